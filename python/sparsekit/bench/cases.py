"""Attention problems on random block lists: one generator for the benchmarks and the tests.

A case is a plain description; `make_inputs(case, device)` turns it into tensors and a BlockPattern. Equal cases give
equal tensors on every device: everything is drawn on the CPU from `case.seed`.
"""

import dataclasses
import math
from dataclasses import dataclass

import torch

from ..formats import BlockPattern

LISTS = {"q": "heads_q", "kv": "heads_kv", "shared": None}  # whose heads have lists of their own


@dataclass(frozen=True)
class AttentionCase:
    """One attention problem. `lens_q` and `lens_k` make it a packed batch: then `len_q`, `len_k` are their sums."""

    name: str = "case"
    batch: int = 1
    heads_q: int = 16
    heads_kv: int = 16
    len_q: int = 4096
    len_k: int = 4096
    head_dim: int = 128
    value_dim: int = 0  # 0: head_dim
    dtype: torch.dtype = torch.bfloat16
    block_size: tuple[int, int] = (128, 128)
    density: float = 0.25  # listed share of the key blocks that a query block can see at all
    lists: str = "q"  # lists per query head ("q"), per key head ("kv") or one for all heads ("shared")
    lists_batch: bool = True  # each batch entry has lists of its own
    causal: bool = False
    window: tuple[int, int] = (-1, -1)
    softcap: float = 0.0
    key_bias: bool = False
    sinks: bool = False
    positions: bool = False  # random query and key positions, in no order
    bits: bool = False  # about half of the partial blocks carry packed bits
    neighbours: float = 0.0  # share of a list that the next query block's list has, too, for every second query block
    lens_q: tuple[int, ...] = ()
    lens_k: tuple[int, ...] = ()
    # What a kernel must survive: empty rows, -1 slots, lists in no order, garbage past the counts, full blocks that
    # causality would cut, a bias of -inf, one key far larger than the rest.
    adversarial: bool = False
    seed: int = 0

    def __post_init__(self):
        object.__setattr__(self, "value_dim", self.value_dim or self.head_dim)
        if self.packed:
            object.__setattr__(self, "len_q", sum(self.lens_q))
            object.__setattr__(self, "len_k", sum(self.lens_k))
            object.__setattr__(self, "batch", 1)
        if self.lists not in LISTS:
            raise ValueError(f"lists: {self.lists!r} found, one of {', '.join(LISTS)} supported")

    @property
    def packed(self) -> bool:
        return bool(self.lens_q)

    @property
    def list_heads(self) -> int:
        return getattr(self, LISTS[self.lists]) if LISTS[self.lists] else 1

    @property
    def sequences(self) -> list[tuple[int, int]]:
        """(query length, key length) of each sequence; without packing there is one."""
        return list(zip(self.lens_q, self.lens_k, strict=True)) if self.packed else [(self.len_q, self.len_k)]

    def with_(self, **changes) -> "AttentionCase":
        if "head_dim" in changes and "value_dim" not in changes and self.value_dim == self.head_dim:
            changes["value_dim"] = 0
        return dataclasses.replace(self, **changes)


@dataclass
class AttentionInputs:
    case: AttentionCase
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    pattern: BlockPattern
    key_bias: torch.Tensor | None = None
    sinks: torch.Tensor | None = None
    query_positions: torch.Tensor | None = None
    key_positions: torch.Tensor | None = None
    cu_seqlens_q: torch.Tensor | None = None
    cu_seqlens_k: torch.Tensor | None = None

    @property
    def args(self) -> tuple:
        """Positional arguments of `block_sparse_attention`, or of its varlen form for a packed case."""
        tensors = (self.query, self.key, self.value, self.pattern)
        if not self.case.packed:
            return tensors
        return (*tensors, self.cu_seqlens_q, self.cu_seqlens_k, max(self.case.lens_q), max(self.case.lens_k))

    @property
    def kwargs(self) -> dict:
        options = {"softcap": self.case.softcap or None}
        for name in ("key_bias", "sinks", "query_positions", "key_positions"):
            options[name] = getattr(self, name)
        return {name: value for name, value in options.items() if value is not None}


def _row_spans(case: AttentionCase) -> list[tuple[int, int, int, int]]:
    """(first query row, one past the last, query length, key length) of every row of the lists, rows and keys counted
    inside their sequence."""
    block = case.block_size[0]
    return [
        (first, min(first + block, len_q), len_q, len_k)
        for len_q, len_k in case.sequences
        for first in range(0, len_q, block)
    ]


