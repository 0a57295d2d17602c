"""Stripe-sparse problems on random columns: `cases.py` for columns, a sink and a local band, with or without blocks."""

import dataclasses
from dataclasses import dataclass

import torch

from ..reference import stripe_mask
from .cases import AttentionCase, AttentionInputs, _to_list, make_inputs, make_pattern


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


def _columns_in_sight(case: StripeCase) -> torch.Tensor:
    """int64 [groups]: keys that the last row of each group can see."""
    groups = -(-case.len_q // case.group_size)
    if not case.causal or case.positions:
        return torch.full((groups,), case.len_k)
    last = (torch.arange(1, groups + 1) * case.group_size).clamp(max=case.len_q)
    return (last + case.len_k - case.len_q).clamp(0, case.len_k)


def draw_columns(case: StripeCase, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """(col_indices, col_counts): the same number of random keys in each group, as many as its share of those that its
    last row can see."""
    seen = _columns_in_sight(case)
    shape = (case.batch if case.lists_batch else 1, case.list_heads, len(seen), case.len_k)
    outside = torch.arange(case.len_k) >= seen[:, None]
    rank = torch.rand(shape, generator=generator).masked_fill(outside, 2.0).argsort(-1).argsort(-1)
    listed = (rank < (seen * case.columns).round()[:, None]) & ~outside
    if case.adversarial:
        listed &= torch.rand(shape[:-1], generator=generator)[..., None] > 0.15  # empty groups
    counts, indices = _to_list(listed, case.adversarial, generator)
    return indices, counts


def draw_columns_on(device: torch.device | str, case: StripeCase) -> tuple[torch.Tensor, torch.Tensor]:
    """The same on a GPU, head by head: lists of long prompts would take minutes on the CPU. Not adversarial."""
    generator = torch.Generator(device).manual_seed(case.seed + 1)
    seen = _columns_in_sight(case).to(device)
    counts = (seen * case.columns).round().int()
    outside = torch.arange(case.len_k, device=device) >= seen[:, None]
    place = torch.arange(int(counts.max()), device=device)
    batch = case.batch if case.lists_batch else 1
    indices = torch.empty(batch, case.list_heads, len(seen), len(place), dtype=torch.int32, device=device)
    for lists in indices.flatten(0, 1):
        rank = torch.rand(outside.shape, generator=generator, device=device).masked_fill(outside, 2.0).argsort(-1)
        columns = rank[:, : len(place)].masked_fill(place >= counts[:, None], case.len_k).sort(-1).values
        lists.copy_(columns.where(columns < case.len_k, -1))
    return indices, counts.expand(batch, case.list_heads, -1).contiguous()


def on_device(case: AttentionCase, device: torch.device | str) -> bool:
    """Whether a benchmark's inputs are drawn on the GPU itself: of long prompts, which would take the CPU minutes."""
    return torch.device(device).type == "cuda" and case.len_q * case.len_k > 1 << 24


def make_stripe_inputs(case: StripeCase, device: torch.device | str = "cpu") -> StripeInputs:
    if on_device(case, device):
        inputs = _plain_inputs(case, device)
        indices, counts = draw_columns_on(device, case)
    else:
        inputs = make_inputs(case, device)
        indices, counts = draw_columns(case, torch.Generator().manual_seed(case.seed + 1))
    fields = {field.name: getattr(inputs, field.name) for field in dataclasses.fields(inputs)}
    return StripeInputs(**fields, col_indices=indices.to(device), col_counts=counts.to(device))


def _plain_inputs(case: AttentionCase, device: torch.device | str) -> AttentionInputs:
    """Query, key, value and pattern; what else a case may have is for tests."""
    generator = torch.Generator(device).manual_seed(case.seed)
    shapes = (
        (case.batch, case.heads_q, case.len_q, case.head_dim),
        (case.batch, case.heads_kv, case.len_k, case.head_dim),
        (case.batch, case.heads_kv, case.len_k, case.value_dim),
    )
    tensors = (torch.randn(shape, generator=generator, device=device, dtype=case.dtype) for shape in shapes)
    return AttentionInputs(case, *tensors, make_pattern(case, torch.Generator().manual_seed(case.seed), device))


def beside(case: AttentionCase, stripes: StripeInputs) -> AttentionInputs:
    """A case of blocks on the same query, key and value."""
    pattern = make_pattern(case, torch.Generator().manual_seed(case.seed), stripes.query.device)
    return AttentionInputs(case, stripes.query, stripes.key, stripes.value, pattern)


def stripe_pairs(inputs: StripeInputs) -> int:
    """How many (query head, query row, key) triples the columns, the sink and the local keys let through."""
    case = inputs.case
    if case.blocks:
        raise ValueError("stripe_pairs: blocks beside columns are not counted")
    options = {name: inputs.kwargs[name] for name in ("group_size", "sink", "local", "causal")}
    lists_batch, lists_heads = inputs.col_counts.shape[:2]
    total = 0
    for b in range(lists_batch):
        for h in range(lists_heads):
            lists = (x[b : b + 1, h : h + 1] for x in (inputs.col_indices, inputs.col_counts))
            total += int(stripe_mask(*lists, (case.len_q, case.len_k), **options).sum())
    return total * (case.batch // lists_batch) * (case.heads_q // lists_heads)


def stripe_bench_cases(device: str) -> dict[str, StripeCase]:
    """Benchmark cases by name, which ends with the listed share of the keys in percent."""
    base = StripeCase(heads_q=4, heads_kv=4, len_q=8192, len_k=8192, seed=7)
    if device == "cuda":
        base = base.with_(heads_q=16, heads_kv=16, len_q=32768, len_k=32768)
    kinds = {
        "d128": (base, 0.1, 0.25),
        "d128-group2048": (base.with_(group_size=2048), 0.1, 0.25),
        "d128-causal": (base.with_(causal=True), 0.1),
        "d128-band": (base.with_(causal=True, sink=128, local=512), 0.1),
        "d128-gqa": (base.with_(heads_kv=base.heads_q // 4, lists="kv"), 0.1),
        "d64": (base.with_(head_dim=64), 0.1),
        "d128-fp32": (base.with_(dtype=torch.float32), 0.1),
    }
    cases = {}
    for kind, (case, *shares) in kinds.items():
        for share in shares:
            name = f"{kind}-{round(100 * share)}"
            cases[name] = case.with_(name=name, columns=share)
    return cases
