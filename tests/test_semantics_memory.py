"""docs/semantics.md, what is read and written: NaN that reaches nothing, bad indices, strides, sizes of 0 and past 2^31."""

import contextlib
import math
import mmap

import pytest
import torch

import sparsekit
from backends import BACKENDS, Backend
from numerics import check_backward, check_forward, dense_attention, make_problem, poisoned
from problems import BASE
from sparsekit import BlockPattern
from test_semantics_masks import BLOCK, DIM, LEN_K, LEN_Q, qkv, raw

OPS = torch.ops.sparsekit
ROWS = [[0, 2], [], [2]]  # key blocks 1 and 3 are listed by no query block
TAIL = (64, 64)


# ---- NaN and Inf


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf], ids=str)
@pytest.mark.parametrize("full", [False, True], ids=["partial", "full"])
def test_unlisted_blocks_reach_nothing(backend: Backend, bad, full):
    """Neither results nor gradients; also -1 slots do not read the last block."""
    rows = [[0, -1, 2], [-1, -1], [2]]
    pattern = raw(full=rows) if full else raw(rows)
    query, key, value = (x.to(backend.device) for x in qkv())
    dirty_key, dirty_value = key.clone(), value.clone()
    for block in (1, 3):
        dirty_key[:, :, block * 64 : (block + 1) * 64] = bad
        dirty_value[:, :, block * 64 : (block + 1) * 64] = bad
    with backend.running(torch.float32, DIM, block_size=BLOCK, backward=True):
        results = []
        for tensors in ((query, key, value), (query, dirty_key, dirty_value)):
            leaves = [x.clone().requires_grad_() for x in tensors]
            out, lse = sparsekit.block_sparse_attention(*leaves, pattern.to(backend.device), return_lse=True)
            with poisoned(backend.device):
                results.append([out, lse, *torch.autograd.grad(out.square().sum(), leaves)])
        for clean, dirty in zip(*results, strict=True):
            assert torch.equal(clean, dirty)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("lengths", [(70, 65), (130, 200), (1, 1), (64, 127)], ids=str)
