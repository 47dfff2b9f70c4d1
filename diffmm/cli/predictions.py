"""Collects the predictions of `diffmm predict` from all processes, and writes them."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffmm.cli.prediction_files import TEXT_COLUMNS, class_columns, writing
from diffmm.hub.predictions import Caption, Prediction
from diffmm.new_folders import discard
from diffmm.recipes.errors import RunFailedError, message_of

Batch = dict[str, Tensor]

TOP_K = 5
"""Number of classes per row."""


def written_predictions(batches: list[Batch], data: Any, task: Any, output: Path) -> None:
    """Write the predictions of a recipe's data: a dict of tensors (`.pt`), or one row per sample as
    for files (see `diffmm.cli.prediction_files`), with its index if it has no file.

    Raises:
        RunFailedError: If they cannot be written.
    """
    if output.suffix.lower() == ".pt":
        save(joined(batches), output)
    else:
        columns: Sequence[str] = TEXT_COLUMNS
        if "probabilities" in batches[0]:
            columns = class_columns(min(TOP_K, batches[0]["probabilities"].shape[1]))
        with writing(output, columns) as writer:
            for prediction in _rows(batches, data, task):
                writer.write(prediction)
    print(output)


def _rows(batches: list[Batch], data: Any, task: Any) -> Iterator[Prediction | Caption]:
    names = task.job.class_names if getattr(task, "job", None) is not None else None
    dataset = data.predict_dataloader().dataset
    file = getattr(dataset, "file", lambda index: None)
    for batch in batches:
        if "probabilities" not in batch:
            texts = task.texts(batch["tokens"])
            for index, text in zip(batch["index"].tolist(), texts, strict=True):
                yield Caption(text, str(file(index) or index))
            continue
        for index, scores in zip(batch["index"].tolist(), batch["probabilities"], strict=True):
            values, classes = scores.topk(min(TOP_K, len(scores)))
            numbers = classes.tolist()
            labels = tuple(names[n] if names else str(n) for n in numbers)
            yield Prediction(labels, tuple(values.tolist()), str(file(index) or index))


def joined(batches: list[Batch]) -> dict[str, Any]:
    """Concatenate the predictions of all batches; keep a list if their lengths differ between
    batches (as for padded clips)."""
    columns = {name: [batch[name].cpu() for batch in batches] for name in batches[0]}
    return {
        name: torch.cat(parts) if len({part.shape[1:] for part in parts}) == 1 else parts
        for name, parts in columns.items()
    }


def gathered(batches: list[Batch]) -> list[Batch] | None:
    """Gather the batches of all processes on the first one, in the order of their samples and
    without repeated samples; return `None` on the others.

    Samples are assigned to processes in turn. Several processes may have the same sample: the first
    samples are repeated to make the shares equal, and all processes of a tensor-parallel group
    compute the same samples. Batches of a single process are returned unchanged.

    Raises:
        RunFailedError: On every process, if a batch has no indices of its samples.
    """
    if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
        return batches
    if any("index" not in batch for batch in batches):
        raise RunFailedError(
            "the predictions of several processes are sorted by the index of the samples, which "
            "these data do not provide: predict with --trainer.devices 1"
        )
    on_cpu = [{name: tensor.cpu() for name, tensor in batch.items()} for batch in batches]
    is_first = torch.distributed.get_rank() == 0
    shares: list[Any] | None = [None] * torch.distributed.get_world_size() if is_first else None
    torch.distributed.gather_object(on_cpu, shares)
    if shares is None:
        return None
    rows: dict[int, Batch] = {}
    for batch in (batch for share in shares for batch in share):
        for row, index in enumerate(batch["index"].tolist()):
            rows.setdefault(index, {name: tensor[row : row + 1] for name, tensor in batch.items()})
    return [rows[index] for index in sorted(rows)]


def save(predictions: dict[str, Any], path: Path) -> None:
    """Write predictions to a file atomically.

    Raises:
        RunFailedError: If they cannot be written, for example because the disk is full.
    """
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with unfinished.open("wb") as file:
            torch.save(predictions, file)
        unfinished.replace(path)
    except (OSError, RuntimeError) as error:
        # torch wraps an OSError of the file in a RuntimeError.
        cause: BaseException = error
        while not isinstance(cause, OSError) and cause.__context__ is not None:
            cause = cause.__context__
        raise RunFailedError(
            f"the predictions could not be written to {path}: {message_of(cause)}"
        ) from error
    finally:
        discard(unfinished)
