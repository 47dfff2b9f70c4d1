"""The datamodule of images with texts and sounds with texts together."""

import os
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

from torch import Tensor
from torch.utils.data import ConcatDataset, DataLoader

from datamodules.audio.augment import AudioAugment
from datamodules.audio.evaluation import AudioReader
from datamodules.image.files import EXTENSIONS as IMAGE_EXTENSIONS
from datamodules.image.files import MAX_PIXELS
from datamodules.image.reader import ImageReader
from datamodules.image.transform import ImageTransform
from datamodules.pairs.audio_text import AudioTextData, AudioTextReader, Sounds
from datamodules.pairs.data import PairData, PairDataset, collate_pairs
from datamodules.pairs.image_text import ImageTextData, ImageTextReader
from datamodules.pairs.sources import IMAGES, NUM_LOOKED_AT, SOUNDS, PairSource
from datamodules.shared.bad_samples import BadSamples
from datamodules.shared.examination import Examined
from datamodules.shared.fingerprints import Fingerprint, spread
from datamodules.shared.loading import SeededDataModule
from datamodules.shared.own_data import OwnData
from datamodules.shared.reader import Reader
from datamodules.shared.sampling import MixedSampler, SampleKey
from diffmm.batch import PairBatch


@dataclass(frozen=True, kw_only=True)
class ImageAudioTextReader(ImageTextReader, AudioTextReader):
    """Reads images as `ImageReader` does and sounds as `AudioReader` does, and encodes texts.

    `read` takes an image or a sound, and `read_text` a text; `collate` takes the results of either,
    or dicts with the fields of both. A path is that of a sound if it has the extension of one, and
    a tuple `(waveform, sample_rate_hz)` is a sound.
    """

    class_path: ClassVar[str] = "datamodules.pairs.ImageAudioTextReader"
    extensions: ClassVar[tuple[str, ...]] = (*IMAGE_EXTENSIONS, *Sounds.extensions)
    kind: ClassVar[str] = "image or sound"

    def read(self, item: Any) -> dict[str, Any]:
        reader = AudioReader if self.is_sound(item) else ImageReader
        return reader.read(self, item)

    def is_sound(self, item: Any) -> bool:
        """Whether an input is a sound, by its type or the extension of its file."""
        if isinstance(item, str | Path):
            return Path(item).suffix.lower() in Sounds.extensions
        return isinstance(item, tuple)

    def collate(self, samples: list[dict[str, Any]]) -> dict[str, Tensor]:
        """Collate samples, of which those with images precede those with sounds.

        Raises:
            ValueError: If they do not.
        """
        images = [sample for sample in samples if "images" in sample]
        sounds = [sample for sample in samples if "waveforms" in sample]
        if images and sounds and "waveforms" in samples[0]:
            raise ValueError("the images of a batch must precede its sounds")
        return {
            **(ImageReader.collate(self, images) if images else {}),
            **(AudioReader.collate(self, sounds) if sounds else {}),
            **self.collate_texts(samples),
        }


