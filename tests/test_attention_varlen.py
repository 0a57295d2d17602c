"""Packed batches: the same as one call per sequence, forward and backward."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings

import sparsekit
from backends import Backend
from numerics import SEARCHED, check_backward, check_forward, make_problem
from problems import BASE, FEATURES, problems

LENGTHS = {
    "one": ((70,), (90,)),
    "several": ((70, 64, 1, 33), (90, 64, 130, 40)),
    "empty": ((0, 40, 0, 65, 0), (30, 0, 0, 64, 17)),
    "fewer-keys": ((100, 90), (60, 10)),
}
PACKED = BASE.with_(dtype=torch.float32, head_dim=64, block_size=(64, 64))
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def packed(name: str, **changes):
    lens_q, lens_k = LENGTHS[name]
    return PACKED.with_(lens_q=lens_q, lens_k=lens_k, lists_batch=False, **changes)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("lengths", LENGTHS)
def test_lengths(backend: Backend, lengths, dtype, seed):
    check_forward(backend, make_problem(packed(lengths, dtype=dtype, causal=True), backend, seed))


@pytest.mark.parametrize("feature", [name for name in FEATURES if "fewer" not in name])
def test_features(backend: Backend, feature, seed):
    problem = make_problem(packed("several", heads_q=4, **FEATURES[feature]), backend, seed)
    check_forward(backend, problem)
    check_backward(backend, problem)


@pytest.mark.parametrize("feature", [name for name in FEATURES if "fewer" not in name])
def test_features_in_bfloat16(backend: Backend, feature, seed):
    changes = {"heads_q": 4, **FEATURES[feature], "dtype": torch.bfloat16}
    check_forward(backend, make_problem(packed("several", **changes), backend, seed))


@pytest.mark.parametrize("block", [(16, 16), (32, 64), (128, 128), (128, 16)], ids=str)
def test_blocks(backend: Backend, block, seed):
    problem = make_problem(packed("empty", block_size=block, bits=True, dtype=torch.bfloat16), backend, seed)
    check_forward(backend, problem)
    check_backward(backend, problem)


@settings(max_examples=20)
@given(problem=problems(packed=True))
def test_random_problems(backend: Backend, problem):
    case, seed, options = problem
    about = (case.dtype, case.head_dim, case.value_dim, case.block_size)
    for backward, check in ((False, check_forward), (True, check_backward)):
        if backend.refusal(*about, packed=True, backward=backward) is None:
            check(backend, make_problem(case, backend, seed, **options), times=SEARCHED)


def test_is_one_call_per_sequence(cpu_backend, seed):
    """Bit for bit: the packing changes where a sequence lies, not how it is computed."""
    problem = make_problem(packed("several", causal=True, key_bias=True, sinks=True), cpu_backend, seed)
    inputs, pattern, block = problem.inputs, problem.inputs.pattern, PACKED.block_size[0]
    with cpu_backend.running(*problem.about, packed=True), torch.no_grad():
        out, lse = problem.sparse(problem.leaves())
        row = q0 = k0 = 0
        for len_q, len_k in problem.case.sequences:
            rows, keys = slice(q0, q0 + len_q), slice(k0, k0 + len_k)
            blocks = slice(row, row + -(-len_q // block))
            lists = {
                name: getattr(pattern, name)[:, :, blocks].contiguous()
                for name in ("kv_num_blocks", "kv_indices", "full_kv_num_blocks", "full_kv_indices")
            }
            alone_out, alone_lse = sparsekit.block_sparse_attention(
                *(x[part].transpose(0, 1)[None] for x, part in zip(inputs.args[:3], (rows, keys, keys), strict=True)),
                dataclasses.replace(pattern, **lists, seq_lengths=(len_q, len_k)),
                key_bias=inputs.key_bias[..., keys],
                sinks=inputs.sinks,
                return_lse=True,
            )
            assert torch.equal(out[rows].transpose(0, 1), alone_out[0])
            assert torch.equal(lse[:, rows], alone_lse[0])
            row, q0, k0 = blocks.stop, rows.stop, keys.stop


def test_rows_past_the_last_sequence(cpu_backend, seed):
    """cu_seqlens may end before the tensors do: what lies behind is 0 and -inf, its gradients 0, and NaN there stays."""
    problem = make_problem(packed("several"), cpu_backend, seed)
    inputs = problem.inputs
    with cpu_backend.running(*problem.about, packed=True, backward=True):
        want, want_lse = problem.sparse(problem.leaves())
        longer = {
            name: torch.cat([x, torch.full_like(x[:20], torch.nan)]).requires_grad_()
            for name, x in zip(("query", "key", "value"), inputs.args[:3], strict=True)
        }
        pattern = dataclasses.replace(inputs.pattern, seq_lengths=tuple(n + 20 for n in inputs.pattern.seq_lengths))
        lists = {
            name: torch.nn.functional.pad(getattr(pattern, name), (0, 0) * (getattr(pattern, name).dim() - 3) + (0, 1))
            for name in ("kv_num_blocks", "kv_indices", "full_kv_num_blocks", "full_kv_indices")
        }
        pattern = dataclasses.replace(pattern, **lists)
        out, lse = sparsekit.block_sparse_attention_varlen(*longer.values(), pattern, *inputs.args[4:], return_lse=True)
        rows = len(want)
        assert torch.equal(out[:rows], want) and torch.equal(lse[:, :rows], want_lse)
        assert (out[rows:] == 0).all() and (lse[:, rows:] == -torch.inf).all()
        gradients = torch.autograd.grad(out.square().sum(), list(longer.values()))
        for name, gradient, x in zip(longer, gradients, inputs.args[:3], strict=True):
            assert gradient[: len(x)].isfinite().all(), name
            assert (gradient[len(x) :] == 0).all(), name


@pytest.mark.parametrize("cu, message", [
    ((0, 70, 60, 168), r"cu_seqlens_q\[2\] is 60"),
    ((0, 70, 134, 999), r"cu_seqlens_q\[3\] is 999"),
    ((5, 70, 134, 168), r"cu_seqlens_q\[0\] is 5"),
])  # fmt: skip
def test_bad_cu_seqlens(cpu_backend, cu, message, seed):
    case = PACKED.with_(lens_q=(70, 64, 34), lens_k=(40, 50, 60), lists_batch=False)
    problem = make_problem(case, cpu_backend, seed)
    args = list(problem.inputs.args)
    args[4] = torch.tensor(cu, dtype=torch.int32)
    with cpu_backend.running(*problem.about, packed=True), pytest.raises(RuntimeError, match=message):
        sparsekit.block_sparse_attention_varlen(*args)
