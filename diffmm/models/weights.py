"""Saving and loading of weights, together with the model's description as plain data.

A file of weights is either a Lightning checkpoint (`.ckpt`, written in training, with the model's
description under the key `"model"` and its job under `"job"`) or a safetensors file, or several
with an index, with both in the metadata or in a `config.json`. All are read as tensors and plain
values only, so opening a file never runs code from it. A checkpoint folder stands for the file in
it, and a run for its newest complete checkpoint.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from diffmm.checkpoint_folders import STATE_NAME, find_state
from diffmm.models.adapters import SCALE_KEY, merged, plain_names, scale_of
from diffmm.models.backbone import BackboneConfig
from diffmm.models.checkpoint_files import read_checkpoint
from diffmm.models.contrastive import ContrastiveModel
from diffmm.models.description import build, configured, describe, unwrap
from diffmm.models.hub_files import resolve
from diffmm.models.job import Job, text_reader
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
from diffmm.renamed import weights_with_new_names, with_new_names

__all__ = [
    "Contents",
    "build",
    "describe",
    "load_description",
    "load_job",
    "load_model",
    "load_weights",
    "own_weights",
    "read_contents",
    "save_contents",
    "save_model",
    "write_contents",
]

CONFIG_NAME = "config.json"
"""Name of the file of settings beside the weights in a folder for the hub, and in folders of other
implementations."""

MODEL_TYPE = "diffmm"
"""The `model_type` in the settings of a folder of diffmm."""

OTHER_ENDINGS = (".pt", ".pth", ".ckpt", ".bin", ".pkl", ".onnx", ".h5", ".npz", ".zip", ".json")
"""Endings of files of other formats, which a folder is not called."""

CHECKPOINT_PREFIX = "model."
"""Prefix of the model's weights in a Lightning module, whose model is `self.model`."""

CONTRASTIVE = f"diffmm.models.{ContrastiveModel.__name__}"
HEAD_PREFIX = "head."
ENCODER_PREFIX = "encoder."
SHOWN = 4


def save_model(model: nn.Module, path: str | Path) -> Path:
    """Save a model's weights, its description and its job (`model.job`, if it has one) as
    safetensors, to be read by `load_model`. The file is written atomically.

    Args:
        model: A model of `diffmm.models`, also with LoRA adapters or in a `PeftModel` of PEFT: the
            merged weights are saved.
        path: A file ending in `.safetensors`, or a folder, which is created if it does not exist.

    Returns:
        The path of the file.

    Raises:
        ValueError: If the model's class is not in `diffmm.models`, the job does not match it, its
            adapters cannot be merged, or the path ends like a file of another format.
    """
    return save_contents(saved_contents(model), path)


def saved_contents(model: nn.Module) -> "Contents":
    """What `save_model` writes of a model.

    Raises:
        ValueError: As `save_model`.
    """
    model = unwrap(model)
    base: Any = getattr(model, "get_base_model", None)  # of PEFT
    model = model if base is None else base()
    job: Any = getattr(model, "job", None)
    if job is not None:
        job.check_fit(model)
        job = job.plain()
    return Contents(own_weights(model), describe(model), job)


def own_weights(model: nn.Module) -> dict[str, Tensor]:
    """The weights of a model by name, without the further names of tied weights; those of low-rank
    adapters are merged (see `diffmm.models.adapters`).

    Raises:
        ValueError: If the model has adapters of another kind.
    """
    aliases = _aliases(model)
    scale = scale_of(model)
    weights = model.state_dict() if scale is None else merged(model.state_dict(), scale)
    return {name: tensor for name, tensor in weights.items() if name not in aliases}


def save_contents(
    contents: "Contents", path: str | Path, *, quantization: dict[str, Any] | None = None
) -> Path:
    """Save weights in their own dtypes with their description and job, as `save_model` does.

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
    contents: "Contents",
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
    """The file that `save_model` writes for a path.

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


