"""Stripe-sparse problems on random columns: `cases.py` for columns, a sink and a local band, with or without blocks."""

import dataclasses
from dataclasses import dataclass

import torch

from .cases import AttentionCase, AttentionInputs, _to_list, make_inputs


@dataclass(frozen=True)
class StripeCase(AttentionCase):
    """An AttentionCase whose rows see columns. `density` is that of its blocks, which it has if `blocks`; `lists` says
    whose heads have columns of their own too."""

    name: str = "stripes"
    group_size: int = 128
    columns: float = 0.1  # listed share of the keys that a group can see at all
    sink: int = 0
    local: int = 0
    blocks: bool = False


@dataclass
class StripeInputs(AttentionInputs):
    col_indices: torch.Tensor | None = None
    col_counts: torch.Tensor | None = None

    @property
    def args(self) -> tuple:
        """Positional arguments of `stripe_sparse_attention`."""
        return (self.query, self.key, self.value, self.col_indices, self.col_counts)

    @property
    def kwargs(self) -> dict:
        case = self.case
        stripes = dict(group_size=case.group_size, sink=case.sink, local=case.local, causal=case.causal)
        return super().kwargs | stripes | ({"pattern": self.pattern} if case.blocks else {})


def draw_columns(case: StripeCase, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """(col_indices, col_counts): the same number of random keys in each group, as many as its share of those that its
    last row can see."""
    groups = -(-case.len_q // case.group_size)
    seen = torch.full((groups,), case.len_k)
    if case.causal and not case.positions:
        last = (torch.arange(1, groups + 1) * case.group_size).clamp(max=case.len_q)
        seen = (last + case.len_k - case.len_q).clamp(0, case.len_k)
    shape = (case.batch if case.lists_batch else 1, case.list_heads, groups, case.len_k)
    outside = torch.arange(case.len_k) >= seen[:, None]
    rank = torch.rand(shape, generator=generator).masked_fill(outside, 2.0).argsort(-1).argsort(-1)
    listed = (rank < (seen * case.columns).round()[:, None]) & ~outside
    if case.adversarial:
        listed &= torch.rand(shape[:-1], generator=generator)[..., None] > 0.15  # empty groups
    counts, indices = _to_list(listed, case.adversarial, generator)
    return indices, counts


def make_stripe_inputs(case: StripeCase, device: torch.device | str = "cpu") -> StripeInputs:
    inputs = make_inputs(case, device)
    indices, counts = draw_columns(case, torch.Generator().manual_seed(case.seed + 1))
    fields = {field.name: getattr(inputs, field.name) for field in dataclasses.fields(inputs)}
    return StripeInputs(**fields, col_indices=indices.to(device), col_counts=counts.to(device))
