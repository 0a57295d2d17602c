"""Block-sparse attention beside other kernels: `python -m sparsekit.bench attention`."""

import argparse
import dataclasses
import fnmatch
import json
import statistics
import sys
from pathlib import Path

import torch

from .baselines import BASELINES, Unavailable, flop, ours
from .cases import bench_cases, key_value_bytes, make_inputs
from .machine import about_this_run, machine, multiply_add_peak
from .refcheck import check
from .timing import Stopwatch, median_ratio

_FEW = 16  # query rows


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = __doc__
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--cases", default="d128-*", help="names or patterns, comma separated; 'list' lists them")
    parser.add_argument("--backward", action="store_true", help="time the backward instead of the forward")
    parser.add_argument("--against", default="sdpa", help=f"of {','.join(BASELINES)}; 'none'")
    parser.add_argument("--refcheck", action="store_true", help="errors against float64 on sampled rows")
    parser.add_argument("--length", type=int, help="tokens, instead of the case's")
    parser.add_argument("--heads", type=int, help="query heads, instead of the case's; key heads in proportion")
    parser.add_argument("--seconds", type=float, default=1.0, help="per contender and case")
    parser.add_argument("--json", type=Path, help="write everything that was measured")
    parser.add_argument("--figure", type=Path, help="draw effective FLOP/s")
    parser.add_argument(
        "--density-figure", type=Path, help="draw shares of the multiply-add peak against density (CPU)"
    )


