"""Trains a plain Lightning module on each datamodule, as `python run_any_module.py FOLDER` in one
or several processes, with Lightning's defaults, and records the samples that it saw."""

import json
import sys
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from datamodules import AudioData, ImageData, ImageTextData, TextData
from datamodules.audio import SoundEvents
from datamodules.pairs import RenderedShapes
from datamodules.shared.loading import SeededDataModule
from datamodules.text import TextFolder

STAGES = ("training", "validation", "test", "predict")


class Anyones(LightningModule):
    """A plain module that only knows that a batch has this field."""

    def __init__(self, field: str) -> None:
        super().__init__()
        self.field = field
        self.scale = torch.nn.Parameter(torch.ones(()))
        self.seen: dict[str, list[int]] = {stage: [] for stage in STAGES}

    def loss(self, batch: dict[str, Tensor], stage: str) -> Tensor:
        self.seen[stage] += batch["index"].tolist()
        return (self.scale * batch[self.field].float()).square().mean()

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return self.loss(batch, "training")

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.log("val/loss", self.loss(batch, "validation"), sync_dist=True)

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.log("test/loss", self.loss(batch, "test"), sync_dist=True)

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return self.loss(batch, "predict")

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.01)


def data(folder: Path) -> dict[str, SeededDataModule]:
    folder.mkdir(exist_ok=True)
    for number in range(40):
        (folder / f"{number}.txt").write_text(f"{number} lorem ipsum " * 20)
    texts: dict[str, Any] = {
        "validation_fraction": 0.3,
        "test_fraction": 0.2,
        "sequence_length": 64,
    }
    sounds = SoundEvents(16, 6, sample_rate_hz=8000, clip_seconds=(0.25, 0.25))
    return {
        "images": ImageData(batch_size=32),
        "waveforms": AudioData(sounds, sample_rate_hz=8000, clip_seconds=0.25, batch_size=4),
        "num_tokens": ImageTextData(RenderedShapes(16, 6), batch_size=4),
        "tokens": TextData(TextFolder(str(folder)), batch_size=4, **texts),
    }


def run(folder: Path, devices: int) -> dict[str, Any]:
    """The sorted indices of the samples that all processes saw in each stage."""
    results: dict[str, Any] = {}
    for field, module in data(folder / "texts").items():
        trainer = Trainer(
            accelerator="cpu",
            devices=devices,
            strategy="ddp" if devices > 1 else "auto",
            max_epochs=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
        )
        theirs = Anyones(field)
        trainer.fit(theirs, datamodule=module)
        theirs.seen["validation"].clear()
        trainer.validate(theirs, datamodule=module, verbose=False)
        trainer.test(theirs, datamodule=module, verbose=False)
        trainer.predict(theirs, datamodule=module)
        shares: list[Any] = [theirs.seen]
        if devices > 1:
            shares = [None] * devices
            torch.distributed.all_gather_object(shares, theirs.seen)
        results[field] = {stage: sorted(chain(*(s[stage] for s in shares))) for stage in STAGES}
    return results


if __name__ == "__main__":
    import warnings

    warnings.filterwarnings("ignore")
    results = run(Path(sys.argv[1]), 2)
    if torch.distributed.get_rank() == 0:
        (Path(sys.argv[1]) / "results.json").write_text(json.dumps(results))
    torch.distributed.destroy_process_group()
