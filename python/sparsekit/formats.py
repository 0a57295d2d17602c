"""Which key blocks each query block attends to: `BlockPattern`, and every way to build one.

A pattern holds int32 lists of key blocks per (batch, head, query block), in the very tensors of FlexAttention's
BlockMask, so that one is the other without a copy. A listed block is *full* (every key of it is seen by every row) or
*partial* (causality, window and, where it has them, packed bits decide). docs/semantics.md has every edge case.

    B|1, H|1   lists may be shared by the batch; H is the number of query heads, of key heads, or 1
    Mq, Nk     query blocks ceil(Sq / block_q), key blocks ceil(Sk / block_k)
    K          capacity of a list: at most K blocks of a row. -1 is an empty slot; entries past the count are not read

Everything here stays on the device of its input. Only what is marked "waits for the device" reads a result back.
"""

from __future__ import annotations

import dataclasses
import weakref

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from . import _lists
from ._lists import pair

__all__ = ["BlockPattern"]

_TENSORS = (
    "kv_num_blocks",
    "kv_indices",
    "full_kv_num_blocks",
    "full_kv_indices",
    "partial_bits_index",  # before partial_bits: torch.export's guards take "partial_bits" for a prefix of it
    "partial_bits",
    "transpose_offsets",
    "transpose_slots",
)


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class BlockPattern:
    """Lists of key blocks per query block, with what the blocks mean. Immutable; a pytree node (tensors are leaves).

    Build one with `from_bool`, `from_indices`, `from_csr`, `from_documents` or `from_flex`. The constructor itself
    takes finished lists, as they are, and vouches for nothing.

    Attributes:
        kv_num_blocks: int32 `[B|1, H|1, Mq]`, the number of entries of each partial list.
        kv_indices: int32 `[B|1, H|1, Mq, K]`, the key blocks of the partial lists, in any order.
        full_kv_num_blocks, full_kv_indices: the same for full blocks: bits, causality, window and positions are not
            applied to them. Or None.
        partial_bits: int32 `[n, block_q, ceil(block_k / 32)]` or None: bit `j % 32` of word `j // 32` of row `i` is set
            where row i of the query block sees key j of the key block.
        partial_bits_index: int32 `[B|1, H|1, Mq, K]` or None: which mask in `partial_bits` a slot of `kv_indices` has;
            -1 is none (all pairs seen).
        transpose_offsets, transpose_slots: the lists seen from the keys, as `transpose()` returns them, or None. Who
            sets them vouches that they belong to the lists, also after the lists were changed in place.
        block_size: (query rows, keys) of a block.
        seq_lengths: (Sq, Sk). For a packed batch: the rows of `query` and of `key`.
        causal, window: query i stands at i + Sk - Sq, or at its position, and sees keys at most there (causal), from
            there - window[0] to there + window[1] (-1: unlimited).
        query_offset: where row 0 stands, if not at Sk - Sq (`slice_rows` sets it).
        assumes: what `causal` and `window` meant when blocks were sorted into full, partial and left out.
            "bottom_right": rows stand at i + Sk - Sq. "positions": they stand at given positions. "packed": bottom
            right in each sequence of a packed batch. "any": nothing was sorted by position. A call that places rows
            otherwise is refused.
    """

    kv_num_blocks: Tensor
    kv_indices: Tensor
    full_kv_num_blocks: Tensor | None = None
    full_kv_indices: Tensor | None = None
    partial_bits: Tensor | None = None
    partial_bits_index: Tensor | None = None
    transpose_offsets: Tensor | None = None
    transpose_slots: Tensor | None = None
    block_size: tuple[int, int] = dataclasses.field(default=(128, 128), kw_only=True)
    seq_lengths: tuple[int, int] = dataclasses.field(kw_only=True)
    causal: bool = dataclasses.field(default=False, kw_only=True)
    window: tuple[int, int] = dataclasses.field(default=(-1, -1), kw_only=True)
    query_offset: int | None = dataclasses.field(default=None, kw_only=True)
    assumes: str = dataclasses.field(default="any", kw_only=True)

    def __post_init__(self):
        object.__setattr__(self, "block_size", pair(self.block_size, "block_size"))
        object.__setattr__(self, "seq_lengths", pair(self.seq_lengths, "seq_lengths"))
        object.__setattr__(self, "window", pair(self.window, "window"))
        _check_lists(self)

    # ---- constructors

    @classmethod
    def from_bool(
        cls,
        block_map: Tensor,
        block_size: int | tuple[int, int],
        *,
        capacity: int | None = None,
        seq_lengths: tuple[int, int] | None = None,
        causal: bool = False,
        window: tuple[int, int] = (-1, -1),
        query_positions: Tensor | None = None,
        key_positions: Tensor | None = None,
        cu_seqlens_q: Tensor | None = None,
        cu_seqlens_k: Tensor | None = None,
    ) -> BlockPattern:
        """The blocks where `block_map` is true (not zero).

        Args:
            block_map: `[B|1, H|1, Mq, Nk]`; leading dimensions may be missing. bool, or any dtype with 0 for false.
            capacity: K; default Nk. A list of more entries keeps its first K.
            seq_lengths: (Sq, Sk); default (Mq * block_q, Nk * block_k).
            causal, window, ...: see `from_indices`.
        """
        if block_map.dim() < 2 or block_map.dim() > 4:
            raise ValueError(f"block_map: found shape {tuple(block_map.shape)}, supported is [B|1, H|1, Mq, Nk]")
        block_map = block_map[(None,) * (4 - block_map.dim())]
        block_map = block_map if block_map.dtype == torch.bool else block_map != 0
        block_size = pair(block_size, "block_size")
        if seq_lengths is None:
            seq_lengths = (block_map.shape[-2] * block_size[0], block_map.shape[-1] * block_size[1])
        _check_grid(block_map.shape[-2:], block_size, seq_lengths, "block_map", cu_seqlens_q is not None)
        capacity = block_map.shape[-1] if capacity is None else capacity
        where = (query_positions, key_positions, cu_seqlens_q, cu_seqlens_k)
        order = _lists.Order(block_size, seq_lengths, causal, window, *where)
        to_lists = torch.ops.sparsekit.block_lists_from_bool
        if order.assumes == "any":
            return _pattern(cls, order, to_lists(block_map, capacity))
        columns = torch.arange(block_map.shape[-1], dtype=torch.int32, device=block_map.device)
        inside, outside = order.inside_outside(columns.expand(1, 1, *block_map.shape[-2:]))
        partial = to_lists(block_map & ~(inside | outside), min(capacity, order.most_cut))
        return _pattern(cls, order, partial, to_lists(block_map & inside, capacity))

    @classmethod
    def from_indices(
        cls,
        indices: Tensor,
        counts: Tensor | None,
        block_size: int | tuple[int, int],
        *,
        seq_lengths: tuple[int, int],
        causal: bool = False,
        window: tuple[int, int] = (-1, -1),
        query_positions: Tensor | None = None,
        key_positions: Tensor | None = None,
        cu_seqlens_q: Tensor | None = None,
        cu_seqlens_k: Tensor | None = None,
    ) -> BlockPattern:
        """The listed blocks: for instance the result of a top-k over block scores.

        With `causal` or `window`, blocks that no row may see are dropped and blocks that every row sees whole go to the
        full lists; else the lists are used as they are.

        Args:
            indices: integers `[B|1, H|1, Mq, K]`; leading dimensions may be missing. -1 is an empty slot.
            counts: integers `[B|1, H|1, Mq]`; None: all K slots are meant.
            seq_lengths: (Sq, Sk), needed: the lists do not say how many key blocks there are.
            causal, window: see the class.
            query_positions, key_positions: int32 `[B|1, Sq]`, `[B|1, Sk]`: where rows and keys stand, if the attention
                calls will pass these.
            cu_seqlens_q, cu_seqlens_k: int32 `[sequences + 1]`, for a packed batch: rows are the query blocks of all
                sequences one after the other (each sequence rounded up), indices count key blocks inside the sequence.
        """
        leading = (None,) * (4 - indices.dim())
        indices = indices[leading].to(torch.int32).contiguous()
        if counts is None:
            counts = torch.full(indices.shape[:-1], indices.shape[-1], dtype=torch.int32, device=indices.device)
        else:
            counts = counts[(None,) * (3 - counts.dim())].to(torch.int32).expand(indices.shape[:-1]).contiguous()
        where = (query_positions, key_positions, cu_seqlens_q, cu_seqlens_k)
        order = _lists.Order(pair(block_size, "block_size"), seq_lengths, causal, window, *where)
        return _from_lists(cls, counts, indices, order)

    @classmethod
    def from_csr(
        cls,
        row_offsets: Tensor,
        col_indices: Tensor,
        block_size: int | tuple[int, int],
        *,
        capacity: int | None = None,
        seq_lengths: tuple[int, int],
        causal: bool = False,
        window: tuple[int, int] = (-1, -1),
        query_positions: Tensor | None = None,
        key_positions: Tensor | None = None,
        cu_seqlens_q: Tensor | None = None,
        cu_seqlens_k: Tensor | None = None,
    ) -> BlockPattern:
        """The blocks of a CSR matrix over blocks, such as `crow_indices()`, `col_indices()` of a `torch.sparse_bsr`.

        Without `capacity` (the largest number of blocks of a row) it waits for the device.

        Args:
            row_offsets: integers `[B|1, H|1, Mq + 1]`; leading dimensions may be missing.
            col_indices: integers `[B|1, H|1, nnz]`, key blocks.
            seq_lengths, causal, ...: see `from_indices`.
        """
        row_offsets = row_offsets[(None,) * (3 - row_offsets.dim())].long()
        col_indices = col_indices[(None,) * (3 - col_indices.dim())].to(torch.int32)
        counts = row_offsets.diff(dim=-1)
        if capacity is None:
            capacity = int(counts.max()) if counts.numel() else 0
        place = torch.arange(capacity, device=counts.device)
        entry = row_offsets[..., :-1, None] + place  # [B, H, Mq, K], where the list entry lies in col_indices
        if col_indices.shape[-1] == 0:
            indices = torch.full(entry.shape, -1, dtype=torch.int32, device=counts.device)
        else:
            flat = entry.clamp(0, col_indices.shape[-1] - 1).flatten(-2)
            col_indices = col_indices.expand(*flat.shape[:2], -1)
            indices = col_indices.gather(-1, flat).view(entry.shape)
            indices = indices.masked_fill(place >= counts[..., None], -1)
        counts = counts.clamp(max=capacity).to(torch.int32)
        where = (query_positions, key_positions, cu_seqlens_q, cu_seqlens_k)
        order = _lists.Order(pair(block_size, "block_size"), seq_lengths, causal, window, *where)
        return _from_lists(cls, counts, indices, order)

    @classmethod
    def from_documents(
        cls,
        cu_seqlens: Tensor,
        block_size: int | tuple[int, int],
        *,
        seq_lengths: tuple[int, int] | None = None,
        causal: bool = False,
        window: tuple[int, int] = (-1, -1),
    ) -> BlockPattern:
        """Self-attention inside documents that lie one after the other in one sequence. Waits for the device.

        Args:
            cu_seqlens: integers `[documents + 1]`: document d is the tokens `cu_seqlens[d] .. cu_seqlens[d + 1]`.
            seq_lengths: (S, S); default the end of the last document. Tokens past it see nothing.
            causal, window: see the class.
        """
        block_size = pair(block_size, "block_size")
        if cu_seqlens.dim() != 1 or cu_seqlens.numel() == 0:
            raise ValueError(f"cu_seqlens: found shape {tuple(cu_seqlens.shape)}, supported is [documents + 1]")
        length = int(cu_seqlens[-1]) if seq_lengths is None else pair(seq_lengths, "seq_lengths")[0]
        seq_lengths = (length, length) if seq_lengths is None else pair(seq_lengths, "seq_lengths")
        if seq_lengths[0] != seq_lengths[1]:
            raise ValueError(f"seq_lengths: found {seq_lengths}, supported are equal lengths (self-attention)")
        order = _lists.Order(block_size, seq_lengths, causal, window)
        # The document of every token; -1 and `documents` are tokens before the first and past the last.
        documents = cu_seqlens.numel() - 1
        token = torch.arange(length, device=cu_seqlens.device)
        document = torch.searchsorted(cu_seqlens.long(), token, right=True) - 1

        # Documents ascend along the sequence: a block holds a range of them, two blocks share one where ranges meet.
        (q_low, q_high), (k_low, k_high) = (_lists.block_range(document[None], size) for size in block_size)
        q_low, q_high = q_low[0, :, None], q_high[0, :, None]
        meets = (q_low <= k_high) & (k_low <= q_high) & (q_high >= 0) & (q_low < documents)
        whole = meets & (q_low == q_high) & (k_low == k_high)
        counts, indices = torch.ops.sparsekit.block_lists_from_bool(meets[None, None], meets.shape[1])
        indices = indices[..., : int(counts.max()) if counts.numel() else 0].contiguous()
        masked = ~whole[None, None].gather(-1, indices.clamp(min=0).long())

        def same_document(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            return (document[q] == document[k]) & (document[q] >= 0) & (document[q] < documents)

        return _from_lists(cls, counts, indices, order, masked, same_document)

    @classmethod
    def from_flex(
        cls,
        block_mask,
        *,
        seq_lengths: tuple[int, int] | None = None,
        causal: bool = False,
        window: tuple[int, int] = (-1, -1),
    ) -> BlockPattern:
        """The pattern of a `torch.nn.attention.flex_attention.BlockMask`. Waits for the device.

        The lists are used in place. `mask_mod` is evaluated once, on the tokens of the partial blocks only, and stored
        as bits; tensors that it captures are read now. It sees positions inside `seq_lengths` only.

        Args:
            block_mask: a BlockMask `[B, H, Sq, Sk]`.
            seq_lengths: (Sq, Sk), if not those of the mask.
            causal, window: applied on top of the mask.
        """
        from torch.nn.attention.flex_attention import noop_mask

        if block_mask.kv_indices.dim() != 4:
            raise ValueError(f"block_mask: found kv_indices {tuple(block_mask.kv_indices.shape)}, supported are 4 dims")
        seq_lengths = tuple(block_mask.seq_lengths if seq_lengths is None else seq_lengths)
        block_size = pair(block_mask.BLOCK_SIZE, "BLOCK_SIZE")
        counts, indices = block_mask.kv_num_blocks, block_mask.kv_indices
        full_counts, full_indices = block_mask.full_kv_num_blocks, block_mask.full_kv_indices
        _check_grid(indices.shape[-2:-1], block_size, seq_lengths, "block_mask", False)
        token_mask = None if block_mask.mask_mod is noop_mask else _lists.over_tokens(block_mask.mask_mod)
        masked = torch.full_like(indices, token_mask is not None, dtype=torch.bool)
        order = _lists.Order(block_size, seq_lengths, causal, window)
        if full_counts is None or order.assumes == "any":
            pattern = _from_lists(cls, counts, indices, order, masked, token_mask)
            if full_counts is None:
                return pattern
            return dataclasses.replace(
                pattern, full_kv_num_blocks=full_counts.contiguous(), full_kv_indices=full_indices.contiguous()
            )
        # One list of both kinds, to be sorted anew.
        masked = torch.cat([masked, torch.zeros_like(full_indices, dtype=torch.bool)], -1)
        listed = torch.cat([_lists.listed_slots(counts, indices), _lists.listed_slots(full_counts, full_indices)], -1)
        indices = torch.cat([indices, full_indices], -1).where(listed, -1)
        counts = torch.full_like(counts, indices.shape[-1])
        return _from_lists(cls, counts, indices, order, masked, token_mask)

    # ---- methods

    @property
    def device(self) -> torch.device:
        return self.kv_indices.device

    @property
    def has_mask(self) -> bool:
        """Whether causality or a window cuts partial blocks."""
        return self.causal or self.window != (-1, -1)

    @property
    def num_blocks(self) -> tuple[int, int]:
        """(query blocks, key blocks)."""
        return self.kv_indices.shape[-2], -(-self.seq_lengths[1] // self.block_size[1])

    def to(self, device: torch.device | str) -> BlockPattern:
        """The same pattern on another device."""
        return pytree.tree_map(lambda tensor: tensor.to(device), self)

    def to_dense(self) -> Tensor:
        """int32 `[B|1, H|1, Mq, Nk]`: 1 where a block is listed, as full or as partial (as BlockMask.to_dense)."""
        key_blocks = self.num_blocks[1]
        dense = _lists.to_dense(self.kv_num_blocks, self.kv_indices, key_blocks)
        if self.full_kv_num_blocks is not None:
            dense |= _lists.to_dense(self.full_kv_num_blocks, self.full_kv_indices, key_blocks)
        return dense.int()

    def to_token_mask(self, query_positions: Tensor | None = None, key_positions: Tensor | None = None) -> Tensor:
        """bool `[B|1, H|1, Sq, Sk]`: which query sees which key, all told. Dense: for looking and for tests."""
        from .reference import token_mask

        return token_mask(self, query_positions, key_positions)

    def density(self) -> float:
        """Listed blocks / all blocks, over batch, heads and rows. Waits for the device."""
        dense = self.to_dense()
        return float(dense.sum()) / dense.numel() if dense.numel() else 0.0

    def transpose(self) -> tuple[Tensor, Tensor]:
        """The lists seen from the keys, which backward walks: CSR over key blocks of forward slot numbers.

        Returns:
            offsets int32 `[B|1, H|1, Nk + 1]` and slots int32 `[B|1, H|1, Mq * slots_per_row]`. Key block n is listed
            in `slots[offsets[n] : offsets[n + 1]]`, ascending, each `m * slots_per_row + slot` of query block m, where
            slots of the full list follow those of the partial list.

        The result is kept with the pattern until a list is changed in place; not while compiling or capturing a graph,
        which may be replayed with other lists.
        """
        if self.transpose_offsets is not None:
            return self.transpose_offsets, self.transpose_slots
        if self.assumes == "packed":
            raise ValueError("a packed pattern has no transpose without its batch; see selection.transpose_block_lists")
        keep = not torch.compiler.is_compiling() and not capturing(self.kv_indices)
        lists = (self.kv_num_blocks, self.kv_indices, self.full_kv_num_blocks, self.full_kv_indices)
        versions = _versions(*lists) if keep else None
        if keep and self.__dict__.get("_transposed", (None,))[0] == versions:
            return self._transposed[1]
        transposed = torch.ops.sparsekit.transpose_block_lists(*lists, self.block_size, self.seq_lengths[1])
        if keep:
            object.__setattr__(self, "_transposed", (versions, transposed))
        return transposed

    def slice_rows(self, start: int, stop: int) -> BlockPattern:
        """The pattern of query blocks `start .. stop` over all keys, as context parallelism cuts it.

        Rows keep standing where they stood, also when causality is bottom right.
        """
        rows = self.kv_indices.shape[-2]
        if not 0 <= start <= stop <= rows:
            raise ValueError(f"slice_rows: found {start} .. {stop}, supported are query blocks 0 .. {rows}")
        if self.assumes == "packed":
            raise ValueError("slice_rows: the rows of a packed pattern belong to its sequences")
        first, last = start * self.block_size[0], min(stop * self.block_size[0], self.seq_lengths[0])
        origin = self.query_offset
        if origin is None:
            origin = self.seq_lengths[1] - self.seq_lengths[0]
        cut = {
            name: getattr(self, name)[:, :, start:stop].contiguous()
            for name in ("kv_num_blocks", "kv_indices", "full_kv_num_blocks", "full_kv_indices", "partial_bits_index")
            if getattr(self, name) is not None
        }
        return dataclasses.replace(
            self,
            **cut,
            transpose_offsets=None,
            transpose_slots=None,
            seq_lengths=(max(last - first, 0), self.seq_lengths[1]),
            query_offset=origin + first,
        )

    def __repr__(self) -> str:
        partial, full = self.kv_indices, self.full_kv_indices
        parts = [f"partial={list(partial.shape)}"]
        parts += [f"full={list(full.shape)}"] if full is not None else []
        parts += [f"bits={list(self.partial_bits.shape)}"] if self.partial_bits is not None else []
        parts += [f"block_size={self.block_size}", f"seq_lengths={self.seq_lengths}"]
        parts += ["causal"] if self.causal else []
        parts += [f"window={self.window}"] if self.window != (-1, -1) else []
        return f"BlockPattern({', '.join(parts)}, device={str(self.device)!r})"


# ---- pytree: tensors are leaves, the rest is context; unflattening checks nothing, leaves may be anything

_CONTEXT = ("block_size", "seq_lengths", "causal", "window", "query_offset", "assumes")


def _flatten(pattern: BlockPattern):
    present = tuple(name for name in _TENSORS if getattr(pattern, name) is not None)
    return [getattr(pattern, name) for name in present], (present, *(getattr(pattern, name) for name in _CONTEXT))


def _flatten_with_keys(pattern: BlockPattern):
    leaves, context = _flatten(pattern)
    return [(pytree.GetAttrKey(name), leaf) for name, leaf in zip(context[0], leaves, strict=True)], context


def _unflatten(leaves, context) -> BlockPattern:
    pattern = object.__new__(BlockPattern)
    for name in _TENSORS:
        object.__setattr__(pattern, name, None)
    for name, value in zip((*context[0], *_CONTEXT), (*leaves, *context[1:]), strict=True):
        object.__setattr__(pattern, name, value)
    return pattern


def _context_from_json(context):
    return tuple(tuple(item) if isinstance(item, list) else item for item in context)


pytree.register_pytree_node(
    BlockPattern,
    _flatten,
    _unflatten,
    serialized_type_name="sparsekit.BlockPattern",
    flatten_with_keys_fn=_flatten_with_keys,
    to_dumpable_context=list,
    from_dumpable_context=_context_from_json,
)
torch.serialization.add_safe_globals([BlockPattern])  # torch.load(weights_only=True): tensors and numbers only


# ---- from lists


def _pattern(cls, order: _lists.Order, partial, full=(None, None), bits=(None, None)) -> BlockPattern:
    return cls(
        *(tensor if tensor is None else tensor.contiguous() for tensor in (*partial, *full)),
        *bits,
        block_size=order.block_size,
        seq_lengths=order.seq_lengths,
        causal=order.causal,
        window=order.window,
        assumes=order.assumes,
    )


def _from_lists(
    cls,
    counts: Tensor,
    indices: Tensor,
    order: _lists.Order,
    masked: Tensor | None = None,
    token_mask: _lists.TokenMask | None = None,
) -> BlockPattern:
    """A pattern of one list per row. Slots where `masked [..., K]` is true get bits from `token_mask`."""
    block_size, seq_lengths = order.block_size, order.seq_lengths
    _check_grid(indices.shape[-2:-1], block_size, seq_lengths, "indices", order.packed)
    full = (None, None)
    if order.assumes != "any":
        key_blocks = -(-seq_lengths[1] // block_size[1])
        partial, full = _lists.sort_by_position(counts, indices, masked, key_blocks, *order.inside_outside(indices))
        counts, indices, masked = partial
        if masked is None:
            indices = indices[..., : order.most_cut]
    bits = (None, None)
    if token_mask is not None:
        bits = _lists.bits_of_slots(counts, indices, masked, block_size, seq_lengths, token_mask)
    return _pattern(cls, order, (counts, indices), full, bits)


# ---- FlexAttention's BlockMask

_converted: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()  # BlockMask -> (key, lists, BlockPattern)
_FLEX_LISTS = ("kv_num_blocks", "kv_indices", "full_kv_num_blocks", "full_kv_indices")


def as_pattern(pattern) -> BlockPattern:
    """A BlockPattern as it is; a BlockMask converted, once: until its lists or its mask_mod change."""
    if isinstance(pattern, BlockPattern):
        return pattern
    if not hasattr(pattern, "mask_mod") or not hasattr(pattern, "kv_indices"):
        raise TypeError(
            f"pattern: found {type(pattern).__name__}, supported are sparsekit.BlockPattern and "
            "torch.nn.attention.flex_attention.BlockMask"
        )
    if torch.compiler.is_compiling():
        raise RuntimeError(
            "pattern: found a BlockMask inside torch.compile, whose mask_mod cannot be turned into bits there; call "
            "sparsekit.BlockPattern.from_flex(block_mask) before, and pass its result"
        )
    lists = tuple(getattr(pattern, name) for name in _FLEX_LISTS)
    key = (pattern.mask_mod, *(id(tensor) for tensor in lists), _versions(*lists))
    known = _converted.get(pattern)
    if known is not None and known[0] == key:
        return known[-1]
    if capturing(pattern.kv_indices):
        raise RuntimeError(
            "pattern: found a BlockMask that was not converted before this graph capture; call "
            "sparsekit.BlockPattern.from_flex(block_mask) before, and pass its result"
        )
    converted = BlockPattern.from_flex(pattern)
    _converted[pattern] = (key, lists, converted)  # lists are kept so that their ids are not used again
    return converted


def _versions(*tensors: Tensor | None) -> tuple[int | None, ...]:
    """Changes when one of the tensors is changed in place (inference tensors do not count their changes)."""
    return tuple(None if tensor is None or tensor.is_inference() else tensor._version for tensor in tensors)


def capturing(tensor: Tensor) -> bool:
    """Whether a CUDA graph is being captured. Asks the driver only where the tensor is on a GPU anyway."""
    return tensor.device.type == "cuda" and torch.cuda.is_current_stream_capturing()


# ---- checks


def _check_grid(blocks, block_size, seq_lengths, name: str, packed: bool) -> None:
    """That a map or list has as many rows (and columns) of blocks as the sequences."""
    if packed:
        return
    for found, size, length, what in zip(blocks, block_size, seq_lengths, ("query", "key"), strict=False):
        if found != -(-length // size):
            raise ValueError(
                f"{name}: found {found} {what} blocks of {size}, but seq_lengths {tuple(seq_lengths)} "
                f"make {-(-length // size)}"
            )


def _check_lists(pattern: BlockPattern) -> None:
    shape = pattern.kv_num_blocks.shape
    if len(shape) != 3:
        raise ValueError(f"kv_num_blocks: found shape {tuple(shape)}, supported is [B|1, H|1, Mq]")
    for counts, indices in (("kv_num_blocks", "kv_indices"), ("full_kv_num_blocks", "full_kv_indices")):
        values = getattr(pattern, counts), getattr(pattern, indices)
        if (values[0] is None) != (values[1] is None):
            raise ValueError(f"{counts}, {indices}: found only one, supported are both or none")
        if values[0] is None:
            continue
        for name, value, expected in ((counts, values[0], shape), (indices, values[1], shape)):
            if value.dtype != torch.int32:
                raise TypeError(f"{name}: found {value.dtype}, supported is int32")
            if value.shape[:3] != expected or value.dim() != 3 + (name == indices):
                raise ValueError(f"{name}: found shape {tuple(value.shape)}, kv_num_blocks has {tuple(shape)}")
    bits, index = pattern.partial_bits, pattern.partial_bits_index
    if (bits is None) != (index is None):
        raise ValueError("partial_bits, partial_bits_index: found only one, supported are both or none")
    if bits is not None:
        wanted = (pattern.block_size[0], -(-pattern.block_size[1] // 32))
        if bits.dtype != torch.int32 or bits.dim() != 3 or tuple(bits.shape[1:]) != wanted:
            raise ValueError(f"partial_bits: found {bits.dtype} {tuple(bits.shape)}, supported is int32 [n, {wanted}]")
        if index.dtype != torch.int32 or index.shape != pattern.kv_indices.shape:
            raise ValueError(
                f"partial_bits_index: found {index.dtype} {tuple(index.shape)}, supported is int32 "
                f"{tuple(pattern.kv_indices.shape)}, as kv_indices"
            )
    if (pattern.transpose_offsets is None) != (pattern.transpose_slots is None):
        raise ValueError("transpose_offsets, transpose_slots: found only one, supported are both or none")
