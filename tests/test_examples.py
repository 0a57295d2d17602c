"""The examples run as they stand; the demo's measurements are right, on a small random model instead of its own."""

import argparse
import math
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).parent.parent / "examples"


def test_quickstart(capsys):
    runpy.run_path(str(EXAMPLES / "quickstart.py"), run_name="__main__")
    difference = float(re.search(r"same mask: (\S+)", capsys.readouterr().out)[1])
    assert difference < 1e-5


@pytest.fixture(scope="module")
def demo():
    pytest.importorskip("transformers", minversion="5", reason="transformers >= 5 is not installed")
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    pytest.importorskip("rich", reason="rich is not installed")
    sys.path.insert(0, str(EXAMPLES))
    try:
        import long_prompt
    finally:
        sys.path.remove(str(EXAMPLES))
    return long_prompt


@pytest.fixture
def model(demo):
    sizes = {"vocab_size": 61, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "head_dim": 32}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 1024}
    model = demo.transformers.LlamaForCausalLM(demo.transformers.LlamaConfig(**sizes, **heads)).eval()
    with torch.no_grad():
        for layer in model.model.layers:  # initial weights attend almost uniformly; these look at single keys
            layer.self_attn.q_proj.weight.mul_(20)
            layer.self_attn.k_proj.weight.mul_(20)
    return model


def test_demo_measures_and_reports(demo, model, tmp_path):
    from rich.console import Console

    ids = torch.randint(0, 61, (1, 640))
    options = argparse.Namespace(density=[0.25, 0.5], block_size=16, local_blocks=1, repeats=2)
    console = Console(width=110, record=True)
    runs = demo.measure(model, ids, options, console)
    assert [run.selection for run in runs] == ["dense"] + [name for name in demo.SELECTIONS for _ in options.density]

    model.set_attn_implementation("sdpa")
    with torch.no_grad():
        log_p = model(ids).logits[0].log_softmax(-1)
    nll = -log_p[319:-1].gather(-1, ids[0, 320:, None]).mean().item()  # 320 of 640 tokens are judged
    dense, sparse = runs[0], runs[1:]
    assert math.isclose(dense.perplexity, math.exp(nll), rel_tol=1e-4)
    assert dense.agreement == 1 and abs(dense.kl) < 1e-6 and dense.density == 1
    for run, density in zip(sparse, options.density * 2, strict=True):
        assert 0 < run.selecting < run.attention < run.first_token
        assert abs(run.density - density) < 0.03
        assert run.kl > 0.001 and 0 < run.agreement < 1
        assert len(run.maps) == 3 and run.maps[0].shape == (4, 40, 40)
    assert not torch.equal(sparse[0].maps[0], sparse[2].maps[0]), "the control chooses other blocks"

    demo.report(runs, "title", tmp_path, console)
    demo.draw_tradeoff(runs, "title", tmp_path / "tradeoff.png")
    demo.draw_maps(sparse[0], 16, tmp_path / "maps.png")
    assert "sink + local only" in console.export_text()
    assert (tmp_path / "results.md").read_text().count("| pooled scores |") == 2
    assert all((tmp_path / name).stat().st_size > 10_000 for name in ("tradeoff.png", "maps.png"))
