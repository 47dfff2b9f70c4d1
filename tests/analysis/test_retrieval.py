"""Accuracy over a grid: models that answer right, wrong or partly, and the files."""

import csv

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from diffmm.analysis.retrieval import RetrievalGrid, measure_retrieval
from diffmm.batch import IGNORE_INDEX
from diffmm.models import BackboneConfig, TextConfig, TextModel

VOCAB, LENGTH = 12, 16


class Parrot(TextModel):
    """Predicts the token that it sees."""

    def __init__(self, causal=True):
        backbone = BackboneConfig(dim=8, depth=1, num_heads=2, rope="1d")
        super().__init__(TextConfig(VOCAB, LENGTH, backbone, causal=causal))

    def forward(self, tokens, *, mask=None):
        assert not self.training
        return nn.functional.one_hot(tokens, VOCAB).float()


def batches(value, length):
    """Two batches of three samples with two answers of two tokens; of the first answers a fraction
    `value` is what a parrot says, of the second ones none."""
    tokens = torch.arange(length).expand(3, length) % VOCAB
    targets = torch.full((3, length), IGNORE_INDEX)
    targets[:, :2], targets[:, 4] = tokens[:, :2], tokens[:, 4] + 1
    targets[:, 5] = tokens[:, 5]  # one of two tokens is right
    targets[round(3 * value) :, 1] = 0
    yield {"tokens": tokens, "targets": targets}
    yield {"tokens": tokens, "targets": targets}


def test_accuracy_counts_exact_answers():
    model = Parrot().train()
    values, lengths = (0.0, 1 / 3, 1.0), (8, 16)
    grid = measure_retrieval(model, batches, axis="depth", values=values, lengths=lengths)
    assert model.training
    assert np.array_equal(grid.num_answers, np.full((3, 2), 12))
    assert np.allclose(grid.accuracy, np.array([[0.0], [1 / 6], [1 / 2]]))


def test_files(tmp_path):
    grid = RetrievalGrid(
        "depth", (0.0, 0.5), (8, 16, 24), np.array([[0, 1, 2], [3, 4, 4]]), np.full((2, 3), 4)
    )
    grid.write_csv(tmp_path / "grid.csv")
    rows = list(csv.DictReader((tmp_path / "grid.csv").read_text().splitlines()))
    assert list(rows[0]) == ["depth", "length", "num_exact", "num_answers", "accuracy"]
    assert [float(row["accuracy"]) for row in rows] == [0.0, 0.25, 0.5, 0.75, 1.0, 1.0]
    assert (rows[4]["depth"], rows[4]["length"]) == ("0.5", "16")
    grid.draw(tmp_path / "grid.png", "needles")
    pixels = np.asarray(Image.open(tmp_path / "grid.png").convert("RGB")).reshape(-1, 3)
    # The ends of viridis, for an accuracy of 0 and of 1.
    for color in ((68, 1, 84), (253, 231, 36)):
        assert (np.abs(pixels.astype(int) - color).sum(1) < 8).mean() > 0.01


@pytest.mark.parametrize(
    ("model", "lengths", "message"),
    [
        (Parrot(), (8, 17), "length 17 exceeds the model's max_length=16: choose shorter lengths"),
        (Parrot(), (), "a grid needs values and lengths"),
        (Parrot(causal=False), (8,), "retrieval needs a causal text model, got Parrot"),
        (nn.Linear(2, 2), (8,), "retrieval needs a causal text model, got Linear"),
    ],
)
def test_what_does_not_fit_is_named(model, lengths, message):
    with pytest.raises(ValueError, match=message):
        measure_retrieval(model, batches, axis="depth", values=(0.5,), lengths=lengths)


def test_a_cell_without_answers_is_named():
    def nothing(value, length):
        yield {"tokens": torch.zeros(1, length).long(), "targets": torch.full((1, length), -100)}

    with pytest.raises(ValueError, match="depth=0.5 and length 8 have no answers"):
        measure_retrieval(Parrot(), nothing, axis="depth", values=(0.5,), lengths=(8,))
