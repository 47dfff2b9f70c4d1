"""Contrastive training: losses against open_clip's, retrieval by hand, and the task's refusals."""

import math
from dataclasses import replace

import pytest
import torch
from torch.nn.functional import normalize

from diffmm.batch import samples_of
from diffmm.models import ContrastiveModel
from diffmm.models.weights import save_model
from diffmm.training import Contrastive, FineTuneConfig, LoRAConfig, OptimizerConfig, ScheduleConfig
from diffmm.training.contrastive_losses import Pairs, clip_loss, siglip_loss, text_ids
from diffmm.training.retrieval import Retrieval, as_floats, as_integers

open_clip_loss = pytest.importorskip("open_clip.loss")

BIAS = torch.tensor(-3.0, dtype=torch.float64)
LOSSES = {"clip": clip_loss, "siglip": siglip_loss}
OPEN_CLIP = {
    "clip": lambda x, y, scale, bias: open_clip_loss.ClipLoss()(x, y, scale),
    "siglip": lambda x, y, scale, bias: open_clip_loss.SigLipLoss()(x, y, scale, bias),
}


def embeddings(count=6, dim=5, dtype=torch.float64):
    return normalize(torch.randn(2, count, dim, dtype=dtype), dim=-1).unbind()


def pairs(media, texts, media_ids=None, text_ids=None):
    every = torch.arange(len(media))
    return Pairs(
        media,
        texts,
        every if media_ids is None else torch.tensor(media_ids),
        every if text_ids is None else torch.tensor(text_ids),
    )


@pytest.mark.parametrize("name", LOSSES)
def test_losses_and_gradients_of_open_clip(name):
    media, texts = embeddings()
    found = []
    for loss in (OPEN_CLIP[name], lambda x, y, scale, bias: LOSSES[name](
        pairs(x, y), pairs(x, y), 0, scale, bias) / len(x)):  # fmt: skip
        inputs = [x.clone().requires_grad_(True) for x in (media, texts, torch.tensor(9.0), BIAS)]
        value = loss(*inputs)
        found.append([value, *torch.autograd.grad(value, inputs, materialize_grads=True)])
    for theirs, ours in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert found[0][1].any()


@pytest.mark.parametrize("name", LOSSES)
def test_shares_add_up_to_the_whole(name):
    media, texts = embeddings()
    every = pairs(media, texts, [0, 1, 1, 3, 4, 5], [0, 1, 2, 0, 4, 5])
    whole = LOSSES[name](every, every, 0, torch.tensor(9.0), BIAS)
    parts = [
        LOSSES[name](Pairs(*(x[i : i + 2] for x in every)), every, i, torch.tensor(9.0), BIAS)
        for i in (0, 2, 4)
    ]
    torch.testing.assert_close(sum(parts), whole)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize(
    ("media_ids", "ids"), [([0, 1, 2, 0], [0, 1, 2, 3]), ([0, 1, 2, 3], [0, 1, 2, 0])]
)
def test_samples_that_match_are_no_negatives(name, media_ids, ids):
    """Samples 0 and 3 have the same medium or the same text: the similarity of one's medium and the
    other's text has no gradient, and that of all others has."""
    media, texts = (x.requires_grad_(True) for x in embeddings(4))
    own = pairs(media, texts, media_ids, ids)
    apart = torch.zeros(4, 4, dtype=torch.float64)
    for row in range(4):
        scale = torch.ones((), dtype=torch.float64)
        single = Pairs(*(x[row : row + 1] for x in own))
        loss = LOSSES[name](single, own, row, scale, BIAS)
        (gradient,) = torch.autograd.grad(loss, texts, materialize_grads=True)
        # Of the medium's row: the gradient of a text is a multiple of the medium, except its own.
        apart[row] = gradient.abs().sum(dim=1)
    known = torch.zeros(4, 4, dtype=torch.bool)
    known[0, 3] = known[3, 0] = True
    assert torch.equal(apart == 0, known)


def test_duplicates_alone_cost_nothing():
    """Two samples of one text: nothing is wrong with equal embeddings."""
    media = normalize(torch.ones(2, 5), dim=-1)
    own = pairs(media, media, [0, 1], [7, 7])
    assert clip_loss(own, own, 0, torch.tensor(10.0), None) == 0.0
    expected = 2 * math.log1p(math.exp(-7.0))
    assert siglip_loss(own, own, 0, torch.tensor(10.0), BIAS.float()).item() == pytest.approx(
        expected
    )


