"""Block-sparse products on the CPU, at the sizes where its kernels go ways of their own. test_matmul.py has the rest."""

import pytest
import torch

import test_matmul
from numerics import assert_passes
from sparse_weights import blocks_of, random_weight, rounded_tokens
from sparsekit import block_sddmm, block_sparse_linear, block_sparse_mm
from test_matmul import BLOCKS, FLOATS

level = test_matmul.cpu_level  # a fixture: on every instruction set of this processor


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_few_tokens(level, dtype, seed):
    """One to four tokens have a kernel of their own. Small integers, whose sums are exact: whole matrices and ragged ones,
    long rows, every way x can lie."""
    for block_size in (*BLOCKS, (8, 1), (20, 1), (2, 2), (3, 24), (40, 40)):
        R, C = block_size
        for shape in ((3 * R, 37 * C), (2 * R + seed % R, 700 + seed % 40), (R, 7000 if R < 10 else 900)):
            weight = random_weight(shape, block_size, 0.4, dtype, integers=True, order="shuffled")
            tokens = 1 + (seed + R + C + shape[0]) % 4
            x = torch.randint(-2, 3, (tokens, shape[1])).to(dtype)
            want = (x.double() @ weight.dense.t()).to(dtype)
            apart = torch.full((tokens, 2 * shape[1] + 3), torch.nan, dtype=dtype)[:, 1 : shape[1] + 1]
            apart.copy_(x)
            for layout in (x, apart, x.t().contiguous().t()):
                assert torch.equal(block_sparse_linear(layout, weight.matrix), want)
                assert torch.equal(block_sparse_mm(weight.matrix, layout.t()), want.t())
            bias = torch.randint(-2, 3, (shape[0],)).to(dtype)
            got = block_sparse_linear(x, weight.matrix, bias, "relu")
            assert torch.equal(got, (x.double() @ weight.dense.t() + bias.double()).relu().to(dtype))


def test_large_outputs(level, seed):
    """Beyond the caches results are written another way. Exact, as above."""
    for dtype, block_size in ((torch.float32, (64, 32)), (torch.bfloat16, (64, 64)), (torch.bfloat16, (8, 8))):
        weight = random_weight((4096, 64), block_size, 0.5, dtype, integers=True)
        x = torch.randint(-2, 3, (270 + seed % 16, 64)).to(dtype)
        want = (x.double() @ weight.dense.t()).to(dtype)
        assert torch.equal(block_sparse_linear(x, weight.matrix), want)
        assert torch.equal(
            block_sparse_linear(x, weight.matrix, torch.ones(4096, dtype=dtype), "relu"), (want + 1).relu()
        )
        y = torch.randint(-2, 3, (20, 4096)).to(dtype)
        pattern = random_weight((1056, 1120), (32, 32), 1.0, dtype, integers=True).matrix
        a, b = torch.randint(-2, 3, (1056, 20)).to(dtype), torch.randint(-2, 3, (20, 1120)).to(dtype)
        assert torch.equal(block_sddmm(a, b, pattern), blocks_of((a.double() @ b.double()).to(dtype), pattern))
        assert torch.equal(
            block_sparse_linear(y, weight.matrix, transposed=True), (y.double() @ weight.dense).to(dtype)
        )


@pytest.mark.parametrize("dtype", FLOATS[:2], ids=str)
def test_low_blocks(level, dtype, seed):
    """Blocks of few rows, seen from either side, go through ordered columns by chunks. Exact, as above."""
    for block_size in ((1, 16), (2, 8), (2, 2), (4, 1), (8, 8), (8, 1), (3, 4)):
        shape = (70 + seed % 8, 1100 + seed % 2 * 4)
        weight = random_weight(shape, block_size, 0.4, dtype, integers=True)
        x = torch.randint(-2, 3, (150, shape[1])).to(dtype)
        want = (x.double() @ weight.dense.t()).to(dtype)
        assert torch.equal(block_sparse_linear(x, weight.matrix), want)
        weight = random_weight(shape[::-1], block_size[::-1], 0.4, dtype, integers=True)
        assert torch.equal(
            block_sparse_linear(x, weight.matrix, transposed=True), (x.double() @ weight.dense).to(dtype)
        )


def test_int8_long_rows(level, seed):
    """Columns in several chunks, in any order; tokens or features contiguous."""
    for block_size in ((4, 1), (16, 1), (5, 1)):
        for order in ("sorted", "shuffled"):
            weight = random_weight((22, 9001), block_size, 0.3, torch.int8, order=order, index=torch.int64)
            x = torch.randn(70, 9001)
            want = rounded_tokens(x) @ weight.dense.t()
            for layout in (x, x.t().contiguous().t()):
                got = block_sparse_linear(layout, weight.matrix)
                assert_passes(f"{block_size} {order}", got, want, [want.float()], torch.float32)
