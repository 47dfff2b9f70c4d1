"""A recipe with the overrides of a command line, as one tree of plain values.

References (`${vars.attention}`, `${oc.env:TOKEN}`) are kept as written: they are resolved when the
tree is parsed, after all overrides, and never in the config that a run saves.
"""

from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

from diffmm.recipes.errors import InputError
from diffmm.recipes.yaml_text import MAX_BYTES, parse
from diffmm.renamed import with_new_names

CLASS_KEYS = ("class_path", "init_args", "dict_kwargs")
"""Keys of a node that specifies a class to create."""


def load(recipes: Sequence[Path], overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Load the values of one or more recipes and apply overrides; later values take precedence.

    Args:
        recipes: YAML files.
        overrides: `--key value` or `--key=value` with dotted keys. `init_args` may be omitted from
            a key; a number selects an item of a list, and `key+` appends to a list.

    Raises:
        InputError: If a file is not a mapping in YAML, or an override has no value.
    """
    values: dict[str, Any] = {}
    for recipe in recipes:
        values = merge(values, load_file(recipe))
    for key, value in parse_overrides(overrides):
        override(values, key, value)
    return values


def load_file(path: Path) -> dict[str, Any]:
    """Load the values of one YAML file; old names are replaced by current ones with a warning.

    Raises:
        InputError: If it cannot be read; the message names the file, and the line if it is not
            YAML.
    """
    try:
        with path.open(encoding="utf-8") as file:
            values = parse(file.read(MAX_BYTES + 1))
    except (ValueError, OSError) as error:
        raise InputError(f"{path} cannot be read: {error}") from error
    if not isinstance(values, dict):
        raise InputError(f"{path} is not a recipe: it holds no keys")
    renamed: dict[str, Any] = with_new_names(values, str(path))
    return renamed


def parse_overrides(arguments: Sequence[str]) -> list[tuple[str, Any]]:
    """Parse the keys and values of `--key value` and `--key=value`.

    Raises:
        InputError: If an argument has neither form.
    """
    return [(key, parse_value(text)) for key, text in split_overrides(arguments)]


def split_overrides(arguments: Sequence[str]) -> list[tuple[str, str]]:
    """Split `--key value` and `--key=value` into keys and values, as written.

    Raises:
        InputError: If an argument has neither form.
    """
    pairs = []
    rest = list(arguments)
    while rest:
        key, equals, text = rest.pop(0).partition("=")
        if not key.startswith("--") or len(key) < 3:
            raise InputError(f"expected --key value, got {key!r}")
        if not equals:
            if not rest or rest[0].startswith("--"):
                raise InputError(f"{key} needs a value")
            text = rest.pop(0)
        pairs.append((key.removeprefix("--"), text))
    return pairs


def parse_value(text: str) -> Any:
    """Parse a value of the command line as YAML; invalid YAML is plain text."""
    try:
        return parse(text)
    except ValueError:
        return text


def merge(below: Any, above: Any) -> Any:
    """Merge `above` over `below` key by key; a node of another class replaces the whole node."""
    if not isinstance(below, dict) or not isinstance(above, dict):
        return deepcopy(above)
    if "class_path" in above and above["class_path"] != below.get("class_path"):
        return deepcopy(above)
    merged = dict(below)
    for key, value in above.items():
        merged[key] = merge(below[key], value) if key in below else deepcopy(value)
    return merged


def override(values: dict[str, Any], key: str, value: Any) -> None:
    """Set one dotted key, in place.

    Raises:
        InputError: If the key refers to a list item that does not exist.
    """
    *parents, last = key.split(".")
    node: Any = values
    for part in parents:
        node = _inside(node, part, key)
    last, adds = last.removesuffix("+"), last.endswith("+")
    if isinstance(node, list):
        if last.isdigit():
            node[_position(node, last, key)] = value
            return
        node = _added_last(node, key)
    if _is_class(node) and last not in CLASS_KEYS:
        node = node.setdefault("init_args", {})
    if adds:
        present = node.get(last)
        items = present if isinstance(present, list) else [] if present is None else [present]
        node[last] = [*items, *(value if isinstance(value, list) else [value])]
    elif _is_class(node.get(last)) and isinstance(value, str):
        node[last] = {**node[last], "class_path": value}
    else:
        node[last] = value


def _inside(node: Any, part: str, key: str) -> Any:
    """The child node at `part`; created if it does not exist or is a plain value."""
    if isinstance(node, list):
        if not part.isdigit():
            return _inside(_added_last(node, key), part, key)
        at: Any = _position(node, part, key)
    else:
        if _is_class(node) and part not in CLASS_KEYS:
            node = node.setdefault("init_args", {})
        at = part
    child = node[at] if isinstance(node, list) else node.get(at)
    if not isinstance(child, dict | list):
        is_class_name = isinstance(child, str) and "${" not in child
        child = node[at] = {"class_path": child} if is_class_name else {}
    return child


def _added_last(node: list[Any], key: str) -> dict[str, Any]:
    """The last item of a list, which a key without a number refers to."""
    if not node:
        raise InputError(f"--{key}: the list is empty, there is nothing to set in it")
    if not isinstance(node[-1], dict):
        node[-1] = {"class_path": node[-1]}
    return node[-1]


def _position(node: list[Any], part: str, key: str) -> int:
    if int(part) >= len(node):
        raise InputError(f"--{key}: the list has {len(node)} items, there is no item {part}")
    return int(part)


def _is_class(node: Any) -> bool:
    return isinstance(node, dict) and "class_path" in node
