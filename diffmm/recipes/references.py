"""References between settings: `${vars.attention}` and `${oc.env:TOKEN}`."""

import re
from collections.abc import Container, Iterator
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from diffmm.checks import did_you_mean, reason_of

REFERENCE = re.compile(r"\$\{([A-Za-z_][\w.\[\]]*)\}")

MAX_SIZE = 1 << 20
"""Maximum number of characters and nodes of a recipe with its references resolved."""

UNKNOWN = object()
"""Stands for a value that is unknown because of a mistake that was already reported."""


def resolve(values: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return the values with all references resolved, and one line per broken reference.

    A broken reference is replaced by `UNKNOWN`. If the resolved values would exceed `MAX_SIZE`, no
    reference is resolved.
    """
    if _resolved_size(values) > MAX_SIZE:
        mistake = f"the references between settings stand for more than {MAX_SIZE:,} characters"
        paths = {path for path, value in walk(values) if isinstance(value, str) and "${" in value}
        return without(values, paths, instead=UNKNOWN), [mistake]
    unreadable = {path: fault for path, value in walk(values) if (fault := _unreadable(value))}
    tree = OmegaConf.create(without(values, unreadable, instead=None))
    names = [".".join(map(str, path)) for path, _ in walk(values)]
    mistakes = [f"{'.'.join(map(str, path))}: {fault}" for path, fault in unreadable.items()]

    def resolved(value: Any, path: tuple[str | int, ...]) -> Any:
        if path in unreadable:
            return UNKNOWN
        if isinstance(value, dict):
            return {key: resolved(item, (*path, key)) for key, item in value.items()}
        if isinstance(value, list):
            return [resolved(item, (*path, index)) for index, item in enumerate(value)]
        if not isinstance(value, str) or "${" not in value:
            return value
        try:
            node: Any = tree
            for part in path:
                node = node[part]
        except OmegaConfBaseException as error:
            mistakes.append(_reference_fault(path, value, names, error))
            return UNKNOWN
        return OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else node

    return resolved(values, ()), mistakes


def used_variables(values: dict[str, Any]) -> list[str]:
    """The names of the variables that any setting refers to."""
    text = " ".join(value for _, value in walk(values) if isinstance(value, str))
    return sorted(set(re.findall(r"\$\{vars\.(\w+)", text)))


def unused_variables(values: dict[str, Any]) -> list[str]:
    """Return one line for each variable that no setting refers to."""
    used, variables = used_variables(values), values.get("vars")
    return [
        f"vars.{name} has no effect: nothing refers to it{did_you_mean(name, used)}"
        for name in (variables if isinstance(variables, dict) else {})
        if name not in used
    ]


def walk(
    value: Any, path: tuple[str | int, ...] = ()
) -> Iterator[tuple[tuple[str | int, ...], Any]]:
    """Iterate over every node of a tree, with its path."""
    if path:
        yield path, value
    if isinstance(value, dict):
        for key, item in value.items():
            yield from walk(item, (*path, key))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from walk(item, (*path, index))


def without(
    value: Any, left_out: Container[tuple[str | int, ...]], *path: str | int, instead: Any
) -> Any:
    """Replace some nodes of a tree by another value."""
    if path in left_out:
        return instead
    if isinstance(value, dict):
        return {k: without(item, left_out, *path, k, instead=instead) for k, item in value.items()}
    if isinstance(value, list):
        return [without(item, left_out, *path, i, instead=instead) for i, item in enumerate(value)]
    return value


def _resolved_size(values: dict[str, Any]) -> int:
    """Approximate number of characters and nodes of the values with references resolved."""
    nodes = {".".join(map(str, path)): value for path, value in walk(values)}
    known: dict[str, int] = {}

    def size(value: Any) -> int:
        if isinstance(value, dict):
            return 1 + sum(map(size, value.values()))
        if isinstance(value, list):
            return 1 + sum(map(size, value))
        if not isinstance(value, str):
            return 1
        return len(value) + sum(map(of_name, REFERENCE.findall(value)))

    def of_name(name: str) -> int:
        if name not in known:
            known[name] = 0  # circular references are reported elsewhere
            known[name] = size(nodes[name]) if name in nodes else 0
        return known[name]

    return size(values)


def _unreadable(value: Any) -> str | None:
    """Return why a leaf such as `${vars.` is not a valid value; `None` if it is valid."""
    if isinstance(value, dict | list):
        return None
    try:
        OmegaConf.create({"value": value})
    except OmegaConfBaseException as error:
        return f"{value} cannot be read: {reason_of(error)}"
    return None


def _reference_fault(
    path: tuple[str | int, ...], value: str, names: list[str], error: OmegaConfBaseException
) -> str:
    place = ".".join(map(str, path))
    for name in REFERENCE.findall(value):
        if name not in names:
            return f"{place} refers to {name}, which does not exist{did_you_mean(name, names)}"
    return f"{place}: {value} cannot be resolved: {reason_of(error)}"
