"""The cache recipes: exact where they lose nothing, better than the plain cache where they should be."""

import torch
import torch.nn.functional as F

from sparsekit import KVCache, decode_attention
from sparsekit.recipes.gear import GearCache, low_rank
from sparsekit.recipes.kivi import kivi_cache
from sparsekit.recipes.zipcache import ZipCache, saliency

B, HQ, H, T, D = 2, 4, 2, 320, 64


def problem(rows=1):
    """Keys with outlier channels, and a query that looks at some tokens."""
    key, value = torch.randn(2, B, H, T + rows, D)
    key[..., :4] *= 8
    query = torch.randn(B, HQ, rows, D)
    return query, key, value


def exact(query, key, value):
    mask = torch.ones(query.shape[2], key.shape[2]).tril(key.shape[2] - query.shape[2]).bool()
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True)


def error(got, want) -> float:
    return float((got - want).norm() / want.norm())


def test_kivi_is_the_cache_with_the_papers_settings():
    cache = kivi_cache(B, H, D, dtype=torch.float32)
    assert (cache.key_bits, cache.group_size, cache.key_axis, cache.window) == (2, 32, "channel", 128)
    query, key, value = problem()
    cache.append(key, value)
    per_token = KVCache(B, H, D, bits=2, group_size=32, key_axis="token", dtype=torch.float32)
    per_token.append(key, value)
    want = exact(query, key, value)
    assert error(decode_attention(query, cache), want) < error(decode_attention(query, per_token), want)


def test_saliency_is_attention_per_row_that_sees_a_token():
    query, key, _ = torch.randn(3, B, H, 50, D)
    query = query.repeat_interleave(2, 1)
    probes = torch.tensor([3, 40, 49])
    got = saliency(query, key, probes)
    scores = query[:, :, probes] @ key.repeat_interleave(2, 1).transpose(2, 3) / D**0.5
    seen = torch.arange(50) <= probes[:, None]
    weights = scores.masked_fill(~seen, -torch.inf).softmax(-1).unflatten(1, (H, 2)).sum((2, 3))
    torch.testing.assert_close(got, weights / (2 * seen.sum(0)).clamp(min=1))


def test_zipcache_in_full_precision_is_attention():
    for rows in (1, 3):
        query, key, value = problem(rows)
        cache = ZipCache(B, H, D, window=512, dtype=torch.float32, high=8, low=8, salient=1.0)
        cache.compress(key[:, :, :T], value[:, :, :T], torch.rand(B, H, T))
        cache.append(key[:, :, T:], value[:, :, T:])
        torch.testing.assert_close(cache.attend(query), exact(query, key, value), rtol=1e-4, atol=1e-5)


def test_zipcache_spends_its_bits_where_attention_looks():
    for rows in (1, 3):
        query, key, value = problem(rows)
        query = query * 2
        truth = exact(query, key, value)
        prompt = F.pad(query, (0, 0, T - rows, 0))  # its last rows ask what the next ones will
        scores = saliency(prompt, key[:, :, :T], torch.arange(T - rows, T))
        errors = []
        for order in (scores, -scores):
            cache = ZipCache(B, H, D, window=32, dtype=torch.float32, salient=0.3)
            cache.compress(key[:, :, :T], value[:, :, :T], order)
            cache.append(key[:, :, T:], value[:, :, T:])
            errors.append(error(cache.attend(query), truth))
        assert errors[0] < 0.8 * errors[1]


def test_low_rank_finds_what_is_there():
    left, right = torch.randn(B, H, 100, 3), torch.randn(B, H, D, 3)
    matrix = left @ right.transpose(2, 3)
    a, b = low_rank(matrix, 3)
    torch.testing.assert_close(a @ b.transpose(2, 3), matrix, rtol=1e-3, atol=1e-3)


def test_gear_gives_back_what_quantization_lost():
    for rows in (1, 3):
        query, key, value = problem(rows)
        truth = exact(query, key, value)
        options = dict(bits=2, group_size=64, window=0, dtype=torch.float32)
        plain = KVCache(B, H, D, **options)
        plain.append(key, value)
        full = GearCache(B, H, D, rank=D, outliers=0.0, **options)  # rank D: everything
        some = GearCache(B, H, D, rank=8, outliers=0.02, **options)
        for cache in (full, some):
            cache.compress(key[:, :, :T], value[:, :, :T])
            cache.append(key[:, :, T:], value[:, :, T:])
        assert error(full.attend(query), truth) < 1e-3
        assert error(some.attend(query), truth) < 0.8 * error(decode_attention(query, plain), truth)
