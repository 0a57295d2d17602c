"""Random block-sparse weights with their dense twins, and the products in float64 from their definitions: nothing here is
shared with the library."""

import dataclasses

import torch
from torch.utils import _pytree as pytree

from sparsekit import BlockSparseMatrix

ACTIVATIONS = {
    None: lambda x: x,
    "relu": torch.relu,
    "gelu": torch.nn.functional.gelu,
    "gelu_tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
    "silu": torch.nn.functional.silu,
}


@dataclasses.dataclass
class Weight:
    matrix: BlockSparseMatrix
    dense: torch.Tensor  # float64, scales included


def random_weight(
    shape, block_size, density=0.5, dtype=torch.float32, *, integers=False, order="sorted", index=torch.int32
) -> Weight:
    """Blocks at random places; what they hold beyond the matrix is NaN (127 of int8)."""
    (rows, columns), (R, C) = shape, block_size
    grid = (-(-rows // R), -(-columns // C))
    keep = torch.rand(grid) < density
    at = keep.nonzero()
    if order == "shuffled":
        at = at[torch.randperm(len(at))]
        at = at[at[:, 0].argsort(stable=True)]
    crow = torch.zeros(grid[0] + 1, dtype=index)
    crow[1:] = keep.sum(1).cumsum(0)
    if dtype == torch.int8:
        values = torch.randint(-127, 128, (len(at), R, C), dtype=torch.int8)
    elif integers:
        values = torch.randint(-2, 3, (len(at), R, C)).to(dtype)
    else:
        values = torch.randn(len(at), R, C).to(dtype)
    dense = torch.zeros(grid[0] * R, grid[1] * C, dtype=torch.float64)
    for block, (i, j) in zip(values, at.tolist(), strict=True):
        dense[i * R : (i + 1) * R, j * C : (j + 1) * C] += block.double()
        for place, size, step in ((0, rows - i * R, R), (1, columns - j * C, C)):
            if size < step:
                block.narrow(place, size, step - size).fill_(127 if dtype == torch.int8 else torch.nan)
    dense = dense[:rows, :columns]
    scales = None
    if dtype == torch.int8:
        scales = torch.rand(rows) / 100 + 0.001
        dense = dense * scales.double()[:, None]
    matrix = BlockSparseMatrix(values, crow, at[:, 1].to(index).contiguous(), scales, shape=(rows, columns))
    return Weight(matrix, dense)


def rounded_tokens(x: torch.Tensor) -> torch.Tensor:
    """float64 of x `[tokens, features]` rounded to 8 bits per token, as int8 weights want it."""
    most = x.abs().amax(-1, keepdim=True).float()
    inverse = torch.where(most > 0, torch.full_like(most, 127.0) / most, 0.0)
    return torch.round(x.float() * inverse).double() * (most.double() / 127)


def blocks_of(dense: torch.Tensor, matrix: BlockSparseMatrix) -> torch.Tensor:
    """`[nnz, R, C]`, the blocks of a dense matrix at the places of a sparse one; 0 beyond its edge."""
    R, C = matrix.block_size
    blocks = torch.zeros(matrix.nnz, R, C, dtype=dense.dtype)
    crow = matrix.crow_indices.tolist()
    for i in range(len(crow) - 1):
        for p in range(crow[i], crow[i + 1]):
            j = int(matrix.col_indices[p])
            piece = dense[i * R : (i + 1) * R, j * C : (j + 1) * C]
            blocks[p, : piece.shape[0], : piece.shape[1]] = piece
    return blocks


def move(tree, device: str):
    """Tensors (and matrices of them) on another device, with the strides and the place in their storage that they have."""

    def moved(tensor):
        if not isinstance(tensor, torch.Tensor) or tensor.device.type == device:
            return tensor
        if tensor.layout != torch.strided or tensor.requires_grad:
            return tensor.to(device)
        numbers = tensor.untyped_storage().nbytes() // tensor.element_size()
        whole = tensor.as_strided((numbers,), (1,), 0).to(device)
        return whole.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())

    return pytree.tree_map(moved, tree)
