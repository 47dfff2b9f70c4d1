"""The CTC model: padding, greedy decoding, the number of times a text needs, refusals."""

import dataclasses
import re

import pytest
import torch

from diffmm.models import AudioConfig, BackboneConfig, CTCConfig, CTCModel
from diffmm.models.ctc import Spoken, needed_times


def encoder(**changes):
    given = {
        "backbone": BackboneConfig(32, 2, 4, rope="1d", init_std=0.1),
        "sample_rate_hz": 4000,
        "num_mels": 8,
        "stem": "frame",
        "window_seconds": 0.064,
        "hop_seconds": 0.032,
    }
    return AudioConfig(**given | changes)


def make():
    return CTCModel(CTCConfig(encoder=encoder(), vocab_size=10, blank_id=9)).eval()


def test_padding_changes_nothing():
    model, num_samples = make(), torch.tensor([1900, 700, 1200])
    waveforms = torch.rand(3, 1900) - 0.5
    waveforms[torch.arange(1900) >= num_samples[:, None]] = 0.0
    found = model(waveforms, num_samples)
    assert torch.equal(found.lengths, model.num_times(waveforms, num_samples))
    for row, samples in enumerate(num_samples.tolist()):
        alone = model(waveforms[row : row + 1, :samples])
        assert alone.lengths.tolist() == [alone.logits.shape[1]] == [int(found.lengths[row])]
        real = found.logits[row, : alone.logits.shape[1]]
        torch.testing.assert_close(real, alone.logits[0])


def test_greedy_drops_repetitions_and_blanks_and_what_follows_the_sound():
    path = torch.tensor([[9, 1, 1, 9, 1, 2, 2, 9], [3, 3, 9, 9, 5, 5, 5, 5]])
    logits = torch.nn.functional.one_hot(path, 10).float()
    assert make().greedy(Spoken(logits, torch.tensor([8, 4]))) == [[1, 1, 2], [3]]


def test_needed_times_are_those_for_which_the_loss_is_finite():
    targets = torch.tensor([[1, 1, 2, 0], [1, 2, 3, 4], [5, 5, 5, 5], [1, 9, 9, 9]])
    lengths = torch.tensor([3, 4, 4, 1])
    assert needed_times(targets, lengths).tolist() == [4, 4, 7, 1]
    for row, needed in enumerate(needed_times(targets, lengths).tolist()):
        for times in (needed - 1, needed):
            loss = torch.nn.functional.ctc_loss(
                torch.zeros(max(times, 1), 10).log_softmax(-1),
                targets[row, : lengths[row]],
                (times,),
                (int(lengths[row]),),
                blank=9,
                reduction="sum",
            )
            assert loss.isfinite() == (times == needed)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": 1}, "vocab_size must be at least 2, got 1"),
        ({"blank_id": 10}, "blank_id must be one of vocab_size=10 ids, 0 to 9, got 10"),
        (
            {"encoder": dataclasses.replace(encoder(), num_classes=4)},
            "set its num_classes to 0, got 4",
        ),
        (
            {"encoder": dataclasses.replace(encoder(), pool="map")},
            "pool='map' has no effect: leave it out",
        ),
        (
            {
                "encoder": encoder(
                    stem="patch", patch_size=(2, 4), backbone=BackboneConfig(32, 2, 4, rope="2d")
                )
            },
            "2 patches are above each other: use stem='frame', or a patch_size with all 8 mel",
        ),
    ],
)
def test_what_a_config_refuses(changes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        CTCConfig(**{"encoder": encoder(), "vocab_size": 10, "blank_id": 9} | changes)


def test_patches_of_all_bands_are_times():
    config = encoder(stem="patch", patch_size=(2, 8), backbone=BackboneConfig(32, 2, 4, rope="2d"))
    model = CTCModel(CTCConfig(encoder=config, vocab_size=10, blank_id=9))
    assert model(torch.rand(2, 1600)).logits.shape[1] == model.encoder.stem.grid(
        model.encoder.spectrogram.num_frames(1600)
    )[0]  # fmt: skip
