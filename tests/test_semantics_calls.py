"""docs/semantics.md, how calls behave: the same bits each time, from several threads at once, and errors with a reason."""

import concurrent.futures
import re

import pytest
import torch

import sparsekit
from backends import BACKENDS, Backend
from numerics import make_problem
from problems import BASE, FEATURES
from sparsekit import BlockPattern

CASES = {
    "plain": BASE.with_(heads_q=4),
    "bf16": BASE.with_(heads_q=4, dtype=torch.bfloat16),
    "everything": BASE.with_(heads_q=4, **FEATURES["everything"]),
    "one-head": BASE.with_(heads_q=1, heads_kv=1, len_q=300, len_k=400, block_size=(128, 128)),
    "packed": BASE.with_(lens_q=(70, 1, 40), lens_k=(80, 30, 0), lists_batch=False, causal=True),
}


def run(problem, gradients: bool):
    """All results of a problem, as bits."""
    leaves = problem.leaves()
    out, lse = problem.sparse(leaves)
    results = [out, lse]
    if gradients:
        results += torch.autograd.grad([out, lse], list(leaves.values()), problem.upstream)
    return [x.detach().clone() for x in results]


def assert_same_bits(got, want):
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a.nan_to_num(nan=7.0), b.nan_to_num(nan=7.0))


# ---- determinism


@pytest.mark.parametrize("name", CASES)
def test_forward_is_repeatable(backend: Backend, name, seed):
    problem = make_problem(CASES[name], backend, seed)
    with backend.running(*problem.about, packed=problem.case.packed):
        want = run(problem, gradients=False)
        for _ in range(3):
            assert_same_bits(run(problem, gradients=False), want)


@pytest.mark.parametrize("name", CASES)
def test_backward_is_repeatable(backend: Backend, name, seed):
    """On CUDA where torch is asked for deterministic algorithms; on the CPU always."""
    problem = make_problem(CASES[name], backend, seed)
    with backend.running(*problem.about, packed=problem.case.packed, backward=True):
        torch.use_deterministic_algorithms(backend.device == "cuda")
        try:
            want = run(problem, gradients=True)
            for _ in range(3):
                assert_same_bits(run(problem, gradients=True), want)
        finally:
            torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("name", CASES)
def test_number_of_threads_changes_no_bit(cpu_backend, name, seed, one_or_two_threads):
    """Work is cut by shape, not by threads."""
    problem = make_problem(CASES[name], cpu_backend, seed)
    with cpu_backend.running(*problem.about, packed=problem.case.packed, backward=True):
        results = []
        for threads in (1, 2, 3):
            one_or_two_threads(threads)
            results.append(run(problem, gradients=True))
        assert_same_bits(results[1], results[0])
        assert_same_bits(results[2], results[0])


# ---- threads


def test_calls_from_several_threads(backend: Backend, seed):
    """Ops keep no state between calls: eight threads, three problems of different shapes, forward and backward."""
    cases = [CASES["plain"], CASES["everything"], CASES["plain"].with_(head_dim=32, len_q=77, batch=2)]
    problems = [make_problem(case, backend, seed) for case in cases]
    with backend.running(*problems[0].about, backward=True):
        torch.use_deterministic_algorithms(backend.device == "cuda")
        try:
            want = [run(problem, gradients=True) for problem in problems]
            with concurrent.futures.ThreadPoolExecutor(8) as pool:
                calls = [(n % 3, pool.submit(run, problems[n % 3], True)) for n in range(18)]
                for n, call in calls:
                    assert_same_bits(call.result(), want[n])
        finally:
            torch.use_deterministic_algorithms(False)


def test_first_call_may_come_from_any_thread(cpu_backend, seed):
    problem = make_problem(CASES["plain"], cpu_backend, seed)
    with cpu_backend.running(*problem.about), concurrent.futures.ThreadPoolExecutor(1) as pool:
        assert_same_bits(pool.submit(run, problem, False).result(), run(problem, False))


# ---- grad mode, devices


def test_grad_mode(backend: Backend, seed):
    problem = make_problem(CASES["plain"], backend, seed)
    with backend.running(*problem.about):
        want = run(problem, gradients=False)
        for mode in (torch.no_grad, torch.inference_mode):
            with mode():
                results = problem.sparse(problem.leaves())
                assert not results[0].requires_grad
                assert_same_bits([x.clone() for x in results], want)
        leaves = {name: x.detach() for name, x in problem.leaves().items()}
        assert not problem.sparse(leaves)[0].requires_grad


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_side_stream(seed):
    """Work goes to torch's current stream: results are right after that stream is waited for, without a device sync."""
    backend = next(backend for backend in BACKENDS if backend.device == "cuda")
    problem = make_problem(CASES["plain"].with_(len_q=2000, len_k=2000), backend, seed)
    want = run(problem, gradients=False)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # whatever runs on another stream comes first
        query = problem.inputs.query * 2
        out, lse = problem.sparse(dict(query=query / 2))
    stream.synchronize()
    assert_same_bits([out, lse], want)


