"""Stripe-sparse attention on every backend: columns, sink, local keys and blocks, against float64 of the dense
reference; and what docs/stripes.md says of edge cases."""

import contextlib
import dataclasses
import functools
import json
import math
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.library import opcheck

import sparsekit
from backends import BACKENDS, Backend
from numerics import SEARCHED, Problem, check_backward, check_forward, visible
from problems import problems
from sparsekit import reference
from sparsekit.bench import __main__ as command
from sparsekit.bench.stripe_cases import StripeCase, make_stripe_inputs, stripe_pairs
from test_semantics_calls import assert_same_bits, run

OPS = torch.ops.sparsekit
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
BASE = StripeCase(
    batch=1,
    heads_q=2,
    heads_kv=2,
    len_q=140,
    len_k=210,
    head_dim=64,
    dtype=torch.float32,
    block_size=(64, 64),
    density=0.4,
    group_size=64,
    columns=0.2,
)
FEATURES = {
    "columns": {},
    "causal": dict(causal=True),
    "causal-fewer-keys": dict(causal=True, len_q=210, len_k=140),
    "sink": dict(sink=20, columns=0.1),
    "local": dict(local=50),
    "band": dict(causal=True, sink=17, local=70),
    "band-only": dict(causal=True, sink=5, local=33, columns=0.0),
    "blocks": dict(blocks=True),
    "blocks-causal": dict(blocks=True, causal=True, local=30, sink=3),
    "blocks-window": dict(blocks=True, causal=True, window=(40, 10), local=60, sink=40),
    "blocks-bits": dict(blocks=True, bits=True, local=20, sink=70),
    "softcap": dict(softcap=2.5, local=40),
    "key-bias": dict(key_bias=True, sink=8),
    "sinks": dict(sinks=True),
    "positions": dict(positions=True, causal=True, sink=30, local=40),
    "adversarial": dict(adversarial=True, blocks=True, bits=True, causal=True, local=30),
    "everything": dict(
        adversarial=True, blocks=True, bits=True, causal=True, window=(120, -1), softcap=3.0, key_bias=True, sinks=True,
        positions=True, sink=25, local=45,
    ),
}  # fmt: skip


def dtype_id(value):
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else None


def stripes_visible(inputs) -> torch.Tensor:
    """bool [B, Hq, Sq, Sk]: who sees whom, group by group: not shared with the library."""
    case = inputs.case
    at_q = torch.arange(case.len_q)[None] + case.len_k - case.len_q
    at_k = torch.arange(case.len_k)[None]
    if inputs.query_positions is not None:
        at_q, at_k = inputs.query_positions.cpu().long(), inputs.key_positions.cpu().long()
    past = at_k[:, None] <= at_q[..., None]  # [B|1, Sq, Sk]
    allowed = past if case.causal else torch.ones_like(past)
    band = (past & (at_q[..., None] - at_k[:, None] < case.local)) | (allowed & (at_k[:, None] < case.sink))
    mask = band[:, None].expand(case.batch, case.heads_q, -1, -1).clone()
    indices, counts = inputs.col_indices.cpu(), inputs.col_counts.tolist()
    for b in range(case.batch):
        lb = min(b, indices.shape[0] - 1)
        for h in range(case.heads_q):
            lh = h * indices.shape[1] // case.heads_q
            for g in range(indices.shape[2]):
                listed = indices[lb, lh, g, : counts[lb][lh][g]]
                rows, columns = slice(g * case.group_size, (g + 1) * case.group_size), listed[listed >= 0].long()
                mask[b, h, rows, columns] |= allowed[min(b, allowed.shape[0] - 1), rows][:, columns]
    return mask | visible(inputs) if case.blocks else mask


class StripeProblem(Problem):
    @property
    def kind(self) -> dict:
        return {"group_size": self.case.group_size}

    @property
    def about(self) -> tuple:
        about = super().about
        return about if self.case.blocks else (*about[:3], (128, 128))

    @functools.cached_property
    def mask(self) -> torch.Tensor:
        return stripes_visible(self.inputs).to(self.inputs.query.device)

    def sparse(self, leaves: dict, **options):
        return self.run(sparsekit.stripe_sparse_attention, leaves, return_lse=True, **options)

    def reference(self, leaves: dict):
        """In float64 on the CPU."""
        moved = {
            field.name: value.to("cpu")
            for field in dataclasses.fields(self.inputs)
            if hasattr(value := getattr(self.inputs, field.name), "to")
        }
        host = StripeProblem(dataclasses.replace(self.inputs, **moved), self.scale)
        return host.run(reference.stripe_sparse_attention, leaves)


def make_problem(case: StripeCase, backend: Backend | None, seed: int, **options) -> StripeProblem:
    torch.manual_seed(seed)
    device = "cpu" if backend is None else backend.device
    return StripeProblem(make_stripe_inputs(case.with_(seed=seed), device), **options)


@contextlib.contextmanager
def deterministic(backend: Backend):
    """On CUDA the same bits are asked for; the CPU always gives them."""
    torch.use_deterministic_algorithms(backend.device == "cuda")
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


