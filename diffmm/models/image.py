"""The image model: a vision transformer."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from diffmm.batch import InputShapes
from diffmm.checks import check_choice
from diffmm.layers.linear import INIT_STD, init_weights
from diffmm.layers.patch import PatchEmbedding, Size, as_size, patchify
from diffmm.layers.positions import coordinates, normalized_coordinates
from diffmm.models.encoder import Embedded, Encoder, EncoderConfig

PREPROCESSING = ("mean", "std", "interpolation", "crop_pct", "crop_mode")
"""Settings of a reader of images that `timm.data.resolve_model_data_config` reads."""


@dataclass(frozen=True, kw_only=True)
class ImageConfig(EncoderConfig):
    """Configuration of an image model, in addition to the fields of `EncoderConfig`.

    Attributes:
        image_size: Side of the images in pixels, or height and width; a multiple of `patch_size`,
            unless `ignore_remainder`.
        patch_size: Side of a patch in pixels, or height and width.
        in_channels: Number of input channels `C`; 3 for color images.
        ignore_remainder: Whether pixels at the bottom and the right that no whole patch covers are
            ignored, as in timm; otherwise image sizes must be multiples of `patch_size`.
        patch_bias: Whether the patch embedding has a bias.
        rope_coordinates: Rotary coordinates are counted in `"patches"`, or `"normalized"` to the
            image, whatever its size (DINOv3; see `diffmm.layers.positions`).
        rope_image_size: Image size that defines the rotary coordinates; the grid of other sizes is
            stretched over it. `image_size` by default. For a model used at another size than
            it was trained at, this is the training size; `ImageModel.set_input_size` keeps it.

    Raises:
        ValueError: If a field is out of range; the message names the field and the value.
    """

    input_fields: ClassVar[tuple[str, ...]] = ("images",)

    image_size: int | tuple[int, int]
    patch_size: int | tuple[int, int] = 16
    in_channels: int = 3
    ignore_remainder: bool = False
    patch_bias: bool = True
    rope_coordinates: Literal["patches", "normalized"] = "patches"
    rope_image_size: int | tuple[int, int] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.in_channels < 1:
            raise ValueError(f"in_channels must be at least 1, got {self.in_channels}")
        if min(as_size(self.patch_size)) < 1:
            raise ValueError(f"patch_size must be at least 1, got {self.patch_size}")
        check_choice("rope_coordinates", self.rope_coordinates, ("patches", "normalized"))
        if self.rope_coordinates == "normalized" and self.backbone.rope == "none":
            raise ValueError(
                "rope_coordinates='normalized' is not used by a backbone with rope 'none': leave "
                "it out"
            )
        if self.rope_coordinates == "normalized" and self.rope_image_size is not None:
            raise ValueError(
                f"rope_image_size={self.rope_image_size} is not used by "
                f"rope_coordinates='normalized': leave it out"
            )
        if self.rope_image_size is not None and self.backbone.rope == "none":
            raise ValueError(
                "rope_image_size is not used by a backbone with rope 'none': leave it out"
            )
        self.grid_of("image_size")
        self.grid_of("rope_image_size")

    @property
    def grid(self) -> Size:
        """Number of rows and columns of patches."""
        return self.grid_of("image_size")

    @property
    def patch_shape(self) -> tuple[int, ...]:
        """Height, width and channels of a patch."""
        return (*as_size(self.patch_size), self.in_channels)

    def make(self) -> "ImageModel":
        return ImageModel(self)

    def input_shapes(self, batch_size: int, length: int | None = None) -> InputShapes:
        height, width = as_size(self.image_size)
        return {"images": ((batch_size, self.in_channels, height, width), torch.float32)}

    def grid_of(self, name: str) -> Size:
        """Number of rows and columns of patches for the image size in field `name`."""
        value = getattr(self, name) or self.image_size
        (height, width), (rows, columns) = as_size(value), as_size(self.patch_size)
        is_whole = height % rows == 0 and width % columns == 0
        if min(height, width) < 1 or not (is_whole or self.ignore_remainder):
            raise ValueError(
                f"{name} {height}x{width} is not a multiple of patch_size {rows}x{columns}"
            )
        if height < rows or width < columns:
            raise ValueError(f"{name} {height}x{width} is smaller than a patch {rows}x{columns}")
        return height // rows, width // columns


class ImageModel(Encoder):
    """Vision transformer (ViT, Dosovitskiy et al. 2021) with timm's interface.

    Rotary coordinates are 2-D, rows then columns; by default in patches, starting at 1.

    >>> model = diffmm.create_model("image/cifar10", depth=2, num_classes=5)
    >>> images = torch.randn(2, 3, 32, 32)
    >>> model(images).shape, model.forward_features(images).shape[0]
    (torch.Size([2, 5]), 2)
    """

    config: ImageConfig

    def __init__(self, config: ImageConfig) -> None:
        super().__init__(config, config.grid)
        self.patch_embedding = PatchEmbedding(
            config.in_channels,
            config.backbone.dim,
            as_size(config.patch_size),
            bias=config.patch_bias,
        )
        self.patch_embedding.apply(partial(init_weights, std=INIT_STD))

    def forward(self, images: Tensor) -> Tensor:
        """Compute logits `[B, num_classes]` of `images`, `[B, C, H, W]`, or pooled features
        `[B, dim]` without a head.

        Raises:
            ValueError: If the images do not have the model's size.
        """
        return self.forward_head(self.forward_features(images))

    def forward_features(self, images: Tensor) -> Tensor:
        """Features `[B, P + N, dim]` after the final norm, `P` special tokens first."""
        return self.encode(self.embed(images))[0]

    def forward_intermediates(
        self,
        images: Tensor,
        indices: int | Sequence[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: Literal["NCHW", "NLC"] = "NCHW",
        intermediates_only: bool = False,
        output_dict: bool = False,
    ) -> Any:
        """Return patch features after several blocks, as timm's models do.

        Args:
            images: `[B, C, H, W]`.
            indices: Block indices (negative ones count from the end), or an integer `n` for the
                last `n` blocks; all blocks by default. Results are in ascending order.
            return_prefix_tokens: Whether to return each intermediate as a pair of the patches and
                the class and register tokens, `[B, P, dim]`.
            norm: Whether to apply the final norm to each intermediate.
            stop_early: Whether to skip the blocks after the last index; the final features are
                then those of that block.
            output_fmt: `"NCHW"` for `[B, dim, rows, columns]`, `"NLC"` for `[B, N, dim]`.
            intermediates_only: Whether to return the intermediates without the final features.
            output_dict: Whether to return a dict with `"image_features"` and
                `"image_intermediates"` (and `"image_intermediates_prefix"`).

        Returns:
            The output of `forward_features` and the list of intermediates, or only the list.

        Raises:
            ValueError: If an index or `output_fmt` is invalid.
        """
        features, taken = self.encode(
            self.embed(images), self._take_indices(indices), stop_early=stop_early
        )
        return self._arranged(
            features,
            taken,
            grid=self.config.grid,
            norm=norm,
            output_fmt=output_fmt,
            return_prefix_tokens=return_prefix_tokens,
            intermediates_only=intermediates_only,
            output_dict=output_dict,
        )

    def embed(self, images: Tensor) -> Embedded:
        """Turn images `[B, C, H, W]` into patch tokens, row by row."""
        self._check(images)
        tokens = self.patch_embedding(images.to(self.patch_embedding.proj.weight.dtype))
        if self.positions is not None:
            tokens = tokens + self.positions(tokens.shape[1])
        if self.config.rope_coordinates == "normalized":
            positions = normalized_coordinates(self.config.grid, images.device)
        else:
            reference = self.config.grid_of("rope_image_size")
            positions = coordinates(self.config.grid, reference, images.device)
        return Embedded(tokens, positions, key_padding=None)

    def patchify(self, images: Tensor) -> Tensor:
        """The pixels of each patch, `[B, N, h * w * C]`."""
        self._check(images)
        height, width = as_size(self.config.patch_size)
        rows, columns = self.config.grid
        whole = images[:, :, : rows * height, : columns * width]
        return patchify(whole, (height, width))

    def num_patches(self, images: Tensor) -> int:
        """Number of patches `N`, the same for all images."""
        rows, columns = self.config.grid
        return rows * columns

    def set_input_size(
        self,
        img_size: int | tuple[int, int] | None = None,
        patch_size: int | tuple[int, int] | None = None,
    ) -> None:
        """Change the size of the images or patches. Resampled weights become new parameters, so
        call this before creating an optimizer.

        Learned positions are resampled to the new grid, and the patch embedding to the new patch
        size (FlexiViT, Beyer et al. 2023). Rotary coordinates in patches are stretched over the
        training grid, so that a place in the image keeps its coordinates; normalized ones do not
        depend on the size.

        Args:
            img_size: Side of the images in pixels, or height and width; unchanged by default.
            patch_size: Side of a patch, or height and width; unchanged by default.

        Raises:
            ValueError: If the image size is not a multiple of the patch size.
        """
        changes: dict[str, Any] = {}
        if img_size is not None:
            changes["image_size"] = img_size
        if patch_size is not None:
            changes["patch_size"] = patch_size
        if self.backbone.rope is not None and self.config.rope_coordinates == "patches":
            changes["rope_image_size"] = self._rope_image_size(patch_size)
        self.config = replace(self.config, **changes)
        if patch_size is not None:
            self.patch_embedding.set_patch_size(as_size(patch_size))
        self._set_grid(self.config.grid)
        self._describe_to_timm()

    def _rope_image_size(self, patch_size: int | tuple[int, int] | None) -> Size:
        """The image size that, in patches of the new size, has the grid that rotary coordinates
        were trained on."""
        rows, columns = self.config.grid_of("rope_image_size")
        height, width = as_size(patch_size or self.config.patch_size)
        return rows * height, columns * width

    @property
    def reduction(self) -> int:
        return max(as_size(self.config.patch_size))

    def timm_cfg(self) -> dict[str, Any]:
        reader = {} if self.job is None or self.job.reader is None else self.job.reader["init_args"]
        return {
            **{name: _plain(reader[name]) for name in PREPROCESSING if name in reader},
            "input_size": (self.config.in_channels, *as_size(self.config.image_size)),
            "fixed_input_size": True,
            "pool_size": None,
            "first_conv": "patch_embedding.proj",
        }

    def _check(self, images: Tensor) -> None:
        size = as_size(self.config.image_size)
        if images.ndim != 4 or images.shape[1] != self.config.in_channels:
            raise ValueError(
                f"images must be [B, {self.config.in_channels}, H, W], "
                f"got shape {tuple(images.shape)}"
            )
        if tuple(images.shape[2:]) != size:
            raise ValueError(
                f"images are {images.shape[2]}x{images.shape[3]}, but the model takes "
                f"{size[0]}x{size[1]}: resize them, or call "
                f"set_input_size(({images.shape[2]}, {images.shape[3]}))"
            )


def _plain(value: Any) -> Any:
    """A value as timm writes it: a tuple instead of a list."""
    return tuple(value) if isinstance(value, list) else value