def load_model(path: str | Path) -> nn.Module:
    """Load the model in a file, in float32 on the CPU and in evaluation mode.

    From a checkpoint of a run with Lightning's weight averaging, the averaged model is loaded. Its
    `job` is a `diffmm.models.job.Job`, or `None` if the file has none.

    Args:
        path: A run, a checkpoint folder, a Lightning checkpoint, a `.safetensors` file or a
            folder with a `model.safetensors`, the latter two as written by `save_model`, a
            `model.safetensors.index.json` of several such files or its folder, or the name of a
            repository on the Hugging Face hub, `user/name`.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If the file cannot be read or has no description of its model, or no
            checkpoint is complete.
    """
    file = find_weights(path)
    weights, description, job = _described(file)
    assert description is not None
    model = build(description)
    _fill(model, weights, set(), file)
    model.job = _job(job, model, file)  # type: ignore[assignment]
    return model.eval()


def read_contents(path: str | Path) -> "Contents":
    """Read what a file holds, with weights in their own dtypes and without the further names of
    tied ones, after the checks of `load_model`.

    Args:
        path: As in `load_model`.

    Raises:
        FileNotFoundError, ValueError: As `load_model`.
    """
    file = find_weights(path)
    weights, description, job = _described(file)
    _job(job, None, file)
    aliases = _aliases(_outline(description, weights, file))
    return Contents(
        {name: tensor for name, tensor in weights.items() if name not in aliases}, description, job
    )


def load_job(path: str | Path) -> Job | None:
    """Read the job of the model in a file; `None` if the file has none.

    Args:
        path: As in `load_model`.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If the file cannot be read, or its job is invalid.
    """
    file = find_weights(path)
    return _job(_read(file).job, None, file)


def load_description(path: str | Path) -> dict[str, Any] | None:
    """Read the description of the model in a file, with the current names of its settings; `None`
    if the file has none.

    Args:
        path: As in `load_model`.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If the file cannot be read, or describes a model that cannot be built.
    """
    file = find_weights(path)
    weights, description, _ = _read(file)
    return None if description is None else describe(_outline(description, weights, file))


def load_weights(model: nn.Module, path: str | Path, *, skip_head: bool = False) -> list[str]:
    """Load the weights in a file into `model`: all of them, or none if they do not fit.

    An image or audio model can be loaded from the encoder of a masked autoencoder, and these and
    text towers from the tower of their kind in a contrastive model. If the model has a method
    `resample_weights(weights) -> weights`, it may first convert weights to its own shapes (for
    example, learned positions of another image size).

    Args:
        model: The model, modified in place.
        path: As in `load_model`; the file needs no description.
        skip_head: Whether to keep the model's head and ignore that of the file. Required for the
            head of a model that is loaded from a masked autoencoder, which has none.

    Returns:
        The names of the weights that were not loaded.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If names or shapes of weights do not fit, or settings differ that change the
            meaning of weights; the message names the file and the differences.
    """
    model = unwrap(model)
    file = find_weights(path)
    weights, description, _ = _read(file)
    weights, description = _of_tower(model, weights, description, file)
    expected = plain_names(model.state_dict())
    if not any(name.startswith(ENCODER_PREFIX) for name in expected):
        encoder = _under(weights, ENCODER_PREFIX)
        weights = encoder or weights
    _check_meaning(model, description, file)
    skipped = {name for name in expected if skip_head and name.startswith(HEAD_PREFIX)}
    if skip_head:
        weights = {n: tensor for n, tensor in weights.items() if not n.startswith(HEAD_PREFIX)}
    resample: Any = getattr(model, "resample_weights", None)
    if resample is not None:
        weights = resample(weights)
    _fill(model, weights, skipped, file)
    return sorted(skipped - set(_aliases(model)))


class Contents(NamedTuple):
    """What a file of weights holds: the weights by name, the description of their model and its job
    as plain values, or None."""

    weights: dict[str, Tensor]
    description: dict[str, Any] | None
    job: dict[str, Any] | None


def _described(file: Path) -> Contents:
    """Read a file whose weights fit its description."""
    contents = _read(file)
    if contents.description is None:
        raise ValueError(
            f"{file} does not describe the model of its weights, and there is no {CONFIG_NAME} "
            f"beside it: put that of the model there and convert it (diffmm convert), or build the "
            f"model and use load_weights"
        )
    model = _outline(contents.description, contents.weights, file)
    _check_fit(model, contents.weights, set(), file)
    return contents