@pytest.mark.cuda
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_second_device(seed):
    """A call runs where its tensors are, whatever the current device is."""
    backend = next(backend for backend in BACKENDS if backend.device == "cuda")
    want = run(make_problem(CASES["plain"], backend, seed), gradients=False)
    got = run(make_problem(CASES["plain"], Backend("cuda", "cuda:1"), seed), gradients=False)
    assert all(x.device.index == 1 for x in got)
    assert_same_bits([x.to("cuda:0") for x in got], want)


# ---- errors name the argument, what was found and what is supported


def arguments(device, **changes):
    tensors = dict(query=torch.randn(2, 4, 100, 64), key=torch.randn(2, 2, 130, 64), value=torch.randn(2, 2, 130, 64))
    tensors["pattern"] = BlockPattern.from_bool(torch.ones(2, 3, dtype=torch.bool), (64, 64), seq_lengths=(100, 130))
    tensors |= changes
    return {name: x.to(device) if hasattr(x, "to") else x for name, x in tensors.items()}


WRONG = {
    "query of another dtype": (dict(query=torch.randn(2, 4, 100, 64).half()), "query is float16, key float32"),
    "unsupported dtype": (
        {
            name: torch.zeros(2, 2, n, 64, dtype=torch.int32)
            for name, n in (("query", 100), ("key", 130), ("value", 130))
        },
        "query has an unsupported dtype; supported: float32",
    ),
    "key of another head_dim": (dict(key=torch.randn(2, 2, 130, 32)), "key has size 32 in dimension 3; supported: 64"),
    "value of another length": (
        dict(value=torch.randn(2, 2, 90, 64)),
        "value has size 90 in dimension 2; supported: 130",
    ),
    "value of other heads": (dict(value=torch.randn(2, 1, 130, 64)), "value has size 1 in dimension 1; supported: 2"),
    "key of another batch": (dict(key=torch.randn(1, 2, 130, 64)), "key has size 1 in dimension 0; supported: 2"),
    "heads that do not divide": (dict(query=torch.randn(2, 3, 100, 64)), "query has 3 heads and key 2"),
    "lengths of the pattern": (dict(query=torch.randn(2, 4, 101, 64)), r"pattern: found seq_lengths \(100, 130\)"),
    "key_bias of another length": (dict(key_bias=torch.zeros(1, 1, 100)), "key_bias has size 100 in dimension 2"),
    "key_bias of other heads": (dict(key_bias=torch.zeros(1, 2, 130)), "key_bias has size 2 in dimension 1"),
    "key_bias of another dtype": (dict(key_bias=torch.zeros(1, 1, 130).half()), "key_bias has the wrong dtype"),
    "sinks of key heads": (dict(sinks=torch.zeros(2)), "sinks has size 2 in dimension 0; supported: 4"),
    "positions of 64 bits": (dict(query_positions=torch.zeros(1, 100).long()), "query_positions has the wrong dtype"),
    "positions of keys": (dict(key_positions=torch.zeros(1, 100).int()), "key_positions has size 100 in dimension 1"),
    "negative softcap": (dict(softcap=-1.0), "softcap is -1"),
    "lists of other heads": (
        dict(pattern=BlockPattern.from_bool(torch.ones(3, 2, 3, dtype=torch.bool), 64, seq_lengths=(100, 130))),
        "kv_num_blocks has 3 heads; supported: 1, key's 2 or query's 4",
    ),
    "lists of another batch": (
        dict(pattern=BlockPattern.from_bool(torch.ones(3, 1, 2, 3, dtype=torch.bool), 64, seq_lengths=(100, 130))),
        "kv_num_blocks has batch size 3; supported: 1 or query's 2",
    ),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_errors(backend: Backend, wrong):
    changes, message = WRONG[wrong]
    with backend.forced(), pytest.raises((RuntimeError, ValueError, TypeError), match=message):
        sparsekit.block_sparse_attention(**arguments(backend.device, **changes))


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("stray", ["key", "pattern", "sinks"])
def test_mixed_devices(stray):
    given = arguments("cuda", sinks=torch.zeros(4))
    given[stray] = given[stray].to("cpu")
    with pytest.raises(RuntimeError, match="device"):
        sparsekit.block_sparse_attention(**given)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cuda_refuses_float64():
    given = arguments("cuda")
    tensors = [given[name].double() for name in ("query", "key", "value")]
    with pytest.raises(RuntimeError, match="float64"):
        sparsekit.block_sparse_attention(*tensors, given["pattern"])


def test_unknown_isa():
    given = arguments("cpu")
    with (
        sparsekit.isa("sse9"),
        pytest.raises(RuntimeError, match=r"SPARSEKIT_ISA is none of reference, portable, avx2"),
    ):
        sparsekit.block_sparse_attention(*given.values())


def test_plan_names_reasons(cpu_backend):
    """Every implementation either runs or says why not; a level above the forced one says that it was not asked for."""
    plan = cpu_backend.plan(torch.float32, 64)
    for name, answer in plan.items():
        assert answer == "runs" or len(answer.split()) >= 3, (name, answer)
    names = list(plan)
    for name in names[: names.index(cpu_backend.name)]:
        assert re.search("SPARSEKIT_ISA asks for a lower one|does not offer", plan[name])
