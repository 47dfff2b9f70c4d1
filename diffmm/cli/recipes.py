"""The recipes that come along: where they are, what they say about themselves.

A recipe's header is a comment block. Its first line says what the recipe is; `FIELDS` follow, one
a paragraph: `# Command: diffmm fit --config text/stdlib_tiny`.
"""

import argparse
import difflib
import re
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import diffmm
from diffmm.cli.errors import BadInput

FIELDS = ("Command", "Hardware", "Time", "Metric", "Measured")
"""What every header says. `Measured` tells which of the figures above it somebody measured."""


def recipe_root() -> Path:
    """The folder of the recipes: inside an installed package, or beside it in its repository."""
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
    """The file of a recipe, given by its path or by the name of a shipped one.

    Raises:
        BadInput: if there is none, with the nearest name.
    """
    path = Path(recipe).expanduser()
    if path.suffix in (".yaml", ".yml"):
        if path.is_file():
            return path
        raise BadInput(f"there is no recipe file {recipe}")
    names = recipe_names()
    if recipe in names:
        return recipe_root() / f"{recipe}.yaml"
    # Somebody may know a recipe without its folder.
    by_file = {name.rpartition("/")[2]: name for name in names}
    near = difflib.get_close_matches(recipe, [*names, *by_file], n=1)
    hint = f"; did you mean {by_file.get(near[0], near[0])!r}?" if near else ""
    raise BadInput(f"there is no recipe {recipe!r}{hint} (diffmm recipes lists them)")


def header(text: str) -> str:
    """The comment at the top of a recipe."""
    block = re.match(r"(?:#.*\n)*", text)
    assert block is not None
    return block[0]


def description(text: str) -> str:
    """The header's first line."""
    return header(text).partition("\n")[0].removeprefix("#").strip()


def fields(text: str) -> dict[str, str]:
    """The header's fields, their continuation lines joined."""
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


def run(verb: str, arguments: Sequence[str]) -> int:
    """`diffmm recipes [show NAME | copy NAME [PATH]]`."""
    parser = argparse.ArgumentParser(
        prog="diffmm recipes", description="List, show and copy the recipes that come along."
    )
    actions = parser.add_subparsers(dest="action", title="without one of these, list all")
    show = actions.add_parser("show", help="print a recipe")
    show.add_argument("name")
    copy = actions.add_parser("copy", help="copy a recipe, to change it")
    copy.add_argument("name")
    copy.add_argument("path", nargs="?", help="a file or folder; ./NAME.yaml by default")
    options = parser.parse_args(arguments)
    if options.action == "show":
        sys.stdout.write(find_recipe(options.name).read_text(encoding="utf-8"))
    elif options.action == "copy":
        print(copy_recipe(options.name, options.path))
    else:
        names = recipe_names()
        width = max(map(len, names), default=0)
        for name in names:
            text = (recipe_root() / f"{name}.yaml").read_text(encoding="utf-8")
            print(f"{name:<{width}}  {description(text)}")
    return 0


def copy_recipe(name: str, target: str | None = None) -> Path:
    """Copy a recipe to a new file and return that.

    Raises:
        BadInput: if there is no such recipe, no folder to copy to, or a file already.
    """
    source = find_recipe(name)
    path = Path(target or source.name)
    if path.is_dir():
        path = path / source.name
    if path.suffix not in (".yaml", ".yml"):
        raise BadInput(f"a recipe's name ends in .yaml, got {path}")
    if not path.parent.is_dir():
        raise BadInput(f"there is no folder {path.parent} to copy {name} to")
    if path.exists():
        raise BadInput(f"{path} exists already: choose another path")
    try:
        shutil.copyfile(source, path)
    except OSError as error:
        path.unlink(missing_ok=True)
        raise BadInput(f"{path} cannot be written: {error.strerror}") from error
    return path
