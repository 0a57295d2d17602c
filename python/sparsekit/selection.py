"""What attention looks at: scores of blocks, columns and rows, the choice of the best, and the lists built from it.

    scores = block_scores(query, key, 64, causal=True)                          what each block may be worth
    indices, counts = select_top_p(scores.softmax(-1), 0.95, sink=1, local=2)   which are worth looking at
    pattern = BlockPattern.from_indices(indices, counts, 64, seq_lengths=(Sq, Sk), causal=True)

Everything stays on the device, with lists of fixed length: no host sync, no workspace that depends on the data. Scores
and choices may be of blocks, single keys, tokens or clusters. With pictures: docs/selection.md.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ._lists import pair
from ._token_orders import axis_order, inverse_permutation, permute_tokens, token_order
from .formats import BlockPattern

__all__ = [
    "VerticalSlashLists",
    "attention_block_map",
    "axis_order",
    "block_lists_from_bool",
    "block_scores",
    "column_scores",
    "inverse_permutation",
    "permute_tokens",
    "row_limits",
    "row_scores",
    "select_threshold",
    "select_top_k",
    "select_top_p",
    "token_order",
    "transpose_block_lists",
    "union_block_lists",
    "vertical_slash_lists",
]

_ops = torch.ops.sparsekit

# The ops take numbers: strings that cross torch's stable ABI are never freed (torch 2.13).
_BLOCK_REDUCES = ("mean", "max", "antidiagonal")
_ROW_REDUCES = ("sum", "max")


def _number(reduce: str, supported: tuple[str, ...]) -> int:
    if reduce not in supported:
        raise ValueError(f"reduce is {reduce!r}; supported: {', '.join(map(repr, supported))}")
    return supported.index(reduce)


# ---- block lists


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


# ---- scores


def block_scores(
    query: Tensor,
    key: Tensor,
    block_size: int | tuple[int, int],
    *,
    reduce: str = "mean",
    causal: bool = False,
    scale: float | None = None,
    stride: int = 16,
    self_similarity: bool = False,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_k: int | None = None,
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """How much each block of queries may want each block of keys: one number per block, without an Sq x Sk buffer.

    Scores are logits: their softmax over a row is an estimate of the row's share of attention, whatever `reduce` is.

    Args:
        query, key: `[B, Hq, Sq, D]`, `[B, Hkv, Sk, D]`, Hq a multiple of Hkv; float32, bfloat16, float16 (float64 on the
            CPU). Packed: `[Tq, Hq, D]`, `[Tk, Hkv, D]` with both `cu_seqlens`.
        block_size: tokens per block, or a pair (query, key).
        reduce: over the pairs of a block that see each other

            * "mean": of scale * q.k, the product of the mean query and the mean key (SpargeAttn, SeerAttention); a block
              that causality cuts averages the pairs it leaves. One read of query and key.
            * "max": of scale * q.k, of all pairs: half the work of dense attention.
            * "antidiagonal": the logarithm of the block's share of attention as XAttention estimates it (arXiv 2503.16428,
              algorithm 1): the mean of the antidiagonal of each `stride` x `stride` tile, a softmax over the tiles of a
              row, summed over the block's columns and averaged over its rows of tiles. 1 / stride of the work of q.k.
        causal: row i sees keys up to i + Sk - Sq. Blocks without any visible pair are -inf.
        scale: default D ** -0.5.
        stride: of "antidiagonal"; divides both block sizes.
        self_similarity: also how alike a block's tokens are, the mean cosine of all their pairs (SpargeAttn, arXiv
            2502.18137): where it is low, a block's mean says little about its tokens.
        cu_seqlens_q, cu_seqlens_k: int32 `[sequences + 1]`; max_seqlen_k: of a sequence, default Tk.

    Returns:
        float32 `[B, Hq, Mq, Nk]`, Mq = ceil(Sq / block), Nk = ceil(Sk / block); differentiable, the maximum through the
        first pair that has it. Packed: `[1, Hq, Tq // block + sequences, ceil(max_seqlen_k / block)]`, rows are the query
        blocks of all sequences one after the other, columns the key blocks of their sequence, what lies past either is
        -inf. With `self_similarity` (scores, q_similarity `[B, Hq, Mq]`, k_similarity `[B, Hkv, Nk]`), without gradients;
        packed k_similarity is `[1, Hkv, Tk // block + sequences]`, numbered over all sequences.
    """
    reduction = _number(reduce, _BLOCK_REDUCES)
    options = (pair(block_size, "block_size"), reduction, causal, scale, stride, cu_seqlens_q, cu_seqlens_k)
    longest = _longest(key, max_seqlen_k)
    scores, q_similarity, k_similarity = _ops.block_scores(query, key, *options, longest, self_similarity)
    return (scores, q_similarity, k_similarity) if self_similarity else scores


def column_scores(
    probe_query: Tensor,
    key: Tensor,
    probe_positions: Tensor,
    *,
    causal: bool = True,
    scale: float | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention that a few probe rows pay to each key and along each diagonal: exact softmax, summed over the rows.

    What vertical and slash lines are chosen from (MInference, arXiv 2407.02490: the last 64 queries; SampleAttention,
    arXiv 2406.15486: sampled ones).

    Args:
        probe_query: `[B, Hq, P, D]`, some rows of query; packed `[P, Hq, D]`.
        key: `[B, Hkv, Sk, D]`; packed `[Tk, Hkv, D]`.
        probe_positions: int32 `[P]` or `[B, P]`: which key position each row stands at (its row + Sk - Sq).
        causal: a row sees keys up to its position; else all.
        cu_seqlens_q, cu_seqlens_k: int32 `[sequences + 1]`, of the probe rows and of the keys.

    Returns:
        columns, diagonals: float32 `[B, Hq, Sk]` (packed `[Hq, Tk]`), without gradients. Diagonal o holds the pairs with
        probe position - key position = o >= 0. Each sums to the number of probe rows (where causal).
    """
    positions = probe_positions.to(torch.int32)
    positions = positions[None] if positions.dim() == 1 else positions
    tensors = (probe_query.detach(), key.detach(), positions)
    return _ops.column_scores(*tensors, causal, scale, cu_seqlens_q, cu_seqlens_k)


