"""Stripe-sparse attention beside block-sparse attention at the same density, and dense: `python -m sparsekit.bench stripes`.

The blocks (128 x 128) are random blocks per head, as many as give the stripes' density: what stripes cost is what their
gathering costs.
"""

import argparse
import contextlib
import dataclasses
import fnmatch
import functools
import json
import os
import statistics
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

import sparsekit

from .baselines import Contender, _timed, flop
from .baselines import ours as block_sparse
from .cases import AttentionCase
from .machine import about_this_run, machine, multiply_add_peak
from .stripe_cases import beside, make_stripe_inputs, stripe_bench_cases, stripe_pairs
from .timing import Stopwatch, median_ratio


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = __doc__
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--cases", default="*", help="names or patterns, comma separated; 'list' lists them")
    parser.add_argument("--backward", action="store_true", help="time the backward instead of the forward")
    parser.add_argument("--dense", action="store_true", help="also dense scaled_dot_product_attention (CUDA: of cuDNN)")
    parser.add_argument("--length", type=int, help="tokens, instead of the case's")
    parser.add_argument("--seconds", type=float, default=1.0, help="per contender and case")
    parser.add_argument("--json", type=Path, help="write everything that was measured")


def dense_backend(device: str):
    """cuDNN on a GPU, else torch's choice."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    return sdpa_kernel(SDPBackend.CUDNN_ATTENTION) if device == "cuda" else contextlib.nullcontext()


def _with_kernels(name: str, call):
    """A call that only CUDA implementations of this name may take."""
    os.environ["SPARSEKIT_CUDA_KERNELS"] = name
    try:
        return call()
    finally:
        del os.environ["SPARSEKIT_CUDA_KERNELS"]


def contenders(case, options) -> list[Contender]:
    inputs = make_stripe_inputs(case, options.device)
    pairs, tensors = stripe_pairs(inputs), inputs.args[:3]

    def stripes(query, key, value):
        return sparsekit.stripe_sparse_attention(query, key, value, *inputs.args[3:], **inputs.kwargs)

    def dense(query, key, value):
        grouped = case.heads_q != case.heads_kv
        with dense_backend(options.device):
            return F.scaled_dot_product_attention(query, key, value, is_causal=case.causal, enable_gqa=grouped)

    everything = case.batch * case.heads_q * case.len_q * (case.len_k + 1 if case.causal else 2 * case.len_k) // 2
    fields = {field.name: getattr(case, field.name) for field in dataclasses.fields(AttentionCase)}
    blocks = AttentionCase(**fields | dict(block_size=(128, 128), density=pairs / everything))
    results = [
        Contender("stripes", _timed(stripes, tensors, options.backward), pairs),
        dataclasses.replace(block_sparse(beside(blocks, inputs), options.backward), name="blocks"),
    ]
    if (
        options.device == "cuda" and not options.backward
    ):  # the kernel that stripes are built on, where another is faster
        for contender in (results[0], results[1]):
            call = functools.partial(_with_kernels, "sm80", contender.call)
            results.append(dataclasses.replace(contender, name=f"{contender.name}, sm80", call=call))
    if options.dense and (options.device == "cpu" or case.dtype != torch.float32):  # cuDNN takes 16 bits
        results.append(Contender("dense", _timed(dense, tensors, options.backward), everything))
    return results


def measure(case, options, stopwatch: Stopwatch) -> dict:
    found = contenders(case, options)
    inputs = argparse.Namespace(case=case)  # what flop() reads
    peak = multiply_add_peak(case.dtype) if options.device == "cpu" else None
    times = stopwatch.rounds({contender.name: contender.call for contender in found})
    work = {contender.name: flop(inputs, contender.pairs, options.backward) for contender in found}
    rows = []
    for name, seconds in times.items():
        rate = work[name] / statistics.median(seconds)
        row = {"name": name, "milliseconds": statistics.median(seconds) * 1e3, "teraflops": rate / 1e12}
        row["share_of_peak"] = rate / peak if peak else None
        row["rate_of_stripes"] = median_ratio(seconds, times["stripes"]) * work["stripes"] / work[name]
        row["rounds"] = len(seconds)
        rows.append(row)
    density = found[0].pairs / (case.batch * case.heads_q * case.len_q * case.len_k)
    problem = {name: str(x) if isinstance(x, torch.dtype) else x for name, x in dataclasses.asdict(case).items()}
    return {"case": case.name, "density": density, "problem": problem, "results": rows}


def show(results: list[dict], options, console) -> None:
    from rich.table import Table

    direction = "backward" if options.backward else "forward"
    title = f"Stripe-sparse attention {direction}, {machine(options.device)}, torch {torch.__version__}"
    table = Table(title=title, title_justify="left")
    for column in ("case", "density", "kernel", "ms", "TFLOP/s", "of peak", "stripes' rate / this one's"):
        table.add_column(column, justify="left" if column in ("case", "kernel") else "right")
    for result in results:
        for row in result["results"]:
            mine, share = row["name"] == "stripes", row["share_of_peak"]
            table.add_row(
                result["case"] if mine else "",
                f"{result['density']:.1%}" if mine else "",
                row["name"],
                f"{row['milliseconds']:.4g}",
                f"{row['teraflops']:.3g}",
                f"{share:.0%}" if share else "-",
                "" if mine else f"{row['rate_of_stripes']:.2f}",
            )
    console.print(table)
    console.print("TFLOP/s: only what the mask lets through. Medians; ratios are medians over rounds.")


def run(parser: argparse.ArgumentParser, options: argparse.Namespace) -> int:
    from rich.console import Console

    cases = stripe_bench_cases(options.device)
    if options.cases == "list":
        print("\n".join(cases))
        return 0
    chosen = [case for name, case in cases.items() if any(fnmatch.fnmatch(name, w) for w in options.cases.split(","))]
    if not chosen:
        parser.error(f"--cases: no case is called {options.cases}; --cases list lists them")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device: cuda found; torch sees no GPU here")
    if options.length:
        chosen = [case.with_(len_q=options.length, len_k=options.length) for case in chosen]
    stopwatch = Stopwatch(options.device, seconds=options.seconds)
    results = [measure(case, options, stopwatch) for case in chosen]
    show(results, options, Console(width=None if sys.stdout.isatty() else 140))
    if options.json:
        direction = "backward" if options.backward else "forward"
        options.json.parent.mkdir(parents=True, exist_ok=True)
        report = about_this_run(options.device) | {"direction": direction, "cases": results}
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    return 0
