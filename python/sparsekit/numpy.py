"""Block-sparse attention on NumPy arrays, and on any other CPU array that speaks DLPack. Does not import torch.

    import sparsekit.numpy
    out, lse = sparsekit.numpy.block_sparse_attention(query, key, value, kv_num_blocks, kv_indices)

The same kernels and the same tensors as `sparsekit.block_sparse_attention`; docs/semantics.md holds here too.
"""

import numpy as np

from ._numpy import attention_forward

__all__ = ["block_sparse_attention"]


def block_sparse_attention(
    query,
    key,
    value,
    kv_num_blocks,
    kv_indices,
    full_kv_num_blocks=None,
    full_kv_indices=None,
    *,
    partial_bits=None,
    partial_bits_index=None,
    block_size=(128, 128),
    scale=None,
    causal=False,
    window=(-1, -1),
    softcap=0.0,
    key_bias=None,
    sinks=None,
    query_positions=None,
    key_positions=None,
    threads=0,
):
    """Attention of `query [B, Hq, Sq, D]` over the key blocks that each query block lists.

    Args:
        query, key, value: float32, float16, bfloat16 (ml_dtypes, or its bits as uint16) or float64 arrays; key and value
            are `[B, Hkv, Sk, D]` and `[B, Hkv, Sk, Dv]`, Hq a multiple of Hkv. Used in place where the last stride is 1
            and the base and the other strides are multiples of 16 bytes, else copied once.
        kv_num_blocks, kv_indices: int32 `[B|1, H|1, Mq]` and `[B|1, H|1, Mq, max]`: how many key blocks each query block
            lists, and which; -1 is an empty slot. H is the number of query heads or of key heads. causal, window and
            bits apply inside these blocks.
        full_kv_num_blocks, full_kv_indices: the same for blocks all of whose keys are seen. Either pair may be None.
        partial_bits, partial_bits_index: int32 `[n, block_q, ceil(block_k / 32)]` and `[B|1, H|1, Mq, max]`: which bit
            mask a slot of `kv_indices` has; -1 is none. Bit k of word w of a row is key 32 w + k of the block.
        block_size: (rows, keys) of a block.
        scale: default 1 / sqrt(D).
        causal, window: query i stands at i + Sk - Sq, or at its position, and sees keys from there - left to
            there + right; -1 is unlimited.
        softcap: 0 is none; else scores become softcap * tanh(score / softcap).
        key_bias: float32 `[B|1, Hq|1, Sk]`, added to the scores; may be -inf.
        sinks: float32 `[Hq]`, one more logit per head, without a value.
        query_positions, key_positions: int32 `[B|1, Sq]` and `[B|1, Sk]`, in any order.
        threads: 0 is SPARSEKIT_NUM_THREADS, or as many as the process may run on.

    Returns:
        `(out, lse)`: out in query's dtype (bfloat16 of a producer without NumPy dtypes: its bits as uint16), and the float32 (float64: float64) natural logarithm of the sum of
        exp(score), -inf where a row sees no key. out is 0 there.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it, what was found and what is supported.
    """
    out, lse = attention_forward(
        _exportable(query),
        _exportable(key),
        _exportable(value),
        kv_num_blocks,
        kv_indices,
        full_kv_num_blocks,
        full_kv_indices,
        partial_bits,
        partial_bits_index,
        tuple(block_size),
        scale,
        causal,
        tuple(window),
        softcap,
        key_bias,
        sinks,
        query_positions,
        key_positions,
        threads,
    )
    dtype = getattr(query, "dtype", None)
    if isinstance(dtype, np.dtype) and dtype.name == "bfloat16":
        out = out.view(dtype)
    return out, lse


def _exportable(array):
    # NumPy exports a bfloat16 array neither through DLPack nor as a buffer, but its bits it does.
    if isinstance(array, np.ndarray) and array.dtype.name == "bfloat16":
        return array.view(np.uint16)
    return array
