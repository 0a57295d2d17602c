"""Token Sparse Attention: each head attends among its own tokens only (Jo et al., arXiv 2602.03216)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

import sparsekit
from sparsekit import BlockPattern
from sparsekit.selection import column_scores, inverse_permutation, permute_tokens, select_top_k

from .recipe import Recipe, lengths_of, per_query_head


@dataclass(frozen=True)
class TokenSparseAttention(Recipe):
    """Per head the tokens that the last queries look at most: query, key and value are reduced to them, attention runs
    densely and causally among them, and the output is put back; rows of other tokens are 0, so that the residual
    passes them by.

    keep         share of the tokens that each head keeps
    last_q       queries that vote
    recent       last tokens that are always kept: their rows are read next
    block_size   of the attention kernel

    The paper sets the number of tokens per layer from how much representations drift; here it is given. Prompts only,
    Sq = Sk.
    """

    keep: float = 0.5
    last_q: int = 64
    recent: int = 64
    block_size: int = 64

    def tokens(self, query, key, scale=None):
        """int32 `[B, Hq, K]`, ascending."""
        length_q, length = lengths_of(query, key)
        if length_q != length:
            raise ValueError(
                f"query: found {length_q} rows for {length} keys; TokenSparseAttention takes whole prompts"
            )
        count = max(1, min(length, round(self.keep * length)))
        rows = torch.arange(max(0, length - self.last_q), length, device=query.device)
        columns, _ = column_scores(query[:, :, rows], key, rows, scale=scale)
        limit = torch.full((), length, device=query.device)
        indices, _ = select_top_k(columns, count, local=min(self.recent, count), row_limit=limit, min_count=count)
        return indices

    def choose(self, query, key, *, scale=None, layer=None):
        raise NotImplementedError("TokenSparseAttention chooses tokens, not blocks or columns: see `tokens`")

    def __call__(self, query, key, value, *, scale=None, softcap=None, sinks=None, return_lse=False, layer=None):
        with torch.no_grad():
            order = self.tokens(query, key, scale)
        (batch, heads, length, _), count = query.shape, order.shape[-1]
        key, value = per_query_head(key, query), per_query_head(value, query)
        # Heads keep different tokens, and positions belong to a batch entry: heads become the batch.
        q, k, v = (x.flatten(0, 1)[:, None] for x in permute_tokens((query, key, value), order))
        blocks = -(-count // self.block_size)
        everything = torch.ones(1, 1, blocks, blocks, dtype=torch.bool, device=query.device)
        # In ascending order causality by index is causality by position.
        pattern = BlockPattern.from_bool(everything, self.block_size, seq_lengths=(count, count), causal=True)
        if sinks is not None:
            raise NotImplementedError("TokenSparseAttention: sinks are per head, and heads are its batch")
        out, lse = sparsekit.block_sparse_attention(q, k, v, pattern, scale=scale, softcap=softcap, return_lse=True)
        back = inverse_permutation(order, length)
        out = permute_tokens(out.unflatten(0, (batch, heads)).squeeze(2), back)
        if not return_lse:
            return out
        full = lse.new_full((batch, heads, length), -torch.inf)
        return out, full.scatter(2, order.long(), lse.unflatten(0, (batch, heads)).squeeze(2))
