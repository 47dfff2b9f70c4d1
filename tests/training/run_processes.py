"""Trains two tasks, and one of them with Muon too, on the given number of processes, and writes the
logged values to a file.

python run_processes.py NUM_PROCESSES OUTPUT.json
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler, StackDataset

from diffmm.batch import IGNORE_INDEX
from diffmm.models import BackboneConfig, ImageConfig, ImageModel, TextConfig, TextModel
from diffmm.recipes.trainer import leave_processes
from diffmm.training import Classification, MaskedLM, OptimizerConfig, ScheduleConfig

GLOBAL_BATCH, NUM_SAMPLES, NUM_STEPS = 8, 24, 6
WATCHED = ("train/loss", "train/grad_norm", "val/loss", "val/bits_per_byte", "val/accuracy")


def masked_texts() -> dict[str, Tensor]:
    """Texts with very different numbers of targets, so that a mean of means would be wrong."""
    tokens = torch.randint(20, (NUM_SAMPLES, 16))
    share = torch.linspace(0.1, 0.9, NUM_SAMPLES)[:, None]
    is_target = (torch.rand(tokens.shape) < share) | (torch.arange(16) == 0)
    return {
        "tokens": tokens.masked_fill(is_target, 20),
        "targets": tokens.masked_fill(~is_target, IGNORE_INDEX),
        "num_bytes": 3 * is_target.sum(dim=1),
        "index": torch.arange(NUM_SAMPLES),
    }


def images() -> dict[str, Tensor]:
    index = torch.arange(NUM_SAMPLES)
    return {"images": torch.randn(NUM_SAMPLES, 3, 8, 8), "labels": index % 5, "index": index}


class Recorded(Callback):
    def __init__(self) -> None:
        self.curves: dict[str, list[float]] = {name: [] for name in WATCHED}

    def _record(self, trainer: Trainer, prefix: str) -> None:
        for name, value in trainer.callback_metrics.items():
            if name in WATCHED and name.startswith(prefix):
                self.curves[name].append(value.item())

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        self._record(trainer, "train/")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._record(trainer, "val/")


def train(task: LightningModule, batch: dict[str, Tensor], num_processes: int) -> dict[str, Any]:
    recorded = Recorded()
    trainer = Trainer(
        accelerator="cpu",
        devices=num_processes,
        strategy="ddp" if num_processes > 1 else "auto",
        use_distributed_sampler=False,
        max_steps=NUM_STEPS,
        gradient_clip_val=1.0,
        log_every_n_steps=1,
        callbacks=[recorded],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    samples = StackDataset(**batch)

    def loader() -> DataLoader[dict[str, Tensor]]:
        sampler = DistributedSampler(samples, num_processes, trainer.global_rank, shuffle=False)
        return DataLoader(samples, GLOBAL_BATCH // num_processes, sampler=sampler)

    trainer.fit(task, loader(), loader())
    weights = {name: weight.double().sum().item() for name, weight in task.named_parameters()}
    return {"curves": recorded.curves, "weights": weights}


def run(num_processes: int) -> dict[str, Any]:
    """The values that both tasks log with this number of processes."""
    settings = (OptimizerConfig(3e-3), ScheduleConfig(NUM_STEPS, warmup_steps=2))
    results = {}
    seed_everything(0, verbose=False)
    backbone = BackboneConfig(32, 2, 4, attention="diff_v2", rope="1d")
    text = TextModel(TextConfig(21, 16, backbone, causal=False))
    results["masked_lm"] = train(MaskedLM(text, *settings), masked_texts(), num_processes)
    seed_everything(0, verbose=False)
    backbone = BackboneConfig(32, 2, 4, attention="diff_v1", rope="2d")
    image = ImageModel(ImageConfig(backbone=backbone, num_classes=5, image_size=8, patch_size=4))
    results["image"] = train(Classification(image, *settings), images(), num_processes)
    seed_everything(0, verbose=False)
    image = ImageModel(ImageConfig(backbone=backbone, num_classes=5, image_size=8, patch_size=4))
    muon = OptimizerConfig(3e-3, kind="muon")
    task = Classification(image, muon, settings[1])
    results["muon"] = train(task, images(), num_processes)
    return results


if __name__ == "__main__":
    results = run(int(sys.argv[1]))
    if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
        Path(sys.argv[2]).write_text(json.dumps(results))
    leave_processes(0)
