"""`diffmm sweep`: train a recipe with all combinations of some settings, one run at a time."""

import argparse
import shlex
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diffmm.checkpoint_folders import write_text
from diffmm.cli.options import add_data_option
from diffmm.recipes.catalog import find_recipe
from diffmm.recipes.errors import InputError, warn
from diffmm.recipes.importing import importing
from diffmm.recipes.settings import load, load_file, split_overrides
from diffmm.runs.directories import CONFIG_NAME, given_directory, named_run
from diffmm.runs.records import begin, note, read_record, varied_settings
from diffmm.runs.sweeps import Combination, combinations, is_finished, sweep_name

DESCRIPTION = """Train a recipe with every combination of the settings that have several values, one
run after the other, each in its own folder, and print a comparison at the end (see diffmm
compare). The same command again skips finished runs and resumes interrupted ones. A run that fails
is reported and the others continue; the exit code is then 1."""

EPILOG = """All other options are settings of the recipe, with values separated by commas. Commas
within brackets, braces or quotes do not separate values: --data.transform.scale
[0.2,1.0],[0.5,1.0] is two lists, and --data.source.pattern "'a,b.txt'" one string. Example:
diffmm sweep --config image/digits_tiny --vars.seed 0,1,2 --vars.attention softmax,diff_v1"""

STOPPED = (130, 143)
"""Exit codes of a run that was stopped by a signal."""


def run(verb: str, arguments: Sequence[str]) -> int:
    """Train all runs, or write a script that does."""
    parser = argparse.ArgumentParser(
        prog="diffmm sweep", allow_abbrev=False, description=DESCRIPTION, epilog=EPILOG
    )
    parser.add_argument(
        "-c",
        "--config",
        action="append",
        metavar="RECIPE",
        required=True,
        help="file or name of a recipe; later ones override earlier ones",
    )
    add_data_option(parser)
    parser.add_argument(
        "--name", help="name of the sweep, instead of the settings varied: runs/RECIPE/NAME/RUN"
    )
    parser.add_argument(
        "--sweep_dir", metavar="DIR", help="directory to use instead of runs/RECIPE/NAME"
    )
    parser.add_argument(
        "--slurm",
        metavar="FILE",
        type=Path,
        help="do not train, but write a script that trains each run as a task of a SLURM array "
        "(sbatch FILE; sbatch --gpus=1 --time=4:00:00 FILE)",
    )
    options, overrides = parser.parse_known_args(arguments)
    paths = [find_recipe(name) for name in options.config]
    pairs = split_overrides(overrides)
    runs = combinations(pairs)
    name = sweep_name(pairs) if options.name is None else options.name
    folder = (
        named_run(options.config[-1], name)
        if options.sweep_dir is None
        else given_directory("--sweep_dir", options.sweep_dir)
    )
    check_grid(folder, runs)
    values = [values_of(paths, one, options.data) for one in runs]
    check_runs(folder, runs, values)
    commands = [command(options.config, options.data, folder, one) for one in runs]
    if options.slurm is not None:
        return write_script(options.slurm, folder, commands, arguments, runs[0].varied)
    return sweep(folder, runs, commands, values)


def command(recipes: Sequence[str], data: str | None, folder: Path, one: Combination) -> list[str]:
    """Return the command that trains or resumes one run of a sweep."""
    configs = [part for recipe in recipes for part in ("--config", recipe)]
    own = [] if data is None else ["--data", data]
    place = ["--run_dir", str(folder / one.name), "--resume", "auto"]
    return ["fit", *configs, *own, *place, *one.arguments]


def sweep(
    folder: Path,
    runs: Sequence[Combination],
    commands: Sequence[Sequence[str]],
    values: Sequence[dict[str, Any]],
) -> int:
    """Train the unfinished runs, one after the other, and compare all runs.

    Args:
        folder: Folder of the sweep.
        runs: All runs.
        commands: The command that trains each run.
        values: The values of each run's config.

    Returns:
        0, 1 if a run failed, or the exit code of a run that was stopped by a signal.
    """
    begin(folder, runs[0].varied)
    failed = []
    for number, (one, arguments, its_values) in enumerate(
        zip(runs, commands, values, strict=True), start=1
    ):
        where = f"[{number}/{len(runs)}] {one.name}"
        if is_finished(folder / one.name, its_values, read_record(folder).get(one.name)):
            print(f"{where}: already finished", flush=True)
            continue
        print(where, flush=True)
        code = launch(arguments)
        if code in STOPPED:
            print(f"{where}: stopped; the same command resumes it")
            return code
        note(folder, one.name, code)
        if code:
            failed.append(one.name)
            warn(f"{where} failed with exit code {code}; the others continue")
    compare_runs(folder, runs)
    for name in failed:
        warn(f"failed: {name}")
    return 1 if failed else 0


