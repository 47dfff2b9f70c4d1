"""Which samples of an evaluation count, where several processes share them.

The datamodules of this library mark batches that are there for the other processes' sake alone.
Lightning's own sampler (and torch's) begins the samples again to make all shares equal: these are
told by their place.
"""

from typing import Any

from torch.utils.data import DistributedSampler

from diffmm.batch import REPEATED, samples_of, size_of


def counted(batch: dict[str, Any], batch_idx: int, loaders: Any) -> dict[str, Any] | None:
    """The samples of a batch that count, or nothing if none does.

    Args:
        batch: of tensors whose first axis are samples.
        batch_idx: the batch's number in this process.
        loaders: the trainer's, of this evaluation.
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
