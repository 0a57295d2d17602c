"""What torch must know of the ops besides their kernels: fake kernels, autograd, autocast, vmap; a module per family.

The stable ABI has no C++ form of these. Imported once, for its effects, after the libraries are loaded.
"""

from . import attention, kv_cache, matmul, selection, tokens  # noqa: F401
