"""Prediction for any number of inputs, in batches."""

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.data import IterableDataset, get_worker_info

from diffmm.batch import inputs_of, to_device
from diffmm.checks import shown_name
from diffmm.workers import WorkerLoader, ignore_stop_signals

OnError = Callable[[Any, Exception], None]
Read = tuple[Any, dict[str, Any] | Exception]


@dataclass(frozen=True)
class Prediction:
    """The most likely classes of one input.

    Attributes:
        labels: Names of the classes, most likely first; indices if the names are unknown.
        scores: Probabilities of the classes; independent of each other with `multi_label`.
        file: Path of the input, if it has one.

    >>> str(Prediction(("cat", "dog"), (0.9, 0.1), file="a.jpg"))
    'a.jpg: cat 0.900, dog 0.100'
    """

    labels: tuple[str, ...]
    scores: tuple[float, ...]
    file: str | None = None

    @property
    def label(self) -> str:
        """The most likely class."""
        return self.labels[0]

    @property
    def score(self) -> float:
        """The probability of the most likely class."""
        return self.scores[0]

    def __str__(self) -> str:
        ranked = ", ".join(
            f"{shown_name(label)} {score:.3f}"
            for label, score in zip(self.labels, self.scores, strict=True)
        )
        return f"{self.file}: {ranked}" if self.file is not None else ranked


@dataclass(frozen=True)
class Caption:
    """The text of one image or sound: a caption or a transcript.

    Attributes:
        text: The text.
        file: Path of the input, if it has one.

    >>> str(Caption("a cat on a mat", file="a.jpg"))
    'a.jpg: a cat on a mat'
    """

    text: str
    file: str | None = None

    def __str__(self) -> str:
        return f"{self.file}: {self.text}" if self.file is not None else self.text


Result = TypeVar("Result")


class Reading(ABC, Generic[Result]):
    """Reads inputs and predicts them, batch by batch.

    Args:
        model: A model in evaluation mode.
        reader: Reader of the model's inputs (see `diffmm.hub.readers`).
    """

    def __init__(self, model: nn.Module, reader: Any) -> None:
        self.model = model
        self.reader = reader

    @abstractmethod
    def results(self, samples: list[dict[str, Any]]) -> Sequence[Result]:
        """Compute the result of each sample of a batch."""

    @abstractmethod
    def prediction(self, result: Result, file: str | None) -> Any:
        """The prediction of an input, given its result."""

    def stream(
        self,
        items: Iterable[Any],
        *,
        batch_size: int,
        num_workers: int = 0,
        on_error: OnError | None = None,
    ) -> Iterator[Any]:
        """Yield a prediction for each input, in order. Only one batch is held in memory, plus the
        batches that workers have prefetched.

        Args:
            items: Inputs for the reader, and folders of them.
            batch_size: Number of inputs per forward pass.
            num_workers: Number of worker processes that read inputs, each one or two batches ahead.
            on_error: Called with each input that cannot be read and the error, which names it;
                the prediction then continues. By default the first error is raised.

        Raises:
            ValueError: If an input cannot be read, or a folder contains none.
        """
        loader = WorkerLoader(
            _Chunks(items, self.reader, batch_size),
            batch_size=None,
            collate_fn=_identity,
            num_workers=num_workers,
            worker_init_fn=ignore_stop_signals,
            # Without it, every new iterator would draw from torch's default generator.
            generator=torch.Generator(),
        )
        for chunk in loader:
            read = []
            for item, sample in chunk:
                if isinstance(sample, Exception):
                    _raise_or_report(item, sample, on_error)
                else:
                    read.append((item, sample))
            for item, result in self._each(read, on_error):
                file = str(item) if isinstance(item, str | os.PathLike) else None
                yield self.prediction(result, file)

    def _each(
        self, read: list[tuple[Any, dict[str, Any]]], on_error: OnError | None
    ) -> Iterator[tuple[Any, Result]]:
        """Yield each input with its result."""
        if not read:
            return
        try:
            results = self.results([sample for _, sample in read])
        except ValueError as error:
            if len(read) > 1:
                # The model rejects one of the inputs: find it by predicting them one by one.
                for one in read:
                    yield from self._each([one], on_error)
                return
            item = read[0][0]
            name = f"{item} " if isinstance(item, str | os.PathLike) else ""
            _raise_or_report(item, ValueError(f"{name}does not fit the model: {error}"), on_error)
            return
        yield from zip((item for item, _ in read), results, strict=True)


