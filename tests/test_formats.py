"""Every way into a BlockPattern, against masks written out token by token; and back."""

import copy
import dataclasses
import io
import math
import pickle
import threading

import pytest
import torch
import torch.utils._pytree as pytree
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import BlockMask, and_masks, create_block_mask, create_mask, or_masks

import sparsekit
from backends import BACKENDS
from sparsekit import BlockPattern, formats, reference
from sparsekit._lists import pack_bits, unpack_bits

DEVICES = [
    pytest.param(name, marks=[pytest.mark.cuda] if name == "cuda" else [])
    for name in sorted({backend.device for backend in BACKENDS})
]


@pytest.fixture(params=DEVICES)
def device(request) -> str:
    return request.param


def expand(block_map: torch.Tensor, block_size, seq_lengths) -> torch.Tensor:
    """bool `[B, H, Sq, Sk]` of a block map."""
    rows = torch.arange(seq_lengths[0]) // block_size[0]
    columns = torch.arange(seq_lengths[1]) // block_size[1]
    return block_map[:, :, rows][..., columns]


def band(seq_lengths, causal=False, window=(-1, -1), query_positions=None, key_positions=None) -> torch.Tensor:
    """bool `[B|1, 1, Sq, Sk]`: what causality and window allow."""
    q = torch.arange(seq_lengths[0])[None] + seq_lengths[1] - seq_lengths[0]
    k = torch.arange(seq_lengths[1])[None]
    q = (q if query_positions is None else query_positions)[:, None, :, None].long()
    k = (k if key_positions is None else key_positions)[:, None, None, :].long()
    allowed = torch.ones(torch.broadcast_shapes(q.shape, k.shape), dtype=torch.bool)
    if causal:
        allowed &= k <= q
    if window[0] >= 0:
        allowed &= k >= q - window[0]
    if window[1] >= 0:
        allowed &= k <= q + window[1]
    return allowed


def assert_lists_are_tight(pattern: BlockPattern, mask: torch.Tensor):
    """Full blocks are seen whole, and listed blocks are seen at all (`mask`: causality and window)."""
    (block_q, block_k), (length_q, length_k) = pattern.block_size, pattern.seq_lengths
    if length_q == 0 or length_k == 0:
        return
    padded = torch.nn.functional.pad(mask, (0, -length_k % block_k, 0, -length_q % block_q), value=False)
    exists = torch.nn.functional.pad(torch.ones_like(mask), (0, -length_k % block_k, 0, -length_q % block_q))
    tiles = [x.unflatten(3, (-1, block_k)).unflatten(2, (-1, block_q)).transpose(3, 4) for x in (padded, exists)]
    some = tiles[0].flatten(-2).any(-1)
    whole = (tiles[0] | ~tiles[1]).flatten(-2).all(-1)
    full = dataclasses.replace(
        pattern, kv_num_blocks=pattern.full_kv_num_blocks, kv_indices=pattern.full_kv_indices,
        full_kv_num_blocks=None, full_kv_indices=None, partial_bits=None, partial_bits_index=None,
    ).to_dense().bool()  # fmt: skip
    assert (full <= whole).all(), "a full block that causality or window cuts"
    assert (pattern.to_dense().bool() <= some).all(), "a listed block of which nothing is seen"
    partial = pattern.to_dense().bool() & ~full
    if pattern.partial_bits is None:
        assert not (partial & whole).any(), "a partial block that is seen whole"


@st.composite
def grids(draw):
    """(block_size, seq_lengths, batch, heads, causal, window, seed)."""
    sizes = st.sampled_from([1, 3, 16, 20, 32, 64])
    block_size = (draw(sizes), draw(sizes))
    lengths = tuple(draw(st.integers(0, 6 * size)) for size in block_size)
    window = draw(st.sampled_from([(-1, -1), (-1, -1), (5, 7), (40, -1), (-1, 0), (0, 0), (17, 0)]))
    batch, heads = draw(st.sampled_from([1, 2])), draw(st.sampled_from([1, 3]))
    return block_size, lengths, batch, heads, draw(st.booleans()), window, draw(st.integers(0, 2**31 - 1))