def block_visibility(case: AttentionCase) -> tuple[torch.Tensor, torch.Tensor]:
    """Two bool maps [query blocks, key blocks]: some row of the block may see some key, and every row sees every key,
    as causality and window (not positions) have it."""
    spans = torch.tensor(_row_spans(case), dtype=torch.int64).reshape(-1, 4)
    first, last, len_q, len_k = (column[:, None] for column in spans.unbind(1))
    block = case.block_size[1]
    blocks = max((math.ceil(len_k / block) for _, len_k in case.sequences), default=0)
    key_first = torch.arange(blocks)[None] * block
    key_last = torch.minimum(key_first + block, len_k)  # one past the last
    exists = key_first < len_k
    if case.positions:
        return exists, exists & (not case.causal) & (case.window == (-1, -1))
    shift = len_k - len_q  # row i stands at position i + shift
    left, right = case.window
    right = 0 if case.causal else right
    some = every = exists
    if right >= 0:
        some = some & (key_first <= last - 1 + shift + right)
        every = every & (key_last - 1 <= first + shift + right)
    if left >= 0:
        some = some & (key_last - 1 >= first + shift - left)
        every = every & (key_first >= last - 1 + shift - left)
    return some, every


def _draw_map(case: AttentionCase, generator: torch.Generator) -> torch.Tensor:
    """Bool map [list batch, list heads, query blocks, key blocks]: in each row the same number of random blocks."""
    visible, _ = block_visibility(case)
    shape = (case.batch if case.lists_batch and not case.packed else 1, case.list_heads, *visible.shape)
    wanted = (visible.sum(-1) * case.density).round().clamp(min=1).minimum(visible.sum(-1))
    draw = torch.rand(shape, generator=generator).masked_fill(~visible, 2.0)
    block_map = draw.argsort(-1).argsort(-1) < wanted[:, None]
    if case.neighbours:
        odd = draw[..., 1::2, :]
        kept = block_map[..., ::2, :][..., : odd.shape[-2], :] & (
            torch.rand(odd.shape, generator=generator) < case.neighbours
        )
        draw[..., 1::2, :] = odd.masked_fill(kept & visible[1::2], -1.0)
        block_map = draw.argsort(-1).argsort(-1) < wanted[:, None]
    if case.adversarial:
        block_map &= torch.rand(shape[:-1], generator=generator)[..., None] > 0.15  # empty rows
    return block_map


def _to_list(block_map: torch.Tensor, adversarial: bool, generator: torch.Generator):
    """(counts, indices) int32 of a map; adversarial: shuffled, with empty slots inside and garbage past the counts."""
    counts = block_map.sum(-1)
    extra = torch.zeros_like(counts)
    if adversarial:
        extra = torch.randint(0, 3, counts.shape, generator=generator)
    capacity = int((counts + extra).max()) if counts.numel() else 0
    columns = torch.arange(block_map.shape[-1]).expand(block_map.shape)
    slots = torch.nn.functional.pad(columns.masked_fill(~block_map, block_map.shape[-1]), (0, capacity), value=1 << 30)
    slots = slots.sort(-1).values[..., :capacity]
    place = torch.arange(capacity).expand(slots.shape)
    slots = slots.masked_fill(place >= counts[..., None], -1)
    total = counts + extra
    if adversarial:
        order = torch.rand(slots.shape, generator=generator).masked_fill(place >= total[..., None], 2.0).argsort(-1)
        slots = slots.gather(-1, order).masked_fill(place >= total[..., None], 1 << 30)
    return total.int().contiguous(), slots.int().contiguous()


def make_pattern(case: AttentionCase, generator: torch.Generator, device: torch.device | str = "cpu") -> BlockPattern:
    block_map = _draw_map(case, generator)
    _, inside = block_visibility(case)
    full_map = block_map & inside
    if case.adversarial:  # the caller of a full block vouches for it: cut by causality or not, all its keys are seen
        full_map = block_map & (torch.rand(block_map.shape, generator=generator) < 0.3)
    elif case.bits:
        full_map = full_map & (torch.rand(block_map.shape, generator=generator) < 0.5)
    counts, indices = _to_list(block_map & ~full_map, case.adversarial, generator)
    full_counts, full_indices = _to_list(full_map, case.adversarial, generator)
    bits = bits_index = None
    if case.bits:
        listed = torch.arange(indices.shape[-1]) < counts[..., None]
        with_bits = listed & (indices >= 0) & (torch.rand(indices.shape, generator=generator) < 0.5)
        number = with_bits.flatten().cumsum(0).reshape(with_bits.shape) - 1
        bits_index = number.masked_fill(~with_bits, -1).int()
        words = math.ceil(case.block_size[1] / 32)
        shape = (int(with_bits.sum()), case.block_size[0], words)
        bits = torch.randint(-(2**31), 2**31, shape, generator=generator, dtype=torch.int64).int()
    tensors = {
        "kv_num_blocks": counts,
        "kv_indices": indices,
        "full_kv_num_blocks": full_counts,
        "full_kv_indices": full_indices,
        "partial_bits": bits,
        "partial_bits_index": bits_index,
    }
    return BlockPattern(
        **{name: None if tensor is None else tensor.to(device) for name, tensor in tensors.items()},
        block_size=case.block_size,
        seq_lengths=(case.len_q, case.len_k),
        causal=case.causal,
        window=case.window,
    )


