"""Fine-tuning: starting from pretrained weights, freezing a part of the model, and low-rank
adapters."""

from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from diffmm.checks import Settings


@dataclass(frozen=True)
class LoRAConfig(Settings):
    """Low-rank adapters (Hu et al. 2022): the weight `W` of a linear layer stays as it is, and
    `alpha / rank * B A` is added to it, of which `B` starts at zero. PEFT puts them into the model
    (`diffmm[peft]`). Files of weights have the merged weights.

    Attributes:
        rank: Number of columns of `B` and rows of `A`.
        alpha: Numerator of the factor, in place of a learning rate of the adapters' own.
        dropout: Dropout of the adapters' inputs, in [0, 1).
        targets: Names of the linear layers inside the blocks that get adapters: `q_proj`, `k_proj`,
            `v_proj` and `out_proj` of attention, `gate_proj`, `up_proj` and `down_proj` of the
            feed-forward layers, `lambda_proj` of v2 and grouped differential attention.

    Raises:
        ValueError: If a field is out of range; the message names the field and the value.
    """

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "out_proj")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rank < 1:
            raise ValueError(f"rank must be at least 1, got {self.rank}")
        if not self.alpha > 0:
            raise ValueError(f"alpha must be above 0, got {self.alpha}")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout}")
        object.__setattr__(self, "targets", tuple(self.targets))
        if not self.targets:
            raise ValueError("targets must name at least one kind of linear layer, got none")


@dataclass(frozen=True)
class FineTuneConfig(Settings):
    """Pretrained weights to start from, and the part of the model to freeze.

    Attributes:
        weights: Checkpoint or weights file to start from (`diffmm.models.weights.load_weights`). It
            is read when fitting starts, but not when a run is resumed. None by default.
        new_head: Whether to keep the model's newly initialized head instead of the file's.
        freeze: Number of first blocks to freeze, together with all layers before them; 0 freezes
            nothing, "all_but_head" trains a linear probe, and "all" is for a part of a model.
            Frozen modules stay in evaluation mode, without dropout and stochastic depth.
        lora: Low-rank adapters to train instead of the weights, together with the head if
            `new_head`; none by default.

    Raises:
        ValueError: If a field is invalid; the message names the field and the value.
    """

    weights: str | None = None
    new_head: bool = True
    freeze: int | Literal["all_but_head", "all"] = 0
    lora: LoRAConfig | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.freeze not in ("all_but_head", "all") and (
            not isinstance(self.freeze, int) or isinstance(self.freeze, bool) or self.freeze < 0
        ):
            raise ValueError(
                f"freeze must be a number of blocks, 'all_but_head' or 'all', got {self.freeze!r}"
            )
        if self.lora is not None and self.freeze != 0:
            raise ValueError(
                f"lora trains adapters of all blocks and freezes the rest, but freeze is "
                f"{self.freeze!r}: drop one of them"
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
    if config.freeze == "all":
        model.requires_grad_(False)
        return list(model.modules())
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


def add_adapters(model: nn.Module, config: FineTuneConfig) -> None:
    """Put the adapters of `config.lora` into the blocks of a model, in place, and disable the
    gradients of all other parameters except, with `new_head`, those of the head.

    Args:
        model: Text, image or audio model with `model.backbone`.
        config: Fine-tuning settings.

    Raises:
        ValueError: If PEFT is not installed, or the blocks have no linear layer of a target's name.
    """
    if config.lora is None:
        return
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ValueError(
            f"lora needs PEFT ({error}): install diffmm[peft], or drop lora"
        ) from error
    layers: dict[str, list[str]] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and ".blocks." in f".{name}":
            layers.setdefault(name.rpartition(".")[2], []).append(name)
    for target in config.lora.targets:
        if target not in layers:
            raise ValueError(
                f"lora.targets has {target!r}, but the linear layers in the blocks of "
                f"{type(model).__name__} are {', '.join(layers) or 'none'}"
            )
    head = getattr(model, "head", None)
    is_new = config.new_head and isinstance(head, nn.Module)
    if is_new and getattr(getattr(model, "config", None), "tie_embeddings", False):
        raise ValueError(
            f"lora with new_head=True would train the embedding, to which {type(model).__name__} "
            f"ties its head: set new_head=False, or build it with tie_embeddings=False"
        )
    model.requires_grad_(False)
    adapters = LoraConfig(
        r=config.lora.rank,
        lora_alpha=config.lora.alpha,  # type: ignore[arg-type]  # it is only divided
        lora_dropout=config.lora.dropout,
        target_modules=[name for target in config.lora.targets for name in layers[target]],
    )
    inject_adapter_in_model(adapters, model)
    if is_new:
        head.requires_grad_(True)  # type: ignore[union-attr]