class ImageAudioTextData(SeededDataModule):
    """Images with texts and sounds with texts as `PairBatch`es, for contrastive training of one
    model with both.

    Every training batch has both, so that every step has gradients for all parts of the model. An
    epoch is a pass over the images or over the sounds, whichever have more batches; the others
    begin again meanwhile. Batches of evaluation have one modality, in turn.

    Args:
        image_source: Source of the images, as `source` of `ImageTextData`.
        audio_source: Source of the sounds, as `source` of `AudioTextData`.
        tokenizer, start_ids, max_tokens, pad_texts: As in both.
        image_size, channels, transform, max_pixels: As in `ImageTextData`.
        sample_rate_hz, resample, clip_seconds, eval_crop, augment: As in `AudioTextData`.
        batching: `"padded"` or `"fixed"`, as in `AudioTextData`.
        batch_size: Number of samples per batch and process, images and sounds together.
        audio_fraction: Fraction of the sounds in a training batch, between 0 and 1; their number is
            rounded.
        num_workers: Number of data loader workers per process and loader; evaluation has a loader
            per modality. 0 loads in the training process.
        seed: Seed of the order, the crops, the augmentation, and the choice among several texts.
        bad_samples: How to handle samples that cannot be read; by default, raise an error. Images
            and sounds are counted separately, and replaced by others of their own kind.

    Raises:
        ValueError: If an argument is out of range, a source has other media, or a batch would lack
            images or sounds; the message names it.
    """

    def __init__(
        self,
        image_source: PairSource | None = None,
        audio_source: PairSource | None = None,
        *,
        tokenizer: str = "bytes",
        start_ids: Sequence[int] = (),
        max_tokens: int = 128,
        pad_texts: bool = False,
        image_size: int | tuple[int, int] | None = None,
        channels: int | None = None,
        transform: ImageTransform | None = None,
        max_pixels: int = MAX_PIXELS,
        sample_rate_hz: int = 16000,
        resample: bool = False,
        clip_seconds: float | None = None,
        eval_crop: Literal["center", "start", "full"] = "center",
        batching: Literal["padded", "fixed"] = "padded",
        augment: AudioAugment | None = None,
        batch_size: int = 64,
        audio_fraction: float = 0.5,
        num_workers: int = 0,
        seed: int = 0,
        bad_samples: BadSamples | None = None,
    ) -> None:
        super().__init__(
            batch_size=batch_size, num_workers=num_workers, seed=seed, bad_samples=bad_samples
        )
        self.audio_fraction = audio_fraction
        if not 0.0 < audio_fraction < 1.0:
            raise ValueError(f"audio_fraction must be between 0 and 1, got {audio_fraction}")
        if not 0 < self.num_sounds < batch_size:
            raise ValueError(
                f"batch_size={batch_size} with audio_fraction={audio_fraction} has "
                f"{self.num_sounds} sounds, but a batch needs at least one image and one sound"
            )
        if batching not in ("padded", "fixed"):
            raise ValueError(f"batching must be 'padded' or 'fixed', got {batching!r}")
        shared: dict[str, Any] = {
            "tokenizer": tokenizer,
            "start_ids": start_ids,
            "max_tokens": max_tokens,
            "pad_texts": pad_texts,
            "num_workers": num_workers,
            "seed": seed,
            "bad_samples": bad_samples,
        }
        self.parts: dict[str, PairData[Any]] = {
            IMAGES: ImageTextData(
                image_source,
                image_size=image_size,
                channels=channels,
                transform=transform,
                max_pixels=max_pixels,
                batch_size=batch_size - self.num_sounds,
                **shared,
            ),
            SOUNDS: AudioTextData(
                audio_source,
                sample_rate_hz=sample_rate_hz,
                resample=resample,
                clip_seconds=clip_seconds,
                eval_crop=eval_crop,
                batching=batching,
                augment=augment,
                batch_size=self.num_sounds,
                **shared,
            ),
        }
        readers = [part.reader for part in self.parts.values()]
        values = {f.name: getattr(reader, f.name) for reader in readers for f in fields(reader)}
        self.reader = ImageAudioTextReader(**values)

    @property
    def num_sounds(self) -> int:
        """Number of sounds in a training batch."""
        return round(self.batch_size * self.audio_fraction)

    @property
    def evaluation_reader(self) -> ImageAudioTextReader:
        # As in `AudioTextData`.
        return replace(self.reader, resample=True)

    def read_with(self, reader: Reader) -> None:
        if type(reader) is not ImageAudioTextReader:
            super().read_with(reader)
            return
        self.reader = reader
        for part in self.parts.values():
            names = [field.name for field in fields(part.reader)]
            part.read_with(type(part.reader)(**{name: getattr(reader, name) for name in names}))

    @classmethod
    def own_data(cls, path: str, given: Mapping[str, Any], *, inputs_may_change: bool) -> OwnData:
        """Refuse a single path.

        Raises:
            ValueError: Always.
        """
        raise ValueError(
            f"--data {path}: {cls.__name__} has images and sounds, which are two sources: set "
            f"--data.image_source '{{class_path: datamodules.pairs.PairFolder, init_args: "
            f"{{train: FOLDER}}}}', and --data.audio_source likewise"
        )

    def prepare_data(self) -> None:
        for part in self.parts.values():
            part.prepare_data()

    def setup(self, stage: str | None = None) -> None:
        for part in self.parts.values():
            part.trainer = self.trainer
            part.setup(stage)

    @property
    def has_test_split(self) -> bool:
        return all(part.has_test_split for part in self.parts.values())

    def evaluate_on_pairs(self, path: str, *, split: str) -> str:
        """Evaluate on other images or sounds, as `PairData.evaluate_on_pairs`; those of the other
        modality are then not evaluated.

        Raises:
            FileNotFoundError: If the path does not exist.
            ValueError: If it has neither images nor sounds with texts.
        """
        faults = []
        for name, part in self.parts.items():
            try:
                summary = part.evaluate_on_pairs(path, split=split)
                _check_names(path, name, part)
            except ValueError as error:
                faults.append(str(error))
                continue
            self.parts = {name: part}
            return summary
        raise ValueError("; ".join(dict.fromkeys(faults)))

    def fingerprint(self) -> Fingerprint:
        return {
            f"{name} of {noun}": value
            for noun, part in self.parts.items()
            for name, value in part.fingerprint().items()
        }

    def examine(self, limit: int) -> Examined:
        """Examine both, as `PairData.examine`."""
        found = {noun: part.examine_pairs(limit) for noun, part in self.parts.items()}
        lines: dict[str, str] = {}
        for noun, each in found.items():
            for name, text in each.lines.items():
                text = f"{noun}: {text}" if name == "read" else text
                lines[name] = f"{lines[name]}; {text}" if name in lines else text
        faults = [
            f"{count} {noun} for training do not fill one batch, which has {part.batch_size} of "
            f"them: set a smaller --data.batch_size or use more data"
            for noun, part in self.parts.items()
            if (count := len(part.splits.train)) < part.batch_size * self.world_size
        ]
        faults += [fault for each in found.values() for fault in each.faults]
        return Examined(lines, faults, [doubt for each in found.values() for doubt in each.doubts])

    def train_dataloader(self) -> DataLoader[Any]:
        for part in self.parts.values():
            part.report_cut_texts()
        parts = [self._pairs(noun, "train") for noun in self.parts]
        dataset = JoinedPairs(parts, self.reader)
        sampler = MixedSampler(
            [len(part) for part in parts],
            [self.batch_size - self.num_sounds, self.num_sounds],
            shuffle=True,
            seed=self.seed,
            rank=self.rank,
            world_size=self.world_size,
        )
        return self._sampled_loader(dataset, dataset.collate, sampler)

    def as_evaluated(self, split: Literal["train", "val", "test"]) -> "InTurn":
        """The pairs of a split in order, prepared as in evaluation: batches of images and of
        sounds in turn."""
        loaders, first = [], 0
        for noun in self.parts:
            pairs = self._pairs(noun, split, training=False)
            dataset = JoinedPairs([pairs], self.reader, first)
            loaders.append(self.evaluation_loader(dataset, dataset.collate))
            first += len(pairs)
        return InTurn(loaders)

    def val_dataloader(self) -> "InTurn":
        return self.as_evaluated("val")

    def test_dataloader(self) -> "InTurn":
        return self.as_evaluated("test")

    def predict_dataloader(self) -> "InTurn":
        return self.as_evaluated("test")

    def _pairs(self, noun: str, split: str, *, training: bool = True) -> PairDataset:
        part = self.parts[noun]
        dataset = part.dataset(getattr(part.splits, split), training=training)
        dataset.triage = part.triage()
        return dataset


