"""Models that are moved from the meta device to new memory are complete."""

import pickle
from copy import deepcopy

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from diffmm.models import (
    AudioConfig,
    AudioModel,
    BackboneConfig,
    CaptioningConfig,
    CaptioningModel,
    ContrastiveConfig,
    ContrastiveModel,
    ImageConfig,
    ImageModel,
    MaskedAutoencoder,
    MaskedAutoencoderConfig,
    TextConfig,
    TextModel,
    TextTower,
    TextTowerConfig,
)


def backbone(rope="2d", **changes):
    given = {"dim": 64, "depth": 2, "num_heads": 4, "rope": rope, "init_std": 0.05, "qk_norm": True}
    return BackboneConfig(**given | changes)


def image_config(num_classes=5, **changes):
    return ImageConfig(
        backbone=backbone(layer_scale=0.1, **changes),
        image_size=16,
        patch_size=4,
        num_classes=num_classes,
        num_reg_tokens=2,
        learned_positions=True,
    )


def text():
    config = TextConfig(vocab_size=50, max_length=20, backbone=backbone("1d"))
    return TextModel(config), torch.randint(50, (2, 9))


def untied_text():
    softmax = backbone("1d", attention="softmax", qk_norm=False, cosine_logits=True, dex=True)
    config = TextConfig(vocab_size=50, max_length=20, backbone=softmax, tie_embeddings=False)
    return TextModel(config), torch.randint(50, (2, 9))


def image():
    config = image_config(attention="diff_v2", qkv_bias=True, norm="layernorm")
    return ImageModel(config), torch.randn(2, 3, 16, 16)


def audio(stem="patch"):
    rope = "2d" if stem == "patch" else "1d"
    config = AudioConfig(
        backbone=backbone(rope, feed_forward="gelu"),
        sample_rate_hz=8000,
        num_mels=32,
        num_classes=5,
        stem=stem,
    )
    return AudioModel(config), torch.randn(2, 4000)


def frames():
    return audio("frame")


def masked():
    config = MaskedAutoencoderConfig(image_config(0), backbone("none", depth=1))
    return MaskedAutoencoder(config), torch.randn(2, 3, 16, 16)


def distilled():
    vectors = backbone("none", attention="diff_v1", dual_lambda=True, parallel=True)
    config = ImageConfig(
        backbone=vectors,
        image_size=16,
        patch_size=4,
        num_classes=5,
        dist_token=True,
        pool="cls_dist",
        head="distilled",
        learned_positions=True,
        prefix_positions=False,
        pre_norm=True,
        pool_norm=True,
        patch_bias=False,
    )
    return ImageModel(config), torch.randn(2, 3, 16, 16)


def padded(spectrogram):
    config = AudioConfig(
        backbone=backbone("2d", qkv_bias="qv"),
        sample_rate_hz=16000,
        num_mels=32,
        num_classes=5,
        spectrogram=spectrogram,
        clip_seconds=0.5,
        partial_patches=False,
    )
    return AudioModel(config), torch.randn(2, 4000)


def kaldi():
    return padded("kaldi")


def whisper():
    return padded("whisper")


def tower():
    config = TextTowerConfig(
        vocab_size=50, max_length=20, backbone=backbone("none"), num_outputs=6, head_bias=True
    )
    return TextTower(config), torch.randint(50, (2, 9))


class OfImages(ContrastiveModel):
    """A contrastive model whose texts are always the same."""

    def forward(self, images):
        tokens = torch.arange(6, device=images.device).view(2, 3)
        found = super().forward(tokens, None, images)
        return found.media @ found.texts.T * found.scale + found.bias


def contrastive():
    text = TextTowerConfig(50, 20, backbone("none", layer_scale=0.1), pool="last")
    config = ContrastiveConfig(
        image=image_config(0), text=text, embed_dim=6, shared_blocks=1, init_bias=-1.0
    )
    return OfImages(config), torch.randn(2, 3, 16, 16)


class OfPictures(CaptioningModel):
    """A captioning model of one text."""

    def forward(self, images):
        return super().forward(torch.arange(6, device=images.device).view(2, 3), images)


def captioning():
    text = TextConfig(50, 30, backbone("1d", layer_scale=0.1))
    config = CaptioningConfig(encoder=image_config(0), decoder=text, projector="mlp")
    return OfPictures(config), torch.randn(2, 3, 16, 16)


def cross_captioning():
    text = TextConfig(50, 30, backbone("1d", layer_scale=0.1))
    config = CaptioningConfig(
        encoder=image_config(0), decoder=text, media="cross_attention", cross_attention_gate=True
    )
    return OfPictures(config), torch.randn(2, 3, 16, 16)


