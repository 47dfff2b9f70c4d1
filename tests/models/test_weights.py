"""Weights are saved with their architecture, and are loaded completely or not at all."""

import dataclasses
import json
import resource
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from diffmm.models import (
    AudioConfig,
    AudioModel,
    Backbone,
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
from diffmm.models.weights import build, describe, load_model, load_weights, save_model


def text_model(*, tie_embeddings=True, **changes):
    backbone = {"dim": 32, "depth": 2, "num_heads": 4, "rope": "1d"} | changes
    config = TextConfig(
        vocab_size=50,
        max_length=16,
        backbone=BackboneConfig(**backbone),
        tie_embeddings=tie_embeddings,
    )
    return TextModel(config).eval()


def image_config(**changes):
    fields = {
        "image_size": (16, 8),
        "patch_size": 4,
        "num_classes": 5,
        "backbone": BackboneConfig(dim=32, depth=2, num_heads=4, rope="none"),
        "learned_positions": True,
    }
    return ImageConfig(**(fields | changes))


def audio_config(**changes):
    fields = {
        "sample_rate_hz": 8000,
        "num_mels": 32,
        "patch_size": (8, 8),
        "clip_seconds": 0.4,
        "num_classes": 3,
        "backbone": BackboneConfig(dim=32, depth=2, num_heads=4, rope="2d"),
    }
    return AudioConfig(**(fields | changes))


def masked_autoencoder(encoder):
    encoder = dataclasses.replace(encoder, num_classes=0)
    decoder = BackboneConfig(dim=16, depth=1, num_heads=2, rope="none")
    return MaskedAutoencoder(MaskedAutoencoderConfig(encoder=encoder, decoder=decoder))


def contrastive_config(**changes):
    backbone = BackboneConfig(dim=32, depth=2, num_heads=4, rope="none")
    text = TextTowerConfig(vocab_size=50, max_length=8, backbone=backbone)
    return ContrastiveConfig(image=image_config(num_classes=6), text=text, embed_dim=6, **changes)


def captioning(encoder, **changes):
    text = TextConfig(50, 40, BackboneConfig(dim=24, depth=2, num_heads=4, rope="1d"))
    encoder = dataclasses.replace(encoder, num_classes=0)
    return CaptioningModel(CaptioningConfig(encoder=encoder, decoder=text, **changes))


MAKERS = {
    "text": text_model,
    "untied": lambda: text_model(tie_embeddings=False),
    "softmax": lambda: text_model(attention="softmax", cosine_logits=True),
    "v2": lambda: text_model(attention="diff_v2", num_kv_heads=2),
    "image": lambda: ImageModel(image_config()),
    "audio": lambda: AudioModel(audio_config()),
    "masked image": lambda: masked_autoencoder(image_config()),
    "masked audio": lambda: masked_autoencoder(audio_config()),
    "image and text": lambda: ContrastiveModel(contrastive_config()),
    "captions": lambda: captioning(image_config()),
    "transcripts": lambda: captioning(audio_config(), projector="mlp"),
    "cross-attention": lambda: captioning(
        image_config(),
        media="cross_attention",
        cross_attention_every=2,
        cross_attention_gate=True,
    ),
    "ctc": lambda: CTCModel(
        CTCConfig(
            encoder=audio_config(num_classes=0, patch_size=(4, audio_config().num_mels)),
            vocab_size=9,
            blank_id=8,
        )
    ),
    "all shared": lambda: ContrastiveModel(contrastive_config(shared_blocks=2)),
}


def test_a_file_that_cannot_be_written_is_named(tmp_path):
    """Under a limit of the size of files, as on a full disk."""
    file = tmp_path / "folder/model.safetensors"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large") as raised:
            save_model(text_model(), file)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert raised.value.filename == str(file)
    assert not list(tmp_path.iterdir())


def test_captioning_models_described_before_cross_attention_are_the_same():
    model = MAKERS["captions"]()
    description = describe(model)
    for name in ("media", "cross_attention_every", "cross_attention_gate"):
        del description["config"][name]
    built = build(description)
    assert built.config == model.config
    assert not any("cross_attention" in n or "start" in n for n in built.state_dict())


def same_weights(one, other):
    one, other = one.state_dict(), other.state_dict()
    return list(one) == list(other) and all(torch.equal(one[key], other[key]) for key in one)


def save_checkpoint(model, path, more=None):
    """The weights in a checkpoint as Lightning writes it."""
    state = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    state["metrics.total"] = torch.zeros(())
    torch.save({"state_dict": state, "model": describe(model)} | (more or {}), path)
    return path


@pytest.mark.parametrize("name", MAKERS)
def test_a_description_is_plain_and_builds_the_same_model(name):
    model = MAKERS[name]()
    description = json.loads(json.dumps(describe(model)))
    assert description == describe(model)
    built = build(description)
    assert type(built) is type(model)
    assert built.config == model.config


@pytest.mark.parametrize("name", MAKERS)
def test_a_saved_model_comes_back(name, tmp_path):
    model = MAKERS[name]()
    for path in (tmp_path / "folder", tmp_path / "file.safetensors"):
        written = save_model(model, path)
        assert written.suffix == ".safetensors"
        loaded = load_model(path)
        assert same_weights(loaded, model)
        assert not loaded.training
    assert sorted(file.name for file in tmp_path.rglob("*.*")) == [
        "file.safetensors",
        "model.safetensors",
    ]


def test_tied_weights_are_written_once_and_stay_tied(tmp_path):
    file = save_model(text_model(), tmp_path)
    with safe_open(file, framework="pt") as opened:
        assert "embedding.weight" in opened.keys()  # noqa: SIM118
        assert "head.weight" not in opened.keys()  # noqa: SIM118
    loaded = load_model(file)
    assert loaded.head.weight is loaded.embedding.weight


def test_a_compiled_model_is_saved_as_what_it_compiles(tmp_path):
    model = text_model()
    assert same_weights(
        load_model(save_model(torch.compile(model, backend="eager"), tmp_path)), model
    )
    assert load_weights(torch.compile(text_model(), backend="eager"), tmp_path) == []


def test_a_cast_model_comes_back_in_float32(tmp_path):
    model = text_model().bfloat16()
    loaded = load_model(save_model(model, tmp_path))
    assert {tensor.dtype for tensor in loaded.parameters()} == {torch.float32}
    assert torch.equal(loaded.embedding.weight, model.embedding.weight.float())


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    model = text_model()
    save_model(model, tmp_path)

    def write_half(weights, path, metadata):
        Path(path).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr("diffmm.models.safetensors_files.save_file", write_half)
    with pytest.raises(OSError, match="disk full"):
        save_model(text_model(), tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["model.safetensors"]
    assert same_weights(load_model(tmp_path), model)


def test_a_lightning_checkpoint_gives_its_model(tmp_path):
    model = text_model()
    loaded = load_model(save_checkpoint(model, tmp_path / "last.ckpt"))
    assert same_weights(loaded, model)


@pytest.mark.parametrize(("starts_at", "expected"), [(0, "average"), (100, "current")])
@pytest.mark.filterwarnings("ignore:.*does not have many workers:UserWarning")
@pytest.mark.filterwarnings("ignore:.*treespec, LeafSpec:FutureWarning")
def test_of_averaged_training_it_is_the_average_once_there_is_one(tmp_path, starts_at, expected):
    import lightning
    from lightning.pytorch.callbacks import EMAWeightAveraging

    class Training(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = text_model().train()

        def training_step(self, batch, batch_idx):
            return self.model(batch).square().mean()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=1.0)

        def on_save_checkpoint(self, checkpoint):
            checkpoint["model"] = describe(self.model)

    class Save(lightning.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            trainer.save_checkpoint(tmp_path / "step.ckpt")
            self.current = {k: v.clone() for k, v in pl_module.model.state_dict().items()}

    save = Save()
    trainer = lightning.Trainer(
        max_steps=3,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[EMAWeightAveraging(decay=0.5, update_starting_at_step=starts_at), save],
    )
    tokens = torch.randint(0, 50, (6, 8))
    trainer.fit(Training(), torch.utils.data.DataLoader(tokens, batch_size=2))
    loaded = load_model(tmp_path / "step.ckpt").state_dict()
    checkpoint = torch.load(tmp_path / "step.ckpt", weights_only=True)
    is_current = all(torch.equal(loaded[key], save.current[key]) for key in loaded)
    assert is_current == (expected == "current")
    kept = checkpoint["state_dict" if expected == "average" else "current_model_state"]
    assert all(torch.equal(loaded[key], kept[f"model.{key}"]) for key in loaded)


class Planted:
    """A pickle that would run code when it is loaded."""

    def __reduce__(self):
        return Path.touch, (Path("planted"),)


def test_opening_a_file_runs_no_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": {}, "model": Planted()}, "bad.ckpt")
    with pytest.raises(ValueError, match="bad.ckpt is not a complete checkpoint of tensors and"):
        load_model("bad.ckpt")
    assert not Path("planted").exists()


def test_files_that_are_not_there_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no file of weights at .*none.ckpt"):
        load_model(tmp_path / "none.ckpt")
    with pytest.raises(FileNotFoundError, match=r"no file of weights at .*model.safetensors"):
        load_weights(text_model(), tmp_path)


@pytest.mark.parametrize("name", ["run.ckpt", "model.safetensors"])
@pytest.mark.parametrize("kept", [0.0, 0.1, 0.9])
def test_a_cut_file_is_named(tmp_path, name, kept):
    file = tmp_path / name
    if file.suffix == ".ckpt":
        save_checkpoint(text_model(), file)
    else:
        save_model(text_model(), file)
    file.write_bytes(file.read_bytes()[: int(kept * file.stat().st_size)])
    for load in (load_model, lambda path: load_weights(text_model(), path)):
        with pytest.raises(ValueError, match=f"{name} is not a complete"):
            load(file)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "is not a Lightning checkpoint: it has no state_dict"),
        ({"weights": {}}, "is not a Lightning checkpoint: it has no state_dict"),
        ({"state_dict": {"net.weight": torch.zeros(1)}}, "contains no weights under 'model.'"),
    ],
)
def test_a_foreign_checkpoint_is_named(tmp_path, content, message):
    torch.save(content, tmp_path / "other.ckpt")
    with pytest.raises(ValueError, match=f"other.ckpt {message}"):
        load_model(tmp_path / "other.ckpt")


