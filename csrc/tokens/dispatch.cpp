// Which kernels run, and how their work is cut: in chunks of about 128 KB of result, by shape alone.
#include "common/cpu/features.h"
#include "common/cpu/scratch.h"
#include "tokens/check.h"
#include "tokens/match.h"
#include "tokens/plan.h"

#include <atomic>
#include <cstring>

namespace sparsekit {
namespace {

using Kind = Status::Kind;

struct Entry {
  const TokenKernels* kernels;
  Isa isa;
};

constexpr Entry table[] = {
#ifdef SPARSEKIT_X86
    {&tokens_cpu_avx512_bf16, Isa::avx512_bf16}, {&tokens_cpu_avx512, Isa::avx512},       {&tokens_cpu_avx2, Isa::avx2},
#endif
    {&tokens_cpu_portable, Isa::portable},       {&tokens_cpu_reference, Isa::reference},
};

constexpr int64_t chunk_bytes = 128 << 10;
// Results beyond this are written around the caches (see cpu_rows.h): smaller ones may still be there for their reader.
constexpr int64_t stream_bytes = 16 << 20;

Status check_isa() {
  Isa limit;
  bool forced;
  const char* text = isa_limit(&limit, &forced);
  return text ? error(Kind::invalid_argument, "%s", text) : Status{};
}

/// The kernels for sums of `type`, or for copies of anything (`sums` false).
const TokenKernels& kernels_for(TokenType type, bool sums, bool f64_coefficients) {
  for (const Entry& entry : table) {
    if (isa_refuses(entry.isa)) continue;
    if (!sums || !entry.kernels->refuses_rows(type, f64_coefficients)) return *entry.kernels;
  }
  return tokens_cpu_reference;
}

/// Combinations of several tensors as one range of chunks. Sample number `samples` of a packed result is the rows after
/// the last sample.
struct Combination {
  struct Part {
    RowTask task;
    const TokenKernels* kernels;
    int64_t rows;       // of a chunk
    int64_t per_outer;  // chunks
    int64_t first;      // chunk
  };
  std::vector<Part> parts;
  int64_t samples, chunks = 0;

  Combination(const RowPlan& plan, const TokenTensor* in, const TokenTensor* base, const TokenTensor* out,
              int64_t tensors, bool sums) {
    samples = plan.to.samples + (plan.to.cu_seqlens ? 1 : 0);
    int64_t bytes = 0;
    for (int64_t i = 0; i < tensors; ++i) bytes += plan.to.samples * out[i].outers * plan.out_rows * out[i].row_bytes();
    for (int64_t i = 0; i < tensors; ++i) {
      Part part;
      part.task = {&plan, in[i], base ? base[i] : TokenTensor{}, out[i], bytes > stream_bytes};
      part.kernels = &kernels_for(out[i].type, sums, plan.coefficients_f64);
      int64_t row_bytes = out[i].row_bytes() > 0 ? out[i].row_bytes() : 1;
      part.rows = row_bytes < chunk_bytes ? chunk_bytes / row_bytes : 1;
      int64_t longest = plan.to.cu_seqlens ? plan.to.rows : plan.out_rows;
      part.per_outer = (longest + part.rows - 1) / part.rows;
      part.first = chunks;
      if (out[i].row_bytes() > 0) chunks += samples * out[i].outers * part.per_outer;
      parts.push_back(part);
    }
  }

  void run_chunk(int64_t chunk) const {
    size_t i = parts.size() - 1;
    while (parts[i].first > chunk) --i;
    const Part& part = parts[i];
    const RowTask& task = part.task;
    const TokenRows& to = task.plan->to;
    int64_t at = chunk - part.first, first = at % part.per_outer * part.rows;
    int64_t o = at / part.per_outer % task.out.outers, s = at / part.per_outer / task.out.outers;
    bool tail = s == to.samples;
    int64_t count = tail ? to.rows - to.cu_seqlens[s] : to.cu_seqlens ? to.count(s) : task.plan->out_rows;
    int64_t last = first + part.rows < count ? first + part.rows : count;
    if (first >= last) return;
    if (!tail) return part.kernels->combine(task, s, o, first, last);
    for (int64_t r = first; r < last; ++r) {  // belongs to no sample: cu_seqlens[samples] is where it begins
      if (task.base.data) {
        std::memcpy(task.out_row(s, o, r), task.base_row(s, o, r), size_t(task.out.row_bytes()));
      } else {
        std::memset(task.out_row(s, o, r), 0, size_t(task.out.row_bytes()));
      }
    }
  }

