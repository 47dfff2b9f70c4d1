"""The datamodule of labeled audio clips."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, Self

import torch
from torch.utils.data import DataLoader

from datamodules.audio.augment import AudioAugment, Augmenter
from datamodules.audio.buckets import BucketSampler
from datamodules.audio.clips import EXTENSIONS, AudioClips
from datamodules.audio.evaluation import POSITIONS, AudioReader, bounded
from datamodules.audio.own_data import own_sounds
from datamodules.audio.reader import ClipReader, Waveform
from datamodules.audio.sound_events import SoundEvents
from datamodules.audio.sources import AudioSource, SoundFolder, SoundTable
from datamodules.shared.bad_samples import BadSampleError, BadSamples
from datamodules.shared.fingerprints import Fingerprint
from datamodules.shared.labelled import LabelledData, LabelledDataset
from datamodules.shared.other_data import table_settings, to_evaluate
from datamodules.shared.own_data import OwnData, locate
from datamodules.shared.reader import Reader
from datamodules.shared.sampling import sample_rng
from datamodules.shared.sources import Splits
from diffmm.batch import AudioBatch
from diffmm.checks import check_choice

BATCHINGS = ("padded", "bucketed", "fixed")


class AudioDataset(LabelledDataset):
    """The clips of a split, decoded, cropped and augmented.

    Args:
        splits: The splits of the source, with its classes.
        clips: The clips of this split.
        reader: The evaluation preprocessing.
        training: Whether crops are random, drawn from `(seed, epoch, index)`.
        augmenter: The augmentation, drawn from the same; `None` for no augmentation.
        seed: Seed of the random numbers.
    """

    def __init__(
        self,
        splits: Splits[AudioClips],
        clips: AudioClips,
        *,
        reader: AudioReader,
        training: bool,
        augmenter: Augmenter | None,
        seed: int,
    ) -> None:
        super().__init__(clips, seed=seed)
        self.splits = splits
        self.clips = clips
        self.reader = reader
        self.training = training
        self.augmenter = augmenter

    def sample(self, epoch: int, index: int) -> dict[str, Any]:
        if self.training:
            waveform = self._varied(epoch, index)
        else:
            waveform = self.reader.waveform(self.clips, index)
        return {
            "waveforms": waveform,
            "num_samples": len(waveform),
            "labels": self.splits.target(self.clips.labels[index]),
            "index": index,
        }

    def collate(self, samples: list[dict[str, Any]]) -> AudioBatch:
        """Pad the clips to equal length with zeros at the end."""
        inputs = self.reader.collate(samples)
        return AudioBatch(
            waveforms=inputs["waveforms"],
            num_samples=inputs["num_samples"],
            labels=torch.stack([sample["labels"] for sample in samples]),
            index=torch.tensor([sample["index"] for sample in samples]),
        )

    def _varied(self, epoch: int, index: int) -> Waveform:
        rng = sample_rng(self.seed, epoch, index)
        longest = self.reader.clip_samples
        waveform = self.reader.of(self.clips).read(
            index, max_samples=longest, position=rng.random()
        )
        if self.augmenter is not None:
            waveform = self.augmenter(waveform, rng)
        return bounded(waveform)


class AudioData(LabelledData[AudioClips]):
    """Labeled audio clips as `AudioBatch`es. SpecAugment and mixup are part of the task.

    Args:
        source: Source of the clips, a class of `datamodules.audio.sources`; by default synthetic
            `SoundEvents`, which need no files.
        sample_rate_hz: Sample rate of the waveforms, in Hz.
        resample: Whether to resample clips of other sample rates, by SciPy's polyphase filter;
            otherwise they raise an error.
        clip_seconds: Length to which longer clips are cropped, in seconds: at a random place in
            training, as set by `eval_crop` in evaluation. By default clips are not cropped.
        eval_crop: Crop in evaluation: `"center"`, `"start"`, or `"full"` for whole clips.
        batching: `"padded"` pads clips to the longest of the batch; `"bucketed"` also groups clips
            of similar length into training batches; `"fixed"` pads all clips to `clip_seconds`, so
            that shapes are static for compiled models.
        augment: Augmentation of training clips; none by default.
        batch_size: Number of clips per batch and process.
        num_workers: Number of data loader workers per process; 0 loads in the training process.
        seed: Seed of the order, the crops and the augmentation.
        bad_samples: How to handle clips that cannot be read; by default, raise an error.

    Raises:
        ValueError: If an argument is out of range; the message names it.
    """

    def __init__(
        self,
        source: AudioSource | None = None,
        *,
        sample_rate_hz: int = 16000,
        resample: bool = False,
        clip_seconds: float | None = None,
        eval_crop: Literal["center", "start", "full"] = "center",
        batching: Literal["padded", "bucketed", "fixed"] = "padded",
        augment: AudioAugment | None = None,
        batch_size: int = 32,
        num_workers: int = 0,
        seed: int = 0,
        bad_samples: BadSamples | None = None,
    ) -> None:
        super().__init__(
            source or SoundEvents(sample_rate_hz=sample_rate_hz),
            batch_size=batch_size,
            num_workers=num_workers,
            seed=seed,
            bad_samples=bad_samples,
        )
        check_choice("eval_crop", eval_crop, POSITIONS)
        check_choice("batching", batching, BATCHINGS)
        if sample_rate_hz < 1:
            raise ValueError(f"sample_rate_hz must be at least 1, got {sample_rate_hz}")
        if clip_seconds is not None and clip_seconds * sample_rate_hz < 1:
            raise ValueError(f"clip_seconds must be at least one sample long, got {clip_seconds}")
        if batching == "fixed" and (clip_seconds is None or eval_crop == "full"):
            raise ValueError(
                f"batching='fixed' needs clip_seconds and eval_crop 'center' or 'start', got "
                f"{clip_seconds} and {eval_crop!r}"
            )
        self.sample_rate_hz = sample_rate_hz
        self.resample = resample
        self.clip_samples = None if clip_seconds is None else round(clip_seconds * sample_rate_hz)
        self.eval_crop = eval_crop
        self.batching = batching
        self.augment = augment
        self.reader = AudioReader(
            sample_rate_hz=sample_rate_hz,
            resample=resample,
            clip_samples=self.clip_samples,
            crop=eval_crop,
            pad=batching == "fixed",
        )

    @property
    def evaluation_reader(self) -> AudioReader:
        # An error for another sample rate protects training data; new inputs are resampled.
        return replace(self.reader, resample=True)

    @classmethod
    def own_data(cls, path: str, given: Mapping[str, Any], *, inputs_may_change: bool) -> OwnData:
        """Settings for a folder of sounds by class, or a CSV file of sounds.

        Args:
            path: Path of the folder or file.
            given: Arguments of the recipe for this class.
            inputs_may_change: Whether the model's sample rate may change to that of the clips,
                which happens if all inspected clips have the same lower rate. Otherwise clips are
                resampled.

        Raises:
            FileNotFoundError: If the path does not exist.
            ValueError: If its structure is not supported.
        """
        return own_sounds(path, given, inputs_may_change=inputs_may_change)

    def evaluate_on(self, path: str, class_names: Sequence[str], *, split: str) -> str:
        self.reader = self.evaluation_reader
        return super().evaluate_on(path, class_names, split=split)

    @classmethod
    def prepared_by(
        cls, reader: Reader, path: str, *, batch_size: int = 64, num_workers: int = 0
    ) -> Self:
        assert isinstance(reader, AudioReader)
        located = locate(path, "sounds", EXTENSIONS, {})
        arguments: dict[str, Any] = located.arguments
        samples, rate_hz = reader.clip_samples, reader.sample_rate_hz
        return cls(
            SoundTable(**arguments) if located.is_table else SoundFolder(**arguments),
            sample_rate_hz=rate_hz,
            resample=True,
            clip_seconds=None if samples is None else samples / rate_hz,
            eval_crop=reader.crop,
            batching="fixed" if reader.pad else "padded",
            batch_size=batch_size,
            num_workers=num_workers,
        )

    def other_source(self, path: str, split: str) -> SoundFolder | SoundTable:
        located = locate(path, "sounds", EXTENSIONS, {})
        arguments: dict[str, Any] = to_evaluate(path, located, split)
        return (
            SoundTable(**arguments, **table_settings(self.source))
            if located.is_table
            else SoundFolder(**arguments)
        )

    def fingerprint(self) -> Fingerprint:
        return {
            **super().fingerprint(),
            "sample_rate_hz": self.sample_rate_hz,
            "clip_samples": self.clip_samples,
            "batching": self.batching,
            "augment": str(self.augment),
        }

    def dataset(self, samples: AudioClips, *, training: bool) -> AudioDataset:
        augmenter = None
        if training and self.augment is not None:
            augmenter = Augmenter(
                self.augment, sample_rate_hz=self.sample_rate_hz, resample=self.resample
            )
        return AudioDataset(
            self.splits,
            samples,
            reader=self.reader,
            training=training,
            augmenter=augmenter,
            seed=self.seed,
        )

    def train_dataloader(self) -> DataLoader[Any]:
        if self.batching != "bucketed":
            return super().train_dataloader()
        dataset = self.dataset(self.splits.train, training=True)
        reader = self.reader.of(self.splits.train)
        longest = self.clip_samples or sys.maxsize
        sampler = BucketSampler(
            [min(self._length(reader, index), longest) for index in range(len(dataset))],
            batch_size=self.batch_size,
            seed=self.seed,
            rank=self.rank,
            world_size=self.world_size,
        )
        return self._sampled_loader(dataset, dataset.collate, sampler)

    def _length(self, reader: ClipReader, index: int) -> int:
        """The length to sort by; 0 for a clip that cannot be read, which is handled later."""
        try:
            return reader.num_samples(index)
        except BadSampleError:
            if self.bad_samples.policy == "raise":
                raise
            return 0
