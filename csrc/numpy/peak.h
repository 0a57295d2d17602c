// What this machine does at best, as the benchmarks' yardstick: its vector units' multiply-adds.
#pragma once

#include "sparsekit/types.h"

namespace sparsekit {

/// FLOP/s of independent multiply-adds on registers, on `threads` threads, best of a few runs of some milliseconds:
/// for bf16 AMX tiles where offered, else the faster of vdpbf16ps and FMA; else FMA on the widest registers (fp16 is
/// computed in fp32). 0 off x86-64.
double multiply_add_peak(DType dtype, int threads);

}  // namespace sparsekit
