"""The token ops on CUDA beyond what every backend does: bad entries that no error can name, the plans of large inputs, bitwise repeats,
CUDA graphs."""

import functools

import pytest
import torch

import sparsekit
from backends import BACKENDS, calls
from sparsekit import reference_tokens as reference
from test_tokens import FLOATS, assert_rounded, random, random_index
from test_tokens_match import check_match

OPS = torch.ops.sparsekit
pytestmark = pytest.mark.cuda
CUDA = [backend for backend in BACKENDS if backend.name == "cuda"]


@pytest.fixture(autouse=True)
def on_cuda():
    if not CUDA:
        pytest.skip("no GPU")
    calls["cuda"] += 1
    with torch.device(CUDA[0].device):
        yield


# ---- entries that name no token count as -1; nothing is read or written out of bounds


BAD = (-2, 9, 10, 2**31 - 1, -(2**31), 2**40)


def with_bad_entries(index: torch.Tensor):
    """(index with a third of its entries bad, the same with -1 there)."""
    values = [value for value in BAD if abs(value) <= torch.iinfo(index.dtype).max]
    bad = torch.tensor(values, dtype=index.dtype)[torch.randint(0, len(values), index.shape)]
    where = torch.rand(index.shape) < 0.3
    return torch.where(where, bad, index), index.masked_fill(where, -1)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_bad_entries_are_none(dtype):
    x, heads = random(3, 9, 16), random(3, 2, 9, 5, dtype=torch.bfloat16)
    bad, good = with_bad_entries(random_index(3, 12, tokens=9, dtype=dtype))
    for got, want in zip(
        sparsekit.gather_tokens([x, heads], bad, dim=[1, 2]),
        sparsekit.gather_tokens([x, heads], good, dim=[1, 2]),
        strict=True,
    ):
        assert torch.equal(got, want)
    src, weights, grad = random(3, 12, 16), torch.rand(3, 12), random(3, 9, 16)
    for reduce in range(3):
        given = weights if reduce else None
        results = []
        for index in (bad, good):
            outs, totals = OPS.scatter_tokens([src], given, [], index, [1], 9, reduce)
            grads = OPS.scatter_tokens_backward(
                [grad], None, [src], given, outs, totals, index, [1], 12, reduce, weights_grad=reduce > 0
            )
            results.append([*outs, totals, *grads[0], grads[1]])
        assert all(map(torch.equal, *results))
    places, same_places = with_bad_entries(random_index(3, 12, 4, tokens=9, dtype=dtype))
    for reduce in ("copy", "add", "mean"):
        got, want = (sparsekit.scatter_tokens(src, index, 9, reduce=reduce) for index in (places, same_places))
        assert torch.equal(got, want)


def test_bad_cu_seqlens_stay_inside():
    """Any numbers: results of the right shape, rows of what exists or zeros, the same in every run."""
    x, index = torch.ones(20, 8), torch.randint(-1, 30, (4, 9))
    for _ in range(20):
        cu, cu_out = (torch.randint(-30, 40, (5,), dtype=torch.int32) for _ in range(2))
        calls_ = [
            lambda cu=cu: sparsekit.gather_tokens(x, index, cu_seqlens=cu),
            lambda cu=cu, out=cu_out: sparsekit.gather_tokens(x, index, cu_seqlens=cu, cu_seqlens_out=out, length=17),
            lambda cu=cu: sparsekit.scatter_tokens(x, index, 11, reduce="mean", cu_seqlens=cu),
            lambda out=cu_out: sparsekit.scatter_tokens(torch.ones(4, 9, 8), index, 13, cu_seqlens_out=out),
            lambda cu=cu, out=cu_out: sparsekit.scatter_tokens(
                x, index, 13, reduce="mean", cu_seqlens=cu, cu_seqlens_out=out
            ),
        ]
        for call in calls_:
            out = call()
            assert ((out == 0) | (out == 1)).all()
        empty = torch.zeros(5, dtype=torch.int32)
        assert not sparsekit.gather_tokens(x, index, cu_seqlens=empty).any()


@pytest.mark.parametrize("keep, lengths, kept", [
    ([1, 1, 5], None, 1),
    ([3, 2, 5], None, 1),
    ([0, 4, 8], None, 2),
    ([1, -2, 3], None, 1),
    ([2**40, 1, 2], None, 0),
    ([1, 5, 6], 6, 2),
    ([1, 5, 6], 99, 3),
    ([1, 5, 6], -4, 0),
])  # fmt: skip
@pytest.mark.parametrize("paged", [False, True])
def test_a_list_ends_before_its_first_bad_entry(keep, lengths, kept, paged):
    cache = random(1, 2, 8, 4)
    want = cache.clone()
    want[:, :, :kept] = cache[:, :, keep[:kept]]
    options = {} if lengths is None else {"lengths": torch.tensor([lengths], dtype=torch.int32)}
    if paged:
        pages = cache.view(2, 4, 2, 4).transpose(0, 1).reshape(4, 2, 2, 4).contiguous()  # [pages, H, page_size, D]
        table = torch.arange(4, dtype=torch.int32)[None]
        sparsekit.compact_kv([pages], torch.tensor([keep]), block_table=table, **options)
        cache = pages.transpose(0, 1).reshape(1, 2, 8, 4)
    else:
        sparsekit.compact_kv([cache], torch.tensor([keep]), **options)
    assert torch.equal(cache, want)
    if lengths is not None:
        assert options["lengths"].item() == kept