def test_weights_without_a_description_fill_a_model_but_make_none(tmp_path):
    model, file = text_model(), tmp_path / "bare.safetensors"
    save_file({k: v.clone() for k, v in model.state_dict().items()}, file)
    with pytest.raises(ValueError, match=r"bare.safetensors does not describe.*load_weights"):
        load_model(file)
    other = text_model()
    assert load_weights(other, file) == []
    assert same_weights(other, model)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda d: d.update(class_path="os.system"), "class_path must be one of .*got 'os.system'"),
        (lambda d: d.update(class_path="diffmm.models.TextModle"), "did you mean .*TextModel'"),
        (lambda d: d["config"].update(vocab=1), "TextConfig has no field 'vocab'; did you mean"),
        (lambda d: d["config"]["backbone"].update(deep=1), "BackboneConfig has no field 'deep'"),
        (lambda d: d["config"].pop("vocab_size"), "TextConfig cannot be created: .*'vocab_size'"),
        (
            lambda d: d["config"].update(backbone=3),
            "BackboneConfig needs its fields by name, got 3",
        ),
        (lambda d: d["config"]["backbone"].update(dim="32"), "BackboneConfig cannot be created"),
        (lambda d: d["config"].update(vocab_size=0), "vocab_size must be at least 1, got 0"),
        (lambda d: d.pop("config"), "a description must have a class_path and a config"),
        (lambda d: d.update(config=[1]), r"TextConfig needs its fields by name, got \[1\]"),
    ],
)
def test_a_description_that_cannot_be_built_is_refused(tmp_path, spoil, message):
    description = describe(text_model())
    spoil(description)
    with pytest.raises(ValueError, match=message):
        build(description)
    file = save_checkpoint(text_model(), tmp_path / "run.ckpt", {"model": description})
    with pytest.raises(ValueError, match=f"run.ckpt describes a model that cannot be.*{message}"):
        load_model(file)


