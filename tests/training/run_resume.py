"""A tiny run that is stopped and resumed, for `test_checkpoints_processes.py`; as a script, it runs
on two processes.

python run_resume.py FOLDER, a folder with a run of one process
"""

import json
import sys
import warnings
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.fsdp import fully_shard

from datamodules.shared.loading import SeededDataModule
from datamodules.shared.sampling import SeededDataset, sample_generator
from diffmm.checkpoint_folders import find_state
from diffmm.recipes.trainer import leave_processes
from diffmm.training import Checkpoints, FSDP2Strategy

NUM_STEPS, GLOBAL_BATCH = 11, 16


class StoppedError(Exception):
    pass


class Numbers(SeededDataset[dict[str, torch.Tensor]]):
    def __len__(self) -> int:
        return 104

    def sample(self, epoch: int, index: int) -> dict[str, torch.Tensor]:
        values = torch.randn(8, generator=sample_generator(0, epoch, index))
        return {"values": values, "index": torch.tensor(index)}


class Data(SeededDataModule):
    """Six batches per epoch."""

    def __init__(self, batch_size: int) -> None:
        super().__init__(batch_size=batch_size, num_workers=0, seed=0)

    def train_dataloader(self) -> Any:
        return self.training_loader(Numbers())

    def val_dataloader(self) -> Any:
        return self.evaluation_loader(Numbers())


class Model(LightningModule):
    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.model = torch.nn.Sequential(torch.nn.Dropout(dropout), torch.nn.Linear(8, 8))
        self.batches: list[list[int]] = []

    def configure_model(self) -> None:
        if isinstance(self.trainer.strategy, ModelParallelStrategy):
            fully_shard(self.model, mesh=self.device_mesh["data_parallel"])  # type: ignore[index]

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        self.batches.append(batch["index"].tolist())
        return self.model(batch["values"]).square().mean()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val/loss", self.model(batch["values"]).square().mean(), sync_dist=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), 0.1)


class Stop(Callback):
    def __init__(self, num_batches: int) -> None:
        self.num_batches = num_batches

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        if trainer.fit_loop.total_batch_idx + 1 == self.num_batches:
            trainer.checkpoint_callback.save_now(trainer, reason="test")  # type: ignore[union-attr]
            raise StoppedError


def run(
    folder: Path,
    *,
    stop: int | None = None,
    resume: Path | None = None,
    dropout: float = 0.1,
    devices: int = 1,
    sharded: bool = False,
    quiet: bool = True,
    **settings: Any,
) -> dict[str, Any]:
    """The samples of every batch of all processes, and the weights."""
    if quiet:
        warnings.filterwarnings("ignore")
    seed_everything(0, verbose=False)
    task = Model(dropout)
    trainer = Trainer(
        accelerator="cpu",
        devices=devices,
        strategy=FSDP2Strategy() if sharded else "ddp" if devices > 1 else "auto",
        default_root_dir=folder,
        callbacks=[Checkpoints(every_n_steps=100), *([Stop(stop)] if stop else [])],
        max_steps=NUM_STEPS,
        check_val_every_n_epoch=None,
        val_check_interval=4,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        **settings,
    )
    state = None if resume is None else find_state(resume)
    try:
        data = Data(GLOBAL_BATCH // devices)
        trainer.fit(task, datamodule=data, ckpt_path=state, weights_only=True)
    except StoppedError:
        pass
    every: list[Any] = [task.batches] * devices
    if devices > 1:
        torch.distributed.all_gather_object(every, task.batches)
    weight = task.model[1].weight
    if hasattr(weight, "full_tensor"):
        weight = weight.full_tensor()
    return {
        "batches": [sorted(chain(*parts)) for parts in zip(*every, strict=True)],
        "weights": weight.tolist(),
    }


def compare(folder: Path, stop: int, **settings: Any) -> dict[str, Any]:
    """Whether a stopped and resumed run equals an uninterrupted one."""
    whole = run(folder / "whole", devices=2, **settings)
    first = run(folder / "stopped", stop=stop, devices=2, **settings)
    rest = run(folder / "stopped", resume=folder / "stopped", devices=2, **settings)
    return {
        "same batches": whole["batches"] == first["batches"] + rest["batches"],
        "same weights": whole["weights"] == rest["weights"],
        "stopped after": len(first["batches"]),
    }


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    results = {
        "epochs": compare(folder / "epochs", stop=7),
        "within a step": compare(folder / "within", stop=8, accumulate_grad_batches=3),
        "sharded": compare(folder / "sharded", stop=4, sharded=True),
        "sharded, within a step": compare(
            folder / "sharded_within", stop=8, sharded=True, accumulate_grad_batches=3
        ),
        "of one process": run(folder / "grown", resume=folder / "one", dropout=0.0, devices=2),
        "for one process": run(folder / "two", stop=5, dropout=0.0, devices=2),
    }
    run(folder / "unfinished", stop=5, devices=2, accumulate_grad_batches=3)
    if torch.distributed.get_rank() == 0:
        (folder / "results.json").write_text(json.dumps(results))
    leave_processes(0)
