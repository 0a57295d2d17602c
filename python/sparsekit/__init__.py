"""sparsekit: block-sparse attention kernels for CPUs and NVIDIA GPUs, as torch ops.

    pattern = sparsekit.BlockPattern.from_bool(block_map, block_size=64, causal=True)      or a FlexAttention BlockMask
    out = sparsekit.block_sparse_attention(query, key, value, pattern)

`import sparsekit` registers `torch.ops.sparsekit.*` and touches no GPU driver. `import sparsekit.numpy` does not even
import torch: then the rest of the package follows at its first use.
"""

import importlib
import importlib.util
import sys

__version__ = "0.1.0"

_HOMES = {
    "BlockPattern": "formats",
    "BlockSparseMatrix": "matrices",
    "KVCache": "kv_cache",
    "NMGMatrix": "matrices",
    "PackedTokens": "tokens",
    "TokenMatch": "tokens",
    "bipartite_match": "tokens",
    "block_sddmm": "matmul",
    "block_sparse_attention": "attention",
    "block_sparse_attention_varlen": "attention",
    "block_sparse_linear": "matmul",
    "block_sparse_mlp": "matmul",
    "block_sparse_mm": "matmul",
    "check": "attention",
    "compact_kv": "tokens",
    "decode_attention": "kv_cache",
    "dequantize_kv": "kv_cache",
    "gather_tokens": "tokens",
    "info": "_info",
    "isa": "_library",
    "merge_attention_states": "attention",
    "merge_tokens": "tokens",
    "pack_tokens": "tokens",
    "quantize_kv": "kv_cache",
    "scatter_tokens": "tokens",
    "stripe_sparse_attention": "stripes",
    "token_size_bias": "tokens",
    "unmerge_tokens": "tokens",
    "unpack_tokens": "tokens",
}
__all__ = ["__version__", *sorted(_HOMES)]


def _load():
    """Loads the libraries, registers what torch must know of the ops, and binds the public names."""
    _library = importlib.import_module("._library", __name__)
    _library.load()
    importlib.import_module("._registrations", __name__)
    for name, home in _HOMES.items():
        globals()[name] = getattr(importlib.import_module(f".{home}", __name__), name)


def __getattr__(name: str):
    if name in _HOMES:
        _load()
        return globals()[name]
    if importlib.util.find_spec(f"{__name__}.{name}") is not None:
        _load()
        return importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__():
    return sorted({*globals(), *_HOMES})


def _imported_for_numpy() -> bool:
    """Whether this import only serves `import sparsekit.numpy`: Python imports the package of a module first."""
    frame = sys._getframe()
    while frame is not None:
        if frame.f_code.co_name == "_find_and_load" and frame.f_locals.get("name") == "sparsekit.numpy":
            return True
        frame = frame.f_back
    return False


if importlib.util.find_spec("torch") is not None and not _imported_for_numpy():
    _load()
