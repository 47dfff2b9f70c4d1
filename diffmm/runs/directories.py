"""Run directories: `runs/<recipe>/<time or name>`, one per run.

A run directory holds `config.yaml` (the recipe with all overrides, references left as written, so
that a secret from the environment is not in it), `checkpoints/` and what the loggers write.
"""

import os
import time
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml

from diffmm.checkpoint_folders import (
    DIRECTORY_NAME,
    RUN_CONFIG_NAME,
    STATE_NAME,
    best,
    find_state,
    write_text,
)
from diffmm.recipes.errors import InputError, refusing, warn
from diffmm.recipes.imports import import_modules
from diffmm.recipes.references import resolve
from diffmm.recipes.settings import load_file

CONFIG_NAME = RUN_CONFIG_NAME
RUNS = Path("runs")

DEPTH = 3
"""Maximum number of folders from a checkpoint's file up to the run's config."""


def run_name(recipe: str) -> str:
    """The folder of a recipe's runs below `runs`: the name of the recipe or of its file."""
    path = Path(recipe)
    if path.suffix not in (".yaml", ".yml"):
        return recipe
    # The saved config of a run is in runs/<recipe>/<run>/.
    is_saved = path.name == CONFIG_NAME
    return path.resolve().parent.parent.name if is_saved else path.stem


def named_run(recipe: str, name: str) -> Path:
    """The directory of a run, or of a sweep, with this name: `runs/<recipe>/<name>`.

    Raises:
        InputError: If the name is empty, or its directory would be outside of `runs/<recipe>`.
    """
    folder = RUNS / run_name(recipe)
    parts = name.split("/")
    if Path(name).is_absolute() or any(part.strip() in ("", ".", "..") for part in parts):
        raise InputError(
            f"--name must be the name of a folder in {folder}, such as first or first/second, got "
            f"{name!r}; for another directory, give --run_dir (diffmm sweep: --sweep_dir)"
        )
    return folder / name


def given_directory(option: str, directory: str) -> Path:
    """The directory that an option gives.

    Raises:
        InputError: If it is empty.
    """
    if not directory.strip():
        raise InputError(f"{option} must be a directory, got {directory!r}")
    return Path(directory)


def new_run(recipe: str, name: str | None, directory: str | None) -> Path:
    """The directory of a new run, which is not created yet.

    Args:
        recipe: The recipe as given on the command line.
        name: Name of the run, instead of the time.
        directory: Directory of the run, instead of `runs/<recipe>/<name>`.

    Raises:
        InputError: If the directory already holds a run, its name is invalid, or several processes
            would each choose their own name.
    """
    if name is None and directory is None and is_one_of_several():
        raise InputError(
            "a run whose processes are started by torchrun or srun needs a common name: "
            "--name NAME (with --resume auto, the same command resumes it)"
        )
    if directory is not None:
        run = given_directory("--run_dir", directory)
    elif name is not None:
        run = named_run(recipe, name)
    else:
        start = run = RUNS / run_name(recipe) / time.strftime("%Y-%m-%d_%H-%M-%S")
        number = 1
        while run.exists():
            number += 1
            run = start.with_name(f"{start.name}_{number}")
    if (run / CONFIG_NAME).exists():
        raise InputError(
            f"{run} already holds a run: choose another name, or resume it (--resume {run})"
        )
    return run


def is_one_of_several() -> bool:
    """Whether this process is one of several started by torchrun, srun or the like."""
    counts = (os.environ.get(name, "1") for name in ("WORLD_SIZE", "SLURM_STEP_NUM_TASKS"))
    return any(int(count) > 1 for count in counts if count.isdecimal())


def find_run(run: str) -> tuple[Path, Path | None]:
    """The saved config of a run, and the state of its newest complete checkpoint, if any.

    Raises:
        InputError: If it is not a run directory, or none of its checkpoints is complete.
    """
    directory = Path(run)
    config = saved_config(directory)
    with refusing():
        state = find_state(directory, warn=warn)
    return config, None if state == directory else state


def saved_config(run: Path) -> Path:
    """The saved config of a run.

    Raises:
        InputError: If it is not a run directory.
    """
    config = run / CONFIG_NAME
    if not config.is_file():
        raise InputError(f"{run} is not a run directory: there is no {config}{near_run(run)}")
    return config