def test_no_description_takes_more_memory_than_the_file_has_weights(tmp_path, monkeypatch):
    """Shapes are compared on the meta device: a model of terabytes is not allocated to be
    refused."""
    made = []
    original = torch.empty

    def watched(*size, **options):
        tensor = original(*size, **options)
        made.append(0 if tensor.is_meta else tensor.numel())
        return tensor

    monkeypatch.setattr(torch, "empty", watched)
    for changes, message in (
        ({"dim": 1 << 20, "num_heads": 1 << 10}, "does not fit TextModel: .* of another shape"),
        ({"depth": 1 << 40}, f"describes a model of {1 << 40} blocks, but contains"),
        ({"dim": 1 << 50, "num_heads": 1 << 10}, "describes a model that cannot be built"),
    ):
        description = describe(text_model())
        description["config"]["backbone"].update(changes)
        file = save_checkpoint(text_model(), tmp_path / "huge.ckpt", {"model": description})
        with pytest.raises(ValueError, match=f"huge.ckpt {message}"):
            load_model(file)
    assert 0 < max(made) < 1 << 20


def test_a_tensor_that_says_more_than_it_holds_is_refused(tmp_path):
    model, file = text_model(), tmp_path / "run.ckpt"
    state = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    state["model.embedding.weight"] = torch.zeros(1).expand(1 << 20, 1 << 20)
    torch.save({"state_dict": state, "model": describe(model)}, file)
    message = r"run.ckpt contains less data of embedding.weight than its shape \(1048576, 1048576\)"
    with pytest.raises(ValueError, match=message):
        load_model(file)
    assert_refused_untouched(model, file, message)


