"""FlexPrefill: every head decides by its last queries what it looks at (Lai et al., arXiv 2502.20766)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsekit import BlockPattern
from sparsekit.selection import block_scores, column_scores, row_limits, select_top_p

from .recipe import Recipe, block_map, lengths_of, own_blocks


@dataclass(frozen=True)
class FlexPrefill(Recipe):
    """Algorithms 1 to 3, in blocks. A head whose block means predict the attention of its last queries (Jensen-Shannon
    distance below `tau`) keeps the blocks that hold `gamma` of the compressed map; another one the vertical and slash
    lines that hold `gamma` of the last queries' attention.

    gamma        share of the attention that is kept
    tau          largest distance (square root of the divergence, natural logarithm) at which block means are trusted
    min_budget   tokens that every row keeps at least
    block_size   tokens per block, and how many last queries stand for the head

    Lines are a block wide, as in the paper's kernel: a slash of distances o keeps the two blocks that o can reach.
    """

    gamma: float = 0.9
    tau: float = 0.1
    min_budget: int = 1024
    block_size: int = 128

    def choose(self, query, key, *, scale=None, layer=None) -> BlockPattern:
        size, (len_q, len_k) = self.block_size, lengths_of(query, key)
        limits = row_limits(size, (len_q, len_k), device=query.device)
        least = -(-self.min_budget // size)

        last = torch.arange(max(0, len_q - size), len_q, device=query.device)
        columns, diagonals = column_scores(query[:, :, last], key, last + (len_k - len_q), scale=scale)
        true = _by_blocks(columns, size) / len(last)
        estimate = block_scores(query[:, :, last], key, (len(last), size), causal=True, scale=scale)[:, :, 0].softmax(
            -1
        )
        by_means = _distance(true, estimate) < self.tau  # [B, Hq]

        share = block_scores(query, key, size, causal=True, scale=scale).softmax(-1).nan_to_num(0)
        options = dict(min_count=least, sink=1, local=own_blocks(size, (len_q, len_k)), row_limit=limits)
        compressed = block_map(*select_top_p(share, self.gamma, scope="head", **options), share.shape[-1])

        blocks = true.shape[-1]
        vertical = block_map(*select_top_p(true, self.gamma, min_count=least, sink=1), blocks)
        slash = block_map(*select_top_p(_by_blocks(diagonals, size), self.gamma, sink=1), blocks)
        distance = (limits[:, None] - 1) - torch.arange(blocks, device=query.device)  # of a key block, in blocks
        reach = F.pad(slash, (1, 0)) | F.pad(slash, (0, 1))  # distances o .. o + size - 1 end in block o or o + 1
        lines = vertical[:, :, None] | reach[:, :, distance.clamp(min=0)]
        visible = distance >= 0
        kept = torch.where(by_means[..., None, None], compressed, lines) & visible
        return BlockPattern.from_bool(kept, size, seq_lengths=(len_q, len_k), causal=True)


def _by_blocks(x: Tensor, size: int) -> Tensor:
    return F.pad(x, (0, -x.shape[-1] % size)).unflatten(-1, (-1, size)).sum(-1)


def _distance(p: Tensor, q: Tensor) -> Tensor:
    """Square root of the Jensen-Shannon divergence."""
    middle = (p + q) / 2
    divergence = (torch.special.xlogy(p, p / middle) + torch.special.xlogy(q, q / middle)).nan_to_num(0).sum(-1) / 2
    return divergence.clamp(min=0).sqrt()
