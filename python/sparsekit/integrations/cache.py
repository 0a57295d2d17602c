"""A quantized cache for Hugging Face models (transformers >= 5): `sparsekit.integrations.transformers.SparseKitCache`.

transformers hands an attention function three tensors: query, key and value. So `update` stores the new tokens and returns
them as they came, with a handle to the layer's `sparsekit.KVCache` on the key; the attention function "sparsekit_cache"
finds the handle and decodes from the packed cache. The cache is never dequantized as a whole.

* The first call of a sequence attends to its own keys and values in full precision (dense, exact, causal).
* Later calls of up to 16 tokens are `decode_attention`; longer ones run as several, 16 query rows each.
* Padding (a 2-D `attention_mask`) becomes `key_bias`.
* Refused with the reason: sliding windows, prepared 4-D masks, dropout, and any other attention function with this cache.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import Cache, CacheLayerMixin

import sparsekit

from .transformers import _every_block, _padding_bias, _refuse_unsupported

NAME = "sparsekit_cache"
_ROWS = 16  # query rows of one decode_attention


class SparseKitLayer(CacheLayerMixin):
    """One layer's `sparsekit.KVCache` behind transformers' interface."""

    is_sliding = False
    is_croppable = True

    def __init__(self, config, options: dict):
        super().__init__()
        self.config, self.options = config, options
        self.cache: sparsekit.KVCache | None = None
        self.fresh = True  # the tokens of this call are the only ones

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        batch, heads, _, dim = key_states.shape
        self.cache = sparsekit.KVCache(
            batch,
            heads,
            dim,
            value_dim=value_states.shape[-1],
            dtype=key_states.dtype,
            device=key_states.device,
            **self.options,
        )
        self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Stores the new tokens, and returns them (not the whole cache) with a handle for the attention function."""
        if self.config._attn_implementation != NAME:
            raise ValueError(
                f"SparseKitCache: found attn_implementation={self.config._attn_implementation!r}, which would attend to "
                f"the newest tokens only; supported is model.set_attn_implementation({NAME!r})"
            )
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.fresh = self.cache.max_length == 0
        self.cache.append(key_states, value_states)
        key_states = key_states.view_as(key_states)  # an attribute on a tensor of our own
        key_states.sparsekit_layer = self
        return key_states, value_states

    def get_seq_length(self) -> int:
        return 0 if self.cache is None else self.cache.max_length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        return -1  # grows

    def reset(self) -> None:
        self.cache, self.is_initialized = None, False  # the next sequences may be another batch

    def reorder_cache(self, beam_idx: Tensor) -> None:
        if self.cache is not None:
            self.cache.reorder(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.cache is not None:
            self.cache.reorder(torch.arange(self.cache.batch_size).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.cache is not None:
            if indices.dtype == torch.bool:
                indices = indices.nonzero()[:, 0]
            self.cache.reorder(indices)

    def crop(self, tokens_to_remove: int) -> None:
        """Removes -tokens_to_remove tokens; a positive number is the length to keep, as in transformers before 5.20."""
        if self.cache is not None and tokens_to_remove != 0:
            length = tokens_to_remove if tokens_to_remove > 0 else self.cache.max_length + tokens_to_remove
            self.cache.crop(max(length, 0))

    def offload(self) -> None:
        raise NotImplementedError("SparseKitCache: offloading is not supported; the cache stays on its device")

    prefetch = offload


class SparseKitCache(Cache):
    """A cache of `sparsekit.KVCache` layers, for `generate` and for direct calls.

        model.set_attn_implementation("sparsekit_cache")
        cache = SparseKitCache(model.config, bits=4)
        model.generate(**inputs, past_key_values=cache)

    Batches, beam search, assisted decoding and continued conversations work as with `DynamicCache`.

    Args:
        config: of the model, whose layers all have full attention.
        bits, and every other option of `sparsekit.KVCache`: group_size, key_axis, window, sinks, rotate, ...

    Raises:
        NotImplementedError: a layer with a sliding window.
        ValueError: in the first forward, where the model has another attention function.
    """

    def __init__(self, config, bits=4, **options):
        text = config.get_text_config(decoder=True)
        kinds = set(getattr(text, "layer_types", None) or ["full_attention"])
        if kinds != {"full_attention"} or (getattr(text, "sliding_window", None) and not hasattr(text, "layer_types")):
            raise NotImplementedError(f"SparseKitCache: found layers {sorted(kinds)}; supported is full attention")
        options = {"bits": bits, **options}
        super().__init__(layers=[SparseKitLayer(text, options) for _ in range(text.num_hidden_layers)])

    @property
    def nbytes(self) -> int:
        """Bytes that all layers hold."""
        return sum(layer.cache.nbytes for layer in self.layers if layer.cache is not None)


def _attention(
    module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    is_causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    _refuse_unsupported(NAME, attention_mask, dropout, is_causal, kwargs)
    layer = getattr(key, "sparsekit_layer", None)
    if layer is None or layer.fresh:  # without a cache, or the first tokens of one
        out = sparsekit.block_sparse_attention(
            query,
            key,
            value,
            _every_block(query, key),
            scale=scaling,
            key_bias=attention_mask,
            softcap=softcap,
            sinks=s_aux,
        )
        return out.transpose(1, 2).contiguous(), None
    bias = None if attention_mask is None else attention_mask[:, :, None]
    length, rows = layer.cache.max_length, query.shape[2]
    outs = []
    for start in range(0, rows, _ROWS):
        part = query[:, :, start : start + _ROWS]
        later = rows - start - part.shape[2]  # tokens of this call that stand behind the part
        hidden = bias
        if later:  # decode_attention takes its rows for the newest tokens: the mask says otherwise
            place = torch.arange(length, device=query.device)
            last = length - later - part.shape[2] + torch.arange(part.shape[2], device=query.device)
            hidden = torch.zeros(1, 1, len(last), length, device=query.device)
            hidden = hidden.masked_fill(place > last[:, None], -torch.inf)
            hidden = hidden if bias is None else hidden + bias
        outs.append(
            sparsekit.decode_attention(part, layer.cache, scale=scaling, softcap=softcap, sinks=s_aux, key_bias=hidden)
        )
    out = outs[0] if len(outs) == 1 else torch.cat(outs, 2)
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, _padding_bias)