@pytest.mark.parametrize("number", [float("nan"), float("-inf")])
def test_numbers_that_are_not_finite_are_refused(tmp_path, number):
    model, file = text_model(), tmp_path / "run.safetensors"
    good = text_model()
    name = "backbone.blocks.0.attention.k_proj.weight"
    with torch.no_grad():
        model.get_parameter(name)[:, :2] = number
    save_model(model, file)
    count, total = 2 * len(model.get_parameter(name)), model.get_parameter(name).numel()
    message = f"run.safetensors has {count} of {total} numbers in {name} that are not finite"
    with pytest.raises(ValueError, match=message):
        load_model(file)
    assert_refused_untouched(good, file, message)


def test_models_of_others_have_no_description():
    backbone = Backbone(BackboneConfig(dim=32, depth=1, num_heads=4))
    with pytest.raises(
        ValueError, match=r"Backbone has no description: only diffmm.models.TextModel"
    ):
        describe(backbone)


def assert_refused_untouched(model, file, message, **options):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        load_weights(model, file, **options)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_another_architecture_is_refused_with_keys_and_shapes(tmp_path):
    file = save_model(text_model(attention="softmax", depth=3), tmp_path)
    bare = tmp_path / "bare.safetensors"
    save_file({k: v.clone() for k, v in load_model(file).state_dict().items()}, bare)
    assert_refused_untouched(
        text_model(),
        bare,
        r"bare.safetensors does not fit TextModel: "
        r"10 missing \(backbone.blocks.0.attention.lambda_q1, .*, and 6 more\); "
        r"9 unexpected \(backbone.blocks.2.*, and 5 more\)$",
    )
    assert_refused_untouched(
        text_model(feed_forward_width=80),
        save_model(text_model(), tmp_path / "wider"),
        r"6 of another shape \(backbone.blocks.0.feed_forward.gate_proj.weight \(8\d, 32\), "
        r"needed \(80, 32\)",
    )


@pytest.mark.parametrize(
    ("source", "target", "message"),
    [
        ({"attention": "softmax"}, {"num_heads": 2}, "num_heads 4, needed 2"),
        ({}, {"lambda_init": 0.5}, "lambda_init None, needed 0.5"),
        ({}, {"combine": "add"}, "combine 'subtract', needed 'add'"),
        ({}, {"num_kv_heads": 2}, "num_kv_heads 4, needed 2"),
    ],
)
def test_weights_that_fit_but_mean_something_else_are_refused(tmp_path, source, target, message):
    file = save_model(text_model(**source), tmp_path)
    assert_refused_untouched(
        text_model(**(source | target)), file, f"has another architecture: .*{message}"
    )


