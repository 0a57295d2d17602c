"""Scores and choices beside torch's own operators composed for the same result: `python -m sparsekit.bench selection`."""

import argparse
import dataclasses
import fnmatch
import json
import math
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch

import sparsekit
from sparsekit import selection

from .machine import about_this_run, machine
from .timing import Stopwatch, median_ratio


@dataclasses.dataclass
class Case:
    """One call, what torch needs for the same result, and the bytes that must be read and written once."""

    ours: Callable
    torch: Callable
    bytes: int = 0


def _size(*tensors) -> int:
    return sum(x.numel() * x.element_size() for x in tensors)


def top_k(rows: int, columns: int, k: int):
    def make(device, scale):
        scores = torch.randn(max(1, rows // scale), columns, device=device)

        def by_torch():  # ascending, as lists are
            return scores.topk(k, -1).indices.sort(-1).values.int()

        return Case(lambda: selection.select_top_k(scores, k), by_torch, _size(scores) + len(scores) * k * 4)

    return make


def top_p(rows: int, columns: int, p: float):
    def make(device, scale):
        probs = torch.randn(max(1, rows // scale), columns, device=device).mul(3).softmax(-1)

        def by_torch():
            best, order = probs.sort(-1, descending=True)
            total = best.cumsum(-1)
            keep = total - best < p * total[:, -1:]
            chosen = torch.zeros_like(probs, dtype=torch.bool).scatter_(-1, order, keep)
            return torch.ops.sparsekit.block_lists_from_bool(chosen[None, None], columns)

        return Case(lambda: selection.select_top_p(probs, p), by_torch, 2 * _size(probs))

    return make


def threshold(rows: int, columns: int):
    def make(device, scale):
        scores = torch.randn(max(1, rows // scale), columns, device=device)
        anchor = scores.amax(-1)

        def by_torch():
            chosen = scores >= (anchor - 2.0)[:, None]
            return torch.ops.sparsekit.block_lists_from_bool(chosen[None, None], columns)

        return Case(lambda: selection.select_threshold(scores, 2.0, anchor=anchor), by_torch, 2 * _size(scores))

    return make


def _query_key(tokens: int, device):
    options = {"dtype": torch.bfloat16, "device": device}
    return torch.randn(1, 32, tokens, 128, **options), torch.randn(1, 8, tokens, 128, **options)


def _blocks(x, block=128):
    return x.unflatten(2, (-1, block))


def _causal(scores):
    rows, columns = scores.shape[-2:]
    return scores.masked_fill_(torch.ones(rows, columns, dtype=torch.bool, device=scores.device).triu(1), -math.inf)


def block_scores(tokens: int, reduce: str):
    def make(device, scale):
        query, key = _query_key(tokens // scale, device)

        def by_torch():
            if reduce == "mean":  # blocks of the diagonal are averaged whole: less than what ours computes
                q, k = (_blocks(x).mean(3, dtype=torch.float32) for x in (query, key))
                return _causal(q @ k.repeat_interleave(4, 1).transpose(-1, -2) * 128**-0.5)
            out = []
            for h in range(32):  # a head at a time: all at once need 32 x Sq x Sk
                if reduce == "max":
                    scores = _causal(query[0, h] @ key[0, h // 4].T * 128**-0.5)
                    out.append(scores.unflatten(1, (-1, 128)).unflatten(0, (-1, 128)).amax((1, 3)))
                else:
                    q = query[0, h].unflatten(0, (-1, 16)).flip(1).flatten(1)
                    k = key[0, h // 4].unflatten(0, (-1, 16)).flatten(1)
                    share = _causal((q @ k.T).float() * (128**-0.5 / 16)).softmax(-1)
                    out.append(share.unflatten(1, (-1, 8)).unflatten(0, (-1, 8)).sum((1, 3)).div(8).log())
            return torch.stack(out)

        def ours():
            return selection.block_scores(query, key, 128, reduce=reduce, causal=True)

        blocks = query.shape[2] // 128
        return Case(ours, by_torch, _size(query, key) + 32 * blocks * blocks * 4)

    return make


def choice(tokens: int, p: float):
    """Block scores, their softmax, and the lists of top-p. Beside it the dense attention that the lists are to save."""

    def make(device, scale):
        query, key = _query_key(tokens // scale, device)
        value = torch.randn_like(key)
        lengths = (query.shape[2], key.shape[2])
        limits = selection.row_limits(128, lengths, device=device)

        def ours():
            probs = selection.block_scores(query, key, 128, causal=True).softmax(-1)
            return selection.select_top_p(probs, p, sink=1, local=1, row_limit=limits)

        def dense():
            return torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)

        return Case(ours, dense, _size(query, key))

    return make


def column_scores(tokens: int, probes: int):
    def make(device, scale):
        query, key = _query_key(tokens // scale, device)
        n = key.shape[2]
        probe, positions = query[:, :, -probes:].contiguous(), torch.arange(n - probes, n, device=device)

        def by_torch():
            scores = probe @ key.repeat_interleave(4, 1).transpose(-1, -2)
            hidden = positions[:, None] < torch.arange(n, device=device)
            share = (scores.float() * 128**-0.5).masked_fill_(hidden, -math.inf).softmax(-1)
            distance = (positions[:, None] - torch.arange(n, device=device)).clamp(min=-1).add(1)
            diagonals = torch.zeros(1, 32, n + 1, device=device)
            diagonals.index_add_(2, distance.flatten(), share.flatten(2))
            return share.sum(2), diagonals[..., 1:]

        return Case(lambda: selection.column_scores(probe, key, positions), by_torch, 2 * _size(key))

    return make


def row_scores(tokens: int):
    def make(device, scale):
        query, key = _query_key(tokens // scale, device)
        lse = torch.randn(1, 32, query.shape[2], device=device) + 9

        def by_torch():
            out = []
            for h in range(32):
                scores = (query[0, h] @ key[0, h // 4].T).float() * 128**-0.5
                out.append((_causal(scores) - lse[0, h, :, None]).exp().sum(0))
            return torch.stack(out)

        return Case(lambda: selection.row_scores(query, key, lse, causal=True), by_torch)

    return make


def block_map(tokens: int):
    def make(device, scale):
        query, key = _query_key(tokens // scale, device)
        lse = torch.randn(1, 32, query.shape[2], device=device) + 9

        def by_torch():
            out = []
            for h in range(32):
                scores = (query[0, h] @ key[0, h // 4].T).float() * 128**-0.5
                share = (_causal(scores) - lse[0, h, :, None]).exp()
                out.append(share.unflatten(1, (-1, 128)).unflatten(0, (-1, 128)).amax((1, 3)))
            return torch.stack(out)

        return Case(lambda: selection.attention_block_map(query, key, lse, 128, causal=True), by_torch)

    return make


def lists_from_bool(blocks: int, capacity: int, transpose: bool):
    def make(device, scale):
        block_map = torch.rand(1, max(1, 32 // scale), blocks, blocks, device=device) < 0.1
        if not transpose:

            def by_torch():
                order = block_map.to(torch.int8).argsort(dim=-1, descending=True, stable=True)[..., :capacity]
                return block_map.sum(-1, dtype=torch.int32), order.int()

            return Case(lambda: selection.block_lists_from_bool(block_map, capacity), by_torch, _size(block_map))
        pattern = sparsekit.BlockPattern.from_bool(block_map, 64, capacity=capacity)
        lists = (pattern.kv_num_blocks, pattern.kv_indices, None, None, (64, 64), blocks * 64)

        def by_torch():
            counts = block_map.sum(-2, dtype=torch.int32).cumsum(-1)
            return counts, block_map.transpose(-1, -2).nonzero()

        return Case(lambda: torch.ops.sparsekit.transpose_block_lists(*lists), by_torch, _size(block_map))

    return make


CASES = {
    "top-k-131072": top_k(512, 131072, 2048),
    "top-k-1024": top_k(4096, 1024, 102),
    "top-p-1024": top_p(4096, 1024, 0.9),
    "top-p-131072": top_p(64, 131072, 0.9),
    "threshold-1024": threshold(4096, 1024),
    "block-mean-32k": block_scores(32768, "mean"),
    "block-mean-128k": block_scores(131072, "mean"),
    "block-max-4k": block_scores(4096, "max"),
    "block-antidiagonal-8k": block_scores(8192, "antidiagonal"),
    "columns-32k": column_scores(32768, 64),
    "columns-128k": column_scores(131072, 64),
    "rows-4k": row_scores(4096),
    "map-4k": block_map(4096),
    "lists-from-bool": lists_from_bool(1024, 128, False),
    "transpose": lists_from_bool(1024, 128, True),
    "choice-128k": choice(131072, 0.9),
}

CUDA_ALONE = ("columns-128k", "choice-128k")  # minutes and hours on a CPU: there only where they are named


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = __doc__
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--cases", default="*", help="names or patterns, comma separated; 'list' lists them")
    parser.add_argument("--seconds", type=float, default=1.0, help="per contender and case")
    parser.add_argument("--scale", type=int, default=1, help="divides the rows or tokens of each case")
    parser.add_argument("--json", type=Path, help="write everything that was measured")


def measure(name: str, options, stopwatch: Stopwatch) -> dict:
    case = CASES[name](options.device, options.scale)
    words = torch.ones(max(case.bytes // 4, 1), device=options.device)  # the yardstick reads as much
    calls = {"ours": case.ours, "torch": case.torch, "read": words.sum}
    times = stopwatch.rounds(calls)
    seconds = {key: statistics.median(value) for key, value in times.items()}
    return {
        "case": name,
        "milliseconds": seconds["ours"] * 1e3,
        "torch_milliseconds": seconds["torch"] * 1e3,
        "speedup": median_ratio(times["torch"], times["ours"]),
        "gigabytes_per_second": case.bytes / seconds["ours"] / 1e9 if case.bytes else None,
        "share_of_read": median_ratio(times["read"], times["ours"]) if case.bytes else None,
        "rounds": len(times["ours"]),
    }


def run(parser: argparse.ArgumentParser, options: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.table import Table

    if options.cases == "list":
        print("\n".join(CASES))
        return 0
    wanted = options.cases.split(",")
    names = [name for name in CASES if any(fnmatch.fnmatch(name, pattern) for pattern in wanted)]
    if options.device == "cpu":
        names = [name for name in names if name not in CUDA_ALONE or name in wanted]
    if not names:
        parser.error(f"--cases: no case is called {options.cases}; --cases list lists them")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device: cuda found; torch sees no GPU here")
    console = Console(width=None if sys.stdout.isatty() else 140)
    stopwatch = Stopwatch(options.device, seconds=options.seconds, least=3)
    results = [measure(name, options, stopwatch) for name in names]
    title = f"Selection, {machine(options.device)}, torch {torch.__version__}"
    table = Table(title=title, title_justify="left")
    for column in ("case", "ms", "torch, ms", "time / ours", "GB/s", "of a plain read"):
        table.add_column(column, justify="left" if column == "case" else "right", no_wrap=True)
    for r in results:
        rate, share = r["gigabytes_per_second"], r["share_of_read"]
        cells = (f"{r['milliseconds']:.3g}", f"{r['torch_milliseconds']:.3g}", f"{r['speedup']:.1f}x")
        table.add_row(r["case"], *cells, f"{rate:.1f}" if rate else "-", f"{share:.0%}" if share else "-")
    console.print(table)
    console.print(
        "torch: its operators composed for the same lists or scores. of a plain read: the time torch.sum takes over as "
        "many bytes, in the same rounds. Medians."
    )
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(about_this_run(options.device) | {"cases": results}, indent=1) + "\n")
    return 0
