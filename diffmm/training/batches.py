"""Batch formats that a task accepts: the dicts of this library, and tuples of other loaders."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from diffmm.batch import named_fields
from diffmm.training.lightning_internals import PreparesBatches


class AnyBatches(PreparesBatches):
    """A module that accepts batches of any datamodule or data loader: dicts with the fields of
    `diffmm.batch`, or tuples of the model's inputs and the targets, in that order. The `index`
    field is optional. Steps, callbacks and metrics always receive dicts."""

    model: nn.Module

    TARGETS: ClassVar[tuple[str, ...]] = ()
    """Batch fields that the loss needs in addition to the model's inputs."""

    def check_batch(self, batch: Any) -> None:
        """Raise `ValueError` for a batch that does not fit the model. The batch is usually still
        on the CPU. By default, every batch is accepted."""

    def layouts(self) -> list[Sequence[str]]:
        """Return the accepted layouts of a tuple batch, each a sequence of field names."""
        inputs = self._inputs()
        alone = [] if self.needs_targets else [inputs[:1]]
        return [(*inputs, *self.TARGETS), (*inputs[:1], *self.TARGETS), *alone]

    def prepared(self, batch: Any) -> Any:
        """Return the batch as a dict of fields that fits the model.

        Raises:
            ValueError: If the batch has another format; the message names the accepted formats
                and the one found.
        """
        declared = self._inputs()[:1] if hasattr(self.model, "input_fields") else ()
        needed = (*declared, *(self.TARGETS if self.needs_targets else ()))
        batch = named_fields(batch, self.layouts(), needed, owner=type(self).__name__)
        self.check_batch(batch)
        return batch

    @property
    def needs_targets(self) -> bool:
        """Whether batches of the current stage must contain the task's targets."""
        return bool(self.TARGETS) and not self.trainer.predicting

    def _inputs(self) -> tuple[str, ...]:
        return tuple(getattr(self.model, "input_fields", ("images",)))


def with_index(batch: Mapping[str, Any], **predictions: Tensor) -> dict[str, Tensor]:
    """Return the predictions, preceded by the samples' `index` if the batch has one."""
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
    """Check that all integers are in `[0, count)`.

    Only values on the CPU are checked, because reading them elsewhere would synchronize.

    Args:
        name: Name of a value, for the message.
        values: Integers to check, `[B, ...]`.
        count: Number of valid values.
        of: Plural noun for what `count` counts, for the message.
        index: Positions of the samples in their dataset, `[B]`; by default, the message gives the
            position in the batch.
        ignore: An additional allowed value.

    Raises:
        ValueError: If a value is out of range; the message names it, its sample and the count.
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
            f"model's {count} {of}, 0 to {count - 1}: give the model more, or fix the data"
        )
