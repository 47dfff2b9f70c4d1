"""Handling of samples that cannot be read, with one policy for all datamodules.

A sample is bad if its file is damaged: an image that does not decode, audio that ends too early, a
text that is not UTF-8. Its substitute is a function of `(seed, epoch, index)`, so it does not
depend on the process or the number of workers, a resumed run draws the same one, and every process
gets the same number of samples.
"""

import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from datamodules.shared.files import check_file
from datamodules.shared.stored import AnyFile
from diffmm.checks import DataError, Settings, check_choice

QUARANTINE_NAME = "quarantine.txt"
LEAST_READ = 100
"""Minimum denominator of the bad fraction, so that one early bad sample does not stop a run."""

MOST_LISTED = 100
"""Maximum number of files that an error names."""

_logger = logging.getLogger(__name__)


class BadSampleError(DataError):
    """A sample cannot be read.

    Args:
        message: Names the sample's index, its file and the problem.
        file: The file, if the sample has one.
    """

    def __init__(self, message: str, file: str | AnyFile | None = None) -> None:
        super().__init__(message)
        self.file = None if file is None else _absolute(file)


class TooManyBadSamplesError(DataError):
    """The fraction of bad samples exceeds `max_bad_fraction`."""


@dataclass(frozen=True)
class BadSamples(Settings):
    """How a run handles samples that cannot be read. Each is logged with its file in one line.

    Attributes:
        policy: `raise` stops at the first bad sample. `substitute` replaces it by another sample,
            drawn from `(seed, epoch, index)`. `quarantine` also adds the file to
            `quarantine_file`, so that later runs skip it without reading it. If a bad file is not
            a sample but part of a corpus, its text is skipped.
        max_bad_fraction: Maximum fraction of bad samples, in [0, 1]. A process stops the run if
            more of the samples that it has read (counted as at least 100) are bad.
        quarantine_file: A text file with one path per line, to which any number of processes
            append. By default `quarantine.txt` in the trainer's `default_root_dir`, which is the
            run directory.

    Raises:
        ValueError: If the policy is unknown, the fraction is out of range, or `quarantine_file` is
            set for another policy.
    """

    policy: Literal["raise", "substitute", "quarantine"] = "raise"
    max_bad_fraction: float = 0.01
    quarantine_file: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("bad_samples.policy", self.policy, ("raise", "substitute", "quarantine"))
        if not 0.0 <= self.max_bad_fraction <= 1.0:
            raise ValueError(
                f"bad_samples.max_bad_fraction must be in [0, 1], got {self.max_bad_fraction}"
            )
        if self.quarantine_file is not None and self.policy != "quarantine":
            raise ValueError(
                f"bad_samples.quarantine_file is not used by policy {self.policy!r}: "
                f"set --data.bad_samples.policy quarantine"
            )


class Triage:
    """Applies `BadSamples` in one process and counts the samples read and the bad ones.

    Args:
        settings: The settings of the run.
        folder: Folder of the quarantine file if the settings do not name one.

    Raises:
        ValueError: If the policy is `quarantine` and there is neither a quarantine file nor a
            folder for it, or the path is not a regular file.
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
                    "bad_samples.policy is quarantine, but there is no run directory for its "
                    "list: set --data.bad_samples.quarantine_file"
                )
        if self._list is not None and os.path.lexists(self._list):
            check_file(self._list, "quarantine_file")
        self.quarantined = frozenset(_lines(self._list))

    @property
    def tolerates(self) -> bool:
        """Whether the run continues after a bad sample."""
        return self.settings.policy != "raise"

    def is_quarantined(self, file: str | AnyFile | None) -> bool:
        """Whether the quarantine list of earlier runs contains `file`."""
        return bool(self.quarantined) and file is not None and _absolute(file) in self.quarantined

    def note(self, error: BadSampleError, *, instead: str) -> None:
        """Count a bad sample; the first time, also log it and add its file to the list.

        Args:
            error: The error that describes the problem.
            instead: How the run replaces the sample, for the log.

        Raises:
            BadSampleError: If the policy is `raise`.
            TooManyBadSamplesError: If `max_bad_fraction` is exceeded; the message gives the counts.
        """
        message = " ".join(str(error).split())
        if not self.tolerates:
            raise BadSampleError(
                f"{message}; to continue without it, set --data.bad_samples.policy substitute (or "
                f"quarantine)",
                error.file,
            ) from error
        self.num_bad += 1
        if error.file is None or error.file not in self._found:
            _logger.warning("%s; %s", message, instead)
            if error.file is not None:
                self._found.add(error.file)
                if self._list is not None:
                    _append(self._list, error.file)
        limit = self.settings.max_bad_fraction
        if self.num_bad > limit * max(self.num_read, LEAST_READ):
            raise TooManyBadSamplesError(
                f"{self.num_bad} of {self.num_read} samples read by this process are bad, which "
                f"exceeds --data.bad_samples.max_bad_fraction ({limit:g} of at least {LEAST_READ} "
                f"samples); the last one: {message}{self._listed()}"
            ) from error

    def _listed(self) -> str:
        """The files that this process has added to the quarantine list, for an error; the list
        itself is removed with a run that has not begun."""
        if self._list is None or not self._found:
            return ""
        files = sorted(self._found)
        more = f" and {len(files) - MOST_LISTED} more" if len(files) > MOST_LISTED else ""
        return f"; put in quarantine: {', '.join(files[:MOST_LISTED])}{more}"


def _absolute(file: str | AnyFile) -> str:
    return str(file) if "://" in str(file) else os.path.abspath(file)


def _lines(path: Path | None) -> Iterator[str]:
    if path is not None and path.exists():
        yield from path.read_text("utf-8", "surrogateescape").splitlines()


def _append(path: Path, line: str) -> None:
    """Append a line in a single write, so that lines of several processes do not mix."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    try:
        os.write(descriptor, f"{line}\n".encode(errors="surrogateescape"))
    finally:
        os.close(descriptor)
