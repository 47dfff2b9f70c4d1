"""Models by name; the shipped recipes are the registry."""

import dataclasses
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from torch import nn

from diffmm.checks import did_you_mean
from diffmm.models.contrastive import TOWERS
from diffmm.models.description import build, config_class, nested_config
from diffmm.models.text import TextConfig
from diffmm.models.weights import load_weights
from diffmm.recipes.catalog import find_recipe, recipe_names
from diffmm.recipes.errors import InputError
from diffmm.recipes.references import REFERENCE, resolve
from diffmm.recipes.settings import load_file

WILDCARDS = frozenset("*?[")


def list_models(filter: str = "") -> list[str]:
    """List the names that `create_model` accepts, those of the shipped recipes, sorted.

    Args:
        filter: A pattern with wildcards, such as `"image/*"`, or a substring of the names
            (`"image"` is also one of `image_text/emoji`).

    >>> diffmm.list_models("imagenet_vit")
    ['image/imagenet_vit_b', 'image/imagenet_vit_s']
    >>> diffmm.list_models("*/imagenet_vit*")
    ['image/imagenet_vit_b', 'image/imagenet_vit_s']
    """
    names = recipe_names()
    if WILDCARDS & set(filter):
        return [name for name in names if fnmatchcase(name, filter)]
    return [name for name in names if filter in name]


def create_model(
    name: str, *, weights: str | Path | None = None, skip_head: bool = False, **overrides: Any
) -> nn.Module:
    """Create the model of a recipe, in training mode, with new or loaded weights.

    Args:
        name: Name of a shipped recipe (see `list_models`), or the path of a recipe file.
        weights: A run, a checkpoint or a file of weights to load, as in
            `diffmm.models.weights.load_weights`; newly initialized weights by default.
        skip_head: Whether to keep the new head instead of loading that of `weights`.
        overrides: Fields of the model's config or its backbone's config, such as
            `attention="softmax"`, `num_classes=5`, `depth=6`. If the recipe sets several fields by
            one variable, an override changes all of them.

    Raises:
        ValueError: If the recipe does not exist, neither config has a field (the message suggests
            the nearest one), or the config rejects a value.

    >>> model = diffmm.create_model("image/digits_tiny", attention="softmax", num_classes=5)
    >>> model.config.backbone.attention, model.num_classes
    ('softmax', 5)
    >>> diffmm.create_model("image/digits_tiny", num_clases=5)  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ValueError: ...has no setting 'num_clases'; did you mean 'num_classes'?
    """
    description = describe_model(name, overrides)
    model = build(description)
    if weights is not None:
        load_weights(model, weights, skip_head=skip_head)
    elif skip_head:
        raise ValueError("skip_head=True needs weights: give them, or leave it out")
    return model


def describe_model(name: str, overrides: dict[str, Any]) -> dict[str, Any]:
    """The description of a recipe's model with overrides, for `diffmm.models.description.build`.

    Raises:
        ValueError: As `create_model`.
    """
    try:
        values = load_file(find_recipe(name))
    except InputError as error:
        raise ValueError(str(error)) from error
    values = {key: values.get(key) or {} for key in ("vars", "model")}
    try:
        node = values["model"]["init_args"]["model"]
        class_path, config = node["class_path"], node["init_args"]["config"]
    except (KeyError, TypeError):
        raise ValueError(f"{name} has no model with a class_path and a config") from None
    places: dict[str, list[dict[str, Any]]] = {}
    for key, node in _places(config_class(class_path), config):
        places.setdefault(key, []).append(node)
    for key, value in overrides.items():
        value = list(value) if isinstance(value, tuple) else value
        if not isinstance(value, str | int | float | list | None):
            raise ValueError(f"{key} must be a plain value, got {type(value).__name__}")
        if key not in places:
            model_name = class_path.rpartition(".")[2]
            raise ValueError(
                f"{model_name} of {name} has no setting {key!r}{did_you_mean(key, places)}"
            )
        settings, *others = places[key]
        written = settings.get(key)
        reference = REFERENCE.fullmatch(written) if isinstance(written, str) else None
        if others and (reference is None or any(other.get(key) != written for other in others)):
            raise ValueError(
                f"{key} is a setting of {len(places[key])} towers of {name}, which does not set "
                f"them by one variable: change the recipe (diffmm recipes copy)"
            )
        if reference is not None and reference[1].removeprefix("vars.") in values["vars"]:
            values["vars"][reference[1].removeprefix("vars.")] = value
        else:
            settings[key] = value
    resolved, mistakes = resolve(values)
    if mistakes:
        raise ValueError(f"{name}: {mistakes[0]}")
    config = resolved["model"]["init_args"]["model"]["init_args"]["config"]
    return {"class_path": class_path, "config": config}


def _places(config: type, node: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every plain field of a model's config and the node of the recipe that sets it, including the
    fields of the backbone, of an encoder, of a decoder of text, but not of a masked autoencoder's,
    and of the towers of a contrastive model."""
    names = {field.name for field in dataclasses.fields(config)}
    inner = [name for name in ("encoder", "backbone", *TOWERS) if isinstance(node.get(name), dict)]
    decoder = node.get("decoder")
    if isinstance(decoder, dict) and nested_config(config, "decoder", decoder) is TextConfig:
        inner.append("decoder")
    for name in inner:
        yield from _places(nested_config(config, name, node[name]), node[name])
    for name in names - {"encoder", "decoder", "backbone", *TOWERS}:
        yield name, node
