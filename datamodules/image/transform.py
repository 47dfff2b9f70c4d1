"""timm's image transforms, with timm's argument names."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal

from PIL import Image
from timm.data import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    create_transform,
    resolve_data_config,
)
from torch import Tensor

from diffmm.checks import Settings, check_choice

Transform = Callable[[Image.Image], Tensor]

CHOICES = {
    "interpolation": ("bicubic", "bilinear", "lanczos", "hamming", "box", "nearest", "random"),
    "crop_mode": ("center", "squash", "border"),
    "train_crop_mode": ("rrc", "rkrc", "rkrr"),
    "re_mode": ("const", "rand", "pixel"),
}
PROBABILITIES = (
    "hflip",
    "vflip",
    "color_jitter_prob",
    "grayscale_prob",
    "gaussian_blur_prob",
    "re_prob",
)


@dataclass(frozen=True)
class ImageTransform(Settings):
    """Image transform with the argument names and meanings of `timm.data`.

    Fields that are not set have the source's defaults, then timm's, so that interpolation, crop,
    mean and standard deviation are those of `resolve_data_config`.

    Attributes:
        interpolation: `"bicubic"`, `"bilinear"`, `"lanczos"`, `"hamming"`, `"box"`, `"nearest"`,
            or `"random"`: bilinear or bicubic per training image, bicubic in evaluation.
        mean: Mean per channel, in [0, 1]. One number applies to all channels; three numbers are
            averaged for gray images.
        std: Standard deviation per channel, in the same format.
        crop_pct: Fraction of the resized image's side that the crop keeps in evaluation.
        crop_mode: Crop mode in evaluation: `"center"`, `"squash"` or `"border"`.
        no_aug: Whether to disable augmentation in training: resize, center crop, normalize.
        train_crop_mode: Crop mode in training: `"rrc"` (random resized crop), `"rkrc"` or `"rkrr"`
            (both keep the aspect ratio).
        scale: Range of the random crop's area, as a fraction of the image.
        ratio: Range of the random crop's aspect ratio.
        hflip: Probability of a horizontal flip.
        vflip: Probability of a vertical flip.
        color_jitter: Strength of random brightness, contrast and saturation; four numbers add hue.
        color_jitter_prob: Probability of color jitter.
        grayscale_prob: Probability of conversion to gray.
        gaussian_blur_prob: Probability of Gaussian blur.
        auto_augment: An augmentation policy, such as `"rand-m9-mstd0.5-inc1"`, `"original"` or
            `"3a"`.
        re_prob: Probability of random erasing.
        re_mode: Fill of erased rectangles: `"const"`, `"rand"` (a color) or `"pixel"` (noise).
        re_count: Maximum number of erased rectangles.

    Raises:
        ValueError: If a choice is unknown or a number is out of range.
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

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, choices in CHOICES.items():
            if (value := getattr(self, name)) is not None:
                check_choice(name, value, choices)
        for name in PROBABILITIES:
            if (value := getattr(self, name)) is not None and not 0.0 <= value <= 1.0:
                raise ValueError(f"{name} must be a probability in [0, 1], got {value}")
        if self.crop_pct is not None and self.crop_pct <= 0.0:
            raise ValueError(f"crop_pct must be above 0, got {self.crop_pct}")
        for name in ("scale", "ratio"):
            if (value := getattr(self, name)) is not None and not 0.0 < value[0] <= value[1]:
                raise ValueError(
                    f"{name} must be two increasing numbers above 0, got {tuple(value)}"
                )
        if isinstance(self.color_jitter, tuple | list) and len(self.color_jitter) not in (3, 4):
            raise ValueError(
                f"color_jitter must be one number, or three or four (brightness, contrast, "
                f"saturation, hue), got {tuple(self.color_jitter)}"
            )

    def build(
        self, defaults: "ImageTransform", size: tuple[int, int], channels: int, *, training: bool
    ) -> Transform:
        """Build the transform from an image to a tensor `[C, H, W]`.

        Args:
            defaults: Defaults of the source.
            size: Height and width of the tensor, `(H, W)`.
            channels: Number of channels, 1 or 3.
            training: Whether to build the training transform, with augmentation, instead of that
                of evaluation.

        Raises:
            ValueError: If the number of means does not match `channels`, or timm does not know the
                `auto_augment` policy or supports it for color images only.
        """
        settings = self.settings(defaults, size, channels)
        if settings["interpolation"] == "random" and not training:
            settings["interpolation"] = "bicubic"
        policy = settings.get("auto_augment")
        if channels == 1 and policy is not None and policy.startswith("augmix"):
            raise ValueError(f"auto_augment {policy!r} needs color images: set --data.channels 3")
        try:
            return create_transform(**settings, is_training=training)
        except AssertionError as error:
            raise ValueError(f"auto_augment {policy!r} is not a timm policy: {error}") from error

    def settings(
        self, defaults: "ImageTransform", size: tuple[int, int], channels: int
    ) -> dict[str, Any]:
        """Arguments of timm's `create_transform`. Arguments and errors as in `build`."""
        # timm has defaults for these two, but for three channels.
        timms = {"mean": IMAGENET_DEFAULT_MEAN, "std": IMAGENET_DEFAULT_STD}
        settings = timms | defaults.given() | self.given()
        for name in timms:
            settings[name] = _per_channel(name, settings[name], channels)
        return settings | resolve_data_config({**settings, "input_size": (channels, *size)})

    def given(self) -> dict[str, Any]:
        """The fields that are set."""
        return {name: value for name, value in asdict(self).items() if value is not None}


def _per_channel(name: str, values: tuple[float, ...], channels: int) -> tuple[float, ...]:
    if len(values) == channels:
        return tuple(values)
    if len(values) == 1:
        return tuple(values) * channels
    if len(values) == 3 and channels == 1:
        return (sum(values) / 3,)
    raise ValueError(f"{name} has {len(values)} numbers, but images have {channels} channels")
