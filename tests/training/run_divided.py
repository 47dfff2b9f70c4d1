"""Computes gradients of a step and metrics of evaluations on all processes of the group.

RANK=0 WORLD_SIZE=2 ... python run_divided.py FOLDER, a folder of texts; runs one process if these
variables are not set.
"""

import json
import sys
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import (
    Callback,
    LightningDataModule,
    LightningModule,
    Trainer,
    seed_everything,
)
from torch import Tensor
from torch.utils.data import DataLoader

from datamodules import ImageAudioTextData
from datamodules.pairs import AudioTextReader, RenderedShapes, SynthesizedSounds
from datamodules.shared.loading import SeededDataModule
from datamodules.shared.sampling import SeededDataset, sample_generator
from datamodules.text.data import HuggingFaceText, TextData, TextFolder
from diffmm.batch import IGNORE_INDEX
from diffmm.models import (
    AudioConfig,
    AudioModel,
    BackboneConfig,
    CaptioningConfig,
    CaptioningModel,
    ContrastiveConfig,
    ContrastiveModel,
    CTCConfig,
    CTCModel,
    ImageConfig,
    ImageModel,
    MaskedAutoencoder,
    MaskedAutoencoderConfig,
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
    MaskedAutoencoding,
    OptimizerConfig,
    ScheduleConfig,
    Task,
)

CLASSES = 7
CAPTIONS = "pairs, captions"
TRANSCRIPTS = "transcripts"
MIXED = "pairs of both media"


def task(kind: str) -> Task:
    """Samples whose losses differ by large factors."""
    seed_everything(0, verbose=False)
    made = untouched_task(kind)
    model: Any = made.model
    if kind.startswith("pairs"):
        model = model.decoder if kind == CAPTIONS else model.text
    head: Any = model.decoder_head if kind == "masked images" else model.head
    with torch.no_grad():
        head.weight.mul_(40.0)
    return made


def untouched_task(kind: str) -> Task:
    settings = (OptimizerConfig(1e-3), ScheduleConfig(10, kind="constant"))
    if kind == "texts":
        model = TextModel(TextConfig(320, 32, BackboneConfig(16, 1, 2, rope="1d")))
        return CausalLM(model, *settings)
    backbone, classes = (
        BackboneConfig(16, 1, 2, rope="2d"),
        0 if kind in ("masked images", CAPTIONS) else CLASSES,
    )
    image = ImageConfig(backbone=backbone, num_classes=classes, image_size=8, patch_size=4)
    if kind == "masked images":
        config = MaskedAutoencoderConfig(encoder=image, decoder=backbone, mask_ratio=0.5)
        return MaskedAutoencoding(MaskedAutoencoder(config), *settings)
    if kind == CAPTIONS:
        decoder = TextConfig(20, 10, BackboneConfig(16, 1, 2, rope="1d"), tie_embeddings=False)
        captioning = CaptioningModel(CaptioningConfig(encoder=image, decoder=decoder))
        return Captioning(captioning, *settings, max_new_tokens=6)
    if kind == TRANSCRIPTS:
        # One token per time.
        encoder = replace(audio_config(0), patch_size=(2, 8))
        return CTC(CTCModel(CTCConfig(encoder=encoder, vocab_size=259, blank_id=256)), *settings)
    if kind.startswith("pairs"):
        tower = BackboneConfig(16, 1, 2)
        text = TextTowerConfig(20, 6, tower, pool="eos", eos_id=2)
        if kind == MIXED:
            text = TextTowerConfig(259, 100, tower, pool="eos", eos_id=256)
        pairs = ContrastiveConfig(
            image=image,
            audio=audio_config(0) if kind in ("pairs, three towers", MIXED) else None,
            text=text,
            embed_dim=CLASSES,
            init_bias=-1.0 if kind == "pairs, sigmoid" else None,
            init_temperature=0.5,
        )
        loss: Any = "siglip" if kind == "pairs, sigmoid" else "clip"
        return Contrastive(ContrastiveModel(pairs), *settings, loss=loss)
    if kind == "images":
        return Classification(ImageModel(image), *settings)
    return Classification(AudioModel(audio_config(CLASSES)), *settings, multi_label=True)


def audio_config(num_classes: int) -> AudioConfig:
    return AudioConfig(
        backbone=BackboneConfig(16, 1, 2, rope="2d"),
        num_classes=num_classes,
        sample_rate_hz=8000,
        num_mels=8,
        window_seconds=0.064,
        hop_seconds=0.032,
        patch_size=(2, 4),
    )


