"""What timm's tools ask of a model: its names, arguments and return values."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from diffmm.checks import check_choice
from diffmm.models.backbone import Backbone
from diffmm.models.parameters import AFTER_BLOCKS, decaying

Intermediates = list[Tensor] | list[tuple[Tensor, Tensor]]


class TimmInterface(nn.Module):
    """The part of timm's contract that image and audio models share.

    Attributes:
        pretrained_cfg: What `timm.data.resolve_data_config` reads, as far as a model knows it: the
            size of its inputs, its number of classes, and the names of its first and last layer.
        default_cfg: The same under timm's former name.
    """

    config: Any
    backbone: Backbone
    head: nn.Module
    pretrained_cfg: dict[str, Any]
    default_cfg: dict[str, Any]

    @property
    def num_prefix_tokens(self) -> int:
        """Tokens in front of the patches."""
        raise NotImplementedError

    @property
    def num_classes(self) -> int:
        """Outputs of the head, 0 without one."""
        return int(self.config.num_classes)

    @property
    def num_features(self) -> int:
        """Width of the features."""
        return int(self.config.backbone.dim)

    @property
    def embed_dim(self) -> int:
        """Width of the tokens."""
        return self.num_features

    @property
    def head_hidden_size(self) -> int:
        """Width of what the head reads."""
        return self.num_features

    @property
    def global_pool(self) -> str:
        """How features are pooled, by timm's name: `"token"`, `"avg"` or `"map"`."""
        return {"cls": "token", "mean": "avg"}.get(self.config.pool, self.config.pool)

    @property
    def feature_info(self) -> list[dict[str, Any]]:
        """Name, width and reduction of each block's output."""
        reduction = self.reduction
        return [
            {
                "module": f"backbone.blocks.{index}",
                "num_chs": self.embed_dim,
                "reduction": reduction,
            }
            for index in range(len(self.backbone.blocks))
        ]

    @property
    def reduction(self) -> int:
        """How many pixels (or frames) of a side become one token."""
        raise NotImplementedError

    def get_classifier(self) -> nn.Module:
        """The head."""
        return self.head

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block in the backward pass, for memory."""
        self.backbone.activation_checkpointing = enable

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that take no weight decay though they are no vectors, such as
        positions, class and register tokens."""
        decay = set(decaying(self))
        return {name for name, p in self.named_parameters() if p.ndim > 1 and name not in decay}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Which layer a parameter belongs to, for timm's layer decay: what stands before the
        blocks, each block (or with `coarse` all of them), and what comes behind them."""
        behind = "|".join(name.replace(".", r"\.") for name in AFTER_BLOCKS)
        # What matches nothing is a last layer of its own, above the blocks.
        return {
            "stem": rf"^(?!backbone\.blocks\.|{behind})",
            "blocks": r"^backbone\.blocks" if coarse else [(r"^backbone\.blocks\.(\d+)", None)],
        }

    def prune_intermediate_layers(
        self,
        indices: int | Sequence[int] = 1,
        prune_norm: bool = False,
        prune_head: bool = True,
    ) -> list[int]:
        """Drop the blocks after the last of those that `indices` name (as in
        `forward_intermediates`), and the head; what `features_only=True` of timm does.

        Args:
            indices: Which blocks' outputs are still wanted.
            prune_norm: Whether to drop the final norm too.
            prune_head: Whether to drop the head.

        Returns:
            The numbers of the blocks named.
        """
        taken = self._take_indices(indices)
        depth = taken[-1] + 1
        self.backbone.blocks = self.backbone.blocks[:depth]
        backbone = replace(self.config.backbone, depth=depth)
        self.config = replace(self.config, backbone=backbone)
        self.backbone.config = backbone
        if prune_norm:
            self.backbone.norm = nn.Identity()
        if prune_head:
            self.reset_classifier(0)
        return taken

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new head, with new weights."""
        raise NotImplementedError

    def _take_indices(self, indices: int | Sequence[int] | None) -> list[int]:
        """The blocks that timm's `indices` name, in order."""
        depth = len(self.backbone.blocks)
        if indices is None:
            return list(range(depth))
        if isinstance(indices, int):
            if not 1 <= indices <= depth:
                raise ValueError(f"cannot take the last {indices} of {depth} blocks")
            return list(range(depth - indices, depth))
        for index in indices:
            if not -depth <= index < depth:
                raise ValueError(f"there is no block {index}: the backbone has {depth}")
        return sorted({index % depth for index in indices})

    def _arranged(
        self,
        features: Tensor,
        taken: list[Tensor],
        *,
        grid: tuple[int, ...],
        norm: bool,
        output_fmt: str,
        return_prefix_tokens: bool,
        intermediates_only: bool,
        output_dict: bool,
    ) -> Any:
        """Final features and blocks' outputs as the arguments of `forward_intermediates` say."""
        check_choice("output_fmt", output_fmt, ("NCHW", "NLC"))
        if norm:
            taken = [self.backbone.norm(x) for x in taken]
        prefix = [x[:, : self.num_prefix_tokens] for x in taken]
        patches = [x[:, self.num_prefix_tokens :] for x in taken]
        if output_fmt == "NCHW":
            patches = [x.transpose(1, 2).unflatten(2, grid).contiguous() for x in patches]
        with_prefix = return_prefix_tokens and self.num_prefix_tokens > 0
        if output_dict:
            found: dict[str, Any] = {"image_intermediates": patches}
            if with_prefix:
                found["image_intermediates_prefix"] = prefix
            return found if intermediates_only else {**found, "image_features": features}
        intermediates: Any = list(zip(patches, prefix, strict=True)) if with_prefix else patches
        return intermediates if intermediates_only else (features, intermediates)
