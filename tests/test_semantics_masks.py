"""docs/semantics.md, which key a row sees: one test per sentence, on every backend, with masks written out by hand."""

import math

import pytest
import torch

import sparsekit
from backends import Backend
from numerics import assert_lse_passes, assert_passes, dense_attention, dense_draws
from sparsekit import BlockPattern

BLOCK = (64, 64)
LEN_Q, LEN_K, DIM = 150, 210, 64
ALL = torch.ones(1, 1, 3, 4, dtype=torch.bool)


def qkv(heads=2, len_q=LEN_Q, len_k=LEN_K, dim=DIM, dtype=torch.float32, heads_kv=None, batch=1):
    shapes = [(heads, len_q)] + [(heads_kv or heads, len_k)] * 2
    return [torch.randn(batch, *shape, dim, dtype=dtype) for shape in shapes]


def raw(partial=None, full=None, block=BLOCK, lengths=(LEN_Q, LEN_K), **options) -> BlockPattern:
    """A pattern of lists as they are, from [[blocks of row 0], [blocks of row 1], ...] or such of each head."""

    def tensors(rows):
        if rows is None:
            return None, None
        heads = rows if rows and rows[0] and isinstance(rows[0][0], (list, tuple)) else [rows]
        capacity = max((len(row) for head in heads for row in head), default=0)
        counts = torch.tensor([[[len(row) for row in head] for head in heads]], dtype=torch.int32)
        padded = [[[*row] + [-1] * (capacity - len(row)) for row in head] for head in heads]
        return counts, torch.tensor([padded], dtype=torch.int32).reshape(*counts.shape, capacity)

    if partial is None:  # as many rows and heads, all empty
        partial = [[[] for _ in rows] if rows and isinstance(rows[0], list) else [] for rows in full]
    return BlockPattern(*tensors(partial), *tensors(full), block_size=block, seq_lengths=lengths, **options)


def check(backend: Backend, tensors, pattern, mask, terms=0.0, **options):
    """Attention under `pattern` is dense attention under `mask [.., Sq, Sk]`. Returns (out, lse)."""
    query, key, value = tensors
    mask = mask.expand(query.shape[0], query.shape[1], query.shape[2], key.shape[2])
    dense = {name: value for name, value in options.items() if "positions" not in name}
    ref, ref_lse = dense_attention(*(x.double() for x in tensors), mask, **dense)
    bases = dense_draws(*tensors, mask, **dense)
    with backend.running(query.dtype, query.shape[-1], value.shape[-1], pattern.block_size):

        def place(x):
            return x.to(backend.device) if isinstance(x, torch.Tensor) else x

        out, lse = sparsekit.block_sparse_attention(
            *map(place, tensors),
            pattern.to(backend.device),
            **{name: place(x) for name, x in options.items()},
            return_lse=True,
        )
        assert_passes("out", out, ref, [base for base, _ in bases], query.dtype, terms)
        assert_lse_passes(lse, ref_lse, bases[0][1], query.dtype)
    return out.cpu(), lse.cpu()


def block_mask(rows, block=BLOCK, lengths=(LEN_Q, LEN_K)):
    """bool [Sq, Sk] of block lists."""
    mask = torch.zeros(lengths, dtype=torch.bool)
    for m, row in enumerate(rows):
        for n in row:
            mask[m * block[0] : (m + 1) * block[0], n * block[1] : (n + 1) * block[1]] = True
    return mask


def ahead(len_q=LEN_Q, len_k=LEN_K):
    """[Sq, Sk]: how far a key stands after a row, bottom right aligned."""
    return torch.arange(len_k)[None] - (torch.arange(len_q)[:, None] + len_k - len_q)


# ---- rows that see no key


@pytest.mark.sanitizer
def test_a_row_that_sees_no_key(backend):
    """Three ways to see none: an empty list, only empty slots, keys that are all hidden by causality."""
    rows = [[0, 2], [], [-1, -1]]
    out, lse = check(backend, qkv(), raw(rows), block_mask([[0, 2], [], []]))
    assert (out[:, :, 64:] == 0).all() and (lse[:, :, 64:] == -math.inf).all()
    future = ahead(LEN_K, LEN_Q) <= 0  # more rows than keys: the first 60 stand before the first key
    out, lse = check(
        backend, qkv(len_q=LEN_K, len_k=LEN_Q), raw([[0, 1, 2]] * 4, lengths=(LEN_K, LEN_Q), causal=True), future
    )
    assert (out[:, :, :60] == 0).all() and (lse[:, :, :60] == -math.inf).all()


