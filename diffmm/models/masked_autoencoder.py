"""Masked autoencoding: an encoder learns by reconstructing images or spectrograms."""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from diffmm.checks import Settings
from diffmm.layers.linear import Linear, init_weights
from diffmm.layers.positions import LearnedPositions
from diffmm.models.audio import NO_PATCHES, AudioConfig
from diffmm.models.backbone import Backbone, BackboneConfig
from diffmm.models.encoder import Embedded, Encoder
from diffmm.models.image import ImageConfig
from diffmm.models.pretrained import Pretrained
from diffmm.ops import AttentionMask

ROUNDING = 1e-3
"""Added before rounding down, since a product such as 0.7 * 10 may be just below 7."""


@dataclass(frozen=True)
class MaskedAutoencoderConfig(Settings):
    """Configuration of a masked autoencoder.

    Attributes:
        encoder: Configuration of the model to be trained, without a head (`num_classes=0`).
        decoder: Configuration of a light backbone that is discarded after training. With rope
            `"none"` its positions are learned.
        mask_ratio: Fraction of a sample's patches that are masked, in (0, 1). Common values are
            0.75 for images and 0.8 for audio.
        normalize_targets: Whether each target patch is normalized by its own mean and standard
            deviation.

    Raises:
        ValueError: If a field is out of range; the message names the field and the value.
    """

    encoder: ImageConfig | AudioConfig
    decoder: BackboneConfig
    mask_ratio: float = 0.75
    normalize_targets: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 < self.mask_ratio < 1.0:
            raise ValueError(f"mask_ratio must be between 0 and 1, got {self.mask_ratio}")
        if self.encoder.num_classes:
            raise ValueError(
                f"the encoder of a masked autoencoder has no head: set its num_classes to 0, "
                f"got {self.encoder.num_classes}"
            )
        if self.encoder.patch_shape is None:
            raise ValueError(NO_PATCHES)
        if self.decoder.rope not in ("none", self.encoder.rope_kind):
            raise ValueError(
                f"the decoder's rope must be 'none' or {self.encoder.rope_kind!r}, got "
                f"{self.decoder.rope!r}"
            )
        if self.decoder.rope == "none" and getattr(self.encoder, "clip_seconds", 1.0) is None:
            raise ValueError(
                "the decoder's learned positions need the encoder's clip_seconds: "
                "set it, or set the decoder's rope to '2d'"
            )

    @property
    def input_fields(self) -> tuple[str, ...]:
        """The input fields of the encoder."""
        return self.encoder.input_fields

    @property
    def exact_fields(self) -> tuple[str, ...]:
        """The field of the samples, whose exact values are the targets."""
        return self.encoder.input_fields[:1]


class MaskedPrediction(NamedTuple):
    """Output of a masked autoencoder."""

    loss: Tensor
    """Mean squared error over the values of masked patches, a float32 scalar."""
    prediction: Tensor
    """`[B, N, P]`, the predicted values of every patch, normalized as the targets are."""
    mask: Tensor
    """`[B, N]` booleans, true where a patch was masked and so is part of the loss."""


