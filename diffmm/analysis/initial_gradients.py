"""Gradients at the start of training: what the factor `1 - lambda_init` does, layer by layer."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from diffmm.analysis.batches import seeded
from diffmm.layers.attention import ATTENTIONS, AttentionArgs, DiffAttentionV1
from diffmm.layers.block import Block
from diffmm.models.backbone_config import BackboneConfig
from diffmm.models.description import describe, unwrap

SOFTMAX, V1, UNSCALED = "softmax", "diff_v1", "diff_v1 without 1 - lambda_init"
VARIANTS = (SOFTMAX, V1, UNSCALED)


@dataclass(frozen=True)
class LayerGradients:
    """The gradients of one block.

    Attributes:
        name: Name of the block in its model.
        norms: Norm of the gradient of each of its modules, such as `attention.q_proj`, and of the
            whole block under `block`.
    """

    name: str
    norms: Mapping[str, float]


def initial_gradients(
    build: Callable[[str], nn.Module],
    loss: Callable[[nn.Module], Tensor],
    *,
    seed: int = 0,
    device: str | torch.device = "cpu",
) -> dict[str, list[LayerGradients]]:
    """Measure the gradients of newly initialized twins: softmax attention, `diff_v1`, and `diff_v1`
    without the factor `1 - lambda_init` after its headwise norm.

    Ye et al. (2025, section 2.2 and appendix) keep gradients of the size of softmax attention's by
    that factor. The third twin has the same headwise norm and weights as the second.

    Args:
        build: Creates a model with new weights for a name in `diffmm.layers.ATTENTIONS`, such as
            `lambda attention: diffmm.create_model("text/stdlib_tiny", attention=attention)`, or
            `twin_of(model)`.
        loss: The loss of a model, a scalar.
        seed: Seed of all weights, and of random numbers in `loss`.
        device: Device of the models, whose random numbers are left as they are.

    Returns:
        The gradients of each block, by the names in `VARIANTS`.

    Raises:
        ValueError: If a model has no blocks of this library.
    """
    found = {}
    for variant in VARIANTS:
        with seeded(seed, torch.device(device)):
            model = build(SOFTMAX if variant == SOFTMAX else V1).train()
            if variant == UNSCALED:
                for part in model.modules():
                    if isinstance(part, DiffAttentionV1):
                        remove_scale(part)
            torch.manual_seed(seed)
            with torch.enable_grad(), torch.compiler.set_stance("force_eager"):
                loss(model).backward()
        found[variant] = gradient_norms(model)
    return found


def remove_scale(layer: DiffAttentionV1) -> None:
    """Remove the factor `1 - lambda_init` from the heads of a layer, but not the norm."""
    if layer.norm is not None:
        layer.finish = layer.norm.forward  # type: ignore[assignment, method-assign]


def gradient_norms(model: nn.Module) -> list[LayerGradients]:
    """The norms of the gradients of each block after a backward pass.

    Raises:
        ValueError: If the model has no blocks of this library.
    """
    found = []
    for name, block in model.named_modules():
        if not isinstance(block, Block):
            continue
        squares: dict[str, float] = {}
        for path, parameter in block.named_parameters():
            if parameter.grad is not None:
                module = path.rpartition(".")[0] or path
                square = float(parameter.grad.detach().float().norm()) ** 2
                squares[module] = squares.get(module, 0.0) + square
        norms = {"block": sum(squares.values()) ** 0.5}
        found.append(LayerGradients(name, norms | {m: s**0.5 for m, s in squares.items()}))
    if not found:
        raise ValueError(f"{type(model).__name__} contains no block of diffmm")
    return found


def ratios(of: list[LayerGradients], to: list[LayerGradients]) -> list[LayerGradients]:
    """The norms of one model divided by those of another, block by block, for the modules that both
    have; NaN where the other's is 0."""
    return [
        LayerGradients(
            one.name,
            {
                module: norm / other.norms[module] if other.norms[module] else float("nan")
                for module, norm in one.norms.items()
                if module in other.norms
            },
        )
        for one, other in zip(of, to, strict=True)
    ]


def twin_of(model: nn.Module) -> Callable[[str], nn.Module]:
    """A function that creates models like `model` with another attention and new weights, on its
    device. Settings of the model's own attention (such as `lambda_init`) take their defaults.

    Raises:
        ValueError: If the model's class is not in `diffmm.models`; or on creation, if the attention
            does not accept the other settings.
    """
    describe(model)  # checks the class
    original: Any = unwrap(model)

    def build(attention: str) -> nn.Module:
        config = _with_attention(original.config, attention)
        twin: nn.Module = type(original)(config)
        return twin.to(next(original.parameters()).device)

    return build


def _with_attention(config: Any, attention: str) -> Any:
    """The config with another attention in all of its backbones, except a decoder's."""
    if not isinstance(config, BackboneConfig):
        parts = getattr(config, "towers", ())
        parts = parts or ["backbone" if hasattr(config, "backbone") else "encoder"]
        new = {name: _with_attention(getattr(config, name), attention) for name in parts}
        return replace(config, **new)
    own = {name for layer in ATTENTIONS.values() for name in layer.config_fields()}
    own -= AttentionArgs.__annotations__.keys()
    defaults: dict[str, Any] = {
        field.name: field.default for field in fields(config) if field.name in own
    }
    return replace(config, attention=attention, **defaults)