@pytest.mark.parametrize(
    ("description", "message"),
    [
        ([1], r"has \[1\] in place of settings by name"),
        ({"config": 3}, "has 3 in place of settings by name"),
        ({"config": {"encoder": "none"}}, "has 'none' in place of settings by name"),
        ({"config": {"backbone": 3}}, "BackboneConfig needs its fields by name, got 3"),
    ],
)
def test_a_damaged_description_is_named(tmp_path, description, message):
    file = save_checkpoint(text_model(), tmp_path / "run.ckpt", {"model": description})
    assert_refused_untouched(
        text_model(), file, f"run.ckpt describes a model that cannot be built: .*{message}"
    )


def test_settings_of_training_may_differ(tmp_path):
    source = text_model()
    target = text_model(dropout=0.1, drop_path=0.2, num_kv_heads=4, head_dim=8, rope_base=5e5)
    assert load_weights(target, save_model(source, tmp_path)) == []
    assert same_weights(source, target)


def test_an_untied_head_does_not_go_into_a_tied_model(tmp_path):
    file = save_model(text_model(tie_embeddings=False), tmp_path)
    assert_refused_untouched(
        text_model(), file, "different head.weight and embedding.weight, but the model ties the two"
    )


def test_a_new_head_is_asked_for_and_listed(tmp_path):
    source = ImageModel(image_config())
    file = save_checkpoint(source, tmp_path / "run.ckpt")
    target = ImageModel(image_config(num_classes=7))
    assert_refused_untouched(
        target,
        file,
        r"2 of another shape \(head.weight \(5, 32\), needed \(7, 32\).*"
        r"Only the head differs: skip_head=True keeps the new one",
    )
    head = target.head.weight.clone()
    assert load_weights(target, file, skip_head=True) == ["head.bias", "head.weight"]
    assert torch.equal(target.head.weight, head)
    assert same_weights(target.backbone, source.backbone)
    # Even a head that fits is skipped, because it may have other classes.
    twin = ImageModel(image_config())
    assert load_weights(twin, file, skip_head=True) == ["head.bias", "head.weight"]
    assert not torch.equal(twin.head.weight, source.head.weight)


def test_learned_positions_are_resampled(tmp_path):
    source = ImageModel(image_config())
    file = save_model(source, tmp_path)
    target = ImageModel(image_config(image_size=(32, 16)))
    assert load_weights(target, file) == []
    source.set_input_size((32, 16))
    images = torch.randn(2, 3, 32, 16)
    torch.testing.assert_close(target.eval()(images), source.eval()(images))


@pytest.mark.parametrize(
    ("config", "model_class"), [(image_config(), ImageModel), (audio_config(), AudioModel)]
)
def test_a_masked_autoencoder_starts_an_encoder(tmp_path, config, model_class):
    pretrained = masked_autoencoder(config)
    model = model_class(config)
    for file in (
        save_model(pretrained, tmp_path / "model.safetensors"),
        save_checkpoint(pretrained, tmp_path / "run.ckpt"),
    ):
        assert_refused_untouched(
            model_class(config), file, r"2 missing \(head.weight, head.bias\).*skip_head=True"
        )
        assert load_weights(model, file, skip_head=True) == ["head.bias", "head.weight"]
        assert same_weights(model.backbone, pretrained.encoder.backbone)
    other = dataclasses.replace(config.backbone, num_heads=2, head_dim=16)
    assert_refused_untouched(
        model_class(dataclasses.replace(config, backbone=other)),
        save_model(pretrained, tmp_path),
        "num_heads 4, needed 2",
        skip_head=True,
    )


def test_a_model_of_another_kind_is_refused(tmp_path):
    file = save_model(text_model(), tmp_path)
    with pytest.raises(ValueError, match=r"does not fit ImageModel|has another architecture"):
        load_weights(ImageModel(image_config()), file)
