// Block-sparse attention forward on the CPU: flash attention with queries in the lanes.
//
//   S^T = K Q^T;  m, l, P^T = softmax down the columns of S^T;  O^T = O^T * 2^(m_old - m) + V^T P^T
//
// Work is cut by shape alone (so results do not depend on threads): an item is up to 256 queries of one head, taken in
// tiles of up to 4 vectors. An item walks the union of its query blocks' lists in ascending order, a group of blocks at
// a time: every tile that lists a block of the group uses it from L2, while the next group is prefetched. V is wanted
// in panels, and K of 16-bit inputs without a product of their own in fp32: packed for all by whoever uses them first
// where blocks are listed twice and more, else per group. Items are handed out longest first.
//
// Bound: multiply-adds (see cpu_forward_kernels.h). Online softmax: Milakov and Gimelshein 2018; tiling:
// FlashAttention-2, section 3, transposed so that no reduction crosses lanes.
#pragma once

#include "attention/cpu_few_queries.h"
#include "attention/cpu_forward_worker.h"
#include "common/cpu/scratch.h"
#ifdef SPARSEKIT_AMX_PRODUCT
#include "attention/cpu_forward_amx.h"
#endif

namespace sparsekit {
namespace {

template <class Product, DType dtype>
static void forward_worker(int64_t first, int64_t last, void* context) {
  ForwardCall& call = *static_cast<ForwardCall*>(context);
  typename ForwardLoops<Product>::Session session;
  for (int64_t i = first; i < last; ++i) ForwardWorker<Product, dtype>(call, i).run();
  session.release();
}

/// How many query heads of a group one tile takes together, so that decoding reads each key once for all of them: where
/// they share lists and bias, and a query block has few rows.
static int shared_heads(const AttentionForward& p, const Sequence* sequences, int64_t sequence_count) {
  if (p.lists.list_heads > p.heads_kv || p.key_bias_head != 0) return 1;
  int64_t rows = 1, group = p.heads_q / p.heads_kv;
  for (int64_t s = 0; s < sequence_count; ++s) rows = larger(rows, smaller(sequences[s].len_q(), p.lists.block_q));
  int64_t heads = smaller(group, larger(1, tile_lanes / rows));
  while (group % heads != 0) --heads;
  return int(heads);
}

/// Cuts a problem into items; returns how many, and writes them where `items` is not null. By shape, so that results
/// never change: fewer queries per item where there would be too few items to share out, and in the last eighth of the
/// rows, so that no thread works alone for long.
static int64_t cut_forward(const AttentionForward& p, const Sequence* sequences, int64_t sequence_count,
                           int64_t usual_queries, ForwardItem* items) {
  const int heads = shared_heads(p, sequences, sequence_count);
  const int64_t block_q = p.lists.block_q, rows = p.batch * p.heads_q * p.len_q;
  int64_t size = usual_queries;
  while (size > 64 && rows < 64 * size) size /= 2;
  int64_t count = 0, cut = 0;
  for (int64_t b = 0; b < p.batch; ++b)
    for (int64_t h = 0; h < p.heads_q; h += heads)
      for (int64_t s = 0; s < sequence_count; ++s) {
        const int64_t len_q = sequences[s].len_q();
        for (int64_t first = few_queries(sequences[s]) ? len_q : 0, end; first < len_q; first = end) {
          const int64_t queries = (8 * cut < 7 * rows ? size : smaller(size, 64)) / heads;
          // Whole query blocks, or a part of one.
          end = first + (queries < block_q ? queries : queries / block_q * block_q);
          end = smaller(end, smaller(queries < block_q ? (first / block_q + 1) * block_q : len_q, len_q));
          if (items) items[count] = {b, h, s, first, int32_t(end - first), heads};
          ++count;
          cut += (end - first) * heads;
        }
      }
  return count;
}

/// Runs the items. Returns false where memory is short.
template <class Product, DType dtype>
static bool run_items(ForwardCall* call, int64_t entries, const ParallelFor& parallel) {
  using Layout = KeyValueLayout<Product, dtype>;
  const AttentionForward& p = *call->p;
  const int64_t threads = smaller(larger(1, parallel.threads), call->item_count);
  const int64_t heads = p.batch * p.heads_kv, rows = heads * call->packed_rows;
  const int64_t segments = heads * call->k_blocks * ceil_div(p.lists.block_k, segment_keys);
  // One block of memory for all, kept from call to call: the first touch of fresh pages costs as much as packing does.
  Arena memory;
  const int64_t workers_at = memory.reserve(threads * ForwardWorker<Product, dtype>(*call, 0).scratch_bytes());
  // Packing costs about a fortieth of using a block for one tile: once for all pays where blocks are listed twice.
  const bool pack_once = entries > 0 && entries >= 2 * heads * call->k_blocks;
  const int64_t keys_at = memory.reserve(pack_once && !Layout::keys_in_place(p) ? rows * Layout::key_bytes(p) : 0);
  const int64_t values_at = memory.reserve(pack_once ? rows * Layout::value_bytes(p) : 0);
  const int64_t packing_at = memory.reserve(pack_once ? segments : 0);
  memory.data = take_scratch(memory.size);
  if (!memory.data) return false;
  call->workers = memory.data + workers_at;
  if (pack_once) {
    call->packed_keys = memory.data + keys_at;
    call->packed_values = memory.data + values_at;
    call->packing = reinterpret_cast<uint8_t*>(memory.data + packing_at);
    memset(call->packing, not_packed, size_t(segments));
  }
  parallel(0, threads, 1, forward_worker<Product, dtype>, call);
  give_back_scratch(memory.data);
  return true;
}

static Status run_forward(const AttentionForward& p, const ParallelFor& parallel) {
  if (p.batch * p.heads_q * p.len_q == 0) return {};
  const Status no_memory = error(Status::Kind::failed, "attention forward: out of memory");
  const int64_t most_sequences =
      p.packed() ? p.sequences + 1 : 1;  // one more: rows behind the last sequence see no key
  Arena arena;
  int64_t sequences_at = arena.reserve(most_sequences * int64_t(sizeof(Sequence)));
  int64_t packed_row_at = arena.reserve(most_sequences * int64_t(sizeof(int64_t)));
  if (!arena.allocate()) return no_memory;
  Sequence* sequences = reinterpret_cast<Sequence*>(arena.data + sequences_at);
  int64_t* packed_row = reinterpret_cast<int64_t*>(arena.data + packed_row_at);
  int64_t sequence_count = 0, row = 0, packed_rows = 0, k_blocks = 0;
  for (SequenceWalk walk(p); walk.valid(); walk.next()) {
    packed_row[sequence_count] = packed_rows;
    packed_rows += round_up(walk.current.len_k(), 32);
    sequences[sequence_count++] = walk.current;
    row = walk.current.q_end;
    k_blocks = walk.current.k_block + ceil_div(walk.current.len_k(), p.lists.block_k);
  }
  if (row < p.len_q) {
    Sequence rest;
    rest.q_begin = row;
    rest.q_end = p.len_q;
    rest.list_row = -1;
    rest.k_block = k_blocks;
    packed_row[sequence_count] = packed_rows;
    sequences[sequence_count++] = rest;
  }

  Status few = run_few_queries(p, sequences, sequence_count, parallel);
#ifdef SPARSEKIT_AMX_PRODUCT
  constexpr int64_t queries = ForwardLoops<AmxProduct>::usual_queries;
#else
  constexpr int64_t queries = ForwardLoops<FloatProduct>::usual_queries;
#endif
  int64_t count = cut_forward(p, sequences, sequence_count, queries, nullptr);
  if (!few.ok() || count == 0) {
    arena.release();
    return few;
  }
  Arena plan;
  int64_t items_at = plan.reserve(count * int64_t(sizeof(ForwardItem)));
  int64_t order_at = plan.reserve(count * int64_t(sizeof(Ranked)));
  int64_t spare_at = plan.reserve(count * int64_t(sizeof(Ranked)));
  if (!plan.allocate()) {
    arena.release();
    return no_memory;
  }
  ForwardItem* items = reinterpret_cast<ForwardItem*>(plan.data + items_at);
  Ranked* order = reinterpret_cast<Ranked*>(plan.data + order_at);
  cut_forward(p, sequences, sequence_count, queries, items);
  ForwardCall call = {};
  call.p = &p;
  call.sequences = sequences;
  call.sequence_count = sequence_count;
  call.items = items;
  call.order = order;
  call.item_count = count;
  call.packed_row = packed_row;
  call.packed_rows = packed_rows;
  call.k_blocks = k_blocks;
  int64_t all_entries = 0;
  for (int64_t i = 0; i < count; ++i) {
    const Sequence& sequence = sequences[items[i].sequence];
    int64_t entries = 0, block = items[i].first / p.lists.block_q;
    for (; sequence.list_row >= 0 && block * p.lists.block_q < items[i].first + items[i].count; ++block) {
      int64_t number = list_row(p, items[i].batch, items[i].head, sequence.list_row + block);
      entries += list_count(p.lists.partial, number) + list_count(p.lists.full, number);
    }
    call.most_entries = larger(call.most_entries, entries);
    all_entries += entries;
    order[i] = {~uint64_t(entries), int32_t(i)};
  }
  sort(order, reinterpret_cast<Ranked*>(plan.data + spare_at), count);

  bool done = false;
#ifdef SPARSEKIT_AMX_PRODUCT  // takes bf16 only
  done = run_items<AmxProduct, DType::bf16>(&call, all_entries, parallel);
#else
  switch (p.dtype) {
    case DType::f32: done = run_items<FloatProduct, DType::f32>(&call, all_entries, parallel); break;
    case DType::f16: done = run_items<FloatProduct, DType::f16>(&call, all_entries, parallel); break;
#ifdef SPARSEKIT_BF16_PRODUCT
    case DType::bf16: done = run_items<Bf16Product, DType::bf16>(&call, all_entries, parallel); break;
#else
    case DType::bf16: done = run_items<FloatProduct, DType::bf16>(&call, all_entries, parallel); break;
#endif
    case DType::f64: break;  // refused
  }
#endif
  plan.release();
  arena.release();
  return done ? Status{} : no_memory;
}

}  // namespace
}  // namespace sparsekit