def find_weights(path: str | Path) -> Path:
    """The file of weights for a path as in `load_model`, or a name of the hub.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If a name of the hub cannot be fetched, or no checkpoint is complete.
    """
    path = find_state(resolve(path))
    if path.suffix == Path(STATE_NAME).suffix and path.is_dir():
        return path  # a sharded checkpoint
    file = weights_in(path) if path.is_dir() else path
    if not file.is_file():
        shard = min((each.name for each in file.parent.glob(SHARDS)), default=None)
        part = f", and no {INDEX_NAME}, which {shard} needs" if shard and path.is_dir() else ""
        raise FileNotFoundError(f"there is no file of weights at {file}{part}")
    return file


def _read(file: Path) -> Contents:
    """Read the weights by the model's names, and the description and the job if there are any."""
    if is_safetensors(file):
        weights, metadata = read_tensors(file)
        try:
            if DESCRIPTION_KEY in metadata:
                description, job, quantization = (
                    json.loads(metadata[key]) if key in metadata else None
                    for key in (DESCRIPTION_KEY, JOB_KEY, QUANTIZATION_KEY)
                )
            else:  # other libraries leave out what they do not know
                settings = settings_beside(file)
                description, job = (settings.get(key) for key in ("description", JOB_KEY))
                quantization = None
        except json.JSONDecodeError as error:
            raise ValueError(f"{file} has damaged metadata: {error}") from error
        if quantization is not None:
            try:
                weights = dequantized(weights, quantization)
            except (ValueError, ArithmeticError, RuntimeError) as error:
                raise ValueError(f"{file} has damaged integer weights: {error}") from error
        return Contents(weights_with_new_names(weights), description, job)
    checkpoint = read_checkpoint(file)
    # With Lightning's weight averaging the state_dict contains the average, but before its first
    # update that is still the initial model.
    averaging = checkpoint.get("averaging_state")
    averaged = averaging is None or averaging["n_averaged"] > 0
    weights = checkpoint["state_dict" if averaged else "current_model_state"]
    weights = _under(weights, CHECKPOINT_PREFIX) if isinstance(weights, dict) else {}
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
    return Contents(weights, checkpoint.get(DESCRIPTION_KEY), _job_values(checkpoint))


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


def _job_values(checkpoint: dict[str, Any]) -> dict[str, Any] | None:
    """The model's job in a checkpoint; older checkpoints only have the name of a tokenizer."""
    if JOB_KEY not in checkpoint and "tokenizer" in checkpoint:
        return {"reader": text_reader(checkpoint["tokenizer"])}
    return checkpoint.get(JOB_KEY)


def _job(values: dict[str, Any] | None, model: nn.Module | None, file: Path) -> Job | None:
    if values is None:
        return None
    try:
        job = Job.of(with_new_names(values, str(file)))
        job.check_fit(model)
    except ValueError as error:
        raise ValueError(f"{file} has an invalid job of its model: {error}") from error
    return job


