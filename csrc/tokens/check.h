// In both libraries.
#pragma once

#include "sparsekit/tokens.h"

namespace sparsekit {

/// Whether the dtypes of a scatter can be reduced as it asks.
Status check_token_types(const ScatterTokens& t);

}  // namespace sparsekit
