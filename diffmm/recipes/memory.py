"""An estimate of the memory of a training step.

* **Weights, gradients, optimizer**: 4 bytes each for the weights and their gradients, 8 for AdamW's
  two moments (4 for Muon's momentum), in float32; half of that under a `-true` 16-bit precision.
  Frozen weights have neither gradients nor moments. Under FSDP2 all are sharded over the devices.
  These sizes are exact.
* **Gathered** (FSDP2 only): unsharded weights that a device holds while it computes with them, and
  their gradients before they are reduce-scattered: everything outside the blocks, the weights of
  two blocks (one is gathered while the other is computed) and the gradients of one. With tensor
  parallelism, a device holds its split of them; activations are counted as if they were not split,
  which overestimates them.
* **Activations**: the task's own training loss is computed on tensors without memory
  (`FakeTensorMode`), under the recipe's autocast, and the sizes of the tensors that autograd would
  save for the backward pass are summed, each storage once. Under activation checkpointing, every
  block keeps its input, and only the largest block temporarily keeps more. The gradient of the
  largest saved tensor (the logits, in a language model) is added, in float32 and in half precision:
  1.5 times its size.

The estimate was 0.93 to 1.07 of the measured peak of uncompiled steps on an H100 in bf16-mixed
(models of eight shipped recipes, 4 to 43 GiB). Compiled steps (`compile: true`) took 16 % and 26 %
less than the estimate, because they recompute cheap operations. The CUDA context and fragmentation
are not counted.
"""

import logging
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from diffmm.batch import InputShapes
from diffmm.layers.block import Block
from diffmm.models.backbone import Backbone
from diffmm.training import Task
from diffmm.training.optimizer import is_of_muon, parameter_groups

HALF_PRECISIONS = ("bf16-true", "16-true")


@dataclass(frozen=True)
class Memory:
    """Memory of a training step on one device, in bytes."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    gathered: int = 0

    @property
    def total(self) -> int:
        """The sum of all parts."""
        kept = self.weights + self.gradients + self.optimizer
        return kept + self.activations + self.gathered


def estimate_memory(
    task: LightningModule,
    batch: dict[str, Any],
    *,
    precision: str,
    num_shards: int = 1,
    num_splits: int = 1,
) -> Memory:
    """Estimate the memory of one training step of `task` (see this module).

    Args:
        task: Task on the meta device; its model is converted to fake tensors.
        batch: Shape and dtype of each tensor of a batch, from `fake_shapes`.
        precision: Precision of the trainer.
        num_shards: Number of devices over which weights, gradients and moments are sharded.
        num_splits: Number of devices that share the heads of a block (tensor parallelism).
    """
    size = 2 if precision in HALF_PRECISIONS else 4
    num_weights = sum(p.numel() for p in task.parameters())
    num_trained = sum(p.numel() for p in task.parameters() if p.requires_grad)
    num_moments = 2 * num_trained - sum(p.numel() for p in moved_by_muon(task))
    num_buffers = sum(b.numel() * b.element_size() for b in task.buffers())
    return Memory(
        weights=size * num_weights // num_shards + num_buffers,
        gradients=size * num_trained // num_shards,
        optimizer=size * num_moments // num_shards,
        activations=saved_bytes(task, batch, precision),
        gathered=size * num_gathered(task) // num_splits if num_shards > 1 else 0,
    )


def moved_by_muon(task: LightningModule) -> list[nn.Parameter]:
    """Parameters with a momentum only, instead of two moments."""
    config = getattr(task, "optimizer_config", None)
    if config is None or config.kind != "muon":
        return []
    groups = parameter_groups(task.model, config)  # type: ignore[arg-type]
    return [p for group in groups if is_of_muon(group) for p in group["params"]]


def num_gathered(task: LightningModule) -> int:
    """Number of weights and gradients that FSDP2 holds unsharded at the same time."""
    blocks = [module for module in task.modules() if isinstance(module, Block)]
    sizes = [sum(p.numel() for p in block.parameters()) for block in blocks]
    outside = sum(p.numel() for p in task.parameters()) - sum(sizes)
    return 2 * outside + 3 * max(sizes, default=0)


def saved_bytes(task: LightningModule, batch: dict[str, Any], precision: str) -> int:
    """Size of the tensors that autograd saves for one training loss, in bytes."""
    floating = torch.bfloat16 if precision in HALF_PRECISIONS else torch.float32
    task.to(floating)
    with FakeTensorMode(allow_non_fake_inputs=True), _LongestTexts():
        empty_weights(task)
        task.trainer = plain_trainer()
        tensors = {
            name: torch.zeros(shape, dtype=floating if dtype.is_floating_point else dtype)
            for name, (shape, dtype) in batch.items()
        }
        meter = _Meter(task)
        with meter, torch.autocast("cpu", torch.bfloat16, enabled="mixed" in precision):
            task.training_loss(tensors, 0)  # type: ignore[operator]
    return meter.total


class _LongestTexts(TorchDispatchMode):
    """Gives the results of the CTC loss, whose sizes follow from the lengths of the texts: those of
    texts as long as the batch has room for."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is not torch.ops.aten._ctc_loss.Tensor:
            return func(*args, **(kwargs or {}))
        log_probs, targets = args[:2]
        times, batch, _ = log_probs.shape
        states = 2 * targets.shape[1] + 1  # each id, and a blank before, between and after them
        return log_probs.new_empty(batch), log_probs.new_empty(batch, times, states)


