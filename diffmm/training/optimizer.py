"""AdamW or Muon, with parameter groups for weight decay and learning rates."""

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim import AdamW, Optimizer

from diffmm.checks import Settings, check_choice
from diffmm.models.parameters import LAMBDA, block_matrices, decaying, layer_of
from diffmm.training.muon import MuonAdamW

LARGEST_RATE = 1000.0
"""Upper limit of learning rates and weight decay. AdamW changes a weight by about its learning rate
per step, so that a larger value is certainly a mistake."""

MOMENTUM = 0.95
"""Muon's default."""


@dataclass(frozen=True)
class OptimizerConfig(Settings):
    """AdamW (Loshchilov and Hutter 2019) or Muon (Jordan et al. 2024), and parameter groups.

    With `kind="muon"`, Muon trains the weights of the linear layers inside the blocks, and AdamW
    everything else: embeddings, head, norms, biases, positions, convolutions, lambda vectors and
    v2's `lambda_proj`. Muon's steps are scaled to the size of AdamW's (Liu et al. 2025), so that
    `learning_rate` and `weight_decay` of an AdamW run are a good start for both. Muon
    orthogonalizes whole matrices: it trains on one device or under `ddp`, but not with sharded
    weights.

    Attributes:
        learning_rate: Peak learning rate, which the schedule scales.
        weight_decay: Weight decay of the weights of linear and convolution layers. It is not
            applied to norms, biases, embeddings (tied to the head or not), positions, class,
            register and mask tokens, logit scales, layer scales, lambda vectors or v2's
            `lambda_proj`.
        betas: Decay rates of the two moment estimates, each in [0, 1).
        eps: Constant added to the square root of the second moment. Weights in float16 (`16-true`)
            need at least 2.5e-4, because the second moment of a smaller gradient underflows to 0.
        lambda_learning_rate: Peak learning rate of the parameters of lambda (`lambda_*`);
            `learning_rate` by default.
        layer_decay: Factor on the learning rate from each layer to the one below, in (0, 1] (Clark
            et al. 2020; Bao et al. 2022). With `depth` blocks, block `i` has
            `layer_decay ** (depth - i)` times the peak learning rate, all layers before the blocks
            (including an embedding that is tied to the head) `layer_decay ** (depth + 1)` times,
            and the final norm and the head the peak itself. None by default.
        kind: "adamw", or "muon" for Muon on the matrices of the blocks and AdamW on the rest.
        muon_learning_rate: Peak learning rate of Muon; `learning_rate` by default. Only for "muon".
        momentum: Decay rate of Muon's momentum, in [0, 1); 0.95 by default. Only for "muon".

    Raises:
        ValueError: If a field is invalid; the message names the field and the value.
    """

    learning_rate: float
    weight_decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    lambda_learning_rate: float | None = None
    layer_decay: float | None = None
    kind: Literal["adamw", "muon"] = "adamw"
    muon_learning_rate: float | None = None
    momentum: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.eps <= 0.0:
            raise ValueError(f"eps must be positive, got {self.eps}")
        check_choice("kind", self.kind, ("adamw", "muon"))
        for name in ("muon_learning_rate", "momentum"):
            if self.kind != "muon" and getattr(self, name) is not None:
                raise ValueError(
                    f"{name}={getattr(self, name)} is only for kind='muon', got "
                    f"kind={self.kind!r}: drop {name}, or choose kind='muon'"
                )
        for name in ("learning_rate", "lambda_learning_rate", "muon_learning_rate"):
            value = getattr(self, name)
            if value is not None and not 0.0 < value <= LARGEST_RATE:
                raise ValueError(
                    f"{name} must be positive and at most {LARGEST_RATE:g}, got {value}"
                )
        if not 0.0 <= self.weight_decay <= LARGEST_RATE:
            raise ValueError(
                f"weight_decay must be in [0, {LARGEST_RATE:g}], got {self.weight_decay}"
            )
        if not all(0.0 <= beta < 1.0 for beta in self.betas):
            raise ValueError(f"betas must be in [0, 1), got {self.betas}")
        if self.momentum is not None and not 0.0 <= self.momentum < 1.0:
            raise ValueError(f"momentum must be in [0, 1), got {self.momentum}")
        if self.layer_decay is not None and not 0.0 < self.layer_decay <= 1.0:
            raise ValueError(f"layer_decay must be in (0, 1], got {self.layer_decay}")


