"""timm's image transforms, in timm's words."""

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
    """How images become tensors; the words and meanings are those of `timm.data`.

    What is left out is taken from the source's own defaults and then from timm's, so that the
    interpolation, crop, mean and standard deviation are what `resolve_data_config` would choose.

    Attributes:
        interpolation: `"bicubic"`, `"bilinear"`, `"lanczos"`, `"hamming"`, `"box"`, `"nearest"`,
            or `"random"`: bilinear or bicubic for each training image, bicubic in evaluation.
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

    Raises:
        ValueError: for an unknown word, or a number out of its range.
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
                raise ValueError(f"{name} is a probability, in [0, 1], got {value}")
        if self.crop_pct is not None and self.crop_pct <= 0.0:
            raise ValueError(f"crop_pct must be above 0, got {self.crop_pct}")
        for name in ("scale", "ratio"):
            if (value := getattr(self, name)) is not None and not 0.0 < value[0] <= value[1]:
                raise ValueError(f"{name} must be two rising numbers above 0, got {tuple(value)}")
        if isinstance(self.color_jitter, tuple | list) and len(self.color_jitter) not in (3, 4):
            raise ValueError(
                f"color_jitter must be one number, or three or four (brightness, contrast, "
                f"saturation, hue), got {tuple(self.color_jitter)}"
            )

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
            ValueError: if there are more or fewer means than channels, or timm knows no such
                `auto_augment` policy, or has it for color images only.
        """
        settings = self.settings(defaults, size, channels)
        if settings["interpolation"] == "random" and not training:
            settings["interpolation"] = "bicubic"
        policy = settings.get("auto_augment")
        if channels == 1 and policy is not None and policy.startswith("augmix"):
            raise ValueError(f"auto_augment {policy!r} needs color images: set channels to 3")
        try:
            return create_transform(**settings, is_training=training)
        except AssertionError as error:
            raise ValueError(f"auto_augment {policy!r} is no policy of timm's: {error}") from error

    def settings(
        self, defaults: "ImageTransform", size: tuple[int, int], channels: int
    ) -> dict[str, Any]:
        """What timm's `create_transform` is to be told. Arguments and errors as in `build`."""
        # timm's own defaults for these two are for three channels.
        timms = {"mean": IMAGENET_DEFAULT_MEAN, "std": IMAGENET_DEFAULT_STD}
        settings = timms | defaults.given() | self.given()
        for name in timms:
            settings[name] = _per_channel(name, settings[name], channels)
        return settings | resolve_data_config({**settings, "input_size": (channels, *size)})

    def given(self) -> dict[str, Any]:
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
