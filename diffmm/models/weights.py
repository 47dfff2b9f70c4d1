"""Weights in files, and with them the architecture that they belong to, as plain data.

A file of weights is one of two kinds: a Lightning checkpoint (`.ckpt`, written in training, with
the description under the key `"model"` and what the model is for under `"job"`), or safetensors
written by `save_model`. Both are read as tensors and plain values only: opening a file never runs
code from it. The folder of a checkpoint stands for the file in it, and a run for its newest whole
checkpoint.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from diffmm.checkpoint_folders import STATE_NAME, find_state
from diffmm.models.backbone import BackboneConfig
from diffmm.models.checkpoint_files import read_checkpoint
from diffmm.models.description import build, configured, describe, unwrap
from diffmm.models.job import Job, text_reader
from diffmm.renamed import weights_with_new_names, with_new_names

__all__ = ["build", "describe", "load_model", "load_weights", "save_model"]

DESCRIPTION_KEY = "model"
"""Where a file keeps its description: a key of a checkpoint, or of the safetensors metadata."""

JOB_KEY = "job"
"""Likewise what the model is for (see `diffmm.models.job`)."""

WEIGHTS_NAME = "model.safetensors"
"""The file of weights in a folder written by `save_model`."""

CHECKPOINT_PREFIX = "model."
"""A Lightning module keeps its model in `self.model`."""

HEAD_PREFIX = "head."
ENCODER_PREFIX = "encoder."
SHOWN = 4


def save_model(model: nn.Module, path: str | Path) -> Path:
    """Write a model's weights, its description and (`model.job`, if it has one) what it is for as
    safetensors; `load_model` reads them back.

    The file appears whole or not at all.

    Args:
        model: any of `diffmm.models`.
        path: a file ending in `.safetensors`, or a folder, made if need be.

    Returns:
        The file.

    Raises:
        ValueError: for a model that is none of `diffmm.models`, or a job of other classes.
    """
    model = unwrap(model)
    metadata = {"format": "pt", DESCRIPTION_KEY: json.dumps(describe(model))}
    job: Any = getattr(model, "job", None)
    if job is not None:
        job.check_fit(model)
        metadata[JOB_KEY] = json.dumps(job.plain())
    path = Path(path)
    file = path if path.suffix == ".safetensors" else path / WEIGHTS_NAME
    file.parent.mkdir(parents=True, exist_ok=True)
    aliases = _aliases(model)
    weights = {
        name: tensor.contiguous()
        for name, tensor in model.state_dict().items()
        if name not in aliases
    }
    unfinished = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        save_file(weights, unfinished, metadata=metadata)
        unfinished.replace(file)
    finally:
        unfinished.unlink(missing_ok=True)
    return file


def load_model(path: str | Path) -> nn.Module:
    """The model in a file, float32 on the CPU, in evaluation mode.

    Of a checkpoint that was trained with Lightning's weight averaging it is the averaged model.
    Its `job` is a `diffmm.models.job.Job`, or `None` where the file says nothing of that.

    Args:
        path: a run, a checkpoint's folder, a Lightning checkpoint, a `.safetensors` file or a
            folder with a `model.safetensors`, the latter two as written by `save_model`.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: naming the file, if it cannot be read or does not hold a described model, or
            the checkpoints, if none is whole.
    """
    file = _find(path)
    weights, description, job = _read(file)
    if description is None:
        raise ValueError(
            f"{file} says nothing about the model its weights belong to: "
            f"build the model and fill it with load_weights"
        )
    _check_fit(_outline(description, weights, file), weights, set(), file)
    model = build(description)
    _fill(model, weights, set(), file)
    model.job = _job(job, model, file)  # type: ignore[assignment]
    return model.eval()


def load_weights(model: nn.Module, path: str | Path, *, skip_head: bool = False) -> list[str]:
    """Start `model` from the weights in a file: all of them, or none where they do not fit.

    The encoder of a masked autoencoder starts an image or audio model. Where a model has a method
    `resample_weights(weights) -> weights`, it may first bring weights to its own shapes (learned
    positions of another image size).

    Args:
        model: filled in place.
        path: as in `load_model`; the file needs no description.
        skip_head: leave the model's own head as it is and ignore the file's. A masked autoencoder
            has no head to give.

    Returns:
        The names of the weights that were left as they are.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: naming the file and what does not fit: keys, shapes, or settings that give the
            same shapes another meaning.
    """
    model = unwrap(model)
    file = _find(path)
    weights, description, _ = _read(file)
    expected = model.state_dict()
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


class _Contents(NamedTuple):
    weights: dict[str, Tensor]
    description: dict[str, Any] | None
    job: dict[str, Any] | None


def _find(path: str | Path) -> Path:
    path = find_state(Path(path))
    if path.suffix == Path(STATE_NAME).suffix and path.is_dir():
        return path  # of shares, one of each process
    file = path / WEIGHTS_NAME if path.is_dir() else path
    if not file.is_file():
        raise FileNotFoundError(f"there is no file of weights at {file}")
    return file


def _read(file: Path) -> _Contents:
    """The model's weights under its own names, and its description if the file has one."""
    if file.suffix == ".safetensors":
        try:
            with safe_open(file, framework="pt") as opened:
                metadata = opened.metadata() or {}
                weights = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
            weights = weights_with_new_names(weights)
            told = [
                json.loads(metadata[key]) if key in metadata else None
                for key in (DESCRIPTION_KEY, JOB_KEY)
            ]
            return _Contents(weights, *told)
        except (SafetensorError, json.JSONDecodeError) as error:
            raise ValueError(f"{file} is not a whole safetensors file: {error}") from error
    checkpoint = read_checkpoint(file)
    # Lightning's weight averaging keeps the average in the state_dict, yet before its first
    # update that is the model as it was at the start.
    averaging = checkpoint.get("averaging_state")
    averaged = averaging is None or averaging["n_averaged"] > 0
    weights = checkpoint["state_dict" if averaged else "current_model_state"]
    weights = _under(weights, CHECKPOINT_PREFIX) if isinstance(weights, dict) else {}
    weights = weights_with_new_names(weights)
    for name, value in weights.items():
        if not isinstance(value, Tensor):
            raise ValueError(f"{file} holds a {type(value).__name__} as {name}, not a tensor")
    if not weights:
        raise ValueError(f"{file} holds no weights under {CHECKPOINT_PREFIX!r}")
    return _Contents(weights, checkpoint.get(DESCRIPTION_KEY), _job_values(checkpoint))


