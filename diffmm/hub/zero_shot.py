"""Embeddings of images, sounds and texts by a contrastive model, and of classes by their names."""

from collections.abc import Iterable, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from diffmm.batch import inputs_of, to_device
from diffmm.hub.predictions import expanded
from diffmm.models.contrastive import ContrastiveModel

PLACE = "{}"
TEMPLATES = ("a photo of a {}.",)
"""CLIP's default prompt."""


def tower_of(model: ContrastiveModel, reader: Any) -> str:
    """The name of the tower whose inputs a reader reads: `"image"` or `"audio"`.

    Raises:
        ValueError: If the model has no such tower.
    """
    name = "audio" if hasattr(reader, "sample_rate_hz") else "image"
    if name not in model.towers:
        raise ValueError(
            f"the reader reads {reader.kind} files, but the model has no {name} tower: use another "
            f"reader"
        )
    return name


@torch.inference_mode()
def embed_media(
    model: ContrastiveModel, reader: Any, inputs: Iterable[Any], batch_size: int
) -> Tensor:
    """Embeddings of images or sounds, and of those in folders, `[I, embed_dim]` on the CPU.

    Raises:
        ValueError: If an input cannot be read; the message names it.
    """
    tower, items = model.towers[tower_of(model, reader)], expanded(inputs, reader)
    found = []
    while samples := [reader.read(item) for item in islice(items, batch_size)]:
        batch = to_device(reader.collate(samples), model.logit_scale.device)
        found.append(model.encode_media(*inputs_of(tower, batch)).cpu())
    return torch.cat(found) if found else torch.empty(0, model.config.embed_dim)


@torch.inference_mode()
def embed_texts(
    model: ContrastiveModel, reader: Any, texts: Sequence[str], batch_size: int
) -> Tensor:
    """Embeddings of texts, `[T, embed_dim]` on the CPU.

    Raises:
        ValueError: If a text is empty, not a string, or longer than the reader's `max_tokens`.
    """
    for text in texts:
        if isinstance(text, str) and reader.is_cut(text):
            raise ValueError(
                f"the text {text!r:.60} has more than the {reader.max_tokens} tokens that the "
                f"model takes, with the end of text: shorten it"
            )
    found = []
    for first in range(0, len(texts), batch_size):
        samples = [reader.read_text(text) for text in texts[first : first + batch_size]]
        batch = to_device(reader.collate(samples), model.logit_scale.device)
        found.append(model.encode_text(batch["tokens"], batch["num_tokens"]).cpu())
    return torch.cat(found) if found else torch.empty(0, model.config.embed_dim)


def embed_classes(
    model: ContrastiveModel,
    reader: Any,
    class_names: Sequence[str],
    templates: Sequence[str],
    batch_size: int = 32,
) -> Tensor:
    """Embeddings of classes, `[num_classes, embed_dim]`: the normalized mean of those of the
    templates with the class's name (Radford et al. 2021, section 3.1.4).

    Raises:
        ValueError: If there are no names or templates, a name is empty or given twice, or a
            template has no place for the name.
    """
    check_classes(class_names, templates)
    texts = [template.replace(PLACE, name) for name in class_names for template in templates]
    found = embed_texts(model, reader, texts, batch_size)
    return normalize(found.unflatten(0, (len(class_names), -1)).mean(dim=1), dim=-1)


def check_classes(class_names: Sequence[str], templates: Sequence[str]) -> None:
    """Check the arguments of `embed_classes`.

    Raises:
        ValueError: As there.
    """
    for name, values in (("class_names", class_names), ("templates", templates)):
        if isinstance(values, str) or not values or not all(isinstance(v, str) for v in values):
            raise ValueError(f"{name} must be a list of at least one string, got {values!r:.200}")
    for number, name in enumerate(class_names):
        if not name.strip() or name in class_names[:number]:
            raise ValueError(
                f"class_names must be different and not empty, got {name!r}"
                f"{' twice' if name.strip() else ''}"
            )
    for template in templates:
        if PLACE not in template:
            raise ValueError(
                f"a template must contain {PLACE}, which stands for the class, got {template!r}"
            )
