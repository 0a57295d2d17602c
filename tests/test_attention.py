"""Attention forward on every backend, against float64: head dims, blocks, lists, masks, and random problems."""

import pytest
import torch
from hypothesis import given

from backends import BACKENDS, Backend
from numerics import SEARCHED, check_forward, make_problem
from problems import BASE, FEATURES, HEAD_DIMS, problems, sanitized
from sparsekit.bench.cases import AttentionCase

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
BLOCKS = [(16, 16), (32, 32), (64, 64), (128, 128), (16, 128), (128, 16), (64, 128), (128, 64), (32, 16), (128, 32)]


def dtype_id(value):
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else None


# ---- what every backend has to take


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_takes_what_it_promises(backend: Backend, backward):
    """A backend that refuses everything would pass all other tests."""
    blocks = [(q, k) for q in (64, 128) for k in (64, 128)] if backend.device == "cuda" else BLOCKS
    dtypes = [torch.bfloat16] if backend.name in ("avx512_bf16", "amx") else DTYPES
    dims = [(dim, dim) for dim in HEAD_DIMS] + [(192, 128)]
    if backend.name == "amx":  # steps of 32 dims and of 32 keys
        if backward:
            assert "backward" in backend.refusal(torch.bfloat16, 64, backward=True)
            return
        dims = [(dim, value_dim) for dim, value_dim in dims if dim % 32 == 0]
        blocks = [(q, k) for q, k in blocks if k % 32 == 0]
    refused = {
        (dtype, dim, block): reason
        for dtype in dtypes
        for dim in dims
        for block in blocks
        if (reason := backend.refusal(dtype, *dim, block, backward=backward))
    }
    assert not refused, f"{backend} refuses {len(refused)} problems, such as {next(iter(refused.items()))}"


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_cpu_takes_packed_batches(cpu_backend, packed):
    dtype = torch.bfloat16 if cpu_backend.name in ("avx512_bf16", "amx") else torch.float32
    for backward in (False, True)[: 1 if cpu_backend.name == "amx" else 2]:
        assert cpu_backend.refusal(dtype, 64, backward=backward, packed=packed) is None


# ---- shapes


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize(
    "dims", [*((dim, dim) for dim in HEAD_DIMS), (192, 128), (64, 128), (20, 20), (72, 40), (33, 7)]
)
def test_head_dims(backend: Backend, dims, dtype, seed):
    case = BASE.with_(head_dim=dims[0], value_dim=dims[1], dtype=dtype)
    check_forward(backend, make_problem(case, backend, seed))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_id)
@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_blocks(backend: Backend, block, dtype, seed):
    case = BASE.with_(block_size=block, dtype=dtype, bits=True, adversarial=True)
    check_forward(backend, make_problem(case, backend, seed))


@pytest.mark.parametrize("block", [(1, 1), (8, 24), (48, 80), (256, 256)], ids=str)
def test_uncommon_blocks(cpu_backend, block, seed):
    """The reference takes any; a backend that does not leaves them to it."""
    check_forward(
        cpu_backend, make_problem(BASE.with_(block_size=block, len_q=60, len_k=70, bits=True), cpu_backend, seed)
    )


@pytest.mark.parametrize("lists", ["q", "kv", "shared"])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (4, 1)], ids=["mha", "gqa", "mqa"])
def test_heads_and_lists(backend: Backend, heads, lists, seed):
    case = BASE.with_(
        batch=2, heads_q=heads[0], heads_kv=heads[1], len_k=130, lists=lists, lists_batch=lists != "kv", bits=True
    )
    check_forward(backend, make_problem(case, backend, seed))


@pytest.mark.parametrize("lengths", [(1, 1), (1, 300), (300, 1), (64, 64), (65, 127), (130, 257)], ids=str)
@pytest.mark.parametrize("causal", [False, True], ids=["all", "causal"])
def test_lengths(backend: Backend, lengths, causal, seed):
    case = BASE.with_(len_q=lengths[0], len_k=lengths[1], causal=causal, dtype=torch.bfloat16)
    check_forward(backend, make_problem(case, backend, seed))


