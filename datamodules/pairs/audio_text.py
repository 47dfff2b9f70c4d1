"""The datamodule of sounds with texts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Literal

from torch import Tensor
from torch.utils.data import DataLoader

from datamodules.audio.augment import AudioAugment
from datamodules.audio.clips import EXTENSIONS, AudioClips, FileClips
from datamodules.audio.evaluation import AudioReader
from datamodules.audio.inputs import AudioInputs, bucket_sampler, prepare_sounds
from datamodules.audio.own_data import inspect_sounds, rate_to_adopt
from datamodules.pairs.data import PairData, PairDataset
from datamodules.pairs.own_data import own_pairs
from datamodules.pairs.reader import ReadsTexts
from datamodules.pairs.sources import SOUNDS, Medium, PairSource
from datamodules.pairs.synthesized import SynthesizedSounds
from datamodules.shared.bad_samples import BadSamples
from datamodules.shared.fingerprints import Fingerprint
from datamodules.shared.own_data import OwnData
from datamodules.shared.stored import AnyFile


class Sounds(Medium[AudioClips]):
    """Sound files."""

    noun = SOUNDS
    extensions = EXTENSIONS

    def of_files(self, files: Sequence[AnyFile]) -> FileClips:
        return FileClips(files, [()] * len(files))


@dataclass(frozen=True, kw_only=True)
class AudioTextReader(ReadsTexts, AudioReader):
    """Reads sounds as `AudioReader` does, and encodes texts.

    `read` takes a sound and `read_text` a text; `collate` takes the results of either, or dicts
    with the fields of both.
    """

    class_path: ClassVar[str] = "datamodules.pairs.AudioTextReader"

    def collate(self, samples: list[dict[str, Any]]) -> dict[str, Tensor]:
        sounds = AudioReader.collate(self, samples) if "waveforms" in samples[0] else {}
        return {**sounds, **self.collate_texts(samples)}


class AudioTextData(PairData[AudioClips]):
    """Sounds with texts as `PairBatch`es, for contrastive training, captioning and transcription.

    Args:
        source: Source of the pairs, a class of `datamodules.pairs`; by default
            `SynthesizedSounds`, which need no files.
        tokenizer: Name of the tokenizer, as in `TextData`; it must have an end-of-text token.
        start_ids: Ids placed before every text; none by default. The tokenizer of CLIP has the
            beginning-of-text token 49406.
        max_tokens: Maximum number of tokens of a text, including the end of text. Longer texts are
            cut, which is reported once.
        pad_texts: Whether texts are padded to `max_tokens` instead of the longest of the batch, so
            that shapes are static for compiled models.
        sample_rate_hz: Sample rate of the waveforms, in Hz.
        resample: Whether to resample sounds of other sample rates, by SciPy's polyphase filter;
            otherwise they raise an error.
        clip_seconds: Length to which longer sounds are cropped, in seconds: at a random place in
            training, as set by `eval_crop` in evaluation. By default sounds are not cropped; a crop
            may leave out what a text describes.
        eval_crop: Crop in evaluation: `"center"`, `"start"`, or `"full"` for whole sounds.
        batching: `"padded"` pads sounds to the longest of the batch; `"bucketed"` also groups
            sounds of similar length into training batches; `"fixed"` pads all sounds to
            `clip_seconds`, so that shapes are static for compiled models.
        augment: Augmentation of training sounds; none by default.
        pairs_per_row: Number of pairs that are packed into each row of a training batch, without
            padding between their texts; for captioning. The model's `max_length` must fit them.
        batch_size: Number of samples per batch and process, a multiple of `pairs_per_row`.
        num_workers: Number of data loader workers per process; 0 loads in the training process.
        seed: Seed of the order, the crops, the augmentation, and the choice among several texts.
        bad_samples: How to handle samples that cannot be read; by default, raise an error.

    Raises:
        ValueError: If an argument is out of range or the source has images; the message names it.
    """

    reader: AudioTextReader

    def __init__(
        self,
        source: PairSource | None = None,
        *,
        tokenizer: str = "bytes",
        start_ids: Sequence[int] = (),
        max_tokens: int = 128,
        pad_texts: bool = False,
        sample_rate_hz: int = 16000,
        resample: bool = False,
        clip_seconds: float | None = None,
        eval_crop: Literal["center", "start", "full"] = "center",
        batching: Literal["padded", "bucketed", "fixed"] = "padded",
        augment: AudioAugment | None = None,
        pairs_per_row: int = 1,
        batch_size: int = 32,
        num_workers: int = 0,
        seed: int = 0,
        bad_samples: BadSamples | None = None,
    ) -> None:
        sounds = prepare_sounds(
            sample_rate_hz=sample_rate_hz,
            resample=resample,
            clip_seconds=clip_seconds,
            eval_crop=eval_crop,
            batching=batching,
        )
        super().__init__(
            source or SynthesizedSounds(sample_rate_hz=sample_rate_hz),
            Sounds(),
            AudioTextReader(
                tokenizer=tokenizer,
                start_ids=tuple(start_ids),
                max_tokens=max_tokens,
                pad_texts=pad_texts,
                **{field.name: getattr(sounds, field.name) for field in fields(sounds)},
            ),
            pairs_per_row=pairs_per_row,
            batch_size=batch_size,
            num_workers=num_workers,
            seed=seed,
            bad_samples=bad_samples,
        )
        self.batching = batching
        self.augment = augment

    @property
    def evaluation_reader(self) -> AudioTextReader:
        # An error for another sample rate protects training data; new inputs are resampled.
        return replace(self.reader, resample=True)

    @classmethod
    def own_data(cls, path: str, given: Mapping[str, Any], *, inputs_may_change: bool) -> OwnData:
        """Settings for a folder of sounds with text files, or a table of sounds and texts.

        Args:
            path: Path of the folder or table.
            given: Arguments of the recipe for this class.
            inputs_may_change: As in `AudioData.own_data`.

        Raises:
            FileNotFoundError: If the path does not exist.
            ValueError: If it has no sounds with texts.
        """
        found = own_pairs(path, given, Sounds(), 32)
        rates, lengths = inspect_sounds(found.splits.train.media)
        rate_hz = rate_to_adopt(rates, given, inputs_may_change=inputs_may_change)
        settings = {**found.settings, **({"resample": True} if rate_hz is None else {})}
        facts = {"sample_rate_hz": rate_hz} if rate_hz else {}
        return OwnData(settings, facts, found.summary + lengths)

    def evaluate_on_pairs(self, path: str, *, split: str) -> str:
        self.reader = self.evaluation_reader
        return super().evaluate_on_pairs(path, split=split)

    def inputs(self, media: AudioClips, *, training: bool) -> AudioInputs:
        return AudioInputs(
            media, reader=self.reader, training=training, augment=self.augment, seed=self.seed
        )

    def fingerprint(self) -> Fingerprint:
        return {
            **super().fingerprint(),
            "sample_rate_hz": self.reader.sample_rate_hz,
            "clip_samples": self.reader.clip_samples,
            "batching": self.batching,
            "augment": str(self.augment),
        }

    def loader_of(self, dataset: PairDataset) -> DataLoader[Any]:
        if self.batching != "bucketed":
            return super().loader_of(dataset)
        sampler = bucket_sampler(
            self.splits.train.media,
            self.reader,
            tolerates=self.bad_samples.policy != "raise",
            batch_size=self.batch_size,
            seed=self.seed,
            rank=self.rank,
            world_size=self.world_size,
        )
        return self._sampled_loader(dataset, self.collate_of(dataset), sampler)
