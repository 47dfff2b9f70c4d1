"""Tiny models and batches of every task, and a trainer for them."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

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
from diffmm.training import (
    CTC,
    Captioning,
    CausalLM,
    Classification,
    Contrastive,
    MaskedAutoencoding,
    MaskedLM,
    OptimizerConfig,
    ScheduleConfig,
    Task,
)

IGNORED_WARNINGS = (
    # Lightning 2.6 under torch 2.11.
    "ignore:.*LeafSpec.*:FutureWarning",
    # The batches are already in memory, so that workers would only cost time.
    "ignore:.*does not have many workers.*",
    # Task shards models if the strategy requires it, and rejects weight averaging in that case.
    "ignore:You're using the WeightAveraging callback with a model that overrides",
    "ignore:You defined a `validation_step` but have no `val_dataloader`.*",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            for warning in IGNORED_WARNINGS:
                item.add_marker(pytest.mark.filterwarnings(warning))


NUM_CLASSES = 7
VOCAB = 24


def backbone(attention: str = "diff_v1", **changes: Any) -> BackboneConfig:
    settings: dict[str, Any] = {"dim": 32, "depth": 2, "num_heads": 4, "rope": "2d"}
    return BackboneConfig(**{**settings, "attention": attention, **changes})


@dataclass
class Make:
    """Builds tiny models, tasks and batches; `attention` and other changes apply to the
    backbone."""

    num_classes = NUM_CLASSES
    vocab_size = VOCAB

    def text(self, attention: str = "diff_v1", causal: bool = True, **changes: Any) -> TextModel:
        config = backbone(attention, **{"rope": "1d", **changes})
        return TextModel(TextConfig(VOCAB, 32, config, causal=causal, tie_embeddings=False))

    def image(self, attention: str = "diff_v1", **changes: Any) -> ImageModel:
        return ImageModel(self.image_config(attention, num_classes=NUM_CLASSES, **changes))

    def image_config(
        self, attention: str = "diff_v1", num_classes: int = 0, **changes: Any
    ) -> ImageConfig:
        return ImageConfig(
            backbone=backbone(attention, **changes),
            num_classes=num_classes,
            image_size=8,
            patch_size=2,
            num_reg_tokens=1,
            learned_positions=True,
        )

    def audio(self, attention: str = "diff_v1", **changes: Any) -> AudioModel:
        return AudioModel(self.audio_config(attention, num_classes=NUM_CLASSES, **changes))

    def audio_config(
        self, attention: str = "diff_v1", num_classes: int = 0, **changes: Any
    ) -> AudioConfig:
        return AudioConfig(
            backbone=backbone(attention, **changes),
            num_classes=num_classes,
            sample_rate_hz=4000,
            num_mels=8,
            window_seconds=0.064,
            hop_seconds=0.032,
            patch_size=(2, 4),
            clip_seconds=0.5,
        )

    def autoencoder(
        self, attention: str = "diff_v1", audio: bool = False, **changes: Any
    ) -> MaskedAutoencoder:
        encoder = self.audio_config if audio else self.image_config
        decoder = backbone(attention, depth=1, dim=16)
        return MaskedAutoencoder(
            MaskedAutoencoderConfig(encoder=encoder(attention, **changes), decoder=decoder)
        )

    def contrastive(
        self, attention: str = "diff_v1", audio: bool = False, model: Any = None, **changes: Any
    ) -> ContrastiveModel:
        text = TextTowerConfig(
            vocab_size=VOCAB,
            max_length=12,
            backbone=backbone(attention, **{**changes, "rope": "none"}),
            pool="eos",
            eos_id=VOCAB - 1,
        )
        media = self.audio_config if audio else self.image_config
        towers: dict[str, Any] = {"audio" if audio else "image": media(attention, **changes)}
        return ContrastiveModel(
            ContrastiveConfig(**{**towers, "text": text, "embed_dim": 16, **(model or {})})
        )

    def captioning(
        self, attention: str = "diff_v1", audio: bool = False, media: Any = "prefix", **changes: Any
    ) -> CaptioningModel:
        encoder = (self.audio_config if audio else self.image_config)(attention, **changes)
        text = backbone(attention, **{**changes, "rope": "1d"})
        decoder = TextConfig(VOCAB, 64, text, tie_embeddings=False)
        return CaptioningModel(CaptioningConfig(encoder=encoder, decoder=decoder, media=media))

    def ctc(self, attention: str = "diff_v1", **changes: Any) -> CTCModel:
        # One token per time.
        encoder = replace(self.audio_config(attention, **changes), patch_size=(1, 8))
        return CTCModel(CTCConfig(encoder=encoder, vocab_size=VOCAB, blank_id=VOCAB - 1))

    def task(self, name: str, attention: str = "diff_v1", **settings: Any) -> Task:
        """Build one of `TASKS` by name. `settings` are the task's, the backbone's under `backbone`,
        or a contrastive model's under `model`."""
        changes = settings.pop("backbone", {})
        settings.setdefault("optimizer", OptimizerConfig(3e-3))
        settings.setdefault("schedule", ScheduleConfig(1000, kind="constant"))
        if name == "causal_lm":
            return CausalLM(self.text(attention, **changes), **settings)
        if name == "masked_lm":
            return MaskedLM(self.text(attention, causal=False, **changes), **settings)
        if name in ("image", "audio"):
            model: nn.Module = getattr(self, name)(attention, **changes)
            return Classification(model, **settings)
        if name.endswith("_captions"):
            media = "cross_attention" if "_cross_" in name else "prefix"
            captioning = self.captioning(attention, name.startswith("audio"), media, **changes)
            return Captioning(captioning, **{"max_new_tokens": 12, **settings})
        if name == "audio_ctc":
            ctc = self.ctc(attention, **changes)
            return CTC(ctc, **{"word_error_rate": False, "skip_too_long": True, **settings})
        if name.endswith("_text"):
            model = self.contrastive(
                attention, name == "audio_text", settings.pop("model", None), **changes
            )
            return Contrastive(model, **settings)
        autoencoder = self.autoencoder(attention, audio=name == "audio_mae", **changes)
        return MaskedAutoencoding(autoencoder, **settings)

    def batch(self, name: str, size: int = 6) -> dict[str, Tensor]:
        """Make a batch for the task of this name."""
        index = torch.arange(size)
        if name.endswith("_lm"):
            tokens = torch.randint(VOCAB, (size, 17))
            targets = tokens[:, 1:].clone() if name == "causal_lm" else tokens[:, :-1].clone()
            tokens = tokens[:, :-1].clone()
            if name == "masked_lm":
                masked = torch.rand(tokens.shape) < 0.3
                targets[~masked] = IGNORE_INDEX
                tokens[masked] = VOCAB - 1
            num_bytes = 2 * (targets != IGNORE_INDEX).sum(dim=1)
            return {"tokens": tokens, "targets": targets, "num_bytes": num_bytes, "index": index}
        if name.endswith("_captions"):
            return self.batch(f"{name.partition('_')[0]}_text", size)
        if name == "audio_ctc":  # short texts, most of which fit their sounds
            pairs = self.batch("audio_text", size)
            pairs["num_tokens"] = pairs["num_tokens"].clamp(max=5)
            pairs["tokens"][:, 4:] = VOCAB - 1
            return pairs
        if name.endswith("_text"):
            media = self.batch(name.removesuffix("_text"), size)
            media.pop("labels")
            if "waveforms" in media:  # sounds that can be told apart
                media["waveforms"] *= 4.0 ** -torch.arange(size)[:, None]
            num_tokens = torch.randint(3, 13, (size,))
            tokens = torch.randint(VOCAB - 1, (size, 12))
            tokens[torch.arange(12) >= num_tokens[:, None] - 1] = VOCAB - 1
            return {**media, "tokens": tokens, "num_tokens": num_tokens, "media_index": index}
        labels = torch.arange(size) % NUM_CLASSES
        if name.startswith("image"):
            return {"images": torch.randn(size, 3, 8, 8), "labels": labels, "index": index}
        num_samples = torch.randint(1200, 2001, (size,))
        waveforms = torch.rand(size, 2000) - 0.5
        waveforms[torch.arange(2000) >= num_samples[:, None]] = 0.0
        return {
            "waveforms": waveforms,
            "num_samples": num_samples,
            "labels": labels,
            "index": index,
        }


