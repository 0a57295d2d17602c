"""Block lists: built from boolean maps, transposed, and checked, against models in NumPy."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from backends import BACKENDS
from problems import problems, sanitized
from sparsekit.bench.cases import AttentionCase, make_inputs

OPS = torch.ops.sparsekit
DEVICES = [
    pytest.param(name, marks=[pytest.mark.cuda] if name == "cuda" else [])
    for name in sorted({backend.device for backend in BACKENDS})
]


@pytest.fixture(params=DEVICES, scope="session")
def device(request) -> str:
    return request.param


def lists_of(pattern) -> tuple:
    return pattern.kv_num_blocks, pattern.kv_indices, pattern.full_kv_num_blocks, pattern.full_kv_indices


# ---- from a boolean map


@pytest.mark.parametrize("columns", sanitized([0, 1, 31, 32, 33, 64, 100, 1025], 33, 1025))
@pytest.mark.parametrize("density", [0.0, 0.1, 0.9, 1.0])
def test_block_lists_from_bool(device, columns, density):
    block_map = torch.rand(2, 3, 7, columns) < density
    for capacity in {columns, columns // 2, columns + 5, 0}:
        counts, indices = (x.cpu() for x in OPS.block_lists_from_bool(block_map.to(device), capacity))
        assert counts.dtype == indices.dtype == torch.int32 and indices.shape == (2, 3, 7, capacity)
        rows = (x.flatten(0, 2) for x in (block_map, counts, indices))
        for row, count, slots in zip(*rows, strict=True):
            want = np.flatnonzero(row.numpy())[:capacity]
            assert count == len(want) and slots.tolist() == [*want, *[-1] * (capacity - len(want))]


def test_block_lists_from_bool_of_a_view(device):
    wide = torch.rand(2, 3, 40, 50, device=device) < 0.5
    for view in (wide.transpose(2, 3), wide[:, :, ::2, 5:], wide[:, :1].expand(-1, 3, -1, -1)):
        got = OPS.block_lists_from_bool(view, view.shape[-1])
        want = OPS.block_lists_from_bool(view.contiguous(), view.shape[-1])
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


# ---- transposed


def transposed(inputs) -> tuple[np.ndarray, np.ndarray]:
    """offsets and slots of every list head, entry by entry."""
    case, block = inputs.case, inputs.pattern.block_size
    lists = [x.cpu().numpy() for x in lists_of(inputs.pattern)]
    batch, heads, rows, capacity = lists[1].shape
    per_row = capacity + lists[3].shape[-1]
    blocks = case.len_k // block[1] + len(case.sequences) if case.packed else -(-case.len_k // block[1])
    offsets, slots = np.zeros((batch, heads, blocks + 1), int), np.full((batch, heads, rows * per_row), -1)
    for b, h in np.ndindex(batch, heads):
        found = [[] for _ in range(blocks)]
        row = first = 0
        for len_q, len_k in case.sequences:
            start, row = row, row + -(-len_q // block[0])
            for m in range(start, row):
                for counts, indices, shift in ((*lists[:2], 0), (*lists[2:], capacity)):
                    for s, n in enumerate(indices[b, h, m, : max(counts[b, h, m], 0)]):
                        if 0 <= n < -(-len_k // block[1]):
                            found[first + n].append(m * per_row + shift + s)
            first += -(-len_k // block[1])
        offsets[b, h] = np.cumsum([0, *map(len, found)])
        slots[b, h, : offsets[b, h, -1]] = [slot for of_block in found for slot in sorted(of_block)]
    return offsets, slots


def check_transpose(device, inputs):
    packed = (inputs.cu_seqlens_q, inputs.cu_seqlens_k)
    arguments = [x if x is None else x.to(device) for x in (*lists_of(inputs.pattern), *packed)]
    got = OPS.transpose_block_lists(*arguments[:4], inputs.pattern.block_size, inputs.case.len_k, *arguments[4:])
    for name, value, want in zip(("offsets", "slots"), got, transposed(inputs), strict=True):
        assert value.dtype == torch.int32 and value.is_contiguous()
        np.testing.assert_array_equal(value.cpu().numpy(), want, err_msg=name)


@settings(max_examples=40)
@given(problem=st.one_of(problems(), problems(packed=True)))
def test_transpose(device, problem):
    case, seed, _ = problem
    check_transpose(device, make_inputs(case.with_(seed=seed)))


@pytest.mark.sanitizer
def test_transpose_leaves_out_bad_entries(device):
    """Out of range, -1, past the count, counts that are too large or negative: nothing is written out of bounds."""
    case = AttentionCase(heads_q=3, heads_kv=3, len_q=640, len_k=700, head_dim=8, block_size=(64, 64), density=0.7)
    inputs = make_inputs(case)
    pattern = inputs.pattern
    for indices in (pattern.kv_indices, pattern.full_kv_indices):
        bad = torch.rand(indices.shape) < 0.3
        indices[bad] = torch.tensor([-1, -7, 11, 2**31 - 1, -(2**31)], dtype=torch.int32)[
            torch.randint(0, 5, (int(bad.sum()),))
        ]
    pattern.kv_num_blocks[0, 0, :3] = torch.tensor([2**31 - 1, -5, 100], dtype=torch.int32)
    check_transpose(device, inputs)


def test_transpose_of_many_rows(device):
    """More rows than a device handles in one pass."""
    case = AttentionCase(
        heads_q=2, heads_kv=2, len_q=16 * 5000, len_k=16 * 300, head_dim=8, block_size=(16, 16), density=0.02
    )
    check_transpose(device, make_inputs(case))


# ---- checked


def check_lists(partial, full=None, len_k=64 * 5, **options):
    def tensors(rows):
        indices = torch.tensor(rows, dtype=torch.int32)[None, None]
        return torch.full(indices.shape[:3], indices.shape[3], dtype=torch.int32), indices

    lists = (*tensors(partial), *(tensors(full) if full else (None, None)))
    OPS.check_block_lists(*lists, None, None, (64, 64), len_k, **options)


def test_check_accepts_what_is_right():
    check_lists([[0, 4, 2], [-1, 1, -1]])
    check_lists([[0, 4, 2], [-1, 1, -1]], full=[[1, 3], [0, -1]])
    check_lists([[0, 0]], duplicates=False)


@pytest.mark.parametrize("partial, full, message", [
    ([[0, 1], [2, 5]], None, r"kv_indices\[0, 0, 1, 1\] is 5; supported: -1 \(empty\) or a key block from 0 to 4"),
    ([[0, -3]], None, r"kv_indices\[0, 0, 0, 1\] is -3"),
    ([[0, 1]], [[7, 2]], r"full_kv_indices\[0, 0, 0, 0\] is 7"),
    ([[0, 1, 0]], None, r"kv_indices\[0, 0, 0, 2\] is 0, a block that this row lists twice"),
    ([[0, 1]], [[3, 1]], r"full_kv_indices\[0, 0, 0, 1\] is 1, a block that this row lists twice"),
    ([[0, 1]], [[3, 3]], r"full_kv_indices\[0, 0, 0, 1\] is 3, a block that this row lists twice"),
])  # fmt: skip
def test_check_names_the_first_bad_entry(partial, full, message):
    with pytest.raises(RuntimeError, match=message):
        check_lists(partial, full)


def test_check_names_a_bad_count():
    counts, indices = torch.tensor([[[2, 3]]], dtype=torch.int32), torch.zeros(1, 1, 2, 2, dtype=torch.int32)
    with pytest.raises(RuntimeError, match=r"kv_num_blocks\[0, 0, 1\] is 3; supported: 0 to 2"):
        OPS.check_block_lists(counts, indices, None, None, None, None, (64, 64), 640, duplicates=False)


def test_check_counts_blocks_inside_a_sequence():
    """Block 1 of a sequence of one block is out of range, though the packed tensor goes on."""
    cu_q, cu_k = (torch.tensor(offsets, dtype=torch.int32) for offsets in ((0, 64, 128), (0, 64, 300)))
    check_lists([[0], [3]], len_k=300, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k)
    with pytest.raises(RuntimeError, match=r"kv_indices\[0, 0, 0, 0\] is 1; .* from 0 to 0"):
        check_lists([[1], [3]], len_k=300, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k)
