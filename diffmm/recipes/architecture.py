"""Fine-tuning a model whose architecture is not that of the recipe: it is that of the weights."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from diffmm.models.description import MODELS, config_class, configured
from diffmm.models.image import ImageConfig
from diffmm.models.weights import load_description
from diffmm.recipes.references import resolve
from diffmm.recipes.settings import override, parse_overrides

CONFIG = ("model", "init_args", "model", "init_args", "config")
"""Where a recipe has the config of its model."""

IMAGE_SIZE = "image_size"

OF_THE_TASK = ("num_classes", IMAGE_SIZE, "clip_seconds", "max_length", "causal")
"""Fields of a config that follow from the data and the task. Weights fit, are resampled, or the
mistake is reported when they are loaded."""

OF_TRAINING = ("dropout", "drop_path", "backend", "init_std")
"""Fields of a backbone's config that do not change the meaning of weights."""

OF_THE_HEAD = ("pool", "head")
"""Fields of a config that an encoder of a masked autoencoder does not use."""

MOST_SHOWN = 6


def with_architecture(
    values: dict[str, Any], weights: Path, overrides: Sequence[str]
) -> str | None:
    """Set the architecture of a recipe's model to that of pretrained weights, in place.

    Settings that `overrides` contain are kept, as are those of the data, the task and the training,
    except for the number of channels. A setting that refers to a variable (`attention:
    ${vars.attention}`) sets the variable.

    Args:
        values: Values of the recipe with the overrides.
        weights: Checkpoint or weights file.
        overrides: Overrides of the command line.

    Returns:
        A line that says what was changed, and whether images have another size than those of the
        weights; None if neither, or if the file does not describe a model of the recipe's kind.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file cannot be read, the recipe's config is invalid, or the overrides
            contain another attention.
    """
    description = load_description(weights)
    raw: Any = values
    for part in CONFIG:
        raw = raw.get(part) if isinstance(raw, dict) else None
    if description is None or not isinstance(raw, dict):
        return None
    class_path = values["model"]["init_args"]["model"].get("class_path")
    theirs, left_out = description["config"], set(OF_THE_TASK)
    if "encoder" in theirs and class_path in MODELS and class_path != description["class_path"]:
        theirs = theirs["encoder"]
        left_out |= set(OF_THE_HEAD)
    elif class_path != description["class_path"]:
        return None
    resolved: Any = resolve(values)[0]
    for part in CONFIG:
        resolved = resolved[part]
    size = resolved.get(IMAGE_SIZE)
    if size is not None:  # it may be a multiple of the weights' patches alone
        resolved = {**resolved, IMAGE_SIZE: resolved.get("patch_size", ImageConfig.patch_size)}
    ours = asdict(configured(config_class(class_path), resolved))
    given = {_short(key) for key, _ in parse_overrides(overrides)}
    changed = []
    for path, value in _leaves(theirs):
        name = path[-1]
        if name in left_out or ("backbone" in path and name in OF_TRAINING):
            continue
        if _at(ours, path, missing=value) == value:
            continue
        key = ".".join((*CONFIG, *path))
        reference = re.fullmatch(r"\$\{(vars\.\w+)\}", str(_at(raw, path, missing="")))
        target = reference[1] if reference else key
        if any(f"{_short(each)}.".startswith(f"{one}.") for each in (key, target) for one in given):
            if name == "attention":
                raise ValueError(
                    f"{weights} has the attention {value!r}, not "
                    f"{_at(ours, path, missing=None)!r}: leave out --{_short(target)}, or convert "
                    f"softmax weights first (diffmm upcycle)"
                )
            continue
        override(values, target, value)
        changed.append(f"{name} {value}")
    lines = []
    if changed:
        more = f" and {len(changed) - MOST_SHOWN} more" if len(changed) > MOST_SHOWN else ""
        lines.append(f"architecture of the weights: {', '.join(changed[:MOST_SHOWN])}{more}")
    if size is not None and _sides(size) != _sides(theirs[IMAGE_SIZE]):
        lines.append(
            f"images have {_sides(size)} pixels, those of the weights had "
            f"{_sides(theirs[IMAGE_SIZE])}: --vars.image_size sets their size"
        )
    return "; ".join(lines) or None


def _sides(size: Any) -> str:
    height, width = size if isinstance(size, list | tuple) else (size, size)
    return f"{height} x {width}"


def _leaves(values: dict[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[Any, Any]]:
    """The paths and values of a config's fields, also of nested configs."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _leaves(value, (*path, name))
        else:
            yield (*path, name), value


def _at(values: Any, path: Sequence[str], *, missing: Any) -> Any:
    """The value at a path, with tuples as lists."""
    for name in path:
        if not isinstance(values, dict) or name not in values:
            return missing
        values = values[name]
    return list(values) if isinstance(values, tuple) else values


def _short(key: str) -> str:
    """A dotted key without `init_args`."""
    return ".".join(part for part in key.split(".") if part != "init_args")
