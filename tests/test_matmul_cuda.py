"""Block-sparse products on a GPU: every kernel and tile against float64, indices that lead nowhere, CUDA graphs, streams,
torch.compile. What both devices share is in test_matmul.py."""

import pytest
import torch

from numerics import assert_passes
from sparse_weights import ACTIVATIONS, blocks_of, move, random_weight
from sparsekit import BlockSparseMatrix, block_sddmm, block_sparse_linear, block_sparse_mlp, block_sparse_mm

OPS = torch.ops.sparsekit
pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU: the kernels cannot run"),
]
FLOATS = [torch.float32, torch.bfloat16, torch.float16]


def plan(dtype, block_size, tokens, transposed=False) -> dict:
    text = OPS.matmul_plan_cuda(dtype, list(block_size), tokens, transposed)
    return dict(line.split(": ", 1) for line in text.splitlines())


def cuda_weight(shape, block_size, density=0.5, dtype=torch.bfloat16, **options):
    weight = random_weight(shape, block_size, density, dtype, **options)
    return move(weight.matrix, "cuda"), weight.dense


def assert_product(name, got, want, dtype):
    """Against what rounding float64 once to the dtype loses, times what fp32 sums of 2,000 terms may add."""
    base = want.float().to(dtype)
    terms = {torch.float32: 2e3, torch.bfloat16: 0.0, torch.float16: 0.0}[dtype]
    assert_passes(name, got, want, [base], dtype, terms=terms * 1e-2 * float(want.abs().max()))


# ---- every kernel, at sizes where each of its paths is walked


