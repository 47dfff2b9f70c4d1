"""A run that was stopped anywhere resumes with the same samples, hooks and bits."""

import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import EarlyStopping
from torchaudio.transforms import FrequencyMasking

from datamodules import (
    AudioData,
    AudioTextData,
    ImageAudioTextData,
    ImageData,
    ImageTextData,
    TextData,
)
from datamodules.audio.augment import AudioAugment
from datamodules.audio.sound_events import SoundEvents
from datamodules.pairs import RenderedShapes, SynthesizedSounds
from datamodules.shared.loading import SeededDataModule
from datamodules.shared.sampling import SeededDataset, sample_generator
from datamodules.text.data import HuggingFaceText, TextFolder
from diffmm.checkpoint_folders import STATE_NAME, checkpoints, find_state
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
    TextConfig,
    TextModel,
    TextTowerConfig,
)
from diffmm.training import (
    CTC,
    Captioning,
    CausalLM,
    Checkpoints,
    Classification,
    Contrastive,
    MixingConfig,
    OptimizerConfig,
    ScheduleConfig,
)

RATE_HZ = 8000

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*smaller than the logging interval"),
]


class StoppedError(Exception):
    pass


class Stop(Callback):
    """Saves after a number of batches, and stops."""

    def __init__(self, num_batches: int) -> None:
        self.num_batches = num_batches

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        if trainer.fit_loop.total_batch_idx + 1 == self.num_batches:
            path = trainer.checkpoint_callback.save_now(trainer, reason="test")
            assert path.name == f"step_{trainer.global_step:08d}"
            raise StoppedError


class Record(Callback):
    """Records the hooks and samples of a run, in order."""

    def __init__(self) -> None:
        self.done: list[Any] = []

    def on_train_epoch_start(self, trainer: Trainer, *args: Any) -> None:
        self.done.append(("epoch starts", trainer.current_epoch))

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        logging = trainer._logger_connector.should_update_logs
        self.done.append((batch_idx, trainer.global_step, logging, *batch["index"].tolist()))

    def on_validation_start(self, trainer: Trainer, *args: Any) -> None:
        if not trainer.sanity_checking:
            self.done.append(("validates", trainer.global_step))

    def on_train_epoch_end(self, trainer: Trainer, *args: Any) -> None:
        self.done.append(("epoch ends", trainer.current_epoch))


class Numbers(SeededDataset[dict[str, torch.Tensor]]):
    def __len__(self) -> int:
        return 60

    def sample(self, epoch: int, index: int) -> dict[str, torch.Tensor]:
        values = torch.randn(8, generator=sample_generator(0, epoch, index))
        return {"values": values, "index": torch.tensor(index)}


class NumbersData(SeededDataModule):
    """Seven batches of eight per epoch."""

    def __init__(self, *, batch_size: int = 8, num_workers: int = 0, seed: int = 0) -> None:
        super().__init__(batch_size=batch_size, num_workers=num_workers, seed=seed)

    def train_dataloader(self) -> Any:
        return self.training_loader(Numbers())

    def val_dataloader(self) -> Any:
        return self.evaluation_loader(Numbers())


