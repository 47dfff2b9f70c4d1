"""Packing: several pairs in one row of a batch, without padding between their texts."""

from functools import partial
from typing import Any

import torch
from torch.nn.functional import pad

from datamodules.shared.loading import Collate
from diffmm.batch import PairBatch


def packed(batch: PairBatch, per_row: int, longest: int | None) -> PairBatch:
    """Pack successive pairs of a batch into rows.

    Args:
        batch: `B` pairs; `B` is a multiple of `per_row`.
        per_row: Number of pairs per row.
        longest: Number of tokens to which rows are padded; by default that of the longest row.
    """
    result: Any = dict(batch)
    rows = [
        torch.cat([text[:length] for text, length in zip(texts, lengths, strict=True)])
        for texts, lengths in zip(
            batch["tokens"].split(per_row),
            batch["num_tokens"].view(-1, per_row).tolist(),
            strict=True,
        )
    ]
    width = longest or max(map(len, rows))
    eos_id = int(rows[0][-1])
    counts = batch["num_tokens"].view(-1, per_row)
    ends = counts.cumsum(dim=1)
    result["tokens"] = torch.stack([pad(row, (0, width - len(row)), value=eos_id) for row in rows])
    result["num_tokens"] = ends[:, -1]
    # The padding belongs to the last pair: no token before it attends to it.
    places = torch.arange(width).expand(len(rows), -1).contiguous()
    documents = torch.searchsorted(ends, places, right=True)
    result["document_ids"] = documents.clamp(max=per_row - 1)
    result["media_documents"] = torch.arange(per_row).repeat(len(rows), 1)
    for name in ("images", "waveforms", "num_samples", "media_index"):
        if name in result:
            result[name] = result[name].unflatten(0, (-1, per_row))
    result["index"] = batch["index"][::per_row]
    return result


def packing(collate: Collate, per_row: int, longest: int | None) -> Collate:
    """A collate function whose batches are packed (see `packed`)."""
    return partial(_packed, collate=collate, per_row=per_row, longest=longest)


def _packed(
    samples: list[Any], *, collate: Collate, per_row: int, longest: int | None
) -> PairBatch:
    return packed(collate(samples), per_row, longest)
