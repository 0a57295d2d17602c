// The ops that choose entries and build lists and orders, for any backend (see attention.h for what `Backend` is).
#pragma once

#include "sparsekit/selection.h"
#include "torch/tensors.h"

namespace sparsekit {

template <class Backend>
struct ChoiceOps {
  using Result = std::tuple<Tensor, Tensor, Tensor>;

#define SPARSEKIT_CHOICE_PARAMETERS \
  int64_t width, int64_t min_count, int64_t sink, int64_t local, OptionalTensor row_limit, bool return_mass
#define SPARSEKIT_CHOICE_ARGUMENTS width, min_count, sink, local, row_limit, return_mass

  static Result top_k(Tensor scores, OptionalTensor row_k, int64_t k, SPARSEKIT_CHOICE_PARAMETERS) {
    Call call(scores);
    call.choice.rule = ChoiceRule::top_k;
    if (k < 0) fail("k is %lld; supported: 0 and more", (long long)k);
    call.choice.k = k;
    if (row_k) call.choice.row_k = call.template per_row<int32_t>(*row_k, ScalarType::Int, "row_k");
    return call.run(SPARSEKIT_CHOICE_ARGUMENTS);
  }

  static Result top_p(Tensor probs, OptionalTensor weights, OptionalTensor row_p, double p, bool by_head,
                      SPARSEKIT_CHOICE_PARAMETERS) {
    Call call(probs);
    Choice& c = call.choice;
    c.rule = ChoiceRule::top_p;
    c.p = p;
    c.by_head = by_head;
    if (weights) {
      require_dims(*weights, 3, "weights");
      if (weights->size(0) != 1) require_size(*weights, 0, c.heads, "weights");
      if (weights->size(1) != 1) require_size(*weights, 1, c.rows, "weights");
      require_size(*weights, 2, c.columns, "weights");
      c.weights = call.template keep<float>(*weights, ScalarType::Float, "weights");
      c.weights_row = weights->size(1) == 1 ? 0 : c.columns;
      c.weights_head = weights->size(0) == 1 ? 0 : weights->size(1) * c.columns;
    }
    if (row_p) {
      if (by_head) {
        require_dims(*row_p, 1, "row_p");
        require_size(*row_p, 0, c.heads, "row_p");
        c.row_p = call.template keep<float>(*row_p, ScalarType::Float, "row_p");
      } else {
        c.row_p = call.template per_row<float>(*row_p, ScalarType::Float, "row_p");
      }
    }
    return call.run(SPARSEKIT_CHOICE_ARGUMENTS);
  }

  static Result threshold(Tensor scores, Tensor thresholds, SPARSEKIT_CHOICE_PARAMETERS) {
    Call call(scores);
    call.choice.rule = ChoiceRule::threshold;
    call.choice.thresholds = call.template per_row<float>(thresholds, ScalarType::Float, "thresholds");
    return call.run(SPARSEKIT_CHOICE_ARGUMENTS);
  }

  static std::tuple<Tensor, Tensor, Tensor, Tensor> vertical_slash_lists(Tensor vertical, Tensor slash,
                                                                         std::vector<int64_t> block_size, int64_t len_q,
                                                                         int64_t len_k, int64_t capacity) {
    require_dims(vertical, 3, "vertical");
    require_dims(slash, 3, "slash");
    for (int64_t d = 0; d < 2; ++d) require_size(slash, d, vertical.size(d), "slash");
    require_same_device(slash, vertical, "slash");
    if (block_size.size() != 2 || block_size[0] <= 0 || block_size[1] <= 0) {
      fail("block_size: supported are 2 positive numbers, (query, key)");
    }
    if (capacity < 0 || capacity > INT32_MAX) fail("capacity is %lld; supported: 0 to 2^31 - 1", (long long)capacity);
    Tensor vertical_used = contiguous_of(vertical, ScalarType::Int, "vertical");
    Tensor slash_used = contiguous_of(slash, ScalarType::Int, "slash");
    int64_t q_blocks = (len_q + block_size[0] - 1) / block_size[0];
    std::vector<int64_t> sizes = {vertical.size(0), vertical.size(1), q_blocks};
    Tensor counts = empty_on(vertical, sizes, ScalarType::Int);
    Tensor column_counts = empty_on(vertical, sizes, ScalarType::Int);
    sizes.push_back(capacity);
    Tensor indices = empty_on(vertical, sizes, ScalarType::Int);
    sizes.back() = vertical.size(2);
    Tensor column_indices = empty_on(vertical, sizes, ScalarType::Int);
    VerticalSlash v;
    v.heads = vertical.size(0) * vertical.size(1);
    v.len_q = len_q;
    v.len_k = len_k;
    v.block_q = int32_t(block_size[0]);
    v.block_k = int32_t(block_size[1]);
    v.vertical_count = vertical.size(2);
    v.slash_count = slash.size(2);
    v.capacity = capacity;
    v.vertical = static_cast<const int32_t*>(vertical_used.data_ptr());
    v.slash = static_cast<const int32_t*>(slash_used.data_ptr());
    v.counts = static_cast<int32_t*>(counts.data_ptr());
    v.indices = static_cast<int32_t*>(indices.data_ptr());
    v.column_counts = static_cast<int32_t*>(column_counts.data_ptr());
    v.column_indices = static_cast<int32_t*>(column_indices.data_ptr());
    if (counts.numel() > 0) Backend::run(v, vertical);
    return {indices, counts, column_indices, column_counts};
  }

