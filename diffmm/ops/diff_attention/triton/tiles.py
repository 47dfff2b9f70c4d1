"""Block sizes of the kernels, and descriptors of the tensors they load.

There is no autotuning: the same call has the same block sizes on every GPU of a kind, from the
first step.
"""

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

# Arguments whose values do not need specialized kernels.
UNSPECIALIZED = [
    "N", "M", "H", "G", "heads_per_group", "parts", "window", "lam_b", "lam_n", "lam_h",
]  # fmt: skip

# Maximum number of queries per tile; per-query arrays are padded to a multiple of it.
MAX_BLOCK = 128


@dataclass(frozen=True)
class GPU:
    """The GPU properties that block sizes depend on.

    Args:
        capability: Compute capability, major and minor.
        num_multiprocessors: Number of multiprocessors.
    """

    capability: tuple[int, int]
    num_multiprocessors: int


@cache
def _gpu(index: int) -> GPU:
    found = torch.cuda.get_device_properties(index)
    return GPU((found.major, found.minor), found.multi_processor_count)


def gpu_of(tensor: Tensor) -> GPU:
    """The GPU of a tensor; a small Hopper GPU for CPU tensors, whose kernels are interpreted."""
    return _gpu(tensor.device.index) if tensor.is_cuda else GPU((9, 0), 2)


def is_traced(tensor: Tensor) -> bool:
    """Whether `torch.compile` is tracing. Launches then need `torch.library.wrap_triton`, which
    would only cost time otherwise."""
    return type(tensor) not in (Tensor, torch.nn.Parameter)


@dataclass(frozen=True)
class Tile:
    """A tile of `block_n` queries by `block_m` keys.

    Args:
        block_n: Queries per tile.
        block_m: Keys per tile.
        num_warps: Warps per program.
        num_stages: Number of pipeline stages of the loads.
        split: Whether the forward kernel computes the maps in two launches, for values too wide
            for two accumulators.
        one_map_registers: Registers per thread that the forward kernel of one map may have with a
            window or documents; None for as many as the compiler likes.
    """

    block_n: int
    block_m: int
    num_warps: int
    num_stages: int
    split: bool = False
    one_map_registers: int | None = None


@dataclass(frozen=True)
class Tiles:
    """The tiles of the kernels that loop over a sequence.

    Args:
        forward: Tile of the forward kernel.
        key_grad: Tile of the kernel for the gradients of keys and values.
        query_grad: Tile of the kernel for the gradient of queries.
    """

    forward: Tile
    key_grad: Tile
    query_grad: Tile


def tiles_for(dtype: torch.dtype, D: int, E: int, capability: tuple[int, int]) -> Tiles:
    """The tiles for head dimension `D`, value dimension `E` and a GPU's compute capability.

    Those for Hopper are the best of `python -m benchmarks.attention_tiles`; if shapes of equal
    widths disagree, those with the smallest product of times. The others fit every older GPU.
    """
    if dtype == torch.float32:  # No tensor cores: small tiles, or compiling takes minutes.
        tile = Tile(16, 16, 4, 1)
        return Tiles(tile, tile, tile)
    D, E = pad(D), pad(E)
    if capability[0] != 9:  # Ampere and Ada: 99 KiB of shared memory on the smaller ones.
        if D > 64 or E > 128:
            small = Tile(32, 32, 4, 1)
            return Tiles(Tile(64, 32, 4, 2, split=E > 128), key_grad=small, query_grad=small)
        return Tiles(Tile(64, 64, 4, 2), key_grad=Tile(32, 64, 4, 1), query_grad=Tile(64, 32, 4, 1))
    if E > 128:
        return Tiles(
            Tile(128, 64, 8, 3, split=True),
            key_grad=Tile(64, 64, 8, 2),
            query_grad=Tile(128, 32, 8, 2),
        )
    if D > 64:
        return Tiles(Tile(64, 64, 4, 2), key_grad=Tile(32, 64, 4, 2), query_grad=Tile(64, 32, 4, 3))
    # A third program per multiprocessor, which the loops of narrow values need without spilling.
    registers = 168 if E <= 64 else None
    return Tiles(
        Tile(64, 64, 4, 3, one_map_registers=registers),
        key_grad=Tile(32, 64, 4, 2),
        query_grad=Tile(64, 64, 4, 2),
    )


def cdiv(total: int, part: int) -> int:
    """`total / part`, rounded up. On the host, Triton's own `cdiv` and `next_power_of_2` take as
    long as a small operator."""
    return -(-total // part)


def power_of_2(number: int) -> int:
    """The smallest power of two that is at least `number`."""
    return 1 << (number - 1).bit_length()


def pad(width: int) -> int:
    """The smallest power of two that is at least `width` and 16, as required for tile sizes."""
    return max(16, power_of_2(width))


def precision(dtype: torch.dtype) -> str:
    """Input precision of matrix products: full precision for float32 inputs."""
    return "ieee" if dtype == torch.float32 else "tf32"


def strides_of(lam: Tensor | None) -> tuple[int, ...]:
    """The strides of lambda, `[B, N, H]`; zeros for softmax attention, which has none."""
    return (0, 0, 0) if lam is None else lam.stride()


def describable(tensor: Tensor) -> Tensor:
    """`tensor` itself if Hopper's tensor memory accelerator (TMA) can address it, otherwise a
    contiguous copy."""
    item = tensor.element_size()
    if tensor.is_contiguous() and tensor.data_ptr() % 16 == tensor.shape[-1] * item % 16 == 0:
        return tensor
    strides = [
        stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if size > 1
    ]
    fits = (
        tensor.data_ptr() % 16 == 0
        and (tensor.shape[-1] == 1 or tensor.stride(-1) == 1)
        and all(stride > 0 for stride in strides)
        and all(stride * item % 16 == 0 for stride in strides[:-1])
    )
    return tensor if fits else tensor.clone(memory_format=torch.contiguous_format)


def describe(tensor: Tensor, block: list[int]) -> TensorDescriptor:
    """A descriptor that loads `block` and reads zeros beyond the ends of `tensor`."""
    # The stride of an axis of size one is arbitrary, but TMA requires a multiple of 16 bytes.
    width = tensor.shape[-1]
    strides = [
        stride if size > 1 else width
        for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
    ]
    return TensorDescriptor(tensor, list(tensor.shape), [*strides[:-1], 1], block)
