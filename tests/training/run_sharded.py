"""Trains small models on the given number of processes, and saves the results for comparison.

python run_sharded.py FOLDER RUNS, where RUNS is a list in JSON of keyword arguments of `run`, all
with the same number of processes.
"""

import importlib
import json
import sys
from collections.abc import Callable
from functools import partialmethod
from pathlib import Path
from typing import Any, Literal
from unittest.mock import patch

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch._inductor import config as inductor
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, DistributedSampler, StackDataset

from datamodules import ImageAudioTextData
from datamodules.pairs import RenderedShapes, SynthesizedSounds
from diffmm.batch import IGNORE_INDEX
from diffmm.models import (
    AudioConfig,
    BackboneConfig,
    CaptioningConfig,
    CaptioningModel,
    ContrastiveConfig,
    ContrastiveModel,
    CTCConfig,
    CTCModel,
    ImageConfig,
    ImageModel,
    TextConfig,
    TextModel,
    TextTowerConfig,
)
from diffmm.recipes.trainer import leave_processes
from diffmm.training import (
    CTC,
    Captioning,
    CausalLM,
    Classification,
    Contrastive,
    OptimizerConfig,
    ScheduleConfig,
)
from diffmm.training.parallel import data_share
from diffmm.training.task import Task

# A user's own attention, as in docs/extending.md.
sys.path.insert(0, str(Path(__file__).parents[2] / "docs/examples"))
importlib.reload(importlib.import_module("own_attention"))

Samples = StackDataset | Callable[[int], Any]
"""Samples, or a function of the number of shares that returns a datamodule or a batch per step and
share."""

GLOBAL_BATCH, NUM_SAMPLES = 8, 16
CURVES = ("train/loss", "train/grad_norm")


