"""Every test runs on every backend that the machine offers; random inputs are new in each run.

The seed stands in the header. SPARSEKIT_TEST_SEED=<seed> repeats a run (CI's seed is fixed); each test draws from the seed and its own name, so
that it draws the same alone.
"""

import os
import random
import zlib

# Before torch loads its OpenMP: waiting threads sleep. On a machine that others use too, spinning made the tests 15 times
# slower.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import hypothesis
import numpy
import pytest
import torch

from backends import ABSENT, BACKENDS, calls

SEED = int(os.environ.get("SPARSEKIT_TEST_SEED") or random.SystemRandom().randrange(2**31))

hypothesis.settings.register_profile(
    "sparsekit",
    deadline=None,
    database=None,  # the seed repeats a run, nothing is left on the disk
    max_examples=int(os.environ.get("SPARSEKIT_TEST_EXAMPLES", 30)),
    suppress_health_check=[hypothesis.HealthCheck.too_slow, hypothesis.HealthCheck.data_too_large],
)
hypothesis.settings.load_profile("sparsekit")


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config):
    config.addinivalue_line("markers", "cuda: runs on a GPU")
    config.addinivalue_line("markers", "sanitizer: one of the few small cases for compute-sanitizer")
    config.addinivalue_line("markers", "slow: takes much memory or time; runs where the machine has it")
    if config.getoption("hypothesis_seed", None) is None:
        config.option.hypothesis_seed = str(SEED)


def pytest_report_header(config):
    return f"sparsekit: SPARSEKIT_TEST_SEED={SEED}"


def pytest_generate_tests(metafunc):
    for argument, backends in (
        ("backend", BACKENDS),
        ("cpu_backend", [backend for backend in BACKENDS if backend.device == "cpu"]),
    ):
        if argument in metafunc.fixturenames:
            marks = {"cuda": [pytest.mark.cuda]}
            values = [
                pytest.param(backend, id=backend.name, marks=marks.get(backend.device, ())) for backend in backends
            ]
            metafunc.parametrize(argument, values)


@pytest.fixture(autouse=True)
def seed(request) -> int:
    """Of this test, from the run's seed. torch and numpy are seeded with it."""
    number = (SEED + zlib.crc32(request.node.nodeid.split("::", 1)[-1].encode())) % 2**31
    print(f"seed {number}")
    torch.manual_seed(number)
    numpy.random.seed(number)
    return number


@pytest.fixture
def one_or_two_threads():
    """Sets torch's number of threads, and restores it."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def pytest_terminal_summary(terminalreporter):
    terminalreporter.section("sparsekit backends")
    for backend in BACKENDS:
        count = calls[backend.name]
        terminalreporter.line(f"{backend}: ran {count} problems" if count else f"{backend}: NOT RUN (none selected)")
    for name, reason in ABSENT.items():
        terminalreporter.line(f"{name}: NOT RUN ({reason})")
    terminalreporter.line(f"SPARSEKIT_TEST_SEED={SEED} repeats this run")
