// Threads for callers that bring none: the NumPy module, the C++ tests and the microbenchmarks. The torch adapter
// passes torch's own pool instead.
#pragma once

#include "sparsekit/parallel.h"

namespace sparsekit {

/// A ParallelFor over at most `threads` threads, the caller's among them; 0: SPARSEKIT_NUM_THREADS, or as many as the
/// process may run on. Ranges are handed out one after the other, so uneven work balances. Calls may nest, come from
/// several threads at once, and go on after a fork.
ParallelFor thread_pool(int32_t threads = 0);

}  // namespace sparsekit