def _job_values(checkpoint: dict[str, Any]) -> dict[str, Any] | None:
    """What a checkpoint says of the model's job; before there were jobs that was a tokenizer's name
    at most."""
    if JOB_KEY not in checkpoint and "tokenizer" in checkpoint:
        return {"reader": text_reader(checkpoint["tokenizer"])}
    return checkpoint.get(JOB_KEY)


def _job(values: dict[str, Any] | None, model: nn.Module, file: Path) -> Job | None:
    if values is None:
        return None
    try:
        job = Job.of(with_new_names(values, str(file)))
        job.check_fit(model)
    except ValueError as error:
        raise ValueError(f"{file} says what its model is for in a wrong way: {error}") from error
    return job


def _under(weights: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The weights below `prefix`, without it (nor the one that `torch.compile` adds)."""
    return {
        name.removeprefix(prefix).removeprefix("_orig_mod."): tensor
        for name, tensor in weights.items()
        if name.startswith(prefix)
    }


def _outline(description: Any, weights: dict[str, Tensor], file: Path) -> nn.Module:
    """The model that a file describes, on no device: no description takes memory."""
    for depth in _depths(description):
        if depth > len(weights):
            raise ValueError(
                f"{file} describes a model of {depth} blocks, and holds {len(weights)} tensors"
            )
    try:
        with torch.device("meta"):
            return build(description)
    except (ValueError, ArithmeticError, RuntimeError, TypeError) as error:
        told = str(error).splitlines()[0]
        raise ValueError(f"{file} describes a model that cannot be built: {told}") from error


def _depths(description: Any) -> Iterator[int]:
    """How many blocks a description asks for, in every backbone of it."""
    if isinstance(description, dict):
        for name, value in description.items():
            if name == "depth" and isinstance(value, int):
                yield value
            yield from _depths(value)


def _fill(model: nn.Module, weights: dict[str, Tensor], skipped: set[str], file: Path) -> None:
    """Load `weights` into all of the model but `skipped`, or refuse and leave it untouched."""
    weights = _check_fit(model, weights, skipped, file)
    model.load_state_dict(weights, strict=False)


def _check_fit(
    model: nn.Module, weights: dict[str, Tensor], skipped: set[str], file: Path
) -> dict[str, Tensor]:
    """`weights` with all names of those that are tied, if they fit all of the model but `skipped`;
    it may be on no device."""
    for name, tensor in weights.items():
        if tensor.untyped_storage().nbytes() < tensor.numel() * tensor.element_size():
            raise ValueError(
                f"{file} holds less of {name} than its shape {tuple(tensor.shape)} says"
            )
    weights = dict(weights)
    for alias, name in _aliases(model).items():
        if alias in skipped or name not in weights:
            continue
        if not torch.equal(weights.setdefault(alias, weights[name]), weights[name]):
            raise ValueError(f"{file} has another {alias} than {name}, but the model ties the two")
    expected = {n: tensor for n, tensor in model.state_dict().items() if n not in skipped}
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
        told = "; ".join(_listed(kind, names) for kind, names in faults.items() if names)
        every = [name for names in faults.values() for name in names]
        only_head = all(name.startswith(HEAD_PREFIX) for name in every)
        advice = (
            ". Only the head differs: skip_head=True starts with a new one" if only_head else ""
        )
        raise ValueError(f"{file} does not fit {type(model).__name__}: {told}{advice}")
    return weights


def _listed(kind: str, names: list[str]) -> str:
    more = f", and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return f"{len(names)} {kind} ({', '.join(names[:SHOWN])}{more})"


def _check_meaning(model: nn.Module, description: dict[str, Any] | None, file: Path) -> None:
    """Refuse weights that would fit by shape and yet mean something else."""
    config: Any = getattr(model, "config", None)
    config = getattr(config, "encoder", config)
    source = (description or {}).get("config", {})
    source = source.get("encoder", source).get("backbone")
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
    if differing:
        raise ValueError(f"{file} is of another architecture: {'; '.join(differing)}")


def _meaning(config: BackboneConfig) -> dict[str, object]:
    """The settings that decide what weights do, whatever their shapes. A changed `rope_base` is
    left out: it is how a model is stretched to longer sequences."""
    names = ("attention", "num_heads", "rope", "share", "lambda_init", "combine")
    return {
        **{name: getattr(config, name) for name in names},
        "num_kv_heads": config.num_kv_heads or config.num_heads,
        "head_dim": config.resolved_head_dim,
    }


def _aliases(model: nn.Module) -> dict[str, str]:
    """Second names of tied weights, and the first name of each."""
    first: dict[int, str] = {}
    names = {
        name: first.setdefault(id(tensor), name)
        for name, tensor in model.state_dict(keep_vars=True).items()
    }
    return {name: original for name, original in names.items() if name != original}