  static std::tuple<Tensor, Tensor> union_block_lists(Tensor indices, Tensor counts, int64_t heads, int64_t key_blocks,
                                                      int64_t capacity) {
    require_dims(counts, 3, "counts");
    require_dims(indices, 4, "indices");
    for (int64_t d = 0; d < 3; ++d) require_size(indices, d, counts.size(d), "indices");
    require_same_device(counts, indices, "counts");
    if (heads <= 0 || counts.size(1) % heads) {
      fail("heads is %lld; supported: a divisor of the %lld heads of the lists", (long long)heads,
           (long long)counts.size(1));
    }
    if (capacity < 0 || capacity > INT32_MAX) fail("capacity is %lld; supported: 0 to 2^31 - 1", (long long)capacity);
    if (key_blocks < 0) fail("key_blocks is %lld; supported: 0 and more", (long long)key_blocks);
    Tensor counts_used = contiguous_of(counts, ScalarType::Int, "counts");
    Tensor indices_used = contiguous_of(indices, ScalarType::Int, "indices");
    std::vector<int64_t> sizes = {counts.size(0), heads, counts.size(2)};
    Tensor counts_out = empty_on(counts, sizes, ScalarType::Int);
    sizes.push_back(capacity);
    Tensor indices_out = empty_on(counts, sizes, ScalarType::Int);
    UnionLists u;
    u.heads = counts.size(0) * heads;
    u.group = counts.size(1) / heads;
    u.rows = counts.size(2);
    u.capacity_in = indices.size(3);
    u.capacity = capacity;
    u.key_blocks = key_blocks;
    u.counts_in = static_cast<const int32_t*>(counts_used.data_ptr());
    u.indices_in = static_cast<const int32_t*>(indices_used.data_ptr());
    u.counts = static_cast<int32_t*>(counts_out.data_ptr());
    u.indices = static_cast<int32_t*>(indices_out.data_ptr());
    if (counts_out.numel() > 0) Backend::run(u, counts);
    return {indices_out, counts_out};
  }

  static Tensor inverse_permutation(Tensor order, int64_t length) {
    require_dims(order, 3, "order");
    if (length < 0 || length > INT32_MAX) fail("length is %lld; supported: 0 to 2^31 - 1", (long long)length);
    Tensor used = contiguous_of(order, ScalarType::Int, "order");
    Tensor inverse = empty_on(order, {order.size(0), order.size(1), length}, ScalarType::Int);
    InversePermutation p;
    p.lists = order.size(0) * order.size(1);
    p.count = order.size(2);
    p.length = length;
    p.order = static_cast<const int32_t*>(used.data_ptr());
    p.inverse = static_cast<int32_t*>(inverse.data_ptr());
    if (p.lists > 0) Backend::run(p, order);
    return inverse;
  }

