"""Predicting one input after another, however many there are."""

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffmm.batch import encoder_inputs

OnError = Callable[[Any, Exception], None]


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
        on_error: OnError | None = None,
    ) -> Iterator[Prediction]:
        """A prediction for each input, in order; no more than a batch of them is held.

        Args:
            items: what the reader reads, and folders of it.
            top_k: classes per prediction, at most as many as there are.
            batch_size: inputs per forward pass.
            on_error: called for an input that cannot be read with what is wrong with it, which
                names it; then the rest goes on. By default the first one ends all.

        Raises:
            ValueError: naming the input that cannot be read, or the folder that holds none.
        """
        items = expanded(items, self.reader)
        while chunk := list(islice(items, batch_size)):
            read = []
            for item in chunk:
                try:
                    read.append((item, self.reader.read(item)))
                except (ValueError, OSError) as error:
                    _refuse(item, error, on_error)
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
        logits = self.model(*encoder_inputs(moved)).float()
        return (logits.sigmoid() if self.multi_label else logits.softmax(dim=1)).cpu()


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
