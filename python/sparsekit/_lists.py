"""What formats.py builds patterns with: lists sorted by causality and window, and in-block masks as packed bits.

Shapes as in formats.py. All of it stays on the device; only `bits_of_slots` reads a result back (how many masks there
are).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor

_CHUNK = (
    1 << 22
)  # (query, key) pairs of a mask evaluated at once: some 100 MiB of temporaries, whatever the mask's size

# Which pairs see each other, of index tensors that broadcast: b, h [n, 1, 1], q [n, rows, 1], k [n, 1, keys].
TokenMask = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def pair(value, name: str) -> tuple[int, int]:
    """One number for both, or two."""
    numbers = (value, value) if isinstance(value, int) else tuple(value)
    if len(numbers) != 2:
        raise ValueError(f"{name}: found {value!r}, supported are two integers")
    return numbers


# ---- lists


def listed_slots(counts: Tensor, indices: Tensor) -> Tensor:
    """bool `[..., K]`: the slots that the counts include."""
    return torch.arange(indices.shape[-1], device=indices.device, dtype=torch.int32) < counts[..., None]


def to_dense(counts: Tensor, indices: Tensor, key_blocks: int) -> Tensor:
    """bool `[B|1, H|1, Mq, key_blocks]` of a list; what is out of range is left out."""
    usable = listed_slots(counts, indices) & (indices >= 0) & (indices < key_blocks)
    dense = torch.zeros(*indices.shape[:-1], key_blocks + 1, dtype=torch.bool, device=indices.device)
    return dense.scatter_(-1, indices.where(usable, key_blocks).long(), True)[..., :key_blocks]


def compact(keep: Tensor, indices: Tensor, flags: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Counts, and the slots to keep moved to the front in their order, -1 (flags: False) behind them."""
    capacity = indices.shape[-1]
    place = keep.cumsum(-1, dtype=torch.int32)
    counts = place[..., -1] if capacity else keep.sum(-1, dtype=torch.int32)
    place = torch.where(keep, place - 1, capacity).long()  # all that goes falls into one slot too many

    def moved(tensor: Tensor, empty: int) -> Tensor:
        room = torch.full((*keep.shape[:-1], capacity + 1), empty, dtype=tensor.dtype, device=tensor.device)
        return room.scatter_(-1, place, tensor.expand(keep.shape))[..., :capacity].contiguous()

    return counts.contiguous(), moved(indices, -1), None if flags is None else moved(flags, False)


# ---- causality and window


def sort_by_position(
    counts: Tensor,
    indices: Tensor,
    masked: Tensor | None,
    key_blocks: int,
    inside: Tensor,
    outside: Tensor,
) -> tuple[tuple[Tensor, Tensor, Tensor | None], tuple[Tensor, Tensor]]:
    """One list as a partial list (with its flags `masked`) and a full list; blocks `outside` are dropped.

    `inside`, `outside` say of each slot whether causality and window let all its pairs through, or none. A block that
    has a mask of its own stays partial. What an op refuses stays for it to name: a bad index, a bad count.
    """
    listed = listed_slots(counts, indices)
    bad = (indices < -1) | (indices >= key_blocks)
    full = listed & inside & (indices >= 0) & ~bad
    if masked is not None:
        full = full & ~masked
    partial = listed & (bad | ~outside) & (indices != -1) & ~full
    full_counts, full_indices, _ = compact(full, indices)
    kept, partial_indices, masked = compact(partial, indices, masked)
    kept = torch.where((counts < 0) | (counts > indices.shape[-1]), counts, kept)
    return (kept, partial_indices, masked), (full_counts, full_indices)


