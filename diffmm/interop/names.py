"""Tables of names: which tensor of another implementation is which of diffmm's."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from diffmm.models.weight_checks import of_another_shape

BLOCK = "{}"
"""Stands for the number of a block in the names of a table."""


@dataclass(frozen=True)
class Layout:
    """How one of their tensors becomes one or several of ours, and back.

    Attributes:
        to_ours: Takes their tensor and returns ours, or a tuple of ours in the order of the table.
        to_theirs: The inverse: takes our tensors in that order and returns theirs. It is also
            called with tensors on the meta device, and so must not depend on values.
    """

    to_ours: Callable[[Tensor], Any]
    to_theirs: Callable[..., Tensor]


def _same(tensor: Tensor) -> Tensor:
    return tensor


SAME = Layout(_same, _same)
"""Both implementations arrange the tensor in the same way."""


def halves_as_pairs(head_dim: int) -> Layout:
    """The layout of rotated queries or keys, `[H * D, ...]`: theirs are rotated in the dimensions
    `(j, j + D/2)` (Hugging Face, GPT-NeoX), ours in `(2j, 2j + 1)` (the RoFormer paper)."""
    if head_dim % 2:
        raise ValueError(f"rotary positions need an even head_dim, got {head_dim}")

    def turned(shape: tuple[int, ...]) -> Callable[[Tensor], Tensor]:
        return lambda tensor: tensor.unflatten(0, shape).transpose(1, 2).flatten(0, 2)

    return Layout(turned((-1, 2, head_dim // 2)), turned((-1, head_dim // 2, 2)))


def fused(sizes: Sequence[int], layouts: Sequence[Layout] | None = None) -> Layout:
    """The layout of one tensor that is several of ours, one after another along the first axis.

    Args:
        sizes: Size of each part along the first axis.
        layouts: Layout of each part; `SAME` by default.
    """
    each = layouts or [SAME] * len(sizes)
    return Layout(
        lambda tensor: tuple(
            layout.to_ours(part)
            for layout, part in zip(each, tensor.split(list(sizes)), strict=True)
        ),
        lambda *parts: torch.cat(
            [layout.to_theirs(part) for layout, part in zip(each, parts, strict=True)]
        ),
    )


@dataclass(frozen=True)
class Name:
    """One entry of a table.

    Attributes:
        theirs: Name of the tensor in the other implementation; `{}` stands for the number of a
            block.
        ours: Name of the tensor in diffmm, or several, in the order of the layout.
        layout: How the tensors are arranged.
    """

    theirs: str
    ours: str | tuple[str, ...]
    layout: Layout = SAME


@dataclass(frozen=True)
class Table:
    """The tensors of a model in another implementation.

    Attributes:
        names: All tensors that hold weights.
        depth: Number of blocks, for names with `{}`.
        derived: Names of tensors that files may contain although they follow from the settings,
            such as rotary frequencies. They are not read, and never written.
        aliases: Further names of tied weights, each with the name that is read. Files may contain
            them if they are equal.
    """

    names: tuple[Name, ...]
    depth: int
    derived: tuple[str, ...] = ()
    aliases: Mapping[str, str] = field(default_factory=dict)

    def each(self) -> list[Name]:
        """The names of all blocks."""
        return [
            Name(_at(name.theirs, number), _at(name.ours, number), name.layout)
            for name in self.names
            for number in (range(self.depth) if BLOCK in name.theirs else [0])
        ]

    def to_theirs(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Rename and rearrange our weights. `weights` must be those of a model with the settings of
        this table."""
        theirs = {}
        remaining = set(weights)
        for name in self.each():
            ours = (name.ours,) if isinstance(name.ours, str) else name.ours
            theirs[name.theirs] = name.layout.to_theirs(*(weights[each] for each in ours))
            remaining -= set(ours)
        assert not remaining, f"the table has no name of {sorted(remaining)}"
        return theirs

    def to_ours(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Rename and rearrange their tensors, which `check` has accepted."""
        weights = {}
        for name in self.each():
            found = name.layout.to_ours(tensors[name.theirs])
            if isinstance(name.ours, str):
                weights[name.ours] = found
            else:
                weights.update(zip(name.ours, found, strict=True))
        return weights

    def check(
        self, tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor], origin: str
    ) -> None:
        """Check that `tensors` are those of `expected`, by name and shape.

        Raises:
            ValueError: If not; the message names `origin` and all tensors that are missing, not
                expected, of another shape, of a dtype that is not floating point, or tied but not
                equal.
        """
        derived = {_at(name, number) for name in self.derived for number in range(self.depth)}
        known = expected.keys() | derived | self.aliases.keys()
        faults = {
            "missing": [name for name in expected if name not in tensors],
            "not expected": [name for name in tensors if name not in known],
            "of another shape": of_another_shape(tensors, expected),
            "of a dtype that cannot be converted": [
                f"{name} {str(tensors[name].dtype).removeprefix('torch.')}"
                for name in expected
                if name in tensors and tensors[name].dtype not in DTYPES
            ],
        }
        if any(faults.values()):
            details = "; ".join(
                f"{len(names)} {kind} ({', '.join(by_block(names))})"
                for kind, names in faults.items()
                if names
            )
            raise ValueError(
                f"{origin} does not have the weights that its settings need: {details}"
            )
        for alias, name in self.aliases.items():
            if alias in tensors and not torch.equal(tensors[alias], tensors[name]):
                raise ValueError(
                    f"{origin} has different {alias} and {name}, but its settings tie the two"
                )


DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def _at(name: Any, number: int) -> Any:
    if isinstance(name, str):
        return name.replace(BLOCK, str(number))
    return tuple(_at(each, number) for each in name)


def by_block(names: Iterable[str]) -> list[str]:
    """Shorten a list of names: those that differ only in their first number become one, with all
    numbers, such as `layers.0-3,5.bias`."""
    numbers: dict[tuple[str, str], list[int | None]] = {}
    for name in names:
        first = re.search(r"(?<=\.)\d+(?=\.)", name)
        start, end = (name, "") if first is None else (name[: first.start()], name[first.end() :])
        numbers.setdefault((start, end), []).append(None if first is None else int(first[0]))
    return [
        f"{start}{'' if None in found else _ranges(sorted(x for x in found if x is not None))}{end}"
        for (start, end), found in numbers.items()
    ]


def _ranges(numbers: list[int]) -> str:
    starts = [numbers[0], *(b for a, b in pairwise(numbers) if b != a + 1)]
    ends = [*(a for a, b in pairwise(numbers) if b != a + 1), numbers[-1]]
    return ",".join(f"{a}" if a == b else f"{a}-{b}" for a, b in zip(starts, ends, strict=True))
