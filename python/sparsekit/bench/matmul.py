"""Block-sparse products beside dense ones: `python -m sparsekit.bench matmul`.

A case is a dtype, a block and a density, such as bf16-64x64-20 (per cent); the weight's blocks are random. Ratios are of
effective FLOP/s (only stored weights count) to torch's dense product of the same dtype, taken inside each round. On a GPU
every contender runs inside a CUDA graph where it can be captured, with an empty L2; of 16 tokens or fewer the time is that
inside the graph, without its launch. On a CPU, of 16 tokens or fewer, copies of the weights that no cache holds are used in
turn, as the layers of a model are: weights come from memory, code from the caches.
"""

import argparse
import copy
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
from sparsekit import BlockSparseMatrix, NMGMatrix, block_sddmm, block_sparse_linear, block_sparse_mlp

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
# What `--device cuda` measures unless --cases are named.
_SIZES = (128, 64, 32, 16)
CUDA_GROUPS = [
    ([f"bf16-{b}x{b}-{d}" for b in _SIZES for d in (5, 20, 50)], {"mkl": True}),
    (["bf16-128x128-85", "bf16-64x64-65", "bf16-32x32-40", "bf16-16x16-25"], {}),
    ([f"bf16-{b}x{b}-{d}" for b in _SIZES for d in (20, 50)], {"direction": "dx"}),
    ([f"bf16-{b}x{b}-{d}" for b in _SIZES for d in (20, 50)], {"direction": "dvalues"}),
    (["bf16-128x128-60", "bf16-64x64-40"], {"rows": 4096, "columns": 4096, "tokens": 4096}),
    (["bf16-128x128-5", "bf16-128x128-10"], {"direction": "mlp", "tokens": 2048}),
    (["bf16-128x128-20"], {"direction": "training", "tokens": 2048}),
    *((["bf16-128x128-10"], {"direction": "mlp", "tokens": tokens}) for tokens in (1, 16)),
    *((["bf16-128x128-10"], {"rows": 32768, "columns": 16384, "tokens": tokens}) for tokens in (1, 16)),
    (["fp32-64x64-20"], {}),
]
DIRECTIONS = ("forward", "dx", "dvalues", "mlp", "training")
_FEW_TOKENS = 16  # up to these, what counts is how fast the stored weights are read
_ROTATED_BYTES = 256 << 20  # of copies of weights: eight times the last-level cache of the machines we know


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
    parser.add_argument(
        "--cases",
        help="names or patterns, comma separated; 'list' lists them. Default: *-64x64-20; with --device cuda a selection "
        "with sizes of its own",
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--direction",
        choices=DIRECTIONS,
        default="forward",
        help="forward: x W^T; dx: dy W; dvalues: dy^T x at the blocks; mlp: a gated MLP of two such weights and one of "
        "the transposed shape; training: its forward and backward",
    )
    parser.add_argument("--tokens", type=int, help="default: 512; on CUDA 8192")
    parser.add_argument("--rows", type=int, help="of the weight: features out; default: 4096; on CUDA 14336")
    parser.add_argument("--columns", type=int, default=4096, help="of the weight: features in")
    parser.add_argument("--mkl", action="store_true", help="also torch.sparse_bsr, where it takes the case")
    parser.add_argument("--no-dense", action="store_true", help="only sparsekit")
    parser.add_argument("--refcheck", action="store_true", help="errors of both against float64 on sampled rows")
    parser.add_argument("--seconds", type=float, help="per contender and case; default: 1; on CUDA 0.03")
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
        self.case, self.direction, self.device = case, options.direction, options.device
        rows, columns = options.rows, options.columns
        dense_dtype = torch.float32 if case.dtype == torch.int8 else case.dtype
        self.matrix = self.weight(rows, columns)
        self.x = torch.randn(options.tokens, columns, dtype=dense_dtype, device=self.device)
        self.y = torch.randn(options.tokens, rows, dtype=dense_dtype, device=self.device)
        self.weights = [self.matrix]
        self.work = 2 * options.tokens * rows * columns
        if self.direction in ("mlp", "training"):
            self.weights += [self.weight(rows, columns), self.weight(columns, rows)]
            self.work *= 9 if self.direction == "training" else 3
        self.density = statistics.fmean(weight.density for weight in self.weights)
        self.stored_bytes = sum(weight.values.nbytes for weight in self.weights)

    def weight(self, rows: int, columns: int) -> BlockSparseMatrix:
        dense = torch.randn(rows, columns, device=self.device) / columns**0.5
        if ":" in self.case.layout:
            n, m, g = map(int, self.case.layout.split(":"))
            matrix = NMGMatrix.from_dense(dense, n, m, g).to_block_sparse()
        else:
            block = tuple(map(int, self.case.layout.split("x")))
            grid = -(-rows // block[0]), -(-columns // block[1])
            keep = torch.rand(grid, device=self.device) < self.case.density
            matrix = BlockSparseMatrix.from_dense(dense, block, keep=keep)
        if self.case.dtype == torch.int8:
            matrix = matrix.quantized()
        else:
            matrix = matrix.with_values(matrix.values.to(self.case.dtype))
        matrix.transposed_pattern()
        return matrix

    def copies(self, weight_bytes: int) -> list["Problem"]:
        """Problems like this one with weights of their own, beyond any cache if one of them reads `weight_bytes`."""
        problems = [self]
        while len(problems) < max(2, -(-_ROTATED_BYTES // weight_bytes)):
            other = copy.copy(self)
            other.weights = [_copied(weight) for weight in self.weights]
            other.matrix = other.weights[0]
            problems.append(other)
        return problems

    def ours(self) -> Contender:
        calls = {
            "forward": lambda: block_sparse_linear(self.x, self.matrix),
            "dx": lambda: block_sparse_linear(self.y, self.matrix, transposed=True),
            "dvalues": lambda: block_sddmm(self.y.t(), self.x, self.matrix),
            "mlp": lambda: block_sparse_mlp(self.x, *self.weights),
        }
        if self.direction == "training":
            leaves = [weight.values.detach().requires_grad_() for weight in self.weights]
            matrices = [weight.with_values(leaf) for weight, leaf in zip(self.weights, leaves, strict=True)]
            calls["training"] = _step(lambda x: block_sparse_mlp(x, *matrices), self.x, leaves)
        return Contender("sparsekit", calls[self.direction], self.density)

    def dense(self) -> list[Contender]:
        weight = self.matrix.to_dense()
        calls = {
            "forward": lambda: F.linear(self.x, weight),
            "dx": lambda: self.y @ weight,
            "dvalues": lambda: self.y.t() @ self.x,
        }
        if self.direction in ("mlp", "training"):
            weights = [weight.to_dense() for weight in self.weights]

            def mlp(x):
                return F.linear(F.silu(F.linear(x, weights[0])) * F.linear(x, weights[1]), weights[2])

            calls["mlp"] = lambda: mlp(self.x)
            if self.direction == "training":
                calls["training"] = _step(mlp, self.x, [weight.requires_grad_() for weight in weights])
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
        if (self.case.dtype != torch.float32 and self.device == "cpu") or self.direction != "forward":
            return []
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            bsr = self.matrix.to_bsr()
            try:
                F.linear(self.x, bsr)
            except (RuntimeError, ValueError):
                return []
        name = "torch.sparse_bsr (MKL)" if self.device == "cpu" else "torch.sparse_bsr (Triton)"
        return [Contender(name, lambda: F.linear(self.x, bsr), self.matrix.density)]

    def errors(self, contenders: list[Contender]) -> dict[str, float]:
        """||e|| / ||ref|| against float64, of some rows."""
        if self.direction in ("mlp", "training"):
            return {}
        dense = self.matrix.to_dense().double()
        if self.direction == "dvalues":
            picked = torch.randperm(self.matrix.nnz, device=self.device)[:50]
            R, C = self.matrix.block_size
            blocks = zip(
                self.matrix.block_rows()[picked].tolist(), self.matrix.col_indices[picked].tolist(), strict=True
            )
            want = torch.stack(
                [self.y[:, i * R : i * R + R].double().t() @ self.x[:, j * C : j * C + C].double() for i, j in blocks]
            )
            return {"sparsekit": float((contenders[0].call()[picked].double() - want).norm() / want.norm())}
        rows = torch.randperm(self.x.shape[0], device=self.device)[:50]
        want = self.x[rows].double() @ dense.t() if self.direction == "forward" else self.y[rows].double() @ dense
        return {c.name: float((c.call()[rows].double() - want).norm() / want.norm()) for c in contenders}


def _copied(weight: BlockSparseMatrix) -> BlockSparseMatrix:
    names = ("values", "crow_indices", "col_indices")
    return dataclasses.replace(weight, **{name: getattr(weight, name).clone() for name in names})


def _step(mlp: Callable, x: torch.Tensor, leaves: list[torch.Tensor]) -> Callable[[], tuple]:
    """Forward and backward."""
    x = x.clone().requires_grad_()
    grad = torch.randn_like(x)
    return lambda: torch.autograd.grad(mlp(x), [x, *leaves], grad)


def captured(call: Callable) -> Callable:
    """The call as a CUDA graph; the call itself where it cannot be captured."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            call()
    except RuntimeError:
        return call
    return graph.replay


def inside_a_graph(call: Callable, stopwatch: Stopwatch, calls: int = 8, rounds: int = 7) -> list[float]:
    """Seconds of a short call on a GPU without the launch of a graph, which takes as long: a graph of `calls` calls, L2
    emptied before each, less one that only empties it."""
    empty = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")

    def with_calls():
        for _ in range(calls):
            empty.fill_(1)
            call()

    def without():
        for _ in range(calls):
            empty.fill_(1)

    both, only = captured(with_calls), captured(without)
    return [(stopwatch.once(both) - stopwatch.once(only)) / calls for _ in range(rounds)]


def in_turns(problem: Problem, contenders: list[Contender], stopwatch: Stopwatch, rounds: int = 9) -> dict[str, list]:
    """Seconds per call of every contender, round by round: all its copies, one after the other."""
    calls: dict[str, list[Callable]] = {}
    for contender in contenders:
        weight_bytes = max(1, int(problem.stored_bytes * contender.density / problem.density))
        copies = problem.copies(weight_bytes)
        ours = contender.name == "sparsekit"
        others = [[other.ours()] if ours else other.dense() + other.mkl() for other in copies[1:]]
        calls[contender.name] = [contender.call]
        calls[contender.name] += [c.call for found in others for c in found if c.name == contender.name]
    times: dict[str, list[float]] = {name: [] for name in calls}
    for i in range(rounds + 1):
        for name, turns in calls.items():
            seconds = stopwatch.once(lambda turns=turns: [call() for call in turns]) / len(turns)
            times[name] += [seconds] if i else []  # the first warms up
    return times


def measure(case: Case, options, stopwatch: Stopwatch) -> dict:
    problem = Problem(case, options)
    contenders = [problem.ours()]
    contenders += [] if options.no_dense else problem.dense()
    contenders += problem.mkl() if options.mkl else []
    on_cpu = options.device == "cpu"
    calls = {contender.name: contender.call for contender in contenders}
    if on_cpu and options.tokens <= _FEW_TOKENS:
        times = in_turns(problem, contenders, stopwatch)
    elif on_cpu:
        times = stopwatch.rounds(calls)
    elif options.tokens <= _FEW_TOKENS:
        times = {name: inside_a_graph(call, stopwatch) for name, call in calls.items()}
    else:
        times = stopwatch.rounds({name: captured(call) for name, call in calls.items()})
    peak = multiply_add_peak(torch.float32 if case.dtype == torch.int8 else case.dtype) if on_cpu else None
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
                "weight_gigabytes_per_second": problem.stored_bytes
                * contender.density
                / problem.density
                / seconds
                / 1e9,
                "rounds": len(times[contender.name]),
            }
        )
    result = {"case": case.name, "density": problem.density, "peak_gigaflops": peak and peak / 1e9}
    result |= {"tokens": options.tokens, "shape": [options.rows, options.columns], "results": rows}
    if options.refcheck:
        result["errors"] = problem.errors(contenders)
    return result


def show(results: list[dict], options, console) -> None:
    from rich.table import Table

    shape = f"{options.rows} x {options.columns} weight, {options.tokens} tokens"
    title = f"Block-sparse {options.direction}, {shape}, {machine(options.device)}, torch {torch.__version__}"
    table = Table(title=title, title_justify="left")
    columns = ["case", "contender", "ms", "GFLOP/s", "time / ours", "ours / its FLOP/s"]
    few = options.tokens <= _FEW_TOKENS
    columns += ["weights, GB/s"] * few + ["|e|/|ref|"] * options.refcheck
    for column in columns:
        table.add_column(column, justify="left" if column in columns[:2] else "right", no_wrap=True)
    for result in results:
        for row in result["results"]:
            mine = row["name"] == "sparsekit"
            cells = [result["case"] if mine else "", row["name"], f"{row['milliseconds']:.3g}"]
            cells += [f"{row['gigaflops']:.0f}"]
            cells += ["" if mine else f"{row[key]:.2f}x" for key in ("speedup_of_sparsekit", "rate_of_sparsekit")]
            cells += [f"{row['weight_gigabytes_per_second']:.0f}"] * few
            if options.refcheck:
                error = result["errors"].get(row["name"])
                cells.append("-" if error is None else f"{error:.1e}")
            table.add_row(*cells, style="bold" if mine else None)
    console.print(table)


def run(parser: argparse.ArgumentParser, options: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.progress import track

    if options.cases == "list":
        print("\n".join(CASES))
        return 0
    on_gpu = options.device == "cuda"
    defaults = (
        {"tokens": 8192, "rows": 14336, "seconds": 0.03} if on_gpu else {"tokens": 512, "rows": 4096, "seconds": 1.0}
    )
    for name, value in defaults.items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    groups = [(options.cases or "*-64x64-20", {})]
    if on_gpu and not options.cases:
        groups = [(",".join(names), changes) for names, changes in CUDA_GROUPS]
    console = Console(width=None if sys.stdout.isatty() else 140)
    stopwatch = Stopwatch(options.device, seconds=options.seconds)
    reports = []
    for cases, changes in groups:
        chosen = argparse.Namespace(**(vars(options) | changes))
        names = []
        for wanted in cases.split(","):
            found = [name for name in CASES if fnmatch.fnmatch(name, wanted)] or [wanted]
            names += [name for name in found if name not in names]
        try:
            parsed = [Case.parse(name) for name in names]
        except ValueError as error:
            parser.error(str(error))
        progress = track(parsed, "measuring", console=Console(stderr=True), transient=True)
        results = [measure(case, chosen, stopwatch) for case in progress]
        show(results, chosen, console)
        reports += [{"direction": chosen.direction} | result for result in results]
    console.print("GFLOP/s are effective: only stored weights count. Medians; ratios are medians over rounds.")
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        report = about_this_run(options.device) | {"direction": options.direction, "cases": reports}
        options.json.write_text(json.dumps(report | {"version": sparsekit.__version__}, indent=1) + "\n")
    return 0
