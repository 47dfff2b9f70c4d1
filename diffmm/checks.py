"""The words in which the library refuses a value."""

import difflib
import math
from collections.abc import Iterable
from dataclasses import dataclass


class DataError(ValueError):
    """Data that cannot be trained on. The message says all that a user needs to know."""


def check_choice(name: str, value: object, choices: Iterable[object]) -> None:
    """Refuse a `value` that is none of `choices`.

    Raises:
        ValueError: naming the argument, the value, the choices and the nearest one.
    """
    choices = list(choices)
    if value in choices:
        return
    listed = ", ".join(map(repr, choices))
    raise ValueError(f"{name} must be one of {listed}, got {value!r}{did_you_mean(value, choices)}")


def did_you_mean(value: object, choices: Iterable[object]) -> str:
    """A hint at the nearest choice, empty where none is near."""
    near = difflib.get_close_matches(str(value), [str(choice) for choice in choices], n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


SMALLEST, LARGEST = 1e-45, 1e30
"""Smaller numbers are 0 in float32; larger ones leave no room in it for products with others."""

MOST = 10**15
"""No count is larger."""


def number_fault(value: object) -> str | None:
    """What is wrong with a number that no run can mean: one that is infinite or NaN, or would be
    that, or 0, in float32. `None` for any other value."""
    if isinstance(value, int):
        return None if abs(value) <= MOST else f"must be at most {MOST:,} in size"
    if not isinstance(value, float):
        return None
    if not math.isfinite(value):
        return "must be finite"
    if value and not SMALLEST <= abs(value) <= LARGEST:
        return f"must be 0, or between {SMALLEST:g} and {LARGEST:g} in size"
    return None


@dataclass(frozen=True)
class Settings:
    """The base of every dataclass of settings: none of its numbers may be one that no run can mean.

    Raises:
        ValueError: naming the field and the value.
    """

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            for number in value if isinstance(value, list | tuple) else (value,):
                if fault := number_fault(number):
                    raise ValueError(f"{name} {fault}, got {value}")
