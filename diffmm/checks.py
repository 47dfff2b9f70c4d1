"""The words in which the library refuses a value."""

import difflib
from collections.abc import Iterable


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
