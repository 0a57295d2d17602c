// Attention forward with few queries (decoding): every key and value is read once, where it stands.
//
//   s = q K^T;  m, l, p = softmax along s;  o = o * 2^(m_old - m) + p V          lanes run along the head dimension
//
// Taken by sequences of at most 16 queries. An item is what shares keys and lists: the queries of one sequence, and of
// all query heads of a key head where those share their lists. Its keys are split into shares of `share_keys`, counted
// in list slots, so that the cut depends on the problem and never on the number of threads; whoever finishes the last
// share of an item merges all of them in order. Inside a share keys go in chunks of up to 128, gathered from as many
// blocks as it takes. The scores of a run of chunks, up to the whole share, come before its first weighted sum: memory
// and prefetchers deliver more in long runs along one stream than in turns between K and V, and only lines that are
// asked for in the order in which they stand are a stream (see Asker).
//
// Bound: memory, up to about 8 rows of bf16 or fp32 on one core; beyond that multiply-adds. Split of keys:
// FlashDecoding (Dao et al. 2023). What was measured: docs/attention-performance-cpu.md.
#pragma once

#include "attention/cpu_few_queries_kernels.h"

namespace sparsekit {
namespace {
namespace few {

constexpr int64_t most_shares = 512;  // about, of a call
constexpr int run_scores = 8192;      // floats of scores in a run: 32 KB
constexpr int most_tiles = 4;         // 64 rows; where a group of heads has more, its keys are read more than once

struct Item {
  int64_t batch, head, sequence, first_share;
  int32_t heads, shares;
};
struct Share {
  int32_t item, number;
};

struct Call {
  const AttentionForward* p;
  const Sequence* sequences;
  Item* items;
  Share* shares;
  int32_t* finished;  // [items] shares done
  float* parts;       // [shares][rows of an item][part_stride]: outputs, maximum, sum
  int64_t part_rows, part_stride;
  int64_t item_count, share_count;
  int64_t next;  // the work counter
  int64_t out_of_memory;
};

/// Floats of one row of a part: outputs, padded to whole pairs of vectors, maximum and sum.
static int64_t output_stride(const AttentionProblem& p) { return round_up(p.value_dim, 2 * lanes); }
static int64_t part_stride(const AttentionProblem& p) { return output_stride(p) + 16; }

/// Units of work of one list row: list slots, and inside those the segments of large blocks.
struct Units {
  int64_t slots, parts, at_once, per_share;  // at_once: units that are gathered together, up to `share_keys` keys

  Units(const AttentionProblem& p, const Sequence& sequence, int64_t b, int64_t h) {
    const int64_t row = sequence.list_row < 0 ? 0 : list_row(p, b, h, sequence.list_row);
    slots = sequence.list_row < 0 ? 0 : list_count(p.lists.partial, row) + list_count(p.lists.full, row);
    parts = ceil_div(p.lists.block_k, segment_keys);
    // Smaller shares where there would be few, larger ones where there would be far more than threads: each leaves its
    // outputs in memory.
    const int64_t all_keys = p.batch * p.heads_kv * p.len_k;
    int64_t keys = share_keys;
    while (keys > 512 && all_keys < 64 * keys) keys /= 2;
    at_once = larger(1, keys / smaller(p.lists.block_k, segment_keys));
    per_share = at_once * larger(1, all_keys / (share_keys * most_shares));
  }
  int64_t count() const { return slots * parts; }
  int32_t shares() const { return int32_t(larger(1, ceil_div(count(), per_share))); }
};

/// One thread's work: its scratch memory and the share at hand.
template <class Product, DType dtype>
class Worker {
 public:
  using Element = typename Product::Element;

