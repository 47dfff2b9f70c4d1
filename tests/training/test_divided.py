"""Two processes have the gradients of one, and the metrics of its evaluations."""

import json
import runpy
from pathlib import Path

import pytest
import torch
from forked import run_as_torchrun

SCRIPT = Path(__file__).with_name("run_divided.py")
NAMES = [
    "5 images",
    "7 images in batches",
    "1 image",
    "5 images of a plain loader",
    "7 images of a plain loader",
    "1 image of a plain loader",
    "5 masked images",
    "5 sounds",
    "1 sound",
    "7 pairs",
    "1 pair",
    "16 pairs of both media",
    "4 pairs of both media",
    "7 captions",
    "1 caption",
    "7 transcripts",
    "1 transcript",
    "texts",
    "a stream",
    "a short stream",
]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("divided")
    for number in range(40):
        text = f"Text number {number} of forty. " * (1 + number % 3)
        (folder / f"{number}.txt").write_text(text)
    one = runpy.run_path(str(SCRIPT))["run"](folder, 1)
    run_as_torchrun(SCRIPT, 2, [str(folder)], tmp_path_factory.mktemp("logs"))
    return one, json.loads((folder / "results.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind",
    [
        "texts",
        "images",
        "pairs",
        "pairs, sigmoid",
        "pairs, three towers",
        "pairs of both media",
        "pairs, captions",
        "transcripts",
    ],
)
def test_gradients(results, kind):
    """Gradients of a step of three micro-batches of four, divided unevenly in both processes; of
    contrastive losses, of a batch divided evenly."""
    one, two = (each["gradients"][kind] for each in results)
    for name in ("train/loss", "train/grad_norm"):
        assert two[name] == pytest.approx(one[name], rel=1e-5)
    for name, gradient in one["gradients"].items():
        expected, found = torch.tensor(gradient), torch.tensor(two["gradients"][name])
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5 * one["train/grad_norm"])


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_metrics(results, name):
    """Metrics of a fit's validation, of `validate` and of `test`."""
    one, two = (each["metrics"][name] for each in results)
    assert {key.split()[0] for key in one} == {"fit", "validate", "test"}
    assert two == pytest.approx(one, rel=1e-5)


@pytest.mark.slow
def test_all_are_compared(results):
    assert list(results[0]["metrics"]) == NAMES
