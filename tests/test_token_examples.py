"""The benchmark of the tokens runs as documented; the example's measurements are right, on a small random encoder."""

import json
import sys
from pathlib import Path

import pytest
import torch

from sparsekit.bench import __main__ as command
from sparsekit.bench import tokens as bench

EXAMPLES = Path(__file__).parent.parent / "examples"


def test_bench_command(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(bench, "keep_memory", lambda: None)  # it would last for the whole test run
    report = tmp_path / "out.json"
    arguments = ["tokens", "--cases", "scatter-add-bf16,gather-5*", "--seconds", "0.01", "--json", str(report)]
    assert command.main(arguments) == 0
    assert "gather-5-tensors" in capsys.readouterr().out
    for case in json.loads(report.read_text())["cases"]:
        assert case["results"][0]["name"] == "sparsekit"
        assert all(row["milliseconds"] > 0 for row in case["results"])
    with pytest.raises(SystemExit):
        command.main(["tokens", "--cases", "nothing"])
    assert "no case is called nothing" in capsys.readouterr().err


@pytest.mark.cuda
def test_bench_command_on_cuda(tmp_path):
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    report = tmp_path / "out.json"
    arguments = ["tokens", "--device", "cuda", "--cases", "scatter-add-bf16,merge-backward-bf16", "--seconds", "0.01"]
    assert command.main([*arguments, "--json", str(report)]) == 0
    for case in json.loads(report.read_text())["cases"]:
        assert case["results"][0]["name"] == "sparsekit"
        assert all(row["milliseconds"] > 0 for row in case["results"])


DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)] if torch.cuda.is_available() else ["cpu"]


@pytest.mark.parametrize("device", DEVICES)
def test_bench_compares_like_with_like(device):
    """The contenders of a case compute the same thing."""
    for case in (bench.scatter_add, bench.gather_several):
        calls = case(device).calls
        mine, other = (
            calls[name]() for name in ("sparsekit", next(name for name in calls if name.startswith("torch ")))
        )
        if "torch clone" in calls:
            other = calls["torch gather"]()
        else:
            mine, other = list(mine), [calls["torch index_add"]()]
        for a, b in zip(mine, other, strict=True):
            torch.testing.assert_close(a, b, rtol=2e-2, atol=4e-2)


@pytest.fixture(scope="module")
def example():
    pytest.importorskip("transformers", minversion="5", reason="transformers >= 5 is not installed")
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    sys.path.insert(0, str(EXAMPLES))
    try:
        import merge_tokens
    finally:
        sys.path.remove(str(EXAMPLES))
    return merge_tokens


def test_example(example, tmp_path):
    import transformers

    sizes = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
    config = transformers.BertConfig(**sizes, intermediate_size=48, max_position_embeddings=64, initializer_range=0.2)
    model = transformers.BertModel(config).eval()
    ids = torch.randint(0, 61, (6, 40))
    seconds, runs = example.measure(model, ids, (0.1, 0.4), batch=4, repeats=1)
    with torch.no_grad():
        whole = torch.nn.functional.normalize(model(input_ids=ids).last_hidden_state.mean(1), dim=-1)
    assert torch.allclose(example.embed(model, ids, None, 4), whole, atol=1e-6)
    assert [round(run.kept * 40) for run in runs] == [30, 9], "36, 33, 30 and 24, 15, 9: shares round down"
    assert runs[0].work > runs[1].work and seconds > 0
    assert 1 > runs[0].cosine > runs[1].cosine > 0 and runs[0].worst <= runs[0].cosine
    assert example.report(seconds, runs).count("\n") == 4
    example.draw(seconds, runs, "title", tmp_path / "out.png")
    assert (tmp_path / "out.png").stat().st_size > 10_000


def test_example_reads_real_text(example):
    class Letters:  # as a tokenizer: one id per character
        cls_token_id, sep_token_id = 1, 2

        def __call__(self, text, **options):
            return {"input_ids": [ord(c) for c in text[:2000]]}

    ids = example.passages(Letters(), 5, 34)
    assert ids.shape == (5, 34) and (ids[:, 0] == 1).all() and (ids[:, -1] == 2).all()
    assert len({tuple(row) for row in ids.tolist()}) == 5
