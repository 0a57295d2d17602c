"""KIVI (arXiv 2402.02750, section 3): asymmetric keys per channel, values per token, the newest tokens in full precision.

It is what `sparsekit.KVCache` does by itself. Here are the paper's settings; the one difference: `append` quantizes keys and
values in units of `group_size` tokens, where the paper flushes keys in blocks of `residual_length` and values one by one.
"""

import sparsekit


def kivi_cache(
    batch_size: int, num_heads: int, head_dim: int, *, bits: int = 2, residual_length: int = 128, **options
) -> sparsekit.KVCache:
    """The paper's cache: groups of 32. Its authors advise 2 bits for multi-head attention and 4 for grouped queries.

    Args:
        residual_length: newest tokens in full precision, at least.
        options: of `KVCache`: capacity, dtype, device, ...
    """
    options = {"group_size": 32, "key_axis": "channel", **options}
    return sparsekit.KVCache(batch_size, num_heads, head_dim, bits=bits, window=residual_length, **options)
