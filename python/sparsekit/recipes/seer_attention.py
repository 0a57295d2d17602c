"""SeerAttention: a small trained gate predicts the pooled attention map (Gao et al., arXiv 2410.13276)."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sparsekit
from sparsekit import BlockPattern
from sparsekit.selection import attention_block_map, row_limits, select_threshold, select_top_k

from .recipe import Recipe, lengths_of, own_blocks, per_query_head


class AttentionGate(nn.Module):
    """AttnGate of one layer: pooled queries and keys, a linear map per head, and their product.

    Query blocks are pooled by the mean, key blocks by maximum, minimum and mean side by side (section 3.1, the paper's
    best). Heads have weights of their own.

    Args:
        heads_q, heads_kv, head_dim: of the layer. gate_dim: of the compressed queries and keys.
        block_size: tokens per block.

    Not here: rotary embedding inside the gate. Give it query and key as attention gets them, or before rotation.
    """

    def __init__(self, heads_q: int, heads_kv: int, head_dim: int, *, gate_dim: int = 128, block_size: int = 64):
        super().__init__()
        self.block_size = block_size
        self.query_weight = nn.Parameter(torch.randn(heads_q, head_dim, gate_dim) / math.sqrt(head_dim))
        self.key_weight = nn.Parameter(torch.randn(heads_kv, 3 * head_dim, gate_dim) / math.sqrt(3 * head_dim))

    def forward(self, query: Tensor, key: Tensor) -> Tensor:
        """Logits float32 `[B, Hq, Mq, Nk]` from query `[B, Hq, Sq, D]` and key `[B, Hkv, Sk, D]`; -inf where causality
        leaves no pair."""
        mean_query = _pool(query, self.block_size, "mean")
        pooled_key = torch.cat([_pool(key, self.block_size, how) for how in ("max", "min", "mean")], -1)
        gate_query = mean_query @ self.query_weight.float()
        gate_key = per_query_head(pooled_key @ self.key_weight.float(), query)
        logits = gate_query @ gate_key.mT / math.sqrt(gate_query.shape[-1])
        limits = row_limits(self.block_size, lengths_of(query, key), device=query.device)
        return logits.masked_fill(torch.arange(logits.shape[-1], device=query.device) >= limits[:, None], -torch.inf)

    def loss(self, query: Tensor, key: Tensor, value: Tensor, *, scale: float | None = None) -> Tensor:
        """KL divergence of the gate from the attention map pooled by its maximum and normalised per row (section 3.2).

        Dense attention runs for its lse, without gradients; the map is made block by block, never `[Sq, Sk]`.
        """
        with torch.no_grad():
            lengths, size = lengths_of(query, key), self.block_size
            rows, columns = (-(-length // size) for length in lengths)
            everything = torch.ones(1, 1, rows, columns, dtype=torch.bool, device=query.device)
            pattern = BlockPattern.from_bool(everything, size, seq_lengths=lengths, causal=True)
            _, lse = sparsekit.block_sparse_attention(query, key, value, pattern, scale=scale, return_lse=True)
            target = attention_block_map(query, key, lse, size, reduce="max", scale=scale, causal=True)
            target = target / target.sum(-1, keepdim=True).clamp(min=1e-20)
        log_gate = self(query, key).log_softmax(-1)
        log_gate = log_gate.masked_fill(log_gate == -torch.inf, 0)  # there the target is 0
        return F.kl_div(log_gate, target, reduction="none").sum(-1).mean()


@dataclass(frozen=True)
class SeerAttention(Recipe):
    """Blocks by trained gates, one per layer: the `topk` best of each row, or those above `threshold`.

    gates       AttentionGate of every layer, by its number
    topk        blocks per query block; None: by threshold
    threshold   least share of the gate's softmax
    The row's own block is always on.
    """

    gates: nn.ModuleList = field(default_factory=nn.ModuleList)
    topk: int | None = None
    threshold: float = 5e-4

    def choose(self, query, key, *, scale=None, layer=None) -> BlockPattern:
        gate = self.gates[0 if layer is None else layer]
        size, lengths = gate.block_size, lengths_of(query, key)
        share = gate(query, key).softmax(-1).nan_to_num(0)
        own = own_blocks(size, lengths)
        options = dict(local=own, row_limit=row_limits(size, lengths, device=query.device))
        if self.topk is None:
            indices, counts = select_threshold(share, self.threshold, **options)
        else:
            indices, counts = select_top_k(share, min(max(self.topk, own), share.shape[-1]), **options)
        return BlockPattern.from_indices(indices, counts, size, seq_lengths=lengths, causal=True)


def _pool(x: Tensor, size: int, how: str) -> Tensor:
    """`[B, H, S, D]` to float32 `[B, H, ceil(S / size), D]`; the last block has the tokens that are there."""
    neutral = {"mean": 0.0, "max": -torch.inf, "min": torch.inf}[how]
    tail = -x.shape[2] % size
    blocks = F.pad(x.float(), (0, 0, 0, tail), value=neutral).unflatten(2, (-1, size))
    if how != "mean":
        return blocks.amax(3) if how == "max" else blocks.amin(3)
    count = torch.full((blocks.shape[2], 1), size, dtype=torch.float32, device=x.device)
    count[-1] = size - tail
    return blocks.sum(3) / count