# ---- forward

# float16 goes float32's way once it is read: two problems show that it is read right.
FEATURES_AND_DTYPES = [
    pytest.param(feature, dtype, id=f"{feature}-{dtype_id(dtype)}")
    for dtype in DTYPES
    for feature in (FEATURES if dtype != torch.float16 else ("causal", "everything"))
]


@pytest.mark.parametrize("feature, dtype", FEATURES_AND_DTYPES)
def test_features(backend, feature, dtype, seed):
    case = BASE.with_(heads_q=4, dtype=dtype, **FEATURES[feature])
    problem = make_problem(case, backend, seed)
    check_forward(backend, problem)


LARGE_GROUPS = [(feature, 128, (128, 128)) for feature in FEATURES]
LARGE_GROUPS += [("band", 256, (64, 64)), ("everything", 256, (64, 64)), ("blocks-causal", 384, (80, 128))]


@pytest.mark.parametrize("feature, group_size, dims", LARGE_GROUPS, ids=str)
def test_features_of_large_groups(backend, feature, group_size, dims, seed):
    """Whole tiles of 128 rows and of 128 keys: what the largest kernels take."""
    case = BASE.with_(head_dim=dims[0], value_dim=dims[1], group_size=group_size, block_size=(128, 128), heads_q=4)
    case = case.with_(len_q=300, len_k=390, dtype=torch.bfloat16).with_(**FEATURES[feature])
    check_forward(backend, make_problem(case, backend, seed))


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("feature", ["columns", "causal", "sink", "key-bias", "sinks", "positions"])
def test_lists_of_many_units(feature, seed):
    """Groups so large that a GPU packs their rows: of more cells than its ring has slots, and of fewer."""
    backend = next(backend for backend in BACKENDS if backend.device == "cuda")
    case = BASE.with_(head_dim=128, group_size=1024, block_size=(128, 128), dtype=torch.bfloat16, len_q=2060)
    for shape in (dict(len_k=500), dict(heads_q=8, heads_kv=4, len_k=190, columns=0.8)):
        check_forward(backend, make_problem(case.with_(**shape).with_(**FEATURES[feature]), backend, seed))


