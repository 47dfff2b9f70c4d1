"""The record of a sweep, in its folder: the settings that it varies, and how its runs ended."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diffmm.checkpoint_folders import write_text
from diffmm.recipes.errors import InputError

RECORD_NAME = "sweep.json"
"""File in the folder of a sweep that records the exit codes of its runs."""

VARIED_KEY = "varied settings"
"""Key of the record with the settings that the sweep varies."""


def read_record(folder: Path) -> dict[str, int]:
    """The exit codes of the ended runs of a sweep, by name; empty if there is no record."""
    return {name: code for name, code in _read(folder).items() if isinstance(code, int)}


def varied_settings(folder: Path) -> list[str] | None:
    """The settings that the sweep in a folder varies; `None` if there is no record of them."""
    varied = _read(folder).get(VARIED_KEY)
    return varied if isinstance(varied, list) else None


def begin(folder: Path, varied: Sequence[str]) -> None:
    """Create the folder of a sweep, and record the settings that it varies."""
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder, {VARIED_KEY: list(varied), **read_record(folder)})


def _read(folder: Path) -> dict[str, Any]:
    try:
        record = json.loads((folder / RECORD_NAME).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise InputError(f"{folder / RECORD_NAME} cannot be read: {error}") from error
    if not isinstance(record, dict):
        raise InputError(f"{folder / RECORD_NAME} is not the record of a sweep")
    return record


def note(folder: Path, name: str, code: int) -> None:
    """Record the exit code of a run."""
    _write(folder, {**_read(folder), name: code})


def _write(folder: Path, record: dict[str, Any]) -> None:
    write_text(folder / RECORD_NAME, json.dumps(record, indent=2, ensure_ascii=False) + "\n")
