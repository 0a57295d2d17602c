// The result of every call of the C++ API: an empty message means success.
//
// A plain struct without std types, so that it may cross any library boundary and be used in files compiled for one
// instruction set (see csrc/common/cpu/README.md).
#pragma once

#include <cstdarg>
#include <cstdio>

namespace sparsekit {

struct [[nodiscard]] Status {
  enum class Kind { ok, invalid_argument, unsupported, failed };

  Kind kind = Kind::ok;
  char message[384] = {};

  bool ok() const { return kind == Kind::ok; }
};

/// An error whose message names the argument, what was found and what is supported (printf format).
__attribute__((format(printf, 2, 3))) static inline Status error(Status::Kind kind, const char* format, ...) {
  Status status;
  status.kind = kind;
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(status.message, sizeof status.message, format, arguments);
  va_end(arguments);
  return status;
}

}  // namespace sparsekit
