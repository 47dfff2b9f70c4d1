"""Gradients and losses of a step do not depend on its division into micro-batches."""

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.plugins import MixedPrecision

from diffmm.batch import IGNORE_INDEX
from diffmm.checkpoint_folders import find_state
from diffmm.training import Checkpoints
from diffmm.training.resilience.checkpoints.exact import gradient_of

TASKS = (
    *("causal_lm", "masked_lm", "image", "multi_label", "audio", "image_mae", "audio_mae"),
    *("audio_captions", "audio_ctc"),
)

DIVISIONS = {
    "unequal": ([1, 5], 2),
    "three": ([3, 2, 1], 3),
    "short last": ([2, 4], 4),
    "a single one of four": ([6], 4),
}
"""Divisions of six samples, and the number of micro-batches per step."""


class Watch(Callback):
    """Records the gradients of every step before clipping."""

    def __init__(self):
        self.gradients, self.losses = [], []

    def on_before_optimizer_step(self, trainer, task, optimizer):
        found = {name: p.grad.clone() for name, p in task.named_parameters() if p.grad is not None}
        self.gradients.append(found)

    def on_train_batch_end(self, trainer, *args):
        if not trainer.fit_loop._should_accumulate():
            self.losses.append(trainer.callback_metrics["train/loss"].item())


def task_and_batch(make, name):
    """A task, and a batch whose samples have very different numbers of targets."""
    if name == "multi_label":
        labels = torch.rand(6, make.num_classes).round()
        return make.task("image", multi_label=True), {**make.batch("image"), "labels": labels}
    task, batch = make.task(name), make.batch(name)
    if name == "causal_lm":
        lengths = torch.tensor([1, 16, 3, 9, 16, 2])
        batch["key_padding"] = torch.arange(16) < lengths[:, None]
        batch["targets"][~batch["key_padding"]] = IGNORE_INDEX
    if name == "masked_lm":
        batch["targets"][:2, 1:] = IGNORE_INDEX
    if name.startswith("audio"):
        batch["num_samples"] = torch.tensor([300, 2000, 1000, 700, 2000, 400])
    return task, batch


def divided(batch, sizes):
    parts = zip(*(tensor.split(sizes) for tensor in batch.values()), strict=True)
    return [dict(zip(batch, part, strict=True)) for part in parts]


@pytest.fixture
def one_step(make, fit):
    """`one_step(name, sizes, num_accumulated)` returns the gradients, the loss and the logged
    norm."""

    def run(name, sizes, num_accumulated, **settings):
        watch = Watch()
        torch.manual_seed(0)
        task, batch = task_and_batch(make, name)
        trainer = fit(
            task,
            divided(batch, sizes),
            callbacks=[watch],
            accumulate_grad_batches=num_accumulated,
            limit_train_batches=len(sizes),
            gradient_clip_val=0.1,
            logger=False,
            **settings,
        )
        (gradients,), (loss,) = watch.gradients, watch.losses
        return gradients, loss, trainer.callback_metrics["train/grad_norm"].item()

    return run


def assert_close(found, expected, tolerance=1e-4):
    assert found[0].keys() == expected[0].keys()
    whole = torch.stack([gradient.norm() for gradient in expected[0].values()]).norm()
    for name, gradient in expected[0].items():
        assert (found[0][name] - gradient).norm() < tolerance * whole, name
    assert found[1:] == pytest.approx(expected[1:], rel=tolerance)


@pytest.mark.parametrize("name", TASKS)
def test_every_division_has_the_gradients_of_one_batch(name, one_step):
    expected = one_step(name, [6], 1)
    assert expected[2] > 0.1, "nothing was clipped"
    for sizes, num_accumulated in DIVISIONS.values():
        assert_close(one_step(name, sizes, num_accumulated), expected)


def test_with_a_gradient_scaler_too(one_step):
    def plugins():
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        return [MixedPrecision("16-mixed", "cpu", scaler)]

    expected = one_step("causal_lm", [6], 1, plugins=plugins())
    assert_close(one_step("causal_lm", [1, 5], 4, plugins=plugins()), expected, 0.01)