@pytest.mark.parametrize("tokens", [1, 7, 16, 24, 300, 1100])
@pytest.mark.parametrize(
    "block_size", [(128, 128), (64, 64), (32, 32), (16, 16), (8, 8), (128, 64), (64, 128), (256, 64)], ids=str
)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_products(dtype, block_size, tokens, seed):
    R, C = block_size
    shape = (5 * R + (8 if seed % 2 else 0), max(3 * C, 640 // C * C) + (16 if seed % 3 else 0))
    matrix, dense = cuda_weight(shape, block_size, 0.4, dtype, order="shuffled")
    x, y = torch.randn(tokens, shape[1]).to(dtype), torch.randn(tokens, shape[0]).to(dtype)
    bias = torch.randn(shape[0]).to(dtype)
    got = block_sparse_linear(x.cuda(), matrix, bias.cuda(), "silu")
    assert_product("x Wt", got, ACTIVATIONS["silu"](x.double() @ dense.t() + bias.double()), dtype)
    assert_product("x W", block_sparse_linear(y.cuda(), matrix, transposed=True), y.double() @ dense, dtype)
    assert_product("W x", block_sparse_mm(matrix, x.t().contiguous().cuda()), dense @ x.t().double(), dtype)
    got = block_sparse_mm(matrix, y.t().contiguous().cuda(), transposed=True)
    assert_product("Wt x", got, dense.t() @ y.t().double(), dtype)


@pytest.mark.parametrize(
    "block_size", [(128, 128), (64, 64), (32, 32), (16, 16), (8, 8), (128, 64), (64, 128), (256, 64)], ids=str
)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_sddmm(dtype, block_size, seed):
    R, C = block_size
    shape = (4 * R + (8 if seed % 2 else 0), 5 * C + (16 if seed % 3 else 0))
    matrix, _ = cuda_weight(shape, block_size, 0.5, dtype, order="shuffled")
    for inner in (8, 72, 520):
        a, b = torch.randn(shape[0], inner).to(dtype), torch.randn(inner, shape[1]).to(dtype)
        want = blocks_of(a.double() @ b.double(), move(matrix, "cpu"))
        for left in (a.cuda(), a.t().contiguous().cuda().t()):
            for right in (b.cuda(), b.t().contiguous().cuda().t()):
                assert_product(f"inner {inner}", block_sddmm(left, right, matrix), want, dtype)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("block_size", [(128, 128), (64, 64), (32, 32), (16, 16)], ids=str)
def test_every_block_counts_once(dtype, block_size, seed):
    """Small integers: every sum is exact, so that one block too many or too few shows, at sizes of many tiles."""
    shape = (1664, 2432)
    density = 0.4 if block_size == (32, 32) else 0.2  # so that both small ones run in panels
    matrix, dense = cuda_weight(shape, block_size, density, dtype, integers=True, order="shuffled")
    dense = dense.cuda()
    for tokens in (3, 16, 700, 1300):
        x = torch.randint(-2, 3, (tokens, shape[1])).to(dtype).cuda()
        y = torch.randint(-2, 3, (tokens, shape[0])).to(dtype).cuda()
        assert torch.equal(block_sparse_linear(x, matrix), (x.double() @ dense.t()).to(dtype))
        assert torch.equal(block_sparse_linear(y, matrix, transposed=True), (y.double() @ dense).to(dtype))
        want = blocks_of((y.double().t() @ x.double()).cpu(), move(matrix, "cpu")).to(dtype)
        assert torch.equal(block_sddmm(y.t(), x, matrix).cpu(), want)


@pytest.mark.parametrize("block_size", [(16, 16), (32, 32), (16, 32), (32, 16)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_many_small_blocks(dtype, block_size, seed):
    """Enough tiles for the kernels in which block rows share x, with parts of tiles and blocks beyond the matrix."""
    tokens, features, inner = 1000, 4104, 1048
    for transposed in (False, True):
        shape = (inner, features) if transposed else (features, inner)
        matrix, dense = cuda_weight(shape, block_size, 0.3, dtype, order="shuffled")
        operand = dense.cuda() if transposed else dense.cuda().t()
        x, bias = torch.randn(tokens, inner).to(dtype).cuda(), torch.randn(features).to(dtype).cuda()
        sums = x.double() @ operand
        got = block_sparse_linear(x, matrix, transposed=transposed)
        assert_product("plain", got.cpu(), sums.cpu(), dtype)
        got = block_sparse_linear(x, matrix, bias, "silu", transposed=transposed)
        assert_product("finished", got.cpu(), ACTIVATIONS["silu"](sums + bias.double()).cpu(), dtype)


def test_mlp_and_gradients(seed):
    """Forward and backward of a gated MLP of blocks of 64 and 128 beside the dense one in float64."""
    gate, up = (cuda_weight((512, 384), (64, 64), 0.5) for _ in range(2))
    down = cuda_weight((384, 512), (128, 128), 0.6)
    for tokens in (5, 333):
        x = torch.randn(tokens, 384).bfloat16().cuda().requires_grad_()
        matrices = [matrix.with_values(matrix.values.clone().requires_grad_()) for matrix, _ in (gate, up, down)]
        with torch.no_grad():
            fused = block_sparse_mlp(x, *matrices)
        out = block_sparse_mlp(x, *matrices)
        grad = torch.randn_like(out)
        got = torch.autograd.grad(out, [x, *(m.values for m in matrices)], grad)
        leaves = [
            x.detach().double().cpu().requires_grad_(),
            *(d.clone().requires_grad_() for _, d in (gate, up, down)),
        ]
        inner = torch.nn.functional.silu(leaves[0] @ leaves[1].t()) * (leaves[0] @ leaves[2].t())
        want_out = inner @ leaves[3].t()
        want = list(torch.autograd.grad(want_out, leaves, grad.double().cpu()))
        want[1:] = [blocks_of(w, move(m.detach(), "cpu")) for w, m in zip(want[1:], matrices, strict=True)]
        for name, a, b in zip(
            ("out", "fused", "x", "gate", "up", "down"), (out, fused, *got), (want_out, want_out, *want), strict=True
        ):
            assert (a.double().cpu() - b).norm() <= 2e-2 * b.norm(), name


@pytest.fixture
def allow_tf32():
    before = torch.backends.cuda.matmul.allow_tf32

    def allow(allowed: bool):
        torch.backends.cuda.matmul.allow_tf32 = allowed

    yield allow
    allow(before)


@pytest.mark.parametrize("block_size", [(64, 64), (16, 16), (5, 3)], ids=str)
def test_tf32_where_torch_allows_it(block_size, allow_tf32, seed):
    R, C = block_size
    matrix, dense = cuda_weight((4 * R, 5 * C), block_size, 0.6, torch.float32)
    matrix = matrix.with_values(matrix.values.nan_to_num().requires_grad_())
    x, grad = torch.randn(70, 5 * C), torch.randn(70, 4 * R)
    want = (
        x.double() @ dense.t(),
        grad.double() @ dense,
        blocks_of(grad.double().t() @ x.double(), move(matrix.detach(), "cpu")),
    )
    for allowed in (False, True):
        allow_tf32(allowed)
        leaf = x.cuda().requires_grad_()
        out = block_sparse_linear(leaf, matrix)
        got = (out, *torch.autograd.grad(out, (leaf, matrix.values), grad.cuda()))
        for a, b in zip(got, want, strict=True):
            error = float((a.detach().double().cpu() - b).norm() / b.norm())
            assert 2e-5 < error < 1e-3 if allowed else error < 2e-6


@pytest.mark.parametrize("tokens", [1, 9, 16, 70, 700])
@pytest.mark.parametrize(
    "blocks",
    [
        ((128, 128), (128, 128)),
        ((64, 64), (64, 128)),
        ((192, 64), (192, 64)),
        ((128, 64), (64, 64)),
        ((32, 32), (32, 32)),
        ((16, 8), (16, 16)),
    ],
    ids=str,
)
@pytest.mark.parametrize("activation", ["silu", "gelu", "relu"])
def test_gated_mlp(activation, blocks, tokens, seed):
    """Gate and up of the same and of different blocks: in one pass where a kernel can, else in two."""
    hidden, features = 384, 256
    gate, up = (cuda_weight((hidden, features), block, 0.4) for block in blocks)
    down = cuda_weight((features, hidden), blocks[0], 0.6)
    x = torch.randn(tokens, features).bfloat16()
    act = ACTIVATIONS[activation]

    def dense(x, gate, up, down):
        return (act(x @ gate.t()) * (x @ up.t())) @ down.t()

    want = dense(x.double(), gate[1], up[1], down[1])
    base = dense(x, *(dense.bfloat16() for _, dense in (gate, up, down)))
    got = block_sparse_mlp(x.cuda(), gate[0], up[0], down[0], activation)
    assert_passes("mlp", got, want, [base], torch.bfloat16)


@pytest.mark.parametrize("activation", [name for name in ACTIVATIONS if name])
@pytest.mark.parametrize("block_size", [(128, 128), (64, 64), (16, 16)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_activations(dtype, block_size, activation, seed):
    """Where large blocks finish their sums in registers, with fast functions: what 16 bits can show."""
    weight, dense = cuda_weight((2 * block_size[0] - 8, 512), block_size, 0.7, dtype)
    for tokens in (9, 300):
        x, bias = torch.randn(tokens, 512).to(dtype), torch.randn(dense.shape[0]).to(dtype)
        x[0] *= 20
        for b in (bias, None):
            got = block_sparse_linear(x.cuda(), weight, None if b is None else b.cuda(), activation)
            sums = x.double() @ dense.t() + (0 if b is None else b.double())
            assert_passes(
                activation, got, ACTIVATIONS[activation](sums), [ACTIVATIONS[activation](sums).to(dtype)] * 2, dtype
            )


def test_nothing_reaches_what_is_not_listed(seed):
    """NaN in a feature that no block of a row lists: other tests have small blocks, here are the kernels of large ones."""
    for block_size, tokens in (((128, 128), 300), ((64, 64), 300), ((32, 32), 300), ((16, 16), 300), ((128, 128), 9)):
        R, C = block_size
        matrix, _ = cuda_weight((6 * R, 7 * C), block_size, 0.4)
        x = torch.randn(tokens, 7 * C).bfloat16().cuda()
        clean = block_sparse_linear(x, matrix)
        spoiled = x.clone()
        spoiled[:, C : 2 * C] = torch.nan
        listed = torch.zeros(6, dtype=torch.bool, device="cuda")
        listed[matrix.block_rows()[matrix.col_indices == 1]] = True
        listed = listed.repeat_interleave(R)
        got = block_sparse_linear(spoiled, matrix)
        assert torch.equal(got[:, ~listed], clean[:, ~listed]) and got[:, listed].isnan().all()
        spoiled = x.clone()
        spoiled[3] = torch.nan
        others = torch.arange(tokens, device="cuda") != 3
        assert torch.equal(block_sparse_linear(spoiled, matrix)[others], clean[others])


# ---- indices that lead nowhere


BAD = {
    "descends": ([0, 3, 2, 4], [0, 1, 2, 0]),
    "beyond the blocks": ([0, 1, 9, 4], [0, 1, 2, 0]),
    "negative offset": ([0, -5, 2, 4], [0, 1, 2, 0]),
    "huge offsets": ([2**31 - 1] * 4, [0, 1, 2, 0]),
    "negative columns": ([0, 1, 2, 4], [0, -1, -(2**31), 0]),
    "huge columns": ([0, 1, 2, 4], [0, 4, 9, 2**31 - 1]),
}


@pytest.mark.parametrize("block_size", [(16, 8), (16, 16), (32, 32), (64, 64), (128, 128), (5, 3)], ids=str)
@pytest.mark.parametrize("index", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("name", BAD)
def test_bad_indices_are_skipped(name, index, block_size):
    """Nothing is read out of bounds; a column out of range adds nothing."""
    crow, col = BAD[name]
    R, C = block_size
    matrix = BlockSparseMatrix(
        torch.randn(4, R, C, device="cuda").bfloat16(),
        torch.tensor(crow, dtype=index, device="cuda"),
        torch.tensor(col, dtype=index, device="cuda"),
        shape=(3 * R, 4 * C),
    )
    for tokens in (5, 200):
        x, y = (
            torch.randn(tokens, 4 * C, device="cuda").bfloat16(),
            torch.randn(tokens, 3 * R, device="cuda").bfloat16(),
        )
        out = block_sparse_linear(x, matrix)
        block_sparse_linear(y, matrix, transposed=True)
        block_sparse_mm(matrix, x.t())
        block_sddmm(y.t(), x, matrix)
        torch.cuda.synchronize()
        if "columns" in name:
            dense = torch.zeros(3 * R, 4 * C, dtype=torch.float64)
            for p, (i, j) in enumerate(zip((0, 1, 2, 2), col, strict=True)):
                if 0 <= j < 4:
                    dense[i * R : i * R + R, j * C : j * C + C] += matrix.values[p].double().cpu()
            assert_product(name, out, x.double().cpu() @ dense.t(), torch.bfloat16)
    with pytest.raises(RuntimeError):
        matrix.check()


@pytest.mark.parametrize("block_size", [(64, 64), (32, 16)], ids=str)
def test_bad_transposes_are_skipped(block_size):
    matrix, _ = cuda_weight((256, 256), block_size, 0.7)
    good = matrix.transposed_pattern()
    y = torch.randn(70, 256, device="cuda").bfloat16()
    for place in range(3):
        for value in (-1, -(2**31), 10**6, 2**31 - 1):
            tensors = [tensor.clone() for tensor in good]
            tensors[place][1] = value
            OPS.block_sparse_linear(
                y, matrix.values, None, matrix.crow_indices, matrix.col_indices, 256, True, 0, None, *tensors
            )
    torch.cuda.synchronize()


@pytest.mark.parametrize("index", [torch.int32, torch.int64], ids=str)
def test_transposed_pattern_is_that_of_the_cpu(index, seed):
    for shape, block_size, density in (
        ((3000, 5000), (8, 8), 0.3),
        ((40, 90), (16, 1), 0.5),
        ((64, 64), (64, 64), 0.0),
    ):
        weight = random_weight(shape, block_size, density, index=index, order="shuffled")
        want = weight.matrix.transposed_pattern()
        on_gpu = move(
            BlockSparseMatrix(
                *(getattr(weight.matrix, n) for n in ("values", "crow_indices", "col_indices")), shape=shape
            ),
            "cuda",
        )
        for a, b in zip(on_gpu.transposed_pattern(), want, strict=True):
            assert a.dtype == index and torch.equal(a.cpu(), b)


# ---- streams, graphs, compile, repetition


def everything(x, y, gate, up, down):
    return (
        block_sparse_linear(x, up, None, "gelu"),
        block_sparse_linear(y, up, transposed=True),
        block_sparse_mm(up, x.t()),
        block_sddmm(y.t(), x, up),
        block_sparse_mlp(x, gate, up, down),
    )


@pytest.fixture(params=[((64, 64), 300), ((128, 128), 4), ((16, 16), 300), ((5, 3), 20)], ids=str)
def problem(request, seed):
    block_size, tokens = request.param
    R, C = block_size
    gate, up = (cuda_weight((6 * R, 5 * C), block_size)[0] for _ in range(2))
    down = cuda_weight((4 * R, 6 * R), (R, R))[0]
    x, y = torch.randn(tokens, 5 * C).bfloat16().cuda(), torch.randn(tokens, 6 * R).bfloat16().cuda()
    return x, y, gate, up, down


def test_results_repeat(problem):
    first = everything(*problem)
    for _ in range(5):
        for a, b in zip(everything(*problem), first, strict=True):
            assert torch.equal(a, b)


def test_graph_and_side_stream(problem):
    x, y, *matrices = problem
    x, y = x.clone(), y.clone()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        everything(x, y, *matrices)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=side):
            outs = everything(x, y, *matrices)
    torch.cuda.current_stream().wait_stream(side)
    for _ in range(2):
        x.copy_(torch.randn_like(x)), y.copy_(torch.randn_like(y))
        graph.replay()
        for a, b in zip(outs, everything(x, y, *matrices), strict=True):
            assert torch.equal(a, b)


def test_transposes_built_in_a_graph_are_not_kept(seed):
    matrix, dense = cuda_weight((256, 192), (64, 64))
    y = torch.randn(40, 256).bfloat16().cuda()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = block_sparse_linear(y, matrix, transposed=True)
    assert matrix.ccol_indices is None
    graph.replay()
    assert torch.equal(out, block_sparse_linear(y, matrix, transposed=True))
    assert_product("x W", out, y.double().cpu() @ dense, torch.bfloat16)


def test_compile(problem):
    torch._dynamo.reset()
    compiled = torch.compile(everything, fullgraph=True, backend="aot_eager")
    for a, b in zip(compiled(*problem), everything(*problem), strict=True):
        assert torch.equal(a, b)
    torch._dynamo.reset()


def test_opcheck(seed):
    matrix = cuda_weight((96, 128), (32, 64), dtype=torch.float32)[0]
    pattern = matrix.crow_indices, matrix.col_indices
    x = torch.randn(9, 128, device="cuda", requires_grad=True)
    torch.library.opcheck(OPS.block_sparse_linear.default, (x, matrix.values.requires_grad_(), None, *pattern, 96))
    torch.library.opcheck(OPS.transpose_block_sparse.default, (*pattern, 2))


# ---- what is refused, and what info says


def test_refusals(seed):
    weight = random_weight((64, 64), (4, 1), 0.5, torch.int8)
    with pytest.raises(RuntimeError, match="int8 weights run on the CPU only"):
        block_sparse_linear(torch.randn(3, 64, device="cuda"), move(weight.matrix, "cuda"))
    double = cuda_weight((64, 64), (8, 8), dtype=torch.float64)[0]
    with pytest.raises(RuntimeError, match="float64 runs on the CPU only"):
        block_sparse_linear(torch.randn(3, 64, device="cuda", dtype=torch.float64), double)
    matrix = cuda_weight((64, 64), (8, 8))[0]
    with pytest.raises(RuntimeError, match="device"):
        block_sparse_linear(torch.randn(3, 64).bfloat16(), matrix)


def test_plan():
    assert plan(torch.bfloat16, (64, 64), 4)["few_tokens"] == "runs"
    assert plan(torch.bfloat16, (64, 64), 400)["sm80"] == "runs"
    if torch.cuda.get_device_capability() == (9, 0):
        assert plan(torch.bfloat16, (32, 16), 400)["small_blocks"] == "runs"
    assert "float64" in plan(torch.float64, (64, 64), 400)["sm80"]
