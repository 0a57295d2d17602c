"""Scores of blocks, columns and rows against dense float64 twins."""

import math

import pytest
import torch
import torch._dynamo.testing
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.library import opcheck

import selection_twins as twins
from backends import calls
from selection_scoring import DTYPES, SCORERS, assert_scores, assert_shares, run, score_error, tensors
from sparsekit import selection

OPS = torch.ops.sparsekit
REDUCES = ["mean", "max", "antidiagonal"]


@pytest.fixture(params=SCORERS)
def scorer(request):
    calls[request.param.name] += 1
    return request.param


# ---- block scores


@pytest.mark.parametrize("reduce", REDUCES)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_block_scores(scorer, reduce, causal, dtype):
    for lengths, block in (((150, 150), (32, 32)), ((70, 200), (64, 32)), ((200, 90), (16, 48)), ((1, 33), (16, 16))):
        query, key = tensors((2, 4, lengths[0], 24), (2, 2, lengths[1], 24), dtype, 4.0)
        got = run(scorer, selection.block_scores, query, key, block, reduce=reduce, causal=causal, stride=8)
        want = twins.block_scores(query, key, block, reduce, causal, stride=8)
        error = score_error(query, key, None)
        if reduce == "antidiagonal":  # logarithms: shares of 1e-30 may be lost
            assert torch.equal(got == -math.inf, want == -math.inf)
            assert_shares(got.exp(), want.exp(), 4 * error)
        else:
            assert_scores(got, want, error)


@pytest.mark.parametrize("block", [128, 7, (1, 1), (5, 300)])
def test_block_sizes(scorer, block):
    query, key = tensors((1, 2, 260, 40), (1, 1, 260, 40))
    for reduce in ("mean", "max"):
        for causal in (False, True):
            got = run(scorer, selection.block_scores, query, key, block, reduce=reduce, causal=causal, scale=0.7)
            size = (block, block) if isinstance(block, int) else block
            assert_scores(got, twins.block_scores(query, key, size, reduce, causal, 0.7), score_error(query, key, 0.7))


@pytest.mark.parametrize("dim", [1, 3, 16, 80, 128, 200])
def test_head_dims(scorer, dim):
    query, key = tensors((1, 3, 100, dim), (1, 3, 130, dim), torch.bfloat16)
    error = score_error(query, key, None)
    for reduce in ("mean", "max"):
        got = run(scorer, selection.block_scores, query, key, 64, reduce=reduce, causal=True)
        assert_scores(got, twins.block_scores(query, key, (64, 64), reduce, True), error)
    got = run(scorer, selection.block_scores, query, key, 64, reduce="antidiagonal", causal=True, stride=16)
    assert_shares(got.exp(), twins.block_scores(query, key, (64, 64), "antidiagonal", True).exp(), 4 * error)


def test_causal_with_more_queries_than_keys(scorer):
    """The first rows see nothing: their blocks are -inf, and no share is NaN."""
    query, key = tensors((1, 2, 130, 16), (1, 2, 40, 16))
    for reduce in REDUCES:
        got = run(scorer, selection.block_scores, query, key, 32, reduce=reduce, causal=True)
        want = twins.block_scores(query, key, (32, 32), reduce, True)
        assert (got[:, :, :2] == -math.inf).all() and not got.isnan().any()
        assert torch.equal(got == -math.inf, want == -math.inf)


def test_strides_and_layouts(scorer):
    """[B, S, H, D] in memory, broadcast heads, odd addresses: the same numbers."""
    query, key = tensors((2, 4, 100, 32), (2, 2, 100, 32))
    want = {r: run(scorer, selection.block_scores, query, key, 32, reduce=r, causal=True) for r in REDUCES}
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (query, key)]
    odd = [torch.empty(x.numel() + 1)[1:].view(x.shape).copy_(x) for x in (query, key)]
    for pair in (strided, odd):
        for reduce in REDUCES:
            got = run(scorer, selection.block_scores, *pair, 32, reduce=reduce, causal=True)
            assert torch.equal(got, want[reduce])
    got = run(scorer, selection.block_scores, query, key[:, :1].expand(2, 2, 100, 32), 32)
    assert_scores(got, twins.block_scores(query, key[:, :1], (32, 32)), score_error(query, key, None))


