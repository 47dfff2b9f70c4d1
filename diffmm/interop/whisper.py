"""The encoder of Whisper (Hugging Face `WhisperModel`, `WhisperForConditionalGeneration` and
`WhisperEncoder`). The tensors of the decoder are left out.

Its sinusoidal positions are stored in its files, and are learned positions in diffmm. Its keys have
no bias.
"""

from typing import Any

from diffmm.interop import sounds
from diffmm.interop.family import PREPROCESSOR, Family
from diffmm.interop.names import Name, Table
from diffmm.interop.settings import TheirSettings
from diffmm.interop.source import Source
from diffmm.interop.timm_vit import both
from diffmm.models import AudioConfig, AudioModel, BackboneConfig

PREFIXES = ("model.encoder.", "encoder.")
DECODER = ("model.decoder.", "decoder.", "proj_out.")

NOT_OF_THE_ENCODER = """
vocab_size decoder_layers decoder_attention_heads decoder_ffn_dim decoder_layerdrop
encoder_layerdrop max_target_positions scale_embedding dropout attention_dropout activation_dropout
init_std classifier_proj_size apply_spec_augment mask_time_prob mask_time_length
mask_time_min_masks mask_feature_prob mask_feature_length mask_feature_min_masks
median_filter_width tie_word_embeddings alignment_heads lang_to_id no_timestamps_token_id
num_hidden_layers use_weighted_layer_sum forced_decoder_ids
""".split()  # noqa: SIM905

THEIRS, OURS = "layers.{}", "backbone.blocks.{}"


def encoder_only(source: Source) -> Source:
    """Leave out the decoder, and the prefix of the encoder's names."""
    kept = {}
    for name, tensor in source.tensors.items():
        if name.startswith(DECODER):
            continue
        prefix = next((each for each in PREFIXES if name.startswith(each)), "")
        kept[name.removeprefix(prefix)] = tensor
    return sounds.with_preprocessor(source._replace(tensors=kept))


def read_settings(settings: TheirSettings) -> AudioConfig:
    """The config of the encoder of a Whisper."""
    num_mels = settings.take("num_mel_bins", int, 80)
    num_positions = settings.take("max_source_positions", int, 1500)
    backbone = BackboneConfig(
        dim=settings.take("d_model", int, 384),
        depth=settings.take("encoder_layers", int, 4),
        num_heads=settings.take("encoder_attention_heads", int, 6),
        attention="softmax",
        norm="layernorm",
        norm_eps=1e-5,
        feed_forward=sounds.activation(settings, "activation_function"),
        feed_forward_width=settings.take("encoder_ffn_dim", int, 1536),
        feed_forward_bias=True,
        qkv_bias="qv",
        out_bias=True,
    )
    settings.skip(*NOT_OF_THE_ENCODER)
    prepared = settings.section(PREPROCESSOR)
    sample_rate_hz = prepared.take("sampling_rate", int, 16000)
    hop, window = prepared.take("hop_length", int, 160), prepared.take("n_fft", int, 400)
    clip_samples = prepared.take("chunk_length", int, 30) * sample_rate_hz
    prepared.only("feature_size", num_mels, "the number of mel bands that its model has")
    prepared.only("dither", 0.0, "it adds no noise to the waveform")
    prepared.only("do_normalize", False, "it does not normalize the waveform")
    if clip_samples // hop != 2 * num_positions:
        prepared.refuse(
            "chunk_length",
            clip_samples // sample_rate_hz,
            f"only the {2 * num_positions} frames that its model has",
        )
    prepared.skip("n_samples", "nb_max_frames", "mel_filters", *sounds.NOT_OF_SOUNDS)
    prepared.finish()
    return AudioConfig(
        backbone=backbone,
        cls_token=False,
        pool="mean",
        learned_positions=True,
        sample_rate_hz=sample_rate_hz,
        num_mels=num_mels,
        window_seconds=window / sample_rate_hz,
        hop_seconds=hop / sample_rate_hz,
        spectrogram="whisper",
        log_mel_mean=-4.0,
        log_mel_std=4.0,
        stem="frame",
        frame_strides=(1, 2),
        clip_seconds=clip_samples / sample_rate_hz,
    )


def write_settings(config: AudioConfig) -> dict[str, Any]:
    """The settings of the nearest encoder of a Whisper."""
    backbone = config.backbone
    rate = config.sample_rate_hz
    window, hop = round(config.window_seconds * rate), round(config.hop_seconds * rate)
    frames = round((config.clip_seconds or 0.0) * rate) // hop
    return {
        "architectures": ["WhisperEncoder"],
        "model_type": "whisper",
        "d_model": backbone.dim,
        "encoder_layers": backbone.depth,
        "encoder_attention_heads": backbone.num_heads,
        "encoder_ffn_dim": backbone.resolved_feed_forward_width,
        "activation_function": sounds.their_activation(backbone.feed_forward),
        "num_mel_bins": config.num_mels,
        "max_source_positions": frames // 2,
        PREPROCESSOR: {
            "feature_extractor_type": "WhisperFeatureExtractor",
            "feature_size": config.num_mels,
            "sampling_rate": rate,
            "hop_length": hop,
            "n_fft": window,
            "chunk_length": round(config.clip_seconds or 0.0),
            "padding_value": 0.0,
        },
    }


def table(config: AudioConfig) -> Table:
    """The tensors of the encoder."""
    names = [
        *both("conv1", "stem.convs.0"),
        *both("conv2", "stem.convs.1"),
        Name("embed_positions.weight", "positions.grid"),
        *both("layer_norm", "backbone.norm"),
        *both(f"{THEIRS}.self_attn_layer_norm", f"{OURS}.attention_norm"),
        *both(f"{THEIRS}.final_layer_norm", f"{OURS}.feed_forward_norm"),
        *both(f"{THEIRS}.self_attn.q_proj", f"{OURS}.attention.q_proj"),
        *both(f"{THEIRS}.self_attn.k_proj", f"{OURS}.attention.k_proj", ("weight",)),
        *both(f"{THEIRS}.self_attn.v_proj", f"{OURS}.attention.v_proj"),
        *both(f"{THEIRS}.self_attn.out_proj", f"{OURS}.attention.out_proj"),
        *both(f"{THEIRS}.fc1", f"{OURS}.feed_forward.up_proj"),
        *both(f"{THEIRS}.fc2", f"{OURS}.feed_forward.down_proj"),
    ]
    return Table(tuple(names), depth=config.backbone.depth)


WHISPER = Family(
    "whisper",
    ("WhisperForConditionalGeneration", "WhisperModel", "WhisperEncoder"),
    read_settings,
    write_settings,
    table,
    model=AudioModel,
    job=sounds.read_job,
    prepare=encoder_only,
)