def _under(weights: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The weights with `prefix`, without it and without the prefix of `torch.compile`."""
    return {
        name.removeprefix(prefix).removeprefix("_orig_mod."): tensor
        for name, tensor in weights.items()
        if name.startswith(prefix)
    }


def _outline(description: Any, weights: dict[str, Tensor], file: Path) -> nn.Module:
    """Build the model that a file describes on the meta device, so that it takes no memory."""
    for depth in _depths(description):
        if depth > len(weights):
            raise ValueError(
                f"{file} describes a model of {depth} blocks, but contains {len(weights)} tensors"
            )
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


def _fill(model: nn.Module, weights: dict[str, Tensor], skipped: set[str], file: Path) -> None:
    """Load `weights` into the model except `skipped`, or raise an error and leave it unchanged."""
    weights = _check_fit(model, weights, skipped, file)
    names = plain_names(model.state_dict())
    model.load_state_dict({names[n]: tensor for n, tensor in weights.items()}, strict=False)


def _check_fit(
    model: nn.Module, weights: dict[str, Tensor], skipped: set[str], file: Path
) -> dict[str, Tensor]:
    """Check that `weights` fit the model except `skipped`, and return them with all names of tied
    weights. The model may be on the meta device."""
    for name, tensor in weights.items():
        if tensor.untyped_storage().nbytes() < tensor.numel() * tensor.element_size():
            raise ValueError(
                f"{file} contains less data of {name} than its shape {tuple(tensor.shape)} needs"
            )
    weights = dict(weights)
    for alias, name in _aliases(model).items():
        if alias in skipped or name not in weights:
            continue
        if not torch.equal(weights.setdefault(alias, weights[name]), weights[name]):
            raise ValueError(f"{file} has different {alias} and {name}, but the model ties the two")
    state = model.state_dict()
    expected = {n: state[name] for n, name in plain_names(state).items() if n not in skipped}
    faults = {
        "missing": [name for name in expected if name not in weights],
        "unexpected": [name for name in weights if name not in expected],
        "of another shape": [
            f"{name} {tuple(weights[name].shape)}, needed {tuple(tensor.shape)}"
            for name, tensor in expected.items()
            if name in weights and weights[name].shape != tensor.shape
        ],
    }
    if any(faults.values()):
        details = "; ".join(_listed(kind, names) for kind, names in faults.items() if names)
        every = [name for names in faults.values() for name in names]
        only_head = all(name.startswith(HEAD_PREFIX) for name in every)
        advice = ". Only the head differs: skip_head=True keeps the new one" if only_head else ""
        raise ValueError(f"{file} does not fit {type(model).__name__}: {details}{advice}")
    return weights


def _of_tower(
    model: nn.Module, weights: dict[str, Tensor], description: Any, file: Path
) -> tuple[dict[str, Tensor], Any]:
    """The tower of the model's class in a file of a contrastive model; other files unchanged.

    Raises:
        ValueError: If the file has no such tower.
    """
    class_path = description.get("class_path") if isinstance(description, dict) else None
    if isinstance(model, ContrastiveModel) or class_path != CONTRASTIVE:
        return weights, description
    whole: Any = _outline(description, weights, file)
    kinds = {name: type(tower) for name, tower in whole.towers.items()}
    name = next((name for name, kind in kinds.items() if isinstance(model, kind)), None)
    if name is None:
        raise ValueError(
            f"{file} contains a ContrastiveModel, whose towers are "
            f"{', '.join(kind.__name__ for kind in kinds.values())}, not {type(model).__name__}"
        )
    weights = dict(weights)
    whole.add_aliases(weights)
    return _under(weights, f"{name}."), {"config": description["config"][name]}


def _listed(kind: str, names: list[str]) -> str:
    more = f", and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return f"{len(names)} {kind} ({', '.join(names[:SHOWN])}{more})"


def _check_meaning(model: nn.Module, description: dict[str, Any] | None, file: Path) -> None:
    """Raise an error for weights whose shapes fit but whose meaning differs."""
    config: Any = getattr(model, "config", None)
    source = (description or {}).get("config", {})
    towers = getattr(config, "towers", {"encoder": getattr(config, "encoder", config)})
    for name, tower in towers.items():
        _check_meaning_of(tower, source.get(name) or source, file)


def _check_meaning_of(config: Any, encoder: dict[str, Any], file: Path) -> None:
    source = encoder.get("backbone")
    if source is None or not hasattr(config, "backbone"):
        return
    try:
        theirs, ours = _meaning(configured(BackboneConfig, source)), _meaning(config.backbone)
    except ValueError as error:
        raise ValueError(f"{file} describes a model that cannot be built: {error}") from error
    differing = [
        f"{name} {theirs[name]!r}, needed {ours[name]!r}"
        for name in ours
        if theirs[name] != ours[name]
    ]
    coordinates = getattr(config, "rope_coordinates", None)
    if coordinates not in (None, given := encoder.get("rope_coordinates", "patches")):
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


def _aliases(model: nn.Module) -> dict[str, str]:
    """The further names of tied weights, each with its first name."""
    first: dict[int, str] = {}
    tensors = model.state_dict(keep_vars=True)
    names = {
        plain: first.setdefault(id(tensors[name]), plain)
        for plain, name in plain_names(tensors).items()
    }
    return {name: original for name, original in names.items() if name != original}