def test_a_micro_batch_without_targets_is_none(make, fit):
    """The first micro-batch has no target, and the gradients of the others are unchanged by it."""
    _, batch = task_and_batch(make, "causal_lm")
    empty = {**batch, "targets": torch.full_like(batch["targets"], IGNORE_INDEX)}
    found = []
    for batches in ([batch], [empty, batch]):
        torch.manual_seed(0)
        watch = Watch()
        fit(
            make.task("causal_lm"),
            batches,
            callbacks=[watch],
            accumulate_grad_batches=len(batches),
            logger=False,
        )
        found.append((watch.gradients[0], watch.losses[0]))
    assert_close(found[1], found[0])


def test_steps_of_an_epoch_and_the_next(make, fit):
    """Five micro-batches, two per step: the third step has one, and the next epoch starts a new
    step."""
    _, batch = task_and_batch(make, "masked_lm")
    parts = divided(batch, [1, 1, 2, 1, 1])
    found = []
    for batches, count in ((parts, 2), (divided(batch, [2, 3, 1]), 1)):
        torch.manual_seed(0)
        watch = Watch()
        fit(
            make.task("masked_lm"),
            batches,
            callbacks=[watch],
            accumulate_grad_batches=count,
            limit_train_batches=len(batches),
            max_steps=6,
            logger=False,
        )
        found.append(watch)
    for step in range(6):
        one, other = ((watch.gradients[step], watch.losses[step]) for watch in found)
        assert_close(one, other, 1e-3)


class StoppedError(Exception):
    pass


class Stop(Callback):
    """Saves after the first batch, and stops."""

    def on_train_batch_end(self, trainer, *args):
        trainer.checkpoint_callback.save_now(trainer, reason="test")
        raise StoppedError


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended")
@pytest.mark.parametrize("is_bad", [False, True])
def test_a_step_that_was_cut_off_is_taken_up(make, fit, tmp_path, is_bad, monkeypatch):
    """Bitwise equal, also if the loss before the interruption was infinite or the gradient not
    finite."""
    _, batch = task_and_batch(make, "causal_lm")
    first, second = divided(batch, [2, 4])
    watches = []
    for batches, callbacks, changes in (
        ([first, second], [], {}),
        ([first, second], [Stop()], {}),
        ([second], [], {"ckpt_path": None}),
    ):
        torch.manual_seed(0)
        task, watch = make.task("causal_lm"), Watch()
        if is_bad:
            loss_sum = task.loss_sum

            def bad(given, number, loss_sum=loss_sum):
                found = loss_sum(given, number)
                return found._replace(total=found.total + (float("inf") if number == 0 else 0))

            monkeypatch.setattr(task, "loss_sum", bad)
        if "ckpt_path" in changes:
            changes = {"ckpt_path": find_state(tmp_path)}
        try:
            trainer = fit(
                task,
                batches,
                callbacks=[watch, *callbacks, Checkpoints(every_minutes=None)],
                accumulate_grad_batches=2,
                enable_checkpointing=True,
                logger=False,
                **changes,
            )
        except StoppedError:
            continue
        watches.append((watch, task, trainer.callback_metrics.get("train/skipped_steps")))
    (whole, task, skipped), (rest, other, skipped_too) = watches
    assert skipped == skipped_too == (1 if is_bad else None)
    for name, gradient in whole.gradients[0].items():
        assert torch.equal(gradient, rest.gradients[0][name])
    for name, weight in task.state_dict().items():
        assert torch.equal(weight, other.state_dict()[name]), name
    if not is_bad:
        assert whole.losses == rest.losses


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended")
def test_a_step_that_an_earlier_version_was_cut_off_in_is_refused(make, fit, tmp_path):
    settings = {"accumulate_grad_batches": 2, "enable_checkpointing": True, "logger": False}
    batch = make.batch("image")
    with pytest.raises(StoppedError):
        fit(make.task("image"), [batch], callbacks=[Stop(), Checkpoints()], **settings)
    state = torch.load(find_state(tmp_path), weights_only=True)
    del state["exact_resume"]["processes"][0]["accumulated"]
    torch.save(state, tmp_path / "earlier.ckpt")
    with pytest.raises(ValueError, match="by an earlier version, without the number of targets"):
        fit(make.task("image"), [batch], callbacks=[Checkpoints()],
            ckpt_path=tmp_path / "earlier.ckpt", **settings)  # fmt: skip


def test_a_share_of_a_gradient_is_for_the_same_strategy():
    with pytest.raises(ValueError, match="which another strategy cannot finish exactly: resume"):
        gradient_of(torch.zeros(4), torch.zeros(2))