def check_grid(folder: Path, runs: Sequence[Combination]) -> None:
    """Check that a folder holds no run, and no sweep over other settings.

    Raises:
        InputError: If it does; the message names the settings.
    """
    if (folder / CONFIG_NAME).is_file():
        raise InputError(f"{folder} holds a run: choose another name for the sweep")
    theirs, ours = varied_settings(folder), runs[0].varied
    if theirs is not None and set(theirs) != set(ours):
        raise InputError(
            f"{folder} is a sweep over {', '.join(theirs)}, not over {', '.join(ours)}: choose "
            f"another name"
        )


def check_runs(folder: Path, runs: Sequence[Combination], values: Sequence[dict[str, Any]]) -> None:
    """Check all runs before the first one is trained.

    Raises:
        InputError: If the values of a run have mistakes, or its folder holds a run with other
            values; the message names the run, unless it is true for all of them.
    """
    with importing():
        from diffmm.recipes.mistakes import find_mistakes
        from diffmm.recipes.trainer import silence_noise

    silence_noise()
    faults: dict[str, list[str]] = {}
    for one, its_values in zip(runs, values, strict=True):
        place = folder / one.name
        for mistake in find_mistakes({**its_values, "run_dir": str(place)}).mistakes:
            faults.setdefault(mistake, []).append(one.name)
        if (place / CONFIG_NAME).is_file() and load_file(place / CONFIG_NAME) != its_values:
            mistake = f"{place} holds a run with other settings: choose another name for the sweep"
            faults[mistake] = [one.name] * len(runs)
    if faults:
        raise InputError(
            *(
                mistake if len(names) == len(runs) else f"{names[0]}: {mistake}"
                for mistake, names in faults.items()
            )
        )


def values_of(recipes: Sequence[Path], one: Combination, data: str | None) -> dict[str, Any]:
    """Return the values of a run's config."""
    if data is None:
        return load(recipes, one.arguments)
    from diffmm.recipes.own_data import on_own_data

    return on_own_data(recipes, one.arguments, data, inputs_may_change=True).values


def launch(arguments: Sequence[str]) -> int:
    """Run `diffmm` in a new process in this process group, and return its exit code.

    A signal that stops this process is forwarded, and this process waits until the run has saved.
    """
    process = subprocess.Popen([sys.executable, "-m", "diffmm.cli", *arguments])
    try:
        code = process.wait()
    except BaseException as end:
        # Ctrl-C is also sent to the run itself.
        if not isinstance(end, KeyboardInterrupt):
            process.send_signal(signal.SIGTERM)
        process.wait()
        raise
    return 128 - code if code < 0 else code


def compare_runs(folder: Path, runs: Sequence[Combination]) -> None:
    """Print the table of the runs that exist."""
    from diffmm.cli.compare import compare

    there = [folder / one.name for one in runs if (folder / one.name / CONFIG_NAME).is_file()]
    if there:
        print()
        compare([str(run) for run in there])


def write_script(
    path: Path,
    folder: Path,
    commands: Sequence[Sequence[str]],
    arguments: Sequence[str],
    varied: Sequence[str],
) -> int:
    """Write the script of a SLURM array with one task per run.

    Raises:
        InputError: If the file exists, or its folder does not exist.
    """
    if path.exists():
        raise InputError(f"{path} exists already: choose another --slurm")
    if not path.parent.is_dir():
        raise InputError(f"there is no folder {path.parent} to write {path.name} to")
    begin(folder, varied)
    write_text(path, script(folder, commands, arguments))
    print(f"{path} trains {len(commands)} runs in {folder}: sbatch {shlex.quote(str(path))}")
    print(f"Afterwards: diffmm compare {shlex.quote(str(folder))}")
    return 0


def script(folder: Path, commands: Sequence[Sequence[str]], arguments: Sequence[str]) -> str:
    """Return the script of a SLURM array."""
    python = shlex.quote(sys.executable)
    written = " ".join(shlex.join(arguments).split())
    tasks = "".join(
        f"    {number}) exec srun {python} -m diffmm.cli {shlex.join(task)} ;;\n"
        for number, task in enumerate(commands)
    )
    return f"""#!/usr/bin/env bash
# Written by: diffmm sweep {written}
#
# A task that is stopped saves its state; requeued, it resumes from there.
#
#SBATCH --job-name=diffmm_sweep
#SBATCH --array=0-{len(commands) - 1}
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output={folder}/slurm_%A_%a.log
#SBATCH --signal=USR1@120
set -euo pipefail
cd {shlex.quote(str(Path.cwd()))}
case "$SLURM_ARRAY_TASK_ID" in
{tasks}    *) echo "this array has tasks 0 to {len(commands) - 1}" >&2; exit 2 ;;
esac
"""
