"""Memory outside of registers in the interpreter of Gluon, and the detection of races.

The order of accesses does not depend on the order in which the interpreter runs them. Every
partition has a vector clock, and others receive its time when they wait at a barrier at which it
has arrived. An access is safe if its partition knows, in this sense, of all earlier accesses.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from gluon_values import Value, poisoned
from torch import Tensor

Clock = dict[Any, int]  # For every partition and barrier: the last known time.


class RaceError(Exception):
    """Memory or a barrier is used in a way that the hardware leaves undefined."""


def line() -> str:
    """The line of the kernel that is executed."""
    frame = sys._getframe(1)
    while (name := frame.f_code.co_filename.rpartition("/")[2]).startswith("gluon_"):
        frame = frame.f_back
    return f"{name}:{frame.f_lineno}"


def learn(clock: Clock, other: Clock) -> None:
    for actor, time in other.items():
        clock[actor] = max(clock.get(actor, 0), time)


class Descriptor:
    """A tensor as seen by the copy engine: in blocks, padded with zeros."""

    def __init__(self, descriptor: Any) -> None:
        self.tensor = descriptor.base.detach().as_strided(descriptor.shape, descriptor.strides)
        self.shape = self.block_shape = list(descriptor.block_shape)
        self.layout = getattr(descriptor, "layout", None)
        self.dtype = self.tensor.dtype
        self.nbytes = torch.Size(self.shape).numel() * self.tensor.element_size()

    block_type = type = property(lambda self: self)

    def _overlap(self, place: list[Any]) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
        """The overlap of the block at `place` and the tensor, as slices of the tensor and of the
        block."""
        outer, inner = [], []
        for start, length, size in zip(map(int, place), self.shape, self.tensor.shape, strict=True):
            low, high = max(start, 0), min(start + length, size)
            outer.append(slice(low, max(low, high)))
            inner.append(slice(low - start, max(low, high) - start))
        return tuple(outer), tuple(inner)

    def must_fit(self, shared: "Shared") -> None:
        if (shared.shape, shared.dtype) != (self.shape, self.dtype):
            raise ValueError(f"a block {self.shape} does not fit {shared.shape} at {line()}")

    def load(self, place: list[Any]) -> Value:
        outer, inner = self._overlap(place)
        block = torch.zeros(self.shape, dtype=self.dtype)
        block[inner] = self.tensor[outer]
        return Value(block)

    def store(self, place: list[Any], block: Value) -> None:
        outer, inner = self._overlap(place)
        self.tensor[outer] = block.data[inner].to(self.dtype)


class Event(NamedTuple):
    """An access to shared memory. An operation in flight is its own actor, unknown to all
    others."""

    what: str
    line: str
    actor: Any
    time: int = 1


class State(NamedTuple):
    """The history of a cell of shared memory: its last write, and the reads since."""

    write: Event | None = None
    reads: frozenset[Event] = frozenset()


class Shared:
    """A view of shared memory; `states` holds each cell's index in the program's list of states."""

    def __init__(self, program: Any, data: Tensor, states: Tensor, layout: Any) -> None:
        self.program, self.data, self.states, self.layout = program, data, states, layout

    dtype = property(lambda self: self.data.dtype)
    shape = property(lambda self: list(self.data.shape))
    numel = property(lambda self: self.data.numel())
    type = property(lambda self: self)

    def _view(self, view: Callable[[Tensor], Tensor]) -> "Shared":
        return Shared(self.program, view(self.data), view(self.states), self.layout)

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
        event = self.program.event("load")
        self._change(lambda state: self._read(state, event))
        return Value(self.data.clone(), layout)

    def store(self, value: Value) -> None:
        self.program.pause()
        if value.shape != self.shape:
            raise ValueError(f"{value.shape} does not fit {self.shape} at {line()}")
        event = self.program.event("store")
        self._change(lambda state: self._written(state, event))
        self.data.copy_(value.data)

    def hold(self, event: Event) -> None:
        """A product or a copy starts to read this memory."""
        self._change(lambda state: self._read(state, event, in_background=True))

    def release(self, event: Event) -> None:
        """`event` is complete, and the partition that waited for it knows this."""
        seen = self.program.event(event.what)._replace(line=event.line)
        self._change(lambda state: state._replace(reads=state.reads - {event} | {seen}))

    def empty(self, event: Event) -> None:
        """A copy will fill this memory."""
        self._change(lambda state: self._written(state, event))
        self.data.copy_(poisoned((), self.dtype))

    def fill(self, value: Value, event: Event) -> None:
        self._change(lambda state: State(event))
        self.data.copy_(value.data)

    def _change(self, change: Callable[[State], State]) -> None:
        known, old = self.program.states, self.states.clone()
        low, high = (int(number) for number in old.aminmax())
        for number in [low] if low == high else old.unique().tolist():
            known.append(change(known[number]))
            self.states.masked_fill_(old == number, len(known) - 1)

    def _read(self, state: State, event: Event, in_background: bool = False) -> State:
        write = state.write
        if write is None:
            raise RaceError(f"the {event.what} of {event.line} reads what nobody wrote")
        self._must_know(event, write)
        fenced = write.what != "store" or self.program.turn.knows_a_fence_after(write)
        if in_background and not fenced:
            raise RaceError(f"the {event.what} of {event.line} needs a fence after {write.line}")
        reads = {e for e in state.reads if e.actor is not event.actor}
        return state._replace(reads=frozenset(reads | {event}))

    def _written(self, state: State, event: Event) -> State:
        self._must_know(event, state.write, *state.reads)
        return State(event)

    def _must_know(self, event: Event, *earlier: Event | None) -> None:
        clock = self.program.turn.clock
        for e in earlier:
            if e is not None and clock.get(e.actor, 0) < e.time:
                raise RaceError(
                    f"the {event.what} of {event.line} does not wait for the {e.what} of {e.line}"
                )


@dataclass(eq=False)
class Barrier:
    """Counts the arrivals and the bytes that its current phase is still waiting for."""

    count: int
    name: str
    arrivals: int = field(init=False)
    bytes: int = 0
    phase: int = 0
    clock: Clock = field(default_factory=dict)  # known to the partitions that wait
    arrived: Clock = field(default_factory=dict)  # known to those that arrived

    def __post_init__(self) -> None:
        self.arrivals = self.count

    def __str__(self) -> str:
        lacks = f"lacks {self.arrivals} arrivals, {self.bytes} bytes"
        return f"{self.name} (phase {self.phase} {lacks})"

    def take(self, *, arrivals: int = 0, bytes: int = 0, at: str) -> None:
        self.arrivals -= arrivals
        self.bytes -= bytes
        if self.arrivals < 0 or self.bytes < 0:
            raise RaceError(f"too much arrives by {at} at {self}")
        if self.arrivals == self.bytes == 0:
            self.phase, self.arrivals = self.phase + 1, self.count
            learn(self.clock, {**self.arrived, self: self.phase})
            self.arrived = {}


class Copy:
    """A copy in flight from global to shared memory."""

    def __init__(self, source: Descriptor, place: list[int], barrier: Barrier, to: Shared) -> None:
        source.must_fit(to)
        self.source, self.place, self.barrier, self.to = source, place, barrier, to
        self.line = line()
        to.empty(Event("copy", self.line, self))

    def arrive(self) -> None:
        event = Event("copy", self.line, self.barrier, self.barrier.phase + 1)
        self.to.fill(self.source.load(self.place), event)
        self.barrier.take(bytes=self.source.nbytes, at=self.line)


class Reading:
    """A product or a copy to global memory that reads `operands` until it is waited for."""

    def __init__(self, what: str, operands: list[Shared]) -> None:
        self.operands, self.event = operands, Event(what, line(), self)
        for operand in operands:
            operand.hold(self.event)
        self.is_over = False

    def end(self) -> None:
        for operand in self.operands:
            operand.release(self.event)
        self.is_over = True


class UnfinishedProduct(Reading):
    """The result of `warpgroup_mma` with `is_async`, which may be accumulated or waited for."""

    def __init__(self, operands: list[Shared], value: Value) -> None:
        super().__init__("product", operands)
        self.value = value

    type = tensor_type = property(lambda self: self)
    layout = property(lambda self: self.value.layout)
