"""Shards a model over devices: the heads of each block by tensor parallelism, then all weights by
FSDP2. Sharded weights keep their names, and their shapes in a checkpoint.

Weights are stored and gathered in float32: `bf16-mixed` casts them for each operation, as it does
on one device. Lambda and norms therefore stay in float32, and the results match those of one
device.
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
"""Names of the mesh dimensions, as set by Lightning's `ModelParallelStrategy`."""


def shard(model: nn.Module, mesh: DeviceMesh) -> None:
    """Shard `model` over the devices of `mesh`, in place. Every process must pass equal weights.

    Args:
        model: Model of `diffmm.models`. All weights of another model form one FSDP2 group.
        mesh: Device mesh with the dimensions `data_parallel` and `tensor_parallel`.

    Raises:
        ValueError: If the heads, the feed-forward width or the vocabulary cannot be split evenly
            over the tensor-parallel devices, or the weights have several dtypes.
    """
    blocks = [module for module in model.modules() if isinstance(module, Block)]
    if mesh[TENSOR_PARALLEL].size() > 1:
        split_heads(model, mesh[TENSOR_PARALLEL])
    dtypes = {p.dtype for p in model.parameters() if p.requires_grad}
    if len(dtypes) > 1:
        raise ValueError(
            f"FSDP2 needs weights of one dtype, got {', '.join(sorted(map(str, dtypes)))}: train "
            f"with precision bf16-mixed or 32-true"
        )
    for module in (*blocks, model):
        fully_shard(module, mesh=mesh[DATA_PARALLEL])


def is_sharded(model: nn.Module) -> bool:
    """Whether the model is sharded by `shard`."""
    return isinstance(model, FSDPModule)


def split_heads(model: nn.Module, mesh: DeviceMesh) -> None:
    """Split the heads and the feed-forward of every block, and the vocabulary of text models, over
    the devices of `mesh`.

    Raises:
        ValueError: If the model has no blocks or cannot be split evenly.
    """
    blocks = [module for module in model.modules() if isinstance(module, Block)]
    if not blocks:
        raise ValueError(
            f"tensor parallelism splits the heads of blocks, but {type(model).__name__} has none: "
            f"use fsdp2 or ddp"
        )
    for block in blocks:
        _check_shares(block, mesh.size())
    texts = [module for module in model.modules() if isinstance(module, TextModel)]
    for text in texts:
        _check_share("vocab_size", text.config.vocab_size, mesh.size())
    for block in blocks:
        for attention in _attentions(block):
            parallelize_module(attention, mesh, _plan(attention))
            # The remaining parameters are lambda vectors, which are replicated on every device.
            distribute_module(attention, mesh)
        parallelize_module(block.feed_forward, mesh, _plan(block.feed_forward))
    for text in texts:
        plan: dict[str, ParallelStyle] = {
            "embedding": RowwiseParallel(input_layouts=Replicate()),
            "head": ColwiseParallel(output_layouts=Replicate()),
        }
        parallelize_module(text, mesh, plan)
        if text.config.tie_embeddings:
            text.head.weight = text.embedding.weight


STYLES: dict[Split, Callable[[], ParallelStyle]] = {
    "columns": ColwiseParallel,
    "rows": RowwiseParallel,
    "heads": partial(SequenceParallel, sequence_dim=2, use_local_output=True),
}
"""Parallel style for each value of a layer's `split`. Norms see only a share of the heads."""


def _plan(layer: nn.Module) -> dict[str, ParallelStyle]:
    """Return the parallel style of each child of a layer, as declared by `layer.split`.

    Raises:
        ValueError: If a child with parameters is missing in `layer.split`.
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
    """Return a style with a replicated input: all projections share it, so that their gradients are
    reduced once."""
    return PrepareModuleInput(input_layouts=Replicate(), desired_input_layouts=Replicate())


def _attentions(block: Block) -> list[Attention]:
    """The attention layers of a block."""
    return [module for module in block.modules() if isinstance(module, Attention)]


def _check_shares(block: Block, num_devices: int) -> None:
    for attention in _attentions(block):
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
    """Group tensors by device mesh; plain tensors form their own group."""
    groups: dict[DeviceMesh | None, list[Tensor]] = defaultdict(list)
    for tensor in tensors:
        groups[tensor.device_mesh if isinstance(tensor, DTensor) else None].append(tensor)
    return list(groups.values())


def gradient_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """Return the total norm of all gradients, a plain scalar that is equal on every device."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norms = [nn.utils.get_total_norm(group) for group in by_mesh(gradients)]
    whole = [norm.full_tensor() if isinstance(norm, DTensor) else norm for norm in norms]
    if len(whole) == 1:
        return whole[0]
    return torch.linalg.vector_norm(torch.stack(whole)) if whole else torch.zeros(())


def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float, norm: Tensor) -> None:
    """Scale all gradients, whose total norm is `norm`, to a norm of at most `max_norm`."""
    for group in by_mesh(parameters):
        nn.utils.clip_grads_with_norm_(group, max_norm, norm)
