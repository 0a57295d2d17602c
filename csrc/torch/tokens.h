// The token ops, for any backend (see attention.h for what `Backend` is).
#pragma once

#include <tuple>

#include "torch/tokens_tensors.h"

namespace sparsekit {

template <class Backend>
struct TokenOps {
  using Tensors = std::vector<Tensor>;

  static Tensors gather_tokens(Tensors tensors, Tensor index, std::vector<int64_t> dims, OptionalTensor cu_seqlens,
                               OptionalTensor cu_seqlens_out, std::optional<int64_t> length) {
    TokenTensors kept(index);
    GatherTokens gather;
    gather.index = kept.index(index, 2);
    gather.from.samples = gather.to.samples = index.size(0);
    std::vector<TokenTensor> in, out;
    kept.add(tensors, dims, cu_seqlens, "tensors", &gather.from, &in);
    gather.to.rows = index.size(1);
    if (cu_seqlens_out) {
      if (!length) fail("length: none is given; supported: with cu_seqlens_out, the rows of the packed result");
      gather.to.rows = *length;
      require_dims(*cu_seqlens_out, 1, "cu_seqlens_out");
      require_size(*cu_seqlens_out, 0, index.size(0) + 1, "cu_seqlens_out");
      gather.to.cu_seqlens = kept.ints(*cu_seqlens_out, "cu_seqlens_out");
    }
    Tensors made =
        kept.make(tensors, dims, cu_seqlens.has_value(), cu_seqlens_out, index.size(0), gather.to.rows, &out);
    gather.in = in.data();
    gather.out = out.data();
    gather.tensors = int64_t(tensors.size());
    if (!tensors.empty()) Backend::run(gather, index);
    return made;
  }

  static TokenReduce to_reduce(int64_t reduce) {
    if (reduce < 0 || reduce > 2) fail("reduce is %lld; supported: 0 (copy), 1 (add), 2 (mean)", (long long)reduce);
    return reduce == 0 ? TokenReduce::copy : reduce == 1 ? TokenReduce::add : TokenReduce::mean;
  }

  /// What forward and backward of a scatter share. `rows`: of a sample of the sources, packed: of all.
  static void set_scatter(TokenTensors& kept, ScatterTokens* scatter, const Tensor& index,
                          const OptionalTensor& weights, int64_t reduce, const OptionalTensor& cu_seqlens,
                          const OptionalTensor& cu_seqlens_out, int64_t rows, int64_t length) {
    scatter->index = kept.index(index, 3);
    scatter->reduce = to_reduce(reduce);
    scatter->from.samples = scatter->to.samples = index.size(0);
    scatter->from.rows = rows;
    scatter->to.rows = length;
    if (length < 0) fail("length is %lld; supported: 0 and more", (long long)length);
    if (!cu_seqlens && rows != index.size(1)) {
      fail("tensors have %lld tokens; supported: index's %lld", (long long)rows, (long long)index.size(1));
    }
    for (auto [cu, side, name] :
         {std::tuple<const OptionalTensor*, TokenRows*, const char*>{&cu_seqlens, &scatter->from, "cu_seqlens"},
          {&cu_seqlens_out, &scatter->to, "cu_seqlens_out"}}) {
      if (!*cu) continue;
      require_dims(**cu, 1, name);
      require_size(**cu, 0, index.size(0) + 1, name);
      side->cu_seqlens = kept.ints(**cu, name);
    }
    if (!weights) return;
    if (scatter->reduce == TokenReduce::copy) fail("weights: given with reduce='copy'; supported: 'add', 'mean'");
    scatter->weights_f64 = weights->scalar_type() == ScalarType::Double;
    if (!scatter->weights_f64 && weights->scalar_type() != ScalarType::Float) {
      fail("weights has the wrong dtype; supported: float32 (float64 on the CPU)");
    }
    require_dims(*weights, index.dim(), "weights");
    for (int64_t d = 0; d < index.dim(); ++d) require_size(*weights, d, index.size(d), "weights");
    require_same_device(*weights, index, "weights");
    scatter->weights = kept.keep(torch::stable::contiguous(*weights)).data_ptr();
  }

