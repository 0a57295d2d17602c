"""AnchorAttention: columns that come close to what the first and the nearest keys score (Zhang et al., arXiv 2505.23520)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

import sparsekit
from sparsekit import BlockPattern
from sparsekit.selection import block_lists_from_bool

from .recipe import Recipe, Stripes, lengths_of


def _block_means(x: Tensor, block_size: int) -> Tensor:
    """Means in float32 over blocks of rows, the last of which may be short: [B, H, blocks, D]."""
    whole = x.shape[2] // block_size * block_size
    means = [x[:, :, :whole].unflatten(2, (-1, block_size)).mean(3, dtype=torch.float32)]
    if whole < x.shape[2]:
        means.append(x[:, :, whole:].mean(2, keepdim=True, dtype=torch.float32))
    return torch.cat(means, 2)


@dataclass(frozen=True)
class AnchorAttention(Recipe):
    """Three stages: attention over the first block and the group's own blocks, whose result is the anchor; columns whose
    score with some mean query of the group is at most `theta` below that query's anchor; attention over those columns,
    resumed from the first stage.

    theta        how far below the anchor a column may score
    step         query blocks per group, which share their columns
    block_size   tokens per block

    The paper's anchor is the largest score of the first stage. Here it is the log-sum-exp, which attention returns
    anyway: a column is kept when its weight is at least e^-theta of all that the first stage saw. It is larger than the
    maximum by at most log(keys of the first stage), so a theta of the paper keeps fewer columns here.
    """

    theta: float = 12.0
    step: int = 16
    block_size: int = 128

    def anchor_pattern(self, query: Tensor, key: Tensor) -> BlockPattern:
        """The first block, and for every query block those from its group's start up to its own."""
        len_q, len_k = lengths_of(query, key)
        first = torch.arange(0, len_q, self.block_size, device=query.device)[:, None]
        group = first // (self.step * self.block_size) * (self.step * self.block_size)
        columns = torch.arange(0, len_k, self.block_size, device=query.device)
        offset = len_k - len_q
        own = (columns + self.block_size > group + offset) & (columns <= first + offset + self.block_size - 1)
        return BlockPattern.from_bool(
            (own | (columns == 0))[None, None], self.block_size, seq_lengths=(len_q, len_k), causal=True
        )

    def columns(self, query: Tensor, key: Tensor, lse: Tensor, scale: float | None) -> Stripes:
        """The stripes of the second stage, from the first's lse `[B, Hq, Sq]`."""
        len_q, len_k = lengths_of(query, key)
        (batch, heads), kv_heads = query.shape[:2], key.shape[1]
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        rows, offset = self.step * self.block_size, len_k - len_q
        groups = -(-len_q // rows)
        # Scores in the tensors' own dtype on a GPU, where a product in float32 would take longer than the attention.
        dtype = key.dtype if key.is_cuda else torch.float32
        mean_query = _block_means(query, self.block_size).mul(scale).to(dtype)  # [B, Hq, blocks, D]
        anchor = _block_means(lse[..., None], self.block_size).sub(self.theta).to(dtype)  # [B, Hq, blocks, 1]
        kept = torch.zeros(batch, heads, groups, len_k, dtype=torch.bool, device=query.device)
        for group in range(groups):
            # Behind the first block and before the blocks that the first stage saw for this group.
            keys = slice(self.block_size, (group * rows + offset) // self.block_size * self.block_size)
            if keys.stop <= keys.start:
                continue
            blocks = slice(group * self.step, (group + 1) * self.step)
            # The query heads of a key head side by side: [B * Hkv, heads * blocks, ...]
            means, lowest = (x[:, :, blocks].reshape(batch * kv_heads, -1, x.shape[-1]) for x in (mean_query, anchor))
            columns = key[:, :, keys].to(dtype).flatten(0, 1)
            above = torch.baddbmm(lowest, means, columns.mT, beta=-1)  # by how much a score is above what is asked for
            best = above.view(batch, heads, -1, above.shape[-1]).amax(2)
            kept[:, :, group, keys] = best >= 0
        counts, indices = block_lists_from_bool(kept)
        return Stripes(indices, counts, rows)

    def choose(self, query, key, *, scale=None, layer=None) -> Stripes:
        """All three stages as one choice: the anchor's blocks beside the columns."""
        pattern = self.anchor_pattern(query, key)
        _, lse = sparsekit.block_sparse_attention(query, key, key, pattern, scale=scale, return_lse=True)
        stripes = self.columns(query, key, lse, scale)
        return Stripes(stripes.col_indices, stripes.col_counts, stripes.group_size, pattern=pattern)

    def __call__(
        self, query, key, value, *, scale=None, softcap=None, sinks=None, return_lse=False, layer=None
    ) -> Tensor | tuple[Tensor, Tensor]:
        if softcap or sinks is not None:
            raise NotImplementedError("AnchorAttention: softcap and sinks are not supported")
        state = sparsekit.block_sparse_attention(
            query, key, value, self.anchor_pattern(query, key), scale=scale, return_lse=True
        )
        with torch.no_grad():
            stripes = self.columns(query, key, state[1], scale)
        return self.attend(query, key, value, stripes, state=state, scale=scale, return_lse=return_lse)
