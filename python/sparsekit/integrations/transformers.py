"""Block-sparse attention in a Hugging Face model (transformers >= 5).

    from sparsekit.integrations.transformers import TopKBlocks, register

    model.set_attn_implementation(register(TopKBlocks(density=0.25)))
    model.generate(**long_prompt)

What runs, per attention layer:

* A call with at least `sparse_from` query tokens (a prompt, or a chunk of one) is block-sparse: `select` chooses key
  blocks per head from the query and key of this very call, and only those are attended to, causally. This is an
  approximation of the model: it changes the output. `examples/long_prompt.py` measures by how much.
* A shorter call (the decode steps of `generate`) is exact: it goes through the same kernel with every block listed.
* Padding (a 2-D `attention_mask`, left or right) becomes `key_bias`: padded keys are never chosen and never seen.
* Anything else is refused with the reason: sliding windows, packed sequences, prepared 4-D masks, position biases,
  dropout, static and paged caches. Nothing falls back to dense attention on its own.

Selection runs on the device of the query and never waits for it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

import sparsekit
from sparsekit import _lists, selection
from sparsekit.recipes import Recipe

_DECODE_BLOCK = (64, 128)  # of calls that list every block: fewest entries among the sizes that every backend takes


# ---- choosing blocks


# A score function returns anything that broadcasts to [B, Hq, Mq, Nk]; larger is better. Causality and the blocks that
# are always on are not its business. key_mask [B, Sk]: False is padding.
Score = Callable[[Tensor, Tensor, tuple[int, int], "Tensor | None", float], Tensor]


def pooled_scores(
    query: Tensor, key: Tensor, block_size: tuple[int, int], key_mask: Tensor | None, scale: float
) -> Tensor:
    """scale * (mean query of the query block) . (mean key of the key block).

    The mean of q . k over all pairs of two blocks is exactly the product of their means. Tried instead: the mean query
    against every key, log-sum-exp per block. At 25 % density that finds more of the attention mass (92 against 87 %, the
    gain in two of nine layers), and yet makes a worse model: perplexity 11.2 against 10.7 in examples/long_prompt.py.
    """
    if key_mask is None:
        return selection.block_scores(query, key, block_size, scale=scale)
    kept = key.masked_fill(~key_mask[:, None, :, None], 0)  # and then the mean over what is left
    share = _share_of_blocks(key_mask, block_size[1])[:, None, None]
    return selection.block_scores(query, kept, block_size, scale=scale) / share.masked_fill(share == 0, 1)


def recency_scores(
    query: Tensor, key: Tensor, block_size: tuple[int, int], key_mask: Tensor | None, scale: float
) -> Tensor:
    """Later blocks score higher, whatever they hold: top-k becomes a sliding window (plus the sinks)."""
    blocks = -(-key.shape[2] // block_size[1])
    return torch.arange(blocks, dtype=torch.float32, device=key.device).view(1, 1, 1, -1)


@dataclass(frozen=True)
class TopKBlocks:
    """Per query head and query block: the sink blocks, the local blocks, and the best of the others by `score`.

    density        share of the causally visible key blocks that each query block keeps (rounded to whole blocks, never
                   fewer than the sink and local blocks)
    block_size     tokens per block, or a pair (query, key)
    sink_blocks    first blocks of the sequence, always on: much of the softmax mass of a trained model rests there
    local_blocks   blocks up to and with the query block's own, always on
    score          pooled_scores, recency_scores, or any function like them
    """

    density: float = 0.25
    block_size: int | tuple[int, int] = 64
    sink_blocks: int = 1
    local_blocks: int = 2
    score: Score = pooled_scores

    def __post_init__(self):
        if not 0.0 < self.density <= 1.0:
            raise ValueError(f"density: found {self.density}, supported are shares in (0, 1]")
        if self.local_blocks < 1:
            raise ValueError(f"local_blocks: found {self.local_blocks}, at least 1 (the query block itself) is needed")

    @torch.no_grad()
    def block_lists(
        self, query: Tensor, key: Tensor, key_mask: Tensor | None = None, scale: float | None = None
    ) -> tuple[Tensor, Tensor]:
        """indices int32 [B, Hq, Mq, Nk] and counts int32 [B, Hq, Mq]: which key blocks each query block attends to.

        key_mask [B, Sk]: False is padding.
        """
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        block_q, block_k = block_size = _pair(self.block_size)
        len_q, len_k, device = query.shape[2], key.shape[2], query.device
        rows = torch.arange(-(-len_q // block_q), device=device)[:, None]
        columns = torch.arange(-(-len_k // block_k), device=device)
        first_position = rows * block_q + (len_k - len_q)  # queries are the last tokens of the sequence
        last_position = ((rows + 1) * block_q).clamp(max=len_q) - 1 + (len_k - len_q)

        visible = columns * block_k <= last_position  # [Mq, Nk]
        local = visible & (columns > first_position // block_k - self.local_blocks)
        sink = columns < self.sink_blocks
        if key_mask is not None:  # a block without a key is not visible, and the sinks are the first that have one
            occupied = _share_of_blocks(key_mask, block_k)[:, None] > 0  # [B, 1, Nk]
            sink = (occupied.cumsum(-1) <= self.sink_blocks)[:, :, None, :]
            visible = visible & occupied[:, :, None, :]

        always = (local | sink) & visible
        budget = (self.density * visible.sum(-1)).round().long().maximum(always.sum(-1))
        score = self.score(query, key, block_size, key_mask, scale).float()
        score = score.masked_fill(always, torch.inf).masked_fill(~visible, -torch.inf)
        return selection.select_top_k(score.expand(*query.shape[:2], *score.shape[2:]), budget)

    def block_map(self, query: Tensor, key: Tensor, *rest) -> Tensor:
        """The same as a bool map [B, Hq, Mq, Nk], to look at."""
        indices, counts = self.block_lists(query, key, *rest)
        return _lists.to_dense(counts, indices, -(-key.shape[2] // _pair(self.block_size)[1]))

    def __call__(
        self, module, query: Tensor, key: Tensor, key_mask: Tensor | None, scale: float | None
    ) -> sparsekit.BlockPattern:
        return sparsekit.BlockPattern.from_indices(
            *self.block_lists(query, key, key_mask, scale),
            _pair(self.block_size),
            seq_lengths=(query.shape[2], key.shape[2]),
            causal=True,
        )


def _pair(size: int | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


def _share_of_blocks(mask: Tensor, block: int) -> Tensor:
    """float32 [B, blocks] of a mask [B, S]: the share of each block's tokens that it keeps."""
    padded = torch.nn.functional.pad(mask.float(), (0, -mask.shape[1] % block)).unflatten(1, (-1, block)).sum(-1)
    tokens = torch.arange(0, mask.shape[1], block, device=mask.device)
    return padded / (mask.shape[1] - tokens).clamp(max=block)