@pytest.fixture
def make() -> Make:
    return Make()


class Repeated(IterableDataset[dict[str, Tensor]]):
    """Repeats the same batches forever."""

    def __init__(self, batches: list[dict[str, Tensor]]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        while True:
            for batch in self.batches:
                yield {name: tensor.clone() for name, tensor in batch.items()}


Fit = Callable[..., Trainer]


@pytest.fixture
def trainer(tmp_path: Path) -> Callable[..., Trainer]:
    """A trainer without output that logs every step to `tmp_path/csv/metrics.csv`."""

    def build(**settings: Any) -> Trainer:
        defaults: dict[str, Any] = {
            "accelerator": "cpu",
            "devices": 1,
            "max_steps": 1,
            "logger": CSVLogger(tmp_path, name="", version="csv"),
            "log_every_n_steps": 1,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "enable_checkpointing": False,
            "num_sanity_val_steps": 0,
            "default_root_dir": tmp_path,
        }
        return Trainer(**{**defaults, **settings})

    return build


@pytest.fixture
def fit(trainer: Callable[..., Trainer]) -> Fit:
    """`fit(task, batches, max_steps=3, ...)` trains on the given batches repeatedly."""

    def run(
        task: LightningModule,
        batches: list[dict[str, Tensor]],
        val_batches: list[dict[str, Tensor]] | None = None,
        ckpt_path: str | Path | None = None,
        **settings: Any,
    ) -> Trainer:
        run_trainer = trainer(**settings)
        train = DataLoader(Repeated(batches), batch_size=None)
        val = None if val_batches is None else DataLoader(val_batches, batch_size=None)  # type: ignore[arg-type]
        run_trainer.fit(task, train, val, ckpt_path=ckpt_path, weights_only=True)
        return run_trainer

    return run