  static Tensor permute_tokens(Tensor input, Tensor order) {
    require_dims(input, 4, "input");
    require_dims(order, 3, "order");
    require_same_device(order, input, "order");
    if (order.size(0) != 1) require_size(order, 0, input.size(0), "order");
    if (order.size(1) <= 0 || input.size(1) % order.size(1)) {
      fail("order has %lld heads; supported: a divisor of the input's %lld", (long long)order.size(1),
           (long long)input.size(1));
    }
    Tensor rows = input.size(3) > 1 && input.stride(3) != 1 ? torch::stable::contiguous(input) : input;
    Tensor used = contiguous_of(order, ScalarType::Int, "order");
    Tensor out = empty_in_order_of(input, {input.size(0), input.size(1), order.size(2), input.size(3)});
    int64_t element = input.element_size();
    PermuteTokens p;
    p.batch = input.size(0);
    p.heads = input.size(1);
    p.len_in = input.size(2);
    p.len_out = order.size(2);
    p.row_bytes = input.size(3) * element;
    p.input = static_cast<const char*>(rows.data_ptr());
    p.out = static_cast<char*>(out.data_ptr());
    p.input_batch = rows.stride(0) * element;
    p.input_head = rows.stride(1) * element;
    p.input_row = rows.stride(2) * element;
    p.out_batch = out.stride(0) * element;
    p.out_head = out.stride(1) * element;
    p.out_row = out.stride(2) * element;
    p.order = static_cast<const int32_t*>(used.data_ptr());
    p.order_heads = order.size(1);
    p.order_batch = order.size(0) == 1 ? 0 : order.size(1) * order.size(2);
    if (out.numel() > 0) Backend::run(p, input);
    return out;
  }

 private:
  /// Checked tensors of a choice, kept alive while it points into them.
  struct Call {
    Choice choice;
    Tensor scores;
    std::vector<Tensor> kept;

    explicit Call(const Tensor& given) : scores(torch::stable::contiguous(given)) {
      require_dims(given, 3, "scores");
      choice.dtype = to_dtype(given.scalar_type(), "scores");
      if (choice.dtype == DType::f64) fail("scores is float64; supported: float32, float16, bfloat16");
      choice.heads = given.size(0);
      choice.rows = given.size(1);
      choice.columns = given.size(2);
      choice.scores = scores.data_ptr();
    }

    template <class T>
    const T* keep(const Tensor& tensor, ScalarType type, const char* name) {
      require_same_device(tensor, scores, name);
      kept.push_back(contiguous_of(tensor, type, name));
      return static_cast<const T*>(kept.back().data_ptr());
    }

    template <class T>
    const T* per_row(const Tensor& tensor, ScalarType type, const char* name) {
      require_dims(tensor, 2, name);
      require_size(tensor, 0, choice.heads, name);
      require_size(tensor, 1, choice.rows, name);
      return keep<T>(tensor, type, name);
    }

    Result run(SPARSEKIT_CHOICE_PARAMETERS) {
      if (width < 0 || width > INT32_MAX) fail("width is %lld; supported: 0 to 2^31 - 1", (long long)width);
      choice.width = width;
      choice.min_count = min_count;
      choice.sink = sink;
      choice.local = local;
      if (row_limit) choice.row_limit = per_row<int32_t>(*row_limit, ScalarType::Int, "row_limit");
      Tensor indices = empty_on(scores, {choice.heads, choice.rows, width}, ScalarType::Int);
      Tensor counts = empty_on(scores, {choice.heads, choice.rows}, ScalarType::Int);
      std::vector<int64_t> none = {0}, rows = {choice.heads, choice.rows};
      Tensor mass = empty_on(scores, return_mass ? rows : none, ScalarType::Float);
      choice.indices = static_cast<int32_t*>(indices.data_ptr());
      choice.counts = static_cast<int32_t*>(counts.data_ptr());
      choice.mass = return_mass ? static_cast<float*>(mass.data_ptr()) : nullptr;
      if (counts.numel() > 0) Backend::run(choice, scores);
      return {indices, counts, mass};
    }
  };
};

#define SPARSEKIT_REGISTER_CHOICES(m, Backend)                                         \
  m.impl("select_top_k", TORCH_BOX(ChoiceOps<Backend>::top_k));                        \
  m.impl("select_top_p", TORCH_BOX(ChoiceOps<Backend>::top_p));                        \
  m.impl("select_threshold", TORCH_BOX(ChoiceOps<Backend>::threshold));                \
  m.impl("vertical_slash_lists", TORCH_BOX(ChoiceOps<Backend>::vertical_slash_lists)); \
  m.impl("union_block_lists", TORCH_BOX(ChoiceOps<Backend>::union_block_lists));       \
  m.impl("inverse_permutation", TORCH_BOX(ChoiceOps<Backend>::inverse_permutation));   \
  m.impl("permute_tokens", TORCH_BOX(ChoiceOps<Backend>::permute_tokens))

}  // namespace sparsekit
