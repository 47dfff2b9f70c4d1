"""What to do about samples that cannot be read: one policy for every datamodule.

A sample is bad if its file is: a picture that does not decode, a sound that ends too early, a text
that is not text. What stands in for it is a function of `(seed, epoch, index)`, so that every
process, every number of workers and a resumed run draw the same, and no process gets fewer samples.
"""

import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from datamodules.shared.files import check_file
from diffmm.checks import DataError, Settings, check_choice

QUARANTINE_NAME = "quarantine.txt"
LEAST_READ = 100
"""Fewer samples than this count as this many, so that one bad sample at the start stops no run."""

_logger = logging.getLogger(__name__)


class BadSampleError(DataError):
    """A sample cannot be read.

    Args:
        message: names the sample's number and its file, and says what is wrong with it.
        file: that file, if there is one.
    """

    def __init__(self, message: str, file: str | Path | None = None) -> None:
        super().__init__(message)
        self.file = None if file is None else _absolute(file)


class TooManyBadSamplesError(DataError):
    """More samples cannot be read than a run is to put up with."""


@dataclass(frozen=True)
class BadSamples(Settings):
    """What a run does about samples that cannot be read, naming each with its file in one line.

    Attributes:
        policy: `raise` stops at the first one. `substitute` takes another sample, drawn from
            `(seed, epoch, index)`. `quarantine` does that, and writes the file's name into
            `quarantine_file`, so that later runs leave it out without reading it. Where a bad file
            is no sample but a part of a corpus, its text is left out.
        max_bad_fraction: in [0, 1]; a process that could not read more than this share of what it
            has read (of 100 at least) stops the run.
        quarantine_file: a text file, a path a line; more are appended, by any number of processes.
            By default `quarantine.txt` in the trainer's `default_root_dir`, which is the run's.

    Raises:
        ValueError: for an unknown policy, a fraction out of its range, or a file that no policy
            uses.
    """

    policy: Literal["raise", "substitute", "quarantine"] = "raise"
    max_bad_fraction: float = 0.01
    quarantine_file: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("bad_samples.policy", self.policy, ("raise", "substitute", "quarantine"))
        if not 0.0 <= self.max_bad_fraction <= 1.0:
            raise ValueError(
                f"bad_samples.max_bad_fraction must lie in [0, 1], got {self.max_bad_fraction}"
            )
        if self.quarantine_file is not None and self.policy != "quarantine":
            raise ValueError(
                f"bad_samples.quarantine_file is of no use under policy {self.policy!r}: "
                f"set bad_samples.policy to quarantine"
            )


class Triage:
    """`BadSamples` at work in one process: what it has read, and what of it was bad.

    Args:
        settings: the run's.
        folder: where the quarantine file is, if the settings name none.

    Raises:
        ValueError: under `quarantine`, if there is neither a file nor a folder for one, or there is
            something else than a file of this name.
    """

    def __init__(self, settings: BadSamples, folder: str | Path | None = None) -> None:
        self.settings = settings
        self.num_read = 0
        self.num_bad = 0
        self._list: Path | None = None
        self._found: set[str] = set()
        if settings.policy == "quarantine":
            if settings.quarantine_file is not None:
                self._list = Path(settings.quarantine_file)
            elif folder is not None:
                self._list = Path(folder, QUARANTINE_NAME)
            else:
                raise ValueError(
                    "bad_samples.policy is quarantine, and there is no run directory to keep its "
                    "list in: set bad_samples.quarantine_file"
                )
        if self._list is not None and os.path.lexists(self._list):
            check_file(self._list, "quarantine_file")
        self.quarantined = frozenset(_lines(self._list))

    @property
    def tolerates(self) -> bool:
        """Whether the run goes on after a bad sample."""
        return self.settings.policy != "raise"

    def is_quarantined(self, file: str | Path | None) -> bool:
        """Whether an earlier run has listed `file`: it is not to be read."""
        return bool(self.quarantined) and file is not None and _absolute(file) in self.quarantined

    def note(self, error: BadSampleError, *, instead: str) -> None:
        """Count a bad sample; name it, and list its file, the first time.

        Args:
            error: says what is wrong with it.
            instead: what the run does without it, for the log.

        Raises:
            BadSampleError: under `raise`.
            TooManyBadSamplesError: if this is one too many, with the numbers.
        """
        told = " ".join(str(error).split())
        if not self.tolerates:
            raise BadSampleError(
                f"{told}; to go on without it, set bad_samples.policy to substitute or quarantine",
                error.file,
            ) from error
        self.num_bad += 1
        if error.file is None or error.file not in self._found:
            _logger.warning("%s; %s", told, instead)
            if error.file is not None:
                self._found.add(error.file)
                if self._list is not None:
                    _append(self._list, error.file)
        limit = self.settings.max_bad_fraction
        if self.num_bad > limit * max(self.num_read, LEAST_READ):
            raise TooManyBadSamplesError(
                f"{self.num_bad} of {self.num_read} samples read by this process are bad, more "
                f"than bad_samples.max_bad_fraction allows ({limit:g}, of {LEAST_READ} samples at "
                f"least); the last: {told}"
            ) from error


def _absolute(file: str | Path) -> str:
    return str(file) if "://" in str(file) else os.path.abspath(file)


def _lines(path: Path | None) -> Iterator[str]:
    if path is not None and path.exists():
        yield from path.read_text("utf-8", "surrogateescape").splitlines()


def _append(path: Path, line: str) -> None:
    """One write to a file opened for appending: lines of several processes do not mix."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    try:
        os.write(descriptor, f"{line}\n".encode(errors="surrogateescape"))
    finally:
        os.close(descriptor)
