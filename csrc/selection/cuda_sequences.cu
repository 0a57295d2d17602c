// Where the sequences of a packed batch begin, in rows and in blocks: one warp, once per call.
#include "selection/cuda_support.cuh"

namespace sparsekit::cuda {
namespace {

/// One warp: lengths are clamped to the tensors, whatever cu_seqlens hold.
__global__ void list_spans(Spans spans) {
  int64_t rows = 0, blocks = 0;
  for (int first = 0; first < spans.sequences; first += kWarp) {
    const int s = first + lane_of();
    Span span = {0, 0, 0, 0, 0, 0, s};
    if (s < spans.sequences) {
      span.q_begin = int(clamped(spans.cu_q[s], 0, spans.len_q));
      span.q_end = int(clamped(spans.cu_q[s + 1], span.q_begin, spans.len_q));
      span.k_begin = int(clamped(spans.cu_k[s], 0, spans.len_k));
      span.k_end = int(clamped(spans.cu_k[s + 1], span.k_begin, spans.len_k));
    }
    const int64_t own_rows = ceil_div(int64_t(span.len_q()), int64_t(spans.block_q));
    const int64_t own_blocks = ceil_div(int64_t(span.len_k()), int64_t(spans.block_k));
    const int64_t row_end = rows + warp_scan(own_rows), block_end = blocks + warp_scan(own_blocks);
    span.list_row = int(clamped(row_end - own_rows, 0, INT32_MAX));
    span.k_block = int(clamped(block_end - own_blocks, 0, INT32_MAX));
    if (s < spans.sequences) spans.table[s] = span;
    rows = __shfl_sync(kLanes, row_end, kWarp - 1);
    blocks = __shfl_sync(kLanes, block_end, kWarp - 1);
  }
}

}  // namespace

void list_spans_of(const Spans& spans, cudaStream_t stream) {
  if (spans.table && spans.sequences > 0) launch(list_spans, 1, kWarp, 0, stream, spans);
}

}  // namespace sparsekit::cuda
