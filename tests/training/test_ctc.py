"""Training by CTC: the loss, what is too long, word error rate, refusals."""

import dataclasses

import pytest
import torch

from diffmm.models import CTCConfig, CTCModel
from diffmm.models.job import Job
from diffmm.models.weights import save_model
from diffmm.training import CTC, FineTuneConfig, LoRAConfig, OptimizerConfig, ScheduleConfig

SETTINGS = OptimizerConfig(3e-3), ScheduleConfig(1000, kind="constant")
BLANK = 256
JOB = Job(reader={"class_path": "datamodules.pairs.AudioTextReader",
                  "init_args": {"tokenizer": "bytes", "definition": None}})  # fmt: skip


@pytest.fixture(autouse=True)
def _job(monkeypatch):
    monkeypatch.setattr(CTC, "make_job", lambda task, data: JOB)


def task_of(make, **settings):
    config = make.audio_config(rope="2d")
    # One token per time.
    config = dataclasses.replace(config, patch_size=(2, 8))
    model = CTCModel(CTCConfig(encoder=config, vocab_size=259, blank_id=BLANK))
    return CTC(model, *settings.pop("optimizer", SETTINGS), **settings)


TEXTS = ("a b", "cc", "dog", "e f g", "hh", "i")


def batch_of(make):
    """Tones, each with a text."""
    lengths = torch.tensor([len(text) + 1 for text in TEXTS])
    tokens = torch.full((6, int(lengths.max())), BLANK)
    for row, text in zip(tokens, TEXTS, strict=True):
        row[: len(text)] = torch.tensor(list(text.encode()))
    pitch = torch.tensor([0.1, 0.25, 0.5, 1.0, 1.6, 2.4])[:, None]
    waveforms = 0.5 * (torch.arange(2000) * pitch).sin()
    return {
        "waveforms": waveforms,
        "num_samples": torch.full((6,), 2000),
        "tokens": tokens,
        "num_tokens": lengths,
        "index": torch.arange(6) + 40,
    }


def test_texts_are_learned_by_heart(make, fit, tmp_path):
    batch = batch_of(make)
    task = task_of(make, optimizer=(OptimizerConfig(1e-2), SETTINGS[1]))
    trainer = fit(task, [batch], [batch], max_steps=120, limit_train_batches=120)
    assert trainer.callback_metrics["val/loss"] < 0.1
    assert trainer.callback_metrics["val/word_error_rate"] == 0.0
    task.eval()
    assert task.texts(task.predict_step(batch)["tokens"]) == list(TEXTS)
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    again = CTC.load_from_checkpoint(tmp_path / "run.ckpt").eval()
    assert torch.equal(again.predict_step(batch)["tokens"], task.predict_step(batch)["tokens"])


def test_losses_are_those_of_torch_one_by_one(make):
    task, batch = task_of(make), batch_of(make)
    with torch.no_grad():
        found = task.model(batch["waveforms"], batch["num_samples"])
    each, count = task.losses(batch, found)
    assert count == sum(map(len, TEXTS))
    for row, text in enumerate(TEXTS):
        expected = torch.nn.functional.ctc_loss(
            found.logits[row, : found.lengths[row]].log_softmax(-1),
            torch.tensor(list(text.encode())),
            (int(found.lengths[row]),),
            (len(text),),
            blank=BLANK,
            reduction="sum",
        )
        torch.testing.assert_close(each[row], expected)


def test_texts_that_are_too_long_are_named_or_left_out(make, fit):
    batch = batch_of(make)
    batch["num_samples"][3] = 300
    times = int(task_of(make).model.num_times(batch["waveforms"], batch["num_samples"])[3])
    with pytest.raises(
        ValueError,
        match=f"the text of sample 43 needs 5 tokens of the encoder, but its sound has {times}:",
    ):
        fit(task_of(make), [batch])
    task = task_of(make, skip_too_long=True)
    fit(task, [batch], max_steps=1)
    each, count = task.losses(batch, task.model(batch["waveforms"], batch["num_samples"]))
    assert (each > 0).tolist() == [True, True, True, False, True, True]
    assert count == sum(map(len, TEXTS)) - 5


def test_the_encoder_starts_from_weights(make, fit, tmp_path):
    task = task_of(make)
    file = str(save_model(task.model.encoder, tmp_path / "encoder.safetensors"))
    torch.manual_seed(1)
    other = task_of(make, encoder=FineTuneConfig(weights=file, freeze="all"))
    fit(other, [batch_of(make)], max_steps=2)
    for name, weight in task.model.encoder.state_dict().items():
        assert torch.equal(weight, other.model.encoder.state_dict()[name]), name
    assert other.model.head.weight.requires_grad


def test_refusals(make, fit, monkeypatch):
    with pytest.raises(ValueError, match="CTC needs a CTCModel, got AudioModel"):
        CTC(make.audio(), *SETTINGS)
    with pytest.raises(ValueError, match=r"encoder\.lora is not supported: give finetune\.lora"):
        task_of(make, encoder=FineTuneConfig(lora=LoRAConfig()))
    batch = batch_of(make)
    batch["tokens"][batch["tokens"] == BLANK] = 10
    with pytest.raises(ValueError, match="the texts end with 10, but the model's blank_id is 256"):
        fit(task_of(make), [batch])
    monkeypatch.setattr(CTC, "make_job", lambda task, data: Job())
    with pytest.raises(ValueError, match="texts need data that name their tokenizer, such as"):
        fit(task_of(make), [batch_of(make)])


def test_packed_rows_are_refused(make):
    packed = {**batch_of(make), "document_ids": torch.zeros(6, 6).long()}
    with pytest.raises(ValueError, match="packed rows are for captioning: set the data's pairs_p"):
        task_of(make).check_batch(packed)
    pairs = {**make.batch("image_text"), "document_ids": torch.zeros(6, 12).long()}
    with pytest.raises(ValueError, match="packed rows are for captioning: set the data's pairs_p"):
        make.task("image_text").check_batch(pairs)