def empty_weights(task: nn.Module) -> None:
    """Replace every weight and buffer by an empty one, those that modules share by the same one.
    In a fake mode, `to_empty` fails for shared modules, and unties tied heads if it is called for
    one module after the other."""
    weights = {id(tensor): tensor for tensor in (*task.parameters(), *task.buffers())}
    empty = {
        number: nn.Parameter(torch.empty_like(tensor, device="cpu"), tensor.requires_grad)
        if isinstance(tensor, nn.Parameter)
        else torch.empty_like(tensor, device="cpu")
        for number, tensor in weights.items()
    }
    for module in task.modules():
        own = (module.named_parameters, module.named_buffers)
        for name, tensor in [pair for each in own for pair in each(recurse=False)]:
            setattr(module, name, empty[id(tensor)])


def plain_trainer() -> Trainer:
    """A trainer with default settings that prints nothing."""
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        return Trainer(
            accelerator="cpu",
            devices=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
    finally:
        logger.setLevel(level)


class _Meter(torch.autograd.graph.saved_tensors_hooks):
    """Sums the sizes of saved tensors per block."""

    def __init__(self, task: LightningModule) -> None:
        super().__init__(self._pack, lambda tensor: tensor)
        self._weights = {p.untyped_storage()._cdata for p in task.parameters()}
        self._seen: dict[int, Tensor] = {}
        self._outside = 0
        self._largest = 0
        self._inputs = 0
        self._blocks: list[int] = []
        self._inside = False
        for backbone in (m for m in task.modules() if isinstance(m, Backbone)):
            for block in backbone.blocks:
                self._watch(block, backbone.activation_checkpointing)
            # Checkpointing is disabled here and modeled by this class instead.
            backbone.activation_checkpointing = False

    @property
    def total(self) -> int:
        """Peak number of bytes held in the backward pass."""
        kept = self._outside + self._inputs + max(self._blocks, default=0)
        return kept + 3 * self._largest // 2

    def _watch(self, block: nn.Module, is_recomputed: bool) -> None:
        if not is_recomputed:
            return

        def enter(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            self._inside = True
            self._inputs += args[0].numel() * args[0].element_size()
            self._blocks.append(0)

        def leave(*_: Any) -> None:
            self._inside = False

        block.register_forward_pre_hook(enter)
        block.register_forward_hook(leave)

    def _pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._weights and storage._cdata not in self._seen:
            self._seen[storage._cdata] = tensor  # keeps it alive, so that its address is not reused
            self._largest = max(self._largest, storage.nbytes())
            if self._inside:
                self._blocks[-1] += storage.nbytes()
            else:
                self._outside += storage.nbytes()
        return tensor


def fake_shapes(task: Any, data: Any) -> InputShapes | None:
    """Shapes and dtypes of a training batch; `None` for unknown kinds of models or data."""
    config: Any = getattr(getattr(task, "model", None), "config", None)
    if not hasattr(config, "input_shapes"):  # of a masked autoencoder
        config = getattr(config, "encoder", None)
    size = getattr(data, "batch_size", None)
    if size is None or not hasattr(config, "input_shapes") or not isinstance(task, Task):
        return None
    lengths = (getattr(data, name, None) for name in ("sequence_length", "clip_samples"))
    # Data with images and sounds in a batch say how many of it are sounds.
    mixed = {"num_sounds": data.num_sounds} if hasattr(data, "num_sounds") else {}
    inputs: InputShapes = config.input_shapes(size, next(filter(None, lengths), None), **mixed)
    shapes = {"index": ((size,), torch.int64), **inputs, **task.target_shapes(inputs)}
    longest = getattr(getattr(data, "reader", None), "max_tokens", None)
    if "tokens" in shapes and "tokens" not in inputs and longest is not None:
        shapes["tokens"] = (size, longest), torch.int64
    if getattr(data, "packing", None) == "packed" and data.document_mask:
        shapes["document_ids"] = inputs["tokens"]
    return shapes
