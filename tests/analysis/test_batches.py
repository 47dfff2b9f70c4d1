"""Loss and accuracy on batches of every modality equal those of the tasks."""

from dataclasses import replace

import pytest
import torch

import diffmm
from diffmm.analysis.batches import evaluate, loss_of, mask_of
from diffmm.batch import IGNORE_INDEX
from diffmm.training import (
    CTC,
    Captioning,
    CausalLM,
    Classification,
    Contrastive,
    MaskedAutoencoding,
    OptimizerConfig,
    ScheduleConfig,
)

SETTINGS = OptimizerConfig(learning_rate=1e-3), ScheduleConfig(total_steps=1)


def text_batch(size):
    tokens = torch.randint(256, (size, 10))
    targets = tokens.roll(-1, dims=1)
    targets[0, :7] = IGNORE_INDEX
    documents = (torch.arange(10) > 4).long().expand(size, -1)
    return {"tokens": tokens, "targets": targets, "document_ids": documents}


def image_batch(size):
    return {"images": torch.rand(size, 1, 8, 8), "labels": torch.randint(10, (size,))}


def sound_batch(size):
    return {"waveforms": torch.rand(size, 8000), "labels": torch.randint(2, (size, 10)).float()}


@pytest.mark.parametrize(
    ("recipe", "make", "task", "settings"),
    [
        ("text/stdlib_tiny", text_batch, CausalLM, {}),
        ("image/digits_tiny", image_batch, Classification, {}),
        ("audio/sound_events_multilabel_tiny", sound_batch, Classification, {"multi_label": True}),
    ],
)
def test_losses_are_those_of_the_task(recipe, make, task, settings):
    model = diffmm.create_model(recipe, dropout=0.5).eval()
    if settings:
        model.reset_classifier(10)
    model.train()
    batches = [make(3), make(2)]
    found = evaluate(model, batches)
    assert model.training
    model.eval()
    of_task = task(model, *SETTINGS, **settings)
    metrics = of_task.make_metrics()
    with torch.no_grad():
        for batch in batches:
            of_task.update_metrics(batch, metrics)
    assert found["loss"] == pytest.approx(float(metrics["loss"].compute()), rel=1e-5)
    assert ("accuracy" in found) == ("accuracy" in metrics)
    if "accuracy" in metrics:
        assert found["accuracy"] == pytest.approx(float(metrics["accuracy"].compute()))


def pair_batch(model):
    """Four pairs, two of them with the same image, and texts of different lengths."""
    tokens, num_tokens = torch.randint(97, 123, (4, 6)), torch.tensor([6, 3, 4, 6])
    for row, length in zip(tokens, num_tokens, strict=True):
        row[length - 1 :] = 256
    if "images" in model.input_fields:
        (encoder,) = (part for part in model.children() if isinstance(part, diffmm.ImageModel))
        size = encoder.config.image_size
        media = {"images": torch.rand(4, 3, size, size)}
    else:
        media = {"waveforms": torch.rand(4, 16000), "num_samples": torch.tensor([16000] * 4)}
    media_index = torch.tensor([0, 0, 1, 2])
    return {**media, "tokens": tokens, "num_tokens": num_tokens, "media_index": media_index}


@pytest.mark.parametrize(
    ("recipe", "task", "num_targets", "settings"),
    [
        ("image_text/shapes_tiny", Contrastive, 4, {"loss": "clip"}),
        ("image_text/shapes_tiny", Contrastive, 4, {"loss": "siglip"}),
        ("image_text/shapes_captions_tiny", Captioning, 19, {"num_generated": 0}),
        ("audio_text/prompts_ctc_tiny", CTC, 15, {"word_error_rate": False}),
    ],
)
def test_losses_of_pairs_are_those_of_the_task(recipe, task, num_targets, settings):
    model = diffmm.create_model(recipe).eval()
    if task is Contrastive:
        init_bias = -3.0 if settings["loss"] == "siglip" else None
        model = type(model)(replace(model.config, init_bias=init_bias)).eval()
    batch = pair_batch(model)
    expected = task(model, *SETTINGS, **settings).loss_sum(batch, 0)
    total, count, correct = loss_of(model, batch)
    assert total.item() == pytest.approx(expected.total.item(), rel=1e-6)
    assert total.requires_grad
    assert (count, correct) == (num_targets, None)
    assert expected.num_targets == num_targets
    assert evaluate(model, [batch]) == {"loss": pytest.approx(total.item() / count, rel=1e-5)}
    with pytest.raises(ValueError, match=f"loss of {type(model).__name__} needs a batch of pairs"):
        loss_of(model, {"images": torch.rand(1, 3, 32, 32), "labels": torch.zeros(1)})


def test_a_masked_autoencoder_hides_the_same_patches_each_time():
    model = diffmm.create_model("image/digits_mae_tiny")
    task = MaskedAutoencoding(model, *SETTINGS)
    assert task.model is model
    batch = {"images": torch.rand(3, 1, 8, 8)}
    assert evaluate(model, [batch]) == evaluate(model, [batch]) != evaluate(model, [batch], seed=1)


def test_masks_have_the_documents_and_padding_of_the_batch():
    batch = {**text_batch(2), "key_padding": torch.ones(2, 10).bool()}
    mask = mask_of(diffmm.create_model("text/stdlib_tiny"), batch)
    assert mask.causal
    assert mask.document_ids is batch["document_ids"]
    assert mask.key_padding is batch["key_padding"]
    assert not mask_of(diffmm.create_model("text/stdlib_mlm_tiny"), {}).causal
    assert mask_of(diffmm.create_model("image/digits_tiny"), {}) is None


def test_batches_without_targets_are_refused():
    text, image = map(diffmm.create_model, ("text/stdlib_tiny", "image/digits_tiny"))
    with pytest.raises(ValueError, match="loss of a text model needs a batch with targets"):
        evaluate(text, [{"tokens": torch.zeros(1, 2).long()}])
    with pytest.raises(ValueError, match="loss of ImageModel needs classes and a batch of labels"):
        evaluate(image, [{"images": torch.rand(1, 1, 8, 8)}])
    with pytest.raises(ValueError, match="there are no targets"):
        evaluate(image, [])
