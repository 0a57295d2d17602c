# torch's stable C++ ABI without find_package(Torch): headers of any installed torch (a CPU build too), and a stub to
# link against. find_package(Torch) would pull in CUDA libraries, its own -gencode flags and a C++ standard.
#
# The stub is an empty shared library whose SONAME is libtorch.so. It gives our libraries a DT_NEEDED entry through which
# the dynamic linker finds the symbols of the torch that is already loaded; without it `torch.ops.load_library` fails
# with an undefined symbol.

set(SPARSEKIT_TORCH_INCLUDE "" CACHE PATH "The folder torch/include of an installed torch (>= 2.11)")
if(NOT SPARSEKIT_TORCH_INCLUDE AND DEFINED ENV{SPARSEKIT_TORCH_INCLUDE})
  set(SPARSEKIT_TORCH_INCLUDE $ENV{SPARSEKIT_TORCH_INCLUDE})
endif()

if(NOT SPARSEKIT_TORCH_INCLUDE)
  # With build isolation the running Python is the environment's own, but its sys.path is not: look beside it as well.
  execute_process(
    COMMAND ${Python_EXECUTABLE} ${CMAKE_CURRENT_LIST_DIR}/find_torch_include.py
    OUTPUT_VARIABLE SPARSEKIT_TORCH_INCLUDE OUTPUT_STRIP_TRAILING_WHITESPACE)
endif()

if(NOT EXISTS "${SPARSEKIT_TORCH_INCLUDE}/torch/csrc/stable/library.h")
  message(FATAL_ERROR
    "sparsekit needs the headers of an installed torch >= 2.11 and found none.\n"
    "Type:  pip install 'torch>=2.11'   and install sparsekit again, in the same environment,\n"
    "or set SPARSEKIT_TORCH_INCLUDE to the folder torch/include of any torch >= 2.11.")
endif()
message(STATUS "sparsekit: torch headers in ${SPARSEKIT_TORCH_INCLUDE}")

file(WRITE ${CMAKE_BINARY_DIR}/torch_stub/empty.c "")
add_library(torch_stub SHARED ${CMAKE_BINARY_DIR}/torch_stub/empty.c)
set_target_properties(torch_stub PROPERTIES OUTPUT_NAME torch LIBRARY_OUTPUT_DIRECTORY ${CMAKE_BINARY_DIR}/torch_stub)

# sparsekit_torch_library(<name> <file>...): a plain shared object for torch.ops.load_library.
function(sparsekit_torch_library name)
  add_library(${name} MODULE ${ARGN})
  target_include_directories(${name} SYSTEM PRIVATE ${SPARSEKIT_TORCH_INCLUDE})
  target_include_directories(${name} PRIVATE ${PROJECT_SOURCE_DIR}/include ${PROJECT_SOURCE_DIR}/csrc)
  # Byte-coded version 2.11 (0x02, 0x0b): the stable functions of later releases stay invisible, so none is used.
  target_compile_definitions(${name} PRIVATE TORCH_TARGET_VERSION=0x020b000000000000ULL)
  target_link_options(${name} PRIVATE LINKER:--no-as-needed)
  target_link_libraries(${name} PRIVATE torch_stub)
  set_target_properties(${name} PROPERTIES PREFIX "" SKIP_BUILD_RPATH ON)
endfunction()
