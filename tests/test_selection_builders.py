"""Lists out of lists, and orders of tokens, against Python sets and torch's gather."""

import pytest
import torch
import torch._dynamo.testing
from hypothesis import given
from hypothesis import strategies as st
from torch.library import opcheck

import selection_twins as twins
import sparsekit
from sparsekit import BlockPattern, selection

OPS = torch.ops.sparsekit


@pytest.fixture(
    params=[pytest.param(d, marks=[pytest.mark.cuda] * (d == "cuda")) for d in twins.DEVICES], scope="session"
)
def device(request) -> str:
    return request.param


def ints(*shape, low=-1, high=10):
    return torch.randint(low, high, shape, dtype=torch.int32)


def padded(rows, width):
    """int32 [len(rows), width], -1 past each row's end, and the counts."""
    lists = torch.full((len(rows), width), -1, dtype=torch.int32)
    for i, row in enumerate(rows):
        lists[i, : min(len(row), width)] = torch.tensor(row[:width], dtype=torch.int32)
    return lists, torch.tensor([min(len(row), width) for row in rows], dtype=torch.int32)


# ---- vertical and slash lines


def vertical_slash(vertical, slash, block, lengths, capacity):
    """Token by token: which blocks hold a token of a slash, which columns are then left."""
    (block_q, block_k), (len_q, len_k) = block, lengths
    blocks, columns = [], []
    for first in range(0, len_q, block_q):
        rows = [i + len_k - len_q for i in range(first, min(first + block_q, len_q))]
        touched = sorted({(p - o) // block_k for p in rows for o in slash if o >= 0 and p - o >= 0})[:capacity]
        blocks.append(touched)
        columns.append(sorted({v for v in vertical if 0 <= v <= rows[-1] and v // block_k not in touched}))
    return padded(blocks, capacity), padded(columns, len(vertical))


@given(
    lengths=st.tuples(st.integers(1, 200), st.integers(1, 200)),
    block=st.sampled_from([(16, 16), (32, 16), (16, 48), (7, 5)]),
    lines=st.tuples(st.integers(0, 12), st.integers(0, 9)),
    capacity=st.one_of(st.none(), st.integers(0, 6)),
    number=st.integers(0, 2**31),
)
def test_vertical_slash(device, lengths, block, lines, capacity, number):
    torch.manual_seed(number)
    vertical, slash = (ints(2, 2, n, high=lengths[1]) for n in lines)
    got = selection.vertical_slash_lists(vertical.to(device), slash.to(device), block, lengths, capacity=capacity)
    got = selection.VerticalSlashLists(*(x.cpu() for x in got))
    width = got.indices.shape[-1]
    assert width == capacity or capacity is None
    for b in range(2):
        for h in range(2):
            want = vertical_slash(vertical[b, h].tolist(), slash[b, h].tolist(), block, lengths, width)
            (indices, counts), (columns, column_counts) = want
            assert torch.equal(got.counts[b, h], counts) and torch.equal(got.indices[b, h], indices)
            assert torch.equal(got.column_counts[b, h], column_counts) and torch.equal(
                got.column_indices[b, h], columns
            )
            if capacity is None:  # nothing is lost
                full = vertical_slash(vertical[b, h].tolist(), slash[b, h].tolist(), block, lengths, 1000)[0][1]
                assert torch.equal(full, counts)


def test_lines_chosen_from_columns_and_diagonals(device):
    """MInference's search: probe rows, their columns and diagonals, the best of both, lists for attention."""
    query, key = torch.randn(1, 4, 300, 32, device=device), torch.randn(1, 2, 300, 32, device=device)
    columns, diagonals = selection.column_scores(query[:, :, -64:], key, torch.arange(236, 300, device=device))
    vertical, _ = selection.select_top_k(columns, 20)
    slash, _ = selection.select_top_k(diagonals, 8, sink=1)
    lists = selection.vertical_slash_lists(vertical, slash, 64, (300, 300))
    pattern = BlockPattern.from_indices(lists.indices, lists.counts, 64, seq_lengths=(300, 300), causal=True)
    assert pattern.to_dense().diagonal(dim1=-2, dim2=-1).all()  # the slash at distance 0
    assert sparsekit.block_sparse_attention(query, key, key, pattern).isfinite().all()


# ---- union over a group of heads


@given(
    sizes=st.tuples(st.integers(1, 2), st.integers(1, 3), st.integers(1, 4), st.integers(0, 5), st.integers(0, 9)),
    key_blocks=st.sampled_from([1, 9, 64, 65, 200]),
    capacity=st.one_of(st.none(), st.integers(0, 7)),
    number=st.integers(0, 2**31),
)
def test_union(device, sizes, key_blocks, capacity, number):
    torch.manual_seed(number)
    batch, heads, group, rows, width = sizes
    indices = ints(batch, heads * group, rows, width, high=key_blocks)
    counts = ints(batch, heads * group, rows, low=0, high=width + 1)
    lists = indices.to(device), counts.to(device)
    got = [x.cpu() for x in selection.union_block_lists(*lists, heads, key_blocks=key_blocks, capacity=capacity)]
    for b in range(batch):
        for h in range(heads):
            lists = []
            for m in range(rows):
                each = [indices[b, i, m, : counts[b, i, m]].tolist() for i in range(h * group, (h + 1) * group)]
                lists.append(sorted({n for row in each for n in row if n >= 0}))
            want = padded(lists, got[0].shape[-1])
            assert torch.equal(got[0][b, h], want[0]) and torch.equal(got[1][b, h], want[1])


# ---- orders of tokens


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8, torch.float8_e4m3fn])
def test_permute_tokens(device, dtype):
    x = torch.randn(2, 4, 50, 24).to(dtype).to(device)
    for shape in ((50,), (4, 50), (2, 50), (2, 2, 50), (2, 4, 50)):
        if len(shape) == 2 and shape[0] == 2:
            shape = (2, 50)
        order = torch.rand(shape).argsort(-1).int().to(device)
        got = selection.permute_tokens(x, order)
        heads = order if order.dim() == 3 else order[None] if order.dim() == 2 else order[None, None]
        index = heads.repeat_interleave(4 // heads.shape[1], 1).expand(2, 4, 50).long()
        want = torch.gather(x.view(torch.uint8), 2, index[..., None].expand(*x.shape[:3], x.view(torch.uint8).shape[3]))
        assert torch.equal(got.view(torch.uint8), want)
        back = selection.permute_tokens(got, selection.inverse_permutation(order))
        assert torch.equal(back.view(torch.uint8), x.view(torch.uint8))


def test_permute_some_tokens(device):
    """A subset per head, empty places, strided input; several tensors at once."""
    x = torch.randn(2, 50, 4, 8, device=device).transpose(1, 2)
    order = torch.rand(2, 4, 50).argsort(-1)[..., :20].int().to(device)
    order[..., ::7] = -1
    got, half = selection.permute_tokens((x, x[:, ::2]), order[:, :1])
    assert got.shape == (2, 4, 20, 8) and got.transpose(1, 2).is_contiguous()
    index = order[:, :1].clamp(min=0).long()[..., None].expand(2, 4, 20, 8)
    want = x.gather(2, index) * (order[:, :1] >= 0)[..., None]
    assert torch.equal(got, want) and torch.equal(half, want[:, ::2])
    inverse = selection.inverse_permutation(order, 50)
    assert inverse.shape == (2, 4, 50)
    for b in range(2):
        for h in range(4):
            used = order[b, h][order[b, h] >= 0].long()
            want = torch.full((50,), -1, dtype=torch.int32, device=device)
            want[used] = torch.arange(20, dtype=torch.int32, device=device)[order[b, h] >= 0]
            assert torch.equal(inverse[b, h], want)


def test_permute_gradients(device):
    x = torch.randn(1, 2, 12, 3, dtype=torch.float64, device=device, requires_grad=True)
    order = torch.rand(2, 12, device=device).argsort(-1)[:, :9].int()
    order[0, 3] = -1
    assert torch.autograd.gradcheck(lambda x: selection.permute_tokens(x, order), x)
    assert torch.autograd.gradgradcheck(lambda x: selection.permute_tokens(x, order), x)


def test_token_order():
    labels = torch.tensor([[2, 0, 2, 1, 0], [1, 1, 0, 0, 0]])
    assert selection.token_order(labels).tolist() == [[1, 4, 3, 0, 2], [2, 3, 4, 0, 1]]
    assert selection.token_order(labels).dtype == torch.int32


def test_axis_order():
    grid = torch.arange(24).view(2, 3, 4)
    order = selection.axis_order((2, 3, 4), (1, 2, 0))
    assert torch.equal(grid.flatten()[order.long()], grid.permute(1, 2, 0).flatten())
    with pytest.raises(ValueError, match="axes: found"):
        selection.axis_order((2, 3), (0, 0))


def test_attention_in_another_order():
    """Clusters side by side, attended in that order, put back: dense attention does not mind."""
    query, key, value = (torch.randn(1, 2, 128, 16) for _ in range(3))
    order = selection.token_order(torch.randint(0, 5, (1, 2, 128)))
    pattern = BlockPattern.from_bool(torch.ones(1, 1, 4, 4, dtype=torch.bool), 32)
    out = sparsekit.block_sparse_attention(*selection.permute_tokens((query, key, value), order), pattern)
    out = selection.permute_tokens(out, selection.inverse_permutation(order))
    want = torch.nn.functional.scaled_dot_product_attention(query, key, value)
    torch.testing.assert_close(out, want, rtol=1e-5, atol=1e-5)


# ---- errors, nothing at all


@pytest.mark.parametrize("call, message", [
    (lambda: selection.vertical_slash_lists(ints(1, 1, 3, low=9), ints(1, 1, 2, high=3), 4, (8, 8)), "vertical: entry 0"),
    (lambda: selection.vertical_slash_lists(ints(1, 1, 3, high=3), ints(1, 1, 2, low=-5, high=-4), 4, (8, 8)), "slash: entry"),
    (lambda: selection.vertical_slash_lists(ints(1, 3, high=3), ints(1, 1, 2), 4, (8, 8)), "vertical has 2 dimensions"),
    (lambda: selection.union_block_lists(ints(1, 4, 2, 3, low=7), ints(1, 4, 2, low=1, high=3), 2, key_blocks=7), "0 to 6"),
    (lambda: selection.union_block_lists(ints(1, 4, 2, 3), ints(1, 4, 2, low=4), 2, key_blocks=7), "counts: row 0 has"),
    (lambda: selection.union_block_lists(ints(1, 4, 2, 3), ints(1, 4, 2), 3, key_blocks=9), "heads is 3; supported: a div"),
    (lambda: selection.inverse_permutation(torch.tensor([0, 2, 0], dtype=torch.int32)), "are both 0; supported: each"),
    (lambda: selection.inverse_permutation(torch.tensor([0, 3], dtype=torch.int32)), "order: entry 1 of row 0 is 3"),
    (lambda: selection.permute_tokens(torch.zeros(1, 2, 4, 3), ints(3, 4, low=0, high=4)), "order has 3 heads"),
    (lambda: selection.permute_tokens(torch.zeros(1, 2, 4, 3), torch.tensor([4, 0])), "is 4; supported: -1 .empty. or 0 to 3"),
])  # fmt: skip
def test_errors(call, message):
    with pytest.raises(RuntimeError, match=message):
        call()


def test_empty(device):
    def nothing(*shape):
        return torch.zeros(shape, dtype=torch.int32, device=device)

    lists = selection.vertical_slash_lists(nothing(1, 2, 0), nothing(1, 2, 0), 16, (40, 40))
    assert lists.counts.shape == (1, 2, 3) and not lists.counts.any() and not lists.column_counts.any()
    assert selection.vertical_slash_lists(nothing(0, 2, 3), nothing(0, 2, 1), 16, (40, 40)).indices.shape == (
        0,
        2,
        3,
        2,
    )
    indices, counts = selection.union_block_lists(nothing(1, 4, 3, 0), nothing(1, 4, 3), 2, key_blocks=5)
    assert indices.shape == (1, 2, 3, 0) and not counts.any()
    x = torch.randn(1, 2, 0, 4, device=device)
    assert selection.permute_tokens(x, nothing(0)).shape == x.shape
    assert selection.permute_tokens(x, nothing(3) - 1).tolist() == torch.zeros(1, 2, 3, 4).tolist()
    assert (selection.inverse_permutation(nothing(0), 4) == -1).all()


# ---- torch


def test_opcheck():
    opcheck(OPS.vertical_slash_lists, (ints(1, 2, 5, high=40), ints(1, 2, 3, high=40), (8, 16), 30, 40, 3))
    opcheck(OPS.union_block_lists, (ints(2, 4, 3, 5), ints(2, 4, 3, low=0, high=5), 2, 10, 7))
    order = torch.rand(1, 2, 12).argsort(-1).int()
    opcheck(OPS.inverse_permutation, (order, 12))
    opcheck(OPS.permute_tokens, (torch.randn(2, 12, 4, 5).transpose(1, 2).requires_grad_(), order))
    opcheck(OPS.permute_tokens, (torch.randn(2, 4, 15, 5, requires_grad=True), order))


def test_vmap():
    x, order = torch.randn(3, 1, 2, 9, 4), torch.rand(3, 2, 9).argsort(-1).int()
    got = torch.vmap(selection.permute_tokens)(x, order)
    assert torch.equal(got, torch.stack([selection.permute_tokens(*pair) for pair in zip(x, order, strict=True)]))
    got = torch.vmap(lambda o: selection.inverse_permutation(o, 9))(order)
    assert torch.equal(got.long(), order.argsort(-1))
    indices, counts = ints(3, 1, 4, 2, 5), torch.full((3, 1, 4, 2), 5, dtype=torch.int32)
    got = torch.vmap(lambda i, c: selection.union_block_lists(i, c, 2, key_blocks=10))(indices, counts)
    want = [selection.union_block_lists(i, c, 2, key_blocks=10) for i, c in zip(indices, counts, strict=True)]
    assert all(torch.equal(a, torch.stack(b)) for a, b in zip(got, zip(*want, strict=True), strict=True))


def test_compile_with_dynamic_shapes():
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    @torch.compile(fullgraph=True, dynamic=True, backend=counter)
    def lines(vertical, slash, x):
        lists = selection.vertical_slash_lists(vertical, slash, 16, (x.shape[2], x.shape[2]))
        key_blocks = (x.shape[2] + 15) // 16
        union = selection.union_block_lists(lists.indices, lists.counts, 1, key_blocks=key_blocks)
        order = selection.token_order(x[..., 0])
        return *lists, *union, selection.permute_tokens(x, order), selection.inverse_permutation(order)

    for n, length in ((7, 90), (9, 130), (11, 201)):
        vertical, slash = ints(1, 2, n, high=length), ints(1, 2, n - 1, high=length)
        x = torch.randn(1, 2, length, 4)
        for a, b in zip(lines(vertical, slash, x), lines._torchdynamo_orig_callable(vertical, slash, x), strict=True):
            assert torch.equal(a, b)
    assert counter.frame_count == 1
    torch._dynamo.reset()
