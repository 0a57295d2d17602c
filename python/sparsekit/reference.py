"""Block- and stripe-sparse attention in float64 with the whole mask expanded: the ground truth of the tests, written to be read.

    score[i, j] = softcap(scale * q_i . k_j) + key_bias_j
    out_i       = sum_j exp(score[i, j]) v_j / (sum_j exp(score[i, j]) + exp(sink)),     j over the keys that row i sees
    lse_i       = log sum_j exp(score[i, j])                                             -inf where it sees none

Dense: O(Sq * Sk) memory. Differentiable by autograd, any dtype in, float64 out. Values of keys that no row sees are
multiplied by 0 here, so they must be finite.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from ._lists import listed_slots, unpack_bits
from .formats import BlockPattern, as_pattern


def token_mask(
    pattern: BlockPattern, query_positions: Tensor | None = None, key_positions: Tensor | None = None
) -> Tensor:
    """bool `[B|1, H|1, Sq, Sk]`: which query sees which key."""
    (block_q, block_k), (length_q, length_k) = pattern.block_size, pattern.seq_lengths
    blocks_q, blocks_k = pattern.num_blocks
    unlisted, unmasked = -2, -1

    def spread(counts: Tensor, indices: Tensor, values: Tensor) -> Tensor:
        """`values` of the list's slots, put where their blocks are: [B, H, blocks_q, blocks_k]; elsewhere unlisted."""
        usable = listed_slots(counts, indices) & (indices >= 0) & (indices < blocks_k)
        grid = torch.full((*indices.shape[:-1], blocks_k + 1), unlisted, dtype=torch.long, device=indices.device)
        return grid.scatter_(-1, indices.where(usable, blocks_k).long(), values.long())[..., :blocks_k]

    def to_tokens(grid: Tensor) -> Tensor:
        """[B, H, blocks_q, blocks_k] or [B, H, blocks_q, blocks_k, block_q, block_k] -> [B, H, Sq, Sk]."""
        grid = grid.expand(*grid.shape[:4], block_q, block_k) if grid.dim() == 6 else grid[..., None, None]
        grid = grid.expand(*grid.shape[:4], block_q, block_k).transpose(3, 4)
        return grid.reshape(*grid.shape[:2], blocks_q * block_q, blocks_k * block_k)[..., :length_q, :length_k]

    # Partial blocks: the bits of the block where it has some, then causality and window.
    indices, bits_index = pattern.kv_indices, pattern.partial_bits_index
    bits_index = torch.full_like(indices, unmasked) if bits_index is None else bits_index.clamp(min=unmasked)
    grid = spread(pattern.kv_num_blocks, indices, bits_index)
    partial = to_tokens(grid != unlisted)
    if pattern.partial_bits is not None and pattern.partial_bits.shape[0]:
        bits = unpack_bits(pattern.partial_bits, block_k)  # [n, block_q, block_k]
        partial = partial & to_tokens(bits[grid.clamp(min=0)] | (grid < 0)[..., None, None])

    device = indices.device
    if query_positions is None:
        first = length_k - length_q if pattern.query_offset is None else pattern.query_offset
        query_positions = torch.arange(length_q, device=device)[None] + first
    if key_positions is None:
        key_positions = torch.arange(length_k, device=device)[None]
    distance = key_positions[:, None, None, :].long() - query_positions[:, None, :, None].long()  # [B|1, 1, Sq, Sk]
    left, right = pattern.window
    if pattern.causal:
        partial = partial & (distance <= 0)
    if right >= 0:
        partial = partial & (distance <= right)
    if left >= 0:
        partial = partial & (distance >= -left)

    if pattern.full_kv_num_blocks is None:
        return partial
    grid = spread(pattern.full_kv_num_blocks, pattern.full_kv_indices, torch.zeros_like(pattern.full_kv_indices))
    return partial | to_tokens(grid != unlisted)


