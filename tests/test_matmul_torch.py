"""What torch asks of the block-sparse products besides their results: gradients, fake kernels, autocast, vmap, compile,
export, and their containers as pytrees."""

import io

import pytest
import torch
import torch._dynamo.testing
from torch.library import opcheck
from torch.utils import _pytree as pytree

import sparsekit
from sparse_weights import ACTIVATIONS, blocks_of, random_weight, rounded_tokens
from sparsekit import BlockSparseMatrix, NMGMatrix, block_sddmm, block_sparse_linear, block_sparse_mlp, block_sparse_mm

OPS = torch.ops.sparsekit


def pattern_of(matrix) -> tuple:
    return matrix.crow_indices, matrix.col_indices


def close(actual, expected, factor: float = 1.0):
    torch.testing.assert_close(actual, expected.to(actual.dtype), rtol=2e-5 * factor, atol=2e-5 * factor)


@pytest.fixture
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


# ---- opcheck


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("kind", ["plain", "bias-gelu", "int8"])
def test_opcheck_linear(kind, transposed, seed):
    weight = random_weight((33, 40), (8, 4), 0.5, torch.int8 if kind == "int8" else torch.float32)
    matrix = weight.matrix
    features, inner = (40, 33) if transposed else (33, 40)
    x = torch.randn(2, 5, inner, requires_grad=not (transposed and kind == "int8"))
    values = matrix.values if kind == "int8" else matrix.values.nan_to_num().requires_grad_()
    bias = torch.randn(features, requires_grad=True) if kind == "bias-gelu" else None
    number = 2 if kind == "bias-gelu" else 0
    args = (x, values, bias, *pattern_of(matrix), features, transposed, number, matrix.scales)
    opcheck(OPS.block_sparse_linear.default, args)
    opcheck(OPS.block_sparse_linear.default, (*args, *matrix.transposed_pattern()))


def test_opcheck_others(seed):
    matrix = random_weight((32, 40), (8, 4), 0.5).matrix
    values = matrix.values.requires_grad_()
    dense = torch.randn(2, 40, 7, requires_grad=True)
    opcheck(OPS.block_sparse_mm.default, (dense, values, *pattern_of(matrix), 32))
    opcheck(
        OPS.block_sparse_mm.default, (torch.randn(32, 7, requires_grad=True), values, *pattern_of(matrix), 40, True)
    )
    a, b = torch.randn(32, 6, requires_grad=True), torch.randn(6, 40, requires_grad=True)
    opcheck(OPS.block_sddmm.default, (a, b, *pattern_of(matrix), [8, 4]))
    opcheck(OPS.transpose_block_sparse.default, (*pattern_of(matrix), 10))
    opcheck(OPS.check_block_sparse.default, (*pattern_of(matrix), 10))
    up, down = random_weight((16, 40), (8, 4), 0.5).matrix, random_weight((24, 16), (8, 8), 0.5).matrix
    gate = random_weight((16, 40), (4, 4), 0.5).matrix
    x = torch.randn(3, 40, requires_grad=True)
    for first in (gate, None):
        given = [] if first is None else [first]
        parts = [m.values.requires_grad_() for m in (*given, up, down)]
        parts = parts if first is not None else [None, *parts]
        patterns = [None, None] if first is None else [*pattern_of(first)]
        args = (x, *parts, *patterns, *pattern_of(up), *pattern_of(down), 16, 24, 4)
        opcheck(OPS.block_sparse_mlp.default, args)


# ---- gradients


