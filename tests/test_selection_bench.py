"""The selection benchmark runs, and its baselines compute what ours do."""

import json

import pytest
import torch

from sparsekit.bench import selection as bench
from sparsekit.bench.__main__ import main


def test_command(tmp_path, capsys):
    report = tmp_path / "report.json"
    cases = "top-k-1024,top-p-1024,threshold-1024,lists-from-bool"
    main(["selection", "--cases", cases, "--scale", "32", "--seconds", "0.01", "--json", str(report)])
    rows = json.loads(report.read_text())["cases"]
    assert [row["case"] for row in rows] == cases.split(",")
    assert all(row["milliseconds"] > 0 and row["speedup"] > 0 for row in rows)
    assert "time / ours" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["top-k-1024", "top-p-1024", "threshold-1024"])
def test_choices_agree(name):
    case = bench.CASES[name]("cpu", 256)
    ours, theirs = case.ours(), case.torch()
    indices, counts = ours
    if name == "top-k-1024":
        assert torch.equal(indices, theirs)
        return
    assert (counts - theirs[0][0, 0]).abs().max() <= 1  # torch sums in float32
    same = counts == theirs[0][0, 0]
    assert same.float().mean() > 0.9 and torch.equal(indices[same], theirs[1][0, 0][same])


@pytest.mark.parametrize("name", ["block-max-4k", "block-antidiagonal-8k", "columns-32k", "rows-4k", "map-4k"])
def test_scores_agree(name):
    case = bench.CASES[name]("cpu", 32)
    ours, theirs = case.ours(), case.torch()
    ours, theirs = (x if isinstance(x, tuple) else (x,) for x in (ours, theirs))
    for a, b in zip(ours, theirs, strict=True):
        a, b = (torch.nan_to_num(x.float(), neginf=-99).view(-1) for x in (a, b))
        # torch's products are rounded to bfloat16, and it takes the tiles of the diagonal whole.
        assert (a - b).abs().mean() < 0.06 * b.abs().clamp(max=9).mean() + 0.02
