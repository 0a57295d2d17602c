"""Block-sparse products against float64, on every backend: what they compute, and what they refuse."""

import contextlib
import functools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import sparsekit
from backends import BACKENDS, calls
from numerics import SEARCHED, assert_passes
from sparse_weights import ACTIVATIONS, blocks_of, move, random_weight, rounded_tokens
from sparsekit import BlockSparseMatrix, NMGMatrix

OPS = torch.ops.sparsekit
FLOATS = [torch.float32, torch.bfloat16, torch.float16]
BLOCKS = [
    (8, 8),
    (16, 16),
    (32, 32),
    (64, 64),
    (128, 128),
    (64, 16),
    (16, 128),
    (1, 16),
    (4, 1),
    (16, 1),
    (4, 4),
    (5, 3),
]


device = "cpu"  # where the products below run; tests and their references stay on the CPU


def on_device(function):
    @functools.wraps(function)
    def call(*args, **options):
        return move(function(*move(args, device), **move(options, device)), "cpu")

    return call


block_sddmm, block_sparse_linear, block_sparse_mlp, block_sparse_mm = map(
    on_device,
    (sparsekit.block_sddmm, sparsekit.block_sparse_linear, sparsekit.block_sparse_mlp, sparsekit.block_sparse_mm),
)


@pytest.fixture
def level(backend, monkeypatch):
    """Forces one instruction set, and asserts that it is the one that runs; or moves the products to the GPU."""
    if backend.device == "cuda":
        monkeypatch.setitem(globals(), "device", "cuda")
        calls[backend.name] += 1
        yield backend
        return
    with backend.forced():
        assert_runs(backend)
        yield backend


@pytest.fixture
def cpu_level(cpu_backend):
    with cpu_backend.forced():
        assert_runs(cpu_backend)
        yield cpu_backend


@contextlib.contextmanager
def running(backend):
    """As `level`, for tests that draw their backend."""
    global device
    device = backend.device
    try:
        with backend.forced():
            yield
    finally:
        device = "cpu"


def assert_runs(cpu_backend):
    plan = dict(line.split(": ", 1) for line in OPS.matmul_plan_cpu(torch.float32, [16, 16]).splitlines())
    assert next(name for name, answer in plan.items() if answer == "runs") == cpu_backend.name
    calls[cpu_backend.name] += 1


def sizes_of(block_size, seed: int) -> tuple[int, int]:
    """A few blocks each way, mostly not whole ones."""
    R, C = block_size
    return 3 * R + seed % R, 5 * C + seed // 7 % C


def baselines(x: torch.Tensor, dense: torch.Tensor, bias: torch.Tensor | None = None, draws: int = 4) -> list:
    """x dense^T (+ bias) of torch, rounded to x's dtype once: each one draw of its rounding errors, with the terms in
    another order. One draw of a few numbers would condemn a good kernel."""
    results = []
    for _ in range(draws):
        order = torch.randperm(x.shape[1])
        results.append(torch.nn.functional.linear(x.float()[:, order], dense.float()[:, order]))
        if bias is not None:
            results[-1] += bias.float()
    return [result.to(x.dtype) for result in results]


def assert_sums(name: str, got, want, bases, dtype, x, dense, times: float = 2.0):
    """assert_passes, and in fp32 the rounding of partial sums is granted: torch takes short sums in several parts."""
    terms = 6 * float((x.double().square() @ dense.double().square().t()).amax().sqrt()) if want.numel() else 0.0
    assert_passes(name, got, want, bases, dtype, terms if dtype == torch.float32 else 0.0, times)


# ---- products


