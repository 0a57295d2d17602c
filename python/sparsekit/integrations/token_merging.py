"""Token Merging inside existing models: ViTs of transformers (5 and later) and timm, and BERT-like encoders.

    from sparsekit.integrations.token_merging import merge_tokens_in

    merging = merge_tokens_in(model, r=16)      # every layer: 16 tokens fewer, after attention and before the MLP
    features = model(pixel_values).last_hidden_state
    tokens = merging.unmerge(features)          # back to one row per patch, where a task wants that
    merging.remove()

No weights change and nothing is trained. Layers are recognised by their parts, not by their class, so models built from
the same blocks (DeiT, sentence encoders ...) work too. Position embeddings are added before the first layer; models that
rotate keys by position in each layer are not supported.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ..recipes.tome import TokenMerging

__all__ = ["MergingHandle", "merge_tokens_in"]


class MergingHandle(TokenMerging):
    """The merging of a model's last forward pass (`sizes`, `row`, `unmerge`, `mean`), and the way back: `remove()`."""

    def __init__(self, **options):
        super().__init__(**options)
        self.metric: Tensor | None = None  # the keys of the layer that runs, averaged over heads
        self._undo: list[Callable[[], None]] = []

    def merge(self, x: Tensor) -> Tensor:
        return self(x, self.metric)

    def attention_mask(self, x: Tensor) -> Tensor | None:
        """[B, 1, 1, N], added to the scores."""
        bias = self.key_bias()
        return None if bias is None else bias[:, :, None].to(x.dtype)

    def remove(self) -> None:
        """The model as it was."""
        while self._undo:
            self._undo.pop()()


def merge_tokens_in(
    model: nn.Module,
    r: int | float | Sequence[int | float],
    *,
    protect: int = 1,
    proportional: bool = True,
    trim: bool = False,
) -> MergingHandle:
    """Merges tokens in every layer of `model`, until the result's `remove()`.

    Args:
        model: a ViT of transformers or timm, or a BERT-like encoder of transformers. A 2-D `attention_mask` (padding on
            the right) makes the merging ragged: each sample merges tokens of its own only.
        r, protect, proportional, trim: see `sparsekit.recipes.tome.TokenMerging`. With padding, `trim=True` is what
            makes the tensors smaller.

    Raises:
        TypeError: no layer of the model is of a known kind.
        ValueError: r has another number of entries than the model layers.
    """
    handle = MergingHandle(r=r, protect=protect, proportional=proportional, trim=trim)
    layers = [(module, kind) for module in model.modules() if (kind := _kind_of(module))]
    if not layers:
        raise TypeError(
            f"model: found {type(model).__name__} without a layer of a known kind; supported are ViT and BERT layers of "
            "transformers >= 5 and blocks of timm's vision transformers"
        )
    if isinstance(r, Sequence) and len(r) != len(layers):
        raise ValueError(f"r: found {len(r)} entries, supported is one per layer, {len(layers)}")
    implementation = getattr(getattr(model, "config", None), "_attn_implementation", "sdpa")
    if implementation not in ("sdpa", "eager"):
        raise ValueError(f"model: found attn_implementation {implementation!r}, supported are 'sdpa' and 'eager'")
    for layer, kind in layers:
        keys, heads = kind.keys(layer)
        hook = keys.register_forward_hook(_take_metric(handle, heads))
        layer.forward = kind.forward(layer, handle)
        handle._undo += [hook.remove, lambda layer=layer: layer.__dict__.pop("forward")]
    handle._undo.append(model.register_forward_pre_hook(_begin(handle), with_kwargs=True).remove)
    return handle


def _begin(handle: MergingHandle):
    def hook(module, args, kwargs):
        mask = kwargs.get("attention_mask")
        if mask is not None and mask.dim() != 2:
            raise ValueError(
                f"attention_mask: found shape {tuple(mask.shape)}, supported is [B, N] with the padding on the right"
            )
        if mask is not None and mask.device.type == "cpu":
            if not (mask.bool() == (torch.arange(mask.shape[1]) < mask.sum(1, keepdim=True))).all():
                raise ValueError("attention_mask: found padding before a token, supported is padding on the right")
            mask = None if mask.all() else mask
        handle.begin(mask)
        return args, {name: value for name, value in kwargs.items() if name != "attention_mask"}

    return hook


def _take_metric(handle: MergingHandle, heads: int):
    def hook(module, inputs, keys):
        # [B, N, H * D], as a projection gives it, or [B, H, N, D], as a normalisation of heads does
        handle.metric = keys.unflatten(-1, (heads, -1)).mean(2) if keys.dim() == 3 else keys.mean(1)

    return hook


def _refuse_mask(mask) -> None:
    if mask is not None:
        raise NotImplementedError("sparsekit: a mask for a single layer is not supported with merged tokens")


# ---- the layers that are known: where their keys come from, and their forward with the merge in its middle


class _TransformersViT:
    @staticmethod
    def keys(layer):
        return layer.attention.k_proj, layer.attention.num_attention_heads

    @staticmethod
    def forward(layer, handle):
        def forward(hidden_states, attention_mask=None, **kwargs):
            _refuse_mask(attention_mask)
            mask = handle.attention_mask(hidden_states)
            attended, _ = layer.attention(layer.layernorm_before(hidden_states), mask, **kwargs)
            hidden_states = handle.merge(hidden_states + layer.dropout(attended))
            return hidden_states + layer.dropout(layer.mlp(layer.layernorm_after(hidden_states)))

        return forward


class _TransformersBert:
    @staticmethod
    def keys(layer):
        return layer.attention.self.key, layer.attention.self.num_attention_heads

    @staticmethod
    def forward(layer, handle):
        def forward(
            hidden_states,
            attention_mask=None,
            encoder_hidden_states=None,
            encoder_attention_mask=None,
            past_key_values=None,
            **kwargs,
        ):
            _refuse_mask(attention_mask)
            if past_key_values is not None or encoder_hidden_states is not None:
                raise NotImplementedError("sparsekit: tokens are merged in encoders only, without a cache")
            attended, _ = layer.attention(hidden_states, handle.attention_mask(hidden_states))
            return layer.feed_forward_chunk(handle.merge(attended))

        return forward


class _Timm:
    @staticmethod
    def keys(layer):
        return layer.attn.k_norm, layer.attn.num_heads

    @staticmethod
    def forward(layer, handle):
        def forward(x, attn_mask=None, is_causal=False):
            _refuse_mask(True if is_causal else attn_mask)
            attended = layer.attn(layer.norm1(x), attn_mask=handle.attention_mask(x))
            x = handle.merge(x + layer.drop_path1(layer.ls1(attended)))
            return x + layer.drop_path2(layer.ls2(layer.mlp(layer.norm2(x))))

        return forward


_PARTS = (
    (_TransformersViT, ("attention.k_proj", "layernorm_before", "layernorm_after", "mlp", "dropout")),
    (_TransformersBert, ("attention.self.key", "feed_forward_chunk")),
    (_Timm, ("attn.k_norm", "attn.qkv", "norm1", "ls1", "drop_path1", "norm2", "ls2", "drop_path2", "mlp")),
)


def _kind_of(module: nn.Module):
    return next((kind for kind, parts in _PARTS if all(_has(module, part) for part in parts)), None)


def _has(module, path: str) -> bool:
    for name in path.split("."):
        if not hasattr(module, name):
            return False
        module = getattr(module, name)
    return True
