"""Logs of a resumed run, which contain each step once.

A killed run may have logged steps after its last checkpoint. These steps are repeated on resuming,
so their earlier log entries are removed.
"""

import csv
import io
import os
from pathlib import Path

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_warn
from tensorboard.compat.proto.event_pb2 import Event, SessionLog

from diffmm.checkpoint_folders import write_text

LIST_NAME = "LOGS"
"""File next to the checkpoints that lists the folders of the run's CSV logs, one per start. Files
outside the run are not modified."""


def begin(trainer: Trainer, directory: Path, step: int) -> None:
    """Remove the entries after the first `step` steps from a run's CSV files, and hide them in
    TensorBoard.

    Args:
        trainer: Trainer of the first process, before the first batch.
        directory: Folder of the run's checkpoints.
        step: Number of steps to keep.
    """
    listed = directory / LIST_NAME
    before = read_list(listed)
    for folder in before:
        file = directory / folder / "metrics.csv"
        if file.is_file():
            keep_rows(file, step)
    folders = list(before)
    for logger in trainer.loggers:
        if isinstance(logger, CSVLogger):
            folder = os.path.relpath(logger.log_dir, directory)
            folders += [folder] if is_in_run(directory, folder) else []
        elif isinstance(logger, TensorBoardLogger) and before:
            # As SummaryWriter does for its `purge_step`.
            start = SessionLog(status=SessionLog.START)
            logger.experiment.file_writer.add_event(Event(step=step, session_log=start), step)
    if folders != before:
        directory.mkdir(parents=True, exist_ok=True)
        write_text(listed, "".join(f"{folder}\n" for folder in dict.fromkeys(folders)))


def read_list(listed: Path) -> list[str]:
    """Return the log folders listed in a file, without those outside the run."""
    try:
        lines = listed.read_text(encoding="utf-8").splitlines() if listed.is_file() else []
    except (OSError, UnicodeDecodeError) as error:
        rank_zero_warn(f"{listed} cannot be read, so earlier logs are not trimmed: {error}")
        return []
    outside = [folder for folder in lines if not is_in_run(listed.parent, folder)]
    if outside:
        rank_zero_warn(f"{listed} names folders outside the run, which are skipped: {outside}")
    return [folder for folder in lines if folder not in outside]


def is_in_run(directory: Path, folder: str) -> bool:
    """Whether a folder, given relative to a run's `checkpoints`, is inside the run after resolving
    links."""
    try:
        file = (directory / folder / "metrics.csv").resolve()
        return file.is_relative_to(directory.parent.resolve())
    except (OSError, ValueError, RuntimeError):
        return False


def keep_rows(file: Path, step: int) -> None:
    """Keep only the rows of the first `step` steps, counted from 0, in a CSV file."""
    with file.open(newline="", encoding="utf-8") as opened:
        reader = csv.DictReader(opened)
        rows = list(reader)
    # The last line may be incomplete.
    kept = [row for row in rows if (row.get("step") or "").isdigit() and int(row["step"]) < step]
    if len(kept) == len(rows):
        return
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, fieldnames=reader.fieldnames or (), extrasaction="ignore")
    writer.writeheader()
    writer.writerows(kept)
    write_text(file, text.getvalue())


def flush(trainer: Trainer) -> None:
    """Write the buffered entries of all loggers to their files."""
    for logger in trainer.loggers:
        logger.save()
