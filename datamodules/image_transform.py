"""timm's image transforms, in timm's words."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Literal

from PIL import Image
from timm.data import create_transform, resolve_data_config
from torch import Tensor

Transform = Callable[[Image.Image], Tensor]


@dataclass(frozen=True)
class ImageTransform:
    """How images become tensors; the words and meanings are those of `timm.data`.

    What is left out is taken from the source's own defaults and then from timm's, so that the
    interpolation, crop, mean and standard deviation are what `resolve_data_config` would choose.

    Attributes:
        interpolation: `"bicubic"`, `"bilinear"`, `"nearest"` or (training only) `"random"`.
        mean, std: of each channel in [0, 1]; one number serves all, and three are averaged for
            gray images.
        crop_pct: in evaluation, the part of the resized image's side that the crop keeps.
        crop_mode: in evaluation, `"center"`, `"squash"` or `"border"`.
        no_aug: no randomness in training: resize, center crop, normalize.
        train_crop_mode: `"rrc"` (random resized crop), `"rkrc"` or `"rkrr"` (keeping the ratio).
        scale, ratio: the random crop's area and aspect ratio are drawn between these.
        hflip, vflip: the probability of a mirror image.
        color_jitter: strength of random brightness, contrast, saturation (and hue, with four).
        color_jitter_prob, grayscale_prob, gaussian_blur_prob: probabilities.
        auto_augment: a policy, such as `"rand-m9-mstd0.5-inc1"`, `"original"` or `"3a"`.
        re_prob: the probability that a random rectangle is erased.
        re_mode: what it is filled with: `"const"`, `"rand"` (a color) or `"pixel"` (noise).
        re_count: how many rectangles at most.
    """

    interpolation: str | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    crop_pct: float | None = None
    crop_mode: Literal["center", "squash", "border"] | None = None
    no_aug: bool | None = None
    train_crop_mode: Literal["rrc", "rkrc", "rkrr"] | None = None
    scale: tuple[float, float] | None = None
    ratio: tuple[float, float] | None = None
    hflip: float | None = None
    vflip: float | None = None
    color_jitter: float | tuple[float, ...] | None = None
    color_jitter_prob: float | None = None
    grayscale_prob: float | None = None
    gaussian_blur_prob: float | None = None
    auto_augment: str | None = None
    re_prob: float | None = None
    re_mode: Literal["const", "rand", "pixel"] | None = None
    re_count: int | None = None

    def build(
        self, defaults: "ImageTransform", size: tuple[int, int], channels: int, *, training: bool
    ) -> Transform:
        """The transform from an image to a tensor `[C, H, W]`.

        Args:
            defaults: the source's.
            size: `(H, W)`.
            channels: 1 or 3; the images have as many.
            training: with augmentation, or resized and cropped as for evaluation.

        Raises:
            ValueError: if there are more or fewer means than channels, or a word is unknown.
        """
        settings = defaults.given() | self.given()
        for name in ("mean", "std"):
            if name in settings:
                settings[name] = _per_channel(name, settings[name], channels)
        settings |= resolve_data_config({**settings, "input_size": (channels, *size)})
        return create_transform(**settings, is_training=training)

    def given(self) -> dict:
        """What is not left out."""
        return {name: value for name, value in asdict(self).items() if value is not None}


def _per_channel(name: str, values: tuple[float, ...], channels: int) -> tuple[float, ...]:
    if len(values) == channels:
        return tuple(values)
    if len(values) == 1:
        return tuple(values) * channels
    if len(values) == 3 and channels == 1:
        return (sum(values) / 3,)
    raise ValueError(f"{name} has {len(values)} numbers for images of {channels} channels")
