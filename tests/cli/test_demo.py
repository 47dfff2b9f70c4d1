"""`diffmm demo`, end to end with a few steps, and its handling of its directory."""

import io
import json

import pytest
import torch

from diffmm.cli import main
from diffmm.cli.demo import replacing
from diffmm.cli.demo_runs import RunRecorder, means
from diffmm.cli.demo_samples import repeated_word
from diffmm.recipes.errors import InputError

MODALITIES = ("text", "image", "audio")
ATTENTIONS = ("softmax", "diff_v1", "diff_v2")


def test_two_steps_of_everything(tmp_path, capsys):
    output = tmp_path / "runs" / "demo"
    assert main(["demo", "--max-steps", "2", "--output", str(output)]) == 0

    runs = json.loads((output / "results.json").read_text())["runs"]
    assert [(run["modality"], run["attention"]) for run in runs] == [
        (modality, attention) for modality in MODALITIES for attention in ATTENTIONS
    ]
    printed = capsys.readouterr().out
    progress = [line for line in printed.splitlines() if line.startswith("[")]
    assert [line.split()[0] for line in progress] == [f"[{i}/9]" for i in range(1, 10)]
    page = (output / "report.html").read_text()
    for run in runs:
        assert run["steps"] == 2
        assert run["seconds"] > 0.0
        cells = [run["modality"], run["attention"], f"{run['parameters']:,}"]
        cells += [f"{run['learning_rate']:g}", f"{run['loss']:.4f}"]
        assert cells in [line.split()[:5] for line in printed.splitlines()]
        assert f"{run['loss']:.4f}" in page
    for modality in MODALITIES:
        counts = [run["parameters"] for run in runs if run["modality"] == modality]
        assert max(counts) / min(counts) < 1.005
        # Every run is a normal run with a config, which can be repeated or resumed.
        assert all((output / modality / a / "config.yaml").is_file() for a in ATTENTIONS)
    assert page.count('<svg class="chart"') == 6
    assert [path.name for path in output.parent.iterdir()] == ["demo"]


def test_the_directory_is_replaced_when_all_is_done(tmp_path):
    target = tmp_path / "demo"
    for text in ("first", "second"):
        with replacing(target) as directory:
            (directory / "results.json").write_text(text)
    assert (target / "results.json").read_text() == "second"

    def fail() -> None:
        with replacing(target) as directory:
            (directory / "results.json").write_text("third")
            raise RuntimeError("no luck")

    with pytest.raises(RuntimeError, match="no luck"):
        fail()
    assert (target / "results.json").read_text() == "second"
    assert [path.name for path in tmp_path.iterdir()] == ["demo"]


def test_another_directory_is_left_alone(tmp_path, capsys):
    (tmp_path / "thesis.txt").write_text("years of work")
    assert main(["demo", "--output", str(tmp_path)]) == 2
    assert f"{tmp_path} exists and is not an earlier demo" in capsys.readouterr().err
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_an_empty_directory_is_taken(tmp_path):
    with replacing(tmp_path / "demo"):
        pass
    with replacing(tmp_path / "demo") as directory:
        (directory / "results.json").touch()
    assert (tmp_path / "demo" / "results.json").exists()


def test_steps_below_one_are_refused(capsys):
    assert main(["demo", "--max-steps", "0"]) == 2
    assert "--max-steps must be at least 1, got 0" in capsys.readouterr().err


def test_a_file_in_the_way_is_refused(tmp_path):
    (tmp_path / "demo").touch()
    with pytest.raises(InputError, match="is not an earlier demo"), replacing(tmp_path / "demo"):
        pass


def test_training_curves_are_means_over_spans():
    losses = [float(i) for i in range(1, 11)]
    assert means(losses, 5) == [(2.0, 1.5), (4.0, 3.5), (6.0, 5.5), (8.0, 7.5), (10.0, 9.5)]
    assert means(losses[:3], 40) == [(1.0, 1.0), (2.0, 2.0), (3.0, 3.0)]


@pytest.mark.parametrize("is_terminal", [True, False])
def test_progress_is_one_line(monkeypatch, is_terminal):
    stream = io.StringIO()
    stream.isatty = lambda: is_terminal
    monkeypatch.setattr("sys.stdout", stream)
    recorder = RunRecorder("[1/9] text")
    recorder.show("step 1")
    recorder.show("loss 2", last=True)
    shown = stream.getvalue()
    assert shown.endswith("[1/9] text  loss 2\n")
    assert shown.count("\n") == 1
    assert ("step 1" in shown) == is_terminal


def test_the_text_stops_inside_a_word_that_came_before():
    text = "import functools\n" + "x = 1\n" * 9 + "value = functools.reduce()\n"
    tokens, target = repeated_word(torch.tensor(list(text.encode())))
    assert bytes(tokens.tolist()).decode().endswith("value = fun")
    assert chr(target) == "c"
    # A repetition immediately after the first occurrence does not count.
    assert repeated_word(torch.tensor(list(b"functools.functools()\n"))) is None
