"""Vision transformers of timm, in folders as its `save_for_hf` and the hub have them.

timm's `config.json` names an architecture, whose settings are in timm's code. They are therefore
read from the model that timm itself builds, without weights.
"""

import dataclasses
import inspect
from typing import Any

import torch
from torch import nn

from diffmm.checks import reason_of
from diffmm.interop import timm_eva, timm_vit
from diffmm.interop.family import Family
from diffmm.interop.names import Table
from diffmm.interop.settings import TheirSettings
from diffmm.interop.source import CONFIG_NAME, Source
from diffmm.models import ImageConfig, ImageModel
from diffmm.models.image import PREPROCESSING
from diffmm.models.job import Job

READER = "datamodules.image.ImageReader"

SHAPING = ("input_size", "num_classes", "fixed_input_size")
"""Entries of `pretrained_cfg` from which timm takes arguments of the model."""

MODULES = (
    "VisionTransformer",
    "VisionTransformerDistilled",
    "Eva",
    "PatchEmbed",
    "Conv2d",
    "Sequential",
    "ModuleList",
    "Identity",
    "Dropout",
    "Block",
    "ParallelScalingBlock",
    "DiffParallelScalingBlock",
    "EvaBlock",
    "Attention",
    "DiffAttention",
    "EvaAttention",
    "Linear",
    "LayerNorm",
    "RmsNorm",
    "LayerScale",
    "Mlp",
    "GluMlp",
    "SwiGLU",
    "GELU",
    "GELUTanh",
    "QuickGELU",
    "SiLU",
    "AttentionPoolLatent",
    "RotaryEmbeddingDinoV3",
    "DropPath",
)
"""Layers that the two tables know."""


def read_settings(settings: TheirSettings) -> ImageConfig:
    """The config of a model of timm."""
    model: Any = outline(settings)
    others = sorted({type(each).__name__ for each in model.modules()} - set(MODULES))
    if others:
        settings.refuse(
            "architecture",
            settings.take("architecture", str),
            f"only vision transformers; this one has {', '.join(others)}",
        )
    if not len(model.blocks):
        settings.refuse("model_args.depth", 0, "at least 1")
    named = settings.take("global_pool", str, model.global_pool)
    if named != model.global_pool:
        settings.refuse(
            "global_pool",
            named,
            f"what timm builds, which does not read this setting and has {model.global_pool!r}: "
            f"set it in model_args",
        )
    family = timm_eva if type(model).__name__ == "Eva" else timm_vit
    return family.read_model(model, settings)


def outline(settings: TheirSettings) -> nn.Module:
    """Build the model of a `config.json` with timm, on the meta device.

    Raises:
        ValueError: If timm does not know the architecture or one of its arguments.
    """
    import timm
    from timm.models import PretrainedCfg
    from timm.models.eva import Eva
    from timm.models.vision_transformer import VisionTransformer

    name = settings.take("architecture", str)
    if "/" in name or ":" in name or not timm.is_model(name):
        settings.refuse("architecture", name, "only vision transformers that timm has")
    settings.skip("num_features", "label_names", "label_descriptions", "labels")
    pretrained = settings.take("pretrained_cfg", dict, None)
    if pretrained is None:  # timm's older files have its entries beside `architecture`
        settings.skip(*(field.name for field in dataclasses.fields(PretrainedCfg)))
        pretrained = {key: settings.peek(key) for key in SHAPING}
    shaping = {key: pretrained[key] for key in SHAPING if pretrained.get(key) is not None}
    num_classes = settings.take("num_classes", int, None)
    if num_classes is not None:
        shaping["num_classes"] = num_classes
    arguments = dict(settings.take("model_args", dict, {}))
    dual_lambda = arguments.pop("dual_lambda", False) is True
    known = set()
    for model_class in (VisionTransformer, Eva):
        known |= set(inspect.signature(model_class.__init__).parameters)
    for key in arguments:
        if key not in known or key in ("self", "device", "dtype"):
            settings.refuse(f"model_args.{key}", arguments[key], "only arguments of timm's models")
    try:
        with torch.device("meta"):
            model = timm.create_model(name, pretrained_cfg=shaping or None, **arguments)
    except Exception as error:  # whatever timm raises for arguments of a wrong type
        raise ValueError(
            f"timm cannot build {name} with model_args={arguments}: {reason_of(error)}"
        ) from error
    layers: list[Any] = [each for each in model.modules() if hasattr(each, "dual_lambda")]
    for layer in layers:
        layer.dual_lambda = dual_lambda
    return model


