"""docs/semantics.md, attention states: (out, lse) of parts of the keys merge into attention over all of them."""

import math

import pytest
import torch

import sparsekit
from backends import Backend
from numerics import assert_lse_passes, assert_passes, make_problem
from problems import BASE, sanitized
from sparsekit import BlockPattern

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("parts", sanitized([2, 3], 2))
def test_union_is_the_merge_of_its_parts(backend: Backend, parts, dtype, seed):
    """Also where a row sees keys in one part only, or in none; only the last call may take sinks, so none does."""
    case = BASE.with_(dtype=dtype, len_k=520, block_size=(64, 64), causal=True)
    problem = make_problem(case, backend, seed)
    block_map = torch.rand(1, case.heads_q, 3, 9) < 0.5
    block_map[:, :, 1] = False  # sees nothing at all
    block_map[:, :, 2] = torch.arange(9) == 4  # sees keys in one part only
    share = torch.randint(0, parts, block_map.shape)

    def attend(chosen):
        problem.inputs.pattern = BlockPattern.from_bool(
            chosen.to(backend.device), case.block_size, seq_lengths=(case.len_q, case.len_k), causal=True
        )
        return problem.sparse(problem.leaves())

    with backend.running(*problem.about), torch.no_grad():
        outs, lses = zip(*(attend(block_map & (share == part)) for part in range(parts)), strict=True)
        out, lse = sparsekit.merge_attention_states(outs, lses)
        whole, whole_lse = attend(block_map)
        ref, ref_lse = problem.reference(problem.leaves(torch.float64, "cpu"))
        # Each part was rounded to the dtype once more than the whole.
        bases = [base + (base - ref.to(base.device)) for base, _ in problem.baselines(problem.leaves())]
        assert_passes("out", out, ref, [*bases, whole], dtype)
        assert_lse_passes(lse, ref_lse, whole_lse, dtype)
        assert (out[:, :, 64:128] == 0).all() and (lse[:, :, 64:128] == -math.inf).all()


@pytest.mark.parametrize("device_backend", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16", "fp16"])
def test_merge_by_its_formula(device_backend, dtype):
    if device_backend == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    outs = [torch.randn(2, 3, 70, 40, device=device_backend).to(dtype) for _ in range(3)]
    lses = [torch.randn(2, 3, 70, device=device_backend) * scale for scale in (1, 30, 1)]
    lses[1][0] = -math.inf
    lses[0][0, 0, :9] = lses[2][0, 0, :9] = -math.inf  # no state saw a key for these rows
    lses[2][1, 1] = 80.0  # far above the others
    out, lse = sparsekit.merge_attention_states(outs, lses)
    stacked = torch.stack(lses).double()
    total = stacked.logsumexp(0)
    weight = (stacked - total.masked_fill(total == -math.inf, 0)).exp()
    want = (weight[..., None] * torch.stack(outs).double()).sum(0)
    assert out.dtype == dtype and lse.dtype == torch.float32
    assert (out[0, 0, :9] == 0).all() and (lse[0, 0, :9] == -math.inf).all()
    assert_passes("out", out, want.cpu(), [want.to(dtype)], dtype)
    assert_lse_passes(lse, total.cpu(), total.float(), torch.float32)


def test_merge_ignores_what_an_empty_state_holds():
    """A state without keys may hold anything in out, also NaN: its weight is 0."""
    outs, lses = [torch.randn(1, 1, 4, 8) for _ in range(2)], [torch.zeros(1, 1, 4), torch.full((1, 1, 4), -math.inf)]
    outs[1].fill_(math.nan)
    out, lse = sparsekit.merge_attention_states(outs, lses)
    assert torch.equal(out, outs[0]) and torch.equal(lse, lses[0])
