"""Decode attention over quantized caches beside bf16 and torch: `python -m sparsekit.bench kv_cache`.

On a GPU (`--device cuda`) every contender is a CUDA graph, replayed with cold caches; quantization and append follow."""

import argparse
import json
import statistics
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import sparsekit

from .machine import about_this_run, machine
from .timing import Stopwatch, median_ratio

FORMATS = {
    "fp8": {"bits": "fp8", "group_size": 128, "key_axis": "token"},
    "int8-sym-g128": {"bits": 8, "group_size": 128, "key_axis": "token", "symmetric": True},
    "int8-g64": {"bits": 8, "group_size": 64},
    "int4-g64": {"bits": 4, "group_size": 64},
    "int4-g128": {"bits": 4, "group_size": 128},
    "int3-g64": {"bits": 3, "group_size": 64},
    "int2-g64": {"bits": 2, "group_size": 64},
}
DEFAULT = "int8-sym-g128,int8-g64,int4-g64,int4-g128,int3-g64,int2-g64"
DEFAULT_CUDA = "fp8," + DEFAULT
SHAPES = {  # batch, query heads, key heads, tokens
    "cpu": (1, 32, 32, 8192),
    "cuda": (16, 32, 8, 32768),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = __doc__
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--formats", help=f"of {','.join(FORMATS)}")
    for place, (name, what) in enumerate(
        (
            ("batch", "sequences"),
            ("heads", "query heads"),
            ("heads-kv", "key heads"),
            ("length", "tokens of each sequence"),
        )
    ):
        default = ", ".join(f"{device} {shape[place]}" for device, shape in SHAPES.items())
        parser.add_argument(f"--{name}", type=int, help=f"{what} (default: {default})")
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--seconds", type=float, default=1.0, help="per contender")
    parser.add_argument("--no-torch", action="store_true", help="without scaled_dot_product_attention")
    parser.add_argument("--json", type=Path)


def graphed(call):
    """The call as a CUDA graph: GPU time without launches. Tensors that it makes live in the graph."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        call()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            call()
    torch.cuda.synchronize()
    return graph.replay


def torch_decodes(query, key, value) -> dict:
    """torch's scaled_dot_product_attention; on a GPU its flash kernel, which splits the sequence: query heads of a key head
    as heads, and as rows (a key head is then read once)."""
    if query.device.type == "cpu":
        grouped = query.shape[1] != key.shape[1]
        return {"torch sdpa bf16": lambda: F.scaled_dot_product_attention(query, key, value, enable_gqa=grouped)}
    rows = query.unflatten(1, (key.shape[1], -1))[:, :, :, 0]

    def flash(q, gqa):
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return F.scaled_dot_product_attention(q, key, value, enable_gqa=gqa)

    return {"torch flash bf16": lambda: flash(query, True), "torch flash bf16, rows": lambda: flash(rows, False)}


def rows_of(calls: dict, base: str, options: argparse.Namespace) -> list[dict]:
    """Times {name: (call, bytes)}; ratios to the call named `base`, which moves its bytes at the rate of the machine."""
    device = options.device
    ready = {name: graphed(call) if device == "cuda" else call for name, (call, _) in calls.items()}
    times = Stopwatch(device, seconds=options.seconds).rounds(ready)
    rows = []
    for name, (_, size) in calls.items():
        rows.append(
            {
                "name": name,
                "milliseconds": statistics.median(times[name]) * 1e3,
                "gigabytes_per_second": statistics.median(size / seconds for seconds in times[name]) / 1e9,
                "of_base": median_ratio(times[base], times[name]) * size / calls[base][1],
                "times": times[name],
            }
        )
    return rows


def measure(options: argparse.Namespace) -> list[dict]:
    device, dim = options.device, options.head_dim
    shape = (options.batch, options.heads_kv, options.length, dim)
    key, value = (torch.randn(shape, dtype=torch.bfloat16, device=device) for _ in range(2))
    query = torch.randn(options.batch, options.heads, 1, dim, dtype=torch.bfloat16, device=device)
    lengths = torch.full((options.batch,), options.length, dtype=torch.int32, device=device)
    plain = 2 * key.nbytes
    stream = torch.randn(plain // 4, device=device)  # as many bytes, read in order by torch's sum
    calls = {
        "stream": (lambda: stream.sum(), plain),
        "bf16": (lambda: sparsekit.decode_attention(query, (key, value), lengths=lengths), plain),
    }
    for name in options.formats.split(","):
        cache = sparsekit.KVCache(
            options.batch, options.heads_kv, dim, capacity=options.length, window=0, device=device, **FORMATS[name]
        )
        cache.append(key, value)
        calls[name] = (lambda cache=cache: sparsekit.decode_attention(query, cache), cache.nbytes)
    baseline = {} if options.no_torch else torch_decodes(query, key, value)
    calls |= {name: (call, plain) for name, call in baseline.items()}
    rows = rows_of(calls, "stream", options)
    # The best of torch's ways is the one to beat.
    times = {row["name"]: row.pop("times") for row in rows}
    reference = min(baseline or {"bf16": None}, key=lambda name: statistics.median(times[name]))
    if device == "cpu":
        reference = "bf16"
    for row in rows:
        row |= {"faster": median_ratio(times[reference], times[row["name"]]), "faster_than": reference}
        row |= {"of_stream": row.pop("of_base"), "rounds": len(times[row["name"]])}
    return rows


def measure_writes(options: argparse.Namespace) -> list[dict]:
    """Quantization of a prompt and append of a token, as shares of a copy's bandwidth."""
    x = torch.randn(
        options.batch, options.heads_kv, 8192, options.head_dim, dtype=torch.bfloat16, device=options.device
    )
    other = torch.empty_like(x)
    calls = {"copy": (lambda: other.copy_(x), 2 * x.nbytes)}
    for bits in (8, 4, 2, "fp8"):
        for axis, layout in (("channel", "key"), ("token", "value")):
            packing = {"bits": bits, "axis": axis, "layout": layout}
            size = x.nbytes + sum(t.nbytes for t in sparsekit.quantize_kv(x, **packing) if t is not None)
            calls[f"quantize, {bits}, {axis}"] = (lambda packing=packing: sparsekit.quantize_kv(x, **packing), size)
    cache = sparsekit.KVCache(
        options.batch, options.heads_kv, options.head_dim, capacity=8192, window=0, device=options.device
    )

    def flush():
        cache.lengths.zero_()
        torch.ops.sparsekit.kv_cache_append(*cache._arguments(), x, x)

    calls["append 8192 tokens, 4 bits"] = (flush, 2 * x.nbytes + cache.nbytes)
    one = sparsekit.KVCache(64, options.heads_kv, options.head_dim, capacity=4096, device=options.device)
    token = torch.randn(64, options.heads_kv, 1, options.head_dim, dtype=torch.bfloat16, device=options.device)
    repeats = 64  # a unit: one of the appends quantizes

    def append():
        one.lengths.zero_()
        for _ in range(repeats):
            torch.ops.sparsekit.kv_cache_append(*one._arguments(), token, token)

    calls["append 1 token, 64 sequences, x 64"] = (append, repeats * 2 * 2 * token.nbytes)
    rows = rows_of(calls, "copy", options)
    for row in rows:
        row["of_copy"] = row.pop("of_base")
        row.pop("times")
        if row["name"].endswith("x 64"):
            row["microseconds_each"] = row["milliseconds"] * 1e3 / repeats
    return rows


def run(parser: argparse.ArgumentParser, options: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.table import Table

    for name, default in zip(("batch", "heads", "heads_kv", "length"), SHAPES[options.device], strict=True):
        setattr(options, name, default if getattr(options, name) is None else getattr(options, name))
    options.formats = options.formats or (DEFAULT if options.device == "cpu" else DEFAULT_CUDA)
    unknown = [name for name in options.formats.split(",") if name not in FORMATS]
    if unknown:
        parser.error(f"--formats: {', '.join(unknown)} found; {', '.join(FORMATS)} supported")
    rows = measure(options)
    console = Console(width=None if sys.stdout.isatty() else 120)
    shape = f"batch {options.batch}, {options.heads}/{options.heads_kv} heads, {options.length} tokens, D={options.head_dim}"
    table = Table(title=f"Decode attention, {shape}; {machine(options.device)}", title_justify="left")
    for column in ("cache", "ms", "GB/s", "of stream", f"against {rows[0]['faster_than']}"):
        table.add_column(column, justify="left" if column == "cache" else "right")
    for row in rows:
        table.add_row(
            row["name"],
            f"{row['milliseconds']:.{2 if options.device == 'cpu' else 4}f}",
            f"{row['gigabytes_per_second']:.1f}",
            f"{row['of_stream']:.2f}",
            f"{row['faster']:.2f}x",
        )
    console.print(table)
    console.print("stream: torch's sum over as many bytes. Medians; ratios are medians over rounds.")
    writes = measure_writes(options) if options.device == "cuda" else []
    if writes:
        table = Table(title="Quantization and append, groups of 64, D=128", title_justify="left")
        for column in ("call", "us", "GB/s", "of copy"):
            table.add_column(column, justify="left" if column == "call" else "right")
        for row in writes:
            each = row.get("microseconds_each")
            table.add_row(
                row["name"] + (", each" if each else ""),
                f"{each or row['milliseconds'] * 1e3:.1f}",
                f"{row['gigabytes_per_second']:.1f}",
                "" if each else f"{row['of_copy']:.2f}",
            )
        console.print(table)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        result = about_this_run(options.device) | {"rows": rows, "writes": writes}
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0
