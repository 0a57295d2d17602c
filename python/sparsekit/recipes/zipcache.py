"""ZipCache (arXiv 2405.14256): tokens that attention looks at keep more bits than the others.

Saliency of a token is the attention it gets, normalized by how many rows can see it (section 3.3), from a few probe rows. Each
head's most salient tokens of a prompt go into a cache of `high` bits and the others into one of `low` bits; values are
channel-separable (section 3.2). Attention over both is two calls, merged by their log-sum-exp: attention does not care about
the order of keys. New tokens go to the high cache. (The paper recompresses every 100 tokens; `compress` does so when called
with all tokens again.)
"""

from __future__ import annotations

import torch
from torch import Tensor

import sparsekit


def saliency(query: Tensor, key: Tensor, probes: Tensor, scale: float | None = None) -> Tensor:
    """Normalized attention scores, float32 `[B, H, S]`: what the probe rows give each token, per row that sees it.

    Args:
        query: `[B, Hq, S, D]` of a whole prompt; key: `[B, H, S, D]`.
        probes: integers `[P]`, rows of query. The paper takes the last 5 % and 5 % at random.
    """
    batch, heads, length, dim = key.shape
    rows = query[:, :, probes].float().unflatten(1, (heads, -1)).flatten(2, 3)  # [B, H, group * P, D]
    scores = rows @ key.float().transpose(2, 3) * (dim**-0.5 if scale is None else scale)
    seen = torch.arange(length, device=key.device) <= probes.repeat(rows.shape[2] // len(probes))[:, None]
    weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
    return weights.sum(2) / seen.sum(0).clamp(min=1)


class ZipCache:
    """Two caches per layer: `high` bits for salient and new tokens, `low` bits for the rest.

    Args:
        batch_size, num_heads, head_dim: as `sparsekit.KVCache`.
        high, low: bits.
        salient: share of a prompt's tokens that are salient.
        options: of both caches.
    """

    def __init__(
        self,
        batch_size: int,
        num_heads: int,
        head_dim: int,
        *,
        high: int = 4,
        low: int = 2,
        salient: float = 0.4,
        **options,
    ):
        self.salient = salient
        group = next(size for size in (32, 64, 128) if size >= min(head_dim, 128))  # one scale per token's values
        options = {"group_size": group, "separable_values": True, **options}
        self.high = sparsekit.KVCache(batch_size, num_heads, head_dim, bits=high, **options)
        self.low = sparsekit.KVCache(batch_size, num_heads, head_dim, bits=low, **{**options, "window": 0})

    def compress(self, key: Tensor, value: Tensor, scores: Tensor) -> None:
        """Stores a prompt's keys and values `[B, H, S, D]` by the saliency of each token, `scores [B, H, S]`."""
        self.high.reset()
        self.low.reset()
        length = key.shape[2]
        count = round(self.salient * length)
        order = scores.argsort(dim=-1, descending=True, stable=True)
        for cache, chosen in ((self.low, order[..., count:]), (self.high, order[..., :count])):
            if not chosen.shape[-1]:
                continue
            at = chosen.sort(-1).values[..., None]
            cache.append(*(x.gather(2, at.expand(*at.shape[:3], x.shape[-1])) for x in (key, value)))

    def append(self, key: Tensor, value: Tensor) -> None:
        self.high.append(key, value)

    def attend(self, query: Tensor, **options) -> Tensor:
        """`sparsekit.decode_attention` over both caches: the newest `query [B, Hq, S, D]`, whose tokens were appended."""
        out, lse = sparsekit.decode_attention(query, self.high, return_lse=True, **options)
        # Every row sees all of the low cache: rows become heads, one row each.
        rows = query.flatten(1, 2)[:, :, None]
        other, other_lse = sparsekit.decode_attention(rows, self.low, return_lse=True, **options)
        other, other_lse = (
            other[:, :, 0].unflatten(1, query.shape[1:3]),
            other_lse[..., 0].unflatten(1, query.shape[1:3]),
        )
        return sparsekit.merge_attention_states([out, other.contiguous()], [lse, other_lse.contiguous()])[0]

    @property
    def nbytes(self) -> int:
        return self.high.nbytes + self.low.nbytes
