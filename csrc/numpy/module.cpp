// sparsekit._numpy: the C++ API for NumPy arrays and everything else that speaks DLPack. Knows no torch.
// python/sparsekit/numpy.py is its public face.
#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>

#include <cmath>
#include <string>

#include "numpy/arrays.h"
#include "numpy/peak.h"
#include "numpy/thread_pool.h"
#include "sparsekit/attention.h"

namespace nb = nanobind;

namespace sparsekit::numpy {
namespace {

using Sizes = std::pair<int64_t, int64_t>;

void raise(const Status& status) {
  if (status.ok()) return;
  if (status.kind == Status::Kind::failed) throw std::runtime_error(status.message);
  throw nb::value_error(status.message);
}

/// The lists of one kind; their shapes become those of `lists`, or must be the same if they are known already.
BlockList block_list(const Array& counts, const Array& indices, const Array& first_counts) {
  BlockList list;
  if (!counts.given() && !indices.given()) return list;
  if (!counts.given() || !indices.given()) {
    throw nb::type_error((std::string(counts.name) + ", " + indices.name + ": give both or none").c_str());
  }
  counts.expect_shape({first_counts.size(0), first_counts.size(1), first_counts.size(2)});
  indices.expect_shape({counts.size(0), counts.size(1), counts.size(2), -1});
  list.counts = counts.int32s();
  list.indices = indices.int32s();
  list.capacity = int32_t(indices.size(3));
  return list;
}

nb::tuple attention_forward(nb::handle query, nb::handle key, nb::handle value, nb::handle kv_num_blocks,
                            nb::handle kv_indices, nb::handle full_kv_num_blocks, nb::handle full_kv_indices,
                            nb::handle partial_bits, nb::handle partial_bits_index, Sizes block_size,
                            std::optional<double> scale, bool causal, Sizes window, double softcap, nb::handle key_bias,
                            nb::handle sinks, nb::handle query_positions, nb::handle key_positions, int threads) {
  const Array q("query", query, 4), k("key", key, 4), v("value", value, 4);
  k.expect_dtype(q);
  v.expect_dtype(q);
  k.expect_shape({q.size(0), -1, -1, q.size(3)});
  v.expect_shape({q.size(0), k.size(1), k.size(2), -1});
  const HeadsArray query_view(q), key_view(k), value_view(v);

  AttentionForward p;
  p.dtype = q.dtype();
  p.batch = q.size(0), p.heads_q = q.size(1), p.heads_kv = k.size(1);
  p.len_q = q.size(2), p.len_k = k.size(2);
  p.head_dim = int32_t(q.size(3)), p.value_dim = int32_t(v.size(3));
  p.query = query_view.view, p.key = key_view.view, p.value = value_view.view;

  const Array counts("kv_num_blocks", kv_num_blocks, 3), indices("kv_indices", kv_indices, 4);
  const Array full_counts("full_kv_num_blocks", full_kv_num_blocks, 3);
  const Array full_indices("full_kv_indices", full_kv_indices, 4);
  const Array& first = counts.given() ? counts : full_counts;
  if (!first.given()) throw nb::type_error("kv_num_blocks: no list of key blocks is given");
  p.lists.partial = block_list(counts, indices, first);
  p.lists.full = block_list(full_counts, full_indices, first);
  p.lists.list_batch = first.size(0), p.lists.list_heads = first.size(1), p.lists.q_blocks = first.size(2);
  p.lists.block_q = int32_t(block_size.first), p.lists.block_k = int32_t(block_size.second);

  const Array bits("partial_bits", partial_bits, 3), bits_index("partial_bits_index", partial_bits_index, 4);
  if (bits.given() != bits_index.given() || (bits.given() && !indices.given())) {
    throw nb::type_error("partial_bits, partial_bits_index: give both, beside kv_indices, or none");
  }
  if (bits.given()) {
    bits.expect_shape({-1, block_size.first, p.lists.bits_words()});
    bits_index.expect_shape({indices.size(0), indices.size(1), indices.size(2), indices.size(3)});
    p.lists.bits = bits.int32s();
    p.lists.bits_count = bits.size(0);
    p.lists.bits_index = bits_index.int32s();
  }

  p.scale = float(scale ? *scale : 1 / std::sqrt(double(p.head_dim)));
  p.softcap = float(softcap);
  p.causal = causal;
  p.window_left = window.first, p.window_right = window.second;

  const Array bias("key_bias", key_bias, 3), sink("sinks", sinks, 1);
  if (bias.given()) {
    bias.expect_shape({bias.size(0) == 1 ? 1 : p.batch, bias.size(1) == 1 ? 1 : p.heads_q, p.len_k});
    p.key_bias = bias.floats();
    p.key_bias_head = bias.size(1) == 1 ? 0 : p.len_k;
    p.key_bias_batch = bias.size(0) == 1 ? 0 : bias.size(1) * p.len_k;
  }
  if (sink.given()) {
    sink.expect_shape({p.heads_q});
    p.sinks = sink.floats();
  }
  const Array q_at("query_positions", query_positions, 2), k_at("key_positions", key_positions, 2);
  if (q_at.given() != k_at.given()) throw nb::type_error("query_positions, key_positions: give both or none");
  if (q_at.given()) {
    q_at.expect_shape({q_at.size(0) == 1 ? 1 : p.batch, p.len_q});
    k_at.expect_shape({k_at.size(0) == 1 ? 1 : p.batch, p.len_k});
    p.query_positions = q_at.int32s(), p.key_positions = k_at.int32s();
    p.query_positions_batch = q_at.size(0) == 1 ? 0 : p.len_q;
    p.key_positions_batch = k_at.size(0) == 1 ? 0 : p.len_k;
  }

  OwnedArray out(p.dtype, {p.batch, p.heads_q, p.len_q, p.value_dim});
  const DType lse_dtype = p.dtype == DType::f64 ? DType::f64 : DType::f32;
  OwnedArray lse(lse_dtype, {p.batch, p.heads_q, p.len_q});
  p.out = {out.data(), p.heads_q * p.len_q * p.value_dim, p.len_q * p.value_dim, p.value_dim};
  if (lse_dtype == DType::f64) {
    p.lse_f64 = static_cast<double*>(lse.data());
  } else {
    p.lse = static_cast<float*>(lse.data());
  }
  Status status;
  {
    nb::gil_scoped_release release;
    status = sparsekit::attention_forward(p, thread_pool(threads));
  }
  raise(status);
  return nb::make_tuple(out.to_numpy(), lse.to_numpy());
}

}  // namespace
}  // namespace sparsekit::numpy

