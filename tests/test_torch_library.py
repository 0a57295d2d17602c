"""What torch asks of an op besides its result: fake kernels, autograd, autocast, vmap, compile, export.

On CUDA as on the CPU; the kernels' own numbers are tested in test_attention.py.
"""

import math

import pytest
import torch
import torch._dynamo.testing
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from torch._dynamo.backends.common import aot_autograd
from torch.library import opcheck

import sparsekit
from backends import BACKENDS
from sparsekit import BlockPattern, reference, selection
from sparsekit.bench.cases import AttentionCase, make_inputs

OPS = torch.ops.sparsekit
DEVICES = [
    pytest.param(name, marks=[pytest.mark.cuda] if name == "cuda" else [])
    for name in sorted({backend.device for backend in BACKENDS})
]
BLOCK = (64, 64)
SMALL = AttentionCase(
    batch=2,
    heads_q=4,
    heads_kv=2,
    len_q=150,
    len_k=200,
    head_dim=32,
    dtype=torch.float32,
    block_size=BLOCK,
    density=0.5,
)
CASES = {
    "plain": SMALL,
    "causal-bits": SMALL.with_(causal=True, bits=True, adversarial=True),
    "everything": SMALL.with_(
        causal=True, window=(90, -1), bits=True, softcap=5.0, key_bias=True, sinks=True, positions=True, lists="shared"
    ),
}
PACKED = SMALL.with_(batch=1, lens_q=(70, 0, 129), lens_k=(64, 5, 200), causal=True, sinks=True)


@pytest.fixture(params=DEVICES)
def device(request) -> str:
    return request.param


def case_of(name: str, seed: int, **changes) -> AttentionCase:
    return CASES[name].with_(seed=seed, **changes)


def op_arguments(inputs) -> tuple:
    """Positional arguments of block_sparse_attn for a case."""
    pattern = inputs.pattern
    lists = (pattern.kv_num_blocks, pattern.kv_indices, pattern.full_kv_num_blocks, pattern.full_kv_indices)
    packed = ()
    if inputs.case.packed:
        packed = (inputs.cu_seqlens_q, inputs.cu_seqlens_k, max(inputs.case.lens_q), max(inputs.case.lens_k))
    return (
        *(inputs.query, inputs.key, inputs.value, *lists, pattern.partial_bits, pattern.partial_bits_index),
        *(pattern.block_size, *packed, None, pattern.causal, pattern.window, inputs.case.softcap),
        *(inputs.key_bias, inputs.sinks, inputs.query_positions, inputs.key_positions),
    )


def leaves(inputs) -> list[torch.Tensor]:
    named = [inputs.query, inputs.key, inputs.value, inputs.key_bias, inputs.sinks]
    return [tensor.requires_grad_() for tensor in named if tensor is not None]


def close(actual, expected, factor: float = 1.0):
    """Equal up to float32 rounding of sums over a few hundred terms."""
    torch.testing.assert_close(actual, expected.to(actual.dtype), rtol=2e-5 * factor, atol=2e-5 * factor)


# ---- opcheck


@pytest.mark.parametrize("name", CASES)
def test_opcheck_attention(device, name, seed):
    inputs = make_inputs(case_of(name, seed), device)
    leaves(inputs)
    opcheck(OPS.block_sparse_attn, op_arguments(inputs))


def test_opcheck_attention_varlen(device, seed):
    if device == "cuda":
        pytest.skip("packed batches have no backward on CUDA yet")
    inputs = make_inputs(PACKED.with_(seed=seed), device)
    leaves(inputs)
    opcheck(OPS.block_sparse_attn_varlen, op_arguments(inputs))


