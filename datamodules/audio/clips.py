"""Audio clips, decoded one at a time, and sound files."""

import os
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import numpy as np
import soundfile
from numpy.typing import NDArray

from datamodules.audio.truncation import what_is_missing
from datamodules.shared.bad_samples import BadSampleError
from datamodules.shared.files import why_no_file
from datamodules.shared.sources import Labelled, Labels
from datamodules.shared.stored import AnyFile, StoredFile

EXTENSIONS = (".wav", ".flac", ".ogg", ".mp3", ".oga", ".opus", ".wave")
"""Extensions of the sound files to find in a folder, in lower case: those of `FORMATS`."""

FORMATS = ("WAV", "WAVEX", "RF64", "FLAC", "OGG", "MP3")
"""Accepted formats, by libsndfile's names. They are detected from the content of a file, whatever
its extension. (MP3 files often have another one.)"""

MAX_SAMPLES = 2**28
"""Maximum number of samples of all channels decoded at once: 1 GiB, or 93 minutes of mono audio at
48 kHz."""
LOUDEST = 10.0
"""Maximum amplitude. Float samples may exceed full scale (1) by 20 dB; larger ones have another
scale."""
CANCELED = 0.01
"""Channels cancel out if the level of their mean is less than this part of the loudest one's."""

_UNKNOWN = 2**63 - 1  # libsndfile's length of a file whose header has none
_BAD_FILE = 7  # libsndfile's error for a file that is missing, or named .mp3 but is no sound
_AT_ONCE = 2**20  # samples of all channels per block
_MP3_LEAD = 300 * 576
"""Samples that are decoded before a crop of an MP3 file. A frame may need 255 bytes of the frames
before it (511 in MPEG-1, whose frames are larger), each of which has at least one: 255 frames, of
576 samples where they are this small, and those that overlap with the crop."""


class ClipInfo(NamedTuple):
    """Properties of a clip that are known without decoding it."""

    num_samples: int
    sample_rate_hz: int


class AudioClips(Labelled):
    """The clips of one split, decoded one at a time."""

    @abstractmethod
    def info(self, index: int) -> ClipInfo:
        """Read a clip's length and sample rate.

        Raises:
            BadSampleError: If the clip cannot be read; the message names it.
        """

    @abstractmethod
    def read(
        self, index: int, start: int = 0, num_samples: int | None = None
    ) -> NDArray[np.float32]:
        """Decode `num_samples` samples from `start` on (all by default), `[S]`, mono, in [-1, 1].

        Raises:
            BadSampleError: If the clip cannot be read; the message names it.
        """


class _ForwardFile(soundfile.SoundFile):
    """A sound file that is read sequentially, without seeking.

    `soundfile` seeks to the current position after each block, which libsndfile cannot do at the
    end of a FLAC file without a length in its header, and after which MP3 frames lack what they
    need of earlier ones.
    """

    def seekable(self) -> bool:
        return False


