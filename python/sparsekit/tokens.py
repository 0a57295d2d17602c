"""Tokens: gather, scatter, pack, match, merge and unmerge, each for several tensors in one call. docs/tokens.md.

A *token* is a slice of a tensor along its token dimension: row n of `[B, N, D]`, the rows `[:, n]` of one sample of
`[B, H, N, D]` (dim=2), one number of `[B, N]`. One index moves the tokens of any number of tensors together: hidden
states, position ids, rotary tables, keys and values, masks. Nothing here waits for the device: what depends on the data
is a tensor (`counts`, `cu_seqlens`), never the shape of a result.

*Packed* tensors have the samples' tokens one after the other, without padding, and no batch dimension: `[T, D]` for
`[B, N, D]`, `[H, T, D]` for `[B, H, N, D]`. Sample s is the rows `cu_seqlens[s]` up to `cu_seqlens[s + 1]`. `dim` counts
the batch dimension also where the packed tensor lacks it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

__all__ = [
    "PackedTokens",
    "TokenMatch",
    "bipartite_match",
    "compact_kv",
    "gather_tokens",
    "merge_tokens",
    "pack_tokens",
    "scatter_tokens",
    "token_size_bias",
    "unmerge_tokens",
    "unpack_tokens",
]

Tensors = TypeVar("Tensors", Tensor, Sequence[Tensor])  # a tensor, or several: the result has the same form


# The ops take numbers: strings that cross torch's stable ABI are never freed (torch 2.13).
_REDUCES = ("copy", "add", "mean")


def _number(value: str, supported: tuple[str, ...], name: str) -> int:
    if value not in supported:
        raise ValueError(f"{name} is {value!r}; supported: {', '.join(map(repr, supported))}")
    return supported.index(value)


class TokenMatch(NamedTuple):
    """Which tokens merge into which. Positions are int32 and count tokens of the sample; all lists ascend."""

    source: Tensor
    """`[B, r]`: the tokens that disappear; -1 past a sample's own r."""
    destination: Tensor
    """`[B, r]`: the token that each of them merges into."""
    kept: Tensor
    """`[B, N - r]` (ragged: `[B, N]`, -1 past the count): the token that each row of the result stands for."""
    row: Tensor
    """`[B, N]`: each token's row of the result; -1: none. All that merging and unmerging read."""
    counts: Tensor | None = None
    """`[B]`: rows of each sample's result where they differ (ragged), else None."""


class PackedTokens(NamedTuple):
    tensors: Tensor | list[Tensor]
    """`[capacity, ...]`, zeros past `cu_seqlens[B]`."""
    cu_seqlens: Tensor
    """int32 `[B + 1]`."""
    index: Tensor
    """int32 `[B, N]`: the positions that each sample's tokens had, ascending; -1 past their number."""


def gather_tokens(
    tensors: Tensors,
    index: Tensor,
    *,
    dim: int | Sequence[int] = 1,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_out: Tensor | None = None,
    length: int | None = None,
) -> Tensors:
    """`out[b, k] = tensor[b, index[b, k]]`: the same tokens of several tensors, in the order of the index.

    Args:
        tensors: one tensor or several, `[B, N, ...]` of any dtypes, alike in B and N only. Used in place where the
            dimensions after the token's are contiguous, else copied once.
        index: int32 or int64 `[B, K]`, in any order, repeated or not; -1 gives zeros.
        dim: the token dimension, one for all or one per tensor; 2 for `[B, H, N, D]`. Not 0.
        cu_seqlens: int32 `[B + 1]`: the tensors are packed, the index counts inside each sample.
        cu_seqlens_out: int32 `[B + 1]`: the result is packed. Sample b takes the first
            `cu_seqlens_out[b + 1] - cu_seqlens_out[b]` entries of its index.
        length: with `cu_seqlens_out`, the rows of the packed result; those past `cu_seqlens_out[B]` are zeros.

    Returns:
        Contiguous tensors with K tokens (packed: `length`), differentiable. The gradient adds what a repeated token
        received, in the order of the index: the same bits in every run.

    Raises:
        RuntimeError: a shape or dtype does not fit; on the CPU also where an entry of index is below -1 or names no
            token (the first such entry is named). On CUDA such an entry counts as -1.
    """
    many, single = _as_list(tensors)
    outs = torch.ops.sparsekit.gather_tokens(many, index, _dims(dim, many), cu_seqlens, cu_seqlens_out, length)
    return outs[0] if single else outs


