"""Run directories: `runs/<recipe>/<time or name>`, one a run.

A run directory holds `config.yaml` (the recipe with all overrides, references left as written, so
that a secret from the environment is not in it), `checkpoints/` and what the loggers write.
"""

import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from diffmm.cli.errors import BadInput
from diffmm.cli.settings import load_file

CONFIG_NAME = "config.yaml"
CHECKPOINTS_NAME = "checkpoints"
RUNS = Path("runs")


def run_name(recipe: str) -> str:
    """The folder of a recipe's runs below `runs`: its own name, or that of its file."""
    path = Path(recipe)
    if path.suffix not in (".yaml", ".yml"):
        return recipe
    # The saved config of a run stands in runs/<recipe>/<run>/.
    is_saved = path.name == CONFIG_NAME
    return path.resolve().parent.parent.name if is_saved else path.stem


def new_run(recipe: str, name: str | None, directory: str | None) -> Path:
    """The directory of a new run; nothing is made yet.

    Args:
        recipe: as on the command line.
        name: in place of the time.
        directory: in place of `runs/<recipe>/<name>`.

    Raises:
        BadInput: if there is a run already.
    """
    if directory is not None:
        run = Path(directory)
    elif name is not None:
        run = RUNS / run_name(recipe) / name
    else:
        start = run = RUNS / run_name(recipe) / time.strftime("%Y-%m-%d_%H-%M-%S")
        number = 1
        while run.exists():
            number += 1
            run = start.with_name(f"{start.name}_{number}")
    if (run / CONFIG_NAME).exists():
        raise BadInput(
            f"{run} holds a run already: choose another name, or go on with it (--resume {run})"
        )
    return run


def find_run(run: str) -> tuple[Path, Path]:
    """The saved config of a run and its latest checkpoint.

    Raises:
        BadInput: if it is no run directory, or has no checkpoint yet.
    """
    directory = Path(run)
    if not (directory / CONFIG_NAME).is_file():
        raise BadInput(f"{run} is no run directory: there is no {directory / CONFIG_NAME}")
    checkpoint = latest_checkpoint(directory)
    if checkpoint is None:
        raise BadInput(f"{run} has no checkpoint to go on from in {directory / CHECKPOINTS_NAME}")
    return directory / CONFIG_NAME, checkpoint


def latest_checkpoint(run: Path) -> Path | None:
    """The checkpoint of a run that was written last."""
    found = (run / CHECKPOINTS_NAME).glob("*.ckpt")
    return max(found, key=lambda path: path.stat().st_mtime_ns, default=None)


def same_run(recipe: str, values: dict[str, Any]) -> Path | None:
    """The latest run of a recipe that has just these values, and a checkpoint."""
    runs = [path.parent for path in (RUNS / run_name(recipe)).glob(f"*/{CONFIG_NAME}")]
    started = [run for run in runs if latest_checkpoint(run) is not None]
    same = [run for run in started if load_file(run / CONFIG_NAME) == values]
    return max(same, key=lambda run: (run / CONFIG_NAME).stat().st_mtime_ns, default=None)


def save_config(run: Path, header: str, values: dict[str, Any]) -> None:
    """Write a run's `config.yaml`, whole or not at all."""
    run.mkdir(parents=True, exist_ok=True)
    unfinished = run / f".{CONFIG_NAME}"
    text = yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=100)
    unfinished.write_text(f"{header}{text}", encoding="utf-8")
    unfinished.replace(run / CONFIG_NAME)


@contextmanager
def nothing_half_written(run: Path) -> Iterator[None]:
    """If the block refuses its input, remove the run directory and the folders made for it."""
    missing = [path for path in (run, *run.parents) if not path.exists()]
    try:
        yield
    except BadInput:
        for path in missing:
            if path == run:
                shutil.rmtree(path, ignore_errors=True)
            elif path.is_dir() and not any(path.iterdir()):
                path.rmdir()
        raise
