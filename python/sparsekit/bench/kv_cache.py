"""Decode attention over quantized caches beside bf16 and torch: `python -m sparsekit.bench kv_cache`."""

import argparse
import json
import statistics
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

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


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = __doc__
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--formats", default=DEFAULT, help=f"of {','.join(FORMATS)}")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--heads", type=int, default=32, help="query heads")
    parser.add_argument("--heads-kv", type=int, default=32)
    parser.add_argument("--length", type=int, default=8192, help="tokens of each sequence")
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--seconds", type=float, default=1.0, help="per contender")
    parser.add_argument("--no-torch", action="store_true", help="without scaled_dot_product_attention")
    parser.add_argument("--json", type=Path)


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
    if not options.no_torch:
        grouped = options.heads != options.heads_kv
        calls["torch sdpa bf16"] = (
            lambda: F.scaled_dot_product_attention(query, key, value, enable_gqa=grouped),
            plain,
        )
    times = Stopwatch(device, seconds=options.seconds).rounds({name: call for name, (call, _) in calls.items()})
    rows = []
    for name, (_, size) in calls.items():
        rate = [size / seconds for seconds in times[name]]
        rows.append(
            {
                "name": name,
                "milliseconds": statistics.median(times[name]) * 1e3,
                "gigabytes_per_second": statistics.median(rate) / 1e9,
                "of_stream": median_ratio(times["stream"], times[name]) * size / plain,
                "faster_than_bf16": median_ratio(times["bf16"], times[name]),
                "rounds": len(times[name]),
            }
        )
    return rows


def run(parser: argparse.ArgumentParser, options: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.table import Table

    unknown = [name for name in options.formats.split(",") if name not in FORMATS]
    if unknown:
        parser.error(f"--formats: {', '.join(unknown)} found; {', '.join(FORMATS)} supported")
    rows = measure(options)
    console = Console(width=None if sys.stdout.isatty() else 120)
    shape = f"batch {options.batch}, {options.heads}/{options.heads_kv} heads, {options.length} tokens, D={options.head_dim}"
    table = Table(title=f"Decode attention, {shape}; {machine(options.device)}", title_justify="left")
    for column in ("cache", "ms", "GB/s", "of stream", "against bf16"):
        table.add_column(column, justify="left" if column == "cache" else "right")
    for row in rows:
        table.add_row(
            row["name"],
            f"{row['milliseconds']:.2f}",
            f"{row['gigabytes_per_second']:.1f}",
            f"{row['of_stream']:.2f}",
            f"{row['faster_than_bf16']:.2f}x",
        )
    console.print(table)
    console.print("stream: torch's sum over as many bytes. Medians; ratios are medians over rounds.")
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(about_this_run(options.device) | {"rows": rows}, indent=1) + "\n")
    return 0
