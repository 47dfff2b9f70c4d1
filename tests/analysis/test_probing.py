"""Linear probes and nearest neighbors."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.multiclass import OneVsRestClassifier
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor

from diffmm.analysis.probing import fit_probes, is_held_out, mean_loss, neighbor_scores


def clusters(num_classes: int = 3, count: int = 150, dim: int = 6) -> tuple[Tensor, Tensor]:
    """Overlapping clusters with features of different scales."""
    labels = torch.arange(count) % num_classes
    features = torch.randn(num_classes, dim)[labels] + torch.randn(count, dim)
    return features * 10.0 ** torch.linspace(-1, 1, dim) + 1.0, labels


@pytest.mark.parametrize("weight_decay", [1.0, 1e-2, 1e-4])
def test_the_probe_is_scikit_learns_logistic_regression(weight_decay):
    features, labels = clusters()
    (probe,) = fit_probes(features, labels, 3, [weight_decay])
    standardized = ((features - features.mean(0)) / features.std(0, correction=0)).numpy()
    # scikit-learn adds up the losses, and weighs them instead of the penalty.
    other = LogisticRegression(C=1 / (weight_decay * len(labels)), tol=1e-8, max_iter=5000)
    wanted = other.fit(standardized, labels.numpy()).predict_proba(standardized)
    found = probe.logits(features).softmax(1).numpy()
    assert np.allclose(found, wanted, atol=2e-3)


def test_several_labels_are_probed_one_by_one():
    features, labels = clusters()
    several = torch.stack([labels == 0, labels != 2], dim=1)
    (probe,) = fit_probes(features, several.float(), 2, [1e-2])
    standardized = ((features - features.mean(0)) / features.std(0, correction=0)).numpy()
    other = LogisticRegression(C=1 / (1e-2 * len(labels)), tol=1e-8, max_iter=5000)
    fitted = OneVsRestClassifier(other).fit(standardized, several.numpy())
    found = probe.logits(features).sigmoid().numpy()
    assert np.allclose(found, fitted.predict_proba(standardized), atol=2e-3)


def test_every_weight_decay_reaches_its_own_minimum():
    features, labels = clusters()
    decays = [1.0, 1e-2, 1e-4]
    probes = fit_probes(features, labels, 3, decays)
    for decay, probe in zip(decays, probes, strict=True):
        (alone,) = fit_probes(features, labels, 3, [decay])
        assert probe.weight_decay == decay
        assert torch.allclose(probe.logits(features), alone.logits(features), atol=2e-2)
    losses = [float(mean_loss(probe.logits(features), labels)) for probe in probes]
    assert losses == sorted(losses, reverse=True)


def test_a_constant_feature_is_ignored():
    features, labels = clusters()
    constant = torch.cat([features, torch.full((len(labels), 1), 1e6)], dim=1)
    (with_it,) = fit_probes(constant, labels, 3, [1e-2])
    (without,) = fit_probes(features, labels, 3, [1e-2])
    assert not with_it.weight[:, -1].any()
    assert torch.allclose(with_it.logits(constant), without.logits(features), atol=1e-3)


@pytest.mark.parametrize("features", [torch.zeros(0, 3), torch.tensor([[1.0, torch.nan]])])
def test_features_must_be_finite(features):
    with pytest.raises(ValueError, match="features must be finite numbers of at least one sample"):
        fit_probes(features, torch.zeros(len(features), dtype=torch.int64), 2)


def test_every_fifth_sample_of_each_class_is_held_out():
    labels = torch.tensor([0] * 10 + [1] * 5)[torch.randperm(15)]
    held_out = is_held_out(labels)
    assert labels[held_out].bincount().tolist() == [2, 1]
    # The smallest class has two samples, another has one.
    labels = torch.tensor([0, 1, 1, 2, 2, 2, 2])
    assert is_held_out(labels).tolist() == [False, False, True, False, True, False, True]
    assert not is_held_out(torch.arange(4)).any()
    assert is_held_out(torch.zeros(10, 3)).nonzero()[:, 0].tolist() == [4, 9]


@pytest.mark.parametrize("num_neighbors", [1, 7, 1000])
def test_neighbors_are_scikit_learns(num_neighbors):
    labels = torch.arange(150) % 3
    features = torch.randn(150, 6)
    queries = features[::3] + 0.1 * torch.randn(50, 6)
    found = neighbor_scores(features, labels, 3, queries, num_neighbors)
    other = KNeighborsClassifier(
        min(num_neighbors, len(labels)),
        metric="cosine",
        algorithm="brute",
        weights=lambda distances: np.exp((1 - distances) / 0.07),
    )
    wanted = other.fit(features.numpy(), labels.numpy()).predict_proba(queries.numpy())
    assert np.allclose(found.numpy(), wanted, atol=1e-4)


def test_neighbors_with_several_labels():
    features, labels = torch.randn(150, 6), torch.arange(150) % 3
    several = torch.stack([labels == 0, labels != 2], dim=1).float()
    found = neighbor_scores(features, several, 2, features, 1)
    assert torch.allclose(found, several, atol=1e-5)
    with pytest.raises(ValueError, match="num_neighbors must be at least 1, got 0"):
        neighbor_scores(features, labels, 3, features, 0)
