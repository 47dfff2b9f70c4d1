"""The evaluation preprocessing of images."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from datamodules.image.files import EXTENSIONS, MAX_PIXELS, PILLOWS_MOST, picture, read_image
from datamodules.image.transform import ImageTransform, Transform
from datamodules.image.values import array_bytes
from datamodules.shared.bad_samples import BadSampleError
from datamodules.shared.reader import Reader
from datamodules.shared.stored import AnyFile
from diffmm.checks import DataError, Settings, check_choice

MODES = {1: "L", 3: "RGB"}
"""Pillow's mode for each number of channels."""


@dataclass(frozen=True, kw_only=True)
class ImageReader(Settings, Reader):
    """Reads images and resizes, crops and normalizes them as timm does in evaluation.

    Attributes:
        image_size: Height and width of the model's input, in pixels.
        channels: Number of channels, 1 for gray or 3 for color.
        interpolation: Interpolation, as in `ImageTransform`; required here.
        crop_pct: Crop fraction, as in `ImageTransform`; required here.
        crop_mode: Crop mode, as in `ImageTransform`; required here.
        mean: Mean per channel, as in `ImageTransform`; required here.
        std: Standard deviation per channel, as in `ImageTransform`; required here.
        max_pixels: Maximum number of pixels; larger images raise an error.

    Raises:
        ValueError: If a field is out of range; the message names the field and the value.
    """

    class_path: ClassVar[str] = "datamodules.image.ImageReader"
    extensions: ClassVar[tuple[str, ...]] = EXTENSIONS
    kind: ClassVar[str] = "image"
    data_class: ClassVar[str] = "datamodules.image.ImageData"

    image_size: tuple[int, int]
    channels: int
    interpolation: str
    crop_pct: float
    crop_mode: Literal["center", "squash", "border"]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    max_pixels: int = MAX_PIXELS

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("image_size", "mean", "std"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if len(self.image_size) != 2 or not all(
            isinstance(side, int) and side >= 1 for side in self.image_size
        ):
            raise ValueError(f"image_size must be a height and a width, got {self.image_size}")
        check_choice("channels", self.channels, MODES)
        if not 1 <= self.max_pixels <= PILLOWS_MOST:
            raise ValueError(f"max_pixels must be in [1, {PILLOWS_MOST}], got {self.max_pixels}")
        _ = self.transform  # runs its checks

    @cached_property
    def transform(self) -> Transform:
        """The transform from an image of mode `MODES[channels]` to a tensor `[C, H, W]`."""
        transform = ImageTransform(
            interpolation=self.interpolation,
            crop_pct=self.crop_pct,
            crop_mode=self.crop_mode,
            mean=self.mean,
            std=self.std,
        )
        return transform.build(ImageTransform(), self.image_size, self.channels, training=False)

    def convert(self, image: Image.Image) -> Image.Image:
        """Convert an image to the model's mode."""
        return image.convert(MODES[self.channels])

    def pixels(self, image: Image.Image) -> Tensor:
        """The model's input `[C, H, W]` for an image in mode L or RGB."""
        return self.transform(self.convert(image))

    def read(self, item: Any) -> dict[str, Any]:
        """Read an image as `{"images": [C, H, W]}`.

        Args:
            item: The path of a file, a Pillow image, or pixels: a NumPy array `[H, W]` or
                `[H, W, C]`, or a tensor `[H, W]` or `[C, H, W]`, with 1, 3 or 4 channels (the
                fourth is alpha), in uint8, uint16 (white is 65,535) or floats in [0, 1].

        Raises:
            BadSampleError: If the file cannot be read; the message names it.
            ValueError: If `item` has another type, shape, dtype or range.
        """
        if isinstance(item, str | Path):
            return {"images": self.pixels(self._from_file(Path(item)))}
        if isinstance(item, Image.Image):
            try:
                return {"images": self.pixels(picture(item.copy(), self.max_pixels))}
            except DataError as error:
                raise DataError(f"an image {error}") from error
        return {"images": self.pixels(picture(_from_array(item), self.max_pixels))}

    def collate(self, samples: list[dict[str, Any]]) -> dict[str, Tensor]:
        return {"images": torch.stack([sample["images"] for sample in samples])}

    def _from_file(self, path: Path) -> Image.Image:
        return read_named(path, str(path), self.max_pixels)


def read_named(path: AnyFile, name: str, max_pixels: int) -> Image.Image:
    """Read an image file (see `read_image`); error messages start with `name`.

    Raises:
        BadSampleError: If it cannot be read.
    """
    try:
        return read_image(path, max_pixels)
    except DataError as error:
        fault, cause = str(error), error.__cause__
    except Exception as error:  # decoders raise various types
        fault, cause = f"cannot be decoded: {error or type(error).__name__}", error
    raise BadSampleError(f"{name} {fault}", path) from cause


def _from_array(item: Any) -> Image.Image:
    if not isinstance(item, np.ndarray | Tensor):
        raise ValueError(
            f"an image must be a path, a Pillow image or an array, got {type(item).__name__}"
        )
    array: NDArray[Any]
    if isinstance(item, Tensor):
        tensor = item.detach().cpu()
        tensor = tensor.float() if tensor.is_floating_point() else tensor
        array = (tensor.permute(1, 2, 0) if tensor.ndim == 3 else tensor).numpy()
    else:
        array = item
    is_gray = array.ndim == 2 or (array.ndim == 3 and array.shape[2] == 1)
    is_color = array.ndim == 3 and array.shape[2] in (3, 4)
    is_known = array.dtype in (np.uint8, np.uint16) or array.dtype.kind == "f"
    if not is_known or not (is_gray or is_color) or not array.size:
        form = "[C, H, W]" if isinstance(item, Tensor) else "[H, W] or [H, W, C]"
        raise ValueError(
            f"an image array must be {form} in uint8, uint16 or floats in [0, 1], with 1, 3 or 4 "
            f"channels, got {tuple(item.shape)} in {str(item.dtype).removeprefix('torch.')}"
        )
    try:
        array = array_bytes(array)
    except DataError as error:
        raise DataError(f"an image array {error}") from error
    return Image.fromarray(
        np.ascontiguousarray(array[..., 0] if array.ndim == 3 and is_gray else array)
    )
