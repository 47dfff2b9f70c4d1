"""Scheduling of partitions in the interpreter of Gluon, which is random at every pause."""

import random
import threading
from collections.abc import Callable
from typing import Any

from gluon_memory import Clock, Copy, Event, RaceError, Reading, UnfinishedProduct, learn, line


class DeadlockError(Exception):
    """Every partition waits for something that cannot happen."""


class _Stopped(BaseException):
    """Ends the remaining threads when a program is over."""


class Partition:
    """A thread of a program, its knowledge of the others, and its operations in flight."""

    def __init__(self, name: str, clock: Clock) -> None:
        self.name, self.clock = name, {**clock, self: 1}
        self.fences: list[int] = []
        self.products: list[UnfinishedProduct] = []
        self.stores: list[Reading] = []
        self.go = threading.Semaphore(0)
        self.can_go: Callable[[], bool] = lambda: True
        self.waits_for: tuple[Any, ...] = ()
        self.is_over = False

    def __str__(self) -> str:
        return " ".join(map(str, (self.name, *self.waits_for)))

    def tick(self) -> Clock:
        """Return its current knowledge; its later actions are not part of it."""
        known = dict(self.clock)
        self.clock[self] += 1
        return known

    def knows_a_fence_after(self, store: Event) -> bool:
        known = self.clock.get(store.actor, 0)
        return any(store.time <= fence <= known for fence in store.actor.fences)

    def end(self) -> None:
        for left in (*self.products, *self.stores):
            raise RaceError(f"nobody waits for the {left.event.what} of {left.event.line}")
        self.is_over = True


class Turns:
    """Runs partitions and copies, one at a time; `turn` is the running partition."""

    def __init__(self, chance: random.Random) -> None:
        self._chance = chance
        self._back = threading.Semaphore(0)
        self._partitions: list[Partition] = []
        self._threads: list[threading.Thread] = []
        self._failure: BaseException | None = None
        self.copies: list[Copy] = []
        self.turn: Partition

    def run_to_the_end(self, body: Callable[[], Any], name: str) -> None:
        self._start(body, name, {})
        try:
            while not all(partition.is_over for partition in self._partitions):
                self._take_turn()
                if self._failure is not None:
                    raise self._failure
        finally:
            self._failure = self._failure or _Stopped()
            for partition in self._partitions:
                partition.go.release()
            for thread in self._threads:
                thread.join()
        for copy in self.copies:
            raise RaceError(f"nobody waits for the copy of {copy.line}")

    def run_beside(self, bodies: list[Callable[[], Any]]) -> Any:
        """Run the first one here and the others as partitions; return the result of the first."""
        default, clock = self.turn, self.turn.tick()
        others = [
            self._start(body, f"partition {number}", clock)
            for number, body in enumerate(bodies[1:], start=1)
        ]
        result = bodies[0]()
        self.pause(lambda: all(other.is_over for other in others), "waits for the others")
        for other in others:
            learn(default.clock, other.clock)
        return result

    def pause(self, can_go: Callable[[], bool] = lambda: True, *waits_for: Any) -> None:
        """Let others run, at least until `can_go`."""
        partition = self.turn
        partition.can_go, partition.waits_for = can_go, waits_for
        self._back.release()
        partition.go.acquire()
        if self._failure is not None:
            raise _Stopped

    def event(self, what: str) -> Event:
        """Record an access by the running partition."""
        return Event(what, line(), self.turn, self.turn.clock[self.turn])

    def _take_turn(self) -> None:
        """Let a partition run until its next pause, or a copy arrive, preferring late arrival."""
        left = [partition for partition in self._partitions if not partition.is_over]
        ready = [partition for partition in left if partition.can_go()]
        if self.copies and (not ready or self._chance.random() < 0.1):
            self.copies.pop(self._chance.randrange(len(self.copies))).arrive()
        elif ready:
            self.turn = self._chance.choice(ready)
            self.turn.go.release()
            self._back.acquire()
        else:
            raise DeadlockError("\n".join(map(str, left)))

    def _start(self, body: Callable[[], Any], name: str, clock: Clock) -> Partition:
        partition = Partition(name, clock)

        def work() -> None:
            partition.go.acquire()
            try:
                if self._failure is None:
                    body()
                    partition.end()
            except _Stopped:
                return
            except BaseException as failure:
                self._failure = failure
            self._back.release()

        self._partitions.append(partition)
        self._threads.append(threading.Thread(target=work, daemon=True))
        self._threads[-1].start()
        return partition