# ---- transformers


def __getattr__(name: str):
    if name == "SparseKitCache":  # its base class is transformers', which is imported only where it is used
        from .cache import SparseKitCache

        return SparseKitCache
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def register(
    select: Callable[..., sparsekit.BlockPattern] | Recipe | None = None,
    *,
    name: str | None = None,
    sparse_from: int = 128,
) -> str:
    """Registers block-sparse attention with transformers and returns its name, for `model.set_attn_implementation`.

    select        (module, query [B, Hq, Sq, D], key [B, Hkv, Sk, D], key_mask [B, Sk] or None, scale or None) ->
                  BlockPattern with causal=True; `module.layer_idx` tells the layer. Or one of sparsekit.recipes, which
                  take no padding: prompts of one length. Default: TopKBlocks()
    name          under which transformers knows it; registering the same name again replaces it. Default: "sparsekit",
                  for a recipe "sparsekit_" and the name of its module: sparsekit_x_attention
    sparse_from   calls with fewer query tokens (decode steps) attend to every key, exactly
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    select = TopKBlocks() if select is None else select
    if name is None:
        name = f"sparsekit_{type(select).__module__.rpartition('.')[2]}" if isinstance(select, Recipe) else "sparsekit"

    def attention(
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
        _refuse_unsupported(name, attention_mask, dropout, is_causal, kwargs)
        if query.shape[2] >= sparse_from and isinstance(select, Recipe):
            if attention_mask is not None:
                raise NotImplementedError(
                    f"attn_implementation={name!r}: found padding; recipes choose as if all tokens were real: pass prompts "
                    "of one length"
                )
            out = select(query, key, value, scale=scaling, softcap=softcap, sinks=s_aux, layer=module.layer_idx)
            return out.transpose(1, 2).contiguous(), None
        if query.shape[2] >= sparse_from:
            key_mask = None if attention_mask is None else attention_mask[:, 0] == 0
            pattern = select(module, query, key, key_mask, scaling)
        else:
            pattern = _every_block(query, key)
        out = sparsekit.block_sparse_attention(
            query, key, value, pattern, scale=scaling, key_bias=attention_mask, softcap=softcap, sinks=s_aux
        )
        return out.transpose(1, 2).contiguous(), None

    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, _padding_bias)
    return name


def _every_block(query: Tensor, key: Tensor) -> sparsekit.BlockPattern:
    rows, columns = -(-query.shape[2] // _DECODE_BLOCK[0]), -(-key.shape[2] // _DECODE_BLOCK[1])
    counts = torch.full((1, 1, rows), columns, dtype=torch.int32, device=query.device)
    indices = torch.arange(columns, dtype=torch.int32, device=query.device).expand(1, 1, rows, columns).contiguous()
    lengths = (query.shape[2], key.shape[2])
    return sparsekit.BlockPattern(counts, indices, block_size=_DECODE_BLOCK, seq_lengths=lengths, causal=True)


def _padding_bias(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable | None = None,
    attention_mask: Tensor | None = None,
    **unused,
) -> Tensor | None:
    """What `attention` receives as its mask: None, or key_bias [B, 1, Sk] with -inf where a key is padding.

    transformers calls this once per forward, for all layers that share a mask. Causality needs no tensor; every other
    kind of mask arrives as a Python function of indices, which is refused here rather than expanded to [Sq, Sk].
    """
    from transformers.masking_utils import causal_mask_function

    if mask_function is not causal_mask_function:
        raise NotImplementedError(
            f"sparsekit: this model builds the mask {getattr(mask_function, '__qualname__', mask_function)} (a sliding "
            "window, packed sequences, or a custom one); supported are causal masks, with 2-D padding. For packed "
            "sequences pass one sequence per batch row"
        )
    if int(q_offset) + q_length != kv_offset + kv_length:
        raise NotImplementedError(
            f"sparsekit: {q_length} queries from position {int(q_offset)} on, but the cache returns keys up to "
            f"{kv_offset + kv_length}; supported are caches that return only the keys they hold, as DynamicCache does"
        )
    if attention_mask is None:
        return None
    missing = max(0, kv_offset + kv_length - attention_mask.shape[-1])  # transformers: a short mask ends in padding
    keep = torch.nn.functional.pad(attention_mask.bool(), (0, missing))[:, kv_offset : kv_offset + kv_length]
    if keep.all():
        return None
    return torch.zeros(keep.shape, device=keep.device).masked_fill_(~keep, -torch.inf)[:, None]


def _refuse_unsupported(name: str, mask: Tensor | None, dropout: float, is_causal: bool, kwargs: dict) -> None:
    reason = None
    if not is_causal:
        reason = "is_causal: found False, supported is causal attention"
    elif dropout:
        reason = f"dropout: found {dropout}, supported is 0 (model.eval(), or attention_dropout=0)"
    elif mask is not None and not (isinstance(mask, Tensor) and mask.ndim == 3):
        shape = list(mask.shape) if hasattr(mask, "shape") else type(mask).__name__
        reason = f"attention_mask: found a prepared mask {shape}, supported is 2-D padding [batch, keys]"
    elif kwargs.get("output_attentions"):
        reason = "output_attentions: the attention weights are never stored; use attn_implementation='eager'"
    else:
        for argument in ("position_bias", "cache", "block_indices", "head_mask"):
            if kwargs.get(argument) is not None:
                reason = f"{argument}: not supported by this attention function"
    if reason:
        raise NotImplementedError(f"attn_implementation={name!r}: {reason}")
