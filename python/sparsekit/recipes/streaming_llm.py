"""StreamingLLM: the first tokens and the last (Xiao et al., arXiv 2309.17453). The control that a choice must beat."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .recipe import Recipe, Stripes


@dataclass(frozen=True)
class StreamingLLM(Recipe):
    """Every row sees the first `start_size` keys and the last `recent_size` up to its own.

    Not here: positions counted inside the cache; rows keep their own, as in a prompt.
    """

    start_size: int = 4
    recent_size: int = 2000

    def choose(self, query, key, *, scale=None, layer=None) -> Stripes:
        none = torch.zeros(1, 1, 1, 0, dtype=torch.int32, device=query.device)
        counts = torch.zeros(1, 1, 1, dtype=torch.int32, device=query.device)
        return Stripes(none, counts, query.shape[2], sink=self.start_size, local=self.recent_size)
