"""`diffmm replay`: repeat the step at which a run stopped, and locate its non-finite numbers."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffmm.checkpoint_folders import DIRECTORY_NAME
from diffmm.recipes.errors import InputError, refusing
from diffmm.recipes.importing import importing
from diffmm.recipes.settings import load, merge
from diffmm.recipes.trust import add_trust_option
from diffmm.runs.directories import find_run

if TYPE_CHECKING:
    from diffmm.training.resilience.replay import MicroBatch

ALONE = {"trainer": {"devices": 1, "num_nodes": 1, "strategy": "auto", "logger": False}}
"""Trainer settings for replaying a step in one process, without logs."""

NUM_SHOWN = 5


def run(verb: str, arguments: Sequence[str]) -> int:
    """Repeat the step, and print what is not finite in it."""
    parser = argparse.ArgumentParser(
        prog=f"diffmm {verb}",
        description="Repeat, in one process, the step at which a run stopped because the loss or a "
        "gradient was not finite, and report the samples, the module and the gradients at fault.",
    )
    parser.add_argument("run", metavar="RUN", help="the run's directory")
    parser.add_argument(
        "--batch", metavar="FILE", help="a file bad_batch_step_*.pt, instead of those in RUN"
    )
    parser.add_argument(
        "--weights",
        metavar="CKPT",
        help="weights to use instead of the checkpoint that the run stopped with",
    )
    add_trust_option(parser)
    options = parser.parse_args(arguments)
    files = [Path(options.batch)] if options.batch else batch_files(Path(options.run))
    for file in files:
        replay_file(Path(options.run), file, options.weights, trust=options.trust)
    return 0


def batch_files(run: Path) -> list[Path]:
    """Return the saved batches of the last step at which a run stopped, one file per process at
    fault.

    Raises:
        InputError: If there are none.
    """
    from diffmm.training.resilience.bad_steps import BATCH_NAME

    files = sorted(run.glob(f"{BATCH_NAME}_*.pt"))
    if not files:
        raise InputError(
            f"{run} has no {BATCH_NAME}_*.pt: it did not stop because of non-finite numbers"
        )
    step = files[-1].name.removeprefix(f"{BATCH_NAME}_").split("_")[0]
    return [file for file in files if file.name.startswith(f"{BATCH_NAME}_{step}_")]


def replay_file(run: Path, file: Path, weights: str | None, *, trust: bool) -> None:
    """Repeat the step of one process, and print what is not finite in it.

    Raises:
        InputError: If the file is not a saved batch, or the weights do not fit.
    """
    with importing():
        from diffmm.models.weights import load_weights
        from diffmm.recipes.trainer import RecipeCLI
        from diffmm.training.resilience.replay import load_batches, replay

    config, newest = find_run(str(run))
    with refusing():
        content = load_batches(file)
    own = run / DIRECTORY_NAME / f"step_{content['step']:08d}"
    chosen = weights or (own if own.is_dir() else newest)
    if chosen is None:
        raise InputError(f"{run} has no checkpoint: give --weights CKPT")
    cli = RecipeCLI(merge(load([config]), {**ALONE, "run_dir": str(run)}), trust=trust)
    task: Any = cli.model
    with refusing():
        load_weights(task.model, chosen)
    print(f"{file}, with the weights of {chosen}")
    for number, found in enumerate(replay(cli.trainer, task, content)):
        print(f"  micro-batch {number}: {message_of(found)}")


def message_of(found: "MicroBatch") -> str:
    """Format the findings of a micro-batch as one line."""
    parts = [f"loss {found.loss:.6g}"]
    if found.fields:
        parts.append(f"not finite in the batch itself: {listed(found.fields)}")
    if found.module is not None:
        parts.append(f"first in the output of {found.module}")
    if found.samples:
        parts.append(f"alone, of the samples {listed(found.samples)}")
    if found.gradients:
        parts.append(f"in the gradients of {listed(found.gradients)}")
    return "; ".join(parts) if len(parts) > 1 else f"{parts[0]}; everything is finite"


def listed(items: Sequence[object]) -> str:
    """Format the first items of a sequence, and the number of the others."""
    more = f" and {len(items) - NUM_SHOWN} more" if len(items) > NUM_SHOWN else ""
    return ", ".join(map(str, items[:NUM_SHOWN])) + more
