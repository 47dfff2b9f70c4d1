"""The encoder that image and audio models share: special tokens, positions, pooling, head."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from diffmm.batch import InputShapes
from diffmm.checks import Settings, check_choice
from diffmm.layers.feed_forward import GELU, QuickGELU, TanhGELU
from diffmm.layers.head import DistilledHead
from diffmm.layers.linear import Linear, init_weights
from diffmm.layers.norm import upcast
from diffmm.layers.pool import AttentionPool
from diffmm.layers.positions import Grid, LearnedPositions, resample
from diffmm.layers.registry import Layer, registration
from diffmm.models.backbone import Backbone, BackboneConfig
from diffmm.models.pretrained import Pretrained
from diffmm.models.timm_interface import TimmInterface
from diffmm.ops import AttentionMask

POOLS = {
    "cls": "cls",
    "token": "cls",
    "cls_dist": "cls_dist",
    "mean": "mean",
    "avg": "mean",
    "map": "map",
}
"""Pooling methods, by diffmm's names and by timm's."""

PLAIN_GELUS = {"gelu": GELU, "gelu_tanh": TanhGELU, "quick_gelu": QuickGELU}
"""Feed-forward layers whose activation the pool `"map"` uses too; with others it uses GELU."""

HEADS: dict[str, type[nn.Module]] = {"linear": Linear, "distilled": DistilledHead}
"""Values of `EncoderConfig.head`: classes constructed from a width and a number of classes."""


def register_head(name: str) -> Callable[[Layer], Layer]:
    """Class decorator that makes a head available as `EncoderConfig(head=name)`. It is constructed
    as `Head(dim, num_classes)` and maps pooled features `[B, dim]` to logits
    `[B, num_classes]`."""
    return registration(HEADS, name)


@dataclass(frozen=True, kw_only=True)
class EncoderConfig(Settings):
    """Configuration that image and audio models share.

    Attributes:
        backbone: Configuration of the blocks, with the modality's rotary positions or none.
        num_classes: Number of output classes; 0 means no head, and the model returns pooled
            features.
        cls_token: Whether the sequence starts with a class token.
        dist_token: Whether a distillation token follows the class token (DeiT, AST).
        num_reg_tokens: Number of register tokens after those; the head does not read them (Darcet
            et al. 2024).
        pool: Input of the head: the class token (`"cls"`, timm's `"token"`), the class and the
            distillation token (`"cls_dist"`), the mean over the patches (`"mean"`, timm's `"avg"`),
            or attention of a learned query over all tokens (`"map"`, Zhai et al. 2022).
        pool_prefix_tokens: Whether the pools `"mean"` and `"map"` include the special tokens; by
            default `"map"` does and `"mean"` does not.
        pool_heads: Number of attention heads of the pool `"map"`; those of the backbone by default.
        pool_width: Hidden width of the feed-forward layer of the pool `"map"`; `4 * dim` by
            default.
        pool_norm: Whether the pooled features are normalized. timm's models with the pool `"avg"`
            do this instead of the backbone's `final_norm`.
        head: `"linear"`, which with the pool `"cls_dist"` reads the mean of the two tokens (AST);
            `"distilled"`, the mean of a linear layer for each of them (DeiT); or a head added by
            `register_head`.
        head_bias: Whether the head `"linear"` has a bias; the projections of CLIP have none.
        learned_positions: Whether every position has a learned embedding, in addition to or
            instead of rotary positions.
        prefix_positions: Whether the special tokens have such embeddings too.
        pre_norm: Whether the tokens are normalized before the first block, as in CLIP.

    Raises:
        ValueError: If a field is out of range; the message names the field and the value.
    """

    backbone: BackboneConfig
    num_classes: int = 0
    cls_token: bool = True
    dist_token: bool = False
    num_reg_tokens: int = 0
    pool: Literal["cls", "token", "cls_dist", "mean", "avg", "map"] = "cls"
    pool_prefix_tokens: bool | None = None
    pool_heads: int | None = None
    pool_width: int | None = None
    pool_norm: bool = False
    head: str = "linear"
    head_bias: bool = True
    learned_positions: bool = False
    prefix_positions: bool = True
    pre_norm: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("num_classes", "num_reg_tokens"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")
        check_choice("pool", self.pool, POOLS)
        object.__setattr__(self, "pool", POOLS[self.pool])
        check_choice("head", self.head, HEADS)
        if self.pool == "cls" and not self.cls_token:
            raise ValueError("pool='cls' needs cls_token=True: set it, or use pool='mean'")
        if self.pool == "cls_dist" and not (self.cls_token and self.dist_token):
            raise ValueError(
                "pool='cls_dist' needs cls_token=True and dist_token=True: set them, or use "
                "pool='mean'"
            )
        if self.head == "distilled" and self.pool != "cls_dist":
            raise ValueError(f"head='distilled' needs pool='cls_dist', got pool={self.pool!r}")
        if not self.head_bias and self.head != "linear":
            raise ValueError(f"head_bias=False is for head='linear', got head={self.head!r}")
        if self.pool_prefix_tokens is not None and self.pool not in ("mean", "map"):
            raise ValueError(
                f"pool_prefix_tokens={self.pool_prefix_tokens} is not used by pool={self.pool!r}: "
                f"leave it out"
            )
        for name in ("pool_heads", "pool_width"):
            value = getattr(self, name)
            if value is not None and (self.pool != "map" or value < 1):
                raise ValueError(
                    f"{name} must be at least 1 and is for pool='map' only, got {value} with "
                    f"pool={self.pool!r}"
                )
        if self.pool_heads is not None and self.backbone.dim % self.pool_heads:
            raise ValueError(
                f"pool_heads must divide the backbone's dim {self.backbone.dim}, got "
                f"{self.pool_heads}"
            )
        if not self.prefix_positions and not self.learned_positions:
            raise ValueError("prefix_positions=False is for learned_positions=True: leave it out")
        if self.backbone.rope not in ("none", self.rope_kind):
            raise ValueError(
                f"the tokens have {self.rope_kind} positions, but the backbone's rope is "
                f"{self.backbone.rope!r}: set it to {self.rope_kind!r} or 'none'"
            )
        if self.backbone.rope == "none" and not self.learned_positions:
            raise ValueError(
                f"tokens have no positions: set the backbone's rope to {self.rope_kind!r} "
                f"or set learned_positions=True"
            )

    input_fields: ClassVar[tuple[str, ...]]
    """The batch fields that the model takes, in the order of its `forward`; the first contains
    the samples."""

    exact_fields: ClassVar[tuple[str, ...]] = ()
    """The input fields that low precision (`bf16-true`, `16-true`) must not cast."""

    @property
    def pools_prefix_tokens(self) -> bool:
        """Whether the pools `"mean"` and `"map"` include the special tokens, given or derived."""
        return self.pool == "map" if self.pool_prefix_tokens is None else self.pool_prefix_tokens

    @property
    def num_prefix_tokens(self) -> int:
        """Number of special tokens before the patches: class token, distillation token and
        register tokens."""
        return int(self.cls_token) + int(self.dist_token) + self.num_reg_tokens

    @property
    def num_axes(self) -> int:
        """Number of axes of the tokens' positions; 2 for rows and columns."""
        return 2

    @property
    def rope_kind(self) -> str:
        """The kind of rotary positions that matches the tokens, such as `"2d"`."""
        return f"{self.num_axes}d"

    def make(self) -> "Encoder":
        """Build the model of this config, with newly initialized weights."""
        raise NotImplementedError

    def input_shapes(self, batch_size: int, length: int | None = None) -> InputShapes:
        """Shape and dtype of each of `input_fields` for a batch of `batch_size` samples.

        Args:
            batch_size: Number of samples per batch.
            length: Length of a sample in the model's own units, if it is not fixed.
        """
        raise NotImplementedError

    @property
    def patch_shape(self) -> tuple[int, ...] | None:
        """Shape of one patch in `Encoder.patchify`, channels last; None if patches overlap."""
        raise NotImplementedError


class Embedded(NamedTuple):
    """Patch tokens for the backbone, without special tokens."""

    tokens: Tensor
    """`[B, N, dim]`, including learned positions."""
    positions: Tensor
    """Rotary coordinates, `[N]` or `[B, N]`, with a last axis of size `num_axes` if there are
    several. Unused by a backbone without rope."""
    key_padding: Tensor | None
    """`[B, N]` booleans, true where a patch is real; None if all are real."""


class Encoder(Pretrained, TimmInterface):
    """Transformer encoder and classifier over patches, with timm's interface.

    The model of a modality adds `embed`, `patchify` and `num_patches`, which take its inputs.

    Args:
        config: Configuration of the model.
        max_grid: Maximum number of tokens along each axis; None means no limit, which learned
            positions do not allow.
    """

    config: EncoderConfig

    embed: Callable[..., Embedded]
    """Turns inputs into patch tokens."""
    patchify: Callable[..., Tensor]
    """Turns inputs into patch contents, `[B, N, prod(patch_shape)]`, before any augmentation."""
    num_patches: Callable[..., int]
    """Number of patches `N` of the inputs."""

    def __init__(self, config: EncoderConfig, max_grid: Grid | None) -> None:
        super().__init__()
        self.config = config
        self.max_grid = max_grid
        dim, num_prefix = config.backbone.dim, self.num_prefix_tokens
        self.cls_token = nn.Parameter(torch.empty(1, dim)) if config.cls_token else None
        self.dist_token = nn.Parameter(torch.empty(1, dim)) if config.dist_token else None
        self.reg_token = (
            nn.Parameter(torch.empty(config.num_reg_tokens, dim)) if config.num_reg_tokens else None
        )
        self.positions = None
        if config.learned_positions:
            assert max_grid is not None
            num_placed = num_prefix if config.prefix_positions else 0
            self.positions = LearnedPositions(max_grid, dim, num_placed, config.backbone.init_std)
        self.pre_norm = config.backbone.make_norm() if config.pre_norm else None
        self.backbone = Backbone(config.backbone)
        self.pooling = _make_pooling(config)
        self.pool_norm = config.backbone.make_norm() if config.pool_norm else None
        self.head = _make_head(config)
        self.reset_parameters()
        self._describe_to_timm()

    def reset_parameters(self) -> None:
        """Initialize the special tokens."""
        for parameter in self.parameters(recurse=False):
            nn.init.trunc_normal_(parameter, std=self.config.backbone.init_std)

    @property
    def input_fields(self) -> tuple[str, ...]:
        """The batch fields that `forward` takes, in order."""
        return self.config.input_fields

    @property
    def num_prefix_tokens(self) -> int:
        """Number of special tokens before the patches, as in `EncoderConfig`."""
        return self.config.num_prefix_tokens

    def encode(
        self, embedded: Embedded, indices: Sequence[int] = (), *, stop_early: bool = False
    ) -> tuple[Tensor, list[Tensor]]:
        """Run the backbone over special tokens and patches, or a subset of the patches.

        Special tokens have position 0 on every axis, where rope does not rotate. With
        `stop_early` the blocks after the last of `indices` are skipped.

        Returns:
            Features `[B, P + N, dim]` after the final norm, `P` special tokens first, and a list
            of the outputs of the blocks in `indices`, of the same shape, before the final norm.
        """
        parts: list[Tensor] = [
            part for part in (self.cls_token, self.dist_token, self.reg_token) if part is not None
        ]
        if parts:
            prefix = torch.cat(parts)
            if self.positions is not None and self.positions.prefix is not None:
                prefix = prefix + self.positions.prefix
            embedded = self.with_prefix(embedded, prefix)
        tokens, positions, key_padding = embedded
        if self.pre_norm is not None:
            tokens = self.pre_norm(tokens)
        mask = AttentionMask(key_padding=key_padding)
        if not indices:
            return self.backbone(tokens, mask=mask, positions=positions), []
        return self.backbone(
            tokens, mask=mask, positions=positions, indices=indices, stop_early=stop_early
        )

    def with_prefix(self, embedded: Embedded, prefix: Tensor) -> Embedded:
        """Prepend special tokens, `[P, dim]` or `[B, P, dim]`, to the patches."""
        tokens, positions, key_padding = embedded
        num_prefix = prefix.shape[-2]
        tokens = torch.cat([prefix.expand(tokens.shape[0], -1, -1), tokens], dim=1)
        coordinate_axis = (0, 0) if self.config.num_axes > 1 else ()
        positions = pad(positions, (*coordinate_axis, num_prefix, 0))
        if key_padding is not None:
            key_padding = pad(key_padding, (num_prefix, 0), value=True)
        return Embedded(tokens, positions, key_padding)

    def forward_head(
        self, features: Tensor, pre_logits: bool = False, *, key_padding: Tensor | None = None
    ) -> Tensor:
        """Pool the features and classify them.

        Args:
            features: `[B, P + N, dim]`, as returned by `forward_features`.
            pre_logits: Whether to return the pooled features.
            key_padding: `[B, N]` booleans, true where a patch is real; all by default. Unused when
                only special tokens are pooled.

        Returns:
            Logits `[B, num_classes]`, or `[B, dim]` without a head or with `pre_logits`.
        """
        if self.config.pool == "cls":
            pooled = features[:, 0]
        elif self.config.pool == "cls_dist":
            pooled = features[:, :2]
            if pre_logits or not isinstance(self.head, DistilledHead):
                pooled = pooled.mean(dim=1)
        else:
            pooled = self._pooled(features, key_padding)
        if self.pool_norm is not None:
            pooled = self.pool_norm(pooled)
        return pooled if pre_logits else self.head(pooled)

    def _pooled(self, features: Tensor, key_padding: Tensor | None) -> Tensor:
        """Pool the patches, and with `pools_prefix_tokens` also the special tokens."""
        if not self.config.pools_prefix_tokens:
            features = features[:, self.num_prefix_tokens :]
        elif key_padding is not None:
            key_padding = pad(key_padding, (self.num_prefix_tokens, 0), value=True)
        if self.pooling is not None:
            return self.pooling(features, key_padding)
        if key_padding is None:
            return features.mean(dim=1)
        real = upcast(features).masked_fill(~key_padding[..., None], 0.0).sum(dim=1)
        return (real / key_padding.sum(dim=1, keepdim=True)).to(features.dtype)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the head by one with newly initialized weights.

        Args:
            num_classes: Number of output classes; 0 means no head.
            global_pool: Pooling method, as in `EncoderConfig.pool`; unchanged by default.

        Raises:
            ValueError: If `EncoderConfig` rejects a value.
        """
        changes: dict[str, Any] = {} if global_pool is None else {"pool": global_pool}
        old_pool = self.config.pool
        self.config = replace(self.config, num_classes=num_classes, **changes)
        weight = next(self.backbone.parameters())
        place: dict[str, Any] = {"device": weight.device, "dtype": weight.dtype}
        self.head = _make_head(self.config).to(**place).train(self.training)
        if self.config.pool != old_pool:
            pooling = _make_pooling(self.config)
            self.pooling = pooling and pooling.to(**place).train(self.training)
        self._describe_to_timm()

    def _describe_to_timm(self) -> None:
        self.pretrained_cfg = self.default_cfg = {
            "num_classes": self.num_classes,
            "classifier": "head",
            **self.timm_cfg(),
        }

    def timm_cfg(self) -> dict[str, Any]:
        """Entries of `pretrained_cfg` that are specific to the modality."""
        return {}

    def resample_weights(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """Resample the learned positions in `weights` to this model's grid.

        Without learned positions, or if the grids agree, `weights` are returned unchanged.
        """
        name = "positions.grid"
        if self.positions is None or name not in weights:
            return weights
        old, new = weights[name], self.positions.grid
        if old.ndim != new.ndim or old.shape[-1] != new.shape[-1]:
            return weights
        return {**weights, name: self._resample_positions(old, tuple(new.shape[:-1]))}

    def _resample_positions(self, positions: Tensor, grid: Grid) -> Tensor:
        return resample(positions, grid)

    def _set_grid(self, grid: Grid) -> None:
        """Change `max_grid` and resample the learned positions, which become a new parameter."""
        old_grid, self.max_grid = self.max_grid, grid
        if self.positions is not None and grid != old_grid:
            old = self.positions.grid
            new = self._resample_positions(old.detach(), grid)
            self.positions.grid = nn.Parameter(new, requires_grad=old.requires_grad)


def _make_head(config: EncoderConfig) -> nn.Module:
    if not config.num_classes:
        return nn.Identity()
    arguments = {} if config.head_bias else {"bias": False}
    head = HEADS[config.head](config.backbone.dim, config.num_classes, **arguments)
    return head.apply(partial(init_weights, std=config.backbone.init_std))


def _make_pooling(config: EncoderConfig) -> AttentionPool | None:
    if config.pool != "map":
        return None
    backbone = config.backbone
    pooling = AttentionPool(
        backbone.dim,
        config.pool_heads or backbone.num_heads,
        config.pool_width or 4 * backbone.dim,
        backbone.init_std,
        norm_eps=backbone.norm_eps,
        activation=PLAIN_GELUS.get(backbone.feed_forward, GELU).activate,
    )
    return pooling.apply(partial(init_weights, std=backbone.init_std))