def draw_map(block_size, lengths, batch, heads, seed):
    generator = torch.Generator().manual_seed(seed)
    rows, columns = (-(-length // size) for length, size in zip(lengths, block_size, strict=True))
    return torch.rand(batch, heads, rows, columns, generator=generator) < 0.6


# ---- constructors


@given(grids())
def test_from_bool(grid):
    block_size, lengths, batch, heads, causal, window, seed = grid
    block_map = draw_map(block_size, lengths, batch, heads, seed)
    pattern = BlockPattern.from_bool(block_map, block_size, seq_lengths=lengths, causal=causal, window=window)
    mask = band(lengths, causal, window)
    assert torch.equal(pattern.to_token_mask(), expand(block_map, block_size, lengths) & mask)
    if causal or window != (-1, -1):
        assert_lists_are_tight(pattern, mask)
    else:
        assert torch.equal(pattern.to_dense().bool(), block_map)
    sparsekit.check(pattern)


@given(grids())
def test_from_indices(grid):
    """Top-k indices in no order, with empty slots; and a capacity smaller than a row."""
    block_size, lengths, batch, heads, causal, window, seed = grid
    block_map = draw_map(block_size, lengths, batch, heads, seed)
    generator = torch.Generator().manual_seed(seed)
    columns = torch.arange(block_map.shape[-1]).expand(block_map.shape)
    indices = torch.nn.functional.pad(columns.masked_fill(~block_map, -1), (0, 2), value=-1)
    order = torch.rand(indices.shape, generator=generator).argsort(-1)
    indices = indices.gather(-1, order)  # int64, as topk gives them
    keep = torch.randint(0, indices.shape[-1] + 1, indices.shape[:-1], generator=generator)
    for counts in (None, keep):
        pattern = BlockPattern.from_indices(
            indices, counts, block_size, seq_lengths=lengths, causal=causal, window=window
        )
        listed = torch.zeros(*block_map.shape[:-1], block_map.shape[-1] + 1, dtype=torch.bool)
        inside = torch.arange(indices.shape[-1]) < (keep[..., None] if counts is not None else 1 << 30)
        listed.scatter_(-1, indices.where(inside & (indices >= 0), block_map.shape[-1]), True)
        mask = band(lengths, causal, window)
        assert torch.equal(pattern.to_token_mask(), expand(listed[..., :-1], block_size, lengths) & mask)
        if causal or window != (-1, -1):
            assert_lists_are_tight(pattern, mask)
        sparsekit.check(pattern)


@given(grids())
def test_from_csr(grid):
    block_size, lengths, _, _, causal, window, seed = grid
    block_map = draw_map(block_size, lengths, 1, 1, seed)
    if 0 in block_map.shape:
        return
    sparse = block_map[0, 0].to_sparse_csr()
    options = dict(seq_lengths=lengths, causal=causal, window=window)
    pattern = BlockPattern.from_csr(sparse.crow_indices(), sparse.col_indices(), block_size, **options)
    expected = BlockPattern.from_bool(block_map, block_size, **options)
    assert torch.equal(pattern.to_token_mask(), expected.to_token_mask())
    wide = BlockPattern.from_csr(sparse.crow_indices(), sparse.col_indices(), block_size, capacity=99, **options)
    assert torch.equal(wide.to_token_mask(), expected.to_token_mask())
    sparsekit.check(pattern)


def test_from_csr_of_a_batch_of_block_matrices():
    """torch.sparse_bsr of two matrices with equally many blocks."""
    block_map = torch.tensor([[[1, 0, 1], [0, 1, 0]], [[0, 0, 0], [1, 1, 1]]], dtype=torch.bool)
    dense = block_map.repeat_interleave(16, 1).repeat_interleave(32, 2).float()
    sparse = dense.to_sparse_bsr((16, 32))
    pattern = BlockPattern.from_csr(
        sparse.crow_indices()[:, None],
        sparse.col_indices()[:, None],
        sparse.values().shape[-2:],
        seq_lengths=dense.shape[1:],
    )
    assert torch.equal(pattern.to_token_mask()[:, 0], dense.bool())


@given(
    st.lists(st.integers(0, 90), min_size=0, max_size=6),
    st.sampled_from([(16, 16), (32, 64), (20, 7)]),
    st.booleans(),
    st.sampled_from([(-1, -1), (9, 3), (30, -1)]),
    st.integers(0, 50),
)
def test_from_documents(lengths, block_size, causal, window, padding):
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    total = int(cu_seqlens[-1]) + padding
    seq_lengths = (total, total) if padding else None
    pattern = BlockPattern.from_documents(cu_seqlens, block_size, seq_lengths=seq_lengths, causal=causal, window=window)
    document = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths, dtype=torch.long))
    document = torch.cat([document, torch.arange(padding) * 0 - 1])
    same = (document[:, None] == document) & (document >= 0)
    assert torch.equal(pattern.to_token_mask()[0, 0], same & band((total, total), causal, window)[0, 0])
    sparsekit.check(pattern)


