"""`sparsekit.info()`: what is installed here, and which kernel an attention call would run."""

from __future__ import annotations

import argparse
import os
import platform
import struct
from pathlib import Path

import torch
from torch import Tensor

from . import __version__, _library
from .formats import BlockPattern, as_pattern

__all__ = ["Info", "info", "main"]


class Info(dict):
    """A nested dictionary that prints as an indented list."""

    def __str__(self) -> str:
        return "\n".join(_lines(self, ""))

    __repr__ = __str__


def info(
    *,
    query: Tensor | None = None,
    key: Tensor | None = None,
    value: Tensor | None = None,
    pattern: BlockPattern | None = None,
    backward: bool = False,
    device: str | None = None,
    dtype: torch.dtype | None = None,
    head_dim: int | None = None,
    value_dim: int | None = None,
    block_size: int | tuple[int, int] | None = None,
    packed: bool = False,
    group_size: int = 0,
) -> Info:
    """Versions, instruction sets, GPU architectures; and for an attention problem, what runs and why the others do not.

    The problem is given by the tensors of a call, or by its kind, or by both (what is named wins):

        sparsekit.info(query=query, value=value, pattern=pattern)
        sparsekit.info(dtype=torch.bfloat16, head_dim=128, block_size=64, device="cuda")

    Args:
        query, key, value, pattern: of `block_sparse_attention` (or its varlen form, with three-dimensional tensors).
        backward: the plan of the backward instead of the forward.
        device: "cpu" or "cuda"; default query's, else "cpu".
        dtype, head_dim, value_dim, block_size, packed: the kind of the problem. value_dim defaults to head_dim.
        group_size: of `stripe_sparse_attention`; 0 for block-sparse attention.

    Returns:
        A dictionary that prints as text. Its entry "attention" maps each implementation, best first, to "runs" or to
        the reason why it refuses; the first that runs is taken.
    """
    report = Info(sparsekit=_software(), cpu=_cpu(), cuda=_cuda())
    if query is not None:
        device, packed = device or query.device.type, packed or query.dim() == 3
        dtype, head_dim = dtype or query.dtype, head_dim or query.shape[-1]
    if value is not None:
        value_dim = value_dim or value.shape[-1]
    if pattern is not None:
        block_size = block_size or as_pattern(pattern).block_size
    if head_dim is not None or block_size is not None:
        block_size = (128, 128) if block_size is None else block_size
        block_size = (block_size, block_size) if isinstance(block_size, int) else tuple(block_size)
        report["attention"] = _plan(
            device or "cpu",
            dtype or torch.bfloat16,
            head_dim or 128,
            value_dim or head_dim or 128,
            block_size,
            backward,
            packed,
            group_size,
        )
    return report


def _software() -> dict:
    return {
        "version": __version__,
        "folder": str(_library.FOLDER),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
    }


def _cpu() -> dict:
    return {
        "instruction sets": torch.ops.sparsekit.cpu_features(),
        "SPARSEKIT_ISA": os.environ.get("SPARSEKIT_ISA", "not set"),
        "threads": torch.get_num_threads(),
    }


def _cuda() -> dict:
    report = {"library": _library.cuda_status, "torch's CUDA": torch.version.cuda or "none"}
    path = _library.FOLDER / "_sparsekit_cuda.so"
    if path.exists():
        report["architectures"] = " ".join(cuda_architectures(path)) or "none"
    if _library.cuda_status == "loaded":
        report["devices"] = [
            f"{properties.name}, sm_{properties.major}{properties.minor}"
            for properties in map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
        ]
    return report


def _plan(
    device: str, dtype, head_dim: int, value_dim: int, block_size, backward: bool, packed: bool, group_size: int
) -> dict:
    if device not in ("cpu", "cuda"):
        raise ValueError(f"device: found {device!r}, supported are 'cpu' and 'cuda'")
    kind = f"{device} {'backward' if backward else 'forward'}"
    problem = f"{str(dtype).removeprefix('torch.')}, head dim {head_dim}, value dim {value_dim}, blocks {block_size}"
    plan: dict = {"problem": f"{kind}, {problem}" + (", packed" if packed else "")}
    if group_size:
        plan["problem"] += f", stripes of {group_size} rows"
    if device == "cuda" and _library.cuda_status != "loaded":
        return plan | {"cuda": f"the CUDA library is not loaded: {_library.cuda_status}"}
    op = torch.ops.sparsekit.attention_plan_cpu if device == "cpu" else torch.ops.sparsekit.attention_plan_cuda
    text = op(dtype, head_dim, value_dim, block_size, backward, packed, group_size)
    return plan | dict(line.split(": ", 1) for line in text.splitlines())


def cuda_architectures(library: Path) -> list[str]:
    """The GPU code in a library, such as `["compute_80", "sm_80", "sm_90a"]`: read from the file, touching no driver.

    nvcc stores code in "fat binaries": a header of 16 bytes (magic, version, header size, size of the rest), then
    entries. Of an entry's header these fields count: kind (1: PTX, 2: machine code) at 0, header size at 4, code size
    at 8, architecture at 28, flags at 40 (bit 20: "a" as in 90a, bit 21: "f" as in 100f).
    """
    data, magic, found = library.read_bytes(), struct.pack("<I", 0xBA55ED50), set()
    start = data.find(magic)
    while start >= 0:
        (size,) = struct.unpack_from("<Q", data, start + 8)
        at, end = start + 16, min(start + 16 + size, len(data))
        while at + 64 <= end:
            kind, _, header_size, code_size = struct.unpack_from("<HHIQ", data, at)
            (architecture,), (flags,) = struct.unpack_from("<I", data, at + 28), struct.unpack_from("<Q", data, at + 40)
            if kind not in (1, 2) or header_size < 64:
                break  # not a fat binary: the magic number by chance
            suffix = "a" if flags >> 20 & 1 else "f" if flags >> 21 & 1 else ""
            found.add(f"{'compute' if kind == 1 else 'sm'}_{architecture}{suffix}")
            at += header_size + code_size
        start = data.find(magic, start + 4)
    return sorted(found, key=lambda name: (int("".join(filter(str.isdigit, name))), name))


def _lines(values: dict, indent: str) -> list[str]:
    width = max((len(str(name)) for name in values), default=0)
    lines = []
    for name, value in values.items():
        if isinstance(value, dict):
            lines += [f"{indent}{name}", *_lines(value, indent + "  ")]
        else:
            text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
            lines.append(f"{indent}{name:<{width}}  {text}")
    return lines


def main(arguments: list[str] | None = None) -> None:
    """`python -m sparsekit.info`: prints `info()`; with --head-dim or --block-size also the plan of such a call."""
    parser = argparse.ArgumentParser(prog="python -m sparsekit.info", description=main.__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32", "float64"), default="bfloat16")
    parser.add_argument("--head-dim", type=int)
    parser.add_argument("--value-dim", type=int, help="default: the head dim")
    parser.add_argument("--block-size", type=int, nargs="+", help="one size, or query rows and keys")
    parser.add_argument("--backward", action="store_true")
    parser.add_argument("--packed", action="store_true", help="a packed batch (varlen)")
    options = vars(parser.parse_args(arguments))
    options["dtype"] = getattr(torch, options["dtype"])
    if sizes := options["block_size"]:
        options["block_size"] = (sizes[0], sizes[-1])
    print(info(**options))
