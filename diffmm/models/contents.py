"""What a file of weights holds, and how it is found, read and written.

    weights           tensors, by the names of the model
    description       the model, as `diffmm.models.description.describe` gives it
    job               its task, as `diffmm.models.job.Job.plain` gives it

In safetensors, description and job are JSON in the metadata, or are in a `config.json` beside the
file. In a Lightning checkpoint they are entries next to the `state_dict`. Nothing here is compared
with a model: `diffmm.models.weights` does this.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from diffmm.checkpoint_folders import STATE_NAME, find_state, why_no_weights
from diffmm.models.adapters import SCALE_KEY, merged
from diffmm.models.checkpoint_files import read_checkpoint
from diffmm.models.hub_files import resolve
from diffmm.models.job import text_reader
from diffmm.models.quantized_file import QUANTIZATION_KEY, dequantized
from diffmm.models.safetensors_files import (
    DESCRIPTION_KEY,
    INDEX_NAME,
    JOB_KEY,
    SHARDS,
    WEIGHTS_NAME,
    is_safetensors,
    read_metadata,
    read_tensors,
    weights_in,
    write_tensors,
)
from diffmm.new_folders import workspace
from diffmm.renamed import weights_with_new_names

CONFIG_NAME = "config.json"
"""Name of the file of settings beside the weights in a folder for the hub, and in folders of other
implementations."""

MODEL_TYPE = "diffmm"
"""The `model_type` in the settings of a folder of diffmm."""

OTHER_ENDINGS = (".pt", ".pth", ".ckpt", ".bin", ".pkl", ".onnx", ".h5", ".npz", ".zip", ".json")
"""Endings of files of other formats, which a folder is not called."""

CHECKPOINT_PREFIX = "model."
"""Prefix of the model's weights in a Lightning module, whose model is `self.model`."""


class Contents(NamedTuple):
    """What a file of weights holds: the weights by name, the description of their model and its job
    as plain values, or None."""

    weights: dict[str, Tensor]
    description: dict[str, Any] | None
    job: dict[str, Any] | None


def find_weights(path: str | Path) -> Path:
    """The file of weights for a path as in `diffmm.models.weights.load_model`.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If a name of the hub cannot be fetched, or no checkpoint is complete.
    """
    path = find_state(resolve(path))
    if path.suffix == Path(STATE_NAME).suffix and path.is_dir():
        return path  # a sharded checkpoint
    file = weights_in(path) if path.is_dir() else path
    if not file.is_file():
        if (why := why_no_weights(path)) is not None:
            raise FileNotFoundError(why)
        shard = min((each.name for each in file.parent.glob(SHARDS)), default=None)
        part = f", and no {INDEX_NAME}, which {shard} needs" if shard and path.is_dir() else ""
        raise FileNotFoundError(f"there is no file of weights at {file}{part}")
    return file


def read_file(file: Path) -> Contents:
    """Read a file of weights, with the current names of weights, and those of low-rank adapters
    and integers merged into floating point.

    Args:
        file: A path that `find_weights` returned.

    Raises:
        ValueError: If the file is damaged or contains no weights; the message names it.
    """
    return _read_safetensors(file) if is_safetensors(file) else _read_lightning(file)


def _read_safetensors(file: Path) -> Contents:
    weights, metadata = read_tensors(file)
    if DESCRIPTION_KEY not in metadata:  # other libraries leave out what they do not know
        settings = settings_beside(file)
        return Contents(
            weights_with_new_names(weights), settings.get("description"), settings.get(JOB_KEY)
        )
    try:
        description, job, quantization = (
            json.loads(metadata[key]) if key in metadata else None
            for key in (DESCRIPTION_KEY, JOB_KEY, QUANTIZATION_KEY)
        )
    except json.JSONDecodeError as error:
        raise ValueError(f"{file} has damaged metadata: {error}") from error
    if quantization is not None:
        try:
            weights = dequantized(weights, quantization)
        except (ValueError, ArithmeticError, RuntimeError) as error:
            raise ValueError(f"{file} has damaged integer weights: {error}") from error
    return Contents(weights_with_new_names(weights), description, job)