  static std::tuple<Tensors, Tensor> scatter_tokens(Tensors tensors, OptionalTensor weights, Tensors base, Tensor index,
                                                    std::vector<int64_t> dims, int64_t length, int64_t reduce,
                                                    OptionalTensor cu_seqlens, OptionalTensor cu_seqlens_out) {
    if (tensors.empty()) fail("tensors: none is given; supported: one and more");
    if (!base.empty() && base.size() != tensors.size()) {
      fail("base has %zu tensors; supported: none, or one per tensor, %zu", base.size(), tensors.size());
    }
    TokenTensors kept(index);
    ScatterTokens scatter;
    std::vector<TokenTensor> in, out, under;
    TokenRows from;
    from.samples = index.size(0);
    kept.add(tensors, dims, cu_seqlens, "tensors", &from, &in);
    set_scatter(kept, &scatter, index, weights, reduce, cu_seqlens, cu_seqlens_out, from.rows, length);
    if (!base.empty()) {
      TokenRows rows;
      rows.samples = index.size(0);
      kept.add(base, dims, cu_seqlens_out, "base", &rows, &under);
      if (rows.rows != length) {
        fail("base has %lld tokens; supported: length, %lld", (long long)rows.rows, (long long)length);
      }
      for (size_t i = 0; i < base.size(); ++i) {
        if (base[i].scalar_type() != tensors[i].scalar_type() || under[i].inner != in[i].inner ||
            under[i].outers != in[i].outers) {
          fail("base[%zu] differs from tensors[%zu] in dtype or in a size beside the tokens'; supported: the same", i,
               i);
        }
      }
    }
    Tensors made = kept.make(tensors, dims, cu_seqlens.has_value(), cu_seqlens_out, index.size(0), length, &out);
    std::vector<int64_t> sizes = {length};
    if (!cu_seqlens_out) sizes.insert(sizes.begin(), index.size(0));
    Tensor totals = empty_on(index, sizes, scatter.weights_f64 ? ScalarType::Double : ScalarType::Float);
    scatter.in = in.data();
    scatter.base = base.empty() ? nullptr : under.data();
    scatter.out = out.data();
    scatter.tensors = int64_t(tensors.size());
    scatter.totals = totals.data_ptr();
    Backend::run(scatter, index);
    return {made, totals};
  }

  /// `tensors` and `outs` may be empty where weights_grad is false; `rows` says how many tokens the gradients have.
  static std::tuple<Tensors, Tensor> scatter_tokens_backward(Tensors grads, OptionalTensor grad_totals, Tensors tensors,
                                                             OptionalTensor weights, Tensors outs, Tensor totals,
                                                             Tensor index, std::vector<int64_t> dims, int64_t rows,
                                                             int64_t reduce, OptionalTensor cu_seqlens,
                                                             OptionalTensor cu_seqlens_out, bool weights_grad) {
    TokenTensors kept(index);
    ScatterTokensBackward backward;
    ScatterTokens& scatter = backward.forward;
    std::vector<TokenTensor> in, out, grad_out, grad_in;
    TokenRows to, from;
    to.samples = from.samples = index.size(0);
    kept.add(grads, dims, cu_seqlens_out, "grads", &to, &grad_out);
    set_scatter(kept, &scatter, index, weights, reduce, cu_seqlens, cu_seqlens_out, rows, to.rows);
    if (weights_grad && (tensors.size() != grads.size() || outs.size() != grads.size() || !weights)) {
      fail("tensors, outs, weights: one is missing; supported: with weights_grad, one per gradient");
    }
    if (weights_grad) {
      kept.add(tensors, dims, cu_seqlens, "tensors", &from, &in);
      kept.add(outs, dims, cu_seqlens_out, "outs", &to, &out);
      scatter.in = in.data();
      scatter.out = out.data();
    }
    Tensors made = kept.make(grads, dims, cu_seqlens_out.has_value(), cu_seqlens, index.size(0), rows, &grad_in);
    auto type = scatter.weights_f64 ? ScalarType::Double : ScalarType::Float;
    Tensor grad_weights = empty_on(index, weights_grad ? sizes_of_index(index) : std::vector<int64_t>{0}, type);
    scatter.tensors = int64_t(grads.size());
    scatter.totals = floats_of(kept, totals, type, "totals");
    if (grad_totals) backward.grad_totals = floats_of(kept, *grad_totals, type, "grad_totals");
    backward.grad_out = grad_out.data();
    backward.grad_in = grad_in.data();
    backward.grad_weights = weights_grad ? grad_weights.data_ptr() : nullptr;
    Backend::run(backward, index);
    return {made, grad_weights};
  }

  static std::vector<int64_t> sizes_of_index(const Tensor& index) {
    std::vector<int64_t> sizes;
    for (int64_t d = 0; d < index.dim(); ++d) sizes.push_back(index.size(d));
    return sizes;
  }

  static void* floats_of(TokenTensors& kept, const Tensor& tensor, ScalarType type, const char* name) {
    if (tensor.scalar_type() != type) fail("%s has the wrong dtype; supported: that of weights", name);
    return kept.keep(torch::stable::contiguous(tensor)).data_ptr();
  }
};

#define SPARSEKIT_REGISTER_TOKENS(m, Backend)                             \
  m.impl("gather_tokens", TORCH_BOX(TokenOps<Backend>::gather_tokens));   \
  m.impl("scatter_tokens", TORCH_BOX(TokenOps<Backend>::scatter_tokens)); \
  m.impl("scatter_tokens_backward", TORCH_BOX(TokenOps<Backend>::scatter_tokens_backward))

}  // namespace sparsekit
