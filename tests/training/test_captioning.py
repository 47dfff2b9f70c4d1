"""Training of captioning models: metrics by hand, parts that start from weights, refusals."""

from functools import partial

import pytest
import torch

from diffmm.batch import IGNORE_INDEX
from diffmm.models.job import Job
from diffmm.models.weights import save_model
from diffmm.tokenizers import until
from diffmm.training import Captioning, FineTuneConfig, LoRAConfig, OptimizerConfig, ScheduleConfig
from diffmm.training.captioning import is_exact
from diffmm.training.writing import targets_of

SETTINGS = OptimizerConfig(1e-3), ScheduleConfig(10)
EOS = 9
BATCH = {
    "tokens": torch.tensor([[4, 5, EOS, EOS], [4, 5, 6, EOS], [7, EOS, 0, 0]]),
    "num_tokens": torch.tensor([3, 4, 2]),
}


def test_texts_are_exact_up_to_their_end():
    found = torch.tensor([[4, 5, EOS, EOS, EOS], [4, 5, 6, 6, EOS], [7, EOS, EOS, EOS, EOS]])
    assert is_exact(found, BATCH).tolist() == [True, False, True]
    # Of a text that was stopped, its end is not known; a shorter one is another.
    assert is_exact(torch.tensor([[4, 5], [4, 5], [7, 7]]), BATCH).tolist() == [True, False, False]


def test_targets_have_no_padding():
    assert targets_of(BATCH).tolist() == [
        [4, 5, EOS, IGNORE_INDEX],
        [4, 5, 6, EOS],
        [7, EOS, IGNORE_INDEX, IGNORE_INDEX],
    ]
    assert until(BATCH["tokens"].tolist(), EOS) == [[4, 5], [4, 5, 6], [7]]


@pytest.mark.parametrize("name", ["image_captions", "audio_cross_captions"])
def test_texts_that_are_known_by_heart_match(name, make, fit):
    batch = make.batch(name)
    task = make.task(name, optimizer=OptimizerConfig(1e-2))
    trainer = fit(task, [batch], [batch], max_steps=80, limit_train_batches=80)
    assert trainer.callback_metrics["val/exact_match"] == 1.0
    assert trainer.callback_metrics["val/loss"] < 0.1
    task.eval()
    found = task.predict_step(batch)
    assert found["tokens"].shape == (6, 12)
    assert (found["nats"] / batch["num_tokens"]).mean() < 0.1
    ends = (batch["num_tokens"] - 1).tolist()
    for row, text, end in zip(found["tokens"], batch["tokens"], ends, strict=True):
        assert torch.equal(row[: end + 1], text[: end + 1])
        assert (row[end:] == make.vocab_size - 1).all()
    # The first token of another picture or sound's text is another one.
    media = "images" if name.startswith("image") else "waveforms"
    batch = {**batch, media: batch[media].flip(0)}
    assert not is_exact(task.generate(batch), batch).all()


@pytest.mark.parametrize(("wanted", "expected"), [(0, 0), (1, 6), (7, 12), (100, 18)])
def test_so_many_texts_are_generated(wanted, expected, make, fit, monkeypatch):
    made = []
    generate = Captioning.generate

    def counted(task, batch):
        made.append(len(batch["tokens"]))
        return generate(task, batch)

    monkeypatch.setattr(Captioning, "generate", counted)
    batch = make.batch("image_captions")
    task = make.task("image_captions", num_generated=wanted)
    trainer = fit(task, [batch], [batch] * 3, limit_train_batches=1)
    assert sum(made) == expected
    assert ("val/exact_match" in trainer.callback_metrics) == bool(wanted)


def constant(task, batch):
    """A loss that does not depend on the batch."""
    return task.model.decoder.losses(torch.zeros(1, 32), torch.zeros(1).long())


def test_word_error_rate_by_hand(make, fit, monkeypatch):
    """Of ten words, one is wrong, one is missing, and there is one too many."""
    told = ["a red cat", "a dog", "one two two three four"]
    found = ["a big cat", "dog", "one two two two three four"]
    task = make.task("image_captions", word_error_rate=True)
    job = Job(reader={"class_path": "datamodules.pairs.ImageTextReader",
                      "init_args": {"tokenizer": "bytes", "definition": None}})  # fmt: skip
    monkeypatch.setattr(Captioning, "make_job", lambda task, data: job)
    monkeypatch.setattr(Captioning, "check_batch", lambda task, batch: None)

    def coded(texts):
        rows = [torch.tensor([*text.encode(), 256]) for text in texts]
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=256)

    monkeypatch.setattr(Captioning, "generate", lambda task, batch: coded(found))
    monkeypatch.setattr(Captioning, "losses", constant)
    batch = make.batch("image_captions", 3)
    lengths = torch.tensor([len(text) + 1 for text in told])
    batch |= {"tokens": coded(told), "num_tokens": lengths}
    metrics = fit(task, [batch], [batch], limit_train_batches=1).callback_metrics
    assert metrics["val/word_error_rate"] == pytest.approx(3 / 10)
    assert metrics["val/exact_match"] == 0.0


