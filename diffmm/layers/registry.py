"""Registration of user-defined layers under names that a config can use."""

from collections.abc import Callable
from typing import Literal, TypeVar

from torch import nn

Split = Literal["columns", "rows", "heads"]
"""How tensor parallelism splits a child module."""

Layer = TypeVar("Layer", bound=type[nn.Module])


def registration(
    registry: dict[str, type[nn.Module]], name: str, base: type[nn.Module] = nn.Module
) -> Callable[[Layer], Layer]:
    """Class decorator that adds the class to `registry` as `name`.

    Args:
        registry: A dict from names to classes.
        name: The name of the class in a config. Registering the same class again, for example by
            rerunning a notebook cell, replaces it.
        base: The base class that the class must derive from.

    Raises:
        ValueError: If the name belongs to another class, or the class does not derive from `base`.
    """

    def register(layer: Layer) -> Layer:
        if not (isinstance(layer, type) and issubclass(layer, base)):
            raise ValueError(f"{name!r} must be a subclass of {base.__name__}, got {layer!r}")
        known = registry.get(name)
        if known is not None and _path(known) != _path(layer):
            raise ValueError(f"{name!r} is already {_path(known)}: choose another name")
        registry[name] = layer
        return layer

    return register


def _path(layer: type[nn.Module]) -> str:
    return f"{layer.__module__}.{layer.__qualname__}"
