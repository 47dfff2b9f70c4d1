"""diffmm: differential attention for text, images and sound.

The way in, in six lines:

    import diffmm

    model = diffmm.create_model("image/imagenet_vit_s", attention="diff_v2", num_classes=5)
    trained = diffmm.load("runs/image/digits_tiny/first")  # a run, a checkpoint, a file of weights
    print(trained.predict("seven.png"))  # a file, an array, a list, a folder: labels and scores
    print(diffmm.load("runs/text/stdlib_tiny/first").generate("def main("))

`diffmm.list_models()` has the names. The op on tensors is `diffmm.diff_attention(q, k, v, lam)`
under a `diffmm.AttentionMask`; the layers and models here are the parts of everything above. What
is not here is found by its part:

* `diffmm.ops`: functions on tensors;
* `diffmm.layers`: the attention layers and what a transformer block is made of;
* `diffmm.models`: the backbone, the models around it and their configs;
* `diffmm.training`: Lightning modules, optimizer groups and schedules;
* `diffmm.analysis`: attention maps, and measurements of attention and activations.

The names here: `create_model`, `list_models`, `load`, `TrainedModel`; `diff_attention`,
`softmax_attention`, `AttentionMask`; `DiffAttentionV1`, `DiffAttentionV2`, `SoftmaxAttention`;
`Backbone`, `BackboneConfig`, `TextModel`, `ImageModel`, `AudioModel`, `MaskedAutoencoder`. Each has
a page of its own, such as `help(diffmm.load)`.

Importing the package is light: a name is imported when it is first asked for.
"""

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.2.0"

if TYPE_CHECKING:
    from diffmm.hub.loading import load
    from diffmm.hub.registry import create_model, list_models
    from diffmm.hub.trained import TrainedModel
    from diffmm.layers import DiffAttentionV1, DiffAttentionV2, SoftmaxAttention
    from diffmm.models import (
        AudioModel,
        Backbone,
        BackboneConfig,
        ImageModel,
        MaskedAutoencoder,
        TextModel,
    )
    from diffmm.ops import AttentionMask, diff_attention, softmax_attention

__all__ = [
    "AttentionMask",
    "AudioModel",
    "Backbone",
    "BackboneConfig",
    "DiffAttentionV1",
    "DiffAttentionV2",
    "ImageModel",
    "MaskedAutoencoder",
    "SoftmaxAttention",
    "TextModel",
    "TrainedModel",
    "__version__",
    "create_model",
    "diff_attention",
    "list_models",
    "load",
    "softmax_attention",
]

_HOMES = {
    "AttentionMask": "diffmm.ops",
    "AudioModel": "diffmm.models",
    "Backbone": "diffmm.models",
    "BackboneConfig": "diffmm.models",
    "DiffAttentionV1": "diffmm.layers",
    "DiffAttentionV2": "diffmm.layers",
    "ImageModel": "diffmm.models",
    "MaskedAutoencoder": "diffmm.models",
    "SoftmaxAttention": "diffmm.layers",
    "TextModel": "diffmm.models",
    "TrainedModel": "diffmm.hub.trained",
    "create_model": "diffmm.hub.registry",
    "diff_attention": "diffmm.ops",
    "list_models": "diffmm.hub.registry",
    "load": "diffmm.hub.loading",
    "softmax_attention": "diffmm.ops",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    # `help(diffmm)` asks through `inspect`: it would import every name and print all of its pages.
    if sys._getframe(1).f_globals.get("__name__") == "inspect":
        return sorted(globals())
    return sorted({*globals(), *__all__})
