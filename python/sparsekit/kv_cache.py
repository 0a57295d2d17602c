"""Low-bit key/value caches: quantization, a cache that packs itself as it grows, and attention that reads the packed form.

    cache = sparsekit.KVCache(batch, kv_heads, head_dim, capacity=32768, bits=4, dtype=torch.bfloat16)
    cache.append(key, value)                              # prompt and decode steps alike
    out = sparsekit.decode_attention(query, cache)        # query: the newest 1 to 16 tokens

`docs/kv_cache.md` draws the format and says what each choice costs in accuracy. Sources: KIVI (arXiv 2402.02750): keys
per channel, values per token, a window in full precision; QuaRot (arXiv 2404.00456): the Hadamard rotation.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .formats import capturing

__all__ = ["KVCache", "decode_attention", "dequantize_kv", "quantize_kv"]

BLOCK = 32  # tokens of one block of codes
_FP8 = -8  # how ops write "fp8" as a number of bits
_POOLS = ("key_codes", "key_scales", "key_minima", "value_codes", "value_scales", "value_minima")
_TENSORS = (*_POOLS, "key_window", "value_window", "lengths")


# ---- tensors


def quantize_kv(
    x: Tensor,
    *,
    bits: int | str = 4,
    group_size: int = 64,
    axis: str = "token",
    symmetric: bool = False,
    layout: str = "key",
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Keys or values to codes with a scale per group.

    Asymmetric: x ~ scale * code + minimum, scale = (max - min) / (2^bits - 1). Symmetric: x ~ scale * (code - 2^(bits-1)),
    scale = max|x| / (2^(bits-1) - 1). "fp8": x ~ scale * e4m3, scale = max|x| / 448. Error of an element (integers):
    at most scale / 2 and what rounding scale and minimum to fp16 costs,
    `(2^bits - 1) (scale 2^-11 + 2^-25) + |minimum| 2^-11 + 2^-25`.

    Finite values beyond 65504 saturate. A group that holds NaN or an infinity is NaN as a whole when it comes back.

    Args:
        x: `[B, H, T, D]`, float32, float16, bfloat16 or float64; D a multiple of 16 (3 bits: 32), at most 512. Any T.
        bits: 8, 4, 3, 2 or "fp8".
        group_size: 32, 64 or 128.
        axis: "token": a group is `group_size` neighbouring channels of one token (the last one shorter where D is no
            multiple); "channel": `group_size` neighbouring tokens of one channel (the last one of what is left).
        symmetric: no minima. "fp8" always is.
        layout: how codes are packed: "key" (words run along channels) or "value" (along tokens). A `KVCache` stores keys in
            the one and values in the other.

    Returns:
        codes uint8 `[B, H, ceil(T / 32), 4 * D * bits]`; scales and minima float16, axis "token":
        `[B, H, ceil(T / 32), ceil(D / group_size), 32]`, "channel": `[B, H, ceil(T / group_size), D]`; minima None
        where there are none. `include/sparsekit/kv_cache.h` has every bit.
    """
    codes, scales, minima = torch.ops.sparsekit.quantize_kv(
        x, _bits(bits), group_size, _channel(axis, "axis"), symmetric, _values(layout)
    )
    return codes, scales, None if symmetric or bits == "fp8" else minima


def dequantize_kv(
    codes: Tensor,
    scales: Tensor,
    minima: Tensor | None,
    *,
    length: int,
    head_dim: int,
    dtype: torch.dtype = torch.float32,
    bits: int | str = 4,
    group_size: int = 64,
    axis: str = "token",
    symmetric: bool = False,
    layout: str = "key",
) -> Tensor:
    """What `quantize_kv` with the same arguments kept: `[B, H, length, head_dim]` in `dtype`."""
    if minima is None:
        minima = scales.new_empty(0)
    return torch.ops.sparsekit.dequantize_kv(
        codes,
        scales,
        minima,
        length,
        head_dim,
        dtype,
        _bits(bits),
        group_size,
        _channel(axis, "axis"),
        symmetric,
        _values(layout),
    )


# ---- attention