def _read_lightning(file: Path) -> Contents:
    checkpoint = read_checkpoint(file)
    # With Lightning's weight averaging the state_dict contains the average, but before its first
    # update that is still the initial model.
    averaging = checkpoint.get("averaging_state")
    averaged = averaging is None or averaging["n_averaged"] > 0
    state = checkpoint["state_dict" if averaged else "current_model_state"]
    weights = without_prefix(state, CHECKPOINT_PREFIX) if isinstance(state, dict) else {}
    weights = weights_with_new_names(weights)
    for name, value in weights.items():
        if not isinstance(value, Tensor):
            raise ValueError(f"{file} contains a {type(value).__name__} as {name}, not a tensor")
    if (scale := checkpoint.get(SCALE_KEY)) is not None:
        try:
            weights = merged(weights, scale)
        except ValueError as error:
            raise ValueError(f"{file} has damaged adapters: {error}") from error
    if not weights:
        raise ValueError(f"{file} contains no weights under {CHECKPOINT_PREFIX!r}")
    job = checkpoint.get(JOB_KEY)
    if JOB_KEY not in checkpoint and "tokenizer" in checkpoint:  # of an older version
        job = {"reader": text_reader(checkpoint["tokenizer"])}
    return Contents(weights, checkpoint.get(DESCRIPTION_KEY), job)


def without_prefix(weights: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The weights under `prefix`, by names without it and without the prefix of `torch.compile`."""
    return {
        name.removeprefix(prefix).removeprefix("_orig_mod."): tensor
        for name, tensor in weights.items()
        if name.startswith(prefix)
    }


def describes_model(file: Path) -> bool:
    """Whether a safetensors file or index, or the settings beside it, describe a model of diffmm.

    Raises:
        ValueError: If a file is damaged.
    """
    return DESCRIPTION_KEY in read_metadata(file) or bool(settings_beside(file))


def settings_beside(file: Path) -> dict[str, Any]:
    """The settings of diffmm beside a file of weights; empty if there are none."""
    try:
        settings = json.loads((file.parent / CONFIG_NAME).read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError, UnicodeDecodeError):
        return {}
    is_ours = isinstance(settings, dict) and settings.get("model_type") == MODEL_TYPE
    return settings if is_ours else {}


def save_contents(
    contents: Contents, path: str | Path, *, quantization: dict[str, Any] | None = None
) -> Path:
    """Save weights in their own dtypes with their description and job, as
    `diffmm.models.weights.save_model` does.

    Args:
        contents: The weights, without the further names of tied weights, and what they are.
        path: As in `save_model`.
        quantization: The settings of weights that are packed integers, with which they are read
            in floating point (see `diffmm.models.quantized_file`).

    Returns:
        The path of the file.

    Raises:
        ValueError: If the path ends like a file of another format.
        OSError: If it cannot be written; nothing is left behind then.
    """
    file = weights_file(path)
    with workspace(file) as folder:
        write_contents(contents, folder / file.name, quantization=quantization)
        (folder / file.name).replace(file)
    return file


def write_contents(
    contents: Contents,
    file: Path,
    *,
    quantization: dict[str, Any] | None = None,
    max_shard_size: int | str | None = None,
) -> None:
    """Write the file of `save_contents`, in place.

    Args:
        contents: As in `save_contents`.
        file: The path of the file.
        quantization: As in `save_contents`.
        max_shard_size: As in `diffmm.models.safetensors_files.write_tensors`: several files are
            written beside `file`, with an index.

    Raises:
        ValueError: If `max_shard_size` is not a size.
        OSError: If a file cannot be written.
    """
    metadata = {"format": "pt", DESCRIPTION_KEY: json.dumps(contents.description)}
    if contents.job is not None:
        metadata[JOB_KEY] = json.dumps(contents.job)
    if quantization is not None:
        metadata[QUANTIZATION_KEY] = json.dumps(quantization)
    weights = {name: tensor.contiguous() for name, tensor in contents.weights.items()}
    write_tensors(weights, file, metadata, max_shard_size=max_shard_size)


def weights_file(path: str | Path) -> Path:
    """The file that `save_contents` writes for a path.

    Raises:
        ValueError: If the path ends like a file of another format, or is such a file.
    """
    path = Path(path)
    if path.suffix != ".safetensors" and path.is_file():
        raise ValueError(f"{path} is a file: give a folder, or a name that ends in .safetensors")
    if path.suffix.lower() in OTHER_ENDINGS:
        raise ValueError(
            f"{path} ends in {path.suffix}, but weights are saved as safetensors: give a name that "
            f"ends in .safetensors, or a folder, in which {WEIGHTS_NAME} is written"
        )
    return path if path.suffix == ".safetensors" else path / WEIGHTS_NAME
