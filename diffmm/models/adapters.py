"""Low-rank adapters that PEFT has put into a model: the weights without them, and merged weights.

PEFT replaces a linear layer `x` by one whose weights are `x.base_layer.weight`,
`x.lora_A.default.weight` and `x.lora_B.default.weight`, and a layer `y` that is trained as a whole
(`modules_to_save`) by `y.original_module` and `y.modules_to_save.default`. Everything else in this
library, and every file that it writes, has the plain names and the merged weights

    W + scale * B A

(Hu et al. 2022, section 4.1). Only checkpoints of a run, which is to be resumed, keep both apart.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

SCALE_KEY = "adapter_scale"
"""Key of the factor of `B A` in a checkpoint."""

_BASE = ".base_layer."
_SAVED, _ORIGINAL = ".modules_to_save.default.", ".original_module."
_DOWN, _UP = ".lora_A.default.weight", ".lora_B.default.weight"


def adapted_layers(model: nn.Module) -> dict[str, Any]:
    """The layers of PEFT in a model, by their plain names."""
    return {name: layer for name, layer in model.named_modules() if hasattr(layer, "base_layer")}


def plain_names(names: Iterable[str]) -> dict[str, str]:
    """The names of a model's weights by the names without adapters, whose own weights are left
    out, as are those of layers that others replace."""
    return {
        name.replace(_BASE, ".").replace(_SAVED, "."): name
        for name in names
        if ".lora_" not in name and _ORIGINAL not in name
    }


def merged(weights: Mapping[str, Tensor], scale: float) -> dict[str, Tensor]:
    """The merged weights by their plain names; computed in float32.

    Args:
        weights: Weights of a model with adapters.
        scale: Factor of `B A`.

    Raises:
        ValueError: If an adapter is not one of these, or its weights do not fit together.
    """
    known = (_DOWN, _UP)
    if others := [name for name in weights if ".lora_" in name and not name.endswith(known)]:
        raise ValueError(f"{others[0]} is not a weight of LoRA's default adapter for linear layers")
    found = {}
    for plain, name in plain_names(weights).items():
        layer, _, last = plain.rpartition(".")
        weight = weights[name]
        if last == "weight" and _BASE in name:
            down, up = (weights.get(layer + each) for each in known)
            if down is None or up is None:
                raise ValueError(f"{layer} has no lora_A or no lora_B")
            if (*up.shape[:1], *down.shape[1:]) != weight.shape or up.shape[1:] != down.shape[:1]:
                shapes = f"{tuple(down.shape)} and {tuple(up.shape)}"
                raise ValueError(
                    f"the adapter of {layer} has the shapes {shapes}, its weight "
                    f"{tuple(weight.shape)}"
                )
            weight = (weight.float() + scale * (up.float() @ down.float())).to(weight.dtype)
        found[plain] = weight
    return found


def scale_of(model: nn.Module) -> float | None:
    """The factor of `B A` of a model's adapters; None if it has none.

    Raises:
        ValueError: If its adapters have several, are not plain LoRA under the name `"default"`, or
            are disabled or merged.
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
        if layer.disable_adapters:
            raise ValueError(
                f"the adapter of {name} is disabled: enable it, or unload it (PEFT's unload)"
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
