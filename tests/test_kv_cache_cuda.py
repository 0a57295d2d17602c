"""Quantized caches on a GPU: bit by bit the CPU's codes, the same caches after the same calls, decode against float64, graphs."""

import math

import pytest
import torch

import sparsekit
from backends import BACKENDS
from sparsekit import KVCache, decode_attention, dequantize_kv, quantize_kv
from test_kv_cache import BITS, FORMATS, check_decode, id_of, new_cache, tokens_of

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(all(b.device != "cuda" for b in BACKENDS), reason="no GPU, or a build without CUDA"),
]
OPS = torch.ops.sparsekit
POOLS = ("key_codes", "key_scales", "key_minima", "value_codes", "value_scales", "value_minima")


def bits_of(x: torch.Tensor) -> torch.Tensor:
    """Raw bits, NaN as one of them."""
    if x.dtype.is_floating_point:
        x = torch.where(x.isnan(), torch.nan, x)
        return x.contiguous().view({2: torch.int16, 4: torch.int32}[x.element_size()])
    return x


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(bits_of(a.cpu()), bits_of(b.cpu()))


def nasty(shape, dtype) -> torch.Tensor:
    """Ranges from 1e-7 to 1e5, constant groups, zeros of both signs, ties, NaN, infinities, numbers beyond fp16."""
    x = torch.randn(shape) * 10.0 ** torch.randint(-7, 5, (*shape[:3], 1))
    x[..., ::5] *= 30
    x[:, :, 1::7] = torch.randint(-20, 20, x[:, :, 1::7].shape) / 2
    x[:, :, 2::9] = 1.5
    x[:, :, 3::11] = 0.0
    x[:, :, 3::22] *= -1
    if shape[2] > 40:
        x[0, 0, 7, 3], x[0, 0, 20, 5], x[0, 0, 39, 7], x[0, 0, 35, 1] = math.nan, math.inf, -math.inf, 3e38
    return x.to(dtype)


@pytest.mark.parametrize("layout", ["key", "value"])
@pytest.mark.parametrize("axis", ["token", "channel"])
@pytest.mark.parametrize("bits", BITS)
def test_codes_are_the_cpus(bits, axis, layout):
    for shape, group_size, symmetric, dtype in (
        ((2, 3, 200, 128), 64, False, torch.bfloat16),
        ((1, 2, 77, 96), 32, True, torch.float16),
        ((2, 1, 33, 64), 128, False, torch.float32),
        ((1, 1, 300, 160), 128, True, torch.float32),
        ((1, 2, 64, 32), 32, False, torch.bfloat16),
        ((1, 1, 1, 512), 64, False, torch.float16),
    ):
        x = nasty(shape, dtype)
        packing = {"bits": bits, "group_size": group_size, "axis": axis, "symmetric": symmetric, "layout": layout}
        want, got = quantize_kv(x, **packing), quantize_kv(x.cuda(), **packing)
        for name, a, b in zip(("codes", "scales", "minima"), want, got, strict=True):
            assert (a is None) == (b is None)
            assert a is None or same(a, b), (name, shape, packing)
        for out in (torch.float32, torch.bfloat16, torch.float16):
            options = {"length": shape[2], "head_dim": shape[3], "dtype": out, **packing}
            assert same(dequantize_kv(*want, **options), dequantize_kv(*got, **options)), (shape, options)
    strided = nasty((2, 90, 3, 64), torch.bfloat16).transpose(1, 2)
    assert same(quantize_kv(strided)[0], quantize_kv(strided.cuda())[0])


def assert_same_cache(cpu: KVCache, gpu: KVCache) -> None:
    assert torch.equal(cpu.lengths, gpu.lengths.cpu()) and cpu.max_length == gpu.max_length
    for name in POOLS:
        assert same(getattr(cpu, name), getattr(gpu, name)), name
    for a, b in zip(cpu.dequantize(), gpu.dequantize(), strict=True):
        assert same(a, b) if not cpu.rotate else torch.allclose(a, b.cpu(), atol=1e-2)


def twins(batch=2, heads=2, dim=64, dtype=torch.bfloat16, **options) -> tuple[KVCache, KVCache]:
    table = options.pop("block_table", None)
    return tuple(
        new_cache(batch, heads, dim, dtype, device=None if table is not None else device,
                  block_table=None if table is None else table.to(device), **options)
        for device in ("cpu", "cuda")
    )  # fmt: skip


def on_both(caches, call) -> None:
    for cache in caches:
        call(cache)


