"""The backends that tests run on: every CPU instruction set that the library has kernels for, and CUDA.

All of them run in one process: SPARSEKIT_ISA is read at every call. A test takes the argument `backend` (any of them) or
`cpu_backend` and makes its calls inside `backend.running(...)`, which forces the backend and asserts that no other one
answers.
"""

import contextlib
import dataclasses
import functools
import re
from collections import Counter

import pytest
import torch

import sparsekit

OPS = torch.ops.sparsekit
CPU_NAMES = ("reference", "portable", "avx2", "avx512", "avx512_bf16", "amx")  # levels, each includes those before it

calls = Counter()  # by backend: how often it was shown to be the one that runs


@dataclasses.dataclass(frozen=True)
class Backend:
    name: str
    device: str = "cpu"

    def __str__(self) -> str:
        return self.name

    @contextlib.contextmanager
    def forced(self):
        with contextlib.nullcontext() if self.device == "cuda" else sparsekit.isa(self.name):
            yield

    def plan(
        self, dtype, head_dim, value_dim=None, block_size=(64, 64), *, backward=False, packed=False, group_size=0
    ) -> dict:
        """{implementation: "runs" or the reason it refuses}, best first, while this backend is forced."""
        plan = OPS.attention_plan_cuda if self.device == "cuda" else OPS.attention_plan_cpu
        with self.forced():
            text = plan(dtype, head_dim, value_dim or head_dim, list(block_size), backward, packed, group_size)
        return dict(line.split(": ", 1) for line in text.splitlines())

    def refusal(self, *problem, **options) -> str | None:
        """Why this backend does not take a problem; None if it does, as the first of the plan to run."""
        plan = self.plan(*problem, **options)
        running = next((name for name, answer in plan.items() if answer == "runs"), None)
        if self.device == "cuda":
            return None if running else "; ".join(plan.values())
        if running == self.name:
            return None
        assert plan[self.name] != "runs", f"{self.name} is forced and offers to run, but {running} comes first"
        return plan[self.name]

    @contextlib.contextmanager
    def running(self, *problem, **options):
        """Calls made inside run on this backend. One that it refuses, it must refuse with its reason (a CPU backend
        leaves it to a lower one instead); then the rest of the test is skipped, and the reason shown."""
        reason = self.refusal(*problem, **options)
        if reason is None:
            calls[self.name] += 1
            with self.forced():
                yield
            return
        assert len(reason.split()) >= 3, f"{self.name} refuses without a readable reason: {reason!r}"
        if self.device == "cuda":
            # The last word is the most general kernel's: it says the same of the forward, which a test calls first.
            with pytest.raises(RuntimeError, match=re.escape(reason.split("; ")[-1])):
                yield
        pytest.skip(f"{self.name} refuses: {reason}")


def _offered() -> tuple[list[Backend], dict[str, str]]:
    """The backends of this machine, and why the others are none of them."""
    features = OPS.cpu_features().split()
    implementations = {
        line.split(": ")[0] for line in OPS.attention_plan_cpu(torch.float32, 64, 64, [64, 64]).split("\n")
    }
    backends, absent = [], {}
    for name in CPU_NAMES:
        if name not in features:
            absent[name] = "this processor does not offer it"
        elif name not in implementations:
            absent[name] = "the library has no kernels for it"
        else:
            backends.append(Backend(name))
    if not torch.cuda.is_available():
        absent["cuda"] = f"torch {torch.__version__} sees no GPU"
    elif not hasattr(OPS, "attention_plan_cuda") or not has_cuda_library():
        absent["cuda"] = "the library was built without CUDA"
    else:
        backends.append(Backend("cuda", "cuda"))
    return backends, absent


@functools.cache
def has_cuda_library() -> bool:
    try:
        OPS.attention_plan_cuda(torch.float32, 64, 64, [64, 64])
    except (RuntimeError, NotImplementedError):
        return False
    return True


BACKENDS, ABSENT = _offered()
