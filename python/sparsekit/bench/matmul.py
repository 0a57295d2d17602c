"""Block-sparse products beside dense ones: `python -m sparsekit.bench matmul`.

A case is a dtype, a block and a density, such as bf16-64x64-20 (per cent); the weight's blocks are random. Ratios are of
effective FLOP/s (only stored weights count) to torch's dense product of the same dtype, taken inside each round.
"""

import argparse
import dataclasses
import fnmatch
import json
import re
import statistics
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

import sparsekit
from sparsekit import BlockSparseMatrix, NMGMatrix, block_sddmm, block_sparse_linear

from .machine import about_this_run, machine, multiply_add_peak
from .timing import Stopwatch, median_ratio

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "int8": torch.int8}
CASES = [
    *(f"bf16-{b}x{b}-{d}" for b in (16, 32, 64, 128) for d in (50, 20, 10, 5)),
    *(f"fp32-{b}x{b}-{d}" for b in (16, 32, 64, 128) for d in (50, 20, 10, 5)),
    *(f"bf16-8x8-{d}" for d in (20, 10)),
    *(f"bf16-64x64-{d}" for d in (100, 80)),
    *(f"fp32-64x64-{d}" for d in (100, 80)),
    *(f"fp16-64x64-{d}" for d in (20,)),
    *(f"int8-4x1-{d}" for d in (20, 10)),
    *(f"int8-64x64-{d}" for d in (20,)),
    *(f"fp32-1x16-{d}" for d in (25, 10)),
    *(f"fp32-4x1-{d}" for d in (25, 10)),
    *(f"{dtype}-1:4:{g}-25" for dtype in ("fp32", "bf16") for g in (8, 16)),
]
DIRECTIONS = ("forward", "dx", "dvalues")


@dataclasses.dataclass
class Case:
    name: str
    dtype: torch.dtype
    layout: str
    density: float

    @classmethod
    def parse(cls, name: str) -> "Case":
        match = re.fullmatch(r"(fp32|bf16|fp16|int8)-(\d+x\d+|\d+:\d+:\d+)-(\d+)", name)
        if match is None:
            raise ValueError(f"--cases: {name} found; names such as bf16-64x64-20 and fp32-1:4:8-25 supported")
        return cls(name, DTYPES[match[1]], match[2], int(match[3]) / 100)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = __doc__
    parser.add_argument("--cases", default="*-64x64-20", help="names or patterns, comma separated; 'list' lists them")
    parser.add_argument("--direction", choices=DIRECTIONS, default="forward")
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--rows", type=int, default=4096, help="of the weight: features out")
    parser.add_argument("--columns", type=int, default=4096, help="of the weight: features in")
    parser.add_argument("--mkl", action="store_true", help="also torch.sparse_bsr (MKL), where it takes the case")
    parser.add_argument("--no-dense", action="store_true", help="only sparsekit")
    parser.add_argument("--refcheck", action="store_true", help="errors of both against float64 on sampled rows")
    parser.add_argument("--seconds", type=float, default=1.0, help="per contender and case")
    parser.add_argument("--json", type=Path, help="write everything that was measured")


@dataclasses.dataclass
class Contender:
    name: str
    call: Callable[[], torch.Tensor]
    density: float  # share of the dense work that it does


