"""Loss and accuracy on batches of every modality equal those of the tasks."""

import pytest
import torch

import diffmm
from diffmm.analysis.batches import evaluate, mask_of
from diffmm.batch import IGNORE_INDEX
from diffmm.training import (
    CausalLM,
    Classification,
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
