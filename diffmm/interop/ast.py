"""AST (Hugging Face `ASTForAudioClassification`): a ViT over overlapping patches of Kaldi's filter
banks, whose class and distillation token are averaged.

Its patches are ordered by frequency, then by time, and are `(mel bands, frames)`; diffmm's are the
reverse. The two orders give the same model, because the positions are learned.
"""

from typing import Any

from torch import Tensor, cat

from diffmm.interop import sounds
from diffmm.interop.family import PREPROCESSOR, Family
from diffmm.interop.names import Layout, Name, Table
from diffmm.interop.settings import TheirSettings
from diffmm.interop.timm_vit import UNBATCHED, both
from diffmm.layers.patch import as_size
from diffmm.models import AudioConfig, AudioModel, BackboneConfig

MEAN, STD = -4.2677393, 4.5689974
"""Defaults of transformers: the statistics of AudioSet."""

WINDOW_SECONDS, HOP_SECONDS = 0.025, 0.010

MODEL = "audio_spectrogram_transformer"
THEIRS, OURS = f"{MODEL}.encoder.layer.{{}}", "backbone.blocks.{}"


def read_settings(settings: TheirSettings) -> AudioConfig:
    """The config of an AST."""
    patch_size = settings.take("patch_size", int, 16)
    num_mels = settings.take("num_mel_bins", int, 128)
    max_length = settings.take("max_length", int, 1024)
    backbone = BackboneConfig(
        dim=settings.take("hidden_size", int, 768),
        depth=settings.take("num_hidden_layers", int, 12),
        num_heads=settings.take("num_attention_heads", int, 12),
        head_dim=settings.take("head_dim", int, None),
        attention="softmax",
        norm="layernorm",
        norm_eps=settings.take("layer_norm_eps", float, 1e-12),
        feed_forward=sounds.activation(settings, "hidden_act"),
        feed_forward_width=settings.take("intermediate_size", int, 3072),
        feed_forward_bias=True,
        qkv_bias=settings.take("qkv_bias", bool, True),
        out_bias=True,
    )
    settings.skip("hidden_dropout_prob", "attention_probs_dropout_prob")
    # transformers stores no names if there are two classes without names.
    names = settings.take("id2label", dict, {"0": "", "1": ""})
    strides = (settings.take("time_stride", int, 10), settings.take("frequency_stride", int, 10))
    prepared = settings.section(PREPROCESSOR)
    sample_rate_hz = prepared.take("sampling_rate", int, 16000)
    prepared.only("num_mel_bins", num_mels, "the number of mel bands that its model has")
    prepared.only("max_length", max_length, "the number of frames that its model has")
    prepared.only("feature_size", 1, "its spectrograms have one channel")
    mean, std = prepared.take("mean", float, MEAN), prepared.take("std", float, STD)
    if not prepared.take("do_normalize", bool, True):
        mean, std = 0.0, 0.5
    prepared.skip(*sounds.NOT_OF_SOUNDS)
    prepared.finish()
    window, hop = (round(x * sample_rate_hz) for x in (WINDOW_SECONDS, HOP_SECONDS))
    return AudioConfig(
        backbone=backbone,
        num_classes=len(names),
        dist_token=True,
        pool="cls_dist",
        pool_norm=True,
        learned_positions=True,
        sample_rate_hz=sample_rate_hz,
        num_mels=num_mels,
        window_seconds=WINDOW_SECONDS,
        hop_seconds=HOP_SECONDS,
        spectrogram="kaldi",
        log_mel_mean=mean,
        log_mel_std=2.0 * std,
        patch_size=patch_size,
        patch_stride=strides,
        partial_patches=False,
        clip_seconds=((max_length - 1) * hop + window) / sample_rate_hz,
    )


