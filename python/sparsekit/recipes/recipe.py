"""What every recipe is: a choice made from query and key, and the attention call that takes it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

import sparsekit
from sparsekit import BlockPattern


@dataclass(frozen=True)
class Stripes:
    """Single keys beside blocks, as `sparsekit.stripe_sparse_attention` takes them.

    col_indices   int32 `[B|1, H|1, G, max]`: key positions for every `group_size` rows, -1 past the count
    col_counts    int32 `[B|1, H|1, G]`
    sink, local   the first keys, and the last up to each row's own: always on
    pattern       blocks beside them, or None
    """

    col_indices: Tensor
    col_counts: Tensor
    group_size: int
    sink: int = 0
    local: int = 0
    pattern: BlockPattern | None = None

    def to_token_mask(self, seq_lengths: tuple[int, int]) -> Tensor:
        """bool `[B|1, H|1, Sq, Sk]`: which keys each row sees, causally. Small inputs only: it holds Sq * Sk numbers."""
        len_q, len_k = seq_lengths
        device = self.col_indices.device
        row = torch.arange(len_q, device=device)[:, None] + (len_k - len_q)
        column = torch.arange(len_k, device=device)
        columns = block_map(self.col_indices, self.col_counts, len_k)
        mask = columns.repeat_interleave(self.group_size, 2)[:, :, :len_q]
        mask = mask | (column < self.sink) | (column > row - self.local)
        if self.pattern is not None:
            mask = mask | self.pattern.to_token_mask()
        return mask & (column <= row)


class Recipe:
    """Sparse attention of a prompt, or a chunk of one: query's rows are the last tokens of key's, causal.

    A subclass says in `choose` what is looked at. `layer` is the number of the model's layer, for recipes that differ
    by layer.
    """

    causal = True

    def choose(
        self, query: Tensor, key: Tensor, *, scale: float | None = None, layer: int | None = None
    ) -> BlockPattern | Stripes:
        """What each query block or row looks at, from query `[B, Hq, Sq, D]` and key `[B, Hkv, Sk, D]`."""
        raise NotImplementedError

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        scale: float | None = None,
        softcap: float | None = None,
        sinks: Tensor | None = None,
        return_lse: bool = False,
        layer: int | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Attention over what `choose` returns; arguments as in `sparsekit.block_sparse_attention`."""
        with torch.no_grad():
            choice = self.choose(query, key, scale=scale, layer=layer)
        return self.attend(query, key, value, choice, scale=scale, softcap=softcap, sinks=sinks, return_lse=return_lse)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, choice: BlockPattern | Stripes, **options):
        if isinstance(choice, BlockPattern):
            return sparsekit.block_sparse_attention(query, key, value, choice, **options)
        return sparsekit.stripe_sparse_attention(
            query,
            key,
            value,
            choice.col_indices,
            choice.col_counts,
            group_size=choice.group_size,
            sink=choice.sink,
            local=choice.local,
            pattern=choice.pattern,
            causal=self.causal,
            **options,
        )


def lengths_of(query: Tensor, key: Tensor) -> tuple[int, int]:
    return query.shape[2], key.shape[2]


def own_blocks(block_size: int | tuple[int, int], lengths: tuple[int, int]) -> int:
    """How many key blocks the keys of one query block's own tokens can reach into, at most."""
    block_q, block_k = (block_size, block_size) if isinstance(block_size, int) else block_size
    aligned = (lengths[1] - lengths[0]) % block_k == 0
    return -(-block_q // block_k) + (0 if aligned else 1)


def per_query_head(x: Tensor, query: Tensor) -> Tensor:
    """`[B, Hkv, ...]` of key heads as `[B, Hq, ...]`."""
    return x.repeat_interleave(query.shape[1] // x.shape[1], dim=1)


def block_map(indices: Tensor, counts: Tensor, blocks: int) -> Tensor:
    """bool `[..., blocks]` of ascending lists."""
    valid = torch.arange(indices.shape[-1], device=indices.device) < counts[..., None]
    flags = torch.zeros(*indices.shape[:-1], blocks + 1, dtype=torch.bool, device=indices.device)
    return flags.scatter_(-1, indices.long().where(valid, blocks), True)[..., :blocks]
