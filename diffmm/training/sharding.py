"""Spread a model over many devices: each block's heads (tensor parallelism), then all that is left
(FSDP2). What is split keeps its name, and its shape in a checkpoint.

Weights stay in float32 and are gathered so: `bf16-mixed` casts them where it computes, as it does
on one device. Lambda and norms thus never leave float32, and the numbers are those of one device.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Replicate, distribute_module
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from diffmm.layers.attention import Attention
from diffmm.layers.block import Block
from diffmm.layers.registry import Split
from diffmm.models.text import TextModel

DATA_PARALLEL, TENSOR_PARALLEL = "data_parallel", "tensor_parallel"
"""Names of the mesh's axes, which Lightning's `ModelParallelStrategy` gives them."""


def shard(model: nn.Module, mesh: DeviceMesh) -> None:
    """Spread `model` over the devices of `mesh`, in place; each device passes the same weights.

    Args:
        model: any of `diffmm.models`; of other models all weights are one group of FSDP2.
        mesh: with the axes `data_parallel` and `tensor_parallel`.

    Raises:
        ValueError: if the heads, the feed-forward's width or the vocabulary cannot be split evenly
            over the tensor-parallel devices, or if the weights are of several types.
    """
    blocks = [module for module in model.modules() if isinstance(module, Block)]
    if mesh[TENSOR_PARALLEL].size() > 1:
        split_heads(model, mesh[TENSOR_PARALLEL])
    dtypes = {p.dtype for p in model.parameters() if p.requires_grad}
    if len(dtypes) > 1:
        raise ValueError(
            f"FSDP2 needs weights of one type, got {', '.join(sorted(map(str, dtypes)))}: train "
            f"with precision bf16-mixed or 32-true"
        )
    for module in (*blocks, model):
        fully_shard(module, mesh=mesh[DATA_PARALLEL])


def is_sharded(model: nn.Module) -> bool:
    """Whether `shard` has been here."""
    return isinstance(model, FSDPModule)


def split_heads(model: nn.Module, mesh: DeviceMesh) -> None:
    """Give each device of `mesh` its share of every block's heads and feed-forward, and of a text
    model's vocabulary.

    Raises:
        ValueError: as `shard` does.
    """
    blocks = [module for module in model.modules() if isinstance(module, Block)]
    if not blocks:
        raise ValueError(
            f"tensor parallelism splits the heads of blocks, and {type(model).__name__} has none: "
            f"use fsdp2 or ddp"
        )
    for block in blocks:
        _check_shares(block, mesh.size())
    if isinstance(model, TextModel):
        _check_share("vocab_size", model.config.vocab_size, mesh.size())
    for block in blocks:
        assert isinstance(block.attention, Attention)
        parallelize_module(block.attention, mesh, _plan(block.attention))
        # What is left are lambda vectors, of which every device needs all.
        distribute_module(block.attention, mesh)
        parallelize_module(block.feed_forward, mesh, _plan(block.feed_forward))
    if isinstance(model, TextModel):
        plan: dict[str, ParallelStyle] = {
            "embedding": RowwiseParallel(input_layouts=Replicate()),
            "head": ColwiseParallel(output_layouts=Replicate()),
        }
        parallelize_module(model, mesh, plan)
        if model.config.tie_embeddings:
            model.head.weight = model.embedding.weight


STYLES: dict[Split, Callable[[], ParallelStyle]] = {
    "columns": ColwiseParallel,
    "rows": RowwiseParallel,
    "heads": partial(SequenceParallel, sequence_dim=2, use_local_output=True),
}
"""What a layer's `split` means. Norms see a share of the heads."""


def _plan(layer: nn.Module) -> dict[str, ParallelStyle]:
    """How a layer's children are divided, by what it declares.

    Raises:
        ValueError: If it declares nothing of one that has parameters.
    """
    split: dict[str, Split] = getattr(layer, "split", {})
    children = [name for name, child in layer.named_children() if list(child.parameters())]
    for name in children:
        if name not in split:
            kind = type(layer).__name__
            raise ValueError(
                f"{kind} does not say how tensor parallelism splits its {name}: add it to "
                f"{kind}.split, or use fsdp2 or ddp"
            )
    return {"": _whole_input(), **{name: STYLES[split[name]]() for name in children}}


def _whole_input() -> ParallelStyle:
    """Every projection reads one input, so that the gradients of all are summed up once."""
    return PrepareModuleInput(input_layouts=Replicate(), desired_input_layouts=Replicate())


def _check_shares(block: Block, num_devices: int) -> None:
    attention = block.attention
    assert isinstance(attention, Attention)
    for name, count in attention.shares.items():
        _check_share(f"{type(attention).__name__}'s {name}", count, num_devices)
    down_proj: Any = block.feed_forward.down_proj
    _check_share("feed_forward_width", down_proj.in_features, num_devices)


def _check_share(name: str, count: int, num_devices: int) -> None:
    if count % num_devices:
        raise ValueError(
            f"{name} must be a multiple of tensor_parallel_size to be split, got {count} and "
            f"{num_devices}: choose another tensor_parallel_size, or change it"
        )


def by_mesh(tensors: Iterable[Tensor]) -> list[list[Tensor]]:
    """Tensors that live on the same devices together; plain ones are a group of their own."""
    groups: dict[DeviceMesh | None, list[Tensor]] = defaultdict(list)
    for tensor in tensors:
        groups[tensor.device_mesh if isinstance(tensor, DTensor) else None].append(tensor)
    return list(groups.values())


def gradient_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """The norm of all gradients as one vector, a plain scalar, the same on every device."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norms = [nn.utils.get_total_norm(group) for group in by_mesh(gradients)]
    whole = [norm.full_tensor() if isinstance(norm, DTensor) else norm for norm in norms]
    if len(whole) == 1:
        return whole[0]
    return torch.linalg.vector_norm(torch.stack(whole)) if whole else torch.zeros(())


def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float, norm: Tensor) -> None:
    """Scale all gradients so that their norm, now `norm`, is at most `max_norm`."""
    for group in by_mesh(parameters):
        nn.utils.clip_grads_with_norm_(group, max_norm, norm)