def task_and_data(
    case: str,
    *,
    dim: int = 32,
    backend: str = "auto",
    learning_rate: float = 1e-2,
    compile: bool = False,
    splits_heads: bool = False,
) -> tuple[Task, Samples]:
    """A case is an attention variant in a text model with tied embeddings, `image`, `pairs`, two
    towers that share their last block, `both media`, three such towers, `media apart`, the same
    with other media on each process, `captions` of images, or `transcripts` by CTC."""
    seed_everything(0, verbose=False)
    settings: dict[str, Any] = {
        "optimizer": OptimizerConfig(learning_rate, eps=1e-4, lambda_learning_rate=3e-2),
        "schedule": ScheduleConfig(6, warmup_steps=2),
        "activation_checkpointing": True,
        "compile": compile,
    }
    # Grouped keys and norms over heads are where splitting heads could go wrong.
    shared: dict[str, Any] = {"num_kv_heads": 4, "qk_norm": True, "feed_forward_width": 2 * dim}
    shared["backend"] = backend
    index = torch.arange(NUM_SAMPLES)
    if case == "image":
        config = ImageConfig(
            backbone=BackboneConfig(dim, 2, 8, rope="2d", layer_scale=0.1, **shared),
            num_classes=5,
            image_size=8,
            patch_size=4,
            learned_positions=True,
        )
        batch = {"images": torch.randn(NUM_SAMPLES, 3, 8, 8), "labels": index % 5, "index": index}
        return Classification(ImageModel(config), **settings), StackDataset(**batch)
    if case == "pairs":
        towers = ContrastiveConfig(
            image=ImageConfig(
                backbone=BackboneConfig(dim, 2, 8, rope="2d", **shared), image_size=8, patch_size=4
            ),
            text=TextTowerConfig(24, 6, BackboneConfig(dim, 2, 8, **shared), pool="eos", eos_id=2),
            embed_dim=16,
            shared_blocks=1,
        )
        tokens = torch.randint(3, 24, (NUM_SAMPLES, 6))
        tokens[:, 4:] = 2
        batch = {"images": torch.randn(NUM_SAMPLES, 3, 8, 8), "tokens": tokens}
        batch |= {"num_tokens": torch.full((NUM_SAMPLES,), 5), "media_index": index // 2 * 2}
        return Contrastive(ContrastiveModel(towers), **settings), StackDataset(**batch, index=index)
    if case in ("both media", "media apart"):
        own = BackboneConfig(dim, 2, 8, rope="2d", **shared)
        sound = AudioConfig(
            backbone=own,
            sample_rate_hz=8000,
            num_mels=8,
            window_seconds=0.064,
            hop_seconds=0.032,
            patch_size=(4, 4),
            clip_seconds=0.6,
        )
        towers = ContrastiveConfig(
            image=ImageConfig(backbone=own, image_size=8, patch_size=4),
            audio=sound,
            text=TextTowerConfig(
                259, 80, BackboneConfig(dim, 2, 8, **shared), pool="eos", eos_id=256
            ),
            embed_dim=16,
            shared_blocks=1,
        )
        task = Contrastive(ContrastiveModel(towers), **settings)
        return task, both_media if case == "both media" else media_apart
    if case in ("captions", "cross-attention"):
        shared["attention"] = "diff_v2"
        image = ImageConfig(
            backbone=BackboneConfig(dim, 2, 8, rope="2d", **shared), image_size=8, patch_size=4
        )
        text = TextConfig(24, 16, BackboneConfig(dim, 2, 8, rope="1d", **shared))
        media: Any = "prefix" if case == "captions" else "cross_attention"
        captioning = CaptioningModel(CaptioningConfig(encoder=image, decoder=text, media=media))
        tokens = torch.randint(3, 24, (NUM_SAMPLES, 6))
        tokens[index % 2 == 0, 3:] = 2
        tokens[:, 5] = 2
        batch = {"images": torch.randn(NUM_SAMPLES, 3, 8, 8), "tokens": tokens, "index": index}
        batch["num_tokens"] = 6 - 2 * (index % 2 == 0).long()
        settings |= {"max_new_tokens": 6, "num_generated": 0 if splits_heads else 100}
        return Captioning(captioning, **settings), StackDataset(**batch)
    if case == "transcripts":
        sound = AudioConfig(
            backbone=BackboneConfig(dim, 2, 8, attention="diff_v2", rope="1d", **shared),
            sample_rate_hz=8000,
            num_mels=8,
            stem="frame",
            patch_size=None,
        )
        ctc = CTCModel(CTCConfig(encoder=sound, vocab_size=24, blank_id=2))
        tokens = torch.randint(3, 24, (NUM_SAMPLES, 6))
        tokens[index % 2 == 0, 3:] = 2
        tokens[:, 5] = 2
        batch = {"waveforms": torch.rand(NUM_SAMPLES, 2000) - 0.5, "tokens": tokens}
        batch |= {"num_samples": torch.full((NUM_SAMPLES,), 2000), "index": index}
        batch["num_tokens"] = 6 - 2 * (index % 2 == 0).long()
        return CTC(ctc, word_error_rate=False, **settings), StackDataset(**batch)
    tokens = torch.randint(24, (NUM_SAMPLES, 17))
    num_bytes = torch.full((NUM_SAMPLES,), 16)
    targets = tokens[:, 1:].clone()
    targets[index % GLOBAL_BATCH < GLOBAL_BATCH // 2, 5:] = IGNORE_INDEX
    batch = {"tokens": tokens[:, :-1], "targets": targets, "num_bytes": num_bytes}
    if case == "diff_grouped":
        shared |= {"signal_per_noise": 2, "output_gate": "element", "exclusive": True}
    if case == "softmax":
        shared["dex"] = True
    backbone = BackboneConfig(dim, 2, 8, attention=case, rope="1d", **shared)
    model = TextModel(TextConfig(24, 16, backbone))
    return CausalLM(model, **settings), StackDataset(**batch, index=index)


def both_media(count: int, num_sounds: int = 5) -> ImageAudioTextData:
    """Eight images with texts, and sounds with texts. Every batch has both: of two per epoch, both
    have the same four of five sounds."""
    return ImageAudioTextData(
        RenderedShapes(8, 5, picture_size=16),
        SynthesizedSounds(num_sounds, 7, sample_rate_hz=8000, clip_seconds=(0.5, 0.6)),
        image_size=8,
        sample_rate_hz=8000,
        max_tokens=80,
        batch_size=GLOBAL_BATCH // count,
    )


MEDIA = ("iiii iiss", "iiss ssss", "iiii iiii", "ssss iiii")
"""The images and sounds of both processes in every step."""


def media_apart(count: int) -> list[list[Any]]:
    """Batches of which some lack images or sounds that the other process has."""
    data = both_media(1, num_sounds=8)
    data.setup()
    pairs: Any = data.train_dataloader().dataset
    steps = []
    for media in MEDIA:
        places = enumerate(media.replace(" ", ""), 3 * len(steps))
        keys = [place % 8 + (8 if kind == "s" else 0) for place, kind in places]
        size = GLOBAL_BATCH // count
        shares = [sorted(keys[size * rank : size * (rank + 1)]) for rank in range(count)]
        steps.append([pairs.collate([pairs[key] for key in share]) for share in shares])
    return steps


def whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().cpu().clone()


class Recorded(Callback):
    def __init__(self) -> None:
        self.curves: dict[str, list[float]] = {name: [] for name in CURVES}
        self.gradients: dict[str, Tensor] = {}

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: LightningOptimizer
    ) -> None:
        for name, parameter in pl_module.named_parameters():
            if name not in self.gradients and parameter.grad is not None:
                self.gradients[name] = whole(parameter.grad)

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        if trainer.fit_loop._should_accumulate():
            return
        for name in CURVES:
            self.curves[name].append(trainer.callback_metrics[name].item())


class Shares:
    """Give each process its own share of the samples, once its rank is known."""

    def __init__(self, samples: Samples, accumulate: int) -> None:
        self.samples, self.accumulate = samples, accumulate
        self.trainer: Trainer | None = None

    def __iter__(self) -> Any:
        assert self.trainer is not None
        rank, count = data_share(self.trainer)
        if not isinstance(self.samples, StackDataset):
            steps = self.samples(count)[self.trainer.global_step :]
            return iter([step[rank] for step in steps])
        sampler = DistributedSampler(self.samples, count, rank, shuffle=False)
        size = GLOBAL_BATCH // count // self.accumulate
        return iter(DataLoader(self.samples, size, sampler=sampler))


def fit(
    task: Task,
    samples: Samples,
    *,
    strategy: str,
    num_processes: int,
    max_steps: int,
    ckpt_path: Path | None = None,
    accelerator: str = "cpu",
    precision: Any = "32-true",
    accumulate: int = 1,
) -> tuple[Trainer, Recorded]:
    recorded = Recorded()
    trainer = Trainer(
        accelerator=accelerator,
        precision=precision,
        gradient_clip_val=0.3,
        accumulate_grad_batches=accumulate,
        devices=num_processes,
        strategy=strategy,
        use_distributed_sampler=False,
        max_steps=max_steps,
        log_every_n_steps=1,
        callbacks=[recorded],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    shares: Any = Shares(samples, accumulate)
    shares.trainer = trainer
    if samples is both_media:
        shares = both_media(num_processes // (2 if strategy == "fsdp2_tp2" else 1))
    trainer.fit(task, shares, ckpt_path=ckpt_path, weights_only=True)
    return trainer, recorded


def refusal(task: Task, samples: Samples, ckpt_path: Path, setting: dict[str, Any]) -> str:
    """The error when a checkpoint of a deeper model is resumed."""
    task.model.backbone.blocks = task.model.backbone.blocks[:1]  # type: ignore[union-attr, index, operator]
    try:
        fit(task, samples, max_steps=4, ckpt_path=ckpt_path, **setting)
    except Exception as error:
        return str(error)
    return ""


def validated(
    task: Task, samples: Samples, ckpt_path: Path, strategy: str, num_processes: int
) -> float:
    """The loss of a checkpoint's weights, by Lightning's own validation."""
    trainer = Trainer(
        accelerator="cpu",
        devices=num_processes,
        strategy=strategy,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    if isinstance(samples, StackDataset):
        loader: Any = DataLoader(samples, GLOBAL_BATCH // 4)
    elif samples is both_media:
        loader = both_media(4)
    else:  # whose processes have different media in each step
        loader = DataLoader([step for (step,) in samples(1)], batch_size=None)
    (metrics,) = trainer.validate(
        task, loader, ckpt_path=ckpt_path, weights_only=True, verbose=False
    )
    return metrics["val/loss"]


def weights_of(task: nn.Module) -> dict[str, Tensor]:
    return {name: whole(parameter) for name, parameter in task.named_parameters()}


def run(
    folder: Path,
    case: str,
    strategy: str,
    num_processes: int,
    *,
    variant: str = "",
    accelerator: str = "cpu",
    precision: str = "32-true",
    accumulate: int = 1,
    source: str = "auto_1",
    compile: Literal["", "eager", "inductor"] = "",
    **changes: Any,
) -> None:
    """Save the loss curve, the gradients of the first step and the weights after two steps, with a
    checkpoint, and the weights after two more steps from `CASE_SOURCE.ckpt`, by default that of one
    process, if it exists.

    Args:
        folder: Folder for the files, which are named `CASE_STRATEGY_NUM` followed by the variant.
        case, changes: Arguments of `task_and_data`.
        strategy, num_processes, accelerator, precision: Settings of the trainer.
        accumulate: Number of micro-batches per step and process.
        variant: Suffix that distinguishes runs with otherwise equal names.
        source: Strategy and number of processes of the checkpoint to resume from.
        compile: Backend of `torch.compile` for all steps, or `"eager"`, which runs what Dynamo
            traced as it is, for the first two: most graphs differ only in that.
    """
    setting: dict[str, Any] = {"strategy": strategy, "num_processes": num_processes}
    setting |= {"accelerator": accelerator, "precision": precision, "accumulate": accumulate}
    name = f"{case}_{strategy}_{num_processes}{variant}"
    changes |= {"splits_heads": "tp" in strategy}
    task, samples = task_and_data(case, compile=bool(compile), **changes)
    with patch.object(nn.Module, "compile", partialmethod(nn.Module.compile, backend=compile)):
        trainer, recorded = fit(task, samples, max_steps=2, **setting)
    results = {"curves": recorded.curves, "gradients": recorded.gradients}
    results["weights"] = weights_of(task)
    trainer.save_checkpoint(folder / f"{name}.ckpt")
    task, samples = task_and_data(case, compile=compile == "inductor", **changes)
    fit(task, samples, max_steps=4, ckpt_path=folder / f"{case}_{source}.ckpt", **setting)
    results["resumed"] = weights_of(task)
    if accelerator == "cpu":
        task, samples = task_and_data(case, **changes)
        path = folder / f"{name}.ckpt"
        results["validated"] = validated(task, samples, path, strategy, num_processes)
    if case == "diff_v1" and strategy == "fsdp2":
        task, samples = task_and_data(case, **changes)
        results["refusal"] = refusal(task, samples, folder / f"{name}.ckpt", setting)
    if trainer.is_global_zero:
        torch.save(results, folder / f"{name}.pt")


if __name__ == "__main__":
    # Dynamo would otherwise silently run uncompiled what it cannot compile or recompiles too often.
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    inductor.cpp.vec_isa_ok = False  # see tests/conftest.py
    for arguments in json.loads(sys.argv[2]):
        torch._dynamo.reset()
        counters.clear()
        run(Path(sys.argv[1]), **arguments)
        if arguments.get("compile"):
            assert counters["stats"]["unique_graphs"], "nothing was compiled"
            assert not counters["graph_break"], counters["graph_break"]
    leave_processes(0)
