"""Attention with few queries: on the CPU a path of its own, which splits long lists of keys and takes the heads of a group
together. Every backend, every argument, against float64."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from backends import Backend
from numerics import SEARCHED, check_forward, make_problem
from problems import BASE, FEATURES, problems, sanitized

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LONG = BASE.with_(len_q=3, len_k=2500, block_size=(16, 64))  # some shares of 1,024 keys, the last one ragged


def dtype_id(value):
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else None


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("rows", [*range(1, 10), 15, 16, 17])
def test_rows(backend: Backend, rows, dtype, seed):
    case = LONG.with_(len_q=rows, len_k=1200, block_size=(32, 128), causal=True, dtype=dtype)
    check_forward(backend, make_problem(case, backend, seed))


@pytest.mark.parametrize("feature", sanitized(FEATURES, "everything"))
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_features(backend: Backend, feature, dtype, seed):
    case = LONG.with_(heads_q=4, dtype=dtype, **{**FEATURES[feature], "len_q": 3, "len_k": 1500})
    check_forward(backend, make_problem(case, backend, seed))


@pytest.mark.parametrize("lists", ["q", "kv", "shared"])
@pytest.mark.parametrize("heads", [(8, 1), (24, 2), (6, 2), (64, 1)], ids=str)
def test_groups_of_heads(backend: Backend, heads, lists, seed):
    """Heads that share keys and lists are taken together, in tiles of up to 16 rows."""
    case = LONG.with_(
        heads_q=heads[0], heads_kv=heads[1], lists=lists, len_k=300, batch=2, bits=True, sinks=True, dtype=torch.bfloat16
    )  # fmt: skip
    check_forward(backend, make_problem(case, backend, seed))


@pytest.mark.parametrize("block", [(16, 16), (16, 48), (16, 128), (16, 144), (16, 4096)], ids=str)
@pytest.mark.parametrize("dims", [(64, 64), (8, 24), (100, 40), (256, 256)], ids=str)
def test_blocks_and_head_dims(backend: Backend, block, dims, seed):
    case = LONG.with_(
        block_size=block, head_dim=dims[0], value_dim=dims[1], bits=True, adversarial=True, dtype=torch.bfloat16
    )
    check_forward(backend, make_problem(case, backend, seed))


def test_larger_shares_of_very_many_keys(backend: Backend, seed):
    """Beyond half a million keys of all heads, shares grow."""
    case = LONG.with_(
        heads_q=8, heads_kv=8, len_q=2, len_k=150_000, head_dim=8, block_size=(16, 4096), density=0.9, dtype=torch.bfloat16
    )  # fmt: skip
    check_forward(backend, make_problem(case, backend, seed))


@pytest.mark.parametrize("feature", ["plain", "everything"])
def test_packed_batches_mix_few_and_many(backend: Backend, feature, seed):
    """Of one packed batch, sequences with few queries go their own way and the others theirs."""
    case = BASE.with_(heads_q=4, **FEATURES[feature]).with_(
        lens_q=(1, 40, 0, 3, 17, 16), lens_k=(300, 90, 5, 0, 64, 200)
    )
    check_forward(backend, make_problem(case, backend, seed))


@given(problem=problems(), rows=st.integers(1, 16), keys=st.integers(1, 1400))
def test_random_problems(backend: Backend, problem, rows, keys):
    case, seed, options = problem
    case = case.with_(len_q=rows, len_k=keys)
    if backend.refusal(case.dtype, case.head_dim, case.value_dim, case.block_size) is None:
        check_forward(backend, make_problem(case, backend, seed, **options), times=SEARCHED)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_any_number_of_threads_gives_the_same_bits(cpu_backend, dtype, one_or_two_threads, seed):
    case = LONG.with_(heads_q=4, len_k=5000, dtype=dtype, causal=True, bits=True)
    problem = make_problem(case, cpu_backend, seed)
    results = []
    with cpu_backend.running(*problem.about), torch.no_grad():
        for threads in (1, 2, 5):
            one_or_two_threads(threads)
            results.append(problem.sparse(problem.leaves()))
    for out, lse in results[1:]:
        assert torch.equal(out, results[0][0]) and torch.equal(lse, results[0][1])


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("mask", ["blocks", "causal", "window", "bits"])
def test_counts_every_key_once(backend: Backend, mask, dtype, seed):
    """Queries of zero weigh all keys alike: exp(lse) is their number, and out says which (test_attention.py)."""
    length, masks = 4099, {"causal": dict(causal=True), "window": dict(window=(1500, -1)), "bits": dict(bits=True)}
    case = BASE.with_(
        heads_q=1, heads_kv=1, len_q=16, len_k=length, value_dim=128, dtype=dtype, **masks.get(mask, {})
    )  # fmt: skip
    problem = make_problem(case, backend, seed)
    key = torch.arange(length)
    value = torch.zeros(length, 128)
    value[key, key % 64] = value[key, 64 + key // 65] = 1
    value = value.to(backend.device, dtype)
    with backend.running(*problem.about), torch.no_grad():
        out, lse = problem.sparse(dict(query=torch.zeros_like(problem.inputs.query), value=value[None, None]))
        sees = problem.mask[0, 0].double()
        keys = sees.sum(-1)
        assert torch.equal(lse[0, 0].double().exp().round(), keys)
        assert torch.equal((out[0, 0].double() * keys[:, None]).round(), sees @ value.double())
