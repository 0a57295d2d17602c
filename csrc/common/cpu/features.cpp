#include "common/cpu/features.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>

#ifdef __linux__
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace sparsekit {
namespace {

constexpr const char* names[isa_count] = {"reference", "portable", "avx2", "avx512", "avx512_bf16", "amx"};

#if defined(SPARSEKIT_X86) && !defined(SPARSEKIT_AMX_EMULATION)
/// Whether threads of this process may use tile registers. Linux wants to be asked, once per process: their 8 KB would
/// not fit the signal stacks of programs that do not know them. It says no where some signal stack is too small.
bool tiles_granted() {
#if defined(__linux__) && defined(__x86_64__)
  constexpr int request_permission = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILE_DATA
  return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
#else
  return false;
#endif
}
#endif

struct Features {
  bool offered[isa_count] = {true, true, false, false, false, false};
  const char* amx_refusal = nullptr;  // where it is not offered
  bool intel = false;

  Features() {
#ifdef SPARSEKIT_X86
    // The compiler's run-time library reads CPUID and, for registers wider than SSE, XCR0.
    __builtin_cpu_init();
    bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c") &&
                __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2");
    bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                  __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    bool bf16 = avx512 && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni");
    offered[int(Isa::avx2)] = avx2;
    offered[int(Isa::avx512)] = avx512;
    offered[int(Isa::avx512_bf16)] = bf16;
#ifdef SPARSEKIT_AMX_EMULATION
    offered[int(Isa::amx)] = bf16;
#else
    const bool tiles = bf16 && __builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-bf16");
    offered[int(Isa::amx)] = tiles && tiles_granted();
    if (tiles && !offered[int(Isa::amx)]) amx_refusal = "the operating system does not grant tile registers";
#endif
    intel = __builtin_cpu_is("intel");
#endif
  }
};

const Features& features() {
  static const Features once;
  return once;
}

/// Of a level that is not offered.
const char* why_not(Isa isa) {
  const char* amx_refusal = isa == Isa::amx ? features().amx_refusal : nullptr;
  return amx_refusal ? amx_refusal : "this processor does not offer it";
}

}  // namespace

const char* isa_name(Isa isa) { return names[int(isa)]; }
bool isa_offered(Isa isa) { return features().offered[int(isa)]; }
bool bf16_dot_is_fast() { return !features().intel; }

const char* isa_limit(Isa* limit, bool* forced) {
  *limit = Isa::amx;
  *forced = false;
  const char* wanted = std::getenv("SPARSEKIT_ISA");
  if (!wanted || !*wanted) return nullptr;
  for (int i = 0; i < isa_count; ++i) {
    if (std::strcmp(wanted, names[i]) != 0) continue;
    if (!isa_offered(Isa(i))) {
      thread_local char text[128];
      std::snprintf(text, sizeof text, "SPARSEKIT_ISA=%s: %s", names[i], why_not(Isa(i)));
      return text;
    }
    *limit = Isa(i);
    *forced = true;
    return nullptr;
  }
  return "SPARSEKIT_ISA is none of reference, portable, avx2, avx512, avx512_bf16, amx";
}

const char* isa_refuses(Isa isa) {
  Isa limit;
  bool forced;
  if (const char* problem = isa_limit(&limit, &forced)) return problem;
  if (!isa_offered(isa)) return why_not(isa);
  if (isa > limit) return "SPARSEKIT_ISA asks for a lower one";
  const bool this_one = forced && isa == limit;
#ifdef SPARSEKIT_AMX_EMULATION
  if (isa == Isa::amx && !this_one) return "emulated, for tests: SPARSEKIT_ISA=amx runs it";
#endif
  if (isa == Isa::avx512_bf16 && !this_one && !bf16_dot_is_fast()) return "vdpbf16ps is slower than fp32 FMA here";
  return nullptr;
}

}  // namespace sparsekit
