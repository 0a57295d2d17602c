"""Token Merging (ToMe, arXiv 2210.09461): in every layer of a transformer, the most similar tokens become one.

    merging = TokenMerging(r=16)                     16 tokens fewer after each layer
    merging.begin()                                  once per forward pass
    for layer in layers:
        out, keys = attention(x, key_bias=merging.key_bias())
        x = merging(x + out, metric=keys.mean(heads))
        x = x + mlp(x)

The paper merges between attention and MLP, by the keys averaged over heads (section 3, table 1), weighs the mean by how
many tokens each stands for, and adds the logarithm of that number to the attention scores (proportional attention).
sparsekit.integrations.token_merging puts this into models of transformers and timm.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

import sparsekit


class TokenMerging:
    """The state of one forward pass: how many tokens each row stands for, and which row each token went to.

    Args:
        r: what each layer merges away: a number of tokens, or a share of a sample's tokens (a float below 1; at most half
            of them); one for all layers, or one per layer.
        protect: the first so many tokens stay as they are: the class token, registers.
        proportional: give attention the sizes of the tokens (`key_bias`).
        trim: after a ragged merge, cut the batch to its longest sample. Needs the counts on the host: for the CPU, or
            where a sync does not matter; never inside torch.compile or a CUDA graph.
    """

    def __init__(
        self,
        r: int | float | Sequence[int | float],
        *,
        protect: int = 1,
        proportional: bool = True,
        trim: bool = False,
    ):
        for value in r if isinstance(r, Sequence) else [r]:
            if value < 0 or (isinstance(value, float) and value >= 1):
                raise ValueError(f"r: found {value}, supported are 0 and more tokens, or a share from 0.0 to below 1.0")
        self.r, self.protect, self.proportional, self.trim = r, protect, proportional, trim
        self.begin()

    def begin(self, mask: Tensor | None = None) -> None:
        """A new forward pass.

        Args:
            mask: bool or 0/1 `[B, N]`: the tokens that exist, each sample's in front (padded on the right). None: all.
        """
        self.layer = 0
        self.sizes = None if mask is None else mask.float()
        self.counts = None if mask is None else mask.sum(1).to(torch.int32)
        self.row: Tensor | None = None

    def key_bias(self) -> Tensor | None:
        """float32 `[B, 1, N]` for attention: the logarithm of the sizes, -inf for padding; None before the first merge of
        a batch without padding."""
        if self.sizes is None:
            return None
        if not self.proportional:
            return torch.zeros_like(self.sizes).masked_fill(self.sizes == 0, -torch.inf)[:, None]
        return sparsekit.token_size_bias(self.sizes)

    def _amount(self, tokens: int) -> int | Tensor:
        r = self.r[self.layer] if isinstance(self.r, Sequence) else self.r
        if isinstance(r, int):
            return r
        return int(r * tokens) if self.counts is None else (self.counts * r).to(torch.int32)

    def __call__(self, x: Tensor, metric: Tensor) -> Tensor:
        """x `[B, N, D]` merged by the cosines of metric `[B, N, M]`: `[B, N - r, D]`, or, where samples differ in length,
        `[B, N, D]` with zeros past each sample's tokens (`self.counts`)."""
        r = self._amount(x.shape[1])
        self.layer += 1
        if isinstance(r, int) and r == 0:
            return x
        match = sparsekit.bipartite_match(metric.detach(), r, protect=self.protect, counts=self.counts)
        x, self.sizes = sparsekit.merge_tokens(x, match, self.sizes)
        if self.row is None:
            self.row = match.row
        else:  # where the row that a token is in went to
            self.row = torch.where(self.row < 0, -1, sparsekit.gather_tokens(match.row, self.row))
        self.counts = match.counts
        if self.trim and self.counts is not None:
            longest = int(self.counts.max())
            x, self.sizes = x[:, :longest], self.sizes[:, :longest]
        return x

    def unmerge(self, x: Tensor) -> Tensor:
        """Every token of the input gets what its row holds now: `[B, N, D]` for a result `[B, N', D]`."""
        return x if self.row is None else sparsekit.unmerge_tokens(x, self.row)

    def mean(self, x: Tensor) -> Tensor:
        """The mean over the tokens of the input, `[B, D]`: over the rows, weighted by their sizes."""
        if self.sizes is None:
            return x.mean(1)
        weights = (self.sizes / self.sizes.sum(1, keepdim=True)).to(x.dtype)
        return (x * weights[..., None]).sum(1)
