"""AdamW with parameter groups for weight decay and learning rates."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from diffmm.checks import Settings
from diffmm.models.parameters import LAMBDA, decaying, layer_of

LARGEST_RATE = 1000.0
"""Upper limit of learning rates and weight decay. AdamW changes a weight by about its learning rate
per step, so that a larger value is certainly a mistake."""


@dataclass(frozen=True)
class OptimizerConfig(Settings):
    """AdamW (Loshchilov and Hutter 2019) and its parameter groups.

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

    Raises:
        ValueError: If a field is invalid; the message names the field and the value.
    """

    learning_rate: float
    weight_decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    lambda_learning_rate: float | None = None
    layer_decay: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.eps <= 0.0:
            raise ValueError(f"eps must be positive, got {self.eps}")
        for name in ("learning_rate", "lambda_learning_rate"):
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
        if self.layer_decay is not None and not 0.0 < self.layer_decay <= 1.0:
            raise ValueError(f"layer_decay must be in (0, 1], got {self.layer_decay}")


def make_optimizer(
    model: nn.Module, config: OptimizerConfig, *, allow_fused: bool = True
) -> torch.optim.AdamW:
    """Return AdamW over `parameter_groups(model, config)`.

    Args:
        model: Model whose trainable parameters are optimized.
        config: Optimizer settings.
        allow_fused: Whether to use the fused kernel if all parameters are on a CPU or CUDA device,
            which also skips steps without waiting for the device (see `NonFiniteGuard`). A gradient
            scaler (float16) cannot clip gradients with the fused kernel.

    Raises:
        ValueError: If `parameter_groups` raises it, or `eps` is too small for the weights' dtype.
    """
    groups = parameter_groups(model, config)
    for group in groups:
        for parameter in group["params"]:
            check_eps(config.eps, parameter.dtype)
    devices = {p.device.type for group in groups for p in group["params"]}
    fused = allow_fused and devices <= {"cpu", "cuda"}
    return torch.optim.AdamW(
        groups,
        lr=config.learning_rate,
        betas=config.betas,
        eps=config.eps,
        weight_decay=config.weight_decay,
        fused=fused or None,
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
        `"decay"`, `"no_decay"` or `"lambda"`, with a suffix such as `"/layer_03"` if `layer_decay`
        is set.

    Raises:
        ValueError: If no parameter is trainable, or `layer_decay` is set for a model without blocks
            in `model.backbone`.
    """
    decay = set(decaying(model))
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
        if config.layer_decay is not None:
            layer = layer_of(name, num_blocks)
            rate *= config.layer_decay ** (num_blocks + 1 - layer)
            kind = f"{kind}/layer_{layer:02d}"
        weight_decay = config.weight_decay if kind.startswith("decay") else 0.0
        group = {"params": [], "lr": rate, "weight_decay": weight_decay, "name": kind}
        groups.setdefault(kind, group)["params"].append(parameter)
    if not groups:
        raise ValueError(f"{type(model).__name__} has no trainable parameters: all are frozen")
    return list(groups.values())


def _num_blocks(model: nn.Module) -> int:
    blocks = getattr(getattr(model, "backbone", None), "blocks", None)
    if not isinstance(blocks, nn.ModuleList):
        raise ValueError(
            f"layer_decay needs a model with blocks in model.backbone, but "
            f"{type(model).__name__} has none: drop layer_decay"
        )
    return len(blocks)
