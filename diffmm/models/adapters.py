"""Low-rank adapters that PEFT has put into a model: the weights without them, and merged weights.

PEFT replaces a linear layer `x` by one whose weights are `x.base_layer.weight`,
`x.lora_A.default.weight` and `x.lora_B.default.weight`. Everything else in this library, and every
file that it writes, has the plain names and the merged weights

    W + scale * B A

(Hu et al. 2022, section 4.1). Only checkpoints of a run, which is to be resumed, keep both apart.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

SCALE_KEY = "adapter_scale"
"""Key of the factor of `B A` in a checkpoint."""

_BASE = ".base_layer."
_DOWN, _UP = ".lora_A.default.weight", ".lora_B.default.weight"


def adapted_layers(model: nn.Module) -> dict[str, Any]:
    """The layers of PEFT in a model, by their plain names."""
    return {name: layer for name, layer in model.named_modules() if hasattr(layer, "base_layer")}


def plain_names(names: Iterable[str]) -> dict[str, str]:
    """The names of a model's weights by the names without adapters, whose own weights are left
    out."""
    return {name.replace(_BASE, "."): name for name in names if ".lora_" not in name}


def merged(weights: Mapping[str, Tensor], scale: float) -> dict[str, Tensor]:
    """The merged weights by their plain names; computed in float32.

    Args:
        weights: Weights of a model with adapters.
        scale: Factor of `B A`.

    Raises:
        ValueError: If an adapter is not one of these.
    """
    found = {}
    for plain, name in plain_names(weights).items():
        layer, _, last = plain.rpartition(".")
        weight = weights[name]
        if last == "weight" and layer + _UP in weights:
            down, up = weights[layer + _DOWN].float(), weights[layer + _UP].float()
            weight = (weight.float() + scale * (up @ down)).to(weight.dtype)
        found[plain] = weight
    known = (_DOWN, _UP)
    if others := [name for name in weights if ".lora_" in name and not name.endswith(known)]:
        raise ValueError(f"{others[0]} is not a weight of LoRA's default adapter for linear layers")
    return found


def scale_of(model: nn.Module) -> float | None:
    """The factor of `B A` of a model's adapters; None if it has none.

    Raises:
        ValueError: If its adapters have several, or are not plain LoRA under the name `"default"`.
    """
    layers = adapted_layers(model)
    if not layers:
        return None
    scales = set()
    for name, layer in layers.items():
        scaling = getattr(layer, "scaling", {})
        if set(scaling) != {"default"} or getattr(layer, "use_dora", {}).get("default"):
            raise ValueError(
                f"{name} has adapters other than LoRA under the name 'default': merge them "
                f"(PEFT's merge_and_unload) before its weights are used"
            )
        if layer.merged:
            raise ValueError(
                f"the adapter of {name} is already merged: unload it (PEFT's merge_and_unload)"
            )
        scales.add(float(scaling["default"]))
    if len(scales) > 1:
        raise ValueError(
            f"the adapters have the scales {' and '.join(map(str, sorted(scales)))}: merge them "
            f"(PEFT's merge_and_unload) before its weights are used"
        )
    return scales.pop()
