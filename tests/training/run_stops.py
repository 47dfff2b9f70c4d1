"""A tiny run that is stopped by signals, for `test_stops.py`; as a script, on two processes.

RANK=0 WORLD_SIZE=2 ... python run_stops.py OUTPUT_FOLDER
"""

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.utilities.exceptions import SIGTERMException

from datamodules.shared.loading import SeededDataModule
from datamodules.shared.sampling import SeededDataset, sample_generator
from diffmm.checkpoint_folders import STATE_NAME, find_whole, read_manifest
from diffmm.recipes.trainer import leave_processes
from diffmm.training.resilience.checkpoints import Checkpoints
from diffmm.training.resilience.shutdown import GracefulShutdown

NUM_STEPS = 14


class Numbers(SeededDataset[torch.Tensor]):
    def __len__(self) -> int:
        return 48

    def sample(self, epoch: int, index: int) -> torch.Tensor:
        return torch.randn(3, generator=sample_generator(0, epoch, index)) + index


class Data(SeededDataModule):
    """Six training batches of eight per epoch (of four with two processes), and six validation
    batches."""

    def __init__(self, *, batch_size: int = 8, num_workers: int = 0) -> None:
        super().__init__(batch_size=batch_size, num_workers=num_workers, seed=0)

    def train_dataloader(self) -> Any:
        return self.training_loader(Numbers())

    def val_dataloader(self) -> Any:
        return self.evaluation_loader(Numbers())


class Model(LightningModule):
    """A plain Lightning module instead of a task of this library."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(3, 1)
        self.num_validations = 0

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        return self.layer(torch.nn.functional.dropout(batch)).square().mean()

    def validation_step(self, batch: torch.Tensor, batch_idx: int) -> None:
        noise = torch.rand(())  # one random number less for the dropout of the next step
        self.log("val/loss", self.layer(batch + noise).square().mean(), sync_dist=True)

    def on_validation_epoch_end(self) -> None:
        self.num_validations += not self.trainer.sanity_checking

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), 1e-2)


class Send(Callback):
    """Sends this process signals when a hook is called after a given step, for the nth time."""

    def __init__(self, hook: str, step: int, *numbers: int, nth: int = 1) -> None:
        self.step, self.numbers, self.nth = step, numbers, nth
        setattr(self, hook, self._send)

    def _send(self, trainer: Trainer, *args: Any) -> None:
        if trainer.global_step == self.step:
            self.nth -= 1
            if self.nth == 0:
                for number in self.numbers:
                    os.kill(os.getpid(), number)


class Impatient(Checkpoints):
    """Receives further signals during its saves."""

    def save_now(self, trainer: Trainer, *, reason: str) -> Path:
        os.kill(os.getpid(), signal.SIGINT)
        path = super().save_now(trainer, reason=reason)
        os.kill(os.getpid(), signal.SIGTERM)
        return path


def run(
    directory: Path,
    *callbacks: Callback,
    resume: bool = False,
    num_workers: int = 0,
    **settings: Any,
) -> dict[str, Any]:
    """Fit in `directory` until the end or a signal.

    Returns:
        `code` (none at the end), `step`, `saved` (the step, reason of the last checkpoint),
        `validations`, and the final `weights`.
    """
    seed_everything(0, verbose=False)
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "max_steps": NUM_STEPS,
        "val_check_interval": 4,
        "check_val_every_n_epoch": None,
        "num_sanity_val_steps": 0,
        "use_distributed_sampler": False,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": directory,
    }
    keeper = Impatient(every_minutes=None)
    trainer = Trainer(
        **{**defaults, **settings}, callbacks=[*callbacks, GracefulShutdown(), keeper]
    )
    data = Data(batch_size=8 // trainer.world_size, num_workers=num_workers)
    model, code, saved = Model(), None, None
    whole = find_whole(directory / "checkpoints") if resume else None
    try:
        trainer.fit(
            model,
            datamodule=data,
            ckpt_path=whole and whole / STATE_NAME,
            weights_only=True,
        )
    except SIGTERMException as stop:
        code = stop.code
    if trainer.world_size > 1:
        torch.distributed.barrier()
    if (whole := find_whole(directory / "checkpoints")) is not None:
        manifest = read_manifest(whole)
        assert manifest is not None
        saved = [manifest["step"], manifest["reason"]]
    weights = [weight.tolist() for weight in model.parameters()]
    return {
        "code": code,
        "step": trainer.global_step,
        "saved": saved,
        "validations": model.num_validations,
        "weights": weights,
    }


TERM, USR1, INT = signal.SIGTERM, signal.SIGUSR1, signal.SIGINT
SCENARIOS: dict[str, tuple[dict[int, Callback], dict[str, Any]]] = {
    "rank 0": ({0: Send("on_before_backward", 4, TERM)}, {}),
    "rank 1": ({1: Send("on_before_backward", 4, TERM)}, {}),
    "both": ({0: Send("on_before_backward", 4, TERM), 1: Send("on_before_backward", 4, TERM)}, {}),
    "rank 1 and later rank 0": (
        {0: Send("on_train_batch_end", 5, TERM), 1: Send("on_before_backward", 4, TERM)},
        {},
    ),
    "SIGINT to 0, SIGUSR1 to 1": (
        {0: Send("on_before_backward", 4, INT), 1: Send("on_before_backward", 4, USR1)},
        {},
    ),
    "within accumulation": (
        {1: Send("on_before_backward", 0, TERM)},
        {"accumulate_grad_batches": 3},
    ),
    "validation": ({1: Send("on_validation_batch_start", 8, TERM, nth=2)}, {}),
    "sanity check": ({1: Send("on_sanity_check_start", 0, TERM)}, {"num_sanity_val_steps": 3}),
    "before the first step": ({1: Send("on_fit_start", 0, TERM)}, {}),
}


def main(output: Path) -> None:
    rank, results = int(os.environ["RANK"]), {}
    processes = {"devices": 2, "strategy": "ddp"}
    whole = run(output / "whole", **processes)
    for name, (sends, settings) in SCENARIOS.items():
        directory = output / name
        callbacks = [sends[rank]] if rank in sends else []
        results[name] = run(directory, *callbacks, **settings, **processes)
        resumed = run(directory, resume=True, **settings, **processes)
        results[name]["resumed equals whole"] = resumed["weights"] == whole["weights"]
    (output / f"{rank}.json").write_text(json.dumps(results))
    leave_processes(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
