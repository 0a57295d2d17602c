"""sparsekit.numpy: the same answers as the op on the same memory, and errors that name the argument."""

import numpy as np
import pytest
import torch

import sparsekit
import sparsekit.numpy
from sparsekit.bench.cases import AttentionCase, make_inputs

CASE = AttentionCase(
    batch=2, heads_q=4, heads_kv=2, len_q=70, len_k=100, head_dim=32, dtype=torch.float32, block_size=(16, 32)
)
LISTS = ("kv_num_blocks", "kv_indices", "full_kv_num_blocks", "full_kv_indices")
BITS = ("partial_bits", "partial_bits_index")


def call(inputs, convert=lambda tensor: tensor.numpy(), **changes):
    case, pattern = inputs.case, inputs.pattern
    names = {name: getattr(pattern, name) for name in (*LISTS, *BITS)} | inputs.kwargs
    softcap = names.pop("softcap", 0.0)
    arrays = {name: convert(tensor) for name, tensor in names.items() if tensor is not None}
    arrays |= {name: convert(getattr(inputs, name)) for name in ("query", "key", "value")}
    options = {"block_size": case.block_size, "causal": case.causal, "window": case.window, "softcap": softcap}
    return sparsekit.numpy.block_sparse_attention(**(arrays | options | changes))


@pytest.mark.parametrize("adversarial", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"causal": True, "bits": True},
        {"window": (9, 4), "lists": "kv"},
        {"softcap": 4.0, "key_bias": True, "sinks": True, "lists": "shared"},
        {"positions": True, "causal": True, "lists_batch": False},
    ],
    ids=lambda options: ",".join(options) or "plain",
)
def test_equals_the_op(options, adversarial, seed):
    inputs = make_inputs(CASE.with_(**options, adversarial=adversarial, seed=seed))
    wanted, wanted_lse = sparsekit.block_sparse_attention(*inputs.args, **inputs.kwargs, return_lse=True)
    out, lse = call(inputs)
    assert out.dtype == np.float32
    assert lse.dtype == np.float32
    np.testing.assert_array_equal(out, wanted.numpy())  # the same kernel: not a bit differs
    np.testing.assert_array_equal(lse, wanted_lse.numpy())


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_dtypes(dtype, seed):
    inputs = make_inputs(CASE.with_(dtype=dtype, seed=seed))
    wanted, wanted_lse = sparsekit.block_sparse_attention(*inputs.args, return_lse=True)
    out, lse = call(inputs)
    np.testing.assert_array_equal(out, wanted.numpy())
    np.testing.assert_array_equal(lse, wanted_lse.numpy())


def test_bfloat16_through_dlpack_and_as_its_bits(seed):
    inputs = make_inputs(CASE.with_(dtype=torch.bfloat16, seed=seed))
    wanted = sparsekit.block_sparse_attention(*inputs.args)
    out, _ = call(inputs, convert=lambda tensor: tensor)
    assert out.dtype == np.uint16
    np.testing.assert_array_equal(out, wanted.view(torch.uint16).numpy())
    bits, _ = call(inputs, convert=lambda t: t.view(torch.uint16).numpy() if t.dtype == torch.bfloat16 else t.numpy())
    np.testing.assert_array_equal(out, bits)


def test_strided_and_unaligned_arrays(seed):
    inputs = make_inputs(CASE.with_(seed=seed))
    wanted, _ = call(inputs)
    query = inputs.query.numpy()
    unaligned = np.empty(query.nbytes + 4, np.uint8)[4:].view(np.float32).reshape(query.shape)
    unaligned[:] = query
    for array in (np.asfortranarray(query), query[:, :, ::-1].copy()[:, :, ::-1], unaligned):
        array.setflags(write=False)
        np.testing.assert_array_equal(call(inputs, query=array)[0], wanted)


def test_any_number_of_threads_gives_the_same_bits(seed, monkeypatch):
    inputs = make_inputs(CASE.with_(seed=seed, len_q=500, len_k=500))
    wanted, _ = call(inputs, threads=1)
    for threads in (2, 3, 5):
        np.testing.assert_array_equal(call(inputs, threads=threads)[0], wanted)
    monkeypatch.setenv("SPARSEKIT_NUM_THREADS", "3")
    np.testing.assert_array_equal(call(inputs)[0], wanted)


def test_zero_sizes():
    for changes in ({"batch": 0}, {"len_q": 0}, {"len_k": 0}):
        inputs = make_inputs(CASE.with_(**changes))
        out, lse = call(inputs)
        assert out.shape == (inputs.case.batch, 4, inputs.case.len_q, 32)
        assert not out.any()
        assert (lse == -np.inf).all()


@pytest.mark.parametrize(
    ("error", "message", "changes"),
    [
        (TypeError, "query: list found", {"query": lambda x: x.tolist()}),
        (TypeError, "query: dtype int32 found; float32", {"query": lambda x: x.astype(np.int32)}),
        (TypeError, "key: dtype float64 found; query's float32", {"key": lambda x: x.astype(np.float64)}),
        (TypeError, "kv_num_blocks: dtype int64 found; int32", {"kv_num_blocks": lambda x: x.astype(np.int64)}),
        (ValueError, "query: 3 dimensions found; 4", {"query": lambda x: x[0]}),
        (ValueError, r"value: shape \(2, 2, 99, 32\) found", {"value": lambda x: x[:, :, :99]}),
        (ValueError, "full_kv_indices is not contiguous", {"full_kv_indices": lambda x: x[..., ::-1]}),
        (ValueError, r"kv_indices\[0, 0, 0, 0\] is 4; supported", {"kv_indices": lambda x: np.full_like(x, 4)}),
        (ValueError, "full_kv_num_blocks.* is 99; supported", {"full_kv_num_blocks": lambda x: np.full_like(x, 99)}),
        (ValueError, "block_size", {"block_size": lambda x: (0, 32)}),
        (ValueError, "3 heads", {"query": lambda x: np.ascontiguousarray(x[:, :3])}),
    ],
)
def test_errors_name_the_argument(error, message, changes):
    inputs = make_inputs(CASE.with_(causal=True, density=0.8))
    (name, change), *_ = changes.items()
    tensor = getattr(inputs, name, None)
    tensor = getattr(inputs.pattern, name) if tensor is None else tensor
    value = change(tensor.numpy() if isinstance(tensor, torch.Tensor) else tensor)
    with pytest.raises(error, match=message):
        call(inputs, **{name: value})


def test_forced_instruction_set_is_read_at_every_call(seed):
    inputs = make_inputs(CASE.with_(seed=seed))
    wanted, _ = call(inputs)
    with sparsekit.isa("reference"):
        exact, _ = call(inputs)
    np.testing.assert_allclose(exact, wanted, atol=1e-5)
    with sparsekit.isa("sse9"), pytest.raises(ValueError, match="SPARSEKIT_ISA"):
        call(inputs)
