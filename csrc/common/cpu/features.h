// Instruction sets: what the processor and the operating system offer, and what SPARSEKIT_ISA leaves of it.
#pragma once

namespace sparsekit {

enum class Isa { reference, portable, avx2, avx512, avx512_bf16, amx };
constexpr int isa_count = 6;

const char* isa_name(Isa isa);

/// Whether CPUID and XCR0 (the operating system saves the registers) offer this instruction set. Decided once.
bool isa_offered(Isa isa);

/// Whether `vdpbf16ps` is worth using: on Intel's cores it runs slower than fp32 FMA (Sapphire Rapids, one thread:
/// 60 against 146 GFLOP/s), on AMD's twice as fast.
bool bf16_dot_is_fast();

/// The level that SPARSEKIT_ISA asks for, read at each call: kernels above it do not run. Unset or empty: the best.
/// Returns null, or the text of an error: an unknown name, or a level this machine does not offer.
const char* isa_limit(Isa* limit, bool* forced);

/// Why kernels of this instruction set do not run in this call, by the machine and SPARSEKIT_ISA; null: they may. Every
/// family's dispatch table asks this first.
const char* isa_refuses(Isa isa);

}  // namespace sparsekit
