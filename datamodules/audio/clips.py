"""Clips of sound, decoded one at a time; sound files among them."""

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import NamedTuple

import numpy as np
import soundfile
from numpy.typing import NDArray

from datamodules.audio.truncation import what_is_missing
from datamodules.shared.bad_samples import BadSampleError
from datamodules.shared.files import why_no_file
from datamodules.shared.sources import Labelled, Labels

EXTENSIONS = (".wav", ".flac", ".ogg")
FORMATS = ("WAV", "WAVEX", "RF64", "FLAC", "OGG", "MP3")
"""What a file may be by its content, in libsndfile's words, whatever its name. (An MP3 is often
called something else.)"""

MAX_SAMPLES = 2**28
"""No more are decoded at once, of all channels: a GiB, or 93 minutes of mono at 48 kHz."""
LOUDEST = 10.0
"""Floats may overshoot full scale, which is 1, by 20 dB; beyond that they are on another scale."""
CANCELED = 0.01
"""Channels cancel out where the level of their mean is less than this part of the loudest one's."""

_UNKNOWN = 2**63 - 1  # libsndfile's length of a file that does not tell it
_AT_ONCE = 2**20  # samples of all channels


class ClipInfo(NamedTuple):
    """What is known of a clip without its samples."""

    num_samples: int
    sample_rate_hz: int


class AudioClips(Labelled):
    """The clips of one split, decoded one at a time."""

    @abstractmethod
    def info(self, index: int) -> ClipInfo:
        """A clip's length and sample rate.

        Raises:
            BadSampleError: naming the clip, if it cannot be read.
        """

    @abstractmethod
    def read(
        self, index: int, start: int = 0, num_samples: int | None = None
    ) -> NDArray[np.float32]:
        """`[S]` mono samples in [-1, 1] from sample `start` on: `num_samples`, or all that follow.

        Raises:
            BadSampleError: naming the clip, if it cannot be read.
        """


class _ForwardFile(soundfile.SoundFile):
    """A sound file that is read from its beginning on, without a seek.

    `soundfile` seeks to where it is after each piece that it reads, which libsndfile cannot do at
    the end of a FLAC file that does not tell its length.
    """

    def seekable(self) -> bool:
        return False


class FileClips(AudioClips):
    """Sound files that `soundfile` can decode, of `FORMATS`.

    Several channels become their mean. Where they cancel out in what is read (see `CANCELED`; as
    where one is the other turned upside down), the loudest channel is taken instead.

    A file that does not tell its length (a FLAC, or a WAV, that was written into a pipe) is as long
    as what it holds. One whose data end before the length that it tells is bad, and so is one of
    which more than `MAX_SAMPLES` would be decoded at once, or with samples beyond `LOUDEST`.
    """

    def __init__(self, paths: Sequence[Path], labels: Sequence[Labels]) -> None:
        self.paths = paths
        self.labels = labels

    def subset(self, indices: Sequence[int]) -> "FileClips":
        """The clips of these numbers."""
        return FileClips([self.paths[i] for i in indices], [self.labels[i] for i in indices])

    def describe(self, index: int) -> str:
        return f"clip {index} ({self.paths[index]})"

    def file(self, index: int) -> Path:
        return self.paths[index]

    def info(self, index: int) -> ClipInfo:
        with self._opened(index) as file:
            length = file.frames
            if length == _UNKNOWN:
                most = MAX_SAMPLES // file.channels
                length = sum(len(block) for block in _blocks(file, most + 1))
                if not 0 < length <= most:
                    raise self._bad(
                        index,
                        "has no samples"
                        if length == 0
                        else f"does not tell its length, and has more than {most:,} samples: "
                        f"write it again with its length",
                    )
            return ClipInfo(length, file.samplerate)

    def read(
        self, index: int, start: int = 0, num_samples: int | None = None
    ) -> NDArray[np.float32]:
        if num_samples is None:
            num_samples = self.info(index).num_samples - start
        with self._opened(index) as file:
            if num_samples * file.channels > MAX_SAMPLES:
                raise self._bad(
                    index,
                    f"has {num_samples:,} samples of {file.channels} channels to be read at once, "
                    f"more than {MAX_SAMPLES:,}: set clip_seconds",
                )
            if file.seekable():
                file.seek(start)
            else:
                for _ in _blocks(file, start):
                    pass
            frames = np.concatenate([*_blocks(file, num_samples)])
        if len(frames) < num_samples:
            raise self._bad(
                index,
                f"ends after {start + len(frames)} of the {start + num_samples} samples that its "
                f"header promises",
            )
        peak = float(np.abs(frames).max(initial=0.0))
        if not np.isfinite(peak):
            raise self._bad(index, "has samples that are not finite")
        if peak > LOUDEST:
            raise self._bad(index, f"has samples up to {peak:g}, where 1 is full scale: scale it")
        return mono(frames)

    @contextmanager
    def _opened(self, index: int) -> Iterator[soundfile.SoundFile]:
        """A clip's file at its beginning; what goes wrong with it names the clip."""
        path = self.paths[index]
        if fault := why_no_file(path):
            raise self._bad(index, fault)
        try:
            file = soundfile.SoundFile(path)
        except soundfile.SoundFileError as error:
            raise self._bad(index, f"is not a readable sound: {error}") from error
        with file:
            if file.format not in FORMATS:
                raise self._bad(index, f"is {file.format} by its content, not {', '.join(FORMATS)}")
            if file.frames == 0:
                raise self._bad(index, "has no samples")
            if fault := what_is_missing(path, file.format):
                raise self._bad(index, fault)
            unmeasured = file.frames == _UNKNOWN
            try:
                with _ForwardFile(path) if unmeasured else nullcontext(file) as opened:
                    yield opened
            except soundfile.SoundFileError as error:
                raise self._bad(index, f"cannot be decoded: {error}") from error

    def _bad(self, index: int, what: str) -> BadSampleError:
        return BadSampleError(f"{self.describe(index)} {what}", self.paths[index])


def _blocks(file: soundfile.SoundFile, num_samples: int) -> Iterator[NDArray[np.float32]]:
    """The next samples `[S, channels]`, in pieces: a header may promise more than memory holds."""
    at_once = max(1, _AT_ONCE // file.channels)
    while True:
        wanted = min(num_samples, at_once)
        block = file.read(wanted, dtype="float32", always_2d=True)
        yield block
        num_samples -= len(block)
        if num_samples == 0 or len(block) < wanted:
            return


def mono(frames: NDArray[np.float32]) -> NDArray[np.float32]:
    """`[S, channels]` as `[S]`: see `FileClips`."""
    mean = frames.mean(axis=1)
    levels = np.linalg.norm(frames, axis=0)
    if np.linalg.norm(mean) < CANCELED * levels.max():
        return np.ascontiguousarray(frames[:, levels.argmax()])
    return mean