def row_scores(
    query: Tensor,
    key: Tensor,
    lse: Tensor,
    *,
    rows: Tensor | None = None,
    reduce: str = "sum",
    causal: bool = False,
    scale: float | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
) -> Tensor:
    """Normalised attention that all rows, or those named, pay to each key: what token pruning and KV eviction read.

    Args:
        query, key: as in `block_scores`.
        lse: float32 `[B, Hq, Sq]` (packed `[Hq, Tq]`) as `block_sparse_attention(..., return_lse=True)` returns it.
        rows: int32 `[R]` or `[B, R]` row numbers (packed: of the packed tensor), -1 for an empty slot. Default: all.
        reduce: "sum" or "max" over the rows.

    Returns:
        float32 `[B, Hq, Sk]` (packed `[Hq, Tk]`), without gradients.
    """
    if rows is not None:
        rows = rows.to(torch.int32)
        rows = rows[None] if rows.dim() == 1 else rows
    tensors = (query.detach(), key.detach(), lse.detach(), rows)
    return _ops.row_scores(*tensors, _number(reduce, _ROW_REDUCES), causal, scale, cu_seqlens_q, cu_seqlens_k)


def attention_block_map(
    query: Tensor,
    key: Tensor,
    lse: Tensor,
    pattern: BlockPattern | int | tuple[int, int],
    *,
    reduce: str = "max",
    scale: float | None = None,
    causal: bool | None = None,
    window: tuple[int, int] | None = None,
    softcap: float | None = None,
    key_bias: Tensor | None = None,
    query_positions: Tensor | None = None,
    key_positions: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_k: int | None = None,
) -> Tensor:
    """The attention map pooled over blocks: the largest weight of each block, or their sum, beside the output.

    The target that SeerAttention (arXiv 2410.13276) trains its gate with: without gradients, and without an Sq x Sk buffer.

    Args:
        query, key: as in `block_scores`; lse: as in `row_scores`.
        pattern: a block size, for the map of all blocks; or a BlockPattern, for the blocks that it lists (its masks apply).
        reduce: "max" or "sum".
        scale, softcap, key_bias, query_positions, key_positions: those of the attention call that returned `lse`.
        causal, window: with a block size only: a pattern has its own.
        cu_seqlens_q, cu_seqlens_k, max_seqlen_k: of a packed batch.

    Returns:
        float32 `[B, Hq, Mq, Nk]`, 0 where nothing is seen. For a pattern `[B, Hq, Mq, slots]`: slot by slot of its
        partial list (`kv_indices`), then of its full list; 0 in empty slots.
    """
    lists: tuple = (None,) * 6
    if isinstance(pattern, BlockPattern):
        if causal is not None or window is not None:
            raise ValueError("causal, window: found beside a pattern, which has its own; supported with a block size")
        if pattern.query_offset is not None:
            raise ValueError("pattern: found rows cut by slice_rows; pass the query_positions they stand at instead")
        lists = (pattern.kv_num_blocks, pattern.kv_indices, pattern.full_kv_num_blocks, pattern.full_kv_indices)
        lists = (*lists, pattern.partial_bits, pattern.partial_bits_index)
        causal, window, block_size = pattern.causal, pattern.window, pattern.block_size
    else:
        causal, block_size = bool(causal), pair(pattern, "pattern")
        window = (-1, -1) if window is None else window
    return _ops.attention_block_map(
        *(query.detach(), key.detach(), lse.detach(), *lists, block_size),
        *(_number(reduce, _ROW_REDUCES), scale, causal, window),
        *(softcap or 0.0, key_bias, query_positions, key_positions, cu_seqlens_q, cu_seqlens_k),
        _longest(key, max_seqlen_k),
    )


