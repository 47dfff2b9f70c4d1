"""Features of images and sounds: what the head of an encoder reads."""

from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from diffmm.batch import inputs_of, to_device
from diffmm.checks import article
from diffmm.hub.predictions import expanded
from diffmm.hub.zero_shot import by_tower, towers_of
from diffmm.models.contrastive import ContrastiveModel
from diffmm.models.encoder import Encoder
from diffmm.models.modes import check_evaluation


def features_of(model: Any, reader: Any, inputs: Any, batch_size: int, origin: str) -> Tensor:
    """The pooled features of inputs, `[N, dim]` float32 on the CPU; of no inputs, `[0, dim]`.

    Args:
        model: An encoder, a model with one, or a contrastive model, with its towers of media.
        reader: Reads the inputs.
        inputs: An input, or a list of inputs, also of folders.
        batch_size: Number of inputs per forward pass.
        origin: The name of the model in messages.

    Raises:
        ValueError: If the model has no encoder, or encoders of different widths, or is in training
            mode; or an input cannot be read.
    """
    check_evaluation(model, "computing features")
    encoders: list[Any] = [getattr(model, "encoder", model)]
    if isinstance(model, ContrastiveModel):
        encoders = [model.towers[name] for name in towers_of(model, reader)]
    if not isinstance(encoders[0], Encoder):
        raise ValueError(
            f"{origin} contains {article(type(model).__name__)}: only image and audio encoders "
            f"have features to return"
        )
    widths = [encoder.num_features for encoder in encoders]
    if len(set(widths)) > 1:
        raise ValueError(
            f"the towers of {origin} have features of different widths, "
            f"{' and '.join(map(str, widths))}: load it with a reader of images or of sounds"
        )
    read: list[Tensor] = []
    rows: list[Tensor] = []

    def keep(head: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        pooled = arguments[0].float()
        read.append((pooled.mean(dim=1) if pooled.ndim == 3 else pooled).cpu())

    device = next(model.parameters()).device
    items = expanded(inputs if isinstance(inputs, list) else [inputs], reader)
    handles = [encoder.head.register_forward_pre_hook(keep) for encoder in encoders]
    try:
        while samples := [reader.read(item) for item in islice(items, batch_size)]:
            if not isinstance(model, ContrastiveModel):
                batch = to_device(reader.collate(samples), device)
                encoders[0](*inputs_of(encoders[0], batch))
                rows.append(read.pop())
                continue
            found = torch.empty(len(samples), widths[0])
            for name, places, arguments in by_tower(model, reader, samples):
                model.towers[name](*arguments)
                found[places] = read.pop()
            rows.append(found)
    finally:
        for handle in handles:
            handle.remove()
    return torch.cat(rows) if rows else torch.empty(0, widths[0])
