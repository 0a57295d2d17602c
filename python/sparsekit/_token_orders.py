"""Orders of tokens (see `selection`): clusters, modalities or a grid's axes side by side, and back."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

_ops = torch.ops.sparsekit


def token_order(labels: Tensor) -> Tensor:
    """The order that puts tokens with equal labels side by side, labels ascending, tokens of one label as they stood.

    Clusters (Sparse VideoGen2), modalities and grid phases (MMInference) are labels.

    Args:
        labels: `[B, H, S]` (leading dimensions may be missing).

    Returns:
        int32 of the same shape: place i of the new order holds token order[i]. See `permute_tokens`.
    """
    return torch.sort(labels, dim=-1, stable=True).indices.to(torch.int32)


def axis_order(shape: tuple[int, ...], axes: tuple[int, ...], device: torch.device | str | None = None) -> Tensor:
    """The order of tokens of a grid when its axes are nested in another way (PAROAttention, Sparse VideoGen).

    `axis_order((frames, rows, columns), (1, 2, 0))` puts the frames of a place side by side.

    Returns:
        int32 `[prod(shape)]`.
    """
    if sorted(axes) != list(range(len(shape))):
        raise ValueError(f"axes: found {axes}, supported is a permutation of 0 to {len(shape) - 1}")
    count = math.prod(shape)
    return torch.arange(count, dtype=torch.int32, device=device).view(shape).permute(axes).flatten()


def inverse_permutation(order: Tensor, length: int | None = None) -> Tensor:
    """The order that undoes `order`: inverse[order[i]] = i, -1 for tokens that `order` leaves out.

    Args:
        order: int32 `[..., n]`, each token at most once, -1 for an empty place. At most three dimensions.
        length: of the tokens, default n.

    Returns:
        int32 `[..., length]`.
    """
    length = order.shape[-1] if length is None else length
    return _ops.inverse_permutation(_with_heads(order), length).reshape(*order.shape[:-1], length)


def permute_tokens(tensors: Tensor | Sequence[Tensor], order: Tensor) -> Tensor | tuple[Tensor, ...]:
    """Rows in a new order, a head its own: out[b, h, i] = tensor[b, h, order[b, h, i]], zeros where that is -1.

    Args:
        tensors: one `[B, H, S, D]` of any dtype, or several (query, key, value) of which H may differ.
        order: int32 `[S']`, `[H', S']` or `[B, H', S']`; H' divides H. Each token at most once per head: gradients are
            moved back by the inverse.

    Returns:
        `[B, H, S', D]`, one per tensor, with the tensor's order of dimensions in memory. `permute_tokens(out,
        inverse_permutation(order))` is the tensor again.
    """
    order = _with_heads(order.to(torch.int32))
    if isinstance(tensors, Tensor):
        return _ops.permute_tokens(tensors, order)
    return tuple(_ops.permute_tokens(tensor, order) for tensor in tensors)


def _with_heads(order: Tensor) -> Tensor:
    if not 1 <= order.dim() <= 3:
        raise ValueError(f"order: found {order.dim()} dimensions, supported are [n], [H, n] and [B, H, n]")
    return order[(None,) * (3 - order.dim())]
