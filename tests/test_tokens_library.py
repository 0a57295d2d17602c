"""The token ops as torch sees them: gradients, opcheck, compile, vmap, on every device."""

# ruff: noqa: F811 (fixtures of test_tokens are arguments here)

import functools

import pytest
import torch
from torch.library import opcheck

import sparsekit
from sparsekit import reference_tokens as reference
from test_tokens import FLOATS, assert_rounded, device, on_the_device, random, random_index, running  # noqa: F401 (fixtures)

OPS = torch.ops.sparsekit


def doubles(*shape):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


# ---- gradients


REDUCES = ["copy", "add", "mean"]  # in the order of the op's numbers


@pytest.mark.parametrize("places", [None, 2])
@pytest.mark.parametrize("reduce", REDUCES)
@pytest.mark.parametrize("based", [False, True])
def test_gradcheck_scatter(device, reduce, places, based):
    index = random_index(*((2, 6) if places is None else (2, 6, places)), tokens=4)
    src, heads = doubles(2, 6, 3), doubles(2, 2, 6, 2)
    base = [doubles(2, 4, 3), doubles(2, 2, 4, 2)] if based else []
    weights = None
    if reduce != "copy":
        weights = (torch.rand(index.shape, dtype=torch.float64) + 0.3).requires_grad_()

    def call(src, heads, weights, *base):
        outs, totals = OPS.scatter_tokens([src, heads], weights, list(base), index, [1, 2], 4, REDUCES.index(reduce))
        return (*outs, totals) if weights is not None else tuple(outs)

    assert torch.autograd.gradcheck(call, (src, heads, weights, *base))


def test_gradcheck_gather_and_unmerge(device):
    x, heads, index = doubles(2, 5, 3), doubles(2, 2, 5, 2), random_index(2, 9, tokens=5)
    call = functools.partial(sparsekit.gather_tokens, index=index, dim=[1, 2])
    assert torch.autograd.gradcheck(lambda *tensors: call(tensors), (x, heads))
    assert torch.autograd.gradgradcheck(lambda *tensors: call(tensors), (x, heads))


def test_gradcheck_packed(device):
    cu, cu_out = torch.tensor([0, 3, 3, 7]).int(), torch.tensor([0, 2, 4, 5]).int()
    index = torch.stack([random_index(4, tokens=n) for n in (3, 0, 4)])
    packed = doubles(8, 3)
    assert torch.autograd.gradcheck(lambda x: sparsekit.gather_tokens(x, index, cu_seqlens=cu), packed)
    assert torch.autograd.gradcheck(
        lambda x: sparsekit.gather_tokens(x, index, cu_seqlens=cu, cu_seqlens_out=cu_out, length=6), packed
    )
    weights, base = torch.rand(3, 4, dtype=torch.float64).requires_grad_(), doubles(6, 3)
    to = torch.stack([random_index(4, tokens=n) for n in (2, 2, 1)])
    for reduce in ("add", "mean"):
        assert torch.autograd.gradcheck(
            lambda x, w, b, reduce=reduce: sparsekit.scatter_tokens(
                x, to, 6, reduce=reduce, weights=w, base=b, cu_seqlens=cu, cu_seqlens_out=cu_out
            ),
            (packed, weights, base),
        )


def test_gradcheck_merge_then_attend(device):
    """Through sizes as key_bias = log(size), as a network uses them."""
    x, sizes = doubles(2, 10, 4), (torch.rand(2, 10, dtype=torch.float64) + 0.5).requires_grad_()
    match = sparsekit.bipartite_match(x, 3, protect=1)

    def call(x, sizes):
        merged, sizes = sparsekit.merge_tokens(x, match, sizes)
        return merged, sparsekit.token_size_bias(sizes)

    assert torch.autograd.gradcheck(call, (x, sizes))


def test_size_zero_has_no_gradient(device):
    sizes = torch.tensor([[1.0, 0.0, 3.0]], requires_grad=True)
    bias = sparsekit.token_size_bias(sizes)
    torch.where(bias.isfinite(), bias, 0).sum().backward()
    assert sizes.grad.tolist() == [[1.0, 0.0, pytest.approx(1 / 3)]]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("places", [None, 2])