def test_a_row_whose_keys_are_all_biased_away(backend):
    bias = torch.zeros(1, 1, LEN_K)
    bias[..., :64] = -math.inf
    out, lse = check(backend, qkv(), raw([[0], [0, 1], [1]]), block_mask([[0], [0, 1], [1]]), key_bias=bias)
    assert (out[:, :, :64] == 0).all() and (lse[:, :, :64] == -math.inf).all()


@pytest.mark.parametrize("reason", ["list", "causal", "bias"])
def test_gradients_of_rows_that_see_no_key(backend, reason):
    tensors = [x.to(backend.device).requires_grad_() for x in qkv()]
    pattern = raw([[0, 2], [] if reason == "list" else [0], [1]], causal=reason == "causal")
    bias = torch.zeros(1, 1, LEN_K)
    if reason == "bias":
        bias[..., :64] = -math.inf
    positions = torch.arange(LEN_Q, dtype=torch.int32)[None]
    positions[:, 64:128] = -1
    options = dict(query_positions=positions.to(backend.device)) if reason == "causal" else {}
    with backend.running(torch.float32, DIM, block_size=BLOCK, backward=True):
        bias = bias.to(backend.device).requires_grad_()
        sinks = torch.randn(2, device=backend.device, requires_grad=True)
        out, lse = sparsekit.block_sparse_attention(
            *tensors, pattern.to(backend.device), key_bias=bias, sinks=sinks, return_lse=True, **options
        )
        inputs = (*tensors, bias, sinks)
        gradients = torch.autograd.grad([out, lse], inputs, [torch.randn_like(out), torch.randn_like(lse)])
        assert all(gradient.isfinite().all() for gradient in gradients)
        assert (out[:, :, 64:128] == 0).all() and (gradients[0][:, :, 64:128] == 0).all()


# ---- causality, window, positions


