# sparsekit._numpy with nanobind in split mode: one module for every Python from 3.10 (stable ABI), which finds nanobind's
# own part in the package nanobind-backend at run time.
find_package(Python 3.10 REQUIRED COMPONENTS Interpreter Development.Module OPTIONAL_COMPONENTS Development.SABIModule)
if(NOT nanobind_DIR AND NOT nanobind_ROOT)
  execute_process(COMMAND ${Python_EXECUTABLE} -m nanobind --cmake_dir
    OUTPUT_VARIABLE nanobind_ROOT OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
endif()
find_package(nanobind CONFIG QUIET)
if(NOT nanobind_FOUND)
  message(FATAL_ERROR
    "sparsekit's NumPy module needs nanobind >= 3 to build.\n"
    "Type:  pip install 'nanobind>=3'   or leave the module out with -DSPARSEKIT_NUMPY=OFF.")
endif()
nanobind_add_module(_numpy BACKEND_MODULE nanobind_backend STABLE_ABI NB_SUPPRESS_WARNINGS
  csrc/numpy/module.cpp csrc/numpy/arrays.cpp)
target_include_directories(_numpy PRIVATE ${PROJECT_SOURCE_DIR}/include ${PROJECT_SOURCE_DIR}/csrc)
target_compile_options(_numpy PRIVATE -Wall -Wextra)
target_link_libraries(_numpy PRIVATE sparsekit_core sparsekit_threads)
install(TARGETS _numpy LIBRARY DESTINATION .)
