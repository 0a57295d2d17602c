// Attention backward: which tiles each head-dim class takes, and the launches of one element type.
#pragma once

#include "attention/cuda_backward_keys.cuh"
#include "attention/cuda_backward_queries.cuh"

namespace sparsekit::cuda {

/// Launches the kernels that depend on the element type: everything but the preparation of the rows.
template <class Element>
Status launch_backward(BackwardPlan plan, cudaStream_t stream);

/// Rows of the scratch are padded to the largest query tile.
constexpr int kPadRows = 64;

/// Head-dim class of a problem: the larger of both dims, rounded up.
constexpr int backward_dim(DType dtype, int head_dim, int value_dim) {
  const int dim = head_dim > value_dim ? head_dim : value_dim;
  if (dtype == DType::f32) return dim <= 64 ? 64 : dim <= 128 ? 128 : 256;
  return dim <= 64 ? 64 : dim <= 96 ? 96 : dim <= 128 ? 128 : 256;
}

template <class Kernel>
Status launch(Kernel kernel, dim3 grid, int threads, int bytes, const BackwardPlan& plan, cudaStream_t stream) {
  cudaError_t code = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (code != cudaSuccess) return status_of(code, "attention backward: reserving shared memory");
  kernel<<<grid, threads, bytes, stream>>>(plan);
  return status_of(cudaGetLastError(), "attention backward: launch");
}

template <class Tiles>
Status launch_tiles(BackwardPlan plan, const SharedMemory& available, cudaStream_t stream) {
  const AttentionBackward& a = plan.a;
  const bool bias = a.grad_key_bias != nullptr;
  const auto tiles = [](int64_t length, int tile) { return unsigned((length + tile - 1) / tile); };
  const dim3 query_grid(tiles(a.len_q, Tiles::TILE_Q), unsigned(a.heads_q), unsigned(a.batch));
  const dim3 key_grid(unsigned(a.k_blocks() * (a.lists.block_k / Tiles::TILE_K)), unsigned(a.heads_kv),
                      unsigned(a.batch));

  if (key_grid.x > 0) {
    // Two buffers hide the loads inside a CTA, a second CTA hides them too and the barriers as well: where only one of
    // both fits, more CTAs win. A CTA costs 1 KB more than it asks for.
    const auto ctas = [&](int stages) {
      const int bytes = KeysSharedMemory<Tiles>(stages, bias).bytes;
      if (bytes > available.per_block) return 0;
      const int fitting = available.per_multiprocessor / (bytes + 1024);
      return fitting < Tiles::CTAS ? fitting : Tiles::CTAS;
    };
    plan.stages = ctas(2) >= ctas(1) ? 2 : 1;
    const int bytes = KeysSharedMemory<Tiles>(plan.stages, bias).bytes;
    if (bytes > available.per_block) {
      return error(Status::Kind::unsupported,
                   "attention backward: head dims %d / %d need %d bytes of shared memory, this GPU has %d", a.head_dim,
                   a.value_dim, bytes, available.per_block);
    }
    Status status = launch(backward_keys<Tiles>, key_grid, Tiles::THREADS, bytes, plan, stream);
    if (!status.ok()) return status;
  }
  if (query_grid.x == 0) return {};
  if (plan.query_sum) {
    return launch(finish_queries<Tiles>, query_grid, Tiles::THREADS, Tiles::Q_BYTES, plan, stream);
  }
  plan.stages = QueriesSharedMemory<Tiles>(2).bytes <= available.per_block ? 2 : 1;
  return launch(backward_queries<Tiles>, query_grid, Tiles::THREADS, QueriesSharedMemory<Tiles>(plan.stages).bytes,
                plan, stream);
}

/// 16-bit elements: 64 x 64 tiles and 4 warps of 32 x 32 scores, so that 2 (dim 128) or 3 (dim 64) CTAs share a
/// multiprocessor and one computes weights while another multiplies.
///                                               dim  Q   K   warps Q K CTAs
template <class Element>
using Backward64 = BackwardTiles<Element, 64, 64, 64, 4, 2, 2, 3>;
template <class Element>
using Backward96 = BackwardTiles<Element, 96, 64, 64, 4, 2, 2, 2>;
template <class Element>
using Backward128 = BackwardTiles<Element, 128, 64, 64, 4, 2, 2, 2>;
template <class Element>
using Backward256 = BackwardTiles<Element, 256, 64, 64, 8, 4, 2, 1>;
/// fp32: 32 x 32 tiles, so that dim 256 fits.
using Backward64Float = BackwardTiles<float, 64, 32, 32, 4, 2, 2, 3>;
using Backward128Float = BackwardTiles<float, 128, 32, 32, 4, 2, 2, 2>;
using Backward256Float = BackwardTiles<float, 256, 32, 32, 4, 2, 2, 1>;

template <class Element>
Status launch_backward(BackwardPlan plan, cudaStream_t stream) {
  SharedMemory available;
  Status status = shared_memory_of_device(&available);
  if (!status.ok()) return status;
  const int dim = backward_dim(plan.a.dtype, plan.a.head_dim, plan.a.value_dim);
  if constexpr (sizeof(Element) == 4) {
    switch (dim) {
      case 64: return launch_tiles<Backward64Float>(plan, available, stream);
      case 128: return launch_tiles<Backward128Float>(plan, available, stream);
      default: return launch_tiles<Backward256Float>(plan, available, stream);
    }
  } else {
    switch (dim) {
      case 64: return launch_tiles<Backward64<Element>>(plan, available, stream);
      case 96: return launch_tiles<Backward96<Element>>(plan, available, stream);
      case 128: return launch_tiles<Backward128<Element>>(plan, available, stream);
      default: return launch_tiles<Backward256<Element>>(plan, available, stream);
    }
  }
}

}  // namespace sparsekit::cuda
