"""Names that have changed, so that recipes, runs and weights from before still load."""

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
"""Modules and classes, and where they are now."""

ARGUMENTS: dict[str, dict[str, str]] = {
    "datamodules.audio.SoundFolder": {"folder": "train"},
    "datamodules.audio.SoundTable": {
        "path_column": "file_column",
        "labels_column": "label_column",
    },
    "datamodules.text.TextFolder": {"path": "root"},
}
"""Arguments of classes, by the names that the classes have now."""

DEFAULTS: dict[str, dict[str, Any]] = {
    "datamodules.audio.SoundTable": {
        "file_column": "path",
        "label_column": "labels",
        "multi_label": True,
    },
}
"""What a class did under its old name where a recipe was silent, and now does otherwise."""

FIELDS = {"class_token": "cls_token", "num_registers": "num_reg_tokens"}
"""Fields of a model's config."""

WEIGHTS = {"class_token": "cls_token", "registers": "reg_token"}
"""Parameters, by the last part of their names."""

STATES = {"BadNumbers": "NonFiniteGuard", "CleanStop": "GracefulShutdown"}
"""Callbacks whose state a checkpoint holds."""

_OLD = re.compile(rf"({'|'.join(map(re.escape, sorted(CLASSES, key=len, reverse=True)))})(?![\w])")


def with_new_names(values: Any, origin: str) -> Any:
    """Plain values of a recipe, a run or a model's description in the names of today.

    Args:
        values: dicts, lists and plain values; left as they are.
        origin: the file that they are of, for the warning that names the old and the new.
    """
    found: dict[str, str] = {}
    renamed = _renamed(values, found)
    if found:
        listed = "; ".join(f"{old} is called {new} now" for old, new in found.items())
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
    """A node that says which class to make, with the arguments that the class takes today."""
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
    """A state dict, or anything keyed by parameters' names, in the names of today."""
    return {weight_name(name): weight for name, weight in weights.items()}


def weight_name(name: str) -> str:
    """A parameter's name of today."""
    path, dot, last = name.rpartition(".")
    return f"{path}{dot}{WEIGHTS.get(last, last)}"