@pytest.mark.parametrize("block", [(128, 128), (128, 64), (64, 64)], ids=str)
@pytest.mark.parametrize("feature", ["plain", "bits", "sinks", "everything"])
def test_more_rows_of_lists_than_multiprocessors(backend: Backend, feature, block, seed):
    """On a GPU some CTAs then take a second row, from a work list."""
    rows = 3
    if backend.device == "cuda":
        rows += torch.cuda.get_device_properties(0).multi_processor_count * (128 // block[0])
    case = BASE.with_(
        heads_q=1, heads_kv=1, len_q=rows * block[0] - 9, len_k=9 * block[1] - 9, block_size=block, density=0.9,
        dtype=torch.bfloat16, **FEATURES[feature],
    )  # fmt: skip
    check_forward(backend, make_problem(case, backend, seed))


# ---- features


@pytest.mark.parametrize("feature", sanitized(FEATURES, "causal", "everything"))
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_features(backend: Backend, feature, dtype, seed):
    case = BASE.with_(heads_q=4, dtype=dtype, **FEATURES[feature])
    check_forward(backend, make_problem(case, backend, seed))


@pytest.mark.parametrize("feature", FEATURES)
def test_features_are_not_left_to_the_reference(cpu_backend, feature, seed):
    """The plan does not know about features. The reference computes in float64: no other kernel gives its very bits."""
    if cpu_backend.name == "reference":
        pytest.skip("is the reference")
    case = BASE.with_(heads_q=4, **FEATURES[feature], dtype=torch.float32)
    results = []
    for backend in (BACKENDS[0], cpu_backend):
        problem = make_problem(case, backend, seed)
        with backend.forced():
            results.append(problem.sparse(problem.leaves())[0])
    assert not torch.equal(*results)


@given(problem=problems())
def test_random_problems(backend: Backend, problem):
    case, seed, options = problem
    if backend.refusal(case.dtype, case.head_dim, case.value_dim, case.block_size, packed=case.packed) is None:
        check_forward(backend, make_problem(case, backend, seed, **options), times=SEARCHED)


# ---- counting: one key too many or too few shows


def positions_as_values(keys: int, dtype: torch.dtype) -> torch.Tensor:
    """[keys, 128] of zeros and ones: a key at j is counted in column j % 64 and in column 64 + j // ceil(keys / 64)."""
    key = torch.arange(keys)
    value = torch.zeros(keys, 128)
    value[key, key % 64] = value[key, 64 + key // -(-keys // 64)] = 1
    return value.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("length", [100, 1024, 4099])
@pytest.mark.parametrize("mask", ["blocks", "causal", "window", "bits"])
def test_counts_every_key_once(backend: Backend, mask, length, dtype, seed):
    """Queries of zero weigh all keys alike: exp(lse) is the number of keys, and out tells which. At most 65 keys fall into
    a column: 8 bits resolve that, so one key too many or too few shows in bfloat16 and at any length."""
    masks = {"causal": dict(causal=True), "window": dict(window=(70, 9)), "bits": dict(bits=True)}
    case = AttentionCase(
        heads_q=1, heads_kv=1, len_q=96, len_k=length, head_dim=64, value_dim=128, dtype=dtype, density=0.6,
        block_size=(64, 64), **masks.get(mask, {}),
    )  # fmt: skip
    problem = make_problem(case, backend, seed)
    with backend.running(*problem.about), torch.no_grad():
        query = torch.zeros_like(problem.inputs.query)
        value = positions_as_values(length, dtype).to(query.device)
        out, lse = problem.sparse(dict(query=query, value=value[None, None]))
        sees = problem.mask[0, 0].double()
        keys = sees.sum(-1)
        assert torch.equal(lse[0, 0].double().exp().round(), keys)
        assert torch.equal((out[0, 0].double() * keys[:, None]).round(), sees @ value.double())