class Problem:
    """Tensors of a case, and what can compute it."""

    def __init__(self, case: Case, options: argparse.Namespace):
        torch.manual_seed(0)
        self.case, self.direction = case, options.direction
        rows, columns = options.rows, options.columns
        dense_dtype = torch.float32 if case.dtype == torch.int8 else case.dtype
        if ":" in case.layout:
            n, m, g = map(int, case.layout.split(":"))
            self.matrix = NMGMatrix.from_dense(torch.randn(rows, columns), n, m, g).to_block_sparse()
        else:
            block = tuple(map(int, case.layout.split("x")))
            keep = torch.rand(-(-rows // block[0]), -(-columns // block[1])) < case.density
            self.matrix = BlockSparseMatrix.from_dense(torch.randn(rows, columns), block, keep=keep)
        if case.dtype == torch.int8:
            self.matrix = self.matrix.quantized()
        else:
            self.matrix = self.matrix.with_values(self.matrix.values.to(case.dtype))
        self.matrix.transposed_pattern()
        self.x = torch.randn(options.tokens, columns, dtype=dense_dtype)
        self.y = torch.randn(options.tokens, rows, dtype=dense_dtype)
        self.work = 2 * options.tokens * rows * columns

    def ours(self) -> Contender:
        calls = {
            "forward": lambda: block_sparse_linear(self.x, self.matrix),
            "dx": lambda: block_sparse_linear(self.y, self.matrix, transposed=True),
            "dvalues": lambda: block_sddmm(self.y.t(), self.x, self.matrix),
        }
        return Contender("sparsekit", calls[self.direction], self.matrix.density)

    def dense(self) -> list[Contender]:
        weight = self.matrix.to_dense()
        calls = {
            "forward": lambda: F.linear(self.x, weight),
            "dx": lambda: self.y @ weight,
            "dvalues": lambda: self.y.t() @ self.x,
        }
        contenders = [Contender(f"dense {str(weight.dtype).removeprefix('torch.')}", calls[self.direction], 1.0)]
        if self.case.dtype == torch.int8 and self.direction == "forward":
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                layer = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
                layer.weight.data = weight
                layer = torch.ao.quantization.quantize_dynamic(torch.nn.Sequential(layer), dtype=torch.qint8)
            contenders.insert(0, Contender("dense int8 (linear_dynamic)", lambda: layer(self.x), 1.0))
        return contenders

    def mkl(self) -> list[Contender]:
        if self.case.dtype != torch.float32 or self.direction != "forward":
            return []
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            bsr = self.matrix.to_bsr()
        try:
            F.linear(self.x[:1], bsr)
        except RuntimeError:
            return []
        return [Contender("torch.sparse_bsr (MKL)", lambda: F.linear(self.x, bsr), self.matrix.density)]

    def errors(self, contenders: list[Contender]) -> dict[str, float]:
        """||e|| / ||ref|| against float64, of some rows."""
        dense = self.matrix.to_dense().double()
        if self.direction == "dvalues":
            picked = torch.randperm(self.matrix.nnz)[:50]
            R, C = self.matrix.block_size
            blocks = zip(
                self.matrix.block_rows()[picked].tolist(), self.matrix.col_indices[picked].tolist(), strict=True
            )
            want = torch.stack(
                [self.y[:, i * R : i * R + R].double().t() @ self.x[:, j * C : j * C + C].double() for i, j in blocks]
            )
            return {"sparsekit": float((contenders[0].call()[picked].double() - want).norm() / want.norm())}
        rows = torch.randperm(self.x.shape[0])[:50]
        want = self.x[rows].double() @ dense.t() if self.direction == "forward" else self.y[rows].double() @ dense
        return {c.name: float((c.call()[rows].double() - want).norm() / want.norm()) for c in contenders}


def measure(case: Case, options, stopwatch: Stopwatch) -> dict:
    problem = Problem(case, options)
    contenders = [problem.ours()]
    contenders += [] if options.no_dense else problem.dense()
    contenders += problem.mkl() if options.mkl else []
    times = stopwatch.rounds({contender.name: contender.call for contender in contenders})
    peak = multiply_add_peak(torch.float32 if case.dtype == torch.int8 else case.dtype)
    rows = []
    for contender in contenders:
        seconds = statistics.median(times[contender.name])
        ratio = median_ratio(times[contender.name], times["sparsekit"])
        rows.append(
            {
                "name": contender.name,
                "milliseconds": seconds * 1e3,
                "gigaflops": problem.work * contender.density / seconds / 1e9,
                "speedup_of_sparsekit": ratio,
                "rate_of_sparsekit": ratio * contenders[0].density / contender.density,
                "rounds": len(times[contender.name]),
            }
        )
    result = {"case": case.name, "density": problem.matrix.density, "peak_gigaflops": peak and peak / 1e9}
    result |= {"tokens": options.tokens, "shape": [options.rows, options.columns], "results": rows}
    if options.refcheck:
        result["errors"] = problem.errors(contenders)
    return result


def show(results: list[dict], options, console) -> None:
    from rich.table import Table

    shape = f"{options.rows} x {options.columns} weight, {options.tokens} tokens"
    title = f"Block-sparse {options.direction}, {shape}, {machine('cpu')}, torch {torch.__version__}"
    table = Table(title=title, title_justify="left")
    columns = ["case", "contender", "ms", "GFLOP/s", "time / ours", "ours / its FLOP/s"]
    columns += ["|e|/|ref|"] if options.refcheck else []
    for column in columns:
        table.add_column(column, justify="left" if column in columns[:2] else "right", no_wrap=True)
    for result in results:
        for row in result["results"]:
            mine = row["name"] == "sparsekit"
            cells = [result["case"] if mine else "", row["name"], f"{row['milliseconds']:.3g}"]
            cells += [f"{row['gigaflops']:.0f}"]
            cells += ["" if mine else f"{row[key]:.2f}x" for key in ("speedup_of_sparsekit", "rate_of_sparsekit")]
            if options.refcheck:
                error = result["errors"].get(row["name"])
                cells.append("-" if error is None else f"{error:.1e}")
            table.add_row(*cells, style="bold" if mine else None)
    console.print(table)
    console.print("GFLOP/s are effective: only stored weights count. Medians; ratios are medians over rounds.")


def run(parser: argparse.ArgumentParser, options: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.progress import track

    if options.cases == "list":
        print("\n".join(CASES))
        return 0
    names = []
    for wanted in options.cases.split(","):
        found = [name for name in CASES if fnmatch.fnmatch(name, wanted)] or [wanted]
        names += [name for name in found if name not in names]
    try:
        cases = [Case.parse(name) for name in names]
    except ValueError as error:
        parser.error(str(error))
    console = Console(width=None if sys.stdout.isatty() else 140)
    stopwatch = Stopwatch("cpu", seconds=options.seconds)
    progress = track(cases, "measuring", console=Console(stderr=True), transient=True)
    results = [measure(case, options, stopwatch) for case in progress]
    show(results, options, console)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        report = about_this_run("cpu") | {"direction": options.direction, "cases": results}
        options.json.write_text(json.dumps(report | {"version": sparsekit.__version__}, indent=1) + "\n")
    return 0
