"""Names for layers of a user's own, which a config can then choose."""

from collections.abc import Callable
from typing import Literal, TypeVar

from torch import nn

Split = Literal["columns", "rows", "heads"]
"""How tensor parallelism divides a child module."""

Layer = TypeVar("Layer", bound=type[nn.Module])


def registration(
    registry: dict[str, type[nn.Module]], name: str, base: type[nn.Module] = nn.Module
) -> Callable[[Layer], Layer]:
    """A class decorator that adds the class to `registry` as `name`.

    Args:
        registry: The classes by name.
        name: What a config calls the class; registering the same class again, as a reloaded
            notebook does, replaces it.
        base: What the class must derive from.

    Raises:
        ValueError: If the name belongs to another class, or the class has another base.
    """

    def register(layer: Layer) -> Layer:
        if not (isinstance(layer, type) and issubclass(layer, base)):
            raise ValueError(f"{name!r} must be a subclass of {base.__name__}, got {layer!r}")
        known = registry.get(name)
        if known is not None and _path(known) != _path(layer):
            raise ValueError(f"{name!r} is {_path(known)} already: choose another name")
        registry[name] = layer
        return layer

    return register


def _path(layer: type[nn.Module]) -> str:
    return f"{layer.__module__}.{layer.__qualname__}"
