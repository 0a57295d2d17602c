"""Scores of columns and rows, and the pooled map of attention, against dense float64 twins."""

import math

import pytest
import torch

import selection_twins as twins
import sparsekit
from backends import calls
from numerics import visible
from selection_scoring import DTYPES, SCORERS, assert_shares, run, score_error, tensors
from sparsekit import selection
from sparsekit.bench.cases import AttentionCase, make_inputs


@pytest.fixture(params=SCORERS)
def scorer(request):
    calls[request.param.name] += 1
    return request.param


@pytest.mark.parametrize("dtype", DTYPES)
def test_column_scores(scorer, dtype):
    query, key = tensors((2, 4, 9, 24), (2, 2, 300, 24), dtype, 4.0)
    for causal in (True, False):
        for positions in (torch.arange(291, 300), torch.randint(-3, 310, (2, 9))):
            got = run(scorer, selection.column_scores, query, key, positions, causal=causal)
            each = positions.expand(2, 9)
            for a, b in zip(got, twins.column_scores(query, key, each, causal), strict=True):
                assert_shares(a, b, 2 * score_error(query, key, None))
    assert torch.allclose(
        run(scorer, selection.column_scores, query, key, torch.arange(291, 300))[1].sum(-1), torch.tensor(9.0)
    )


