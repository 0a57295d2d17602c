"""Block-sparse attention: the public functions. docs/semantics.md has every edge case.

    score[i, j] = softcap(scale * q_i . k_j) + key_bias_j                softcap(x) = c * tanh(x / c)
    out_i       = sum_j exp(score[i, j]) v_j / (sum_j exp(score[i, j]) + exp(sink))
    lse_i       = log sum_j exp(score[i, j])                             without the sink

over the keys j that row i sees. Torch's side of the ops (autograd, fake kernels, ...) is in _registrations/.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .formats import BlockPattern, as_pattern, capturing

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

__all__ = ["block_sparse_attention", "block_sparse_attention_varlen", "check", "merge_attention_states"]

_MERGE_LIMIT = 16  # states that one call of the op takes on CUDA


def block_sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pattern: BlockPattern | BlockMask,
    *,
    scale: float | None = None,
    key_bias: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    query_positions: Tensor | None = None,
    key_positions: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of each query over the keys in the blocks that its query block lists.

    Args:
        query: `[B, Hq, Sq, D]`; float32, float16 or bfloat16 (on the CPU also float64, slowly).
        key, value: `[B, Hkv, Sk, D]` and `[B, Hkv, Sk, Dv]`, in query's dtype; Hq is a multiple of Hkv. Used in place
            where the last stride is 1 and base and other strides are multiples of 16 bytes, else copied once.
        pattern: which key blocks each query block lists, and causality and window inside them. A FlexAttention
            BlockMask is converted at its first use (`BlockPattern.from_flex`); inside torch.compile, convert it before.
        scale: default 1 / sqrt(D).
        key_bias: float32 `[B|1, Hq|1, Sk]`, added to the scores after softcap. -inf hides a key: this is the argument
            for padding. Differentiable.
        softcap: scores become softcap * tanh(score / softcap); None or 0: they do not.
        sinks: float32 `[Hq]`, one more logit per head, without a value. They scale `out` and leave lse alone.
            Differentiable.
        query_positions, key_positions: int32 `[B|1, Sq]`, `[B|1, Sk]`, any order: causality and window compare these
            instead of i + Sk - Sq and j. Full blocks do not look at them, so a pattern that was sorted by causality or
            window must have been built with them.
        return_lse: also return lse.

    Returns:
        out `[B, Hq, Sq, Dv]` in query's dtype and stride order; with `return_lse` also lse `[B, Hq, Sq]`, float32
        (float64 for float64), natural logarithm, differentiable. A row that sees no key is 0, its lse -inf.

    Raises:
        ValueError, TypeError, RuntimeError: an argument does not fit; the message names it, what was found and what is
            supported. A bad list entry raises on the CPU; on CUDA it is skipped unless SPARSEKIT_CHECK=1 is set.

    Sources: FlashAttention-2 (arXiv 2307.08691), block lists as in FlexAttention (arXiv 2412.05496).
    """
    pattern = as_pattern(pattern)
    _check_call(pattern, query_positions is not None or key_positions is not None, packed=False)
    if query.dim() != 4 or key.dim() != 4:
        raise ValueError(
            f"query, key: found shapes {tuple(query.shape)}, {tuple(key.shape)}, supported are [B, Hq, Sq, D], "
            "[B, Hkv, Sk, D] (packed batches: block_sparse_attention_varlen)"
        )
    lengths = (query.shape[2], key.shape[2])
    if pattern.seq_lengths != lengths:
        raise ValueError(
            f"pattern: found seq_lengths {pattern.seq_lengths}, but query and key have {lengths} rows; build it with "
            f"seq_lengths={lengths}"
        )
    if query_positions is None and pattern.query_offset is not None and pattern.has_mask:
        rows = torch.arange(lengths[0], dtype=torch.int32, device=query.device)
        query_positions = (rows + pattern.query_offset)[None]
    if _checks_wanted(query):
        check(pattern, query=query, key=key)
    transpose = (pattern.transpose_offsets, pattern.transpose_slots)
    if transpose[0] is None and _keeps_transpose(query, key, value, key_bias, sinks):
        transpose = pattern.transpose()
    out, lse = torch.ops.sparsekit.block_sparse_attn(
        query,
        key,
        value,
        *_lists(pattern),
        pattern.block_size,
        scale,
        pattern.causal,
        pattern.window,
        softcap or 0.0,
        key_bias,
        sinks,
        query_positions,
        key_positions,
        *transpose,
    )
    return (out, lse) if return_lse else out


