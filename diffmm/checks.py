"""Checks of values, and their error messages."""

import difflib
import json
import math
import numbers
from collections.abc import Iterable
from dataclasses import dataclass


class DataError(ValueError):
    """Data that cannot be used. The message is complete without a traceback."""


def check_choice(name: str, value: object, choices: Iterable[object]) -> None:
    """Check that `value` is one of `choices`.

    Raises:
        ValueError: If it is not; the message names the argument, the value, the choices and the
            nearest one.
    """
    choices = list(choices)
    if value in choices:
        return
    listed = ", ".join(map(repr, choices))
    raise ValueError(f"{name} must be one of {listed}, got {value!r}{did_you_mean(value, choices)}")


def check_count(name: str, value: object) -> None:
    """Check that a value is an integer of at least 1.

    Raises:
        ValueError: If it is not; the message names the argument and the value.
    """
    if not isinstance(value, numbers.Integral) or value < 1:
        raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")


_OF_SYSTEMS = frozenset(("__MACOSX", "Thumbs.db", "desktop.ini"))
"""Names of files and folders that systems add to those of users: a Mac's archives have a folder of
attributes, and Windows stores thumbnails and settings. They are treated as hidden."""


def is_hidden_name(name: str) -> bool:
    """Whether the name of a file or folder starts with a dot, or is added by a system, as
    `__MACOSX`."""
    return name.startswith(".") or name in _OF_SYSTEMS


def reason_of(error: BaseException) -> str:
    """The first line of an error's message; the name of its class if there is no message."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def shown_name(name: str) -> str:
    """The name of a class for a list or a table: in double quotes, as in JSON, if a separator, a
    line break or another character that cannot be seen would make it look like something else."""
    is_plain = name.isprintable() and name == name.strip() and not set(name) & set(',;"')
    return name if is_plain and name else json.dumps(name, ensure_ascii=not name.isprintable())


def article(noun: str) -> str:
    """A noun with its indefinite article."""
    return f"{'an' if noun[:1] in 'AEIOUaeiou' else 'a'} {noun}"


def counted(count: int, noun: str) -> str:
    """A number and a noun, in the singular or with an s: `1 sample`, `1,200 samples`."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def did_you_mean(value: object, choices: Iterable[object]) -> str:
    """A hint at the nearest choice, or an empty string."""
    near = difflib.get_close_matches(str(value), [str(choice) for choice in choices], n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


SMALLEST, LARGEST = 1e-45, 1e30
"""Smaller numbers are 0 in float32; products with larger ones may overflow float32."""

MOST = 10**15
"""Maximum of integers."""


def number_fault(value: object) -> str | None:
    """Why a number is invalid: it is infinite or NaN, or too large or too small for float32. `None`
    for any other value."""
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
    """Base class of all dataclasses of settings, which checks that numbers are finite and in range.

    Raises:
        ValueError: If a number is invalid; the message names the field and the value.
    """

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            for number in value if isinstance(value, list | tuple) else (value,):
                if fault := number_fault(number):
                    raise ValueError(f"{name} {fault}, got {value}")