class Samples(SeededDataset[dict[str, Tensor]]):
    """Images, or sounds of equal length with several classes each."""

    def __init__(self, kind: str, size: int) -> None:
        self.kind, self.size = kind, size

    def __len__(self) -> int:
        return self.size

    def sample(self, epoch: int, index: int) -> dict[str, Tensor]:
        generator = sample_generator(0, index)
        found = {"index": torch.tensor(index)}
        if self.kind == "sounds":
            labels = (torch.rand(CLASSES, generator=generator) < 0.5).float()
            sound = torch.rand(2000, generator=generator) - 0.5
            return {
                **found,
                "waveforms": sound,
                "num_samples": torch.tensor(2000),
                "labels": labels,
            }
        if self.kind == TRANSCRIPTS:
            words = [b"a", b"b c", b"d e"][index % 3]
            return {
                **found,
                "waveforms": torch.rand(2000, generator=generator) - 0.5,
                "num_samples": torch.tensor(2000),
                "tokens": torch.tensor([*words, *[256] * (4 - len(words))]),
                "num_tokens": torch.tensor(len(words) + 1),
            }
        image = torch.randn(3, 8, 8, generator=generator)
        if self.kind.startswith("pairs"):  # of one image, or one text, several are
            medium, text = index // 2, index % 5
            tokens = torch.tensor([3 + text, 4 + text % 3, 2, 2, 2, 2])
            return {
                **found,
                "images": torch.randn(3, 8, 8, generator=sample_generator(0, medium)),
                "tokens": tokens,
                "num_tokens": torch.tensor(3),
                "media_index": torch.tensor(medium),
            }
        return {**found, "images": image, "labels": torch.tensor(index % CLASSES)}


class Data(SeededDataModule):
    def __init__(self, kind: str, size: int, batch_size: int) -> None:
        super().__init__(batch_size=batch_size, num_workers=0, seed=0)
        self.kind, self.size = kind, size

    def train_dataloader(self) -> Any:
        return self.training_loader(Samples(self.kind, 16))

    def describe_inputs(self) -> dict[str, Any]:
        if self.kind == TRANSCRIPTS:
            return {"reader": AudioTextReader(sample_rate_hz=8000, tokenizer="bytes").describe()}
        return super().describe_inputs()

    def val_dataloader(self) -> Any:
        return self.evaluation_loader(Samples(self.kind, self.size))

    test_dataloader = val_dataloader


def mixed_data(size: int, batch_size: int) -> ImageAudioTextData:
    """Images and sounds; of those to evaluate, `size` images and two more sounds."""
    return ImageAudioTextData(
        RenderedShapes(16, size, picture_size=16),
        SynthesizedSounds(16, size + 2, sample_rate_hz=8000, clip_seconds=(0.5, 0.6)),
        image_size=8,
        sample_rate_hz=8000,
        max_tokens=100,
        batch_size=batch_size,
    )


class PlainData(LightningDataModule):
    """Loaders without samplers of their own, to which Lightning adds distributed samplers."""

    def __init__(self, size: int, batch_size: int) -> None:
        super().__init__()
        self.size, self.batch_size = size, batch_size

    def train_dataloader(self) -> Any:
        return DataLoader(Samples("images", 16), self.batch_size)

    def val_dataloader(self) -> Any:
        return DataLoader(Samples("images", self.size), self.batch_size)

    test_dataloader = val_dataloader


def texts(folder: Path, *, streamed: bool, validation_fraction: float) -> TextData:
    source = TextFolder(str(folder))
    if streamed:
        files = str(folder / "*.txt")
        source = HuggingFaceText("text", data_files=files, streaming=True, shuffle_buffer=5)
    return TextData(
        source,
        sequence_length=16,
        batch_size=2,
        validation_fraction=validation_fraction,
        test_fraction=0.2,
    )


def evaluations(folder: Path) -> dict[str, tuple[str, Any]]:
    """Numbers of samples that processes cannot share evenly, or that are too few for all."""
    return {
        "5 images": ("images", lambda: Data("images", 5, 1)),
        "7 images in batches": ("images", lambda: Data("images", 7, 3)),
        "1 image": ("images", lambda: Data("images", 1, 2)),
        "5 images of a plain loader": ("images", lambda: PlainData(5, 1)),
        "7 images of a plain loader": ("images", lambda: PlainData(7, 2)),
        "1 image of a plain loader": ("images", lambda: PlainData(1, 2)),
        "5 masked images": ("masked images", lambda: Data("masked images", 5, 2)),
        "5 sounds": ("sounds", lambda: Data("sounds", 5, 1)),
        "1 sound": ("sounds", lambda: Data("sounds", 1, 2)),
        "7 pairs": ("pairs", lambda: Data("pairs", 7, 2)),
        "1 pair": ("pairs, sigmoid", lambda: Data("pairs", 1, 2)),
        "16 pairs of both media": (MIXED, lambda: mixed_data(7, 4)),
        "4 pairs of both media": (MIXED, lambda: mixed_data(1, 4)),
        "7 captions": (CAPTIONS, lambda: Data(CAPTIONS, 7, 2)),
        "1 caption": (CAPTIONS, lambda: Data(CAPTIONS, 1, 2)),
        "7 transcripts": (TRANSCRIPTS, lambda: Data(TRANSCRIPTS, 7, 2)),
        "1 transcript": (TRANSCRIPTS, lambda: Data(TRANSCRIPTS, 1, 2)),
        "texts": ("texts", lambda: texts(folder, streamed=False, validation_fraction=0.2)),
        "a stream": ("texts", lambda: texts(folder, streamed=True, validation_fraction=0.2)),
        "a short stream": ("texts", lambda: texts(folder, streamed=True, validation_fraction=0.08)),
    }


