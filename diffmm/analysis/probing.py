"""What frozen features know: a linear probe and nearest neighbors."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, normalize

WEIGHT_DECAYS = tuple(10.0 ** (exponent / 2) for exponent in range(2, -13, -1))
"""Grid from 10 to 1e-6, from the strongest decay to the weakest."""

MAX_STEPS = 500
TEMPERATURE = 0.07
"""Of the weights of neighbors, as in DINO."""

_CHUNK = 1024


@dataclass(frozen=True)
class LinearProbe:
    """A linear classifier of features, `logits = weight @ x + bias`.

    Attributes:
        weight: `[K, D]` float32.
        bias: `[K]` float32.
        weight_decay: With which it was fitted.
    """

    weight: Tensor
    bias: Tensor
    weight_decay: float

    def logits(self, features: Tensor) -> Tensor:
        """The logits `[N, K]` of features `[N, D]`."""
        return features.float() @ self.weight.T + self.bias


def fit_probes(
    features: Tensor,
    labels: Tensor,
    num_classes: int,
    weight_decays: Sequence[float] = WEIGHT_DECAYS,
) -> list[LinearProbe]:
    """Fit a linear classifier for each weight decay, by L-BFGS until the gradient vanishes:

        min over W, b of  mean(loss(W z + b, label)) + weight_decay / 2 * sum(W ** 2),
        z = (x - mean(x)) / std(x)

    with the mean and the standard deviation of each feature. The loss is cross-entropy, or binary
    cross-entropy summed over the classes for several labels per sample. The problem is convex, so
    that no learning rate needs to be chosen. Fits start from those of stronger weight decays.

    Args:
        features: `[N, D]`.
        labels: `[N]` class indices, or `[N, num_classes]` zeros and ones.
        num_classes: Number of classes.
        weight_decays: The weight decays, from the strongest to the weakest.

    Returns:
        The classifiers of features that are not standardized, one per weight decay.

    Raises:
        ValueError: If there are no samples, or the features are not finite.
    """
    features = features.float()
    if not len(features) or not features.isfinite().all():
        raise ValueError(
            f"features must be finite numbers of at least one sample, got {len(features)} samples"
        )
    mean, std = features.mean(0), features.std(0, correction=0)
    # A feature that is the same for all samples stays 0.
    std = torch.where(std > 1e-6 * features.abs().amax(0).clamp(min=1e-30), std, torch.inf)
    standardized = (features - mean) / std
    weight = torch.zeros(num_classes, features.shape[1], device=features.device)
    bias = torch.zeros(num_classes, device=features.device)
    probes = []
    for weight_decay in weight_decays:
        _minimize(standardized, labels, weight, bias, weight_decay)
        scaled = weight.detach() / std
        probes.append(LinearProbe(scaled, bias.detach() - scaled @ mean, weight_decay))
    return probes


def _minimize(
    features: Tensor, labels: Tensor, weight: Tensor, bias: Tensor, weight_decay: float
) -> None:
    """Move `weight` and `bias` to the minimum."""
    parameters = [weight.requires_grad_(), bias.requires_grad_()]
    optimizer = torch.optim.LBFGS(
        parameters, max_iter=MAX_STEPS, tolerance_grad=1e-6, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = mean_loss(features @ weight.T + bias, labels)
        loss = loss + 0.5 * weight_decay * weight.square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)


def mean_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """The mean loss of logits `[N, K]`; see `fit_probes`."""
    if labels.ndim == 1:
        return cross_entropy(logits, labels)
    losses = binary_cross_entropy_with_logits(logits, labels.float(), reduction="none")
    return losses.sum(1).mean()


def is_held_out(labels: Tensor) -> Tensor:
    """Select the samples with which a weight decay is chosen, `[N]` booleans: every fifth one of
    each class, but every second, third or fourth one if the smallest class of several samples has
    fewer than five. With several labels per sample, every fifth sample.

    Args:
        labels: As in `fit_probes`.
    """
    if labels.ndim > 1:
        return torch.arange(len(labels), device=labels.device) % 5 == 4
    order = labels.argsort(stable=True)
    counts = labels.bincount()
    first = (counts.cumsum(0) - counts)[labels[order]]
    rank = torch.empty_like(labels)
    rank[order] = torch.arange(len(labels), device=labels.device) - first
    several = counts[counts > 1]
    period = min(5, int(several.min())) if len(several) else 5
    return rank % period == period - 1


def neighbor_scores(
    features: Tensor, labels: Tensor, num_classes: int, queries: Tensor, num_neighbors: int = 20
) -> Tensor:
    """Score classes by the nearest training samples, with weights `exp(cosine / 0.07)` (Wu et al.
    2018; Caron et al. 2021, DINO).

    Args:
        features: Features of the training samples, `[N, D]`.
        labels: Their labels, as in `fit_probes`.
        num_classes: Number of classes.
        queries: Features of the samples to classify, `[M, D]`.
        num_neighbors: Number of neighbors, at most `N` of which are used.

    Returns:
        The share of each class in the neighbors' weight, `[M, num_classes]`.

    Raises:
        ValueError: If `num_neighbors` is less than 1.
    """
    if num_neighbors < 1:
        raise ValueError(f"num_neighbors must be at least 1, got {num_neighbors}")
    targets = labels.float()
    if labels.ndim == 1:
        targets = torch.nn.functional.one_hot(labels, num_classes).float()
    train = normalize(features.float(), dim=1)
    scores = []
    for chunk in normalize(queries.float(), dim=1).split(_CHUNK):
        cosines, nearest = (chunk @ train.T).topk(min(num_neighbors, len(train)), dim=1)
        weights = (cosines / TEMPERATURE).softmax(dim=1)
        scores.append((weights[:, None] @ targets[nearest])[:, 0])
    return torch.cat(scores)
