"""Sweeps: runs of a recipe with all combinations of some settings, and which are finished."""

import itertools
import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffmm.recipes.errors import InputError
from diffmm.recipes.lengths import step_of
from diffmm.recipes.references import resolve
from diffmm.recipes.settings import load_file
from diffmm.runs.directories import CONFIG_NAME, find_run
from diffmm.runs.summaries import short_settings

LONGEST_NAME = 120

CLOSING = {"[": "]", "{": "}", "(": ")"}


@dataclass(frozen=True)
class Combination:
    """One run of a sweep.

    Attributes:
        name: Name of its folder, such as `seed=0,attention=softmax`.
        settings: Keys and values as written, in the order of the command line.
        varied: Keys of the settings that the sweep varies.
    """

    name: str
    settings: list[tuple[str, str]]
    varied: tuple[str, ...]

    @property
    def arguments(self) -> list[str]:
        """The settings as `diffmm fit` takes them."""
        return [f"--{key}={text}" for key, text in self.settings]


def split_values(text: str) -> list[str]:
    """Split values at commas outside of brackets, braces and quotes.

    `0,1,2` gives three values, `[0.2,1.0],[0.5,1.0]` two lists, `"a,b"` one text with a comma, and
    `[0.2,1.0]` one list, with which nothing is varied.
    """
    values, start, closing = [], 0, ""
    quote = ""
    for place, letter in enumerate(text):
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "\"'" and not text[start:place].strip():
            quote = letter
        elif letter in CLOSING:
            closing += CLOSING[letter]
        elif closing and letter == closing[-1]:
            closing = closing[:-1]
        elif letter == "," and not closing:
            values.append(text[start:place].strip())
            start = place + 1
    return [*values, text[start:].strip()]


def combinations(pairs: Sequence[tuple[str, str]]) -> list[Combination]:
    """Return all combinations of the values; the last setting varies fastest.

    Args:
        pairs: Keys and values as written, with several values separated by commas.

    Raises:
        InputError: If no setting has several values, or a value is missing or repeated.
    """
    choices = [(key, split_values(text)) for key, text in pairs]
    varied = [key for key, values in choices if len(values) > 1]
    if not varied:
        raise InputError(
            "diffmm sweep needs a setting with several values, separated by commas: "
            "--vars.seed 0,1,2 (for one run: diffmm fit)"
        )
    for key, values in choices:
        for value in values:
            if len(values) > 1 and not value:
                raise InputError(
                    f"--{key} {','.join(values)} has an empty value: write '' for an empty text"
                )
            if values.count(value) > 1:
                raise InputError(f"--{key} has the value {value} twice")
    if len({key for key, _ in choices}) < len(choices):
        raise InputError("a setting is given twice: give its values once, separated by commas")
    found: dict[str, Combination] = {}
    for chosen in itertools.product(*(values for _, values in choices)):
        settings = [(key, value) for (key, _), value in zip(choices, chosen, strict=True)]
        name = _name([(key, value) for key, value in settings if key in varied])
        while name in found:
            name += "_"
        found[name] = Combination(name, settings, tuple(varied))
    return list(found.values())


def sweep_name(pairs: Sequence[tuple[str, str]]) -> str:
    """The default name of a sweep, from the settings that it varies: `sweep_seed_attention`."""
    varied = [key for key, text in pairs if len(split_values(text)) > 1]
    return "_".join(["sweep", *(re.sub(r"[^\w.-]", "_", key) for key in short_settings(varied))])


def _name(settings: Sequence[tuple[str, str]]) -> str:
    """A folder name for the varied settings, without special characters of shells and file systems:
    `scale=0.2-1.0` for `[0.2,1.0]`."""
    keys = short_settings([key for key, _ in settings])
    text = ",".join(f"{key}={value}" for key, (_, value) in zip(keys, settings, strict=True))
    plain = [re.sub(r"[\[\]{}\"' ]", "", value).replace(",", "-") for _, value in settings]
    name = ",".join(f"{key}={value}" for key, value in zip(keys, plain, strict=True))
    safe = re.sub(r"[^\w.=,+-]", "_", name)
    if safe != name or len(safe) > LONGEST_NAME:
        # Names that become equal by replacing or truncation are distinguished by a checksum.
        safe = f"{safe[:LONGEST_NAME]}_{zlib.crc32(text.encode()):08x}"
    return safe


def is_finished(run: Path, values: dict[str, Any], code: int | None) -> bool:
    """Whether a run is finished.

    Args:
        run: Directory of the run.
        values: Current values of its recipe; a run with other values is not finished.
        code: Recorded exit code of the run, if any.
    """
    if not (run / CONFIG_NAME).is_file() or load_file(run / CONFIG_NAME) != values:
        return False
    trainer = resolve({**values, "run_dir": str(run)})[0].get("trainer") or {}
    max_steps = trainer.get("max_steps")
    if isinstance(max_steps, int) and max_steps > 0:
        try:
            if step_of(find_run(str(run))[1]) >= max_steps:
                return True
        except InputError:
            return False
    # All epochs are done or a callback ended it; a run that stopped at its time limit can resume.
    return code == 0 and trainer.get("max_time") is None