def best_state(run: Path) -> Path:
    """The state of a run's best checkpoint, by the metric that its recipe monitors.

    Raises:
        InputError: If it is not a run directory, its recipe monitors no metric, or no checkpoint
            has been measured.
    """
    trainer = resolve({**load_file(saved_config(run)), "run_dir": str(run)})[0].get("trainer")
    for callback in (trainer.get("callbacks") if isinstance(trainer, dict) else None) or []:
        arguments = (callback.get("init_args") if isinstance(callback, dict) else None) or {}
        monitor = arguments.get("monitor")
        if monitor is None or not str(callback.get("class_path")).endswith("Checkpoints"):
            continue
        found = best(run / DIRECTORY_NAME, monitor, arguments.get("mode", "min"))
        if not found:
            raise InputError(f"{run} has no checkpoint with a value of {monitor}")
        return found[0].path / STATE_NAME
    raise InputError(f"the recipe of {run} monitors no metric, so that no checkpoint is the best")


def config_around(path: Path) -> Path | None:
    """The saved config of the run that a run, a checkpoint or another file of it belongs to; `None`
    if there is none."""
    whole = path.absolute()
    places = (whole, *list(whole.parents)[:DEPTH])
    return next((p / CONFIG_NAME for p in places if (p / CONFIG_NAME).is_file()), None)


def import_modules_of_run(path: Path) -> None:
    """Import the modules that the recipe of a run imports, given the run or a file of it.

    Raises:
        InputError: If one cannot be imported.
    """
    config = config_around(path)
    if config is not None and (mistakes := import_modules(load_file(config), trust=True)):
        raise InputError(*mistakes)


def near_run(path: Path) -> str:
    """A hint at the run that a path is in, at the first of those in it, or at the one whose name is
    nearest to a path that does not exist; may be empty."""
    for folder in path.parents:
        if path.exists() and (folder / CONFIG_NAME).is_file():
            return f"; it is in the run '{folder}'"
    for below in ("*", "*/*", "*/*/*"):
        if runs := sorted(config.parent for config in path.glob(f"{below}/{CONFIG_NAME}")):
            return (
                f"; in it is '{runs[0]}'"
                if len(runs) == 1
                else (f"; in it are {len(runs):,} runs, such as '{runs[0]}'")
            )
    if path.exists() or not path.parent.is_dir():
        return ""
    names = [config.parent.name for config in path.parent.glob(f"*/{CONFIG_NAME}")]
    near = get_close_matches(path.name, names, n=1)
    return f"; did you mean '{path.parent / near[0]}'?" if near else ""


def same_run(
    recipe: str, values: dict[str, Any], name: str | None, directory: str | None
) -> Path | None:
    """The run of a recipe with exactly these values: the named one, or the latest.

    Raises:
        InputError: If the named one has other values, or the name is invalid.
    """
    if name is not None or directory is not None:
        named = (
            given_directory("--run_dir", directory)
            if directory is not None
            else named_run(recipe, str(name))
        )
        if not (named / CONFIG_NAME).is_file():
            return None
        if load_file(named / CONFIG_NAME) != values:
            raise InputError(
                f"{named} holds a run with other settings: choose another name, or resume it "
                f"as it is (--resume {named})"
            )
        return named
    same = []
    for path in sorted((RUNS / run_name(recipe)).glob(f"*/{CONFIG_NAME}")):
        try:
            if load_file(path) == values:
                same.append(path.parent)
        except InputError as error:
            warn(f"{path.parent} is skipped: {error}")
    return max(same, key=lambda run: (run / CONFIG_NAME).stat().st_mtime_ns, default=None)


def config_text(header: str, values: dict[str, Any]) -> str:
    """The text of a run's config: the header comment and the values."""
    text = yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=100)
    return f"{header}{text}"


def save_config(run: Path, header: str, values: dict[str, Any]) -> None:
    """Write a run's `config.yaml` atomically."""
    run.mkdir(parents=True, exist_ok=True)
    write_text(run / CONFIG_NAME, config_text(header, values))