class FileClips(AudioClips):
    """Sound files in one of `FORMATS`, decoded by `soundfile`.

    Several channels are averaged. If they cancel out in the decoded part (see `CANCELED`), for
    example because one is the inverse of the other, the loudest channel is used instead.

    A file without a length in its header (a FLAC or WAV file that was written into a pipe) is as
    long as its content. A file is bad if its data end before the length in its header, if more than
    `MAX_SAMPLES` would be decoded at once, or if samples exceed `LOUDEST`.
    """

    def __init__(self, paths: Sequence[AnyFile], labels: Sequence[Labels]) -> None:
        self.paths = paths
        self.labels = labels

    def subset(self, indices: Sequence[int]) -> "FileClips":
        """The clips with these indices."""
        return FileClips([self.paths[i] for i in indices], [self.labels[i] for i in indices])

    def describe(self, index: int) -> str:
        return f"clip {index} ({self.paths[index]})"

    def file(self, index: int) -> AnyFile:
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
                        else f"has no length in its header and more than {most:,} samples: "
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
                    f"has {num_samples:,} samples of {file.channels} channels, which exceeds the "
                    f"limit of {MAX_SAMPLES:,} in all: set --data.clip_seconds",
                )
            _move(file, start)
            frames = np.concatenate([*_blocks(file, num_samples)])
        if len(frames) < num_samples:
            raise self._bad(
                index,
                f"is incomplete: it ends after {start + len(frames)} of the "
                f"{start + num_samples} samples in its header",
            )
        peak = float(np.abs(frames).max(initial=0.0))
        if not np.isfinite(peak):
            raise self._bad(index, "has samples that are not finite")
        if peak > LOUDEST:
            raise self._bad(
                index, f"has samples up to {peak:g}, but full scale is 1: rescale the file"
            )
        return mono(frames)

    @contextmanager
    def _opened(self, index: int) -> Iterator[soundfile.SoundFile]:
        """Open the file of a clip; errors name the clip."""
        path = self.paths[index]
        if fault := why_no_file(path):
            raise self._bad(index, fault)
        try:
            file = soundfile.SoundFile(_openable(path))
        except soundfile.SoundFileError as error:
            raise self._bad(index, f"is not a readable sound file: {_reason(error)}") from error
        with file:
            if file.format not in FORMATS:
                raise self._bad(
                    index, f"has format {file.format}, which is not one of {', '.join(FORMATS)}"
                )
            if file.frames == 0:
                raise self._bad(index, "has no samples")
            if fault := what_is_missing(path, file.format):
                raise self._bad(index, fault)
            forward = file.format == "MP3" or file.frames == _UNKNOWN
            try:
                with _ForwardFile(_openable(path)) if forward else nullcontext(file) as opened:
                    yield opened
            except soundfile.SoundFileError as error:
                raise self._bad(index, f"cannot be decoded: {_reason(error)}") from error

    def _bad(self, index: int, what: str) -> BadSampleError:
        return BadSampleError(f"{self.describe(index)} {what}", self.paths[index])


def _reason(error: soundfile.SoundFileError) -> str:
    """The message without the file, which the messages of clips name, and the final period."""
    if getattr(error, "code", None) == _BAD_FILE:
        return "Format not recognised"
    return str(getattr(error, "error_string", error)).removesuffix(".")


def _openable(path: AnyFile) -> Any:
    if isinstance(path, StoredFile):
        return path.open()
    # As bytes, because soundfile cannot encode names that are not UTF-8. Windows has none.
    return path if os.name == "nt" else os.fsencode(path)


def _move(file: soundfile.SoundFile, start: int) -> None:
    """Move from the beginning of a file to sample `start`, such that what follows is decoded as in
    the whole file."""
    place = 0
    if file.format == "MP3":
        place = max(0, start - _MP3_LEAD)
    elif file.seekable():
        place = start
    if place:
        file.seek(place)
    for _ in _blocks(file, start - place):
        pass


def _blocks(file: soundfile.SoundFile, num_samples: int) -> Iterator[NDArray[np.float32]]:
    """The next samples `[S, channels]` in blocks, because the length in a header may be wrong and
    exceed the memory."""
    at_once = max(1, _AT_ONCE // file.channels)
    while True:
        wanted = min(num_samples, at_once)
        block = file.read(wanted, dtype="float32", always_2d=True)
        yield block
        num_samples -= len(block)
        if num_samples == 0 or len(block) < wanted:
            return


def mono(frames: NDArray[np.float32]) -> NDArray[np.float32]:
    """Mix `[S, channels]` to `[S]`; see `FileClips`."""
    mean = frames.mean(axis=1)
    levels = np.linalg.norm(frames, axis=0)
    if np.linalg.norm(mean) < CANCELED * levels.max():
        return np.ascontiguousarray(frames[:, levels.argmax()])
    return mean
