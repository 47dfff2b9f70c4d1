"""The audio model: padding has no effect, with any stem."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchaudio.transforms import FrequencyMasking, TimeMasking

from diffmm.models import AudioConfig, AudioModel, BackboneConfig
from diffmm.models.description import build, describe

ATTENTIONS = ["softmax", "diff_v1", "diff_v2"]
RATE = 8000

STEMS: dict[str, dict[str, Any]] = {
    "patch": {"stem": "patch", "patch_size": (8, 16)},
    "overlapping": {"stem": "patch", "patch_size": (8, 16), "patch_stride": (6, 10)},
    "frame": {"stem": "frame"},
    "coarse_frame": {"stem": "frame", "frame_strides": (2, 2)},
}


def config(stem: str = "patch", positions: str = "rope", **changes: Any) -> AudioConfig:
    rope = "2d" if STEMS[stem]["stem"] == "patch" else "1d"
    backbone = {"dim": 32, "depth": 2, "num_heads": 4, "rope": rope} | changes.pop("backbone", {})
    settings: dict[str, Any] = {"sample_rate_hz": RATE, "num_mels": 32, "num_classes": 5}
    if positions == "learned":
        backbone["rope"] = "none"
        settings |= {"learned_positions": True, "clip_seconds": 1.0}
    settings |= STEMS[stem] | changes
    return AudioConfig(backbone=BackboneConfig(**backbone), **settings)


def real(features: Tensor, padding: Tensor, num_prefix: int) -> Tensor:
    """The special tokens and the real patches of a clip."""
    return torch.cat([features[:num_prefix], features[num_prefix:][padding]])


@pytest.mark.parametrize("pool", ["cls", "mean"])
@pytest.mark.parametrize("positions", ["rope", "learned"])
@pytest.mark.parametrize("stem", STEMS)
def test_padding_changes_no_feature(stem: str, positions: str, pool: str) -> None:
    model = AudioModel(config(stem, positions, pool=pool, num_reg_tokens=1)).eval()
    for parameter in model.stem.parameters():  # including biases, which would leak past the end
        nn.init.normal_(parameter, std=0.3)
    clips = torch.randn(2, 8000)  # noise after the end, which must be ignored
    for num_samples in (50, 3456, 7900):
        lengths = torch.tensor([num_samples, 8000])
        alone = clips[:1, :num_samples]
        torch.testing.assert_close(model(clips, lengths)[:1], model(alone), rtol=1e-5, atol=1e-5)
        padding = model.key_padding(clips, lengths)
        features = model.forward_features(clips, lengths)
        expected = model.forward_features(alone)[0]
        torch.testing.assert_close(real(features[0], padding[0], 2), expected, rtol=1e-5, atol=1e-5)
        assert padding.sum(dim=1).tolist() == [len(expected) - 2, model.num_patches(clips)]
        # The separate head gives the same result.
        torch.testing.assert_close(
            model.forward_head(features, key_padding=padding), model(clips, lengths)
        )
        # Passing the lengths of full clips changes nothing.
        torch.testing.assert_close(
            model(alone, torch.tensor([num_samples])), model(alone), rtol=1e-5, atol=1e-5
        )


@pytest.mark.parametrize("stem", ["patch", "frame"])
def test_padding_is_not_a_silent_clip(stem: str) -> None:
    """Zeros are also sound: only `num_samples` makes them padding."""
    model = AudioModel(config(stem)).eval()
    clips = torch.randn(1, 8000)
    clips[:, 4000:] = 0.0
    assert (model(clips) - model(clips, torch.tensor([4000]))).abs().max() > 1e-4


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("stem", ["patch", "frame"])
def test_every_parameter_learns(stem: str, attention: str) -> None:
    model = AudioModel(
        config(stem, "learned", backbone={"attention": attention}, num_reg_tokens=1, pool="mean")
    )
    lengths = torch.tensor([3000, 8000])
    model(torch.randn(2, 8000), lengths).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_rope_of_each_stem(attention: str) -> None:
    for stem in ("patch", "frame"):
        model = AudioModel(config(stem, backbone={"attention": attention}))
        model(torch.randn(2, 4000), torch.tensor([4000, 1])).sum().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_shapes() -> None:
    clips = torch.randn(2, 8000)  # 100 frames
    patch, frame = AudioModel(config("patch")), AudioModel(config("frame"))
    assert (patch.num_patches(clips), frame.num_patches(clips)) == (13 * 2, 50)
    assert patch.forward_features(clips).shape == (2, 27, 32)
    final, taken = frame.forward_intermediates(clips)
    assert final.shape == (2, 51, 32)
    assert [tuple(x.shape) for x in taken] == [(2, 50, 32)] * 2
    (last,) = frame.forward_intermediates(clips, None, 1, norm=True, intermediates_only=True)
    torch.testing.assert_close(last, final[:, 1:])
    assert patch.patchify(clips).shape == (2, 26, 8 * 16)
    assert patch(torch.randn(1, 1)).shape == (1, 5)  # one sample is one patch


def test_ast() -> None:
    """The original's number of tokens for 10.24 s: 12 bands by 101 steps, and the special
    tokens."""
    backbone = BackboneConfig(dim=32, depth=1, num_heads=4, rope="2d")
    ast = AudioModel(AudioConfig(sample_rate_hz=16000, patch_stride=10, backbone=backbone))
    assert ast.stem.grid(1016) == (101, 12)
    assert ast.stem.grid(1024) == (102, 12)


def test_the_spectrogram_stays_float32() -> None:
    model = AudioModel(config(log_mel_mean=-7.0, log_mel_std=3.0)).eval()
    clips = 0.01 * torch.randn(2, 8000)
    expected, seen = model(clips), []
    model.spectrogram.register_forward_hook(lambda _, __, output: seen.append(output[0]))
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(clips)
    torch.testing.assert_close(logits.float(), expected, rtol=0.1, atol=0.05)
    logits = model.bfloat16()(clips)
    assert logits.dtype == torch.bfloat16
    torch.testing.assert_close(logits.float(), expected, rtol=0.1, atol=0.05)
    assert {x.dtype for x in seen} == {torch.float32}
    assert seen[0].equal(seen[1])


def test_augmentation_in_training_only() -> None:
    model = AudioModel(config())
    clips, lengths = torch.randn(2, 8000), torch.tensor([4000, 8000])
    model.augment = nn.Sequential(FrequencyMasking(16, True), TimeMasking(40, True))
    assert "augment" not in "".join(model.state_dict())
    plain = model.eval().embed(clips, lengths).tokens
    assert model.eval().embed(clips, lengths).tokens.equal(plain)
    assert not model.train().embed(clips, lengths).tokens.equal(plain)
    # The target of masked autoencoding is the sound itself.
    assert model.train().patchify(clips, lengths).equal(model.eval().patchify(clips, lengths))


def test_augmentation_leaves_padding_silent() -> None:
    class Louder(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + 1.0

    model = AudioModel(config())
    model.augment = Louder()
    clips = torch.randn(2, 8000)
    alone = model.embed(clips[:1, :1000]).tokens
    padded = model.embed(clips, torch.tensor([1000, 8000])).tokens
    # 13 frames: the rest of the second patch is silence there, and must be here.
    alone_frames = model.spectrogram.num_frames(1000)
    assert alone_frames % 8
    torch.testing.assert_close(padded[:1, :4], alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("stem", ["patch", "frame"])
def test_longer_and_shorter_clips(stem: str) -> None:
    model = AudioModel(config(stem, "learned")).eval()
    clips = torch.randn(1, 4000)
    at_1 = model(clips)
    before = model.positions.grid.detach().clone()
    model.set_input_size(0.5)  # cropped: the remaining positions are unchanged
    torch.testing.assert_close(model(clips), at_1, rtol=0, atol=0)
    assert model.positions.grid.equal(before[: len(model.positions.grid)])
    model.set_input_size(2.0)
    assert model(torch.randn(1, 16000)).shape == (1, 5)
    twin = build(describe(model)).eval()
    twin.load_state_dict(model.state_dict())
    torch.testing.assert_close(twin(clips), model(clips), rtol=0, atol=0)


def test_weights_of_another_length_load() -> None:
    model = AudioModel(config("patch", "learned"))
    longer = AudioModel(config("patch", "learned", clip_seconds=3.0))
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    longer.load_state_dict(longer.resample_weights(weights))
    model.set_input_size(3.0)
    torch.testing.assert_close(longer.positions.grid, model.positions.grid)


def test_rope_takes_any_length() -> None:
    model = AudioModel(config("frame")).eval()
    assert model.positions is None
    for num_samples in (1, 80, 81, 30000):
        assert model(torch.randn(1, num_samples)).isfinite().all()


@pytest.mark.parametrize(
    ("stem", "dynamic", "backend"), [("frame", None, "aot_eager"), ("patch", True, "eager")]
)
def test_compiled(stem: str, dynamic: bool | None, backend: str) -> None:
    model = AudioModel(config(stem, backbone={"depth": 1})).eval()
    compiled = torch.compile(model, backend=backend, fullgraph=True, dynamic=dynamic)
    for num_samples in (4000, 6000):
        clips, lengths = torch.randn(2, num_samples), torch.tensor([3000, num_samples])
        found, expected = [], []
        for call, gradients in ((compiled, found), (model, expected)):
            model.zero_grad()
            out = call(clips, lengths)
            out.square().sum().backward()
            gradients += [out, *(p.grad for p in model.parameters())]
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_compiled_with_gradients_of_the_waveforms() -> None:
    model = AudioModel(config("patch", backbone={"depth": 1})).eval()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    clips = torch.randn(2, 4000, requires_grad=True)
    found, expected = (
        torch.autograd.grad(call(clips).square().sum(), clips) for call in (compiled, model)
    )
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("stem", "changes", "message"),
    [
        ("frame", {"patch_size": 16}, r"patch_size is not used by stem 'frame': leave it out"),
        ("patch", {"frame_strides": (1, 2)}, r"frame_strides is not used by stem 'patch'"),
        ("patch", {"patch_size": (8, 64)}, r"patch of 64 mel bands does not fit num_mels=32"),
        ("patch", {"patch_stride": 17}, r"patch_stride must be between 1 and patch_size, got \(17"),
        ("frame", {"frame_strides": (0, 1)}, r"frame_strides must be between 1 and 3, got \(0, 1"),
        ("patch", {"clip_seconds": 0.0}, r"clip_seconds must be positive, got 0.0"),
        ("patch", {"learned_positions": True}, r"learned_positions needs clip_seconds"),
        ("patch", {"hop_seconds": 0.03}, r"hop_seconds must be .* at most window_seconds"),
        ("patch", {"backbone": {"rope": "1d"}}, r"have 2d positions.*rope is '1d'"),
        ("frame", {"backbone": {"rope": "2d"}}, r"have 1d positions.*rope is '2d'"),
    ],
)
def test_config_refuses(stem: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(stem, **changes)


def test_another_stem() -> None:
    with pytest.raises(ValueError, match=r"stem must be one of 'patch', 'frame'.*mean 'patch'"):
        replace(config(), stem="patches")


def test_model_refuses() -> None:
    model = AudioModel(config("patch", "learned"))
    with pytest.raises(ValueError, match=r"clips of 1.5 s are longer than clip_seconds=1: cut"):
        model(torch.randn(1, 12000))
    with pytest.raises(ValueError, match=r"clip_seconds must be positive, got -1"):
        model.set_input_size(-1.0)
    with pytest.raises(ValueError, match=r"waveforms must be \[B, S\].*got shape \(1, 2, 800\)"):
        model(torch.randn(1, 2, 800))
    with pytest.raises(ValueError, match=r"num_samples must be \[B\]"):
        model.key_padding(torch.randn(1, 800), torch.tensor([[800]]))
    for stem in ("frame", "overlapping"):
        with pytest.raises(ValueError, match=r"masking needs patches that do not overlap"):
            AudioModel(config(stem)).patchify(torch.randn(1, 800))