def test_pages_that_do_not_exist():
    cache = random(3, 2, 4, 8)
    before = cache.clone()
    sparsekit.compact_kv([cache], torch.tensor([[1, 5, 8]]), block_table=torch.tensor([[1, 9, -1]], dtype=torch.int32))
    before[1, :, 0] = before[1, :, 1]
    assert torch.equal(cache, before)


@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("width", [6, 64, 200])
def test_compact_many_rows(heads, width):
    """More rows than a batch of the kernel: moved rows overlap what others still have to read."""
    tokens = 3000
    cache = random(2, heads, tokens, width, dtype=torch.bfloat16)
    keep = torch.stack([torch.randperm(tokens)[:2500].sort().values for _ in range(2 * heads)]).view(2, heads, 2500)
    want = cache.clone()
    want[:, :, :2500] = cache.gather(2, keep[..., None].expand(-1, -1, -1, width))
    sparsekit.compact_kv([cache], keep)
    assert torch.equal(cache, want)


def test_bad_counts_are_clamped():
    metric = random(4, 20, 16)
    got = sparsekit.bipartite_match(metric, torch.tensor([-3, 99, 2, 4]), counts=torch.tensor([20, 99, -7, 9]).int())
    want = sparsekit.bipartite_match(metric, torch.tensor([0, 10, 0, 4]), counts=torch.tensor([20, 20, 0, 9]).int())
    assert all(map(torch.equal, got, want))


# ---- large inputs


@pytest.mark.parametrize("reduce", ["copy", "add", "mean"])
@pytest.mark.parametrize("entries, rows, concentrated", [(5000, 3000, False), (5000, 7, True), (2300, 40_000, False)])
@pytest.mark.parametrize("packed", [False, True])
def test_scatter_of_many_entries(reduce, entries, rows, concentrated, packed):
    """Sorted over all samples at once; with rows of thousands of entries."""
    src, index = random(2, entries, 8), random_index(2, entries, tokens=rows)
    if concentrated:
        index[:, ::2] = rows - 1
    weights = None if reduce == "copy" else torch.rand(2, entries).where(torch.rand(2, entries) < 0.8, 0)
    options = {"weights": weights, "reduce": reduce}
    want, totals = reference.scatter_tokens(src, index, rows, **options)
    terms, _ = reference.scatter_tokens(src.abs(), index, rows, **options)
    if packed:
        cu, cu_out = (torch.tensor([0, n, 2 * n], dtype=torch.int32) for n in (entries, rows))
        given = (
            [src.flatten(0, 1)],
            weights,
            [],
            index,
            [1],
            2 * rows,
            ("copy", "add", "mean").index(reduce),
            cu,
            cu_out,
        )
    else:
        given = [src], weights, [], index, [1], rows, ("copy", "add", "mean").index(reduce)
    results = [OPS.scatter_tokens(*given) for _ in range(3)]
    (got,), got_totals = results[0]
    if reduce == "copy":
        assert torch.equal(got.view(want.shape).double(), want)
    else:
        assert_rounded(got.view(want.shape), want, terms * (entries / 200 if concentrated else 1))
    torch.testing.assert_close(got_totals.view(totals.shape).double(), totals, rtol=1e-6, atol=0)
    for (other,), other_totals in results[1:]:
        assert torch.equal(got, other) and torch.equal(got_totals, other_totals), "the same bits in every run"


def test_gather_backward_adds_in_order_of_the_index():
    x, index = random(1, 4000, 24, dtype=torch.bfloat16).requires_grad_(), random_index(1, 9000, tokens=4000)
    grad = random(1, 9000, 24, dtype=torch.bfloat16)
    got = [torch.autograd.grad(sparsekit.gather_tokens(x, index), x, grad)[0] for _ in range(2)]
    assert torch.equal(*got)
    want, _ = reference.scatter_tokens(grad, index, 4000, reduce="add")
    terms, _ = reference.scatter_tokens(grad.abs(), index, 4000, reduce="add")
    assert_rounded(got[0], want, terms)