def _longest(key: Tensor, max_seqlen_k: int | None) -> int:
    return (key.shape[0] if max_seqlen_k is None else max_seqlen_k) if key.dim() == 3 else 0


# ---- choices


def select_top_k(
    scores: Tensor,
    k: int | Tensor,
    *,
    min_count: int = 0,
    max_count: int | None = None,
    sink: int = 0,
    local: int = 0,
    row_limit: Tensor | None = None,
    return_mass: bool = False,
) -> tuple[Tensor, ...]:
    """The k best entries of every row.

    Args:
        scores: `[..., N]`; float32, bfloat16, float16. The entries may be blocks, columns, tokens, clusters. Those whose
            score is -inf or NaN are never chosen.
        k: how many, or an integer tensor that broadcasts to `[...]`.
        min_count, max_count: bounds of the count; there are never more than can be chosen.
        sink, local: the first `sink` entries and the last `local` before `row_limit` are chosen first, and count.
        row_limit: integers that broadcast to `[...]`: entries from there on are not looked at (see `row_limits`).
        return_mass: also the sum of the chosen scores, float32 `[...]`.

    Returns:
        indices int32 `[..., K]`, ascending, -1 past the count, and counts int32 `[...]`: what
        `BlockPattern.from_indices` takes. K is k and at most max_count; for a tensor k max_count, default N. Of equal
        scores (-0 equals 0) the lower index is chosen. No gradients; the same entries on every backend.
    """
    rows = _Rows(scores, row_limit)
    if isinstance(k, Tensor):
        width, row_k, k = max_count, rows.spread(k, torch.int32), 0
    else:
        width, row_k = (k if max_count is None else min(k, max_count)), None
    options = rows.options(width, min_count, sink, local, return_mass)
    return rows.result(_ops.select_top_k(rows.scores, row_k, k, *options), return_mass)


def select_top_p(
    probs: Tensor,
    p: float | Tensor,
    *,
    scope: str = "row",
    weights: Tensor | None = None,
    min_count: int = 0,
    max_count: int | None = None,
    sink: int = 0,
    local: int = 0,
    row_limit: Tensor | None = None,
    return_mass: bool = False,
) -> tuple[Tensor, ...]:
    """The fewest entries of every row that hold a share p of its mass (SpargeAttn's and SampleAttention's cumulative
    share, Twilight's top-p).

    Args:
        probs: `[..., N]`; probabilities, or anything that adds up (attention that columns received): p is a share of all
            that may be chosen, whatever it sums to. What is negative has no mass.
        p: 0 (none) to 1 (all that have a mass), or a tensor that broadcasts to `[...]`.
        scope: "row"; or "head": the fewest of all rows of `probs [..., M, N]` together, so that flat rows get more than
            peaked ones. A tensor p then broadcasts to the dimensions before M; the bounds hold for every row.
        weights: broadcasts to probs: the mass of an entry is probs * weights, as for clusters of several tokens (Sparse
            VideoGen2, arXiv 2505.18875). The best are those with the most mass.
        sink, local: their mass counts; the rest is filled with the best others.
        min_count, max_count, row_limit, return_mass: as in `select_top_k`; the mass is that of probs * weights.

    Returns:
        indices, counts and, if asked for, mass, as in `select_top_k`. K is max_count, default N.

    Masses are compared in whole units of about 2^-(52 - log2 N) of the row's largest (with "head", of the head's), so that
    sums are exact and the choice is the same on every backend.
    """
    if scope not in ("row", "head"):
        raise ValueError(f"scope: found {scope!r}, supported are 'row' and 'head'")
    rows = _Rows(probs, row_limit)
    by_head, row_p = scope == "head", None
    if isinstance(p, Tensor):
        row_p, p = rows.spread(p, torch.float32, per_head=by_head), 0.0
    elif not 0.0 <= p <= 1.0:
        raise ValueError(f"p: found {p}, supported is a share from 0 to 1")
    if weights is not None:
        weights = rows.spread_entries(weights)
    options = rows.options(max_count, min_count, sink, local, return_mass)
    return rows.result(_ops.select_top_p(rows.scores, weights, row_p, p, by_head, *options), return_mass)


