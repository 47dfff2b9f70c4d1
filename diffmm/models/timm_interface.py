"""The interface that timm's tools expect of a model: names, arguments and return values."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from diffmm.checks import check_choice
from diffmm.models.backbone import Backbone
from diffmm.models.job import Job
from diffmm.models.parameters import AFTER_BLOCKS, decaying

Intermediates = list[Tensor] | list[tuple[Tensor, Tensor]]


class TimmInterface(nn.Module):
    """The part of timm's model interface that image and audio models share.

    Attributes:
        pretrained_cfg: The values read by `timm.data.resolve_model_data_config` that a model has:
            input size, number of classes, the names of the first and the last layer and, for a
            trained image model, its preprocessing (mean, std, crop, interpolation).
        default_cfg: The same dict under timm's former name.
    """

    config: Any
    backbone: Backbone
    head: nn.Module
    pretrained_cfg: dict[str, Any]
    default_cfg: dict[str, Any]
    _job: Job | None = None

    @property
    def job(self) -> Job | None:
        """The preprocessing of the inputs and the meaning of the outputs, if the model is trained.
        Setting it updates `pretrained_cfg`."""
        return self._job

    @job.setter
    def job(self, job: Job | None) -> None:
        self._job = job
        self._describe_to_timm()

    def _describe_to_timm(self) -> None:
        """Set `pretrained_cfg`."""
        raise NotImplementedError

    @property
    def num_prefix_tokens(self) -> int:
        """Number of special tokens before the patches."""
        raise NotImplementedError

    @property
    def num_classes(self) -> int:
        """Number of output classes; 0 without a head."""
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
        """Width of the head's input."""
        return self.num_features

    @property
    def global_pool(self) -> str:
        """How features are pooled, by timm's name: `"token"`, `"avg"` or `"map"`."""
        timms = {"cls": "token", "cls_dist": "token", "mean": "avg"}
        return timms.get(self.config.pool, self.config.pool)

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
        """Number of pixels (or frames) per token along one axis."""
        raise NotImplementedError

    def get_classifier(self) -> nn.Module:
        """Return the head."""
        return self.head

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Enable activation checkpointing: recompute each block in the backward pass."""
        self.backbone.activation_checkpointing = enable

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters without weight decay that are not vectors, such as positions,
        class and register tokens."""
        decay = set(decaying(self))
        return {name for name, p in self.named_parameters() if p.ndim > 1 and name not in decay}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns of the layers for timm's layer-wise decay: the stem before the blocks, and each
        block (or with `coarse` all of them)."""
        behind = "|".join(name.replace(".", r"\.") for name in AFTER_BLOCKS)
        # timm puts parameters that match no pattern into a last layer, after the blocks.
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
        """Remove the blocks after the last of `indices` (as in `forward_intermediates`) and the
        head, as timm's `features_only=True` does.

        Args:
            indices: Indices of the blocks whose outputs are still needed.
            prune_norm: Whether to remove the final norm.
            prune_head: Whether to remove the head.

        Returns:
            The selected block indices, in ascending order.
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
        """Replace the head by one with newly initialized weights."""
        raise NotImplementedError

    def _take_indices(self, indices: int | Sequence[int] | None) -> list[int]:
        """Block indices, in ascending order, of timm's `indices` argument."""
        depth = len(self.backbone.blocks)
        if indices is None:
            return list(range(depth))
        if isinstance(indices, int):
            if not 1 <= indices <= depth:
                raise ValueError(
                    f"indices must be between 1 and the number of blocks {depth}, got {indices}"
                )
            return list(range(depth - indices, depth))
        for index in indices:
            if not -depth <= index < depth:
                raise ValueError(f"block {index} does not exist: the backbone has {depth} blocks")
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
        """Arrange features and intermediates as `forward_intermediates` documents."""
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
