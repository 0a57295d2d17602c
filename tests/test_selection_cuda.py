"""Selection on a GPU beyond equal results: CUDA graphs, compilation, repeats, streams, and index tensors that hold anything."""

import math

import pytest
import torch

import sparsekit
from backends import BACKENDS
from sparsekit import BlockPattern, selection

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not any(b.device == "cuda" for b in BACKENDS), reason="no GPU, or a library without CUDA"),
]
OPS = torch.ops.sparsekit


def heads(*shape, dtype=torch.bfloat16):
    return torch.randn(shape, device="cuda", dtype=dtype)


def everything(query, key, lse, positions, probs, block_map):
    """Every op once; all results in one flat list."""
    vertical, _ = selection.select_top_k(selection.column_scores(query[:, :, -32:], key, positions)[0], 20)
    slash = vertical[..., :9]
    counts, indices = selection.block_lists_from_bool(block_map, 12)
    order = probs[0, :, 0].argsort(-1).int()
    scores = selection.block_scores(query, key, 32, causal=True)
    return [
        scores,
        *selection.block_scores(query, key, 32, reduce="max", causal=True, self_similarity=True),
        selection.block_scores(query, key, 32, reduce="antidiagonal", causal=True),
        *selection.column_scores(query[:, :, -32:], key, positions),
        selection.row_scores(query, key, lse, causal=True),
        selection.row_scores(query, key, lse, reduce="max"),
        selection.attention_block_map(query, key, lse, 32, causal=True, reduce="sum"),
        *selection.select_top_k(probs, 7, sink=1, return_mass=True),
        *selection.select_top_p(probs, 0.8, local=2, return_mass=True),
        *selection.select_top_p(probs, 0.8, scope="head"),
        *selection.select_threshold(probs, 0.01),
        *selection.vertical_slash_lists(vertical, slash, 32, (query.shape[2], key.shape[2])),
        *selection.union_block_lists(indices, counts, 2, key_blocks=block_map.shape[-1]),
        counts,
        indices,
        *OPS.transpose_block_lists(counts, indices, None, None, (32, 32), 32 * block_map.shape[-1]),
        selection.permute_tokens(query[:, :, :90], order),
        selection.inverse_permutation(order),
    ]


def inputs(seed):
    torch.manual_seed(seed)
    query, key = heads(1, 4, 300, 64), heads(1, 2, 300, 64)
    lse = torch.rand(1, 4, 300, device="cuda") + 6
    positions = torch.arange(268, 300, device="cuda", dtype=torch.int32)
    return (
        query,
        key,
        lse,
        positions,
        torch.rand(1, 4, 50, 90, device="cuda"),
        torch.rand(1, 4, 50, 90, device="cuda") < 0.1,
    )


def same(got, want):
    return all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_graph_replay_with_changed_inputs():
    static = inputs(0)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        everything(*static)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = everything(*static)
    for seed in (1, 2):
        fresh = inputs(seed)
        for to, value in zip(static, fresh, strict=True):
            to.copy_(value)
        graph.replay()
        assert same(outputs, everything(*fresh))


def test_repeats_bit_for_bit():
    given = inputs(3)
    first = everything(*given)
    for _ in range(5):
        assert same(everything(*given), first)


def test_a_side_stream():
    given = inputs(4)
    want = everything(*given)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        got = everything(*given)
    stream.synchronize()
    assert same(got, want)


def test_compiled_whole():
    torch._dynamo.reset()

    @torch.compile(fullgraph=True, backend="aot_eager")
    def chosen(query, key, limits):
        scores = selection.block_scores(query, key, 32, causal=True)
        return selection.select_top_p(scores.softmax(-1), 0.9, sink=1, local=1, row_limit=limits)

    query, key = heads(1, 4, 300, 64), heads(1, 2, 300, 64)
    limits = selection.row_limits(32, (300, 300), device="cuda")
    got, want = (f(query, key, limits) for f in (chosen, chosen._torchdynamo_orig_callable))
    assert same(got, want)
    torch._dynamo.reset()