def select_threshold(
    scores: Tensor,
    threshold: float | Tensor,
    *,
    anchor: Tensor | None = None,
    min_count: int = 0,
    max_count: int | None = None,
    sink: int = 0,
    local: int = 0,
    row_limit: Tensor | None = None,
    return_mass: bool = False,
) -> tuple[Tensor, ...]:
    """All entries that reach a threshold; of more than max_count the best.

    Args:
        scores: `[..., N]`, as in `select_top_k`.
        threshold: entries with score >= threshold are chosen. A number, or a tensor that broadcasts to `[...]`.
        anchor: broadcasts to `[...]`: chosen are entries with score >= anchor - threshold, at most `threshold` below the
            row's anchor (AnchorAttention, arXiv 2505.23520).
        min_count, max_count, sink, local, row_limit, return_mass: as in `select_top_k`.

    Returns:
        indices, counts and, if asked for, mass, as in `select_top_k`. K is max_count, default N.
    """
    rows = _Rows(scores, row_limit)
    if anchor is not None:
        threshold = anchor.float() - threshold
    if not isinstance(threshold, Tensor):
        threshold = torch.full((), threshold, dtype=torch.float32, device=scores.device)
    options = rows.options(max_count, min_count, sink, local, return_mass)
    return rows.result(_ops.select_threshold(rows.scores, rows.spread(threshold, torch.float32), *options), return_mass)


class _Rows:
    """Scores `[..., N]` as the ops take them, `[heads, rows, N]`, with all that belongs to the rows."""

    def __init__(self, scores: Tensor, row_limit: Tensor | None):
        if scores.dim() == 0:
            raise ValueError("scores: found a single number, supported is [..., N]")
        self.shape = scores.shape
        self.scores = self._three(scores.detach(), 3)
        self.row_limit = None if row_limit is None else self.spread(row_limit, torch.int32)

    @staticmethod
    def _three(tensor: Tensor, dims: int) -> Tensor:
        while tensor.dim() < dims:
            tensor = tensor[None]
        return tensor.flatten(0, tensor.dim() - dims)

    def spread(self, value: Tensor, dtype: torch.dtype, per_head: bool = False) -> Tensor:
        leading = self.shape[:-2] if per_head else self.shape[:-1]
        return self._three(value.detach().to(dtype).expand(leading), 1 if per_head else 2)

    def spread_entries(self, weights: Tensor) -> Tensor:
        """`[heads, rows|1, N]`: rows stay broadcast where they are."""
        weights = weights.detach().float()
        rows = weights.shape[-2] if weights.dim() > 1 and len(self.shape) > 1 else 1
        sizes = (*self.shape[:-2], rows, self.shape[-1])
        return self._three(weights.expand(sizes[-max(len(self.shape), 2) :]), 3)

    def options(self, width: int | None, min_count: int, sink: int, local: int, return_mass: bool) -> tuple:
        width, bounded = (self.shape[-1], False) if width is None else (width, True)
        for name, value in (("min_count", min_count), ("sink", sink), ("local", local), ("max_count", width)):
            if value < 0:
                raise ValueError(f"{name}: found {value}, supported are 0 and more")
        if bounded and width < self.shape[-1] and (sink + local > width or min_count > width):
            raise ValueError(
                f"sink, local, min_count: found {sink}, {local}, {min_count}; supported are sink + local and min_count "
                f"up to the length of the lists, {width} (k or max_count)"
            )
        return width, min_count, sink, local, self.row_limit, return_mass

    def result(self, outputs: tuple[Tensor, Tensor, Tensor], return_mass: bool) -> tuple[Tensor, ...]:
        indices, counts, mass = outputs
        leading = self.shape[:-1]
        outputs = indices.reshape(*leading, indices.shape[-1]), counts.reshape(leading)
        return (*outputs, mass.reshape(leading)) if return_mass else outputs


