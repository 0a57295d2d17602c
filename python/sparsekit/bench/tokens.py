"""Token movers beside eager torch and a plain copy of their bytes: `python -m sparsekit.bench tokens`.

On CUDA the working sets are more than four times an H200's L2 cache (50 MB), and each contender is captured in a CUDA graph, so that the
time is the device's.
"""

import argparse
import ctypes
import dataclasses
import fnmatch
import itertools
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch

import sparsekit

from .machine import about_this_run, machine
from .timing import Stopwatch, median_ratio


@dataclasses.dataclass
class Problem:
    """Calls to compare: "sparsekit" first. `bytes`: what a copy of the same tokens reads and writes."""

    calls: dict[str, Callable[[], object]]
    bytes: int


def _grad(forward: Callable, *leaves: torch.Tensor) -> Callable:
    """The backward of one forward that has run."""
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    out = forward(*leaves)
    grad = torch.randn_like(out)
    return lambda: torch.autograd.grad(out, leaves, grad, retain_graph=True)


def gather(row_bytes: int, device: str) -> Problem:
    """96 MB of rows of a 512 MB tensor; on CUDA 256 MB of 2 GB."""
    kept, of = (96 << 20, 512 << 20) if device == "cpu" else (256 << 20, 2 << 30)
    x = torch.randn(1, of // row_bytes, row_bytes // 4, device=device)
    index = torch.randint(0, x.shape[1], (1, kept // row_bytes), device=device)
    parts = [part for part in x.split(index.shape[1], 1) if part.shape[1] == index.shape[1]]
    into = torch.empty_like(parts[0])
    part = itertools.cycle(parts)  # where memory is not equally far everywhere, copies see all of it, as gathers do
    calls = {
        "sparsekit": lambda: sparsekit.gather_tokens(x, index),
        "copy of as many bytes": lambda: into.copy_(next(part)),
        "torch clone": lambda: next(part).clone(),
        "torch index_select": lambda: x[0].index_select(0, index[0]),
    }
    return Problem(calls, 2 * into.nbytes)


def gather_several(device: str) -> Problem:
    """Hidden states, residual, positions, and rotary tables of [8, 4096] tokens (CUDA: [64, 4096]), half of them kept."""
    samples = 8 if device == "cpu" else 64
    x, residual = (torch.randn(samples, 4096, 1024, device=device, dtype=torch.bfloat16) for _ in range(2))
    tables = [torch.randn(samples, 4096, 64, device=device) for _ in range(2)]
    tensors = [x, residual, torch.arange(4096, device=device).expand(samples, -1), *tables]
    index = torch.stack([torch.randperm(4096, device=device)[:2048].sort().values for _ in range(samples)])
    copies = [tensor[:, :2048].clone() for tensor in tensors]
    one = torch.randn(samples, 4096, 2304, device=device, dtype=torch.bfloat16)  # their bytes but for the positions

    def eager():
        return [
            tensor.gather(1, index.view(samples, -1, *[1] * (tensor.dim() - 2)).expand(-1, -1, *tensor.shape[2:]))
            for tensor in tensors
        ]

    calls = {
        "sparsekit": lambda: sparsekit.gather_tokens(tensors, index),
        "sparsekit, one by one": lambda: [sparsekit.gather_tokens(tensor, index) for tensor in tensors],
        "sparsekit, one tensor of as many bytes": lambda: sparsekit.gather_tokens(one, index),
        "torch clone": lambda: [copy.clone() for copy in copies],
        "torch gather": eager,
    }
    return Problem(calls, 2 * sum(copy.nbytes for copy in copies))


def scatter_add(device: str) -> Problem:
    """bf16 rows of 8 KB (CUDA: 256 MB of them), two for each of the targets."""
    rows = 4096 if device == "cpu" else 32768
    src = torch.randn(1, rows, 4096, device=device, dtype=torch.bfloat16)
    index = torch.randperm(rows, device=device)[None] // 2
    zeros = torch.zeros(rows // 2, 4096, device=device, dtype=torch.bfloat16)
    calls = {
        "sparsekit": lambda: sparsekit.scatter_tokens(src, index, rows // 2, reduce="add"),
        "copy of as many bytes": src[:, : rows * 3 // 4].clone,
        "torch index_add": lambda: zeros.index_add(0, index[0], src[0]),
    }
    return Problem(calls, src.nbytes * 3 // 2)


# ---- Token Merging


def eager_merge(x: torch.Tensor, source, target, rest) -> torch.Tensor:
    """Token Merging's merge as its users write it: gather, scatter_reduce, concatenate."""
    even, odd = x[:, ::2], x[:, 1::2]
    wide = (-1, -1, x.shape[-1])
    merged = odd.scatter_reduce(1, target.expand(wide), even.gather(1, source.expand(wide)), reduce="sum")
    return torch.cat([even.gather(1, rest.expand(wide)), merged], 1)


def eager_match(metric: torch.Tensor, r: int):
    unit = metric / metric.norm(dim=-1, keepdim=True)
    best, place = (unit[:, ::2] @ unit[:, 1::2].transpose(1, 2)).max(-1)
    order = best.argsort(-1, descending=True)[..., None]
    source, rest = order[:, :r], order[:, r:]
    return source, place[..., None].gather(1, source), rest


def eager_tome(x: torch.Tensor, sizes: torch.Tensor, match) -> torch.Tensor:
    return eager_merge(x * sizes, *match) / eager_merge(sizes, *match)


def _tome_inputs(dtype: torch.dtype, device: str, samples: int = 64):
    x = torch.randn(samples, 576, 1024, device=device).to(dtype)
    return x, torch.ones(samples, 576, 1, device=device, dtype=dtype), 128


def tome(dtype: torch.dtype, device: str) -> Problem:
    x, sizes, r = _tome_inputs(dtype, device)
    flat = sizes[..., 0].float()
    match = sparsekit.bipartite_match(x, r)
    calls = {
        "sparsekit": lambda: sparsekit.merge_tokens(x, sparsekit.bipartite_match(x, r), flat),
        "sparsekit, match alone": lambda: sparsekit.bipartite_match(x, r),
        "sparsekit, merge alone": lambda: sparsekit.merge_tokens(x, match, flat),
        "torch eager": lambda: eager_tome(x, sizes, eager_match(x, r)),
    }
    return Problem(calls, x.nbytes * (576 + 448) // 576)


def merge_backward(dtype: torch.dtype, device: str) -> Problem:
    x, sizes, r = _tome_inputs(dtype, device, 64 if device == "cpu" else 256)
    match, eager = sparsekit.bipartite_match(x, r), eager_match(x, r)
    flat = sizes[..., 0].float()
    calls = {
        "sparsekit": _grad(lambda x: sparsekit.merge_tokens(x, match, flat)[0], x),
        "torch eager": _grad(lambda x: eager_tome(x, sizes, eager), x),
        "copy of as many bytes": x[: x.shape[0] * (576 + 448) // 1152].clone,
    }
    return Problem(calls, x.nbytes * (576 + 448) // 576)


def gather_backward(dtype: torch.dtype, device: str) -> Problem:
    """Half of the tokens kept: the gradient of the others is zero."""
    samples = 64 if device == "cpu" else 256
    x = torch.randn(samples, 576, 1024, device=device).to(dtype)
    index = torch.stack([torch.randperm(576, device=device)[:288].sort().values for _ in range(samples)])
    batch = torch.arange(samples, device=device)[:, None]
    calls = {
        "sparsekit": _grad(lambda x: sparsekit.gather_tokens(x, index), x),
        "torch gather": _grad(lambda x: x.gather(1, index[..., None].expand(-1, -1, 1024)), x),
        "torch x[batch, index]": _grad(lambda x: x[batch, index], x),
        "copy of as many bytes": x[: samples * 3 // 4].clone,
    }
    return Problem(calls, x.nbytes * 3 // 2)


CASES: dict[str, Callable[[str], Problem]] = {
    **{f"gather-{n}": (lambda device, n=n: gather(n, device)) for n in (512, 2048, 8192)},
    "gather-5-tensors": gather_several,
    "scatter-add-bf16": scatter_add,
    "tome-fp32": lambda device: tome(torch.float32, device),
    "tome-bf16": lambda device: tome(torch.bfloat16, device),
    "gather-backward-fp32": lambda device: gather_backward(torch.float32, device),
    "gather-backward-bf16": lambda device: gather_backward(torch.bfloat16, device),
    "merge-backward-fp32": lambda device: merge_backward(torch.float32, device),
    "merge-backward-bf16": lambda device: merge_backward(torch.bfloat16, device),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = __doc__
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--cases", default="*", help="names or patterns, comma separated; 'list' lists them")
    parser.add_argument("--seconds", type=float, default=1.0, help="per contender and case")
    parser.add_argument(
        "--fresh-memory",
        action="store_true",
        help="CPU: let every large result come from the operating system, as glibc does; otherwise the process keeps its "
        "memory for all contenders, as with a caching allocator",
    )
    parser.add_argument("--json", type=Path, help="write everything that was measured")


def keep_memory() -> None:
    """From now on glibc gives nothing back: a large result needs no new pages, whose clearing costs more than a copy."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return
    mmap_threshold, trim_threshold, top_pad = -3, -1, -2
    for option, value in ((mmap_threshold, 1 << 30), (trim_threshold, (1 << 31) - 1), (top_pad, 256 << 20)):
        mallopt(option, value)


def captured(call: Callable) -> Callable:
    """The kernels of a call as a CUDA graph, on the current stream (which must not be the default one)."""
    for _ in range(2):
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
        result = call()
    return lambda: (graph.replay(), result)


def measure(name: str, device: str, stopwatch: Stopwatch) -> dict:
    if device == "cuda" and torch.cuda.current_stream() == torch.cuda.default_stream():
        with torch.cuda.stream(torch.cuda.Stream()):
            return measure(name, device, stopwatch)
    problem = CASES[name](device)
    calls = problem.calls
    if device == "cuda":
        calls = {contender: captured(call) for contender, call in calls.items()}
    times = stopwatch.rounds(calls)
    rows = [
        {
            "name": contender,
            "milliseconds": statistics.median(seconds) * 1e3,
            "gigabytes_per_second": problem.bytes / statistics.median(seconds) / 1e9,
            "speedup_of_sparsekit": median_ratio(seconds, times["sparsekit"]),
            "rounds": len(seconds),
        }
        for contender, seconds in times.items()
    ]
    return {"case": name, "bytes": problem.bytes, "results": rows}


def show(results: list[dict], device: str, console) -> None:
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=f"Tokens, {machine(device)}, torch {torch.__version__}", title_justify="left")
    for column in ("case", "contender", "ms", "GB/s", "time / ours"):
        table.add_column(column, justify="left" if column in ("case", "contender") else "right", no_wrap=True)
    for result in results:
        for row in result["results"]:
            mine = row["name"] == "sparsekit"
            table.add_row(
                result["case"] if mine else "",
                escape(row["name"]),
                f"{row['milliseconds']:.3g}",
                f"{row['gigabytes_per_second']:.3g}",
                "" if mine else f"{row['speedup_of_sparsekit']:.2f}x",
                style="bold" if mine else None,
            )
    console.print(table)
    console.print(
        "GB/s: the bytes that the operation must read and write, over the time. Medians; ratios are medians over rounds."
    )


def run(parser: argparse.ArgumentParser, options: argparse.Namespace) -> int:
    from rich.console import Console

    if options.cases == "list":
        print("\n".join(CASES))
        return 0
    names = [name for name in CASES if any(fnmatch.fnmatch(name, wanted) for wanted in options.cases.split(","))]
    if not names:
        parser.error(f"--cases: no case is called {options.cases}; --cases list lists them")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device: cuda found; torch sees no GPU here")
    if options.device == "cpu" and not options.fresh_memory:
        keep_memory()
    stopwatch = Stopwatch(options.device, seconds=options.seconds)
    results = [measure(name, options.device, stopwatch) for name in names]
    show(results, options.device, Console(width=None if sys.stdout.isatty() else 110))
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(about_this_run(options.device) | {"cases": results}, indent=1) + "\n")
    return 0
