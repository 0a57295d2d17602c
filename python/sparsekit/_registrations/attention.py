"""The attention ops: block-sparse attention, padded and packed, stripe-sparse attention, and the merging of states."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.library import register_autograd, register_fake, register_vmap

from .common import argument_names, autocast, differentiable, loop_vmap, one_by_one, refuse_second_derivative

_ops = torch.ops.sparsekit

_LISTS = (
    "kv_num_blocks",
    "kv_indices",
    "full_kv_num_blocks",
    "full_kv_indices",
    "partial_bits",
    "partial_bits_index",
    "block_size",
)
_PACKED = ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")


# ---- fake kernels


def _empty_in_order_of(like: Tensor, last: int) -> Tensor:
    """Like `like` with another last size, dense, in the same order of dimensions (as in csrc/torch/tensors.h)."""
    order = sorted(range(like.dim() - 1), key=lambda dim: like.stride(dim), reverse=True)
    sizes = (*like.shape[:-1], last)
    strides = [1] * like.dim()
    stride = last if last > 1 else 1
    for dim in reversed(order):
        strides[dim] = stride
        stride = stride * torch.sym_max(sizes[dim], 1)
    return like.new_empty_strided(sizes, strides)


def _lse_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _fake_forward(query, key, value, *rest, **options):
    shape = (query.shape[1], query.shape[0]) if query.dim() == 3 else query.shape[:3]
    lse = query.new_empty(shape, dtype=_lse_dtype(query.dtype))
    return _empty_in_order_of(query, value.shape[-1]), lse


def _fake_backward(op) -> Callable:
    names = argument_names(op)

    def fake(*args, **kwargs):
        given = dict(zip(names, args, strict=False), **kwargs)
        query, key, value = given["query"], given["key"], given["value"]
        if query.dim() == 3:
            batch, heads, len_k = 1, query.shape[1], key.shape[0]
        else:
            batch, heads, len_k = query.shape[0], query.shape[1], key.shape[2]
        bias_shape = (batch, heads, len_k) if given.get("key_bias_grad") else (0,)
        sinks_shape = (batch, heads) if given.get("sinks") is not None else (0,)
        return (
            *(_empty_in_order_of(tensor, tensor.shape[-1]) for tensor in (query, key, value)),
            query.new_empty(bias_shape, dtype=torch.float32),
            query.new_empty(sinks_shape, dtype=torch.float32),
        )

    return fake


for _op in (_ops.block_sparse_attn, _ops.block_sparse_attn_varlen, _ops.stripe_sparse_attn):
    register_fake(_op.default, _fake_forward)
for _op in (_ops.block_sparse_attn_backward, _ops.block_sparse_attn_varlen_backward, _ops.stripe_sparse_attn_backward):
    register_fake(_op.default, _fake_backward(_op))


@register_fake("sparsekit::check_column_lists")
def _(col_indices, col_counts, len_k, duplicates=True):
    return None


@register_fake("sparsekit::merge_attention_states")
def _(outs, lses):
    return _empty_in_order_of(outs[0], outs[0].shape[-1]), lses[0].new_empty(lses[0].shape)


# ---- autograd


def _attention_autograd(forward, backward) -> None:
    names = argument_names(forward)
    packed = "cu_seqlens_q" in names
    blocks_only = "col_indices" not in names
    passed = names[3:]  # from forward to backward, as they are
    no_tensors = {"block_size", "max_seqlen_q", "max_seqlen_k", "scale", "causal", "window", "softcap"}
    no_tensors |= {"group_size", "sink", "local"}
    tensors = [at for at, name in enumerate(names) if name not in no_tensors]
    others = [at for at, name in enumerate(names) if name in no_tensors]
    kept = [names[at] for at in (*tensors, *others)]

    def setup_context(ctx, inputs, output):
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*output, *(inputs[at] for at in tensors))
        ctx.others = [inputs[at] for at in others]

    def formula(ctx, grad_out, grad_lse):
        if grad_out is None and grad_lse is None:
            return (None,) * len(names)
        out, lse, *saved = ctx.saved_tensors
        given = dict(zip(kept, (*saved, *ctx.others), strict=True), out=out, lse=lse)
        wanted = dict.fromkeys(names, False) | dict(zip(names, ctx.needs_input_grad[1:], strict=False))
        # An op of its own: layers that share lists share the result when compiled.
        if blocks_only and given["transpose_offsets"] is None:
            lists = [given[name] for name in (*_LISTS[:4], "block_size")]
            cu_seqlens = [given[name] for name in _PACKED[:2]] if packed else []
            len_k = given["key"].shape[0 if packed else 2]
            transposed = _ops.transpose_block_lists(*lists, len_k, *cu_seqlens)
            given["transpose_offsets"], given["transpose_slots"] = transposed
        query_grad, key_grad, value_grad, bias_grad, sinks_grad = backward(
            torch.zeros_like(out) if grad_out is None else grad_out,
            grad_lse,
            *(given[name] for name in ("query", "key", "value", "out", "lse", *passed)),
            key_bias_grad=wanted["key_bias"],
            deterministic=torch.are_deterministic_algorithms_enabled(),
        )
        grads = {"query": query_grad, "key": key_grad, "value": value_grad}
        if wanted["key_bias"]:  # per batch and query head: summed over what the argument broadcasts
            grads["key_bias"] = bias_grad.sum_to_size(given["key_bias"].shape)
        if wanted["sinks"]:
            grads["sinks"] = sinks_grad.sum(0)
        return tuple(grads.get(name) if wanted[name] else None for name in names)

    differentiable(forward, setup_context, formula)
    refuse_second_derivative(forward, backward)


_attention_autograd(_ops.block_sparse_attn, _ops.block_sparse_attn_backward)
_attention_autograd(_ops.block_sparse_attn_varlen, _ops.block_sparse_attn_varlen_backward)
_attention_autograd(_ops.stripe_sparse_attn, _ops.stripe_sparse_attn_backward)


def _merge_setup(ctx, inputs, output):
    outs, lses = inputs
    ctx.count = len(outs)
    ctx.save_for_backward(*outs, *lses, *output)


def _merge_formula(ctx, grad_out, grad_lse):
    # lse = log sum exp(lse_s), weight_s = exp(lse_s - lse) = d lse / d lse_s, out = sum weight_s out_s
    *states, out, lse = ctx.saved_tensors
    grad_out, difference = grad_out.float(), lambda state: state.float() - out.float()
    grad_outs, grad_lses = [], []
    for state_out, state_lse in zip(states[: ctx.count], states[ctx.count :], strict=True):
        counts = state_lse > -torch.inf  # a state without keys: weight 0, whatever its out holds
        weight = torch.where(counts, torch.exp(torch.where(counts, state_lse - lse, 0.0)), 0.0)
        grad_outs.append((weight[..., None] * grad_out).to(state_out.dtype))
        inner = torch.where(counts[..., None], difference(state_out) * grad_out, 0.0).sum(-1)
        grad_lses.append(weight * (grad_lse + inner))
    return grad_outs, grad_lses


register_autograd("sparsekit::merge_attention_states", _merge_formula, setup_context=_merge_setup)


# ---- autocast: query, key and value in the region's dtype; what is added to scores stays float32


for _op in (_ops.block_sparse_attn, _ops.block_sparse_attn_varlen, _ops.stripe_sparse_attn):
    autocast(_op, "query", "key", "value")


# ---- vmap: the mapped dimension becomes part of the batch

_PER_BATCH = ("grad_out", "grad_lse", "query", "key", "value", "out", "lse")  # [B, ...]
_PER_LIST = (
    "kv_num_blocks",
    "kv_indices",
    "full_kv_num_blocks",
    "full_kv_indices",
    "partial_bits_index",
    "transpose_offsets",
    "transpose_slots",
)  # [B|1, ...], all alike
_PER_COLUMN_LIST = ("col_indices", "col_counts")  # [B|1, ...], both alike
_BROADCAST = ("key_bias", "query_positions", "key_positions")  # [B|1, ...], each on its own


def _mapped_first(tensor: Tensor, dim: int | None, size: int) -> Tensor:
    return tensor.expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)


def _attention_vmap(op) -> None:
    names = argument_names(op)

    def rule(info, in_dims, *args):
        dims, given = (dict(zip(names, values, strict=False)) for values in (in_dims, args))
        size = info.batch_size
        if dims.get("sinks") is not None or size == 0:  # per head, not per batch entry
            return one_by_one(op, info, in_dims, args)
        batch = given["query"].shape[0] if dims["query"] is None else given["query"].movedim(dims["query"], 0).shape[1]

        def fold(name: str) -> Tensor:
            tensor = _mapped_first(given[name], dims[name], size)
            return tensor.expand(size, batch, *tensor.shape[2:]).flatten(0, 1)

        folded = dict(given)
        for name in _PER_BATCH:
            if given.get(name) is not None:
                folded[name] = fold(name)
        for name in _BROADCAST:
            if given.get(name) is not None and (dims[name] is not None or given[name].shape[0] != 1):
                folded[name] = fold(name)
        for group, first in ((_PER_LIST, "kv_num_blocks"), (_PER_COLUMN_LIST, "col_counts")):
            if given.get(first) is None:
                continue
            mapped = any(dims.get(name) is not None for name in (*group, "partial_bits"))
            if mapped or given[first].shape[0] != 1:
                for name in group:
                    if given.get(name) is not None:
                        folded[name] = fold(name)
        if dims.get("partial_bits") is not None:  # [n, ...] for each element: one table, into which the numbers point
            bits = given["partial_bits"].movedim(dims["partial_bits"], 0)
            index = folded["partial_bits_index"].unflatten(0, (size, batch))
            first = torch.arange(size, dtype=torch.int32, device=index.device).view(size, 1, 1, 1, 1) * bits.shape[1]
            folded["partial_bits_index"] = torch.where(index >= 0, index + first, index).flatten(0, 1)
            folded["partial_bits"] = bits.flatten(0, 1)
        outputs = op(*folded.values())
        # Gradients that were not asked for are empty, whatever the batch.
        split = [(out, None) if out.dim() == 1 else (out.unflatten(0, (size, batch)), 0) for out in outputs]
        return tuple(out for out, _ in split), tuple(dim for _, dim in split)

    register_vmap(op.default, rule)


_attention_vmap(_ops.block_sparse_attn)
_attention_vmap(_ops.block_sparse_attn_backward)
_attention_vmap(_ops.stripe_sparse_attn)
_attention_vmap(_ops.stripe_sparse_attn_backward)
# Packed batches have no batch dimension to fold into.
for _op in (_ops.block_sparse_attn_varlen, _ops.block_sparse_attn_varlen_backward, _ops.merge_attention_states):
    loop_vmap(_op)