def make_optimizer(
    model: nn.Module, config: OptimizerConfig, *, allow_fused: bool = True
) -> Optimizer:
    """Return AdamW, or Muon with AdamW, over `parameter_groups(model, config)`.

    Args:
        model: Model whose trainable parameters are optimized.
        config: Optimizer settings.
        allow_fused: Whether to use AdamW's fused kernel if all parameters are on a CPU or CUDA
            device, which also skips steps without waiting for the device (see `NonFiniteGuard`). A
            gradient scaler (float16) cannot clip gradients with the fused kernel.

    Raises:
        ValueError: If `parameter_groups` raises it, `eps` is too small for the weights' dtype, or
            the weights are sharded and the kind is "muon".
    """
    groups = parameter_groups(model, config)
    for group in groups:
        for parameter in group["params"]:
            check_eps(config.eps, parameter.dtype)
    devices = {p.device.type for group in groups for p in group["params"]}
    fused = allow_fused and devices <= {"cpu", "cuda"}
    if config.kind == "adamw":
        return AdamW(
            groups,
            lr=config.learning_rate,
            betas=config.betas,
            eps=config.eps,
            weight_decay=config.weight_decay,
            fused=fused or None,
        )
    if any(isinstance(p, DTensor) for group in groups for p in group["params"]):
        raise ValueError(
            "kind='muon' orthogonalizes whole matrices, which fsdp2 and tensor parallelism shard: "
            "train with strategy ddp, or with kind='adamw'"
        )
    return MuonAdamW(
        [group for group in groups if is_of_muon(group)],
        [group for group in groups if not is_of_muon(group)],
        momentum=MOMENTUM if config.momentum is None else config.momentum,
        betas=config.betas,
        eps=config.eps,
        fused=fused,
    )


def is_of_muon(group: dict[str, Any]) -> bool:
    """Whether Muon trains the parameters of a group of `parameter_groups`."""
    return group["name"].startswith("muon")


def check_kind(saved: Any, config: OptimizerConfig) -> None:
    """Check that a run is resumed with the kind of optimizer that it was saved with.

    Args:
        saved: Description of the task in the checkpoint; None if it has none.
        config: Settings of the resumed run.

    Raises:
        ValueError: If the kinds differ.
    """
    optimizer = ((saved or {}).get("init_args") or {}).get("optimizer") or {}
    kind = optimizer.get("kind", "adamw")
    if optimizer and kind != config.kind:
        raise ValueError(
            f"the checkpoint was saved with kind={kind!r}, which is now {config.kind!r}: resume "
            f"with kind={kind!r}, or start a new run from its weights (`diffmm finetune`)"
        )


def check_eps(eps: float, dtype: torch.dtype) -> None:
    """Check that `eps` is large enough for weights of this dtype.

    The second moment of a gradient below the square root of the dtype's smallest number underflows
    to 0. Its step is then the gradient divided by `eps`, which must not exceed that of larger
    gradients.

    Raises:
        ValueError: If `eps` is too small; the message names the smallest valid value.
    """
    least = math.sqrt(torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps)
    if eps < least:
        raise ValueError(
            f"eps={eps:g} is too small for weights in {str(dtype).removeprefix('torch.')}, where "
            f"squares of gradients below {least:.3g} are 0: give the optimizer an eps of at least "
            f"{1.02 * least:.2g}, or train with precision 16-mixed or bf16-true"
        )


def parameter_groups(model: nn.Module, config: OptimizerConfig) -> list[dict[str, Any]]:
    """Group the trainable parameters of `model` by weight decay and learning rate.

    Returns:
        One dict per group for a torch optimizer, with `params`, `lr`, `weight_decay` and a `name`:
        `"muon"`, `"decay"`, `"no_decay"` or `"lambda"`, with a suffix such as `"/layer_03"` if
        `layer_decay` is set.

    Raises:
        ValueError: If no parameter is trainable, `layer_decay` is set for a model without blocks
            in `model.backbone`, or the kind is "muon" and no matrix inside a block is trainable.
    """
    decay = set(decaying(model))
    matrices = set(block_matrices(model)) if config.kind == "muon" else set()
    num_blocks = 0 if config.layer_decay is None else _num_blocks(model)
    groups: dict[str, dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        is_lambda = LAMBDA in name
        kind = "lambda" if is_lambda else "decay" if name in decay else "no_decay"
        rate = config.learning_rate
        if is_lambda and config.lambda_learning_rate is not None:
            rate = config.lambda_learning_rate
        if name in matrices:
            kind, rate = "muon", config.muon_learning_rate or rate
        if config.layer_decay is not None:
            layer = layer_of(name, num_blocks)
            rate *= config.layer_decay ** (num_blocks + 1 - layer)
            kind = f"{kind}/layer_{layer:02d}"
        weight_decay = config.weight_decay if kind.startswith(("decay", "muon")) else 0.0
        group = {"params": [], "lr": rate, "weight_decay": weight_decay, "name": kind}
        groups.setdefault(kind, group)["params"].append(parameter)
    if not groups:
        raise ValueError(f"{type(model).__name__} has no trainable parameters: all are frozen")
    if config.kind == "muon" and not any(map(is_of_muon, groups.values())):
        raise ValueError(
            f"kind='muon' trains the linear layers inside blocks, and {type(model).__name__} has "
            f"none{' that is trainable' if matrices else ''}: use kind='adamw'"
        )
    return list(groups.values())


def _num_blocks(model: nn.Module) -> int:
    blocks = getattr(getattr(model, "backbone", None), "blocks", None)
    if not isinstance(blocks, nn.ModuleList):
        raise ValueError(
            f"layer_decay needs a model with blocks in model.backbone, but "
            f"{type(model).__name__} has none: drop layer_decay"
        )
    return len(blocks)