NB_MODULE(_numpy, m) {
  using namespace sparsekit;
  m.def("attention_forward", &numpy::attention_forward, nb::arg("query"), nb::arg("key"), nb::arg("value"),
        nb::arg("kv_num_blocks").none(), nb::arg("kv_indices").none(), nb::arg("full_kv_num_blocks").none(),
        nb::arg("full_kv_indices").none(), nb::arg("partial_bits").none(), nb::arg("partial_bits_index").none(),
        nb::arg("block_size").noconvert(), nb::arg("scale").none(), nb::arg("causal").noconvert(),
        nb::arg("window").noconvert(), nb::arg("softcap"), nb::arg("key_bias").none(), nb::arg("sinks").none(),
        nb::arg("query_positions").none(), nb::arg("key_positions").none(), nb::arg("threads").noconvert());
  m.def(
      "multiply_add_peak",
      [](const std::string& dtype, int threads) {
        for (DType candidate : {DType::f32, DType::f16, DType::bf16, DType::f64}) {
          if (dtype == name(candidate)) {
            nb::gil_scoped_release release;
            return multiply_add_peak(candidate, threads);
          }
        }
        throw nb::value_error(("dtype: " + dtype + " found; float32, float16, bfloat16, float64 supported").c_str());
      },
      nb::arg("dtype"), nb::arg("threads"),
      "FLOP/s of multiply-adds on registers: the most that the vector units of `threads` cores deliver.");
}