  explicit Worker(Call& call) : call_(call), p_(*call.p) {
    query_stride_ = round_up(ceil_div(p_.head_dim, Product::pair), lanes);
    output_stride_ = output_stride(p_);
    transform_.needed = p_.softcap > 0 || p_.key_bias || !(p_.scale > 0);
    transform_.scale = p_.scale;
    transform_.softcap = p_.softcap;
    unit_ = transform_.needed ? 1.f : p_.scale * log2_e;
    queries_ = reserve<Element>(most_tiles * tile_rows * query_stride_);
    outputs_ = reserve<float>(most_tiles * tile_rows * output_stride_);
    scores_ = reserve<float>(larger(run_scores, most_tiles * tile_rows * score_stride) + score_stride);
    ready_ = arena_.allocate();
  }
  void release() { arena_.release(); }
  bool ready() const { return ready_; }

  void run(int64_t number) {
    const Share& share = call_.shares[number];
    if (share.item != item_number_) set_item(share.item);
    reset();
    const Units units(p_, *sequence_, item_->batch, item_->head);
    const int64_t first = share.number * units.per_share, last = smaller(first + units.per_share, units.count());
    for (int64_t unit = first; unit < last; unit += units.at_once) {
      gather(unit, smaller(unit + units.at_once, last), units.parts);
      attend();
    }
    store_part(number);
    if (__atomic_add_fetch(&call_.finished[share.item], 1, __ATOMIC_ACQ_REL) == item_->shares) merge();
  }

 private:
  /// The gathered keys: scores of a run of chunks, then for each of them its weights and the sum of its values.
  void attend() {
    if (p_.key_bias) load_bias();
    const int run = int(smaller(share_keys, larger(1, run_scores / (score_rows_ * score_stride)) * chunk_keys));
    const int step = score_rows_ <= 2 ? chunk_keys : step_keys;
    for (int first = 0; first < keys_.count; first += run) {
      const int last = int(smaller(first + run, keys_.count));
      for (int n = first, chunk = 0; n < last; n += chunk_keys, ++chunk) {
        for (int t = 0; t < tile_count_; ++t) multiply_keys(t, chunk, n);
      }
      for (int n = first, chunk = 0; n < last; n += chunk_keys, ++chunk) {
        for (int t = 0; t < tile_count_; ++t) weigh(t, chunk, n);
        // More than two rows take several passes over the columns of V: over what L1 holds beside the rest.
        for (int at = 0; at < chunk_keys && n + at < last; at += step) {
          for (int t = 0; t < tile_count_; ++t) multiply_values(t, chunk, n + at, at, step);
        }
      }
    }
  }

  static constexpr int tile_rows = most_rows < 8 ? 8 : most_rows;  // with room for rows that are computed and dropped

  template <class T>
  int64_t reserve(int64_t count) {
    return arena_.reserve(count * int64_t(sizeof(T)));
  }
  template <class T>
  T* at(int64_t offset) const {
    return reinterpret_cast<T*>(arena_.data + offset);
  }
  Element* queries(int t) const { return at<Element>(queries_) + t * tile_rows * query_stride_; }
  float* scores(int t, int chunk) const {
    return at<float>(scores_) + (chunk * score_rows_ + score_row_[t]) * score_stride;
  }
  float* outputs(int t) const { return at<float>(outputs_) + t * tile_rows * output_stride_; }

