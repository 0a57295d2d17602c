"""Quantized caches: the packed format bit by bit, its errors, what append, crop and compact keep, and decode attention."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import sparsekit
from sparsekit import KVCache, decode_attention, dequantize_kv, quantize_kv

OPS = torch.ops.sparsekit
BITS = [8, 4, 3, 2, "fp8"]
ISAS = [line.split(": ") for line in OPS.decode_plan_cpu(torch.bfloat16, 64, 64).splitlines()]
OFFERED = [name for name, reason in ISAS if "does not offer" not in reason]


@pytest.fixture(params=OFFERED)
def isa(request) -> str:
    with sparsekit.isa(request.param):
        plan = dict(line.split(": ", 1) for line in OPS.decode_plan_cpu(torch.bfloat16, 64, 64).splitlines())
        assert next(name for name, reason in plan.items() if reason == "runs") == request.param
        yield request.param


def round_trip(x, dtype=torch.float32, **packing):
    codes, scales, minima = quantize_kv(x, **packing)
    return dequantize_kv(codes, scales, minima, length=x.shape[2], head_dim=x.shape[3], dtype=dtype, **packing), (
        codes,
        scales,
        minima,
    )


def spread(scales, x, axis, group_size):
    """Scales as [B, H, T, D]: of every element."""
    if axis == "channel":
        return scales.repeat_interleave(group_size, 2)[:, :, : x.shape[2]]
    per_token = scales.transpose(3, 4).flatten(2, 3)[:, :, : x.shape[2]]  # [B, H, T, groups]
    return per_token.repeat_interleave(group_size, 3)[..., : x.shape[3]]


# ---- the format


def codes_of(codes: torch.Tensor, length: int, dim: int, bits, layout: str) -> np.ndarray:
    """Codes [B, H, T, D] out of their blocks: the words of include/sparsekit/kv_cache.h, one by one."""
    width = 8 if bits == "fp8" else bits
    batch, heads, blocks, _ = codes.shape
    out = np.zeros((batch, heads, blocks * 32, dim), np.uint8)
    for b, h, n in np.ndindex(batch, heads, blocks):
        words = codes[b, h, n].numpy().view("<u4").astype(np.int64)
        planes = [(2, 0, words[: 2 * dim]), (1, 2, words[2 * dim :])] if width == 3 else [(width, 0, words)]
        block = out[b, h, n * 32 : (n + 1) * 32]
        for plane_bits, shift, plane in planes:
            columns = 32 if layout == "key" else dim
            for r, c in np.ndindex(len(plane) // columns, columns):
                for j in range(8 // plane_bits):
                    for i in range(4):
                        inner = r * (32 // plane_bits) + 4 * j + i
                        code = plane[r * columns + c] >> (8 * i + plane_bits * j) & (1 << plane_bits) - 1
                        block[(c, inner) if layout == "key" else (inner, c)] |= code << shift
    return out[:, :, :length]


@pytest.mark.parametrize("layout", ["key", "value"])
@pytest.mark.parametrize("bits", BITS)
def test_codes_stand_where_the_header_says(bits, layout):
    x = torch.randn(2, 1, 70, 64)
    codes, scales, minima = quantize_kv(x, bits=bits, group_size=32, layout=layout)
    assert codes.shape == (2, 1, 3, 4 * 64 * (8 if bits == "fp8" else bits)) and codes.dtype == torch.uint8
    assert scales.shape == (2, 1, 3, 2, 32) and scales.dtype == torch.float16
    found = torch.from_numpy(codes_of(codes, 70, 64, bits, layout))
    scale = spread(scales, x, "token", 32).float()
    if bits == "fp8":
        assert minima is None
        want = scale * found.view(torch.float8_e4m3fn).float()
    else:
        want = scale * found.float() + spread(minima, x, "token", 32).float()
    got = dequantize_kv(codes, scales, minima, length=70, head_dim=64, bits=bits, group_size=32, layout=layout)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("axis", ["token", "channel"])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [8, 4, 3, 2])
def test_codes_are_the_nearest(bits, symmetric, axis):
    """Against an independent float64 quantizer: the same scales and minima, and codes that no other code beats."""
    x = torch.randn(1, 2, 96, 64) * torch.rand(64) * 10
    got, (_, scales, minima) = round_trip(x, bits=bits, group_size=32, axis=axis, symmetric=symmetric)
    groups = x.unflatten(2, (3, 32)).movedim(3, -1) if axis == "channel" else x.unflatten(3, (2, 32))
    if symmetric:
        want_scale = groups.abs().amax(-1) / (2 ** (bits - 1) - 1)
        assert minima is None
    else:
        want_scale = (groups.amax(-1) - groups.amin(-1)) / (2**bits - 1)
        want_minimum = groups.amin(-1)
    if axis == "token":
        scales, minima = (s if s is None else s.transpose(3, 4).flatten(2, 3) for s in (scales, minima))
    torch.testing.assert_close(scales, want_scale.half(), rtol=2e-3, atol=1e-7)
    if not symmetric:
        assert torch.equal(minima, want_minimum.half())
    levels = torch.arange(2**bits) - (2 ** (bits - 1) if symmetric else 0)
    levels = levels[1:] if symmetric else levels  # -2^(b-1) is not used
    grid = scales[..., None].float() * levels + (0 if symmetric else minima[..., None].float())
    nearest = (groups[..., None] - grid[..., None, :]).abs().amin(-1)
    got = got.unflatten(2, (3, 32)).movedim(3, -1) if axis == "channel" else got.unflatten(3, (2, 32))
    assert ((got - groups).abs() <= nearest * (1 + 1e-4) + 1e-5).all()


# relative error on N(0, 1): asymmetric and symmetric, groups of 32, 64, 128 (closed form and simulation)
ASYMMETRIC = {8: (0.00461, 0.00528, 0.00587), 4: (0.0782, 0.0897, 0.0998), 3: (0.1678, 0.1924, 0.2140), 2: (0.3929, 0.4503, 0.5008)}  # fmt: skip
SYMMETRIC = {8: (0.00535, 0.00594, 0.00647), 4: (0.0970, 0.1077, 0.1174), 3: (0.2265, 0.2513, 0.2738), 2: (0.658, 0.718, 0.767)}  # fmt: skip


@pytest.mark.parametrize("axis", ["token", "channel"])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [8, 4, 3, 2])
def test_error_on_normal_numbers(bits, symmetric, axis):
    for group_size, want in zip((32, 64, 128), (SYMMETRIC if symmetric else ASYMMETRIC)[bits], strict=True):
        x = torch.randn(1, 8, 1024, 128)
        got, _ = round_trip(x, bits=bits, group_size=group_size, axis=axis, symmetric=symmetric)
        assert float((got - x).norm() / x.norm()) == pytest.approx(want, rel=0.03)


def test_error_of_fp8_on_normal_numbers():
    x = torch.randn(1, 8, 1024, 128)
    got, _ = round_trip(x, bits="fp8", group_size=128)
    assert float((got - x).norm() / x.norm()) == pytest.approx(0.0265, rel=0.04)


@st.composite
def tensors(draw):
    seed = draw(st.integers(0, 2**31 - 1))
    generator = torch.Generator().manual_seed(seed)
    shape = (draw(st.integers(1, 2)), draw(st.integers(1, 2)), draw(st.integers(1, 140)), 32 * draw(st.integers(1, 5)))
    x = torch.randn(shape, generator=generator) * 10.0 ** draw(st.integers(-8, 4))
    x = x + draw(st.sampled_from([0.0, 1.0, -300.0, 1e-7]))
    if draw(st.booleans()):
        x[..., ::7] *= 100
    if draw(st.booleans()):
        x[:, :, ::3] = draw(st.sampled_from([0.0, 1.5, -2e-8]))
    return x.clamp(-6e4, 6e4).to(draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16])))


@settings(max_examples=60)
@given(
    x=tensors(),
    bits=st.sampled_from(BITS),
    group_size=st.sampled_from([32, 64, 128]),
    axis=st.sampled_from(["token", "channel"]),
    symmetric=st.booleans(),
    layout=st.sampled_from(["key", "value"]),
)
def test_every_error_is_bounded(x, bits, group_size, axis, symmetric, layout):
    got, (_, scales, minima) = round_trip(
        x, bits=bits, group_size=group_size, axis=axis, symmetric=symmetric, layout=layout
    )
    assert got.isfinite().all()
    scale = spread(scales, x, axis, group_size).double()
    if bits == "fp8":  # 3 bits behind the leading one, or a unit of 2^-9
        bound = torch.maximum(x.double().abs() * 2**-4, scale * 2**-10) + 448 * scale * 2**-11 + 448 * 2**-25
    else:
        low = 0 if minima is None else spread(minima, x, axis, group_size).double().abs()
        bound = scale / 2 + (2**bits - 1) * (scale * 2**-11 + 2**-25) + low * 2**-11 + 2**-25
    assert ((got.double() - x.double()).abs() <= bound * (1 + 1e-5) + 1e-6 * x.double().abs()).all()


def test_layouts_hold_the_same_numbers():
    x = torch.randn(1, 2, 100, 96)
    for bits in BITS:
        for axis in ("token", "channel"):
            got = [round_trip(x, bits=bits, axis=axis, layout=layout)[0] for layout in ("key", "value")]
            assert torch.equal(*got)


@pytest.mark.parametrize("axis", ["token", "channel"])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", BITS)
def test_constant_groups_are_kept(bits, symmetric, axis):
    x = torch.randn(1, 1, 1, 64).half().float().expand(1, 1, 64, 64).contiguous()
    if axis == "token":
        x = x.transpose(2, 3).contiguous()
    got, _ = round_trip(x, bits=bits, axis=axis, symmetric=symmetric)
    torch.testing.assert_close(got, x, rtol=1e-3 if symmetric or bits == "fp8" else 0, atol=2e-5)
    assert torch.equal(
        round_trip(torch.zeros_like(x), bits=bits, axis=axis, symmetric=symmetric)[0], torch.zeros_like(x)
    )


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("axis", ["token", "channel"])
@pytest.mark.parametrize("bits", BITS)
def test_nan_and_infinity_take_their_group_and_no_other(bits, axis, bad):
    x = torch.randn(1, 1, 96, 64)
    x[0, 0, 40, 3] = bad
    got, _ = round_trip(x, bits=bits, axis=axis, group_size=32)
    lost = torch.zeros(96, 64, dtype=torch.bool)
    lost[(slice(32, 64), 3) if axis == "channel" else (40, slice(0, 32))] = True
    assert torch.equal(got[0, 0].isnan(), lost)


def test_large_numbers_saturate():
    x = torch.tensor([1e30, -1e30, 7.0, 65504.0]).repeat(1, 1, 32, 8)
    got, _ = round_trip(x, bits=8, group_size=32)
    assert got.isfinite().all() and got.max() >= 65000 and got.min() <= -65000


def test_any_number_of_tokens_and_dtype():
    for tokens in (0, 1, 31, 33, 65):
        for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
            x = torch.randn(2, 1, tokens, 32).to(dtype)
            got, (codes, *_) = round_trip(x, dtype, bits=8, group_size=32)
            assert got.dtype == dtype and codes.shape[2] == -(-tokens // 32)
            torch.testing.assert_close(got, x, rtol=2e-2, atol=2e-2)
    x = torch.randn(2, 60, 3, 32).transpose(1, 2)  # any strides
    assert torch.equal(round_trip(x)[0], round_trip(x.contiguous())[0])


@pytest.mark.parametrize("arguments, message", [
    ({"bits": 5}, "bits: found 5"), ({"group_size": 48}, "group_size is 48"), ({"axis": "row"}, "axis: found 'row'"),
    ({"layout": "x"}, "layout: found 'x'"),
])  # fmt: skip
def test_quantize_refuses(arguments, message):
    with pytest.raises((ValueError, RuntimeError), match=message):
        quantize_kv(torch.zeros(1, 1, 32, 32), **arguments)
    for dim, bits in ((40, 4), (48, 3), (528, 8)):
        with pytest.raises(RuntimeError, match=f"head_dim is {dim}"):
            quantize_kv(torch.zeros(1, 1, 32, dim), bits=bits)
    with pytest.raises(RuntimeError, match="x has 3 dimensions"):
        quantize_kv(torch.zeros(1, 32, 32))


# ---- the cache against a model that quantizes whole units with quantize_kv


FORMATS = [
    {"bits": 4, "group_size": 64},
    {"bits": (8, 4), "group_size": 32, "key_axis": "token"},
    {"bits": 2, "group_size": 32, "window": 64},
    {"bits": (3, 2), "group_size": 128, "window": 0},
    {"bits": 8, "group_size": 128, "symmetric": True, "key_axis": "token", "window": 0, "sinks": 4},
    {"bits": "fp8", "group_size": 64, "sinks": 5},
    {"bits": ("fp8", 3), "group_size": 32, "page_size": 32, "window": 32},
    {"bits": 4, "group_size": 32, "rotate": True, "separable_values": True},
]


def id_of(options) -> str:
    return ",".join(f"{k}={v}" for k, v in options.items()).replace(" ", "")


def new_cache(batch=2, heads=2, dim=64, dtype=torch.float32, **options) -> KVCache:
    return KVCache(batch, heads, dim, dtype=dtype, **options)


def tokens_of(cache: KVCache, count: int, scale=1.0):
    shape = (cache.batch_size, cache.num_heads, count)
    return (scale * torch.randn(*shape, dim).to(cache.dtype) for dim in (cache.head_dim, cache.value_dim))


def expected(cache: KVCache, x: torch.Tensor, kind: str) -> torch.Tensor:
    """What a cache keeps of x [B, H, T, D], appended at once: sinks, quantized units, at least `window` recent tokens."""
    tokens, unit = x.shape[2], cache.unit
    sinks = min(cache.sinks, tokens)
    rest = tokens - sinks
    quantized = 0 if rest < cache.window + unit else (rest - cache.window) // unit * unit
    axis = cache.key_axis if kind == "key" else "token"
    bits = cache.key_bits if kind == "key" else cache.value_bits
    middle, _ = round_trip(
        x[:, :, sinks : sinks + quantized].contiguous(),
        bits=bits,
        group_size=cache.group_size,
        axis=axis,
        symmetric=cache.symmetric,
    )
    return torch.cat([x[:, :, :sinks], middle, x[:, :, sinks + quantized :]], 2)


@pytest.mark.parametrize("options", FORMATS[:-1], ids=id_of)
def test_append_keeps_what_it_should(options):
    for total in (1, 31, 127, 128, 191, 192, 300, 517):
        cache = new_cache(**options)
        key, value = tokens_of(cache, total)
        first = int(torch.randint(0, total + 1, ()))
        cache.append(key[:, :, :first], value[:, :, :first])
        for t in range(first, min(total, first + 40)):
            cache.append(key[:, :, t : t + 1], value[:, :, t : t + 1])
        cache.append(key[:, :, first + 40 :], value[:, :, first + 40 :])
        assert cache.max_length == total and (cache.seq_lengths() == total).all()
        for got, x, kind in zip(cache.dequantize(), (key, value), ("key", "value"), strict=True):
            torch.testing.assert_close(got, expected(cache, x, kind), rtol=1e-6, atol=1e-6)


def test_append_in_any_pieces_is_the_same_cache():
    for options in FORMATS[:3]:
        whole, pieces = new_cache(capacity=600, **options), new_cache(capacity=600, **options)
        key, value = tokens_of(whole, 600)
        whole.append(key, value)
        at = 0
        while at < 600:
            step = int(torch.randint(1, 150, ()))
            pieces.append(key[:, :, at : at + step], value[:, :, at : at + step])
            at += step
        for name, tensor in whole.state_dict().items():
            if isinstance(tensor, torch.Tensor) and "window" not in name:
                assert torch.equal(tensor, pieces.state_dict()[name]), name
        assert all(torch.equal(a, b) for a, b in zip(whole.dequantize(), pieces.dequantize(), strict=True))


def test_append_ragged_counts():
    cache = new_cache(batch=4, bits=8, group_size=32, window=32)
    key, value = tokens_of(cache, 200)
    counts = torch.tensor([200, 0, 77, -5], dtype=torch.int32)
    cache.append(key, value, counts)
    assert cache.seq_lengths()[:, 0].tolist() == [200, 0, 77, 0] and cache.max_length == 200
    got = cache.dequantize()[0]
    assert torch.equal(got[0], expected(cache, key, "key")[0])
    assert torch.equal(got[2, :, :77], expected(cache, key[:, :, :77], "key")[2]) and not got[1].any()
    with pytest.raises(RuntimeError, match=r"counts\[1\] is 3; supported: up to 2"):
        cache.append(*(x[:, :, :2] for x in (key, value)), torch.tensor([0, 3, 0, 0], dtype=torch.int32))


def test_rotation_and_separable_values_undo_themselves():
    cache = new_cache(bits=8, group_size=64, rotate=True, separable_values=True, window=0)
    key, value = tokens_of(cache, 256)
    value = value * torch.rand(64) * 30
    cache.append(key, value)
    got_key, got_value = cache.dequantize()
    assert float((got_key - key).norm() / key.norm()) < 8e-3
    assert float((got_value - value).norm() / value.norm()) < 8e-3
    outliers = key.clone()
    outliers[..., ::16] *= 20  # rotation spreads them over the group
    errors = []
    for rotate in (False, True):
        cache = new_cache(bits=4, group_size=64, key_axis="token", rotate=rotate, window=0)
        cache.append(outliers, value)
        errors.append(float((cache.dequantize()[0] - outliers).norm()))
    assert errors[1] < 0.8 * errors[0]


@pytest.mark.parametrize("options", FORMATS[:-1], ids=id_of)
def test_crop(options):
    for total, length in ((40, 17), (300, 250), (300, 97), (517, 130), (517, 3), (517, 0), (200, 200), (200, 400)):
        cache = new_cache(**options)
        key, value = tokens_of(cache, total)
        cache.append(key, value)
        before = cache.dequantize()
        cache.crop(length)
        kept = min(total, length)
        assert cache.max_length == kept and (cache.seq_lengths() == kept).all()
        for got, want in zip(cache.dequantize(), before, strict=True):  # float32: going back to the window is exact
            torch.testing.assert_close(got, want[:, :, :kept], rtol=1e-6, atol=1e-6)
        more = tuple(tokens_of(cache, 33))
        cache.append(*more)  # it goes on
        assert cache.max_length == kept + 33
        if kept:
            scale = 1e-6 if cache.max_length < cache.window + cache.unit else 3.0
            assert (cache.dequantize()[0][:, :, :kept] - before[0][:, :, :kept]).abs().max() <= scale


def test_crop_from_the_end_and_per_sequence():
    cache = new_cache(batch=3, bits=4)
    cache.append(*tokens_of(cache, 300))
    before = cache.dequantize()[0]
    cache.crop(-7)
    assert (cache.seq_lengths() == 293).all() and cache.max_length == 293
    cache.crop(torch.tensor([293, 64, 100]))
    assert cache.seq_lengths()[:, 1].tolist() == [293, 64, 100] and cache.sync_length() == 293
    assert torch.allclose(cache.dequantize()[0][2, :, :100], before[2, :, :100], atol=1e-6)
    cache.crop(-1000)
    assert cache.max_length == 0 and not cache.lengths.any()


@pytest.mark.parametrize("bits", [8, 4, 3, 2])
def test_requantizing_a_cut_group_adds_at_most_half_a_scale(bits):
    """In bfloat16, as documented: half the old scale, rounding to bfloat16, half the new scale."""
    cache = new_cache(bits=bits, group_size=64, window=0, dtype=torch.bfloat16)
    key, value = tokens_of(cache, 128)
    cache.append(key, value)
    once = cache.dequantize()[0].float()
    cache.crop(100)
    cache.append(*tokens_of(cache, 28))
    twice = cache.dequantize()[0].float()
    scales = cache.key_scales[:, :, 1].flatten(0, 0).float()[:, :, None]  # of tokens 64 to 127, now
    added = (twice[:, :, 64:100] - once[:, :, 64:100]).abs()
    assert (added <= scales / 2 * 1.01 + 2 * 2**-8 * once.abs().amax() + 2**bits * scales * 2**-11).all()
    assert torch.equal(twice[:, :, :64], once[:, :, :64])


@pytest.mark.parametrize("options", FORMATS[:-1], ids=id_of)
@pytest.mark.parametrize("per_head", [False, True])
def test_compact(options, per_head):
    for total in (50, 300, 517):
        cache = new_cache(**options)
        key, value = tokens_of(cache, total)
        cache.append(key, value)
        before = cache.dequantize()
        keep = torch.rand(2, 2 if per_head else 1, total) < torch.rand(2, 1, 1) + 0.1
        keep[0, 0, 64:256] = True  # whole units stay whole
        cache.compact(keep)
        lengths = keep.sum(-1).expand(2, 2)
        assert torch.equal(cache.seq_lengths().long(), lengths) and cache.max_length <= total
        after = cache.dequantize()
        for b, h in np.ndindex(2, 2):
            chosen = keep[b, h if per_head else 0]
            n = int(lengths[b, h])
            key_error = (after[0][b, h, :n] - before[0][b, h][chosen]).abs()
            if cache.key_axis == "token":  # quantized before: the same codes now
                assert (key_error[(before[0][b, h] != key[b, h]).any(-1)[chosen]] <= 1e-6).all()
            bits = 8 if cache.key_bits == "fp8" else cache.key_bits
            assert key_error.max() <= 9 / (2**bits - 1) if bits != 8 else key_error.max() <= 0.3
            value_error = (after[1][b, h, :n] - before[1][b, h][chosen]).abs()
            exact = ((before[1][b, h] != value[b, h]).any(-1))[chosen]  # quantized before: the same codes now
            assert (value_error[exact] <= 1e-6).all()
        cache.append(*tokens_of(cache, 65))
        assert torch.equal(cache.seq_lengths().long(), lengths + 65)


def test_compact_moves_whole_groups_exactly():
    cache = new_cache(bits=2, group_size=32, window=32)
    cache.append(*tokens_of(cache, 320))
    before = cache.dequantize()
    keep = torch.ones(2, 1, 320, dtype=torch.bool)
    keep[:, :, 32:96] = keep[:, :, 160:192] = False
    cache.compact(keep)
    for got, want in zip(cache.dequantize(), before, strict=True):
        assert torch.equal(got[:, :, :224], want[:, :, keep[0, 0]])


def test_compact_takes_indices_and_refuses_bad_ones():
    cache = new_cache(bits=4)
    cache.append(*tokens_of(cache, 40))
    state = {name: x.clone() for name, x in cache.state_dict().items() if isinstance(x, torch.Tensor)}
    for bad, message in (
        ([0, 5, 5], "is 5 after 5"), ([3, 2, 1], "is 2 after 3"), ([0, 40, -1], "is 40 after 0"),
        ([-1, 3, -1], "is 3 after"), ([-7, -1, -1], "is -7"),
    ):  # fmt: skip
        with pytest.raises(RuntimeError, match=rf"keep\[0, 0, \d\] {message}"):
            cache.compact(torch.tensor(bad).expand(2, 1, 3))
    assert all(torch.equal(state[name], cache.state_dict()[name]) for name in state)
    before = cache.dequantize()[1]
    cache.compact(torch.tensor([[[1, 2, 39, -1]], [[7, -1, -1, -1]]]))
    assert cache.seq_lengths()[:, 0].tolist() == [3, 1]
    assert torch.equal(cache.dequantize()[1][0, :, :3], before[0][:, [1, 2, 39]])


@pytest.mark.parametrize("options", [FORMATS[0], FORMATS[-1]], ids=id_of)
def test_reorder(options):
    cache = new_cache(batch=3, **options)
    cache.append(*tokens_of(cache, 300))
    before = cache.dequantize()
    cache.reorder(torch.tensor([2, 2, 0, 1]))
    assert cache.batch_size == 4
    for got, want in zip(cache.dequantize(), before, strict=True):
        assert torch.equal(got, want[[2, 2, 0, 1]])
    cache.append(*tokens_of(cache, 200))
    assert (cache.seq_lengths() == 500).all()
    empty = new_cache(batch=2)
    empty.reorder(torch.tensor([0, 1, 1]))
    empty.append(*tokens_of(empty, 3))


def test_cache_grows_and_says_when_it_cannot():
    cache = new_cache(bits=4, window=0)
    assert cache.capacity == 0
    for count in (1, 100, 400):
        cache.append(*tokens_of(cache, count))
    assert cache.capacity >= 501 and (cache.seq_lengths() == 501).all()
    table = torch.tensor([[[0, 1]], [[2, 3]]], dtype=torch.int32)
    paged = new_cache(bits=4, window=0, block_table=table, num_pages=4)
    paged.append(*tokens_of(paged, 200))
    state = {name: x.clone() for name, x in paged.state_dict().items() if isinstance(x, torch.Tensor)}
    with pytest.raises(RuntimeError, match="the cache is full: 257 tokens"):
        paged.append(*tokens_of(paged, 57))
    assert all(torch.equal(state[name], paged.state_dict()[name]) for name in state) and paged.max_length == 200
    with pytest.raises(RuntimeError, match="the cache is full: sequence 0, head 0 holds 200 tokens and gets 150 more"):
        key, value = tokens_of(paged, 150)
        OPS.kv_cache_append(*paged._arguments(), key, value)
    assert all(torch.equal(state[name], paged.state_dict()[name]) for name in state)


def test_pages_grow_with_the_capacity():
    """Pages are laid out anew where a cache grows; what it holds stays, and caches of other page sizes load it."""
    options = {"bits": (4, 3), "group_size": 32, "window": 32, "sinks": 2}
    whole, grown = new_cache(capacity=9000, **options), new_cache(**options)
    key, value = tokens_of(whole, 3000)
    whole.append(key, value)
    sizes = []
    for first, last in ((0, 700), (700, 2100), (2100, 3000)):
        grown.append(key[:, :, first:last], value[:, :, first:last])
        sizes.append(grown.page_size)
    assert sizes == sorted(sizes) and sizes[0] == 128 and sizes[2] == grown.page_size > 128 and whole.page_size == 2048
    assert 3000 <= grown.capacity <= 1.25 * 1.5 * 3000
    for got, want in zip(grown.dequantize(), whole.dequantize(), strict=True):
        assert torch.equal(got, want)
    query = torch.randn(2, 4, 1, 64)
    want = decode_attention(query, whole)
    assert torch.equal(decode_attention(query, grown), want)
    other = new_cache(**options)
    other.load_state_dict(grown.state_dict())
    assert other.page_size == grown.page_size and torch.equal(decode_attention(query, other), want)
    with pytest.raises(ValueError, match="this cache has"):
        new_cache(page_size=128, **options).load_state_dict(grown.state_dict())


@pytest.mark.parametrize("table_heads", [1, 2])
def test_paged_is_contiguous_with_pages_elsewhere(table_heads, isa):
    plain = new_cache(bits=4, group_size=32, sinks=3)
    table = torch.randperm(8 * table_heads + 3)[: 8 * table_heads].view(2, table_heads, 4).int()
    paged = new_cache(bits=4, group_size=32, sinks=3, block_table=table, num_pages=8 * table_heads + 3)
    key, value = tokens_of(plain, 450)
    query = torch.randn(2, 4, 2, 64)
    for cache in (plain, paged):
        cache.append(key, value)
    assert all(torch.equal(a, b) for a, b in zip(plain.dequantize(), paged.dequantize(), strict=True))
    assert torch.equal(decode_attention(query, plain), decode_attention(query, paged))
    keep = torch.rand(2, 2, 450) < 0.5
    for cache in (plain, paged):
        cache.compact(keep)
        cache.crop(140)
    assert torch.equal(decode_attention(query, plain), decode_attention(query, paged))


def test_state_dict_and_size():
    cache = new_cache(bits=4, group_size=64, window=32, dtype=torch.bfloat16, capacity=4096)
    cache.append(*tokens_of(cache, 4000))
    other = new_cache(bits=4, group_size=64, window=32, dtype=torch.bfloat16)
    other.load_state_dict({k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in cache.state_dict().items()})
    assert all(torch.equal(a, b) for a, b in zip(cache.dequantize(), other.dequantize(), strict=True))
    with pytest.raises(ValueError, match="state: found format"):
        new_cache(bits=3).load_state_dict(cache.state_dict())
    full = 2 * 2 * 4096 * 64 * 2 * 2
    assert cache.nbytes < full * (4 + 32 / 64 + 0.8) / 16  # codes, scale and minimum, and the window
    cache.reset()
    assert cache.max_length == 0 and not cache.seq_lengths().any()


# ---- decode attention


def reference(query, key, value, lengths, scale=None, softcap=0.0, sinks=None, key_bias=None):
    """float64; lengths [B, H]."""
    batch, heads, rows, dim = query.shape
    group = heads // key.shape[1]
    key, value = (x.double().repeat_interleave(group, 1) for x in (key, value))
    scores = query.double() @ key.transpose(2, 3) * (dim**-0.5 if scale is None else scale)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if key_bias is not None:
        scores = scores + F.pad(key_bias.double(), (0, scores.shape[3] - key_bias.shape[3]))
    place, row = torch.arange(key.shape[2]), torch.arange(rows)[:, None]
    limit = lengths.repeat_interleave(group, 1)[..., None, None] - rows + 1 + row
    scores = scores.masked_fill(place >= limit, -math.inf)
    lse = scores.logsumexp(-1)
    total = lse if sinks is None else torch.logaddexp(lse, sinks.double()[None, :, None])
    weights = torch.where(scores > -math.inf, (scores - total[..., None]).exp(), 0.0)
    return weights @ value.nan_to_num(0), lse, scores


def check_decode(query, cache_key, cache_value, lengths, got, **options):
    want, lse, scores = reference(query, cache_key, cache_value, lengths, **options)
    out, got_lse, got_scores = got
    assert out.dtype == query.dtype and out.shape == want.shape
    # A weight's error is its exponent's: that of a score, rounded in units of its own size.
    largest = scores[scores > -math.inf].abs().max() if (scores > -math.inf).any() else torch.tensor(1.0)
    eps = torch.finfo(query.dtype).eps
    tolerance = (2e-6 if query.dtype == torch.float32 else 2e-5 + eps / 2) * (1 + float(largest))
    magnitude = float(cache_value.double().abs().max()) + 1e-9 if cache_value.numel() else 1.0
    assert (out.double() - want).abs().max() <= tolerance * magnitude
    visible = scores > -math.inf
    assert torch.equal(got_lse == -math.inf, lse == -math.inf)
    finite = lse > -math.inf
    slack = (2e-6 if query.dtype == torch.float32 else 1e-4) * (4 + float(largest))  # 15-bit factors beside codes
    assert ((got_lse.double() - lse)[finite].abs() <= slack).all()
    got_scores = got_scores[..., : scores.shape[3]].double()
    assert torch.equal(got_scores > -math.inf, visible)
    assert ((got_scores - scores)[visible].abs() <= slack).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("options", FORMATS, ids=id_of)
def test_decode(isa, options, dtype):
    for batch, heads, group, dim, rows, tokens in (
        (2, 2, 3, 64, 2, 400),
        (1, 1, 1, 128, 1, 2500),
        (1, 2, 4, 96, 5, 210),
    ):
        cache = new_cache(batch, heads, dim, dtype, **options)
        key, value = tokens_of(cache, tokens)
        cache.append(key, value)
        query = torch.randn(batch, heads * group, rows, dim, dtype=dtype)
        stored = [cache._stored(name, dim) for name in ("key", "value")]  # rotated and scaled, as the kernel sees it
        arguments = (*cache._arguments(), None, 0.0, None, None, cache.max_length)
        got = OPS.decode_attention(query, *arguments)
        check_decode(query, *stored, cache.seq_lengths(), got)
        rotated = decode_attention(query, cache)
        assert rotated.shape == query.shape and rotated.isfinite().all()


def test_decode_with_every_option(isa):
    for tokens in (0, 1, 130, 300):
        cache = new_cache(2, 2, 64, torch.float32, bits=4, group_size=32, sinks=2)
        counts = torch.tensor([tokens, tokens // 2], dtype=torch.int32)
        cache.append(*tokens_of(cache, tokens, 2.0), counts)
        query = torch.randn(2, 6, 4, 64) * 3
        bias = torch.randn(2, 6, 1, max(tokens - 5, 0))
        bias[torch.rand(bias.shape) < 0.3] = -math.inf
        sinks = torch.randn(6)
        options = {"scale": 0.3, "softcap": 4.0, "sinks": sinks, "key_bias": bias}
        got = decode_attention(query, cache, return_lse=True, return_scores=True, **options)
        check_decode(query, *cache.dequantize(), cache.seq_lengths(), got, **options)
        alone = decode_attention(query, cache, **options)
        assert torch.equal(alone, got[0])


@pytest.mark.parametrize("layout", ["HND", "NHD"])
@pytest.mark.parametrize("paged", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_decode_over_plain_caches(isa, dtype, paged, layout):
    batch, heads, dim = 3, 2, 80
    lengths = torch.tensor([300, 0, 37], dtype=torch.int32)
    pages, page_size, table = (64, 16, torch.randperm(60).view(3, 20).int()) if paged else (3, 300, None)
    cache = torch.randn(2, pages, page_size, heads, dim, dtype=dtype)  # vLLM's, NHD
    cache[:, -1 if paged else 1, -1] = math.nan  # not in any sequence
    tokens = cache[:, table.long()].flatten(2, 3) if paged else cache
    key, value = tokens.transpose(2, 3)
    if layout == "HND":
        cache = cache.transpose(2, 3).contiguous()
    query = torch.randn(batch, 4, 3, dim, dtype=dtype)
    got = decode_attention(
        query,
        (cache[0], cache[1]),
        lengths=lengths,
        block_table=table,
        layout=layout,
        return_lse=True,
        return_scores=True,
    )
    check_decode(query, key.nan_to_num(0), value.nan_to_num(0), lengths[:, None].expand(3, 2).long(), got)


def test_decode_counts_every_key(isa):
    """Queries of zero weigh every key alike, and the value channel tells its token: one too many or too few shows."""
    for tokens in (1, 63, 64, 65, 128, 129, 1000, 2048, 2049, 5000):
        cache = new_cache(1, 1, 32, torch.float32, bits=8, group_size=32, window=32, sinks=1)
        key = torch.randn(1, 1, tokens, 32)
        value = torch.arange(tokens).float()[:, None] % 255 == torch.arange(32)  # 0 and 1: exact in 8 bits
        cache.append(key, value.float()[None, None])
        got = decode_attention(torch.zeros(1, 1, 1, 32), cache) * tokens
        torch.testing.assert_close(got[0, 0, 0], value.sum(0).float(), rtol=0, atol=tokens * 2e-6 + 1e-3)
        lse = decode_attention(torch.zeros(1, 1, 1, 32), cache, return_lse=True)[1]
        assert float(lse) == pytest.approx(math.log(tokens), abs=2e-6)


@pytest.mark.parametrize("bits", BITS)
def test_decode_is_bitwise_repeatable(bits, one_or_two_threads, isa):
    cache = new_cache(2, 2, 64, torch.bfloat16, bits=bits)
    cache.append(*tokens_of(cache, 5000))
    query = torch.randn(2, 4, 1, 64, dtype=torch.bfloat16)
    results = []
    for threads in (1, 2, 2):
        one_or_two_threads(threads)
        results.append(decode_attention(query, cache, return_lse=True, return_scores=True))
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


def test_a_large_score_does_not_overflow(isa):
    cache = new_cache(1, 1, 64, torch.float32, bits=8, group_size=64)
    key, value = tokens_of(cache, 700)
    key[0, 0, 333] *= 300
    cache.append(key, value)
    query = key[:, :, 333:334].contiguous()
    out = decode_attention(query, cache)
    torch.testing.assert_close(out[0, 0, 0], cache.dequantize()[1][0, 0, 333], rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("options", [FORMATS[0], FORMATS[1], FORMATS[4], FORMATS[5]], ids=id_of)
def test_nan_shows_where_it_is_seen_and_nowhere_else(isa, options):
    cache = new_cache(2, 2, 64, torch.bfloat16, **options)
    key, value = tokens_of(cache, 400)
    key[0, 0, 70, 5] = math.nan
    cache.append(key, value)
    query = torch.randn(2, 2, 1, 64, dtype=torch.bfloat16)
    out = decode_attention(query, cache)
    assert out[0, 0].isnan().all() and not out[0, 1].isnan().any() and not out[1].isnan().any()
    hidden = torch.zeros(1, 1, 1, 400)
    hidden[..., :192] = -math.inf  # its whole group
    assert not decode_attention(query, cache, key_bias=hidden).isnan().any()


def test_decode_refuses():
    cache = new_cache(bits=4)
    cache.append(*tokens_of(cache, 300))
    query = torch.randn(2, 2, 1, 64)
    for bad, message in (
        (torch.randn(2, 2, 17, 64), "query has 17 rows"), (torch.randn(2, 3, 1, 64), "query has 3 heads"),
        (torch.randn(2, 2, 1, 32), "query has size 32"), (torch.randn(3, 2, 1, 64), "query has size 3"),
        (torch.randn(2, 2, 64), "query has 3 dimensions"), (query.double(), "query: float64"),
    ):  # fmt: skip
        with pytest.raises(RuntimeError, match=message):
            decode_attention(bad, cache)
    with pytest.raises(RuntimeError, match="key_bias has size 3"):
        decode_attention(query, cache, key_bias=torch.zeros(1, 3, 1, 9))
    with pytest.raises(RuntimeError, match="sinks has size 5"):
        decode_attention(query, cache, sinks=torch.zeros(5))
    with pytest.raises(ValueError, match="lengths: found None"):
        decode_attention(query, (query, query))
    for index, bad, message in (
        (0, 9, "is 9 sinks"),
        (1, 33, "is 33 quantized"),
        (1, 6400, "is 6400"),
        (2, -1, "is -1 recent"),
    ):
        spoiled = cache.lengths.clone()
        spoiled[1, 0, index] = bad
        with pytest.raises(RuntimeError, match=rf"lengths\[1, 0, {index}\] {message}"):
            OPS.decode_attention(query, *cache._arguments()[:8], spoiled, None, cache.format)
    plain = torch.randn(4, 2, 16, 64)
    for lengths, table, message in (
        ([3, 33], [[0, 1], [2, 3]], r"lengths\[1\] is 33"), ([3, 32], [[0, 1], [2, -1]], r"block_table\[1, 1\] is -1"),
        ([3, 20], [[0, 1], [4, 3]], r"block_table\[1, 0\] is 4"),
    ):  # fmt: skip
        with pytest.raises(RuntimeError, match=message):
            table = torch.tensor(table, dtype=torch.int32)
            decode_attention(query, (plain, plain), lengths=torch.tensor(lengths, dtype=torch.int32), block_table=table)
    unused = torch.tensor([[0, -7], [1, 99]], dtype=torch.int32)  # entries past the length are not looked at
    decode_attention(query, (plain, plain), lengths=torch.tensor([16, 16], dtype=torch.int32), block_table=unused)
    table = torch.tensor([[[0, 1]], [[2, 7]]], dtype=torch.int32)
    paged = new_cache(bits=4, window=0, block_table=table, num_pages=4)
    with pytest.raises(RuntimeError, match="block_table of sequence 1: page 1 is 7"):
        paged.append(*tokens_of(paged, 200))
    assert not paged.lengths.any()


def test_zero_sizes():
    for batch, heads in ((0, 2), (2, 0)):
        cache = new_cache(batch, max(heads, 1), 32)
        cache.append(*tokens_of(cache, 40))
        assert decode_attention(torch.randn(batch, heads, 1, 32), cache).shape == (batch, heads, 1, 32)
    cache = new_cache(1, 1, 32)
    out, lse, scores = decode_attention(torch.randn(1, 2, 3, 32), cache, return_lse=True, return_scores=True)
    assert not out.any() and (lse == -math.inf).all() and scores.shape == (1, 2, 3, 0)
    cache.append(*tokens_of(cache, 0))
    assert cache.max_length == 0


# ---- what torch must know


def test_opcheck():
    x = torch.randn(1, 2, 70, 64)
    for value_layout in (False, True):
        torch.library.opcheck(OPS.quantize_kv.default, (x, 3, 32, True, False, value_layout))
        torch.library.opcheck(OPS.quantize_kv.default, (x, -8, 64, False, False, value_layout))
    codes, scales, minima = OPS.quantize_kv(x, 4, 64, True, False, False)
    packing = (70, 64, torch.bfloat16, 4, 64, True, False, False)
    torch.library.opcheck(OPS.dequantize_kv.default, (codes, scales, minima, *packing))
    cache = new_cache(1, 2, 64, bits=4, window=32, capacity=512)
    cache.append(*tokens_of(cache, 200))
    query = torch.randn(1, 4, 2, 64)
    torch.library.opcheck(OPS.decode_attention.default, (query, *cache._arguments()))
    torch.library.opcheck(OPS.decode_attention.default, (query, *cache._arguments(), 0.1, 2.0, None, None, 200))
    lengths = torch.tensor([50], dtype=torch.int32)
    torch.library.opcheck(OPS.decode_attention_plain.default, (query, x, x, lengths, None, False))
    tests = ("test_schema", "test_faketensor")
    arguments = [a.clone() if isinstance(a, torch.Tensor) else a for a in cache._arguments()]
    torch.library.opcheck(OPS.kv_cache_append.default, (*arguments, *tokens_of(cache, 9)), test_utils=tests)
    limits = torch.tensor([150], dtype=torch.int32)
    torch.library.opcheck(OPS.kv_cache_crop.default, (*arguments, limits), test_utils=tests)
    keep = torch.arange(0, 100, 3, dtype=torch.int32)[None, None]
    torch.library.opcheck(OPS.kv_cache_compact.default, (*arguments, keep), test_utils=tests)


def test_compiled_step_changes_the_cache():
    eager, compiled = (new_cache(1, 2, 64, bits=4, window=32, capacity=512) for _ in range(2))

    def step(key, value, query, tensors, table, layout):
        OPS.kv_cache_append(*tensors, table, layout, key, value)
        return OPS.decode_attention(query, *tensors, table, layout)[0]

    torch._dynamo.reset()
    fast = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for count in (200, 1, 1, 70):
        key, value = tokens_of(eager, count)
        query = torch.randn(1, 4, 1, 64)
        results = []
        for cache, run in ((eager, step), (compiled, fast)):
            *tensors, table, layout = cache._arguments()
            results.append(run(key, value, query, tensors, table, layout))
        assert torch.equal(*results) and torch.equal(eager.lengths, compiled.lengths)


def test_vmap_and_gradients():
    x = torch.randn(3, 1, 2, 40, 64)
    got = torch.func.vmap(lambda t: OPS.quantize_kv(t, 4, 64, False, False, False))(x)
    want = [OPS.quantize_kv(t, 4, 64, False, False, False) for t in x]
    assert all(torch.equal(g[i], w[j]) for j, g in enumerate(got) for i, w in enumerate(want))
    cache = new_cache(1, 2, 64)
    cache.append(*tokens_of(cache, 40))
    query = torch.randn(3, 1, 2, 1, 64)
    got = torch.func.vmap(lambda q: decode_attention(q, cache))(query)
    assert torch.equal(got, torch.stack([decode_attention(q, cache) for q in query]))
    out = decode_attention(query[0].requires_grad_(), cache)
    with pytest.raises(RuntimeError, match="decode_attention has no derivative"):
        out.sum().backward()
