"""The benchmark's own arithmetic: what it counts as work, what it draws, and that it runs as documented."""

import json

import pytest
import torch

from sparsekit import reference
from sparsekit.bench import __main__ as command
from sparsekit.bench.cases import AttentionCase, bench_cases, make_inputs, visible_pairs

SMALL = AttentionCase(heads_q=4, heads_kv=2, len_q=100, len_k=130, head_dim=32, block_size=(32, 16), batch=2)


@pytest.mark.parametrize("adversarial", [False, True])
@pytest.mark.parametrize("lists", ["q", "kv", "shared"])
@pytest.mark.parametrize("options", [{}, {"causal": True}, {"window": (20, 3)}, {"window": (-1, 5)}, {"len_q": 1}])
def test_work_is_counted_exactly(options, lists, adversarial, seed):
    inputs = make_inputs(SMALL.with_(**options, lists=lists, adversarial=adversarial, seed=seed))
    mask = reference.token_mask(inputs.pattern)
    mask = mask.repeat_interleave(SMALL.heads_q // mask.shape[1], 1).expand(SMALL.batch, -1, -1, -1)
    assert visible_pairs(inputs) == int(mask.sum())


def test_full_blocks_of_a_case_are_inside_its_mask(seed):
    """Without `adversarial` a full block is one that causality and window leave whole."""
    inputs = make_inputs(SMALL.with_(causal=True, window=(50, -1), density=0.7, seed=seed))
    pattern = inputs.pattern
    mask = reference.token_mask(pattern)
    distance = torch.arange(130)[None] - (torch.arange(100)[:, None] + 30)
    assert not (mask & ~((distance <= 0) & (distance >= -50))).any()
    assert int(pattern.full_kv_num_blocks.sum()) > 0


def test_equal_cases_give_equal_tensors(seed):
    first, second = (make_inputs(SMALL.with_(seed=seed, bits=True, causal=True)) for _ in range(2))
    assert torch.equal(first.query, second.query)
    assert torch.equal(first.pattern.kv_indices, second.pattern.kv_indices)
    assert torch.equal(first.pattern.partial_bits, second.pattern.partial_bits)


def test_density_is_the_listed_share():
    for case in bench_cases("cpu").values():
        if case.causal or case.len_q > 8192:
            continue
        heads_kv = min(4, case.heads_kv)
        inputs = make_inputs(case.with_(len_q=2560, len_k=2560, head_dim=8, heads_q=4, heads_kv=heads_kv))
        share = visible_pairs(inputs) / (4 * 2560**2)
        assert share == pytest.approx(case.density, abs=0.03)


@pytest.mark.parametrize("backward", [False, True])
def test_command(tmp_path, capsys, backward):
    report, figure = tmp_path / "out.json", tmp_path / "out.png"
    arguments = ["attention", "--cases", "d64-25,d64-fp32-25", "--length", "300", "--heads", "2", "--seconds", "0.01"]
    arguments += ["--against", "sdpa,cudnn,fa4", "--refcheck", "--json", str(report), "--figure", str(figure)]
    assert command.main(arguments + ["--backward"] * backward) == 0
    shown = capsys.readouterr().out
    assert "not run: cudnn: it runs on CUDA" in shown
    assert figure.stat().st_size > 1000
    cases = json.loads(report.read_text())["cases"]
    assert [case["case"] for case in cases] == ["d64-25", "d64-fp32-25"]
    for case in cases:
        mine, dense = case["results"]
        assert mine["name"] == "sparsekit"
        assert mine["milliseconds"] > 0
        assert dense["rate_of_sparsekit"] == pytest.approx(dense["speedup_of_sparsekit"] * case["density"], rel=1e-6)
        assert case["errors"]["passed"]
        if backward:
            assert max(case["errors"][name] for name in ("query", "key", "value")) < 0.02


def test_unknown_names_are_errors(capsys):
    for arguments in (["--cases", "d65"], ["--against", "nothing"]):
        with pytest.raises(SystemExit):
            command.main(["attention", *arguments])
    error = capsys.readouterr().err
    assert "nothing found; " in error and "sdpa" in error


def test_refcheck_sees_a_dropped_block(monkeypatch):
    """The check can fail: one listed block fewer is outside the bounds."""
    from sparsekit.bench import refcheck

    inputs = make_inputs(SMALL.with_(batch=1, dtype=torch.bfloat16))
    assert refcheck.check(inputs).passed
    real = refcheck.sparsekit.block_sparse_attention

    def drops_one(query, key, value, pattern, **options):
        pattern.full_kv_num_blocks.clamp_(max=int(pattern.full_kv_num_blocks.max()) - 1)
        return real(query, key, value, pattern, **options)

    class Stub:
        block_sparse_attention = staticmethod(drops_one)

    head_of = refcheck._head
    monkeypatch.setattr(refcheck, "_head", lambda _, head: head_of(make_inputs(inputs.case), head))
    monkeypatch.setattr(refcheck, "sparsekit", Stub)
    assert not refcheck.check(inputs).passed