  void set_item(int32_t number) {
    item_number_ = number;
    item_ = &call_.items[number];
    sequence_ = &call_.sequences[item_->sequence];
    kv_head_ = item_->head / (p_.heads_q / p_.heads_kv);
    const int count = int(sequence_->len_q());
    const int tiles = int(ceil_div(item_->heads, most_rows / count));
    const int heads = int(ceil_div(item_->heads, tiles));  // of a tile: as even as possible
    tile_count_ = score_rows_ = 0;
    for (int first = 0; first < item_->heads; first += heads, ++tile_count_) {
      const int t = tile_count_, taken = int(smaller(heads, item_->heads - first));
      tile_head_[t] = item_->head + first;
      set_tile(p_, *sequence_, item_->batch, sequence_->q_begin, count, &tiles_[t], taken);
      score_row_[t] = score_rows_;
      score_rows_ += tiles_[t].rows <= 2 ? tiles_[t].rows : int(round_up(tiles_[t].rows, tiles_[t].rows <= 4 ? 4 : 8));
      for (int i = 0; i < tile_rows; ++i) {
        const bool exists = i < tiles_[t].rows;
        const char* row =
            exists ? row_of<dtype>(p_.query, item_->batch, tile_head_[t] + i / count, sequence_->q_begin + i % count)
                   : nullptr;
        for (int64_t step = 0; step < query_stride_; step += lanes) {
          Simd::store_int(queries(t) + i * query_stride_ + step,
                          exists ? Rows<Product, dtype>::along(row, step, p_.head_dim) : Simd::set_int(0));
        }
      }
    }
  }

  void reset() {
    for (int t = 0; t < tile_count_; ++t) {
      for (int i = 0; i < tile_rows; ++i) {
        maximum_[t][i] = -__builtin_inff();
        sum_[t][i] = 0;
      }
      memset(outputs(t), 0, size_t(tile_rows * output_stride_) * sizeof(float));
    }
  }

  /// The keys of some units. Blocks that position hides from every row are not read.
  void gather(int64_t first, int64_t last, int64_t parts) {
    keys_.count = keys_.run_count = 0;
    const int64_t row = list_row(p_, item_->batch, item_->head, sequence_->list_row);
    const int64_t blocks = ceil_div(sequence_->len_k(), p_.lists.block_k);
    const int32_t partial = list_count(p_.lists.partial, row);
    for (int64_t unit = first; unit < last; ++unit) {
      const int64_t slot = unit / parts;
      const bool masked = slot < partial;
      const BlockList& list = masked ? p_.lists.partial : p_.lists.full;
      const int64_t place = row * list.capacity + (masked ? slot : slot - partial);
      const int32_t block = list.indices[place];
      if (block < 0 || block >= blocks) continue;
      Keys::Run& run = keys_.runs[keys_.run_count];
      run.keys = key_segment(p_, *sequence_, item_->batch, block, int(unit % parts));
      if (run.keys.count <= 0 || (masked && hidden(run.keys))) continue;
      run.first = keys_.count;
      run.masked = masked;
      run.bits = masked && p_.lists.bits_index ? p_.lists.bits_index[place] : -1;
      const char* key = row_of<dtype>(p_.key, item_->batch, kv_head_, run.keys.key);
      const char* value = row_of<dtype>(p_.value, item_->batch, kv_head_, run.keys.key);
      for (int n = 0; n < run.keys.count; n += together, keys_.count += together) {
        const int last = int(smaller(run.keys.count - n, together)) - 1, group = keys_.count / together;
        keys_.key[group] = {key + n * key_stride(), last};
        keys_.value[group] = {value + n * value_stride(), last};
      }
      ++keys_.run_count;
    }
    // Beyond, addresses are only asked for: what stands behind the share in memory is most often the next share.
    for (int n = keys_.count / together, end = n + ahead / together; n > 0 && n < end; ++n) {
      keys_.key[n] = behind(keys_.key[n - 1], key_stride());
      keys_.value[n] = behind(keys_.value[n - 1], value_stride());
    }
  }
  static Group behind(const Group& group, int64_t stride) {
    return {reinterpret_cast<const char*>(reinterpret_cast<uintptr_t>(group.first) + uintptr_t(together * stride)),
            together - 1};
  }
  int64_t key_stride() const { return p_.key.row * size_of(dtype); }
  int64_t value_stride() const { return p_.value.row * size_of(dtype); }
  bool hidden(const KeySegment& keys) const {
    if (!p_.has_mask()) return false;
    for (int t = 0; t < tile_count_; ++t) {
      if (keys.least <= tiles_[t].most_high && keys.most >= tiles_[t].least_low) return false;
    }
    return true;
  }

