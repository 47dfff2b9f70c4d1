"""Tolerance of failing loggers: each failure is reported once, and training continues."""

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
from diffmm.training.lightning_internals import record_new_columns

METHODS = ("log_metrics", "save", "finalize")
"""Methods of a logger that a trainer calls during training."""


class LoggersMayFail(Callback):
    """Continues training when a logger raises an `OSError`, such as for a full disk or an
    unreachable server.

    The first failure of each logger is reported as a warning. Once writing succeeds again, CSV
    files receive the missed rows, and TensorBoard the rows from then on; neither contains
    incomplete rows. Failures before training starts (such as a folder that cannot be created) still
    stop the run.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        for logger in trainer.loggers:
            # A trainer may run `fit` several times.
            if not isinstance(vars(logger).get(METHODS[0]), _Tolerant):
                tolerate(logger, is_writing=trainer.is_global_zero)


def tolerate(logger: Logger, *, is_writing: bool) -> None:
    """Turn a logger's `OSError`s into warnings.

    Args:
        logger: Logger to modify.
        is_writing: Whether this process writes the log.
    """
    failures = _Failures(type(logger).__name__)
    if is_writing and isinstance(logger, CSVLogger):
        keep_rows_whole(logger.experiment)
    if is_writing and isinstance(logger, TensorBoardLogger):
        # TensorBoard writes in a thread, which would end with a traceback at the first failure.
        events: Any = logger.experiment._get_file_writer().event_writer
        records = events._async_writer._writer
        records.write = _Tolerant(_whole(records.write, Path(events._file_name)), failures)
        records.flush = _Tolerant(records.flush, failures)
    for name in METHODS:
        setattr(logger, name, _Tolerant(getattr(logger, name), failures))


def keep_rows_whole(experiment: Any) -> None:
    """Keep the writer of a CSV file from losing rows when writing fails.

    When there is a new column, Lightning's writer truncates the file before it rewrites it.
    """
    file = Path(experiment.metrics_file_path)
    append = _whole(experiment.save, file)

    def save() -> None:
        columns = list(experiment.metrics_keys)
        try:
            if experiment.metrics and record_new_columns(experiment) and file.exists():
                _write_columns(file, experiment.metrics_keys)
        except OSError:
            experiment.metrics_keys = columns
            raise
        append()

    experiment.save = save


def _write_columns(file: Path, columns: list[str]) -> None:
    """Rewrite a CSV file with new columns; on failure, the file is unchanged."""
    with file.open(newline="", encoding="utf-8") as opened:
        rows = list(csv.DictReader(opened))
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, fieldnames=columns)
    writer.writeheader()
    writer.writerows(rows)
    write_text(file, text.getvalue())


class _Failures:
    """Reports the first failure of a logger."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.is_reported = False

    def report(self, error: OSError) -> None:
        if not self.is_reported:
            self.is_reported = True
            rank_zero_warn(
                f"{self.name} could not write: {error}. Training continues, and further failures "
                f"of this logger are not reported"
            )


class _Tolerant:
    """A function whose `OSError`s are reported instead of raised."""

    def __init__(self, function: Callable[..., Any], failures: _Failures) -> None:
        self.function = function
        self.failures = failures

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return self.function(*args, **kwargs)
        except OSError as error:
            self.failures.report(error)


def _whole(write: Callable[..., Any], file: Path) -> Callable[..., Any]:
    """Wrap `write`, which appends to a file, so that a failure leaves the file unchanged."""

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