def block_sparse_attention_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pattern: BlockPattern,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    scale: float | None = None,
    key_bias: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    query_positions: Tensor | None = None,
    key_positions: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """The same for a packed batch: sequences of different lengths one after the other, without padding.

    Args:
        query, key, value: `[Tq, Hq, D]`, `[Tk, Hkv, D]`, `[Tk, Hkv, Dv]`.
        pattern: lists of batch dimension 1. Its rows are the query blocks of all sequences one after the other, each
            sequence rounded up; its indices count key blocks inside the sequence. With causality or a window it must
            have been built with the same `cu_seqlens_q`, `cu_seqlens_k` (or with the plain constructor).
        cu_seqlens_q, cu_seqlens_k: int32 `[sequences + 1]`: sequence s is the rows `cu_seqlens[s]` up to
            `cu_seqlens[s + 1]`. Rows of no sequence are 0, their lse -inf.
        max_seqlen_q, max_seqlen_k: no sequence is longer. Bounds that are too large cost time, not results.
        key_bias, query_positions, key_positions: packed too: `[1, Hq|1, Tk]`, `[1, Tq]`, `[1, Tk]`.
        scale, softcap, sinks, return_lse: see `block_sparse_attention`.

    Returns:
        out `[Tq, Hq, Dv]`; with `return_lse` also lse `[Hq, Tq]`.

    Raises:
        ValueError, TypeError, RuntimeError: see `block_sparse_attention`.
    """
    pattern = as_pattern(pattern)
    _check_call(pattern, query_positions is not None or key_positions is not None, packed=True)
    if query.dim() != 3 or key.dim() != 3:
        raise ValueError(
            f"query, key: found shapes {tuple(query.shape)}, {tuple(key.shape)}, supported are [Tq, Hq, D], "
            "[Tk, Hkv, D]"
        )
    if _checks_wanted(query):
        check(pattern, query=query, key=key, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k)
    out, lse = torch.ops.sparsekit.block_sparse_attn_varlen(
        query,
        key,
        value,
        *_lists(pattern),
        pattern.block_size,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        scale,
        pattern.causal,
        pattern.window,
        softcap or 0.0,
        key_bias,
        sinks,
        query_positions,
        key_positions,
        pattern.transpose_offsets,
        pattern.transpose_slots,
    )
    return (out, lse) if return_lse else out


