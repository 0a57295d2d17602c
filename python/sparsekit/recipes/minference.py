"""MInference: three shapes of sparse attention, one per head, chosen offline (Jiang et al., arXiv 2407.02490)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsekit import BlockPattern
from sparsekit.selection import block_scores, column_scores, row_limits, select_top_k, vertical_slash_lists

from .recipe import Recipe, Stripes, lengths_of, own_blocks, per_query_head


@dataclass(frozen=True)
class AShape:
    """The first `n_init` keys and the last `n_local`, to whole blocks: the head looks nowhere else."""

    n_init: int = 128
    n_local: int = 1024

    def lists(self, query, key, block_size, scale):
        len_q, len_k = lengths_of(query, key)
        heads = query.shape[:2]
        vertical = torch.arange(min(self.n_init, len_k), dtype=torch.int32, device=query.device)
        slash = torch.arange(0, min(self.n_local, len_k), block_size, dtype=torch.int32, device=query.device)
        return vertical_slash_lists(vertical.expand(*heads, -1), slash.expand(*heads, -1), block_size, (len_q, len_k))


@dataclass(frozen=True)
class VerticalSlash:
    """The best vertical lines (keys) and slash lines (distances), by the attention of the last `last_q` queries.

    sink, local   the first verticals and the shortest slashes, always among them (the paper's code: 30 and 100)
    """

    vertical_size: int = 1000
    slash_size: int = 6096
    last_q: int = 64
    sink: int = 30
    local: int = 100

    def lists(self, query, key, block_size, scale):
        len_q, len_k = lengths_of(query, key)
        rows = torch.arange(max(0, len_q - self.last_q), len_q, device=query.device)
        columns, diagonals = column_scores(query[:, :, rows], key, rows + (len_k - len_q), scale=scale)
        vertical, slash = min(self.vertical_size, len_k), min(self.slash_size, len_k)
        vertical, _ = select_top_k(columns, vertical, sink=min(self.sink, vertical))
        slash, _ = select_top_k(diagonals, slash, sink=min(self.local, slash))
        return vertical_slash_lists(vertical, slash, block_size, (len_q, len_k))


@dataclass(frozen=True)
class BlockSparse:
    """The `topk` best key blocks of every query block, by the product of their means; the row's own is one of them."""

    topk: int = 100

    def lists(self, query, key, block_size, scale):
        lengths = lengths_of(query, key)
        scores = block_scores(query, key, block_size, causal=True, scale=scale)
        limits, own = row_limits(block_size, lengths, device=query.device), own_blocks(block_size, lengths)
        indices, counts = select_top_k(
            scores, min(self.topk, scores.shape[-1]), local=min(own, self.topk), row_limit=limits
        )
        none = torch.zeros(*counts.shape, 0, dtype=torch.int32, device=query.device)
        return indices, counts, none, torch.zeros_like(counts)


Shape = AShape | VerticalSlash | BlockSparse


@dataclass(frozen=True)
class MInference(Recipe):
    """Heads of all shapes in one call: blocks for what slashes, local windows and blocks want, columns for verticals.

    shapes       the shape of every head of a layer, by the layer's number; `search` finds them
    default      the shape of heads that `shapes` does not name
    block_size   tokens per block and rows per column list
    """

    shapes: Mapping[int, Sequence[Shape]] = field(default_factory=dict)
    default: Shape = field(default_factory=VerticalSlash)
    block_size: int = 64

    def choose(self, query, key, *, scale=None, layer=None) -> Stripes:
        heads = query.shape[1]
        shapes = self.shapes.get(layer, (self.default,) * heads)
        if len(shapes) != heads:
            raise ValueError(f"shapes[{layer}]: found {len(shapes)} shapes, the layer has {heads} query heads")
        if all(shape == shapes[0] for shape in shapes):
            lists = shapes[0].lists(query, key, self.block_size, scale)
        else:
            lists = self._of_heads(shapes, query, key, scale)
        indices, counts, col_indices, col_counts = lists
        pattern = BlockPattern.from_indices(
            indices, counts, self.block_size, seq_lengths=lengths_of(query, key), causal=True
        )
        return Stripes(col_indices, col_counts, self.block_size, pattern=pattern)

    def _of_heads(self, shapes, query, key, scale):
        """Lists of heads of different shapes, as wide as the widest."""
        key = per_query_head(key, query)
        parts = {}
        for shape in dict.fromkeys(shapes):
            heads = [head for head, other in enumerate(shapes) if other == shape]
            parts[shape] = heads, shape.lists(query[:, heads], key[:, heads], self.block_size, scale)
        order = torch.tensor([head for heads, _ in parts.values() for head in heads], device=query.device).argsort()

        def joined(number: int, ragged: bool) -> Tensor:
            tensors = [lists[number] for _, lists in parts.values()]
            if ragged:
                width = max(tensor.shape[-1] for tensor in tensors)
                tensors = [F.pad(tensor, (0, width - tensor.shape[-1]), value=-1) for tensor in tensors]
            return torch.cat(tensors, 1)[:, order]

        return joined(0, True), joined(1, False), joined(2, True), joined(3, False)


@torch.no_grad()
def search(
    query: Tensor, key: Tensor, value: Tensor, candidates: Sequence[Shape], *, block_size: int = 64
) -> list[Shape]:
    """The candidate of every head whose output is nearest to dense attention (the paper's kernel-aware search, with the
    error on one prompt as the measure; give candidates of equal cost).

    Args:
        query, key, value: of one layer, on a prompt as those to come.
    """
    keys, values = per_query_head(key, query), per_query_head(value, query)
    dense = F.scaled_dot_product_attention(query, keys, values, is_causal=True)
    errors = []
    for candidate in candidates:
        out = MInference(default=candidate, block_size=block_size)(query, key, value)
        errors.append((out - dense).float().square().sum((0, 2, 3)))
    return [candidates[number] for number in torch.stack(errors).argmin(0).tolist()]