SHAPES = {"linear": (2, 3), "mm": (3, 2)}


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("block_size", [(2, 3), (4, 1), (1, 4)], ids=str)
def test_gradcheck(block_size, transposed, seed):
    """First and second derivatives in float64, where only the reference runs."""
    matrix = random_weight((6, 8), block_size, 0.6, torch.float64).matrix
    inner, features = (6, 8) if transposed else (8, 6)
    values = matrix.values.nan_to_num().requires_grad_()
    x = torch.randn(3, inner, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(features, dtype=torch.float64, requires_grad=True)
    a, b = (torch.randn(size, dtype=torch.float64, requires_grad=True) for size in ((6, 3), (3, 8)))
    y = torch.randn(2, inner, 3, dtype=torch.float64, requires_grad=True)
    for function, inputs in (
        (
            lambda x, v, bias: block_sparse_linear(x, matrix.with_values(v), bias, transposed=transposed),
            (x, values, bias),
        ),
        (lambda y, v: block_sparse_mm(matrix.with_values(v), y, transposed=transposed), (y, values)),
        (lambda a, b: block_sddmm(a, b, matrix), (a, b)),
    ):
        assert torch.autograd.gradcheck(function, inputs)
        assert torch.autograd.gradgradcheck(function, inputs)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradcheck_of_activations(activation, seed):
    """The function, and the op itself, whose backward computes again what went into its activation."""
    matrix = random_weight((6, 8), (2, 4), 0.7, torch.float64).matrix
    number = list(ACTIVATIONS).index(activation)
    inputs = (
        torch.randn(3, 8, dtype=torch.float64, requires_grad=True),
        matrix.values.clone().requires_grad_(),
        torch.randn(6, dtype=torch.float64, requires_grad=True),
    )

    def function(x, values, bias):
        return block_sparse_linear(x, matrix.with_values(values), bias, activation)

    def op(x, values, bias):
        return OPS.block_sparse_linear(x, values, bias, *pattern_of(matrix), 6, False, number)

    assert torch.autograd.gradcheck(function, inputs) and torch.autograd.gradcheck(op, inputs)


@pytest.mark.parametrize("gated", [True, False])
def test_gradcheck_of_the_mlp(gated, seed):
    gate, up = (random_weight((6, 4), (2, 2), 0.7, torch.float64).matrix for _ in range(2))
    down = random_weight((4, 6), (2, 3), 0.7, torch.float64).matrix
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    values = [m.values.clone().requires_grad_() for m in ((gate, up, down) if gated else (up, down))]

    def function(x, *values):
        first = gate.with_values(values[0]) if gated else None
        return block_sparse_mlp(x, first, up.with_values(values[-2]), down.with_values(values[-1]))

    def op(x, *values):
        first = (values[0], pattern_of(gate)) if gated else (None, (None, None))
        indices = (*first[1], *pattern_of(up), *pattern_of(down))
        return OPS.block_sparse_mlp(x, first[0], values[-2], values[-1], *indices, 6, 4)

    assert torch.autograd.gradcheck(function, (x, *values))
    assert torch.autograd.gradcheck(op, (x, *values))
    close(op(x, *values), function(x, *values))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_gradients_against_dense(cpu_backend, dtype, seed):
    weight = random_weight((96, 130), (16, 8), 0.4, dtype)
    x, bias = torch.randn(3, 17, 130).to(dtype), torch.randn(96).to(dtype)
    leaves = [x.requires_grad_(), weight.matrix.values.requires_grad_(), bias.requires_grad_()]
    grad = torch.randn(3, 17, 96).to(dtype)
    with cpu_backend.forced():
        out = block_sparse_linear(x, weight.matrix, bias, "silu")
        got = torch.autograd.grad(out, leaves, grad)
    dense = [
        x.detach().double().requires_grad_(),
        weight.dense.requires_grad_(),
        bias.detach().double().requires_grad_(),
    ]
    want_out = torch.nn.functional.silu(torch.nn.functional.linear(*dense))
    want = list(torch.autograd.grad(want_out, dense, grad.double()))
    want[1] = blocks_of(want[1], weight.matrix)
    limit = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}[dtype]
    for name, a, b in zip(("x", "values", "bias"), got, want, strict=True):
        assert a.dtype == dtype and a.shape == b.shape
        assert (a.double() - b).norm() <= limit * b.norm(), name


def test_int8_gradients(seed):
    """Straight through the rounding of the input; the product with a transposed int8 weight has none."""
    weight = random_weight((32, 40), (4, 1), 0.5, torch.int8)
    x, grad = torch.randn(5, 40, requires_grad=True), torch.randn(5, 32)
    (got,) = torch.autograd.grad(block_sparse_linear(x, weight.matrix), x, grad)
    close(got, grad.double() @ weight.dense)
    y = torch.randn(5, 32, requires_grad=True)
    with pytest.raises(RuntimeError, match="has no derivative"):
        block_sparse_linear(y, weight.matrix, transposed=True).sum().backward()


def test_gradients_of_sparse_bsr(seed):
    """A sparse_bsr parameter gets a dense gradient, twice; one made from a dense parameter passes it on."""
    dense = torch.randn(32, 24) * (torch.rand(4, 3) < 0.5).repeat_interleave(8, 0).repeat_interleave(8, 1)
    x = torch.randn(5, 24)
    leaf = dense.to_sparse_bsr((8, 8)).requires_grad_()
    for times in (1, 2):
        block_sparse_linear(x, leaf).square().sum().backward()
        close(leaf.grad, times * (2 * (x @ dense.t()).t() @ x) * (dense != 0), 10)
    parameter = dense.clone().requires_grad_()
    block_sparse_linear(x, parameter.to_sparse_bsr((8, 8))).square().sum().backward()
    close(parameter.grad, (2 * (x @ dense.t()).t() @ x) * (dense != 0), 10)