class MaskedAutoencoder(Pretrained, nn.Module):
    """Mask most patches, encode the rest, predict the masked ones (MAE, He et al. 2022;
    Audio-MAE, Huang et al. 2022).

    The encoder processes only the visible patches; in the decoder a mask token replaces each
    masked patch. Of `n` patches `floor(mask_ratio * n)` are masked, never all of them. For a
    padded clip `n` is the number of real patches; padding is neither encoded nor predicted.

    Attributes:
        encoder: An `ImageModel` or `AudioModel`, the model to fine-tune afterwards.

    >>> model = diffmm.create_model("image/digits_mae_tiny")
    >>> loss, prediction, mask = model(torch.randn(2, 1, 8, 8))
    >>> prediction.shape, int(mask.sum())  # 12 of 16 patches per image are masked
    (torch.Size([2, 16, 4]), 24)
    """

    encoder: Encoder

    def __init__(self, config: MaskedAutoencoderConfig) -> None:
        super().__init__()
        self.config = config
        self.input_fields = config.input_fields
        self.encoder = config.encoder.make()
        assert config.encoder.patch_shape is not None
        dim = config.decoder.dim
        self.decoder_embedding = Linear(self.encoder.num_features, dim)
        self.mask_token = nn.Parameter(torch.empty(dim))
        self.positions = None
        if config.decoder.rope == "none":
            assert self.encoder.max_grid is not None
            self.positions = LearnedPositions(
                self.encoder.max_grid, dim, num_prefix=0, init_std=config.decoder.init_std
            )
        self.decoder = Backbone(config.decoder)
        self.decoder_head = Linear(dim, math.prod(config.encoder.patch_shape))
        for module in (self.decoder_embedding, self.decoder_head):
            init_weights(module, config.decoder.init_std)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialize the mask token."""
        nn.init.trunc_normal_(self.mask_token, std=self.config.decoder.init_std)

    def forward(self, *inputs: Tensor, noise: Tensor | None = None) -> MaskedPrediction:
        """Mask patches at random and predict them.

        Args:
            inputs: Inputs of the encoder: images, or waveforms and optionally `num_samples`.
            noise: `[B, N]` in [0, 1), with `N = encoder.num_patches(*inputs)`; the patches with
                the lowest values stay visible. By default drawn from torch's default generator.

        Raises:
            ValueError: If `noise` has the wrong shape, or the encoder rejects the inputs.
        """
        embedded = self.encoder.embed(*inputs)
        batch, num_patches, _ = embedded.tokens.shape
        if noise is None:
            noise = torch.rand(batch, num_patches, device=embedded.tokens.device)
        if tuple(noise.shape) != (batch, num_patches):
            raise ValueError(
                f"noise has shape {tuple(noise.shape)}, but there are {num_patches} patches in "
                f"each of {batch} samples"
            )
        order, num_visible = self._order(noise, embedded.key_padding)
        is_visible = order.argsort(dim=1) < num_visible
        mask = ~is_visible
        if embedded.key_padding is not None:
            mask = mask & embedded.key_padding
        features = self._encode(embedded, order, num_visible)
        prediction = self._decode(features, embedded, order, is_visible)
        errors = (prediction.float() - self.targets(*inputs)).square().mean(dim=-1)
        # In a batch of one-patch clips nothing is masked: the loss is 0 and not 0 / 0.
        loss = (errors * mask).sum() / mask.sum().clamp(min=1)
        return MaskedPrediction(loss, prediction, mask)

    def targets(self, *inputs: Tensor) -> Tensor:
        """Compute the target values, `[B, N, P]` in float32. Inputs as in `forward`."""
        patches = self.encoder.patchify(*inputs).float()
        if not self.config.normalize_targets:
            return patches
        variance, mean = torch.var_mean(patches, dim=-1, keepdim=True, correction=0)
        return (patches - mean) * torch.rsqrt(variance + 1e-6)

    def _order(self, noise: Tensor, key_padding: Tensor | None) -> tuple[Tensor, Tensor]:
        """Patch indices per sample, visible ones first, then masked ones, then padding, `[B, N]`;
        and the number of visible ones, `[B, 1]`."""
        if key_padding is None:
            num_patches = torch.full_like(noise[:, :1], noise.shape[1])
        else:
            noise = noise.masked_fill(~key_padding, math.inf)
            num_patches = key_padding.sum(dim=1, keepdim=True)
        num_hidden = (num_patches * self.config.mask_ratio + ROUNDING).floor()
        return noise.argsort(dim=1, stable=True), (num_patches - num_hidden).clamp(min=1)

    def _encode(self, embedded: Embedded, order: Tensor, num_visible: Tensor) -> Tensor:
        """Features `[B, P + K, dim]` of the special tokens and the visible patches, where `K` is
        the number of visible patches in a sample without padding."""
        tokens, positions, key_padding = embedded
        num_patches = tokens.shape[1]
        num_kept = max(1, num_patches - int(num_patches * self.config.mask_ratio + ROUNDING))
        kept = order[:, :num_kept]
        if key_padding is not None:
            key_padding = torch.arange(num_kept, device=kept.device) < num_visible
        visible = Embedded(_gather(tokens, kept), positions[kept], key_padding)
        return self.encoder.encode(visible)[0]

    def _decode(
        self, features: Tensor, embedded: Embedded, order: Tensor, is_visible: Tensor
    ) -> Tensor:
        """Predict the values of all patches, `[B, N, P]`, from the visible patches' features."""
        num_prefix = self.encoder.num_prefix_tokens
        prefix, kept = self.decoder_embedding(features).tensor_split([num_prefix], dim=1)
        rank = order.argsort(dim=1).clamp(max=kept.shape[1] - 1)
        tokens = torch.where(is_visible[..., None], _gather(kept, rank), self.mask_token)
        if self.positions is not None:
            tokens = tokens + self.positions(tokens.shape[1])
        full = Embedded(tokens, embedded.positions, embedded.key_padding)
        tokens, positions, key_padding = self.encoder.with_prefix(full, prefix)
        mask = AttentionMask(key_padding=key_padding)
        decoded = self.decoder(tokens, mask=mask, positions=positions)
        return self.decoder_head(decoded[:, num_prefix:])


def _gather(tokens: Tensor, index: Tensor) -> Tensor:
    """Select `tokens[b, index[b]]` for every sample."""
    return tokens.gather(1, index[..., None].expand(-1, -1, tokens.shape[-1]))
