"""The whole models that benchmarks compare: ours and others', of the same dims, weights random.

Widths are the softmax model's; v2 gives the parameters of its extra queries back in the
feed-forward (see `BackboneConfig.feed_forward_width`).
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
    """A decoder of Llama's kind, with untied embeddings.

    Args:
        dim: width of the residual stream.
        depth: blocks.
        num_heads: query heads of the softmax model.
        num_kv_heads: its key and value heads.
        width: of its feed-forward; the others' have as many parameters in all, in steps of 64.
        vocab_size: token ids.
    """

    dim: int
    depth: int
    num_heads: int
    num_kv_heads: int
    width: int
    vocab_size: int

    def ours(self, kind: str, backend: str, length: int) -> TextModel:
        """`kind` is a key of `ATTENTIONS`; `backend` is the attention op's."""
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

    def hugging_face(self, kind: str, length: int) -> nn.Module:
        """`LlamaForCausalLM` for softmax, `DiffLlamaForCausalLM` for v1.

        Compiled with its own `sdpa`, HF hands torch a mask in memory, which keeps it from the flash
        and cuDNN kernels. An attention of another name gets no mask, and so these have HF's best.
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
            attn_implementation="sdpa_without_mask",
        )
        return model_class(config)


@dataclass(frozen=True)
class EncoderSize:
    """A vision transformer's blocks: LayerNorm, GELU, biases, learned positions, a class token."""

    dim: int
    depth: int
    num_heads: int

    def backbone(self, kind: str, backend: str) -> BackboneConfig:
        """`kind` is a key of `ATTENTIONS`; `backend` is the attention op's."""
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
        """Patches of 16, 1000 classes."""
        return ImageModel(
            ImageConfig(
                backbone=self.backbone(kind, backend),
                num_classes=1000,
                learned_positions=True,
                image_size=image_size,
            )
        )

    def audio(self, kind: str, backend: str, clip_seconds: float) -> AudioModel:
        """AST's front end (128 mel bands every 10 ms), patches of 16 side by side, 527 classes."""
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
        """timm's vision transformer with patches of 16.

        Args:
            kind: `"softmax"`, or `"v1"` for `attn_layer="diff"`.
            num_heads: as timm counts them: with `"v1"`, pairs.
            image_size: side of the images.
        """
        sizes: dict[str, Any] = {"img_size": image_size, "embed_dim": self.dim, "depth": self.depth}
        if kind == "v1":
            sizes["attn_layer"] = "diff"
        return timm.create_model("vit_base_patch16_224", num_heads=num_heads, **sizes)


TEXT_748M = TextSize(2048, 12, 16, 16, 5632, 32000)
TEXT_SMOKE = TextSize(64, 2, 8, 2, 192, 256)
TEXT_KV4 = TextSize(2048, 12, 16, 4, 5632, 32000)
# Grouped keys, so that 64 contexts of 32K tokens take 34 GB in bfloat16.
TEXT_GROUPED = TextSize(2048, 8, 16, 4, 5632, 32000)
VIT_B = EncoderSize(768, 12, 12)
VIT_SMOKE = EncoderSize(64, 2, 4)
