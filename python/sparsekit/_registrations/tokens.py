"""The token ops: gather, scatter, match, compaction."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.library import register_autograd, register_fake, register_vmap
from torch.utils import _pytree as pytree

from .common import refuse_second_derivative

_ops = torch.ops.sparsekit


# ---- fake kernels


def _with_rows(tensor: Tensor, dim: int, packed: bool, packed_out: bool, samples, rows) -> Tensor:
    """A new tensor like `tensor` with `rows` tokens: dims count a batch dimension, which packed tensors lack."""
    shape = list(tensor.shape[0 if packed else 1 :])
    shape[dim - 1] = rows
    return tensor.new_empty(shape if packed_out else [samples, *shape])


@register_fake("sparsekit::gather_tokens")
def _(tensors, index, dims, cu_seqlens=None, cu_seqlens_out=None, length=None):
    samples, rows = index.shape[0], index.shape[1] if cu_seqlens_out is None else length
    sides = cu_seqlens is not None, cu_seqlens_out is not None
    return [_with_rows(tensor, dim, *sides, samples, rows) for tensor, dim in zip(tensors, dims, strict=True)]


def _float_of(weights: Tensor | None) -> torch.dtype:
    return torch.float64 if weights is not None and weights.dtype == torch.float64 else torch.float32


@register_fake("sparsekit::scatter_tokens")
def _(tensors, weights, base, index, dims, length, reduce=0, cu_seqlens=None, cu_seqlens_out=None):
    samples, sides = index.shape[0], (cu_seqlens is not None, cu_seqlens_out is not None)
    outs = [_with_rows(tensor, dim, *sides, samples, length) for tensor, dim in zip(tensors, dims, strict=True)]
    shape = (length,) if cu_seqlens_out is not None else (samples, length)
    return outs, index.new_empty(shape, dtype=_float_of(weights))


@register_fake("sparsekit::scatter_tokens_backward")
def _(
    grads,
    grad_totals,
    tensors,
    weights,
    outs,
    totals,
    index,
    dims,
    rows,
    reduce,
    cu_seqlens=None,
    cu_seqlens_out=None,
    weights_grad=False,
):
    samples, sides = index.shape[0], (cu_seqlens_out is not None, cu_seqlens is not None)
    made = [_with_rows(grad, dim, *sides, samples, rows) for grad, dim in zip(grads, dims, strict=True)]
    return made, index.new_empty(index.shape if weights_grad else (0,), dtype=_float_of(weights))


@register_fake("sparsekit::bipartite_match")
def _(metric, r, ragged_r=None, protect=0, counts=None):
    samples, tokens, _ = metric.shape
    if ragged_r is None and counts is None:
        pairs = torch.sym_min(r, torch.sym_max(tokens - protect, 0) // 2)
        rows = tokens - pairs
    else:
        pairs, rows = tokens // 2, tokens
    shapes = ((samples, pairs), (samples, pairs), (samples, rows), (samples, tokens), (samples,))
    return tuple(metric.new_empty(shape, dtype=torch.int32) for shape in shapes)


@register_fake("sparsekit::compact_kv")
def _(cache_tensors, keep_index, block_table=None, lengths=None, tokens_first=False):
    return None


# ---- autograd: the gradient of a gather is a scatter that adds; that of a scatter gathers


def _gather_setup(ctx, inputs, output):
    tensors, index, dims, cu_seqlens, cu_seqlens_out, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(index, cu_seqlens, cu_seqlens_out)
    ctx.dims = list(dims)
    ctx.rows = tensors[0].shape[dims[0] - (cu_seqlens is not None)] if tensors else 0


def _gather_formula(ctx, grads):
    index, cu_seqlens, cu_seqlens_out = ctx.saved_tensors
    result, others = [None] * len(grads), (None,) * (len(ctx.needs_input_grad) - 1)
    wanted = [i for i, grad in enumerate(grads) if grad is not None and ctx.needs_input_grad[0][i]]
    if wanted:
        given, dims = [grads[i] for i in wanted], [ctx.dims[i] for i in wanted]
        sums, _ = _ops.scatter_tokens(given, None, [], index, dims, ctx.rows, 1, cu_seqlens_out, cu_seqlens)
        for i, grad in zip(wanted, sums, strict=True):
            result[i] = grad
    return result, *others


register_autograd("sparsekit::gather_tokens", _gather_formula, setup_context=_gather_setup)


def _scatter_setup(ctx, inputs, output):
    tensors, weights, base, index, dims, _, reduce, cu_seqlens, cu_seqlens_out = inputs
    outs, totals = output
    ctx.set_materialize_grads(False)
    ctx.weights_grad = weights is not None and weights.requires_grad
    if not ctx.weights_grad:
        ctx.mark_non_differentiable(totals)
    kept = (*tensors, *outs) if ctx.weights_grad else ()  # only the weights' gradient looks at the rows again
    ctx.save_for_backward(weights, totals, index, cu_seqlens, cu_seqlens_out, *kept)
    ctx.dims, ctx.reduce, ctx.count, ctx.based = list(dims), reduce, len(tensors), len(base)
    ctx.rows = tensors[0].shape[dims[0] - (cu_seqlens is not None)]
    ctx.shapes = [(out.shape, out.dtype) for out in outs]


def _scatter_formula(ctx, grads, grad_totals):
    weights, totals, index, cu_seqlens, cu_seqlens_out, *kept = ctx.saved_tensors
    tensors, outs = kept[: ctx.count], kept[ctx.count :]
    needs = ctx.needs_input_grad
    tensor_grads, weight_grad = [None] * ctx.count, None
    wanted = [i for i in range(ctx.count) if grads[i] is not None and (needs[0][i] or ctx.weights_grad)]
    grads = list(grads)
    if not wanted and ctx.weights_grad and grad_totals is not None:
        shape, dtype = ctx.shapes[0]
        grads[0], wanted = totals.new_zeros(shape, dtype=dtype), [0]
    if wanted:
        pick = (lambda values: [values[i] for i in wanted]) if ctx.weights_grad else (lambda values: [])
        made, made_weights = _ops.scatter_tokens_backward(
            [grads[i] for i in wanted],
            grad_totals if ctx.weights_grad else None,
            pick(tensors),
            weights,
            pick(outs),
            totals,
            index,
            [ctx.dims[i] for i in wanted],
            ctx.rows,
            ctx.reduce,
            cu_seqlens,
            cu_seqlens_out,
            ctx.weights_grad,
        )
        for i, grad in zip(wanted, made, strict=True):
            tensor_grads[i] = grad if needs[0][i] else None
        weight_grad = made_weights if ctx.weights_grad else None
    base_grads = [_base_grad(ctx, i, grads[i], totals, cu_seqlens_out) for i in range(ctx.based)]
    return tensor_grads, weight_grad, base_grads, *((None,) * (len(needs) - 3))


def _base_grad(ctx, i, grad, totals, cu_seqlens_out):
    if grad is None or not ctx.needs_input_grad[2][i]:
        return None
    if ctx.reduce == 1:  # add
        return grad
    dim = ctx.dims[i] - (cu_seqlens_out is not None)
    shape = [1] * grad.dim()
    shape[dim] = grad.shape[dim]
    if cu_seqlens_out is None:
        shape[0] = grad.shape[0]
    return torch.where(totals.view(shape) == 0, grad, 0)  # rows that received nothing are base


register_autograd("sparsekit::scatter_tokens", _scatter_formula, setup_context=_scatter_setup)
refuse_second_derivative(_ops.scatter_tokens, _ops.scatter_tokens_backward)


# ---- vmap: the mapped dimension becomes part of the batch; packed tensors have none to fold into


def _is_tensor(value) -> bool:
    return isinstance(value, Tensor)


def _loop(op, info, in_dims, args):
    def element(value, dim, number):
        if isinstance(value, (list, tuple)) and isinstance(dim, (list, tuple)):
            return [element(v, d, number) for v, d in zip(value, dim, strict=True)]
        return value if dim is None else value.select(dim, number)

    calls = [
        op(*(element(value, dim, number) for value, dim in zip(args, in_dims, strict=True)))
        for number in range(info.batch_size)
    ]
    if not calls:
        raise RuntimeError("sparsekit: vmap over a dimension of size 0 is not supported")
    stacked = pytree.tree_map(lambda *parts: torch.stack(parts), *calls)
    return stacked, pytree.tree_map(lambda _: 0, stacked)


def _fold_vmap(op, packed_arguments: tuple[str, ...]) -> None:
    names = [argument.name for argument in op.default._schema.arguments]

    def rule(info, in_dims, *args):
        given = dict(zip(names, args, strict=False))
        if info.batch_size == 0 or any(given.get(name) is not None for name in packed_arguments):
            return _loop(op, info, in_dims, args)

        def fold(value, dim):
            if isinstance(value, (list, tuple)) and any(map(_is_tensor, value)):
                dim = dim if isinstance(dim, (list, tuple)) else [dim] * len(value)
                return [fold(v, d) for v, d in zip(value, dim, strict=True)]
            if not _is_tensor(value):
                return value
            value = value.expand(info.batch_size, *value.shape) if dim is None else value.movedim(dim, 0)
            return value.flatten(0, 1)

        outputs = op(*(fold(value, dim) for value, dim in zip(args, in_dims, strict=True)))
        split = pytree.tree_map(lambda out: _unfold(out, info.batch_size), outputs)
        return split, pytree.tree_map(lambda _: 0, split)

    register_vmap(op.default, rule)


def _unfold(out: Tensor, size: int) -> Tensor:
    if out.dim() == 1 and out.shape[0] == 0:  # gradients that were not asked for are empty, whatever the batch
        return out.expand(size, 0)
    return out.unflatten(0, (size, out.shape[0] // size))


_fold_vmap(_ops.gather_tokens, ("cu_seqlens", "cu_seqlens_out"))
_fold_vmap(_ops.scatter_tokens, ("cu_seqlens", "cu_seqlens_out"))
_fold_vmap(_ops.scatter_tokens_backward, ("cu_seqlens", "cu_seqlens_out"))
_fold_vmap(_ops.bipartite_match, ())
