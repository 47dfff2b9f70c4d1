"""The models that benchmarks compare: ours and other libraries', of equal sizes.

Widths are those of the softmax model; v2 compensates for the parameters of its additional queries
in the feed-forward layers (see `BackboneConfig.feed_forward_width`).
"""

from dataclasses import dataclass, replace
from typing import Any

import timm
import transformers
from torch import nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from diffmm.models import (
    AudioConfig,
    AudioModel,
    BackboneConfig,
    ImageConfig,
    ImageModel,
    TextConfig,
    TextModel,
)

ATTENTIONS = {"softmax": "softmax", "v1": "diff_v1", "v2": "diff_v2", "grouped": "diff_grouped"}


@dataclass(frozen=True)
class TextSize:
    """Sizes of a decoder like Llama, with untied embeddings.

    Args:
        dim: Width of the residual stream.
        depth: Number of blocks.
        num_heads: Number of query heads of the softmax model.
        num_kv_heads: Number of key and value heads of the softmax model.
        width: Feed-forward width of the softmax model. The other models get the multiple of 64 with
            which they have the same total number of parameters.
        vocab_size: Number of token ids.
    """

    dim: int
    depth: int
    num_heads: int
    num_kv_heads: int
    width: int
    vocab_size: int

    def ours(self, kind: str, backend: str, length: int) -> TextModel:
        """Build our model. `kind` is a key of `ATTENTIONS`, `backend` that of the attention op."""
        backbone = BackboneConfig(
            dim=self.dim,
            depth=self.depth,
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            attention=ATTENTIONS[kind],
            feed_forward_width=self.width,
            rope="1d",
            backend=backend,
        )
        fewer = backbone.extra_parameters / (3 * self.dim)
        width = 64 * round((self.width - fewer) / 64) if fewer else self.width
        backbone = replace(backbone, feed_forward_width=width)
        return TextModel(TextConfig(self.vocab_size, length, backbone, tie_embeddings=False))

    def hugging_face(
        self, kind: str, length: int, implementation: str = "sdpa_without_mask"
    ) -> nn.Module:
        """Build `LlamaForCausalLM` for softmax, or `DiffLlamaForCausalLM` for v1.

        With its own `sdpa`, HF passes a mask tensor to torch, which rules out the flash and cuDNN
        kernels. An attention function with another name gets no mask, which is HF's fastest option.
        """
        transformers.AttentionInterface.register("sdpa_without_mask", sdpa_attention_forward)
        config_class, model_class = {
            "softmax": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
            "v1": (transformers.DiffLlamaConfig, transformers.DiffLlamaForCausalLM),
        }[kind]
        config = config_class(
            hidden_size=self.dim,
            num_hidden_layers=self.depth,
            num_attention_heads=self.num_heads,
            num_key_value_heads=self.num_kv_heads,
            intermediate_size=self.width,
            vocab_size=self.vocab_size,
            max_position_embeddings=length,
            rms_norm_eps=1e-5,
            tie_word_embeddings=False,
            use_cache=False,
            attn_implementation=implementation,
        )
        return model_class(config)


@dataclass(frozen=True)
class EncoderSize:
    """Sizes of a vision transformer with LayerNorm, GELU, biases, learned position embeddings and a
    class token."""

    dim: int
    depth: int
    num_heads: int

    def backbone(self, kind: str, backend: str) -> BackboneConfig:
        """Config of the blocks. `kind` is a key of `ATTENTIONS`, `backend` that of the op."""
        return BackboneConfig(
            dim=self.dim,
            depth=self.depth,
            num_heads=self.num_heads,
            attention=ATTENTIONS[kind],
            norm="layernorm",
            feed_forward="gelu",
            qkv_bias=True,
            out_bias=True,
            feed_forward_bias=True,
            backend=backend,
        )

    def image(self, kind: str, backend: str, image_size: int) -> ImageModel:
        """Build an image model with patches of 16 and 1000 classes."""
        return ImageModel(
            ImageConfig(
                backbone=self.backbone(kind, backend),
                num_classes=1000,
                learned_positions=True,
                image_size=image_size,
            )
        )

    def audio(self, kind: str, backend: str, clip_seconds: float) -> AudioModel:
        """Build an audio model with AST's front end (128 mel bands every 10 ms), non-overlapping
        patches of 16 and 527 classes."""
        return AudioModel(
            AudioConfig(
                backbone=self.backbone(kind, backend),
                num_classes=527,
                learned_positions=True,
                sample_rate_hz=16000,
                clip_seconds=clip_seconds,
            )
        )

    def timm_image(self, kind: str, num_heads: int, image_size: int) -> nn.Module:
        """Build timm's vision transformer with patches of 16.

        Args:
            kind: `"softmax"`, or `"v1"` for `attn_layer="diff"`.
            num_heads: Number of heads as counted by timm: with `"v1"`, the number of pairs.
            image_size: Height and width of the images.
        """
        sizes: dict[str, Any] = {"img_size": image_size, "embed_dim": self.dim, "depth": self.depth}
        if kind == "v1":
            sizes["attn_layer"] = "diff"
        return timm.create_model("vit_base_patch16_224", num_heads=num_heads, **sizes)


TEXT_748M = TextSize(2048, 12, 16, 16, 5632, 32000)
TEXT_SMOKE = TextSize(64, 2, 8, 2, 192, 256)
TEXT_KV4 = TextSize(2048, 12, 16, 4, 5632, 32000)
# With grouped keys, 64 contexts of 32K tokens take 34 GB in bfloat16.
TEXT_GROUPED = TextSize(2048, 8, 16, 4, 5632, 32000)
VIT_B = EncoderSize(768, 12, 12)
VIT_SMOKE = EncoderSize(64, 2, 4)