def test_self_similarity(scorer):
    query, key = tensors((2, 4, 100, 24), (2, 2, 70, 24), torch.bfloat16)
    query[:, :, 40:50] = 0  # rows of zeros resemble nothing
    key[:, :, 32:64] = key[:, :, 32:33]  # a block of one direction resembles itself
    scores, of_query, of_key = run(scorer, selection.block_scores, query, key, 32, causal=True, self_similarity=True)
    assert_scores(scores, twins.block_scores(query, key, (32, 32), causal=True), score_error(query, key, None))
    torch.testing.assert_close(of_query, twins.similarity(query, 32).float(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(of_key, twins.similarity(key, 32).float(), rtol=1e-5, atol=1e-6)
    assert (of_key[:, :, 1] > 0.99999).all()


def test_what_is_not_finite_stays_in_its_blocks(scorer):
    query, key = tensors((1, 2, 128, 16), (1, 2, 128, 16))
    clean = {r: run(scorer, selection.block_scores, query, key, 32, reduce=r) for r in ("mean", "max")}
    key[:, :, 70] = math.nan
    for reduce, want in clean.items():
        got = run(scorer, selection.block_scores, query, key, 32, reduce=reduce)
        assert got[..., 2].isnan().all() and torch.equal(got[..., [0, 1, 3]], want[..., [0, 1, 3]])
        got = run(scorer, selection.block_scores, query, key, 32, reduce=reduce, causal=True)
        assert got[:, :, 2:, 2].isnan().all() and not got[:, :, :2].isnan().any()


# ---- packed batches


@pytest.fixture
def packed():
    lens_q, lens_k = (70, 0, 33, 5, 130), (64, 20, 100, 0, 200)
    query = torch.randn(sum(lens_q) + 6, 4, 24)  # rows past the last sequence belong to none
    key = torch.randn(sum(lens_k) + 3, 2, 24)
    cu = [torch.tensor([0, *torch.tensor(x).cumsum(0).tolist()], dtype=torch.int32) for x in (lens_q, lens_k)]
    parts = []
    for s in range(len(lens_q)):
        rows, keys = slice(int(cu[0][s]), int(cu[0][s + 1])), slice(int(cu[1][s]), int(cu[1][s + 1]))
        parts.append((rows, keys, query[rows].transpose(0, 1)[None], key[keys].transpose(0, 1)[None]))
    return query, key, *cu, parts


@pytest.mark.parametrize("reduce", REDUCES)
def test_block_scores_packed(scorer, packed, reduce):
    query, key, cu_q, cu_k, parts = packed
    got, of_query, of_key = run(
        scorer,
        selection.block_scores,
        *(query, key, 32),
        reduce=reduce,
        causal=True,
        self_similarity=True,
        cu_seqlens_q=cu_q,
        cu_seqlens_k=cu_k,
        max_seqlen_k=200,
    )
    assert got.shape == (1, 4, len(query) // 32 + 5, 7) and of_key.shape == (1, 2, len(key) // 32 + 5)
    limits = selection.row_limits(32, (len(query), len(key)), cu_seqlens_q=cu_q, cu_seqlens_k=cu_k)
    row = block = 0
    for _, _, q, k in parts:
        rows, blocks = -(-q.shape[2] // 32), -(-k.shape[2] // 32)
        if rows and blocks:
            want = twins.block_scores(q, k, (32, 32), reduce, True)
            torch.testing.assert_close(got[:, :, row : row + rows, :blocks], want.float(), rtol=2e-5, atol=2e-5)
            seen = (want > -math.inf).sum(-1)[0, 0]
            assert torch.equal(limits[row : row + rows], seen.int())
        assert (got[:, :, row : row + rows, blocks:] == -math.inf).all()
        if rows:
            torch.testing.assert_close(
                of_query[:, :, row : row + rows], twins.similarity(q, 32).float(), rtol=1e-5, atol=1e-6
            )
        if blocks:
            torch.testing.assert_close(
                of_key[:, :, block : block + blocks], twins.similarity(k, 32).float(), rtol=1e-5, atol=1e-6
            )
        row, block = row + rows, block + blocks
    assert (got[:, :, row:] == -math.inf).all() and not limits[row:].any()
    assert not of_query[:, :, row:].any() and not of_key[:, :, block:].any()


def test_columns_rows_and_map_packed(scorer, packed):
    query, key, cu_q, cu_k, parts = packed
    lse = torch.full((4, len(query)), -math.inf)
    positions = torch.zeros(len(query), dtype=torch.int32)
    for rows, _, q, k in parts:
        mask = twins.causal_mask(q.shape[2], k.shape[2], True)
        if q.numel() and k.numel():
            lse[:, rows] = twins.products(q, k).where(mask, -math.inf).logsumexp(-1)[0].float()
        positions[rows] = torch.arange(q.shape[2], dtype=torch.int32) + k.shape[2] - q.shape[2]
    cu = {"cu_seqlens_q": cu_q, "cu_seqlens_k": cu_k}
    columns, diagonals = run(scorer, selection.column_scores, query, key, positions, **cu)
    every = run(scorer, selection.row_scores, query, key, lse, causal=True, **cu)
    some = torch.tensor([3, -1, 71, 200, len(query) - 1])
    chosen = run(scorer, selection.row_scores, query, key, lse, rows=some, causal=True, **cu)
    pooled = run(scorer, selection.attention_block_map, query, key, lse, 32, causal=True, reduce="sum", **cu)
    seen, row = torch.zeros(len(key), dtype=torch.bool), 0
    for rows, keys, q, k in parts:
        mask = twins.causal_mask(q.shape[2], k.shape[2], True)
        share = twins.attention(q, k, mask, lse[None, :, rows])
        inside = [int(r) - rows.start for r in some if rows.start <= r < rows.stop]
        wants = [
            (every, share.sum(2)),
            (chosen, share[:, :, inside].sum(2)),
            *zip((columns, diagonals), twins.column_scores(q, k, positions[None, rows]), strict=True),
        ]
        for got, want in wants:
            torch.testing.assert_close(got[:, keys], want[0].float(), rtol=2e-5, atol=1e-6)
        blocks = twins.by_blocks(share, (32, 32), 0.0).sum((-1, -2))
        got = pooled[:, :, row : row + blocks.shape[2]]
        torch.testing.assert_close(got[..., : blocks.shape[3]], blocks.float(), rtol=2e-5, atol=1e-6)
        assert not got[..., blocks.shape[3] :].any()
        row += blocks.shape[2]
        seen[keys] = True
    assert not pooled[:, :, row:].any()
    for got in (columns, diagonals, every, chosen):
        assert not got[:, ~seen].any()


# ---- gradients


@pytest.mark.parametrize("reduce", REDUCES)
@pytest.mark.parametrize("causal", [False, True])
def test_gradients(scorer, reduce, causal):
    for lengths, block in (((100, 100), (32, 32)), ((70, 130), (48, 16)), ((90, 40), (16, 16))):
        query, key = (x.requires_grad_() for x in tensors((2, 4, lengths[0], 12), (2, 2, lengths[1], 12)))
        got = run(scorer, selection.block_scores, query, key, block, reduce=reduce, causal=causal)
        want = twins.block_scores(query, key, block, reduce, causal)
        seen = want != -math.inf
        grad = torch.randn(want.shape)
        with scorer.forced():
            got_grads = torch.autograd.grad(got, (query, key), grad)
        grads = torch.autograd.grad(want.where(seen, 0), (query, key), grad.double() * seen)
        for a, b in zip(got_grads, grads, strict=True):
            torch.testing.assert_close(a, b.float(), rtol=1e-4, atol=2e-5 * b.abs().max().item())


@pytest.mark.parametrize("reduce", REDUCES)
def test_gradcheck(reduce):
    query, key = (torch.randn(1, h, n, 3, dtype=torch.float64, requires_grad=True) for h, n in ((2, 9), (1, 11)))

    def scores(query, key):
        s = selection.block_scores(query, key, 4, reduce=reduce, causal=True, stride=2)
        return s.where(s != -math.inf, 0)

    assert torch.autograd.gradcheck(scores, (query, key))


def test_gradients_packed(scorer, packed):
    query, key, cu_q, cu_k, parts = packed
    query.requires_grad_(), key.requires_grad_()
    for reduce in REDUCES:
        options = {"reduce": reduce, "causal": True, "cu_seqlens_q": cu_q, "cu_seqlens_k": cu_k}
        got = run(scorer, selection.block_scores, query, key, 32, **options)
        grad = torch.randn(got.shape)
        with scorer.forced():
            got_grads = torch.autograd.grad(got, (query, key), grad)
        total, row = torch.zeros((), dtype=torch.float64), 0
        for rows, keys, q, k in parts:
            q, k = query[rows].transpose(0, 1)[None], key[keys].transpose(0, 1)[None]
            blocks = -(-q.shape[2] // 32), -(-k.shape[2] // 32)
            if all(blocks):
                want = twins.block_scores(q, k, (32, 32), reduce, True)
                part = grad[:, :, row : row + blocks[0], : blocks[1]]
                total = total + (want.where(want != -math.inf, 0) * part).sum()
            row += blocks[0]
        for a, b in zip(got_grads, torch.autograd.grad(total, (query, key)), strict=True):
            torch.testing.assert_close(a, b.float(), rtol=1e-4, atol=2e-5 * b.abs().max().item())


def test_only_wanted_gradients_and_none_twice():
    query, key = torch.randn(1, 2, 40, 8, requires_grad=True), torch.randn(1, 2, 40, 8)
    scores, of_query, of_key = selection.block_scores(query, key, 8, self_similarity=True)
    assert not of_query.requires_grad and not of_key.requires_grad
    (grad,) = torch.autograd.grad(scores.sum(), query, create_graph=True)
    with pytest.raises(RuntimeError, match="block_scores cannot be differentiated twice"):
        grad.sum().backward()
    lse = torch.zeros(1, 2, 40)
    for result in (
        selection.row_scores(query, key, lse),
        selection.attention_block_map(query, key, lse, 8),
        *selection.column_scores(query, key, torch.arange(40)),
    ):
        assert not result.requires_grad


# ---- random problems, threads, nothing at all


@settings(max_examples=40)
@given(
    lengths=st.tuples(st.integers(1, 140), st.integers(1, 140)),
    block=st.tuples(st.sampled_from([8, 16, 24, 64]), st.sampled_from([8, 16, 40, 64])),
    heads=st.sampled_from([(1, 1), (4, 2), (3, 1)]),
    dim=st.integers(1, 40),
    dtype=st.sampled_from(DTYPES),
    reduce=st.sampled_from(REDUCES),
    causal=st.booleans(),
    number=st.integers(0, 2**31),
)
def test_any_block_scores(cpu_backend, lengths, block, heads, dim, dtype, reduce, causal, number):
    calls[cpu_backend.name] += 1
    torch.manual_seed(number)
    query, key = tensors((1, heads[0], lengths[0], dim), (1, heads[1], lengths[1], dim), dtype, 3.0)
    got = run(cpu_backend, selection.block_scores, query, key, block, reduce=reduce, causal=causal, stride=8)
    want = twins.block_scores(query, key, block, reduce, causal, stride=8)
    error = score_error(query, key, None)
    if reduce == "antidiagonal":
        assert torch.equal(got == -math.inf, want == -math.inf)
        assert_shares(got.exp(), want.exp(), 4 * error)
    else:
        assert_scores(got, want, error)


def test_threads_do_not_change_a_bit(cpu_backend, one_or_two_threads):
    query, key = tensors((1, 6, 500, 40), (1, 2, 700, 40), torch.bfloat16)
    lse = torch.randn(1, 6, 500) + 6
    results = []
    for threads in (1, 2):
        one_or_two_threads(threads)
        results.append(
            [
                *(run(cpu_backend, selection.block_scores, query, key, 64, reduce=r, causal=True) for r in REDUCES),
                *run(cpu_backend, selection.column_scores, query[:, :, :30], key, torch.arange(600, 630)),
                run(cpu_backend, selection.row_scores, query, key, lse, causal=True),
                run(cpu_backend, selection.attention_block_map, query, key, lse, 64, causal=True, reduce="sum"),
            ]
        )
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize(
    "shapes", [((0, 2, 9, 4), (0, 2, 9, 4)), ((1, 2, 0, 4), (1, 2, 9, 4)), ((1, 2, 9, 4), (1, 2, 0, 4))]
)
def test_empty(scorer, shapes):
    query, key = (torch.randn(shape) for shape in shapes)
    for reduce in REDUCES:
        scores = run(scorer, selection.block_scores, query, key, 4, reduce=reduce, stride=2)
        assert scores.shape == (shapes[0][0], 2, -(-shapes[0][2] // 4), -(-shapes[1][2] // 4))
    lse = torch.zeros(shapes[0][:3])
    assert not run(scorer, selection.row_scores, query, key, lse).any()
    assert not run(scorer, selection.attention_block_map, query, key, lse, 4).any()
    for result in run(scorer, selection.column_scores, query, key, torch.zeros(shapes[0][2], dtype=torch.int32)):
        assert not result.any()


# ---- errors


Q, K, LSE = torch.randn(1, 4, 20, 8), torch.randn(1, 2, 20, 8), torch.zeros(1, 4, 20)


@pytest.mark.parametrize("call, message", [
    (lambda: selection.block_scores(Q, K, 8, reduce="sum"), "reduce is 'sum'; supported: 'mean', 'max', 'antidiagonal'"),
    (lambda: selection.block_scores(Q, K, 24, reduce="antidiagonal"), "stride is 16; supported: a divisor of both"),
    (lambda: selection.block_scores(Q, K, 0), "block_size holds 0"),
    (lambda: selection.block_scores(Q, K[:, :, :, :4], 8), "key has size 4 in dimension 3; supported: 8"),
    (lambda: selection.block_scores(Q, K.half(), 8), "query is float32, key float16"),
    (lambda: selection.block_scores(Q[:, :3], K, 8), "query has 3 heads and key 2"),
    (lambda: selection.block_scores(Q[0], K[0], 8), "packed 3 with cu_seqlens_q and cu_seqlens_k"),
    (lambda: selection.row_scores(Q, K, LSE, rows=torch.tensor([3, 20])), r"rows\[0, 1\] is 20; supported: -1"),
    (lambda: selection.row_scores(Q, K, LSE, reduce="mean"), "reduce is 'mean'; supported: 'sum', 'max'"),
    (lambda: selection.row_scores(Q, K, LSE[:, :, :3]), "lse has size 3 in dimension 2; supported: 20"),
    (lambda: selection.row_scores(Q, K, LSE.half()), "lse has the wrong dtype; supported: float32"),
    (lambda: selection.column_scores(Q, K, torch.arange(19)), "query_positions has size 19"),
])  # fmt: skip
def test_errors(call, message):
    with pytest.raises((RuntimeError, ValueError), match=message):
        call()


def test_errors_of_packed_lengths():
    cu = torch.tensor([0, 9, 30], dtype=torch.int32)
    with pytest.raises(RuntimeError, match=r"cu_seqlens_q\[2\] is 30"):
        selection.block_scores(torch.randn(20, 2, 8), torch.randn(30, 2, 8), 8, cu_seqlens_q=cu, cu_seqlens_k=cu)
    with pytest.raises(RuntimeError, match="sequence 1 has 21 rows; supported: at most the given maximum 20"):
        tensors = torch.randn(30, 2, 8), torch.randn(30, 2, 8)
        selection.block_scores(*tensors, 8, cu_seqlens_q=cu, cu_seqlens_k=cu, max_seqlen_k=20)


# ---- torch


def test_opcheck():
    query, key = torch.randn(2, 4, 40, 8, requires_grad=True), torch.randn(2, 2, 50, 8, requires_grad=True)
    for reduce in REDUCES:
        opcheck(OPS.block_scores, (query, key, (8, 16), REDUCES.index(reduce), True, None, 8, None, None, 0, True))
    query, key = query.detach(), key.detach()
    grad = torch.randn(2, 4, 5, 4)
    opcheck(OPS.block_scores_backward, (grad, query.transpose(0, 1).contiguous().transpose(0, 1), key, (8, 16)))
    opcheck(OPS.column_scores, (query, key, torch.arange(40, dtype=torch.int32)[None]))
    lse = torch.randn(2, 4, 40)
    opcheck(OPS.row_scores, (query, key, lse, torch.tensor([[1, 2]], dtype=torch.int32), 1))
    nothing = (None,) * 6
    opcheck(OPS.attention_block_map, (query, key, lse, *nothing, (8, 16)))
    counts = torch.full((1, 1, 5), 2, dtype=torch.int32)
    indices = torch.tensor([0, 2], dtype=torch.int32).expand(1, 1, 5, 2).contiguous()
    opcheck(OPS.attention_block_map, (query, key, lse, counts, indices, *nothing[2:], (8, 16), 0))


def test_opcheck_packed(packed):
    query, key, cu_q, cu_k, _ = packed
    query.requires_grad_()
    opcheck(OPS.block_scores, (query, key, (32, 32), 0, True, None, 16, cu_q, cu_k, 200, True))
    query = query.detach()
    lse = torch.randn(4, len(query))
    opcheck(OPS.row_scores, (query, key, lse, None, 0, True, None, cu_q, cu_k))
    opcheck(OPS.column_scores, (query, key, torch.zeros(1, len(query), dtype=torch.int32), True, None, cu_q, cu_k))
    options = (None, True, (-1, -1), 0.0, None, None, None, cu_q, cu_k, 200)
    opcheck(OPS.attention_block_map, (query, key, lse, *(None,) * 6, (32, 32), 1, *options))


def test_vmap():
    query, key = torch.randn(3, 1, 4, 40, 8, requires_grad=True), torch.randn(1, 2, 40, 8)
    lse = torch.randn(3, 1, 4, 40)

    def one(q, lse):
        columns = selection.column_scores(q, key, torch.arange(40))
        rows = selection.row_scores(q, key, lse), selection.attention_block_map(q, key, lse, 8)
        return selection.block_scores(q, key, 8), *columns, *rows

    together = torch.vmap(one)(query, lse)
    apart = [torch.stack(x) for x in zip(*map(one, query, lse), strict=True)]
    for a, b in zip(together, apart, strict=True):
        torch.testing.assert_close(a, b)
    grads = [torch.autograd.grad(x.square().sum(), query)[0] for x in (together[0], apart[0])]
    torch.testing.assert_close(*grads)


def test_autocast():
    query, key = torch.randn(1, 2, 40, 8), torch.randn(1, 2, 40, 8).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        got = selection.block_scores(query, key, 8)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, selection.block_scores(query.bfloat16(), key, 8))


def test_training_a_gate_in_one_graph():
    """SeerAttention: pooled scores learn the pooled attention map; compiled whole, with dynamic shapes."""
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    @torch.compile(fullgraph=True, dynamic=True, backend=counter)
    def loss(query, key, gate, lse):
        scores = selection.block_scores(query @ gate, key, 16, causal=True)
        target = selection.attention_block_map(query, key, lse, 16, causal=True)
        target = target / target.sum(-1, keepdim=True)
        return torch.nn.functional.kl_div(scores.log_softmax(-1).clamp(min=-99), target, reduction="sum")

    for length in (64, 100, 150):
        query, key = torch.randn(1, 4, length, 8), torch.randn(1, 2, length, 8)
        gate = torch.eye(8).requires_grad_()
        lse = twins.products(query, key).where(twins.causal_mask(length, length, True), -math.inf).logsumexp(-1).float()
        got, want = (f(query, key, gate, lse) for f in (loss, loss._torchdynamo_orig_callable))
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(*(torch.autograd.grad(x, gate)[0] for x in (got, want)))
    assert counter.frame_count == 1
    torch._dynamo.reset()
