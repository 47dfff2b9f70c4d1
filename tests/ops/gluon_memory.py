"""What a kernel holds outside its registers, in the interpreter of Gluon: and who is using it."""

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from gluon_values import Value, poisoned
from torch import Tensor


class Race(Exception):
    """Memory or a barrier used in a way that the hardware leaves undefined."""


def line() -> str:
    """The line of the kernel that is at work."""
    frame = sys._getframe(1)
    while Path(frame.f_code.co_filename).name.startswith("gluon_"):
        frame = frame.f_back
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"


class Descriptor:
    """A tensor as the copy engine sees it: in blocks, with zeros around it."""

    def __init__(self, descriptor: Any) -> None:
        self.tensor = descriptor.base.detach().as_strided(descriptor.shape, descriptor.strides)
        self.shape = self.block_shape = list(descriptor.block_shape)
        self.layout = getattr(descriptor, "layout", None)
        self.dtype = self.tensor.dtype
        self.nbytes = torch.Size(self.shape).numel() * self.tensor.element_size()

    block_type = type = property(lambda self: self)

    def _overlap(self, place: list[Any]) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
        """Where the block at `place` and the tensor meet: as parts of the tensor, of the block."""
        outer, inner = [], []
        for start, length, size in zip(map(int, place), self.shape, self.tensor.shape, strict=True):
            low, high = max(start, 0), min(start + length, size)
            outer.append(slice(low, max(low, high)))
            inner.append(slice(low - start, max(low, high) - start))
        return tuple(outer), tuple(inner)

    def load(self, place: list[Any]) -> Value:
        outer, inner = self._overlap(place)
        block = torch.zeros(self.shape, dtype=self.dtype)
        block[inner] = self.tensor[outer]
        return Value(block)

    def store(self, place: list[Any], block: Value) -> None:
        outer, inner = self._overlap(place)
        self.tensor[outer] = block.data[inner].to(self.dtype)


class Shared:
    """A view of shared memory, and of what is under way in each of its cells.

    `readers` counts the products and copies that still read a cell, `filling` says that a copy is
    to arrive there, and `unfenced` which partition, counted from one, stored there without a fence.
    """

    def __init__(self, program: Any, cells: tuple[Tensor, ...], layout: Any) -> None:
        self.program, self.cells, self.layout = program, cells, layout
        self.data, self.readers, self.filling, self.unfenced = cells

    dtype = property(lambda self: self.data.dtype)
    shape = property(lambda self: list(self.data.shape))
    numel = property(lambda self: self.data.numel())
    type = property(lambda self: self)

    def _view(self, view: Callable[[Tensor], Tensor]) -> "Shared":
        return Shared(self.program, tuple(map(view, self.cells)), self.layout)

    def index(self, index: Any) -> "Shared":
        return self.slice(index, 1)._view(lambda cells: cells.squeeze(0))

    def slice(self, start: Any, length: int, dim: int = 0) -> "Shared":
        start, size = int(start), self.shape[dim]
        if not 0 <= start <= start + length <= size:
            raise IndexError(f"{start} to {start + length} of {size} at {line()}")
        return self._view(lambda cells: cells.narrow(dim, start, length))

    def reshape(self, shape: Any) -> "Shared":
        return self._view(lambda cells: cells.view(*shape))

    def permute(self, order: Any) -> "Shared":
        return self._view(lambda cells: cells.permute(*order))

    def load(self, layout: Any = None) -> Value:
        self.program.pause()
        self.refuse("read", self.filling, "is being filled")
        return Value(self.data.clone(), layout)

    def store(self, value: Value) -> None:
        self.program.pause()
        self.refuse("written", self.filling, "is being filled")
        self.refuse("written", self.readers, "is being read")
        if value.shape != self.shape:
            raise ValueError(f"{value.shape} does not fit {self.shape} at {line()}")
        self.data.copy_(value.data)
        self.unfenced.fill_(self.program.turn.number)

    def refuse(self, verb: str, cells: Tensor, state: str) -> None:
        if cells.any():
            raise Race(f"shared memory is {verb} at {line()} that {state} in the background")

    def hold(self) -> None:
        """A product or a copy reads this from now on."""
        self.refuse("read", self.filling, "is being filled")
        if self.unfenced.any():
            raise Race(f"shared memory is read at {line()} that was stored without a fence")
        self.readers.add_(1)

    def release(self) -> None:
        self.readers.sub_(1)

    def empty(self) -> None:
        """A copy will fill this."""
        self.refuse("overwritten", self.filling, "is being filled")
        self.refuse("overwritten", self.readers, "is being read")
        self.data.copy_(poisoned((), self.dtype))
        self.filling.fill_(1)
        self.unfenced.zero_()

    def fill(self, value: Value) -> None:
        self.data.copy_(value.data)
        self.filling.zero_()


@dataclass
class Barrier:
    """Counts the arrivals and the bytes that its current phase still lacks."""

    count: int
    number: int  # among the barriers of one allocation
    arrivals: int = field(init=False)
    bytes: int = 0
    phase: int = 0
    line: str = field(default_factory=line)

    def __post_init__(self) -> None:
        self.arrivals = self.count

    def __str__(self) -> str:
        lacks = f"lacks {self.arrivals} arrivals and {self.bytes} bytes in phase {self.phase}"
        return f"barrier {self.number} of {self.line}, which {lacks}"

    def take(self, *, arrivals: int = 0, bytes: int = 0) -> None:
        self.arrivals -= arrivals
        self.bytes -= bytes
        if self.arrivals < 0 or self.bytes < 0:
            raise Race(f"too much arrives at {line()}: {self}")
        if self.arrivals == self.bytes == 0:
            self.phase, self.arrivals = self.phase + 1, self.count


class UnfinishedProduct:
    """What `warpgroup_mma` with `is_async` returns: fit to be added to or waited for."""

    def __init__(self, value: Value, operands: list[Shared]) -> None:
        self.value, self.operands, self.line = value, operands, line()
        self.is_done = False

    type = tensor_type = property(lambda self: self)
    layout = property(lambda self: self.value.layout)

    def finish(self) -> None:
        for operand in self.operands:
            operand.release()
        self.is_done = True