@pytest.mark.parametrize("reduce", ["add", "mean"])
def test_backward_kernels(backend, dtype, reduce, places):
    """Every instruction set's gradients for tensors and weights, against float64 autograd."""
    shape = (2, 20) if places is None else (2, 20, places)
    with running(backend, dtype):
        for inner in (1, 33, 130):
            src, index = random(2, 20, inner, dtype=dtype), random_index(*shape, tokens=9)
            weights = torch.rand(shape) + 0.1
            leaves = src.clone().requires_grad_(), weights.clone().requires_grad_()
            outs, totals = OPS.scatter_tokens([leaves[0]], leaves[1], [], index, [1], 9, REDUCES.index(reduce))
            grad, grad_totals = random(2, 9, inner, dtype=dtype), torch.randn(2, 9)
            got = torch.autograd.grad([*outs, totals], leaves, [grad, grad_totals])

            def by_reference(absolute, src=src, weights=weights, grad=grad, grad_totals=grad_totals, index=index):
                x, w = src.double().requires_grad_(), weights.double().requires_grad_()
                if absolute:
                    x = x.detach().abs().requires_grad_()
                out, totals = reference.scatter_tokens(x, index, 9, reduce=reduce, weights=w)
                grads = (grad.double(), grad_totals.double())
                return torch.autograd.grad([out, totals], (x, w), [g.abs() for g in grads] if absolute else grads)

            want, terms = by_reference(False), by_reference(True)
            assert_rounded(got[0], want[0], terms[0].abs())
            # <grad, x - out> / total: `out` comes in the payload's dtype; its rounding is part of the terms
            size = (
                grad.double().abs().amax() * src.double().abs().amax() * inner / totals.abs().clamp(min=0.1).min()
            ).item()
            error = torch.finfo(dtype).eps * size if reduce == "mean" else torch.finfo(torch.float32).eps * 8 * size
            torch.testing.assert_close(got[1].double(), want[1], rtol=1e-5, atol=error + 1e-6 * size)


def test_gather_backward_is_exact_where_no_token_repeats(backend):
    x = random(2, 40, 24, dtype=torch.bfloat16).requires_grad_()
    index = torch.stack([torch.randperm(40)[:25] for _ in range(2)])
    with running(backend, torch.bfloat16):
        out = sparsekit.gather_tokens([x, torch.arange(80).view(2, 40)], index)
        grad = random(2, 25, 24, dtype=torch.bfloat16)
        out[0].backward(grad)
    want = torch.zeros_like(x).scatter(1, index[..., None].expand(-1, -1, 24), grad)
    assert torch.equal(x.grad, want) and not out[1].requires_grad


def test_only_what_is_asked_for_gets_a_gradient(device):
    x, y = torch.randn(2, 5, 3, requires_grad=True), torch.randn(2, 5, 3)
    outs = sparsekit.gather_tokens([x, y], torch.tensor([[0, 1], [2, 3]]))
    assert outs[0].requires_grad
    outs[0].sum().backward()
    assert x.grad.sum() == 12
    merged, sizes = sparsekit.merge_tokens([x, y], sparsekit.bipartite_match(y, 2))
    assert not sizes.requires_grad
    merged[1].sum().backward() if merged[1].requires_grad else None
    assert y.grad is None


