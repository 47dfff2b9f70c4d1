"""Predicting one input after another, however many there are."""

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import IterableDataset, get_worker_info

from diffmm.batch import inputs_of
from diffmm.workers import WorkerLoader, ignore_stop_signals

OnError = Callable[[Any, Exception], None]
Read = tuple[Any, dict[str, Any] | Exception]


@dataclass(frozen=True)
class Prediction:
    """The likeliest classes of one input.

    Attributes:
        labels: their names, the likeliest first; numbers where no names are known.
        scores: their probabilities: of one class among all, or under `multi_label` of each by
            itself.
        file: the input's path, if it has one.

    >>> str(Prediction(("cat", "dog"), (0.9, 0.1), file="a.jpg"))
    'a.jpg: cat 0.900, dog 0.100'
    """

    labels: tuple[str, ...]
    scores: tuple[float, ...]
    file: str | None = None

    @property
    def label(self) -> str:
        """The likeliest class."""
        return self.labels[0]

    @property
    def score(self) -> float:
        """Its probability."""
        return self.scores[0]

    def __str__(self) -> str:
        ranked = ", ".join(
            f"{label} {score:.3f}" for label, score in zip(self.labels, self.scores, strict=True)
        )
        return f"{self.file}: {ranked}" if self.file is not None else ranked


class Predictor:
    """Inputs to predictions, a batch at a time.

    Args:
        model: an image or audio model with classes, in evaluation mode.
        reader: makes what the model sees (see `diffmm.hub.readers`).
        class_names: of its outputs.
        multi_label: whether classes do not exclude each other.
    """

    def __init__(
        self, model: nn.Module, reader: Any, class_names: tuple[str, ...], *, multi_label: bool
    ) -> None:
        self.model = model
        self.reader = reader
        self.class_names = class_names
        self.multi_label = multi_label

    def stream(
        self,
        items: Iterable[Any],
        *,
        top_k: int,
        batch_size: int,
        num_workers: int = 0,
        on_error: OnError | None = None,
    ) -> Iterator[Prediction]:
        """A prediction for each input, in order; no more than a batch of them is held, and what
        workers have read ahead.

        Args:
            items: what the reader reads, and folders of it.
            top_k: classes per prediction, at most as many as there are.
            batch_size: inputs per forward pass.
            num_workers: processes that read beside this one, each of them a batch or two ahead.
            on_error: called for an input that cannot be read with what is wrong with it, which
                names it; then the rest goes on. By default the first one ends all.

        Raises:
            ValueError: naming the input that cannot be read, or the folder that holds none.
        """
        loader = WorkerLoader(
            _Chunks(items, self.reader, batch_size),
            batch_size=None,
            collate_fn=_as_it_is,
            num_workers=num_workers,
            worker_init_fn=ignore_stop_signals,
            # Without it every loader that begins takes a number from torch's own generator.
            generator=torch.Generator(),
        )
        for chunk in loader:
            read = []
            for item, sample in chunk:
                if isinstance(sample, Exception):
                    _refuse(item, sample, on_error)
                else:
                    read.append((item, sample))
            for item, scores in self._scored(read, on_error):
                values, classes = scores.topk(min(top_k, len(scores)))
                yield Prediction(
                    tuple(self.class_names[number] for number in classes.tolist()),
                    tuple(values.tolist()),
                    str(item) if isinstance(item, str | os.PathLike) else None,
                )

    def _scored(
        self, read: list[tuple[Any, dict[str, Any]]], on_error: OnError | None
    ) -> Iterator[tuple[Any, Tensor]]:
        """The scores `[num_classes]` of what was read."""
        if not read:
            return
        try:
            scores = self.scores([sample for _, sample in read])
        except ValueError as error:
            if len(read) > 1:
                # One of them is of no use to the model: which one?
                for one in read:
                    yield from self._scored([one], on_error)
                return
            item = read[0][0]
            name = f"{item} " if isinstance(item, str | os.PathLike) else ""
            _refuse(item, ValueError(f"{name}is not what the model takes: {error}"), on_error)
            return
        yield from zip((item for item, _ in read), scores, strict=True)

    @torch.inference_mode()
    def scores(self, samples: list[dict[str, Any]]) -> Tensor:
        """`[B, num_classes]` probabilities, on the CPU."""
        device = next(self.model.parameters()).device
        batch = self.reader.collate(samples)
        moved: Any = {name: tensor.to(device) for name, tensor in batch.items()}
        logits = self.model(*inputs_of(self.model, moved)).float()
        return (logits.sigmoid() if self.multi_label else logits.softmax(dim=1)).cpu()


class _Chunks(IterableDataset[list[Read]]):
    """A batch of inputs after the other, each with what the reader made of it or with what is wrong
    with it. Of several workers each reads every so many batches, so that they come in order."""

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
        try:
            return self.reader.read(item)
        except (ValueError, OSError) as error:
            return error


def _as_it_is(chunk: list[Read]) -> list[Read]:
    return chunk


def expanded(items: Iterable[Any], reader: Any) -> Iterator[Any]:
    """The inputs themselves: in place of a folder the files in it.

    Raises:
        ValueError: for a folder without any.
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
                f"there is no {reader.kind} in {item}: looked for {', '.join(reader.extensions)}"
            )


def _refuse(item: Any, error: Exception, on_error: OnError | None) -> None:
    if on_error is None:
        raise error
    on_error(item, error)
