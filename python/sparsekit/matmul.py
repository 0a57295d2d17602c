"""Products with block-sparse weights: the public functions. docs/matmul.md shows the formats and which to use when.

    block_sparse_linear   x W^T (or x W), with bias and activation        block_sparse_mm    W x (or W^T x)
    block_sddmm           (a b) at the blocks of a pattern                block_sparse_mlp   (act(x gate^T) * x up^T) down^T

A weight is a BlockSparseMatrix, an NMGMatrix or a torch.sparse_bsr tensor. Sums are fp32 (of int8: integers); float32 on a
GPU is rounded to TF32 where torch.backends.cuda.matmul.allow_tf32 says so, else accurate to fp32.
Torch's side of the ops (autograd, fake kernels, ...) is in _registrations/.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .matrices import BlockSparseMatrix, NMGMatrix

__all__ = ["block_sddmm", "block_sparse_linear", "block_sparse_mlp", "block_sparse_mm"]

_ops = torch.ops.sparsekit
ACTIVATIONS = {None: 0, "none": 0, "relu": 1, "gelu": 2, "gelu_tanh": 3, "silu": 4}  # as csrc/torch/library.cpp numbers

Weight = BlockSparseMatrix | NMGMatrix | Tensor


def block_sparse_linear(
    input: Tensor,
    weight: Weight,
    bias: Tensor | None = None,
    activation: str | None = None,
    *,
    transposed: bool = False,
) -> Tensor:
    """activation(input W^T + bias), as `torch.nn.functional.linear`; with `transposed` input W in place of input W^T.

    Args:
        input: `[..., columns of W]` (transposed: `[..., rows of W]`); float32, float16, bfloat16 (on the CPU also
            float64, slowly). Used in place where its rows lie at one distance with stride 1 inside, or where a matrix
            has its columns so; else copied once.
        weight: a BlockSparseMatrix, NMGMatrix or torch.sparse_bsr tensor, in input's dtype or int8 with scales. With
            int8, input is rounded per token to 8 bits, too (max|x| / 127; transposed: it is not). W^T and W read the
            same values, wherever they are: nothing is transposed.
        bias: `[features]` in input's dtype.
        activation: None, "relu", "gelu", "gelu_tanh" or "silu", applied in fp32 before rounding to the dtype. Where a
            gradient is wanted it runs as torch's own, after the product.

    Returns:
        `[..., features]` contiguous, in input's dtype. Differentiable in input, values and bias, also twice.

    Raises:
        TypeError, ValueError, RuntimeError: an argument does not fit; the message names it, what was found and what is
            supported. On the CPU an index out of range raises, naming the first; on CUDA it is skipped
            (docs/matmul.md), and int8 weights and float64 are not taken.

    Sources: blocks of weights as in BLaST (arXiv 2507.03117); int8 4 x 1 blocks: Shen et al. (arXiv 2306.16601).
    """
    matrix = as_matrix(weight)
    _check_inner("input", input, -1, matrix, transposed)
    number = _activation(activation)
    if number and torch.is_grad_enabled() and _any_grad(input, bias, matrix.values):
        # The backward wants what goes into the activation, so there is nothing to save by fusing it.
        return _torch_activation(activation, block_sparse_linear(input, matrix, bias, transposed=transposed))
    transpose = _transpose(matrix, transposed or _any_grad(input))
    features = matrix.shape[1 if transposed else 0]
    return _ops.block_sparse_linear(
        *(input, matrix.values, bias, matrix.crow_indices, matrix.col_indices, features),
        *(transposed, number, matrix.scales, *transpose, _tf32(input)),
    )


def block_sparse_mm(weight: Weight, dense: Tensor, *, transposed: bool = False) -> Tensor:
    """W dense, with `transposed` W^T dense: as `block_sparse_linear` of columns instead of rows.

    Args:
        weight: as in `block_sparse_linear`. int8 rounds each column of `dense` to 8 bits (transposed: it does not).
        dense: `[..., columns of W, n]` (transposed: `[..., rows of W, n]`); leading dimensions are batches.

    Returns:
        `[..., rows of W, n]` (transposed: `[..., columns of W, n]`) contiguous. Differentiable in values and dense.
    """
    matrix = as_matrix(weight)
    if dense.dim() < 2:
        raise ValueError(f"dense: found shape {tuple(dense.shape)}, supported is [..., features, columns]")
    _check_inner("dense", dense, -2, matrix, transposed)
    transpose = _transpose(matrix, transposed or _any_grad(dense))
    features = matrix.shape[1 if transposed else 0]
    return _ops.block_sparse_mm(
        *(dense, matrix.values, matrix.crow_indices, matrix.col_indices, features, transposed),
        *(matrix.scales, *transpose, _tf32(dense)),
    )


def block_sddmm(a: Tensor, b: Tensor, pattern: Weight) -> Tensor:
    """The product a b at the blocks of a pattern: the gradient of a block-sparse weight, for instance.

    Args:
        a: `[M, K]`, b: `[K, N]`, one dtype; transposed views are used in place.
        pattern: a BlockSparseMatrix, NMGMatrix or torch.sparse_bsr tensor of shape (M, N), whose values are not read.

    Returns:
        `[nnz, R, C]`, the values of such a matrix (`pattern.with_values(...)`); of an NMGMatrix in the shape of its
        values. 0 in padding. Differentiable in a and b.
    """
    matrix = as_matrix(pattern)
    if a.dim() != 2 or b.dim() != 2 or (a.shape[0], b.shape[1]) != tuple(matrix.shape) or a.shape[1] != b.shape[0]:
        raise ValueError(
            f"a, b: found shapes {tuple(a.shape)}, {tuple(b.shape)}, supported are [{matrix.shape[0]}, K], "
            f"[K, {matrix.shape[1]}] for a pattern of shape {tuple(matrix.shape)}"
        )
    values = _ops.block_sddmm(a, b, matrix.crow_indices, matrix.col_indices, matrix.block_size, _tf32(a))
    return values.view(pattern.values.shape) if isinstance(pattern, NMGMatrix) else values


def block_sparse_mlp(
    x: Tensor, gate: Weight | None, up: Weight, down: Weight, activation: str | None = "silu"
) -> Tensor:
    """(activation(x gate^T) * (x up^T)) down^T; without `gate`, activation(x up^T) down^T. A transformer's MLP.

    One op: activation and product are part of the first two products' epilogues, and the hidden tensor is written twice
    and read twice; on a GPU, with large blocks or few tokens, both are computed in one pass that writes it once. Where a
    gradient is wanted the parts run as ops of their own, whose results backward needs.

    Args:
        x: `[..., features]`; gate, up: `(hidden, features)` or None, down: `(features out, hidden)`, as in
            `block_sparse_linear`.
        activation: as in `block_sparse_linear`.
    """
    matrices = [None if weight is None else as_matrix(weight) for weight in (gate, up, down)]
    number = _activation(activation)
    for name, matrix in zip(("gate", "up"), matrices, strict=False):
        if matrix is not None:
            _check_inner(f"x (for {name})", x, -1, matrix, False)
    up_matrix, down_matrix = matrices[1:]
    hidden = up_matrix.shape[0]
    if down_matrix.shape[1] != hidden or (matrices[0] is not None and matrices[0].shape[0] != hidden):
        shapes = [None if matrix is None else tuple(matrix.shape) for matrix in matrices]
        raise ValueError(f"gate, up, down: found shapes {shapes}, supported are (h, f), (h, f), (f out, h)")
    if torch.is_grad_enabled() and _any_grad(x, *(matrix.values for matrix in matrices if matrix is not None)):
        inner = block_sparse_linear(x, matrices[0] or up_matrix)
        inner = _torch_activation(activation, inner)
        if matrices[0] is not None:
            inner = inner * block_sparse_linear(x, up_matrix)
        return block_sparse_linear(inner, down_matrix)
    values, indices, scales = [], [], []
    for matrix in matrices:
        values.append(None if matrix is None else matrix.values)
        indices += [None, None] if matrix is None else [matrix.crow_indices, matrix.col_indices]
        scales.append(None if matrix is None else matrix.scales)
    return _ops.block_sparse_mlp(x, *values, *indices, hidden, down_matrix.shape[0], number, *scales, _tf32(x))


def as_matrix(weight: Weight) -> BlockSparseMatrix:
    """Any weight as a BlockSparseMatrix, without copying values."""
    if isinstance(weight, BlockSparseMatrix):
        return weight
    if isinstance(weight, NMGMatrix):
        return weight.to_block_sparse()
    if isinstance(weight, Tensor) and weight.layout == torch.sparse_bsr:
        return BlockSparseMatrix.from_bsr(weight)
    found = f"a tensor of layout {weight.layout}" if isinstance(weight, Tensor) else type(weight).__name__
    raise TypeError(
        f"weight: found {found}, supported are sparsekit.BlockSparseMatrix, sparsekit.NMGMatrix and torch.sparse_bsr "
        "(BlockSparseMatrix.from_dense makes one)"
    )


def _activation(name: str | None) -> int:
    if name not in ACTIVATIONS:
        raise ValueError(f"activation: found {name!r}, supported are None, 'relu', 'gelu', 'gelu_tanh', 'silu'")
    return ACTIVATIONS[name]


def _torch_activation(name: str | None, x: Tensor) -> Tensor:
    number = ACTIVATIONS[name]
    if number == 1:
        return torch.relu(x)
    if number in (2, 3):
        return F.gelu(x, approximate="tanh" if number == 3 else "none")
    return F.silu(x) if number == 4 else x


def _tf32(tensor: Tensor) -> bool:
    """Whether torch's own products of float32 on a GPU may round to TF32."""
    return tensor.is_cuda and tensor.dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32


def _any_grad(*tensors: Tensor | None) -> bool:
    return any(tensor is not None and tensor.requires_grad for tensor in tensors)


def _check_inner(name: str, tensor: Tensor, dim: int, matrix: BlockSparseMatrix, transposed: bool) -> None:
    inner = matrix.shape[0 if transposed else 1]
    if tensor.dim() < 1 or tensor.shape[dim] != inner:
        raise ValueError(
            f"{name}: found shape {tuple(tensor.shape)}, supported is {inner} in dimension {dim} for a weight of shape "
            f"{tuple(matrix.shape)}{', transposed' if transposed else ''}"
        )


def _transpose(matrix: BlockSparseMatrix, wanted: bool) -> tuple[Tensor | None, ...]:
    return matrix.transposed_pattern() if wanted else (None, None, None)