@pytest.mark.parametrize("full", [False, True], ids=["partial", "full"])
def test_ragged_tail_reaches_nothing(backend: Backend, lengths, dtype, full):
    """Query, key and value are the front of longer tensors that go on with NaN: as a cache does, or the next head."""
    blocks = [list(range(-(-lengths[1] // 64)))] * -(-lengths[0] // 64)
    pattern = (raw(full=blocks, lengths=lengths) if full else raw(blocks, lengths=lengths)).to(backend.device)
    tensors = [x.to(backend.device) for x in qkv(len_q=lengths[0], len_k=lengths[1], dtype=dtype)]
    longer = [torch.cat([x, torch.full((1, 2, 140, DIM), math.nan, dtype=dtype, device=x.device)], 2) for x in tensors]
    with backend.running(dtype, DIM, block_size=BLOCK, backward=True), poisoned(backend.device):
        results = []
        for leaves in (
            tensors,
            [x[:, :, :length] for x, length in zip(longer, (lengths[0], *lengths[1:] * 2), strict=True)],
        ):
            leaves = [x.detach().requires_grad_() for x in leaves]
            out, lse = sparsekit.block_sparse_attention(*leaves, pattern, return_lse=True)
            results.append([out, lse, *torch.autograd.grad(out.float().square().sum(), leaves)])
        for clean, dirty in zip(*results, strict=True):
            assert clean.isfinite().all() and torch.equal(clean, dirty)


@pytest.mark.parametrize("where", ["key", "value"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_nan_of_a_listed_block_stays_with_its_rows(backend: Backend, where, dtype):
    """It may reach every row of the query blocks that list it, and reaches no other row, head or batch entry."""
    rows = [[0, 1], [0, 2], [1, 3]]
    tensors = dict(
        zip(("query", "key", "value"), (x.to(backend.device) for x in qkv(batch=2, dtype=dtype)), strict=True)
    )
    with backend.running(dtype, DIM, block_size=BLOCK):
        clean = sparsekit.block_sparse_attention(*tensors.values(), raw(rows).to(backend.device))
        tensors[where][1, 0, 70] = math.nan  # in block 1
        out = sparsekit.block_sparse_attention(*tensors.values(), raw(rows).to(backend.device))
        spared = torch.ones_like(out, dtype=torch.bool)
        spared[1, 0, :64] = spared[1, 0, 128:] = False
        assert torch.equal(out[spared], clean[spared]) and clean.isfinite().all()
        assert out[1, 0, :64].isnan().any(-1).all(), "and it does not vanish"


def test_nan_of_a_query_stays_in_its_row(backend: Backend):
    tensors = [x.to(backend.device) for x in qkv()]
    with backend.running(torch.float32, DIM, block_size=BLOCK):
        clean = sparsekit.block_sparse_attention(*tensors, raw([[0, 1], [0, 2], [1, 3]]).to(backend.device))
        tensors[0][0, 1, 70] = math.nan
        out, lse = sparsekit.block_sparse_attention(
            *tensors, raw([[0, 1], [0, 2], [1, 3]]).to(backend.device), return_lse=True
        )
        spared = torch.ones_like(out, dtype=torch.bool)
        spared[0, 1, 70] = False
        assert torch.equal(out[spared], clean[spared])
        assert out[0, 1, 70].isnan().all() and lse[0, 1, 70].isnan()


# ---- every element is written


@pytest.mark.parametrize("dims", [(64, 64), (80, 80), (192, 128), (20, 20)], ids=str)
def test_every_element_is_written(backend: Backend, dims, seed):
    """Also what belongs to rows and keys that nothing sees: results lie in memory that was full of NaN."""
    case = BASE.with_(head_dim=dims[0], value_dim=dims[1], key_bias=True, sinks=True)
    problem = make_problem(case, backend, seed)
    problem.inputs.pattern = raw(ROWS, lengths=(case.len_q, case.len_k)).to(backend.device)
    check_forward(backend, problem)
    check_backward(backend, problem)


# ---- bad indices


def lists_with(entry=None, count=None, full=False):
    """Lists [0, 1, 2] of 3 query blocks and 2 heads, with one bad entry."""
    indices = torch.tensor([0, 1, 2], dtype=torch.int32).expand(1, 2, 3, 3).clone()
    counts = torch.full((1, 2, 3), 3, dtype=torch.int32)
    if entry is not None:
        indices[0, 1, 2, 1] = entry
    if count is not None:
        counts[0, 1, 2] = count
    return ((counts * 0, indices, counts, indices) if full else (counts, indices, None, None)), counts, indices


BAD = [
    (dict(entry=4), r"kv_indices\[0, 1, 2, 1\] is 4; supported: -1 \(empty\) or a key block from 0 to 3"),
    (dict(entry=-2), r"kv_indices\[0, 1, 2, 1\] is -2"),
    (dict(entry=2**31 - 1), r"kv_indices\[0, 1, 2, 1\] is 2147483647"),
    (dict(entry=-(2**31)), r"kv_indices\[0, 1, 2, 1\] is -2147483648"),
    (dict(count=4), r"kv_num_blocks\[0, 1, 2\] is 4; supported: 0 to 3"),
    (dict(count=2**31 - 1), r"kv_num_blocks\[0, 1, 2\] is 2147483647"),
    (dict(count=-1), r"kv_num_blocks\[0, 1, 2\] is -1"),
]


@pytest.mark.sanitizer
@pytest.mark.parametrize("full", [False, True], ids=["partial", "full"])
@pytest.mark.parametrize("bad, message", BAD, ids=lambda value: str(value) if isinstance(value, dict) else "")
def test_bad_index(backend: Backend, bad, message, full):
    """CPU: an error that names the first bad entry. CUDA: the entry is skipped, the count clamped."""
    lists, counts, indices = lists_with(**bad, full=full)
    pattern = BlockPattern(*lists, block_size=BLOCK, seq_lengths=(LEN_Q, LEN_K))
    tensors = [x.to(backend.device).requires_grad_() for x in qkv()]
    name = "full_" + message if full else message
    if backend.device == "cpu":
        with backend.running(torch.float32, DIM, block_size=BLOCK):
            with pytest.raises(RuntimeError, match=name):
                sparsekit.block_sparse_attention(*tensors, pattern)
            with pytest.raises(RuntimeError, match=name):
                OPS.block_sparse_attn_backward(
                    *(tensors[0], None, *tensors, tensors[0], tensors[0][..., 0]), *lists, None, None, BLOCK
                )
        return
    mended = [[[n for n in row[: max(count, 0)] if 0 <= n < 4] for row, count in zip(*head, strict=True)]
              for head in zip(indices[0].tolist(), counts[0].tolist(), strict=True)]  # fmt: skip
    with backend.running(torch.float32, DIM, block_size=BLOCK, backward=True), poisoned(backend.device):
        results = []
        for each in (pattern, raw(full=mended) if full else raw(mended)):
            out, lse = sparsekit.block_sparse_attention(*tensors, each.to(backend.device), return_lse=True)
            results.append([out, lse, *torch.autograd.grad(out.square().sum(), tensors)])
        for got, want in zip(*results, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.sanitizer
@pytest.mark.parametrize("entry", [1, 2**31 - 1, -2, -(2**31)])
def test_bad_bits_index(backend: Backend, entry):
    """CPU: an error. CUDA: nothing is read out of bounds."""
    lists, _, indices = lists_with()
    index = torch.full_like(indices, -1)
    index[0, 1, 2, 0] = entry
    bits = torch.full((1, 64, 2), -1, dtype=torch.int32)
    pattern = BlockPattern(*lists, bits, index, block_size=BLOCK, seq_lengths=(LEN_Q, LEN_K))
    tensors = [x.to(backend.device) for x in qkv()]
    with backend.running(torch.float32, DIM, block_size=BLOCK):
        if backend.device == "cpu":
            with pytest.raises(RuntimeError, match=rf"partial_bits_index: entry 15 is {entry}"):
                sparsekit.block_sparse_attention(*tensors, pattern)
        else:
            out = sparsekit.block_sparse_attention(*tensors, pattern.to("cuda"))
            whole = sparsekit.block_sparse_attention(*tensors, raw([[0, 1, 2]] * 3).to("cuda"))
            assert torch.equal(out[:, 0], whole[:, 0]) and torch.equal(out[:, 1, :128], whole[:, 1, :128])


@pytest.mark.sanitizer
@pytest.mark.parametrize("offsets, slots", [(2**31 - 1, None), (-5, None), (None, 2**31 - 1), (None, -7)], ids=str)
def test_bad_transpose(backend: Backend, offsets, slots):
    """A transposed list that belongs to other lists, or to none: gradients are anything, but nothing is read or written
    out of bounds, and on the CPU it may be an error."""
    tensors = [x.to(backend.device) for x in qkv()]
    pattern = raw([[0, 1, 2]] * 3).to(backend.device)
    starts, numbers = (x.clone() for x in pattern.transpose())
    if offsets is not None:
        starts[..., 1:3] = offsets
    if slots is not None:
        numbers[..., ::2] = slots
    with backend.running(torch.float32, DIM, block_size=BLOCK, backward=True), torch.no_grad():
        out, lse = sparsekit.block_sparse_attention(*tensors, pattern, return_lse=True)
        lists = (pattern.kv_num_blocks, pattern.kv_indices, None, None, None, None, BLOCK)
        try:
            gradients = OPS.block_sparse_attn_backward(
                out, None, *tensors, out, lse, *lists, transpose_offsets=starts, transpose_slots=numbers
            )
        except RuntimeError as error:
            assert backend.device == "cpu" and "transpose" in str(error), error
        else:
            assert gradients[0].shape == tensors[0].shape
            torch.cuda.synchronize() if backend.device == "cuda" else None


# ---- sizes of zero


@pytest.mark.parametrize(
    "batch, heads, len_q, len_k, slots", [
        (0, 2, 100, 100, 2), (2, 0, 100, 100, 2), (2, 2, 0, 100, 2), (2, 2, 100, 0, 0), (2, 2, 100, 0, 2),
        (2, 2, 100, 100, 0), (0, 0, 0, 0, 0), (2, 2, 0, 0, 0),
    ]
)  # fmt: skip
def test_zero_sized(backend: Backend, batch, heads, len_q, len_k, slots):
    """Empty or zero results of the right shape, gradients too."""
    tensors = [
        torch.randn(batch, heads, n, DIM, device=backend.device, requires_grad=True) for n in (len_q, len_k, len_k)
    ]
    counts = torch.zeros(1, 1, -(-len_q // 64), dtype=torch.int32)
    if len_k and slots:
        counts += 2
    indices = torch.arange(slots, dtype=torch.int32).expand(*counts.shape, slots).contiguous()
    pattern = BlockPattern(counts, indices, block_size=BLOCK, seq_lengths=(len_q, len_k)).to(backend.device)
    sinks = torch.randn(heads, device=backend.device, requires_grad=True)
    bias = torch.randn(1, 1, len_k, device=backend.device, requires_grad=True)
    with backend.running(torch.float32, DIM, block_size=BLOCK, backward=True):
        with poisoned(backend.device):
            out, lse = sparsekit.block_sparse_attention(*tensors, pattern, sinks=sinks, key_bias=bias, return_lse=True)
        assert out.shape == tensors[0].shape and lse.shape == out.shape[:3]
        if not (len_k and slots):
            assert (out == 0).all() and (lse == -math.inf).all()
        inputs = (*tensors, sinks, bias)
        for gradient, x in zip(torch.autograd.grad(out.sum(), inputs), inputs, strict=True):
            assert gradient.shape == x.shape and gradient.isfinite().all()


def test_zero_sequences(cpu_backend):
    query, key = torch.randn(5, 2, DIM), torch.randn(7, 2, DIM)
    empty = torch.zeros(1, 1, 1, 0, dtype=torch.int32)
    pattern = BlockPattern(torch.zeros(1, 1, 1, dtype=torch.int32), empty, block_size=BLOCK, seq_lengths=(5, 7))
    cu = torch.zeros(1, dtype=torch.int32)
    with cpu_backend.running(torch.float32, DIM, block_size=BLOCK, packed=True):
        out, lse = sparsekit.block_sparse_attention_varlen(query, key, key, pattern, cu, cu, 0, 0, return_lse=True)
        assert out.shape == query.shape and (out == 0).all() and (lse == -math.inf).all() and lse.shape == (2, 5)


# ---- strides


def laid_out(x: torch.Tensor, layout: str) -> torch.Tensor:
    """The same values in other memory."""
    batch, heads, rows, dim = x.shape
    wide = torch.full((batch, heads, rows, dim + 8), math.nan, dtype=x.dtype, device=x.device)
    match layout:
        case "BHSD":
            return x.clone()
        case "BSHD":
            return x.transpose(1, 2).contiguous().transpose(1, 2)
        case "HBSD":
            return x.transpose(0, 1).contiguous().transpose(0, 1)
        case "packed-qkv":  # beside others in one tensor [B, S, 3, H, D]
            room = torch.full((batch, rows, 3, heads, dim), math.nan, dtype=x.dtype, device=x.device)
            room[:, :, 1] = x.transpose(1, 2)
            return room[:, :, 1].transpose(1, 2)
        case "padded-rows":
            wide[..., :dim] = x
            return wide[..., :dim]
        case "misaligned-base":  # one element off: a copy
            flat = torch.full((x.numel() + 1,), math.nan, dtype=x.dtype, device=x.device)
            flat[1:] = x.flatten()
            return flat[1:].view(x.shape)
        case "odd-row-stride":
            odd = torch.full((batch, heads, rows, dim + 1), math.nan, dtype=x.dtype, device=x.device)
            odd[..., :dim] = x
            return odd[..., :dim]
        case "dim-not-last":
            return x.transpose(-1, -2).contiguous().transpose(-1, -2)
    raise ValueError(layout)


LAYOUTS = ["BHSD", "BSHD", "HBSD", "packed-qkv", "padded-rows", "misaligned-base", "odd-row-stride", "dim-not-last"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides(backend: Backend, layout, dtype, seed):
    """Any layout gives the bits of the contiguous one, in query's order of dimensions; so do the gradients."""
    case = BASE.with_(batch=2, heads_q=4, len_q=100, len_k=90, dtype=dtype)
    problem = make_problem(case, backend, seed)
    with backend.running(*problem.about, backward=True), poisoned(backend.device):
        results = []
        for order in ("BHSD", layout):
            leaves = {name: laid_out(x.detach(), order).requires_grad_() for name, x in problem.leaves().items()}
            out, lse = problem.sparse(leaves)
            grad_out, grad_lse = problem.upstream
            gradients = torch.autograd.grad([out, lse], list(leaves.values()), [laid_out(grad_out, order), grad_lse])
            results.append([out, lse, *gradients])
        for got, want in zip(*results, strict=True):
            assert torch.equal(got, want)
        by_stride = sorted(range(4), key=lambda d: leaves["query"].stride(d), reverse=True)
        if layout != "dim-not-last":
            assert sorted(range(4), key=lambda d: out.stride(d), reverse=True) == by_stride
        assert out.stride(-1) == 1


def test_expanded_tensors(backend: Backend, seed):
    """Stride 0: keys shared by the batch, a query shared by all heads."""
    problem = make_problem(BASE.with_(batch=2, heads_q=4), backend, seed)
    leaves = problem.leaves()
    expanded = dict(
        query=leaves["query"][:, :1].expand(-1, 4, -1, -1),
        key=leaves["key"][:1].expand(2, -1, -1, -1),
        value=leaves["value"][:, :1].expand(-1, 2, -1, -1),
    )
    with backend.running(*problem.about), torch.no_grad():
        out, lse = problem.sparse(expanded)
        want, want_lse = problem.sparse({name: x.contiguous() for name, x in expanded.items()})
        assert torch.equal(out, want) and torch.equal(lse, want_lse)


def test_unaligned_head_dims_are_copied(cpu_backend, seed):
    """Rows of 33 elements are no multiple of 16 bytes apart."""
    check_forward(cpu_backend, make_problem(BASE.with_(head_dim=33, value_dim=7), cpu_backend, seed))


# ---- offsets past 2^31


@contextlib.contextmanager
def sparse_memory(elements: int, dtype: torch.dtype):
    """A 1-d tensor over address space: pages take memory only once they are touched."""
    size = elements * dtype.itemsize
    try:
        room = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0))
    except OSError as error:
        pytest.skip(f"{size >> 30} GiB of address space: {error}")
    yield torch.frombuffer(room, dtype=dtype)


@pytest.mark.parametrize("which", ["batch", "head", "row"])
def test_strides_past_2_31(cpu_backend, which):
    """Offsets of 2^31 elements and more, in key, value and query, forward; gradients have their own memory."""
    sizes = {"batch": (2, 1, 20), "head": (1, 2, 20), "row": (1, 1, 20)}[which]
    step = {"batch": 2**31 + 64, "head": 2**31 + 64, "row": 2**28 + 64}[which]
    dims = [*sizes, DIM]
    strides = {"batch": (step, DIM, DIM), "head": (DIM, step, DIM), "row": (DIM, DIM, step)}[which]
    pattern = raw([[0], [0]], block=(16, 32), lengths=(20, 20))
    dense = [torch.randn(dims) for _ in range(3)]
    with cpu_backend.running(torch.float32, DIM, block_size=(16, 32)), contextlib.ExitStack() as stack:
        far = []
        for x in dense:
            room = stack.enter_context(sparse_memory((max(sizes) - 1) * step + 64 * DIM, torch.float32))
            far.append(torch.as_strided(room, dims, (*strides, 1)).copy_(x))
        assert far[0].stride() == (*strides, 1)
        pattern = raw([[0], [0]], block=(16, 32), lengths=(20, 20))
        assert torch.equal(
            sparsekit.block_sparse_attention(*far, pattern), sparsekit.block_sparse_attention(*dense, pattern)
        )


@pytest.mark.slow
@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16], ids=["bf16"])
def test_more_than_2_31_elements(dtype):
    """2^31 elements in query, key, value and out (4 GiB each in bfloat16): the last rows of the last head are right, and
    their gradients."""
    backend = next(backend for backend in BACKENDS if backend.device == "cuda")
    if torch.cuda.mem_get_info()[0] < 60 << 30:
        pytest.skip("needs 60 GiB of free GPU memory")
    length, heads, dim, block = 2**18 + 100, 64, 128, (128, 128)
    shape = (1, heads, length, dim)
    assert math.prod(shape) > 2**31
    rows = -(-length // block[0])
    indices = torch.arange(rows, dtype=torch.int32, device="cuda").view(1, 1, rows, 1)
    pattern = BlockPattern(torch.ones_like(indices[..., 0]), indices, block_size=block, seq_lengths=(length, length))
    with backend.running(dtype, dim, block_size=block, backward=True):
        tensors = [torch.randn(shape, dtype=dtype, device="cuda").requires_grad_() for _ in range(3)]
        out = sparsekit.block_sparse_attention(*tensors, pattern)
        grad = torch.randn_like(out)
        gradients = torch.autograd.grad(out, tensors, grad)
        last = slice((rows - 1) * 128, length)
        for head in (0, heads - 1):
            few = [x[:, head : head + 1, last].detach().float().requires_grad_() for x in tensors]
            mask = torch.ones(1, 1, few[0].shape[2], few[1].shape[2], dtype=torch.bool, device="cuda")
            want, _ = dense_attention(*few, mask)
            torch.testing.assert_close(out[:, head : head + 1, last].float(), want, rtol=2e-2, atol=2e-2)
            exact = torch.autograd.grad(want, few, grad[:, head : head + 1, last].float())
            for got, ref in zip(gradients, exact, strict=True):
                torch.testing.assert_close(got[:, head : head + 1, last].float(), ref, rtol=3e-2, atol=3e-2)