@pytest.mark.parametrize("shape", [(4, 2, 64, 64), (6, 1, 33, 128), (2, 2, 1, 40), (8, 1, 64, 96), (3, 3, 50, 128)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_column_scores_of_a_prompt(scorer, dtype, shape):
    """The last rows of a prompt, or rows in the middle: consecutive positions, many tiles of keys."""
    heads, heads_kv, rows, dim = shape
    query, key = tensors((2, heads, rows, dim), (2, heads_kv, 1157, dim), dtype, 3.0)
    error = 2 * score_error(query, key, None)
    for causal, start in ((True, 1157 - rows), (True, 500), (False, 700), (True, 0), (True, 1150)):
        positions = torch.arange(start, start + rows)
        got = run(scorer, selection.column_scores, query, key, positions, causal=causal)
        for a, b in zip(got, twins.column_scores(query, key, positions.expand(2, rows), causal), strict=True):
            assert_shares(a, b, error)
    mixed = torch.stack([torch.arange(900, 900 + rows), torch.randint(0, 1157, (rows,))])  # one entry scattered
    got = run(scorer, selection.column_scores, query, key, mixed)
    for a, b in zip(got, twins.column_scores(query, key, mixed, True), strict=True):
        assert_shares(a, b, error)


@pytest.mark.parametrize("shape", [(4, 2, 64, 128, 4133), (3, 1, 40, 64, 6500), (2, 2, 61, 72, 4096)])
def test_column_scores_of_many_keys(scorer, shape):
    """So many that a GPU's kernel for many keys takes them, with scores that rise far above the first and fall again."""
    heads, heads_kv, rows, dim, keys = shape
    for dtype in (torch.bfloat16, torch.float16):
        query, key = tensors((1, heads, rows, dim), (1, heads_kv, keys, dim), dtype, 2.0)
        rising = (1 + 11 * torch.linspace(-1, 1, keys)[:, None].cos().square() * torch.rand(keys, 1)).to(dtype)
        key = key * rising
        error = 2 * score_error(query, key, None)
        for causal, start in ((True, keys - rows), (True, 1000), (False, 3000), (True, keys - 5), (False, 0)):
            positions = torch.arange(start, start + rows)
            got = run(scorer, selection.column_scores, query, key, positions, causal=causal)
            for a, b in zip(got, twins.column_scores(query, key, positions[None], causal), strict=True):
                assert_shares(a, b, error)


@pytest.mark.parametrize("dtype", DTYPES)
def test_row_scores(scorer, dtype):
    query, key = tensors((2, 4, 150, 24), (2, 2, 180, 24), dtype, 4.0)
    for causal in (False, True):
        mask = twins.causal_mask(150, 180, causal)
        lse = twins.products(query, key).where(mask, -math.inf).logsumexp(-1).float()
        lse[0, 1, 7] = -math.inf  # a row that saw nothing pays nothing
        share = twins.attention(query, key, mask, lse)
        error = 2 * score_error(query, key, None) + 4e-7 * lse.abs()[lse.isfinite()].max().item()
        for reduce in ("sum", "max"):
            got = run(scorer, selection.row_scores, query, key, lse, reduce=reduce, causal=causal)
            assert_shares(got, share.sum(2) if reduce == "sum" else share.amax(2), error)
            rows = torch.tensor([[3, -1, 149, 3], [-1, 0, 7, 80]])
            got = run(scorer, selection.row_scores, query, key, lse, rows=rows, reduce=reduce, causal=causal)
            picked = torch.stack([share[b][:, r.clamp(min=0)] * (r >= 0)[:, None] for b, r in enumerate(rows)])
            assert_shares(got, picked.sum(2) if reduce == "sum" else picked.amax(2), error)
    assert not run(scorer, selection.row_scores, query, key, lse, rows=torch.tensor([-1, -1])).any()
    assert not run(scorer, selection.row_scores, query, key, lse, rows=torch.zeros(0)).any()


@pytest.mark.parametrize("reduce", ["max", "sum"])
def test_attention_block_map(scorer, reduce):
    query, key = tensors((2, 4, 150, 24), (2, 2, 180, 24), torch.bfloat16, 4.0)
    for causal, window in ((False, (-1, -1)), (True, (-1, -1)), (True, (40, -1)), (False, (20, 30))):
        mask = twins.causal_mask(150, 180, causal)
        ahead = torch.arange(180)[None] - (torch.arange(150)[:, None] + 30)
        mask = mask & ((ahead >= -window[0]) | (window[0] < 0)) & ((ahead <= window[1]) | (window[1] < 0))
        lse = twins.products(query, key).where(mask, -math.inf).logsumexp(-1).float()
        share = twins.by_blocks(twins.attention(query, key, mask, lse), (64, 32), 0.0).flatten(-2)
        got = run(
            scorer,
            selection.attention_block_map,
            *(query, key, lse, (64, 32)),
            reduce=reduce,
            causal=causal,
            window=window,
        )
        error = 2 * score_error(query, key, None) + 4e-7 * lse.abs().max().item()
        assert_shares(got, share.sum(-1) if reduce == "sum" else share.amax(-1), error)


CASES = {
    "causal": {"causal": True},
    "bits": {"bits": True, "causal": True},
    "everything": {
        **{"causal": True, "window": (90, -1), "bits": True, "softcap": 5.0, "key_bias": True, "positions": True},
        "lists": "shared",
    },
}


@pytest.mark.parametrize("name", CASES)
def test_attention_block_map_of_a_pattern(scorer, name, seed):
    """Slot by slot the pooled weights of the pattern's own masks, and their sum is every row's share of 1."""
    case = AttentionCase(
        **{"batch": 2, "heads_q": 4, "heads_kv": 2, "len_q": 150, "len_k": 200, "head_dim": 32},
        **{"dtype": torch.float32, "block_size": (64, 64), "density": 0.5, "seed": seed},
    )
    inputs = make_inputs(case.with_(**CASES[name]))
    pattern = inputs.pattern
    out, lse = sparsekit.block_sparse_attention(*inputs.args, **inputs.kwargs, return_lse=True)
    mask = visible(inputs)
    scores = twins.products(inputs.query, inputs.key)
    if case.with_(**CASES[name]).softcap:
        scores = 5.0 * torch.tanh(scores / 5.0)
    if inputs.key_bias is not None:
        scores = scores + inputs.key_bias.double()[:, :, None]
    share = (scores - lse.double()[..., None]).exp().where(mask & (lse != -math.inf)[..., None], 0)
    blocks = twins.by_blocks(share, (64, 64), 0.0).flatten(-2)
    options = {k: v for k, v in inputs.kwargs.items() if k != "sinks"}
    for reduce in ("sum", "max"):
        got = run(
            scorer, selection.attention_block_map, *(inputs.query, inputs.key, lse, pattern), reduce=reduce, **options
        )
        want = blocks.sum(-1) if reduce == "sum" else blocks.amax(-1)
        lists = [(pattern.kv_num_blocks, pattern.kv_indices)]
        if pattern.full_kv_num_blocks is not None:
            lists.append((pattern.full_kv_num_blocks, pattern.full_kv_indices))
        slots = []
        for counts, indices in lists:
            shape = (2, 4, *indices.shape[2:])
            repeat = 4 // indices.shape[1]
            indices = indices.repeat_interleave(repeat, 1).expand(shape)
            used = torch.arange(shape[-1]) < counts.repeat_interleave(repeat, 1).expand(shape[:-1])[..., None]
            used = used & (indices >= 0)
            slots.append(want.gather(-1, indices.clamp(min=0).long()).where(used, 0))
        assert_shares(got, torch.cat(slots, -1), 1e-5)