  void load_bias() {
    const float* bias = p_.key_bias + item_->batch * p_.key_bias_batch + item_->head * p_.key_bias_head;
    for (int i = 0; i < keys_.run_count; ++i) {
      const Keys::Run& run = keys_.runs[i];
      for (int n = 0; n < run.keys.count; ++n) bias_[run.first + n] = bias_in_units(bias[run.keys.key + n]);
    }
  }
  /// The lowest finite bias stays finite: a row that sees only such keys weighs them evenly.
  static float bias_in_units(float bias) {
    const float scaled = bias * log2_e;
    return scaled < -__FLT_MAX__ && bias >= -__FLT_MAX__ ? -__FLT_MAX__ : scaled;
  }

  /// Scores of chunk number `chunk` of the run, which begins with key `n` of the share.
  void multiply_keys(int t, int chunk, int n) {
    few::multiply_keys<Product, dtype>(keys_.key + n / together, key_stride(),
                                       int(smaller(keys_.count - n, chunk_keys)), queries(t), query_stride_,
                                       tiles_[t].rows, p_.head_dim, scores(t, chunk));
  }

  /// The weights of a chunk that begins with key `first` of the share, from its scores.
  void weigh(int t, int chunk, int first) {
    const int rows = tiles_[t].rows, count = int(smaller(keys_.count - first, chunk_keys));
    if (transform_.needed) {
      for (int r = 0; r < rows; ++r) {
        transform_scores(transform_, p_.key_bias ? bias_ + first : nullptr, count, scores(t, chunk) + r * score_stride);
      }
    }
    for (int i = 0; i < keys_.run_count; ++i) {
      const Keys::Run& run = keys_.runs[i];
      const int begin = int(larger(run.first, first)), end = int(smaller(run.end(), first + count));
      const int padded = int(smaller(run.first + round_up(run.keys.count, together), first + count));
      if (begin >= padded) continue;
      const Visible visible = mask_.set(p_, tiles_[t], run.keys, run.masked, run.bits);
      for (int r = 0; r < rows && (visible != Visible::all || end < padded); ++r) {
        float* row = scores(t, chunk) + r * score_stride - first;
        if (visible == Visible::some) {
          mask_scores(mask_, r, run.keys, begin - run.first, end - run.first, row + begin);
        }
        for (int n = visible == Visible::none ? begin : end; n < padded; ++n) row[n] = -__builtin_inff();
      }
    }
    for (int r = 0; r < rows; ++r) {
      rescale_[t][r] =
          softmax_row<Product>(scores(t, chunk) + r * score_stride, count, unit_, &maximum_[t][r], &sum_[t][r]);
    }
  }

  void multiply_values(int t, int chunk, int n, int at, int step) {
    few::multiply_values<Product, dtype>(keys_.value + n / together, value_stride(),
                                         int(smaller(keys_.count - n, step)), scores(t, chunk) + at / Product::pair,
                                         rescale_[t], tiles_[t].rows, p_.value_dim, outputs(t), output_stride_);
    for (int r = 0; r < tiles_[t].rows; ++r) rescale_[t][r] = 1;
  }

  float* part(int64_t share, int row) const {
    return call_.parts + (share * call_.part_rows + row) * call_.part_stride;
  }
  void store_part(int64_t share) {
    for (int t = 0, row = 0; t < tile_count_; ++t) {
      for (int i = 0; i < tiles_[t].rows; ++i, ++row) {
        float* to = part(share, row);
        memcpy(to, outputs(t) + i * output_stride_, size_t(output_stride_) * sizeof(float));
        to[output_stride_] = maximum_[t][i];
        to[output_stride_ + 1] = sum_[t][i];
      }
    }
  }

