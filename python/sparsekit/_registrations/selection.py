"""The block-list ops."""

from __future__ import annotations

import torch
from torch.library import register_fake

from .common import loop_vmap

_ops = torch.ops.sparsekit


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
