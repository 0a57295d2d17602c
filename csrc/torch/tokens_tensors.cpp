// See tokens_tensors.h. In both libraries.
#include "torch/tokens_tensors.h"

#include <sys/mman.h>

namespace sparsekit {
namespace {

/// Dimensions [first, last) as one with one stride: their strides follow from the last of them.
bool collapses(const Tensor& tensor, int64_t first, int64_t last) {
  for (int64_t d = first; d + 1 < last; ++d) {
    if (tensor.size(d) != 1 && tensor.stride(d) != tensor.stride(d + 1) * tensor.size(d + 1)) return false;
  }
  return true;
}

int64_t sizes_product(const Tensor& tensor, int64_t first, int64_t last) {
  int64_t product = 1;
  for (int64_t d = first; d < last; ++d) product *= tensor.size(d);
  return product;
}

bool inner_is_contiguous(const Tensor& tensor, int64_t first) {
  int64_t stride = 1;
  for (int64_t d = tensor.dim() - 1; d >= first; --d) {
    if (tensor.size(d) != 1 && tensor.stride(d) != stride) return false;
    stride *= tensor.size(d);
  }
  return true;
}

/// Fresh memory of many megabytes comes from the operating system page by page, which costs several times the copy
/// itself; asked for as huge pages it does not. (A hint: nothing depends on its success.)
void advise_huge_pages(const Tensor& tensor) {
#ifdef MADV_HUGEPAGE
  constexpr uintptr_t huge = 2 << 20;
  uintptr_t begin = reinterpret_cast<uintptr_t>(tensor.data_ptr());
  uintptr_t end = begin + uintptr_t(tensor.numel() * tensor.element_size());
  begin = (begin + huge - 1) / huge * huge;
  end = end / huge * huge;
  if (begin + 4 * huge <= end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

}  // namespace

TokenType to_token_type(ScalarType type) {
  switch (type) {
    case ScalarType::Float: return TokenType::f32;
    case ScalarType::Half: return TokenType::f16;
    case ScalarType::BFloat16: return TokenType::bf16;
    case ScalarType::Double: return TokenType::f64;
    case ScalarType::Int: return TokenType::i32;
    case ScalarType::Long: return TokenType::i64;
    default: return TokenType::bytes;
  }
}

TokenTensor TokenTensors::view(const Tensor& given, int64_t dim, bool packed, const char* name, size_t number) {
  const int64_t token = dim - (packed ? 1 : 0), outer = packed ? 0 : 1;
  if (dim < 1 || token >= given.dim()) {
    fail("dim is %lld for %s[%zu], which has %lld dimensions%s; supported: 1 to %lld", (long long)dim, name, number,
         (long long)given.dim(), packed ? " (packed: without the batch)" : "",
         (long long)given.dim() - (packed ? 0 : 1));
  }
  require_same_device(given, anchor_, name);
  bool usable = collapses(given, outer, token) && inner_is_contiguous(given, token + 1);
  Tensor tensor = keep(usable ? given : torch::stable::contiguous(given));
  TokenTensor view;
  view.element_size = int32_t(tensor.element_size());
  view.data = tensor.data_ptr();
  view.sample = packed ? 0 : tensor.stride(0) * view.element_size;
  view.outers = sizes_product(tensor, outer, token);
  view.outer = token > outer ? tensor.stride(token - 1) * view.element_size : 0;
  view.row = tensor.stride(token) * view.element_size;
  view.inner = sizes_product(tensor, token + 1, tensor.dim());
  view.type = to_token_type(tensor.scalar_type());
  return view;
}

void TokenTensors::add(const std::vector<Tensor>& tensors, const std::vector<int64_t>& dims,
                       const OptionalTensor& cu_seqlens, const char* name, TokenRows* rows,
                       std::vector<TokenTensor>* views) {
  if (dims.size() != tensors.size()) {
    fail("dims has %zu numbers; supported: one per tensor, %zu", dims.size(), tensors.size());
  }
  const bool packed = cu_seqlens.has_value();
  for (size_t i = 0; i < tensors.size(); ++i) {
    views->push_back(view(tensors[i], dims[i], packed, name, i));
    int64_t count = tensors[i].size(dims[i] - (packed ? 1 : 0));
    if (i == 0) rows->rows = count;
    if (rows->rows != count) {
      fail("%s[%zu] has %lld tokens in dimension %lld; supported: as many as the first, %lld", name, i,
           (long long)count, (long long)(dims[i] - (packed ? 1 : 0)), (long long)rows->rows);
    }
    if (!packed && tensors[i].size(0) != rows->samples) {
      fail("%s[%zu] has batch size %lld; supported: index's %lld", name, i, (long long)tensors[i].size(0),
           (long long)rows->samples);
    }
  }
  if (!packed) return;
  require_dims(*cu_seqlens, 1, "cu_seqlens");
  require_size(*cu_seqlens, 0, rows->samples + 1, "cu_seqlens");
  rows->cu_seqlens = ints(*cu_seqlens, "cu_seqlens");
}

std::vector<Tensor> TokenTensors::make(const std::vector<Tensor>& tensors, const std::vector<int64_t>& dims,
                                       bool from_packed, const OptionalTensor& cu_seqlens, int64_t samples,
                                       int64_t rows, std::vector<TokenTensor>* views) {
  if (rows < 0) fail("length is %lld; supported: 0 and more", (long long)rows);
  std::vector<Tensor> made;
  for (size_t i = 0; i < tensors.size(); ++i) {
    std::vector<int64_t> sizes;
    if (!cu_seqlens) sizes.push_back(samples);
    for (int64_t d = from_packed ? 0 : 1; d < tensors[i].dim(); ++d) sizes.push_back(tensors[i].size(d));
    sizes[size_t(dims[i] - (cu_seqlens ? 1 : 0))] = rows;
    made.push_back(torch::stable::new_empty(tensors[i], sizes));
    if (made.back().device().type() == torch::headeronly::DeviceType::CPU) advise_huge_pages(made.back());
    views->push_back(view(made.back(), dims[i], cu_seqlens.has_value(), "out", i));
  }
  return made;
}

TokenIndex TokenTensors::index(const Tensor& tensor, int64_t dims_most) {
  if (tensor.dim() < 2 || tensor.dim() > dims_most) {
    fail("index has %lld dimensions; supported: %s", (long long)tensor.dim(),
         dims_most == 2 ? "2, [B, K]" : "2 or 3, [B, K] or [B, K, M]");
  }
  TokenIndex index;
  index.wide = tensor.scalar_type() == ScalarType::Long;
  if (!index.wide && tensor.scalar_type() != ScalarType::Int) {
    fail("index has the wrong dtype; supported: int32, int64");
  }
  index.rows = tensor.size(1);
  index.per_row = tensor.dim() == 3 ? tensor.size(2) : 1;
  index.data = keep(torch::stable::contiguous(tensor)).data_ptr();
  return index;
}

const int32_t* TokenTensors::ints(const Tensor& tensor, const char* name) {
  require_same_device(tensor, anchor_, name);
  return static_cast<const int32_t*>(keep(contiguous_of(tensor, ScalarType::Int, name)).data_ptr());
}

}  // namespace sparsekit
