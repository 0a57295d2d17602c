"""Draws what the scores of docs/selection.md see, on one made-up attention head: python examples/draw_selection.py

Writes docs/images/selection_*.png. Needs matplotlib.
"""

import argparse
import math
from pathlib import Path

import matplotlib
import torch

from sparsekit import selection

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402

TOKENS, BLOCK, DIM = 512, 32, 64


def head() -> tuple[torch.Tensor, torch.Tensor]:
    """Query and key whose attention has what heads of trained models have: a sink, a few columns that every row wants, the
    near past, one distance of its own, and passages that attend to passages."""
    torch.manual_seed(5)
    position = torch.arange(TOKENS)
    topic = torch.randn(4, 16)[torch.tensor([0, 1, 2, 0, 3, 1, 0, 2])].repeat_interleave(TOKENS // 8, 0)
    topic[250:330] = torch.randn(80, 16)  # a passage without a topic
    angle = position[:, None] * (0.9 ** torch.arange(12)) * 1.3
    waves = torch.cat([angle.cos(), angle.sin()], -1)
    shifted = torch.cat([(angle - 150 * angle[1:2]).cos(), (angle - 150 * angle[1:2]).sin()], -1)
    wanted = torch.zeros(TOKENS, 1)
    wanted[[0, 1, 97, 260]] = torch.tensor([14.0, 10.0, 13.0, 12.0])[:, None]
    ones = torch.ones(TOKENS, 1)
    query = torch.cat([topic, 1.2 * waves + 1.1 * shifted, 2 * ones, torch.randn(TOKENS, 23)], -1)
    key = torch.cat([0.7 * topic, 1.5 * waves, wanted, 0.8 * torch.randn(TOKENS, 23)], -1)
    return query[None, None], key[None, None]


def dense(query, key):
    score = query @ key.transpose(-1, -2) * DIM**-0.5 * 2
    score = score.masked_fill(torch.ones(TOKENS, TOKENS, dtype=torch.bool).triu(1), -math.inf)
    return score.softmax(-1)[0, 0], score.logsumexp(-1)


def show(axis, image, title, **options):
    axis.imshow(image, cmap="magma", interpolation="nearest", aspect="auto", **options)
    axis.set_title(title, fontsize=9)
    axis.set_xticks([])
    axis.set_yticks([])


def draw_block_scores(folder, query, key, weights, lse):
    figure, axes = pyplot.subplots(1, 5, figsize=(13, 3), layout="constrained")
    show(axes[0], weights.clamp(min=1e-6).log10(), "attention, log scale", vmin=-5)
    for axis, reduce in zip(axes[1:4], ("mean", "max", "antidiagonal"), strict=True):
        scores = selection.block_scores(query, key, BLOCK, reduce=reduce, causal=True, scale=2 * DIM**-0.5)
        show(axis, scores.softmax(-1)[0, 0].clamp(min=1e-6).log10(), f'block_scores, "{reduce}"\nsoftmax', vmin=-4)
    pooled = selection.attention_block_map(query, key, lse, BLOCK, causal=True, scale=2 * DIM**-0.5, reduce="sum")
    show(axes[4], (pooled[0, 0] / BLOCK).clamp(min=1e-6).log10(), 'attention_block_map, "sum"\nthe truth', vmin=-4)
    figure.savefig(folder / "selection_block_scores.png", dpi=110)


def draw_similarity(folder, query, key):
    _, of_query, of_key = selection.block_scores(query, key, BLOCK, self_similarity=True)
    figure, axes = pyplot.subplots(figsize=(6, 2.2), layout="constrained")
    axes.step(range(TOKENS // BLOCK), of_query[0, 0], where="mid", label="q_similarity")
    axes.step(range(TOKENS // BLOCK), of_key[0, 0], where="mid", label="k_similarity")
    axes.set_xlabel("block")
    axes.set_ylabel("mean cosine")
    axes.set_ylim(0, 1)
    axes.legend(fontsize=8)
    figure.savefig(folder / "selection_similarity.png", dpi=110)


def draw_lines(folder, query, key, weights):
    probes = torch.arange(TOKENS - 64, TOKENS)
    columns, diagonals = selection.column_scores(query[:, :, -64:], key, probes, scale=2 * DIM**-0.5)
    figure, axes = pyplot.subplots(1, 4, figsize=(13, 3), layout="constrained", width_ratios=(1, 1.2, 1.2, 1))
    probed = weights.clamp(min=1e-6).log10()
    probed[:-64] -= 2
    show(axes[0], probed, "attention; the probe rows lit", vmin=-7, vmax=0)
    for axis, values, name in ((axes[1], columns, "key"), (axes[2], diagonals, "distance")):
        axis.plot(values[0, 0])
        axis.set_yscale("log")
        axis.set_ylim(1e-3, 64)
        axis.set_xlabel(name)
        axis.set_title(f"column_scores: {'columns' if name == 'key' else 'diagonals'}", fontsize=9)
    vertical, _ = selection.select_top_k(columns, 6)
    slash, _ = selection.select_top_k(diagonals, 5, sink=1)
    lists = selection.vertical_slash_lists(vertical, slash, BLOCK, (TOKENS, TOKENS))
    image = torch.zeros(TOKENS, TOKENS)
    for m in range(TOKENS // BLOCK):
        rows = slice(m * BLOCK, (m + 1) * BLOCK)
        for n in lists.indices[0, 0, m, : lists.counts[0, 0, m]].tolist():
            image[rows, n * BLOCK : (n + 1) * BLOCK] = 0.6
        for j in lists.column_indices[0, 0, m, : lists.column_counts[0, 0, m]].tolist():
            image[rows, j : j + 4] = 1  # wider than it is, to be seen
    show(axes[3], image.tril(), "vertical_slash_lists:\nblocks, and columns beside them", vmin=0, vmax=1)
    figure.savefig(folder / "selection_lines.png", dpi=110)


def draw_rows(folder, query, key, lse):
    figure, axes = pyplot.subplots(figsize=(8, 2.4), layout="constrained")
    options = {"causal": True, "scale": 2 * DIM**-0.5}
    last = torch.arange(TOKENS - 16, TOKENS)
    axes.plot(selection.row_scores(query, key, lse, **options)[0, 0], label="all rows, sum")
    axes.plot(selection.row_scores(query, key, lse, rows=last, **options)[0, 0], label="the last 16 rows, sum")
    axes.plot(selection.row_scores(query, key, lse, reduce="max", **options)[0, 0], label="all rows, max", lw=0.8)
    axes.set_yscale("log")
    axes.set_ylim(1e-3, 300)
    axes.set_xlabel("key")
    axes.set_title("row_scores: attention that each key receives", fontsize=9)
    axes.legend(fontsize=8)
    figure.savefig(folder / "selection_rows.png", dpi=110)


def draw_choices(folder, query, key):
    scores = selection.block_scores(query, key, BLOCK, causal=True, scale=2 * DIM**-0.5)
    probs, limits = scores.softmax(-1), selection.row_limits(BLOCK, (TOKENS, TOKENS))
    always = {"sink": 1, "local": 2, "row_limit": limits}
    choices = {
        "select_top_k, k = 6": selection.select_top_k(scores, 6, **always),
        "select_top_p, p = 0.8": selection.select_top_p(probs, 0.8, **always),
        'select_top_p, p = 0.8,\nscope = "head"': selection.select_top_p(probs, 0.8, scope="head", **always),
        "select_threshold,\n2 below the row's best": selection.select_threshold(
            scores, 2.0, anchor=scores.amax(-1), **always
        ),
    }
    figure, axes = pyplot.subplots(1, 4, figsize=(11, 3.2), layout="constrained")
    for axis, (name, (indices, counts)) in zip(axes, choices.items(), strict=True):
        image = torch.zeros(TOKENS // BLOCK, TOKENS // BLOCK + 1)
        image.scatter_(-1, indices[0, 0].where(indices[0, 0] >= 0, TOKENS // BLOCK).long(), 1)
        show(axis, image[:, :-1], f"{name}\n{int(counts.sum())} blocks", vmin=0, vmax=1)
    figure.savefig(folder / "selection_choices.png", dpi=110)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path(__file__).parent.parent / "docs" / "images")
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    query, key = head()
    weights, lse = dense(query, key)
    draw_block_scores(folder, query, key, weights, lse)
    draw_similarity(folder, query, key)
    draw_lines(folder, query, key, weights)
    draw_rows(folder, query, key, lse)
    draw_choices(folder, query, key)


if __name__ == "__main__":
    main()
