"""The datamodule of labeled audio clips."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, Self

import torch
from torch.utils.data import DataLoader

from datamodules.audio.augment import AudioAugment
from datamodules.audio.clips import EXTENSIONS, AudioClips
from datamodules.audio.evaluation import AudioReader
from datamodules.audio.inputs import AudioInputs, bucket_sampler, prepare_sounds
from datamodules.audio.own_data import own_sounds
from datamodules.audio.sound_events import SoundEvents
from datamodules.audio.sources import AudioSource, SoundFolder, SoundTable
from datamodules.shared.bad_samples import BadSamples
from datamodules.shared.fingerprints import Fingerprint
from datamodules.shared.labelled import LabelledData, LabelledDataset
from datamodules.shared.other_data import table_settings, to_evaluate
from datamodules.shared.own_data import OwnData, locate
from datamodules.shared.reader import Reader
from datamodules.shared.sources import Splits
from diffmm.batch import AudioBatch


class AudioDataset(LabelledDataset):
    """The clips of a split, decoded, cropped and augmented.

    Args:
        splits: The splits of the source, with its classes.
        clips: The clips of this split.
        reader: The evaluation preprocessing.
        training, augment, seed: As in `AudioInputs`.
    """

    def __init__(
        self,
        splits: Splits[AudioClips],
        clips: AudioClips,
        *,
        reader: AudioReader,
        training: bool,
        augment: AudioAugment | None,
        seed: int,
    ) -> None:
        super().__init__(clips, seed=seed)
        self.splits = splits
        self.reader = reader
        self.inputs = AudioInputs(
            clips, reader=reader, training=training, augment=augment, seed=seed
        )

    def sample(self, epoch: int, index: int) -> dict[str, Any]:
        return {
            **self.inputs(epoch, index),
            "labels": self.splits.target(self.samples.labels[index]),
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
        self.reader = prepare_sounds(
            sample_rate_hz=sample_rate_hz,
            resample=resample,
            clip_seconds=clip_seconds,
            eval_crop=eval_crop,
            batching=batching,
        )
        self.sample_rate_hz = sample_rate_hz
        self.resample = resample
        self.clip_samples = self.reader.clip_samples
        self.batching = batching
        self.augment = augment

    @property
    def evaluation_reader(self) -> AudioReader:
        # An error for another sample rate protects training data; new inputs are resampled.
        return replace(self.reader, resample=True)

    def read_with(self, reader: Reader) -> None:
        if type(reader) is not AudioReader:
            super().read_with(reader)
            return
        self.reader = reader

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

    def evaluate_on(
        self,
        path: str,
        class_names: Sequence[str],
        *,
        split: str,
        multi_label: bool | None = None,
    ) -> str:
        self.reader = self.evaluation_reader
        return super().evaluate_on(path, class_names, split=split, multi_label=multi_label)

    @classmethod
    def prepared_by(
        cls,
        reader: Reader,
        path: str,
        *,
        multi_label: bool = False,
        batch_size: int = 64,
        num_workers: int = 0,
    ) -> Self:
        assert isinstance(reader, AudioReader)
        located = locate(path, "sounds", EXTENSIONS, {})
        arguments: dict[str, Any] = located.arguments
        samples, rate_hz = reader.clip_samples, reader.sample_rate_hz
        return cls(
            SoundTable(**arguments, multi_label=multi_label)
            if located.is_table
            else SoundFolder(**arguments),
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
        return AudioDataset(
            self.splits,
            samples,
            reader=self.reader,
            training=training,
            augment=self.augment,
            seed=self.seed,
        )

    def train_dataloader(self) -> DataLoader[Any]:
        if self.batching != "bucketed":
            return super().train_dataloader()
        dataset = self.dataset(self.splits.train, training=True)
        sampler = bucket_sampler(
            self.splits.train,
            self.reader,
            tolerates=self.bad_samples.policy != "raise",
            batch_size=self.batch_size,
            seed=self.seed,
            rank=self.rank,
            world_size=self.world_size,
        )
        return self._sampled_loader(dataset, dataset.collate, sampler)