@pytest.mark.parametrize("transposed", [False, True], ids=["xWt", "xW"])
@pytest.mark.parametrize("block_size", BLOCKS, ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_linear(level, dtype, block_size, transposed, seed):
    weight = random_weight(sizes_of(block_size, seed), block_size, 0.6, dtype, order="shuffled")
    dense = weight.dense.t() if transposed else weight.dense
    for tokens in (1, 3, 16 + seed % 40, 150):
        x, bias = torch.randn(tokens, dense.shape[1]).to(dtype), torch.randn(dense.shape[0]).to(dtype)
        got = block_sparse_linear(x, weight.matrix, transposed=transposed)
        assert_sums(f"{tokens} tokens", got, x.double() @ dense.t(), baselines(x, dense), dtype, x, dense)
        got = block_sparse_linear(x, weight.matrix, bias, transposed=transposed)
        want = x.double() @ dense.t() + bias.double()
        assert_sums(f"{tokens} tokens, bias", got, want, baselines(x, dense, bias), dtype, x, dense)


@pytest.mark.parametrize("transposed", [False, True], ids=["WX", "WtX"])
@pytest.mark.parametrize("block_size", [(16, 16), (64, 32), (4, 1), (1, 16), (5, 3)], ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_mm(level, dtype, block_size, transposed, seed):
    weight = random_weight(sizes_of(block_size, seed), block_size, 0.6, dtype, index=torch.int64)
    dense = weight.dense.t() if transposed else weight.dense
    for columns in (1, 30, 131):
        x = torch.randn(dense.shape[1], columns).to(dtype)
        for layout in (x, x.t().contiguous().t(), torch.randn(columns, 2 * x.shape[0]).to(dtype)[:, ::2].t()):
            got = block_sparse_mm(weight.matrix, layout, transposed=transposed)
            bases = [base.t() for base in baselines(layout.t(), dense)]
            assert_sums(f"{columns} columns", got, dense @ layout.double(), bases, dtype, layout.t(), dense)
    batch = torch.randn(2, 3, dense.shape[1], 20).to(dtype)
    got = block_sparse_mm(weight.matrix, batch, transposed=transposed)
    want = dense @ batch.double()
    bases = [(dense.float() @ batch.float()).to(dtype)]
    assert_sums("batch", got, want, bases, dtype, batch.mT.flatten(0, 2), dense)


@pytest.mark.parametrize("block_size", BLOCKS, ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_sddmm(level, dtype, block_size, seed):
    weight = random_weight(sizes_of(block_size, seed), block_size, 0.5, dtype, order="shuffled")
    (rows, columns), matrix = weight.matrix.shape, weight.matrix
    for inner in (1, 77, 600 if level.name != "reference" else 100):
        a, b = torch.randn(rows, inner).to(dtype), torch.randn(inner, columns).to(dtype)
        for left, right in ((a, b), (a.t().contiguous().t(), b), (a, b.t().contiguous().t())):
            got = block_sddmm(left, right, matrix)
            want = blocks_of(a.double() @ b.double(), matrix)
            assert got.dtype == dtype
            bases = [blocks_of(base, matrix) for base in baselines(a, b.t())]
            assert_sums(f"inner {inner}", got, want, bases, dtype, a, b.t())


@pytest.mark.parametrize("block_size", [(4, 1), (1, 4), (8, 8), (16, 16), (64, 64), (5, 3)], ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_int8(cpu_level, dtype, block_size, seed):
    """Integer sums are exact: what is left is the rounding of the result."""
    weight = random_weight(sizes_of(block_size, seed), block_size, 0.6, torch.int8, order="shuffled")
    matrix, dense = weight.matrix, weight.dense
    for tokens in (1, 5, 40, 150):
        x = torch.randn(tokens, matrix.shape[1]).to(dtype) * 10 ** torch.randint(-3, 3, (tokens, 1)).to(dtype)
        want = rounded_tokens(x) @ dense.t()
        for got in (block_sparse_linear(x, matrix), block_sparse_mm(matrix, x.t()).t()):
            assert_passes(f"{tokens} tokens", got, want, [want.to(dtype)], dtype)
        x = torch.randn(tokens, matrix.shape[0]).to(dtype)
        want = x.double() @ dense
        got = block_sparse_linear(x, matrix, transposed=True)
        assert_sums("transposed", got, want, baselines(x, dense.t()), dtype, x, dense.t())


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_products_count_every_block_once(level, dtype, seed):
    """Small integers: sums are exact in fp32, so one block too many or too few shows, at any length."""
    for block_size, shape in (
        ((16, 16), (250, 700)),
        ((64, 64), (300, 520)),
        ((4, 1), (60, 300)),
        ((1, 16), (50, 640)),
    ):
        weight = random_weight(shape, block_size, 0.3, dtype, integers=True, order="shuffled")
        x = torch.randint(-2, 3, (61, shape[1])).to(dtype)
        assert torch.equal(block_sparse_linear(x, weight.matrix), (x.double() @ weight.dense.t()).to(dtype))
        y = torch.randint(-2, 3, (61, shape[0])).to(dtype)
        assert torch.equal(
            block_sparse_linear(y, weight.matrix, transposed=True), (y.double() @ weight.dense).to(dtype)
        )
        want = blocks_of(y.double().t() @ x.double(), weight.matrix).to(dtype)
        assert torch.equal(block_sddmm(y.t(), x, weight.matrix), want)


def test_long_rows_keep_fp32_accurate(level, seed):
    if level.name == "reference":
        pytest.skip("its sums are float64")
    for block_size in ((16, 16), (4, 1)):
        weight = random_weight((64, 9000), block_size, 0.9)
        for tokens in (20, 2):
            x = torch.randn(tokens, 9000) + 1
            got, want = block_sparse_linear(x, weight.matrix), x.double() @ weight.dense.t()
            assert_passes(f"{tokens} tokens", got, want, baselines(x, weight.dense), torch.float32)
        y = torch.randn(9000, 64) + 1
        matrix = random_weight((64, 64), block_size, 0.9).matrix
        want, *bases = (blocks_of(full, matrix) for full in (y.double().t() @ y.double(), *baselines(y.t(), y.t())))
        assert_passes("sddmm", block_sddmm(y.t(), y, matrix), want, bases, torch.float32)


@given(data=st.data())
def test_any_problem(data):
    """Any sizes, blocks, densities, dtypes and directions, on any backend."""
    draw = data.draw
    block_size = draw(st.integers(1, 40)), draw(st.integers(1, 40))
    shape = draw(st.integers(1, 100)), draw(st.integers(1, 100))
    dtype = draw(st.sampled_from(FLOATS))
    torch.manual_seed(draw(st.integers(0, 10**6)))
    order, index = draw(st.sampled_from(["sorted", "shuffled"])), draw(st.sampled_from([torch.int32, torch.int64]))
    weight = random_weight(shape, block_size, draw(st.floats(0, 1)), dtype, order=order, index=index)
    x = torch.randn(draw(st.integers(0, 70)), shape[1]).to(dtype)
    y = torch.randn(x.shape[0], shape[0]).to(dtype)
    with running(draw(st.sampled_from(BACKENDS))):
        got = block_sparse_linear(x, weight.matrix)
        assert_sums(
            "xWt", got, x.double() @ weight.dense.t(), baselines(x, weight.dense), dtype, x, weight.dense, SEARCHED
        )
        got = block_sparse_linear(y, weight.matrix, transposed=True)
        dense = weight.dense.t()
        assert_sums("xW", got, y.double() @ weight.dense, baselines(y, dense), dtype, y, dense, SEARCHED)
        got = block_sddmm(y.t(), x, weight.matrix)
        want = blocks_of(y.double().t() @ x.double(), weight.matrix)
        bases = [blocks_of(base, weight.matrix) for base in baselines(y.t(), x.t())]
        assert_sums("sddmm", got, want, bases, dtype, y.t(), x.t(), SEARCHED)


# ---- epilogues, the MLP, n:m:g


@pytest.mark.parametrize("activation", [name for name in ACTIVATIONS if name])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_activations(level, dtype, activation, seed):
    weight = random_weight((70, 60), (16, 4), 0.7, dtype)
    x, bias = torch.randn(33, 60).to(dtype), torch.randn(70).to(dtype)
    x[0] *= 20  # far from 0: relative precision of the tails
    with torch.no_grad():
        got = block_sparse_linear(x, weight.matrix, bias, activation)
    want = ACTIVATIONS[activation](x.double() @ weight.dense.t() + bias.double())
    exact = baselines(x.float(), weight.dense, bias)
    assert_passes(activation, got, want, [ACTIVATIONS[activation](base).to(dtype) for base in exact], dtype)


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "silu"])
def test_activations_on_a_grid(level, activation):
    """Through an identity: relative errors of a few units in the last place, in the tails, too."""
    weight = BlockSparseMatrix.from_dense(torch.eye(16), 16)
    x = torch.cat([torch.linspace(-12, 12, 4001), torch.tensor([0.0, -0.0, 1e-30, -1e-30, 100, -100, 1e30])])
    x = torch.nn.functional.pad(x, (0, -len(x) % 16)).view(-1, 16)
    y = x.double().requires_grad_()
    want = {  # without the cancellation of torch's own forms
        "gelu": 0.5 * y * torch.erfc(-y * math.sqrt(0.5)),
        "gelu_tanh": y * torch.sigmoid(2 * math.sqrt(2 / math.pi) * (y + 0.044715 * y**3)),
        "silu": y * torch.sigmoid(y),
    }[activation]
    (slope,) = torch.autograd.grad(want.sum(), y)
    y, want = y.detach(), want.detach()
    # On CUDA x itself comes out of three TF32 products with an error of up to 2^-22, which a tail multiplies: by 30 at -5,
    # by 230 at -10.
    granted = (y * slope / want).abs().nan_to_num(0, 0, 0) * (2**-22 if level.device == "cuda" else 0)
    got = block_sparse_linear(x, weight, None, activation).double()
    error = (got - want).abs() / want.abs().clamp(min=1e-35) - granted
    assert error[x.abs() < 5].max() < 4e-6 and error[x > -10].max() < 2e-5
    assert (got - want).abs().max() <= 1e-6 * want.abs().max()


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_mlp(level, dtype, gated, seed):
    gate, up = (random_weight((96, 50), (32, 16), 0.6, dtype) for _ in range(2))
    down = random_weight((40, 96), (8, 32), 0.6, dtype)
    x = torch.randn(3, 11, 50).to(dtype)

    def dense(x, gate, up, down):
        inner = ACTIVATIONS["silu"](x @ (gate if gated else up).t())
        return (inner * (x @ up.t()) if gated else inner) @ down.t()

    want = dense(x.double(), gate.dense, up.dense, down.dense)
    base = dense(x, *(w.dense.to(dtype) for w in (gate, up, down)))
    got = block_sparse_mlp(x, gate.matrix if gated else None, up.matrix, down.matrix)
    assert got.shape == (3, 11, 40)
    assert_passes("mlp", got, want, [base], dtype)


@pytest.mark.parametrize(("n", "m", "g"), [(2, 4, 8), (1, 4, 16), (2, 8, 4), (1, 10, 1)])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_nmg(level, dtype, n, m, g, seed):
    dense = torch.randn(5 * g, 9 * m).to(dtype)
    matrix = NMGMatrix.from_dense(dense, n, m, g)
    assert matrix.shape == dense.shape and matrix.density == n / m
    kept = matrix.to_dense()
    assert torch.equal(kept, torch.where(kept != 0, dense, 0))
    groups = (kept != 0).view(5, g, 9, m)
    assert (groups.any(1).sum(-1) == n).all(), "n columns of every m, the same for g rows"
    lost = torch.where(kept != 0, 0, dense).view(5, g, 9, m).float().abs().sum(1)
    least = torch.where(groups.any(1), kept.view(5, g, 9, m).float().abs().sum(1), torch.inf).amin(-1)
    assert (lost.amax(-1) <= least * 1.01).all(), "the largest are kept"
    x = torch.randn(21, dense.shape[1]).to(dtype)
    want = x.double() @ kept.double().t()
    assert_sums("nmg", block_sparse_linear(x, matrix), want, baselines(x, kept), dtype, x, kept)
    y = torch.randn(21, dense.shape[0]).to(dtype)
    values = block_sddmm(y.t(), x, matrix)
    assert values.shape == matrix.values.shape
    full = (y.t() @ x).view(5, g, 9, m).permute(0, 2, 3, 1)
    want = full.gather(2, matrix.indices.long()[..., None].expand(-1, -1, -1, g))
    torch.testing.assert_close(values.float(), want.float(), rtol=5e-2, atol=5e-2 * float(want.float().abs().max()))


# ---- what must not matter


def test_threads_change_nothing(cpu_level, one_or_two_threads, seed):
    weights = [random_weight((250, 300), block, 0.4, torch.bfloat16) for block in ((16, 16), (64, 64), (4, 1))]
    quantized = random_weight((250, 300), (4, 1), 0.4, torch.int8)
    x, y = torch.randn(70, 300).bfloat16(), torch.randn(70, 250).bfloat16()

    def everything():
        for weight in weights:
            yield block_sparse_linear(x, weight.matrix)
            yield block_sparse_linear(y, weight.matrix, transposed=True)
            yield block_sddmm(y.t(), x, weight.matrix)
            yield block_sparse_linear(x[:3], weight.matrix)
        yield block_sparse_linear(x, quantized.matrix)

    results = []
    for threads in (1, 2, 2):
        one_or_two_threads(threads)
        results.append(list(everything()))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_nothing_reaches_what_is_not_listed(level, seed):
    """NaN in a feature that no block of a row lists, and in what blocks hold beyond the matrix (see random_weight)."""
    weight = random_weight((70, 130), (16, 16), 0.3)
    x = torch.randn(20, 130)
    clean = block_sparse_linear(x, weight.matrix)
    assert clean.isfinite().all()
    spoiled, listed = x.clone(), torch.zeros(5, 9, dtype=torch.bool)
    listed[weight.matrix.block_rows(), weight.matrix.col_indices.long()] = True
    spoiled[:, 16:32] = torch.nan
    rows = ~listed[:, 1].repeat_interleave(16)[:70]
    assert torch.equal(block_sparse_linear(spoiled, weight.matrix)[:, rows], clean[:, rows])
    assert block_sparse_linear(spoiled, weight.matrix)[:, ~rows].isnan().all()
    few = slice(0, 4)
    assert torch.equal(
        block_sparse_linear(spoiled[few], weight.matrix)[:, rows], block_sparse_linear(x[few], weight.matrix)[:, rows]
    )
    spoiled = x.clone()
    spoiled[3] = torch.nan
    others = torch.arange(20) != 3
    assert torch.equal(block_sparse_linear(spoiled, weight.matrix)[others], clean[others])
    y = torch.randn(20, 70)
    assert block_sparse_linear(y, weight.matrix, transposed=True).isfinite().all()


def test_int8_tokens_with_nan(cpu_level):
    weight = random_weight((40, 64), (4, 1), 0.5, torch.int8)
    x = torch.randn(20, 64)
    clean = block_sparse_linear(x, weight.matrix)
    for bad in (torch.nan, torch.inf):
        spoiled = x.clone()
        spoiled[5, 7] = bad
        got = block_sparse_linear(spoiled, weight.matrix)
        assert got[5].isnan().all() and torch.equal(got[torch.arange(20) != 5], clean[torch.arange(20) != 5])
    assert torch.equal(block_sparse_linear(torch.zeros(2, 64), weight.matrix), torch.zeros(2, 40))


def test_empty(level):
    nothing = BlockSparseMatrix(
        torch.empty(0, 16, 8), torch.zeros(4, dtype=torch.int32), torch.empty(0, dtype=torch.int32), shape=(40, 30)
    )
    x = torch.full((7, 30), torch.nan)
    assert torch.equal(block_sparse_linear(x, nothing), torch.zeros(7, 40))
    bias = torch.arange(40.0)
    assert torch.equal(block_sparse_linear(x, nothing, bias), bias.expand(7, 40))
    assert torch.equal(block_sparse_linear(torch.randn(7, 40), nothing, transposed=True), torch.zeros(7, 30))
    assert block_sddmm(torch.randn(40, 5), torch.randn(5, 30), nothing).shape == (0, 16, 8)
    weight = random_weight((40, 30), (16, 8), 0.8).matrix
    assert block_sparse_linear(torch.empty(0, 30), weight).shape == (0, 40)
    assert block_sparse_linear(torch.empty(2, 0, 30), weight).shape == (2, 0, 40)
    assert block_sparse_mm(weight, torch.empty(30, 0)).shape == (40, 0)
    assert torch.equal(block_sddmm(torch.empty(40, 0), torch.empty(0, 30), weight), torch.zeros(weight.nnz, 16, 8))
    for shape in ((0, 30), (40, 0)):
        crow = torch.zeros(-(-shape[0] // 16) + 1, dtype=torch.int32)
        matrix = BlockSparseMatrix(torch.empty(0, 16, 8), crow, torch.empty(0, dtype=torch.int32), shape=shape)
        assert torch.equal(block_sparse_linear(torch.randn(3, shape[1]), matrix), torch.zeros(3, shape[0]))


def test_one_dimensional_and_batched_inputs(level):
    weight = random_weight((40, 30), (16, 8), 0.8)
    assert block_sparse_linear(torch.randn(30), weight.matrix).shape == (40,)
    x = torch.randn(2, 3, 60, 4)
    for view in (x.transpose(2, 3)[..., ::2], x.permute(3, 0, 1, 2)[..., 5:35], x.permute(3, 1, 0, 2)[..., 5:35]):
        got = block_sparse_linear(view, weight.matrix)
        assert got.is_contiguous()
        torch.testing.assert_close(got.double(), view.double() @ weight.dense.t(), rtol=1e-5, atol=1e-5)


def test_blocks_listed_twice_count_twice(level):
    weight = random_weight((32, 64), (16, 16), 1.0)
    matrix = weight.matrix
    doubled = BlockSparseMatrix(
        matrix.values, matrix.crow_indices, torch.tensor([0, 0, 2, 3, 1, 1, 1, 1], dtype=torch.int32), shape=(32, 64)
    )
    x, y = torch.randn(5, 64), torch.randn(5, 32)
    dense = doubled.to_dense()
    torch.testing.assert_close(block_sparse_linear(x, doubled), x @ dense.t(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(block_sparse_linear(y, doubled, transposed=True), y @ dense, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match=r"col_indices\[1\] is 0, which block row 0 lists before"):
        doubled.check()
    matrix.check()


# ---- what is refused


BAD_PATTERNS = {
    "descends": ([0, 3, 2, 4], [0, 1, 2, 0], r"crow_indices\[2\] is 2 after 3"),
    "beyond the blocks": ([0, 1, 9, 4], [0, 1, 2, 0], r"crow_indices\[2\] is 9 after 1"),
    "starts late": ([1, 1, 2, 4], [0, 1, 2, 0], r"crow_indices\[0\] is 1"),
    "ends early": ([0, 1, 2, 3], [0, 1, 2, 0], r"crow_indices ends with 3"),
    "negative offset": ([0, -5, 2, 4], [0, 1, 2, 0], r"crow_indices\[1\] is -5 after 0"),
    "column too large": ([0, 1, 2, 4], [0, 1, 4, 9], r"col_indices\[2\] is 4; supported: 0 to 3"),
    "negative column": ([0, 1, 2, 4], [0, -1, 2, 0], r"col_indices\[1\] is -1"),
    "huge column": ([0, 1, 2, 4], [0, 1, 2, 2**31 - 1], r"col_indices\[3\] is 2147483647"),
}


@pytest.mark.parametrize("index", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("name", BAD_PATTERNS)
def test_bad_patterns(cpu_level, name, index):
    crow, col, message = BAD_PATTERNS[name]
    matrix = BlockSparseMatrix(
        torch.randn(4, 16, 8), torch.tensor(crow, dtype=index), torch.tensor(col, dtype=index), shape=(48, 32)
    )
    for call in (
        lambda: block_sparse_linear(torch.randn(5, 32), matrix),
        lambda: block_sparse_mm(matrix, torch.randn(32, 5)),
        lambda: block_sparse_linear(torch.randn(5, 48), matrix, transposed=True),
        lambda: block_sddmm(torch.randn(48, 5), torch.randn(5, 32), matrix),
        lambda: block_sparse_mlp(torch.randn(5, 32), None, matrix, random_weight((8, 48), (8, 8)).matrix),
        lambda: matrix.check(),
        lambda: OPS.transpose_block_sparse(matrix.crow_indices, matrix.col_indices, 4),
    ):
        with pytest.raises(RuntimeError, match=message):
            call()


def test_bad_transposes(cpu_level):
    matrix = random_weight((48, 32), (16, 8), 1.0).matrix
    good = matrix.transposed_pattern()
    x = torch.randn(5, 48)
    for place, value, message in (
        (0, 99, r"ccol_indices\[3\]"),
        (1, 3, r"row_indices\[3\] is 3"),
        (2, 12, r"entries\[3\]"),
    ):
        tensors = [tensor.clone() for tensor in good]
        tensors[place][3] = value
        with pytest.raises(RuntimeError, match=message):
            OPS.block_sparse_linear(
                x, matrix.values, None, matrix.crow_indices, matrix.col_indices, 32, True, 0, None, *tensors
            )


def test_wrong_calls():
    matrix = random_weight((48, 32), (16, 8), 0.5).matrix
    x = torch.randn(5, 32)
    args = (matrix.crow_indices, matrix.col_indices)
    for call, message in (
        (lambda: block_sparse_linear(torch.randn(5, 31), matrix), "input: found shape"),
        (lambda: block_sparse_linear(x, matrix, transposed=True), "input: found shape"),
        (lambda: block_sparse_linear(x.bfloat16(), matrix), "values has another dtype than input"),
        (lambda: block_sparse_linear(x, matrix, torch.randn(47)), "bias has size 47"),
        (lambda: block_sparse_linear(x, matrix, torch.randn(48).half()), "bias has another dtype"),
        (lambda: block_sparse_linear(x, matrix, activation="tanh"), "activation: found 'tanh'"),
        (lambda: block_sparse_linear(x, torch.randn(48, 32)), "weight: found a tensor of layout torch.strided"),
        (lambda: block_sparse_linear(x, None), "weight: found NoneType"),
        (lambda: block_sparse_linear(x.int(), matrix), "dtype"),
        (lambda: block_sparse_mm(matrix, torch.randn(31, 5)), "dense: found shape"),
        (lambda: block_sparse_mm(matrix, torch.randn(31)), "dense: found shape"),
        (lambda: block_sddmm(torch.randn(48, 5), torch.randn(6, 32), matrix), "a, b: found shapes"),
        (lambda: block_sparse_mlp(x, matrix, matrix, matrix), "gate, up, down: found shapes"),
        (lambda: OPS.block_sparse_linear(x, matrix.values, None, *args, 64), "crow_indices has size 4"),
        (lambda: OPS.block_sparse_linear(x, matrix.values, None, *args, 48, False, 9), "activation is 9"),
        (lambda: OPS.block_sparse_linear(x, matrix.values[1:], None, *args, 48), "values has size"),
        (lambda: OPS.block_sparse_linear(x, matrix.values[0], None, *args, 48), "values has 2 dimensions"),
        (lambda: OPS.block_sparse_linear(x, matrix.values, None, args[0].short(), args[1], 48), "int32, int64"),
        (lambda: OPS.block_sparse_linear(x, matrix.values, None, args[0].long(), args[1], 48), "differ in dtype"),
        (lambda: OPS.block_sparse_linear(x, matrix.values, None, *args, 48, False, 0, torch.ones(48)), "scales"),
        (lambda: BlockSparseMatrix(matrix.values.to(torch.int8), *args, shape=(48, 32)), "scales"),
        (lambda: BlockSparseMatrix(matrix.values[0], *args, shape=(48, 32)), "values: found shape"),
        (lambda: BlockSparseMatrix.from_dense(torch.randn(5, 5), 2000), "block_size: found 2000"),
        (lambda: BlockSparseMatrix.from_dense(torch.randn(5, 5), 2, keep=torch.ones(2, 2)), "keep: found shape"),
        (lambda: BlockSparseMatrix.from_bsr(torch.randn(5, 5)), "matrix: found layout"),
        (lambda: matrix.with_values(matrix.values[..., :7]).to_bsr(), "torch.sparse_bsr takes multiples"),
        (lambda: NMGMatrix.from_dense(torch.randn(10, 16), 2, 4, 4), "dense: found shape"),
        (lambda: NMGMatrix(torch.randn(2, 3, 1, 4), torch.zeros(2, 3, 1), m=4), "indices: found torch.float32"),
    ):
        with pytest.raises((RuntimeError, TypeError, ValueError), match=message):
            call()


def test_unknown_isa_is_an_error(monkeypatch):
    monkeypatch.setenv("SPARSEKIT_ISA", "sse9")
    with pytest.raises(RuntimeError, match="SPARSEKIT_ISA"):
        block_sparse_linear(torch.randn(5, 32), random_weight((48, 32), (16, 8)).matrix)


# ---- containers


def test_block_sparse_matrix_forms(seed):
    dense = torch.randn(50, 33) * (torch.rand(50, 33) < 0.02)
    matrix = BlockSparseMatrix.from_dense(dense, (8, 5))
    assert torch.equal(matrix.to_dense(), dense) and matrix.shape == (50, 33)
    assert matrix.density < 1 and "blocks of 8 x 5" in repr(matrix)
    dense = torch.randn(48, 32) * (torch.rand(48, 32) < 0.05)
    bsr = dense.to_sparse_bsr((16, 8))
    matrix = BlockSparseMatrix.from_bsr(bsr)
    assert matrix.values.data_ptr() == bsr.values().data_ptr() and matrix.crow_indices.dtype == torch.int32
    assert torch.equal(matrix.to_dense(), dense)
    assert torch.equal(matrix.to_bsr().to_dense(), dense) and matrix.to_bsr().layout == torch.sparse_bsr
    x = torch.randn(5, 32)
    for out in (block_sparse_linear(x, bsr), block_sparse_linear(x, matrix), (matrix @ x.t()).t()):
        torch.testing.assert_close(out, x @ dense.t(), rtol=1e-5, atol=1e-5)
    ccol, row, entries = matrix.transposed_pattern()
    assert matrix.transposed_pattern()[0] is ccol
    csc = dense.to_sparse_bsc((16, 8))
    assert torch.equal(ccol.long(), csc.ccol_indices().long()) and torch.equal(row.long(), csc.row_indices().long())
    assert torch.equal(matrix.values[entries.long()], csc.values())


def test_quantized(seed):
    weight = random_weight((64, 96), (4, 1), 0.3)
    quantized = weight.matrix.quantized()
    assert quantized.values.dtype == torch.int8 and quantized.scales.shape == (64,)
    step = weight.dense.abs().amax(1, keepdim=True) / 127
    assert ((quantized.to_dense().double() - weight.dense).abs() <= step / 2 + 1e-6).all()
    x = torch.randn(30, 96)
    want, got = x.double() @ weight.dense.t(), block_sparse_linear(x, quantized)
    assert (got.double() - want).norm() < 0.015 * want.norm()
    torch.testing.assert_close(quantized.to_bsr().to_dense(), quantized.to_dense())


def test_float64_is_the_reference(seed):
    weight = random_weight((30, 40), (8, 8), 0.5, torch.float64)
    x = torch.randn(5, 40, dtype=torch.float64)
    assert torch.allclose(block_sparse_linear(x, weight.matrix), x @ weight.dense.t(), rtol=1e-13, atol=1e-13)
    plan = OPS.matmul_plan_cpu(torch.float64, [8, 8]).splitlines()
    with contextlib.suppress(StopIteration):
        assert next(line for line in plan if line.endswith(": runs")) == "reference: runs"
