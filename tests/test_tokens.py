"""Tokens: every op on every instruction set against dense float64 (reference_tokens.py) or loops, and its bad inputs."""

import contextlib

import pytest
import torch

import sparsekit
from backends import BACKENDS, calls
from sparsekit import reference_tokens as reference

OPS = torch.ops.sparsekit
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
INTEGERS = (torch.int32, torch.int64)
SIZES = (1, 3, 16, 31, 64, 97, 256)  # of a row: tails of every vector width


@pytest.fixture(autouse=True)
def on_the_device(request):
    """New tensors of a test are on the device of its backend."""
    backend = request.node.callspec.params.get("backend") if hasattr(request.node, "callspec") else None
    with torch.device(backend.device) if backend else contextlib.nullcontext():
        yield


@pytest.fixture(
    params=[
        pytest.param(device, marks=[pytest.mark.cuda] if device == "cuda" else [])
        for device in dict.fromkeys(backend.device for backend in BACKENDS)
    ]
)
def device(request):
    """Every device that there is; new tensors of the test are on it."""
    with torch.device(request.param):
        yield request.param


@contextlib.contextmanager
def running(backend, dtype=torch.float32, match=False):
    """Calls inside run on this backend, or on a lower one that it names a reason for leaving them to."""
    with backend.forced():
        plan = OPS.tokens_plan_cuda if backend.name == "cuda" else OPS.tokens_plan_cpu
        plan = dict(line.split(": ", 1) for line in plan(dtype, match).split("\n"))
        first = next(name for name, answer in plan.items() if answer == "runs")
        if backend.name == "cuda":
            assert first.startswith("cuda")
        elif first != backend.name:
            assert len(plan[backend.name].split()) >= 3, plan
            pytest.skip(f"{backend.name}: {plan[backend.name]}")
        calls[backend.name] += 1
        yield


def random(*shape, dtype=torch.float32) -> torch.Tensor:
    if dtype == torch.bool:
        return torch.rand(shape) < 0.5
    if not dtype.is_floating_point:
        return torch.randint(-1000, 1000, shape).to(dtype)
    return (torch.randn(shape, dtype=torch.float64) * torch.exp(torch.randn(shape[:1] + (1,) * (len(shape) - 1)))).to(
        dtype
    )


def random_index(*shape, tokens: int, dtype=torch.int32) -> torch.Tensor:
    return torch.randint(-1, max(tokens, 0), shape).to(dtype)


def assert_rounded(got, ref, terms, dtype=None):
    """`got` is `ref` rounded to its dtype once, after sums in float32 of terms as large as `terms` (in sum)."""
    dtype = dtype or got.dtype
    assert got.shape == ref.shape, (got.shape, ref.shape)
    info, wide = torch.finfo(dtype), torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32)
    bound = 0.51 * info.eps * ref.abs() + 8 * wide.eps * terms + info.tiny * info.eps
    worst = ((got.double() - ref).abs() - bound).max() if got.numel() else torch.tensor(-1.0)
    assert worst <= 0, f"{worst:.3g} beyond the bound; largest error {(got.double() - ref).abs().max():.3g}"


# ---- gather


@pytest.mark.parametrize("dtype", [*FLOATS, *INTEGERS, torch.float64, torch.bool, torch.int8, torch.complex64])
def test_gather_is_exact(backend, dtype):
    with running(backend):
        for inner in SIZES:
            x = random(3, 11, inner, dtype=torch.float32).to(dtype)
            for index_dtype in INTEGERS:
                index = random_index(3, 17, tokens=11, dtype=index_dtype)
                got = sparsekit.gather_tokens(x, index)
                want = torch.stack([x[b][index[b].long()] for b in range(3)])
                want[index < 0] = 0
                assert torch.equal(got, want)