@pytest.mark.parametrize("options", FORMATS[:-1], ids=id_of)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_the_same_calls_make_the_same_cache(options, dtype):
    for dim, heads in ((64, 1), (160, 2)):
        same_calls(twins(dim=dim, dtype=dtype, capacity=700, **options), heads)


def same_calls(pair: tuple[KVCache, KVCache], keep_heads: int) -> None:
    cpu = pair[0]

    def append(count, counts=None):
        key, value = tokens_of(cpu, count)
        for cache in pair:
            device = cache.device
            cache.append(key.to(device), value.to(device), None if counts is None else counts.to(device))

    for count in (1, 3, 200, 1, 31, 1, 90):
        append(count)
        assert_same_cache(*pair)
    append(50, torch.tensor([50, -3], dtype=torch.int32))
    append(40, torch.tensor([0, 17], dtype=torch.int32))
    assert_same_cache(*pair)
    on_both(pair, lambda c: c.crop(270))
    assert_same_cache(*pair)
    on_both(pair, lambda c: c.crop(torch.tensor([230, 101])))
    append(70)
    assert_same_cache(*pair)
    keep = torch.rand(2, keep_heads, cpu.max_length) < 0.7
    keep[0, 0, 64:200] = True
    keep &= torch.arange(cpu.max_length) < cpu.seq_lengths()[:, :keep_heads, None]
    on_both(pair, lambda c: c.compact(keep.to(c.device)))
    assert_same_cache(*pair)
    append(150)
    assert_same_cache(*pair)
    on_both(pair, lambda c: c.reorder(torch.tensor([1, 0, 1])))
    append(1)
    assert_same_cache(*pair)


@pytest.mark.parametrize("table_heads", [1, 2])
def test_paged_caches_are_the_same(table_heads):
    table = torch.randperm(12 * table_heads + 3)[: 12 * table_heads].view(2, table_heads, 6).int()
    pair = twins(bits=4, group_size=32, sinks=3, page_size=64, block_table=table, num_pages=12 * table_heads + 3)
    for count in (300, 1, 60):
        key, value = tokens_of(pair[0], count)
        on_both(pair, lambda c, key=key, value=value: c.append(key.to(c.device), value.to(c.device)))
        assert torch.equal(pair[0].lengths, pair[1].lengths.cpu())
        for name in POOLS:
            assert same(getattr(pair[0], name), getattr(pair[1], name)), name
    query = torch.randn(2, 4, 2, 64, dtype=torch.bfloat16)
    close = decode_attention(query, pair[0]), decode_attention(query.cuda(), pair[1]).cpu()
    torch.testing.assert_close(*close, rtol=2e-2, atol=1e-2)
    keep = torch.rand(2, 2, 361) < 0.5
    on_both(pair, lambda c: c.compact(keep.to(c.device)))
    on_both(pair, lambda c: c.crop(140))
    close = decode_attention(query, pair[0]), decode_attention(query.cuda(), pair[1]).cpu()
    torch.testing.assert_close(*close, rtol=2e-2, atol=1e-2)


# ---- decode


def stored(cache: KVCache) -> list[torch.Tensor]:
    return [cache._stored(name, dim).cpu() for name, dim in (("key", cache.head_dim), ("value", cache.value_dim))]


