#include <cstring>

#include "testing.h"

namespace sparsekit::testing {

std::vector<Test>& tests() {
  static std::vector<Test> all;
  return all;
}

int& failures() {
  static int count = 0;
  return count;
}

}  // namespace sparsekit::testing

/// Runs the tests whose name contains the first argument, or all.
int main(int argc, char** argv) {
  using namespace sparsekit;
  using namespace sparsekit::testing;
  std::string ran, not_run;
  for (int i = 0; i < isa_count; ++i) (isa_offered(Isa(i)) ? ran : not_run) += std::string(" ") + isa_name(Isa(i));
  std::printf("instruction sets:%s; this processor does not offer:%s\n", ran.c_str(), not_run.c_str());
  std::setvbuf(stdout, nullptr, _IOLBF, 0);  // a crash must not swallow what was said before it
  int passed = 0, failed = 0;
  for (const Test& test : tests()) {
    if (argc > 1 && !std::strstr(test.name, argv[1])) continue;
    failures() = 0;
    test.run();
    std::printf("%-60s %s\n", test.name, failures() ? "FAILED" : "ok");
    ++(failures() ? failed : passed);
  }
  std::printf("%d passed, %d failed\n", passed, failed);
  return failed || !passed;
}