def test_gather_of_several_tensors(backend):
    """Hidden states, positions, keys by head, a mask with the tokens last: each as if gathered alone."""
    tensors = [random(2, 9, 24), torch.arange(18).view(2, 9), random(2, 3, 9, 8, dtype=torch.bfloat16)]
    tensors += [random(2, 3, 4, 9, dtype=torch.bool), random(2, 9, 2, 5, dtype=torch.float16)]
    dims = [1, 1, 2, 3, 1]
    index = random_index(2, 6, tokens=9)
    with running(backend):
        together = sparsekit.gather_tokens(tensors, index, dim=dims)
        for got, x, dim in zip(together, tensors, dims, strict=True):
            assert got.dtype == x.dtype and got.is_contiguous()
            assert torch.equal(got, sparsekit.gather_tokens(x, index, dim=dim))
            assert torch.equal(got.double(), reference.gather_tokens(x, index, dim))


@pytest.mark.parametrize("dim", [1, 2])
def test_gather_of_views(backend, dim):
    wide = random(4, 10, 12, 40)
    index = random_index(4, 5, tokens=7)
    with running(backend):
        for view in (wide[:, :7, :7], wide[:, 1:8, 2:9, 3:21], wide.transpose(1, 2)[:, :7, :7], wide[:, :7, :7, ::2]):
            assert torch.equal(
                sparsekit.gather_tokens(view, index, dim=dim),
                sparsekit.gather_tokens(view.contiguous(), index, dim=dim),
            )
        same = wide[:1, :7].expand(4, 7, 12, 40)
        assert torch.equal(sparsekit.gather_tokens(same, index), sparsekit.gather_tokens(same.contiguous(), index))


@pytest.mark.parametrize("inner", [128, 130, 2048])
def test_gather_beyond_the_caches(backend, inner):
    """Large results are written around the caches: rows that are whole lines of 64 bytes, and others."""
    rows = (18 << 20) // (4 * inner)
    x = torch.randn(1, 5000, inner)
    index = random_index(1, rows, tokens=5000)
    with running(backend):
        got = sparsekit.gather_tokens(x, index)
    want = x[0][index[0].long()]
    want[index[0] < 0] = 0
    assert torch.equal(got[0], want)


def test_gather_packed(backend):
    lengths = [4, 0, 7]
    cu = torch.tensor([0, 4, 4, 11], dtype=torch.int32)
    x, heads = random(13, 6), random(2, 13, 5)
    index = torch.stack([random_index(8, tokens=n) for n in lengths])
    with running(backend):
        got, got_heads = sparsekit.gather_tokens([x, heads], index, dim=[1, 2], cu_seqlens=cu)
        for b in range(3):
            for k in range(8):
                n = int(index[b, k])
                assert torch.equal(got[b, k], x[cu[b] + n] if n >= 0 else torch.zeros(6))
                assert torch.equal(got_heads[b, :, k], heads[:, cu[b] + n] if n >= 0 else torch.zeros(2, 5))


def test_gather_to_packed(backend):
    x = random(3, 9, 6)
    index, cu = random_index(3, 5, tokens=9), torch.tensor([0, 5, 5, 8], dtype=torch.int32)
    with running(backend):
        got = sparsekit.gather_tokens(x, index, cu_seqlens_out=cu, length=10)
        padded = sparsekit.gather_tokens(x, index)
    assert torch.equal(got, torch.cat([padded[0], padded[2, :3], torch.zeros(2, 6)]))


@pytest.mark.parametrize("shape", [(0, 5, 4), (2, 0, 4), (2, 5, 0)])
@pytest.mark.parametrize("count", [0, 3])
def test_gather_of_nothing(device, shape, count):
    index = torch.full((shape[0], count), -1)
    got = sparsekit.gather_tokens(torch.randn(shape), index)
    assert got.shape == (shape[0], count, shape[2]) and not got.any()