def scatter_tokens(
    src: Tensors,
    index: Tensor,
    length: int,
    *,
    reduce: str = "copy",
    weights: Tensor | None = None,
    base: Tensors | None = None,
    dim: int | Sequence[int] = 1,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_out: Tensor | None = None,
) -> Tensors:
    """Puts token k of sample b at `index[b, k]` of a result with `length` tokens per sample.

        copy   out[b, n] = src[b, k] of the highest k with index[b, k] = n
        add    out[b, n] = base[b, n] + sum of w src[b, k]
        mean   out[b, n] = sum of w src[b, k] / sum of w

    A token that receives nothing (for mean: whose weights sum to 0) is `base[b, n]`, without base zeros. Sums are taken
    in float32, in the order of k, without atomics: the same bits in every run and for any number of threads.

    Args:
        src: one tensor or several, `[B, K, ...]`.
        index: int32 or int64 `[B, K]`, or `[B, K, M]` where a token goes to M places; -1: nowhere.
        reduce: "copy" takes any dtype; "add" floats, int32, int64; "mean" floats.
        weights: float32 (float64 for float64) in index's shape, for "add" and "mean". A weight of 0 counts for nothing,
            whatever the token holds. Differentiable.
        base: as src, with `length` tokens. Differentiable.
        dim: see `gather_tokens`.
        cu_seqlens, cu_seqlens_out: src, or base and the result, are packed; `length` is then the rows of the packed
            result. A sample of n packed source tokens uses the first n rows of its index.

    Returns:
        Contiguous tensors in src's dtypes, differentiable.

    Raises:
        RuntimeError: see `gather_tokens`.
    """
    many, single = _as_list(src)
    below = [] if base is None else _as_list(base)[0]
    outs, _ = torch.ops.sparsekit.scatter_tokens(
        many,
        weights,
        below,
        index,
        _dims(dim, many),
        length,
        _number(reduce, _REDUCES, "reduce"),
        cu_seqlens,
        cu_seqlens_out,
    )
    return outs[0] if single else outs


# ---- padded and packed


def pack_tokens(
    tensors: Tensors, keep: Tensor, *, dim: int | Sequence[int] = 1, capacity: int | None = None
) -> PackedTokens:
    """The kept tokens of all samples one after the other, without padding.

    Args:
        tensors: one tensor or several, `[B, N, ...]`.
        keep: bool `[B, N]`, or int32 or int64 `[B]`: the first so many tokens of each sample.
        dim: see `gather_tokens`. `[B, H, N, D]` with dim=2 becomes `[H, T, D]`.
        capacity: rows of the packed tensors, default B * N. What does not fit is left out, from the end.

    Returns:
        The packed tensors (differentiable), `cu_seqlens` for the attention ops, and the positions the tokens came from:
        what `unpack_tokens` needs to put them back.
    """
    many, single = _as_list(tensors)
    dims = _dims(dim, many)
    samples, tokens = many[0].shape[0], many[0].shape[dims[0]]
    if keep.dtype == torch.bool:
        if keep.shape != (samples, tokens):
            raise ValueError(f"keep: found shape {tuple(keep.shape)}, supported is {(samples, tokens)} or [B]")
    else:
        if keep.shape != (samples,) or keep.dtype not in (torch.int32, torch.int64):
            raise ValueError(
                f"keep: found {str(keep.dtype).removeprefix('torch.')} {tuple(keep.shape)}, supported are bool "
                f"{(samples, tokens)} and int32, int64 {(samples,)}"
            )
        keep = torch.arange(tokens, device=keep.device) < keep[:, None]
    counts, index = torch.ops.sparsekit.block_lists_from_bool(keep[None, None], tokens)
    counts, index = counts.view(samples), index.view(samples, tokens)
    capacity = samples * tokens if capacity is None else capacity
    ends = counts.cumsum(0).clamp(max=capacity)
    cu_seqlens = torch.nn.functional.pad(ends, (1, 0)).to(torch.int32)
    packed = torch.ops.sparsekit.gather_tokens(many, index, dims, None, cu_seqlens, capacity)
    return PackedTokens(packed[0] if single else packed, cu_seqlens, index)