@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
def test_opcheck_backward(device, layout, seed):
    inputs = make_inputs(case_of("everything", seed), device)
    if layout == "bshd":
        for name in ("query", "key", "value"):
            setattr(inputs, name, getattr(inputs, name).transpose(1, 2).contiguous().transpose(1, 2))
    arguments = op_arguments(inputs)
    out, lse = OPS.block_sparse_attn(*arguments)
    grads = (torch.randn_like(out), torch.randn_like(lse))
    opcheck(
        OPS.block_sparse_attn_backward,
        (*grads, *arguments[:3], out, lse, *arguments[3:]),
        {"key_bias_grad": True, "deterministic": True},
        test_utils=("test_schema", "test_faketensor"),
    )


def test_opcheck_merge(device):
    outs = [torch.randn(2, 3, 50, 8, device=device, requires_grad=True) for _ in range(3)]
    lses = [torch.randn(2, 3, 50, device=device, requires_grad=True) for _ in range(3)]
    opcheck(OPS.merge_attention_states, (outs, lses))


def test_opcheck_lists(device, seed):
    block_map = torch.rand(2, 3, 9, 7, device=device) < 0.4
    opcheck(OPS.block_lists_from_bool, (block_map, 5))
    pattern = make_inputs(case_of("plain", seed), device).pattern
    arguments = (pattern.kv_num_blocks, pattern.kv_indices, pattern.full_kv_num_blocks, pattern.full_kv_indices)
    opcheck(OPS.transpose_block_lists, (*arguments, pattern.block_size, SMALL.len_k))


def test_output_layout_follows_query(device, seed):
    """In memory order too, and the fake kernel agrees (opcheck compares strides)."""
    inputs = make_inputs(case_of("plain", seed), device)
    inputs.query = inputs.query.transpose(1, 2).contiguous().transpose(1, 2)
    out = sparsekit.block_sparse_attention(*inputs.args)
    assert out.transpose(1, 2).is_contiguous()
    opcheck(OPS.block_sparse_attn, op_arguments(inputs), test_utils=("test_schema", "test_faketensor"))


# ---- autograd


