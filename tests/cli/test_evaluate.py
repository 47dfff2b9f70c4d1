"""`diffmm validate`, `test` and `predict`."""

import os
import re
from pathlib import Path

import pytest
import torch

from diffmm.checkpoint_folders import find_state
from diffmm.cli.predictions import joined


@pytest.fixture
def trained(run, recipe):
    """A recipe, and the weights of a run of it."""
    path = recipe()
    assert run("fit", "--config", path, "--name", "first").code == 0
    return path, Path("runs/recipe/first")


@pytest.mark.parametrize("verb", ["validate", "test"])
@pytest.mark.parametrize("option", ["--weights", "--ckpt_path"])
def test_metrics_are_printed_and_nothing_is_written(run, trained, verb, option):
    path, weights = trained
    before = sorted(Path().rglob("*"))
    result = run(verb, "--config", path, option, weights)
    assert result.code == 0, result.err
    stage = "val" if verb == "validate" else "test"
    assert f"{stage}/accuracy" in result.out
    assert sorted(Path().rglob("*")) == before


def test_the_weights_are_the_given_ones(run, trained):
    path, weights = trained
    state = torch.load(find_state(weights), weights_only=True)
    state["state_dict"]["model.head.weight"].zero_()
    state["state_dict"]["model.head.bias"].fill_(0.0)
    torch.save(state, "changed.ckpt")
    printed = []
    for given in (weights, "changed.ckpt"):
        result = run("validate", "--config", path, "--weights", given)
        printed.append(re.search(r"val/loss\D+([\d.]+)", result.out)[1])
    # With a head of zeros all ten classes are as likely.
    assert float(printed[1]) == pytest.approx(2.302585, abs=1e-4)
    assert printed[0] != printed[1]


def test_predictions_are_a_dict_of_tensors(run, trained):
    path, weights = trained
    result = run("predict", "--config", path, "--weights", weights)
    assert result.code == 0, result.err
    assert result.out.splitlines()[-1] == "predictions.pt"
    predictions = torch.load("predictions.pt", weights_only=True)
    count = len(predictions["index"])
    assert predictions["index"].tolist() == list(range(count))
    assert predictions["probabilities"].shape == (count, 10)
    result = run("predict", "--config", path, "--weights", weights)
    assert result.mistakes == ["predictions.pt exists already: choose another --output"]
    assert "runs" in os.listdir()


def test_predictions_of_unequal_batches_stay_apart():
    batches = [
        {"index": torch.arange(2), "prediction": torch.zeros(2, 3)},
        {"index": torch.arange(2, 3), "prediction": torch.zeros(1, 4)},
    ]
    predictions = joined(batches)
    assert predictions["index"].tolist() == [0, 1, 2]
    assert [part.shape for part in predictions["prediction"]] == [(2, 3), (1, 4)]