def unpack_tokens(
    tensors: Tensors,
    cu_seqlens: Tensor,
    length: int,
    *,
    index: Tensor | None = None,
    base: Tensors | None = None,
    dim: int | Sequence[int] = 1,
) -> Tensors:
    """From packed back to padded: `[T, ...]` to `[B, length, ...]`.

    Args:
        tensors: one packed tensor or several.
        cu_seqlens: int32 `[B + 1]`.
        length: tokens per sample of the result. Without an index, longer samples lose their end.
        index: `[B, K]`, as `pack_tokens` returns it: token j of sample b goes to position `index[b, j]`. None: to j.
        base: `[B, length, ...]`, with an index: what the other positions hold, instead of zeros.
        dim: see `gather_tokens`.
    """
    many, single = _as_list(tensors)
    dims = _dims(dim, many)
    if index is not None:
        return scatter_tokens(tensors, index, length, base=base, dim=dims, cu_seqlens=cu_seqlens)
    if base is not None:
        raise ValueError("base: found without an index, supported with the index that pack_tokens returns")
    position = torch.arange(length, dtype=torch.int32, device=cu_seqlens.device)
    counts = cu_seqlens[1:] - cu_seqlens[:-1]
    index = torch.where(position < counts[:, None], position, -1)
    outs = torch.ops.sparsekit.gather_tokens(many, index, dims, cu_seqlens)
    return outs[0] if single else outs


def compact_kv(
    cache_tensors: Sequence[Tensor],
    keep_index: Tensor,
    *,
    block_table: Tensor | None = None,
    lengths: Tensor | None = None,
    layout: str = "HND",
) -> None:
    """Keeps some rows of a KV cache, in place: row j of a sample becomes row `keep_index[b, j]`. Returns nothing.

    Args:
        cache_tensors: keys, values, ... in float32, float16 or bfloat16, alike in all sizes but the last, whose stride is
            1. layout "HND": `[B, H, T, D]`, paged `[pages, H, page_size, D]`; "NHD": `[B, T, H, D]`, paged
            `[pages, page_size, H, D]`.
        keep_index: int32 or int64 `[B, K]`, or `[B, H, K]` for heads that keep different rows: ascending rows, then -1.
            Rows of the cache after the kept ones stay what they were.
        block_table: int32 `[B, pages per sample]`: token t is row t % page_size of page `block_table[b, t //
            page_size]`. No two samples may share a page that is written.
        lengths: int32, `keep_index.shape[:-1]`: the rows in use. Changed in place to the number of rows kept.

    Raises:
        RuntimeError: on the CPU a row that is not in use, rows that do not ascend, a page that does not exist (the first
            bad entry is named, and nothing has been changed). On CUDA the list ends before such an entry.
    """
    torch.ops.sparsekit.compact_kv(
        list(cache_tensors), keep_index, block_table, lengths, bool(_number(layout, ("HND", "NHD"), "layout"))
    )


# ---- matching and merging


def bipartite_match(metric: Tensor, r: int | Tensor, *, protect: int = 0, counts: Tensor | None = None) -> TokenMatch:
    """Bipartite soft matching: the r tokens at even positions that are most similar to a token at an odd one.

    Similarity is the cosine, summed in float32; no matrix of similarities is stored. Ties go to the lower position. A
    token of length 0 has similarity 0 to every other; one with a NaN or an infinity is similar to none: it is chosen
    last, and then merges into the first odd position that may be merged into.

    Args:
        metric: `[B, N, D]` float32, float16 or bfloat16 (also float64, slowly), such as the keys averaged over heads.
            On CUDA rows should be a multiple of 16 bytes long and apart; others are searched many times slower.
        r: how many tokens to merge away: an int for all samples, or int32 or int64 `[B]`. More than
            (N - protect) // 2 are not possible: r is clamped to that.
        protect: the first so many tokens (class token, registers) are neither merged nor merged into.
        counts: int32 `[B]`: the tokens that exist, as the match of the layer before says; the others take no part.

    Returns:
        A `TokenMatch`. Where r is an int and counts is None its result has N - r rows and `counts` is None; else it is
        ragged: N rows, of which `counts[b]` exist.

    Source: Token Merging (arXiv 2210.09461), section 3. It puts the kept tokens of the even positions before those of
    the odd ones; here all stay in order.
    """
    if counts is not None and not isinstance(r, Tensor):
        r = torch.full((metric.shape[0],), r, dtype=torch.int32, device=metric.device)
    ragged = isinstance(r, Tensor)
    match = torch.ops.sparsekit.bipartite_match(metric, 0 if ragged else r, r if ragged else None, protect, counts)
    return TokenMatch(*match[:4], match[4] if ragged else None)


