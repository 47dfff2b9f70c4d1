"""What sources of images with texts share."""

from typing import ClassVar

from datamodules.image.transform import ImageTransform
from datamodules.pairs.sources import IMAGES, PairSource

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
"""Statistics of the images that CLIP (Radford et al., 2021) was trained on, as in open_clip."""


class ImagePairSource(PairSource):
    """Images with texts, and defaults for the preprocessing of the images.

    The default transform is that of open_clip: crops of at least 90% of the area, and no mirroring
    or color jitter, because texts describe sides and colors.

    Attributes:
        image_size: Default height and width of the images.
        channels: Default number of channels, 1 for gray or 3 for color.
        transform: Default transform, where it differs from timm's defaults.
    """

    kinds = (IMAGES,)
    image_size: ClassVar[int] = 224
    channels: ClassVar[int] = 3
    transform: ClassVar[ImageTransform] = ImageTransform(
        mean=CLIP_MEAN,
        std=CLIP_STD,
        interpolation="bicubic",
        crop_pct=1.0,
        scale=(0.9, 1.0),
        hflip=0.0,
        color_jitter=0.0,
    )
