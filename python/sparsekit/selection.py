"""Block lists: from boolean maps, and seen from the keys. The ops behind `BlockPattern`, on their own."""

from __future__ import annotations

import torch
from torch import Tensor

from .formats import BlockPattern

__all__ = ["block_lists_from_bool", "transpose_block_lists"]


def block_lists_from_bool(block_map: Tensor, capacity: int | None = None) -> tuple[Tensor, Tensor]:
    """Which entries of each row are true.

    Args:
        block_map: bool `[B, H, Mq, Nk]`.
        capacity: K, default Nk. A row with more true entries keeps its first K.

    Returns:
        counts int32 `[B, H, Mq]` and indices int32 `[B, H, Mq, K]`, ascending, -1 past the count.
    """
    capacity = block_map.shape[-1] if capacity is None else capacity
    return torch.ops.sparsekit.block_lists_from_bool(block_map, capacity)


def transpose_block_lists(
    pattern: BlockPattern,
    len_k: int | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The lists of a pattern seen from the keys (see `BlockPattern.transpose`), also of a packed batch.

    Args:
        len_k: the rows of `key`; default `pattern.seq_lengths[1]`.
        cu_seqlens_q, cu_seqlens_k: int32 `[sequences + 1]` of a packed batch. Its key block n of sequence s is number
            `sum over t < s of ceil(length_k[t] / block_k)` + n.

    Returns:
        offsets int32 `[B|1, H|1, blocks + 1]` and slots int32 `[B|1, H|1, Mq * slots_per_row]`, where blocks is
        ceil(len_k / block_k), for a packed batch len_k // block_k + sequences.
    """
    return torch.ops.sparsekit.transpose_block_lists(
        pattern.kv_num_blocks,
        pattern.kv_indices,
        pattern.full_kv_num_blocks,
        pattern.full_kv_indices,
        pattern.block_size,
        pattern.seq_lengths[1] if len_k is None else len_k,
        cu_seqlens_q,
        cu_seqlens_k,
    )