def see_lambda(source: Source) -> Source:
    """Add the setting `dual_lambda`, which only the names of tensors show."""
    if not any(name.endswith("lambda_a") for name in source.tensors):
        return source
    given = source.config.get("model_args")
    arguments = {**(given if isinstance(given, dict) else {}), "dual_lambda": True}
    return source._replace(config={**source.config, "model_args": arguments})


def write_settings(config: ImageConfig) -> dict[str, Any]:
    """The settings of the nearest model of timm."""
    family = timm_eva if config.rope_coordinates == "normalized" else timm_vit
    return family.write_arguments(config)


def table(config: ImageConfig) -> Table:
    """The tensors of a model."""
    family = timm_eva if config.rope_coordinates == "normalized" else timm_vit
    return family.table(config)


def read_job(source: Source, config: ImageConfig) -> Job:
    """The preprocessing as timm resolves it, and the names of the classes.

    Raises:
        ValueError: If the number of names is not that of the classes.
    """
    from timm.data import resolve_data_config

    pretrained = source.config.get("pretrained_cfg") or source.config
    reader = None
    if config.in_channels in (1, 3):
        data = resolve_data_config(pretrained_cfg=pretrained)
        settings = {name: _as_list(data[name]) for name in PREPROCESSING}
        for name in ("mean", "std"):
            if config.in_channels == 1 and len(settings[name]) == 3:
                # Files that give no statistics get those of color images.
                settings[name] = [sum(settings[name]) / 3]
        settings |= {"image_size": _as_list(config.image_size), "channels": config.in_channels}
        reader = {"class_path": READER, "init_args": settings}
    names = class_names(source.config, pretrained, config.num_classes)
    if names is not None and len(names) != config.num_classes:
        raise ValueError(
            f"{source.origin} has {len(names)} label_names, but {config.num_classes} classes"
        )
    return Job(reader=reader, class_names=names)


def class_names(
    settings: dict[str, Any], pretrained: dict[str, Any], num_classes: int
) -> tuple[str, ...] | None:
    """The names of the classes: their descriptions, where the file has them, or those of
    ImageNet-1k, if the tag of the weights says that they were trained on it.

    Raises:
        ValueError: If the keys of `label_names` are not numbers.
    """
    from timm.data import ImageNetInfo

    labels = settings.get("label_names") or settings.get("labels")
    labels = labels or pretrained.get("label_names")
    descriptions = settings.get("label_descriptions") or pretrained.get("label_descriptions")
    if labels is None:
        if num_classes != 1000 or "in1k" not in str(pretrained.get("tag")):
            return None
        known = ImageNetInfo()
        return tuple(str(known.index_to_description(index)) for index in range(num_classes))
    if isinstance(labels, dict):
        if not all(str(key).isdecimal() for key in labels):
            raise ValueError(f"label_names must have numbers as keys, got {sorted(labels)!r:.100}")
        labels = [labels[key] for key in sorted(labels, key=int)]
    if isinstance(descriptions, dict):
        labels = [descriptions.get(label, label) for label in labels]
    return tuple(str(label) for label in labels)


def write_job(job: Job | None, config: ImageConfig) -> dict[str, dict[str, Any]]:
    """The preprocessing and the names of the classes, as timm stores them."""
    reader = {} if job is None or job.reader is None else job.reader["init_args"]
    height, width = _as_list(config.image_size)
    values: dict[str, Any] = {
        "pretrained_cfg": {
            "input_size": [config.in_channels, height, width],
            "fixed_input_size": True,
            "num_classes": config.num_classes,
            **{name: reader[name] for name in PREPROCESSING if name in reader},
        }
    }
    if job is not None and job.class_names is not None:
        values["label_names"] = list(job.class_names)
    return {CONFIG_NAME: values}


def _as_list(value: Any) -> Any:
    """Plain values: a list in place of a tuple, and both sides of a square."""
    if isinstance(value, int):
        return [value, value]
    return list(value) if isinstance(value, tuple | list) else value


TIMM = Family(
    "timm",
    (),
    read_settings,
    write_settings,
    table,
    model=ImageModel,
    job=read_job,
    write_job=write_job,
    prepare=see_lambda,
)