def choose(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Turns the names in `options` into cases and baselines."""
    cases = bench_cases(options.device)
    if options.cases == "list":
        print("\n".join(cases))
        sys.exit()
    options.against = [] if options.against == "none" else options.against.split(",")
    unknown = [name for name in options.against if name not in BASELINES]
    if unknown:
        parser.error(f"--against: {', '.join(unknown)} found; {', '.join(BASELINES)} supported")
    names = [name for name in cases if any(fnmatch.fnmatch(name, wanted) for wanted in options.cases.split(","))]
    if not names:
        parser.error(f"--cases: no case is called {options.cases}; --cases list lists them")
    if options.density_figure and options.device != "cpu":
        parser.error("--density-figure: the peak is measured on the CPU only")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device: cuda found; torch sees no GPU here")
    options.cases = [resize(cases[name], options) for name in names]


def resize(case, options):
    changes = {}
    if options.length:
        changes |= {"len_k": options.length} | ({"len_q": options.length} if case.len_q == case.len_k else {})
    if options.heads:
        changes |= {"heads_q": options.heads, "heads_kv": max(1, options.heads * case.heads_kv // case.heads_q)}
    return case.with_(**changes)


def measure(case, options, stopwatch: Stopwatch) -> dict:
    inputs = make_inputs(case, options.device)
    contenders, absent = [ours(inputs, options.backward)], {}
    for name in options.against:
        try:
            contenders.append(BASELINES[name](inputs, options.backward))
        except Unavailable as error:
            absent[name] = str(error)
    peak = multiply_add_peak(case.dtype) if options.device == "cpu" else None
    calls = {contender.name: contender.call for contender in contenders}
    # Few queries wait for memory: beside what they compute, what they read counts, beside a read of as many bytes in the
    # same rounds: the best of many reads, a second earlier, says what memory can do and not what it does now. The bytes
    # are the keys and values themselves: other memory of the same process was read at 38 GB/s where they were at 55.
    few = options.device == "cpu" and case.len_q <= _FEW and not options.backward
    if few:
        whole = [tensor.view(torch.float32).flatten() for tensor in (inputs.key, inputs.value)]
        listed = key_value_bytes(inputs) / sum(tensor.nbytes for tensor in whole)
        streams = [tensor[: int(listed * len(tensor))] for tensor in whole]
        calls["stream"] = lambda: [stream.sum() for stream in streams]
    times = stopwatch.rounds(calls)
    if peak:  # the larger: whatever else ran, it was not faster than it can be
        peak = max(peak, multiply_add_peak(case.dtype))
    rows = []
    for contender in contenders:
        seconds = statistics.median(times[contender.name])
        work = flop(inputs, contender.pairs, options.backward)
        ratio = median_ratio(times[contender.name], times["sparsekit"])
        rows.append(
            {
                "name": contender.name,
                "milliseconds": seconds * 1e3,
                "teraflops": work / seconds / 1e12,
                "share_of_peak": work / seconds / peak if peak else None,
                "share_of_stream": median_ratio(times["stream"], times[contender.name]) if few else None,
                "speedup_of_sparsekit": ratio,
                "rate_of_sparsekit": ratio * flop(inputs, contenders[0].pairs, options.backward) / work,
                "rounds": len(times[contender.name]),
            }
        )
    density = contenders[0].pairs / (case.batch * case.heads_q * case.len_q * case.len_k)
    result = {"case": case.name, "density": density, "peak_teraflops": peak and peak / 1e12, "results": rows}
    bytes_read = sum(stream.nbytes for stream in streams) if few else 0
    result["stream_gigabytes_per_second"] = bytes_read / statistics.median(times["stream"]) / 1e9 if few else None
    result["absent"] = absent
    result["problem"] = {k: str(v) if isinstance(v, torch.dtype) else v for k, v in dataclasses.asdict(case).items()}
    if options.refcheck:
        result["errors"] = dataclasses.asdict(check(inputs, backward=options.backward))
    return result


def show(results: list[dict], options, console):
    from rich.table import Table

    direction = "backward" if options.backward else "forward"
    title = f"Block-sparse attention {direction}, {machine(options.device)}, torch {torch.__version__}"
    table = Table(title=title, title_justify="left")
    few = any(row["share_of_stream"] for result in results for row in result["results"])
    columns = ["case", "contender", "ms", "TFLOP/s", "of peak", "time / ours", "ours / its FLOP/s"]
    columns += ["of stream"] * few
    for column in columns:
        table.add_column(column, justify="left" if column in columns[:2] else "right", no_wrap=True)
    for result in results:
        for row in result["results"]:
            mine = row["name"] == "sparsekit"
            share, stream = row["share_of_peak"], row["share_of_stream"]
            table.add_row(
                result["case"] if mine else "",
                row["name"],
                f"{row['milliseconds']:.3g}",
                f"{row['teraflops']:.3g}",
                f"{share:.0%}" if share else "-",
                "" if mine else f"{row['speedup_of_sparsekit']:.2f}x",
                "" if mine else f"{row['rate_of_sparsekit']:.2f}x",
                *([f"{stream:.0%}" if stream else "-"] * few),
                style="bold" if mine else None,
            )
    console.print(table)
    console.print(
        "TFLOP/s are effective: only what the contender's mask lets through. of peak: multiply-adds on registers, "
        "measured in this run.\ntime / ours: how much faster sparsekit is. Medians; ratios are medians over rounds."
    )
    if few:
        console.print(
            "of stream: against torch's sums over as many bytes of keys and values as the lists name, in the same rounds."
        )
    for name, reason in {k: v for result in results for k, v in result["absent"].items()}.items():
        console.print(f"not run: {name}: {reason}")
    if not options.refcheck:
        return
    table = Table(title="Error against float64 (sampled rows)", title_justify="left")
    for column in ("case", "|e|/|ref|", "max", "max, dense", "lse max", "dQ", "dK", "dV", "within bounds"):
        table.add_column(column, justify="left" if column == "case" else "right")
    for result in results:
        e = result["errors"]
        cells = [e[k] for k in ("out", "out_max", "baseline_max", "lse_max", "query", "key", "value")]
        cells = ["-" if cell is None else f"{cell:.1e}" for cell in cells]
        table.add_row(result["case"], *cells, "yes" if e["passed"] else "NO")
    console.print(table)


def draw(results: list[dict], options):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = list(dict.fromkeys(row["name"] for result in results for row in result["results"]))
    figure, axes = pyplot.subplots(figsize=(9, 1.2 + 0.22 * len(results) * len(names)), layout="constrained")
    height = 0.8 / len(names)
    for i, name in enumerate(names):
        found = [next((row for row in result["results"] if row["name"] == name), None) for result in results]
        places = [at + i * height for at, row in enumerate(found) if row]
        bars = axes.barh(places, [row["teraflops"] for row in found if row], height * 0.9, label=name)
        axes.bar_label(bars, [f"{row['milliseconds']:.3g} ms" for row in found if row], padding=3, fontsize=7)
    axes.set_yticks([at + 0.4 - height / 2 for at in range(len(results))], [result["case"] for result in results])
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set_xlabel("effective TFLOP/s (unmasked work only)")
    axes.set_title(f"attention {'backward' if options.backward else 'forward'}, {machine(options.device)}", fontsize=10)
    axes.legend(fontsize=8)
    options.figure.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(options.figure, dpi=150)


def draw_against_density(results: list[dict], options):
    """A panel per kind of case (its name without the density), a line per contender."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    kinds = list(dict.fromkeys(result["case"].rpartition("-")[0] for result in results))
    names = list(dict.fromkeys(row["name"] for result in results for row in result["results"]))
    figure, axes = pyplot.subplots(
        1, len(kinds), figsize=(1 + 3.2 * len(kinds), 3.4), sharey=True, squeeze=False, layout="constrained"
    )
    for panel, kind in zip(axes[0], kinds, strict=True):
        found = sorted((r for r in results if r["case"].rpartition("-")[0] == kind), key=lambda r: r["density"])
        for name in names:
            points = [
                (r["density"], row["share_of_peak"]) for r in found for row in r["results"] if row["name"] == name
            ]
            if points:
                panel.plot(*zip(*points, strict=True), marker="o", label=name)
        panel.set(title=kind, xscale="log", xlabel="density", ylim=(0, 1))
        ticks = [r["density"] for r in found]
        panel.set_xticks(ticks, [f"{density:.0%}" for density in ticks])
        panel.minorticks_off()
        panel.grid(alpha=0.3)
    axes[0][0].set_ylabel("share of the multiply-add peak")
    axes[0][0].legend(fontsize=8, loc="center left", bbox_to_anchor=(0, 0.45))
    figure.suptitle(f"Attention forward, {machine(options.device)}: each on its own work", fontsize=10)
    options.density_figure.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(options.density_figure, dpi=150)


def run(parser: argparse.ArgumentParser, options: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.progress import track

    choose(parser, options)
    console = Console(width=None if sys.stdout.isatty() else 140)
    stopwatch = Stopwatch(options.device, seconds=options.seconds)
    progress = track(options.cases, "measuring", console=Console(stderr=True), transient=True)
    results = [measure(case, options, stopwatch) for case in progress]
    show(results, options, console)
    if options.json:
        direction = "backward" if options.backward else "forward"
        options.json.parent.mkdir(parents=True, exist_ok=True)
        report = about_this_run(options.device) | {"direction": direction, "cases": results}
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    if options.figure:
        draw(results, options)
    if options.density_figure:
        draw_against_density(results, options)
    failed = [result["case"] for result in results if options.refcheck and not result["errors"]["passed"]]
    if failed:
        console.print(f"outside the bounds of docs/semantics.md: {', '.join(failed)}")
    return 1 if failed else 0
