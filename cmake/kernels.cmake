# The file name is the build rule: the suffix of a kernel file decides the flags it is compiled with.
#
#   cpu_portable.cpp      no flags; the only backend on processors that are not x86-64
#   *_avx2.cpp            AVX2, FMA, F16C
#   *_avx512.cpp          AVX-512 F, BW, DQ, VL (Skylake-SP and later)
#   *_avx512_bf16.cpp     the same with BF16 and VNNI (Zen 4, Cooper Lake, Sapphire Rapids and later)
#   *_amx.cpp             the same with AMX tiles and BF16 tile products (Sapphire Rapids and later)
#   cuda_*sm80*.cu        code for 8.0 and 9.0, and PTX for every other card from Ampere on (PTX alone costs 10 s at first use)
#   cuda_*sm90*.cu        code for 9.0a (wgmma, TMA: Hopper only)
#   cuda_<name>.cu        no tensor cores: 8.0 with PTX and 9.0
#
# Any other kernel file is a configure error.

# GCC keeps integers in vector registers rather than on the stack where it runs out of others, 2,000 times in attention's
# AVX-512 object alone: addresses of the next tile then wait behind the multiply-adds of this one (3 to 5 % of attention,
# Zen 5). Not where tiles multiply: there it is loads that wait, behind those of tiles (3 to 14 % of attention).
include(CheckCXXCompilerFlag)
check_cxx_compiler_flag(-mtune-ctrl=^inter_unit_moves_from_vec SPARSEKIT_HAS_TUNE_CTRL)

set(SPARSEKIT_FLAGS_portable "")
set(SPARSEKIT_FLAGS_avx2 -mavx2 -mfma -mf16c -mbmi -mbmi2)
set(SPARSEKIT_FLAGS_avx512 ${SPARSEKIT_FLAGS_avx2} -mavx512f -mavx512bw -mavx512dq -mavx512vl -mprefer-vector-width=512)
set(SPARSEKIT_FLAGS_avx512_bf16 ${SPARSEKIT_FLAGS_avx512} -mavx512bf16 -mavx512vnni)
set(SPARSEKIT_FLAGS_amx ${SPARSEKIT_FLAGS_avx512_bf16} -mamx-tile -mamx-bf16)
if(SPARSEKIT_HAS_TUNE_CTRL)
  foreach(isa avx2 avx512 avx512_bf16)
    list(APPEND SPARSEKIT_FLAGS_${isa} -mtune-ctrl=^inter_unit_moves_from_vec)
  endforeach()
endif()

# sparsekit_cpu_kernels(<target> <file>...): adds each file with the flags of its suffix; x86 files only on x86-64.
function(sparsekit_cpu_kernels target)
  foreach(file IN LISTS ARGN)
    if(NOT file MATCHES "cpu_.*(portable|avx2|avx512|avx512_bf16|amx)\\.cpp$")
      message(FATAL_ERROR "sparsekit: ${file} names no known instruction set (see cmake/kernels.cmake)")
    endif()
    string(REGEX MATCH "(portable|avx2|avx512_bf16|avx512|amx)\\.cpp$" _ "${file}")
    set(isa ${CMAKE_MATCH_1})
    if(isa STREQUAL "portable" OR SPARSEKIT_X86)
      target_sources(${target} PRIVATE ${file})
      set_property(SOURCE ${file} APPEND PROPERTY COMPILE_OPTIONS ${SPARSEKIT_FLAGS_${isa}})
    endif()
  endforeach()
endfunction()

# sparsekit_cuda_kernels(<target> <file>...): adds each file with the -gencode flags of its suffix.
function(sparsekit_cuda_kernels target)
  foreach(file IN LISTS ARGN)
    if(file MATCHES "cuda_[a-z0-9_]*sm90[a-z0-9_]*\\.cu$")
      set(flags -gencode=arch=compute_90a,code=sm_90a)
    elseif(file MATCHES "cuda_[a-z0-9_]*sm80[a-z0-9_]*\\.cu$")
      set(flags -gencode=arch=compute_80,code=[sm_80,sm_90,compute_80])
    elseif(file MATCHES "cuda_[a-z0-9_]+\\.cu$")
      set(flags -gencode=arch=compute_80,code=[sm_80,compute_80] -gencode=arch=compute_90,code=sm_90)
    else()
      message(FATAL_ERROR "sparsekit: ${file} names no known GPU architecture (see cmake/kernels.cmake)")
    endif()
    target_sources(${target} PRIVATE ${file})
    set_property(SOURCE ${file} APPEND PROPERTY COMPILE_OPTIONS ${flags})
  endforeach()
endfunction()
