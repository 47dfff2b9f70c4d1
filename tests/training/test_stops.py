"""A signal ends a run at a step, with everything saved and the handlers of before."""

import os
import signal

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch.utils.data import DataLoader, Dataset

from diffmm.training.stops import SIGNALS, CleanStop
from diffmm.workers import ignore_stop_signals

# Lightning saves through fsspec's temporary folders.
pytestmark = pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists")


class Numbers(Dataset):
    def __len__(self):
        return 40

    def __getitem__(self, index):
        return torch.full((3,), float(index))


class Model(LightningModule):
    """Not of this library: a plain Lightning module."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(3, 1)

    def training_step(self, batch, batch_idx):
        return self.layer(torch.nn.functional.dropout(batch)).square().mean()

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", self.layer(batch).square().mean())

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), 1e-2)


class Send(Callback):
    """Sends this process signals when a hook is called at a step (for the `nth` time there)."""

    def __init__(self, hook, step, *numbers, nth=1):
        self.step, self.numbers, self.nth = step, numbers, nth
        setattr(self, hook, self._send)

    def _send(self, trainer, *args):
        if trainer.global_step == self.step:
            self.nth -= 1
            if self.nth == 0:
                for number in self.numbers:
                    os.kill(os.getpid(), number)


class Saves(Callback):
    """Stands in for `Checkpoints`."""

    def __init__(self):
        self.saves = []

    def save_now(self, trainer, *, reason):
        os.kill(os.getpid(), signal.SIGINT)  # another signal, within the save
        os.kill(os.getpid(), signal.SIGTERM)
        self.saves.append((trainer.global_step, reason))
        return "there"


@pytest.fixture
def stopped(trainer):
    """`stopped(callback, ...)` fits until a callback's signal ends it."""

    def run(*callbacks, workers=0, **settings):
        saves = Saves()
        run_trainer = trainer(
            **{
                "max_steps": 12,
                "val_check_interval": 3,
                "check_val_every_n_epoch": None,
                **settings,
            },
            callbacks=[*callbacks, CleanStop(), saves],
            logger=False,
        )
        loaders = [
            DataLoader(Numbers(), 2, num_workers=workers, worker_init_fn=ignore_stop_signals)
            for _ in range(2)
        ]
        with pytest.raises(SIGTERMException) as stop:
            run_trainer.fit(Model(), *loaders)
        return stop.value.code, saves.saves

    return run


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), (signal.SIGUSR1, 143), (signal.SIGINT, 130)]
)
def test_a_signal_ends_the_step_saves_and_exits(stopped, number, code):
    before = [signal.getsignal(each) for each in SIGNALS]
    assert stopped(Send("on_before_backward", 4, number)) == (code, [(5, number.name)])
    assert [signal.getsignal(each) for each in SIGNALS] == before
