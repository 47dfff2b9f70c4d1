"""Excludes repeated samples from the metrics of a distributed evaluation.

The datamodules of this library mark batches that only keep the processes in step. The distributed
sampler of Lightning (and of torch) repeats samples from the beginning to make all shares equal;
these are recognized by their position.
"""

from typing import Any

from torch.utils.data import DistributedSampler

from diffmm.batch import REPEATED, samples_of, size_of


def counted(batch: dict[str, Any], batch_idx: int, loaders: Any) -> dict[str, Any] | None:
    """Return the samples of a batch that count towards the metrics, or `None` if there are none.

    Args:
        batch: Tensors whose first dimension is the batch dimension.
        batch_idx: Index of the batch in this process.
        loaders: The trainer's data loaders of this evaluation.
    """
    if REPEATED in batch:
        return None
    loader = loaders[0] if isinstance(loaders, list) and len(loaders) == 1 else loaders
    sampler, batch_size = getattr(loader, "sampler", None), getattr(loader, "batch_size", None)
    if not isinstance(sampler, DistributedSampler) or batch_size is None:
        return batch
    first = sampler.rank + batch_idx * batch_size * sampler.num_replicas
    size = size_of(batch)
    num_left = max(0, -(-(len(sampler.dataset) - first) // sampler.num_replicas))  # type: ignore[arg-type]
    if num_left >= size:
        return batch
    return samples_of(batch, slice(num_left)) if num_left else None
