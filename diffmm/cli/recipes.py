"""`diffmm recipes`: list, show and copy the shipped recipes."""

import argparse
import sys
from collections.abc import Sequence

from diffmm.recipes.catalog import (
    copy_recipe,
    description,
    find_recipe,
    recipe_names,
    recipe_root,
)


def run(verb: str, arguments: Sequence[str]) -> int:
    """`diffmm recipes [show NAME | copy NAME [PATH]]`."""
    parser = argparse.ArgumentParser(
        prog="diffmm recipes", description="List, show and copy the shipped recipes."
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