def test_chosen_blocks_are_attended_to():
    query, key, value = heads(1, 4, 512, 64), heads(1, 2, 512, 64), heads(1, 2, 512, 64)
    scores = selection.block_scores(query, key, 64, causal=True)
    limits = selection.row_limits(64, (512, 512), device="cuda")
    lists = selection.select_top_k(scores, 8, sink=1, local=1, row_limit=limits)
    pattern = BlockPattern.from_indices(*lists, 64, seq_lengths=(512, 512), causal=True)
    got = sparsekit.block_sparse_attention(query, key, value, pattern)
    want = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-2)  # 8 of 8 blocks: all that causality leaves


# ---- index tensors that hold anything: passed over, never read or written out of bounds

NASTY = (-1, -7, 11, 2**31 - 1, -(2**31))


def nasty(*shape, high):
    x = torch.randint(-1, high, shape, dtype=torch.int32)
    bad = torch.rand(shape) < 0.4
    x[bad] = torch.tensor(NASTY, dtype=torch.int32)[torch.randint(0, len(NASTY), (int(bad.sum()),))]
    return x


def test_nasty_lines():
    vertical, slash = nasty(1, 2, 40, high=300), nasty(1, 2, 30, high=300)
    got = selection.vertical_slash_lists(vertical.cuda(), slash.cuda(), 32, (300, 300))
    clean = [x.where((x >= 0) & (x < 300), -1) for x in (vertical, slash)]
    want = selection.vertical_slash_lists(*clean, 32, (300, 300))
    assert same([x.cpu() for x in got], want)


def test_nasty_unions():
    indices, counts = nasty(1, 4, 6, 20, high=30), nasty(1, 4, 6, high=25)
    got = selection.union_block_lists(indices.cuda(), counts.cuda(), 2, key_blocks=30)
    clean = indices.where((indices >= 0) & (indices < 30), -1), counts.clamp(0, 20)
    assert same([x.cpu() for x in got], selection.union_block_lists(*clean, 2, key_blocks=30))


def test_nasty_orders():
    order = nasty(2, 50, high=40)
    x = torch.randn(1, 4, 40, 8)
    clean = order.where((order >= 0) & (order < 40), -1)
    assert torch.equal(selection.permute_tokens(x.cuda(), order.cuda()).cpu(), selection.permute_tokens(x, clean))
    want = torch.full((2, 40), -1, dtype=torch.int32)  # the last of those that name a token
    for b in range(2):
        for i, token in enumerate(clean[b].tolist()):
            if token >= 0:
                want[b, token] = i
    assert torch.equal(selection.inverse_permutation(order.cuda(), 40).cpu(), want)


def test_nasty_rows_and_limits():
    query, key = heads(1, 2, 100, 32, dtype=torch.float32), heads(1, 2, 100, 32, dtype=torch.float32)
    lse = torch.rand(1, 2, 100, device="cuda") + 6
    rows = nasty(1, 60, high=100)
    clean = rows.where((rows >= 0) & (rows < 100), -1)
    got = selection.row_scores(query, key, lse, rows=rows.cuda())
    assert torch.equal(got, selection.row_scores(query, key, lse, rows=clean.cuda()))
    scores, limits = torch.rand(3, 4, 70), nasty(3, 4, high=90)
    got = selection.select_top_k(scores.cuda(), 9, row_limit=limits.cuda())
    assert same([x.cpu() for x in got], selection.select_top_k(scores, 9, row_limit=limits.clamp(0, 70)))


