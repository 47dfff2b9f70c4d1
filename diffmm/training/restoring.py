"""Saves a task's settings as plain data in a checkpoint, and restores the task from them."""

import dataclasses
import inspect
from collections.abc import Mapping
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from diffmm.checkpoint_folders import find_state
from diffmm.checks import did_you_mean
from diffmm.models.checkpoint_files import read_checkpoint
from diffmm.models.description import configured
from diffmm.models.safetensors_files import DESCRIPTION_KEY
from diffmm.models.weights import load_model, load_weights
from diffmm.training.finetuning import FineTuneConfig

TASK_KEY = "task"
"""Checkpoint key of the task's description."""

MODEL_PREFIX = "model."

ATTRIBUTES = {
    "optimizer": "optimizer_config",
    "schedule": "schedule_config",
    "compile": "compile_model",
}
"""Attributes of a task whose names differ from their arguments, by argument name."""

PLAIN = (str, bool, int, float, type(None))

AnyTask = TypeVar("AnyTask", bound=LightningModule)


def describe_task(task: LightningModule) -> dict[str, Any]:
    """Return the class of a task and those of its arguments that are stored as attributes and are
    configs or plain values.

    Returns:
        `{"class_path": "diffmm.training.Classification", "init_args": {...}}`, without the model.
    """
    kept = {}
    for name in _parameters(type(task)):
        value = getattr(task, ATTRIBUTES.get(name, name), inspect.Parameter.empty)
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            kept[name] = dataclasses.asdict(value)
        elif isinstance(value, PLAIN):
            kept[name] = value
    return {"class_path": class_path(type(task)), "init_args": kept}


def class_path(task_class: type) -> str:
    """Return the public import path of a class."""
    package = "diffmm.training"
    module = task_class.__module__
    return f"{package if module.startswith(package) else module}.{task_class.__qualname__}"


def restore_task(
    task_class: type[AnyTask], path: str | Path, *, strict: bool, given: Mapping[str, Any]
) -> AnyTask:
    """Restore the task in a checkpoint, with its model and weights, on the CPU in training mode.

    A checkpoint cannot cause an import: the restored class is `task_class` or one of its subclasses
    that are already defined.

    Args:
        task_class: Expected class of the task.
        path: Lightning checkpoint, checkpoint folder or run directory.
        strict: Whether the task's weights outside its model must match the checkpoint.
        given: Arguments, possibly including `model`, that override those in the checkpoint.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If the checkpoint does not fit; the message names the file and the problem.
    """
    path = find_state(Path(path))
    if not path.exists():
        raise FileNotFoundError(f"there is no checkpoint at {path}")
    checkpoint = read_checkpoint(path)
    found = checkpoint.get(TASK_KEY, {"class_path": class_path(task_class), "init_args": {}})
    if not isinstance(found, dict) or not isinstance(found.get("init_args"), dict):
        raise ValueError(f"{path} has no usable description of its task, got {found!r:.200}")
    chosen = _chosen(task_class, found.get("class_path"), path)
    for name in given:
        if name != "model" and name not in _parameters(chosen):
            raise ValueError(
                f"{chosen.__name__} has no argument {name!r}"
                f"{did_you_mean(name, _parameters(chosen))}"
            )
    arguments = {**_arguments(chosen, found["init_args"], path), **given}
    needed = [n for n, p in _parameters(chosen).items() if p.default is p.empty]
    missing = [name for name in needed if name not in arguments]
    if missing:
        raise ValueError(
            f"{path} does not contain the arguments {' and '.join(missing)}: pass them to "
            f"{chosen.__name__}.load_from_checkpoint as keyword arguments"
        )
    if "model" in arguments:
        load_weights(arguments["model"], path)
    elif DESCRIPTION_KEY in checkpoint:
        arguments["model"] = load_model(path)
    else:
        raise ValueError(
            f"{path} does not describe its model: pass one to "
            f"{chosen.__name__}.load_from_checkpoint as model=..."
        )
    task = chosen(**arguments)
    _fill_rest(task, checkpoint["state_dict"], path, strict=strict)
    task.on_load_checkpoint(checkpoint)
    # `load_model` returns the model in evaluation mode; Lightning restores in training mode.
    LightningModule.train(task)
    return task


def _parameters(task_class: type) -> dict[str, inspect.Parameter]:
    """Return the arguments of a task except its model."""
    every = dict(inspect.signature(task_class).parameters)
    return {name: parameter for name, parameter in every.items() if name != "model"}


def _chosen(task_class: type[AnyTask], wanted: Any, path: Path) -> type[AnyTask]:
    family, todo = [], [task_class]
    while todo:
        family.append(each := todo.pop())
        todo += each.__subclasses__()
    for each in family:
        if class_path(each) == wanted:
            return each
    if wanted in map(class_path, task_class.__mro__):
        return task_class  # a subclass of the saved class
    raise ValueError(
        f"{path} is a checkpoint of the task {wanted}, which is not a {task_class.__name__}: use "
        f"{str(wanted).rpartition('.')[2]}.load_from_checkpoint"
    )


def _arguments(task_class: type, values: dict[str, Any], path: Path) -> dict[str, Any]:
    """Convert plain values to the types of the task's arguments."""
    hints, parameters = get_type_hints(task_class.__init__), _parameters(task_class)  # type: ignore[misc]
    unknown = [name for name in values if name not in parameters]
    if unknown:
        raise ValueError(
            f"{path} has settings that {task_class.__name__} does not know: {', '.join(unknown)}"
        )
    arguments = {}
    for name, value in values.items():
        hint = hints.get(name)
        options = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
        configs = [option for option in options if dataclasses.is_dataclass(option)]
        try:
            typed = configured(configs[0], value) if configs and value is not None else value
        except ValueError as error:
            raise ValueError(f"{path} has an invalid {name}: {error}") from error
        arguments[name] = typed
    for name, value in arguments.items():
        if isinstance(value, FineTuneConfig):
            # The checkpoint supersedes these weights: fitting the restored task must not load them.
            arguments[name] = dataclasses.replace(value, weights=None)
    return arguments


def _fill_rest(task: LightningModule, state: Any, path: Path, *, strict: bool) -> None:
    """Load the weights of a task outside its model."""
    rest = {name: value for name, value in state.items() if not name.startswith(MODEL_PREFIX)}
    found = task.load_state_dict(rest, strict=False)
    missing = [name for name in found.missing_keys if not name.startswith(MODEL_PREFIX)]
    if not missing and not found.unexpected_keys:
        return
    message = (
        f"{path} does not fit {type(task).__name__}: missing {missing}, unexpected "
        f"{found.unexpected_keys}"
    )
    if strict:
        raise ValueError(message)
    rank_zero_warn(message)