def _check_names(path: str, noun: str, part: PairData[Any]) -> None:
    """Check that a table of images does not name sounds, or the reverse.

    Raises:
        ValueError: If it does; the message names a file.
    """
    other, extensions = {IMAGES: (SOUNDS, Sounds.extensions), SOUNDS: (IMAGES, IMAGE_EXTENSIONS)}[
        noun
    ]
    media = part.splits.val.media
    files = (media.file(index) for index in spread(range(len(media.labels)), NUM_LOOKED_AT))
    for file in files:
        if file is not None and os.fspath(file).lower().endswith(extensions):
            raise ValueError(
                f"{path} cannot be evaluated as {noun}: it has {other}, such as {file}"
            )


class JoinedPairs(ConcatDataset[dict[str, Any]]):
    """Several datasets one after the other, whose samples are read by index and epoch; the `index`
    of a sample counts through all of them.

    Args:
        parts: The datasets, those of images first.
        reader: Collates samples of all of them.
        first: Index of the first sample.
    """

    def __init__(
        self, parts: Sequence[PairDataset], reader: ImageAudioTextReader, first: int = 0
    ) -> None:
        super().__init__(parts)
        self.reader = reader
        self.first = first

    def __getitem__(self, key: SampleKey | int) -> dict[str, Any]:
        epoch, index = key if isinstance(key, tuple) else (0, key)
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} is out of range for {len(self)} samples")
        number = bisect_right(self.cumulative_sizes, index)
        part = self.datasets[number]
        before = 0 if number == 0 else self.cumulative_sizes[number - 1]
        sample = part[epoch, index - before]
        return {**sample, "index": self.first + before + sample["index"]}

    def collate(self, samples: list[dict[str, Any]]) -> PairBatch:
        """Collate samples, those of images first."""
        return collate_pairs(self.reader, samples)


class InTurn:
    """The batches of several loaders in turn, as long as they have any.

    Processes whose loaders have equally many batches thus have the same modality in every step, as
    sharded models need.
    """

    def __init__(self, loaders: Sequence[DataLoader[Any]]) -> None:
        self.loaders = loaders

    def __len__(self) -> int:
        return sum(map(len, self.loaders))

    def __iter__(self) -> Iterator[Any]:
        left = [iter(loader) for loader in self.loaders]
        while left:
            for batches in list(left):
                batch = next(batches, None)
                if batch is None:
                    left.remove(batches)
                else:
                    yield batch
