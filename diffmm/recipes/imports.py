"""Modules of the user's own that a recipe imports: `imports: [own_attention]`.

Importing a module registers the layers in it, so that the recipe can name them. Modules are found
as usual, and then in the working directory.
"""

import importlib
import importlib.util
import re
import sys
from pathlib import Path
from typing import Any

from diffmm.recipes.errors import InputError
from diffmm.recipes.trust import KNOWN

KEY = "imports"
"""The key of a recipe."""

MODULE = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*")


def modules_of(values: dict[str, Any]) -> list[str]:
    """The names of the modules that a recipe imports.

    Raises:
        InputError: If they are not names of modules.
    """
    given = values.get(KEY) or []
    names = [given] if isinstance(given, str) else given
    if not isinstance(names, list) or not all(
        isinstance(name, str) and MODULE.fullmatch(name) and not name.endswith(".py")
        for name in names
    ):
        raise InputError(f"{KEY} must be a list of names of modules, without .py, got {given!r}")
    return names


def import_modules(values: dict[str, Any], *, trust: bool) -> list[str]:
    """Import the modules of a recipe, and return the mistakes.

    Args:
        values: Values of the recipe.
        trust: Whether to import modules outside `diffmm.recipes.trust.KNOWN`; otherwise, naming one
            is a mistake, and nothing of it runs.
    """
    mistakes = []
    try:
        names = modules_of(values)
    except InputError as error:
        return error.lines
    for name in names:
        package = name.partition(".")[0]
        if not trust and package not in KNOWN:
            mistakes.append(
                f"{KEY}: {name!r} is outside diffmm, datamodules, torch, timm and lightning: add "
                f"--trust if you trust the author of this recipe"
            )
            continue
        here = str(Path.cwd())
        if importlib.util.find_spec(package) is None and here not in sys.path:
            # Last, so that no file in it replaces an installed module.
            sys.path.append(here)
            importlib.invalidate_caches()
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            mistakes.append(
                f"{KEY}: there is no module {error.name!r}, neither installed nor in {here}"
            )
        except Exception as error:
            mistakes.append(f"{KEY}: {name} cannot be imported: {type(error).__name__}: {error}")
    return mistakes


def not_imported(values: dict[str, Any]) -> list[str]:
    """The modules of a recipe that have not been imported in this process."""
    return [name for name in modules_of(values) if name not in sys.modules]
