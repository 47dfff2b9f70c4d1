"""An interpreter that runs Triton and Gluon kernels for Hopper on a CPU and detects races.

    with interpreted(seed=0):
        forward(q, k, v, lam, mask, scale)  # every launch runs here, on tensors of the CPU

A kernel's Python function runs unchanged, with replacements for the functions of Triton's language.
Each partition of `warp_specialize` is a thread. One runs at a time, and at every operation that is
visible to others the next one is chosen at random. Asynchronous operations take effect at the worst
possible time: a copy to shared memory clears its destination immediately and fills it late, and
products and copies to global memory use their operands until they are waited for.

`RaceError` is raised for accesses that the hardware leaves undefined, and `DeadlockError` if no
partition can continue. Uninitialized memory is NaN. Layouts are stored but not checked; only the
compiler checks them.
"""

import inspect
import itertools
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import FunctionType, ModuleType
from typing import Any

import torch
import triton.language as tl
from gluon_memory import (
    Barrier,
    Copy,
    Descriptor,
    RaceError,
    Reading,
    Shared,
    State,
    UnfinishedProduct,
    learn,
    line,
)
from gluon_turns import Turns
from gluon_values import VOCABULARY, Pointer, Value, poisoned
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier
from triton.runtime.jit import JITFunction


@contextmanager
def interpreted(seed: int = 0) -> Iterator[None]:
    """Run launches of Triton's and Gluon's kernels here; `seed` determines random choices."""
    chance, compiled = random.Random(seed), JITFunction.run

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        parameters = inspect.signature(self.fn).parameters
        options = {"num_warps", "num_stages"} - set(parameters)
        kwargs = {name: value for name, value in kwargs.items() if name not in options}
        bound = inspect.signature(self.fn).bind(*args, **kwargs).arguments
        arguments = {name: _argument(x, parameters[name].annotation) for name, x in bound.items()}
        places = list(itertools.product(*map(range, grid)))
        for place in chance.sample(places, len(places)):
            Program(place, grid, chance).run(self, arguments)

    JITFunction.run = run
    try:
        yield
    finally:
        JITFunction.run = compiled


def _argument(x: Any, annotation: Any) -> Any:
    """An argument of a launch, as seen by the kernel."""
    if isinstance(x, Tensor):
        return Pointer.to_first_of(x)
    if hasattr(x, "block_shape"):
        return Descriptor(x)
    is_constant = "constexpr" in str(annotation) or not isinstance(x, (bool, int, float))
    return _constant(x) if is_constant else Value.of(x)


def _constant(x: Any) -> Any:
    """Unwrap a constant, and convert a type to torch's."""
    x = x.value if isinstance(x, gl.constexpr) else x
    if not isinstance(x, tl.dtype):
        return x
    names = {"int1": "bool", "fp16": "float16", "bf16": "bfloat16", "fp32": "float32"}
    return getattr(torch, names.get(x.name, x.name))


