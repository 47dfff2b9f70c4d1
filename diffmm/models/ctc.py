"""Connectionist temporal classification: transcripts from the tokens of an audio encoder."""

from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn

from diffmm.batch import InputShapes
from diffmm.checks import Settings
from diffmm.layers.linear import Linear, init_weights
from diffmm.layers.stem import PatchStem
from diffmm.models.audio import AudioConfig, AudioModel
from diffmm.models.pretrained import Pretrained


@dataclass(frozen=True, kw_only=True)
class CTCConfig(Settings):
    """Configuration of a CTC model.

    Attributes:
        encoder: Configuration of the audio encoder, without a head (`num_classes=0`) and with one
            token per time: the stem `"frame"`, or patches of all mel bands.
        vocab_size: Number of ids, including the blank.
        blank_id: Id of the blank, which no text contains: the tokenizer's end of text in training
            by `diffmm.training.CTC`.

    Raises:
        ValueError: If a field is out of range; the message names the field and the value.
    """

    encoder: AudioConfig
    vocab_size: int
    blank_id: int

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.vocab_size < 2:
            raise ValueError(f"vocab_size must be at least 2, got {self.vocab_size}")
        if not 0 <= self.blank_id < self.vocab_size:
            raise ValueError(
                f"blank_id must be one of vocab_size={self.vocab_size} ids, 0 to "
                f"{self.vocab_size - 1}, got {self.blank_id}"
            )
        if self.encoder.num_classes:
            raise ValueError(
                f"the encoder of a CTC model has no head: set its num_classes to 0, got "
                f"{self.encoder.num_classes}"
            )
        if self.encoder.pool == "map" or self.encoder.pool_norm:
            found = "pool='map'" if self.encoder.pool == "map" else "pool_norm=True"
            raise ValueError(f"no features are pooled, so that {found} has no effect: leave it out")
        with torch.device("meta"):
            stem = self.encoder.make_stem()
        if isinstance(stem, PatchStem) and stem.num_bands > 1:
            raise ValueError(
                f"CTC needs one token per time, but {stem.num_bands} patches are above each other: "
                f"use stem='frame', or a patch_size with all {self.encoder.num_mels} mel bands"
            )

    @property
    def towers(self) -> dict[str, AudioConfig]:
        """The config of the encoder by its name."""
        return {"encoder": self.encoder}

    @property
    def input_fields(self) -> tuple[str, ...]:
        """The batch fields that `forward` takes, in order."""
        return self.encoder.input_fields

    @property
    def exact_fields(self) -> tuple[str, ...]:
        """As in `EncoderConfig`."""
        return self.encoder.exact_fields

    def input_shapes(self, batch_size: int, length: int | None = None) -> InputShapes:
        """As in `AudioConfig`."""
        return self.encoder.input_shapes(batch_size, length)


class Spoken(NamedTuple):
    """The outputs of a CTC model."""

    logits: Tensor
    """Logits of the ids at each time, `[B, N, vocab_size]`."""
    lengths: Tensor
    """`[B]` int64, the number of times within each sound."""


class CTCModel(Pretrained, nn.Module):
    """Transcribes sounds: a linear layer on every token of an audio encoder, for the loss that adds
    up all alignments of a text with the tokens (Graves et al. 2006).

    Attributes:
        encoder: An `AudioModel`.
        head: Maps its features to logits.

    >>> config = diffmm.models.CTCConfig(
    ...     encoder=diffmm.models.AudioConfig(
    ...         backbone=diffmm.BackboneConfig(dim=64, depth=2, num_heads=4, rope="1d"),
    ...         sample_rate_hz=8000,
    ...         num_mels=32,
    ...         stem="frame",
    ...     ),
    ...     vocab_size=259,
    ...     blank_id=256,
    ... )
    >>> model = diffmm.models.CTCModel(config)
    >>> found = model(torch.randn(2, 8000), torch.tensor([8000, 4000]))
    >>> found.logits.shape, found.lengths
    (torch.Size([2, 51, 259]), tensor([51, 26]))
    """

    def __init__(self, config: CTCConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder: AudioModel = config.encoder.make()
        self.head = Linear(config.encoder.backbone.dim, config.vocab_size)
        # Larger than in classifiers: training begins sooner where ids differ from the blank.
        init_weights(self.head, config.encoder.backbone.dim**-0.5)

    @property
    def input_fields(self) -> tuple[str, ...]:
        """As in `CTCConfig`."""
        return self.config.input_fields

    def forward(self, waveforms: Tensor, num_samples: Tensor | None = None) -> Spoken:
        """Compute logits of the ids at each time.

        Args:
            waveforms: As in `AudioModel.forward`.
            num_samples: As there.

        Raises:
            ValueError: As there.
        """
        embedded = self.encoder.embed(waveforms, num_samples)
        features = self.encoder.encode(embedded)[0][:, self.encoder.num_prefix_tokens :]
        logits = self.head(features)
        real = embedded.key_padding
        if real is None:
            lengths = torch.full(logits.shape[:1], logits.shape[1], device=logits.device)
        else:
            lengths = real.sum(dim=1)
        return Spoken(logits, lengths)

    def num_times(self, waveforms: Tensor, num_samples: Tensor | None = None) -> Tensor:
        """The lengths that `forward` returns, `[B]`, without computing anything else."""
        if num_samples is None:
            num_samples = torch.full(waveforms.shape[:1], waveforms.shape[1])
        return self.encoder.key_padding(waveforms, num_samples).sum(dim=1)

    def greedy(self, found: Spoken) -> list[list[int]]:
        """The ids of each sound: the most likely one at each time, without repetitions and
        blanks."""
        return [[id for id, _ in row] for row in self.aligned(found)]

    def aligned(self, found: Spoken) -> list[list[tuple[int, range]]]:
        """As `greedy`, each id with the times at which it is the most likely one."""
        best = found.logits.argmax(dim=-1).cpu()
        rows: list[list[tuple[int, range]]] = []
        for row, length in zip(best, found.lengths.tolist(), strict=True):
            ids, counts = row[:length].unique_consecutive(return_counts=True)
            ends = counts.cumsum(dim=0).tolist()
            times = [range(start, end) for start, end in pairwise([0, *ends])]
            spoken = zip(ids.tolist(), times, strict=True)
            rows.append([(id, at) for id, at in spoken if id != self.config.blank_id])
        return rows


def needed_times(targets: Tensor, lengths: Tensor) -> Tensor:
    """The smallest number of times in which each text can be spoken, `[B]`: one per id, and a blank
    between equal successive ids.

    Args:
        targets: Ids, `[B, N]`.
        lengths: Number of ids of each text, `[B]`.
    """
    places = torch.arange(1, targets.shape[1], device=targets.device)
    repeated = (targets[:, 1:] == targets[:, :-1]) & (places < lengths[:, None])
    return lengths + repeated.sum(dim=1)
