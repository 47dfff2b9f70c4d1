"""Every task with every attention variant: it learns, logs, and saves what can be loaded again."""

import csv
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint

from diffmm.batch import IGNORE_INDEX, inputs_of
from diffmm.models import Backbone, ImageModel
from diffmm.models.weights import load_model
from diffmm.training import CausalLM, Classification, MaskedLM, OptimizerConfig, ScheduleConfig

TASKS = (
    *("causal_lm", "masked_lm", "image", "audio", "image_mae", "audio_mae"),
    *("image_text", "audio_text", "image_captions", "audio_captions", "audio_ctc"),
    "audio_cross_captions",
)
ATTENTIONS = ("softmax", "diff_v1", "diff_v2")


def logged(tmp_path: Path) -> dict[str, list[float]]:
    """The columns of the CSV log, without empty cells."""
    columns: dict[str, list[float]] = {}
    with (tmp_path / "csv" / "metrics.csv").open() as file:
        for row in csv.DictReader(file):
            for name, value in row.items():
                if value:
                    columns.setdefault(name, []).append(float(value))
    return columns


@pytest.mark.parametrize(
    ("name", "attention"),
    # All attentions of texts, and one of every other task in turn.
    [(TASKS[0], attention) for attention in ATTENTIONS]
    + [(name, ATTENTIONS[index % 3]) for index, name in enumerate(TASKS[1:])],
)
def test_the_loss_falls_and_is_logged(name, attention, make, fit, tmp_path):
    task, batch = make.task(name, attention), make.batch(name)
    fit(task, [batch], [batch], max_steps=40, limit_train_batches=40, gradient_clip_val=1.0)
    log = logged(tmp_path)
    losses = log["train/loss"]
    assert len(losses) == 40
    # The masks of autoencoding only change with the epoch, so that all of them can be memorized.
    assert losses[-1] < (0.95 if name.endswith("mae") else 0.6) * losses[0]
    expected = {"train/loss", "train/learning_rate", "train/grad_norm", "val/loss"}
    expected |= {"train/samples_per_second", "train/data_wait"}
    if name.endswith("_lm"):
        expected |= {"train/tokens_per_second", "val/perplexity", "val/bits_per_byte"}
    if name.endswith("_text"):
        expected |= {"train/tokens_per_second"}
        expected |= {
            f"val/{way}_recall_{k}"
            for way in ("media_to_text", "text_to_media")
            for k in (1, 5, 10)
        }
    if name.endswith("_captions"):
        expected |= {"train/tokens_per_second", "val/exact_match"}
    if name == "audio_ctc":
        expected |= {"train/tokens_per_second"}
    if name in ("image", "audio"):
        expected |= {"val/accuracy", "val/accuracy_top5"}
    if attention != "softmax":
        expected |= {"lambda/layer_00", "lambda/layer_01"}
    assert set(log) == expected | {"epoch", "step"}
    assert all(math.isfinite(value) for column in log.values() for value in column)


@pytest.mark.parametrize("name", TASKS)
def test_a_checkpoint_is_tensors_and_loads_as_the_model(name, make, fit, tmp_path):
    task, batch = make.task(name), make.batch(name)
    trainer = fit(task, [batch], max_steps=2)
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    checkpoint = torch.load(tmp_path / "run.ckpt", weights_only=True)
    assert "hyper_parameters" not in checkpoint
    reader = checkpoint["job"]["reader"]
    assert (reader and reader["init_args"]) == ({"tokenizer": "bytes"} if "_lm" in name else None)
    assert all(key.startswith("model.") for key in checkpoint["state_dict"])
    loaded = load_model(tmp_path / "run.ckpt")
    task.eval()
    before = task.predict_step(batch)
    task.model = loaded
    for key, value in task.predict_step(batch).items():
        if not name.endswith("_mae"):
            torch.testing.assert_close(value, before[key], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("name", "attention"),
    [
        ("causal_lm", "diff_v1"),
        ("image", "diff_v2"),
        ("image_text", "diff_v1"),
    ],
)
def test_compiled_training_is_the_same(name, attention, make, fit, tmp_path, monkeypatch):
    compile_fn = torch.nn.Module.compile
    # Inductor takes a minute here; the test is about the task, not about compilation.
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda module: compile_fn(module, backend="aot_eager")
    )
    batch, runs = make.batch(name), []
    for compiled in (False, True):
        torch.manual_seed(0)
        task = make.task(name, attention, compile=compiled)
        keys = list(task.state_dict())
        trainer = fit(task, [batch], max_steps=3, logger=False)
        assert list(task.state_dict()) == keys
        assert (task.model._compiled_call_impl is not None) == compiled
        runs.append(trainer.callback_metrics)
    assert runs[0].keys() == runs[1].keys()
    speeds = {"train/samples_per_second", "train/tokens_per_second", "train/data_wait"}
    for metric in runs[0].keys() - speeds:
        torch.testing.assert_close(runs[1][metric], runs[0][metric], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", TASKS)
def test_activation_checkpointing_is_the_same(name, make, fit):
    batch, losses = make.batch(name), []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        task = make.task(name, activation_checkpointing=checkpointing)
        backbones = [module for module in task.modules() if isinstance(module, Backbone)]
        assert backbones
        assert all(b.activation_checkpointing == checkpointing for b in backbones)
        losses.append(fit(task, [batch], max_steps=3, logger=False).callback_metrics["train/loss"])
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-6, atol=0)


