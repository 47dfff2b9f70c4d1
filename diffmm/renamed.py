"""Renamed classes and arguments, so that older recipes, runs and weights still load."""

import re
import warnings
from typing import Any

CLASSES = {
    "datamodules.audio.Manifest": "datamodules.audio.SoundTable",
    "datamodules.audio_augment": "datamodules.audio",
    "datamodules.audio_sources": "datamodules.audio",
    "datamodules.audio_sources.Manifest": "datamodules.audio.SoundTable",
    "datamodules.image_sources": "datamodules.image",
    "datamodules.image_transform": "datamodules.image",
    "datamodules.sound_events": "datamodules.audio",
    "datamodules.text_datasets": "datamodules.text",
    "datamodules.text_sources": "datamodules.text",
    "datamodules.bad_samples": "datamodules.shared.bad_samples",
    "diffmm.training.BadNumbers": "diffmm.training.NonFiniteGuard",
    "diffmm.training.CleanStop": "diffmm.training.GracefulShutdown",
    "diffmm.training.bad_numbers.BadNumbers": "diffmm.training.NonFiniteGuard",
    "diffmm.training.loggers": "diffmm.training.resilience.loggers",
    "diffmm.training.stops.CleanStop": "diffmm.training.GracefulShutdown",
    "diffmm.training.checkpoints": "diffmm.training.resilience.checkpoints",
}
"""Old and new paths of modules and classes."""

ARGUMENTS: dict[str, dict[str, str]] = {
    "datamodules.audio.SoundFolder": {"folder": "train"},
    "datamodules.audio.SoundTable": {
        "path_column": "file_column",
        "labels_column": "label_column",
    },
    "datamodules.text.TextFolder": {"path": "root"},
}
"""Old and new names of arguments, by the new names of their classes."""

DEFAULTS: dict[str, dict[str, Any]] = {
    "datamodules.audio.SoundTable": {
        "file_column": "path",
        "label_column": "labels",
        "multi_label": True,
    },
}
"""Defaults of a class under its old name that have changed."""

FIELDS = {"class_token": "cls_token", "num_registers": "num_reg_tokens"}
"""Old and new names of fields of model configs."""

WEIGHTS = {"class_token": "cls_token", "registers": "reg_token"}
"""Old and new names of parameters, by the last part of their names."""

STATES = {"BadNumbers": "NonFiniteGuard", "CleanStop": "GracefulShutdown"}
"""Old and new names of callbacks whose state is in checkpoints."""

_OLD = re.compile(rf"({'|'.join(map(re.escape, sorted(CLASSES, key=len, reverse=True)))})(?![\w])")


def with_new_names(values: Any, origin: str) -> Any:
    """Replace old names in the plain values of a recipe, a run or a model's description.

    Args:
        values: Dicts, lists and plain values; not modified.
        origin: The file of the values, for the warning about old names.
    """
    found: dict[str, str] = {}
    renamed = _renamed(values, found)
    if found:
        listed = "; ".join(f"{old} is now {new}" for old, new in found.items())
        warnings.warn(f"{origin} has old names: {listed}", FutureWarning, stacklevel=2)
    return renamed


def _renamed(values: Any, found: dict[str, str]) -> Any:
    if isinstance(values, list):
        return [_renamed(value, found) for value in values]
    if not isinstance(values, dict):
        return values
    renamed = {}
    for key, value in values.items():
        new_key, new_value = key, _renamed(value, found)
        if key in FIELDS and FIELDS[key] not in values:
            new_key = found[key] = FIELDS[key]
        if key == "class_path" and isinstance(value, str) and (match := _OLD.match(value)):
            new_value = found[value] = CLASSES[match[1]] + value[match.end() :]
        renamed[new_key] = new_value
    return _with_new_arguments(renamed, values.get("class_path"), found)


def _with_new_arguments(
    node: dict[str, Any], old_class: Any, found: dict[str, str]
) -> dict[str, Any]:
    """Rename the arguments of a node that names a class."""
    new_class, arguments = node.get("class_path"), node.get("init_args", {})
    if not isinstance(new_class, str) or not isinstance(arguments, dict):
        return node
    renamed: dict[str, Any] = {}
    for name, value in arguments.items():
        new_name = ARGUMENTS.get(new_class, {}).get(name) or str(name)
        if new_name != name and new_name not in arguments:
            found[f"{name} of {new_class}"] = new_name
            renamed[new_name] = value
        else:
            renamed[name] = value
    if new_class != old_class:
        renamed = {**DEFAULTS.get(new_class, {}), **renamed}
    return {**node, "init_args": renamed} if renamed or "init_args" in node else node


def weights_with_new_names(weights: dict[str, Any]) -> dict[str, Any]:
    """Replace old names in a state dict, or another dict with the names of parameters as keys."""
    return {weight_name(name): weight for name, weight in weights.items()}


def weight_name(name: str) -> str:
    """The current name of a parameter."""
    path, dot, last = name.rpartition(".")
    return f"{path}{dot}{WEIGHTS.get(last, last)}"
