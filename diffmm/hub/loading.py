"""`diffmm.load`: a trained model from a run, a file or the Hugging Face hub."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch

from diffmm.checkpoint_folders import find_state
from diffmm.checks import check_choice
from diffmm.hub.devices import find_device
from diffmm.hub.trained import TrainedModel
from diffmm.models.hub_files import resolve
from diffmm.models.job import Job, text_reader
from diffmm.models.weights import load_model


def load(
    path: str | Path,
    *,
    device: str | torch.device = "cpu",
    reader: Any = None,
    class_names: Sequence[str] | None = None,
    multi_label: bool | None = None,
    tokenizer: str | None = None,
    checkpoint: Literal["newest", "best"] = "newest",
    revision: str | None = None,
    token: str | bool | None = None,
) -> TrainedModel:
    """Load a trained model with its task: `load(run).predict("cat.jpg")`.

    Args:
        path: A run, a checkpoint folder, a Lightning checkpoint, a `.safetensors` file (or the
            index of several) or its folder as written by `TrainedModel.save`, or the name of a
            repository on the Hugging Face hub, `user/name` (if there is no folder `user`).
        device: Device of the model; `"auto"` is the accelerator, if there is one.
        reader: The preprocessing of inputs, such as a `datamodules.image.ImageReader`; by default
            that of the file.
        class_names: The names of the outputs; by default those of the file.
        multi_label: Whether an input may have any number of classes; by default as in the file.
        tokenizer: Name of a text model's tokenizer; by default that of the file.
        checkpoint: Which checkpoint of a run to load: `"newest"`, that of its last save, or
            `"best"`, that with the best value of the metric that its recipe monitors.
        revision: A branch, a tag or a commit on the hub.
        token: Token of a login to the hub; by default the stored one, if there is one.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If the file cannot be read or does not describe its model, the hub cannot be
            reached, the device does not exist, or `checkpoint` is `"best"` for a path that is not a
            run with a monitored metric.

    >>> trained = diffmm.load("runs/image/digits_tiny/first")
    >>> trained.predict("seven.png").label
    '7'
    """
    check_choice("checkpoint", checkpoint, ("newest", "best"))
    folder = resolve(path, revision=revision, token=token)
    file = find_state(folder) if checkpoint == "newest" else _best_state(folder)
    try:
        model = load_model(file)
    except ValueError as error:
        raise ValueError(f"{error}{_missing_imports(file)}{_of_others(path, folder)}") from error
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error}{_of_others(path, folder)}") from error
    job: Job = model.job or Job()  # type: ignore[assignment]
    if tokenizer is not None:
        if reader is not None:
            raise ValueError("reader and tokenizer exclude each other: give only one of them")
        reader = text_reader(tokenizer)
    given: dict[str, Any] = {
        "reader": reader if reader is None or isinstance(reader, dict) else reader.describe(),
        "class_names": None if class_names is None else tuple(class_names),
        "multi_label": multi_label,
    }
    num_classes = getattr(model, "num_classes", 0)
    if class_names is not None and num_classes and len(class_names) != num_classes:
        raise ValueError(
            f"class_names has {len(class_names)} names, but the model of {file} has {num_classes} "
            f"classes: give one name per class, in order"
        )
    job = replace(job, **{name: value for name, value in given.items() if value is not None})
    return TrainedModel(model.to(find_device(device)), job, origin=str(file))


def _best_state(run: Path) -> Path:
    """The state of the best checkpoint of a run."""
    from diffmm.recipes.errors import InputError
    from diffmm.runs.directories import best_state

    try:
        return best_state(run)
    except InputError as error:
        raise ValueError(str(error)) from error


def _missing_imports(file: Path) -> str:
    """A sentence on the modules that a file's run imports and this process has not; may be empty.
    They are not imported here, because opening a file of weights must not run code."""
    from diffmm.recipes.imports import not_imported
    from diffmm.recipes.settings import load_file
    from diffmm.runs.directories import config_around

    config = config_around(file)
    missing = [] if config is None else not_imported(load_file(config))
    if not missing:
        return ""
    return (
        f". The run's recipe imports {', '.join(missing)}: do so before (on the command line: "
        f"--trust)"
    )


def _of_others(name: str | Path, folder: Path) -> str:
    """A sentence on the folder of a model of another implementation; empty for other files."""
    from diffmm.interop.source import is_of_others

    return f". To use it, convert it first: diffmm convert {name} TARGET" * is_of_others(folder)