  /// out = O / (l + 2^(sink - m)) and lse, of O, l and m of all shares.
  void merge() {
    const int queries = int(sequence_->len_q());
    for (int row = 0; row < item_->heads * queries; ++row) {
      const int64_t head = item_->head + row / queries, query = sequence_->q_begin + row % queries;
      float maximum = -__builtin_inff(), sum = 0;
      for (int s = 0; s < item_->shares; ++s) {
        const float found = part(item_->first_share + s, row)[output_stride_];
        maximum = found > maximum ? found : maximum;
      }
      const float base = maximum == -__builtin_inff() ? 0 : maximum;
      float* outputs = this->outputs(0);
      for (int s = 0; s < item_->shares; ++s) {
        const float* from = part(item_->first_share + s, row);
        const float weight = __builtin_exp2f(from[output_stride_] - base);
        sum += weight * from[output_stride_ + 1];
        for (int64_t d = 0; d < p_.value_dim; d += lanes) {
          const Simd::Float share = Simd::mul(Simd::set(weight), Simd::load(from + d));
          Simd::store(outputs + d, s == 0 ? share : Simd::add(Simd::load(outputs + d), share));
        }
      }
      const bool empty = sum == 0;
      float total = sum;
      if (p_.sinks) total += __builtin_exp2f(p_.sinks[head] * log2_e - base);
      float lse = empty ? -__builtin_inff() : maximum * ln_2 + __builtin_logf(sum);
      if (maximum == -__FLT_MAX__) lse = maximum;  // a bias that bias_in_units kept finite
      p_.lse[(item_->batch * p_.heads_q + head) * p_.len_q + query] = lse;
      char* out = static_cast<char*>(p_.out.data) + p_.out.offset(item_->batch, head, query) * size_of(dtype);
      const Simd::Float factor = Simd::set(1 / total);
      for (int64_t d = 0; d < p_.value_dim; d += lanes) {
        const Simd::Float value = empty ? Simd::zero() : Simd::mul(Simd::load(outputs + d), factor);
        store_row<dtype>(out, d, int(smaller(p_.value_dim - d, lanes)), value);
      }
    }
  }

  Call& call_;
  const AttentionForward& p_;
  Arena arena_;
  bool ready_ = false;
  int64_t query_stride_, output_stride_;
  ScoreTransform transform_;
  float unit_;
  int64_t queries_, outputs_, scores_;

