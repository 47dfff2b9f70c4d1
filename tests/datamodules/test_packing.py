"""Packed pairs: the same pairs in the same order, and the same losses."""

import pytest
import torch

from datamodules import AudioTextData, ImageTextData
from datamodules.pairs import RenderedShapes, SynthesizedSounds
from diffmm.models import (
    BackboneConfig,
    CaptioningConfig,
    CaptioningModel,
    ImageConfig,
    TextConfig,
)
from diffmm.training import Captioning, OptimizerConfig, ScheduleConfig

EOS = 256


def data(**changes):
    made = ImageTextData(RenderedShapes(24, 4), image_size=8, batch_size=6, **changes)
    made.setup()
    return made


def test_rows_have_the_pairs_of_a_batch_in_order():
    (apart, *_), (together, *_) = (
        data(pairs_per_row=number).train_dataloader() for number in (1, 3)
    )
    assert torch.equal(together["images"].flatten(0, 1), apart["images"])
    assert torch.equal(together["media_index"].flatten(), apart["media_index"])
    assert together["index"].tolist() == apart["index"][::3].tolist()
    assert together["media_documents"].tolist() == [[0, 1, 2]] * 2
    for row in range(2):
        real = together["tokens"][row, : together["num_tokens"][row]]
        texts = apart["tokens"][3 * row : 3 * row + 3]
        lengths = apart["num_tokens"][3 * row : 3 * row + 3]
        parts = [text[:length] for text, length in zip(texts, lengths, strict=True)]
        assert torch.equal(real, torch.cat(parts))
        documents = together["document_ids"][row]
        expected = torch.arange(3).repeat_interleave(lengths)
        assert torch.equal(documents[: len(real)], expected)
        assert (documents[len(real) :] == 2).all()
        assert (together["tokens"][row, len(real) :] == EOS).all()


def test_losses_are_those_of_the_pairs():
    backbone = {"dim": 16, "depth": 1, "num_heads": 2, "init_std": 0.2}
    config = CaptioningConfig(
        encoder=ImageConfig(
            backbone=BackboneConfig(**backbone, rope="2d"), image_size=8, patch_size=4
        ),
        decoder=TextConfig(259, 500, BackboneConfig(**backbone, rope="1d")),
    )
    task = Captioning(CaptioningModel(config), OptimizerConfig(1e-3), ScheduleConfig(10))
    found = []
    for number in (1, 2, 6):
        batch = next(iter(data(pairs_per_row=number).train_dataloader()))
        task.check_batch(batch)
        found.append(task.loss_sum(batch, 0))
    for packed in found[1:]:
        torch.testing.assert_close(packed, found[0])


def test_sounds_are_packed_and_rows_padded():
    made = AudioTextData(
        SynthesizedSounds(12, 4, sample_rate_hz=8000),
        sample_rate_hz=8000,
        max_tokens=40,
        pad_texts=True,
        pairs_per_row=2,
        batch_size=4,
    )
    made.setup()
    batch = next(iter(made.train_dataloader()))
    assert batch["waveforms"].shape[:2] == batch["num_samples"].shape == (2, 2)
    assert batch["tokens"].shape == batch["document_ids"].shape == (2, 80)
    # Evaluation is not packed.
    assert "document_ids" not in next(iter(made.val_dataloader()))


@pytest.mark.parametrize("number", [0, 4, 2.0])
def test_rows_divide_a_batch(number):
    with pytest.raises(
        ValueError, match=f"must be at least 1 and divide batch_size=6, got {number}"
    ):
        data(pairs_per_row=number)
