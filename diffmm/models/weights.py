"""Saving and loading of weights, together with the model's description as plain data.

A file of weights is either a Lightning checkpoint (`.ckpt`, written in training, with the model's
description under the key `"model"` and its job under `"job"`) or a safetensors file, or several
with an index, with both in the metadata or in a `config.json`. All are read as tensors and plain
values only, so opening a file never runs code from it. A checkpoint folder stands for the file in
it, and a run for its newest complete checkpoint.
"""

from collections.abc import Collection
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from diffmm.models.adapters import merged, plain_names, scale_of
from diffmm.models.contents import (
    CONFIG_NAME,
    Contents,
    find_weights,
    read_file,
    save_contents,
    without_prefix,
    write_contents,
)
from diffmm.models.contrastive import ContrastiveModel
from diffmm.models.description import build, describe, unwrap
from diffmm.models.job import Job
from diffmm.models.weight_checks import HEAD_PREFIX, aliases, check_fit, check_meaning, outline
from diffmm.renamed import with_new_names

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

CONTRASTIVE = f"diffmm.models.{ContrastiveModel.__name__}"
ENCODER_PREFIX = "encoder."


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
    contents, _ = _read_described(file)
    assert contents.description is not None
    model = build(contents.description)
    _fill(model, contents.weights, file)
    model.job = _job(contents, model, file)  # type: ignore[assignment]
    return model.eval()


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
    weights, description = _part_for(model, read_file(file), file)
    check_meaning(model, description, file)
    skipped: set[str] = set()
    if skip_head:
        names = plain_names(model.state_dict())
        skipped = {name for name in names if name.startswith(HEAD_PREFIX)}
        weights = {n: tensor for n, tensor in weights.items() if not n.startswith(HEAD_PREFIX)}
    resample: Any = getattr(model, "resample_weights", None)
    if resample is not None:
        weights = resample(weights)
    _fill(model, weights, file, skipped=skipped)
    return sorted(skipped - set(aliases(model)))


def load_job(path: str | Path) -> Job | None:
    """Read the job of the model in a file; `None` if the file has none.

    Args:
        path: As in `load_model`.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If the file cannot be read, or its job is invalid.
    """
    file = find_weights(path)
    return _job(read_file(file), None, file)


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
    contents = read_file(file)
    return None if contents.description is None else describe(outline(contents, file))


def read_contents(path: str | Path) -> Contents:
    """Read what a file holds, with weights in their own dtypes and without the further names of
    tied ones, after the checks of `load_model`.

    Args:
        path: As in `load_model`.

    Raises:
        FileNotFoundError, ValueError: As `load_model`.
    """
    file = find_weights(path)
    contents, model = _read_described(file)
    _job(contents, None, file)
    further = aliases(model)
    return contents._replace(
        weights={name: tensor for name, tensor in contents.weights.items() if name not in further}
    )


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


def saved_contents(model: nn.Module) -> Contents:
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
    further = aliases(model)
    scale = scale_of(model)
    weights = model.state_dict() if scale is None else merged(model.state_dict(), scale)
    return {name: tensor for name, tensor in weights.items() if name not in further}


def _read_described(file: Path) -> tuple[Contents, nn.Module]:
    """Read a file whose weights fit its description, and the outline of the model."""
    contents = read_file(file)
    if contents.description is None:
        raise ValueError(
            f"{file} does not describe the model of its weights, and there is no {CONFIG_NAME} "
            f"beside it: put that of the model there and convert it (diffmm convert), or build the "
            f"model and use load_weights"
        )
    model = outline(contents, file)
    check_fit(model, contents.weights, file)
    return contents, model


def _part_for(
    model: nn.Module, contents: Contents, file: Path
) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """The weights in a file that are for a model, and their description: those of a tower, of an
    encoder, or all of them.

    Raises:
        ValueError: If the file is of a contrastive model that has no such tower.
    """
    weights, description, _ = contents
    class_path = description.get("class_path") if isinstance(description, dict) else None
    if class_path == CONTRASTIVE and not isinstance(model, ContrastiveModel):
        weights, description = _tower_for(model, contents, file)
    if not any(name.startswith(ENCODER_PREFIX) for name in plain_names(model.state_dict())):
        weights = without_prefix(weights, ENCODER_PREFIX) or weights
    return weights, description


def _tower_for(
    model: nn.Module, contents: Contents, file: Path
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The weights of the tower of the model's class in a contrastive model, and their
    description."""
    assert contents.description is not None
    whole: Any = outline(contents, file)
    kinds = {name: type(tower) for name, tower in whole.towers.items()}
    name = next((name for name, kind in kinds.items() if isinstance(model, kind)), None)
    if name is None:
        raise ValueError(
            f"{file} contains a ContrastiveModel, whose towers are "
            f"{', '.join(kind.__name__ for kind in kinds.values())}, not {type(model).__name__}"
        )
    weights = dict(contents.weights)
    whole.add_aliases(weights)
    return without_prefix(weights, f"{name}."), {"config": contents.description["config"][name]}


def _fill(
    model: nn.Module, weights: dict[str, Tensor], file: Path, *, skipped: Collection[str] = ()
) -> None:
    """Load weights into a model except `skipped`, or raise an error and leave it unchanged."""
    weights = check_fit(model, weights, file, skipped=skipped)
    names = plain_names(model.state_dict())
    model.load_state_dict({names[n]: tensor for n, tensor in weights.items()}, strict=False)


def _job(contents: Contents, model: nn.Module | None, file: Path) -> Job | None:
    """The job in a file, which must be that of the model, if it is given."""
    if contents.job is None:
        return None
    try:
        job = Job.of(with_new_names(contents.job, str(file)))
        job.check_fit(model)
    except ValueError as error:
        raise ValueError(f"{file} has an invalid job of its model: {error}") from error
    return job