def write_settings(config: AudioConfig) -> dict[str, Any]:
    """The settings of the nearest AST."""
    backbone = config.backbone
    spectrogram: Any = config.make_spectrogram()
    height, width = as_size(config.patch_stride or config.patch_size or 16)
    max_length = getattr(spectrogram, "clip_frames", None)
    return {
        "architectures": ["ASTForAudioClassification"],
        "model_type": "audio-spectrogram-transformer",
        "hidden_size": backbone.dim,
        "num_hidden_layers": backbone.depth,
        "num_attention_heads": backbone.num_heads,
        "intermediate_size": backbone.resolved_feed_forward_width,
        "hidden_act": sounds.their_activation(backbone.feed_forward),
        "layer_norm_eps": backbone.norm_eps,
        "qkv_bias": backbone.qkv_bias is True,
        "patch_size": as_size(config.patch_size or 16)[0],
        "time_stride": height,
        "frequency_stride": width,
        "max_length": max_length,
        "num_mel_bins": config.num_mels,
        "id2label": {str(index): "" for index in range(config.num_classes)},
        PREPROCESSOR: {
            "feature_extractor_type": "ASTFeatureExtractor",
            "sampling_rate": config.sample_rate_hz,
            "num_mel_bins": config.num_mels,
            "max_length": max_length,
            "mean": config.log_mel_mean,
            "std": config.log_mel_std / 2.0,
            "do_normalize": True,
            "feature_size": 1,
            "padding_value": 0.0,
        },
    }


def positions(config: AudioConfig) -> Layout:
    """The layout of the positions, `[1, 2 + F * T, dim]`, of which the patches are transposed."""
    bands = config.make_stem().grid(1 << 20)[1]

    def split(x: Tensor) -> tuple[Tensor, Tensor]:
        return x[0, :2], x[0, 2:].unflatten(0, (bands, -1)).transpose(0, 1)

    def join(prefix: Tensor, grid: Tensor) -> Tensor:
        return cat([prefix, grid.transpose(0, 1).flatten(0, 1)]).unsqueeze(0)

    return Layout(split, join)


TRANSPOSED = Layout(lambda x: x.transpose(2, 3), lambda x: x.transpose(2, 3))


def table(config: AudioConfig) -> Table:
    """The tensors of an AST."""
    embeddings = f"{MODEL}.embeddings"
    patches = f"{embeddings}.patch_embeddings.projection"
    attention = f"{THEIRS}.attention"
    bias = ("weight", "bias") if config.backbone.qkv_bias else ("weight",)
    names = [
        Name(f"{embeddings}.cls_token", "cls_token", UNBATCHED),
        Name(f"{embeddings}.distillation_token", "dist_token", UNBATCHED),
        Name(
            f"{embeddings}.position_embeddings",
            ("positions.prefix", "positions.grid"),
            positions(config),
        ),
        Name(f"{patches}.weight", "stem.embedding.proj.weight", TRANSPOSED),
        Name(f"{patches}.bias", "stem.embedding.proj.bias"),
        *both(f"{MODEL}.layernorm", "backbone.norm"),
        *both("classifier.layernorm", "pool_norm"),
        *both(f"{THEIRS}.layernorm_before", f"{OURS}.attention_norm"),
        *both(f"{THEIRS}.layernorm_after", f"{OURS}.feed_forward_norm"),
        *both(f"{attention}.output.dense", f"{OURS}.attention.out_proj"),
        *both(f"{THEIRS}.intermediate.dense", f"{OURS}.feed_forward.up_proj"),
        *both(f"{THEIRS}.output.dense", f"{OURS}.feed_forward.down_proj"),
    ]
    for part in ("query", "key", "value"):
        ours = f"{OURS}.attention.{part[0]}_proj"
        names += both(f"{attention}.attention.{part}", ours, bias)
    if config.num_classes:
        names += both("classifier.dense", "head")
    return Table(tuple(names), depth=config.backbone.depth)


AST = Family(
    "audio-spectrogram-transformer",
    ("ASTForAudioClassification",),
    read_settings,
    write_settings,
    table,
    model=AudioModel,
    job=sounds.read_job,
    write_job=sounds.write_job,
    prepare=sounds.with_preprocessor,
)