def test_no_unnamed_token_is_read(backend):
    x = torch.full((1, 6, 40), torch.nan)
    x[0, 2] = 1.0
    with running(backend):
        assert (sparsekit.gather_tokens(x, torch.tensor([[2, -1, 2]])) == torch.tensor([1.0, 0, 1])[:, None]).all()
        out = sparsekit.scatter_tokens(x, torch.tensor([[-1, -1, 1, -1, -1, -1]]), 3, reduce="add")
        assert (out[0] == torch.tensor([0.0, 1, 0])[:, None]).all()


# ---- scatter


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("reduce", ["copy", "add", "mean"])
@pytest.mark.parametrize("places", [None, 3])
def test_scatter(backend, dtype, reduce, places):
    with running(backend, dtype):
        for inner in SIZES:
            for weighted in (False, True) if reduce != "copy" else (False,):
                for based in (False, True):
                    shape = (3, 12) if places is None else (3, 12, places)
                    src, index = random(3, 12, inner, dtype=dtype), random_index(*shape, tokens=7)
                    weights = torch.rand(shape).where(torch.rand(shape) < 0.8, 0) if weighted else None
                    base = random(3, 7, inner, dtype=dtype) if based else None
                    got = sparsekit.scatter_tokens(src, index, 7, reduce=reduce, weights=weights, base=base)
                    want, _ = reference.scatter_tokens(src, index, 7, reduce=reduce, weights=weights, base=base)
                    terms, _ = reference.scatter_tokens(
                        src.abs(), index, 7, reduce=reduce, weights=weights, base=None if base is None else base.abs()
                    )
                    if reduce == "copy":
                        assert torch.equal(got.double(), want)
                    assert_rounded(got, want, terms)


@pytest.mark.parametrize("dtype", INTEGERS)
def test_scatter_of_integers(backend, dtype):
    top = torch.iinfo(dtype).max
    src = torch.tensor([[[top, 5], [1, -7], [3, 4]]], dtype=dtype)
    with backend.forced():
        got = sparsekit.scatter_tokens(src, torch.tensor([[1, 1, 0]]), 2, reduce="add")
        assert got.tolist() == [[[3, 4], [-top - 1, -2]]], "sums wrap as torch's do"
        assert sparsekit.scatter_tokens(src, torch.tensor([[1, 1, 0]]), 3).tolist() == [[[3, 4], [1, -7], [0, 0]]]


def test_scatter_of_heads_and_packed(backend):
    """[B, H, N, D] with dim=2, and packed sources and results, against the padded op sample by sample."""
    src, index, weights = random(3, 2, 8, 5), random_index(3, 8, tokens=6), torch.rand(3, 8)
    with running(backend):
        for reduce in ("copy", "add", "mean"):
            options = {} if reduce == "copy" else {"weights": weights}
            want = sparsekit.scatter_tokens(src, index, 6, reduce=reduce, dim=2, **options)
            for head in range(2):
                got = sparsekit.scatter_tokens(src[:, head], index, 6, reduce=reduce, **options)
                assert torch.equal(got, want[:, head])
            lengths, out_lengths = [5, 0, 8], [6, 1, 6]
            cu, cu_out = (torch.tensor([0, *x]).cumsum(0).int() for x in (lengths, out_lengths))
            limited = index.clone()
            limited[1] = -1
            limited[0, 5:] = 99  # beyond the packed sample: not read
            packed = torch.cat([src[b, :, :n] for b, n in enumerate(lengths)], 1)
            base = random(2, 15, 5)
            got = sparsekit.scatter_tokens(
                packed, limited, 15, reduce=reduce, dim=2, cu_seqlens=cu, cu_seqlens_out=cu_out, base=base, **options
            )
            for b, (n, out) in enumerate(zip(lengths, out_lengths, strict=True)):
                part = base[None, :, cu_out[b] : cu_out[b + 1]]
                part_options = {} if reduce == "copy" else {"weights": weights[b : b + 1, :n]}
                want = sparsekit.scatter_tokens(
                    src[b : b + 1, :, :n], limited[b : b + 1, :n], out, reduce=reduce, dim=2, base=part, **part_options
                )
                assert torch.equal(got[:, cu_out[b] : cu_out[b + 1]], want[0])
            assert torch.equal(got[:, 13:], base[:, 13:])


