"""Options and output shared by several verbs: the user's own data, help, the complete recipe."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diffmm.recipes.catalog import find_recipe
from diffmm.recipes.errors import InputError
from diffmm.recipes.importing import importing
from diffmm.recipes.settings import load
from diffmm.runs.claims import is_first_process

RUN_DIR = "<the run's directory>"
"""Placeholder for the run directory while references are resolved before it exists."""


def add_data_option(parser: argparse.ArgumentParser) -> None:
    """Add `--data` to a command that accepts a user's own data."""
    parser.add_argument(
        "--data",
        metavar="PATH",
        help="train on this instead of the recipe's data: a folder with one folder per class (or "
        "such folders in train and val), a CSV file of files and labels, or texts; the number of "
        "classes and other settings derived from the data are set and printed, and settings given "
        "here take precedence",
    )


def recipe_values(
    paths: Sequence[Path],
    overrides: Sequence[str],
    data: str | None,
    *,
    inputs_may_change: bool,
    trust: bool = True,
    aside: bool = False,
) -> dict[str, Any]:
    """Return the values of recipes with overrides and, if given, with the user's own data, of which
    a summary is printed. See `diffmm.recipes.own_data.on_own_data`.

    Args:
        paths, overrides, inputs_may_change, trust: See `on_own_data`.
        data: Path of the user's own data.
        aside: Whether to print to stderr, if stdout is used for a recipe.
    """
    if data is None:
        return load(paths, overrides)
    with importing():
        from diffmm.recipes.own_data import on_own_data

    own = on_own_data(paths, overrides, data, inputs_may_change=inputs_may_change, trust=trust)
    if is_first_process():
        stream = sys.stderr if aside else sys.stdout
        print("\n".join(f"data: {line}" for line in own.lines), file=stream, flush=True)
    return own.values


def add_help_options(parser: argparse.ArgumentParser) -> None:
    """Add `--help` and `--help-all` to a command that also takes settings of a recipe."""
    parser.add_argument(
        "-h",
        "--help",
        action="store_true",
        help="print this help; with --config, also the settings of that recipe and their values",
    )
    parser.add_argument(
        "--help-all",
        action="store_true",
        help="also print all settings that a recipe can have, from Lightning and the library",
    )


def wants_help(options: argparse.Namespace, overrides: Sequence[str]) -> bool:
    """Whether help is requested, for the verb or for a class (`--model.help CLASS`)."""
    is_for_class = any(key.partition("=")[0].endswith(".help") for key in overrides)
    return options.help or options.help_all or is_for_class


def print_help(
    parser: argparse.ArgumentParser, options: argparse.Namespace, overrides: Sequence[str]
) -> int:
    """Print the help of a verb with the settings of its recipe or all settings, or of a class."""
    if options.help_all or not options.help:
        with importing():
            from diffmm.recipes.trainer import print_settings

        if options.help_all:
            parser.print_help()
            print()
        print_settings(["--help"] if options.help_all else overrides, parser.prog)
        return 0
    if not options.config:
        parser.print_help()
        return 0
    from diffmm.recipes.explanation import explain

    paths = [find_recipe(name) for name in options.config]
    parser.epilog = (
        f"More can be set than the recipe does: {parser.prog} --help-all lists all settings, and "
        f"--model.help CLASS those of a class."
    )
    print(f"settings of {', '.join(options.config)} (${{...}}: follows that setting):")
    print(f"{explain(paths, load(paths, overrides))}\n")
    parser.print_help()
    return 0


def printed(values: dict[str, Any], form: str) -> dict[str, Any]:
    """Return the values of a recipe as `--print_config` shows them: `written`, or `resolved`, which
    replaces variables by their values. The run directory remains a reference.

    Raises:
        InputError: If references are resolved and some are broken; the message lists them.
    """
    if form == "written":
        return values
    from diffmm.recipes.references import resolve

    resolved, mistakes = resolve({**values, "run_dir": RUN_DIR})
    if mistakes:
        raise InputError(*mistakes)
    return {
        key: _with_reference(value)
        for key, value in resolved.items()
        if key not in ("run_dir", "vars")
    }


def _with_reference(value: Any) -> Any:
    """Replace the placeholder of the run directory by its reference."""
    if isinstance(value, dict):
        return {key: _with_reference(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_with_reference(item) for item in value]
    return value.replace(RUN_DIR, "${run_dir}") if isinstance(value, str) else value
