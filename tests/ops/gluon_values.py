"""Values in registers, in the interpreter of Gluon: numbers, tiles and pointers."""

import functools
import math
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl


def poisoned(shape: Any, dtype: torch.dtype) -> Tensor:
    """The value of uninitialized memory."""
    if dtype == torch.bool:
        return torch.ones(shape, dtype=dtype)
    value = math.nan if dtype.is_floating_point else torch.iinfo(dtype).min
    return torch.full(shape, value, dtype=dtype)


def _own_type(x: Any) -> torch.dtype:
    if isinstance(x, Value):
        return x.dtype
    if isinstance(x, float):
        return torch.float32
    if isinstance(x, bool):
        return torch.bool
    return torch.int32 if -(2**31) <= x < 2**31 else torch.int64


def _kind(dtype: torch.dtype) -> int:
    return 2 if dtype.is_floating_point else int(dtype != torch.bool)


def _common_type(*operands: Any) -> torch.dtype:
    """The dtype in which Triton computes: a constant in the kernel's code takes the dtype of tiles
    of the same kind."""
    types = [_own_type(x) for x in operands if isinstance(x, Value)]
    common = functools.reduce(torch.promote_types, types) if types else torch.bool
    for x in operands:
        if isinstance(x, Value):
            continue
        if not types or _kind(_own_type(x)) > _kind(common):
            common = torch.promote_types(common, _own_type(x))
        elif _kind(common) == 1 and not torch.iinfo(common).min <= x <= torch.iinfo(common).max:
            raise ValueError(f"{x} is out of range for {common}")
    return common


def elementwise(function: Callable[..., Tensor], *operands: Any) -> "Value":
    """Apply `function` to operands with a common type, in the layout of the largest."""
    dtype = _common_type(*operands)
    values = [Value.of(operand) for operand in operands]
    widest = max(values, key=lambda value: value.data.dim())
    return Value(function(*(value.data.to(dtype) for value in values)), widest.layout)


class Value:
    """A tile in registers, or a single number, with a layout that has no effect.

    Integer division rounds towards zero, as in C.
    """

    def __init__(self, data: Tensor, layout: Any = None) -> None:
        self.data, self.layout = data, layout

    @classmethod
    def of(cls, x: Any) -> "Value":
        if isinstance(x, Value):
            return x
        if not isinstance(x, (bool, int, float)):
            raise TypeError(f"a number or a tile is needed, not {type(x).__name__}")
        return cls(torch.tensor(x, dtype=_own_type(x)))

    type = tensor_type = property(lambda self: self)  # `x.type.layout`, as of a real tensor
    dtype = property(lambda self: self.data.dtype)
    shape = property(lambda self: list(self.data.shape))
    T = property(lambda self: Value(self.data.mT))

    def to(self, dtype: torch.dtype) -> "Value":
        return Value(self.data.to(dtype), self.layout)

    def reshape(self, *shape: Any) -> "Value":
        return Value(self.data.reshape(*shape))

    def __getitem__(self, index: Any) -> "Value":
        return Value(self.data[index], getattr(self.layout, "parent", None))

    def __bool__(self) -> bool:
        return bool(self.data.item())

    def __index__(self) -> int:
        return operator.index(self.data.item())

    def __neg__(self) -> "Value":
        return Value(-self.data, self.layout)

    def __invert__(self) -> "Value":
        return Value(~self.data, self.layout)

    __hash__ = None


def _divide(x: Tensor, y: Tensor) -> Tensor:
    return x.float() / y.float()  # Also if both have 16 bits.


_OPERATORS = {
    "add": torch.add, "sub": torch.sub, "mul": torch.mul, "truediv": _divide,
    "floordiv": functools.partial(torch.div, rounding_mode="trunc"), "mod": torch.fmod,
    "and": torch.bitwise_and, "or": torch.bitwise_or, "xor": torch.bitwise_xor,
    "lshift": torch.bitwise_left_shift, "rshift": torch.bitwise_right_shift,
    "lt": torch.lt, "le": torch.le, "gt": torch.gt, "ge": torch.ge, "eq": torch.eq, "ne": torch.ne,
}  # fmt: skip


def _method(function: Callable[..., Tensor], reflected: bool) -> Callable[[Value, Any], Value]:
    def method(self: Value, other: Any) -> Value:
        if not isinstance(other, (Value, bool, int, float)):
            return NotImplemented
        return elementwise(function, *((other, self) if reflected else (self, other)))

    return method


for _name, _function in _OPERATORS.items():
    setattr(Value, f"__{_name}__", _method(_function, reflected=False))
    setattr(Value, f"__r{_name}__", _method(_function, reflected=True))


