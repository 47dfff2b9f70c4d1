"""A model's architecture as plain data, which travels with its weights."""

import dataclasses
from types import UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from torch import nn

from diffmm.checks import check_choice, did_you_mean
from diffmm.models.audio import AudioModel
from diffmm.models.image import ImageModel
from diffmm.models.masked_autoencoder import MaskedAutoencoder
from diffmm.models.text import TextModel
from diffmm.renamed import with_new_names

Model = TypeVar("Model", bound=nn.Module)

MODELS: dict[str, type[nn.Module]] = {
    f"diffmm.models.{model.__name__}": model
    for model in (TextModel, ImageModel, AudioModel, MaskedAutoencoder)
}
"""What a description may name. A file cannot make the library import anything else."""


def describe(model: nn.Module) -> dict[str, Any]:
    """What `build` needs to make this model again, in dicts, lists, numbers and strings.

    Returns:
        `{"class_path": "diffmm.models.TextModel", "config": {...}}`.

    Raises:
        ValueError: for a model that is none of `diffmm.models`.
    """
    model = unwrap(model)
    class_path = f"diffmm.models.{type(model).__name__}"
    if MODELS.get(class_path) is not type(model):
        raise ValueError(
            f"{type(model).__name__} is none of {', '.join(MODELS)}: it has no description"
        )
    config: Any = model.config
    return {"class_path": class_path, "config": _plain(dataclasses.asdict(config))}


def build(description: dict[str, Any]) -> nn.Module:
    """The model that `describe` described, with new weights.

    Raises:
        ValueError: for a class that is none of `diffmm.models`, and for fields or values that its
            config does not take.
    """
    if not isinstance(description, dict) or set(description) != {"class_path", "config"}:
        raise ValueError(f"a description has a class_path and a config, got {description!r:.200}")
    description = with_new_names(description, "the model's description")
    config = configured(config_class(description["class_path"]), description["config"])
    return MODELS[description["class_path"]](config)


def config_class(class_path: Any) -> type:
    """The config of the model that a description names.

    Raises:
        ValueError: for a class that is none of `diffmm.models`.
    """
    check_choice("class_path", class_path, MODELS)
    return get_type_hints(MODELS[class_path].__init__)["config"]


def nested_config(config: type, name: str, values: Any) -> type:
    """The class of the config in field `name` of a config: of several, the one that has most of
    the names in `values`.

    Raises:
        ValueError: if the field holds none.
    """
    nearest = _nearest_config(get_type_hints(config)[name], values)
    if nearest is None:
        raise ValueError(f"{config.__name__}.{name} is no config")
    return nearest


def unwrap(model: Model) -> Model:
    """The model inside what `torch.compile` returns."""
    return getattr(model, "_orig_mod", model)


def _plain(value: Any) -> Any:
    """Tuples become lists, as JSON would have it."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def configured(config: Any, values: Any) -> Any:
    """An instance of `config` from plain values, with the configs nested in it."""
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
        raise ValueError(f"{config.__name__} cannot be made: {error}") from error


def _typed(hint: Any, value: Any) -> Any:
    """A plain value as its field's type has it: nested configs, and tuples where JSON has lists."""
    config = _nearest_config(hint, value)
    if config is not None and not (value is None and type(None) in _options(hint)):
        return configured(config, value)
    if isinstance(value, list) and any(get_origin(option) is tuple for option in _options(hint)):
        return tuple(value)
    return value


def _nearest_config(hint: Any, values: Any) -> type | None:
    """Of the configs that a type allows, the one with most of the names in `values`."""
    configs: list[Any] = [option for option in _options(hint) if dataclasses.is_dataclass(option)]
    names = set(values) if isinstance(values, dict) else set()
    return max(
        configs,
        key=lambda config: len(names & {field.name for field in dataclasses.fields(config)}),
        default=None,
    )


def _options(hint: Any) -> tuple[Any, ...]:
    """The members of a union, or the one type that is none."""
    return get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
