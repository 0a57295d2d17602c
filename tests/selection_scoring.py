"""What the tests of selection's scores share: backends, inputs, bounds."""

import math

import pytest
import torch

import selection_twins as twins
import sparsekit
from backends import BACKENDS

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SCORERS = [pytest.param(b, id=b.name, marks=[pytest.mark.cuda] * (b.device == "cuda")) for b in BACKENDS]


def tensors(shape_q, shape_k, dtype=torch.float32, spread=1.0):
    """A few rows far larger than the rest: scores of very different size."""
    query, key = torch.randn(shape_q), torch.randn(shape_k)
    query = query * torch.rand(*shape_q[:-1], 1).pow(2).mul(spread).exp2()
    return query.to(dtype), key.to(dtype)


def score_error(query, key, scale) -> float:
    """How far a float32 sum of q.k may be off: some units of the sum of its terms' sizes."""
    size = twins.products(query.abs(), key.abs(), scale).abs().max().item()
    return 8 * torch.finfo(torch.float32).eps * max(size, 1e-30)


def assert_scores(got, want, error: float):
    """Logits: -inf in the same places, else within `error`, which is absolute."""
    assert got.shape == want.shape and got.dtype == (torch.float64 if error == 0 else torch.float32)
    got, want = got.double(), want.double()
    assert torch.equal(got == -math.inf, want == -math.inf)
    finite = want != -math.inf
    worst = (got - want)[finite].abs().max().item() if finite.any() else 0.0
    assert worst <= error + 1e-11, f"{worst:.3g} > {error:.3g}"


def assert_shares(got, want, error: float):
    """Sums of exp(score): scores off by `error` make them off by that factor."""
    assert got.shape == want.shape
    got, want = got.double(), want.double()
    bound = (math.expm1(error) + 4e-6) * want + 1e-9 * max(want.max().item() if want.numel() else 0.0, 1.0)
    worst = ((got - want).abs() - bound).max().item() if want.numel() else 0.0
    assert worst <= 0, f"{worst:.3g} above the bound; {(got - want).abs().max():.3g}"


def run(backend, function, *args, **options):
    def moved(x):
        return x.to(backend.device) if isinstance(x, torch.Tensor | sparsekit.BlockPattern) else x

    with backend.forced():
        result = function(*map(moved, args), **{k: moved(v) for k, v in options.items()})
    return tuple(x.cpu() for x in result) if isinstance(result, tuple) else result.cpu()
