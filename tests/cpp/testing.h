// The least a C++ test needs: named tests, checks that print what they saw, one closing line. No third-party package.
#pragma once

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <string>
#include <vector>

#include "common/cpu/features.h"
#include "sparsekit/status.h"

namespace sparsekit::testing {

struct Test {
  const char* name;
  void (*run)();
};
std::vector<Test>& tests();
int& failures();  // of the running test

struct Registration {
  Registration(const char* name, void (*run)()) { tests().push_back({name, run}); }
};
#define TEST(name)                                                                \
  static void name();                                                             \
  static const sparsekit::testing::Registration registration_##name(#name, name); \
  static void name()

#define CHECK(condition, ...)                                     \
  do {                                                            \
    if (!(condition)) {                                           \
      ++sparsekit::testing::failures();                           \
      std::printf("%s:%d: %s: ", __FILE__, __LINE__, #condition); \
      std::printf(__VA_ARGS__);                                   \
      std::printf("\n");                                          \
    }                                                             \
  } while (0)
#define CHECK_OK(expression)                    \
  do {                                          \
    sparsekit::Status checked = (expression);   \
    CHECK(checked.ok(), "%s", checked.message); \
  } while (0)

using Random = std::mt19937;

/// Runs `body(name)` once for every instruction set that this machine offers, forced through SPARSEKIT_ISA.
template <class Body>
void for_each_isa(const Body& body) {
  for (int i = 0; i < isa_count; ++i) {
    if (!isa_offered(Isa(i))) continue;
    setenv("SPARSEKIT_ISA", isa_name(Isa(i)), 1);
    body(isa_name(Isa(i)));
  }
  unsetenv("SPARSEKIT_ISA");
}

}  // namespace sparsekit::testing
