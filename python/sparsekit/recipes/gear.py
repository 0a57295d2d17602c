"""GEAR (arXiv 2403.05527): a quantized cache, plus a low-rank term and a few outliers of what quantization lost.

X ~ Q + L + S: S the largest elements of each head in full precision, Q the quantized rest, L = A B^T of rank r the error that is
left, by power iteration (algorithm 1). Of a prompt; tokens appended later have Q only. Keys meet L and S as a bias on the scores
and values as a correction of the output, so the kernel is `sparsekit.decode_attention` as it is: per prompt token and head
that adds r factors to read, and one score to write.

It pays where the error has structure: rank r removes r outlier channels; on keys without structure 4 ranks gain a few percent.
"""

from __future__ import annotations

import torch
from torch import Tensor

import sparsekit


def low_rank(error: Tensor, rank: int, steps: int = 2) -> tuple[Tensor, Tensor]:
    """A `[..., T, r]`, B `[..., D, r]`, error ~ A B^T: subspace iteration from a fixed start."""
    generator = torch.Generator().manual_seed(0)
    right = torch.randn(error.shape[-1], rank, generator=generator).to(error).expand(*error.shape[:-2], -1, -1)
    for _ in range(steps):
        left = torch.linalg.qr(error @ right).Q
        right = error.transpose(-1, -2) @ left
    return left, right


class Outliers:
    """The `share` of each head's elements that are largest: positions in `[T * D]` and values, per head."""

    def __init__(self, x: Tensor, share: float):
        self.dim, flat = x.shape[-1], x.flatten(2)
        self.at = flat.abs().topk(round(share * flat.shape[-1]), -1).indices
        self.values = flat.gather(-1, self.at)

    def removed_from(self, x: Tensor) -> Tensor:
        return x.flatten(2).scatter(-1, self.at, 0).view_as(x)

    @property
    def tokens(self) -> Tensor:
        return self.at // self.dim

    @property
    def channels(self) -> Tensor:
        return self.at % self.dim


class GearCache:
    """A `sparsekit.KVCache` with the error feedback of a prompt.

    Args:
        rank: of the low-rank term of each head, keys and values each.
        outliers: share of elements kept in full precision (the paper: 0.02).
        options: of `KVCache`.
    """

    def __init__(
        self, batch_size: int, num_heads: int, head_dim: int, *, rank: int = 4, outliers: float = 0.02, **options
    ):
        self.cache = sparsekit.KVCache(batch_size, num_heads, head_dim, **options)
        self.rank, self.share, self.length = rank, outliers, 0

    def compress(self, key: Tensor, value: Tensor) -> None:
        """Stores a prompt's keys and values `[B, H, T, D]`."""
        self.cache.reset()
        self.length = key.shape[2]
        self.outliers = [Outliers(x.float(), self.share) for x in (key, value)]
        rest = [kept.removed_from(x.float()) for kept, x in zip(self.outliers, (key, value), strict=True)]
        self.cache.append(*(x.to(self.cache.dtype) for x in rest))
        stored = self.cache.dequantize()
        self.factors = [low_rank(x - kept.float(), self.rank) for x, kept in zip(rest, stored, strict=True)]

    def append(self, key: Tensor, value: Tensor) -> None:
        self.cache.append(key, value)

    def attend(self, query: Tensor, scale: float | None = None) -> Tensor:
        """Attention of the newest `query [B, Hq, S, D]`, whose tokens were appended."""
        heads, dim = self.cache.num_heads, query.shape[-1]
        scale = dim**-0.5 if scale is None else scale
        rows = query.float().unflatten(1, (heads, -1)).flatten(2, 3)  # [B, H, group * S, D]
        (key_left, key_right), (value_left, value_right) = self.factors
        key_outliers, value_outliers = self.outliers

        bias = (rows @ key_right) @ key_left.transpose(2, 3)  # [B, H, rows, T]
        expand = (-1, -1, rows.shape[2], -1)
        at_channel = key_outliers.channels[:, :, None].expand(expand)
        terms = rows.gather(3, at_channel) * key_outliers.values[:, :, None]
        bias = bias.scatter_add(3, key_outliers.tokens[:, :, None].expand(expand), terms) * scale
        bias = bias.unflatten(2, (-1, query.shape[2])).flatten(1, 2)  # [B, Hq, S, T]
        out, lse, scores = sparsekit.decode_attention(
            query, self.cache, scale=scale, key_bias=bias.contiguous(), return_lse=True, return_scores=True
        )
        weights = (scores[..., : self.length] - lse[..., None]).exp().unflatten(1, (heads, -1)).flatten(2, 3)
        extra = (weights @ value_left) @ value_right.transpose(2, 3)  # [B, H, rows, Dv]
        terms = weights.gather(3, value_outliers.tokens[:, :, None].expand(expand)) * value_outliers.values[:, :, None]
        extra = extra.scatter_add(3, value_outliers.channels[:, :, None].expand(expand), terms)
        return (out.float() + extra.unflatten(2, (-1, query.shape[2])).flatten(1, 2)).to(query.dtype)
