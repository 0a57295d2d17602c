"""Loads the shared libraries that hold the ops, and says why one is not there."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

OLDEST_TORCH = (2, 11)
FOLDER = Path(__file__).parent

cuda_status = "not loaded yet"  # "loaded", or why the CUDA library is not
_loaded = False


def load() -> None:
    """Registers `torch.ops.sparsekit.*`: once, and without touching the GPU driver.

    Raises:
        ImportError: torch is missing or too old, or the library is missing or does not load; the message says what to
            do.
    """
    global _loaded, cuda_status
    if _loaded:
        return
    try:
        import torch
    except ModuleNotFoundError as error:
        raise ImportError(
            "sparsekit needs torch >= 2.11 (only sparsekit.numpy works without): pip install 'torch>=2.11'"
        ) from error
    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if version < OLDEST_TORCH:
        raise ImportError(f"sparsekit needs torch >= 2.11, and torch {torch.__version__} is installed")
    _load_library(torch, FOLDER / "_sparsekit.so")
    # By torch's build and not by torch.cuda.is_available(), which initialises the driver (and so breaks fork).
    if torch.version.cuda is None:
        cuda_status = f"torch {torch.__version__} is built without CUDA"
    elif not (FOLDER / "_sparsekit_cuda.so").exists():
        cuda_status = "sparsekit was built without CUDA (no nvcc was found, or SPARSEKIT_CUDA=off)"
    else:
        _load_library(torch, FOLDER / "_sparsekit_cuda.so")
        cuda_status = "loaded"
    _loaded = True


def _load_library(torch, path: Path) -> None:
    if not path.exists():
        raise ImportError(
            f"sparsekit: {path} is missing, so this copy of the package was never built. In a source tree type "
            "'make dev'; else install it: pip install ."
        )
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        raise ImportError(
            f"sparsekit: {path.name} does not load into torch {torch.__version__}: {error}. It was built for another "
            "platform, or is damaged: install sparsekit again"
        ) from error


@contextlib.contextmanager
def isa(name: str):
    """Within, CPU kernels use at most this instruction set: "amx", "avx512_bf16", "avx512", "avx2", "portable" or
    "reference".

    Sets the environment variable SPARSEKIT_ISA, which every call reads; an unknown name is that call's error. It holds
    for the whole process, not for one thread.
    """
    before = os.environ.get("SPARSEKIT_ISA")
    os.environ["SPARSEKIT_ISA"] = name
    try:
        yield
    finally:
        if before is None:
            del os.environ["SPARSEKIT_ISA"]
        else:
            os.environ["SPARSEKIT_ISA"] = before