class Predictor(Reading[Tensor]):
    """Predicts the classes of inputs.

    Args:
        model: An image or audio model with classes, in evaluation mode.
        reader: Reader of the model's inputs (see `diffmm.hub.readers`).
        class_names: Names of the model's outputs.
        multi_label: Whether an input may have any number of classes.
        top_k: Number of classes per prediction, at most the number of classes.
    """

    def __init__(
        self,
        model: nn.Module,
        reader: Any,
        class_names: tuple[str, ...],
        *,
        multi_label: bool,
        top_k: int,
    ) -> None:
        super().__init__(model, reader)
        self.class_names = class_names
        self.multi_label = multi_label
        self.top_k = top_k

    def prediction(self, result: Tensor, file: str | None) -> Prediction:
        values, classes = result.topk(min(self.top_k, len(result)))
        labels = tuple(self.class_names[number] for number in classes.tolist())
        return Prediction(labels, tuple(values.tolist()), file)

    @torch.inference_mode()
    def results(self, samples: list[dict[str, Any]]) -> Sequence[Tensor]:
        """Compute probabilities `[B, num_classes]` on the CPU."""
        logits = self.logits(samples)
        scores = (logits.sigmoid() if self.multi_label else logits.softmax(dim=1)).cpu()
        return list(scores)

    @torch.inference_mode()
    def logits(self, samples: list[dict[str, Any]]) -> Tensor:
        """Compute logits `[B, num_classes]` in float32."""
        device = next(self.model.parameters()).device
        batch = to_device(self.reader.collate(samples), device)
        return self.model(*inputs_of(self.model, batch)).float()


class _Chunks(IterableDataset[list[Read]]):
    """Batches of inputs, each with the reader's result or the error. With several workers, batches
    are assigned to them in turn, so that they arrive in order."""

    def __init__(self, items: Iterable[Any], reader: Any, size: int) -> None:
        self.items = items
        self.reader = reader
        self.size = size

    def __iter__(self) -> Iterator[list[Read]]:
        worker = get_worker_info()
        number, count = (0, 1) if worker is None else (worker.id, worker.num_workers)
        items = expanded(self.items, self.reader)
        for turn in cycle(range(count)):
            chunk = list(islice(items, self.size))
            if not chunk:
                return
            if turn == number:
                yield [(item, self._read(item)) for item in chunk]

    def _read(self, item: Any) -> dict[str, Any] | Exception:
        if isinstance(item, str) and "://" in item:
            return ValueError(f"{item}: only local files are read, download it first")
        try:
            return self.reader.read(item)
        except (ValueError, OSError) as error:
            return error


def _identity(chunk: list[Read]) -> list[Read]:
    return chunk


def expanded(items: Iterable[Any], reader: Any) -> Iterator[Any]:
    """Iterate over inputs, with each folder replaced by the files in it.

    Raises:
        ValueError: If a folder contains no files for the reader.
    """
    for item in items:
        if not isinstance(item, str | os.PathLike) or not Path(item).is_dir():
            yield item
            continue
        is_empty = True
        for file in reader.files(item):
            is_empty = False
            yield file
        if is_empty:
            raise ValueError(
                f"folder {item} contains no {reader.kind} files, which end in "
                f"{', '.join(reader.extensions)}"
            )


def _raise_or_report(item: Any, error: Exception, on_error: OnError | None) -> None:
    if on_error is None:
        raise error
    on_error(item, error)
