// The lists of several block rows merged, for kernels that share the tiles of x among them (cuda_panels_sm80.cuh).
//
// A panel is 256 features, `lists` = 256 / list_size block rows (x W: block columns). The contraction is cut into
// windows of 64; a panel's entries are sorted by window, then by list. A step is up to `slots` entries of one window:
// all that there can be, unless blocks are listed twice.
#pragma once

#include <cstddef>

#include "common/cuda/launch.h"
#include "sparsekit/matmul.h"

namespace sparsekit::cuda {

struct ProductCall;

constexpr int kPanelFeatures = 256;

struct PanelEntry {
  int32_t place;  // in values
  int32_t at;     // list in the panel | block column in the window << 8
};

struct PanelStep {
  int32_t begin, count;  // entries
  int32_t window;
  int32_t split;  // how many of the entries are of the first half of the lists
};

struct Panels {
  int lists = 0, slots = 0, window = 0;
  int64_t panels = 0, windows = 0;
  int64_t most_steps = 0;         // of all panels
  PanelEntry* entries = nullptr;  // [nnz]
  PanelStep* steps = nullptr;     // [most_steps]; panel i's begin at first_step(i, its first entry)
  int32_t* counts = nullptr;      // [panels]
};

/// Sizes only; `window` is a multiple of call.inner_size.
Panels panels_of(const ProductCall& call, int window, int slots);
size_t panels_bytes(const Panels& panels, int64_t nnz);
int panels_shared_bytes(const Panels& panels);

/// Points into `workspace` and launches the kernel that fills it.
Status make_panels(Panels* panels, const ProductCall& call, void* workspace, void* stream);

#ifdef __CUDACC__
__host__ __device__ __forceinline__ int64_t first_step(const Panels& panels, int64_t panel, int64_t first_entry) {
  return panel * (panels.windows + 1) + first_entry / panels.slots;
}
#endif

}  // namespace sparsekit::cuda