def test_a_bad_index_survives_sorting_by_causality():
    """It must reach the op, which names it; only what is known to be unseen is dropped."""
    for bad in (4, -2, 1 << 30):
        indices = torch.tensor([[0, -1], [1, bad], [2, 1], [0, 3]])
        pattern = BlockPattern.from_indices(indices, None, 16, seq_lengths=(64, 64), causal=True)
        with pytest.raises(RuntimeError, match=rf"kv_indices\[0, 0, 1, .\] is {bad}"):
            sparsekit.check(pattern)
    pattern = BlockPattern.from_indices(
        indices.clamp(0, 3), torch.tensor([1, 2, 3, 2]), 16, seq_lengths=(64, 64), causal=True
    )
    with pytest.raises(RuntimeError, match=r"kv_num_blocks\[0, 0, 2\] is 3"):
        sparsekit.check(pattern)


def test_capacity_keeps_the_first_blocks():
    block_map = torch.ones(1, 1, 2, 6, dtype=torch.bool)
    pattern = BlockPattern.from_bool(block_map, 16, capacity=4)
    assert pattern.kv_indices.tolist() == [[[[0, 1, 2, 3]] * 2]]
    assert pattern.seq_lengths == (32, 96)


def test_positions(seed):
    """Blocks are sorted by the positions that the calls will have, per batch entry."""
    lengths, block = (100, 150), (16, 32)
    at_q = torch.stack([torch.randperm(300)[:100].sort().values, torch.randperm(300)[:100]]).int()
    at_k = torch.randperm(300)[:150].sort().values[None].int()
    block_map = torch.rand(1, 3, 7, 5) < 0.7
    for where in ({"query_positions": at_q}, {"key_positions": at_k}, {"query_positions": at_q, "key_positions": at_k}):
        pattern = BlockPattern.from_bool(block_map, block, seq_lengths=lengths, causal=True, window=(150, -1), **where)
        mask = band(lengths, True, (150, -1), **where)
        assert torch.equal(pattern.to_token_mask(**where), expand(block_map, block, lengths) & mask)
        assert_lists_are_tight(pattern, mask)
        query, key = torch.randn(2, 3, 100, 8), torch.randn(2, 3, 150, 8)
        out = sparsekit.block_sparse_attention(query, key, key, pattern, **where)
        expected, _ = reference.block_sparse_attention(query, key, key, pattern, **where)
        torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)


