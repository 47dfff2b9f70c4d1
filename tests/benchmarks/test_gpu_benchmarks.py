"""The GPU benchmarks on the CPU, at sizes that mean nothing: that they run, and what they say."""

import functools
import json

import pytest
import torch

from benchmarks import decode, train_step

pytestmark = pytest.mark.filterwarnings(
    "ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"
)


@pytest.fixture(autouse=True)
def traced_only(monkeypatch):
    """Graphs are traced and run as they are: compiling them takes a minute."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))


@pytest.mark.slow
def test_decoding(tmp_path, capsys):
    arguments = ["--smoke", "--models", "softmax,v1-sdpa", "--rounds", "1", "--steps", "2"]
    decode.main([*arguments, "--out", str(tmp_path)])
    rows = json.loads((tmp_path / "decode.json").read_text())
    shapes = {(row["what"], row["model"], row["batch"], row["context"]) for row in rows}
    assert shapes == {
        (what, model, batch, context)
        for what in ("compiled", "op")
        for model in ("softmax", "v1-sdpa")
        for batch in (1, 2)
        for context in (64, 128)
    }
    assert all(row["ratio"] == 1.0 for row in rows if row["model"] == "softmax")
    printed = capsys.readouterr().out
    assert "SMOKE" in printed
    assert "rates as ratios to softmax's" in printed


@pytest.mark.slow
def test_training_steps(tmp_path, capsys):
    arguments = ["--smoke", "--only", "text2048", "--models", "softmax,v1-sdpa,hf-llama"]
    train_step.main([*arguments, "--rounds", "1", "--steps", "1", "--out", str(tmp_path)])
    rows = json.loads((tmp_path / "train_step.json").read_text())
    assert [row["model"] for row in rows] == ["softmax", "hf-llama", "v1-sdpa"]
    assert rows[0]["ratio"] == 1.0
    assert rows[0]["parameters"] == rows[1]["parameters"]
    assert "medians" in capsys.readouterr().out


@pytest.mark.parametrize("benchmark", [decode, train_step])
def test_unknown_models_are_named(benchmark):
    with pytest.raises(SystemExit, match="there is no 'softmx': choose from .*softmax"):
        benchmark.main(["--smoke", "--models", "softmx"])
