"""MMInference: tokens of one grid phase side by side, then blocks (Li et al., arXiv 2504.16083)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

import sparsekit
from sparsekit import BlockPattern
from sparsekit.selection import (
    block_scores,
    inverse_permutation,
    permute_tokens,
    select_top_k,
    token_order,
)

from .recipe import Recipe, block_map, lengths_of


@dataclass(frozen=True)
class MMInferenceGrid(Recipe):
    """The grid heads of a vision language model: video tokens look at those of the same place in every frame. Sorted by
    phase (position modulo `stride`) such lines are blocks, and a modality's tokens stand together, so that blocks never
    straddle a modality boundary's two sides.

    stride       distance of the grid's lines: tokens per frame, or per row of one
    topk         blocks per query block, by the product of block means
    modalities   integers `[S]`, 0 is text and is not permuted by phase; None: all is vision
    block_size   tokens per block

    Blocks of a row's own phase always count among the best. Causality holds by position, whatever the order. One stride
    for all heads: heads of other shapes are other calls (the paper chooses a shape per head offline). Prompts only, Sq =
    Sk.
    """

    stride: int
    topk: int = 32
    modalities: Tensor | None = None
    block_size: int = 64

    def order(self, length: int, device) -> Tensor:
        """int32 `[S]`: which token stands at each place."""
        positions = torch.arange(length, device=device)
        phase = positions % self.stride
        if self.modalities is not None:
            modality = self.modalities.to(device)
            phase = phase.where(modality > 0, 0) + modality * self.stride
        return token_order(phase)

    def choose(self, query, key, *, scale=None, layer=None) -> BlockPattern:
        """Over the permuted tokens: row i is token `order[i]`."""
        length = self._length(query, key)
        order = self.order(length, query.device)
        return self._choose(*permute_tokens((query, key), order), order, scale)

    def _length(self, query, key) -> int:
        length_q, length = lengths_of(query, key)
        if length_q != length:
            raise ValueError(f"query: found {length_q} rows for {length} keys; MMInferenceGrid takes whole prompts")
        return length

    def _choose(self, query, key, order, scale) -> BlockPattern:
        size, positions = self.block_size, order[None]
        tail = -order.shape[0] % size
        first = F.pad(order, (0, tail), value=order.shape[0]).view(-1, size).amin(1)
        last = F.pad(order, (0, tail), value=-1).view(-1, size).amax(1)
        visible = first[None] <= last[:, None]
        scores = block_scores(query, key, size, scale=scale)
        label = (order % self.stride)[::size]
        own = (label[:, None] == label[None]) & visible
        scores = scores.masked_fill(own, torch.finfo(torch.float32).max).masked_fill(~visible, -torch.inf)
        indices, counts = select_top_k(scores, min(self.topk, scores.shape[-1]))
        kept = block_map(indices, counts, scores.shape[-1])
        return BlockPattern.from_bool(
            kept,
            size,
            seq_lengths=lengths_of(query, key),
            causal=True,
            query_positions=positions,
            key_positions=positions,
        )

    def __call__(self, query, key, value, *, scale=None, softcap=None, sinks=None, return_lse=False, layer=None):
        order = self.order(self._length(query, key), query.device)
        query, key, value = permute_tokens((query, key, value), order)
        with torch.no_grad():
            pattern = self._choose(query, key, order, scale)
        out, lse = sparsekit.block_sparse_attention(
            query,
            key,
            value,
            pattern,
            scale=scale,
            softcap=softcap,
            sinks=sinks,
            query_positions=order[None],
            key_positions=order[None],
            return_lse=True,
        )
        back = inverse_permutation(order)
        out = permute_tokens(out, back)
        return (out, lse[..., back.long()]) if return_lse else out
