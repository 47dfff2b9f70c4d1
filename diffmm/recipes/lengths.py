"""Runs that are extended beyond their planned length: `diffmm fit --resume RUN --trainer.max_steps
N`.

With `--trainer.max_epochs N`, a length in epochs replaces one in steps.

The learning-rate schedule is unchanged, and the learning rate stays at its final value, unless the
schedule's length (`total_steps`) is also given.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from diffmm.checkpoint_folders import read_manifest
from diffmm.recipes.errors import InputError
from diffmm.recipes.references import resolve, used_variables, walk
from diffmm.recipes.settings import load, split_overrides

SCHEDULE = "model.init_args.schedule.total_steps"
STEPS, EPOCHS = "trainer.max_steps", "trainer.max_epochs"
LENGTHS = (STEPS, EPOCHS, "trainer.max_time", SCHEDULE)
"""Settings that may be changed when a run is resumed, and the settings that these refer to."""


class Longer(NamedTuple):
    """A resumed run with another length."""

    values: dict[str, Any]
    """Values of its recipe, unresolved, with the new length."""
    schedule: dict[str, Any] | None
    """Previous settings of the learning-rate schedule."""


def lengthened(config: Path, overrides: Sequence[str]) -> Longer | None:
    """Return the run with the length changed by `overrides`; `None` if they change nothing.

    Raises:
        InputError: If they change any other setting.
    """
    before, after = load([config]), load([config], overrides)
    given = [key for key, _ in split_overrides(overrides)]
    if EPOCHS in given and STEPS not in given and (after["trainer"] or {}).get("max_steps"):
        # The number of steps would end the run before the epochs.
        after["trainer"]["max_steps"] = -1
    old, new = (leaves(values) for values in (before, after))
    changed = [name for name in {**old, **new} if old.get(name) != new.get(name)]
    if others := [name for name in changed if name not in LENGTHS]:
        raise InputError(
            f"--resume can only change the length of a run ({', '.join(LENGTHS)}), not "
            f"{', '.join(others)}. A new run from its weights is `diffmm finetune`"
        )
    if not changed:
        return None
    # Remove variables that are no longer used, because unused variables are an error.
    left = set(used_variables(before)) - set(used_variables(after))
    if isinstance(after.get("vars"), dict):
        after["vars"] = {name: v for name, v in after["vars"].items() if name not in left}
    model = resolve(before)[0].get("model") or {}
    return Longer(after, (model.get("init_args") or {}).get("schedule"))


def leaves(values: dict[str, Any]) -> dict[str, Any]:
    """The resolved settings of a recipe by their dotted names, without its variables."""
    return {
        ".".join(map(str, path)): value
        for path, value in walk(resolve(values)[0])
        if path[0] != "vars" and not (isinstance(value, dict | list) and value)
    }


def step_of(checkpoint: Path | None) -> int:
    """Return the number of optimizer steps of a checkpoint.

    Raises:
        InputError: If the checkpoint cannot be read.
    """
    if checkpoint is None:
        return 0
    manifest = read_manifest(checkpoint.parent)
    if manifest is not None:
        return manifest["step"]
    from diffmm.models.checkpoint_files import read_checkpoint

    try:
        # A checkpoint of Lightning's own callback.
        return read_checkpoint(checkpoint, weights=False)["global_step"]
    except Exception as error:
        raise InputError(f"{checkpoint} is not a checkpoint of a run: {error}") from error


def epoch_of(checkpoint: Path | None) -> int:
    """The number of completed epochs of a checkpoint; 0 if it is not known."""
    manifest = None if checkpoint is None else read_manifest(checkpoint.parent)
    return int((manifest or {}).get("epoch", 0))


def cut_schedule(task: Any, max_steps: Any) -> str | None:
    """A warning that a run of `max_steps` ends in the middle of its task's schedule, or None."""
    schedule = getattr(task, "schedule_config", None)
    if schedule is None or not isinstance(max_steps, int) or not max_steps > 0:
        return None
    if max_steps >= schedule.total_steps or schedule.kind == "constant":
        return None
    return (
        f"trainer.max_steps {max_steps} ends the run before its schedule of "
        f"{schedule.total_steps} steps: for a shorter schedule, set --vars.steps (or "
        f"--model.schedule.total_steps) instead"
    )


def outlook(
    task: Any, trainer: Any, schedule: dict[str, Any] | None, step: int, *, epoch: int = 0
) -> str:
    """Describe the rest of a run, from step `step` on, in one line.

    Args:
        task: Task with the current learning rate and schedule.
        trainer: Trainer with the new length.
        schedule: Previous settings of the schedule.
        step: Number of completed steps.
        epoch: Number of completed epochs.

    Raises:
        InputError: If no step is left, or the learning rate would be 0 in all remaining steps.
    """
    end = trainer.max_steps
    if 0 <= end <= step:
        raise InputError(
            f"the run has already made {step} steps: trainer.max_steps must be larger, got {end}"
        )
    last_epoch = trainer.max_epochs
    if last_epoch is not None and 0 <= last_epoch <= epoch:
        raise InputError(
            f"the run has already completed epoch {last_epoch}: trainer.max_epochs must be larger"
        )
    steps = f"resumes from step {step}" + (f" to step {end}" if end > 0 else "")
    if end < 0 and last_epoch is not None and last_epoch > 0:
        steps += f" to the end of epoch {last_epoch}"
    new = getattr(task, "schedule_config", None)
    if new is None:
        return steps
    peak, old = task.optimizer_config.learning_rate, type(new)(**(schedule or {}))
    final = (end if end > 0 else max(step + 1, new.total_steps)) - 1
    rate, last = peak * new.factor(step), peak * new.factor(final)
    if rate == last == 0.0:
        raise InputError(
            f"the learning rate reaches 0 at step {new.total_steps}, and nothing would be "
            f"learned after it: also give a longer schedule (--model.schedule.total_steps "
            f"{final + 1})"
        )
    is_same = old.total_steps == new.total_steps
    where = f"at step {new.total_steps}{', as before' if is_same else f', not {old.total_steps}'}"
    then = f"stays at {rate:.3g}" if rate == last else f"is {rate:.3g} now and {last:.3g} at last"
    return f"{steps}; its schedule ends {where}: the learning rate {then}"
