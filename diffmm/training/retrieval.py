"""Retrieval between media and texts: recall, and the loss of a whole evaluation."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torchmetrics.utilities import dim_zero_cat

from diffmm.training.contrastive_losses import LOSSES, Pairs
from diffmm.training.metrics import ExactMetric

TOP_KS = (1, 5, 10)
ROWS = 1024
"""Number of rows of the matrix of similarities that are in memory at once."""

PIECES, BITS = 3, 22
"""An integer is stored as floating-point numbers of this many bits, which are exact in float32."""


class Retrieval(ExactMetric):
    """Recall of texts by media and of media by texts, and the loss, over a whole evaluation.

    * `media_to_text_recall_K`: share of the images or sounds for which at least one of their texts
      is among the `K` most similar of all texts.
    * `text_to_media_recall_K`: share of the texts for which (one of) their images or sounds is
      among the `K` most similar of all.
    * `loss`: that of training, of all samples as one batch. More negatives than in a training batch
      make it larger.

    A medium counts once, however many texts it has, and so does a text that several media have: it
    matches all of them. A wrong item that is exactly as similar as the best right one comes before
    it, so that a model that embeds everything alike has a recall of 0. The result does not depend
    on how the samples are divided into batches and among processes.

    With several modalities of media, such as images and sounds, there are also
    `image_to_text_recall_K`, `text_to_image_recall_K` and `image_loss` of each that has samples:
    those of its media and their texts alone.

    Args:
        embed_dim: Width of the embeddings.
        loss: A name in `diffmm.training.contrastive_losses.LOSSES`.
        media: The modalities of the media.
    """

    full_state_update = False
    rows: list[Tensor]
    scale: Tensor
    bias: Tensor

    def __init__(self, embed_dim: int, loss: str, media: Sequence[str] = ("media",)) -> None:
        super().__init__()
        self.embed_dim, self.loss, self.media = embed_dim, loss, tuple(media)
        # One-dimensional, as torchmetrics assumes for the states of a process without samples.
        self.add_state("rows", default=[], dist_reduce_fx="cat")
        # All processes with samples have equal ones; the others have none.
        self.add_state("scale", default=torch.tensor(-torch.inf), dist_reduce_fx="max")
        self.add_state("bias", default=torch.tensor(-torch.inf), dist_reduce_fx="max")

    def update(
        self,
        pairs: Pairs,
        index: Tensor,
        scale: Tensor,
        bias: Tensor | None,
        medium: str | None = None,
    ) -> None:
        """Add a batch.

        Args:
            pairs: The pairs of one modality, with `media_ids`.
            index: Positions of the samples in their dataset, `[B]`.
            scale: Factor of the similarities, a scalar.
            bias: Term added to them, a scalar; None without one.
            medium: The modality, one of `media`; the first by default.
        """
        assert pairs.media_ids is not None
        number = 0 if medium is None else self.media.index(medium)
        kinds = torch.full_like(index, number)
        integers = [as_floats(ids) for ids in (pairs.media_ids, pairs.text_ids, index, kinds)]
        rows = [pairs.media.detach().float(), pairs.texts.detach().float(), *integers]
        self.rows.append(torch.cat(rows, dim=1).flatten())
        self.scale = scale.detach().float()
        self.bias = torch.zeros_like(self.scale) if bias is None else bias.detach().float()

    def compute(self) -> dict[str, Tensor]:
        """Return the recalls, in [0, 1], and the loss; NaN without samples."""
        if not len(self.rows):
            names = ("loss", *recall_names("media"))
            return dict.fromkeys(names, torch.tensor(torch.nan, device=self.device))
        pairs, kinds = self._pairs()
        found = {"loss": self._loss(pairs), **recalls(pairs, "media")}
        for number, medium in enumerate(self.media if len(self.media) > 1 else ()):
            if (kinds == number).any():
                own = pairs.at(kinds == number)
                found |= {f"{medium}_loss": self._loss(own), **recalls(own, medium)}
        return found

    def _pairs(self) -> tuple[Pairs, Tensor]:
        """All pairs and the numbers of their modalities, in the order of their index; of pairs with
        the same index, the first."""
        dim = self.embed_dim
        rows = dim_zero_cat(self.rows).view(-1, 2 * dim + 4 * PIECES)
        media, texts, *pieces = rows.split([dim, dim, *[PIECES] * 4], dim=1)
        media_ids, text_ids, index, kinds = map(as_integers, pieces)
        _, order = first_places(index)
        return Pairs(media, texts, media_ids, text_ids).at(order), kinds[order]

    def _loss(self, pairs: Pairs) -> Tensor:
        count = len(pairs.media)
        total = torch.zeros((), device=pairs.media.device)
        for first in range(0, count, ROWS):
            own = Pairs(*(part[first : first + ROWS] for part in pairs if part is not None))
            total += LOSSES[self.loss](own, pairs, first, self.scale, self.bias)
        return total / count


def recalls(pairs: Pairs, medium: str) -> dict[str, Tensor]:
    """The recalls of all pairs, by their names for a modality."""
    assert pairs.media_ids is not None
    media = Items.of(pairs.media, pairs.media_ids)
    texts = Items.of(pairs.texts, pairs.text_ids)
    ranks = (best_ranks(media, texts), best_ranks(texts, media))
    found = [(rank < k).float().mean() for rank in ranks for k in TOP_KS]
    return dict(zip(recall_names(medium), found, strict=True))


def recall_names(medium: str) -> list[str]:
    """The names of the recalls of a modality, of media and then of texts."""
    ways = f"{medium}_to_text", f"text_to_{medium}"
    return [f"{way}_recall_{k}" for way in ways for k in TOP_KS]


class Items:
    """Different media or texts of an evaluation, `K` in number.

    Args:
        embeddings: `[K, D]`.
        of_pairs: `[P]` integers, the item of each of `P` pairs.
    """

    def __init__(self, embeddings: Tensor, of_pairs: Tensor) -> None:
        self.embeddings, self.of_pairs = embeddings, of_pairs

    @classmethod
    def of(cls, embeddings: Tensor, ids: Tensor) -> "Items":
        """Find the different items of pairs, given the embedding and the id of each pair's item.
        Of several embeddings of one item, the first is used."""
        of_pairs, first = first_places(ids)
        return cls(embeddings[first], of_pairs)


def first_places(ids: Tensor) -> tuple[Tensor, Tensor]:
    """The number of each id among the different ones in ascending order, `[B]`, and the first place
    of each of these, `[K]`."""
    different, numbers = ids.unique(return_inverse=True)
    places = torch.arange(len(ids), device=ids.device)
    first = torch.full_like(different, len(ids)).scatter_reduce(0, numbers, places, "amin")
    return numbers, first


def best_ranks(queries: Items, keys: Items) -> Tensor:
    """The rank of the best right key of each query: the number of wrong keys that are at least as
    similar as the most similar right one.

    Args:
        queries: The queries.
        keys: The keys; those with a pair in common with a query are right.

    Returns:
        `[K]` integers, where 0 is best.
    """
    ranks = []
    for first in range(0, len(queries.embeddings), ROWS):
        scores = queries.embeddings[first : first + ROWS] @ keys.embeddings.T
        rows = queries.of_pairs - first
        inside = (rows >= 0) & (rows < len(scores))
        is_right = torch.zeros_like(scores, dtype=torch.bool)
        is_right[rows[inside], keys.of_pairs[inside]] = True
        best = scores.masked_fill(~is_right, -torch.inf).amax(dim=1, keepdim=True)
        # Not `>=`: NaN is not below anything, so that it is never a hit.
        ranks.append((~is_right & ~(scores < best)).sum(dim=1))
    return torch.cat(ranks)


def as_floats(values: Tensor) -> Tensor:
    """Store int64 numbers, `[B]`, as float32, `[B, PIECES]`, exactly."""
    mask = (1 << BITS) - 1
    pieces = [(values >> BITS * i) & mask for i in range(PIECES - 1)]
    return torch.stack([*pieces, values >> BITS * (PIECES - 1)], dim=1).float()


def as_integers(pieces: Tensor) -> Tensor:
    """The numbers that `as_floats` has stored."""
    return sum(piece << BITS * i for i, piece in enumerate(pieces.long().unbind(1)))  # type: ignore[return-value]