SHAPES = ((2, 2, 4, 128, 1, 700), (2, 2, 3, 64, 2, 400), (1, 1, 1, 128, 1, 2500), (1, 2, 4, 96, 5, 210), (1, 2, 4, 128, 7, 330))  # fmt: skip
MORE = [
    {"bits": bits, "group_size": group_size, "key_axis": axis, "symmetric": symmetric, "window": 32}
    for bits in BITS
    for group_size, axis, symmetric in (
        (32, "channel", False), (64, "channel", False), (128, "channel", True), (32, "token", True), (64, "token", False), (128, "token", False),
    )
]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("options", FORMATS + MORE, ids=id_of)
def test_decode(options, dtype):
    for batch, heads, group, dim, rows, tokens in SHAPES[: 5 if dtype == torch.bfloat16 else 3]:
        cache = new_cache(batch, heads, dim, dtype, device="cuda", **options)
        key, value = tokens_of(cache, tokens)
        cache.append(key.cuda(), value.cuda())
        query = torch.randn(batch, heads * group, rows, dim, dtype=dtype)
        arguments = (*cache._arguments(), None, 0.0, None, None)
        got = OPS.decode_attention(query.cuda(), *arguments, cache.max_length)
        check_decode(query, *stored(cache), cache.seq_lengths().cpu(), [x.cpu() for x in got])
        plain = OPS.decode_attention(query.cuda(), *arguments, 0)  # the way without scores
        assert torch.equal(plain[1], got[1]) or torch.allclose(plain[1], got[1], atol=1e-4)
        check_decode(query, *stored(cache), cache.seq_lengths().cpu(), [plain[0].cpu(), plain[1].cpu(), got[2].cpu()])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_decode_with_every_option(dtype):
    for tokens in (0, 1, 130, 300, 1000):
        cache = new_cache(2, 2, 64, dtype, bits=4, group_size=64, sinks=2, device="cuda")
        counts = torch.tensor([tokens, tokens // 2], dtype=torch.int32)
        key, value = tokens_of(cache, tokens, 2.0)
        cache.append(key.cuda(), value.cuda(), counts.cuda())
        query = (torch.randn(2, 6, 4, 64) * 3).to(dtype)
        bias = torch.randn(2, 6, 1, max(tokens - 5, 0))
        bias[torch.rand(bias.shape) < 0.3] = -math.inf
        sinks = torch.randn(6)
        for scale in (0.3, -0.2):
            options = {"scale": scale, "softcap": 4.0, "sinks": sinks, "key_bias": bias}
            on_gpu = {k: v.cuda() if isinstance(v, torch.Tensor) else v for k, v in options.items()}
            got = decode_attention(query.cuda(), cache, return_lse=True, return_scores=True, **on_gpu)
            check_decode(query, *stored(cache), cache.seq_lengths().cpu(), [x.cpu() for x in got], **options)


@pytest.mark.parametrize("layout", ["HND", "NHD"])
@pytest.mark.parametrize("paged", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_decode_over_plain_caches(dtype, paged, layout):
    for dim in (80, 64, 128):
        lengths = torch.tensor([300, 0, 37], dtype=torch.int32)
        table = torch.randperm(60).view(3, 20).int() if paged else None
        pages, page_size = (64, 16) if paged else (3, 300)
        cache = torch.randn(2, pages, page_size, 2, dim, dtype=dtype)
        cache[:, -1 if paged else 1, -1] = math.nan  # not in any sequence
        tokens = cache[:, table.long()].flatten(2, 3) if paged else cache
        key, value = (x.nan_to_num(0) for x in tokens.transpose(2, 3))
        cache = (cache.transpose(2, 3).contiguous() if layout == "HND" else cache).cuda()
        query = torch.randn(3, 8, 3, dim, dtype=dtype)
        table_used = None if table is None else table.cuda()
        options = {"lengths": lengths.cuda(), "block_table": table_used, "layout": layout}
        got = decode_attention(query.cuda(), (cache[0], cache[1]), return_lse=True, return_scores=True, **options)
        check_decode(query, key, value, lengths[:, None].expand(3, 2).long(), [x.cpu() for x in got])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_decode_counts_every_key(dtype):
    for bits, group_size in ((8, 32), (4, 64), (2, 64), (3, 32)):
        for tokens in (1, 63, 64, 65, 128, 129, 255, 1000, 2049, 5000):
            cache = new_cache(1, 1, 64, dtype, bits=bits, group_size=group_size, window=32, sinks=1, device="cuda")
            value = (torch.arange(tokens)[:, None] % 255 == torch.arange(64)).to(dtype)  # 0 and 1: exact in any bits
            cache.append(torch.randn(1, 1, tokens, 64, dtype=dtype).cuda(), value[None, None].cuda())
            query = torch.zeros(1, 1, 1, 64, dtype=dtype, device="cuda")
            out, lse = decode_attention(query, cache, return_lse=True)
            want = value.float().sum(0) / tokens
            torch.testing.assert_close(out[0, 0, 0].float().cpu(), want, rtol=1e-2, atol=2e-6 + 3e-4 / tokens)
            assert float(lse) == pytest.approx(math.log(tokens), abs=2e-6)


@pytest.mark.parametrize("bits", BITS)
def test_decode_is_bitwise_repeatable(bits):
    cache = new_cache(3, 2, 128, torch.bfloat16, bits=bits, device="cuda", capacity=9000)
    key, value = tokens_of(cache, 5000)
    cache.append(key.cuda(), value.cuda())
    query = torch.randn(3, 8, 1, 128, dtype=torch.bfloat16, device="cuda")
    first = decode_attention(query, cache, return_lse=True, return_scores=True)
    for _ in range(20):
        again = decode_attention(query, cache, return_lse=True, return_scores=True)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_the_scale_of_values_and_queries_does_not_matter():
    """fp16 operands in kernels: what would leave fp16 is brought back by powers of two."""
    for bits in (8, 4, 2, "fp8"):
        for key_scale, value_scale, query_scale in (
            (1, 1e-4, 1),
            (1, 3e3, 1),
            (1e3, 1, 1e-3),
            (1e-3, 1, 1e3),
            (30, 1e4, 1e-30),
        ):
            cache = new_cache(1, 1, 128, torch.bfloat16, bits=bits, device="cuda", window=0)
            key, value = tokens_of(cache, 640)
            ramp = torch.linspace(0, 1, 640)[:, None] ** 4 + 1e-3  # the largest values come late
            key, value = key * key_scale, (value * ramp * value_scale).bfloat16()
            cache.append(key.cuda(), value.cuda())
            query = (torch.randn(1, 4, 1, 128) * query_scale).bfloat16()
            got = decode_attention(query.cuda(), cache, return_lse=True, return_scores=True)
            check_decode(query, *stored(cache), cache.seq_lengths().cpu(), [x.cpu() for x in got])


@pytest.mark.parametrize(
    "options", [FORMATS[0], FORMATS[1], FORMATS[4], FORMATS[5], {"bits": 4, "key_axis": "token"}], ids=id_of
)
def test_nan_shows_where_it_is_seen_and_nowhere_else(options):
    for spoiled in (0, 1):
        cache = new_cache(2, 2, 64, torch.bfloat16, device="cuda", **options)
        tensors = list(tokens_of(cache, 400))
        tensors[spoiled][0, 0, 70, 5] = math.nan
        cache.append(*(x.cuda() for x in tensors))
        query = torch.randn(2, 2, 1, 64, dtype=torch.bfloat16, device="cuda")
        out = decode_attention(query, cache)
        assert out[0, 0, :, 5].isnan().all() and not out[0, 1].isnan().any() and not out[1].isnan().any()
        hidden = torch.zeros(1, 1, 1, 400, device="cuda")
        hidden[..., :192] = -math.inf  # its whole group
        assert not decode_attention(query, cache, key_bias=hidden).isnan().any()
        if spoiled:  # one row hides it
            mixed = hidden.expand(1, 2, 1, 400).clone()
            mixed[:, 1] = 0
            query = query[:, :1].repeat(1, 4, 1, 1)
            out = decode_attention(query, cache, key_bias=mixed.repeat_interleave(2, 1))
            assert not out[0, 0].isnan().any()


def test_a_step_in_a_graph():
    """Append and decode, captured once, replayed through several flushes; the capacity is fixed."""
    eager, captured = (
        new_cache(4, 2, 128, torch.bfloat16, bits=4, group_size=64, window=64, capacity=1024, device="cuda")
        for _ in range(2)
    )
    prompt = [x.cuda() for x in tokens_of(eager, 150)]
    key, value = (torch.zeros(4, 2, 1, 128, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    query = torch.zeros(4, 8, 1, 128, dtype=torch.bfloat16, device="cuda")
    for cache in (eager, captured):
        cache.append(*prompt)
    state = captured.lengths.clone(), captured.key_window.clone(), captured.value_window.clone()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        captured.append(key, value)
        decode_attention(query, captured)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            captured.append(key, value)
            out = decode_attention(query, captured)
    torch.cuda.synchronize()
    for to, source in zip((captured.lengths, captured.key_window, captured.value_window), state, strict=True):
        to.copy_(source)
    for _ in range(140):
        for x in (key, value, query):
            x.copy_(torch.randn(x.shape).bfloat16())
        graph.replay()
        eager.append(key, value)
        assert torch.equal(decode_attention(query, eager), out)
    assert torch.equal(eager.lengths, captured.lengths) and int(eager.lengths[0, 0, 1]) >= 192
    with pytest.raises(RuntimeError, match="a CUDA graph is being captured"), torch.cuda.stream(stream):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            captured.append(*(torch.zeros(4, 2, 2000, 128, dtype=torch.bfloat16, device="cuda") for _ in range(2)))


def test_what_tensors_hold_is_never_trusted():
    """Lengths, tables, counts, limits and lists out of range: nothing outside the tensors is touched."""
    table = torch.tensor([[[0, 99, -5, 1]], [[2, 3, 4, 5]]], dtype=torch.int32, device="cuda")
    cache = new_cache(2, 2, 128, torch.bfloat16, bits=4, window=0, block_table=table, num_pages=8)
    key, value = (x.cuda() for x in tokens_of(cache, 300))
    cache.append(key, value)  # sequence 0 has bad pages: it stays as it was
    assert cache.lengths[0].sum() == 0 and (cache.seq_lengths()[1] == 300).all()
    query = torch.randn(2, 8, 1, 128, dtype=torch.bfloat16, device="cuda")
    good = decode_attention(query, cache)
    assert not good[0].any() and good[1].isfinite().all()
    cache.lengths[0] = torch.tensor([7, 256, 999], dtype=torch.int32)
    assert decode_attention(query, cache).isfinite().all()
    for bad in ([-5, -64, -9], [2**31 - 1] * 3, [0, 100, 3]):
        cache.lengths[0] = torch.tensor(bad, dtype=torch.int32)
        assert torch.equal(decode_attention(query, cache)[1], good[1])
        cache.crop(torch.tensor([10**9, 300]))
        cache.append(key[:, :, :1], value[:, :, :1], torch.tensor([2**31 - 1, 0], dtype=torch.int32, device="cuda"))
    keep = torch.randint(-(2**31), 2**31 - 1, (2, 2, 500))
    cache.compact(keep)
    cache.compact(torch.tensor([5, 3, 4, 7, -1, 9, 2**31 - 1, 8]).expand(2, 1, 8))
    cache.compact(torch.arange(600).repeat(3).expand(2, 2, 1800))
    plain = torch.randn(4, 2, 16, 64, dtype=torch.bfloat16, device="cuda")
    for lengths, pages in (([3, 33], [[0, 1], [2, 3]]), ([2**31 - 1, -4], [[0, 99], [-7, 1]])):
        lengths, pages = (torch.tensor(x, dtype=torch.int32, device="cuda") for x in (lengths, pages))
        out = decode_attention(
            torch.randn(2, 4, 2, 64, dtype=torch.bfloat16, device="cuda"),
            (plain, plain),
            lengths=lengths,
            block_table=pages,
        )
        assert out.isfinite().all()
    torch.cuda.synchronize()


def test_zero_sizes_and_refusals():
    for batch, heads in ((0, 2), (2, 0)):
        cache = new_cache(batch, max(heads, 1), 64, torch.bfloat16, device="cuda")
        cache.append(*(x.cuda() for x in tokens_of(cache, 40)))
        query = torch.randn(batch, heads, 1, 64, dtype=torch.bfloat16, device="cuda")
        assert decode_attention(query, cache).shape == (batch, heads, 1, 64)
    for dtype in (torch.bfloat16, torch.float32):
        cache = new_cache(1, 1, 64, dtype, device="cuda")
        out, lse = decode_attention(torch.randn(1, 2, 3, 64, dtype=dtype, device="cuda"), cache, return_lse=True)
        assert not out.any() and (lse == -math.inf).all()
    with pytest.raises(RuntimeError, match="x: float64; supported on CUDA"):
        quantize_kv(torch.zeros(1, 1, 32, 32, dtype=torch.float64, device="cuda"))
    with pytest.raises(RuntimeError, match="query has 17 rows"):
        decode_attention(torch.randn(1, 1, 17, 64, device="cuda"), cache)
    plan = OPS.decode_plan_cuda(torch.bfloat16, 128, 128)
    assert plan.splitlines()[0] == "sm80: runs", plan
    assert sparsekit.info(device="cuda") is not None


def test_compiled_and_checked():
    eager, compiled = (
        new_cache(1, 2, 64, torch.bfloat16, bits=4, window=32, capacity=512, device="cuda") for _ in range(2)
    )

    def step(key, value, query, tensors, table, layout):
        OPS.kv_cache_append(*tensors, table, layout, key, value)
        return OPS.decode_attention(query, *tensors, table, layout)[0]

    torch._dynamo.reset()
    fast = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for count in (200, 1, 1, 70):
        key, value = (x.cuda() for x in tokens_of(eager, count))
        query = torch.randn(1, 4, 1, 64, dtype=torch.bfloat16, device="cuda")
        results = []
        for cache, run in ((eager, step), (compiled, fast)):
            *tensors, table, layout = cache._arguments()
            results.append(run(key, value, query, tensors, table, layout))
        assert torch.equal(*results) and torch.equal(eager.lengths, compiled.lengths)
    x = torch.randn(1, 2, 70, 64, device="cuda")
    torch.library.opcheck(OPS.quantize_kv.default, (x, 3, 32, True, False, False))
    torch.library.opcheck(OPS.decode_attention.default, (query, *eager._arguments()))
