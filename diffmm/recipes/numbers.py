"""Checks for invalid numbers in a recipe."""

from typing import Any, TypeGuard

from diffmm.checks import number_fault
from diffmm.recipes.errors import message_of
from diffmm.recipes.references import UNKNOWN, walk, without

Place = tuple[str | int, ...]
"""Path of a setting in a recipe."""

LEAST = {
    "num_nodes": 1,
    "fast_dev_run": 0,
    "min_epochs": 0,
    "min_steps": 0,
    "accumulate_grad_batches": 1,
    "check_val_every_n_epoch": 1,
    "reload_dataloaders_every_n_epochs": 0,
    "log_every_n_steps": 0,
    "num_sanity_val_steps": -1,
    "gradient_clip_val": 0,
}
"""Numeric settings of the trainer, and their minimum values."""

ENDLESS = ("max_steps", "max_epochs", "devices")
"""Settings that are either -1 (unlimited, or all) or at least 1."""

LEAST_OF_BATCHES = {
    "limit_train_batches": 0,
    "limit_val_batches": 0,
    "limit_test_batches": 0,
    "limit_predict_batches": 0,
    "overfit_batches": 0,
    "val_check_interval": 1,
}
"""Settings that are a number of batches, with this minimum, or a fraction of them."""

TIMES = ("max_time", "val_check_interval")

LARGEST_SEED = 2**32 - 1


def wrong_numbers(
    values: dict[str, Any], resolved: dict[str, Any]
) -> tuple[list[str], dict[str, Any]]:
    """Return one line per invalid number, and the values with `UNKNOWN` instead of it.

    Args:
        values: Values of a recipe.
        resolved: The same values, with references resolved.
    """
    written, anywhere, out_of_range = faults(values), faults(resolved), trainer_faults(resolved)
    # A value that several settings refer to is reported once, where it is set.
    found = {**(written or anywhere), **out_of_range}
    mistakes = [f"{'.'.join(map(str, path))} {fault}" for path, fault in found.items()]
    return mistakes, without(resolved, anywhere.keys() | out_of_range.keys(), instead=UNKNOWN)


def faults(values: dict[str, Any]) -> dict[Place, str]:
    """Return the faults of all numbers in a recipe, by path."""
    return {
        path: f"{fault}, got {value}"
        for path, value in walk(values)
        if (fault := number_fault(value))
    }


def trainer_faults(values: dict[str, Any]) -> dict[Place, str]:
    """Return the faults of the trainer's numbers and times and of the seed, by path."""
    trainer = values.get("trainer")
    found: dict[Place, str] = {
        ("trainer", name): f"must be {fault}, got {value}"
        for name, value in (trainer.items() if isinstance(trainer, dict) else ())
        if not number_fault(value) and (fault := trainer_fault(name, value))
    }
    seed = values.get("seed_everything")
    if is_number(seed) and not 0 <= seed <= LARGEST_SEED:
        found["seed_everything",] = f"must be in [0, {LARGEST_SEED}], got {seed}"
    return found


def trainer_fault(name: str, value: Any) -> str | None:
    """Return what a setting of the trainer must be if it is an invalid number or time."""
    if not is_number(value):
        return time_fault(value) if name in TIMES and isinstance(value, str | dict) else None
    if name in LEAST and value < LEAST[name]:
        return f"at least {LEAST[name]}"
    if name in ENDLESS and value != -1 and value < 1:
        return "at least 1, or -1"
    if name not in LEAST_OF_BATCHES:
        return None
    least = LEAST_OF_BATCHES[name]
    is_share = isinstance(value, float) and (0.0 < value <= 1.0 or value == least == 0.0)
    if is_share or (isinstance(value, int) and value >= least):
        return None
    return f"a number of batches of at least {least}, or a fraction of them up to 1.0"


def time_fault(value: str | dict[str, int]) -> str | None:
    """Return what a duration must be if it is invalid."""
    from lightning.pytorch.callbacks import Timer
    from lightning.pytorch.utilities.exceptions import MisconfigurationException

    try:
        seconds = Timer(value).time_remaining()
    except (MisconfigurationException, TypeError, OverflowError) as error:
        return f"a time, such as '00:12:00:00' for twelve hours ({message_of(error)})"
    return None if seconds is not None and seconds > 0.0 else "longer than 0 seconds"


def is_number(value: object) -> TypeGuard[int | float]:
    """Whether a value is a number but not a boolean."""
    return isinstance(value, int | float) and not isinstance(value, bool)