def test_gradcheck(seed):
    """float64 through the reference kernel: out and lse against every differentiable float64 argument."""
    case = AttentionCase(
        **dict(batch=1, heads_q=2, heads_kv=1, len_q=9, len_k=11, head_dim=3, value_dim=2, dtype=torch.float64),
        **dict(block_size=(4, 4), density=0.7, causal=True, softcap=3.0, key_bias=True, sinks=True, seed=seed),
    )
    inputs = make_inputs(case)
    leaves(inputs)
    seen = inputs.pattern.to_token_mask().any(-1).repeat_interleave(2 // inputs.pattern.kv_indices.shape[1], dim=1)

    def attend(query, key, value):
        out, lse = sparsekit.block_sparse_attention(query, key, value, inputs.pattern, **inputs.kwargs, return_lse=True)
        return out, lse.masked_fill(~seen, 0)

    assert torch.autograd.gradcheck(attend, (inputs.query, inputs.key, inputs.value), fast_mode=True)


@pytest.mark.parametrize("name", CASES)
def test_gradients(device, name, seed):
    """Of out and lse together, against autograd of the reference."""
    inputs = make_inputs(case_of(name, seed), device)
    tensors = leaves(inputs)
    out, lse = sparsekit.block_sparse_attention(*inputs.args, **inputs.kwargs, return_lse=True)
    expected, expected_lse = reference.block_sparse_attention(*inputs.args, **inputs.kwargs)
    close(out, expected)
    close(lse, expected_lse)
    grad_out, grad_lse = torch.randn_like(out), torch.randn_like(lse).masked_fill(lse.isinf(), 0)
    actual = torch.autograd.grad((out, lse), tensors, (grad_out, grad_lse))
    wanted = torch.autograd.grad((expected, expected_lse), tensors, (grad_out.double(), grad_lse.double()))
    for got, want in zip(actual, wanted, strict=True):
        close(got, want, 10)


def test_gradients_varlen(seed):
    inputs = make_inputs(PACKED.with_(seed=seed))
    tensors = leaves(inputs)
    out, lse = sparsekit.block_sparse_attention_varlen(*inputs.args, **inputs.kwargs, return_lse=True)
    expected, expected_lse = reference.block_sparse_attention_varlen(*inputs.args, **inputs.kwargs)
    grad_out, grad_lse = torch.randn_like(out), torch.randn_like(lse).masked_fill(lse.isinf(), 0)
    actual = torch.autograd.grad((out, lse), tensors, (grad_out, grad_lse))
    wanted = torch.autograd.grad((expected, expected_lse), tensors, (grad_out.double(), grad_lse.double()))
    for got, want in zip((out, lse, *actual), (expected, expected_lse, *wanted), strict=True):
        close(got, want, 10)


@pytest.mark.parametrize("shape", [(1, 1), (2, 1), (1, 4), (2, 4)])
def test_key_bias_gradient_has_its_shape(device, shape, seed):
    inputs = make_inputs(case_of("plain", seed), device)
    bias = torch.randn(*shape, SMALL.len_k, device=device, requires_grad=True)
    weight = torch.randn(2, 4, SMALL.len_q, 32, device=device)
    results = []
    for attend in (sparsekit.block_sparse_attention, lambda *a, **k: reference.block_sparse_attention(*a, **k)[0]):
        (grad,) = torch.autograd.grad((attend(*inputs.args, key_bias=bias) * weight).sum(), bias)
        results.append(grad)
    assert results[0].shape == bias.shape
    close(results[0], results[1], 10)


def test_lse_alone_has_gradients(device, seed):
    """No gradient reaches out: backward must not need one."""
    inputs = make_inputs(case_of("plain", seed, density=1.0), device)
    tensors = leaves(inputs)[:2]
    _, lse = sparsekit.block_sparse_attention(*inputs.args, return_lse=True)
    _, expected = reference.block_sparse_attention(*inputs.args)
    for got, want in zip(
        torch.autograd.grad(lse.sum(), tensors), torch.autograd.grad(expected.sum(), tensors), strict=True
    ):
        close(got, want, 10)


def test_double_backward_is_refused(device, seed):
    inputs = make_inputs(case_of("plain", seed), device)
    tensors = leaves(inputs)
    (grad, *_) = torch.autograd.grad(
        sparsekit.block_sparse_attention(*inputs.args).square().sum(), tensors, create_graph=True
    )
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        grad.sum().backward()


def test_transpose_is_kept_between_backwards(device, seed, monkeypatch):
    """One transpose serves all layers that share a pattern, until a list changes in place."""
    inputs = make_inputs(case_of("plain", seed), device)
    leaves(inputs)
    calls = []
    transpose = OPS.transpose_block_lists

    class Counting:
        def __getattr__(self, name):
            return getattr(transpose, name)

        def __call__(self, *arguments):
            calls.append(1)
            return transpose(*arguments)

    monkeypatch.setattr(OPS, "transpose_block_lists", Counting())
    for _ in range(3):
        sparsekit.block_sparse_attention(*inputs.args).sum().backward()
    assert len(calls) == 1
    inputs.pattern.kv_num_blocks.clamp_(max=1)
    inputs.query.grad = None
    sparsekit.block_sparse_attention(*inputs.args).sum().backward()
    assert len(calls) == 2
    expected, _ = reference.block_sparse_attention(*inputs.args)
    close(inputs.query.grad, torch.autograd.grad(expected.sum(), inputs.query)[0], 10)


@pytest.mark.parametrize("states", [1, 2, 40])
@pytest.mark.parametrize("packed", [False, True], ids=["batch", "packed"])
def test_merge_states(device, states, packed):
    """Against the formula in float64, rows without keys included. 40 states are more than one call of the op takes."""
    shape = (5, 3) if packed else (2, 3, 5)
    outs = [torch.randn(*shape, 8, device=device) for _ in range(states)]
    lses = [torch.randn(shape[::-1] if packed else shape, device=device) * 3 for _ in range(states)]
    for out, lse in zip(outs, lses, strict=True):
        blind = torch.rand(lse.shape, device=device) < 0.4
        lse.masked_fill_(blind, -math.inf)
        out.masked_fill_((blind.t() if packed else blind)[..., None], 0)
    for tensor in (*outs, *lses):
        tensor.requires_grad_()
    out, lse = sparsekit.merge_attention_states(outs, lses)

    wide = torch.stack([x.double() for x in lses])
    expected_lse = wide.logsumexp(0)
    weight = torch.exp(wide - expected_lse.masked_fill(expected_lse.isinf(), 0))
    weight = weight.transpose(1, 2) if packed else weight
    expected = (weight[..., None] * torch.stack([x.double() for x in outs])).sum(0)
    close(out, expected)
    close(lse, expected_lse)
    grad_out, grad_lse = torch.randn_like(out), torch.randn_like(lse).masked_fill(lse.isinf(), 0)
    actual = torch.autograd.grad((out, lse), (*outs, *lses), (grad_out, grad_lse))
    assert all(grad.isfinite().all() for grad in actual)
    finite = [x.detach().clone().requires_grad_() for x in (*outs, *lses)]
    wide = torch.stack([x.double() for x in finite[states:]])
    expected_lse = torch.where(expected_lse.isinf(), 0, wide.clamp(min=-1e4).logsumexp(0))
    weight = torch.exp(wide.clamp(min=-1e4) - expected_lse)
    weight = weight.transpose(1, 2) if packed else weight
    expected = (weight[..., None] * torch.stack([x.double() for x in finite[:states]])).sum(0)
    wanted = torch.autograd.grad((expected, expected_lse), finite, (grad_out.double(), grad_lse.double()))
    for got, want in zip(actual, wanted, strict=True):
        close(got, want, 10)


def test_merge_of_split_keys_is_attention(device, seed):
    inputs = make_inputs(case_of("plain", seed, causal=True), device)
    dense = inputs.pattern.to_dense().bool()
    states = []
    for part in range(3):
        half = dense.clone()
        half[..., part::3] = False
        half ^= dense  # every third block
        pattern = BlockPattern.from_bool(half, BLOCK, seq_lengths=(SMALL.len_q, SMALL.len_k), causal=True)
        states.append(sparsekit.block_sparse_attention(*inputs.args[:3], pattern, return_lse=True))
    out, lse = sparsekit.merge_attention_states(*zip(*states, strict=True))
    whole = BlockPattern.from_bool(dense, BLOCK, seq_lengths=(SMALL.len_q, SMALL.len_k), causal=True)
    expected, expected_lse = reference.block_sparse_attention(*inputs.args[:3], whole)
    close(out, expected)
    close(lse, expected_lse)


# ---- autocast


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(device, dtype, seed):
    inputs = make_inputs(case_of("everything", seed), device)
    tensors = leaves(inputs)
    with torch.autocast(device, dtype=dtype):
        out, lse = sparsekit.block_sparse_attention(*inputs.args, **inputs.kwargs, return_lse=True)
    assert out.dtype == dtype and lse.dtype == torch.float32
    inputs16 = [tensor.to(dtype) for tensor in inputs.args[:3]]
    torch.testing.assert_close(out, sparsekit.block_sparse_attention(*inputs16, inputs.pattern, **inputs.kwargs))
    grads = torch.autograd.grad(out.float().sum(), tensors)
    assert all(grad.dtype == tensor.dtype for grad, tensor in zip(grads, tensors, strict=True))


# ---- vmap


def loop(function, *tensors):
    return [torch.stack(parts) for parts in zip(*(function(*x) for x in zip(*tensors, strict=True)), strict=True)]


MAPPED = {  # which of query, key, value, lists, bits, key_bias, sinks, query_positions is mapped
    "qkv": ("query", "key", "value"),
    "query": ("query",),
    "lists": ("lists",),
    "qkv-lists-bits": ("query", "key", "value", "lists", "bits"),
    "bits": ("bits",),
    "bias-positions": ("key_bias", "query_positions"),
    "sinks": ("sinks", "query"),
}


@pytest.mark.parametrize("lists_batch", [True, False], ids=["lists-per-batch", "lists-shared"])
@pytest.mark.parametrize("mapped", MAPPED)
def test_vmap(device, mapped, lists_batch, seed):
    """vmap equals a loop, whatever is mapped, along whichever dimension."""
    size, mapped = 3, MAPPED[mapped]
    case = case_of("everything", seed, lists_batch=lists_batch)
    draws = [make_inputs(case.with_(seed=seed + i), device) for i in range(size)]
    capacity = [max(getattr(x.pattern, name).shape[-1] for x in draws) for name in ("kv_indices", "full_kv_indices")]
    masks = max(x.pattern.partial_bits.shape[0] for x in draws)

    def wide(tensor, dim, length, value=-1):
        return torch.nn.functional.pad(tensor, (*(0, 0) * (-1 - dim), 0, length - tensor.shape[dim]), value=value)

    def tensors_of(inputs) -> dict:
        p = inputs.pattern
        lists = {
            "kv_num_blocks": p.kv_num_blocks,
            "kv_indices": wide(p.kv_indices, -1, capacity[0]),
            "full_kv_num_blocks": p.full_kv_num_blocks,
            "full_kv_indices": wide(p.full_kv_indices, -1, capacity[1]),
            "partial_bits_index": wide(p.partial_bits_index, -1, capacity[0]),
        }
        named = {"bits": wide(p.partial_bits, -3, masks, 0), "lists": lists}
        for name in ("query", "key", "value", "key_bias", "sinks", "query_positions", "key_positions"):
            named[name] = getattr(inputs, name)
        return named

    def attend(arguments):
        lists = arguments["lists"]
        pattern = BlockPattern(
            *(lists[name] for name in ("kv_num_blocks", "kv_indices", "full_kv_num_blocks", "full_kv_indices")),
            arguments["bits"],
            lists["partial_bits_index"],
            block_size=BLOCK,
            seq_lengths=(case.len_q, case.len_k),
            causal=case.causal,
            window=case.window,
        )
        options = {name: arguments[name] for name in ("key_bias", "sinks", "query_positions", "key_positions")}
        query, key, value = (arguments[name] for name in ("query", "key", "value"))
        return sparsekit.block_sparse_attention(
            query, key, value, pattern, softcap=case.softcap, return_lse=True, **options
        )

    parts = [tensors_of(inputs) for inputs in draws]
    if "lists" in mapped and "bits" not in mapped:  # numbers into one table
        for part in parts:
            part["lists"]["partial_bits_index"] = part["lists"]["partial_bits_index"].clamp(max=masks - 1)
    arguments, in_dims = dict(parts[0]), dict.fromkeys(parts[0])
    dims = {"query": 1, "key": 2, "value": 0, "lists": 0, "bits": 1, "key_bias": 2, "sinks": 0, "query_positions": 1}
    for name in mapped:
        dim = in_dims[name] = dims[name]
        if name == "lists":
            arguments[name] = {key: torch.stack([part[name][key] for part in parts], dim) for key in parts[0][name]}
        else:
            arguments[name] = torch.stack([part[name] for part in parts], dim)

    def element(index):
        chosen = {}
        for name, value in arguments.items():
            if in_dims[name] is None:
                chosen[name] = value
            elif name == "lists":
                chosen[name] = {key: x.select(in_dims[name], index) for key, x in value.items()}
            else:
                chosen[name] = value.select(in_dims[name], index)
        return chosen

    for got, want in zip(
        torch.vmap(attend, in_dims=(in_dims,))(arguments),
        [torch.stack(x) for x in zip(*(attend(element(i)) for i in range(size)), strict=True)],
        strict=True,
    ):
        close(got, want)


def test_vmap_through_autograd(device, seed):
    """Gradients of a mapped call; and a mapped backward, as is_grads_batched asks for."""
    inputs = make_inputs(case_of("everything", seed), device)
    tensors = leaves(inputs)
    queries = torch.stack([inputs.query, -inputs.query]).detach().requires_grad_()
    rest = inputs.args[1:]

    def attend(query):
        return sparsekit.block_sparse_attention(query, *rest, **inputs.kwargs)

    together, apart = torch.vmap(attend)(queries), torch.stack([attend(query) for query in queries])
    close(together, apart)
    grad = torch.randn_like(apart)
    for got, want in zip(
        torch.autograd.grad(together, (queries, *tensors[1:]), grad),
        torch.autograd.grad(apart, (queries, *tensors[1:]), grad),
        strict=True,
    ):
        close(got, want, 10)

    out, lse = sparsekit.block_sparse_attention(*inputs.args, **inputs.kwargs, return_lse=True)
    grads = [torch.randn(3, *out.shape, device=device), torch.randn(3, *lse.shape, device=device)]
    together = torch.autograd.grad((out, lse), tensors, grads, is_grads_batched=True, retain_graph=True)
    apart = [torch.autograd.grad((out, lse), tensors, one, retain_graph=True) for one in zip(*grads, strict=True)]
    for got, want in zip(together, zip(*apart, strict=True), strict=True):
        close(got, torch.stack(want), 10)


def test_torch_func_gradients(device, seed):
    """torch.func.grad, alone and on either side of vmap, gives what backward() gives."""
    inputs = make_inputs(case_of("everything", seed), device)
    rest = inputs.args[3:]

    def loss(*tensors):
        out, lse = sparsekit.block_sparse_attention(*tensors, *rest, **inputs.kwargs, return_lse=True)
        return out.square().sum() + torch.where(lse.isfinite(), lse, 0).sum()

    tensors = leaves(inputs)[:3]
    want = torch.autograd.grad(loss(*tensors), tensors)
    tensors = [tensor.detach() for tensor in tensors]
    grads = torch.func.grad(loss, argnums=(0, 1, 2))
    for got, expected in zip(grads(*tensors), want, strict=True):
        close(got, expected, 10)

    pairs = [torch.stack([tensor, tensor.flip(0)]) for tensor in tensors]
    inside = torch.func.vmap(grads)(*pairs)
    outside = torch.func.grad(lambda *pairs: torch.func.vmap(loss)(*pairs).sum(), argnums=(0, 1, 2))(*pairs)
    for mapped, reduced, expected in zip(inside, outside, want, strict=True):
        close(mapped[0], expected, 10)
        close(reduced, mapped, 10)


def test_vmap_varlen(seed):
    draws = [make_inputs(PACKED.with_(seed=seed + i)) for i in range(3)]
    query = torch.stack([inputs.query for inputs in draws], 1)
    rest = draws[0].args[1:]
    got = torch.vmap(lambda q: sparsekit.block_sparse_attention_varlen(q, *rest), in_dims=1)(query)
    want = torch.stack([sparsekit.block_sparse_attention_varlen(inputs.query, *rest) for inputs in draws])
    close(got, want)


def test_vmap_merge(device):
    outs, lses = torch.randn(4, 3, 2, 2, 5, 8, device=device), torch.randn(4, 3, 2, 2, 5, device=device)
    got = torch.vmap(lambda o, s: sparsekit.merge_attention_states(o.unbind(0), s.unbind(0)))(outs, lses)
    calls = [sparsekit.merge_attention_states(o.unbind(0), s.unbind(0)) for o, s in zip(outs, lses, strict=True)]
    for a, b in zip(got, [torch.stack(x) for x in zip(*calls, strict=True)], strict=True):
        close(a, b)


# ---- compile, export


@pytest.fixture
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@torch.fx.experimental._config.patch(use_duck_shape=False)  # a list's length equals another size by chance
@pytest.mark.parametrize("engine", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compile_with_dynamic_shapes(device, engine, seed, fresh_dynamo):
    """One graph, forward and backward, patterns as arguments; a second shape does not recompile."""
    counter = torch._dynamo.testing.CompileCounterWithBackend(engine)

    @torch.compile(fullgraph=True, dynamic=True, backend=counter)
    def attend(query, key, value, pattern, key_bias, sinks):
        return sparsekit.block_sparse_attention(
            query * 1.5, key, value, pattern, key_bias=key_bias, sinks=sinks, return_lse=True
        )

    for step, lengths in enumerate([(150, 200), (260, 330), (450, 520)]):
        case = SMALL.with_(len_q=lengths[0], len_k=lengths[1], key_bias=True, sinks=True, seed=seed + step)
        inputs = make_inputs(case, device)
        tensors = leaves(inputs)
        options = {"key_bias": inputs.key_bias, "sinks": inputs.sinks}
        out, lse = attend(*inputs.args, *options.values())
        expected = reference.block_sparse_attention(inputs.query * 1.5, *inputs.args[1:], **options)
        close(out, expected[0])
        close(lse, expected[1])
        grads = torch.autograd.grad(out.sum(), tensors)
        for got, want in zip(grads, torch.autograd.grad(expected[0].sum(), tensors), strict=True):
            close(got, want, 10)
    assert counter.frame_count == 1


def test_compile_builds_patterns(device, fresh_dynamo):
    """Selection and attention in one graph: a map is scored, cut to a list and attended to."""

    @torch.compile(fullgraph=True, backend="aot_eager")
    def attend(query, key, value):
        scores = query.unflatten(2, (-1, 64)).mean(3) @ key.unflatten(2, (-1, 64)).mean(3).transpose(-1, -2)
        best = scores.topk(2, dim=-1).indices
        pattern = BlockPattern.from_indices(best, None, 64, seq_lengths=(query.shape[2], key.shape[2]), causal=True)
        first = sparsekit.block_sparse_attention(query, key, value, pattern)
        pattern = BlockPattern.from_bool(scores > 0, 64, causal=True, window=(100, -1))
        return first, sparsekit.block_sparse_attention(query, key, value, pattern)

    query, key, value = (torch.randn(1, 2, 256, 32, device=device, requires_grad=True) for _ in range(3))
    compiled = attend(query, key, value)
    eager = attend._torchdynamo_orig_callable(query, key, value)
    for got, want in zip(compiled, eager, strict=True):
        close(got, want)
    got, want = (torch.autograd.grad(sum(x.sum() for x in outs), (query, key, value)) for outs in (compiled, eager))
    for a, b in zip(got, want, strict=True):
        close(a, b)


def test_compile_shares_one_transpose(device, seed, fresh_dynamo):
    """Layers with one pattern transpose it once: the compiler sees the op and merges equal calls."""
    inputs = make_inputs(case_of("plain", seed, len_k=150, heads_kv=4), device)
    leaves(inputs)
    graphs = []

    def keep(graph, _):
        graphs.append(graph)
        return graph

    backend = aot_autograd(
        fw_compiler=lambda graph, _: make_boxed_func(keep(graph, _)),
        bw_compiler=lambda graph, _: make_boxed_func(keep(graph, _)),
        partition_fn=min_cut_rematerialization_partition,  # as Inductor has it
    )

    @torch.compile(fullgraph=True, backend=backend)
    def layers(x, key, value, pattern):
        for _ in range(3):
            x = sparsekit.block_sparse_attention(x, key, value, pattern)
        return x

    layers(*inputs.args).sum().backward()
    calls = [node.target for graph in graphs for node in graph.graph.nodes if node.op == "call_function"]
    assert calls.count(OPS.block_sparse_attn_backward.default) == 3
    assert calls.count(OPS.transpose_block_lists.default) == 1


def test_export(device, seed):
    class Attention(torch.nn.Module):
        def forward(self, query, key, value, pattern):
            return sparsekit.block_sparse_attention(query, key, value, pattern)

    inputs = make_inputs(case_of("causal-bits", seed), device)
    for strict in (False, True):
        program = torch.export.export(Attention(), inputs.args, strict=strict)
        assert OPS.block_sparse_attn.default in {node.target for node in program.graph.nodes}
        close(program.module()(*inputs.args), sparsekit.block_sparse_attention(*inputs.args))


def test_export_saves_a_pattern(tmp_path, seed):
    class Attention(torch.nn.Module):
        def forward(self, query, key, value, pattern):
            return sparsekit.block_sparse_attention(query, key, value, pattern)

    inputs = make_inputs(case_of("causal-bits", seed))
    torch.export.save(torch.export.export(Attention(), inputs.args), tmp_path / "attention.pt2")
    program = torch.export.load(tmp_path / "attention.pt2")
    close(program.module()(*inputs.args), sparsekit.block_sparse_attention(*inputs.args))


def test_compile_refuses_an_unconverted_block_mask(device, fresh_dynamo):
    from torch.nn.attention.flex_attention import create_block_mask

    mask = create_block_mask(lambda b, h, q, k: q >= k, None, None, 256, 256, device=device)
    query = torch.randn(1, 2, 256, 32, device=device)
    with pytest.raises(Exception, match="BlockPattern.from_flex"):
        torch.compile(sparsekit.block_sparse_attention, fullgraph=True, backend="eager")(query, query, query, mask)


# ---- CUDA graphs


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", CASES)
def test_graph_capture_reads_the_lists_of_the_replay(name, seed):
    """Forward and backward in one graph; then lists, inputs and counts change in place."""
    inputs = make_inputs(case_of(name, seed), "cuda")
    tensors = leaves(inputs)

    def step():
        out, lse = sparsekit.block_sparse_attention(*inputs.args, **inputs.kwargs, return_lse=True)
        return out, lse, *torch.autograd.grad(out.float().sum(), tensors)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        inputs.query.mul_(-1)
        inputs.pattern.kv_num_blocks.sub_(1).clamp_(min=0)
    graph.replay()
    for got, want in zip(captured, step(), strict=True):
        close(got, want, 10)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_graph_capture_refuses_an_unconverted_block_mask():
    from torch.nn.attention.flex_attention import create_block_mask

    mask = create_block_mask(lambda b, h, q, k: q >= k, None, None, 256, 256, device="cuda")
    query = torch.randn(1, 2, 256, 64, device="cuda")
    with pytest.raises(RuntimeError, match="before this graph capture"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        sparsekit.block_sparse_attention(query, query, query, mask)
    expected = sparsekit.block_sparse_attention(query, query, query, mask)  # converts it
    with torch.cuda.graph(graph := torch.cuda.CUDAGraph()):
        out = sparsekit.block_sparse_attention(query, query, query, mask)
    graph.replay()
    close(out, expected)


# ---- the schema


def test_every_op_is_reachable_and_registered():
    for name in ("block_sparse_attn", "block_sparse_attn_varlen"):
        arguments = [argument.name for argument in getattr(OPS, name).default._schema.arguments]
        assert arguments[:10] == [
            *("query", "key", "value", "kv_num_blocks", "kv_indices", "full_kv_num_blocks", "full_kv_indices"),
            *("partial_bits", "partial_bits_index", "block_size"),
        ]
        assert arguments[-10:] == [
            *("scale", "causal", "window", "softcap", "key_bias", "sinks", "query_positions", "key_positions"),
            *("transpose_offsets", "transpose_slots"),
        ]
    block_map = torch.rand(1, 1, 4, 4) < 0.5
    counts, indices = selection.block_lists_from_bool(block_map)
    assert torch.equal(counts.long(), block_map.sum(-1)) and indices.shape == (1, 1, 4, 4)