def test_more_tensors_than_one_launch_takes():
    tensors = [random(2, 9, 1 + i % 5, dtype=FLOATS[i % 3]) for i in range(30)] + [torch.arange(18).view(2, 9)]
    index = random_index(2, 7, tokens=9)
    for got, x in zip(sparsekit.gather_tokens(tensors, index), tensors, strict=True):
        assert torch.equal(got, sparsekit.gather_tokens(x, index))
    weights = torch.rand(2, 9)
    floats, to = tensors[:30], random_index(2, 9, tokens=4)
    merged, totals = OPS.scatter_tokens(floats, weights, [], to, [1] * 30, 4, 2)
    grads = [random(*out.shape, dtype=out.dtype) for out in merged]
    back, weight_grad = OPS.scatter_tokens_backward(
        grads, None, floats, weights, merged, totals, to, [1] * 30, 9, 2, weights_grad=True
    )
    alone = 0
    for x, out, grad, got in zip(floats, merged, grads, back, strict=True):
        assert torch.equal(out, sparsekit.scatter_tokens(x, to, 4, reduce="mean", weights=weights))
        one, part = OPS.scatter_tokens_backward(
            [grad], None, [x], weights, [out], totals, to, [1], 9, 2, weights_grad=True
        )
        assert torch.equal(one[0], got)
        alone = alone + part
    torch.testing.assert_close(weight_grad, alone)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("samples, tokens, dim", [(40, 576, 24), (1, 1500, 72), (1, 2600, 8), (3, 640, 200)])
def test_match_on_every_tile(dtype, samples, tokens, dim):
    metric = random(samples, tokens, dim, dtype=dtype)
    for protect in (0, 7):
        match = sparsekit.bipartite_match(metric, tokens // 4, protect=protect)
        first = [x[:2] for x in match[:4]]
        check_match(sparsekit.TokenMatch(*first), metric[:2], [tokens // 4] * min(2, samples), protect)
        again = sparsekit.bipartite_match(metric, tokens // 4, protect=protect)
        assert all(map(torch.equal, match[:4], again[:4]))


def test_one_bad_row_changes_no_other_sample():
    metric = random(6, 150, 64, dtype=torch.bfloat16)
    want = sparsekit.bipartite_match(metric, 40)
    metric[2, 17], metric[4, 6] = torch.nan, 1e30
    got = sparsekit.bipartite_match(metric, 40)
    for b in (0, 1, 3, 5):
        assert all(torch.equal(x[b], y[b]) for x, y in zip(got[:4], want[:4], strict=True))


@pytest.mark.slow
def test_more_than_2_31_rows():
    if CUDA[0].device == "cpu" or torch.cuda.mem_get_info()[0] < 40 << 30:
        pytest.skip("needs 40 GB of a GPU")
    count = 2**31 + 77
    x = torch.arange(8, dtype=torch.uint8)[None]
    index = (torch.arange(count, dtype=torch.int32) & 7)[None]  # wraps, as do the low bits
    got = sparsekit.gather_tokens(x, index)[0]
    for begin in (0, 2**31 - 50, count - 100):
        assert torch.equal(got[begin : begin + 100].int(), index[0, begin : begin + 100])


# ---- CUDA graphs


def layer(x, positions, index, sizes):
    """Gather, match, merge, back, with gradients of everything."""
    kept, position = sparsekit.gather_tokens([x, positions], index)
    match = sparsekit.bipartite_match(kept, 20, protect=1)
    merged, sizes = sparsekit.merge_tokens(kept, match, sizes)
    back = sparsekit.unmerge_tokens(merged * sizes[..., None], match)
    out = sparsekit.scatter_tokens(back, index, x.shape[1], reduce="add", base=x)
    packed = sparsekit.pack_tokens(out, index.amax(1))
    return out, position, packed.tensors, *torch.autograd.grad(out.square().sum(), x)


@pytest.mark.parametrize("tokens, kept", [(200, 120), (5000, 3000)])
def test_graph_replay(tokens, kept):
    """Captured once, replayed on new inputs: the results of eager calls, bit for bit."""
    if CUDA[0].device == "cpu":
        pytest.skip("no GPU")

    def inputs():
        index = torch.stack([torch.randperm(tokens)[:kept].sort().values for _ in range(2)])
        return random(2, tokens, 64), torch.arange(tokens).expand(2, -1).clone(), index, torch.rand(2, kept) + 0.5

    static = inputs()
    static[0].requires_grad_()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            layer(*static)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = layer(*static)
    for _ in range(3):
        new = inputs()
        with torch.no_grad():
            for old, value in zip(static, new, strict=True):
                old.copy_(value)
        graph.replay()
        want = layer(new[0].requires_grad_(), *new[1:])
        for got, expected in zip(captured, want, strict=True):
            assert torch.equal(got, expected)


def test_graph_of_a_cache():
    if CUDA[0].device == "cpu":
        pytest.skip("no GPU")
    cache, keep = torch.zeros(2, 4, 64, 32), torch.zeros(2, 20, dtype=torch.int64)
    lengths = torch.zeros(2, dtype=torch.int32)
    call = functools.partial(sparsekit.compact_kv, [cache], keep, lengths=lengths)
    call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    for _ in range(3):
        new, rows = random(2, 4, 64, 32), torch.stack([torch.randperm(64)[:20].sort().values for _ in range(2)])
        cache.copy_(new)
        keep.copy_(rows)
        lengths.fill_(64)
        graph.replay()
        assert torch.equal(cache[:, :, :20], new.gather(2, rows[:, None, :, None].expand(-1, 4, -1, 32)))
        assert lengths.tolist() == [20, 20]
