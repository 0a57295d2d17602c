// Large scratch memory of one call.
//
// Fresh pages are what it costs: two threads that touch 12 to 42 MB for the first time took 7 to 25 ms for it, where
// the call itself takes 8 to 55. So the last piece that a call gave back is kept for the next one, at most 64 MB in
// all; it is taken and put back by exchanging one pointer, and whoever finds none allocates. Calls may run at the same
// time, and a fork has its own.
#pragma once

#include <cstdint>

namespace sparsekit {

/// At least `bytes` of memory, aligned to 64 bytes, with any contents; null if there is none.
char* take_scratch(int64_t bytes);

/// Gives back what take_scratch returned (or null).
void give_back_scratch(char* memory);

}  // namespace sparsekit
