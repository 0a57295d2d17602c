"""top-k, top-p and threshold, against a choice made entry by entry in Python. Choices are equal, not close."""

import math

import pytest
import torch
import torch._dynamo.testing
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.library import opcheck

import selection_twins as twins
from backends import BACKENDS, calls
from sparsekit import BlockPattern, selection
from sparsekit.selection import select_threshold, select_top_k, select_top_p

OPS = torch.ops.sparsekit


def draw(kind: str, heads: int, rows: int, columns: int, dtype=torch.float32) -> torch.Tensor:
    """Scores that make choosing hard."""
    shape = (heads, rows, columns)
    x = {
        "normal": lambda: torch.randn(shape),
        "uniform": lambda: torch.rand(shape),
        "ties": lambda: torch.randint(0, 4, shape).float(),  # massive ties
        "equal": lambda: torch.full(shape, 0.25),
        "one_hot": lambda: torch.zeros(shape).index_fill_(-1, torch.tensor([columns // 2]), 1.0),
        "heavy": lambda: torch.randn(shape).mul(12).exp(),  # one entry has nearly all
        "softmax": lambda: torch.randn(shape).mul(4).softmax(-1),
        "tiny": lambda: torch.rand(shape) * 1e-42,  # denormals
        "huge": lambda: torch.rand(shape) * 3e38,
        "signed_zeros": lambda: torch.zeros(shape).where(torch.rand(shape) < 0.5, -0.0),
        "all_inf": lambda: torch.full(shape, -math.inf),
        "holes": lambda: torch.rand(shape).where(torch.rand(shape) < 0.3, -math.inf),
        "bad": lambda: (
            torch.randn(shape)
            .where(torch.rand(shape) < 0.8, math.nan)
            .where(torch.rand(shape) < 0.8, -math.inf)
            .where(torch.rand(shape) < 0.9, math.inf)
        ),
        "ascending": lambda: torch.arange(columns).float().expand(shape).contiguous(),
        "descending": lambda: torch.arange(columns, 0, -1).float().expand(shape).contiguous(),
        "close": lambda: 1 + torch.randint(0, 1 << 12, shape) * 2.0**-23,  # differ in the last bits
    }[kind]()
    return x.to(dtype)


KINDS = (
    *("normal", "uniform", "ties", "equal", "one_hot", "heavy", "softmax", "tiny", "huge", "signed_zeros", "all_inf"),
    *("holes", "bad", "ascending", "descending", "close"),
)


@pytest.fixture(params=[pytest.param(b, id=b.name, marks=[pytest.mark.cuda] * (b.device == "cuda")) for b in BACKENDS])
def chooser(request):
    """A backend with choices."""
    backend = request.param
    calls[backend.name] += 1
    return backend


def run(backend, function, scores, *args, **options):
    def moved(x):
        return x.to(backend.device) if isinstance(x, torch.Tensor) else x

    with backend.forced():
        result = function(moved(scores), *map(moved, args), **{k: moved(v) for k, v in options.items()})
    return tuple(x.cpu() for x in result)


def check(got, want):
    for name, a, b in zip(("counts", "indices"), (got[1], got[0]), (want[1], want[0]), strict=True):
        assert a.dtype == torch.int32 and a.shape == b.shape, name
        assert torch.equal(a, b), f"{name}\n{a[a != b][:8]} for {b[a != b][:8]}"
    if len(got) == 3:
        torch.testing.assert_close(got[2], want[2], rtol=1e-6, atol=0, equal_nan=True)


# ---- each rule on each kind of row


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("columns", [1, 7, 64, 333])
def test_top_k(chooser, kind, columns):
    scores = draw(kind, 2, 3, columns)
    for k in {0, 1, columns // 3, columns, columns + 5}:
        got = run(chooser, select_top_k, scores, k, return_mass=True)
        check(got, twins.choose(scores, "top_k", number=torch.full((2, 3), k), width=k))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("columns", [1, 7, 64, 333])
def test_top_p(chooser, kind, columns):
    probs = draw(kind, 2, 3, columns)
    for p in (0.0, 0.5, 0.9, 0.999, 1.0):
        got = run(chooser, select_top_p, probs, p, return_mass=True)
        check(got, twins.choose(probs, "top_p", number=torch.full((2, 3), p, dtype=torch.float64)))


@pytest.mark.parametrize("kind", KINDS)
def test_top_p_of_a_head(chooser, kind):
    probs = draw(kind, 3, 5, 41) * torch.rand(3, 5, 1)
    for p in (0.0, 0.3, 0.9, 1.0):
        got = run(chooser, select_top_p, probs, p, scope="head", return_mass=True)
        want = twins.choose(probs, "top_p", number=torch.full((3,), p, dtype=torch.float64), by_head=True)
        check(got, want)


@pytest.mark.parametrize("kind", KINDS)
def test_threshold(chooser, kind):
    scores = draw(kind, 2, 3, 133)
    for threshold in (-math.inf, -0.5, 0.0, 0.25, float(scores[0, 0, 5].nan_to_num()), math.inf, math.nan):
        got = run(chooser, select_threshold, scores, threshold, return_mass=True)
        check(got, twins.choose(scores, "threshold", number=torch.full((2, 3), threshold)))


def test_threshold_below_an_anchor(chooser):
    scores = torch.randn(2, 3, 4, 90)
    anchor = scores.amax(-1)
    got = run(chooser, select_threshold, scores, 1.5, anchor=anchor)
    limit = (anchor - 1.5).flatten(0, 1)
    want = twins.choose(scores.flatten(0, 1), "threshold", number=limit)
    check((got[0].flatten(0, 1), got[1].flatten(0, 1)), want)
    assert (got[1] >= 1).all()


@pytest.mark.parametrize("columns", [4097, 20000, 131072])
@pytest.mark.parametrize("kind", ["normal", "ties", "one_hot", "heavy", "softmax", "holes", "close", "descending"])
def test_long_rows(backend, kind, columns):
    """Rows that are narrowed by a sample first, against torch: the stable sort has ties at the lower index first."""
    calls[backend.name] += 1
    scores = draw(kind, 1, 2, columns)
    order = scores.sort(dim=-1, descending=True, stable=True)
    for k in (1, 100, 2048, columns // 2):
        best = order.indices[..., :k].sort(-1).values.int()
        allowed = scores.gather(-1, best.long()) > -math.inf
        got = run(backend, select_top_k, scores, k)
        assert torch.equal(got[1], allowed.sum(-1).int())
        for row in range(2):
            assert torch.equal(got[0][0, row, : got[1][0, row]], best[0, row][allowed[0, row]])
    masses = scores.clamp(min=0).double()
    for p in (0.2, 0.95):
        indices, counts = run(backend, select_top_p, scores, p)
        for row in range(2):
            total, taken = masses[0, row].sum(), masses[0, row, indices[0, row, : counts[0, row]].long()]
            assert taken.sum() >= p * total * (1 - 1e-6)
            if len(taken):  # without its least it would not do, and nothing better was left out
                assert taken.sum() - taken.min() <= p * total * (1 + 1e-6)
                assert torch.equal(taken.sort(descending=True).values, order.values[0, row, : len(taken)].double())


# ---- everything at once


@st.composite
def problems(draw_value):
    heads, rows = draw_value(st.integers(1, 3)), draw_value(st.integers(1, 4))
    columns = draw_value(st.one_of(st.integers(1, 40), st.integers(1, 300)))
    width = draw_value(st.integers(0, columns + 3))
    sink = draw_value(st.integers(0, min(width, 4)))
    return {
        "shape": (heads, rows, columns),
        "kind": draw_value(st.sampled_from(KINDS)),
        "dtype": draw_value(st.sampled_from([torch.float32, torch.bfloat16, torch.float16])),
        "width": width,
        "sink": sink,
        "local": draw_value(st.integers(0, min(width - sink, 5))),
        "min_count": draw_value(st.integers(0, width)),
        "limits": draw_value(st.booleans()),
        "seed": draw_value(st.integers(0, 2**31)),
    }


@settings(max_examples=60)
@given(problem=problems(), rule=st.sampled_from(["top_k", "top_p", "head", "threshold"]), weighted=st.booleans())
def test_any_choice(backend, problem, rule, weighted):
    calls[backend.name] += 1
    torch.manual_seed(problem["seed"])
    heads, rows, columns = shape = problem["shape"]
    scores = draw(problem["kind"], *shape, problem["dtype"])
    limits = torch.randint(-2, columns + 3, shape[:2]) if problem["limits"] else None
    bounds = {name: problem[name] for name in ("min_count", "sink", "local")}
    given = dict(bounds, max_count=problem["width"], row_limit=limits, return_mass=True)
    wanted = dict(bounds, width=problem["width"], row_limit=limits)
    if rule == "top_k":
        k = torch.randint(-1, columns + 3, shape[:2])
        got = run(backend, select_top_k, scores, k, **given)
        want = twins.choose(scores, "top_k", number=k, **wanted)
    elif rule == "threshold":
        threshold = scores[..., 0].float().nan_to_num()
        got = run(backend, select_threshold, scores, threshold, **given)
        want = twins.choose(scores, "threshold", number=threshold, **wanted)
    else:
        weights = torch.randint(0, 5, (heads, 1, columns)).float() if weighted else None
        by_head = rule == "head"
        p = torch.rand(shape[: 1 if by_head else 2])
        got = run(backend, select_top_p, scores, p, weights=weights, scope="head" if by_head else "row", **given)
        weights = None if weights is None else weights.expand(shape)
        want = twins.choose(scores, "top_p", number=p, weights=weights, by_head=by_head, **wanted)
    check(got, want)


# ---- shapes, strides, threads, repeats


def test_leading_dimensions(chooser):
    scores = torch.randn(2, 3, 5, 20)
    k = torch.randint(1, 9, (3, 1))
    got = run(chooser, select_top_k, scores, k, max_count=9)
    assert got[0].shape == (2, 3, 5, 9) and got[1].shape == (2, 3, 5)
    want = twins.choose(scores.flatten(0, 1), "top_k", number=k.expand(2, 3, 5).flatten(0, 1), width=9)
    check((got[0].flatten(0, 1), got[1].flatten(0, 1)), want)
    indices, counts = run(chooser, select_top_k, scores[0, 0, 0], 4)
    assert (
        indices.shape == (4,)
        and counts.shape == ()
        and indices.tolist() == scores[0, 0, 0].topk(4)[1].sort()[0].tolist()
    )
    indices, counts = run(chooser, select_top_p, scores[0, 0].softmax(-1), torch.tensor(0.4))
    assert indices.shape == (5, 20) and counts.shape == (5,)
    weights = torch.rand(20)
    one, two = (
        run(chooser, select_top_p, scores.softmax(-1), 0.5, weights=w) for w in (weights, weights.expand(2, 3, 5, 20))
    )
    check(one, two)


def test_views(chooser):
    wide = torch.randn(4, 60, 50)
    for view in (wide.transpose(1, 2), wide[:, ::3, 7:], wide[:1].expand(3, -1, -1)):
        check(run(chooser, select_top_k, view, 5), run(chooser, select_top_k, view.contiguous(), 5))


@pytest.mark.parametrize("shape", [(0, 3, 8), (2, 0, 8), (2, 3, 0)])
def test_empty(chooser, shape):
    for function, value in ((select_top_k, 4), (select_top_p, 0.5), (select_threshold, 0.0)):
        indices, counts, mass = run(chooser, function, torch.randn(shape), value, return_mass=True)
        assert counts.shape == mass.shape == shape[:2] and indices.shape[:2] == shape[:2]
        assert not counts.any() and (indices == -1).all() and not mass.any()


def test_same_on_every_backend_and_thread_count(one_or_two_threads):
    probs = draw("softmax", 3, 40, 700)
    for options in ({}, {"scope": "head"}):
        results = []
        for backend in (b for b in BACKENDS if b.device == "cpu"):
            for threads in (1, 2):
                one_or_two_threads(threads)
                results.append(run(backend, select_top_p, probs, 0.93, return_mass=True, **options))
        for result in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


def test_choice_to_pattern(chooser):
    """Choices are lists that BlockPattern takes."""
    scores = selection.block_scores(torch.randn(1, 4, 320, 16), torch.randn(1, 2, 320, 16), 64, causal=True)
    limits = selection.row_limits(64, (320, 320))
    indices, counts = run(chooser, select_top_k, scores, 3, sink=1, local=1, row_limit=limits)
    pattern = BlockPattern.from_indices(indices, counts, 64, seq_lengths=(320, 320), causal=True)
    dense = pattern.to_dense()[0]
    assert dense[:, :, 0].all() and dense.diagonal(dim1=-2, dim2=-1).all()
    assert torch.equal(dense.sum(-1), torch.tensor([1, 2, 3, 3, 3]).expand(4, 5))


# ---- errors


@pytest.mark.parametrize("call, error, message", [
    (lambda x: select_top_k(x, 3, sink=2, local=2), ValueError, "sink, local, min_count: found 2, 2, 0"),
    (lambda x: select_top_k(x, 3, min_count=4), ValueError, "up to the length of the lists, 3"),
    (lambda x: select_top_k(x, -1), ValueError, "max_count: found -1"),
    (lambda x: select_top_p(x, 1.5), ValueError, "p: found 1.5, supported is a share from 0 to 1"),
    (lambda x: select_top_p(x, 0.5, scope="all"), ValueError, "scope: found 'all'"),
    (lambda x: select_top_p(x, 0.5, sink=-1), ValueError, "sink: found -1"),
    (lambda x: select_top_k(x.double(), 3), RuntimeError, "scores is float64; supported: float32"),
    (lambda x: select_top_k(x.int(), 3), RuntimeError, "scores has an unsupported dtype"),
    (lambda x: OPS.select_top_k(x, None, 3, 3, 4), RuntimeError, "min_count 4; supported"),
    (lambda x: OPS.select_top_k(x[0], None, 3, 3), RuntimeError, "scores has 2 dimensions; supported: 3"),
    (lambda x: OPS.select_threshold(x, torch.zeros(2, 4), 3), RuntimeError, "thresholds has size 4 in dimension 1"),
])  # fmt: skip
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call(torch.randn(2, 3, 8))


# ---- torch


def test_opcheck():
    scores, limits = torch.rand(2, 3, 20), torch.randint(0, 20, (2, 3), dtype=torch.int32)
    bounds = (9, 1, 1, 2, limits, True)
    opcheck(OPS.select_top_k, (scores, torch.randint(0, 9, (2, 3), dtype=torch.int32), 0, *bounds))
    opcheck(OPS.select_top_k, (scores, None, 4, 4))
    opcheck(OPS.select_top_p, (scores, torch.rand(1, 1, 20), torch.rand(2, 3), 0.0, False, *bounds))
    opcheck(OPS.select_top_p, (scores, None, torch.rand(2), 0.0, True, 20))
    opcheck(OPS.select_threshold, (scores, torch.rand(2, 3), *bounds))


def test_vmap():
    scores = torch.rand(4, 2, 3, 20)
    for function in (
        lambda x: select_top_k(x, 5, sink=1),
        lambda x: select_top_p(x, 0.6),
        lambda x: select_threshold(x, 0.5),
    ):
        check(torch.vmap(function)(scores), [torch.stack(x) for x in zip(*map(function, scores), strict=True)])


def test_compile_with_dynamic_shapes():
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    @torch.compile(fullgraph=True, dynamic=True, backend=counter)
    def choose(query, key):
        scores = selection.block_scores(query, key, 32, causal=True)
        limits = selection.row_limits(32, (query.shape[2], key.shape[2]))
        first = select_top_p(scores.softmax(-1), 0.8, sink=1, local=1, row_limit=limits, return_mass=True)
        return *first, *select_top_k(scores, 3), *select_threshold(scores, 1.0, anchor=scores.amax(-1))

    for length in (200, 333, 470):
        query, key = torch.randn(1, 4, length, 16), torch.randn(1, 2, length + 40, 16)
        for got, want in zip(choose(query, key), choose._torchdynamo_orig_callable(query, key), strict=True):
            assert torch.equal(got, want)
    assert counter.frame_count == 1
    torch._dynamo.reset()


def test_no_gradient_through_a_choice():
    scores = torch.randn(2, 3, 8, requires_grad=True)
    _, _, mass = select_top_k(scores, 3, return_mass=True)
    assert not mass.requires_grad
