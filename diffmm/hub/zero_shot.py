"""Embeddings of images, sounds and texts by a contrastive model, and of classes by their names."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from diffmm.batch import inputs_of, to_device
from diffmm.hub.predictions import Predictor, expanded
from diffmm.models.contrastive import ContrastiveModel
from diffmm.models.modes import check_evaluation

PLACE = "{}"
TEMPLATES = ("a photo of a {}.",)
"""CLIP's default prompt."""


def towers_of(model: ContrastiveModel, reader: Any) -> list[str]:
    """The names of the towers whose inputs a reader reads: `"image"`, `"audio"` or both.

    Raises:
        ValueError: If the model has no such tower.
    """
    settings = {"image": "image_size", "audio": "sample_rate_hz"}
    names = [name for name, setting in settings.items() if hasattr(reader, setting)]
    for name in names:
        if name not in model.towers:
            raise ValueError(
                f"the reader reads {reader.kind} files, but the model has no {name} tower: use "
                f"another reader"
            )
    return names


def by_tower(
    model: ContrastiveModel, reader: Any, samples: Sequence[dict[str, Any]]
) -> Iterator[tuple[str, list[int], tuple[Tensor, ...]]]:
    """Sort samples of a reader by the tower that they are for. Yields its name, the places of its
    samples, and its inputs."""
    for name in towers_of(model, reader):
        tower = model.towers[name]
        places = [i for i, sample in enumerate(samples) if tower.input_fields[0] in sample]
        if places:
            batch = reader.collate([samples[place] for place in places])
            yield name, places, inputs_of(tower, to_device(batch, model.logit_scale.device))


def embed_samples(
    model: ContrastiveModel, reader: Any, samples: Sequence[dict[str, Any]]
) -> Tensor:
    """Embeddings of samples of a reader, `[N, embed_dim]`."""
    found = model.logit_scale.new_empty(len(samples), model.config.embed_dim)
    for _, places, inputs in by_tower(model, reader, samples):
        found[places] = model.encode_media(*inputs)
    return found


@torch.inference_mode()
def embed_media(
    model: ContrastiveModel, reader: Any, inputs: Iterable[Any], batch_size: int
) -> Tensor:
    """Embeddings of images or sounds, and of those in folders, `[I, embed_dim]` on the CPU.

    Raises:
        ValueError: If an input cannot be read, the message names it; or the model is in training
            mode.
    """
    check_evaluation(model, "embedding images or sounds")
    _ = towers_of(model, reader)  # an error before anything is read
    items, found = expanded(inputs, reader), []
    while samples := [reader.read(item) for item in islice(items, batch_size)]:
        found.append(embed_samples(model, reader, samples).cpu())
    return torch.cat(found) if found else torch.empty(0, model.config.embed_dim)


@torch.inference_mode()
def embed_texts(
    model: ContrastiveModel, reader: Any, texts: Sequence[str], batch_size: int
) -> Tensor:
    """Embeddings of texts, `[T, embed_dim]` on the CPU.

    Raises:
        ValueError: If a text is empty, not a string, or longer than the reader's `max_tokens`; or
            the model is in training mode.
    """
    check_evaluation(model, "embedding texts")
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


class ZeroShotPredictor(Predictor):
    """Predicts classes that are known by their names, of images and sounds in any order.
    Arguments as in `Predictor`, with a `ZeroShotClassifier` as the model."""

    @torch.inference_mode()
    def logits(self, samples: list[dict[str, Any]]) -> Tensor:
        classifier: Any = self.model
        return classifier.compare(embed_samples(classifier.model, self.reader, samples))
