"""The cache ops. They have no gradient: a backward through them raises."""

from __future__ import annotations

import torch
from torch.library import register_autograd, register_fake, register_vmap

from .attention import _empty_in_order_of
from .common import loop_vmap

_ops = torch.ops.sparsekit
_BLOCK = 32


def _scale_shape(batch, heads, tokens, dim, group_size: int, per_channel: bool) -> tuple:
    if per_channel:
        return batch, heads, (tokens + group_size - 1) // group_size, dim
    return batch, heads, (tokens + _BLOCK - 1) // _BLOCK, (dim + group_size - 1) // group_size, _BLOCK


@register_fake("sparsekit::quantize_kv")
def _(x, bits, group_size, per_channel, symmetric, value_layout):
    batch, heads, tokens, dim = x.shape
    codes = x.new_empty((batch, heads, (tokens + _BLOCK - 1) // _BLOCK, 4 * dim * abs(bits)), dtype=torch.uint8)
    shape = _scale_shape(batch, heads, tokens, dim, group_size, per_channel)
    minima = (0,) if symmetric or bits < 0 else shape
    return codes, x.new_empty(shape, dtype=torch.float16), x.new_empty(minima, dtype=torch.float16)


@register_fake("sparsekit::dequantize_kv")
def _(codes, scales, minima, length, dim, dtype, *packing):
    return codes.new_empty((codes.shape[0], codes.shape[1], length, dim), dtype=dtype)


for _name in ("kv_cache_append", "kv_cache_crop", "kv_cache_compact"):
    register_fake(f"sparsekit::{_name}", lambda *arguments, **options: None)


def _decoded(query, value_dim, scores_length):
    rows = query.shape[:3]
    scores = (*rows, scores_length) if not isinstance(scores_length, int) or scores_length else (0,)
    return (
        _empty_in_order_of(query, value_dim),
        query.new_empty(rows, dtype=torch.float32),
        query.new_empty(scores, dtype=torch.float32),
    )


@register_fake("sparsekit::decode_attention")
def _(query, *cache, scale=None, softcap=0.0, sinks=None, key_bias=None, scores_length=0):
    value_window, options = cache[7], cache[11:]  # options may come by position
    return _decoded(query, value_window.shape[-1], options[4] if len(options) > 4 else scores_length)


@register_fake("sparsekit::decode_attention_plain")
def _(
    query, key, value, lengths, table, tokens_first, scale=None, softcap=0.0, sinks=None, key_bias=None, scores_length=0
):
    return _decoded(query, value.shape[-1], scores_length)


def _no_gradient(op) -> None:
    def refuse(ctx, *grads):
        raise RuntimeError(f"sparsekit: {op.__name__} has no derivative: it is for decoding, under torch.no_grad()")

    register_autograd(op.default, refuse, setup_context=lambda ctx, inputs, output: None)


for _op in (_ops.quantize_kv, _ops.dequantize_kv, _ops.decode_attention, _ops.decode_attention_plain):
    _no_gradient(_op)

for _op in (_ops.quantize_kv, _ops.decode_attention, _ops.decode_attention_plain):
    loop_vmap(_op)


@register_vmap("sparsekit::dequantize_kv")
def _(info, in_dims, *arguments):
    def element(index):
        return (x if dim is None else x.select(dim, index) for x, dim in zip(arguments, in_dims, strict=True))

    return torch.stack([_ops.dequantize_kv(*element(index)) for index in range(info.batch_size)]), 0
