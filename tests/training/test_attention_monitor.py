"""The monitor of attention logs what it says, and leaves training and resuming as they are."""

import csv

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.loggers import CSVLogger

from diffmm.analysis.attention_maps import attention_maps
from diffmm.analysis.map_blocks import visit_layers
from diffmm.analysis.monitor import AttentionMonitor, cheap_measures
from diffmm.checkpoint_folders import find_state
from diffmm.training import Checkpoints

NAMES = [f"attention/{n}" for n in ("entropy", "first_share", "negative_share", "top_logit")]


class Weights(Callback):
    """Copies the weights after a step."""

    def __init__(self, step):
        self.step = step
        self.state = None

    def on_train_batch_end(self, trainer, pl_module, *args):
        if trainer.global_step == self.step:
            self.state = {n: w.clone() for n, w in pl_module.model.state_dict().items()}


def logged(folder):
    """The logged values by step."""
    found = {}
    for file in sorted(folder.rglob("metrics.csv")):
        with file.open() as opened:
            for row in csv.DictReader(opened):
                if row.get(NAMES[0]):
                    found[int(row["step"])] = [float(row[name]) for name in NAMES]
    return found


def test_values_are_those_of_the_first_samples(make, fit, tmp_path):
    task, batches = make.task("causal_lm", "diff_v2"), [make.batch("causal_lm") for _ in range(6)]
    weights = Weights(4)
    callbacks = [AttentionMonitor(every_n_steps=2, num_samples=2), weights]
    fit(task, batches, max_steps=5, log_every_n_steps=1, callbacks=callbacks)
    found = logged(tmp_path)
    assert list(found) == [1, 3]
    task.model.load_state_dict(weights.state)
    tokens = batches[0]["tokens"][:2]
    combined = torch.stack([layer.combined for layer in attention_maps(task.model, tokens)])
    entropy, first, negative, top = found[3]
    shares = combined / combined.abs().sum(-1, keepdim=True)
    assert entropy == pytest.approx(float(torch.special.entr(shares.abs()).sum(-1).mean()), 1e-4)
    assert first == pytest.approx(float(shares[..., 0].abs().mean()), rel=1e-4)
    assert negative == pytest.approx(float(shares.clamp(max=0).sum(-1).abs().mean()), rel=1e-4)
    tops = []

    def visit(layer):
        for block in layer.blocks():
            seen = [scores[block.visible.expand_as(scores)] for scores in block.scores]
            tops.append(float(torch.cat(seen).abs().max()))

    visit_layers(task.model, tokens, visit=visit)
    assert top == pytest.approx(max(tops), rel=1e-4)


@pytest.mark.parametrize("name", ["audio", "image_mae"])
def test_training_is_left_as_it_is(make, fit, name):
    weights = []
    for callbacks in ([], [AttentionMonitor(every_n_steps=1)]):
        torch.manual_seed(0)
        task = make.task(name, "diff_v1", backbone={"dropout": 0.2, "drop_path": 0.2})
        trainer = fit(task, [make.batch(name)], max_steps=3, logger=False, callbacks=callbacks)
        assert (NAMES[0] in trainer.callback_metrics) == bool(callbacks)
        weights.append(task.model.state_dict())
    for parameter, weight in weights[0].items():
        assert torch.equal(weight, weights[1][parameter]), parameter


def test_a_resumed_run_continues_with_the_same_samples(make, fit, tmp_path):
    batches = [make.batch("image") for _ in range(4)]

    def run(folder, steps, batches, ckpt_path=None):
        torch.manual_seed(0)
        checkpoints = Checkpoints(tmp_path / folder / "checkpoints", every_n_steps=2)
        fit(
            make.task("image"),
            batches,
            max_steps=steps,
            enable_checkpointing=True,
            callbacks=[AttentionMonitor(every_n_steps=1), checkpoints],
            logger=CSVLogger(tmp_path / folder, name="", version=f"until_{steps}"),
            ckpt_path=ckpt_path,
        )
        return logged(tmp_path / folder)

    whole = run("whole", 4, batches)
    assert list(whole) == [0, 1, 2, 3]
    run("parts", 2, batches)
    # Its first batch is another one than that of the first start.
    assert run("parts", 4, batches[2:], find_state(tmp_path / "parts" / "checkpoints")) == whole


def test_wrong_intervals_are_refused(make, fit):
    for name in ("every_n_steps", "num_samples"):
        with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
            AttentionMonitor(**{name: 0})
    with pytest.raises(ValueError, match="every_n_steps=3 of .* multiple of the trainer's .*=2"):
        fit(
            make.task("image"),
            [make.batch("image")],
            max_steps=1,
            log_every_n_steps=2,
            callbacks=[AttentionMonitor(every_n_steps=3)],
        )


def test_padding_of_text_does_not_count(make):
    model, batch = make.text("diff_v1"), make.batch("causal_lm", 2)
    real = torch.ones_like(batch["tokens"], dtype=torch.bool)
    real[:, 9:] = False
    padded = cheap_measures(model, {**batch, "key_padding": real})
    short = cheap_measures(model, {"tokens": batch["tokens"][:, :9]})
    assert padded == pytest.approx(short, rel=1e-4)