def merge_attention_states(outs: Sequence[Tensor], lses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """One attention state from states of the same queries over disjoint sets of keys.

    lse = log sum_s exp(lse_s), out = sum_s exp(lse_s - lse) out_s. Differentiable. States of rows that saw no key
    (lse -inf) count for nothing, and merge to such a state.

    An lse knows nothing of sinks: of the calls whose states are merged, none may have had `sinks`. To apply them, scale
    the merged state: `out * torch.sigmoid(lse - sinks[None, :, None])[..., None]`.

    Args:
        outs: tensors `[B, H, S, Dv]` of one dtype, or of packed batches `[T, H, Dv]`.
        lses: as many float32 tensors `[B, H, S]`, or `[H, T]`.

    Returns:
        out and lse of the same shapes.
    """
    outs, lses = list(outs), list(lses)
    if not outs or len(outs) != len(lses):
        raise ValueError(
            f"outs, lses: found {len(outs)} and {len(lses)} tensors, supported are equally many, at least 1"
        )
    packed = outs[0].dim() == 3
    if packed:
        outs, lses = [out.transpose(0, 1)[None] for out in outs], [lse[None] for lse in lses]
    out, lse = torch.ops.sparsekit.merge_attention_states(outs[:_MERGE_LIMIT], lses[:_MERGE_LIMIT])
    step = _MERGE_LIMIT - 1
    for s in range(_MERGE_LIMIT, len(outs), step):
        out, lse = torch.ops.sparsekit.merge_attention_states([out, *outs[s : s + step]], [lse, *lses[s : s + step]])
    return (out[0].transpose(0, 1), lse[0]) if packed else (out, lse)


def check(
    pattern: BlockPattern | BlockMask | None,
    *,
    query: Tensor | None = None,
    key: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    col_indices: Tensor | None = None,
    col_counts: Tensor | None = None,
    duplicates: bool = True,
) -> None:
    """Raises if lists are not right: an index out of range, a count larger than its list, a block or column listed
    twice.

    Reads the lists on the CPU, so on CUDA it waits for the device. With SPARSEKIT_CHECK=1 in the environment every
    attention call does it; not while compiling or capturing a graph.

    Args:
        pattern: block lists; None where a call of `stripe_sparse_attention` has none.
        query, key: the tensors of a call, to check the lists' shape against them too. Columns need `key`.
        cu_seqlens_q, cu_seqlens_k: int32 `[sequences + 1]` of a packed batch.
        col_indices, col_counts: the columns of `stripe_sparse_attention`.
        duplicates: also look for blocks listed twice, which would count twice, and for columns listed twice.

    Raises:
        ValueError: the lists do not fit `query` and `key`.
        RuntimeError: the first bad entry, by its place.
    """
    if col_indices is not None and col_counts is not None:
        if key is None:
            raise ValueError("key: None found beside columns, supported is the key of the call, whose rows they are")
        torch.ops.sparsekit.check_column_lists(col_indices.cpu(), col_counts.cpu(), key.shape[2], duplicates)
    if pattern is None:
        return
    pattern = as_pattern(pattern)
    packed = cu_seqlens_q is not None
    axes = (0, 1, 0) if packed else (2, 1, None)  # of rows and heads, and of the batch where there is one
    len_k = pattern.seq_lengths[1] if key is None else key.shape[axes[0]]
    if not packed:
        rows = -(-pattern.seq_lengths[0] // pattern.block_size[0])
        if pattern.kv_indices.shape[2] != rows:
            raise ValueError(
                f"pattern: found {pattern.kv_indices.shape[2]} rows of lists, supported are {rows}: seq_lengths "
                f"{pattern.seq_lengths} in blocks of {pattern.block_size}"
            )
    if query is not None and key is not None:
        lengths = (query.shape[axes[0]], key.shape[axes[0]])
        if not packed and pattern.seq_lengths != lengths:
            raise ValueError(f"pattern: found seq_lengths {pattern.seq_lengths}, query and key have {lengths} rows")
        heads = (1, key.shape[1], query.shape[1])
        if pattern.kv_indices.shape[1] not in heads:
            raise ValueError(
                f"pattern: found lists of {pattern.kv_indices.shape[1]} heads, supported are 1, {heads[1:]}"
            )
        batches = (1,) if packed else (1, query.shape[0])
        if pattern.kv_indices.shape[0] not in batches:
            raise ValueError(f"pattern: found lists of batch {pattern.kv_indices.shape[0]}, supported are {batches}")
    lists = [None if tensor is None else tensor.cpu() for tensor in _lists(pattern)]
    cu_seqlens = [None if tensor is None else tensor.cpu() for tensor in (cu_seqlens_q, cu_seqlens_k)]
    torch.ops.sparsekit.check_block_lists(*lists, pattern.block_size, len_k, *cu_seqlens, duplicates)


# ---- details


def _lists(pattern: BlockPattern) -> tuple[Tensor | None, ...]:
    return (
        pattern.kv_num_blocks,
        pattern.kv_indices,
        pattern.full_kv_num_blocks,
        pattern.full_kv_indices,
        pattern.partial_bits,
        pattern.partial_bits_index,
    )


def _check_call(pattern: BlockPattern, positions: bool, packed: bool) -> None:
    """That rows stand where they stood when causality and window sorted the pattern's blocks."""
    if pattern.assumes == "any":
        return
    if pattern.assumes == "packed" and not packed:
        raise ValueError("pattern: built for packed batches (cu_seqlens_q=), which block_sparse_attention_varlen takes")
    if pattern.assumes != "packed" and packed:
        raise ValueError(
            "pattern: causality or window sorted its blocks for one sequence; build it with cu_seqlens_q= and "
            "cu_seqlens_k="
        )
    if (pattern.assumes == "positions") != positions:
        raise ValueError(
            "query_positions, key_positions: causality or window sorted the pattern's blocks "
            + ("by positions, and the call has none" if not positions else "without them; build it with the same ones")
        )


def _checks_wanted(query: Tensor) -> bool:
    if torch.compiler.is_compiling() or os.environ.get("SPARSEKIT_CHECK", "0") in ("", "0"):
        return False
    return not capturing(query)


def _keeps_transpose(*tensors: Tensor | None) -> bool:
    """Whether a backward will come for which the pattern should keep its transpose (see BlockPattern.transpose)."""
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    return any(tensor is not None and tensor.requires_grad for tensor in tensors) and not capturing(tensors[0])
