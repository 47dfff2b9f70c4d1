"""A recipe's settings as a command line names them, with their values and comments."""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from diffmm.recipes.references import UNKNOWN, resolve, walk
from diffmm.recipes.yaml_text import Loader

COMMENT = re.compile(r"\s*[,\]}]*\s+# ?(.*)")
"""Matches the rest of a line after a value, with a comment."""

LEFT_OUT = ("init_args", "dict_kwargs")
WIDTH = 44
"""Width of the column of settings and values, in characters; comments follow it."""


def explain(recipes: Sequence[Path], values: dict[str, Any]) -> str:
    """Return one line per setting.

    Args:
        recipes: Recipe files, whose comments are shown.
        values: Values of the recipes, with overrides.
    """
    comments: dict[str, str] = {}
    for recipe in recipes:
        comments.update(_comments(recipe.read_text(encoding="utf-8")))
    resolved = dict(_leaves(resolve({**values, "run_dir": "${run_dir}"})[0]))
    lines = []
    for name, written in _leaves(values):
        is_reference = isinstance(written, str) and "${" in written
        value = resolved.get(name, written)
        # Secrets from the environment are not shown, and the run directory is not known yet.
        if is_reference and ("${oc." in written or "${run_dir}" in written or value is UNKNOWN):
            value = written
        setting = f"--{name} {_in_writing(value)}"
        notes = [written] if is_reference and value is not written else []
        notes += [comments[name]] if name in comments else []
        lines.append(f"  {setting:<{WIDTH}}  {'  '.join(notes)}".rstrip())
    return "\n".join(lines)


def _leaves(values: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """The settings by their names on the command line; a list of plain values is one setting."""
    inside: set[tuple[str | int, ...]] = set()
    for place, value in walk(values):
        if place[0] == "run_dir" or place[:-1] in inside:
            inside.add(place)
            continue
        if isinstance(value, list) and not any(isinstance(item, dict | list) for item in value):
            inside.add(place)
        elif isinstance(value, dict | list) and value:
            continue
        yield _name(place), value


def _name(place: Sequence[str | int]) -> str:
    return ".".join(str(part) for part in place if part not in LEFT_OUT)


def _in_writing(value: Any) -> str:
    text = yaml.safe_dump(value, default_flow_style=True, width=10_000, allow_unicode=True)
    return text.removesuffix("\n").removesuffix("\n...")


def _comments(text: str) -> Iterator[tuple[str, str]]:
    """Return the comments after the values of a YAML text, by the names of the settings."""
    lines = text.splitlines()
    root = yaml.compose(text, Loader)
    todo: list[tuple[tuple[str | int, ...], yaml.Node]] = [] if root is None else [((), root)]
    while todo:
        place, node = todo.pop()
        children: list[tuple[str | int, yaml.Node]] = []
        if isinstance(node, yaml.MappingNode):
            children = [(key.value, value) for key, value in node.value]
        elif isinstance(node, yaml.SequenceNode):
            children = list(enumerate(node.value))
        todo += [((*place, part), child) for part, child in children]
        is_leaf = isinstance(node, yaml.ScalarNode) or getattr(node, "flow_style", False)
        mark = node.end_mark
        rest = lines[mark.line][mark.column :] if mark.line < len(lines) else ""
        if is_leaf and place and (match := COMMENT.fullmatch(rest)):
            yield _name(place), match[1]
