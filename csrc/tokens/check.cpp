// What no device takes.
#include "tokens/check.h"

namespace sparsekit {

Status check_token_types(const ScatterTokens& t) {
  for (int64_t i = 0; i < t.tensors && t.reduce != TokenReduce::copy; ++i) {
    TokenType type = t.out[i].type;
    if (type == TokenType::bytes) {
      return error(Status::Kind::unsupported,
                   "tensors[%lld]: this dtype cannot be summed; supported: float32, float16, "
                   "bfloat16, float64, int32, int64, or reduce='copy'",
                   (long long)i);
    }
    if ((type == TokenType::i32 || type == TokenType::i64) && (t.weights || t.reduce == TokenReduce::mean)) {
      return error(Status::Kind::unsupported,
                   "tensors[%lld]: integers have no mean and no weights; supported: reduce='copy', "
                   "or 'add' without weights",
                   (long long)i);
    }
  }
  return {};
}

}  // namespace sparsekit
