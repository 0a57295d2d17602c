"""Sparse weights: `BlockSparseMatrix` (blocks of any size, in the tensors of torch.sparse_bsr) and `NMGMatrix` (n:m:g).

Both are plain tensors inside: pytree nodes whose leaves are tensors, which pass through torch.compile and torch.export,
move with `.to()` and take gradients on `values`. docs/matmul.md shows the layouts and says which to use when.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .formats import capturing

__all__ = ["BlockSparseMatrix", "NMGMatrix"]

_ops = torch.ops.sparsekit
_TRANSPOSE = ("ccol_indices", "row_indices", "entries")


class _Container:
    """What both matrices share: all fields but the last, `shape`, are tensors or None."""

    def _map(self, function: Callable[[Tensor], Tensor]):
        return pytree.tree_map(lambda leaf: function(leaf) if isinstance(leaf, Tensor) else leaf, self)

    def to(self, device: torch.device | str | int):
        """The same matrix on another device."""
        return self._map(lambda tensor: tensor.to(device))

    def requires_grad_(self, requires_grad: bool = True):
        """Sets whether `values` take gradients, in place."""
        self.values.requires_grad_(requires_grad)
        return self

    def detach(self):
        return dataclasses.replace(self, values=self.values.detach())

    @property
    def dtype(self) -> torch.dtype:
        return self.values.dtype

    @property
    def device(self) -> torch.device:
        return self.values.device

    def __repr__(self) -> str:
        grad = ", requires_grad=True" if self.values.requires_grad else ""
        return f"{type(self).__name__}({tuple(self.shape)}, {self._layout()}, {self.dtype}, {self.device}{grad})"


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class BlockSparseMatrix(_Container):
    """A matrix of blocks, most of which are zero and not stored.

    Build one with `from_dense` or `from_bsr`; the constructor takes finished tensors, as they are.

    Attributes:
        values: `[nnz, R, C]`: float32, float16, bfloat16 (on the CPU also float64, slowly), or int8 with scales.
        crow_indices: int32 or int64 `[ceil(rows / R) + 1]`: block row i holds the blocks crow[i] to crow[i + 1] - 1.
        col_indices: the same dtype, `[nnz]`: where a block stands, in units of C. A row's columns may be in any order;
            a block that is listed twice counts twice.
        scales: float32 `[rows]` for int8 values: row n is scales[n] * values. Else None.
        ccol_indices, row_indices, entries: the pattern seen from its columns, as `transposed_pattern()` returns it, or
            None. Values are never copied for it.
        shape: (rows, columns), not necessarily multiples of the block: what a block holds beyond them is padding that
            reaches nothing.
    """

    values: Tensor
    crow_indices: Tensor
    col_indices: Tensor
    scales: Tensor | None = None
    ccol_indices: Tensor | None = None
    row_indices: Tensor | None = None
    entries: Tensor | None = None
    shape: tuple[int, int] = dataclasses.field(kw_only=True)

    def __post_init__(self):
        object.__setattr__(self, "shape", (self.shape[0], self.shape[1]))
        if self.values.dim() != 3:
            raise ValueError(f"values: found shape {tuple(self.values.shape)}, supported is [blocks, R, C]")
        for name in ("crow_indices", "col_indices"):
            indices = getattr(self, name)
            if indices.dtype not in (torch.int32, torch.int64) or indices.dim() != 1:
                raise TypeError(f"{name}: found {indices.dtype} {tuple(indices.shape)}, supported is int32, int64 [n]")
        if (self.scales is None) != (self.values.dtype != torch.int8):
            raise TypeError("scales: int8 values need them, and other values have none")

    # ---- constructors

    @classmethod
    def from_bsr(cls, matrix: Tensor) -> BlockSparseMatrix:
        """Of a `torch.sparse_bsr` tensor, without copying values. int64 indices become int32 where they fit.

        Gradients reach `matrix` as dense tensors: that is all torch accumulates for sparse_bsr parameters. Make the
        BlockSparseMatrix the parameter (`requires_grad_()`) to have them as blocks.
        """
        if matrix.layout != torch.sparse_bsr:
            raise TypeError(f"matrix: found layout {matrix.layout}, supported is torch.sparse_bsr")
        if matrix.dim() != 2 or matrix.values().dim() != 3:
            raise ValueError(f"matrix: found shape {tuple(matrix.shape)}, supported is a single matrix (no batch)")
        crow, col = matrix.crow_indices(), matrix.col_indices()
        if crow.dtype == torch.int64 and matrix.values().shape[0] < 2**31 and max(matrix.shape) < 2**31:
            crow, col = crow.to(torch.int32), col.to(torch.int32)
        leaf = matrix.requires_grad and matrix.is_leaf
        values = _LeafValues.apply(matrix) if leaf else matrix.values()
        return cls(values, crow, col, shape=tuple(matrix.shape))

    @classmethod
    def from_dense(
        cls, dense: Tensor, block_size: int | tuple[int, int], *, keep: Tensor | None = None
    ) -> BlockSparseMatrix:
        """The blocks of a dense matrix that `keep` marks, by default those that are not zero. Waits for the device.

        Args:
            dense: `[rows, columns]`, any sizes.
            block_size: (R, C), or one number for both; 1 to 1024.
            keep: bool `[ceil(rows / R), ceil(columns / C)]`.
        """
        block_size = _pair(block_size)
        rows, columns = dense.shape
        blocks = _cut(dense, block_size)
        keep = (blocks != 0).any(-1).any(-1) if keep is None else keep.to(torch.bool)
        if keep.shape != blocks.shape[:2]:
            raise ValueError(f"keep: found shape {tuple(keep.shape)}, supported is {tuple(blocks.shape[:2])}")
        crow = torch.zeros(keep.shape[0] + 1, dtype=torch.int32, device=dense.device)
        crow[1:] = keep.sum(1).cumsum(0)
        at = keep.nonzero()
        values = blocks[at[:, 0], at[:, 1]].contiguous()
        return cls(values, crow, at[:, 1].to(torch.int32), shape=(rows, columns))

    # ---- other forms

    @property
    def block_size(self) -> tuple[int, int]:
        return (self.values.shape[1], self.values.shape[2])

    @property
    def nnz(self) -> int:
        """Stored blocks."""
        return self.values.shape[0]

    @property
    def density(self) -> float:
        """Stored numbers over all numbers."""
        return self.values.numel() / max(1, self.shape[0] * self.shape[1])

    def block_rows(self) -> Tensor:
        """`[nnz]`, the block row of each block."""
        counts = self.crow_indices.diff()
        rows = torch.arange(counts.shape[0], device=counts.device)
        return torch.repeat_interleave(rows, counts.long(), output_size=self.nnz)

    def to_dense(self) -> Tensor:
        """`[rows, columns]`, differentiable. int8 values times their scales: float32."""
        (rows, columns), (R, C) = self.shape, self.block_size
        grid = (self.crow_indices.shape[0] - 1, -(-columns // C))
        values = self.values.float() if self.scales is not None else self.values
        blocks = values.new_zeros(grid[0] * grid[1], R, C)
        blocks = blocks.index_add(0, self.block_rows() * grid[1] + self.col_indices.long(), values)
        dense = blocks.view(*grid, R, C).permute(0, 2, 1, 3).reshape(grid[0] * R, grid[1] * C)[:rows, :columns]
        return dense if self.scales is None else dense * self.scales[:, None]

    def to_bsr(self) -> Tensor:
        """A `torch.sparse_bsr` tensor that shares `values`; for int8 of values times scales."""
        if any(size % block for size, block in zip(self.shape, self.block_size, strict=True)):
            raise ValueError(f"shape: found {self.shape}, torch.sparse_bsr takes multiples of {self.block_size}")
        values = self.values
        if self.scales is not None:
            values = values * self.scales.view(-1, self.block_size[0])[self.block_rows()][:, :, None]
        return torch.sparse_bsr_tensor(self.crow_indices, self.col_indices, values, self.shape, check_invariants=False)

    def quantized(self) -> BlockSparseMatrix:
        """int8 values with a scale per row, max|row| / 127: products with it round their input per token, too."""
        rows = self.block_rows()
        most = self.values.detach().float().abs().amax(2)  # [nnz, R]
        largest = most.new_zeros(self.crow_indices.shape[0] - 1, self.block_size[0])
        largest = largest.index_reduce(0, rows, most, "amax")
        scales = torch.where(largest > 0, largest / 127, 1.0)
        values = (self.values.detach().float() / scales[rows][:, :, None]).round().clamp(-127, 127).to(torch.int8)
        return dataclasses.replace(self, values=values, scales=scales.flatten()[: self.shape[0]].contiguous())

    def with_values(self, values: Tensor) -> BlockSparseMatrix:
        """The same pattern with other values."""
        return dataclasses.replace(self, values=values)

    # ---- the pattern seen from its columns

    def transposed_pattern(self) -> tuple[Tensor, Tensor, Tensor]:
        """(ccol_indices, row_indices, entries): block column j holds the blocks entries[ccol[j] : ccol[j + 1]], which
        stand in the block rows row_indices[...]. Computed at the first call and kept (inside torch.compile, and while a
        CUDA graph is captured: computed in the graph)."""
        if self.ccol_indices is not None:
            return tuple(getattr(self, name) for name in _TRANSPOSE)
        columns = -(-self.shape[1] // self.values.shape[2])
        pattern = _ops.transpose_block_sparse(self.crow_indices, self.col_indices, columns)
        if not torch.compiler.is_compiling() and not capturing(self.col_indices):
            for name, tensor in zip(_TRANSPOSE, pattern, strict=True):
                object.__setattr__(self, name, tensor)
        return pattern

    def check(self) -> None:
        """Raises with the first index that is out of range or out of order, or a block that is listed twice. Waits for
        the device. Products on the CPU make the first of these checks at every call."""
        columns = -(-self.shape[1] // self.block_size[1])
        _ops.check_block_sparse(self.crow_indices.cpu(), self.col_indices.cpu(), columns)
        place = self.block_rows().long() * columns + self.col_indices.long()
        ordered, order = place.sort(stable=True)
        twice = (ordered.diff() == 0).nonzero()
        if twice.numel():
            block = int(order[twice[0, 0] + 1])
            raise ValueError(
                f"col_indices[{block}] is {int(self.col_indices[block])}, which block row "
                f"{int(self.block_rows()[block])} lists before; supported: each block once"
            )

    def __matmul__(self, dense: Tensor) -> Tensor:
        from .matmul import block_sparse_mm

        return block_sparse_mm(self, dense)

    def _layout(self) -> str:
        return f"{self.nnz} blocks of {self.block_size[0]} x {self.block_size[1]}"


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class NMGMatrix(_Container):
    """n:m:g: of every m columns, n are kept; g consecutive rows keep the same ones.

    The layout, for `[rows, columns]` with rows a multiple of g and columns of m:

        values   [rows / g, columns / m, n, g]     values[i, j, s, r] stands in row i * g + r
        indices  [rows / g, columns / m, n]        and column j * m + indices[i, j, s]; uint8, 0 to m - 1, each once

    which is a BSR matrix of g x 1 blocks with as many in each row, and runs as one. n:m sparsity is g = 1; larger g
    shares each column of the input among g rows, which is what makes it fast (8 or more).

    Source: Ivanov et al., STen (arXiv 2304.07613), section 5, whose layout orders columns by pattern instead of
    storing indices.
    """

    values: Tensor
    indices: Tensor
    col_indices: Tensor | None = None  # int32 [nnz], derived from `indices`
    m: int = dataclasses.field(kw_only=True)

    def __post_init__(self):
        shape = tuple(self.values.shape)
        if self.values.dim() != 4 or self.indices.shape != self.values.shape[:3]:
            raise ValueError(
                f"values, indices: found shapes {shape}, {tuple(self.indices.shape)}, supported are "
                "[rows / g, columns / m, n, g], [rows / g, columns / m, n]"
            )
        if self.indices.dtype != torch.uint8:
            raise TypeError(f"indices: found {self.indices.dtype}, supported is uint8")
        if not 1 <= self.m <= 256 or self.values.shape[2] > self.m:
            raise ValueError(f"m: found {self.m} for n = {self.values.shape[2]}, supported are n to 256")

    @classmethod
    def from_dense(cls, dense: Tensor, n: int, m: int, g: int) -> NMGMatrix:
        """Keeps, of every m columns of every g rows, the n columns with the largest sum of magnitudes."""
        rows, columns = dense.shape
        if rows % g or columns % m:
            raise ValueError(f"dense: found shape {tuple(dense.shape)}, supported are multiples of g = {g}, m = {m}")
        grouped = dense.view(rows // g, g, columns // m, m).permute(0, 2, 3, 1)  # [rows / g, columns / m, m, g]
        indices = grouped.detach().float().abs().sum(-1).topk(n, dim=-1).indices.sort(-1).values
        values = grouped.gather(2, indices[..., None].expand(-1, -1, -1, g)).contiguous()
        return cls(values, indices.to(torch.uint8), m=m)

    @property
    def shape(self) -> tuple[int, int]:
        return (self.values.shape[0] * self.values.shape[3], self.values.shape[1] * self.m)

    @property
    def n(self) -> int:
        return self.values.shape[2]

    @property
    def g(self) -> int:
        return self.values.shape[3]

    @property
    def density(self) -> float:
        return self.n / self.m

    def to_block_sparse(self) -> BlockSparseMatrix:
        """The same matrix as g x 1 blocks, sharing `values`: what products run. Indices are derived once and kept."""
        groups, chunks, n, g = self.values.shape
        col = self.col_indices
        if col is None:
            first = torch.arange(chunks, dtype=torch.int32, device=self.values.device)[:, None] * self.m
            col = (first + self.indices.to(torch.int32)).reshape(-1)
            if not torch.compiler.is_compiling() and not capturing(col):
                object.__setattr__(self, "col_indices", col)
        crow = torch.arange(groups + 1, dtype=torch.int32, device=self.values.device) * (chunks * n)
        return BlockSparseMatrix(self.values.reshape(groups * chunks * n, g, 1), crow, col, shape=self.shape)

    def to_dense(self) -> Tensor:
        """`[rows, columns]`, differentiable."""
        groups, chunks, n, g = self.values.shape
        dense = self.values.new_zeros(groups, chunks, self.m, g)
        dense = dense.scatter(2, self.indices.long()[..., None].expand(-1, -1, -1, g), self.values)
        return dense.permute(0, 3, 1, 2).reshape(self.shape)

    def with_values(self, values: Tensor) -> NMGMatrix:
        return dataclasses.replace(self, values=values)

    def __matmul__(self, dense: Tensor) -> Tensor:
        return self.to_block_sparse() @ dense

    def _layout(self) -> str:
        return f"{self.n}:{self.m}:{self.g}"


class _LeafValues(torch.autograd.Function):
    """values() of a sparse_bsr leaf, whose own derivative makes a gradient that torch cannot accumulate."""

    @staticmethod
    def forward(ctx, matrix):
        ctx.save_for_backward(matrix.crow_indices(), matrix.col_indices())
        ctx.shape = matrix.shape
        return matrix.values().detach()

    @staticmethod
    def backward(ctx, grad):
        return torch.sparse_bsr_tensor(*ctx.saved_tensors, grad, ctx.shape, check_invariants=False).to_dense()


def _pair(size: int | tuple[int, int]) -> tuple[int, int]:
    first, second = (size, size) if isinstance(size, int) else size
    if not (1 <= first <= 1024 and 1 <= second <= 1024):
        raise ValueError(f"block_size: found {size}, supported are 1 to 1024")
    return first, second


def _cut(dense: Tensor, block_size: tuple[int, int]) -> Tensor:
    """`[rows / R, columns / C, R, C]`, filled up with zeros."""
    (rows, columns), (R, C) = dense.shape, block_size
    dense = torch.nn.functional.pad(dense, (0, -columns % C, 0, -rows % R))
    return dense.view(-(-rows // R), R, -(-columns // C), C).permute(0, 2, 1, 3)


# ---- pytree: tensors are leaves, the rest is context; unflattening checks nothing, leaves may be anything


def _register(cls, context_name: str) -> None:
    names = tuple(field.name for field in dataclasses.fields(cls) if field.name != context_name)

    def flatten(matrix):
        given = tuple(name for name in names if getattr(matrix, name) is not None)
        return [getattr(matrix, name) for name in given], (given, getattr(matrix, context_name))

    def flatten_with_keys(matrix):
        leaves, context = flatten(matrix)
        return [(pytree.GetAttrKey(name), leaf) for name, leaf in zip(context[0], leaves, strict=True)], context

    def unflatten(leaves, context):
        matrix = object.__new__(cls)
        for name, value in (
            dict.fromkeys(names) | dict(zip(context[0], leaves, strict=True)) | {context_name: context[1]}
        ).items():
            object.__setattr__(matrix, name, value)
        return matrix

    def context_from_json(context):
        given, rest = context
        return tuple(given), tuple(rest) if isinstance(rest, list) else rest

    pytree.register_pytree_node(
        cls,
        flatten,
        unflatten,
        serialized_type_name=f"sparsekit.{cls.__name__}",
        flatten_with_keys_fn=flatten_with_keys,
        to_dumpable_context=list,
        from_dumpable_context=context_from_json,
    )
    torch.serialization.add_safe_globals([cls])  # torch.load(weights_only=True): tensors and numbers only


_register(BlockSparseMatrix, "shape")
_register(NMGMatrix, "m")
