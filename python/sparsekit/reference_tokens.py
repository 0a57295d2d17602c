"""The token operations in float64 as products with dense matrices: the ground truth of the tests, written to be read.

A movement of tokens is a matrix W `[B, rows out, rows in]`: out = W x. A gather's W has one 1 per row, a scatter's is
the transpose of such a one, a weighted mean's has rows that sum to 1. Differentiable by autograd. Rows with a weight of
0 are multiplied by 0 here, so they must be finite.
"""

from __future__ import annotations

import torch
from torch import Tensor


def one_hot(index: Tensor, length: int) -> Tensor:
    """float64 `[..., length]`: 1 at index; nowhere for -1."""
    return (index[..., None] == torch.arange(length, device=index.device)).double()


def apply(matrix: Tensor, x: Tensor, dim: int = 1) -> Tensor:
    """`matrix` [B, rows out, rows in] times the tokens of x."""
    tokens = x.double().movedim(dim, 1)
    out = torch.einsum("boi,bi...->bo...", matrix, tokens)
    return out.movedim(1, dim)


def gather_tokens(x: Tensor, index: Tensor, dim: int = 1) -> Tensor:
    return apply(one_hot(index, x.shape[dim]), x, dim)


def scatter_tokens(
    src: Tensor,
    index: Tensor,
    length: int,
    *,
    reduce: str = "copy",
    weights: Tensor | None = None,
    base: Tensor | None = None,
    dim: int = 1,
) -> tuple[Tensor, Tensor]:
    """The result, and what each row received: `[B, length]` sums of weights."""
    index = index if index.dim() == 3 else index[..., None]  # [B, K, M]
    ones = torch.ones(index.shape, dtype=torch.float64)
    weights = ones if weights is None else weights.double().view(index.shape)
    entries = one_hot(index, length)  # [B, K, M, length]
    totals = torch.einsum("bkmn,bkm->bn", entries, weights)
    if reduce == "copy":
        samples, tokens, places = index.shape
        order = torch.arange(tokens * places).view(tokens, places, 1)
        last = torch.where(entries > 0, order, -1).amax((1, 2), keepdim=True)
        entries = entries * (order == last)
    matrix = torch.einsum("bkmn,bkm->bnk", entries, weights)
    received = totals != 0
    if reduce == "mean":
        matrix = matrix / torch.where(received, totals, 1)[..., None] * received[..., None]
    out = apply(matrix, src, dim)
    if base is not None:
        keep = torch.ones_like(totals) if reduce == "add" else (~received).double()
        out = out + apply(torch.diag_embed(keep), base, dim)
    return out, totals


def cosines(metric: Tensor) -> Tensor:
    """`[B, ceil(N / 2), N // 2]`: of the tokens at even positions with those at odd ones; -inf where either has a NaN or
    an infinity."""
    metric = metric.double()
    length = metric.norm(dim=-1, keepdim=True)
    unit = torch.where(length > 0, metric / length, 0.0)
    unit = torch.where(length.isfinite(), unit, torch.nan)
    return (unit[:, ::2] @ unit[:, 1::2].transpose(1, 2)).nan_to_num(nan=-torch.inf)


def bipartite_match(metric: Tensor, r: list[int], protect: int = 0, counts: list[int] | None = None) -> list[dict]:
    """Per sample a dictionary {source: destination} and the list of tokens that stay."""
    matches = []
    for b, scores in enumerate(cosines(metric).tolist()):
        count = metric.shape[1] if counts is None else counts[b]
        pairs = []
        for i in range(0, count, 2):
            found = [(-scores[i // 2][j // 2], j) for j in range(1, count, 2) if j >= protect]
            if i >= protect and found:
                best, j = min(found)
                pairs.append((best, i, j))
        pairs = sorted(pairs)[: max(0, min(r[b], (count - protect) // 2))]
        merged = {i: j for _, i, j in pairs}
        matches.append({"merged": merged, "kept": [n for n in range(count) if n not in merged]})
    return matches