MODELS = (
    *(tower, text, untied_text, image, audio, frames, masked, distilled, kaldi, whisper),
    contrastive,
    captioning,
    cross_captioning,
)


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch):
    """Fill the memory that `to_empty` leaves uninitialized with NaN."""
    empty_like = torch.empty_like

    def poisoned(tensor, **options):
        new = empty_like(tensor, **options)
        return new.fill_(float("nan")) if new.is_floating_point() else new

    monkeypatch.setattr(torch, "empty_like", poisoned)


def on_meta(make):
    with torch.device("meta"):
        return make()[0].eval()


def outputs(model, inputs):
    torch.manual_seed(1)
    with torch.no_grad():
        return torch.cat([x.flatten().float() for x in tree_leaves(model(inputs))])


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("make", MODELS)
def test_weights_make_a_model_from_the_meta_device_whole(make, assign):
    model, inputs = make()
    empty = on_meta(make).to_empty(device="cpu")
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    empty.load_state_dict(weights, assign=assign)
    assert outputs(empty, inputs).equal(outputs(model.eval(), inputs))
    assert len(list(empty.parameters())) == len(list(model.parameters()))


@pytest.mark.parametrize("make", MODELS)
def test_reset_parameters_starts_a_model_anew_in_any_order(make):
    model, inputs = make()
    for order in (list, reversed):
        empty = on_meta(make).to_empty(device="cpu")
        for module in order(list(empty.modules())):
            own = (*module.parameters(recurse=False), *module.buffers(recurse=False))
            # As FSDP2's users and Lightning do. A module without this method is left with NaN.
            if own and hasattr(module, "reset_parameters"):
                module.reset_parameters()
        assert outputs(empty, inputs).isfinite().all()
        found = {**dict(empty.named_parameters()), **dict(empty.named_buffers())}
        expected = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            if not tensor.std(correction=0) > 0 or "lambda_" in name or name.endswith(".value"):
                continue
            few = 5 / tensor.numel() ** 0.5
            assert found[name].std().item() == pytest.approx(tensor.std().item(), rel=few), name
        for name, tensor in expected.items():
            if name.endswith(".value") or not tensor.std(correction=0) > 0:
                assert found[name].equal(tensor), name


def test_weights_without_memory_are_not_drawn(monkeypatch):
    """Torch takes milliseconds for a truncated normal distribution on the meta device."""
    drawn = []
    monkeypatch.setattr(nn.init, "trunc_normal_", lambda weight, **_: drawn.append(weight))
    on_meta(text)
    assert drawn == []
    text()
    assert len(drawn) > 10


def test_lambda_vectors_start_anew_at_a_tenth():
    layer = text()[0].backbone.blocks[1].attention
    torch.manual_seed(4)
    layer.reset_parameters()
    torch.manual_seed(4)
    for name in layer.LAMBDA_NAMES:
        torch.testing.assert_close(getattr(layer, name).detach(), 0.1 * torch.randn(16))


@pytest.mark.parametrize("copied", [deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_ties_outlast_copies_and_moves(copied):
    model = copied(text()[0])
    for moved in (
        model,
        model.double(),
        model.to_empty(device="meta"),
        model.to_empty(device="cpu"),
    ):
        assert moved.head.weight is moved.embedding.weight


def test_a_head_put_in_later_is_not_tied():
    model, tokens = text()
    model.head = nn.Linear(64, 7)
    model.float().double().float()
    model.load_state_dict(model.state_dict(), assign=True)
    assert model(tokens).shape == (2, 9, 7)
    model.head = nn.Identity()
    assert model.double().float()(tokens).shape == (2, 9, 64)


class WatchesFloat64(TorchDispatchMode):
    """Counts tensors on the device, and tensors with dtypes that devices such as Apple's lack."""

    def __init__(self):
        super().__init__()
        self.num_tensors, self.wide = 0, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **kwargs or {})
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor) and tensor.is_meta:
                self.num_tensors += 1
                self.wide += [func] if tensor.dtype == torch.float64 else []
        return made


@pytest.mark.parametrize("make", MODELS)
def test_no_float64_is_made_on_the_device(make):
    with torch.device("meta"), WatchesFloat64() as seen:
        model, inputs = make()
        out = model(inputs.to("meta"))
        loss = out.loss if make is masked else out.float().square().mean()
        loss.backward()
        if isinstance(model, TextModel):
            cache = model.new_cache(2)
            model(inputs.to("meta"), cache=cache)
    assert seen.num_tensors > 100
    assert seen.wide == []