def test_weight_zero_counts_for_nothing(backend):
    src = torch.tensor([[[1.0], [torch.nan], [3.0], [torch.inf]]])
    index, weights = torch.tensor([[0, 0, 1, 2]]), torch.tensor([[2.0, 0.0, 1.0, 0.0]])
    with running(backend):
        for reduce, want in (("add", [2.0, 3, 0]), ("mean", [1.0, 3, 0])):
            assert sparsekit.scatter_tokens(src, index, 3, reduce=reduce, weights=weights).flatten().tolist() == want
        based = sparsekit.scatter_tokens(
            src, index, 3, reduce="mean", weights=weights, base=torch.tensor([[[7.0], [8.0], [9.0]]])
        )
        assert based.flatten().tolist() == [1.0, 3.0, 9.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_same_bits_for_any_number_of_threads(cpu_backend, dtype, one_or_two_threads):
    src, index = random(3, 500, 129, dtype=dtype), random_index(3, 500, tokens=60)
    weights, grad = torch.rand(3, 500), random(3, 60, 129, dtype=dtype)
    results = []
    for threads in (1, 2, 5):
        one_or_two_threads(threads)
        with running(cpu_backend, dtype):
            out, totals = OPS.scatter_tokens([src], weights, [], index, [1], 60, 2)
            backward = OPS.scatter_tokens_backward(
                [grad], totals, [src], weights, out, totals, index, [1], 500, 2, weights_grad=True
            )
            match = sparsekit.bipartite_match(src, 100)
            results.append([*out, totals, *backward[0], backward[1], *match[:4]])
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


# ---- padded and packed


@pytest.mark.parametrize("capacity", [None, 20, 9, 0])
def test_pack_and_unpack(backend, capacity):
    x, position = random(4, 8, 6), torch.arange(8).expand(4, 8)
    heads, keep = random(4, 2, 8, 3), torch.rand(4, 8) < 0.6
    keep[2] = False
    with running(backend):
        packed = sparsekit.pack_tokens([x, position, heads], keep, dim=[1, 1, 2], capacity=capacity)
        rows = [(b, n) for b in range(4) for n in range(8) if keep[b, n]]
        limit = 32 if capacity is None else capacity
        fit = rows[:limit]
        tensors, cu = packed.tensors, packed.cu_seqlens
        assert cu.dtype == torch.int32 and cu[-1] == len(fit) and tensors[0].shape == (limit, 6)
        for at, (b, n) in enumerate(fit):
            assert torch.equal(tensors[0][at], x[b, n]) and tensors[1][at] == n
            assert torch.equal(tensors[2][:, at], heads[b, :, n])
        assert not tensors[0][len(fit) :].any() and not tensors[2][:, len(fit) :].any()

        base = random(4, 8, 6)
        back = sparsekit.unpack_tokens(tensors[0], cu, 8, index=packed.index, base=base)
        front = sparsekit.unpack_tokens([tensors[0], tensors[2]], cu, 5, dim=[1, 2])
        for b in range(4):
            mine = [n for c, n in fit if c == b]
            for n in range(8):
                assert torch.equal(back[b, n], x[b, n] if n in mine else base[b, n])
            for j in range(5):
                assert torch.equal(front[0][b, j], x[b, mine[j]] if j < len(mine) else torch.zeros(6))
                assert torch.equal(front[1][b, :, j], heads[b, :, mine[j]] if j < len(mine) else torch.zeros(2, 3))


def test_pack_by_length(device):
    x = random(3, 5, 2)
    packed = sparsekit.pack_tokens(x, torch.tensor([2, 0, 9]))
    assert torch.equal(packed.tensors[:7], torch.cat([x[0, :2], x[2]]))
    assert packed.cu_seqlens.tolist() == [0, 2, 2, 7]
    for keep in (torch.ones(3), torch.ones(3, 4, dtype=torch.bool)):
        with pytest.raises(ValueError, match="keep: found"):
            sparsekit.pack_tokens(x, keep)


# ---- compaction of a cache


def kept_rows(samples, tokens, count):
    index = torch.stack([torch.randperm(tokens)[:count].sort().values for _ in range(samples)])
    for b in range(samples):
        index[b, int(torch.randint(0, count + 1, ())) :] = -1
    return index


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("layout", ["HND", "NHD"])
@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize("paged", [False, True])
def test_compact_kv(device, dtype, layout, per_head, paged):
    samples, heads, page, table_pages = 3, 2, 4, 5
    tokens = page * table_pages
    token_dim = 2 if layout == "HND" else 1
    contiguous = [random(samples, heads, tokens, d, dtype=dtype) for d in (6, 8)]  # HND; keys and values differ in D
    keep = kept_rows(samples * heads, tokens, 9).view(samples, heads, 9) if per_head else kept_rows(samples, tokens, 9)
    lengths = torch.full(keep.shape[:-1], tokens, dtype=torch.int32)
    want = [x.clone() for x in contiguous]
    for x, old in zip(want, contiguous, strict=True):
        for b in range(samples):
            for h in range(heads):
                for j, n in enumerate(keep[b, h] if per_head else keep[b]):
                    if n >= 0:
                        x[b, h, j] = old[b, h, n]
    table = torch.randperm(samples * table_pages + 2)[: samples * table_pages].view(samples, table_pages).int()

    def to_cache(x):
        if paged:
            pages = torch.full((samples * table_pages + 2, heads, page, x.shape[-1]), 7, dtype=dtype)
            pages[table.long()] = x.view(samples, heads, table_pages, page, -1).transpose(1, 2)
            x = pages
        return x if layout == "HND" else x.transpose(1, 2).contiguous()

    caches = [to_cache(x) for x in contiguous]
    sparsekit.compact_kv(caches, keep, block_table=table if paged else None, lengths=lengths, layout=layout)
    for cache, x in zip(caches, want, strict=True):
        assert torch.equal(cache, to_cache(x))
    assert torch.equal(lengths.long(), (keep >= 0).sum(-1))
    assert caches[0].shape[token_dim] == (page if paged else tokens)


def test_compact_kv_of_a_view(device):
    """In place means in place: a view with gaps between its rows, and what lies in the gaps stays."""
    storage = random(2, 3, 10, 16)
    want = storage.clone()
    want[:, :, :2, :8] = storage[:, :, [4, 9], :8]
    sparsekit.compact_kv([storage[..., :8]], torch.tensor([[4, 9], [4, 9]]))
    assert torch.equal(storage, want)


@pytest.mark.parametrize("keep, options, message", [
    ([[3, 3]], {}, r"keep_index\[0, 1\] is 3 after 3; supported: ascending"),
    ([[1, -1], [-1, 2]], {}, r"keep_index\[1, 1\] is 2 after -1"),
    ([[1, 8]], {}, r"keep_index\[0, 1\] is 8; supported: -1 \(end\) or a row in use, 0 to 7"),
    ([[1, 5]], {"lengths": torch.tensor([5], dtype=torch.int32)}, r"row in use, 0 to 4"),
    ([[1, -2]], {}, r"keep_index\[0, 1\] is -2"),
    ([[0, 1]], {"lengths": torch.tensor([9], dtype=torch.int32)}, r"lengths\[0\] is 9; supported: 0 to the cache's 8"),
    ([[0, 1]], {"layout": "DHN"}, "layout is 'DHN'"),
    ([[0, 1]], {"lengths": torch.tensor([8])}, "lengths: found another dtype"),
])  # fmt: skip
def test_compact_kv_refuses(keep, options, message):
    cache = random(len(keep), 2, 8, 4)
    before = cache.clone()
    with pytest.raises((RuntimeError, ValueError), match=message):
        sparsekit.compact_kv([cache], torch.tensor(keep), **options)
    assert torch.equal(cache, before), "nothing moved"


def test_compact_kv_refuses_pages():
    cache = random(3, 2, 4, 8)
    for table, message in (
        ([[0, 3]], r"block_table\[0, 1\] is 3; .* 0 to 2"),
        ([[-1, 0]], r"block_table\[0, 0\] is -1"),
    ):
        with pytest.raises(RuntimeError, match=message):
            sparsekit.compact_kv([cache], torch.tensor([[0, 5]]), block_table=torch.tensor(table, dtype=torch.int32))
    sparsekit.compact_kv([cache], torch.tensor([[0, 2]]), block_table=torch.tensor([[1, 99]], dtype=torch.int32))
    with pytest.raises(RuntimeError, match="last stride"):
        sparsekit.compact_kv([cache[..., ::2]], torch.tensor([[0], [0], [0]]))


# ---- bad indices


@pytest.mark.parametrize("dtype", INTEGERS)
@pytest.mark.parametrize("bad", [-2, 5, 2**31 - 1, -(2**31), 2**40])
def test_bad_index_names_the_first_entry(dtype, bad):
    if bad > torch.iinfo(dtype).max:
        pytest.skip("not an int32")
    x, index = random(2, 5, 3), torch.zeros(2, 4, dtype=dtype)
    index[1, 2] = index[1, 3] = bad
    message = rf"index\[1, 2\] is {bad}; supported: -1 \(none\) or a token from 0 to 4"
    with pytest.raises(RuntimeError, match=message):
        sparsekit.gather_tokens(x, index)
    with pytest.raises(RuntimeError, match=message):
        sparsekit.scatter_tokens(x[:, :4], index, 5)
    with pytest.raises(RuntimeError, match=r"index\[1, 2, 0\] is"):
        sparsekit.scatter_tokens(x[:, :4], index[..., None].expand(2, 4, 2), 5)


@pytest.mark.parametrize("call, message", [
    (lambda x: sparsekit.gather_tokens(x, torch.zeros(3, 2).long()), r"tensors\[0\] has batch size 2; supported: index's 3"),
    (lambda x: sparsekit.gather_tokens(x, torch.zeros(2, 2)), "index has the wrong dtype"),
    (lambda x: sparsekit.gather_tokens(x, torch.zeros(2).long()), "index has 1 dimensions"),
    (lambda x: sparsekit.gather_tokens(x, torch.zeros(2, 2).long(), dim=3), r"dim is 3 for tensors\[0\]"),
    (lambda x: sparsekit.gather_tokens(x, torch.zeros(2, 2).long(), dim=0), r"dim is 0 for tensors\[0\]"),
    (lambda x: sparsekit.gather_tokens([x, x[:, :4]], torch.zeros(2, 2).long()), r"tensors\[1\] has 4 tokens"),
    (lambda x: sparsekit.gather_tokens(x[0], torch.zeros(1, 2).long(), cu_seqlens=torch.tensor([0, 9]).int()), r"cu_seqlens\[1\] is 9"),
    (lambda x: sparsekit.gather_tokens(x[0], torch.zeros(2, 2).long(), cu_seqlens=torch.tensor([0, 3, 2]).int()), r"cu_seqlens\[2\] is 2"),
    (lambda x: sparsekit.gather_tokens(x[0], torch.zeros(1, 2).long(), cu_seqlens=torch.tensor([1, 3]).int()), r"cu_seqlens\[0\] is 1"),
    (lambda x: sparsekit.gather_tokens(x, torch.zeros(2, 2).long(), cu_seqlens_out=torch.tensor([0, 1, 2]).int()), "length: none"),
    (lambda x: sparsekit.gather_tokens(x, torch.zeros(2, 2).long(), cu_seqlens_out=torch.tensor([0, 3, 3]).int(), length=4), "at most the 2 of index"),
    (lambda x: sparsekit.scatter_tokens(x, torch.zeros(2, 5).long(), 3, reduce="max"), "reduce is 'max'"),
    (lambda x: sparsekit.scatter_tokens(x, torch.zeros(2, 5).long(), -1), "length is -1"),
    (lambda x: sparsekit.scatter_tokens(x, torch.zeros(2, 4).long(), 3), "tensors have 5 tokens; supported: index's 4"),
    (lambda x: sparsekit.scatter_tokens(x, torch.zeros(2, 5).long(), 3, weights=torch.ones(2, 5)), "weights: given with"),
    (lambda x: sparsekit.scatter_tokens(x, torch.zeros(2, 5).long(), 3, reduce="add", weights=torch.ones(2, 4)), "weights has size 4"),
    (lambda x: sparsekit.scatter_tokens(x, torch.zeros(2, 5).long(), 3, base=x), "base has 5 tokens; supported: length, 3"),
    (lambda x: sparsekit.scatter_tokens(x, torch.zeros(2, 5).long(), 5, base=x.half()), r"base\[0\] differs"),
    (lambda x: sparsekit.scatter_tokens(x.int(), torch.zeros(2, 5).long(), 3, reduce="mean"), "integers have no mean"),
    (lambda x: sparsekit.scatter_tokens(x > 0, torch.zeros(2, 5).long(), 3, reduce="add"), "cannot be summed"),
    (lambda x: sparsekit.bipartite_match(x, -1), "r is -1"),
    (lambda x: sparsekit.bipartite_match(x, torch.tensor([1, -3])), r"r\[1\] is -3"),
    (lambda x: sparsekit.bipartite_match(x, 1, protect=-1), "protect is -1"),
    (lambda x: sparsekit.bipartite_match(x, 1, counts=torch.tensor([5, 6]).int()), r"counts\[1\] is 6; supported: 0 to metric's 5"),
    (lambda x: sparsekit.bipartite_match(x.int(), 1), "metric has an unsupported dtype"),
    (lambda x: sparsekit.bipartite_match(x[0], 1), "metric has 2 dimensions"),
])  # fmt: skip
def test_bad_arguments(call, message):
    with pytest.raises((RuntimeError, ValueError), match=message):
        call(random(2, 5, 3))


# ---- merging


@pytest.mark.parametrize("dtype", FLOATS)
def test_merge_and_unmerge(backend, dtype):
    x, heads, sizes = random(2, 30, 20, dtype=dtype), random(2, 3, 30, 5, dtype=dtype), torch.rand(2, 30) + 0.5
    with running(backend, dtype):
        match = sparsekit.bipartite_match(x, 8, protect=1)
        (merged, merged_heads), new_sizes = sparsekit.merge_tokens([x, heads], match, sizes, dim=[1, 2])
        assert new_sizes.dtype == torch.float32
        for got, source, dim in ((merged, x, 1), (merged_heads, heads, 2)):
            want, totals = reference.scatter_tokens(source, match.row, 22, reduce="mean", weights=sizes, dim=dim)
            terms, _ = reference.scatter_tokens(source.abs(), match.row, 22, reduce="mean", weights=sizes, dim=dim)
            assert_rounded(got, want, terms)
            torch.testing.assert_close(new_sizes.double(), totals, rtol=1e-6, atol=0)
        alone = [j for j in range(22) if int((match.row[0] == j).sum()) == 1]
        assert torch.equal(merged[0, alone], x[0, match.kept[0].long()[alone]]), "a row of one token is that token"
        back = sparsekit.unmerge_tokens([merged, merged_heads], match, dim=[1, 2])
        for b in range(2):
            for n in range(30):
                assert torch.equal(back[0][b, n], merged[b, match.row[b, n]])
                assert torch.equal(back[1][b, :, n], merged_heads[b, :, match.row[b, n]])


def test_ragged_merge(backend):
    """Layer after layer with counts: what lies past a sample's count is zeros of size 0, and reaches nothing."""
    x, counts, sizes = random(3, 24, 16), None, None
    lengths = [24] * 3
    with running(backend):
        for r in (torch.tensor([0, 5, 30]), torch.tensor([4, 4, 4]), 2):
            match = sparsekit.bipartite_match(x, r, counts=counts)
            x, sizes = sparsekit.merge_tokens(x, match, sizes)
            counts = match.counts
            lengths = [n - min(int(k), n // 2) for n, k in zip(lengths, torch.as_tensor(r).expand(3), strict=True)]
            assert counts.tolist() == lengths
            past = torch.arange(24) >= counts[:, None]
            assert not x[past].any() and not sizes[past].any()
            assert sizes.sum(1).tolist() == [24.0] * 3
    bias = sparsekit.token_size_bias(sizes)
    assert bias.shape == (3, 1, 24) and torch.equal(bias[:, 0] == -torch.inf, past)


def test_many_to_many_merge(backend):
    x, row, weights = random(2, 12, 10), random_index(2, 12, 3, tokens=5), torch.rand(2, 12, 3)
    sizes = torch.rand(2, 12) + 1
    with running(backend):
        merged, new_sizes = sparsekit.merge_tokens(x, row, sizes, weights=weights, length=5)
    want, totals = reference.scatter_tokens(x, row, 5, reduce="mean", weights=weights * sizes[..., None])
    torch.testing.assert_close(merged.double(), want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(new_sizes.double(), totals, rtol=1e-6, atol=0)
    with pytest.raises(ValueError, match="length: none"):
        sparsekit.merge_tokens(x, row)


def test_merged_duplicates_attend_as_before():
    """Tokens that are equal in pairs, merged: attention with key_bias = log(size) is that over all of them."""
    x = torch.randn(1, 64, 32).repeat_interleave(2, 1)
    match = sparsekit.bipartite_match(x, 40)
    merged, sizes = sparsekit.merge_tokens(x, match)
    pattern = sparsekit.BlockPattern.from_bool(torch.ones(1, 1, 8, 6, dtype=torch.bool), 16, seq_lengths=(128, 88))
    out = sparsekit.block_sparse_attention(
        x[:, None], merged[:, None], merged[:, None], pattern, key_bias=sparsekit.token_size_bias(sizes)
    )
    want = torch.nn.functional.scaled_dot_product_attention(x[:, None], x[:, None], x[:, None])
    torch.testing.assert_close(out, want, rtol=1e-4, atol=1e-5)


def test_same_tokens_as_the_published_formula(device):
    """Token Merging's own steps in eager torch (its order of rows is another: compared as sets of rows)."""
    x, r = torch.randn(3, 50, 12), 14
    unit = x / x.norm(dim=-1, keepdim=True)
    best, target = (unit[:, ::2] @ unit[:, 1::2].transpose(1, 2)).max(-1)
    order = best.argsort(-1, descending=True)
    source, destination = x[:, ::2], x[:, 1::2].clone()
    chosen = order[:, :r]
    count = torch.ones(3, 25, 1)

    def expand(index):
        return index[..., None].expand(-1, -1, 12)

    destination.scatter_add_(1, expand(target.gather(1, chosen)), source.gather(1, expand(chosen)))
    count.scatter_add_(1, target.gather(1, chosen)[..., None], torch.ones(3, r, 1))
    want = torch.cat([source.gather(1, expand(order[:, r:])), destination / count], 1)
    got, _ = sparsekit.merge_tokens(x, sparsekit.bipartite_match(x, r))
    for a, b in zip(got, want, strict=True):
        distance = (a[:, None] - b[None]).norm(dim=-1)
        assert distance.min(1).values.max() < 1e-5 and distance.argmin(1).unique().numel() == 36