  int32_t item_number_ = -1;
  const Item* item_ = nullptr;
  const Sequence* sequence_ = nullptr;
  int64_t kv_head_ = 0;
  int tile_count_ = 0;
  int64_t tile_head_[most_tiles];
  int score_row_[most_tiles], score_rows_ = 1;  // first row of scores of each tile, and of all, with dropped ones
  QueryTile tiles_[most_tiles];
  float maximum_[most_tiles][tile_rows], sum_[most_tiles][tile_rows], rescale_[most_tiles][tile_rows] = {};
  alignas(64) float bias_[share_keys + 16] = {};
  Keys keys_;
  PairMask mask_;
};

template <class Product, DType dtype>
static void work(int64_t first, int64_t last, void* context) {
  Call& call = *static_cast<Call*>(context);
  for (int64_t i = first; i < last; ++i) {
    Worker<Product, dtype> worker(call);
    if (!worker.ready()) {
      __atomic_store_n(&call.out_of_memory, 1, __ATOMIC_RELAXED);
      return;
    }
    for (int64_t next; (next = __atomic_fetch_add(&call.next, 1, __ATOMIC_RELAXED)) < call.share_count;) {
      worker.run(next);
    }
    worker.release();
  }
}

template <class Product, DType dtype>
static void run(Call* call, const ParallelFor& parallel) {
  parallel(0, smaller(larger(1, parallel.threads), call->share_count), 1, work<Product, dtype>, call);
}

}  // namespace few

/// Whether the rows of a sequence are taken by run_few_queries.
SPARSEKIT_INLINE bool few_queries(const Sequence& sequence) {
  return sequence.len_q() > 0 && sequence.len_q() <= few::most_rows;
}

/// How many query heads of a group one item takes: all that share lists and bias, and fit.
static int few_queries_heads(const AttentionForward& p, const Sequence& sequence) {
  if (p.lists.list_heads > p.heads_kv || p.key_bias_head != 0) return 1;
  const int64_t group = p.heads_q / p.heads_kv, in_tile = few::most_rows / sequence.len_q();
  int64_t heads = smaller(group, few::most_tiles * in_tile);
  while (group % heads != 0) --heads;
  return int(heads);
}

/// Cuts the rows of all sequences that have few queries into items and shares: counts them in `call`, and writes them
/// where it has memory for them.
static void cut_few_queries(const AttentionForward& p, const Sequence* sequences, int64_t sequence_count,
                            few::Call* call) {
  call->item_count = call->share_count = 0;
  for (int64_t s = 0; s < sequence_count; ++s) {
    if (!few_queries(sequences[s])) continue;
    const int heads = few_queries_heads(p, sequences[s]);
    call->part_rows = larger(call->part_rows, heads * sequences[s].len_q());
    for (int64_t b = 0; b < p.batch; ++b) {
      for (int64_t h = 0; h < p.heads_q; h += heads) {
        const int64_t item = call->item_count++, share = call->share_count;
        const int32_t shares = few::Units(p, sequences[s], b, h).shares();
        call->share_count += shares;
        if (!call->items) continue;
        call->items[item] = {b, h, s, share, heads, shares};
        for (int32_t i = 0; i < shares; ++i) call->shares[share + i] = {int32_t(item), i};
      }
    }
  }
}

/// The rows of all sequences that have few queries.
static Status run_few_queries(const AttentionForward& p, const Sequence* sequences, int64_t sequence_count,
                              const ParallelFor& parallel) {
  const Status no_memory = error(Status::Kind::failed, "attention forward: out of memory");
  few::Call call = {};
  cut_few_queries(p, sequences, sequence_count, &call);
  if (call.item_count == 0) return {};
  call.p = &p;
  call.sequences = sequences;
  call.part_stride = few::part_stride(p);
  Arena arena;
  const int64_t items_at = arena.reserve(call.item_count * int64_t(sizeof(few::Item)));
  const int64_t shares_at = arena.reserve(call.share_count * int64_t(sizeof(few::Share)));
  const int64_t finished_at = arena.reserve(call.item_count * int64_t(sizeof(int32_t)));
  const int64_t parts_at = arena.reserve(call.share_count * call.part_rows * call.part_stride * int64_t(sizeof(float)));
  if (!arena.allocate()) return no_memory;
  call.items = reinterpret_cast<few::Item*>(arena.data + items_at);
  call.shares = reinterpret_cast<few::Share*>(arena.data + shares_at);
  call.finished = reinterpret_cast<int32_t*>(arena.data + finished_at);
  call.parts = reinterpret_cast<float*>(arena.data + parts_at);
  memset(call.finished, 0, size_t(call.item_count) * sizeof(int32_t));
  cut_few_queries(p, sequences, sequence_count, &call);
#ifdef SPARSEKIT_AMX_PRODUCT  // takes bf16 only; the processors that have AMX run vdpbf16ps slower than fp32
  few::run<FloatProduct, DType::bf16>(&call, parallel);
#else
  switch (p.dtype) {
    case DType::f32: few::run<FloatProduct, DType::f32>(&call, parallel); break;
    case DType::f16: few::run<FloatProduct, DType::f16>(&call, parallel); break;
#ifdef SPARSEKIT_BF16_PRODUCT
    case DType::bf16: few::run<Bf16Product, DType::bf16>(&call, parallel); break;
#else
    case DType::bf16: few::run<FloatProduct, DType::bf16>(&call, parallel); break;
#endif
    case DType::f64: break;  // refused
  }
#endif
  arena.release();
  return call.out_of_memory ? no_memory : Status{};
}

}  // namespace
}  // namespace sparsekit
