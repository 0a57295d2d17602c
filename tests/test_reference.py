"""The Python reference against what it must not share code with: loops over blocks, torch's dense attention, FlexAttention."""

import pytest
import torch
from hypothesis import given, settings
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

import sparsekit
from backends import Backend
from numerics import Problem, dense_attention, make_problem, sdpa, visible
from problems import BASE, FEATURES, problems
from sparsekit import reference
from sparsekit.bench.cases import make_inputs


@settings(max_examples=60)
@given(problem=problems())
def test_mask_is_what_the_lists_say(problem):
    case, seed, _ = problem
    inputs = make_inputs(case.with_(seed=seed))
    mask = reference.token_mask(inputs.pattern, inputs.query_positions, inputs.key_positions)
    shape = (case.batch, case.heads_q, case.len_q, case.len_k)
    mask = mask.repeat_interleave(case.heads_q // mask.shape[1], 1).expand(shape)
    assert torch.equal(mask, visible(inputs))


@settings(max_examples=40)
@given(problem=problems(), packed=problems(packed=True))
def test_is_dense_attention_under_its_mask(problem, packed):
    for case, seed, options in (problem, packed):
        case = case.with_(dtype=torch.float64)
        dense = Problem(make_inputs(case.with_(seed=seed)), **options)
        leaves = dense.leaves()
        out, lse = dense.reference(leaves)
        want, want_lse = dense.baselines(leaves, draws=1)[0]
        torch.testing.assert_close(out, want, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(lse, want_lse, rtol=1e-10, atol=1e-10)


def test_dense_attention_is_sdpa():
    query, key, value = (torch.randn(2, 3, 50, 16, dtype=torch.float64) for _ in range(3))
    mask = torch.rand(2, 3, 50, 50) < 0.5
    mask[0, 1, 7] = False
    out, lse = dense_attention(query, key, value, mask)
    torch.testing.assert_close(out, sdpa(query, key, value, mask), rtol=1e-12, atol=1e-12)
    # A sink is one more key, of value 0 and with this score.
    sinks = torch.randn(3, dtype=torch.float64)
    score = (query @ key.mT / 4).masked_fill(~mask, -torch.inf)
    more = torch.cat([score, sinks[None, :, None, None].expand(2, 3, 50, 1)], -1)
    want = more.softmax(-1)[..., :-1] @ value
    torch.testing.assert_close(dense_attention(query, key, value, mask, sinks=sinks)[0], want, rtol=1e-12, atol=1e-12)
    finite = lse.isfinite()
    torch.testing.assert_close(lse[finite], score.logsumexp(-1)[finite], rtol=1e-12, atol=1e-12)


# ---- FlexAttention: ten masks. Eager (it materialises the scores) and forward only: it has no CPU backward.

DOCUMENTS = torch.tensor([0] * 60 + [1] * 33 + [2] * 70 + [3] * 37)
RANDOM = torch.rand(200, 200, generator=torch.Generator().manual_seed(3)) < 0.3
MASKS = {
    "causal": lambda b, h, q, k: q >= k,
    "sliding-window": lambda b, h, q, k: (q >= k) & (q - k < 50),
    "document": lambda b, h, q, k: DOCUMENTS[q] == DOCUMENTS[k],
    "causal-document": lambda b, h, q, k: (DOCUMENTS[q] == DOCUMENTS[k]) & (q >= k),
    "prefix-lm": lambda b, h, q, k: (k < 70) | (q >= k),
    "dilated": lambda b, h, q, k: (q >= k) & ((q - k) % 3 == 0),
    "checkerboard": lambda b, h, q, k: (q + k) % 2 == 0,
    "random": lambda b, h, q, k: RANDOM[q, k],
    "per-head": lambda b, h, q, k: (q >= k) & (q - k <= 16 * (h + 1)),
    "per-batch": lambda b, h, q, k: k < 90 + 60 * b,
    "sink-and-window": lambda b, h, q, k: (k < 4) | ((q >= k) & (q - k < 24)),
    "everything": lambda b, h, q, k: q >= 0,
}


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("block", [(64, 64), (128, 64)], ids=str)
def test_flex_attention(backend: Backend, name, block):
    query, key, value = (torch.randn(2, heads, 200, 64) for heads in (4, 2, 2))
    mask = create_block_mask(MASKS[name], 2, 4, 200, 200, device="cpu", BLOCK_SIZE=block)
    want, want_lse = flex_attention(query, key, value, block_mask=mask, enable_gqa=True, return_lse=True)
    pattern = sparsekit.BlockPattern.from_flex(mask).to(backend.device)
    with backend.running(torch.float32, 64, block_size=block):
        out, lse = sparsekit.block_sparse_attention(
            *(x.to(backend.device) for x in (query, key, value)), pattern, return_lse=True
        )
        torch.testing.assert_close(out.cpu(), want, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(lse.cpu(), want_lse, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("feature", ["plain", "everything"])
def test_the_reference_kernel_is_exact(feature, seed):
    """csrc's float64 reference and Python's agree to float64 rounding: two implementations, one meaning."""
    case = BASE.with_(dtype=torch.float64, heads_q=4, **FEATURES[feature])
    problem = make_problem(case, Backend("reference"), seed)
    out, lse = problem.sparse(problem.leaves())
    want, want_lse = problem.reference(problem.leaves())
    torch.testing.assert_close(out, want, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(lse, want_lse, rtol=1e-10, atol=1e-10)
