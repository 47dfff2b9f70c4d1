"""The GPU benchmarks run on the CPU with tiny sizes and print their tables."""

import contextlib
import functools
import io
import json
import subprocess
import sys

import pytest
import torch

from benchmarks import decode, hf_diffllama, train_step
from diffmm.ops import AttentionMask, diff_attention, softmax_attention

pytestmark = pytest.mark.filterwarnings(
    "ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"
)


@pytest.fixture(autouse=True)
def traced_only(monkeypatch):
    """Graphs are traced but not compiled, because compiling them takes a minute."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))


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
    assert "rates relative to softmax" in printed


@pytest.mark.slow
def test_training_steps(tmp_path, capsys):
    arguments = ["--smoke", "--only", "text2048", "--models", "softmax,v1-sdpa,hf-llama"]
    train_step.main([*arguments, "--rounds", "1", "--steps", "1", "--out", str(tmp_path)])
    rows = json.loads((tmp_path / "train_step.json").read_text())
    assert [row["model"] for row in rows] == ["softmax", "hf-llama", "v1-sdpa"]
    assert rows[0]["ratio"] == 1.0
    assert rows[0]["parameters"] == rows[1]["parameters"]
    assert "medians" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["v1", "v2"])
def test_every_shape_of_attention_is_compiled_for_itself(kind, monkeypatch):
    pytest.importorskip("triton", reason="benchmarks.attention prints its version")
    from benchmarks.attention import MORE_SHAPES, SHAPES, Shape, implementations

    sizes = []

    def record(graph, inputs):
        sizes.extend(size for size in inputs if isinstance(size, torch.SymInt))
        return graph

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=record))
    for length in (16, 24):
        shape = Shape("tiny", 1, length, 2, 8, True)
        q, k = (
            torch.randn(1, length, 2, 2, 8),
            torch.randn(1, length, 2, 1 if kind == "v2" else 2, 8),
        )
        v, lam = torch.randn(1, length, 2, 8 if kind == "v2" else 16), torch.rand(1, length, 2)
        ops = implementations(shape, kind)
        wanted = diff_attention(q, k, v, lam, mask=AttentionMask(causal=True), backend="reference")
        for by in ("sdpa", "two calls"):
            torch.testing.assert_close(ops[by](q, k, v, lam), wanted)
    assert sizes == []
    names = [shape.name for shape in SHAPES + MORE_SHAPES]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("benchmark", [decode, train_step])
def test_unknown_models_are_named(benchmark):
    with pytest.raises(SystemExit, match="there is no 'softmx': choose from .*softmax"):
        benchmark.main(["--smoke", "--models", "softmx"])


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("name", ["causal", "documents", "window", "prefix", "padding", "full"])
def test_flex_attention_is_compared_with_the_same_mask(name):
    from benchmarks.attention_choice import flex, make_mask

    mask = make_mask(name, 2, 64, "cpu")
    q, k, v = (torch.randn(2, 64, 2, 16) for _ in "qkv")
    found = flex(q, k, v, mask=mask)
    torch.testing.assert_close(found, softmax_attention(q, k, v, mask=mask), rtol=1e-4, atol=1e-5)


def test_advice_names_the_lengths_where_auto_is_slower():
    from benchmarks.attention_choice import Time, advice, line_of

    def times(length, sdpa, triton, auto):
        return [
            Time("v1", "window", 64, length, by, ms, by == auto)
            for by, ms in (("sdpa", sdpa), ("triton", triton), ("flex", 0.1))
        ]

    fine = [*times(256, 1.0, 2.0, "sdpa"), *times(512, 1.0, 1.04, "triton")]
    assert advice(fine) == []
    assert advice([*fine, *times(1024, 2.0, 1.0, "sdpa"), *times(4096, 3.0, 1.0, "sdpa")]) == [
        "v1 with heads of 64 and a window mask: backend: triton for lengths of about 1024, 4096"
    ]
    assert line_of(times(256, 1.0, 2.0, "sdpa"), 0.5) == (
        "v1       window     d64      256  sdpa* 1.000 ms (2.00)  triton 2.000 ms (4.00)  "
        "flex 0.100 ms (0.20)"
    )


@pytest.mark.slow
def test_fit_beside_the_bare_step(tmp_path, capsys, monkeypatch):
    from benchmarks import fit

    run = subprocess.run

    def run_here(command, **options):
        """What the process of a measurement would do and print; a process for `diffmm fit`."""
        if command[2] == "diffmm.cli":
            return run(command, **options)
        assert command[:3] == [sys.executable, "-m", "benchmarks.fit"]
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            fit.main(command[3:])
        return subprocess.CompletedProcess(command, 0, printed.getvalue(), "")

    monkeypatch.setattr(fit.subprocess, "run", run_here)
    arguments = ["--smoke", "--attentions", "diff_v2", "--steps", "3", "--out", str(tmp_path)]
    rows = []
    for case, ways in (("text42m", "fit,graph"), ("vit", "outside")):
        fit.main([*arguments, "--only", case, "--ways", ways])
        rows += json.loads((tmp_path / "fit.json").read_text())
    assert [row["way"] for row in rows] == ["fit", "graph", "outside"]
    assert all(row["rate"] > 0 for row in rows)
    assert "failed" not in capsys.readouterr().out


@pytest.mark.slow
def test_generation(tmp_path):
    from benchmarks import generation

    generation.main(["--smoke", "--models", "v1", "--out", str(tmp_path)])
    rows = json.loads((tmp_path / "generation.json").read_text())
    assert [row["way"] for row in rows] == [
        "step", "generate", "replay", "later", "uncompiled", "prompt", "forward",
    ]  # fmt: skip
    assert all(row["ms"] > 0 for row in rows)
    assert {row["ratio"] for row in rows if row["way"] in ("step", "forward")} == {1.0}


def test_diffllama_with_all_attentions_has_the_same_loss(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    hf_diffllama.main(
        ["--smoke", "--only", "text2048", "--rounds", "1", "--steps", "1", "--out", str(tmp_path)]
    )
    rows = json.loads((tmp_path / "hf_diffllama.json").read_text())
    assert [row["model"] for row in rows] == ["ours", "diffmm", "sdpa", "eager"]
    assert len({row["parameters"] for row in rows[1:]}) == 1
    losses = [row["loss"] for row in rows]
    assert losses == pytest.approx([losses[0]] * 4, rel=1e-3)
    assert rows[0]["ratio"] == 1.0
    assert "medians" in capsys.readouterr().out