  void run(const ParallelFor& parallel) const {
    auto body = [](int64_t first, int64_t last, void* context) {
      for (int64_t at = first; at < last; ++at) static_cast<const Combination*>(context)->run_chunk(at);
    };
    parallel(0, chunks, 1, body, const_cast<Combination*>(this));
  }
};

/// What becomes of the dot product of an entry that went to row n.
template <class Float>
void finish(Float& sum, const Float* totals, const Float* grad_totals, int64_t n, bool mean) {
  if (mean) sum = totals[n] == 0 ? 0 : sum / totals[n];
  if (grad_totals) sum += grad_totals[n];
}

/// grad_weights: the dot products, then what a mean makes of them.
void weight_gradients(const ScatterTokensBackward& b, const std::vector<int32_t>& targets,
                      const ParallelFor& parallel) {
  const ScatterTokens& t = b.forward;
  struct Context {
    const ScatterTokensBackward& b;
    const int32_t* targets;
    int64_t rows, per_sample;  // of a chunk; chunks of a sample
  } context{b, targets.data(), 64, (t.index.rows + 63) / 64};
  auto body = [](int64_t first, int64_t last, void* opaque) {
    const Context& c = *static_cast<const Context*>(opaque);
    const ScatterTokens& t = c.b.forward;
    const bool mean = t.reduce == TokenReduce::mean;
    for (int64_t at = first; at < last; ++at) {
      const int64_t s = at / c.per_sample, row = at % c.per_sample * c.rows;
      const int64_t end = row + c.rows < t.index.rows ? row + c.rows : t.index.rows;
      const int64_t begin_entry = (s * t.index.rows + row) * t.index.per_row;
      const int64_t end_entry = (s * t.index.rows + end) * t.index.per_row;
      float* sums = static_cast<float*>(c.b.grad_weights);
      double* sums_f64 = static_cast<double*>(c.b.grad_weights);
      for (int64_t e = begin_entry; e < end_entry; ++e) t.weights_f64 ? void(sums_f64[e] = 0) : void(sums[e] = 0);
      if (t.reduce == TokenReduce::copy) continue;
      for (int64_t i = 0; i < t.tensors; ++i) {
        DotTask task{t.from,           t.to,
                     c.targets,        t.index.rows,
                     t.index.per_row,  c.b.grad_out[i],
                     t.in[i],          mean ? t.out[i] : TokenTensor{},
                     c.b.grad_weights, t.weights_f64};
        const TokenKernels& kernels = kernels_for(t.in[i].type, true, t.weights_f64);
        for (int64_t o = 0; o < t.in[i].outers; ++o) kernels.dots(task, s, o, row, end);
      }
      for (int64_t e = begin_entry; e < end_entry; ++e) {
        if (c.targets[e] < 0) continue;
        const int64_t n = (t.to.cu_seqlens ? t.to.cu_seqlens[s] : s * t.to.rows) + c.targets[e];
        if (t.weights_f64) {
          finish(sums_f64[e], static_cast<const double*>(t.totals), static_cast<const double*>(c.b.grad_totals), n,
                 mean);
        } else {
          finish(sums[e], static_cast<const float*>(t.totals), static_cast<const float*>(c.b.grad_totals), n, mean);
        }
      }
    }
  };
  parallel(0, t.from.samples * context.per_sample, 1, body, &context);
}

}  // namespace

TokensPlan tokens_plan(TokenType type, bool match) {
  TokensPlan plan;
  for (const Entry& entry : table) {
    const char* reason = isa_refuses(entry.isa);
    DType dtype = type == TokenType::f64    ? DType::f64
                  : type == TokenType::f16  ? DType::f16
                  : type == TokenType::bf16 ? DType::bf16
                                            : DType::f32;
    if (!reason) reason = match ? entry.kernels->refuses_match(dtype) : entry.kernels->refuses_rows(type, false);
    plan.entries[plan.count++] = {entry.kernels->name, reason};
  }
  return plan;
}

Status gather_tokens(const GatherTokens& g, const ParallelFor& parallel) {
  Status status = check_isa();
  OwnedPlan owned;
  if (status.ok()) status = plan_gather(g, parallel, &owned);
  if (!status.ok()) return status;
  Combination(owned.plan, g.in, nullptr, g.out, g.tensors, /*sums=*/false).run(parallel);
  return {};
}

Status scatter_tokens(const ScatterTokens& t, const ParallelFor& parallel) {
  Status status = check_isa();
  OwnedPlan owned;
  if (status.ok()) status = check_token_types(t);
  if (status.ok()) status = plan_scatter(t, parallel, &owned);
  if (!status.ok()) return status;
  Combination(owned.plan, t.in, t.base, t.out, t.tensors, t.reduce != TokenReduce::copy).run(parallel);
  return {};
}

Status scatter_tokens_backward(const ScatterTokensBackward& b, const ParallelFor& parallel) {
  Status status = check_isa();
  OwnedPlan owned;
  if (status.ok()) status = plan_scatter_backward(b.forward, parallel, &owned);
  if (!status.ok()) return status;
  const ScatterTokens& t = b.forward;
  if (b.grad_in) {
    bool sums = t.reduce != TokenReduce::copy || t.index.per_row > 1;
    Combination(owned.plan, b.grad_out, nullptr, b.grad_in, t.tensors, sums).run(parallel);
  }
  if (b.grad_weights) weight_gradients(b, owned.targets, parallel);
  return {};
}

char* match_memory(MatchMemory* memory, int64_t bytes) {
  if (memory->bytes >= bytes) return memory->data;
  give_back_scratch(memory->data);
  memory->data = take_scratch(bytes);
  memory->bytes = memory->data ? bytes : 0;
  return memory->data;
}

Status match_tokens_search(const NearestTask& task, const ParallelFor& parallel) {
  Status status = check_isa();
  if (!status.ok()) return status;
  const TokenKernels* kernels = &tokens_cpu_reference;
  for (const Entry& entry : table) {
    if (isa_refuses(entry.isa) || entry.kernels->refuses_match(task.match->dtype)) continue;
    kernels = entry.kernels;
    break;
  }
  // At most 256 sources an item, or 512 where there are samples enough; all items have about as many. Packing the
  // destinations costs as much as 10 sources, or 60 where the products are the integers of cpu_match_screened.h.
  const int64_t most = task.match->samples >= 32 ? 512 : 256;
  struct Context {
    const NearestTask& task;
    const TokenKernels& kernels;
    int64_t items, rows;  // of a sample
    std::atomic<bool> failed;
  } context{task, *kernels, (task.sources + most - 1) / most, 0, {false}};
  if (task.sources == 0) return {};
  context.rows = (task.sources + context.items - 1) / context.items;
  auto body = [](int64_t first, int64_t last, void* opaque) {
    Context& c = *static_cast<Context*>(opaque);
    MatchMemory memory;
    for (int64_t at = first; at < last; ++at) {
      const int64_t s = at / c.items, begin = at % c.items * c.rows;
      const int64_t exist = (c.task.count(s) + 1) / 2, end = begin + c.rows < exist ? begin + c.rows : exist;
      if (begin < end && !c.kernels.nearest(c.task, s, begin, end, &memory)) c.failed = true;
    }
    give_back_scratch(memory.data);
  };
  parallel(0, task.match->samples * context.items, 1, body, &context);
  if (context.failed) return error(Kind::failed, "out of memory in bipartite_match");
  return {};
}

}  // namespace sparsekit