def test_similarities_are_not_rounded_under_autocast():
    media, texts = embeddings(8, 16, torch.float32)
    own, scale = pairs(media, texts), torch.tensor(100.0)
    expected = clip_loss(own, own, 0, scale, None)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(clip_loss(own, own, 0, scale, None), expected)


def test_texts_are_the_same_whatever_their_padding():
    tokens = torch.tensor([[5, 2, 9, 9], [5, 2, 0, 0], [2, 5, 0, 0], [5, 2, 9, 9], [0, 0, 0, 0]])
    found = text_ids(tokens, torch.tensor([2, 2, 2, 3, 1]))
    assert found[0] == found[1]
    assert len(found.unique()) == 4
    longer = text_ids(torch.cat([tokens, tokens], dim=1), torch.tensor([2, 2, 2, 3, 1]))
    assert torch.equal(found, longer)
    many = torch.randint(300, (20_000, 30)).unique(dim=0)
    assert len(text_ids(many, torch.full((len(many),), 30)).unique()) == len(many)


def test_integers_are_stored_exactly():
    values = torch.tensor([0, 1, -1, 2**24 + 1, 2**62 + 12345, -(2**63), 2**63 - 1, 123456789012])
    assert torch.equal(as_integers(as_floats(values)), values)
    assert as_floats(values).dtype == torch.float32


def measured(own, loss="clip", sizes=(100,), scale=1.0):
    metric, first = Retrieval(own.media.shape[1], loss), 0
    index = torch.arange(len(own.media))
    for size in sizes:
        part = slice(first, first + size)
        batch = Pairs(*(x[part] for x in own))
        metric.update(batch, index[part], torch.tensor(scale), None)
        first += size
    return {name: value.item() for name, value in metric.compute().items()}


def test_recall_by_hand():
    """Media along the axes; texts at known angles to them."""
    media, texts = torch.eye(4), torch.eye(4)[[0, 1, 3, 2]]
    found = measured(pairs(media, texts))
    assert found["media_to_text_recall_1"] == found["text_to_media_recall_1"] == 0.5
    assert found["media_to_text_recall_5"] == found["text_to_media_recall_10"] == 1.0


def test_several_texts_of_a_medium_count_once():
    """Medium 0 has two texts, one of which is the nearest to it; both are counted as queries."""
    media = torch.eye(3)[[0, 0, 1]]
    texts = torch.tensor([[1.0, 0, 0], [0, 0.6, 0.8], [0, 1.0, 0]])
    found = measured(pairs(media, texts, [7, 7, 9]))
    assert found["media_to_text_recall_1"] == 1.0
    assert found["text_to_media_recall_1"] == pytest.approx(2 / 3)


def test_a_text_of_several_media_matches_all_of_them():
    media, texts = torch.eye(3), torch.eye(3)[[0, 0, 2]]
    found = measured(pairs(media, texts, text_ids=[5, 5, 6]))
    # Medium 1 is as similar to the other text as to its own; the text finds medium 0.
    assert found["media_to_text_recall_1"] == pytest.approx(2 / 3)
    assert found["text_to_media_recall_1"] == 1.0


@pytest.mark.parametrize("value", [1.0, math.nan])
def test_a_model_that_embeds_everything_alike_finds_nothing(value):
    same = normalize(torch.full((20, 4), value), dim=-1)
    found = measured(pairs(same, same))
    assert all(found[name] == 0.0 for name in found if "recall" in name)


