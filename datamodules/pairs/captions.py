"""What generated pictures and sounds share: held-out combinations, and captions that all differ."""

from collections.abc import Callable, Sequence
from typing import TypeVar

from numpy.random import Generator

Scene = TypeVar("Scene")
Kind = tuple[str, str]
"""A combination of two properties, such as a color and a shape."""


def diagonal(first: Sequence[str], second: Sequence[str], fraction: float) -> list[Kind]:
    """The combinations to hold out: `fraction` of all (rounded, at least one, or none for 0). They
    are taken along diagonals of the table, so that every property is also in combinations that are
    not held out.

    Raises:
        ValueError: If `fraction` is not in [0, 0.5].
    """
    if not 0.0 <= fraction <= 0.5:
        raise ValueError(f"held_out_fraction must be in [0, 0.5], got {fraction}")
    if fraction == 0.0:
        return []
    places = [(row, column) for row in range(len(first)) for column in range(len(second))]
    places.sort(key=lambda place: ((place[1] - place[0]) % len(second), place))
    count = max(1, round(fraction * len(places)))
    return [(first[row], second[column]) for row, column in places[:count]]


def draw_kinds(
    rng: Generator, number: int, known: Sequence[Kind], held_out: Sequence[Kind]
) -> list[Kind]:
    """Draw combinations for a scene; with `held_out`, one of them at a random place is of these."""
    kinds = [known[i] for i in rng.integers(len(known), size=number)]
    if held_out:
        kinds[int(rng.integers(number))] = held_out[int(rng.integers(len(held_out)))]
    return kinds


def draw_distinct(
    count: int, draw: Callable[[], Scene], caption: Callable[[Scene], str], advice: str
) -> list[Scene]:
    """Draw scenes until there are `count` with different captions.

    Args:
        count: Number of scenes.
        draw: Draws a scene.
        caption: The caption of a scene.
        advice: What to change if there are too few, for the message.

    Raises:
        ValueError: If twenty draws per scene do not suffice.
    """
    scenes: dict[str, Scene] = {}
    for _ in range(20 * count):
        scene = draw()
        scenes.setdefault(caption(scene), scene)
        if len(scenes) == count:
            return list(scenes.values())
    raise ValueError(f"only about {len(scenes)} different captions can be made of these: {advice}")