class Program(Turns):
    """One program of a launch, with its meaning of the functions of Triton's language."""

    def __init__(
        self, place: tuple[int, ...], grid: tuple[int, ...], chance: random.Random
    ) -> None:
        super().__init__(chance)
        self._place, self._grid = place, grid
        self._functions: dict[Any, Callable[..., Any]] = {}
        self._barriers: dict[int, Barrier] = {}
        self._late_stores: list[tuple[Descriptor, list[int], Value]] = []
        self.states = [State()]

    def run(self, kernel: Any, arguments: dict[str, Any]) -> None:
        self.run_to_the_end(lambda: self._call(kernel)(**arguments), kernel.__name__)
        for descriptor, place, block in self._late_stores:
            descriptor.store(place, block)

    # ---- Python's functions with this program's meaning of what they name

    def _call(self, kernel: Any) -> Callable[..., Any]:
        if kernel not in self._functions:
            fn = kernel.fn
            scope = {name: self._meaning(x) for name, x in fn.__globals__.items()}
            scope |= {
                "range": self.range,
                "min": self.minimum,
                "max": self.maximum,
                "abs": self.abs,
            }
            own = FunctionType(fn.__code__, scope, fn.__name__, fn.__defaults__, fn.__closure__)

            def call(*args: Any, **kwargs: Any) -> Any:
                kwargs = {name: _constant(x) for name, x in kwargs.items()}
                return own(*map(_constant, args), **kwargs)

            self._functions[kernel] = call
        return self._functions[kernel]

    def _meaning(self, x: Any) -> Any:
        if isinstance(x, JITFunction):
            return lambda *args, **kwargs: self._call(x)(*args, **kwargs)
        if isinstance(x, ModuleType) and x.__name__.startswith("triton."):
            return self  # All functions share one namespace.
        if hasattr(x, "__triton_builtin__"):
            return getattr(self, x.__name__)
        return _constant(x)

    def __getattr__(self, name: str) -> Any:
        if name in VOCABULARY:
            return VOCABULARY[name]
        x = getattr(gl, name, getattr(mbarrier, name, None))
        if isinstance(x, tl.dtype):
            return _constant(x)
        if isinstance(x, type):  # A layout.
            return x
        raise NotImplementedError(f"the interpreter does not know `{name}`")

    # ---- The words that touch memory or other partitions

    def program_id(self, axis: int) -> Value:
        return Value.of(self._place[axis] if axis < len(self._place) else 0)

    def num_programs(self, axis: int) -> Value:
        return Value.of(self._grid[axis] if axis < len(self._grid) else 1)

    def load(self, pointer: Any, mask: Any = None, other: Any = None) -> Value:
        self.pause()
        return pointer.load(mask, other)

    def store(self, pointer: Any, value: Any, mask: Any = None) -> None:
        self.pause()
        pointer.store(value, mask)

    def allocate_shared_memory(
        self, element_ty: torch.dtype, shape: Any, layout: Any, value: Value | None = None
    ) -> Shared:
        states = torch.zeros(*shape, dtype=torch.int32)
        shared = Shared(self, poisoned(tuple(shape), element_ty), states, layout)
        if value is not None:
            shared.store(value)
        return shared

    def fence_async_shared(self, cluster: bool = False) -> None:
        self.pause()
        self.turn.fences.append(self.turn.tick()[self.turn])

    def thread_barrier(self) -> None:
        self.pause()

    def warp_specialize(
        self, functions_and_args: Any, worker_num_warps: list[int], worker_num_regs: list[int]
    ) -> Any:
        num_workers = len(functions_and_args) - 1
        if not num_workers == len(worker_num_warps) == len(worker_num_regs):
            sizes = f"of warps {worker_num_warps} and registers {worker_num_regs}"
            raise ValueError(f"{num_workers} partitions beside the first, {sizes}")
        return self.run_beside([partial(work, *args) for work, args in functions_and_args])

    # ---- mbarrier

    def _barrier(self, barrier: Shared) -> Barrier:
        if barrier.data.data_ptr() not in self._barriers:
            raise RaceError(f"the barrier of {line()} was not initialized")
        return self._barriers[barrier.data.data_ptr()]

    def _arrive(self, barrier: Barrier, **what: int) -> None:
        learn(barrier.arrived, self.turn.tick())
        barrier.take(**what, at=line())

    def init(self, barrier: Shared, count: int) -> None:
        self.pause()
        assert barrier.shape == [1], f"a barrier is one number, not {barrier.shape}"
        name = f"barrier {barrier.data.storage_offset()} of {line()}"
        self._barriers[barrier.data.data_ptr()] = Barrier(count, name)

    def expect(self, barrier: Shared, bytes: int, pred: Any = True) -> None:
        self.pause()
        if pred:
            self._arrive(self._barrier(barrier), arrivals=1, bytes=-bytes)

    def arrive(self, barrier: Shared, *, count: int = 1, pred: Any = True) -> None:
        self.pause()
        if pred:
            self._arrive(self._barrier(barrier), arrivals=count)

    def wait(self, barrier: Shared, phase: Any, pred: Any = True, deps: Any = ()) -> None:
        """Wait until the previous phase has the given parity; a new barrier passes for parity 1."""
        if not pred:
            return
        state, parity = self._barrier(barrier), int(phase)
        assert parity in (0, 1), f"a phase is 0 or 1, not {parity}"
        waits_for = f"waits at {line()} for parity {parity} of", state
        self.pause(lambda: state.phase % 2 != parity, *waits_for)
        learn(self.turn.clock, state.clock)

    # ---- The copy engine

    def async_copy_global_to_shared(
        self, tensor_desc: Descriptor, coord: Any, barrier: Shared, result: Shared, pred: Any = True
    ) -> None:
        self.pause()
        if pred:
            place = list(map(int, coord))
            self.copies.append(Copy(tensor_desc, place, self._barrier(barrier), result))

    def async_copy_shared_to_global(self, tensor_desc: Descriptor, coord: Any, src: Shared) -> None:
        self.pause()
        tensor_desc.must_fit(src)
        self.turn.stores.append(Reading("copy", [src]))
        place, block = list(map(int, coord)), Value(src.data.clone())
        self._late_stores.append((tensor_desc, place, block))

    def store_wait(self, pendings: int) -> None:
        """Wait until the copies have read shared memory; they may reach global memory later."""
        self.pause()
        stores = self.turn.stores
        while len(stores) > pendings:
            stores.pop(0).end()

    # ---- The tensor cores

    def warpgroup_mma(
        self, a: Any, b: Shared, acc: Any, *, use_acc: Any = True, is_async: bool = False
    ) -> Any:
        self.pause()
        operands = [x for x in (a, b) if isinstance(x, Shared)]
        if a.dtype != b.dtype or a.dtype.itemsize != 2:
            raise ValueError(f"{a.dtype} times {b.dtype} at {line()}")
        acc = acc.value if isinstance(acc, UnfinishedProduct) else acc
        result = a.data.float() @ b.data.float() + (acc.data if use_acc else 0.0)
        product = UnfinishedProduct(operands, Value(result, acc.layout))
        self.turn.products.append(product)
        return product if is_async else self.warpgroup_mma_wait(0, deps=[product])

    def warpgroup_mma_wait(self, num_outstanding: int = 0, deps: Any = None) -> Any:
        self.pause()
        products = self.turn.products
        while len(products) > num_outstanding:
            products.pop(0).end()
        finished = tuple(x.value if getattr(x, "is_over", False) else x for x in deps)
        return finished[0] if len(finished) == 1 else finished
