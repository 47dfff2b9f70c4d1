"""Outliers of activations: attention logits and hidden states."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from diffmm.analysis.magnitudes import NUM_TOP, MagnitudeMeter, Magnitudes
from diffmm.analysis.map_blocks import LayerInputs, visit_layers
from diffmm.layers.block import Block
from diffmm.ops import AttentionMask


@dataclass(frozen=True)
class Outliers:
    """Magnitudes of the activations of a model.

    Attributes:
        logits: Of the attention logits `Qi Kiᵀ / √D` of both components, by the name of the layer.
        hidden: Of the hidden states (the residual stream after each block), by the name of the
            block. Empty if the model has none of this library's blocks.
    """

    logits: dict[str, Magnitudes]
    hidden: dict[str, Magnitudes]


class OutlierMeter:
    """Accumulates the magnitudes of activations over batches.

    Args:
        num_top: Number of the largest magnitudes to keep.
        max_bytes: Memory of a block of logits, in bytes; see `LayerInputs.blocks`.
    """

    def __init__(self, *, num_top: int = NUM_TOP, max_bytes: int | None = None) -> None:
        self.num_top = num_top
        self.max_bytes = max_bytes
        self._logits: dict[str, MagnitudeMeter] = {}
        self._hidden: dict[str, MagnitudeMeter] = {}

    def add_logits(self, layer: LayerInputs) -> None:
        """Add the logits of a layer that its softmax uses: those of visible keys and real
        queries."""
        meter = self._logits.setdefault(layer.name, MagnitudeMeter(self.num_top))
        for block in layer.blocks(max_bytes=self.max_bytes):
            used = (block.visible & block.is_real[:, None, :, None]).expand_as(block.scores[0])
            for scores in block.scores:
                meter.add(scores[used])

    def add_hidden(self, name: str, hidden: Tensor, is_real: Tensor | None) -> None:
        """Add the hidden states after a block, `[B, N, dim]`, at the tokens in `is_real`, `[B, N]`
        booleans (all by default)."""
        meter = self._hidden.setdefault(name, MagnitudeMeter(self.num_top))
        meter.add(hidden if is_real is None else hidden[is_real])

    def result(self) -> Outliers:
        """The magnitudes of all batches so far."""
        return Outliers(
            *(
                {name: meter.result() for name, meter in meters.items()}
                for meters in (self._logits, self._hidden)
            )
        )


def outliers(
    model: nn.Module,
    *inputs: Tensor | None,
    mask: AttentionMask | None = None,
    num_top: int = NUM_TOP,
    max_bytes: int | None = None,
) -> Outliers:
    """Measure the largest and median magnitudes and the kurtosis of attention logits and hidden
    states, per layer (Ye et al. 2025, table 5).

    Logits are scaled as the softmax uses them. Those of masked keys and of padding do not count.

    Args:
        model: See `diffmm.analysis.map_blocks.visit_layers`.
        inputs: See `diffmm.analysis.map_blocks.visit_layers`.
        mask: See `diffmm.analysis.map_blocks.visit_layers`.
        num_top: Number of the largest magnitudes to keep.
        max_bytes: Memory of a block of logits, in bytes; see `LayerInputs.blocks`.

    Raises:
        ValueError: If the model has no attention layers.
    """
    meter = OutlierMeter(num_top=num_top, max_bytes=max_bytes)
    with watching_blocks(model, meter.add_hidden):
        visit_layers(model, *inputs, visit=meter.add_logits, mask=mask)
    return meter.result()


@contextmanager
def watching_blocks(
    model: nn.Module, visit: Callable[[str, Tensor, Tensor | None], None]
) -> Iterator[None]:
    """Call `visit` with the name and the output of each block that runs in the body of the `with`
    statement, and with `[B, N]` booleans of its real tokens (None if all are)."""

    def hook_of(name: str) -> Callable[..., None]:
        def hook(block: Block, args: Any, kwargs: dict[str, Any], output: Tensor) -> None:
            padding = kwargs["mask"].key_padding
            visit(name, output.detach(), padding)

        return hook

    handles = [
        part.register_forward_hook(hook_of(name), with_kwargs=True)
        for name, part in model.named_modules()
        if isinstance(part, Block)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
