"""Sounds as model inputs, in training and evaluation, for all datamodules that have sounds."""

import sys
from typing import Any, Literal

from datamodules.audio.augment import AudioAugment, Augmenter
from datamodules.audio.buckets import BucketSampler
from datamodules.audio.clips import AudioClips
from datamodules.audio.evaluation import POSITIONS, AudioReader, bounded
from datamodules.audio.reader import ClipReader
from datamodules.shared.bad_samples import BadSampleError
from datamodules.shared.sampling import sample_rng
from diffmm.checks import check_choice

BATCHINGS = ("padded", "bucketed", "fixed")


class AudioInputs:
    """The clips of a split, decoded, cropped and augmented.

    Args:
        clips: The clips.
        reader: The evaluation preprocessing.
        training: Whether crops are random, drawn from `(seed, epoch, index)`, and clips augmented.
        augment: The augmentation, drawn from the same; `None` for no augmentation.
        seed: Seed of the random numbers.

    Raises:
        FileNotFoundError, ValueError: As `Augmenter`.
    """

    def __init__(
        self,
        clips: AudioClips,
        *,
        reader: AudioReader,
        training: bool,
        augment: AudioAugment | None,
        seed: int,
    ) -> None:
        self.clips = clips
        self.reader = reader
        self.training = training
        self.augmenter = None
        if training and augment is not None:
            self.augmenter = Augmenter(
                augment, sample_rate_hz=reader.sample_rate_hz, resample=reader.resample
            )
        self.seed = seed

    def __call__(self, epoch: int, index: int) -> dict[str, Any]:
        """The input of clip `index` in `epoch`, as `{"waveforms": [S], "num_samples": S}`.

        Raises:
            BadSampleError: If the clip cannot be read.
        """
        if not self.training:
            waveform = self.reader.waveform(self.clips, index)
        else:
            rng = sample_rng(self.seed, epoch, index)
            waveform = self.reader.of(self.clips).read(
                index, max_samples=self.reader.clip_samples, position=rng.random()
            )
            if self.augmenter is not None:
                waveform = self.augmenter(waveform, rng)
            waveform = bounded(waveform)
        return {"waveforms": waveform, "num_samples": len(waveform)}


def prepare_sounds(
    *,
    sample_rate_hz: int,
    resample: bool,
    clip_seconds: float | None,
    eval_crop: Literal["center", "start", "full"],
    batching: Literal["padded", "bucketed", "fixed"],
) -> AudioReader:
    """The evaluation preprocessing of sounds. Arguments as in `AudioData`.

    Raises:
        ValueError: If an argument is out of range; the message names it.
    """
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
    return AudioReader(
        sample_rate_hz=sample_rate_hz,
        resample=resample,
        clip_samples=None if clip_seconds is None else round(clip_seconds * sample_rate_hz),
        crop=eval_crop,
        pad=batching == "fixed",
    )


def bucket_sampler(
    clips: AudioClips, reader: AudioReader, *, tolerates: bool, **arguments: int
) -> BucketSampler:
    """A sampler of clips of similar length, as they are after cropping.

    Args:
        clips: The training clips.
        reader: Their preprocessing.
        tolerates: Whether a clip that cannot be read counts as empty, because it is handled later;
            otherwise it raises an error.
        arguments: `batch_size`, `seed`, `rank` and `world_size` of the sampler.

    Raises:
        BadSampleError: If a clip cannot be read.
    """
    longest = reader.clip_samples or sys.maxsize
    lengths = [
        min(_length(reader.of(clips), index, tolerates), longest)
        for index in range(len(clips.labels))
    ]
    return BucketSampler(lengths, **arguments)


def _length(reader: ClipReader, index: int, tolerates: bool) -> int:
    try:
        return reader.num_samples(index)
    except BadSampleError:
        if not tolerates:
            raise
        return 0
