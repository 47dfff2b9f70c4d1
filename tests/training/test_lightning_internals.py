"""The private attributes of Lightning that the library uses still exist."""

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.demos.boring_classes import BoringDataModule, BoringModel
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities.exceptions import SIGTERMException

from diffmm.training import lightning_internals as internals

pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:.*LeafSpec")


class Watcher(Callback):
    """Evaluates `question` at the end of every batch."""

    def __init__(self, question):
        self.question, self.answers = question, []

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args) -> None:
        self.answers.append(self.question(trainer))


def answers(question, **settings):
    watcher = Watcher(question)
    trainer = Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[watcher],
        **{"max_epochs": 1, "limit_train_batches": 6, "limit_val_batches": 1, **settings},
    )
    trainer.fit(BoringModel(), BoringDataModule())
    return watcher.answers


def test_logging_steps():
    found = answers(internals.is_logging_step, log_every_n_steps=3)
    assert found == [False, False, True] * 2


def test_data_is_there_once_batches_are_fetched():
    assert not internals.training_has_data(Trainer(logger=False, accelerator="cpu"))
    assert answers(internals.training_has_data) == [True] * 6


def test_validation_follows_by_the_schedule():
    assert answers(internals.validation_follows, val_check_interval=2) == [False, True] * 3
    found = answers(internals.validation_follows, val_check_interval="00:01:00:00")
    assert found == [False] * 6


def test_accumulation():
    assert answers(internals.accumulates, accumulate_grad_batches=3) == [True, True, False] * 2


def test_last_batches():
    assert answers(internals.is_last_batch) == [False] * 5 + [True]


def test_an_epoch_ends_when_fetched_batches_are_forgotten():
    def forget_at_the_second(trainer):
        if trainer.global_step == 2:
            internals.forget_fetched_batches(trainer)

    assert len(answers(forget_at_the_second)) < 5


def test_a_checkpoint_is_what_the_trainer_saves(tmp_path):
    def save(trainer):
        trainer.save_checkpoint(tmp_path / "saved.ckpt")
        return internals.checkpoint_of(trainer)

    ours = answers(save, max_steps=1)[0]
    saved = torch.load(tmp_path / "saved.ckpt", weights_only=False)
    assert ours.keys() == saved.keys()
    for name, weight in saved["state_dict"].items():
        assert torch.equal(ours["state_dict"][name], weight)


class Handling:
    def __init__(self):
        self.calls = []
        self.received_sigterm = False

    def register_signal_handlers(self):
        self.calls.append("register")

    def teardown(self):
        self.calls.append("teardown")


def test_signal_handling_is_replaced_and_put_back():
    handling, kept = Handling(), []

    class Replacing(Callback):
        def setup(self, trainer, pl_module, stage):
            kept.append((trainer._signal_connector, trainer.fit_loop.epoch_loop))
            self.put_back = internals.replace_signal_handling(trainer, handling)

        def on_train_batch_end(self, trainer, *args):
            handling.received_sigterm = True

    replacing = Replacing()
    trainer = Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, callbacks=[replacing],
        enable_progress_bar=False, enable_model_summary=False, max_epochs=1,
    )  # fmt: skip
    with pytest.raises(SIGTERMException):
        trainer.fit(BoringModel(), BoringDataModule())
    assert trainer.global_step == 1
    assert handling.calls[-1] == "teardown"
    replacing.put_back()
    assert trainer._signal_connector is kept[0][0]
    assert "_broadcast_sigterm_tensor" not in vars(kept[0][1])


def test_signals_are_left_alone(monkeypatch):
    trainer = Trainer(accelerator="cpu", logger=False)
    internals.leave_signals_alone(trainer)
    monkeypatch.setattr("signal.signal", lambda *_: pytest.fail("a handler was registered"))
    trainer._signal_connector.register_signal_handlers()


def test_validation_is_added_and_taken_back():
    validated = []

    class Adding(Callback):
        def on_train_start(self, trainer, pl_module):
            self.restore = internals.add_validation(trainer, lambda: trainer.global_step == 2)

        def on_validation_end(self, trainer, pl_module):
            if not trainer.sanity_checking:
                validated.append(trainer.global_step)

    adding = Adding()
    trainer = Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, callbacks=[adding],
        enable_progress_bar=False, enable_model_summary=False, max_epochs=1,
        limit_train_batches=4, limit_val_batches=1, val_check_interval=3,
    )  # fmt: skip
    trainer.fit(BoringModel(), BoringDataModule())
    assert validated == [2, 3]
    adding.restore()
    assert "_should_check_val_fx" not in vars(trainer.fit_loop.epoch_loop)


def test_a_module_without_a_trainer_has_none():
    module = BoringModel()
    assert internals.trainer_of(module) is None
    module.trainer = trainer = Trainer(accelerator="cpu", logger=False)
    assert internals.trainer_of(module) is trainer


def test_the_data_parallel_size_is_that_of_the_strategy():
    strategy = ModelParallelStrategy(tensor_parallel_size=1)
    assert strategy._data_parallel_size == "auto"
    internals.set_data_parallel_size(strategy, 4)
    assert strategy._data_parallel_size == 4


def test_new_columns_of_a_csv_log(tmp_path):
    experiment = CSVLogger(tmp_path).experiment
    experiment.log_metrics({"loss": 1.0}, step=0)
    assert internals.record_new_columns(experiment)
    assert "loss" in experiment.metrics_keys
    assert not internals.record_new_columns(experiment)


@pytest.mark.parametrize("has_hooks", [False, True])
def test_batches_are_prepared_after_the_hooks_of_the_datamodule(has_hooks):
    seen = []

    class Prepares(internals.PreparesBatches, BoringModel):
        def prepared(self, batch):
            return batch if isinstance(batch, dict) else {"x": batch}

        def training_step(self, batch, batch_idx):
            seen.append(batch)
            return super().training_step(batch["x"], batch_idx)

    class Hooked(BoringDataModule):
        def on_after_batch_transfer(self, batch, dataloader_idx):
            return batch * 0.0

    answered = Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, max_steps=1,
        enable_progress_bar=False, enable_model_summary=False, limit_val_batches=0,
    )  # fmt: skip
    answered.fit(Prepares(), Hooked() if has_hooks else BoringDataModule())
    assert (seen[0]["x"] == 0).all() == has_hooks