def make_inputs(
    case: AttentionCase, device: torch.device | str = "cpu", *, requires_grad: bool = False
) -> AttentionInputs:
    """The tensors of a case on `device`."""
    generator = torch.Generator().manual_seed(case.seed)
    pattern = make_pattern(case, generator, device)

    def randn(*shape: int) -> torch.Tensor:
        if torch.device(device).type == "cpu" or math.prod(shape) < 1 << 24:
            return torch.randn(shape, generator=generator)
        # A benchmark's: other numbers than on the CPU, in no time.
        seed = int(torch.randint(1 << 31, (), generator=generator))
        return torch.randn(shape, generator=torch.Generator(device).manual_seed(seed), device=device)

    def heads(count: int, length: int, dim: int) -> torch.Tensor:
        return randn(length, count, dim) if case.packed else randn(case.batch, count, length, dim)

    query = heads(case.heads_q, case.len_q, case.head_dim)
    key = heads(case.heads_kv, case.len_k, case.head_dim)
    value = heads(case.heads_kv, case.len_k, case.value_dim)
    optional: dict[str, torch.Tensor] = {}
    if case.key_bias:
        optional["key_bias"] = randn(case.batch, 1, case.len_k)
        if case.adversarial:
            hidden = torch.rand(optional["key_bias"].shape, generator=generator) < 0.1
            optional["key_bias"].masked_fill_(hidden, -math.inf)
    if case.sinks:
        optional["sinks"] = randn(case.heads_q)
    if case.positions:
        for name, length in (("query_positions", case.len_q), ("key_positions", case.len_k)):
            draws = torch.rand((case.batch, length), generator=generator)
            optional[name] = draws.argsort(-1).int()
    if case.adversarial and case.len_k:
        (key if case.packed else key.transpose(1, 2).flatten(0, 1))[case.len_k // 2] *= 16.0

    def place(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(device=device, dtype=case.dtype).requires_grad_(requires_grad)

    packed = {}
    if case.packed:
        for name, lens in (("cu_seqlens_q", case.lens_q), ("cu_seqlens_k", case.lens_k)):
            offsets = torch.tensor((0, *lens), dtype=torch.int64).cumsum(0).int()
            packed[name] = offsets.to(device)
    return AttentionInputs(
        case=case,
        query=place(query),
        key=place(key),
        value=place(value),
        pattern=pattern,
        **{name: tensor.to(device) for name, tensor in optional.items()},
        **packed,
    )


def visible_pairs(inputs: AttentionInputs) -> int:
    """How many (query head, query row, key) triples the pattern lets through, over the whole batch: the unmasked work.
    A slot counts the pairs of its block that causality and window allow, or all of them if it is a full block."""
    case, pattern = inputs.case, inputs.pattern
    if case.bits or case.positions or case.packed:
        raise ValueError("visible_pairs: bits, positions and packed batches are not counted")
    block_q, block_k = case.block_size
    rows = torch.arange(case.len_q)
    position = rows + case.len_k - case.len_q
    left, right = case.window
    right = 0 if case.causal else right
    low, high = torch.zeros_like(rows), torch.full_like(rows, case.len_k)  # first key, and one past the last
    blocks = rows[::block_q]
    whole = (blocks // block_q, low[::block_q], high[::block_q], (case.len_q - blocks).clamp(max=block_q))
    if left >= 0:
        low = (position - left).clamp(min=0)
    if right >= 0:
        high = (position + right + 1).clamp(max=case.len_k)
    # A query block whose rows see the same keys of a block counts once, times its rows.
    ranged = (rows // block_q, low, high, torch.ones_like(rows)) if left >= 0 or right >= 0 else whole
    lists = ((pattern.kv_num_blocks, pattern.kv_indices, ranged),)
    if pattern.full_kv_num_blocks is not None:
        lists += ((pattern.full_kv_num_blocks, pattern.full_kv_indices, whole),)
    total = 0
    for counts, indices, groups in lists:
        counts, indices = counts.cpu(), indices.cpu()
        for b, h in ((b, h) for b in range(counts.shape[0]) for h in range(counts.shape[1])):
            for block, first, last, times in zip(*(x.split(4096) for x in groups), strict=True):
                index = indices[b, h, block].long()
                listed = (torch.arange(index.shape[-1]) < counts[b, h, block][:, None]) & (index >= 0)
                index = index.masked_fill(~listed, 0)
                begin = torch.maximum(index * block_k, first[:, None])
                end = torch.minimum((index + 1) * block_k, last[:, None])
                total += int(((end - begin).clamp(min=0) * listed * times[:, None]).sum())
    return total * (case.batch // counts.shape[0]) * (case.heads_q // counts.shape[1])


def key_value_bytes(inputs: AttentionInputs) -> float:
    """Bytes of the keys and values that a query row sees on average, of all key heads: what few queries that see about
    the same must read."""
    case = inputs.case
    rows = case.batch * case.heads_q * case.len_q
    keys = visible_pairs(inputs) / max(rows, 1)
    return keys * case.batch * case.heads_kv * (case.head_dim + case.value_dim) * case.dtype.itemsize


# The named problems of `python -m sparsekit.bench attention`, per device. Sizes are those of a long prompt: what one
# layer of a model computes.
_CPU = AttentionCase(heads_q=4, heads_kv=4, len_q=8192, len_k=8192, seed=7)
_CUDA = AttentionCase(heads_q=16, heads_kv=16, len_q=32768, len_k=32768, seed=7)


def _densities(base: str, case: AttentionCase, *densities: float) -> list[AttentionCase]:
    return [case.with_(name=f"{base}-{density:.0%}".rstrip("%"), density=density) for density in densities]


def bench_cases(device: str) -> dict[str, AttentionCase]:
    """Benchmark cases by name. A name ends with its density in percent."""
    base = _CUDA if device == "cuda" else _CPU
    cases = [
        *_densities("d128", base, 0.05, 0.1, 0.25, 0.5, 1.0),
        *_densities("d64", base.with_(head_dim=64), 0.05, 0.1, 0.25, 0.5, 1.0),
        *_densities("d128-block64", base.with_(block_size=(64, 64)), 0.1, 0.25),
        *_densities("d128-causal", base.with_(causal=True), 0.1, 0.25, 1.0),
        *_densities("d128-gqa", base.with_(heads_kv=base.heads_q // 4, lists="kv"), 0.1, 0.25),
        *_densities("d128-fp16", base.with_(dtype=torch.float16), 0.25),
    ]
    if device == "cuda":
        cases += _densities("d128-128x64", base.with_(block_size=(128, 64)), 0.05, 0.1, 0.25, 0.5)
        cases += _densities("d128-block64", base.with_(block_size=(64, 64)), 0.05, 0.5)
        cases += _densities("d128-neighbours", base.with_(block_size=(64, 64), neighbours=0.75), 0.1, 0.25)
        # 25 % of all pairs: half of what causality leaves.
        cases += _densities("d128-causal-gqa", base.with_(causal=True, heads_kv=base.heads_q // 4, lists="q"), 0.5)
        cases += _densities("d128-short", base.with_(batch=4, heads_q=32, heads_kv=32, len_q=4096, len_k=4096), 0.25)
    if device != "cuda":
        cases += _densities("d128-block32", base.with_(block_size=(32, 32)), 0.25)
        cases += _densities("d128-block16", base.with_(block_size=(16, 16)), 0.25)
        cases += _densities("d128-fp32", base.with_(dtype=torch.float32), 0.1, 0.25, 1.0)
        cases += _densities("d64-fp32", base.with_(dtype=torch.float32, head_dim=64), 0.1, 0.25, 1.0)
        # Decoding: few queries against a long cache of 32 heads.
        decode = base.with_(heads_q=32, heads_kv=32)
        for len_q in (1, 2, 4, 8, 16):
            cases += _densities(f"decode{len_q}", decode.with_(len_q=len_q), 1.0)
            cases += _densities(f"decode{len_q}-fp32", decode.with_(len_q=len_q, dtype=torch.float32), 1.0)
        cases += _densities("decode1", decode.with_(len_q=1), 0.25)
        cases += _densities("decode1-fp16", decode.with_(len_q=1, dtype=torch.float16), 1.0)
        for len_q in (1, 4):
            cases += _densities(f"decode{len_q}-gqa", decode.with_(len_q=len_q, heads_kv=8, lists="kv"), 1.0)
    return {case.name: case for case in cases}
