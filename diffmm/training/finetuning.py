"""Fine-tuning: starting from pretrained weights, and freezing a part of the model."""

from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from diffmm.checks import Settings


@dataclass(frozen=True)
class FineTuneConfig(Settings):
    """Pretrained weights to start from, and the part of the model to freeze.

    Attributes:
        weights: Checkpoint or weights file to start from (`diffmm.models.weights.load_weights`). It
            is read when fitting starts, but not when a run is resumed. None by default.
        new_head: Whether to keep the model's newly initialized head instead of the file's.
        freeze: Number of first blocks to freeze, together with all layers before them; 0 freezes
            nothing, and "all_but_head" trains a linear probe. Frozen modules stay in evaluation
            mode, without dropout and stochastic depth.

    Raises:
        ValueError: If a field is invalid; the message names the field and the value.
    """

    weights: str | None = None
    new_head: bool = True
    freeze: int | Literal["all_but_head"] = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.freeze != "all_but_head" and (
            not isinstance(self.freeze, int) or isinstance(self.freeze, bool) or self.freeze < 0
        ):
            raise ValueError(
                f"freeze must be a number of blocks or 'all_but_head', got {self.freeze!r}"
            )


def freeze(model: nn.Module, config: FineTuneConfig) -> list[nn.Module]:
    """Disable the gradients of the parameters that `config` freezes.

    Args:
        model: Text, image or audio model with `model.backbone` and `model.head`.
        config: Fine-tuning settings.

    Returns:
        The frozen modules, which must be kept in evaluation mode.

    Raises:
        ValueError: If the model has no backbone or head, has fewer blocks, or ties its head to a
            frozen embedding.
    """
    if config.freeze == 0:
        return []
    backbone, head = getattr(model, "backbone", None), getattr(model, "head", None)
    if not isinstance(backbone, nn.Module) or not isinstance(head, nn.Module):
        raise ValueError(
            f"freeze={config.freeze!r} needs a model with a backbone and a head, but "
            f"{type(model).__name__} lacks one of them"
        )
    blocks: list[nn.Module] = list(backbone.blocks)  # type: ignore[arg-type]
    if config.freeze == "all_but_head":
        trainable = [head]
    elif config.freeze <= len(blocks):
        norms: list[Any] = [backbone.norm, getattr(model, "pool_norm", None)]
        norms = [norm for norm in norms if norm is not None]
        trainable = [head, *norms, *blocks[config.freeze :]]
    else:
        raise ValueError(
            f"freeze={config.freeze} blocks, but {type(model).__name__} has {len(blocks)}"
        )
    kept = {id(p) for module in trainable for p in module.parameters()}
    inside = {id(m) for module in trainable for m in module.modules()}
    outside = [m for m in model.modules() if not any(id(part) in inside for part in m.modules())]
    if any(id(parameter) in kept for module in outside for parameter in module.parameters()):
        raise ValueError(
            f"freeze={config.freeze!r} would freeze the embedding, but {type(model).__name__} ties "
            f"its head to it: build it with tie_embeddings=False"
        )
    for parameter in model.parameters():
        if id(parameter) not in kept:
            parameter.requires_grad_(False)
    return outside
