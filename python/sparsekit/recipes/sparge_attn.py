"""SpargeAttn: blocks by the product of block means, where the means speak for their blocks (Zhang et al., arXiv 2502.18137)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sparsekit import BlockPattern
from sparsekit.selection import block_scores, row_limits, select_top_p

from .recipe import Recipe, block_map, lengths_of, own_blocks, per_query_head


@dataclass(frozen=True)
class SpargeAttn(Recipe):
    """The selection of section 3.3. A block of tokens that are not alike is not judged by its mean: such a key block is
    kept for all, such a query block keeps all.

    simthreshd1   theta, least mean cosine of a block's tokens for its mean to count
    cdfthreshd    tau, share of the compressed attention map that each query block keeps
    block_size    tokens per block (query, key)
    causal        False for diffusion models

    A causal row's own blocks are always on, or it might see nothing. Not here: the skip of small P V products inside the
    kernel, and INT8 / FP8 operands: attention over the chosen blocks is exact.
    """

    simthreshd1: float = 0.6
    cdfthreshd: float = 0.98
    block_size: tuple[int, int] = (128, 64)
    causal: bool = True

    def choose(self, query, key, *, scale=None, layer=None) -> BlockPattern:
        lengths = lengths_of(query, key)
        scores, query_alike, key_alike = block_scores(
            query, key, self.block_size, causal=self.causal, scale=scale, self_similarity=True
        )
        limits = row_limits(self.block_size, lengths, causal=self.causal, device=query.device)
        unlike_key = per_query_head(key_alike < self.simthreshd1, query)[:, :, None]
        unlike_query = (query_alike < self.simthreshd1)[..., None]
        share = scores.masked_fill(unlike_key, -torch.inf).softmax(-1).nan_to_num(0)  # a row of unlike blocks only: 0
        own = own_blocks(self.block_size, lengths) if self.causal else 0
        indices, counts = select_top_p(share, self.cdfthreshd, local=own, row_limit=limits)
        kept = block_map(indices, counts, scores.shape[-1]) | unlike_key | unlike_query
        visible = torch.arange(scores.shape[-1], device=query.device) < limits[:, None]
        return BlockPattern.from_bool(kept & visible, self.block_size, seq_lengths=lengths, causal=self.causal)
