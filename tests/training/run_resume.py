"""A tiny run that is stopped and resumed, for `test_checkpoints_processes.py`; as a script, it runs
on two processes.

python run_resume.py FOLDER, a folder with a run of one process
"""

import json
import sys
import warnings
from contextlib import suppress
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.fsdp import fully_shard

from datamodules import ImageAudioTextData
from datamodules.pairs import RenderedShapes, SynthesizedSounds
from datamodules.shared.loading import SeededDataModule
from datamodules.shared.sampling import SeededDataset, sample_generator
from diffmm.checkpoint_folders import find_state
from diffmm.models import (
    AudioConfig,
    BackboneConfig,
    ContrastiveConfig,
    ContrastiveModel,
    ImageConfig,
    TextTowerConfig,
)
from diffmm.recipes.trainer import leave_processes
from diffmm.training import (
    Checkpoints,
    Contrastive,
    FSDP2Strategy,
    OptimizerConfig,
    ScheduleConfig,
)

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

    def configure_model(self) -> None:
        if isinstance(self.trainer.strategy, ModelParallelStrategy):
            fully_shard(self.model, mesh=self.device_mesh["data_parallel"])  # type: ignore[index]

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return self.model(batch["values"]).square().mean()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val/loss", self.model(batch["values"]).square().mean(), sync_dist=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), 0.1)


def both_media(batch_size: int, dropout: float) -> tuple[Contrastive, ImageAudioTextData]:
    """A contrastive task of images and sounds, of which every batch has both: four batches per
    epoch, in which the sounds begin again."""
    settings: dict[str, Any] = {"dim": 16, "depth": 1, "num_heads": 2, "dropout": dropout}
    image = ImageConfig(backbone=BackboneConfig(**settings, rope="2d"), image_size=8, patch_size=4)
    audio = AudioConfig(
        backbone=BackboneConfig(**settings, rope="2d"),
        sample_rate_hz=8000,
        num_mels=8,
        window_seconds=0.064,
        hop_seconds=0.032,
        patch_size=(4, 4),
    )
    text = TextTowerConfig(259, 80, BackboneConfig(**settings), pool="eos", eos_id=256)
    model = ContrastiveConfig(image=image, audio=audio, text=text, embed_dim=8, shared_blocks=1)
    data = ImageAudioTextData(
        RenderedShapes(35, 8, picture_size=16),
        SynthesizedSounds(19, 8, sample_rate_hz=8000, clip_seconds=(0.5, 0.6)),
        image_size=8,
        sample_rate_hz=8000,
        max_tokens=80,
        batch_size=batch_size,
    )
    schedule = ScheduleConfig(NUM_STEPS, warmup_steps=2)
    return Contrastive(ContrastiveModel(model), OptimizerConfig(1e-2), schedule), data


class Record(Callback):
    """The samples of every batch."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self.batches.append(batch["index"].tolist())


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
    has_media: bool = False,
    quiet: bool = True,
    **settings: Any,
) -> dict[str, Any]:
    """The samples of every batch of all processes, and the weights; of `Model`, or with
    `has_media` of `both_media`."""
    if quiet:
        warnings.filterwarnings("ignore")
    seed_everything(0, verbose=False)
    record, size = Record(), GLOBAL_BATCH // devices
    task: LightningModule
    task, data = both_media(size, dropout) if has_media else (Model(dropout), Data(size))
    trainer = Trainer(
        accelerator="cpu",
        devices=devices,
        strategy=FSDP2Strategy() if sharded else "ddp" if devices > 1 else "auto",
        default_root_dir=folder,
        callbacks=[record, Checkpoints(every_n_steps=100), *([Stop(stop)] if stop else [])],
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
    with suppress(StoppedError):
        trainer.fit(task, datamodule=data, ckpt_path=state, weights_only=True)
    every: list[Any] = [record.batches] * devices
    if devices > 1:
        torch.distributed.all_gather_object(every, record.batches)
    weights: list[Any] = list(task.parameters())
    if sharded:
        weights = [weight.full_tensor() for weight in weights]
    return {
        "batches": [sorted(chain(*parts)) for parts in zip(*every, strict=True)],
        "weights": [weight.flatten().tolist() for weight in weights],
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
        "both media": compare(folder / "both_media", stop=6, sharded=True, has_media=True),
        "of one process": run(folder / "grown", resume=folder / "one", dropout=0.0, devices=2),
        "for one process": run(folder / "two", stop=5, dropout=0.0, devices=2),
    }
    run(folder / "unfinished", stop=5, devices=2, accumulate_grad_batches=3)
    if torch.distributed.get_rank() == 0:
        (folder / "results.json").write_text(json.dumps(results))
    leave_processes(0)
