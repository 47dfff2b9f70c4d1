"""What a task takes for a batch: the dicts of this library, and what other loaders give."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from diffmm.batch import named_fields
from diffmm.training.lightning_internals import PreparesBatches


class AnyBatches(PreparesBatches):
    """A module that takes batches of any datamodule or loader: dicts of the fields of
    `diffmm.batch`, or tuples of its model's inputs and its targets, in that order. An `index` is
    never demanded. Steps, callbacks and metrics get dicts."""

    model: nn.Module

    TARGETS: ClassVar[tuple[str, ...]] = ()
    """The fields of a batch that the loss needs beside the model's inputs."""

    def check_batch(self, batch: Any) -> None:
        """Refuse a batch, usually still on the CPU, that does not fit the model; takes any by
        default."""

    def layouts(self) -> list[Sequence[str]]:
        """What the tensors of a batch may be that is a tuple, by its length."""
        inputs = self._inputs()
        alone = [] if self.needs_targets else [inputs[:1]]
        return [(*inputs, *self.TARGETS), (*inputs[:1], *self.TARGETS), *alone]

    def prepared(self, batch: Any) -> Any:
        """A batch as a dict of its fields, which fits the model.

        Raises:
            ValueError: If it is none, naming what is taken and what was found.
        """
        declared = self._inputs()[:1] if hasattr(self.model, "input_fields") else ()
        needed = (*declared, *(self.TARGETS if self.needs_targets else ()))
        batch = named_fields(batch, self.layouts(), needed, owner=type(self).__name__)
        self.check_batch(batch)
        return batch

    @property
    def needs_targets(self) -> bool:
        """Whether the batches of this stage must have the task's targets."""
        return bool(self.TARGETS) and not self.trainer.predicting

    def _inputs(self) -> tuple[str, ...]:
        return tuple(getattr(self.model, "input_fields", ("images",)))


def with_index(batch: Mapping[str, Any], **predictions: Tensor) -> dict[str, Tensor]:
    """Predictions, and before them the samples' `index` where the batch has it."""
    return {**({"index": batch["index"]} if "index" in batch else {}), **predictions}


def check_range(
    name: str,
    values: Tensor,
    count: int,
    *,
    of: str,
    index: Tensor | None = None,
    ignore: int | None = None,
) -> None:
    """Refuse integers outside `[0, count)`.

    Looks at values on the CPU only: elsewhere it would have to wait for them.

    Args:
        name: what a value is called.
        values: `[B, ...]`.
        count: how many there are.
        of: what `count` counts, for the message.
        index: `[B]`, the samples' numbers in their dataset; by default those in the batch.
        ignore: a value that is allowed besides.

    Raises:
        ValueError: naming the value, its sample and the count.
    """
    if values.device.type != "cpu":
        return
    wrong = (values < 0) | (values >= count)
    if ignore is not None:
        wrong &= values != ignore
    if wrong.any():
        place = tuple(wrong.nonzero()[0].tolist())
        sample = f"batch entry {place[0]}" if index is None else f"sample {index[place[0]].item()}"
        raise ValueError(
            f"{name} {values[place].item()} of {sample} is outside the "
            f"model's {count} {of}, 0 to {count - 1}: give the model more, or mend the data"
        )
