"""Trains on two processes with different non-finite losses and gradients.

RANK=0 WORLD_SIZE=2 ... python run_bad_numbers.py OUTPUT_FOLDER
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from torch.utils.data import DataLoader

from diffmm.recipes.trainer import leave_processes
from diffmm.training import Checkpoints, GracefulShutdown, NonFiniteGuard
from diffmm.training.resilience.checkpoints import NonFiniteWeightsError
from diffmm.training.resilience.non_finite import TooManyNonFiniteStepsError

STEPS = ["", "loss of 1", "", "gradient of 0", "", "losses", "loss of 1"]
"""The non-finite values of each step."""


class Model(LightningModule):
    """The loss of a process is that of its batch, plus a non-finite value in bad steps."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(3, 1)

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        loss = self.layer(batch["numbers"]).square().mean()
        what = STEPS[batch_idx]
        if what == "losses" or what == f"loss of {self.global_rank}":
            return loss + float("inf")  # its gradient is finite
        if what == f"gradient of {self.global_rank}":
            return loss + (0.0 * self.layer.bias.sum()).sqrt()
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), 1e-2)


class Watch(Callback):
    """Records the weights after each step, and the number of all-reduces before it."""

    def __init__(self) -> None:
        self.weights: list[Any] = []
        self.num_reduces: list[int] = []
        self.all_reduce, self.calls = torch.distributed.all_reduce, 0
        torch.distributed.all_reduce = self.count

    def count(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        return self.all_reduce(*args, **kwargs)

    def on_train_batch_start(self, *args: Any) -> None:
        self.calls = 0

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, *args: Any) -> None:
        self.weights.append([weight.tolist() for weight in module.parameters()])
        self.num_reduces.append(self.calls)


class Poison(Callback):
    """Makes a weight of one process non-finite after the second step."""

    def on_train_batch_end(self, trainer: Trainer, module: Any, *args: Any) -> None:
        if trainer.global_step == 2 and trainer.global_rank == 1:
            module.layer.bias.data.fill_(float("nan"))


def main(output: Path) -> None:
    rank = int(os.environ["RANK"])
    seed_everything(0, verbose=False)
    watch = Watch()
    trainer = Trainer(
        accelerator="cpu",
        devices=2,
        strategy="ddp",
        max_steps=len(STEPS),
        use_distributed_sampler=False,
        # In this order, the last callback sees the end of the step before the run is stopped.
        callbacks=[
            watch,
            GracefulShutdown(),
            NonFiniteGuard(max_in_a_row=2),
            Checkpoints(every_minutes=None),
        ],
        gradient_clip_val=1.0,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=output,
    )
    batches = [
        {"numbers": torch.randn(4, 3), "index": 100 * rank + 10 * step + torch.arange(4)}
        for step in range(len(STEPS))
    ]
    errors = []
    try:
        trainer.fit(Model(), DataLoader(batches, batch_size=None))  # type: ignore[arg-type]
    except TooManyNonFiniteStepsError as stop:
        errors.append(str(stop))
    result = {"weights": watch.weights, "num_reduces": watch.num_reduces, "errors": errors}
    trainer = Trainer(
        accelerator="cpu",
        devices=2,
        strategy="ddp",
        use_distributed_sampler=False,
        callbacks=[Poison(), Checkpoints(output / "poisoned", every_n_steps=1)],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=output,
    )
    try:
        trainer.fit(Model(), DataLoader(batches[:1] * 3, batch_size=None))  # type: ignore[arg-type]
    except NonFiniteWeightsError as stop:
        errors.append(str(stop))
    (output / f"{rank}.json").write_text(json.dumps(result))
    leave_processes(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
