"""Logged values are correct, and monitors do not change training."""

from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Callback

from diffmm.training import LambdaMonitor, SpeedMonitor
from diffmm.training.callbacks import differential_layers, mean_lambdas


def test_lambda_of_v1_is_the_layer_s(make):
    task = make.task("causal_lm", "diff_v1")
    means = mean_lambdas(task, differential_layers(task), make.batch("causal_lm"))
    for index, block in enumerate(task.model.backbone.blocks):
        torch.testing.assert_close(means[index], block.attention.lam(None).detach())


def test_lambda_of_v2_is_the_mean_over_tokens_and_heads(make):
    task = make.task("image", "diff_v2")
    layer = task.model.backbone.blocks[0].attention
    seen = []
    layer.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    means = mean_lambdas(task, differential_layers(task), make.batch("image"))
    lam = (seen[0] @ layer.lambda_proj.weight.T).sigmoid()
    torch.testing.assert_close(means[0], lam.mean())
    assert set(means) == {0, 1}
    assert not task.model.backbone.blocks[1].attention._forward_pre_hooks


def test_watching_leaves_training_as_it_is(make, fit, monkeypatch):
    """With dropout and stochastic depth, the same random numbers are drawn."""
    weights = []
    for watched in (False, True):
        if not watched:
            monkeypatch.setattr(LambdaMonitor, "on_train_batch_end", Callback.on_train_batch_end)
        else:
            monkeypatch.undo()
        torch.manual_seed(0)
        task = make.task("audio", "diff_v2", backbone={"dropout": 0.2, "drop_path": 0.2})
        trainer = fit(task, [make.batch("audio")], max_steps=4, logger=False)
        assert ("lambda/layer_00" in trainer.callback_metrics) == watched
        weights.append(task.model.state_dict())
    for name, weight in weights[0].items():
        assert torch.equal(weight, weights[1][name]), name


def test_lambda_is_measured_at_logging_steps_alone(make, fit, monkeypatch):
    calls = []
    monkeypatch.setattr(
        "diffmm.training.callbacks.mean_lambdas",
        lambda task, layers, batch: calls.append(len(batch["index"])) or {},
    )
    fit(make.task("image"), [make.batch("image")], max_steps=7, log_every_n_steps=3)
    assert calls == [1, 1]


def test_the_gradient_norm_is_that_before_clipping(make, fit):
    batch, norms = make.batch("image"), []
    for clip in (None, 1e-3, 1e9):
        torch.manual_seed(0)
        task = make.task("image")
        trainer = fit(task, [batch], gradient_clip_val=clip, logger=False)
        norms.append(trainer.callback_metrics["train/grad_norm"])
        grads = torch.stack([p.grad.norm() for p in task.model.parameters() if p.grad is not None])
        expected = 1e-3 if clip == 1e-3 else norms[-1]
        assert grads.norm().item() == pytest.approx(float(expected), rel=1e-3)
    assert norms[0] == norms[1] == norms[2] > 1e-3


def test_values_can_be_clipped(make, fit):
    task = make.task("image")
    settings = {"gradient_clip_val": 1e-4, "gradient_clip_algorithm": "value"}
    trainer = fit(task, [make.batch("image")], **settings)
    gradients = torch.cat([p.grad.flatten().abs() for p in task.model.parameters()])
    assert gradients.max() == pytest.approx(1e-4)
    assert (gradients == gradients.max()).float().mean() > 0.1
    assert trainer.callback_metrics["train/grad_norm"] > 1e-3


def test_speed_counts_samples_and_tokens_but_no_validation(make, fit, monkeypatch):
    class Clock(Callback):
        now = 100.0

        def on_train_batch_start(self, *args):
            self.now += 0.02  # waiting for the batch

        def on_before_optimizer_step(self, *args):
            self.now += 0.03

        def on_validation_batch_start(self, *args):
            self.now += 0.5

    clock = Clock()
    fake = SimpleNamespace(monotonic=lambda: clock.now)
    monkeypatch.setattr("diffmm.training.callbacks.time", fake)
    batch = make.batch("causal_lm")
    trainer = fit(
        make.task("causal_lm"),
        [batch],
        [batch],
        max_steps=4,
        val_check_interval=1,
        log_every_n_steps=2,
        callbacks=[clock],
        logger=False,
    )
    speed = trainer.callback_metrics["train/samples_per_second"]
    assert speed == pytest.approx(6 / 0.05)
    tokens = trainer.callback_metrics["train/tokens_per_second"].item()
    assert tokens == pytest.approx(16 * speed.item(), rel=1e-5)
    assert trainer.callback_metrics["train/data_wait"] == pytest.approx(0.4)


def test_a_monitor_that_the_trainer_has_is_not_doubled(make, fit):
    speed = SpeedMonitor()
    trainer = fit(make.task("image"), [make.batch("image")], callbacks=[speed])
    kinds = [type(callback) for callback in trainer.callbacks]
    assert kinds.count(SpeedMonitor) == kinds.count(LambdaMonitor) == 1
    assert speed in trainer.callbacks