@pytest.mark.parametrize("lengths", [(150, 210), (210, 150), (128, 128), (1, 200), (65, 64)], ids=str)
def test_causal_is_bottom_right(backend, lengths):
    blocks = [list(range(-(-lengths[1] // 64)))] * -(-lengths[0] // 64)
    pattern = raw(blocks, lengths=lengths, causal=True)
    check(backend, qkv(len_q=lengths[0], len_k=lengths[1]), pattern, ahead(*lengths) <= 0)


@pytest.mark.parametrize("window", [(0, 0), (5, 0), (0, 7), (63, 64), (100, -1), (-1, 3), (-1, -1)], ids=str)
@pytest.mark.parametrize("causal", [False, True], ids=["", "causal"])
def test_window(backend, window, causal):
    """A row at p sees keys p - left to p + right; -1 is unlimited; both limits hold where causal is set too."""
    left, right = window
    mask = ((ahead() >= -left) | (left < 0)) & ((ahead() <= right) | (right < 0)) & ((ahead() <= 0) | (not causal))
    check(backend, qkv(), raw([[0, 1, 2, 3]] * 3, causal=causal, window=window), mask)


@pytest.mark.parametrize("which", ["query", "key", "both", "both-per-batch"])
def test_positions_replace_places(backend, which):
    """Causality and window compare positions, in any order, also negative, repeated and far ones."""
    batch = 2 if "batch" in which else 1
    at_q = torch.randint(-50, 300, (batch, LEN_Q), dtype=torch.int32)
    at_k = torch.randint(-50, 300, (batch, LEN_K), dtype=torch.int32)
    at_k[:, 0], at_q[:, 0] = 2**30, 2**30
    options = {}
    places = [torch.arange(LEN_Q)[None] + LEN_K - LEN_Q, torch.arange(LEN_K)[None]]
    if which != "key":
        options["query_positions"], places[0] = at_q, at_q.long()
    if which != "query":
        options["key_positions"], places[1] = at_k, at_k.long()
    distance = (places[1][:, None, :] - places[0][:, :, None])[:, None]
    pattern = raw([[0, 1, 2, 3]] * 3, causal=True, window=(120, -1))
    check(backend, qkv(batch=batch), pattern, (distance <= 0) & (distance >= -120), **options)


# ---- full and partial blocks


def test_full_blocks_skip_masks(backend):
    """Bits, causality, window and positions do not cut a full block; they cut the partial one beside it."""
    pattern = raw(partial=[[0], [1], [2]], full=[[3], [2, 3], [0]], causal=True, window=(70, 5))
    cut = (ahead() <= 0) & (ahead() >= -70)
    mask = (block_mask([[0], [1], [2]]) & cut) | block_mask([[3], [2, 3], [0]])
    check(backend, qkv(), pattern, mask)
    positions = torch.randint(0, 200, (1, LEN_Q), dtype=torch.int32)
    distance = torch.arange(LEN_K)[None] - positions[0].long()[:, None]
    mask = (block_mask([[0], [1], [2]]) & (distance <= 0) & (distance >= -70)) | block_mask([[3], [2, 3], [0]])
    check(backend, qkv(), pattern, mask, query_positions=positions)


def test_bias_and_tail_apply_to_full_blocks(backend):
    bias = torch.randn(1, 2, LEN_K)
    bias[:, 0, 200:] = -math.inf
    check(backend, qkv(), raw(full=[[0, 3], [3], [1, 3]]), block_mask([[0, 3], [3], [1, 3]]), key_bias=bias)


@pytest.mark.parametrize("block", [(64, 64), (128, 64), (16, 16), (32, 128)], ids=str)
def test_bits(backend, block):
    """Word w of row r of a mask covers keys 32w to 32w + 31 of the block; a slot without a mask (-1) is seen whole."""
    rows, columns = -(-LEN_Q // block[0]), -(-LEN_K // block[1])
    masks = torch.rand(3, *block) < 0.5
    shifts = torch.arange(-(-block[1] // 32) * 32) % 32
    padded = torch.nn.functional.pad(masks, (0, len(shifts) - block[1]))
    words = (padded.long() << shifts).unflatten(-1, (-1, 32)).sum(-1)
    words = torch.where(words >= 2**31, words - 2**32, words).int()
    index = torch.randint(-1, 3, (1, 1, rows, columns), dtype=torch.int32)
    every = BlockPattern.from_bool(torch.ones(rows, columns, dtype=torch.bool), block, seq_lengths=(LEN_Q, LEN_K))
    pattern = BlockPattern(
        every.kv_num_blocks, every.kv_indices, None, None, words, index, block_size=block, seq_lengths=(LEN_Q, LEN_K)
    )
    mask = torch.ones(rows * block[0], columns * block[1], dtype=torch.bool)
    for m, n in ((m, n) for m in range(rows) for n in range(columns)):
        if index[0, 0, m, n] >= 0:
            place = (slice(m * block[0], (m + 1) * block[0]), slice(n * block[1], (n + 1) * block[1]))
            mask[place] = masks[index[0, 0, m, n]]
    check(backend, qkv(), pattern, mask[:LEN_Q, :LEN_K])


# ---- scores


def test_order_of_the_score(backend):
    """score = softcap(scale * q.k) + key_bias: the bias is not capped, and the sink neither; lse is without the sink."""
    bias, sinks = torch.randn(1, 1, LEN_K) * 20, torch.tensor([8.0, -3.0])
    rows = [[0, 1, 3], [2], [1, 2]]
    out, lse = check(backend, qkv(), raw(rows), block_mask(rows), scale=0.9, softcap=2.0, key_bias=bias, sinks=sinks)
    _, without = check(backend, qkv(), raw(rows), block_mask(rows), scale=0.9, softcap=2.0, key_bias=bias)
    assert torch.equal(lse.isfinite(), without.isfinite())


def test_sinks_leave_lse_alone(backend):
    tensors, rows = qkv(), [[0, 1, 3], [2], []]
    _, lse = check(backend, tensors, raw(rows), block_mask(rows))
    for sink in (-1e30, 0.0, 12.0):
        out, with_sink = check(backend, tensors, raw(rows), block_mask(rows), sinks=torch.full((2,), sink))
        assert torch.equal(lse, with_sink)
        assert out.isfinite().all() and (out[:, :, 128:] == 0).all()


@pytest.mark.parametrize("shape", [(1, 1), (2, 1), (1, 4), (2, 4)], ids=str)
def test_key_bias_shapes(backend, shape):
    bias = torch.randn(*shape, LEN_K)
    bias[..., 100:130] = -math.inf
    rows = [[0, 1, 3], [2], [1, 2]]
    check(backend, qkv(heads=4, heads_kv=2, batch=2), raw(rows), block_mask(rows), key_bias=bias)


# ---- which list belongs to which head


@pytest.mark.parametrize("heads", [1, 2, 4], ids=["shared", "key-heads", "query-heads"])
def test_lists_of_heads(backend, heads):
    """Lists of a key head belong to all query heads of its group, which stand beside each other."""
    lists = [[[h % 4], [(h + 1) % 4, (h + 2) % 4], []] for h in range(heads)]
    mask = torch.stack([block_mask(lists[h * heads // 4]) for h in range(4)])[None]
    check(backend, qkv(heads=4, heads_kv=2), raw(lists), mask)


def test_order_and_empty_slots_do_not_matter(backend):
    """-1 is an empty slot wherever it stands; entries past the count are not looked at."""
    lists = torch.tensor([[[[3, -1, 0, 1], [-1, -1, 2, 10**9], [1, 3, -(10**9), 2**31 - 1]]]], dtype=torch.int32)
    counts = torch.tensor([[[4, 3, 2]]], dtype=torch.int32)
    pattern = BlockPattern(counts, lists, block_size=BLOCK, seq_lengths=(LEN_Q, LEN_K))
    check(backend, qkv(), pattern, block_mask([[0, 1, 3], [2], [1, 3]]))


def test_capacity_of_a_budget(backend):
    """A list may have fewer slots than there are key blocks, or more."""
    for slots in (1, 9):
        indices = torch.full((1, 1, 3, slots), -1, dtype=torch.int32)
        indices[..., 0] = torch.tensor([3, 0, 2])
        pattern = BlockPattern(indices[..., 0] * 0 + 1, indices, block_size=BLOCK, seq_lengths=(LEN_Q, LEN_K))
        check(backend, qkv(), pattern, block_mask([[3], [0], [2]]))


# ---- numbers that are hard to sum


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
def test_large_dynamic_range(backend, dtype):
    """Scores from -100 to 100 and values from 1e-3 to 1e3: sums are over weights that differ by many orders."""
    query, key, value = qkv(dtype=torch.float32)
    query, key = query * 4, key * torch.logspace(-2, 0.5, LEN_K)[:, None]
    value = value * torch.logspace(-3, 3, LEN_K)[torch.randperm(LEN_K), None]
    rows = [[0, 1, 3], [2, 3], [1, 2]]
    check(backend, [x.to(dtype) for x in (query, key, value)], raw(rows), block_mask(rows))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("place", [0, 70, 209])
@pytest.mark.parametrize("sign", [1, -1], ids=["above", "below"])
def test_a_score_far_from_the_rest(backend, dtype, place, sign):
    """One key whose score stands 200 above (or below) all others, in the first, a middle and the last block walked."""
    query, key, value = qkv()
    query[..., 0], key[..., 0] = 20.0, 0.0
    key[..., place, 0] = sign * 80.0  # 80 * 20 / sqrt(64) = 200
    terms = float(value.abs().max())  # a row is one value: dense attention copies it, three tf32 products round it
    rows = [[0, 1, 2, 3]] * 3
    out, lse = check(backend, [x.to(dtype) for x in (query, key, value)], raw(rows), block_mask(rows), terms)
    if sign > 0:
        torch.testing.assert_close(out, value.to(dtype)[:, :, place : place + 1].expand_as(out))


def test_scores_beyond_the_range_of_exp(backend):
    """exp(1000) overflows every dtype: only differences to the largest score are exponentiated. (A score of 1000 is rounded
    to 6e-5, and so is the result.)"""
    query, key, value = qkv()
    bias = torch.full((1, 1, LEN_K), 1000.0) + torch.randn(LEN_K)
    rows = [[0, 1], [2], [1, 2]]
    for offset in (0.0, -2000.0):
        out, lse = check(backend, [query, key, value], raw(rows), block_mask(rows), 1e3, key_bias=bias + offset)
        assert (lse.abs() > 900).all() and out.isfinite().all()
