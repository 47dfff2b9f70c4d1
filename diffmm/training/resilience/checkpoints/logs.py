"""Logs of a run that goes on: each step is in them once.

A killed run has logged steps that came after its checkpoint. They are made again, so what was
logged of them is taken back.
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
"""Beside the checkpoints: the folders of a run's CSV files, one for each time it was started.
Files outside the run are nobody's to cut back."""


def begin(trainer: Trainer, directory: Path, step: int) -> None:
    """Remove from a run's CSV files, and hide in TensorBoard, what follows its first steps.

    Args:
        trainer: of the first process, about to train.
        directory: of the run's checkpoints.
        step: how many steps are kept.
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
            # As SummaryWriter does it for its `purge_step`.
            start = SessionLog(status=SessionLog.START)
            logger.experiment.file_writer.add_event(Event(step=step, session_log=start), step)
    if folders != before:
        directory.mkdir(parents=True, exist_ok=True)
        write_text(listed, "".join(f"{folder}\n" for folder in dict.fromkeys(folders)))


def read_list(listed: Path) -> list[str]:
    """The folders that a list of logs names, as far as they are in the run."""
    try:
        lines = listed.read_text(encoding="utf-8").splitlines() if listed.is_file() else []
    except (OSError, UnicodeDecodeError) as error:
        rank_zero_warn(f"{listed} cannot be read, and no log of before is cut back: {error}")
        return []
    outside = [folder for folder in lines if not is_in_run(listed.parent, folder)]
    if outside:
        rank_zero_warn(f"{listed} names folders outside the run, which are left alone: {outside}")
    return [folder for folder in lines if folder not in outside]


def is_in_run(directory: Path, folder: str) -> bool:
    """Whether a folder, told from a run's `checkpoints`, is in the run, links followed."""
    try:
        file = (directory / folder / "metrics.csv").resolve()
        return file.is_relative_to(directory.parent.resolve())
    except (OSError, ValueError, RuntimeError):
        return False


def keep_rows(file: Path, step: int) -> None:
    """Leave the rows of the first `step` steps, which count from 0, in a CSV file."""
    with file.open(newline="", encoding="utf-8") as opened:
        reader = csv.DictReader(opened)
        rows = list(reader)
    # The last line may be cut off.
    kept = [row for row in rows if (row.get("step") or "").isdigit() and int(row["step"]) < step]
    if len(kept) == len(rows):
        return
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, fieldnames=reader.fieldnames or (), extrasaction="ignore")
    writer.writeheader()
    writer.writerows(kept)
    write_text(file, text.getvalue())


def flush(trainer: Trainer) -> None:
    """Write what the loggers hold to their files."""
    for logger in trainer.loggers:
        logger.save()
