"""Metrics of steps reach callbacks at once, and bars and loggers a step later, each step once."""

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.loggers import Logger

from diffmm.training.resilience.coordinator import Coordinator
from diffmm.training.step_log import log_step


class Recorder(Logger):
    """Keeps what it is given."""

    name, version = "recorder", 0

    def __init__(self):
        super().__init__()
        self.rows = []

    def log_hyperparams(self, *args, **kwargs):
        pass

    def log_metrics(self, metrics, step=None):
        self.rows.append((step, dict(metrics)))

    def losses(self):
        return {step: row["train/loss"] for step, row in self.rows if "train/loss" in row}


class Watch(Callback):
    """Keeps what callbacks and progress bars see at the end of each batch."""

    def __init__(self):
        self.seen, self.shown, self.num_started = [], [], 0

    def on_train_batch_start(self, *args):
        self.num_started += 1

    def on_train_batch_end(self, trainer, module, *args):
        self.seen.append(float(trainer.callback_metrics.get("train/loss", 0.0)))
        self.shown.append(trainer.progress_bar_metrics.get("train/loss"))
        log_step(module, "mine", lambda: float(self.num_started))


@pytest.fixture
def recorded(make, fit):
    def run(**settings):
        torch.manual_seed(1)
        logger, watch = Recorder(), Watch()
        settings = {"max_steps": 6, "log_every_n_steps": 1, **settings}
        batches = [make.batch("image")]
        trainer = fit(make.task("image"), batches, logger=logger, callbacks=[watch], **settings)
        return logger, watch, trainer

    return run


def test_every_step_is_logged_with_its_own_number(recorded):
    logger, watch, trainer = recorded()
    assert logger.losses() == pytest.approx(dict(enumerate(watch.seen)))
    assert watch.shown[0] is None
    assert watch.shown[1:] == pytest.approx(watch.seen[:-1])
    assert trainer.progress_bar_metrics["train/loss"] == pytest.approx(watch.seen[-1])
    assert {row["epoch"] for _, row in logger.rows} <= set(range(6))
    # What is a function is called when the values arrive.
    assert [row["mine"] for _, row in logger.rows if "mine" in row] == [2, 3, 4, 5, 6, 6]


def test_only_logging_steps_are_written(recorded):
    logger, watch, _ = recorded(log_every_n_steps=3)
    assert logger.losses() == pytest.approx({2: watch.seen[2], 5: watch.seen[5]})


def test_accumulated_steps_are_logged_once(recorded):
    logger, _, trainer = recorded(max_steps=3, accumulate_grad_batches=2)
    assert trainer.global_step == 3
    assert list(logger.losses()) == [0, 1, 2]


def test_a_step_is_complete_before_its_validation(make, fit):
    logger = Recorder()
    batches = [make.batch("image")]
    fit(
        make.task("image"), batches, batches, max_steps=2, val_check_interval=1, logger=logger,
        log_every_n_steps=1,
    )  # fmt: skip
    kinds = ["val" if "val/loss" in row else "train" for _, row in logger.rows]
    assert kinds == ["train", "val", "train", "val"]


def test_values_arrive_in_order_and_only_when_received():
    coordinator, found = Coordinator(), []
    for number in range(3):
        coordinator.send(torch.tensor([float(number)]), found.append)
    assert found == []
    coordinator.receive(all_but=1)
    assert found == [[0.0], [1.0]]
    coordinator.receive()
    assert found == [[0.0], [1.0], [2.0]]