def row_limits(
    block_size: int | tuple[int, int],
    seq_lengths: tuple[int, int],
    *,
    causal: bool = True,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """How many key blocks each query block may choose from: the `row_limit` of the choices.

    Args:
        block_size: tokens per block, or a pair (query, key).
        seq_lengths: (Sq, Sk), of a packed batch (Tq, Tk).
        causal: only blocks that some row of the query block sees; else all of the sequence.
        cu_seqlens_q, cu_seqlens_k: int32 `[sequences + 1]` of a packed batch.
        device: default that of cu_seqlens_q, else the CPU.

    Returns:
        int32 `[Mq]`, packed `[Tq // block + sequences]` (0 past the last query block).
    """
    (block_q, block_k), (len_q, len_k) = pair(block_size, "block_size"), seq_lengths
    if cu_seqlens_q is None:
        first = torch.arange(0, len_q, block_q, device=device)
        visible = (first + block_q).clamp(max=len_q) + (len_k - len_q) if causal else torch.full_like(first, len_k)
        return (visible.clamp(min=0) + block_k - 1).div(block_k, rounding_mode="floor").to(torch.int32)
    lengths_q, lengths_k = cu_seqlens_q.diff().long(), cu_seqlens_k.diff().long()
    row_blocks = (lengths_q + block_q - 1) // block_q
    ends = row_blocks.cumsum(0)
    row = torch.arange(len_q // block_q + lengths_q.numel(), device=cu_seqlens_q.device)
    if lengths_q.numel() == 0:
        return row.to(torch.int32)
    sequence = torch.searchsorted(ends, row, right=True)
    inside = sequence.clamp(max=lengths_q.numel() - 1)
    length_q, length_k = lengths_q[inside], lengths_k[inside]
    first = (row - (ends - row_blocks)[inside]) * block_q
    visible = torch.minimum(first + block_q, length_q) + length_k - length_q if causal else length_k
    limits = (visible.clamp(min=0) + block_k - 1) // block_k
    return limits.where(sequence < lengths_q.numel(), 0).to(torch.int32)


# ---- builders


class VerticalSlashLists(NamedTuple):
    """Block lists for `BlockPattern.from_indices`, and the columns beside them."""

    indices: Tensor  # int32 [B, H, Mq, K], ascending, -1 past the count
    counts: Tensor  # int32 [B, H, Mq]
    column_indices: Tensor  # int32 [B, H, Mq, V]
    column_counts: Tensor  # int32 [B, H, Mq]


def vertical_slash_lists(
    vertical: Tensor,
    slash: Tensor,
    block_size: int | tuple[int, int],
    seq_lengths: tuple[int, int],
    *,
    capacity: int | None = None,
) -> VerticalSlashLists:
    """Vertical and slash lines of causal heads as block lists and, for what no block covers, column lists (MInference,
    arXiv 2407.02490).

    Args:
        vertical: int32 `[B, H, V]` key positions that every later row sees; -1 is an empty slot.
        slash: int32 `[B, H, L]` distances o >= 0: row at position p sees key p - o; -1 is an empty slot.
        block_size: tokens per block, or a pair (query, key).
        seq_lengths: (Sq, Sk); row i stands at i + Sk - Sq.
        capacity: K, default what L slashes can touch: min(Nk, L * (1 + ceil((block_q - 1) / block_k))). A row that needs
            more keeps its first K.

    Returns:
        Per query block the key blocks that its slashes touch, and the vertical positions up to its last row that none of
        these blocks holds. Both without duplicates. Causality cuts blocks and columns where they are attended to.
    """
    (block_q, block_k), (len_q, len_k) = pair(block_size, "block_size"), seq_lengths
    if capacity is None:
        per_slash = 1 + -(-(block_q - 1) // block_k)
        capacity = torch.sym_min(-(-len_k // block_k), slash.shape[-1] * per_slash)
    vertical, slash = vertical.to(torch.int32), slash.to(torch.int32)
    return VerticalSlashLists(*_ops.vertical_slash_lists(vertical, slash, (block_q, block_k), len_q, len_k, capacity))


def union_block_lists(
    indices: Tensor, counts: Tensor, heads: int, *, key_blocks: int, capacity: int | None = None
) -> tuple[Tensor, Tensor]:
    """Lists per query head as lists per key head: what any query head of the group wants, ascending, each block once.

    Args:
        indices, counts: int32 `[B, Hq, Mq, K]`, `[B, Hq, Mq]`.
        heads: of the result; divides Hq.
        key_blocks: Nk; entries are 0 to Nk - 1, or -1.
        capacity: of the result, default min(Nk, K * Hq / heads). A row with more blocks keeps its first.

    Returns:
        indices int32 `[B, heads, Mq, capacity]`, -1 past the count, and counts int32 `[B, heads, Mq]`.
    """
    if capacity is None:
        capacity = torch.sym_min(key_blocks, indices.shape[-1] * (indices.shape[1] // max(heads, 1)))
    return _ops.union_block_lists(indices, counts, heads, key_blocks, capacity)
