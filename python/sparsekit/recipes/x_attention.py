"""XAttention: the antidiagonals of a block tell what it is worth (Xu et al., arXiv 2503.16428)."""

from __future__ import annotations

from dataclasses import dataclass

from sparsekit import BlockPattern
from sparsekit.selection import block_scores, row_limits, select_top_p

from .recipe import Recipe, lengths_of, own_blocks


@dataclass(frozen=True)
class XAttention(Recipe):
    """Algorithm 1: blocks by the softmax of strided antidiagonal sums, per row the fewest that hold `threshold` of it.

    threshold    share of the estimated attention that each query block keeps
    stride       S, distance of the sampled antidiagonals
    block_size   B, tokens per block
    keep_sink, keep_recent   the first block, and each row's own: always on

    Not here: the per-head thresholds that the paper finds by dynamic programming.
    """

    threshold: float = 0.9
    stride: int = 8
    block_size: int = 128
    keep_sink: bool = True
    keep_recent: bool = True

    def choose(self, query, key, *, scale=None, layer=None) -> BlockPattern:
        share = block_scores(
            query, key, self.block_size, reduce="antidiagonal", stride=self.stride, causal=True, scale=scale
        ).exp()
        lengths = lengths_of(query, key)
        indices, counts = select_top_p(
            share,
            self.threshold,
            sink=int(self.keep_sink),
            local=own_blocks(self.block_size, lengths) if self.keep_recent else 0,
            row_limit=row_limits(self.block_size, lengths, device=query.device),
        )
        return BlockPattern.from_indices(indices, counts, self.block_size, seq_lengths=lengths, causal=True)