class Pointer:
    """Positions in a tensor's memory, with bounds checks."""

    def __init__(self, memory: Tensor, place: Value) -> None:
        self.memory, self.place = memory, place

    @classmethod
    def to_first_of(cls, tensor: Tensor) -> "Pointer":
        count = tensor.untyped_storage().nbytes() // tensor.element_size()
        memory = tensor.detach().as_strided((count,), (1,), 0)
        return cls(memory, Value(torch.tensor(tensor.storage_offset())))

    dtype = type = property(lambda self: self)
    element_ty = property(lambda self: self.memory.dtype)

    def __add__(self, steps: Any) -> "Pointer":
        return Pointer(self.memory, self.place + Value.of(steps).to(torch.int64))

    __radd__ = __add__

    def __sub__(self, steps: Any) -> "Pointer":
        return self + -Value.of(steps)

    def __getitem__(self, index: Any) -> "Pointer":
        return Pointer(self.memory, self.place[index])

    def _wanted(self, mask: Any) -> tuple[Tensor, Tensor]:
        mask = Value.of(True if mask is None else mask)
        place, wanted = torch.broadcast_tensors(self.place.data, mask.data)
        if (wanted & ((place < 0) | (place >= len(self.memory)))).any():
            raise IndexError(f"a pointer leaves its tensor of {len(self.memory)} elements")
        return place, wanted

    def load(self, mask: Any, other: Any) -> Value:
        place, wanted = self._wanted(mask)
        data = poisoned(place.shape, self.memory.dtype)
        if other is not None:
            data[:] = Value.of(other).data
        data[wanted] = self.memory[place[wanted]]
        return Value(data, self.place.layout)

    def store(self, value: Any, mask: Any) -> None:
        place, wanted = self._wanted(mask)
        data = Value.of(value).data.to(self.memory.dtype).expand(place.shape)
        self.memory[place[wanted]] = data[wanted]


def _reduce(function: Callable[..., Tensor]) -> Callable[..., Value]:
    def reduce(x: Value, axis: int | None = None) -> Value:
        dtype = torch.int32 if x.dtype == torch.bool else x.dtype
        if axis is None:
            return Value(function(x.data.to(dtype).flatten(), 0).to(dtype))
        layout = None if x.layout is None else gl.SliceLayout(axis, x.layout)
        return Value(function(x.data.to(dtype), axis).to(dtype), layout)

    return reduce


def _full(shape: Any, value: Any, dtype: torch.dtype, layout: Any = None) -> Value:
    return Value(torch.full(tuple(shape), Value.of(value).data.item(), dtype=dtype), layout)


def _where(condition: Any, x: Any, y: Any) -> Value:
    result = elementwise(functools.partial(torch.where, Value.of(condition).data), x, y)
    widest = max(map(Value.of, (condition, x, y)), key=lambda value: value.data.dim())
    return Value(result.data, widest.layout)


def _range(*bounds: Any) -> Any:
    return (Value.of(step) for step in range(*map(operator.index, bounds)))


def _dot(a: Value, b: Value, acc: Any = None, *, input_precision: str | None = None) -> Value:
    product = Value(a.data.float() @ b.data.float())
    return product if acc is None else product + acc


def _on_floats(function: Callable[[Tensor], Tensor]) -> Callable[[Any], Value]:
    return lambda x: elementwise(function, Value.of(x))


# Unlike on a GPU, `maximum` and `minimum` propagate NaN, to reveal uninitialized memory.
VOCABULARY: dict[str, Any] = {
    "constexpr": lambda x: x,
    "range": _range,
    "static_range": range,
    "arange": lambda start, end, layout=None: Value(
        torch.arange(start, end, dtype=torch.int32), layout
    ),
    "full": _full,
    "zeros": lambda shape, dtype, layout=None: _full(shape, 0, dtype, layout),
    "zeros_like": lambda x: Value(torch.zeros_like(x.data), x.layout),
    "convert_layout": lambda x, layout, assert_trivial=False: Value(x.data, layout),
    "where": _where,
    "maximum": functools.partial(elementwise, torch.maximum),
    "minimum": functools.partial(elementwise, torch.minimum),
    "cdiv": lambda x, y: (x + y - 1) // y,
    "max": _reduce(torch.amax),
    "min": _reduce(torch.amin),
    "sum": _reduce(torch.sum),
    "dot": _dot,
    "inline_asm_elementwise": lambda asm, constraints, args, dtype, is_pure, pack: args[0],
    **{name: _on_floats(getattr(torch, name)) for name in ("abs", "exp2", "log2")},
}  # fmt: skip