@pytest.mark.parametrize("loss", LOSSES)
def test_an_evaluation_does_not_depend_on_its_batches(loss, monkeypatch):
    monkeypatch.setattr("diffmm.training.retrieval.ROWS", 5)
    own = pairs(*embeddings(13, 4, torch.float32), [i // 2 for i in range(13)])
    whole = measured(own, loss, scale=5.0)
    assert measured(own, loss, (1, 2, 7, 3), scale=5.0) == pytest.approx(whole, rel=1e-6)
    expected = LOSSES[loss](own, own, 0, torch.tensor(5.0), torch.tensor(0.0)) / 13
    assert whole["loss"] == pytest.approx(expected.item(), rel=1e-6)


def test_recall_at_k_by_sorting():
    own = pairs(*embeddings(40, 4, torch.float32), [i // 2 for i in range(40)])
    found = measured(own)
    media = own.media[::2]
    ranked = (media @ own.texts.T).argsort(dim=1, descending=True)
    for k in (1, 5, 10):
        hits = (ranked[:, :k] // 2 == torch.arange(20)[:, None]).any(dim=1)
        assert found[f"media_to_text_recall_{k}"] == pytest.approx(hits.float().mean().item())
    ranked = (own.texts @ media.T).argsort(dim=1, descending=True)
    for k in (1, 5, 10):
        hits = (ranked[:, :k] == torch.arange(40)[:, None] // 2).any(dim=1)
        assert found[f"text_to_media_recall_{k}"] == pytest.approx(hits.float().mean().item())


@pytest.mark.filterwarnings("ignore:The ``compute`` method of metric Retrieval was called before")
def test_an_evaluation_without_samples_is_not_a_number():
    assert all(value.isnan() for value in Retrieval(4, "clip").compute().values())


SETTINGS = (OptimizerConfig(1e-2), ScheduleConfig(10, kind="constant"))


def test_the_scale_stays_below_its_bound(make, fit):
    task = make.task("image_text", model={"max_scale": 15.0}, optimizer=OptimizerConfig(1e-6))
    with torch.no_grad():
        task.model.logit_scale.fill_(math.log(30.0))
    fit(task, [make.batch("image_text")], max_steps=1)
    assert task.model.scale.item() == pytest.approx(15.0)


def test_scale_and_bias_do_not_decay(make):
    task = make.task("image_text", model={"init_bias": -10.0}, loss="siglip")
    from diffmm.training.optimizer import parameter_groups

    (group,) = [g for g in parameter_groups(task.model, SETTINGS[0]) if g["name"] == "no_decay"]
    plain = {id(parameter) for parameter in group["params"]}
    assert {id(task.model.logit_scale), id(task.model.logit_bias)} <= plain


def test_towers_start_from_weights_and_stay_frozen(make, fit, tmp_path):
    """A tower with the weights of a classifier, all of it frozen but its projection."""
    classifier = make.image()
    file = save_model(classifier, tmp_path / "classifier.safetensors")
    start = FineTuneConfig(weights=str(file), freeze="all_but_head")
    task = make.task("image_text", image=start)
    before = task.model.text.embedding.weight.clone()
    head = task.model.image.head.weight.clone()
    trainer = fit(task, [make.batch("image_text")], max_steps=2)
    for name, weight in task.model.image.state_dict().items():
        if name.startswith("head."):
            assert not torch.equal(weight, head)
        else:
            assert torch.equal(weight, classifier.state_dict()[name]), name
    assert not task.model.image.backbone.training
    assert task.model.text.backbone.training
    assert not torch.equal(task.model.text.embedding.weight, before)
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    again = Contrastive.load_from_checkpoint(tmp_path / "run.ckpt")
    assert again.image == FineTuneConfig(freeze="all_but_head")
    assert not again.model.image.cls_token.requires_grad


def contrastive(make, model=None, **settings):
    return make.task("image_text", model=model or {}, **settings)


@pytest.mark.parametrize(
    ("model", "settings", "message"),
    [
        ({}, {"loss": "sigmoid"}, "loss must be one of 'clip', 'siglip', got 'sigmoid'"),
        ({}, {"loss": "siglip"}, "loss='siglip' needs a bias: set the model's init_bias"),
        ({"init_bias": -10.0}, {}, "'clip' does not depend on a bias, .* init_bias=-10.0"),
        ({}, {"audio": FineTuneConfig(freeze=1)}, "audio is for a model .* are image and text"),
        ({}, {"text": FineTuneConfig(lora=LoRAConfig())}, "text.lora is not supported"),
        (
            {"shared_blocks": 1},
            {"text": FineTuneConfig(freeze=2)},
            "text.freeze=2 would freeze blocks that all towers share: freeze at most 1",
        ),
        (
            {"shared_blocks": 1},
            {"image": FineTuneConfig(freeze="all_but_head")},
            "image.freeze='all_but_head' would freeze blocks that all towers share",
        ),
        (
            {"shared_blocks": 1},
            {"image": FineTuneConfig(weights="a"), "text": FineTuneConfig(weights="b")},
            "image and text share 1 blocks, whose weights cannot be those of several files",
        ),
    ],
)
def test_settings_that_do_not_fit_are_refused(model, settings, message, make):
    with pytest.raises(ValueError, match=message):
        contrastive(make, model, **settings)


def test_another_model_is_refused(make):
    with pytest.raises(ValueError, match="needs a ContrastiveModel, got ImageModel"):
        Contrastive(make.image(), *SETTINGS)


def test_accumulated_gradients_are_refused(make, fit):
    with pytest.raises(ValueError, match="accumulate_grad_batches=2 is not supported"):
        fit(make.task("image_text"), [make.batch("image_text")], accumulate_grad_batches=2)


def test_batches_are_checked(make, fit):
    task, batch = make.task("image_text"), make.batch("image_text")
    endless, unknown = batch["tokens"].clone(), batch["tokens"].clone()
    endless[2], unknown[1, 0] = 3, 99
    with pytest.raises(ValueError, match="the text of sample 2 does not contain the model's eos_i"):
        task.check_batch({**batch, "tokens": endless})
    with pytest.raises(ValueError, match="token 99 of sample 1 is outside the model's 24 tokens"):
        task.check_batch({**batch, "tokens": unknown})
    begun = batch["tokens"].clone()
    begun[4, 0] = 23
    with pytest.raises(ValueError, match="text of sample 4 has .* but pool='eos' takes number 1:"):
        task.check_batch({**batch, "tokens": begun})
    config = task.model.config
    by_id = replace(config, text=replace(config.text, pool="argmax", eos_id=None))
    highest = Contrastive(ContrastiveModel(by_id), *SETTINGS)
    highest.check_batch(batch)
    with pytest.raises(ValueError, match="text of sample 2 has .* but pool='argmax' takes number"):
        highest.check_batch({**batch, "tokens": endless})
    del batch["num_tokens"]
    with pytest.raises(ValueError, match="must have tokens, num_tokens and images, got ima"):
        task.check_batch(batch)


def test_tuples_are_batches(make, fit):
    batch = make.batch("image_text")
    task = make.task("image_text")
    fit(task, [batch], max_steps=1)
    found = task.prepared((batch["images"], batch["tokens"], batch["num_tokens"]))
    assert list(found) == ["images", "tokens", "num_tokens"]


def test_a_batch_of_one_sample_is_refused(make, fit):
    with pytest.raises(ValueError, match="a batch of one sample has no negatives"):
        fit(make.task("image_text"), [make.batch("image_text", 1)])


def test_towers_without_gradients_need_a_strategy_that_allows_them(make, fit, monkeypatch):
    monkeypatch.setattr("diffmm.training.contrastive.needs_all_gradients", lambda trainer: True)
    fit(make.task("image_text"), [make.batch("image_text")], max_steps=1, logger=False)
    message = (
        "the audio tower has no gradients, as the batch has only images, .* or set --trainer.s"
    )
    with pytest.raises(ValueError, match=message):
        fit(both(make), [make.batch("image_text")])
    with pytest.raises(ValueError, match="the image tower has no gradients, .* only waveforms"):
        fit(both(make), [make.batch("audio_text")], logger=False)
    fit(both(make), [mixed(make)], max_steps=1, logger=False)
    frozen = both(make, audio=FineTuneConfig(freeze="all"))
    fit(frozen, [make.batch("image_text")], max_steps=1, logger=False)


def both(make, **settings):
    """A task with an image and an audio tower."""
    return make.task("image_text", model={"audio": make.audio_config()}, **settings)


def mixed(make):
    """A batch of six images and four sounds, with texts in common."""
    images, sounds = make.batch("image_text"), make.batch("audio_text", 4)
    shared = {name: torch.cat([images.pop(name), sounds.pop(name)]) for name in TEXTS}
    shared["index"] = torch.arange(10)
    shared["tokens"][7] = shared["tokens"][1]
    shared["num_tokens"][7] = shared["num_tokens"][1]
    return {**images, **sounds, **shared}


TEXTS = ("tokens", "num_tokens", "media_index", "index")


def test_a_mixed_batch_is_compared_as_a_whole(make):
    task, batch = both(make).eval(), mixed(make)
    images, sounds = samples_of(batch, slice(6)), samples_of(batch, slice(6, None))
    assert "waveforms" not in images
    assert "images" not in sounds
    apart = [task.pairs(part, task.embeddings(part)) for part in (images, sounds)]
    # No sound has the number of an image, but a text of both is no negative.
    whole = Pairs(*(torch.cat(each) for each in zip(*apart, strict=True)))
    assert len(whole.media_ids.unique()) == 10
    assert whole.text_ids[7] == whole.text_ids[1]
    found = task.loss_sum(batch, 0)
    torch.testing.assert_close(found.total, clip_loss(whole, whole, 0, task.model.scale, None))
    assert found.num_targets == 10
    embedded = task.embeddings(batch)
    torch.testing.assert_close(embedded.media[:6], task.model.encode_image(batch["images"]))
    torch.testing.assert_close(embedded.texts[6:], task.embeddings(sounds).texts)


def test_every_step_on_a_mixed_batch_trains_all_towers(make, fit):
    task, batch = both(make), mixed(make)
    fit(task, [batch], max_steps=1, val_batches=[batch, samples_of(batch, slice(2))])
    assert all(p.grad is not None for p in task.parameters() if p.requires_grad)


def test_recall_of_each_modality(make):
    """Alone, images find their texts among those of images, and sounds theirs; together, among
    all."""
    eye = torch.eye(4)
    metric = Retrieval(4, "clip", ("image", "audio"))
    # Sound 0 is as near to its own text as to that of image 0, sounds 1 and 2 are not near theirs.
    images = pairs(eye[:2], eye[:2])
    sounds = pairs(eye[[0, 2, 3]], eye[[0, 3, 2]], [~0, ~1, ~2], [4, 5, 6])
    scale = torch.tensor(1.0)
    metric.update(images, torch.tensor([0, 1]), scale, None, "image")
    metric.update(sounds, torch.tensor([2, 3, 4]), scale, None, "audio")
    found = {name: value.item() for name, value in metric.compute().items()}
    assert found["image_to_text_recall_1"] == found["text_to_image_recall_1"] == 1.0
    assert found["audio_to_text_recall_1"] == pytest.approx(1 / 3)
    assert found["media_to_text_recall_1"] == pytest.approx(1 / 5)  # image 1
    assert found["media_to_text_recall_5"] == 1.0
    whole = Pairs(*(torch.cat(each) for each in zip(images, sounds, strict=True)))
    for name, own in (("image_loss", images), ("audio_loss", sounds), ("loss", whole)):
        expected = clip_loss(own, own, 0, scale, None).item() / len(own.media)
        assert found[name] == pytest.approx(expected)


def test_a_batch_lacks_no_text(make):
    batch = mixed(make)
    batch["tokens"], batch["num_tokens"] = batch["tokens"][:9], batch["num_tokens"][:9]
    with pytest.raises(ValueError, match="got 9 texts of 6 images and 4 waveforms"):
        both(make).check_batch(batch)


def test_scale_and_bias_stay_exact_in_half_precision(make, fit):
    task = make.task("image_text", model={"init_bias": -10.0}, loss="siglip")
    fit(task, [make.batch("image_text")], max_steps=1, precision="bf16-true")
    dtypes = {name: p.dtype for name, p in task.model.named_parameters()}
    exact = {name for name, dtype in dtypes.items() if dtype == torch.float32}
    assert {"logit_scale", "logit_bias"} == {name for name in exact if "lambda_" not in name}
    assert dtypes["image.head.weight"] == torch.bfloat16
    assert task.model.scale.item() != pytest.approx(1 / 0.07, rel=1e-6)  # it was trained


def test_both_media_share_a_space(make, fit):
    """One model trains on images with texts, and on sounds with texts."""
    task = both(make)
    batches = [make.batch("image_text"), make.batch("audio_text")]
    fit(task, batches, max_steps=2)
    assert all(p.grad is None or p.grad.isfinite().all() for p in task.model.parameters())
    ids = [task.pairs(b, task.embeddings(b)).media_ids.tolist() for b in batches]
    assert len({*ids[0], *ids[1]}) == 12  # no sound has the number of an image
    assert task.layouts() == [
        ("images", "tokens", "num_tokens"),
        ("waveforms", "num_samples", "tokens", "num_tokens"),
    ]
