"""Accuracy of answers: what counts as one, and what `CausalLM` logs."""

import pytest
import torch
from torch.nn.functional import cross_entropy

from diffmm.batch import IGNORE_INDEX, answer_counts
from diffmm.training import CausalLM, OptimizerConfig, ScheduleConfig

_ = IGNORE_INDEX


def test_an_answer_is_a_run_of_targets():
    targets = torch.tensor([[7, 8, _, 9, _, _, 5, 6, 7], [_] * 9, [1, _, 1, _, 1, _, 1, _, 1]])
    predicted = torch.tensor([[7, 8, 0, 9, 1, 2, 5, 6, 0], [1] * 9, [1, 1, 0, 1, 1, 1, 1, 1, 1]])
    num_exact, num_answers = answer_counts(predicted, targets)
    assert num_exact.tolist() == [2, 0, 4]
    assert num_answers.tolist() == [3, 0, 5]


@pytest.fixture
def answering(make):
    def create(**changes):
        settings = OptimizerConfig(learning_rate=1e-2), ScheduleConfig(total_steps=60)
        return CausalLM(make.text("diff_v1"), *settings, **changes)

    return create


def batch_of(make, num=6):
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(make.vocab_size, (num, 9), generator=generator)
    targets = torch.full_like(tokens, _)
    targets[:, 3:5] = tokens[:, 4:6]
    targets[:, 7] = tokens[:, 8]
    evidence = torch.zeros(tokens.shape, dtype=torch.bool)
    return {"tokens": tokens, "targets": targets, "evidence": evidence, "index": torch.arange(num)}


def test_accuracy_rises_to_one_and_the_loss_is_that_of_the_answers(make, fit, answering):
    task, batch = answering(answers=True), batch_of(make)
    untrained = task.make_metrics()
    task.eval()
    with torch.no_grad():
        task.update_metrics(batch, untrained)
        logits = task.model(batch["tokens"])
    mean = cross_entropy(logits.flatten(0, 1), batch["targets"].flatten(), ignore_index=_)
    torch.testing.assert_close(untrained["loss"].compute(), mean)
    assert untrained["accuracy"].compute() < 0.5
    task.train()
    trainer = fit(task, [batch], [batch], max_steps=60, limit_train_batches=60)
    assert trainer.callback_metrics["val/accuracy"] == 1.0
    assert trainer.callback_metrics["val/loss"] < 0.1
    assert "val/bits_per_byte" not in trainer.callback_metrics


def test_other_tasks_are_unchanged(make, answering):
    assert "accuracy" not in answering().make_metrics()
    batch = batch_of(make)
    metrics = [task.make_metrics() for task in (answering(), answering(answers=True))]
    task = answering()
    with torch.no_grad():
        task.eval().update_metrics(batch, metrics[0])
        task.answers = True
        task.update_metrics(batch, metrics[1])
    torch.testing.assert_close(metrics[0]["loss"].compute(), metrics[1]["loss"].compute())