@pytest.mark.parametrize("feature", FEATURES)
def test_the_reference_sees_what_the_loops_see(feature, seed):
    problem = make_problem(BASE.with_(heads_q=4, batch=2, **FEATURES[feature]), None, seed)
    out, _ = problem.reference(problem.leaves(torch.float64))
    math_options = {name: problem.options[name] for name in ("softcap", "key_bias", "sinks") if name in problem.options}
    dense, _ = reference.masked_attention(*problem.inputs.args[:3], problem.mask, **math_options)
    torch.testing.assert_close(out, dense, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("feature", FEATURES)
def test_features_are_not_left_to_the_reference(cpu_backend, feature, seed):
    """The plan does not know about features. The reference computes in float64: no other kernel gives its very bits."""
    problem = make_problem(BASE.with_(heads_q=4, **FEATURES[feature]), cpu_backend, seed)
    if cpu_backend.name == "reference":
        pytest.skip("is the reference")
    with cpu_backend.running(*problem.about, **problem.kind):
        got = problem.sparse(problem.leaves())[0]
    with sparsekit.isa("reference"):
        assert not torch.equal(got, problem.sparse(problem.leaves())[0])


@pytest.mark.parametrize("dims", [(32, 32), (80, 80), (128, 128), (192, 128), (256, 256), (20, 24)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_head_dims(backend, dims, dtype, seed):
    case = BASE.with_(head_dim=dims[0], value_dim=dims[1], dtype=dtype, local=20, causal=True, len_q=80, heads_q=4)
    check_forward(backend, make_problem(case, backend, seed))


@pytest.mark.parametrize("group_size", [1, 16, 48, 100, 128, 512])
@pytest.mark.parametrize("block", [(16, 16), (64, 128), (128, 64)], ids=str)
def test_groups_and_blocks(backend, group_size, block, seed):
    """Groups of any size, the same for blocks or not. What is no multiple of 16 is left to the reference."""
    case = BASE.with_(group_size=group_size, block_size=block, blocks=True, causal=True, bits=True, local=10, len_q=260)
    check_forward(backend, make_problem(case.with_(dtype=torch.bfloat16), backend, seed))


@pytest.mark.parametrize("lists", ["q", "kv", "shared"])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (6, 1)], ids=["mha", "gqa", "mqa"])
@pytest.mark.parametrize("len_q", [1, 5, 300])
def test_heads_and_lists(backend, heads, lists, len_q, seed):
    case = BASE.with_(
        batch=2, heads_q=heads[0], heads_kv=heads[1], len_q=len_q, lists=lists, lists_batch=lists != "kv", local=9,
        blocks=len_q == 5, key_bias=len_q == 300,
    )  # fmt: skip
    check_forward(backend, make_problem(case, backend, seed))


@st.composite
def stripe_problems(draw, small: bool = False):
    base, seed, options = draw(problems(small=small))
    fields = {field.name: getattr(base, field.name) for field in dataclasses.fields(base)}
    extent = st.one_of(st.just(0), st.integers(0, 150))
    blocks = draw(st.booleans())
    case = StripeCase(
        **fields,
        group_size=draw(st.sampled_from([16, 32, 64, 128, 256])),
        columns=draw(st.sampled_from([0.0, 0.1, 0.3, 1.0])),
        sink=draw(extent),
        local=draw(extent),
        blocks=blocks,
    )
    return case, seed, options


@given(problem=stripe_problems())
def test_random_problems(backend, problem):
    case, seed, options = problem
    problem = make_problem(case, backend, seed, **options)
    if backend.refusal(*problem.about, **problem.kind) is None:
        check_forward(backend, problem, times=SEARCHED)


@pytest.mark.parametrize("length, rows", [(100, 64), (1030, 64), (1030, 128), (4099, 64)])
@pytest.mark.parametrize("feature", ["columns", "causal", "band", "local", "blocks-causal", "blocks-bits"])
def test_counts_every_key_once(backend, feature, rows, length, seed):
    """Queries of zero weigh all keys alike: exp(lse) is the number of keys, and out tells which."""
    case = BASE.with_(heads_q=1, heads_kv=1, value_dim=128, dtype=torch.bfloat16, **FEATURES[feature])
    case = case.with_(group_size=rows, block_size=(rows, rows), columns=0.3, len_q=96, len_k=length)
    problem = make_problem(case, backend, seed)
    with backend.running(*problem.about, **problem.kind), torch.no_grad():
        key = torch.arange(length)
        value = torch.zeros(length, 128)
        value[key, key % 64] = value[key, 64 + key // -(-length // 64)] = 1
        value = value.to(backend.device)
        leaves = dict(query=torch.zeros_like(problem.inputs.query), value=value.bfloat16()[None, None])
        out, lse = problem.sparse(leaves)
        sees = problem.mask[0, 0].double()
        keys = sees.sum(-1)
        assert torch.equal(lse[0, 0].double().exp().round(), keys)
        assert torch.equal((out[0, 0].double() * keys[:, None]).round(), sees @ value.double())


# ---- backward


SMALL = BASE.with_(len_q=100, len_k=140)


@pytest.mark.parametrize("feature, dtype", FEATURES_AND_DTYPES)
def test_gradients_of_features(backend, feature, dtype, seed):
    case = SMALL.with_(heads_q=4, dtype=dtype, **FEATURES[feature])
    problem = make_problem(case, backend, seed, grad_lse=feature in ("sinks", "everything"))
    check_backward(backend, problem)
    if backend.device == "cuda":
        check_backward(backend, problem, fast=True)


@pytest.mark.parametrize("feature, group_size, dims", LARGE_GROUPS, ids=str)
def test_gradients_of_large_groups(backend, feature, group_size, dims, seed):
    """Whole tiles of 128 rows, and several of keys: what the largest kernels take."""
    dtype = torch.float16 if feature in ("causal", "blocks") else torch.bfloat16
    case = BASE.with_(head_dim=dims[0], value_dim=dims[1], group_size=group_size, block_size=(128, 128), dtype=dtype)
    case = case.with_(heads_kv=1, len_q=200, len_k=290, columns=0.7).with_(**FEATURES[feature])
    problem = make_problem(case, backend, seed, grad_lse=feature in ("sinks", "everything"))
    check_backward(backend, problem, times=SEARCHED)
    if backend.device == "cuda":
        check_backward(backend, problem, fast=True, times=SEARCHED)


@pytest.mark.parametrize("lists", ["q", "kv", "shared"])
@pytest.mark.parametrize("heads, group_size", [((4, 4), 16), ((4, 2), 128), ((6, 1), 16)], ids=["mha", "gqa", "mqa"])
def test_gradients_of_shared_heads(backend, heads, lists, group_size, seed):
    case = SMALL.with_(
        batch=2, heads_q=heads[0], heads_kv=heads[1], lists=lists, lists_batch=lists != "kv", sinks=True, key_bias=True,
        group_size=group_size, len_q=180, local=7,
    )  # fmt: skip
    check_backward(backend, make_problem(case, backend, seed, grad_lse=True))


@pytest.mark.parametrize("dims", [(32, 32), (128, 128), (192, 128), (256, 256), (20, 24)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_id)
def test_gradients_of_head_dims(backend, dims, dtype, seed):
    case = SMALL.with_(head_dim=dims[0], value_dim=dims[1], dtype=dtype, local=20, causal=True)
    check_backward(backend, make_problem(case, backend, seed))


@settings(max_examples=20)
@given(problem=stripe_problems(small=True))
def test_gradients_of_random_problems(backend, problem):
    case, seed, options = problem
    problem = make_problem(case, backend, seed, **options)
    if backend.refusal(*problem.about, backward=True, **problem.kind) is None:
        check_backward(backend, problem, times=SEARCHED)
        if backend.device == "cuda":
            check_backward(backend, problem, fast=True, times=SEARCHED)


@pytest.mark.parametrize("feature", ["columns", "band", "blocks-bits", "everything"])
def test_gradcheck(feature, seed):
    """float64 goes to the reference."""
    case = StripeCase(
        heads_q=2, heads_kv=1, len_q=7, len_k=10, head_dim=3, value_dim=2, dtype=torch.float64, block_size=(4, 4),
        group_size=3, columns=0.4, **FEATURES[feature] | dict(sink=2, local=3), seed=seed,
    )  # fmt: skip
    problem = make_problem(case, None, seed)
    leaves = problem.leaves()
    names = list(leaves)
    state = torch.randn(1, 2, 7, 2, dtype=torch.float64, requires_grad=True)
    state_lse = torch.randn(1, 2, 7, dtype=torch.float64, requires_grad=True)

    def attend(*tensors):
        out, lse = problem.sparse(dict(zip(names, tensors[2:], strict=True)), state=tensors[:2])
        return out, lse.where(lse > -torch.inf, 0)

    # sinks and key_bias are float32, too coarse for finite differences: hold them fixed.
    inputs = [leaf if leaf.dtype == torch.float64 else leaf.detach() for leaf in leaves.values()]
    assert torch.autograd.gradcheck(attend, (state, state_lse, *inputs), eps=1e-6, atol=1e-6)


# ---- the same bits


REPEATED = {
    "columns": BASE.with_(heads_q=4),
    "one-head": BASE.with_(heads_q=1, heads_kv=1, len_q=700, len_k=700, group_size=32, causal=True, local=50),
    "everything": BASE.with_(heads_q=4, len_q=300, **FEATURES["everything"]),
    "bf16": BASE.with_(heads_q=6, heads_kv=1, lists="shared", len_q=300, dtype=torch.bfloat16, group_size=256),
}


@pytest.mark.parametrize("name", REPEATED)
def test_number_of_threads_changes_no_bit(cpu_backend, name, seed, one_or_two_threads):
    problem = make_problem(REPEATED[name], cpu_backend, seed)
    with cpu_backend.running(*problem.about, **problem.kind, backward=True):
        results = []
        for threads in (1, 2, 3, 3):
            one_or_two_threads(threads)
            results.append(run(problem, gradients=True))
        for result in results[1:]:
            assert_same_bits(result, results[0])


@pytest.mark.parametrize("name", REPEATED)
def test_repeated_calls_give_the_same_bits(backend, name, seed):
    problem = make_problem(REPEATED[name], backend, seed)
    with backend.running(*problem.about, **problem.kind, backward=True), deterministic(backend):
        want = run(problem, gradients=True)
        for _ in range(3):
            assert_same_bits(run(problem, gradients=True), want)


# ---- edge cases


def call(query, key, value, indices, counts, **options):
    return sparsekit.stripe_sparse_attention(query, key, value, indices, counts, return_lse=True, **options)


def small_tensors(len_q=70, len_k=90, heads=2, dim=32, dtype=torch.float32, batch=1, device="cpu"):
    lengths = (len_q, len_k, len_k)
    return [torch.randn(batch, heads, length, dim, dtype=dtype).to(device) for length in lengths]


def column_lists(*groups, heads=1, device="cpu") -> tuple[torch.Tensor, torch.Tensor]:
    """(indices, counts) of lists of columns, the same for every head."""
    longest = max(map(len, groups), default=0)
    indices = [[*group, *[-1] * (longest - len(group))] for group in groups]
    counts = torch.tensor([len(group) for group in groups], dtype=torch.int32)
    indices = torch.tensor(indices, dtype=torch.int32).reshape(1, 1, len(groups), longest)
    lists = indices.expand(1, heads, -1, -1).contiguous(), counts.expand(1, heads, -1).contiguous()
    return tuple(x.to(device) for x in lists)


@pytest.mark.parametrize("bad", [math.nan, math.inf], ids=str)
def test_keys_that_no_group_lists_reach_nothing(backend, bad, seed):
    query, key, value = small_tensors(device=backend.device)
    indices, counts = column_lists([3, 88, 40], [50], device=backend.device)
    seen = [3, 40, 50, 88, *range(5), *range(18, 90)]  # sink, local: row 0 stands at 20
    hidden = [j for j in range(90) if j not in seen]
    options = dict(group_size=64, sink=5, local=3, causal=True)
    with backend.running(torch.float32, 32, group_size=64):
        want = call(query, key, value, indices, counts, **options)
        key[:, :, hidden] = bad
        value[:, :, hidden] = bad
        leaves = [x.requires_grad_() for x in (query, key, value)]
        got = call(*leaves, indices, counts, **options)
        assert_same_bits(got, want)
        grads = torch.autograd.grad(got[0].sum(), leaves)
        assert all(grad.isfinite().all() for grad in grads)
        assert not grads[1][:, :, hidden].any() and not grads[2][:, :, hidden].any()


def test_rows_that_see_no_key(backend, seed):
    """Groups without columns, and rows before their group's first column."""
    query, key, value = (x.requires_grad_() for x in small_tensors(64, 64, device=backend.device))
    indices, counts = column_lists([], [20, 30], [-1, -1], [63], device=backend.device)
    sinks = torch.randn(2, device=backend.device)
    with backend.running(torch.float32, 32, backward=True, group_size=16):
        out, lse = call(query, key, value, indices, counts, group_size=16, causal=True, sinks=sinks)
        grads = torch.autograd.grad([out, lse.where(lse > -math.inf, 0)], [query, key, value], [out + 1, lse * 0 + 1])
    blind = [*range(20), *range(32, 63)]
    assert not out[:, :, blind].any() and (lse[:, :, blind] == -math.inf).all()
    assert not grads[0][:, :, blind].any() and all(grad.isfinite().all() for grad in grads)
    assert lse[:, :, [20, 31, 63]].isfinite().all()


def test_what_stands_past_the_count_is_not_read(backend, seed):
    query, key, value = small_tensors(device=backend.device)
    indices = torch.tensor([5, -1, 17, 2**31 - 1], dtype=torch.int32, device=backend.device).expand(1, 1, 2, 4)
    counts = torch.tensor([[[3, 1]]], dtype=torch.int32, device=backend.device)
    with backend.running(torch.float32, 32, group_size=64):
        got = call(query, key, value, indices, counts, group_size=64)
        want = call(query, key, value, *column_lists([5, 17], [5], device=backend.device), group_size=64)
    assert_same_bits(got, want)


def test_a_column_listed_twice(backend, seed):
    """The caller's error, which check finds; it counts once."""
    query, key, value = (x.requires_grad_() for x in small_tensors(device=backend.device))
    twice = column_lists([9, 3, 9], [4, 4, 4], device=backend.device)
    once = column_lists([9, 3], [4], device=backend.device)
    with backend.running(torch.float32, 32, backward=True, group_size=64), deterministic(backend):
        results = [call(query, key, value, *lists, group_size=64) for lists in (twice, once)]
        assert_same_bits(*results)
        grads = [torch.autograd.grad(out.sum(), [query, key, value]) for out, _ in results]
        assert_same_bits(*grads)
    with pytest.raises(
        RuntimeError, match=re.escape("col_indices[0, 0, 0, 2] is 9, a column that this group lists twice")
    ):
        sparsekit.check(None, key=key, col_indices=twice[0], col_counts=twice[1])
    sparsekit.check(None, key=key, col_indices=once[0], col_counts=once[1])


def test_check_is_called_where_the_environment_asks_for_it(monkeypatch):
    query, key, value = small_tensors()
    monkeypatch.setenv("SPARSEKIT_CHECK", "1")
    with pytest.raises(RuntimeError, match="lists twice"):
        call(query, key, value, *column_lists([9, 9], [4]), group_size=64)


BAD = {
    "index": (
        dict(indices=[[3, 90]]),
        r"col_indices\[0, 0, 0, 1\] is 90; supported: -1 \(empty\) or a key from 0 to 89",
    ),
    "negative": (dict(indices=[[3, -2]]), r"col_indices\[0, 0, 0, 1\] is -2"),
    "count": (dict(counts=[3]), r"col_counts\[0, 0, 0\] is 3; supported: 0 to 2"),
    "count-below": (dict(counts=[-1]), r"col_counts\[0, 0, 0\] is -1"),
    "groups": (dict(group_size=32), r"col_counts has 1 groups; supported: 3, query's length 70 in groups of 32"),
    "group-size": (dict(group_size=0), r"group_size: found 0"),
    "heads": (dict(heads=3), r"col_counts has 3 heads; supported: 1, key's 2 or query's 2"),
    "sink": (dict(sink=-1), r"sink, local are -1, 0; supported: 0"),
    "causal": (dict(pattern=True, causal=True), r"causal: found True beside a pattern with causal=False"),
    "lengths": (dict(pattern=True, len_q=71), r"pattern: found seq_lengths \(71, 90\)"),
    "state": (dict(state=3), r"state: found shapes"),
    "dtype": (dict(dtype=torch.int64), r"col_indices has the wrong dtype; supported: int32"),
}


@pytest.mark.parametrize("name", BAD)
def test_errors_name_the_argument(cpu_backend, name):
    change, message = BAD[name]
    change = dict(change)
    query, key, value = small_tensors()
    indices = torch.tensor(change.pop("indices", [[3, 8]]), dtype=change.pop("dtype", torch.int32))[None, None]
    counts = torch.tensor(change.pop("counts", [2]), dtype=torch.int32)[None, None]
    heads = change.pop("heads", 1)
    options = dict(group_size=80) | change
    if options.pop("pattern", None):
        map_ = torch.ones(1, 1, 2, 2, dtype=torch.bool)
        options["pattern"] = sparsekit.BlockPattern.from_bool(map_, 64, seq_lengths=(options.pop("len_q", 70), 90))
    if "state" in options:
        options["state"] = (query, torch.zeros(1, 2, options["state"]))
    with cpu_backend.forced(), pytest.raises((RuntimeError, ValueError), match=message):
        call(query, key, value, indices.expand(1, heads, -1, -1), counts.expand(1, heads, -1), **options)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("blocks", [False, True], ids=["", "blocks"])
def test_bad_entries_are_skipped_on_cuda(blocks, seed):
    """Counts are clamped, entries outside are no columns: nothing is read out of bounds, and nobody waits to check."""
    query, key, value = (x.requires_grad_() for x in small_tensors(device="cuda"))
    bad = torch.tensor([[5, 90, -7, 2**31 - 1, -(2**31), 17], [3] + [90, -1, 1 << 30, 6, 89]], dtype=torch.int32)
    pattern = None
    if blocks:
        block_map = torch.tensor([[1, 0], [0, 1]], dtype=torch.bool)[None, None]
        pattern = sparsekit.BlockPattern.from_bool(block_map, 64, seq_lengths=(70, 90)).to("cuda")
    for counts, want in (([6, 100], ([5, 17], [3, 6, 89])), ([2, -5], ([5], []))):
        lists = bad[None, None].cuda(), torch.tensor([[counts]], dtype=torch.int32).cuda()
        options = dict(group_size=64, local=3, pattern=pattern)
        with deterministic(next(backend for backend in BACKENDS if backend.device == "cuda")):
            got = call(query, key, value, *lists, **options)
            right = call(query, key, value, *column_lists(*want, device="cuda"), **options)
            assert_same_bits([x.detach() for x in got], [x.detach() for x in right])
            pairs = (torch.autograd.grad(out.sum(), [query, key, value]) for out, _ in (got, right))
            assert_same_bits(*pairs)


@pytest.mark.parametrize("sizes", [(0, 2, 70, 90), (1, 0, 70, 90), (1, 2, 0, 90), (1, 2, 70, 0)], ids=str)
def test_zero_sized(backend, sizes):
    batch, heads, len_q, len_k = sizes
    tensors = small_tensors(len_q, len_k, heads, batch=batch, device=backend.device)
    query, key, value = (x.requires_grad_() for x in tensors)
    indices = torch.full((1, 1, -(-len_q // 64), 3), -1, dtype=torch.int32, device=backend.device)
    counts = torch.full(indices.shape[:3], 2, dtype=torch.int32, device=backend.device)
    with backend.forced():
        out, lse = call(query, key, value, indices, counts, group_size=64, sink=4, local=4)
        grads = torch.autograd.grad(out.sum(), [query, key, value])
    assert out.shape == query.shape and lse.shape == query.shape[:3]
    assert not out.any() and (lse == -math.inf).all() and not any(grad.any() for grad in grads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_id)
def test_strides(backend, dtype, seed):
    """[B, S, H, D] in memory, rows apart, and a slice that is not aligned: the same bits, out in query's order."""
    problem = make_problem(BASE.with_(dtype=dtype, heads_q=4, local=20, causal=True, batch=2), backend, seed)
    with backend.running(*problem.about, backward=True, **problem.kind), deterministic(backend):
        want = run(problem, gradients=True)
        for layout in (
            lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
            lambda x: torch.nn.functional.pad(x, (0, 16))[..., : x.shape[-1]],
            lambda x: torch.nn.functional.pad(x, (1, 0))[..., 1:],
        ):
            changed = {name: layout(x.detach()).requires_grad_() for name, x in problem.leaves().items()}
            out, lse = problem.sparse(changed)
            grads = torch.autograd.grad([out, lse], list(changed.values()), problem.upstream)
            assert_same_bits([out.detach(), lse.detach(), *grads], want)


# ---- states


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_id)
@pytest.mark.parametrize("sinks", [False, True], ids=["", "sinks"])
def test_resuming_a_state_is_one_call(backend, dtype, sinks, seed):
    """The band first, then columns that skip it: as AnchorAttention does it."""
    case = BASE.with_(dtype=dtype, heads_q=4, causal=True, sinks=sinks, len_q=210, columns=0.3)
    problem = make_problem(case, backend, seed)
    inputs = problem.inputs
    start = torch.arange(0, 210, 64, device=backend.device)[:, None, None]
    inside = (inputs.col_indices < 20) | (inputs.col_indices >= start[:, 0]) | (inputs.col_indices < 0)
    indices = inputs.col_indices.masked_fill(inside, -1)
    none = torch.zeros_like(inputs.col_counts)
    leaves = {name: x for name, x in problem.leaves().items()}
    qkv = [leaves[name] for name in ("query", "key", "value")]
    extra = {"sinks": leaves["sinks"]} if sinks else {}
    options = dict(group_size=64, causal=True)
    block_map = torch.eye(4, dtype=torch.bool)[None, None]
    diagonal = sparsekit.BlockPattern.from_bool(block_map, 64, seq_lengths=(210, 210), causal=True).to(backend.device)
    with backend.running(*problem.about, backward=True, **problem.kind):
        state = call(*qkv, indices, none, sink=20, pattern=diagonal, **options)
        resumed = call(*qkv, indices, inputs.col_counts, state=state, **extra, **options)
        at_once = call(*qkv, indices, inputs.col_counts, sink=20, pattern=diagonal, **extra, **options)
        upstream = [torch.randn_like(x) for x in at_once]
        tolerance = dict(rtol=2e-5, atol=2e-5) if dtype == torch.float32 else dict(rtol=2e-2, atol=2e-2)
        for got, want in zip(resumed, at_once, strict=True):
            torch.testing.assert_close(got, want, **tolerance)
        wanted = [*qkv, *extra.values()]
        pairs = (torch.autograd.grad(results, wanted, upstream) for results in (resumed, at_once))
        scale = 4 if dtype == torch.float32 else 10
        for got, want in zip(*pairs, strict=True):
            torch.testing.assert_close(got, want, **{name: scale * value for name, value in tolerance.items()})


# ---- torch


TORCH = StripeCase(
    batch=2, heads_q=4, heads_kv=2, len_q=150, len_k=200, head_dim=32, dtype=torch.float32, block_size=(64, 64),
    density=0.5, group_size=64, columns=0.2, sink=5, local=20,
)  # fmt: skip
TORCH_CASES = {
    "columns": TORCH,
    "everything": TORCH.with_(
        causal=True, window=(90, -1), bits=True, softcap=5.0, key_bias=True, sinks=True, positions=True, blocks=True
    ),
}


def op_arguments(inputs) -> tuple:
    """Positional arguments of stripe_sparse_attn for a case."""
    case, pattern = inputs.case, inputs.pattern
    lists = (None,) * 6
    if case.blocks:
        lists = (pattern.kv_num_blocks, pattern.kv_indices, pattern.full_kv_num_blocks, pattern.full_kv_indices)
        lists += (pattern.partial_bits, pattern.partial_bits_index)
    return (
        *(*inputs.args, case.group_size, case.sink, case.local, *lists, case.block_size, None, case.causal),
        *(case.window, case.softcap, inputs.key_bias, inputs.sinks, inputs.query_positions, inputs.key_positions),
    )


@pytest.mark.parametrize("name", TORCH_CASES)
def test_opcheck(name, seed):
    inputs = make_problem(TORCH_CASES[name], None, seed).inputs
    for tensor in (inputs.query, inputs.key, inputs.value, inputs.key_bias, inputs.sinks):
        if tensor is not None:
            tensor.requires_grad_()
    arguments = op_arguments(inputs)
    opcheck(OPS.stripe_sparse_attn, arguments)
    with torch.no_grad():
        out, lse = OPS.stripe_sparse_attn(*arguments)
        opcheck(
            OPS.stripe_sparse_attn_backward,
            (torch.randn_like(out), torch.randn_like(lse), *arguments[:3], out, lse, *arguments[3:]),
            {"key_bias_grad": True},
            test_utils=("test_schema", "test_faketensor"),
        )
    opcheck(OPS.check_column_lists, (inputs.col_indices, inputs.col_counts, 200), test_utils=("test_schema",))


@pytest.mark.parametrize("name", TORCH_CASES)
def test_compile_with_dynamic_shapes(name, seed):
    torch._dynamo.reset()

    @torch.compile(fullgraph=True, dynamic=True, backend="aot_eager")
    def compiled(query, key, value, indices, counts, kwargs):
        out, lse = sparsekit.stripe_sparse_attention(query * 2, key, value, indices, counts, return_lse=True, **kwargs)
        return out + 1, lse

    for length in (150, 170, 129):
        problem = make_problem(TORCH_CASES[name].with_(len_q=length), None, seed)
        inputs = problem.inputs
        leaves = [x.requires_grad_() for x in inputs.args[:3]]
        results = []
        for attend in (compiled, compiled._torchdynamo_orig_callable):
            out, lse = attend(*inputs.args, inputs.kwargs)
            loss = (out.sum() + lse.where(lse > -math.inf, 0).sum(),)
            results.append([out.detach(), lse.detach(), *torch.autograd.grad(loss, leaves)])
        assert_same_bits(*results)
    torch._dynamo.reset()


def test_export(seed):
    inputs = make_problem(TORCH, None, seed).inputs

    class Model(torch.nn.Module):
        def forward(self, *tensors):
            return sparsekit.stripe_sparse_attention(*tensors, **inputs.kwargs)

    program = torch.export.export(Model(), inputs.args)
    torch.testing.assert_close(program.module()(*inputs.args), Model()(*inputs.args), rtol=0, atol=0)


@pytest.mark.parametrize("mapped", ["tensors", "columns", "all"])
@pytest.mark.parametrize("lists_batch", [False, True], ids=["lists-shared", "lists-per-batch"])
def test_vmap(mapped, lists_batch, seed):
    problems_ = [make_problem(TORCH.with_(lists_batch=lists_batch, causal=True), None, seed + n) for n in range(3)]
    first = problems_[0].inputs
    width = max(p.inputs.col_indices.shape[-1] for p in problems_)

    def padded(inputs):
        gap = width - inputs.col_indices.shape[-1]
        return (*inputs.args[:3], torch.nn.functional.pad(inputs.col_indices, (0, gap), value=-1), inputs.col_counts)

    which = {"tensors": (0, 1, 2), "columns": (3, 4), "all": range(5)}[mapped]
    args = [torch.stack([padded(p.inputs)[n] for p in problems_]) if n in which else padded(first)[n] for n in range(5)]
    in_dims = tuple(0 if n in which else None for n in range(5))

    def attend(*tensors):
        return sparsekit.stripe_sparse_attention(*tensors, return_lse=True, **first.kwargs)

    got = torch.vmap(attend, in_dims)(*args)
    for n in range(3):
        want = attend(*(x[n] if dim == 0 else x for x, dim in zip(args, in_dims, strict=True)))
        assert_same_bits([x[n] for x in got], want)
    if mapped == "all":  # backward of the folded call
        leaves = [x.requires_grad_() for x in args[:3]]
        out, lse = torch.vmap(attend, in_dims)(*args)
        got = torch.autograd.grad(out.square().sum(), leaves)
        want = torch.autograd.grad(sum(attend(*(x[n] for x in args))[0].square().sum() for n in range(3)), leaves)
        assert_same_bits(got, want)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", ["columns", "everything"])
def test_cuda_graph(name, seed):
    """Plan and kernels are captured, and read the lists at each replay."""
    backend = next(backend for backend in BACKENDS if backend.device == "cuda")
    first, second = (make_problem(TORCH_CASES[name], backend, seed + n).inputs for n in range(2))
    width = min(x.col_indices.shape[-1] for x in (first, second))
    tensors = [x.clone() for x in first.args]
    tensors[3] = tensors[3][..., :width].contiguous()

    def attend():
        return sparsekit.stripe_sparse_attention(*tensors, return_lse=True, **first.kwargs)

    attend()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = attend()
    for inputs in (first, second):
        changed = [*inputs.args[:3], inputs.col_indices[..., :width], inputs.col_counts]
        for tensor, new in zip(tensors, changed, strict=True):
            tensor.copy_(new)
        graph.replay()
        assert_same_bits([x.clone() for x in captured], attend())


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_compile_on_cuda(seed):
    torch._dynamo.reset()
    backend = next(backend for backend in BACKENDS if backend.device == "cuda")
    inputs = make_problem(TORCH_CASES["columns"], backend, seed).inputs
    options = inputs.kwargs

    def attend(query, *rest):
        return sparsekit.stripe_sparse_attention(query * 2, *rest, **options) + 1

    leaves = [x.requires_grad_() for x in inputs.args[:3]]
    results = []
    with deterministic(backend):
        for call_ in (attend, torch.compile(attend, fullgraph=True, backend="aot_eager")):
            out = call_(*inputs.args)
            results.append([out.detach(), *torch.autograd.grad(out.sum(), leaves)])
    assert_same_bits(*results)
    torch._dynamo.reset()


def test_autocast(seed):
    inputs = make_problem(TORCH, None, seed).inputs
    with torch.autocast("cpu", torch.bfloat16):
        out = sparsekit.stripe_sparse_attention(*inputs.args, **inputs.kwargs)
    want = sparsekit.stripe_sparse_attention(
        *(x.bfloat16() for x in inputs.args[:3]), *inputs.args[3:], **inputs.kwargs
    )
    assert out.dtype == torch.bfloat16
    assert_same_bits([out], [want])


def test_double_backward_is_refused(seed):
    inputs = make_problem(TORCH, None, seed).inputs
    inputs.query.requires_grad_()
    out = sparsekit.stripe_sparse_attention(*inputs.args, **inputs.kwargs)
    (grad,) = torch.autograd.grad(out.sum(), inputs.query, create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        grad.sum().backward()


def test_info_shows_the_plan():
    plan = sparsekit.info(head_dim=64, group_size=100)["attention"]
    assert "stripes of 100 rows" in plan["problem"] and plan["reference"] == "runs"


# ---- the benchmark


@pytest.mark.parametrize("lists", ["q", "kv", "shared"])
@pytest.mark.parametrize("feature", ["columns", "band", "local"])
def test_bench_counts_pairs(feature, lists, seed):
    inputs = make_problem(TORCH.with_(sink=0, local=0, lists=lists).with_(**FEATURES[feature]), None, seed).inputs
    assert stripe_pairs(inputs) == int(stripes_visible(inputs).sum())


@pytest.mark.parametrize("backward", [False, True])
def test_bench_command(tmp_path, backward):
    report = tmp_path / "out.json"
    arguments = ["stripes", "--cases", "d128-10,d128-gqa-10", "--length", "300", "--seconds", "0.01", "--dense"]
    assert command.main([*arguments, "--json", str(report)] + ["--backward"] * backward) == 0
    cases = json.loads(report.read_text())["cases"]
    assert [case["case"] for case in cases] == ["d128-10", "d128-gqa-10"]
    for case in cases:
        assert [row["name"] for row in case["results"]] == ["stripes", "blocks", "dense"]
        assert case["density"] == pytest.approx(0.1, abs=0.01)
