"""Stripe-sparse attention: columns of keys beside blocks, a sink and a local band. docs/stripes.md has the details.

    a row sees      its group's columns, the first `sink` keys, the last `local` keys up to itself, its pattern's blocks
    and of these    each key once: out_i = sum_j exp(score[i, j]) v_j / sum_j exp(score[i, j]), as in attention.py

The shape of long prompts' attention: AnchorAttention, MInference (arXiv 2407.02490) and SampleAttention (arXiv
2406.15486) attend to columns.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .attention import _check_call, _checks_wanted, _lists, check, merge_attention_states
from .formats import BlockPattern, as_pattern

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

__all__ = ["stripe_sparse_attention"]

_NO_LISTS = (None,) * 6
_NO_BLOCKS = (128, 128)  # a block size where there is no block


def stripe_sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    col_indices: Tensor,
    col_counts: Tensor,
    *,
    group_size: int,
    sink: int = 0,
    local: int = 0,
    pattern: BlockPattern | BlockMask | None = None,
    state: tuple[Tensor, Tensor] | None = None,
    scale: float | None = None,
    causal: bool = False,
    key_bias: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    query_positions: Tensor | None = None,
    key_positions: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of each query over the columns of its group, the sink, the local keys and the blocks it lists.

    Args:
        query, key, value: `[B, Hq, Sq, D]`, `[B, Hkv, Sk, D]`, `[B, Hkv, Sk, Dv]`, as `block_sparse_attention` takes
            them.
        col_indices: int32 `[B|1, H|1, G, max]`, the keys that group g of query rows (rows g * group_size up to
            (g + 1) * group_size) sees, in any order; H is the query's heads or the key's. -1 is an empty slot.
        col_counts: int32 `[B|1, H|1, G]`, slots in use; what stands past the count is not read.
        group_size: query rows of a group; G is ceil(Sq / group_size). Fast where it is a multiple of 16.
        sink: every row sees the keys at positions below `sink`.
        local: a row at position p sees the keys at positions p - local + 1 to p. These two add keys, where a pattern's
            window takes some away; 0 is none.
        pattern: blocks that rows see too, as in `block_sparse_attention`. Its own mask (bits, causality, window, full
            blocks) is for its blocks; `causal` must be the pattern's.
        state: `(out, lse)` of an earlier call on the same queries and other keys, which this one resumes: the result
            is that of one call over all keys. Differentiable. Of the calls only the last may have `sinks`.
        causal: columns and sink keys are seen only up to the row's position: i + Sk - Sq, or `query_positions`.
        scale, key_bias, softcap, sinks, query_positions, key_positions, return_lse: see `block_sparse_attention`.
            Sink, local and causality compare positions where they are given.

    Returns:
        out `[B, Hq, Sq, Dv]` in query's dtype and stride order; with `return_lse` also lse `[B, Hq, Sq]`, float32.
        A row that sees no key is 0, its lse -inf. A key that columns, sink, local keys and blocks show more than once
        counts once.

    Raises:
        ValueError, TypeError, RuntimeError: an argument does not fit; the message names it, what was found and what is
            supported. A bad list entry raises on the CPU. A column that one group lists twice is the caller's error;
            `sparsekit.check` finds it.
    """
    if query.dim() != 4 or key.dim() != 4:
        raise ValueError(
            f"query, key: found shapes {tuple(query.shape)}, {tuple(key.shape)}, supported are [B, Hq, Sq, D], "
            "[B, Hkv, Sk, D]"
        )
    if group_size <= 0:
        raise ValueError(f"group_size: found {group_size}, supported is a positive number of query rows")
    lists, block_size, window, transpose = _NO_LISTS, _NO_BLOCKS, (-1, -1), (None, None)
    if pattern is not None:
        pattern = as_pattern(pattern)
        query_positions = _check_pattern(pattern, query, key, causal, query_positions, key_positions)
        lists, block_size, window = _lists(pattern), pattern.block_size, pattern.window
        transpose = (pattern.transpose_offsets, pattern.transpose_slots)
    if _checks_wanted(query):
        check(pattern, query=query, key=key, col_indices=col_indices, col_counts=col_counts)
    if state is not None:
        _check_state(state, query, value)
    out, lse = torch.ops.sparsekit.stripe_sparse_attn(
        query,
        key,
        value,
        col_indices,
        col_counts,
        group_size,
        sink,
        local,
        *lists,
        block_size,
        scale,
        causal,
        window,
        softcap or 0.0,
        key_bias,
        sinks if state is None else None,
        query_positions,
        key_positions,
        *transpose,
    )
    if state is not None:
        out, lse = _merge(state, (out, lse))
        if sinks is not None:  # exp(lse) / (exp(lse) + exp(sink)), of all keys together
            out = (out * torch.sigmoid(lse - sinks[None, :, None])[..., None]).to(out.dtype)
    return (out, lse) if return_lse else out


# ---- details


def _check_pattern(
    pattern: BlockPattern,
    query: Tensor,
    key: Tensor,
    causal: bool,
    query_positions: Tensor | None,
    key_positions: Tensor | None,
) -> Tensor | None:
    """That a pattern fits the call; returns the query positions that it asks for."""
    _check_call(pattern, query_positions is not None or key_positions is not None, packed=False)
    lengths = (query.shape[2], key.shape[2])
    if pattern.seq_lengths != lengths:
        raise ValueError(
            f"pattern: found seq_lengths {pattern.seq_lengths}, but query and key have {lengths} rows; build it with "
            f"seq_lengths={lengths}"
        )
    if pattern.causal != causal:
        raise ValueError(
            f"causal: found {causal} beside a pattern with causal={pattern.causal}, supported are equal ones"
        )
    if query_positions is None and pattern.query_offset is not None:
        rows = torch.arange(lengths[0], dtype=torch.int32, device=query.device)
        query_positions = (rows + pattern.query_offset)[None]
    return query_positions


def _check_state(state: tuple[Tensor, Tensor], query: Tensor, value: Tensor) -> None:
    shapes = tuple(tuple(tensor.shape) for tensor in state)
    wanted = ((*query.shape[:3], value.shape[-1]), tuple(query.shape[:3]))
    if shapes != wanted:
        raise ValueError(f"state: found shapes {shapes}, supported are (out, lse) of {wanted[0]}, {wanted[1]}")
    if state[0].dtype != query.dtype:
        raise TypeError(f"state: found out in {state[0].dtype}, supported is query's {query.dtype}")


def _merge(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """merge_attention_states of two; in float64, which its kernels do not take, written out."""
    if a[0].dtype != torch.float64:
        return merge_attention_states([a[0], b[0]], [a[1], b[1]])
    empty = (a[1] == -torch.inf) & (b[1] == -torch.inf)
    lse_a, lse_b = (lse.masked_fill(empty, 0.0) for lse in (a[1], b[1]))
    lse = torch.logaddexp(lse_a, lse_b)
    out = torch.exp(lse_a - lse)[..., None] * a[0] + torch.exp(lse_b - lse)[..., None] * b[0]
    return out, lse.masked_fill(empty, -torch.inf)
