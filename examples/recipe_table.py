"""What each recipe costs on a real model: `long_prompt.py --recipe all`, or the names of some.

Every recipe at some budgets, each beside the control that knows nothing of the prompt: as many keys, but the first 64
and the last (StreamingLLM). Density is the share of the (query, key) pairs that causality allows.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from long_prompt import Run, judge, prefill
from rich.console import Console
from rich.progress import track
from rich.table import Table

from sparsekit import BlockPattern, recipes
from sparsekit.recipes import AShape, BlockSparse, MInference, VerticalSlash

SINK = 64  # of the control


def budgets(tokens: int) -> dict[str, list]:
    """Small to large, of every recipe that chooses causally from one prompt. Sizes scale with the prompt."""

    def of(share: float) -> int:
        return max(1, round(share * tokens))

    return {
        "AnchorAttention": [recipes.AnchorAttention(theta, 4) for theta in (4.0, 6.0, 8.0, 10.0)],
        "MInference vertical-slash": [
            MInference(default=VerticalSlash(of(v), of(s), sink=30, local=min(100, of(s))))
            for v, s in ((0.01, 0.01), (0.03, 0.03), (0.06, 0.1), (0.12, 0.3))
        ],
        "MInference block-sparse": [MInference(default=BlockSparse(of(s) // 64)) for s in (0.03, 0.06, 0.15, 0.3)],
        "MInference A-shape": [MInference(default=AShape(64, of(s))) for s in (0.03, 0.06, 0.15, 0.3)],
        "SampleAttention": [recipes.SampleAttention(a, window_ratio=w) for a, w in
                            ((0.6, 0.02), (0.8, 0.04), (0.9, 0.08), (0.95, 0.08))],
        "XAttention": [recipes.XAttention(t, 8, 64) for t in (0.7, 0.8, 0.9, 0.95)],
        "FlexPrefill": [recipes.FlexPrefill(g, 0.1, 256, 64) for g in (0.6, 0.8, 0.9, 0.95)],
        "SpargeAttn": [recipes.SpargeAttn(s, c, (64, 64)) for s, c in ((-1, 0.7), (-1, 0.9), (0.3, 0.95), (0.6, 0.98))],
        "TokenSparseAttention": [recipes.TokenSparseAttention(k, recent=64) for k in (0.25, 0.5, 0.75)],
    }  # fmt: skip


def share_of_pairs(recipe, query, key, layer: int) -> float:
    """Of the pairs that causality allows, those that are looked at; the mean over heads."""
    lengths = query.shape[2], key.shape[2]
    if isinstance(recipe, recipes.TokenSparseAttention):
        kept = recipe.tokens(query, key).shape[-1]
        return kept * (kept + 1) / (lengths[0] * (lengths[0] + 1))
    choice = recipe.choose(query, key, layer=layer)
    total = 0
    heads = query.shape[1]
    for head in range(heads):  # one head's mask at a time: 8,192 tokens are 64 MB
        total += int(_one_head(choice, head, heads, lengths).sum())
    return total / heads / (lengths[0] * (lengths[0] + 1) / 2)


def _one_head(choice, head: int, heads: int, lengths) -> torch.Tensor:
    def of(lists):
        return lists[:, head * lists.shape[1] // heads :][:, :1]

    def pattern_of(pattern):
        names = ("kv_num_blocks", "kv_indices", "full_kv_num_blocks", "full_kv_indices")
        tensors = [getattr(pattern, name) for name in names]
        return BlockPattern(
            *(None if t is None else of(t) for t in tensors),
            block_size=pattern.block_size,
            seq_lengths=lengths,
            causal=True,
        )

    if isinstance(choice, BlockPattern):
        return pattern_of(choice).to_token_mask()
    alone = recipes.Stripes(
        of(choice.col_indices), of(choice.col_counts), choice.group_size, choice.sink, choice.local,
        choice.pattern and pattern_of(choice.pattern),
    )  # fmt: skip
    return alone.to_token_mask(lengths)


def control(density: float, tokens: int) -> recipes.StreamingLLM:
    """The sink and as wide a window as this density pays for: of S keys, a window w sees about w S - w^2 / 2 pairs."""
    pairs = density * tokens * (tokens + 1) / 2 - SINK * tokens
    low, high = 1, tokens
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if middle * tokens - middle**2 / 2 <= pairs else (low, middle - 1)
    return recipes.StreamingLLM(SINK, low)


def run_recipe(model, ids, recipe, name: str, dense_hidden, last: int) -> Run:
    run, hidden = prefill(model, ids, recipe, lambda: None, share_of_pairs)
    run.selection = name
    judge(run, model, hidden, dense_hidden, ids, last)
    return run


def main(model, ids, options, title: str, console: Console):
    tokens = ids.shape[1]
    last = min(4096, tokens // 2)
    wanted = budgets(tokens)
    if options.recipe != "all":
        names = options.recipe.split(",")
        unknown = [name for name in names if name not in wanted]
        if unknown:
            raise SystemExit(f"--recipe: found {', '.join(unknown)}; supported: all, {', '.join(wanted)}")
        wanted = {name: wanted[name] for name in names}
    prefill(model, ids[:, :512], None, lambda: None)
    dense, dense_hidden = prefill(model, ids, None, lambda: None)
    judge(dense, model, dense_hidden, dense_hidden, ids, last)
    rows = [(dense, None, None)]
    plan = [(name, recipe) for name, sizes in wanted.items() for recipe in sizes]
    for name, recipe in track(plan, "recipes", console=console, transient=True):
        run = run_recipe(model, ids, recipe, name, dense_hidden, last)
        beside = run_recipe(model, ids, control(run.density, tokens), "control", dense_hidden, last)
        rows.append((run, beside, recipe))
    report(rows, title, options.out, console)


def report(rows, title: str, out: Path, console: Console):
    header = ("recipe", "density", "perplexity", "loss", "KL", "same top-1", "attention / dense", "control's loss")
    dense = rows[0][0]

    def loss(run):
        return f"{run.perplexity / dense.perplexity - 1:+.1%}"

    lines = [("dense", "100%", f"{dense.perplexity:.2f}", "", "", "", "1", "")]
    for run, beside, _ in rows[1:]:
        lines.append((
            run.selection, f"{run.density:.1%}", f"{run.perplexity:.2f}", loss(run), f"{run.kl:.3f}", f"{run.agreement:.1%}",
            f"{run.attention / dense.attention:.2f}", loss(beside),
        ))  # fmt: skip
    table = Table(title=title, title_justify="left")
    for column in header:
        table.add_column(column, justify="left" if column == "recipe" else "right", no_wrap=column == "recipe")
    for line in lines:
        table.add_row(*line)
    console.print(table)
    markdown = ["| " + " | ".join(header) + " |", "|---|" + "---:|" * (len(header) - 1)]
    markdown += ["| " + " | ".join(line) + " |" for line in lines]
    (out / "recipes.md").write_text("\n".join([title.replace("\n", "; "), "", *markdown]) + "\n")
    records = [
        {"name": run.selection, "recipe": repr(recipe), "density": run.density, "perplexity": run.perplexity, "kl": run.kl,
         "agreement": run.agreement, "attention": run.attention, "control": beside and beside.perplexity}
        for run, beside, recipe in rows
    ]  # fmt: skip
    (out / "recipes.json").write_text(json.dumps({"title": title, "runs": records}, indent=1))
    draw(rows, title, out / "recipes.png")
    console.print(f"Figure: {out}/recipes.png")


def draw(rows, title: str, file: Path):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    dense = rows[0][0].perplexity
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    names = list(dict.fromkeys(run.selection for run, _, _ in rows[1:]))
    for number, name in enumerate(names):
        points = sorted((run.density, run.perplexity / dense - 1) for run, _, _ in rows[1:] if run.selection == name)
        axes.plot(*zip(*points, strict=True), "o-", ms=4, lw=1.2, color=f"C{number}", label=name)
    points = sorted((beside.density, beside.perplexity / dense - 1) for _, beside, _ in rows[1:])
    axes.plot(*zip(*points, strict=True), "--", color="0.5", lw=1, label="control: first and last keys")
    axes.set_xscale("log")
    axes.set_yscale("symlog", linthresh=0.01)
    axes.set_ylim(bottom=min(0.0, min(run.perplexity / dense - 1 for run, _, _ in rows[1:])) - 0.001)
    axes.axhline(0.01, color="0.8", lw=0.8)
    axes.set(xlabel="share of causal pairs attended to", ylabel="perplexity above dense (0.01 = 1 %)")
    axes.set_title(title, fontsize=8, color="0.3")
    axes.legend(fontsize=7, frameon=False)
    figure.savefig(file, dpi=150)
