"""The image models of the recipes as models of timm.

Importing this module registers them:

    import diffmm.hub.timm_models
    import timm

    model = timm.create_model("diffmm_vit_small_patch16_224", attention="diff_v1", num_classes=10)

It is a `diffmm.models.ImageModel`, which has timm's interface.
"""

from functools import partial
from typing import Any

import torch
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import nn

from diffmm.hub.registry import create_model
from diffmm.models import ImageModel

RECIPES = {
    "diffmm_vit_small_patch16_224": "image/imagenet_vit_s",
    "diffmm_vit_base_patch16_224": "image/imagenet_vit_b",
    "diffmm_vit_small_patch4_32": "image/cifar10",
}
"""The recipes whose models timm can create, by the names of the models."""

PREPARATIONS: dict[str, dict[str, Any]] = {
    "image/cifar10": {
        "mean": (0.4914, 0.4822, 0.4465),
        "std": (0.2470, 0.2435, 0.2616),
        "crop_pct": 1.0,
    },
}
"""The preprocessing of the recipes' data where it is not timm's default."""

NAMES = {
    "in_chans": "in_channels",
    "img_size": "image_size",
    "drop_path_rate": "drop_path",
    "global_pool": "pool",
}
"""Settings by timm's names, and diffmm's names of them."""


def make_model(recipe: str, *, drop_rate: float = 0.0, **settings: Any) -> nn.Module:
    """Create the image model of a recipe from settings by timm's names.

    Args:
        recipe: Name of the recipe.
        drop_rate: Dropout rate before the head, which must be 0.
        settings: `num_classes`, those in `NAMES`, and any field of `diffmm.models.ImageConfig` or
            its `BackboneConfig`, such as `attention`.

    Raises:
        ValueError: If there is no such setting, or a value is not accepted; the message names it.
    """
    if drop_rate:
        raise ValueError(
            f"drop_rate must be 0, got {drop_rate}: the models have no dropout before the head; "
            f"dropout={drop_rate} is that of the residual branches"
        )
    both = [name for name, own in NAMES.items() if {name, own} <= settings.keys()]
    if both:
        raise ValueError(f"{both[0]} and {NAMES[both[0]]} are the same setting: give one of them")
    return create_model(recipe, **{NAMES.get(name, name): x for name, x in settings.items()})


def default_cfg(recipe: str) -> dict[str, Any]:
    """What timm knows about a model before it is created: the recipe's sizes and preprocessing.
    timm's own defaults of the latter are those of the recipes for ImageNet."""
    with torch.device("meta"):
        model: Any = create_model(recipe)
    return {**model.pretrained_cfg, **PREPARATIONS.get(recipe, {}), "license": "apache-2.0"}


def _register(name: str, recipe: str) -> None:
    def entrypoint(pretrained: bool = False, **settings: Any) -> nn.Module:
        model = build_model_with_cfg(
            partial(make_model, recipe),
            name,
            pretrained,
            feature_cfg={"out_indices": 3, "feature_cls": "getter"},
            **settings,
        )
        if isinstance(model, ImageModel):  # timm has described it by the recipe's sizes
            model.pretrained_cfg |= {"num_classes": model.num_classes, **model.timm_cfg()}
        return model

    entrypoint.__name__ = entrypoint.__qualname__ = name
    entrypoint.__doc__ = f"The model of the recipe {recipe}."
    register_model(entrypoint)


default_cfgs = generate_default_cfgs(
    {name: default_cfg(recipe) for name, recipe in RECIPES.items()}
)
for _name, _recipe in RECIPES.items():
    _register(_name, _recipe)
