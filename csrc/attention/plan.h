// The error of a problem that every implementation refuses.
#pragma once

#include <cstdio>
#include <cstring>

#include "sparsekit/attention.h"

namespace sparsekit {

static inline Status refusal(const AttentionPlan& plan) {
  Status status = error(Status::Kind::unsupported, "block-sparse attention: no implementation takes this problem");
  for (int i = 0; i < plan.count; ++i) {
    size_t used = std::strlen(status.message);
    std::snprintf(status.message + used, sizeof status.message - used, "; %s: %s", plan.entries[i].name,
                  plan.entries[i].reason);
  }
  return status;
}

}  // namespace sparsekit
