"""Recipes on a long prompt beside dense causal attention: `python -m sparsekit.bench recipes`.

Everything is in the time: scores, choice, lists, attention. The inputs have what long prompts' attention has: a sink, a
local band, and strong single columns among weak ones, different ones in each head.
"""

import argparse
import fnmatch
import json
import math
import statistics
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

from .. import recipes
from ..recipes.recipe import Recipe, Stripes
from .machine import about_this_run, machine
from .stripes import dense_backend
from .timing import Stopwatch, median_ratio

RECIPES: dict[str, Recipe] = {
    "anchor": recipes.AnchorAttention(theta=8.0),
    "vertical-slash": recipes.MInference(default=recipes.VerticalSlash(10000, 128), block_size=128),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = __doc__
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--cases", default="*", help="names or patterns, comma separated; 'list' lists them")
    parser.add_argument("--length", type=int, help="tokens (131,072 on a GPU, 8,192 on a CPU)")
    parser.add_argument("--seconds", type=float, default=1.0, help="per contender and case")
    parser.add_argument("--json", type=Path, help="write everything that was measured")


def make_inputs(length: int, heads: int, kv_heads: int, device: str, *, strong: float = 0.08, seed: int = 7):
    """query, key, value in bfloat16, D = 128. Scores in units of one: weak keys about 0, the first four 10, a share of
    `strong` keys 8, and a band of some hundred keys around 6."""
    dim, generator = 128, torch.Generator(device).manual_seed(seed)

    def noise(*shape):
        return torch.randn(*shape, generator=generator, device=device, dtype=torch.bfloat16)

    query, key, value = (noise(1, n, length, dim) for n in (heads, kv_heads, kv_heads))
    listed = torch.rand(1, kv_heads, length, generator=generator, device=device) < strong
    gain = torch.where(listed, 8.0, 0.0)
    gain[..., :4] = 10.0
    query[..., 0] += 6.0
    key[..., 0] += (gain * math.sqrt(dim) / 6.0).bfloat16()
    # cos(w (i - j)) of four frequencies: 6 at the row itself, gone some hundred keys away.
    at = torch.arange(length, device=device, dtype=torch.float32)
    for n, period in enumerate((600.0, 971.0, 1571.0, 2543.0)):
        angle = at * (2 * math.pi / period)
        for column, wave in ((1 + 2 * n, angle.cos()), (2 + 2 * n, angle.sin())):
            wave = (wave * math.sqrt(1.5 * math.sqrt(dim))).bfloat16()
            query[..., column] += wave
            key[..., column] += wave
    return query, key, value


def kept_share(choice: Stripes, length: int) -> float:
    """Share of the causal half that a choice sees, its columns and blocks counted apart, cut at the diagonal."""
    lists = choice.col_counts.float()
    rows = torch.full((lists.shape[-1],), choice.group_size, device=lists.device)
    rows[-1] -= lists.shape[-1] * choice.group_size - length
    seen = (lists * rows).sum(-1).mean().item()
    if choice.pattern is not None:
        pattern, (block_q, block_k) = choice.pattern, choice.pattern.block_size
        blocks = pattern.kv_num_blocks.float()
        if pattern.full_kv_num_blocks is not None:
            blocks = blocks + pattern.full_kv_num_blocks
        seen += blocks.sum(-1).mean().item() * block_q * block_k
        seen -= length / block_q * block_q * (block_q - 1) / 2  # the diagonal's blocks are half seen
    return seen / (length * (length + 1) / 2)


def measure(name: str, recipe: Recipe, tensors, options, stopwatch: Stopwatch) -> dict:
    query, key, value = tensors

    def dense():
        with dense_backend(options.device):
            return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)

    with torch.no_grad():
        share = kept_share(recipe.choose(query, key), query.shape[2])
        times = stopwatch.rounds({"recipe": lambda: recipe(query, key, value), "dense": dense})
    medians = {contender: statistics.median(seconds) * 1e3 for contender, seconds in times.items()}
    return {
        "case": name,
        "recipe": str(recipe),
        "length": query.shape[2],
        "heads": (query.shape[1], key.shape[1]),
        "kept": share,
        "milliseconds": medians,
        "speedup": median_ratio(times["dense"], times["recipe"]),
        "rounds": len(times["dense"]),
    }


def show(results: list[dict], options, console) -> None:
    from rich.table import Table

    title = f"Recipes against dense causal attention, {machine(options.device)}, torch {torch.__version__}, bfloat16, D = 128"
    table = Table(title=title, title_justify="left")
    for column in ("recipe", "tokens", "heads", "kept", "ms", "dense ms", "times faster"):
        table.add_column(column, justify="left" if column == "recipe" else "right")
    for result in results:
        times = result["milliseconds"]
        table.add_row(
            result["case"],
            f"{result['length']:,}",
            "{} over {}".format(*result["heads"]),
            f"{result['kept']:.1%}",
            f"{times['recipe']:.4g}",
            f"{times['dense']:.4g}",
            f"{result['speedup']:.2f}",
        )
    console.print(table)
    console.print("Dense: scaled_dot_product_attention" + (" of cuDNN." if options.device == "cuda" else "."))


def run(parser: argparse.ArgumentParser, options: argparse.Namespace) -> int:
    from rich.console import Console

    if options.cases == "list":
        print("\n".join(RECIPES))
        return 0
    chosen = [name for name in RECIPES if any(fnmatch.fnmatch(name, wanted) for wanted in options.cases.split(","))]
    if not chosen:
        parser.error(f"--cases: no case is called {options.cases}; --cases list lists them")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device: cuda found; torch sees no GPU here")
    on_gpu = options.device == "cuda"
    length, heads, kv_heads = (131072, 32, 8) if on_gpu else (8192, 4, 2)
    tensors = make_inputs(options.length or length, heads, kv_heads, options.device)
    stopwatch = Stopwatch(options.device, seconds=options.seconds)
    results = [measure(name, RECIPES[name], tensors, options, stopwatch) for name in chosen]
    show(results, options, Console(width=None if sys.stdout.isatty() else 140))
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(about_this_run(options.device) | {"cases": results}, indent=1) + "\n")
    return 0