class Plain(LightningModule):
    """A module that is not a task of this library."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.Dropout(0.1), torch.nn.Linear(8, 8))

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return self.layers(batch["values"]).square().mean()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val/loss", self.layers(batch["values"]).square().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), 0.1)


def backbone(rope):
    return BackboneConfig(16, 1, 2, attention="diff_v1", rope=rope, dropout=0.1, drop_path=0.1)


def image():
    config = ImageConfig(
        backbone=backbone("2d"), num_classes=10, image_size=8, patch_size=4, in_channels=1
    )
    mixing = MixingConfig(mixup_alpha=0.5, cutmix_alpha=0.5)
    task = Classification(ImageModel(config), *settings(), mixing=mixing)
    return task, lambda **changes: ImageData(batch_size=100, **changes)


def audio():
    config = AudioConfig(
        backbone=backbone("2d"),
        num_classes=10,
        sample_rate_hz=RATE_HZ,
        num_mels=16,
        window_seconds=0.032,
        hop_seconds=0.016,
        patch_size=(4, 16),
        clip_seconds=0.25,
    )
    # Texts of several lengths, so that batches are grouped by length.
    source = SoundEvents(80, 10, sample_rate_hz=RATE_HZ, clip_seconds=(0.2, 0.3))
    model = AudioModel(config)
    model.augment = FrequencyMasking(6)
    return Classification(model, *settings()), lambda **changes: AudioData(
        source,
        sample_rate_hz=RATE_HZ,
        clip_seconds=0.25,
        augment=AudioAugment(gain_db=(-6.0, 6.0), snr_db=(10.0, 20.0)),
        batch_size=10,
        **changes,
    )


def pairs():
    image = ImageConfig(backbone=backbone("2d"), image_size=8, patch_size=4)
    text = TextTowerConfig(259, 64, backbone("none"), causal=False, pool="mean")
    # A bound that the scale reaches.
    model = ContrastiveConfig(
        image=image, text=text, embed_dim=8, shared_blocks=1, max_scale=1 / 0.07
    )
    return Contrastive(ContrastiveModel(model), *settings()), lambda **changes: ImageTextData(
        RenderedShapes(56, 8, num_shapes=(1, 2), picture_size=16),
        image_size=8,
        max_tokens=64,
        batch_size=8,
        **changes,
    )


def both_media():
    tower = {"backbone": backbone("2d")}
    image = ImageConfig(**tower, image_size=8, patch_size=4)
    audio = AudioConfig(
        **tower,
        sample_rate_hz=8000,
        num_mels=16,
        window_seconds=0.032,
        hop_seconds=0.016,
        patch_size=(4, 16),
        clip_seconds=0.6,
    )
    text = TextTowerConfig(259, 100, backbone("none"), causal=False, pool="mean")
    model = ContrastiveConfig(image=image, audio=audio, text=text, embed_dim=8, shared_blocks=1)
    # The sounds begin again within an epoch.
    return Contrastive(ContrastiveModel(model), *settings()), lambda **changes: ImageAudioTextData(
        RenderedShapes(28, 8, picture_size=16),
        SynthesizedSounds(16, 8, sample_rate_hz=8000, clip_seconds=(0.5, 0.6)),
        image_size=8,
        sample_rate_hz=8000,
        max_tokens=100,
        batch_size=8,
        **changes,
    )


def captions(**changes):
    image = ImageConfig(backbone=backbone("2d"), image_size=8, patch_size=4)
    decoder = TextConfig(259, 68, backbone("1d"))
    model = CaptioningConfig(encoder=image, decoder=decoder, **changes)
    task = Captioning(CaptioningModel(model), *settings(), max_new_tokens=4, num_generated=8)
    return task, pairs()[1]


def transcripts():
    encoder = AudioConfig(
        backbone=backbone("1d"),
        sample_rate_hz=RATE_HZ,
        num_mels=16,
        window_seconds=0.016,
        hop_seconds=0.008,
        stem="frame",
        patch_size=None,
        clip_seconds=0.6,
    )
    model = CTCModel(CTCConfig(encoder=encoder, vocab_size=259, blank_id=256))
    task = CTC(model, *settings(), skip_too_long=True, augment=FrequencyMasking(6))
    return task, lambda **changes: AudioTextData(
        SynthesizedSounds(56, 8, sample_rate_hz=RATE_HZ, clip_seconds=(0.5, 0.6)),
        sample_rate_hz=RATE_HZ,
        max_tokens=30,
        batch_size=8,
        **changes,
    )


def text(source, **settings_of_data):
    task = CausalLM(TextModel(TextConfig(320, 32, backbone("1d"))), *settings())
    return task, lambda **changes: TextData(
        source,
        sequence_length=32,
        validation_fraction=0.3,
        batch_size=8,
        **settings_of_data,
        **changes,
    )


def stream(folder):
    files = str(folder / "*.txt")
    source = HuggingFaceText("text", data_files=files, streaming=True, shuffle_buffer=5)
    return text(source, stream_shares=2)


def settings():
    return OptimizerConfig(1e-2), ScheduleConfig(40, warmup_steps=2)


@pytest.fixture
def go(tmp_path):
    """`go("first", stop=3)` runs, stops after three batches, and returns weights and record."""
    texts = tmp_path / "texts"
    texts.mkdir()
    for number in range(20):
        (texts / f"{number}.txt").write_text(f"Text number {number} of twenty. " * 8)

    def run(
        name: str,
        kind: str = "plain",
        *,
        stop: int | None = None,
        ckpt: Path | None = None,
        callbacks: tuple[Callback, ...] = (),
        data: dict[str, Any] | None = None,
        checkpoints: dict[str, Any] | None = None,
        **changes: Any,
    ):
        seed_everything(1, verbose=False)
        task, make_data = {
            "plain": lambda: (Plain(), NumbersData),
            "image": image,
            "audio": audio,
            "pairs": pairs,
            "both media": both_media,
            "captions": captions,
            "cross-attention": partial(captions, media="cross_attention"),
            "transcripts": transcripts,
            "text": lambda: text(TextFolder(str(texts))),
            "stream": lambda: stream(texts),
        }[kind]()
        record = Record()
        trainer = Trainer(
            **{
                "default_root_dir": tmp_path / name,
                "callbacks": [
                    record,
                    Checkpoints(**(checkpoints or {})),
                    *callbacks,
                    *([] if stop is None else [Stop(stop)]),
                ],
                "accelerator": "cpu",
                "devices": 1,
                "max_steps": 16,
                "logger": False,
                "enable_progress_bar": False,
                "enable_model_summary": False,
                "use_distributed_sampler": False,
                "check_val_every_n_epoch": None,
                "val_check_interval": 4,
                "limit_val_batches": 1,
                "log_every_n_steps": 3,
                **changes,
            }
        )
        datamodule = make_data(**(data or {}))
        try:
            trainer.fit(task, datamodule=datamodule, ckpt_path=ckpt, weights_only=True)
        except StoppedError:
            assert stop is not None
        return {key: value.clone() for key, value in task.state_dict().items()}, record.done

    return run


def same(weights, others):
    return all(torch.equal(weights[name], others[name]) for name in weights)


SCHEDULES: dict[str, tuple[dict[str, Any], list[int]]] = {
    "steps": ({}, [1, 4, 7, 14, 15]),
    "accumulated": ({"accumulate_grad_batches": 2, "max_steps": 9}, [2, 3, 4, 7]),
    "accumulated unevenly": ({"accumulate_grad_batches": 3, "max_steps": 6}, [4, 7, 8]),
    "epochs": (
        {"max_steps": -1, "max_epochs": 3, "val_check_interval": 1.0, "check_val_every_n_epoch": 1},
        [6, 7, 8],
    ),
    "short epochs": (
        {
            "max_steps": -1,
            "max_epochs": 3,
            "val_check_interval": 1.0,
            "check_val_every_n_epoch": 2,
            "limit_train_batches": 5,
        },
        [4, 5, 6, 10],
    ),
    "no validation": ({"limit_val_batches": 0, "limit_train_batches": 5}, [1, 5, 10]),
    "overfitting": ({"overfit_batches": 3, "max_steps": 11}, [1, 2, 3, 4, 8]),
    "half epochs": (
        {"max_steps": -1, "max_epochs": 2, "val_check_interval": 0.5, "check_val_every_n_epoch": 1},
        [3, 6, 7],
    ),
}
"""Numbers of batches after which to stop; an epoch has seven."""


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_run_that_stopped_after_any_batch_goes_on_exactly(go, tmp_path, schedule):
    changes, stops = SCHEDULES[schedule]
    weights, whole = go("whole", **changes)
    for stop in stops:
        name = f"stopped_{stop}"
        _, first = go(name, stop=stop, **changes)
        rest_weights, rest = go(name, ckpt=find_state(tmp_path / name), **changes)
        assert first + rest == whole, stop
        assert same(weights, rest_weights), stop


MODALITIES = (
    *("text", "stream", "audio", "image", "pairs", "both media", "captions", "transcripts"),
    "cross-attention",
)


@pytest.mark.parametrize(
    ("modality", "workers"),
    [(modality, (0, 0)) for modality in MODALITIES]
    # Workers that come or go: both for streams, which divide their files among them.
    + [(modality, (0, 2)) for modality in ("stream", *MODALITIES[::2])]
    + [(modality, (2, 0)) for modality in MODALITIES[1::2]],
)
def test_every_checkpoint_of_a_run_leads_to_the_same_bits(go, tmp_path, modality, workers):
    """With persistent or changed workers, background saves, and saves after validation."""
    before, after = ({"num_workers": count} for count in workers)
    every = {"every_n_steps": 1, "keep_last": 100}
    weights, whole = go("whole", modality, data=before, checkpoints=every, max_steps=11)
    saved = checkpoints(tmp_path / "whole" / "checkpoints")
    assert [found.step for found in saved] == list(range(1, 12))
    for found in saved[2:10:2] if workers == (0, 0) else saved[3:10:5]:
        again, rest = go("again", modality, data=after, ckpt=found.path / STATE_NAME, max_steps=11)
        assert whole[len(whole) - len(rest) :] == rest
        steps = sum(isinstance(done[0], int) for done in rest)
        assert steps == 11 - found.step
        assert same(weights, again), found.step


@pytest.mark.parametrize("modality", ["text", "audio", "image"])
def test_overfitting_goes_on_with_the_batch_that_is_due(go, tmp_path, modality):
    """Repeats the first batches in order, each with the same random draws."""
    changes = {"overfit_batches": 2, "max_steps": 7}
    weights, whole = go("whole", modality, **changes)
    batches = [row for row in whole if isinstance(row[0], int)]
    size = len(batches[0]) - 3
    assert [row[3:] for row in batches] == [
        tuple(range(first, first + size)) for first in (0, size, 0, size, 0, size, 0)
    ]
    _, first = go("stopped", modality, stop=3, **changes)
    again, rest = go("stopped", modality, ckpt=find_state(tmp_path / "stopped"), **changes)
    assert first + rest == whole
    assert same(weights, again)


def test_a_stream_is_not_overfitted(go):
    with pytest.raises(ValueError, match="cannot do: set --data.source.streaming"):
        go("whole", "stream", overfit_batches=2)


def test_validation_of_more_or_less_shifts_nothing(go):
    weights, _ = go("some", max_steps=6)
    for name, changes in {
        "none": {"limit_val_batches": 0},
        "often": {"val_check_interval": 1, "num_sanity_val_steps": 0},
        "workers": {"data": {"num_workers": 2}},
    }.items():
        assert same(weights, go(name, max_steps=6, **changes)[0]), name


def test_what_was_stopped_by_a_criterion_stays_stopped(go, tmp_path):
    def stopping():
        return EarlyStopping("val/loss", patience=1, min_delta=1e9)

    weights, done = go("first", callbacks=(stopping(),))
    assert sum(isinstance(row[0], int) for row in done) == 8
    again, more = go("first", callbacks=(stopping(),), ckpt=find_state(tmp_path / "first"))
    assert not [row for row in more if isinstance(row[0], int)]
    assert same(weights, again)


def test_a_longer_run_goes_on_where_the_shorter_ended(go, tmp_path):
    weights, whole = go("whole")
    _, first = go("short", max_steps=10)
    rest_weights, rest = go("short", ckpt=find_state(tmp_path / "short"))
    batches = [row for row in first + rest if isinstance(row[0], int)]
    assert batches == [row for row in whole if isinstance(row[0], int)]
    assert same(weights, rest_weights)


def test_a_checkpoint_without_random_states_is_told(go, tmp_path):
    go("first", stop=3)
    state = torch.load(find_state(tmp_path / "first"), weights_only=True)
    del state["exact_resume"]
    torch.save(state, tmp_path / "plain.ckpt")
    with pytest.warns(UserWarning, match="was not saved by Checkpoints: .* but not exactly"):
        go("second", ckpt=tmp_path / "plain.ckpt")


def test_what_would_not_be_exact_is_refused(go, tmp_path):
    go("first", stop=3, accumulate_grad_batches=2)
    ckpt = find_state(tmp_path / "first")
    with pytest.raises(
        ValueError, match="saved with accumulate_grad_batches=2, which is now 4: resume with 2"
    ):
        go("first", ckpt=ckpt, accumulate_grad_batches=4)
    go("second", stop=3)
    ckpt = find_state(tmp_path / "second")
    message = r"was 8 samples and is now 4 \(batch_size 4 on 1 process.*with batch_size 8$"
    with pytest.raises(ValueError, match=message):
        go("second", ckpt=ckpt, data={"batch_size": 4})
    with pytest.raises(ValueError, match="resume with the same data and seed"):
        go("second", ckpt=ckpt, data={"seed": 5})


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"gradient_clip_val": 0.5}, "gradient_clip_val=0.5 instead of None"),
        ({"precision": "bf16-mixed"}, "precision='bf16-mixed' instead of '32-true'"),
    ],
)
def test_changed_settings_of_the_trainer_are_told(go, tmp_path, changes, told):
    go("first", stop=3)
    with pytest.warns(UserWarning, match=re.escape(f"the run resumes with {told}")):
        go("first", ckpt=find_state(tmp_path / "first"), **changes)
