"""Checks of a file's weights: that they fit a model, and that they mean the same to it.

Every error names the file, and the weights or settings that differ.
"""

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffmm.models.adapters import plain_names
from diffmm.models.backbone import BackboneConfig
from diffmm.models.contents import Contents
from diffmm.models.description import build, configured

HEAD_PREFIX = "head."
SHOWN = 4


def outline(contents: Contents, file: Path) -> nn.Module:
    """Build the model that a file describes on the meta device, so that it takes no memory.

    Raises:
        ValueError: If it cannot be built, or is far larger than the file.
    """
    for depth in _depths(contents.description):
        if depth > len(contents.weights):
            raise ValueError(
                f"{file} describes a model of {depth} blocks, but contains "
                f"{len(contents.weights)} tensors"
            )
    description: Any = contents.description
    try:
        with torch.device("meta"):
            return build(description)
    except (ValueError, ArithmeticError, RuntimeError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{file} describes a model that cannot be built: {reason}") from error


def _depths(description: Any) -> Iterator[int]:
    """The number of blocks of every backbone in a description."""
    if isinstance(description, dict):
        for name, value in description.items():
            if name == "depth" and isinstance(value, int):
                yield value
            yield from _depths(value)


def aliases(model: nn.Module) -> dict[str, str]:
    """The further names of tied weights, each with its first name."""
    first: dict[int, str] = {}
    tensors = model.state_dict(keep_vars=True)
    names = {
        plain: first.setdefault(id(tensors[name]), plain)
        for plain, name in plain_names(tensors).items()
    }
    return {name: original for name, original in names.items() if name != original}


def check_fit(
    model: nn.Module, weights: dict[str, Tensor], file: Path, *, skipped: Collection[str] = ()
) -> dict[str, Tensor]:
    """Check that weights fit a model in names and shapes.

    Args:
        model: The model, which may be on the meta device.
        weights: The weights, with or without the further names of tied ones.
        file: Their file, for messages.
        skipped: Names of the model's weights that are not among them.

    Returns:
        The weights with all names of tied ones.

    Raises:
        ValueError: If they do not fit, tied weights differ, or a tensor is incomplete or has
            numbers that are not finite.
    """
    for name, tensor in weights.items():
        if tensor.untyped_storage().nbytes() < tensor.numel() * tensor.element_size():
            raise ValueError(
                f"{file} contains less data of {name} than its shape {tuple(tensor.shape)} needs"
            )
        if count := _num_not_finite(tensor):
            raise ValueError(
                f"{file} has {count} of {tensor.numel()} numbers in {name} that are not finite, as "
                f"a training that diverged writes them: choose an earlier checkpoint"
            )
    weights = _with_aliases(model, weights, file, skipped)
    state = model.state_dict()
    expected = {n: state[name] for n, name in plain_names(state).items() if n not in skipped}
    faults = {
        "missing": [name for name in expected if name not in weights],
        "unexpected": [name for name in weights if name not in expected],
        "of another shape": of_another_shape(weights, expected),
    }
    if any(faults.values()):
        details = "; ".join(_listed(kind, names) for kind, names in faults.items() if names)
        every = [name for names in faults.values() for name in names]
        only_head = all(name.startswith(HEAD_PREFIX) for name in every)
        advice = ". Only the head differs: skip_head=True keeps the new one" if only_head else ""
        raise ValueError(f"{file} does not fit {type(model).__name__}: {details}{advice}")
    return weights


def _num_not_finite(tensor: Tensor) -> int:
    """The number of elements that are infinite or not a number."""
    if not tensor.is_floating_point():
        return 0
    if tensor.itemsize == 1:
        tensor = tensor.bfloat16()  # torch has no `isfinite` for all float8
    return tensor.numel() - int(tensor.isfinite().sum())


def of_another_shape(weights: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> list[str]:
    """The weights whose shape is not the expected one, each with both shapes."""
    return [
        f"{name} {tuple(weights[name].shape)}, needed {tuple(tensor.shape)}"
        for name, tensor in expected.items()
        if name in weights and weights[name].shape != tensor.shape
    ]


def _with_aliases(
    model: nn.Module, weights: dict[str, Tensor], file: Path, skipped: Collection[str]
) -> dict[str, Tensor]:
    """The weights with all names of tied ones, which must not differ."""
    weights = dict(weights)
    for alias, name in aliases(model).items():
        if alias in skipped or name not in weights:
            continue
        if not torch.equal(weights.setdefault(alias, weights[name]), weights[name]):
            raise ValueError(f"{file} has different {alias} and {name}, but the model ties the two")
    return weights


def _listed(kind: str, names: list[str]) -> str:
    more = f", and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return f"{len(names)} {kind} ({', '.join(names[:SHOWN])}{more})"


def check_meaning(model: nn.Module, description: dict[str, Any] | None, file: Path) -> None:
    """Check that weights were trained with the settings of a model that change their meaning but
    not their shapes. Weights without a description are not checked.

    Raises:
        ValueError: If settings differ, or the description is damaged.
    """
    if description is None:
        return
    config: Any = getattr(model, "config", None)
    source = _fields(_fields(description, file).get("config", {}), file)
    encoders = getattr(config, "towers", {"encoder": getattr(config, "encoder", config)})
    for name, encoder in encoders.items():
        _check_encoder(encoder, _fields(source.get(name) or source, file), file)


def _fields(values: Any, file: Path) -> dict[str, Any]:
    """Part of a description, which must be settings by name."""
    if not isinstance(values, dict):
        raise ValueError(
            f"{file} describes a model that cannot be built: it has {values!r:.200} in place of "
            f"settings by name"
        )
    return values


def _check_encoder(config: Any, source: dict[str, Any], file: Path) -> None:
    """Compare the config of an encoder or decoder with the plain values of another one."""
    if source.get("backbone") is None or not hasattr(config, "backbone"):
        return
    try:
        theirs = _meaning(configured(BackboneConfig, source["backbone"]))
    except ValueError as error:
        raise ValueError(f"{file} describes a model that cannot be built: {error}") from error
    ours = _meaning(config.backbone)
    differing = [
        f"{name} {theirs[name]!r}, needed {ours[name]!r}"
        for name in ours
        if theirs[name] != ours[name]
    ]
    coordinates = getattr(config, "rope_coordinates", None)
    if coordinates not in (None, given := source.get("rope_coordinates", "patches")):
        differing.append(f"rope_coordinates {given!r}, needed {coordinates!r}")
    if differing:
        raise ValueError(f"{file} has another architecture: {'; '.join(differing)}")


def _meaning(config: BackboneConfig) -> dict[str, object]:
    """The settings that determine the meaning of weights, whatever their shapes. `rope_base` is not
    among them, because it may be changed to extend a model to longer sequences."""
    names = (
        *("attention", "num_heads", "rope", "share", "lambda_init", "combine"),
        *("norm", "feed_forward", "attention_scale", "lambda_layer_offset", "heads_per_noise"),
    )
    return {
        **{name: getattr(config, name) for name in names},
        "num_kv_heads": config.num_kv_heads or config.num_heads,
        "head_dim": config.resolved_head_dim,
    }