class Order:
    """How causality and window sort blocks into full, partial and dropped, and what else every pattern needs.

    `assumes` is "any" where there is nothing to sort by: also in a packed batch with positions, where the keys of a block
    number differ from row to row, so that every block stays partial.
    """

    def __init__(
        self,
        block_size: tuple[int, int],
        seq_lengths: tuple[int, int],
        causal: bool,
        window: tuple[int, int],
        query_positions: Tensor | None = None,
        key_positions: Tensor | None = None,
        cu_seqlens_q: Tensor | None = None,
        cu_seqlens_k: Tensor | None = None,
    ):
        if seq_lengths is None:
            raise ValueError("seq_lengths: found None, supported is (Sq, Sk): lists do not say how many keys there are")
        if (cu_seqlens_q is None) != (cu_seqlens_k is None):
            raise ValueError("cu_seqlens_q, cu_seqlens_k: found only one, supported are both or none")
        self.block_size, self.seq_lengths = block_size, pair(seq_lengths, "seq_lengths")
        self.causal, self.window = causal, pair(window, "window")
        self.positions, self.cu_seqlens = (query_positions, key_positions), (cu_seqlens_q, cu_seqlens_k)
        self.packed = cu_seqlens_q is not None
        positioned = query_positions is not None or key_positions is not None
        masks = causal or self.window != (-1, -1)
        if not masks or (self.packed and positioned):
            self.assumes = "any"
        else:
            self.assumes = "packed" if self.packed else "positions" if positioned else "bottom_right"

    @property
    def most_cut(self) -> int:
        """At most so many blocks of a row are cut, and so partial (if they have no bits)."""
        if self.assumes == "positions":
            return 2**31 - 1
        return cut_blocks(self.block_size, self.causal, self.window)

    def inside_outside(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Of blocks `[..., Mq, K]`: are all their pairs seen, is none."""
        if self.packed:
            ranges = packed_ranges(indices, self.block_size, *self.cu_seqlens)
        else:
            ranges = position_ranges(indices, self.block_size, self.seq_lengths, *self.positions)
        return mask_of_ranges(*ranges, self.causal, self.window)


def mask_of_ranges(
    q_low: Tensor, q_high: Tensor, k_low: Tensor, k_high: Tensor, causal: bool, window: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """(inside, outside) of rows that stand at q_low .. q_high and keys that stand at k_low .. k_high."""
    left, right = window
    right = 0 if causal else right
    inside = torch.ones_like(k_low - q_low, dtype=torch.bool)
    outside = torch.zeros_like(inside)
    if right >= 0:
        inside, outside = inside & (k_high - q_low <= right), outside | (k_low - q_high > right)
    if left >= 0:
        inside, outside = inside & (q_high - k_low <= left), outside | (q_low - k_high > left)
    return inside, outside


def cut_blocks(block_size: tuple[int, int], causal: bool, window: tuple[int, int]) -> int:
    """At most so many key blocks of a row are cut by causality and window, where positions are consecutive."""
    limits = int(causal or window[1] >= 0) + int(window[0] >= 0)
    # A limit moves by block_q - 1 keys over the rows of a block: it cuts blocks whose first key is one of
    # block_q + block_k - 2 consecutive ones.
    return limits * ((block_size[0] + block_size[1] - 2) // block_size[1] + 1)


def block_range(values: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Smallest and largest value `[B, blocks]` of each block of `values [B, length]`; the last may be ragged."""
    length = values.shape[-1]
    blocks = -(-length // block)
    index = torch.arange(blocks * block, device=values.device).clamp(max=length - 1)
    cut = values[:, index].view(values.shape[0], blocks, block)
    return cut.amin(-1), cut.amax(-1)


def position_ranges(
    indices: Tensor,
    block_size: tuple[int, int],
    seq_lengths: tuple[int, int],
    query_positions: Tensor | None,
    key_positions: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Smallest and largest position of the rows `[B|1, 1, Mq, 1]`, and of the keys of each listed block `[..., K]`."""
    (block_q, block_k), (length_q, length_k) = block_size, seq_lengths
    if query_positions is None:
        row = torch.arange(0, length_q, block_q, dtype=torch.int32, device=indices.device)[:, None]
        q_low, q_high = row + (length_k - length_q), (row + block_q).clamp(max=length_q) + (length_k - length_q - 1)
    else:
        q_low, q_high = (bound[:, None, :, None] for bound in block_range(query_positions, block_q))
    if key_positions is None or length_k == 0:
        k_low = indices * block_k
        return q_low, q_high, k_low, (k_low + block_k).clamp(max=length_k) - 1
    k_low, k_high = block_range(key_positions, block_k)
    block = indices.clamp(0, k_low.shape[1] - 1).long()
    batch = torch.arange(k_low.shape[0], device=indices.device)[:, None, None, None]
    return q_low, q_high, k_low[batch, block], k_high[batch, block]


def packed_ranges(
    indices: Tensor, block_size: tuple[int, int], cu_seqlens_q: Tensor, cu_seqlens_k: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The same for a packed batch: list row m is a query block of one sequence, indices count inside that sequence."""
    lengths_q, lengths_k = cu_seqlens_q.diff().long(), cu_seqlens_k.diff().long()
    row_blocks = (lengths_q + block_size[0] - 1) // block_size[0]
    ends = row_blocks.cumsum(0)
    row = torch.arange(indices.shape[-2], device=indices.device)
    if lengths_q.numel() == 0:  # no sequence: nothing is listed
        return row[:, None], row[:, None], indices, indices
    sequence = torch.searchsorted(ends, row, right=True).clamp(max=lengths_q.numel() - 1)
    length_q, length_k = lengths_q[sequence], lengths_k[sequence]
    first = (row - (ends - row_blocks)[sequence]) * block_size[0]
    last = torch.minimum(first + block_size[0], length_q) - 1
    origin = length_k - length_q
    k_low = indices.long() * block_size[1]
    k_high = torch.minimum(k_low + block_size[1], length_k[:, None]) - 1
    return (first + origin)[:, None], (last + origin)[:, None], k_low, k_high


# ---- packed bits


def bits_of_slots(
    counts: Tensor,
    indices: Tensor,
    masked: Tensor,
    block_size: tuple[int, int],
    seq_lengths: tuple[int, int],
    token_mask: TokenMask,
) -> tuple[Tensor, Tensor]:
    """`partial_bits` and `partial_bits_index` of the listed slots where `masked`. Waits for the device."""
    key_blocks = -(-seq_lengths[1] // block_size[1])
    wanted = listed_slots(counts, indices) & masked & (indices >= 0) & (indices < key_blocks)
    b, h, m, slot = wanted.nonzero(as_tuple=True)
    n = indices[b, h, m, slot].long()
    bits_index = torch.full(indices.shape, -1, dtype=torch.int32, device=indices.device)
    bits_index[b, h, m, slot] = torch.arange(b.numel(), dtype=torch.int32, device=indices.device)
    words = -(-block_size[1] // 32)
    bits = torch.empty(b.numel(), block_size[0], words, dtype=torch.int32, device=indices.device)
    chunk = max(1, _CHUNK // (block_size[0] * block_size[1]))
    for start in range(0, b.numel(), chunk):
        part = slice(start, start + chunk)
        q = (m[part, None] * block_size[0] + torch.arange(block_size[0], device=indices.device))[:, :, None]
        k = (n[part, None] * block_size[1] + torch.arange(block_size[1], device=indices.device))[:, None, :]
        # A mask may look up tensors of the sequence's length: past the end it is asked about the last token.
        asked_q, asked_k = q.clamp(max=seq_lengths[0] - 1), k.clamp(max=seq_lengths[1] - 1)
        sees = token_mask(b[part, None, None], h[part, None, None], asked_q, asked_k)
        bits[part] = pack_bits(sees & (q < seq_lengths[0]) & (k < seq_lengths[1]))
    return bits, bits_index


def pack_bits(mask: Tensor) -> Tensor:
    """int32 `[..., ceil(keys / 32)]` of a bool `[..., keys]`: bit j % 32 of word j // 32 is key j."""
    words = -(-mask.shape[-1] // 32)
    mask = torch.nn.functional.pad(mask, (0, words * 32 - mask.shape[-1]))
    weight = 1 << torch.arange(32, device=mask.device)
    return (mask.unflatten(-1, (words, 32)) * weight).sum(-1).to(torch.int32)  # up to 2^32 - 1: the top bit is the sign


def unpack_bits(bits: Tensor, keys: int) -> Tensor:
    """bool `[..., keys]` of packed words: the inverse of `pack_bits`."""
    shift = torch.arange(32, device=bits.device, dtype=torch.int32)
    return ((bits[..., None] >> shift) & 1).bool().flatten(-2)[..., :keys]


def over_tokens(mask_mod: Callable) -> TokenMask:
    """FlexAttention's mask_mod, which is written for one pair of tokens, as a TokenMask."""
    per_key = torch.vmap(mask_mod, in_dims=(None, None, None, 0))
    per_row = torch.vmap(per_key, in_dims=(None, None, 0, None))
    per_block = torch.vmap(per_row, in_dims=(0, 0, 0, 0))
    try:  # lets a mask_mod index tensors with the scalars that vmap gives it
        from torch._dynamo._trace_wrapped_higher_order_op import TransformGetItemToIndex as indexing
    except ImportError:
        indexing = nullcontext

    def token_mask(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        with indexing():
            return per_block(b[:, 0, 0], h[:, 0, 0], q[:, :, 0], k[:, 0, :])

    return token_mask
