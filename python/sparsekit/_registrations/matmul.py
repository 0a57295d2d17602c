"""The block-sparse products. Their derivatives are products again, so that they can be differentiated any number of times:

y = x W^T: dx = dy W (the pattern seen from its columns, the same values), dW = (dy^T x) at the blocks of W.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.library import register_autograd, register_fake, register_vmap

from .common import argument_names, autocast, loop_vmap, one_by_one

_ops = torch.ops.sparsekit


# ---- fake kernels


@register_fake("sparsekit::block_sparse_linear")
def _(input, values, bias, crow_indices, col_indices, features, *options, **named):
    return input.new_empty((*input.shape[:-1], features))


@register_fake("sparsekit::block_sparse_mm")
def _(dense, values, crow_indices, col_indices, features, *options, **named):
    return dense.new_empty((*dense.shape[:-2], features, dense.shape[-1]))


@register_fake("sparsekit::block_sddmm")
def _(a, b, crow_indices, col_indices, block_size, tf32=False):
    return a.new_empty((col_indices.shape[0], *block_size))


@register_fake("sparsekit::block_sparse_mlp")
def _(input, *tensors_and_options, **named):
    names = argument_names(_ops.block_sparse_mlp)[1:]
    given = dict(zip(names, tensors_and_options, strict=False)) | named
    return input.new_empty((*input.shape[:-1], given["features"]))


@register_fake("sparsekit::transpose_block_sparse")
def _(crow_indices, col_indices, col_blocks):
    return col_indices.new_empty(col_blocks + 1), torch.empty_like(col_indices), torch.empty_like(col_indices)


@register_fake("sparsekit::check_block_sparse")
def _(crow_indices, col_indices, col_blocks):
    return None


# ---- autograd


def _through_activation(number: int, before: Tensor, grad: Tensor) -> Tensor:
    """The gradient of what goes into the activation."""
    if number == 1:
        return grad * (before > 0)
    if number in (2, 3):
        return torch.ops.aten.gelu_backward(grad, before, approximate="tanh" if number == 3 else "none")
    return torch.ops.aten.silu_backward(grad, before) if number == 4 else grad


def _rows(tensor: Tensor) -> Tensor:
    """`[tokens, features]`"""
    return tensor.reshape(-1, tensor.shape[-1])


def _save(op):
    names = argument_names(op)

    def setup_context(ctx, inputs, output):
        given = dict(zip(names, inputs, strict=True))
        ctx.tensor_names = [name for name, value in given.items() if isinstance(value, Tensor)]
        ctx.save_for_backward(*(given[name] for name in ctx.tensor_names))
        ctx.others = {name: value for name, value in given.items() if not isinstance(value, Tensor)}

    def restore(ctx) -> tuple[dict, dict, tuple[str, ...]]:
        passed = names[: len(ctx.needs_input_grad)]  # the dispatcher drops trailing defaults
        wanted = dict.fromkeys(names, False) | dict(zip(passed, ctx.needs_input_grad, strict=True))
        return ctx.others | dict(zip(ctx.tensor_names, ctx.saved_tensors, strict=True)), wanted, passed

    return setup_context, restore


def _refuse_int8(given: dict, transposed: bool) -> None:
    if given["scales"] is not None and transposed:
        raise RuntimeError(
            "sparsekit: input W with int8 values has no derivative: it is itself the derivative of input W^T, "
            "straight through the rounding of its input"
        )


_PATTERN = ("crow_indices", "col_indices")
_TRANSPOSE = ("ccol_indices", "row_indices", "entries")
_NO_SCALES = (None,) * 4  # nor a transpose
_LINEAR = argument_names(_ops.block_sparse_linear)
_linear_setup, _linear_restore = _save(_ops.block_sparse_linear)
_mm_setup, _mm_restore = _save(_ops.block_sparse_mm)


def _linear_formula(ctx, grad):
    given, wanted, passed = _linear_restore(ctx)
    input, values, transposed = given["input"], given["values"], given["transposed"]
    _refuse_int8(given, transposed)
    if given["activation"]:
        before = _ops.block_sparse_linear(*(0 if name == "activation" else given[name] for name in _LINEAR))
        grad = _through_activation(given["activation"], before, grad)
    rows, grad_rows = _rows(input), _rows(grad)
    grads = {}
    if wanted["input"]:
        grads["input"] = _ops.block_sparse_linear(
            *(grad, values, None, *(given[name] for name in _PATTERN), input.shape[-1]),
            *(not transposed, 0, given["scales"], *(given[name] for name in _TRANSPOSE), given["tf32"]),
        )
    if wanted["values"]:
        a, b = (rows, grad_rows) if transposed else (grad_rows, rows)
        pattern = (given[name] for name in _PATTERN)
        grads["values"] = _ops.block_sddmm(a.t(), b, *pattern, values.shape[1:], given["tf32"])
    if wanted["bias"]:
        grads["bias"] = grad_rows.sum(0)
    return tuple(grads.get(name) for name in passed)


register_autograd("sparsekit::block_sparse_linear", _linear_formula, setup_context=_linear_setup)


def _mm_formula(ctx, grad):
    given, wanted, passed = _mm_restore(ctx)
    dense, values, transposed = given["dense"], given["values"], given["transposed"]
    _refuse_int8(given, transposed)
    grads = {}
    if wanted["dense"]:
        grads["dense"] = _ops.block_sparse_mm(
            *(grad, values, *(given[name] for name in _PATTERN), dense.shape[-2]),
            *(not transposed, given["scales"], *(given[name] for name in _TRANSPOSE), given["tf32"]),
        )
    if wanted["values"]:
        # Batches are more columns of one product.
        columns, grad_columns = (x.movedim(-2, 0).reshape(x.shape[-2], -1) for x in (dense, grad))
        a, b = (columns, grad_columns) if transposed else (grad_columns, columns)
        pattern = (given[name] for name in _PATTERN)
        grads["values"] = _ops.block_sddmm(a, b.t(), *pattern, values.shape[1:], given["tf32"])
    return tuple(grads.get(name) for name in passed)


register_autograd("sparsekit::block_sparse_mm", _mm_formula, setup_context=_mm_setup)


def _sddmm_setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:4])
    ctx.tf32 = inputs[5]


def _sddmm_formula(ctx, grad):
    a, b, *pattern = ctx.saved_tensors
    grad_a = grad_b = None
    grad = grad.contiguous()
    if ctx.needs_input_grad[0]:  # G b^T
        grad_a = _ops.block_sparse_mm(b.t(), grad, *pattern, a.shape[0], False, *_NO_SCALES, ctx.tf32)
    if ctx.needs_input_grad[1]:  # a^T G
        grad_b = _ops.block_sparse_linear(a.t(), grad, None, *pattern, b.shape[1], True, 0, *_NO_SCALES, ctx.tf32)
    return grad_a, grad_b, *(None for _ in ctx.needs_input_grad[2:])


register_autograd("sparsekit::block_sddmm", _sddmm_formula, setup_context=_sddmm_setup)

_mlp_setup, _mlp_restore = _save(_ops.block_sparse_mlp)


def _mlp_formula(ctx, grad):
    """Computes the hidden tensors again: the op keeps none. block_sparse_mlp() runs its parts where a gradient is
    wanted, and keeps them."""
    given, wanted, passed = _mlp_restore(ctx)

    def linear(part: str, x: Tensor, features: int, transposed: bool = False) -> Tensor:
        tensors = (given[f"{part}_values"], None, given[f"{part}_crow_indices"], given[f"{part}_col_indices"])
        return _ops.block_sparse_linear(
            x, *tensors, features, transposed, 0, given[f"{part}_scales"], None, None, None, given["tf32"]
        )

    def outer(part: str, dy: Tensor, x: Tensor) -> Tensor:
        pattern = given[f"{part}_crow_indices"], given[f"{part}_col_indices"]
        return _ops.block_sddmm(_rows(dy).t(), _rows(x), *pattern, given[f"{part}_values"].shape[1:], given["tf32"])

    x, number, hidden = given["input"], given["activation"], given["hidden_features"]
    gated = given["gate_values"] is not None
    before = linear("gate" if gated else "up", x, hidden)
    active = (before, before.relu(), F.gelu(before), F.gelu(before, approximate="tanh"), F.silu(before))[number]
    beside = linear("up", x, hidden) if gated else None
    grad_inner = linear("down", grad, hidden, True)
    grad_before = _through_activation(number, before, grad_inner * beside if gated else grad_inner)
    grads = {}
    if wanted["down_values"]:
        grads["down_values"] = outer("down", grad, active * beside if gated else active)
    for part, dy in (("gate", grad_before), ("up", grad_inner * active)) if gated else (("up", grad_before),):
        if wanted[f"{part}_values"]:
            grads[f"{part}_values"] = outer(part, dy, x)
        if wanted["input"]:
            share = linear(part, dy, x.shape[-1], True)
            grads["input"] = grads["input"] + share if "input" in grads else share
    return tuple(grads.get(name) for name in passed)


register_autograd("sparsekit::block_sparse_mlp", _mlp_formula, setup_context=_mlp_setup)


# ---- autocast: dense operands and values in the region's dtype (int8 values stay), scales in float32


autocast(_ops.block_sparse_linear, "input", "values", "bias")
autocast(_ops.block_sparse_mm, "dense", "values")
autocast(_ops.block_sddmm, "a", "b")
autocast(_ops.block_sparse_mlp, "input", "gate_values", "up_values", "down_values")


# ---- vmap: a mapped dense operand is one more leading dimension; anything else goes one by one


def _batched(op):
    def rule(info, in_dims, dense, *rest):
        if in_dims[0] is None or any(dim is not None for dim in in_dims[1:]) or info.batch_size == 0:
            (out,), dims = one_by_one(_as_tuple(op), info, in_dims, (dense, *rest))
            return out, dims[0]
        return op(dense.movedim(in_dims[0], 0), *rest), 0

    register_vmap(op.default, rule)


def _as_tuple(op):
    return lambda *args: (op(*args),)


def _single_vmap(op):
    def rule(info, in_dims, *args):
        (out,), dims = one_by_one(_as_tuple(op), info, in_dims, args)
        return out, dims[0]

    register_vmap(op.default, rule)


for _op in (_ops.block_sparse_linear, _ops.block_sparse_mm, _ops.block_sparse_mlp):
    _batched(_op)
_single_vmap(_ops.block_sddmm)
loop_vmap(_ops.transpose_block_sparse)