def test_training_reduces_the_loss(seed):
    weight = random_weight((64, 48), (16, 16), 0.5)
    matrix = weight.matrix.requires_grad_()
    optimizer = torch.optim.SGD([matrix.values], lr=10.0)
    x = torch.randn(200, 48)
    target = x @ (weight.dense + torch.randn(64, 48) * 0.3).float().t()
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = (block_sparse_linear(x, matrix) - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    kept = blocks_of(torch.ones(64, 48), matrix).bool()
    assert losses[-1] < 0.8 * losses[0] and kept.all() and matrix.values.isfinite().all()


# ---- autocast, vmap


def test_autocast(seed):
    weight, quantized = random_weight((32, 40), (8, 4), 0.5), random_weight((32, 40), (4, 1), 0.5, torch.int8)
    x = torch.randn(6, 40)
    with torch.autocast("cpu", torch.bfloat16):
        out = block_sparse_linear(x, weight.matrix, torch.zeros(32))
        int8 = block_sparse_linear(x, quantized.matrix)
        values = block_sddmm(torch.randn(32, 5), torch.randn(5, 40), weight.matrix)
        product = block_sparse_mm(weight.matrix, x.t())
    assert out.dtype == int8.dtype == values.dtype == product.dtype == torch.bfloat16
    close(out, (x.bfloat16().double() @ weight.dense.bfloat16().double().t()).bfloat16(), 1000)
    close(int8, (rounded_tokens(x.bfloat16()) @ quantized.dense.t()).bfloat16(), 1000)


@pytest.mark.parametrize("dims", [(0, None), (1, None), (2, None), (None, 0), (1, 1)], ids=str)
def test_vmap(dims, seed):
    matrix, down = random_weight((32, 40), (8, 4), 0.5).matrix, random_weight((16, 32), (8, 8), 0.5).matrix
    x = torch.randn(4, 5, 40) if dims[0] is None else torch.randn(3, 4, 5, 40).movedim(0, dims[0])
    values = matrix.values if dims[1] is None else torch.randn(3, *matrix.values.shape).movedim(0, dims[1])

    def element(tensor, dim, index):
        return tensor if dim is None else tensor.select(dim, index)

    for function in (
        lambda x, v: block_sparse_linear(x, matrix.with_values(v)),
        lambda x, v: block_sparse_mm(matrix.with_values(v), x.mT),
        lambda x, v: block_sparse_mlp(x, matrix, matrix.with_values(v), down),
        lambda x, v: block_sddmm(x[0, :, :32].t(), x[0], matrix) * v,
    ):
        got = torch.vmap(function, in_dims=dims)(x, values)
        want = torch.stack([function(element(x, dims[0], i), element(values, dims[1], i)) for i in range(3)])
        close(got, want)


def test_vmap_through_autograd(seed):
    matrix = random_weight((32, 40), (8, 4), 0.5).matrix.requires_grad_()
    x = torch.randn(5, 40, requires_grad=True)
    out = block_sparse_linear(x, matrix)
    grads = torch.randn(3, *out.shape)
    together = torch.autograd.grad(out, (x, matrix.values), grads, is_grads_batched=True, retain_graph=True)
    apart = [torch.autograd.grad(out, (x, matrix.values), grad, retain_graph=True) for grad in grads]
    for got, want in zip(together, zip(*apart, strict=True), strict=True):
        close(got, torch.stack(want))


# ---- compile, export, pytrees


@pytest.mark.parametrize("engine", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@torch.fx.experimental._config.patch(use_duck_shape=False)
def test_compile_with_dynamic_shapes(engine, seed, fresh_dynamo):
    """One graph, forward and backward, weights as arguments; another number of tokens and blocks does not recompile."""
    counter = torch._dynamo.testing.CompileCounterWithBackend(engine)

    @torch.compile(fullgraph=True, dynamic=True, backend=counter)
    def model(x, first, second, bias):
        hidden = block_sparse_linear(x * 1.5, first, bias, "gelu")
        return block_sparse_mm(second, hidden.mT), block_sparse_linear(hidden, first, transposed=True)

    for tokens in (19, 33, 70):
        first, second = random_weight((96, 64), (16, 16), 0.5), random_weight((32, 96), (8, 8), 0.5)
        for weight in (first, second):
            weight.matrix.requires_grad_()
        x, bias = torch.randn(2, tokens, 64, requires_grad=True), torch.randn(96, requires_grad=True)
        outs = model(x, first.matrix, second.matrix, bias)
        hidden = torch.nn.functional.gelu((x * 1.5) @ first.dense.float().t() + bias)
        for got, want in zip(outs, (second.dense.float() @ hidden.mT, hidden @ first.dense.float()), strict=True):
            close(got, want, 10)
        leaves = [x, first.matrix.values, second.matrix.values, bias]
        grads = torch.autograd.grad(sum(out.sum() for out in outs), leaves)
        eager = model._torchdynamo_orig_callable(x, first.matrix, second.matrix, bias)
        for got, want in zip(grads, torch.autograd.grad(sum(out.sum() for out in eager), leaves), strict=True):
            close(got, want, 100)
    assert counter.frame_count == 1


def test_compile_mlp_sddmm_and_nmg(seed, fresh_dynamo):
    gate, up = (random_weight((32, 40), (8, 8), 0.5).matrix for _ in range(2))
    down, nmg = random_weight((16, 32), (8, 8), 0.5).matrix, NMGMatrix.from_dense(torch.randn(32, 40), 1, 4, 8)
    bsr = BlockSparseMatrix.from_dense(torch.randn(32, 40), (4, 1)).quantized()

    def model(x, gate, up, down, nmg, bsr):
        values = block_sddmm(x.t()[:32], x, up)
        return block_sparse_mlp(x, gate, up, down), values, block_sparse_linear(x, nmg), block_sparse_linear(x, bsr)

    x = torch.randn(40, 40)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")(x, gate, up, down, nmg, bsr)
    for got, want in zip(compiled, model(x, gate, up, down, nmg, bsr), strict=True):
        close(got, want)


class Linear(torch.nn.Module):
    def forward(self, x, weight):
        return block_sparse_linear(x, weight, activation="silu")


def test_export(seed):
    weight = random_weight((32, 40), (8, 4), 0.5)
    for matrix in (weight.matrix, NMGMatrix.from_dense(torch.randn(32, 40), 2, 8, 4)):
        x = torch.randn(3, 40)
        for strict in (False, True):
            program = torch.export.export(Linear(), (x, matrix), strict=strict)
            assert OPS.block_sparse_linear.default in {node.target for node in program.graph.nodes}
            close(program.module()(x, matrix), block_sparse_linear(x, matrix, activation="silu"))
        stream = io.BytesIO()
        torch.export.save(torch.export.export(Linear(), (x, matrix)), stream)
        stream.seek(0)
        close(torch.export.load(stream).module()(x, matrix), block_sparse_linear(x, matrix, activation="silu"))


def test_containers_are_pytrees(tmp_path, seed):
    quantized = random_weight((32, 40), (4, 1), 0.5, torch.int8).matrix
    quantized.transposed_pattern()
    for matrix in (
        quantized,
        random_weight((30, 41), (8, 4), 0.5).matrix,
        NMGMatrix.from_dense(torch.randn(8, 16), 1, 4, 2),
    ):
        leaves, spec = pytree.tree_flatten(matrix)
        assert all(isinstance(leaf, torch.Tensor) for leaf in leaves)
        again = pytree.tree_unflatten(leaves, spec)
        assert type(again) is type(matrix) and again.shape == matrix.shape and again.values is matrix.values
        moved = matrix.to("cpu")
        assert torch.equal(moved.to_dense(), matrix.to_dense()) or matrix.to_dense().isnan().any()
        torch.save(matrix, tmp_path / "matrix.pt")
        loaded = torch.load(tmp_path / "matrix.pt", weights_only=True)
        assert loaded.shape == matrix.shape and torch.equal(loaded.values, matrix.values) or matrix.values.isnan().any()
        assert matrix.detach().values.data_ptr() == matrix.values.data_ptr() and str(matrix.values.dtype) in repr(
            matrix
        )


def test_ops_without_a_kernel_for_a_device_say_so():
    matrix = random_weight((32, 40), (8, 4), 0.5).matrix.to("meta")
    x = torch.randn(3, 40, device="meta")
    assert block_sparse_linear(x, matrix).device.type == "meta"  # the fake kernel
    if not torch.cuda.is_available():
        assert not torch._C._dispatch_has_kernel_for_dispatch_key("sparsekit::block_sparse_linear", "CUDA")


def test_reference_is_reachable():
    assert "reference: runs" in OPS.matmul_plan_cpu(torch.float32, [16, 16])
    with sparsekit.isa("reference"):
        assert OPS.matmul_plan_cpu(torch.float32, [16, 16]).count("SPARSEKIT_ISA asks for a lower one") >= 1