def test_activation_checkpointing_needs_a_backbone():
    model = torch.nn.Linear(3, 2)
    model.num_classes = 2
    with pytest.raises(ValueError, match="needs a Backbone, and Linear has none"):
        Classification(
            model, OptimizerConfig(1e-3), ScheduleConfig(10), activation_checkpointing=True
        )


@pytest.mark.parametrize("name", TASKS)
def test_bfloat16_trains(name, make, fit):
    task, batch = make.task(name, "diff_v2"), make.batch(name)
    trainer = fit(
        task, [batch], [batch], max_steps=3, limit_train_batches=3, precision="bf16-mixed"
    )
    assert all(torch.isfinite(value) for value in trainer.callback_metrics.values())
    assert all(parameter.dtype == torch.float32 for parameter in task.model.parameters())


def test_the_averaged_model_is_saved_and_validated(make, fit, tmp_path):
    task, batch = make.task("image"), make.batch("image")
    weights, validated = [], []

    class Recorded(Callback):
        def on_train_batch_end(self, trainer, pl_module, *args: Any) -> None:
            weights.append(pl_module.model.head.weight.detach().clone())

        def on_validation_batch_end(self, trainer, pl_module, *args: Any) -> None:
            validated.append(pl_module.model.head.weight.detach().clone())

    fit(
        task,
        [batch],
        [batch],
        max_steps=4,
        limit_train_batches=4,
        enable_checkpointing=True,
        callbacks=[
            EMAWeightAveraging(decay=0.5),
            Recorded(),
            ModelCheckpoint(tmp_path / "checkpoints", filename="last"),
        ],
    )
    average = weights[0]
    for weight in weights[1:]:
        average = 0.5 * average + 0.5 * weight
    assert not torch.allclose(average, weights[-1])
    torch.testing.assert_close(validated[-1], average)
    saved = load_model(tmp_path / "checkpoints" / "last.ckpt")
    torch.testing.assert_close(saved.head.weight.detach(), average)


def test_bits_per_byte_are_exact_whatever_the_batches(make, fit):
    task, batch = make.task("causal_lm"), make.batch("causal_lm", size=5)
    batch["targets"][0, 3:] = IGNORE_INDEX
    batch["num_bytes"] = torch.tensor([3, 40, 7, 16, 30])
    logits = task.model(batch["tokens"])
    nats = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), batch["targets"].flatten(), reduction="sum"
    ).item()
    for split in ([5], [1, 4], [2, 2, 1]):
        parts = [dict(zip(batch, part, strict=True)) for part in
                 zip(*(tensor.split(split) for tensor in batch.values()), strict=True)]  # fmt: skip
        for part in parts:
            with torch.no_grad():
                task.update_metrics(part, dict(task.metrics["val"].items()))
        result = {name: metric.compute().item() for name, metric in task.metrics["val"].items()}
        for metric in task.metrics["val"].values():
            metric.reset()
        assert result["loss"] == pytest.approx(nats / 67, rel=1e-6)
        assert result["perplexity"] == pytest.approx(math.exp(nats / 67), rel=1e-6)
        assert result["bits_per_byte"] == pytest.approx(nats / math.log(2) / 96, rel=1e-6)


@pytest.mark.parametrize("name", TASKS)
def test_each_validation_starts_afresh(name, make, fit, tmp_path):
    task, batch = make.task(name), make.batch(name)
    fit(task, [batch], [batch, batch], max_steps=6, limit_train_batches=2)
    metrics = task.make_metrics()
    with torch.no_grad():
        task.eval()
        batch = task.prepared(batch)
        task.update_metrics(batch, metrics)
    losses = logged(tmp_path)["val/loss"]
    assert len(losses) == 3
    found = {name: metric.compute() for name, metric in metrics.items()}
    expected = found["retrieval"]["loss"] if name.endswith("_text") else found["loss"]
    assert losses[-1] == pytest.approx(expected.item(), rel=1e-5)


