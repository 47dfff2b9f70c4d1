"""The data that trained weights are measured on: those of their run, of their recipe, or others."""

from collections.abc import Iterable, Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffmm.batch import IGNORE_INDEX
from diffmm.cli.compare_maps import validation_data
from diffmm.cli.evaluate import use_other_data
from diffmm.hub.trained import TrainedModel
from diffmm.models.text import TextModel
from diffmm.recipes.catalog import find_recipe, recipe_names
from diffmm.recipes.errors import InputError
from diffmm.recipes.locations import data_paths
from diffmm.recipes.settings import load_file
from diffmm.runs.directories import config_around

TEXT_ENDING = ".txt"


class ValidationBatches(NamedTuple):
    """Batches to measure a model on.

    Attributes:
        batches: The batches, as datamodules make them.
        special_ids: The special tokens of their texts.
    """

    batches: Iterable[Any]
    special_ids: frozenset[int]


def validation_batches(
    trained: TrainedModel, weights: Path, path: str | None, *, trust: bool, way_out: str
) -> ValidationBatches:
    """The validation batches of a run; of weights in no run, those of the shipped recipe that
    trained them, with the preprocessing of their file.

    Args:
        trained: The model.
        weights: Its run or file.
        path: Other data, as of `diffmm validate`; for a text model, a text file or a folder of
            them.
        trust: Whether to import and call classes that a run's recipe names outside the library.
        way_out: What else to do if there are no data, for the end of the message.

    Raises:
        InputError, ValueError, OSError: If there are no such data, or they do not fit the model.
    """
    if path is not None and isinstance(trained.model, TextModel):
        return ValidationBatches(_text_files(trained, Path(path)), frozenset())
    config = config_around(weights)
    if config is None:
        data = _of_weights(trained, weights, path, way_out)
    else:

        def use_other(data: Any) -> None:
            if path is not None:
                use_other_data(data, path, str(weights), "validate")

        values = load_file(config)
        data = validation_data(values, config.parent, trust=trust, prepare=use_other)
    special = getattr(getattr(data, "tokenizer", None), "special_ids", ())
    return ValidationBatches(data.val_dataloader(), frozenset(special))


def labelled_data(
    trained: TrainedModel, path: str, class_names: Sequence[str], split: str
) -> tuple[Any, str]:
    """Labeled data with the preprocessing of a file of weights, whose reader has a `data_class`.

    Args:
        trained: The model.
        path: A folder with one folder per class, or a CSV file of files and labels.
        class_names: The names of its classes, with which labels are matched.
        split: The split to evaluate if the data have several, `"val"` or `"test"`.

    Returns:
        The datamodule, and a one-line summary.

    Raises:
        ValueError, OSError: If the data cannot be read, or have other classes.
    """
    reader, multi_label = trained.reader, trained.job.multi_label
    module, _, name = reader.data_class.rpartition(".")
    data = getattr(import_module(module), name).prepared_by(reader, path, multi_label=multi_label)
    return data, data.evaluate_on(path, class_names, split=split, multi_label=multi_label)


def _of_weights(trained: TrainedModel, weights: Path, path: str | None, way_out: str) -> Any:
    """The data for weights in no run."""
    job = trained.job
    names, reader = job.class_names, None if job.reader is None else trained.reader
    if path is not None and names is not None and getattr(reader, "data_class", None) is not None:
        data, _ = labelled_data(trained, path, names, "val")
        data.setup("validate")
        return data
    # The name comes with the weights, which may be a stranger's: it is never taken as a path.
    if job.recipe not in recipe_names():
        raise InputError(
            f"{weights} is not in a run and does not name the shipped recipe that trained it, so "
            f"that there are no data to measure it on: give the run{way_out}"
        )
    recipe = find_recipe(job.recipe)
    values = load_file(recipe)
    if path is None and (own := data_paths(values)):
        raise InputError(
            f"{weights} is not in a run, and its recipe {job.recipe} names no data, only a place "
            f"for them ({own[0].path}): give data with --data PATH{way_out}"
        )

    def prepare(data: Any) -> None:
        if reader is not None:
            data.read_with(reader)
        if isinstance(trained.model, TextModel):
            longest = trained.model.config.max_length
            data.sequence_length = min(data.sequence_length, longest)
        if path is not None:
            use_other_data(data, path, str(weights), "validate")

    data = validation_data(values, recipe.parent, prepare=prepare)
    theirs = getattr(data, "class_names", None)
    if names is not None and theirs is not None and tuple(theirs) != names:
        raise InputError(
            f"{weights} is not in a run, and its classes ({_some(names)}) are not those of its "
            f"recipe {job.recipe} ({_some(theirs)}): give its data with --data PATH{way_out}"
        )
    return data


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + ", ..." * (len(names) > 3)


def _text_files(trained: TrainedModel, path: Path) -> Iterator[dict[str, Tensor]]:
    """The starts of text files, as many tokens as the model takes, each a batch."""
    if not path.exists():
        raise InputError(f"--data {path}: there is no such file or folder")
    files = sorted(path.rglob(f"*{TEXT_ENDING}")) if path.is_dir() else [path]
    if not files:
        raise InputError(f"--data {path}: there are no {TEXT_ENDING} files in it")
    assert isinstance(trained.model, TextModel)
    model, most = trained.model, trained.model.config.max_length
    return (text_batch(trained.reader.read(f)["tokens"].tolist()[:most], model) for f in files)


def text_batch(ids: Sequence[int], model: TextModel) -> dict[str, Tensor]:
    """A batch of one text; a causal model predicts each token but the first."""
    tokens = torch.tensor([list(ids)])
    if not model.config.causal:
        return {"tokens": tokens}
    targets = tokens.roll(-1, dims=1)
    targets[:, -1] = IGNORE_INDEX
    return {"tokens": tokens, "targets": targets}
