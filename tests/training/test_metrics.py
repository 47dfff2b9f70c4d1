"""Metrics depend only on the samples, not on their batches or the magnitude of their scores."""

import pytest
import torch
from sklearn.metrics import average_precision_score

from diffmm.training.metrics import MeanAveragePrecision, RatioOfSums

SIZES = ([12], [1] * 12, [5, 7], [11, 1])


def measured(metric, sizes, *tensors):
    for parts in zip(*(tensor.split(sizes) for tensor in tensors), strict=True):
        metric.update(*parts)
    return metric.compute().item()


def truth(scores, targets):
    """scikit-learn's average precision, averaged over the classes with a positive sample."""
    present = [k for k in range(scores.shape[1]) if targets[:, k].any()]
    each = [average_precision_score(targets[:, k], scores[:, k].double()) for k in present]
    return sum(each) / len(each)


@pytest.mark.parametrize(
    "scale",
    [0.01, 1.0, 1e3, 1e30],
    ids=["all in [0, 1] in some batches", "logits", "a saturated sigmoid", "huge"],
)
def test_mean_average_precision_is_that_of_the_scores_order(scale):
    scores = scale * torch.randn(12, 4)
    scores[:3] = scores[:3].abs()
    scores[7] = scores[2]  # equal scores share one rank
    targets = (torch.rand(12, 4) < 0.4).float()
    targets[:, 2] = 0.0
    expected = truth(scores, targets)
    assert 0.1 < expected < 0.9
    for sizes in SIZES:
        found = measured(MeanAveragePrecision(4), sizes, scores, targets)
        assert found == pytest.approx(expected, abs=1e-6)


def test_one_sample():
    scores, targets = torch.randn(1, 3), torch.tensor([[0.0, 1.0, 0.0]])
    assert measured(MeanAveragePrecision(3), [1], scores, targets) == 1.0


def test_one_class():
    scores, targets = torch.randn(12, 1), (torch.rand(12, 1) < 0.5).float()
    found = measured(MeanAveragePrecision(1), [12], scores, targets)
    assert found == pytest.approx(truth(scores, targets), abs=1e-6)


def test_what_has_no_average_precision():
    scores, targets = torch.randn(12, 2), torch.zeros(12, 2)
    assert torch.tensor(measured(MeanAveragePrecision(2), [12], scores, targets)).isnan()
    targets[3] = 1.0
    scores[5, 1] = torch.nan
    assert torch.tensor(measured(MeanAveragePrecision(2), [12], scores, targets)).isnan()


@pytest.mark.parametrize("num_classes", [1, 2, 7])
@pytest.mark.parametrize("multi_label", [False, True])
def test_a_task_s_metrics_do_not_depend_on_batches(make, num_classes, multi_label):
    task = make.task("image", multi_label=multi_label).eval()
    task.model.reset_classifier(num_classes)
    task.num_classes = num_classes
    with torch.no_grad():
        task.model.head.weight.mul_(1e5)
    batch = make.batch("image", size=12)
    batch["labels"] %= num_classes
    if multi_label:
        batch["labels"] = (torch.rand(12, num_classes) < 0.5).float()
    logits = task.model(batch["images"]).detach()
    if multi_label:
        expected = {"mean_average_precision": truth(logits, batch["labels"])}
    else:
        best = logits.topk(min(5, num_classes)).indices == batch["labels"][:, None]
        expected = {"accuracy": best[:, 0].float().mean().item()}
        if num_classes > 5:
            expected["accuracy_top5"] = best.any(dim=1).float().mean().item()
    expected["loss"] = task.loss(logits, batch["labels"]).double().mean().item()
    for sizes in SIZES:
        metrics = task.make_metrics()
        assert metrics.keys() == expected.keys()
        for part in zip(*(tensor.split(sizes) for tensor in batch.values()), strict=True):
            with torch.no_grad():
                task.update_metrics(dict(zip(batch, part, strict=True)), metrics)
        found = {name: metric.compute().item() for name, metric in metrics.items()}
        assert found == pytest.approx(expected, rel=1e-5)


def test_states_keep_their_type_when_a_task_is_cast():
    for metric in (MeanAveragePrecision(2), RatioOfSums()):
        assert metric.to(torch.bfloat16).dtype == torch.float32
