"""bipartite_match on every instruction set against dense float64: choices, ties, and metrics that are bad or alike."""

import pytest
import torch

import sparsekit
from sparsekit import reference_tokens as reference
from test_tokens import FLOATS, device, on_the_device, random, running  # noqa: F401 (fixtures)


def check_match(match, metric, r, protect=0, counts=None, tolerance=1e-5):
    """Lists that fit each other, and pairs that are the best ones but for cosines that differ by rounding."""
    samples, tokens, _ = metric.shape
    scores = reference.cosines(metric)
    counts = [tokens] * samples if counts is None else counts
    for b in range(samples):
        count, merged = counts[b], min(r[b], max(0, counts[b] - protect) // 2)
        source, destination, kept, row = (x[b].tolist() for x in match[:4])
        assert source[merged:] == [-1] * (len(source) - merged) == destination[merged:]
        source, destination = source[:merged], destination[:merged]
        rows = count - merged
        assert kept[rows:] == [-1] * (len(kept) - rows)
        kept = kept[:rows]
        assert source == sorted(set(source)) and sorted([*source, *kept]) == list(range(count)) and kept == sorted(kept)
        assert all(n % 2 == 0 and n >= protect for n in source)
        assert all(n % 2 == 1 and protect <= n < count for n in destination)
        into = dict(zip(source, destination, strict=True))
        assert row[:count] == [kept.index(into.get(n, n)) for n in range(count)] and set(row[count:]) <= {-1}
        if match.counts is not None:
            assert match.counts[b] == rows
        allowed = scores[b, :, protect // 2 :][:, : count // 2 - protect // 2]
        if allowed.shape[1] == 0:
            continue
        best = allowed.max(1).values
        for n, m in into.items():
            assert scores[b, n // 2, m // 2] >= best[n // 2] - tolerance
        chosen = [best[n // 2] for n in source]
        left = [best[n // 2] for n in range(0, count, 2) if n >= protect and n not in into]
        if chosen and left:
            assert min(chosen) >= max(left) - tolerance


@pytest.mark.parametrize("dtype", [*FLOATS, torch.float64])
@pytest.mark.parametrize("dim", [1, 2, 33, 64, 200])
def test_match(backend, dtype, dim):
    with running(backend, dtype, match=True):
        for tokens in (1, 2, 3, 17, 100, 197):
            metric = random(3, tokens, dim, dtype=dtype)
            for protect in (0, 1, 2, 5):
                r = int(torch.randint(0, tokens // 2 + 2, ()))
                match = sparsekit.bipartite_match(metric, r, protect=protect)
                assert match.source.shape[1] == min(r, max(0, tokens - protect) // 2)
                assert match.counts is None and all(x.dtype == torch.int32 for x in match[:4])
                check_match(match, metric, [r] * 3, protect)


def test_match_of_many_tokens(backend):
    """More sources than one item of work holds, and a view whose rows have gaps."""
    for metric in (random(1, 1200, 2, 48)[:, :, 1, 5:37], random(1, 1200, 2, 128)[:, :, 1, 5:117]):
        with running(backend, match=True):
            check_match(sparsekit.bipartite_match(metric, 400), metric, [400])


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("dim", [96, 250])
def test_match_of_tokens_that_are_alike(backend, dtype, dim):
    """Cosines of 0.99 to 1 in a few clusters, among them equal tokens: searches that round first must look twice."""
    clusters = torch.randn(3, dim).repeat_interleave(34, 0)
    for apart in (0.1, 0.01, 0.0):
        metric = (clusters + apart * torch.randn(2, 102, dim)).to(dtype)
        metric[:, 50:60] = metric[:, 49:50]
        metric[0] *= torch.exp(3 * torch.randn(102, 1)).to(dtype)
        with running(backend, dtype, match=True):
            for protect in (0, 3):
                check_match(sparsekit.bipartite_match(metric, 30, protect=protect), metric, [30] * 2, protect)


@pytest.mark.parametrize("wide", [False, True])
def test_ragged_match(backend, wide):
    metric = random(5, 40, 24)
    counts = torch.tensor([40, 7, 0, 1, 33], dtype=torch.int32)
    r = torch.tensor([3, 50, 4, 1, 0], dtype=torch.int64 if wide else torch.int32)
    metric[torch.arange(40) >= counts[:, None]] = torch.nan  # what does not exist takes no part
    with running(backend, match=True):
        match = sparsekit.bipartite_match(metric, r, counts=counts, protect=1)
        check_match(match, metric.nan_to_num(), r.tolist(), 1, counts.tolist())
        assert match.kept.shape == (5, 40) and match.source.shape == (5, 20)
        check_match(
            sparsekit.bipartite_match(metric, 4, counts=counts), metric.nan_to_num(), [4] * 5, 0, counts.tolist()
        )
        whole = random(5, 40, 24)
        uniform, ragged = sparsekit.bipartite_match(whole, 6), sparsekit.bipartite_match(whole, torch.full((5,), 6))
        assert torch.equal(uniform.row, ragged.row) and torch.equal(uniform.kept, ragged.kept[:, :34])


@pytest.mark.parametrize("dim", [16, 256])
def test_ties_go_to_the_lower_position(backend, dim):
    """Entries of +-1: every cosine is a multiple of 1 / dim, exact in every dtype and order."""
    for dtype in FLOATS:
        metric = (torch.randint(0, 2, (2, 90, dim)) * 2 - 1).to(dtype)
        metric[:, 40:60] = metric[:, :1]
        with running(backend, dtype, match=True):
            for protect in (0, 3):
                match = sparsekit.bipartite_match(metric, 20, protect=protect)
                for b, want in enumerate(reference.bipartite_match(metric, [20, 20], protect)):
                    got = dict(zip(match.source[b].tolist(), match.destination[b].tolist(), strict=True))
                    assert got == want["merged"] and match.kept[b].tolist() == want["kept"]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("dim", [40, 130])
def test_match_of_bad_values(backend, dtype, dim):
    """Zeros, NaN, infinities, and lengths whose squares leave float32."""
    metric = random(1, 64, dim, dtype=dtype)
    metric[0, 4] = metric[0, 7] = 0
    metric[0, 10, 3] = metric[0, 13, 39] = torch.nan
    metric[0, 20, 0], metric[0, 23, 1] = torch.inf, -torch.inf
    with running(backend, dtype, match=True):
        check_match(sparsekit.bipartite_match(metric, 25), metric, [25])
    if dtype != torch.float16:
        for n, power in ((30, 100), (31, 120), (33, -100), (36, -120), (40, 112), (41, -125)):
            metric[0, n] *= 2.0**power
    with running(backend, dtype, match=True):
        for r in (3, 25, 30):
            match = sparsekit.bipartite_match(metric, r)
            check_match(match, metric, [r])
            broken = {10, 20}
            assert not broken & set(match.source[0].tolist()), "chosen last"
        match = sparsekit.bipartite_match(metric, 32)
        into = dict(zip(match.source[0].tolist(), match.destination[0].tolist(), strict=True))
        assert into[10] == into[20] == 1
        assert not {13, 23} & set(match.destination[0].tolist())
        everything = sparsekit.bipartite_match(torch.full_like(metric, torch.nan), 2, protect=2)
        assert everything.source.tolist() == [[2, 4]] and everything.destination.tolist() == [[3, 3]]
        zeros = sparsekit.bipartite_match(torch.zeros_like(metric), 2, protect=3)
        assert zeros.source.tolist() == [[4, 6]] and zeros.destination.tolist() == [[3, 3]]


def test_match_of_nothing(device):  # noqa: F811
    for shape in ((0, 6, 4), (2, 0, 4), (2, 6, 0)):
        match = sparsekit.bipartite_match(torch.randn(shape), 2)
        merged = min(2, shape[1] // 2)
        assert match.kept.shape == (shape[0], shape[1] - merged) and match.source.shape == (shape[0], merged)
        merged_x, sizes = sparsekit.merge_tokens(torch.randn(*shape[:2], 3), match)
        assert merged_x.shape == (*match.kept.shape, 3) and sizes.sum() == shape[0] * shape[1]