def test_packed(seed):
    """Rows of a packed batch stand in their own sequence."""
    lens_q, lens_k, block = (40, 0, 17, 64), (64, 30, 5, 100), (16, 32)
    cu_seqlens = [torch.tensor([0, *lens]).cumsum(0).int() for lens in (lens_q, lens_k)]
    rows = sum(-(-length // 16) for length in lens_q)
    block_map = torch.rand(1, 2, rows, 4) < 0.8
    row = 0
    for length_q, length_k in zip(lens_q, lens_k, strict=True):  # blocks past a sequence are nobody's
        count = -(-length_q // 16)
        block_map[:, :, row : row + count, -(-length_k // 32) :] = False
        row += count
    pattern = BlockPattern.from_bool(
        block_map, block, causal=True, window=(50, -1), cu_seqlens_q=cu_seqlens[0], cu_seqlens_k=cu_seqlens[1]
    )
    row = 0
    for length_q, length_k in zip(lens_q, lens_k, strict=True):
        count, columns = -(-length_q // 16), -(-length_k // 32)
        names = ("kv_num_blocks", "kv_indices", "full_kv_num_blocks", "full_kv_indices")
        cut = {name: getattr(pattern, name)[:, :, row : row + count] for name in names}
        one = dataclasses.replace(pattern, **cut, seq_lengths=(length_q, length_k), assumes="any")
        mask = band((length_q, length_k), True, (50, -1))
        expected = expand(block_map[:, :, row : row + count, :columns], block, (length_q, length_k)) & mask
        assert torch.equal(one.to_token_mask(), expected)
        assert_lists_are_tight(one, mask)
        row += count
    assert row == rows


# ---- FlexAttention

DOCUMENT = torch.tensor([0] * 40 + [1] * 3 + [2] * 90 + [3] * 67)
MASKS = {
    "causal": lambda b, h, q, k: q >= k,
    "noop": None,
    "window": lambda b, h, q, k: (q - k).abs() <= 30,
    "document": lambda b, h, q, k: DOCUMENT[q] == DOCUMENT[k],
    "prefix": lambda b, h, q, k: (k < 50) | (q >= k),
    "per-head": lambda b, h, q, k: (q - k) % (h + 2) == 0,
    "per-batch": lambda b, h, q, k: k < 60 + 70 * b,
    "dilated": lambda b, h, q, k: ((q - k) % 7 == 0) & (q >= k),
    "and": and_masks(lambda b, h, q, k: q >= k, lambda b, h, q, k: q - k < 64),
    "or": or_masks(lambda b, h, q, k: k < 4, lambda b, h, q, k: (q - k).abs() < 9),
    "empty-rows": lambda b, h, q, k: (q >= 100) & (k < 33),
    "python-branch-on-nothing": lambda b, h, q, k: q.new_ones((), dtype=torch.bool) & (k != 17),
}


def flex_mask(name, device="cpu", lengths=(200, 200), block=(32, 64)) -> BlockMask:
    mask_mod = MASKS[name] or (lambda b, h, q, k: q.new_ones((), dtype=torch.bool))
    return create_block_mask(mask_mod, 2, 3, *lengths, device=device, BLOCK_SIZE=block)


def flex_token_mask(mask: BlockMask) -> torch.Tensor:
    return create_mask(mask.mask_mod, 2, 3, *mask.seq_lengths, device="cpu")


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("block", [(32, 64), (128, 128), (16, 24)], ids=str)
def test_from_flex(name, block):
    mask = flex_mask(name, block=block)
    pattern = BlockPattern.from_flex(mask)
    assert torch.equal(pattern.to_token_mask(), flex_token_mask(mask))
    assert torch.equal(pattern.to_dense(), mask.to_dense())
    for field in ("kv_num_blocks", "kv_indices", "full_kv_num_blocks", "full_kv_indices"):
        assert getattr(pattern, field).data_ptr() == getattr(mask, field).data_ptr(), "the lists are used in place"
    sparsekit.check(pattern)


@pytest.mark.parametrize("name", MASKS)
def test_from_flex_with_causality_on_top(name):
    mask = flex_mask(name)
    for options in ({"causal": True}, {"window": (50, 20)}, {"causal": True, "window": (70, -1)}):
        pattern = BlockPattern.from_flex(mask, **options)
        assert torch.equal(pattern.to_token_mask(), flex_token_mask(mask) & band((200, 200), **options))
        sparsekit.check(pattern)


@pytest.mark.parametrize("name", MASKS)
def test_attention_takes_block_masks(name, seed):
    """Converted once: until its lists or its mask_mod change."""
    mask = flex_mask(name)
    query, key = torch.randn(2, 3, 200, 16), torch.randn(2, 3, 200, 16)
    out = sparsekit.block_sparse_attention(query, key, key, mask)
    expected, _ = reference.block_sparse_attention(query, key, key, BlockPattern.from_flex(mask))
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
    assert formats.as_pattern(mask) is formats.as_pattern(mask)


def test_conversion_is_repeated_when_the_mask_changes():
    mask = flex_mask("causal")
    first = formats.as_pattern(mask)
    mask.kv_num_blocks.clamp_(max=1)
    second = formats.as_pattern(mask)
    assert second is not first
    mask.mask_mod = MASKS["dilated"]
    third = formats.as_pattern(mask)
    assert third is not second and not torch.equal(third.partial_bits, second.partial_bits)
    mask.kv_indices = mask.kv_indices.clone()
    assert formats.as_pattern(mask) is not third


def test_conversions_do_not_keep_masks_alive():
    before = len(formats._converted)
    for _ in range(3):
        formats.as_pattern(flex_mask("window"))
    assert len(formats._converted) <= before + 1


def test_from_flex_evaluates_partial_blocks_only():
    seen = []

    def causal(b, h, q, k):
        seen.append(1)
        return q >= k

    mask = create_block_mask(causal, 1, 1, 1024, 1024, device="cpu", BLOCK_SIZE=64)
    pattern = BlockPattern.from_flex(mask)
    assert pattern.partial_bits.shape[0] == 16  # the diagonal of 16 x 16 blocks


def test_from_flex_without_mask_mod_has_no_bits():
    counts, indices = torch.tensor([[[1, 2]]], dtype=torch.int32), torch.tensor([[[[1, 0], [0, 1]]]], dtype=torch.int32)
    mask = BlockMask.from_kv_blocks(counts, indices, BLOCK_SIZE=16)
    pattern = BlockPattern.from_flex(mask)
    assert pattern.partial_bits is None and pattern.full_kv_indices is None
    assert torch.equal(pattern.to_dense(), mask.to_dense())


def test_from_flex_of_a_budget():
    """Lists shorter than the number of key blocks: the mask has to be told its length."""
    counts, indices = torch.tensor([[[1, 1]]], dtype=torch.int32), torch.tensor([[[[5], [2]]]], dtype=torch.int32)
    mask = BlockMask.from_kv_blocks(counts, indices, BLOCK_SIZE=16, compute_q_blocks=False, mask_mod=MASKS["causal"])
    pattern = BlockPattern.from_flex(mask, seq_lengths=(32, 96))
    assert pattern.to_dense().sum() == 2
    assert pattern.to_token_mask().sum() == 0  # keys 80 .. and 32 .. are past rows 0 .. and 16 ..


# ---- bits


@given(st.integers(1, 130), st.integers(0, 2**31 - 1))
def test_bits_round_trip(keys, seed):
    mask = torch.rand(3, 5, keys, generator=torch.Generator().manual_seed(seed)) < 0.5
    bits = pack_bits(mask)
    assert bits.dtype == torch.int32 and bits.shape == (3, 5, math.ceil(keys / 32))
    assert torch.equal(unpack_bits(bits, keys), mask)


def test_bits_layout():
    """Bit j % 32 of word j // 32 is key j: the contract with the kernels."""
    mask = torch.zeros(1, 70, dtype=torch.bool)
    mask[0, [0, 5, 31, 32, 69]] = True
    assert pack_bits(mask).tolist() == [[1 + 32 - 2**31, 1, 1 << 5]]


# ---- methods


@given(grids())
def test_slice_rows(grid):
    """Rows keep standing where they stood, also when the slice stops before the last row."""
    block_size, lengths, batch, heads, causal, window, seed = grid
    block_map = draw_map(block_size, lengths, batch, heads, seed)
    pattern = BlockPattern.from_bool(block_map, block_size, seq_lengths=lengths, causal=causal, window=window)
    rows, whole = block_map.shape[2], pattern.to_token_mask()
    generator = torch.Generator().manual_seed(seed)
    start, stop = sorted(torch.randint(0, rows + 1, (2,), generator=generator).tolist())
    part = pattern.slice_rows(start, stop)
    first, last = start * block_size[0], min(stop * block_size[0], lengths[0])
    assert torch.equal(part.to_token_mask(), whole[:, :, first:last])
    again = part.slice_rows(0, stop - start)
    assert torch.equal(again.to_token_mask(), whole[:, :, first:last])


def test_slices_attend_like_the_whole(seed):
    query, key = torch.randn(1, 2, 200, 16), torch.randn(1, 2, 230, 16)
    block_map = torch.rand(1, 2, 7, 8) < 0.6
    pattern = BlockPattern.from_bool(block_map, 32, seq_lengths=(200, 230), causal=True, window=(90, -1))
    whole = sparsekit.block_sparse_attention(query, key, key, pattern)
    for start, stop in ((0, 2), (2, 5), (5, 7)):
        part = sparsekit.block_sparse_attention(
            query[:, :, start * 32 : stop * 32], key, key, pattern.slice_rows(start, stop)
        )
        torch.testing.assert_close(part, whole[:, :, start * 32 : stop * 32])


@given(grids())
def test_transpose(grid):
    """CSR over key blocks of forward slots, ascending: every listed slot once, and nothing else."""
    block_size, lengths, batch, heads, causal, window, seed = grid
    block_map = draw_map(block_size, lengths, batch, heads, seed)
    pattern = BlockPattern.from_bool(block_map, block_size, seq_lengths=lengths, causal=causal, window=window)
    offsets, slots = pattern.transpose()
    full = pattern.full_kv_indices
    indices = pattern.kv_indices if full is None else torch.cat([pattern.kv_indices, full], -1)
    counts = [formats._lists.listed_slots(pattern.kv_num_blocks, pattern.kv_indices)]
    if full is not None:
        counts.append(formats._lists.listed_slots(pattern.full_kv_num_blocks, full))
    listed = torch.cat(counts, -1) & (indices >= 0)
    assert offsets.shape == (batch, heads, -(-lengths[1] // block_size[1]) + 1)
    assert slots.shape == (batch, heads, indices.shape[2] * indices.shape[3])
    for b in range(batch):
        for h in range(heads):
            flat = indices[b, h].flatten()
            found = [slots[b, h, a:z].tolist() for a, z in zip(offsets[b, h], offsets[b, h, 1:], strict=False)]
            want = [(listed[b, h].flatten() & (flat == n)).nonzero().flatten().tolist() for n in range(len(found))]
            assert found == want


def test_density_and_dense():
    block_map = torch.zeros(2, 1, 4, 4, dtype=torch.bool)
    block_map[0] = True
    pattern = BlockPattern.from_bool(block_map, 16)
    assert pattern.density() == 0.5
    assert pattern.to_dense().dtype == torch.int32
    causal = BlockPattern.from_bool(block_map, 16, causal=True)
    assert causal.density() == 10 / 32  # blocks above the diagonal are dropped


def test_is_a_pytree_and_can_be_copied(tmp_path):
    mask = flex_mask("causal")
    pattern = BlockPattern.from_flex(mask, causal=True)
    pattern.transpose()
    leaves, spec = pytree.tree_flatten(pattern)
    assert all(isinstance(leaf, torch.Tensor) for leaf in leaves)
    buffer = io.BytesIO()
    torch.save(pattern, buffer)
    buffer.seek(0)
    for other in (
        pytree.tree_unflatten(leaves, spec),
        pytree.tree_unflatten(leaves, pytree.treespec_loads(pytree.treespec_dumps(spec))),
        copy.deepcopy(pattern),
        pickle.loads(pickle.dumps(pattern)),
        torch.load(buffer, weights_only=True),
        pattern.to("cpu"),
        dataclasses.replace(pattern),
    ):
        assert torch.equal(other.to_token_mask(), pattern.to_token_mask())
        assert other.block_size == pattern.block_size and other.assumes == pattern.assumes
    with pytest.raises(dataclasses.FrozenInstanceError):
        pattern.causal = False
    meta = pattern.to("meta")
    assert meta.device.type == "meta" and repr(meta).startswith("BlockPattern(partial=")


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("options", [{}, {"causal": True}, {"causal": True, "window": (100, -1)}], ids=str)
def test_lists_are_built_without_waiting_for_the_device(options, seed):
    """And they are those of the CPU."""
    block_map = torch.rand(2, 3, 16, 20) < 0.4
    indices = torch.rand(2, 3, 16, 20).topk(6).indices
    lengths, on_gpu = (1000, 1280), (block_map.cuda(), indices.cuda())
    build = (
        lambda m, i: BlockPattern.from_bool(m, 64, seq_lengths=lengths, **options),
        lambda m, i: BlockPattern.from_indices(i, None, 64, seq_lengths=lengths, **options),
    )
    [make(*on_gpu).transpose() for make in build]  # whatever is done once
    torch.cuda.set_sync_debug_mode("error")
    try:
        patterns = [make(*on_gpu) for make in build]
        transposes = [pattern.transpose() for pattern in patterns]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for pattern, transpose, make in zip(patterns, transposes, build, strict=True):
        expected = make(block_map, indices)
        for got, want in zip(
            (*pytree.tree_leaves(pattern), *transpose),
            (*pytree.tree_leaves(expected), *expected.transpose()),
            strict=True,
        ):
            assert torch.equal(got.cpu(), want)


# ---- errors


def test_errors_name_the_argument():
    ones = torch.ones(1, 1, 4, 4, dtype=torch.bool)
    good = BlockPattern.from_bool(ones, 16)
    lists = {"kv_num_blocks": good.kv_num_blocks, "kv_indices": good.kv_indices}
    grid = dict(block_size=16, seq_lengths=(64, 64))
    for match, call in {
        "block_map: found shape": lambda: BlockPattern.from_bool(ones[0, 0, 0], 16),
        "block_map: found 4 query blocks of 16": lambda: BlockPattern.from_bool(ones, 16, seq_lengths=(80, 64)),
        "block_map: found 4 key blocks of 16": lambda: BlockPattern.from_bool(ones, 16, seq_lengths=(64, 48)),
        "seq_lengths: found None": lambda: BlockPattern.from_indices(good.kv_indices, None, 16, seq_lengths=None),
        "indices: found 4 query blocks": lambda: BlockPattern.from_indices(
            good.kv_indices, None, 16, seq_lengths=(100, 64)
        ),
        "cu_seqlens_q, cu_seqlens_k: found only one": lambda: BlockPattern.from_bool(
            ones, 16, cu_seqlens_q=torch.tensor([0, 64])
        ),
        "seq_lengths: found .*equal lengths": lambda: BlockPattern.from_documents(
            torch.tensor([0, 9]), 16, seq_lengths=(9, 10)
        ),
        "block_size: found": lambda: BlockPattern.from_bool(ones, (16, 16, 16)),
        "kv_num_blocks: found torch.int64": lambda: BlockPattern(good.kv_num_blocks.long(), good.kv_indices, **grid),
        "kv_indices: found shape": lambda: BlockPattern(good.kv_num_blocks, good.kv_indices[:, :, :2], **grid),
        "full_kv_num_blocks, full_kv_indices: found only one": lambda: BlockPattern(
            **lists, full_kv_indices=good.kv_indices, **grid
        ),
        "partial_bits, partial_bits_index: found only one": lambda: BlockPattern(
            **lists, partial_bits_index=good.kv_indices, **grid
        ),
        "partial_bits: found": lambda: BlockPattern(
            **lists, partial_bits=torch.zeros(1, 16, 2, dtype=torch.int32), partial_bits_index=good.kv_indices, **grid
        ),
        "slice_rows: found 1 .. 5": lambda: good.slice_rows(1, 5),
    }.items():
        with pytest.raises((ValueError, TypeError), match=match):
            call()


def test_calls_refuse_patterns_that_were_sorted_otherwise():
    """A block in the full list is not masked again, so the rows must stand where they stood when it was put there."""
    ones, cu_seqlens = torch.ones(1, 1, 4, 4, dtype=torch.bool), torch.tensor([0, 64], dtype=torch.int32)
    query, packed = torch.randn(1, 2, 64, 8), torch.randn(64, 2, 8)
    positions = torch.arange(64, dtype=torch.int32)[None]
    plain = BlockPattern.from_bool(ones, 16)
    causal = BlockPattern.from_bool(ones, 16, causal=True)
    positioned = BlockPattern.from_bool(ones, 16, causal=True, query_positions=positions)
    in_batch = BlockPattern.from_bool(ones, 16, causal=True, cu_seqlens_q=cu_seqlens, cu_seqlens_k=cu_seqlens)

    def attend(pattern, **options):
        return sparsekit.block_sparse_attention(query, query, query, pattern, **options)

    def attend_packed(pattern, **options):
        arguments = (packed, packed, packed, pattern, cu_seqlens, cu_seqlens, 64, 64)
        return sparsekit.block_sparse_attention_varlen(*arguments, **options)

    for good in (
        lambda: attend(plain),
        lambda: attend(plain, query_positions=positions),
        lambda: attend_packed(plain),
        lambda: attend(causal),
        lambda: attend(positioned, query_positions=positions),
        lambda: attend_packed(in_batch),
    ):
        assert good().isfinite().all()
    for match, bad in (
        ("query_positions, key_positions: .*without them", lambda: attend(causal, query_positions=positions)),
        ("query_positions, key_positions: .*the call has none", lambda: attend(positioned)),
        ("build it with cu_seqlens_q=", lambda: attend_packed(causal)),
        ("block_sparse_attention_varlen takes", lambda: attend(in_batch)),
        (r"found seq_lengths \(64, 64\)", lambda: sparsekit.block_sparse_attention(*[query[:, :, :60]] * 3, plain)),
        ("query, key: found shapes", lambda: sparsekit.block_sparse_attention(packed, packed, packed, plain)),
    ):
        with pytest.raises(ValueError, match=match):
            bad()
    with pytest.raises(TypeError, match="pattern: found Tensor"):
        attend(ones)


def test_check_finds_what_kernels_skip(device):
    counts = torch.tensor([[[2, 2]]], dtype=torch.int32, device=device)
    query = torch.randn(1, 1, 32, 64, device=device)

    def pattern(*rows):
        indices = torch.tensor([[rows]], dtype=torch.int32, device=device)
        return BlockPattern(counts, indices, block_size=16, seq_lengths=(32, 32))

    sparsekit.check(pattern([0, 1], [1, -1]), query=query, key=query)
    for match, bad in {
        r"kv_indices\[0, 0, 1, 0\] is 2": pattern([0, 1], [2, 0]),
        r"lists twice": pattern([0, 1], [1, 1]),
        r"kv_num_blocks\[0, 0, 0\] is 2": pattern([0], [1]),
    }.items():
        with pytest.raises(RuntimeError, match=match):
            sparsekit.check(bad)
    sparsekit.check(pattern([0, 1], [1, 1]), duplicates=False)
    with pytest.raises(ValueError, match="seq_lengths"):
        sparsekit.check(pattern([0, 1], [1, 0]), query=query[:, :, :30], key=query)


def test_environment_variable_checks_every_call(device, monkeypatch):
    counts = torch.tensor([[[2]]], dtype=torch.int32, device=device)
    indices = torch.tensor([[[[0, 0]]]], dtype=torch.int32, device=device)
    pattern = BlockPattern(counts, indices, block_size=64, seq_lengths=(64, 64))
    query = torch.randn(1, 1, 64, 64, device=device)
    sparsekit.block_sparse_attention(query, query, query, pattern)
    monkeypatch.setenv("SPARSEKIT_CHECK", "1")
    with pytest.raises(RuntimeError, match="lists twice"):
        sparsekit.block_sparse_attention(query, query, query, pattern)
    monkeypatch.setenv("SPARSEKIT_CHECK", "0")
    sparsekit.block_sparse_attention(query, query, query, pattern)


def test_threads_share_a_pattern(seed):
    """Conversion, transpose and calls from several threads at once."""
    mask = flex_mask("causal")
    query = torch.randn(2, 3, 200, 16, requires_grad=True)
    expected = sparsekit.block_sparse_attention(query, query, query, BlockPattern.from_flex(mask))
    results = []

    def work():
        out = sparsekit.block_sparse_attention(query, query, query, mask)
        torch.autograd.grad(out.sum(), query)
        results.append(out)

    threads = [threading.Thread(target=work) for _ in range(4)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert len(results) == 4 and all(torch.equal(out, expected) for out in results)
