"""The ops of selection: block lists, scores, choices, and the builders of lists and orders."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.library import register_autograd, register_fake, register_vmap

from .common import argument_names, autocast, loop_vmap, one_by_one, refuse_second_derivative

_ops = torch.ops.sparsekit


def _ceil_div(length, block):
    return (length + block - 1) // block


# ---- block lists


@register_fake("sparsekit::block_lists_from_bool")
def _(block_map, capacity):
    rows = block_map.shape[:-1]
    return block_map.new_empty(rows, dtype=torch.int32), block_map.new_empty((*rows, capacity), dtype=torch.int32)


@register_fake("sparsekit::transpose_block_lists")
def _(counts, indices, full_counts, full_indices, block_size, len_k, cu_seqlens_q=None, cu_seqlens_k=None):
    batch, heads, rows, slots = indices.shape
    if full_indices is not None:
        slots = slots + full_indices.shape[-1]
    if cu_seqlens_k is None:
        blocks = (len_k + block_size[1] - 1) // block_size[1]
    else:
        blocks = len_k // block_size[1] + cu_seqlens_k.shape[0] - 1
    return indices.new_empty((batch, heads, blocks + 1)), indices.new_empty((batch, heads, rows * slots))


@register_fake("sparsekit::check_block_lists")
def _(*lists_and_lengths, **options):
    return None


# The list ops are called once per pattern.
for _op in (_ops.block_lists_from_bool, _ops.transpose_block_lists):
    loop_vmap(_op)


# ---- scores: fake kernels


def _result_dtype(query: Tensor) -> torch.dtype:
    return torch.float64 if query.dtype == torch.float64 else torch.float32


def _grid(query, key, block_size, cu_seqlens_q, max_seqlen_k):
    """(batch, query heads, key heads, query blocks, key blocks of a row, key blocks in all)"""
    block_q, block_k = block_size
    if query.dim() == 4:
        blocks = _ceil_div(key.shape[2], block_k)
        return query.shape[0], query.shape[1], key.shape[1], _ceil_div(query.shape[2], block_q), blocks, blocks
    sequences = cu_seqlens_q.shape[0] - 1
    longest = max_seqlen_k if max_seqlen_k > 0 else key.shape[0]
    rows = query.shape[0] // block_q + sequences
    return 1, query.shape[1], key.shape[1], rows, _ceil_div(longest, block_k), key.shape[0] // block_k + sequences


def _per_key(query, key):
    return (query.shape[1], key.shape[0]) if query.dim() == 3 else (query.shape[0], query.shape[1], key.shape[2])


def _empty_in_order_of(like: Tensor, sizes) -> Tensor:
    """Dense, in the order of dimensions of `like` (as in csrc/torch/tensors.h)."""
    order = sorted(range(like.dim() - 1), key=lambda dim: like.stride(dim), reverse=True)
    strides, stride = [1] * like.dim(), torch.sym_max(sizes[-1], 1)
    for dim in reversed(order):
        strides[dim] = stride
        stride = stride * torch.sym_max(sizes[dim], 1)
    return like.new_empty_strided(sizes, strides)


@register_fake("sparsekit::block_scores")
def _(
    query,
    key,
    block_size,
    reduce=0,
    causal=False,
    scale=None,
    stride=16,
    cu_seqlens_q=None,
    cu_seqlens_k=None,
    max_seqlen_k=0,
    self_similarity=False,
):
    batch, heads, heads_kv, rows, blocks, all_blocks = _grid(query, key, block_size, cu_seqlens_q, max_seqlen_k)
    dtype = _result_dtype(query)
    of_query = (batch, heads, rows) if self_similarity else (0,)
    of_key = (batch, heads_kv, all_blocks) if self_similarity else (0,)
    return (
        query.new_empty((batch, heads, rows, blocks), dtype=dtype),
        query.new_empty(of_query, dtype=dtype),
        query.new_empty(of_key, dtype=dtype),
    )


@register_fake("sparsekit::block_scores_backward")
def _(grad_scores, query, key, block_size, *options, **named):
    return _empty_in_order_of(query, query.shape), _empty_in_order_of(key, key.shape)


@register_fake("sparsekit::column_scores")
def _(probe_query, key, probe_positions, *options, **named):
    columns = probe_query.new_empty(_per_key(probe_query, key), dtype=_result_dtype(probe_query))
    return columns, torch.empty_like(columns)


@register_fake("sparsekit::row_scores")
def _(query, key, lse, *options, **named):
    return query.new_empty(_per_key(query, key), dtype=_result_dtype(query))


_MAP_ARGUMENTS = argument_names(_ops.attention_block_map)


@register_fake("sparsekit::attention_block_map")
def _(*args, **kwargs):
    given = dict(zip(_MAP_ARGUMENTS, args, strict=False), **kwargs)
    query = given["query"]
    longest, cu_seqlens_q = given.get("max_seqlen_k", 0), given.get("cu_seqlens_q")
    batch, heads, _, rows, width, _ = _grid(query, given["key"], given["block_size"], cu_seqlens_q, longest)
    if given["kv_indices"] is not None:
        full = given["full_kv_indices"]
        rows = given["kv_indices"].shape[2]
        width = given["kv_indices"].shape[3] + (0 if full is None else full.shape[3])
    return query.new_empty((batch, heads, rows, width), dtype=_result_dtype(query))


# ---- scores: autograd (block scores alone), autocast

_BLOCK_SCORES = argument_names(_ops.block_scores)


def _block_scores_context(ctx, inputs, output):
    given = dict(zip(_BLOCK_SCORES, inputs, strict=True))
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(given["query"], given["key"], given["cu_seqlens_q"], given["cu_seqlens_k"])
    ctx.options = [given[name] for name in ("block_size", "reduce", "causal", "scale", "stride")]
    ctx.longest = given["max_seqlen_k"]


def _block_scores_backward(ctx, grad_scores, *_):
    nothing = (None,) * len(ctx.needs_input_grad)
    if grad_scores is None:
        return nothing
    query, key, *cu_seqlens = ctx.saved_tensors
    grads = _ops.block_scores_backward(grad_scores, query, key, *ctx.options, *cu_seqlens, ctx.longest)
    return (*(g if wanted else None for g, wanted in zip(grads, ctx.needs_input_grad, strict=False)), *nothing[2:])


register_autograd(_ops.block_scores.default, _block_scores_backward, setup_context=_block_scores_context)
refuse_second_derivative(_ops.block_scores, _ops.block_scores_backward)
for _op in (_ops.block_scores, _ops.row_scores, _ops.attention_block_map):
    autocast(_op, "query", "key")
autocast(_ops.column_scores, "probe_query", "key")


# ---- choices


def _fake_choice(op):
    names = argument_names(op)

    def fake(*args, **kwargs):
        given = dict(zip(names, args, strict=False), **kwargs)
        scores = given[names[0]]
        rows = scores.shape[:2]
        return (
            scores.new_empty((*rows, given["width"]), dtype=torch.int32),
            scores.new_empty(rows, dtype=torch.int32),
            scores.new_empty(rows if given.get("return_mass") else (0,), dtype=torch.float32),
        )

    register_fake(op.default, fake)


for _op in (_ops.select_top_k, _ops.select_top_p, _ops.select_threshold):
    _fake_choice(_op)


# ---- builders


@register_fake("sparsekit::vertical_slash_lists")
def _(vertical, slash, block_size, len_q, len_k, capacity):
    rows = (*vertical.shape[:2], _ceil_div(len_q, block_size[0]))
    sizes = ((*rows, capacity), rows, (*rows, vertical.shape[2]), rows)
    return tuple(vertical.new_empty(size) for size in sizes)


@register_fake("sparsekit::union_block_lists")
def _(indices, counts, heads, key_blocks, capacity):
    rows = (counts.shape[0], heads, counts.shape[2])
    return indices.new_empty((*rows, capacity)), counts.new_empty(rows)


@register_fake("sparsekit::inverse_permutation")
def _(order, length):
    return order.new_empty((*order.shape[:2], length))


@register_fake("sparsekit::permute_tokens")
def _(input, order):
    return _empty_in_order_of(input, (*input.shape[:2], order.shape[2], input.shape[3]))


def _permute_context(ctx, inputs, output):
    ctx.save_for_backward(inputs[1])
    ctx.length = inputs[0].shape[2]


def _permute_backward(ctx, grad):
    """Each token goes to one place at most, so what comes back to it is one row: no sum, no atomics."""
    (order,) = ctx.saved_tensors
    return _ops.permute_tokens(grad, _ops.inverse_permutation(order, ctx.length)), None


register_autograd(_ops.permute_tokens.default, _permute_backward, setup_context=_permute_context)


# ---- vmap: one call per element (these ops are called once per layer)


def _single(op) -> None:
    """loop_vmap of an op that returns one tensor."""

    def rule(info, in_dims, *args):
        outputs, dims = one_by_one(lambda *element: (op(*element),), info, in_dims, args)
        return outputs[0], dims[0]

    register_vmap(op.default, rule)


for _op in (
    *(_ops.block_scores, _ops.block_scores_backward, _ops.column_scores, _ops.select_top_k, _ops.select_top_p),
    *(_ops.select_threshold, _ops.vertical_slash_lists, _ops.union_block_lists),
):
    loop_vmap(_op)
for _op in (_ops.row_scores, _ops.attention_block_map, _ops.inverse_permutation, _ops.permute_tokens):
    _single(_op)
