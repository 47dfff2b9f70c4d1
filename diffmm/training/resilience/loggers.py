"""Loggers that cannot write: told once, and training goes on."""

import csv
import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from diffmm.checkpoint_folders import write_text

METHODS = ("log_metrics", "save", "finalize")
"""Of a logger, that a trainer calls while it trains."""


class LoggersMayFail(Callback):
    """Goes on training when a logger meets an `OSError`: a full disk, a server that is gone.

    Each logger's first failure is told in one line. CSV files get the rows that they missed when
    there is room again, TensorBoard those that come then; neither keeps half a row. What a logger
    fails at before training begins (a folder that cannot be made) still ends the run.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        for logger in trainer.loggers:
            # A trainer may fit several times.
            if not isinstance(vars(logger).get(METHODS[0]), _Tolerant):
                tolerate(logger, is_writing=trainer.is_global_zero)


def tolerate(logger: Logger, *, is_writing: bool) -> None:
    """Let a logger's failures be warnings.

    Args:
        logger: to be changed.
        is_writing: whether this process is the one that writes.
    """
    failures = _Failures(type(logger).__name__)
    if is_writing and isinstance(logger, CSVLogger):
        keep_rows_whole(logger.experiment)
    if is_writing and isinstance(logger, TensorBoardLogger):
        # A thread of its own writes, and would end at the first failure, with a traceback.
        events: Any = logger.experiment._get_file_writer().event_writer
        records = events._async_writer._writer
        records.write = _Tolerant(_whole(records.write, Path(events._file_name)), failures)
        records.flush = _Tolerant(records.flush, failures)
    for name in METHODS:
        setattr(logger, name, _Tolerant(getattr(logger, name), failures))


def keep_rows_whole(experiment: Any) -> None:
    """Let the writer of a CSV file lose no rows when it cannot write.

    Lightning's empties the file to write it again when there is a new column.
    """
    file = Path(experiment.metrics_file_path)
    append = _whole(experiment.save, file)

    def save() -> None:
        columns = list(experiment.metrics_keys)
        try:
            if experiment.metrics and experiment._record_new_keys() and file.exists():
                _write_columns(file, experiment.metrics_keys)
        except OSError:
            experiment.metrics_keys = columns
            raise
        append()

    experiment.save = save


def _write_columns(file: Path, columns: list[str]) -> None:
    """Give a CSV file new columns, or leave it as it is."""
    with file.open(newline="", encoding="utf-8") as opened:
        rows = list(csv.DictReader(opened))
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, fieldnames=columns)
    writer.writeheader()
    writer.writerows(rows)
    write_text(file, text.getvalue())


class _Failures:
    """Whether a logger has failed, which is told once."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.is_told = False

    def tell(self, error: OSError) -> None:
        if not self.is_told:
            self.is_told = True
            rank_zero_warn(
                f"{self.name} could not write: {error}. Training goes on; this is told once"
            )


class _Tolerant:
    """A function whose `OSError` is told and no more."""

    def __init__(self, function: Callable[..., Any], failures: _Failures) -> None:
        self.function = function
        self.failures = failures

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return self.function(*args, **kwargs)
        except OSError as error:
            self.failures.tell(error)


def _whole(write: Callable[..., Any], file: Path) -> Callable[..., Any]:
    """`write`, which adds to a file all of what it is given or nothing."""

    def write_or_not(*args: Any) -> None:
        size = file.stat().st_size if file.exists() else 0
        try:
            write(*args)
        except OSError:
            if not size:
                file.unlink(missing_ok=True)
            elif file.stat().st_size > size:
                os.truncate(file, size)
            raise

    return write_or_not