def decode_attention(
    query: Tensor,
    cache: KVCache | tuple[Tensor, Tensor],
    *,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    key_bias: Tensor | None = None,
    return_lse: bool = False,
    return_scores: bool = False,
    lengths: Tensor | None = None,
    block_table: Tensor | None = None,
    layout: str = "HND",
) -> Tensor | tuple[Tensor, ...]:
    """Attention of the newest tokens over a cache, which already holds their own keys and values.

    `score[i, j] = softcap(scale * q_i . k_j) + key_bias[i, j]`, and row i of the S query rows sees all but the last
    S - 1 - i tokens of its sequence (causal inside the chunk). Quantized keys and values are never written out. Work is
    split over the sequence by lengths alone: results are bitwise the same for any number of threads. No gradient.

    Args:
        query: `[B, Hq, S, D]`, S from 1 to 16, bfloat16, float16 or float32. Hq is a multiple of the cache's heads.
        cache: a `KVCache`; or plain `(key, value)` in bfloat16, float16 or float32, of any strides whose last is 1:
            layout "HND": `[B, H, capacity, D]`, or with a block_table pages `[pages, H, page_size, D]`;
            layout "NHD": `[B, capacity, H, D]`, or pages `[pages, page_size, H, D]`. These are vLLM's paged layouts:
            pass `kv_cache[0], kv_cache[1]`.
        scale: default 1 / sqrt(D).
        softcap: c of `c * tanh(score / c)`; None or 0: none.
        sinks: float32 `[Hq]`: one extra logit per head that takes weight and gives nothing.
        key_bias: float32 `[B|1, Hq|1, S|1, L]`, added to the scores of the first L tokens; -inf hides a token.
        return_lse: also the logarithm of the sum of exp(score), float32 `[B, Hq, S]`, without sinks.
        return_scores: also the scores, float32 `[B, Hq, S, cache.max_length]` (plain: the capacity), -inf where a row sees
            nothing. `exp(scores - lse[..., None])` are the attention weights that eviction policies sum.
        lengths: plain caches: int32 `[B]`, tokens of each sequence.
        block_table: plain caches in pages: int32 `[B, max_pages]`.

    Returns:
        out `[B, Hq, S, Dv]` in query's dtype; a row that sees no token is 0 and its lse -inf. With return_lse or
        return_scores a tuple (out, lse, scores) of what was asked for.

    Raises:
        RuntimeError: a wrong shape or dtype; on the CPU, a length or page number out of range, by its place.
    """
    softcap = softcap or 0.0
    if isinstance(cache, KVCache):
        if lengths is not None or block_table is not None:
            raise ValueError("lengths, block_table: a KVCache has its own; supported: None")
        query_used = cache._rotated(query, query.shape[-1])
        out, lse, scores = torch.ops.sparsekit.decode_attention(
            query_used, *cache._arguments(), scale, softcap, sinks, key_bias, cache.max_length if return_scores else 0
        )
        if return_scores and cache.max_length == 0:
            scores = query.new_empty((*query.shape[:3], 0), dtype=torch.float32)
        out = cache._unrotated(out)
    else:
        key, value = cache
        if lengths is None:
            raise ValueError("lengths: found None; supported for a plain cache: int32 [batch], tokens of each sequence")
        if layout not in ("HND", "NHD"):
            raise ValueError(f"layout: found {layout!r}, supported are 'HND' and 'NHD'")
        page_size = key.shape[1 if layout == "NHD" else 2]
        capacity = page_size * (1 if block_table is None else block_table.shape[1])
        out, lse, scores = torch.ops.sparsekit.decode_attention_plain(
            query,
            key,
            value,
            lengths,
            block_table,
            layout == "NHD",
            scale,
            softcap,
            sinks,
            key_bias,
            capacity if return_scores else 0,
        )
    extra = ([lse] if return_lse else []) + ([scores] if return_scores else [])
    return (out, *extra) if extra else out


# ---- the cache


