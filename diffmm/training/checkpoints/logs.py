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
from tensorboard.compat.proto.event_pb2 import Event, SessionLog

from diffmm.checkpoint_folders import write_text

LIST_NAME = "LOGS"
"""Beside the checkpoints: the folders of a run's CSV files, one for each time it was started."""


def begin(trainer: Trainer, directory: Path, step: int) -> None:
    """Remove from a run's CSV files, and hide in TensorBoard, what follows its first steps.

    Args:
        trainer: of the first process, about to train.
        directory: of the run's checkpoints.
        step: how many steps are kept.
    """
    listed = directory / LIST_NAME
    before = listed.read_text(encoding="utf-8").splitlines() if listed.exists() else []
    for folder in before:
        file = directory / folder / "metrics.csv"
        if file.exists():
            keep_rows(file, step)
    folders = list(before)
    for logger in trainer.loggers:
        if isinstance(logger, CSVLogger):
            folders.append(os.path.relpath(logger.log_dir, directory))
        elif isinstance(logger, TensorBoardLogger) and before:
            # As SummaryWriter does it for its `purge_step`.
            start = SessionLog(status=SessionLog.START)
            logger.experiment.file_writer.add_event(Event(step=step, session_log=start), step)
    if folders != before:
        directory.mkdir(parents=True, exist_ok=True)
        write_text(listed, "".join(f"{folder}\n" for folder in dict.fromkeys(folders)))


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
