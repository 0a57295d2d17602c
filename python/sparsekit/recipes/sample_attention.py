"""SampleAttention: a local window and the columns that sampled queries want (Zhu et al., arXiv 2406.15486)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sparsekit.selection import column_scores, select_top_p

from .recipe import Recipe, Stripes, lengths_of


@dataclass(frozen=True)
class SampleAttention(Recipe):
    """Two stages (section 4): exact attention of sampled query rows, summed over columns; then per head the fewest columns
    that hold `alpha` of it, for all rows.

    alpha          share of the sampled attention that the columns hold
    sample_ratio   r_row, share of the query rows that are sampled, evenly
    window_ratio   r_w, share of the keys that the local window spans
    max_columns    bound of the columns per head; None: all
    """

    alpha: float = 0.95
    sample_ratio: float = 0.05
    window_ratio: float = 0.08
    max_columns: int | None = None

    def choose(self, query, key, *, scale=None, layer=None) -> Stripes:
        len_q, len_k = lengths_of(query, key)
        stride = max(1, round(1 / self.sample_ratio))
        rows = torch.arange(stride - 1, max(len_q, stride), stride, device=query.device).clamp(max=len_q - 1)
        columns, _ = column_scores(query[:, :, rows], key, rows + (len_k - len_q), scale=scale)
        indices, counts = select_top_p(columns, self.alpha, max_count=self.max_columns)
        window = max(1, round(self.window_ratio * len_k))
        return Stripes(indices[:, :, None], counts[:, :, None], len_q, local=window)