class KVCache:
    """Keys and values of one attention layer, the newest in full precision and the rest in a few bits.

    A sequence's tokens are, in order: `sinks` first tokens in full precision, quantized tokens in pages of `page_size`, and
    the newest, at least `window` of them, in full precision. `append` quantizes what leaves the window by itself, in
    units of `group_size` tokens (32 where keys are per token), without waiting for the device. The host knows an upper bound
    of the length (`max_length`) and makes room, or raises, before anything runs; while a CUDA graph is captured the
    capacity is fixed.

    Args:
        batch_size, num_heads, head_dim: B, key heads H, D (a multiple of 16; of 32 for 3 bits).
        capacity: tokens per sequence to make room for now.
        bits: 8, 4, 3, 2 or "fp8", or a pair (keys, values). Keys are the sensitive side.
        group_size: 32, 64 or 128 elements that share a scale.
        key_axis: "channel" (KIVI: keys have outlier channels) or "token".
        symmetric: scales without minima; twice the error at 2 bits, half the overhead.
        window: newest tokens that stay in full precision, a multiple of 32; 0 is allowed.
        sinks: first tokens that stay in full precision.
        rotate: quantize the Hadamard transform of keys and values, which spreads outlier channels; `append` and
            `decode_attention` transform on the way.
        separable_values: divide each value channel by sqrt(max |value|) over the first append before quantization, and
            multiply the output (ZipCache, arXiv 2405.14256, section 3.2).
        value_dim: default head_dim.
        page_size: tokens of a page, a multiple of 32 (of group_size where key_axis is "channel"). Default: 128 with a
            block_table; without, 128 to 2,048 as the capacity grows: a head's tokens that stand together are read faster
            (int4 on a CPU: 1.1x).
        block_table: int32 `[B, 1 or H, max_pages]` of page numbers in a pool of `num_pages`; with H rows a page holds one
            head. The caller owns it and may change entries of pages that are not in use. Default: each sequence has its
            own pages, and the cache grows.
        dtype: of the full-precision part and of what is appended.
    """

    def __init__(
        self,
        batch_size: int,
        num_heads: int,
        head_dim: int,
        *,
        capacity: int = 0,
        bits: int | str | Sequence = 4,
        group_size: int = 64,
        key_axis: str = "channel",
        symmetric: bool = False,
        window: int = 128,
        sinks: int = 0,
        rotate: bool = False,
        separable_values: bool = False,
        value_dim: int | None = None,
        page_size: int | None = None,
        block_table: Tensor | None = None,
        num_pages: int | None = None,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str | None = None,
    ):
        key_bits, value_bits = (bits, bits) if isinstance(bits, int | str) else bits
        self.batch_size, self.num_heads, self.head_dim = batch_size, num_heads, head_dim
        self.value_dim = head_dim if value_dim is None else value_dim
        self.key_bits, self.value_bits = key_bits, value_bits
        self.group_size, self.key_axis, self.symmetric = group_size, key_axis, symmetric
        self._pages_grow = page_size is None and block_table is None
        if page_size is None:
            page_size = _page_size(capacity if block_table is None else 0)
        self.page_size, self.sinks, self.window = page_size, sinks, window
        self.rotate, self.separable_values = rotate, separable_values
        self.value_scale: Tensor | None = None  # [B, H, value_dim], of separable_values, from the first append
        self.block_table = block_table
        self.max_length = 0
        self.format = [
            _bits(key_bits),
            _bits(value_bits),
            group_size,
            int(_channel(key_axis, "key_axis")),
            int(symmetric),
            page_size,
            sinks,
            window,
        ]
        self.unit = group_size if key_axis == "channel" else BLOCK
        if page_size % self.unit or page_size <= 0:
            raise ValueError(f"page_size: found {page_size}, supported are multiples of {self.unit}")
        if (block_table is None) != (num_pages is None):
            raise ValueError("block_table, num_pages: one is missing; supported are both or none")
        like = torch.empty(0, dtype=dtype, device=device if block_table is None else block_table.device)
        pages = num_pages if block_table is not None else batch_size * _pages(capacity, page_size)
        for name, tensor in self._new_pools(like, pages).items():
            setattr(self, name, tensor)
        rows = sinks + window + self.unit
        self.key_window = like.new_zeros(batch_size, num_heads, rows, head_dim)
        self.value_window = like.new_zeros(batch_size, num_heads, rows, self.value_dim)
        self.lengths = like.new_zeros(batch_size, num_heads, 3, dtype=torch.int32)

    def __repr__(self) -> str:
        bits = self.key_bits if self.key_bits == self.value_bits else (self.key_bits, self.value_bits)
        return (
            f"KVCache({self.batch_size} x {self.num_heads} heads x {self.head_dim}, bits={bits}, "
            f"group_size={self.group_size}, key_axis={self.key_axis!r}, at most {self.max_length} of {self.capacity} "
            f"tokens, {self.nbytes / 2**20:.1f} MiB)"
        )

    # ---- what it holds

    @property
    def dtype(self) -> torch.dtype:
        return self.key_window.dtype

    @property
    def device(self) -> torch.device:
        return self.key_window.device

    @property
    def capacity(self) -> int:
        """Tokens per sequence that fit without growing."""
        if self.block_table is not None:
            return self.block_table.shape[2] * self.page_size
        return self.key_codes.shape[0] // max(self.batch_size, 1) * self.page_size

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors of the cache, used or not."""
        return sum(getattr(self, name).nbytes for name in _TENSORS)

    def seq_lengths(self) -> Tensor:
        """int32 `[B, H]`, on the device: tokens of every head (they differ after a `compact` per head)."""
        return self.lengths.sum(-1, dtype=torch.int32)

    def sync_length(self) -> int:
        """Makes `max_length` exact (waits for the device) and returns it."""
        self.max_length = int(self.seq_lengths().max()) if self.lengths.numel() else 0
        return self.max_length

    # ---- what changes it

    def append(self, key: Tensor, value: Tensor, counts: Tensor | None = None) -> None:
        """Appends the tokens of key `[B, H, T, D]` and value `[B, H, T, Dv]`.

        Args:
            counts: int32 `[B]`: of sequence b only the first counts[b] tokens; 0 or a negative number: none.

        Raises:
            RuntimeError: the cache is full and cannot grow (it has a block_table, or a graph is captured). Nothing was
                appended.
        """
        needed = self.max_length + key.shape[2]
        if needed > self.capacity:
            self._grow(needed)
        if self.separable_values and self.value_scale is None:
            largest = value.abs().amax(2).float()
            self.value_scale = torch.where(largest > 0, largest, 1.0).sqrt()
        if self.separable_values:
            value = (value / self.value_scale[:, :, None]).to(self.dtype)
        key, value = self._rotated(key.to(self.dtype), self.head_dim), self._rotated(value, self.value_dim)
        torch.ops.sparsekit.kv_cache_append(*self._arguments(), key, value.to(self.dtype), counts)
        self.max_length = needed

    def crop(self, length: int | Tensor) -> None:
        """Keeps the first `length` tokens of every sequence.

        Where that cuts a quantized unit, its kept tokens go back to the window, dequantized: their error, at most half a
        scale, stays, and rounding to `dtype` adds at most 2^-9 (bfloat16) of the value; when they leave the window
        again they are quantized a second time, which adds at most half of the new scale.

        Args:
            length: an int; negative: so many tokens are removed from every sequence; or int32 `[B]`, one per sequence.
        """
        if isinstance(length, Tensor):
            limits = length.to(device=self.device, dtype=torch.int32)
        elif length >= 0:
            limits = torch.full((self.batch_size,), length, dtype=torch.int32, device=self.device)
            self.max_length = min(self.max_length, length)
        else:
            limits = (self.seq_lengths().amax(1) + length).clamp(min=0)
            self.max_length = max(self.max_length + length, 0)
        torch.ops.sparsekit.kv_cache_crop(*self._arguments(), limits)

    def compact(self, keep: Tensor) -> None:
        """Keeps some tokens, in order, per sequence or per head.

        Tokens quantized per token keep their codes exactly. Of keys per channel, a new group whose tokens come from one old
        group keeps them too; a group of mixed origin is quantized again, which adds at most half of its new scale. What
        does not fill a unit goes back to the window, dequantized.

        Args:
            keep: bool `[B, H or 1, L]`, True: keep (tokens from L on are dropped); or integers `[B, H or 1, K]`, ascending,
                -1 at the end: nothing.
        """
        if keep.dtype == torch.bool:
            length = keep.shape[-1]
            places = torch.arange(length, dtype=torch.int32, device=keep.device).expand_as(keep)
            keep = torch.where(keep, places, length).sort(-1).values
            keep = torch.where(keep < length, keep, -1)
        keep = keep.to(device=self.device, dtype=torch.int32)
        torch.ops.sparsekit.kv_cache_compact(*self._arguments(), keep)
        self.max_length = min(self.max_length, keep.shape[-1])

    def reorder(self, index: Tensor) -> None:
        """Sequence b becomes a copy of sequence index[b]: beam search; also repeats or drops sequences.

        Args:
            index: integers `[B']`; the batch size becomes B'.
        """
        if self.block_table is not None:
            raise NotImplementedError(
                "reorder: found a block_table, whose pages the caller owns; supported is a cache without"
            )
        index = index.to(self.device)
        for name in _POOLS:
            pool = getattr(self, name)
            if pool.numel():
                per_sequence = pool.unflatten(0, (self.batch_size, -1))
                setattr(self, name, per_sequence.index_select(0, index).flatten(0, 1))
        for name in ("key_window", "value_window", "lengths", "value_scale"):
            if getattr(self, name) is not None:
                setattr(self, name, getattr(self, name).index_select(0, index))
        self.batch_size = index.shape[0]
        if self.key_codes.shape[0] == 0 or self.batch_size == 0:
            pages = 0 if self.batch_size == 0 else self.key_codes.shape[0]
            for name, tensor in self._new_pools(self.key_window, pages).items():
                setattr(self, name, tensor)

    def reset(self) -> None:
        """Forgets every token; keeps the memory."""
        self.lengths.zero_()
        self.max_length, self.value_scale = 0, None

    # ---- elsewhere

    def dequantize(self) -> tuple[Tensor, Tensor]:
        """Keys and values `[B, H, max_length, D]` in `dtype`, 0 past a head's length: for tests, not for decoding."""
        key, value = self._stored("key", self.head_dim), self._stored("value", self.value_dim)
        if self.rotate:
            key, value = key @ _hadamard(self.head_dim, key.device), value @ _hadamard(self.value_dim, key.device)
        if self.value_scale is not None:
            value = value * self.value_scale[:, :, None]
        return key.to(self.dtype), value.to(self.dtype)

    def state_dict(self) -> dict:
        """Everything, as tensors and numbers."""
        state = {name: getattr(self, name) for name in _TENSORS}
        state |= {"block_table": self.block_table, "value_scale": self.value_scale}
        return state | {"format": list(self.format), "max_length": self.max_length, "rotate": self.rotate}

    def load_state_dict(self, state: dict) -> None:
        """Takes the tensors of a cache of the same format (not copies of them).

        Raises:
            ValueError: the formats differ.
        """
        formats = [list(state["format"]), list(self.format)]
        if self._pages_grow and state["block_table"] is None:  # their page size is a matter of capacity
            formats[1][5] = formats[0][5]
        if formats[0] != formats[1] or state["rotate"] != self.rotate:
            raise ValueError(
                f"state: found format {state['format']}, rotate={state['rotate']}; this cache has {self.format}, {self.rotate}"
            )
        window = state["key_window"]
        if window.shape[-1] != self.head_dim or state["value_window"].shape[-1] != self.value_dim:
            raise ValueError(f"state: found head_dim {window.shape[-1]}, this cache has {self.head_dim}")
        for name in (*_TENSORS, "block_table", "value_scale", "max_length"):
            setattr(self, name, state[name])
        self.format = formats[0]
        self.page_size = self.format[5]
        self.batch_size, self.num_heads = window.shape[:2]

    # ---- details

    def _arguments(self) -> tuple:
        return (*(getattr(self, name) for name in _TENSORS), self.block_table, self.format)

    def _new_pools(self, like: Tensor, pages: int) -> dict[str, Tensor]:
        heads = self.num_heads if self.block_table is None or self.block_table.shape[1] == 1 else 1
        pools, blocks = {}, self.page_size // BLOCK
        for name, bits, dim in (("key", self.key_bits, self.head_dim), ("value", self.value_bits, self.value_dim)):
            width = 8 if bits == "fp8" else bits
            if name == "key" and self.key_axis == "channel":
                sizes = (self.page_size // self.group_size, dim)
            else:
                sizes = (blocks, -(-dim // self.group_size), BLOCK)
            minima = (0,) if self.symmetric or bits == "fp8" else (pages, heads, *sizes)
            pools[f"{name}_codes"] = like.new_zeros(pages, heads, blocks, 4 * dim * width, dtype=torch.uint8)
            pools[f"{name}_scales"] = like.new_zeros(pages, heads, *sizes, dtype=torch.float16)
            pools[f"{name}_minima"] = like.new_zeros(minima, dtype=torch.float16)
        return pools

    def _grow(self, needed: int) -> None:
        if self.block_table is not None:
            raise RuntimeError(
                f"the cache is full: {needed} tokens, and its block_table has pages for {self.capacity}; supported are "
                "longer rows of block_table, or a cache without one, which grows (nothing was appended)"
            )
        if capturing(self.key_window):
            raise RuntimeError(
                f"the cache is full: {needed} tokens, capacity {self.capacity}, and a CUDA graph is being captured; "
                "supported is a larger capacity= from the start (nothing was appended)"
            )
        room = max(needed, math.ceil(1.5 * self.capacity))
        old = {name: getattr(self, name) for name in _POOLS}
        if self._pages_grow:
            self.page_size = self.format[5] = _page_size(room)
        pages = _pages(room, self.page_size)
        for name, new in self._new_pools(self.key_window, self.batch_size * pages).items():
            setattr(self, name, new)
            if old[name].numel():
                kept = self._of_sequences(old.pop(name))  # [B, H, blocks or groups, ...]
                paged, size = new.unflatten(0, (self.batch_size, pages)), new.shape[2]
                for page, part in enumerate(kept.split(size, 2)):
                    paged[:, page, :, : part.shape[2]] = part

    def _rotated(self, x: Tensor, dim: int) -> Tensor:
        if not self.rotate:
            return x
        return (x.float() @ _hadamard(dim, x.device)).to(x.dtype)

    def _unrotated(self, out: Tensor) -> Tensor:
        """Undoes on the output what `append` did to the values."""
        out = self._rotated(out, self.value_dim)  # the matrix is its own inverse
        if self.value_scale is None:
            return out
        scale = self.value_scale.repeat_interleave(out.shape[1] // self.num_heads, 1)
        return (out * scale[:, :, None]).to(out.dtype)

    def _stored(self, name: str, dim: int) -> Tensor:
        """float32 `[B, H, max_length, dim]`: what the kernels see, before rotation and scale are undone."""
        channel = name == "key" and self.key_axis == "channel"
        codes, scales, minima = (
            self._of_sequences(getattr(self, f"{name}_{part}")) for part in ("codes", "scales", "minima")
        )
        quantized = torch.ops.sparsekit.dequantize_kv(
            codes,
            scales,
            minima,
            self.capacity,
            dim,
            torch.float32,
            self.format[0 if name == "key" else 1],
            self.group_size,
            channel,
            self.symmetric,
            name == "value",
        )
        place = torch.arange(self.max_length, device=self.device)
        sink, packed, recent = self.lengths[..., None].long().unbind(2)  # [B, H, 1]
        window, ring = getattr(self, f"{name}_window").float(), self.window + self.unit
        parts = [
            (place < sink, window, place.expand_as(place - sink)),
            ((place >= sink) & (place < sink + packed), quantized, place - sink),
            ((place >= sink + packed) & (place < sink + packed + recent), window, self.sinks + (place - sink) % ring),
        ]
        x = torch.zeros(self.batch_size, self.num_heads, self.max_length, dim, device=self.device)
        for chosen, source, index in parts:
            if source.shape[2] == 0:
                continue
            index = index.clamp(0, source.shape[2] - 1)[..., None].expand(*x.shape)
            x = torch.where(chosen[..., None], source.gather(2, index), x)
        return x

    def _of_sequences(self, pool: Tensor) -> Tensor:
        """[pages, heads, n, ...] -> [B, H, max_pages * n, ...]."""
        if pool.numel() == 0 and pool.dim() == 1:
            return pool
        if self.block_table is None:
            pages = pool.unflatten(0, (self.batch_size, -1)).transpose(1, 2)
        else:
            table = self.block_table.clamp(0, max(pool.shape[0] - 1, 0)).long()
            pages = pool[table[:, 0]].transpose(1, 2) if table.shape[1] == 1 else pool[table][:, :, :, 0]
        return pages.flatten(2, 3).contiguous()


def _bits(bits: int | str) -> int:
    if bits not in (8, 4, 3, 2, "fp8"):
        raise ValueError(f"bits: found {bits!r}, supported are 8, 4, 3, 2 and 'fp8'")
    return _FP8 if bits == "fp8" else bits


def _channel(axis: str, name: str) -> bool:
    if axis not in ("token", "channel"):
        raise ValueError(f"{name}: found {axis!r}, supported are 'token' and 'channel'")
    return axis == "channel"


def _values(layout: str) -> bool:
    if layout not in ("key", "value"):
        raise ValueError(f"layout: found {layout!r}, supported are 'key' and 'value'")
    return layout == "value"


def _page_size(capacity: int) -> int:
    """A power of two from 128 to 2,048; a quarter of the capacity at most, so that what rounding up leaves empty is little."""
    size = 128
    while size < 2048 and 8 * size <= capacity:
        size *= 2
    return size


def _pages(tokens: int, page_size: int) -> int:
    return -(-tokens // page_size)


@functools.lru_cache(maxsize=32)
def _hadamard(dim: int, device: torch.device) -> Tensor:
    """Orthonormal, symmetric `[dim, dim]`: Sylvester's matrix of the largest power of two that divides dim, repeated
    down the diagonal."""
    size = dim & -dim
    matrix = torch.ones(1, 1)
    while matrix.shape[0] < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return torch.block_diag(*[matrix / math.sqrt(size)] * (dim // size)).to(device)