def merge_tokens(
    x: Tensors,
    match: TokenMatch | Tensor,
    sizes: Tensor | None = None,
    *,
    weights: Tensor | None = None,
    length: int | None = None,
    dim: int | Sequence[int] = 1,
) -> tuple[Tensors, Tensor]:
    """The mean of the tokens that merge, weighted by how many tokens each stands for.

        merged[b, j] = sum of w x[b, n] / sum of w,   w = sizes[b, n] (times weights), over the tokens n of row j

    Args:
        x: one tensor or several, `[B, N, ...]` floats. A row made of one token is that token, bit for bit.
        match: of `bipartite_match`; or any int32 or int64 `[B, N]` that says for each token its row of the result (-1:
            none), or `[B, N, M]` where it is part of M rows.
        sizes: float32 `[B, N]` (float64 for float64), as the merge before returned them; None: 1. Differentiable.
        weights: float32, with a tensor for `match`: in its shape, the share that each row takes of the token.
        length: with a tensor for `match`, the rows of the result.
        dim: see `gather_tokens`.

    Returns:
        merged `[B, N - r, ...]` (ragged: `[B, N, ...]`) and the sizes of its tokens, float32 `[B, N - r]`; rows past a
        sample's count are zeros of size 0. Both differentiable. `token_size_bias(sizes)` is what attention needs of
        them.

    Sources: Token Merging (arXiv 2210.09461), section 3; many to many: Token Transforming (arXiv 2506.05709).
    """
    if isinstance(match, TokenMatch):
        row, length = match.row, match.kept.shape[1] if length is None else length
    else:
        row = match
        if length is None:
            raise ValueError("length: none is given; with a tensor for match it is the number of rows of the result")
    many, single = _as_list(x)
    if sizes is not None:
        shape = sizes if row.dim() == 2 else sizes[..., None].expand(row.shape)
        weights = shape if weights is None else weights * shape
    if weights is None and any(tensor.dtype == torch.float64 for tensor in many):
        weights = torch.ones(row.shape, dtype=torch.float64, device=row.device)
    outs, totals = torch.ops.sparsekit.scatter_tokens(
        many, weights, [], row, _dims(dim, many), length, _REDUCES.index("mean")
    )
    return (outs[0] if single else outs), totals


def unmerge_tokens(x: Tensors, match: TokenMatch | Tensor, *, dim: int | Sequence[int] = 1) -> Tensors:
    """Every token gets what its row of the merged tensor holds: `out[b, n] = x[b, row[b, n]]`.

    Args:
        x: one tensor or several, `[B, N - r, ...]`.
        match: the match that merged them, or its `row` `[B, N]`.
        dim: see `gather_tokens`.

    Returns:
        `[B, N, ...]`, differentiable; tokens without a row are zeros.
    """
    return gather_tokens(x, match.row if isinstance(match, TokenMatch) else match, dim=dim)


def token_size_bias(sizes: Tensor) -> Tensor:
    """`key_bias` `[B, 1, N]` for the attention ops: log(size), so that a merged token weighs as the tokens it stands for.

    A size of 0 gives -inf, which hides the padding of a ragged merge; its gradient is 0. Source: proportional attention,
    Token Merging (arXiv 2210.09461), section 3.
    """
    exists = sizes > 0
    return torch.where(exists, torch.where(exists, sizes, 1).log(), -torch.inf)[:, None]


def _as_list(tensors) -> tuple[list[Tensor], bool]:
    if isinstance(tensors, Tensor):
        return [tensors], True
    return list(tensors), False


def _dims(dim: int | Sequence[int], tensors: list[Tensor]) -> list[int]:
    return [dim] * len(tensors) if isinstance(dim, int) else list(dim)