def block_sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pattern: BlockPattern,
    *,
    scale: float | None = None,
    key_bias: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    query_positions: Tensor | None = None,
    key_positions: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`(out [B, Hq, Sq, Dv], lse [B, Hq, Sq])` in float64, of the arguments of `sparsekit.block_sparse_attention`."""
    mask = token_mask(as_pattern(pattern), query_positions, key_positions)
    return masked_attention(query, key, value, mask, scale=scale, key_bias=key_bias, softcap=softcap, sinks=sinks)


def stripe_mask(
    col_indices: Tensor,
    col_counts: Tensor,
    lengths: tuple[int, int],
    *,
    group_size: int,
    sink: int = 0,
    local: int = 0,
    causal: bool = False,
    query_positions: Tensor | None = None,
    key_positions: Tensor | None = None,
) -> Tensor:
    """bool `[B|1, H|1, Sq, Sk]`: which query sees which key as a column, as a sink or as a local key."""
    length_q, length_k = lengths
    device = col_indices.device
    if query_positions is None:
        query_positions = torch.arange(length_q, device=device)[None] + length_k - length_q
    if key_positions is None:
        key_positions = torch.arange(length_k, device=device)[None]
    at_query, at_key = query_positions[:, None, :, None].long(), key_positions[:, None, None, :].long()

    used = listed_slots(col_counts, col_indices) & (col_indices >= 0) & (col_indices < length_k)
    columns = torch.zeros(*col_indices.shape[:3], length_k + 1, dtype=torch.bool, device=device)
    columns.scatter_(-1, col_indices.where(used, length_k).long(), True)  # what is no column goes to the last, unused
    columns = columns[..., :length_k].repeat_interleave(group_size, dim=2)[:, :, :length_q]

    allowed = (at_key <= at_query) | (not causal)
    sinks = (at_key < sink) & allowed & (sink > 0)
    return (columns & allowed) | sinks | ((at_key <= at_query) & (at_key > at_query - local))


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
    pattern: BlockPattern | None = None,
    causal: bool = False,
    query_positions: Tensor | None = None,
    key_positions: Tensor | None = None,
    **options,
) -> tuple[Tensor, Tensor]:
    """`(out, lse)` in float64, of the arguments of `sparsekit.stripe_sparse_attention` (without `state`)."""
    mask = stripe_mask(
        col_indices,
        col_counts,
        (query.shape[2], key.shape[2]),
        group_size=group_size,
        sink=sink,
        local=local,
        causal=causal,
        query_positions=query_positions,
        key_positions=key_positions,
    )
    mask = mask.repeat_interleave(query.shape[1] // mask.shape[1], dim=1)
    if pattern is not None:
        blocks = token_mask(as_pattern(pattern), query_positions, key_positions)
        mask = mask | blocks.repeat_interleave(query.shape[1] // blocks.shape[1], dim=1)
    return masked_attention(query, key, value, mask, **options)


def masked_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    *,
    scale: float | None = None,
    key_bias: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`(out [B, Hq, Sq, Dv], lse [B, Hq, Sq])` in float64, where `mask [B|1, H|1, Sq, Sk]` says who sees whom."""
    heads = query.shape[1]
    mask = mask.repeat_interleave(heads // mask.shape[1], dim=1)
    query, key, value = query.double(), key.double(), value.double()
    key, value = (x.repeat_interleave(heads // x.shape[1], dim=1) for x in (key, value))

    score = (query.shape[-1] ** -0.5 if scale is None else scale) * (query @ key.transpose(-1, -2))
    if softcap:
        score = softcap * torch.tanh(score / softcap)
    if key_bias is not None:
        score = score + key_bias.double()[:, :, None, :]
    score = torch.where(mask, score, -torch.inf)

    if score.shape[-1] == 0:
        peak = torch.zeros_like(score.sum(-1, keepdim=True))
    else:  # the largest score of a row, or 0 where all are -inf
        peak = score.detach().amax(-1, keepdim=True).nan_to_num(neginf=0.0)
    weight = torch.exp(score - peak)
    total = weight.sum(-1, keepdim=True)
    sees = total > 0
    lse = torch.where(sees, total.where(sees, 1).log() + peak, -torch.inf)
    out = (weight / total.where(sees, 1)) @ value
    if sinks is not None:  # exp(lse) / (exp(lse) + exp(sink))
        out = out * torch.sigmoid(lse - sinks.double()[None, :, None, None])
    return out, lse.squeeze(-1)


def block_sparse_attention_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pattern: BlockPattern,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    *,
    key_bias: Tensor | None = None,
    query_positions: Tensor | None = None,
    key_positions: Tensor | None = None,
    **options,
) -> tuple[Tensor, Tensor]:
    """`(out [Tq, Hq, Dv], lse [Hq, Tq])` in float64 of a packed batch: one sequence after the other.

    Rows of no sequence (past the last one) are 0 and -inf.
    """
    out = torch.zeros(*query.shape[:2], value.shape[-1], dtype=torch.float64, device=query.device)
    lse = torch.full(query.shape[1::-1], -torch.inf, dtype=torch.float64, device=query.device)
    row = 0  # of the lists
    bounds_q, bounds_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    for first_q, last_q, first_k, last_k in zip(bounds_q, bounds_q[1:], bounds_k, bounds_k[1:], strict=False):
        rows = -(-(last_q - first_q) // pattern.block_size[0])
        lists = {
            name: getattr(pattern, name)[:, :, row : row + rows]
            for name in ("kv_num_blocks", "kv_indices", "full_kv_num_blocks", "full_kv_indices", "partial_bits_index")
            if getattr(pattern, name) is not None
        }
        lengths = (last_q - first_q, last_k - first_k)
        one = dataclasses.replace(pattern, **lists, seq_lengths=lengths, assumes="any")
        row += rows
        part_q, part_k = slice(first_q, last_q), slice(first_k, last_k)
        result, result_lse = block_sparse_attention(
            query[part_q].transpose(0, 1)[None],
            key[part_k].transpose(0, 1)[None],
            value[part_k].transpose(0, 1)[None],
            one,
            key_bias=None if key_bias is None else key_bias[..., part_k],
            query_positions=None if query_positions is None else query_positions[..., part_q],
            key_positions=None if key_positions is None else key_positions[..., part_k],
            **options,
        )
        out = torch.cat([out[:first_q], result[0].transpose(0, 1), out[last_q:]])
        lse = torch.cat([lse[:, :first_q], result_lse[0], lse[:, last_q:]], dim=1)
    return out, lse
