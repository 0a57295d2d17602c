"""The machine that a benchmark runs on, and what it could do at best: measured in the same run."""

import platform
import sys
from pathlib import Path

import torch

import sparsekit


def machine(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    threads = torch.get_num_threads()
    return f"{names[0] if names else platform.machine()}, {threads} thread{'s' * (threads > 1)}"


def multiply_add_peak(dtype: torch.dtype) -> float | None:
    """FLOP/s of the CPU's vector or tile units on torch's number of threads, measured now; None where it is not known, as
    without the NumPy module, which measures it."""
    try:
        from .. import _numpy
    except ImportError:
        return None
    return _numpy.multiply_add_peak(str(dtype).removeprefix("torch."), torch.get_num_threads()) or None


def about_this_run(device: str) -> dict:
    """What a table of results must say: the command, the machine, the versions."""
    return {
        "command": " ".join(["python -m sparsekit.bench", *sys.argv[1:]]),
        "machine": machine(device),
        "torch": torch.__version__,
        "sparsekit": sparsekit.__version__,
    }
