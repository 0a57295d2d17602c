// Merges the lists of a panel's block rows: a counting sort by window and list, one CTA a panel, a warp a list. Entries
// out of range are left out. Ranks inside a list come from __match_any_sync, so the order is the same every time.
//
// Bound: latency; a few microseconds for the weights of a layer.
#include "matmul/cuda_panels.h"

#include "matmul/cuda_product.cuh"

namespace sparsekit::cuda {
namespace {

constexpr int kThreads = 512, kWarps = kThreads / 32;
constexpr unsigned kAllLanes = 0xffffffffu;

/// Exclusive sum over the CTA's threads; `sums` has 32 numbers. `total` of all.
__device__ int scan(int value, int* sums, int* total) {
  const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32;
  int inclusive = value;
  for (int step = 1; step < 32; step *= 2) {
    const int other = __shfl_up_sync(kAllLanes, inclusive, step);
    if (lane >= step) inclusive += other;
  }
  if (lane == 31) sums[warp] = inclusive;
  __syncthreads();
  int before = 0, all = 0;
  for (int i = 0; i < kWarps; ++i) {
    if (i < warp) before += sums[i];
    all += sums[i];
  }
  __syncthreads();
  *total = all;
  return before + inclusive - value;
}

__global__ void __launch_bounds__(kThreads)
    merge_lists(const __grid_constant__ ProductCall call, const __grid_constant__ Panels panels, bool transposed) {
  extern __shared__ int histogram[];  // [lists][windows], then [windows] where a window's entries begin
  __shared__ int sums[32];
  const int windows = int(panels.windows), lists = panels.lists;
  int* begins = histogram + lists * windows;
  const int64_t panel = blockIdx.x, nnz = call.pattern.nnz;
  const int warp = int(threadIdx.x) / 32, lane = int(threadIdx.x) % 32;
  for (int i = int(threadIdx.x); i < lists * windows; i += kThreads) histogram[i] = 0;
  __syncthreads();

  // Column block of the contraction that an entry stands at, or -1.
  auto neighbour_of = [&](int64_t entry, int64_t end) -> int64_t {
    if (entry >= end) return -1;
    const int64_t neighbour = index_at(call.neighbour, entry);
    const int64_t place = transposed ? index_at(call.place, entry) : entry;
    return neighbour >= 0 && neighbour < call.neighbours && place >= 0 && place < nnz ? neighbour : -1;
  };
  auto extent_of = [&](int list) -> Extent {
    const int64_t at = panel * lists + list;
    if (at >= call.lists) return {0, 0};
    return list_extent(call.offsets, at, nnz);
  };
  for (int list = warp; list < lists; list += kWarps) {
    const Extent extent = extent_of(list);
    for (int64_t entry = extent.begin + lane; entry < extent.end; entry += 32) {
      const int64_t neighbour = neighbour_of(entry, extent.end);
      if (neighbour >= 0) atomicAdd(&histogram[list * windows + int(neighbour * call.inner_size / panels.window)], 1);
    }
  }
  __syncthreads();
  const int64_t base = list_extent(call.offsets, panel * lists, nnz).begin, first = first_step(panels, panel, base);
  int entries_before = 0, steps_before = 0;
  for (int start = 0; start < windows; start += kThreads) {
    const int window = start + int(threadIdx.x);
    int count = 0, split = 0;
    if (window < windows) {
      for (int list = 0; list < lists; ++list) {
        const int own = histogram[list * windows + window];
        histogram[list * windows + window] = count;
        if (list == lists / 2) split = count;
        count += own;
      }
    }
    const int steps = (count + panels.slots - 1) / panels.slots;
    int all_entries, all_steps;
    const int begin = entries_before + scan(count, sums, &all_entries);
    const int step = steps_before + scan(steps, sums, &all_steps);
    if (window < windows) begins[window] = begin;
    for (int i = 0; i < steps; ++i) {
      const int done = i * panels.slots, here = min(count - done, panels.slots);
      if (first + step + i >= panels.most_steps) break;
      panels.steps[first + step + i] = {int32_t(base + begin + done), here, window, min(max(split - done, 0), here)};
    }
    entries_before += all_entries;
    steps_before += all_steps;
  }
  if (threadIdx.x == 0) {
    panels.counts[panel] = int32_t(max(min(int64_t(steps_before), panels.most_steps - first), int64_t(0)));
  }
  __syncthreads();
  for (int list = warp; list < lists; list += kWarps) {
    const Extent extent = extent_of(list);
    for (int64_t from = extent.begin; from < extent.end; from += 32) {
      const int64_t entry = from + lane, neighbour = neighbour_of(entry, extent.end);
      const int inner = neighbour < 0 ? 0 : int(neighbour * call.inner_size);
      const int window = neighbour < 0 ? -1 : inner / panels.window;
      const unsigned same = __match_any_sync(kAllLanes, window);
      const int rank = __popc(same & ((1u << lane) - 1));
      int before = 0;
      if (window >= 0) before = histogram[list * windows + window];
      __syncwarp();
      if (window >= 0 && rank == 0) histogram[list * windows + window] = before + __popc(same);
      __syncwarp();
      if (window >= 0) {
        const int64_t to = base + begins[window] + before + rank;
        const int column = inner % panels.window / call.inner_size;
        if (to < nnz) {
          panels.entries[to] = {int32_t(transposed ? index_at(call.place, entry) : entry), list | column << 8};
        }
      }
    }
  }
}

}  // namespace

Panels panels_of(const ProductCall& call, int window, int slots) {
  Panels panels;
  panels.lists = kPanelFeatures / call.list_size;
  panels.slots = slots;
  panels.window = window;
  panels.panels = (call.lists + panels.lists - 1) / panels.lists;
  panels.windows = (call.inner + window - 1) / window;
  panels.most_steps = panels.panels * (panels.windows + 1) + call.pattern.nnz / slots + 1;
  return panels;
}

size_t panels_bytes(const Panels& panels, int64_t nnz) {
  return size_t(panels.most_steps) * sizeof(PanelStep) + size_t(nnz) * sizeof(PanelEntry) +
         size_t(panels.panels) * sizeof(int32_t);
}

int panels_shared_bytes(const Panels& panels) { return int((panels.lists + 1) * panels.windows * sizeof(int)); }

Status make_panels(Panels* panels, const ProductCall& call, void* workspace, void* stream) {
  panels->steps = static_cast<PanelStep*>(workspace);
  panels->entries = reinterpret_cast<PanelEntry*>(panels->steps + panels->most_steps);
  panels->counts = reinterpret_cast<int32_t*>(panels->entries + call.pattern.nnz);
  const int bytes = panels_shared_bytes(*panels);
  const cudaError_t code = cudaFuncSetAttribute(reinterpret_cast<const void*>(merge_lists),
                                                cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (code != cudaSuccess) return status_of(code, "setting the shared memory of a pattern's panels");
  merge_lists<<<unsigned(panels->panels), kThreads, size_t(bytes), static_cast<cudaStream_t>(stream)>>>(
      call, *panels, call.place.data != nullptr);
  return status_of(cudaGetLastError(), "launching the merging of lists");
}

}  // namespace sparsekit::cuda