def test_no_second_derivative_of_a_scatter(device):
    x = torch.randn(1, 3, 2, requires_grad=True)
    out = sparsekit.scatter_tokens(x, torch.tensor([[0, 1, 1]]), 2, reduce="mean")
    (grad,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        grad.sum().backward()


# ---- what torch asks of an op


def op_calls():
    x, index = torch.randn(2, 6, 4), torch.tensor([[0, 5, -1], [2, 2, 1]])
    cu, cu_out = torch.tensor([0, 6, 12]).int(), torch.tensor([0, 2, 3]).int()
    to, weights = random_index(2, 6, tokens=3), torch.rand(2, 6)
    yield OPS.gather_tokens, ([x.requires_grad_(), torch.arange(12).view(2, 6)], index, [1, 1])
    yield OPS.gather_tokens, ([x.detach().view(12, 4)], index, [1], cu)
    yield OPS.gather_tokens, ([x.detach()], index, [1], None, cu_out, 5)
    yield OPS.scatter_tokens, ([x], None, [torch.randn(2, 3, 4, requires_grad=True)], to, [1], 3, 0)
    yield OPS.scatter_tokens, ([x], weights.requires_grad_(), [], to, [1], 3, 2)
    yield OPS.scatter_tokens, ([x.detach()], weights.detach()[..., None], [], to[..., None], [1], 3, 1)
    yield OPS.scatter_tokens, ([x.detach().view(12, 4)], None, [], to.clamp(max=0), [1], 5, 0, cu, cu_out)
    outs, totals = OPS.scatter_tokens([x.detach()], weights.detach(), [], to, [1], 3, 2)
    backward = ([torch.randn(2, 3, 4)], totals, [x.detach()], weights.detach(), outs, totals, to, [1], 6, 2)
    yield OPS.scatter_tokens_backward, (*backward, None, None, True)
    yield OPS.bipartite_match, (x.detach(), 2)
    yield OPS.bipartite_match, (x.detach(), 9, None, 1)
    yield OPS.bipartite_match, (x.detach(), 0, torch.tensor([1, 2]), 0, torch.tensor([6, 5]).int())
    cache = [torch.randn(2, 3, 6, 4), torch.randn(2, 3, 6, 2)]
    keep = torch.tensor([[0, 5], [2, 3]])
    yield OPS.compact_kv, (cache, keep, None, torch.tensor([6, 6]).int())
    yield OPS.compact_kv, (cache, keep, torch.tensor([[0], [1]]).int(), None, False)


@pytest.mark.parametrize("number", range(13))
def test_opcheck(device, number):
    op, arguments = list(op_calls())[number]
    opcheck(op.default, arguments)


def pruned_block(x, positions, scores, sizes):
    """One layer of everything: keep the best tokens of several tensors, merge the rest of the way, put back."""
    index = scores.topk(x.shape[1] * 3 // 4, dim=1).indices.sort(dim=1).values
    kept, position = sparsekit.gather_tokens([x, positions], index)
    match = sparsekit.bipartite_match(kept, kept.shape[1] // 4, protect=1)
    sizes = sparsekit.gather_tokens(sizes, index)
    merged, sizes = sparsekit.merge_tokens(kept, match, sizes)
    ragged = sparsekit.bipartite_match(merged, (scores.sum(1) > 0).int() * 2)
    merged, sizes = sparsekit.merge_tokens(merged * 2, ragged, sizes)
    packed = sparsekit.pack_tokens(merged, ragged.counts)
    padded = sparsekit.unpack_tokens(packed.tensors.sin(), packed.cu_seqlens, merged.shape[1])
    bias = sparsekit.token_size_bias(sizes).exp().sum()
    back = sparsekit.unmerge_tokens(sparsekit.unmerge_tokens(padded, ragged), match)
    return sparsekit.scatter_tokens(back, index, x.shape[1], base=x) + bias, position


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(device, dynamic):
    compiled = torch.compile(pruned_block, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for tokens in (24, 40) if dynamic else (24,):
        x = torch.randn(2, tokens, 8, requires_grad=True)
        arguments = (torch.arange(tokens).expand(2, -1), torch.randn(2, tokens), torch.rand(2, tokens) + 0.5)
        want, got = pruned_block(x, *arguments), compiled(x, *arguments)
        torch.testing.assert_close(got[0], want[0])
        assert torch.equal(got[1], want[1])
        grads = [torch.autograd.grad(out[0].square().sum(), x)[0] for out in (want, got)]
        torch.testing.assert_close(*grads)


def test_compile_in_place(device):
    @functools.partial(torch.compile, fullgraph=True, backend="aot_eager")
    def call(cache, keep, lengths):
        sparsekit.compact_kv([cache], keep, lengths=lengths)
        return cache.sum() + lengths.sum()

    cache, lengths = torch.randn(1, 2, 6, 4), torch.tensor([6]).int()
    want = cache.clone()
    want[:, :, :2] = cache[:, :, [1, 4]]
    total = call(cache, torch.tensor([[1, 4]]), lengths)
    assert torch.equal(cache, want) and lengths.item() == 2
    torch.testing.assert_close(total, want.sum() + 2)


def test_vmap(device):
    x, index = torch.randn(4, 2, 6, 3), random_index(4, 2, 5, tokens=6)
    got = torch.vmap(sparsekit.gather_tokens)(x, index)
    assert torch.equal(got, torch.stack(list(map(sparsekit.gather_tokens, x, index))))
    shared = torch.vmap(sparsekit.gather_tokens, in_dims=(None, 1), out_dims=1)(x[0], index.transpose(0, 1))
    assert torch.equal(shared[:, 2], sparsekit.gather_tokens(x[0], index[2]))

    weights, to = torch.rand(4, 2, 6), random_index(4, 2, 6, tokens=3)

    def scatter(x, i, w):
        return sparsekit.scatter_tokens(x, i, 3, reduce="mean", weights=w)

    assert torch.equal(torch.vmap(scatter)(x, to, weights), torch.stack(list(map(scatter, x, to, weights))))

    leaves = x.clone().requires_grad_(), weights.clone().requires_grad_()
    got = torch.autograd.grad(torch.vmap(scatter)(leaves[0], to, leaves[1]).square().sum(), leaves)
    want = torch.autograd.grad(sum(scatter(leaves[0][b], to[b], leaves[1][b]).square().sum() for b in range(4)), leaves)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)

    rows = torch.vmap(lambda x: sparsekit.bipartite_match(x, 2).row)(x)
    assert torch.equal(rows[3], sparsekit.bipartite_match(x[3], 2).row)
    cu = torch.tensor([0, 2, 6]).int()
    packed = torch.vmap(lambda x, i: sparsekit.gather_tokens(x, i, cu_seqlens=cu))(x[:, 0], index.clamp(max=1))
    assert torch.equal(packed[1], sparsekit.gather_tokens(x[1, 0], index[1].clamp(max=1), cu_seqlens=cu))


def test_meta_tensors_need_no_data():
    x = torch.empty(3, 50, 8, device="meta")
    match = sparsekit.bipartite_match(x, 10, protect=1)
    merged, sizes = sparsekit.merge_tokens(x, match)
    assert merged.shape == (3, 40, 8) and sizes.shape == (3, 40) and match.source.shape == (3, 10)
