"""Attention backward on every backend: all gradients against float64 autograd of the dense reference."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings

from backends import Backend
from numerics import GRADIENTS, SEARCHED, Problem, check_backward, make_problem
from problems import BASE, FEATURES, HEAD_DIMS, problems, sanitized
from sparsekit.bench.cases import AttentionCase, make_inputs

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SMALL = BASE.with_(len_q=100, len_k=140)


def dtype_id(value):
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else None


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("dims", [*((dim, dim) for dim in HEAD_DIMS), (192, 128), (20, 20), (72, 40)])
def test_head_dims(backend: Backend, dims, dtype, seed):
    case = SMALL.with_(head_dim=dims[0], value_dim=dims[1], dtype=dtype)
    check_backward(backend, make_problem(case, backend, seed))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_id)
@pytest.mark.parametrize("block", [(16, 16), (32, 32), (64, 64), (128, 128), (16, 128), (128, 64), (64, 128)], ids=str)
def test_blocks(backend: Backend, block, dtype, seed):
    case = SMALL.with_(block_size=block, dtype=dtype, bits=True, adversarial=True)
    check_backward(backend, make_problem(case, backend, seed))


@pytest.mark.parametrize("lists", ["q", "kv", "shared"])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (4, 1)], ids=["mha", "gqa", "mqa"])
def test_heads_and_lists(backend: Backend, heads, lists, seed):
    """Gradients of shared keys, biases and sinks are sums over the heads and batch entries that share them."""
    case = SMALL.with_(
        batch=2, heads_q=heads[0], heads_kv=heads[1], lists=lists, lists_batch=lists != "kv", sinks=True, key_bias=True
    )  # fmt: skip
    check_backward(backend, make_problem(case, backend, seed, grad_lse=True))


@pytest.mark.parametrize("feature", sanitized(FEATURES, "causal", "everything"))
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_features(backend: Backend, feature, dtype, seed):
    case = SMALL.with_(heads_q=4, dtype=dtype, **FEATURES[feature])
    if "fewer" in feature:
        case = case.with_(len_q=140, len_k=100)
    problem = make_problem(case, backend, seed)
    check_backward(backend, problem)
    if backend.device == "cuda":
        check_backward(backend, problem, fast=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("feature", ["plain", "softcap", "sinks", "everything"])
def test_lse_has_a_gradient(backend: Backend, feature, dtype, seed):
    """delta = rowsum(dO * O) - dlse: also where lse alone is used."""
    case = SMALL.with_(dtype=dtype, **FEATURES[feature])
    problem = make_problem(case, backend, seed, grad_lse=True)
    check_backward(backend, problem)
    alone = Problem(problem.inputs, grad_lse=True)
    alone.upstream[0].zero_()
    check_backward(backend, alone, wanted=("query", "key", "key_bias"))


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("sink", [-200.0, 100.0, 3e4])
def test_sink_far_from_every_score(backend: Backend, sink, dtype, seed):
    """A sink far above every score takes all weight from out and none from lse, whose gradient stays what it is without
    one: exp(lse' - lse) would overflow."""
    problem = make_problem(SMALL.with_(dtype=dtype, sinks=True), backend, seed, grad_lse=True)
    problem.inputs.sinks.fill_(sink)
    got = check_backward(backend, problem, wanted=("query", "key", "value"))
    with backend.running(*problem.about, backward=True):
        out, _ = problem.sparse(leaves := problem.leaves())
        (of_sinks,) = torch.autograd.grad(out, leaves["sinks"], problem.upstream[0])
    assert (of_sinks.abs() < 1e-30).all()  # NaN fails, too
    if sink > 0:
        alone = Problem(dataclasses.replace(problem.inputs, sinks=None), grad_lse=True)
        alone.upstream[0].zero_()
        alone.upstream[1].copy_(problem.upstream[1])
        without = check_backward(backend, alone, wanted=("query", "key"))
        for name, gradient in without.items():
            assert gradient.abs().max() > 1e-3
            error = (got[name].double() - gradient.double()).abs().max()
            assert error <= 2 * torch.finfo(dtype).eps * gradient.abs().max() + 1e-6


@pytest.mark.parametrize("lengths", [(1, 1), (1, 130), (130, 1), (64, 64), (65, 127)], ids=str)
@pytest.mark.parametrize("causal", [False, True], ids=["all", "causal"])
def test_lengths(backend: Backend, lengths, causal, seed):
    case = SMALL.with_(len_q=lengths[0], len_k=lengths[1], causal=causal, dtype=torch.bfloat16)
    check_backward(backend, make_problem(case, backend, seed))


@settings(max_examples=20)
@given(problem=problems(small=True))
def test_random_problems(backend: Backend, problem):
    case, seed, options = problem
    about = (case.dtype, case.head_dim, case.value_dim, case.block_size)
    if backend.refusal(*about, backward=True) is None:
        check_backward(backend, make_problem(case, backend, seed, **options), times=SEARCHED)


def test_wants_only_some_gradients(backend: Backend, seed):
    """The gradient of one input does not depend on which others are asked for."""
    problem = make_problem(SMALL.with_(key_bias=True, sinks=True, heads_q=4), backend, seed)
    everything = check_backward(backend, problem)
    for name in GRADIENTS:
        leaves = {key: leaf.detach().requires_grad_(key == name) for key, leaf in problem.leaves().items()}
        with backend.running(*problem.about, backward=True):
            out, _ = problem.sparse(leaves)
            (got,) = torch.autograd.grad(out, leaves[name], problem.upstream[0])
        if backend.device == "cuda":  # summed in any order
            torch.testing.assert_close(got, everything[name], rtol=1e-4, atol=1e-5)
        else:
            torch.testing.assert_close(got, everything[name], rtol=0, atol=0)


def test_transpose_given_or_built(backend: Backend, seed):
    """Backward builds the transposed lists itself where the op is called without them."""
    problem = make_problem(SMALL.with_(adversarial=True), backend, seed)
    inputs, pattern = problem.inputs, problem.inputs.pattern
    ops, grad_out = torch.ops.sparsekit, problem.upstream[0]
    lists = (pattern.kv_num_blocks, pattern.kv_indices, pattern.full_kv_num_blocks, pattern.full_kv_indices, None, None)
    with backend.running(*problem.about, backward=True), torch.no_grad():
        qkv = (inputs.query, inputs.key, inputs.value)
        out, lse = ops.block_sparse_attn(*qkv, *lists, pattern.block_size)
        offsets, slots = pattern.transpose()
        built, given_ = (
            ops.block_sparse_attn_backward(
                grad_out, None, *qkv, out, lse, *lists, pattern.block_size, deterministic=True, **options
            )
            for options in ({}, dict(transpose_offsets=offsets, transpose_slots=slots))
        )
        for got, want in zip(built, given_, strict=True):
            assert torch.equal(got, want)


# ---- gradcheck: the derivative of forward as it is computed


@pytest.mark.parametrize("feature", ["plain", "softcap", "sinks", "key-bias", "everything"])
@pytest.mark.parametrize("heads", [(2, 2), (2, 1)], ids=["mha", "gqa"])
def test_gradcheck(feature, heads, seed):
    """float64 goes to the reference on the CPU."""
    case = AttentionCase(
        heads_q=heads[0], heads_kv=heads[1], len_q=7, len_k=10, head_dim=3, value_dim=2, dtype=torch.float64,
        block_size=(4, 4), density=0.7, **FEATURES[feature], seed=seed,
    )  # fmt: skip
    problem = Problem(make_inputs(case))
    leaves = problem.leaves()
    names = list(leaves)

    def attend(*tensors):
        out, lse = problem.sparse(dict(zip(names, tensors, strict=True)))
        return out, lse.where(lse > -torch.inf, 0)

    # sinks and key_bias are float32, too coarse for finite differences: hold them fixed.
    inputs = [leaf if leaf.dtype == torch.float64 else leaf.detach() for leaf in leaves.values()]
    assert torch.autograd.gradcheck(attend, inputs, eps=1e-6, atol=1e-6, fast_mode=False)


def test_float64_of_bias_and_sinks(seed):
    """Their gradients, which gradcheck cannot take: float32 leaves, so against autograd of the reference. (The scale is
    kept in float32: 1 / 4 is exact.)"""
    case = SMALL.with_(dtype=torch.float64, head_dim=16, **FEATURES["everything"], seed=seed)
    problem = Problem(make_inputs(case), grad_lse=True)
    out, lse = problem.sparse(leaves := problem.leaves())
    ref_out, ref_lse = problem.reference(ref_leaves := problem.leaves(torch.float64))
    grad_out, grad_lse = torch.randn_like(out), torch.randn_like(lse).where(lse > -torch.inf, 0)
    got, want = (
        torch.autograd.grad([o, s], list(part.values()), [grad_out, grad_lse])
        for o, s, part in ((out, lse, leaves), (ref_out, ref_lse, ref_leaves))
    )
    for name, a, b in zip(leaves, got, want, strict=True):
        exact = a.dtype == torch.float64
        torch.testing.assert_close(
            a.double(),
            b,
            rtol=1e-9 if exact else 1e-5,
            atol=1e-12 if exact else 1e-5,
            msg=lambda text, name=name: f"{name}: {text}",
        )