@pytest.mark.parametrize("name", ["image_captions", "image_cross_captions"])
def test_parts_start_from_weights_and_stay_frozen(name, make, fit, tmp_path):
    """The encoder of a classifier is frozen as a whole; the decoder starts from a language model,
    without its head, and its first block is frozen, except its cross-attention."""
    classifier, text = make.image(), make.text()
    files = [str(save_model(model, tmp_path / f"{number}.safetensors"))
             for number, model in enumerate((classifier, text))]  # fmt: skip
    task = make.task(
        name,
        encoder=FineTuneConfig(weights=files[0], freeze="all"),
        decoder=FineTuneConfig(weights=files[1], new_head=False, freeze=1),
    )
    new = {key: weight.clone() for key, weight in task.model.decoder.state_dict().items()
           if "cross_attention" in key}  # fmt: skip
    trainer = fit(task, [make.batch(name)], max_steps=2)
    for name, weight in task.model.encoder.state_dict().items():
        assert torch.equal(weight, classifier.state_dict()[name]), name
    for name, weight in task.model.decoder.state_dict().items():
        if name in new:
            assert not torch.equal(weight, new[name]), name
            continue
        is_frozen = name.startswith(("embedding", "backbone.blocks.0"))
        assert torch.equal(weight, text.state_dict()[name]) == is_frozen, name
    assert not any(module.training for module in task.model.encoder.modules())
    assert task.model.decoder.backbone.blocks[1].training
    assert task.model.projector[0].weight.requires_grad
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    again = Captioning.load_from_checkpoint(tmp_path / "run.ckpt")
    assert again.encoder == FineTuneConfig(freeze="all")
    assert not any(p.requires_grad for p in again.model.encoder.parameters())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be an integer of at least 1, got 0"),
        ({"num_generated": -1}, "num_generated must be an integer of at least 0, got -1"),
        (
            {"num_generated": 0, "word_error_rate": True},
            "word_error_rate is that of generated texts: set num_generated",
        ),
        ({"encoder": FineTuneConfig(lora=LoRAConfig())}, "encoder.lora is not supported"),
        ({"finetune": FineTuneConfig(freeze="all")}, "freeze='all' would leave nothing to train"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings, message, make):
    with pytest.raises(ValueError, match=message):
        make.task("image_captions", **settings)


def test_another_model_is_refused(make):
    with pytest.raises(ValueError, match="needs a CaptioningModel, got ImageModel"):
        Captioning(make.image(), *SETTINGS)


def test_word_error_rate_needs_a_tokenizer(make, fit):
    with pytest.raises(ValueError, match="need data that name their tokenizer, such as those of"):
        fit(make.task("image_captions", word_error_rate=True), [make.batch("image_captions")])


def test_batches_are_checked(make):
    task, batch = make.task("audio_captions"), make.batch("audio_captions")
    check = partial(pytest.raises, ValueError)
    unknown, endless = batch["tokens"].clone(), batch["tokens"].clone()
    unknown[1, 0] = 99
    endless[2, batch["num_tokens"][2] - 1] = 3
    with check(match="token 99 of sample 1 is outside the model's 24 token ids"):
        task.check_batch({**batch, "tokens": unknown})
    with check(match="must be the same end of text, but it is 23 and 3"):
        task.check_batch({**batch, "tokens": endless})
    del batch["waveforms"]
    with check(match="must have tokens, num_tokens and waveforms, got num_samples, "):
        task.check_batch(batch)


def test_tuples_are_batches(make, fit):
    batch, task = make.batch("audio_captions"), make.task("audio_captions")
    fit(task, [batch], max_steps=1)
    names = ["waveforms", "num_samples", "tokens", "num_tokens"]
    assert list(task.prepared(tuple(batch[name] for name in names))) == names
    short = [names[0], *names[2:]]
    assert list(task.prepared(tuple(batch[name] for name in short))) == short


def test_spectrograms_are_augmented_in_training_only(make, fit):
    seen = []

    class Silence(torch.nn.Module):
        def forward(self, spectrogram):
            seen.append(self.training)
            return torch.zeros_like(spectrogram)

    task, batch = make.task("audio_captions", augment=Silence()), make.batch("audio_captions")
    fit(task, [batch], [batch], max_steps=1)
    assert seen == [True]
    with pytest.raises(ValueError, match="augment requires an audio encoder, got ImageModel"):
        make.task("image_captions", augment=Silence())
