"""A model's architecture as plain data, saved with its weights."""

import dataclasses
from types import UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from torch import nn

from diffmm.checks import check_choice, did_you_mean
from diffmm.models.audio import AudioModel
from diffmm.models.captioning import CaptioningModel
from diffmm.models.contrastive import ContrastiveModel
from diffmm.models.ctc import CTCModel
from diffmm.models.image import ImageModel
from diffmm.models.masked_autoencoder import MaskedAutoencoder
from diffmm.models.text import TextModel
from diffmm.models.text_tower import TextTower
from diffmm.renamed import with_new_names

Model = TypeVar("Model", bound=nn.Module)

MODELS: dict[str, type[nn.Module]] = {
    f"diffmm.models.{model.__name__}": model
    for model in (
        *(TextModel, TextTower, ImageModel, AudioModel, MaskedAutoencoder),
        *(ContrastiveModel, CaptioningModel, CTCModel),
    )
}
"""The classes that a description may name; a file cannot cause any other import."""


def describe(model: nn.Module) -> dict[str, Any]:
    """Describe a model in dicts, lists, numbers and strings, so that `build` can recreate it.

    Returns:
        `{"class_path": "diffmm.models.TextModel", "config": {...}}`.

    Raises:
        ValueError: If the model's class is not in `diffmm.models`.
    """
    model = unwrap(model)
    class_path = f"diffmm.models.{type(model).__name__}"
    if MODELS.get(class_path) is not type(model):
        raise ValueError(
            f"{type(model).__name__} has no description: only {', '.join(MODELS)} have one"
        )
    config: Any = model.config
    return {"class_path": class_path, "config": _plain(dataclasses.asdict(config))}


def build(description: dict[str, Any]) -> nn.Module:
    """Build the model of a description, with newly initialized weights.

    Raises:
        ValueError: If the class is not in `diffmm.models`, or its config does not accept a field
            or value.
    """
    if not isinstance(description, dict) or set(description) != {"class_path", "config"}:
        raise ValueError(
            f"a description must have a class_path and a config, got {description!r:.200}"
        )
    description = with_new_names(description, "the model's description")
    config = configured(config_class(description["class_path"]), description["config"])
    return MODELS[description["class_path"]](config)


def config_class(class_path: Any) -> type:
    """The config class of the model that a description names.

    Raises:
        ValueError: If the class is not in `diffmm.models`.
    """
    check_choice("class_path", class_path, MODELS)
    return get_type_hints(MODELS[class_path].__init__)["config"]


def nested_config(config: type, name: str, values: Any) -> type:
    """The config class in field `name` of a config. If the field allows several, this is the one
    with the most names in `values`.

    Raises:
        ValueError: If the field does not hold a config.
    """
    nearest = _nearest_config(get_type_hints(config)[name], values)
    if nearest is None:
        raise ValueError(f"{config.__name__}.{name} is not a config")
    return nearest


def unwrap(model: Model) -> Model:
    """The original model of one returned by `torch.compile`, or `model` itself."""
    return getattr(model, "_orig_mod", model)


def _plain(value: Any) -> Any:
    """Convert tuples to lists, as in JSON."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def configured(config: Any, values: Any) -> Any:
    """Create an instance of `config`, including nested configs, from plain values."""
    hints = get_type_hints(config)
    if not isinstance(values, dict):
        raise ValueError(f"{config.__name__} needs its fields by name, got {values!r:.200}")
    for name in values:
        if name not in hints:
            raise ValueError(f"{config.__name__} has no field {name!r}{did_you_mean(name, hints)}")
    typed = {name: _typed(hints[name], value) for name, value in values.items()}
    try:
        return config(**typed)
    except TypeError as error:
        raise ValueError(f"{config.__name__} cannot be created: {error}") from error


def _typed(hint: Any, value: Any) -> Any:
    """Convert a plain value to its field's type: nested configs, and tuples instead of lists."""
    config = _nearest_config(hint, value)
    if config is not None and not (value is None and type(None) in _options(hint)):
        return configured(config, value)
    if isinstance(value, list) and any(get_origin(option) is tuple for option in _options(hint)):
        return tuple(value)
    return value


def _nearest_config(hint: Any, values: Any) -> type | None:
    """The config that a type allows; of several, the one with the most names in `values`."""
    configs: list[Any] = [option for option in _options(hint) if dataclasses.is_dataclass(option)]
    names = set(values) if isinstance(values, dict) else set()
    return max(
        configs,
        key=lambda config: len(names & {field.name for field in dataclasses.fields(config)}),
        default=None,
    )


def _options(hint: Any) -> tuple[Any, ...]:
    """The members of a union, or the type itself."""
    return get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