def test_nasty_lists_of_a_map():
    query, key = heads(1, 2, 256, 32, dtype=torch.float32), heads(1, 2, 256, 32, dtype=torch.float32)
    lse = torch.rand(1, 2, 256, device="cuda") + 6
    indices, counts = nasty(1, 2, 4, 6, high=4), nasty(1, 2, 4, high=9)
    maps = []
    for i, c in ((indices, counts), (indices.where((indices >= 0) & (indices < 4), -1), counts.clamp(0, 6))):
        pattern = BlockPattern(c.cuda(), i.cuda(), None, None, block_size=(64, 64), seq_lengths=(256, 256), causal=True)
        maps.append(selection.attention_block_map(query, key, lse, pattern, reduce="sum"))
    assert torch.equal(*maps) and maps[0].isfinite().all()


@pytest.mark.parametrize("offsets", [(0, 300, -5, 1000), (-9, 40, 20, 2**31 - 1), (0, 0, 0, 0), (200, 100, 50, 0)])
def test_nasty_sequences(offsets):
    """Whatever cu_seqlens hold, nothing is read or written out of bounds; and good sequences are right afterwards."""
    cu = torch.tensor(offsets, dtype=torch.int32, device="cuda")
    query, key = heads(300, 4, 32, dtype=torch.float32), heads(280, 2, 32, dtype=torch.float32)
    lse, positions = torch.rand(4, 300, device="cuda") + 6, torch.arange(300, device="cuda")
    packed = {"cu_seqlens_q": cu, "cu_seqlens_k": cu}
    for reduce in ("mean", "max", "antidiagonal"):
        q, k = query.clone().requires_grad_(), key.clone().requires_grad_()
        scores = selection.block_scores(q, k, 32, reduce=reduce, causal=True, **packed)
        torch.autograd.grad(scores.where(scores > -math.inf, 0).sum(), (q, k))
    selection.block_scores(query, key, 32, self_similarity=True, **packed)
    selection.row_scores(query, key, lse, causal=True, **packed)
    selection.column_scores(query, key, positions, **packed)
    selection.attention_block_map(query, key, lse, 32, causal=True, **packed)
    torch.cuda.synchronize()


def test_no_sequence():
    """A packed batch of none: nothing is seen."""
    cu = torch.zeros(1, dtype=torch.int32, device="cuda")
    query, key, lse = heads(70, 4, 32), heads(90, 2, 32), torch.zeros(4, 70, device="cuda")
    packed = {"cu_seqlens_q": cu, "cu_seqlens_k": cu}
    for reduce in ("mean", "max", "antidiagonal"):
        assert (selection.block_scores(query, key, 32, reduce=reduce, **packed) == -math.inf).all()
    assert not selection.row_scores(query, key, lse, **packed).any()
    assert not selection.attention_block_map(query, key, lse, 32, **packed).any()
    for result in selection.column_scores(query, key, torch.arange(70, device="cuda"), **packed):
        assert not result.any()


@pytest.mark.parametrize("columns", [2000, 40000, 140000, 600000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_long_rows_of_every_kind(columns, dtype):
    """One pass by a sample, and where that misleads, digit by digit: against the CPU, entry by entry."""
    x = torch.randn(3, columns)
    x[1] = x[1].round()  # massive ties
    x[2, columns // 3 :] = -math.inf
    x = x.to(dtype)
    for options in ({}, {"sink": 3, "local": 40}):
        for k in (50, 2048):
            got = selection.select_top_k(x.cuda(), k, return_mass=True, **options)
            want = selection.select_top_k(x, k, return_mass=True, **options)
            assert same([y.cpu() for y in got[:2]], want[:2])
            torch.testing.assert_close(got[2].cpu(), want[2], rtol=1e-6, atol=0)
    ascending = torch.arange(columns).float().to(dtype)
    got, _ = selection.select_top_k(ascending.cuda(), 1000)
    assert torch.equal(got.cpu(), selection.select_top_k(ascending, 1000)[0])


def test_refused():
    query = heads(1, 2, 40, 8, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="query is float64; supported on CUDA: float32, float16, bfloat16"):
        selection.block_scores(query, query, 8)