def trainer(
    num_processes: int, callbacks: Sequence[Callback] = (), ddp: str = "ddp", **settings: Any
) -> Trainer:
    return Trainer(
        accelerator="cpu",
        devices=num_processes,
        strategy=ddp if num_processes > 1 else "auto",
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        **settings,
    )


class Watch(Callback):
    """The gradients of a step before clipping."""

    gradients: dict[str, list[float]]

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, *args: Any
    ) -> None:
        self.gradients = {
            name: parameter.grad.flatten().tolist()
            for name, parameter in pl_module.named_parameters()
            if parameter.grad is not None
        }


def text_batch() -> dict[str, Tensor]:
    """Eight texts with very different numbers of targets."""
    seed_everything(1, verbose=False)
    tokens = torch.randint(256, (8, 17))
    lengths = torch.tensor([1, 16, 2, 9, 16, 3, 1, 7])
    targets = tokens[:, 1:].clone()
    targets[torch.arange(16) >= lengths[:, None]] = IGNORE_INDEX
    return {
        "tokens": tokens[:, :-1],
        "targets": targets,
        "num_bytes": lengths,
        "key_padding": torch.arange(16) < lengths[:, None],
        "index": torch.arange(8),
    }


def batch_of(kind: str) -> dict[str, Tensor]:
    if kind == "texts":
        return text_batch()
    return torch.utils.data.default_collate([Samples(kind, 8)[index] for index in range(8)])


DIVISIONS = {1: [[8]], 2: [[1, 2, 1], [2, 1, 1]]}
"""The number of the eight samples in each micro-batch, for each process in turn."""

WHOLE = {1: [[8]], 2: [[4], [4]]}
"""The same for a task that does not accumulate gradients."""


GRADIENTS = ("texts", "images", "pairs", "pairs, sigmoid", "pairs, three towers", MIXED, CAPTIONS,
             TRANSCRIPTS)  # fmt: skip


def gradients(kind: str, num_processes: int) -> dict[str, Any]:
    """The gradients of a step that ends before all micro-batches, at the end of an epoch."""
    is_whole = kind.startswith("pairs") and kind != CAPTIONS
    watch = Watch()
    own = trainer(
        num_processes,
        [watch],
        # The tower of the other medium has no gradients.
        ddp="ddp_find_unused_parameters_true" if kind.endswith("three towers") else "ddp",
        accumulate_grad_batches=1 if is_whole else 4,
        max_steps=1,
        gradient_clip_val=0.1,
        use_distributed_sampler=False,
    )
    model = task(kind)
    if kind == MIXED:
        own.fit(model, datamodule=mixed_data(2, 8 // num_processes))
        return measured(own, watch)
    batch = batch_of(kind)
    sizes = (WHOLE if is_whole else DIVISIONS)[num_processes]
    flat = [size for share in sizes for size in share]
    parts = list(zip(*(tensor.split(flat) for tensor in batch.values()), strict=True))
    share = len(sizes[0])
    mine = parts[own.global_rank * share : (own.global_rank + 1) * share]
    batches = [dict(zip(batch, part, strict=True)) for part in mine]
    data = Data(kind, 1, 1)
    data.train_dataloader = lambda: DataLoader(batches, batch_size=None)  # type: ignore
    own.fit(model, data) if kind == TRANSCRIPTS else own.fit(model, data.train_dataloader())
    return measured(own, watch)


def measured(own: Trainer, watch: Watch) -> dict[str, Any]:
    logged = {name: own.callback_metrics[name].item() for name in ("train/loss", "train/grad_norm")}
    return {**logged, "gradients": watch.gradients}


def evaluate(kind: str, data: LightningDataModule, num_processes: int) -> dict[str, Any]:
    """The metrics of a fit's validation, where DDP runs the forward pass, and of `validate` and
    `test`."""
    model = task(kind)
    fitted = trainer(num_processes, max_steps=1, limit_train_batches=1)
    model.optimizer_config = OptimizerConfig(1e-30)
    fitted.fit(model, datamodule=data)
    found = {"fit": fitted.callback_metrics}
    for verb in ("validate", "test"):
        (metrics,) = getattr(trainer(num_processes), verb)(model, datamodule=data, verbose=False)
        found[verb] = metrics
    return {
        f"{verb} {name}": float(value)
        for verb, metrics in found.items()
        for name, value in metrics.items()
        if name.startswith(("val/", "test/"))
    }


def run(folder: Path, num_processes: int) -> dict[str, Any]:
    warnings.filterwarnings("ignore")
    return {
        "gradients": {kind: gradients(kind, num_processes) for kind in GRADIENTS},
        "metrics": {
            name: evaluate(kind, make(), num_processes)
            for name, (kind, make) in evaluations(folder).items()
        },
    }


if __name__ == "__main__":
    output = Path(sys.argv[1])
    results = run(output, 2)
    if torch.distributed.get_rank() == 0:
        (output / "results.json").write_text(json.dumps(results))
    leave_processes(0)
