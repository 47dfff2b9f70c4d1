"""What a family of other implementations declares, and conversion in both directions."""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from diffmm.interop.names import Table
from diffmm.interop.settings import TheirSettings
from diffmm.interop.source import CONFIG_NAME, PREPROCESSOR_NAME, Source
from diffmm.layers.patch import as_size
from diffmm.models import BackboneConfig, TextModel
from diffmm.models.contents import Contents
from diffmm.models.description import MODELS, build, describe
from diffmm.models.encoder import EncoderConfig
from diffmm.models.job import Job
from diffmm.models.weights import own_weights

SIZES = ("image_size", "patch_size", "patch_stride")
"""Settings that a number or a pair of numbers can give."""

PREPROCESSOR = "preprocessor_config"
"""The setting that holds the file of this name, of families whose `prepare` puts it there."""

TRAINING_ONLY = ("dropout", "drop_path", "init_std", "backend")
"""Settings of a backbone that change no output of a trained model."""


@dataclass(frozen=True)
class Family:
    """Models of another implementation that diffmm can hold.

    Attributes:
        name: Name of the family: Hugging Face's `model_type`, where it has one.
        architectures: Names of the classes in `config.json` whose weights these are.
        read_settings: Takes the settings of the other implementation and returns the config of
            `model`. It reads every setting that has an effect, and raises `ValueError` for those
            that diffmm cannot hold.
        write_settings: Takes a config and returns the settings of the nearest model of the family.
            Whether that model is the same is checked by reading them again.
        table: Takes a config and returns the names of the tensors.
        model: The model's class in `diffmm.models`.
        job: Takes the source and the model's config, and returns how inputs are prepared; None if
            the source does not say.
        write_job: Takes a job, or None, and the model's config, and returns what the files of the
            family say about it: values by name for each JSON file.
        prepare: Takes the source and returns it with settings that only its tensors show.
    """

    name: str
    architectures: tuple[str, ...]
    read_settings: Callable[[TheirSettings], Any]
    write_settings: Callable[[Any], dict[str, Any]]
    table: Callable[[Any], Table]
    model: type[nn.Module] = TextModel
    job: Callable[[Source, Any], Job | None] = lambda source, config: None
    write_job: Callable[[Job | None, Any], dict[str, dict[str, Any]]] = lambda job, config: {}
    prepare: Callable[[Source], Source] = lambda source: source

    def to_ours(self, source: Source) -> Contents:
        """Convert weights to diffmm's, in their own dtypes.

        Raises:
            ValueError: If diffmm cannot hold a setting, or tensors are missing, not expected or of
                another shape; the message names all of them.
        """
        source = self.prepare(source)
        config = self.config_of(source.config, source.origin)
        table = self.table(config)
        with torch.device("meta"):
            model = self.model(config)
        table.check(source.tensors, table.to_theirs(own_weights(model)), source.origin)
        job = self.job(source, config)
        plain = None if job is None else job.plain()
        return Contents(table.to_ours(source.tensors), describe(model), plain)

    def to_theirs(self, contents: Contents) -> tuple[dict[str, dict[str, Any]], dict[str, Tensor]]:
        """Convert diffmm's weights: returns the tensors of the other implementation, and before
        them its settings by JSON file.

        Raises:
            ValueError: If the model is of another kind, or the family cannot hold one of its
                settings; the message names all of them with their values.
        """
        assert contents.description is not None
        class_path = contents.description["class_path"]
        if MODELS[class_path] is not self.model:
            raise ValueError(f"{self.name} cannot hold {class_path}, only {self.model.__name__}")
        with torch.device("meta"):
            config: Any = build(contents.description).config
        settings = self.write_settings(config)
        try:
            again = _settled(self.config_of(settings, f"a model of family {self.name}"))
        except ValueError as error:
            raise ValueError(f"{self.name} cannot hold this model: {error}") from error
        wanted = _settled(config)
        differing = [
            f"{name}={value!r}" for name, value in wanted.items() if again.get(name) != value
        ]
        if differing:
            raise ValueError(f"{self.name} cannot hold {', '.join(differing)}")
        tensors = self.table(config).to_theirs(contents.weights)
        job = None if contents.job is None else Job.of(contents.job)
        files = self.write_job(job, config)
        if PREPROCESSOR in settings:
            files = {**files, PREPROCESSOR_NAME: settings.pop(PREPROCESSOR)}
        files = {**files, CONFIG_NAME: settings | files.get(CONFIG_NAME, {})}
        return files, {name: tensor.contiguous() for name, tensor in tensors.items()}

    def config_of(self, settings: Mapping[str, Any], origin: str) -> Any:
        """The config of a model with these settings of the other implementation.

        Raises:
            ValueError: If diffmm cannot hold a setting; the message names it.
        """
        theirs = TheirSettings(settings, origin)
        try:
            config = self.read_settings(theirs)
        except (ArithmeticError, TypeError) as error:
            raise ValueError(f"{origin} has settings out of range: {error}") from error
        theirs.finish()
        return config


def model_of(contents: Contents) -> nn.Module:
    """Build the model of some weights, in float32 on the CPU and in evaluation mode."""
    assert contents.description is not None
    model = build(contents.description)
    model.load_state_dict(contents.weights, strict=False)
    model.job = None if contents.job is None else Job.of(contents.job)  # type: ignore[assignment]
    return model.eval()


def contents_of(model: nn.Module) -> Contents:
    """The weights, description and job of a model."""
    job: Any = getattr(model, "job", None)
    return Contents(own_weights(model), describe(model), None if job is None else job.plain())


def _settled(config: Any) -> dict[str, Any]:
    """All settings of a config that have an effect, flat, with derived values in place of None."""
    found: dict[str, Any] = {}
    for name in config.__dataclass_fields__:
        value = getattr(config, name)
        if isinstance(value, BackboneConfig):
            found |= _settled(explicit(value))
        elif dataclasses.is_dataclass(value):
            found |= {f"{name}.{key}": each for key, each in _settled(value).items()}
        elif name in SIZES and value is not None:
            found[name] = as_size(value)
        elif name not in TRAINING_ONLY:
            found[name] = value
    found.pop("ignore_remainder", None)  # without an effect where there is no remainder
    if isinstance(config, EncoderConfig):
        found |= _settled_pool(config)
    return found


def _settled_pool(config: EncoderConfig) -> dict[str, Any]:
    """The settings of special tokens and of the pool, None for those without an effect."""
    is_map, has_prefix = config.pool == "map", config.num_prefix_tokens > 0
    return {
        "prefix_positions": config.prefix_positions
        if has_prefix and config.learned_positions
        else None,
        "pool_prefix_tokens": config.pools_prefix_tokens
        if has_prefix and config.pool in ("mean", "map")
        else None,
        "pool_heads": (config.pool_heads or config.backbone.num_heads) if is_map else None,
        "pool_width": (config.pool_width or 4 * config.backbone.dim) if is_map else None,
    }


def explicit(config: BackboneConfig) -> BackboneConfig:
    """The same config with derived values in place of None."""
    with torch.device("meta"):
        norm: Any = config.make_norm()
    return dataclasses.replace(
        config,
        num_kv_heads=config.num_kv_heads or config.num_heads,
        head_dim=config.resolved_head_dim,
        feed_forward_width=config.resolved_feed_forward_width,
        attention_scale=config.attention_scale or config.resolved_head_dim**-0.5,
        norm_eps=config.norm_eps or getattr(norm, "eps", None),
    )