def test_packed_documents_and_padding_reach_the_attention(make):
    task, batch = make.task("causal_lm", "diff_v2"), make.batch("causal_lm")
    task.eval()
    document_ids = (torch.arange(16) >= 8).long().expand(6, -1)
    changed = {**batch, "tokens": batch["tokens"].clone()}
    changed["tokens"][:, :8] = 0
    for extra, leaks in (({}, True), ({"document_ids": document_ids}, False),
                         ({"key_padding": document_ids.bool()}, False)):  # fmt: skip
        ours = task.losses({**batch, **extra}).each[:, 8:]
        theirs = task.losses({**changed, **extra}).each[:, 8:]
        assert torch.equal(ours, theirs) != leaks


@pytest.mark.parametrize(
    ("name", "key", "value", "message"),
    [
        (
            "causal_lm",
            "tokens",
            24,
            "token 24 of sample 40 is outside the model's 24 token ids, 0 to 23",
        ),
        ("causal_lm", "tokens", -1, "token -1 of sample 40 is"),
        ("causal_lm", "tokens", IGNORE_INDEX, "token -100 of sample 40 is"),
        ("masked_lm", "targets", 99, "target 99 of sample 40 is outside the model's 24 token ids"),
        ("image", "labels", 7, "label 7 of sample 43 is outside the model's 7 classes, 0 to 6"),
        ("audio", "labels", -1, "label -1 of sample 43 is outside the model's 7 classes"),
    ],
)
def test_what_is_outside_the_model_is_named(name, key, value, message, make, fit):
    task, batch = make.task(name), make.batch(name)
    batch["index"] += 40
    batch[key].view(-1)[3] = value
    with pytest.raises(ValueError, match=message):
        fit(task, [batch])


def test_labels_of_the_other_kind_are_refused(make, fit):
    batch = make.batch("image")
    with pytest.raises(ValueError, match=r"shape \(6,\), but with multi_label=True and 7 classes"):
        fit(make.task("image", multi_label=True), [batch])
    batch["labels"] = torch.zeros(6, 7)
    with pytest.raises(ValueError, match=r"shape \(6, 7\), but with multi_label=False"):
        fit(make.task("image"), [batch])


def test_decoders_and_encoders_have_their_own_tasks(make):
    settings = (OptimizerConfig(1e-3), ScheduleConfig(10))
    with pytest.raises(ValueError, match="MaskedLM trains a text model with causal=False"):
        MaskedLM(make.text(causal=True), *settings)
    with pytest.raises(ValueError, match="CausalLM trains a text model with causal=True"):
        CausalLM(make.text(causal=False), *settings)


def test_classification_needs_classes_and_a_place_for_its_augmentation(make):
    settings = (OptimizerConfig(1e-3), ScheduleConfig(10))
    with pytest.raises(ValueError, match="ImageModel has num_classes=0"):
        Classification(ImageModel(make.image_config()), *settings)
    with pytest.raises(ValueError, match=r"label_smoothing must be in \[0, 1\), got 1.0"):
        Classification(make.image(), *settings, label_smoothing=1.0)
    with pytest.raises(ValueError, match="augment requires an audio model, got ImageModel"):
        Classification(make.image(), *settings, augment=torch.nn.Identity())


def test_another_library_s_model_trains_too(make, fit, tmp_path):
    timm = pytest.importorskip("timm")
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=8, patch_size=4, depth=1, num_classes=7
    )
    task = Classification(model, OptimizerConfig(1e-3), ScheduleConfig(10))
    trainer = fit(task, [make.batch("image")], max_steps=2)
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    assert "model" not in torch.load(tmp_path / "run.ckpt", weights_only=True)
    assert task.predict_step(make.batch("image"))["probabilities"].shape == (6, 7)


def test_predictions(make):
    batch = make.batch("audio")
    task = make.task("audio").eval()
    probabilities = task.predict_step(batch)["probabilities"]
    logits = task.model(*inputs_of(task.model, batch))
    torch.testing.assert_close(probabilities, logits.softmax(dim=1))
    several = make.task("audio", multi_label=True).eval()
    logits = several.model(*inputs_of(several.model, batch))
    torch.testing.assert_close(several.predict_step(batch)["probabilities"], logits.sigmoid())
