"""The subset of YAML that recipes use: plain values of bounded size and depth."""

import re
from typing import Any

import yaml

MAX_BYTES = 1 << 20
"""Maximum size of a file."""
MAX_NODES = 100_000
"""Maximum number of nodes of a tree; an alias counts each time it is used."""
MAX_DEPTH = 100
"""Maximum nesting depth of a tree."""

PLAIN = (str, bool, int, float, type(None))


class Loader(yaml.SafeLoader):
    """A YAML loader with the floats of YAML 1.2 (such as `1e-3`), which rejects repeated keys and
    reads dates such as `2026-01-01` as text."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise _refusal("a key must be text, not a list or a mapping", key)
            if key.value in seen:
                raise _refusal(f"the key {key.value!r} appears twice", key)
            seen.add(key.value)
        return super().construct_mapping(node, deep)

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        super().flatten_mapping(node)
        if len(node.value) > MAX_NODES:
            raise _refusal(f"its aliases stand for more than {MAX_NODES:,} values", node)


Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith(":timestamp")]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:[0-9][0-9_]*)(?:\.[0-9_]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)


def _refusal(message: str, node: yaml.Node) -> yaml.constructor.ConstructorError:
    return yaml.constructor.ConstructorError(None, None, message, node.start_mark)


def parse(text: str) -> Any:
    """Parse a YAML text of plain values.

    Raises:
        ValueError: If the text is not valid YAML, has other values than mappings with text as keys,
            lists, text, numbers, booleans and null, or exceeds the size or depth of a recipe. The
            message is one line.
    """
    if len(text) > MAX_BYTES:
        raise ValueError(f"it has more than {MAX_BYTES:,} characters, more than a recipe may have")
    try:
        values = yaml.load(text, Loader)
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from error
    except RecursionError:
        raise ValueError(f"it is nested more than {MAX_DEPTH} levels deep") from None
    except (ValueError, ArithmeticError, LookupError, TypeError, AttributeError) as error:
        # Raised by PyYAML's constructors, such as for an integer of thousands of digits.
        raise ValueError(f"it holds a value that cannot be read: {error}") from error
    _size(values, (), {})
    return values


def _size(value: Any, path: tuple[str | int, ...], known: dict[int, int | None]) -> int:
    """The number of nodes in a tree; a node with several references is visited only once."""
    if not isinstance(value, dict | list):
        if type(value) not in PLAIN:
            place = ".".join(map(str, path)) or "it"
            raise ValueError(f"{place} is of YAML's type {type(value).__name__}: put it in quotes")
        return 1
    if len(path) > MAX_DEPTH:
        raise ValueError(f"it is nested more than {MAX_DEPTH} levels deep")
    if id(value) in known:
        size = known[id(value)]
        if size is None:
            raise ValueError(f"{'.'.join(map(str, path))} is an alias of its own parent")
        return size
    known[id(value)] = None
    size = 1
    for key, item in value.items() if isinstance(value, dict) else enumerate(value):
        if isinstance(value, dict) and not isinstance(key, str):
            place = ".".join(map(str, (*path, key)))
            raise ValueError(f"the key {place} is not a string: put it in quotes")
        size += _size(item, (*path, key), known)
        if size > MAX_NODES:
            raise ValueError(f"its aliases stand for more than {MAX_NODES:,} values")
    known[id(value)] = size
    return size
