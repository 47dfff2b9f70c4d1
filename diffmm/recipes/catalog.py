"""The shipped recipes: their location and their headers.

A recipe's header is a comment block. Its first line describes the recipe; `FIELDS` follow, one per
paragraph: `# Command: diffmm fit --config text/stdlib_tiny`.
"""

import difflib
import re
import shutil
from pathlib import Path

import diffmm
from diffmm.new_folders import discard
from diffmm.recipes.errors import InputError

FIELDS = ("Command", "Hardware", "Time", "Metric", "Measured")
"""The fields of every header. `Measured` says which figures of the other fields were measured."""


def recipe_root() -> Path:
    """Return the folder of the recipes: inside an installed package, or next to it in the
    repository."""
    package = Path(diffmm.__file__).parent
    installed = package / "_recipes"
    return installed if installed.is_dir() else package.parent / "recipes"


def recipe_names() -> list[str]:
    """Names of all shipped recipes, such as `text/stdlib_tiny`."""
    root = recipe_root()
    return sorted(
        path.relative_to(root).with_suffix("").as_posix() for path in root.rglob("*.yaml")
    )


def find_recipe(recipe: str) -> Path:
    """Return the file of a recipe, given its path or the name of a shipped recipe.

    Raises:
        InputError: If it does not exist; the message suggests the nearest name.
    """
    path = Path(recipe).expanduser()
    if path.suffix in (".yaml", ".yml"):
        if path.is_file():
            return path
        raise InputError(f"there is no recipe file {recipe}")
    names = recipe_names()
    if recipe in names:
        return recipe_root() / f"{recipe}.yaml"
    # Also suggest recipes whose name was given without the folder.
    by_file = {name.rpartition("/")[2]: name for name in names}
    near = difflib.get_close_matches(recipe, [*names, *by_file], n=1)
    hint = f"; did you mean {by_file.get(near[0], near[0])!r}?" if near else ""
    raise InputError(f"there is no recipe {recipe!r}{hint} (diffmm recipes lists them)")


def header(text: str) -> str:
    """The comment at the top of a recipe."""
    block = re.match(r"(?:#.*\n)*", text)
    assert block is not None
    return block[0]


def description(text: str) -> str:
    """The header's first line."""
    return header(text).partition("\n")[0].removeprefix("#").strip()


def fields(text: str) -> dict[str, str]:
    """The header's fields, with continuation lines joined."""
    found: dict[str, str] = {}
    current = None
    for line in (line.removeprefix("#").strip() for line in header(text).splitlines()[1:]):
        match = re.match(rf"({'|'.join(FIELDS)}): +(.*)", line)
        if match:
            current = match[1]
            found[current] = match[2]
        elif not line:
            current = None
        elif current:
            found[current] += f" {line}"
    return found


def copy_recipe(name: str, target: str | None = None) -> Path:
    """Copy a recipe to a new file and return its path.

    Raises:
        InputError: If the recipe or the target folder does not exist, or the target file exists.
    """
    source = find_recipe(name)
    path = Path(target or source.name)
    if path.is_dir():
        path = path / source.name
    if path.suffix not in (".yaml", ".yml"):
        raise InputError(f"a recipe's name ends in .yaml, got {path}")
    if not path.parent.is_dir():
        raise InputError(f"there is no folder {path.parent} to copy {name} to")
    if path.exists():
        raise InputError(f"{path} exists already: choose another path")
    try:
        shutil.copyfile(source, path)
    except OSError as error:
        discard(path)
        raise InputError(f"{path} cannot be written: {error.strerror}") from error
    return path
