"""Images as model inputs, in training and evaluation, for all datamodules that have images."""

from typing import Any, NamedTuple, Protocol

from datamodules.image.reader import MODES, ImageReader
from datamodules.image.sources import LabelledImages
from datamodules.image.transform import ImageTransform, Transform
from datamodules.shared.sampling import seeded
from diffmm.checks import check_choice


class ImageInputs:
    """The images of a split, decoded and transformed.

    Args:
        images: The images.
        reader: The evaluation preprocessing.
        transform: The training transform, which replaces that of the reader; its random numbers
            are a function of `(seed, epoch, index)`.
        seed: Seed of the transform.
    """

    def __init__(
        self,
        images: LabelledImages,
        *,
        reader: ImageReader,
        transform: Transform | None,
        seed: int,
    ) -> None:
        self.images = images
        self.reader = reader
        self.transform = transform
        self.seed = seed

    def __call__(self, epoch: int, index: int) -> dict[str, Any]:
        """The input of image `index` in `epoch`, as `{"images": [C, H, W]}`.

        Raises:
            BadSampleError: If the image cannot be read.
        """
        image = self.images.read(index)
        if self.transform is None:
            return {"images": self.reader.pixels(image)}
        with seeded(self.seed, epoch, index):
            return {"images": self.transform(self.reader.convert(image))}


class ImageDefaults(Protocol):
    """What a source of images sets where a datamodule does not; see `ImageSource`."""

    @property
    def image_size(self) -> int: ...
    @property
    def channels(self) -> int: ...
    @property
    def transform(self) -> ImageTransform: ...


class PreparedImages(NamedTuple):
    """The preprocessing of images.

    Attributes:
        reader: The evaluation preprocessing.
        training: The training transform.
        settings: The settings of both as text, which is equal if they are.
    """

    reader: ImageReader
    training: Transform
    settings: str


def prepare_images(
    defaults: ImageDefaults,
    image_size: int | tuple[int, int] | None,
    channels: int | None,
    transform: ImageTransform | None,
    max_pixels: int,
) -> PreparedImages:
    """Combine a datamodule's settings with the defaults of its source. Arguments as in `ImageData`.

    Raises:
        ValueError: If an argument is out of range; the message names it.
    """
    size = defaults.image_size if image_size is None else image_size
    height, width = (size, size) if isinstance(size, int) else size
    if height < 1 or width < 1:
        raise ValueError(f"image_size must be at least 1, got {image_size}")
    channels = defaults.channels if channels is None else channels
    check_choice("channels", channels, MODES)
    transform = transform or ImageTransform()
    settings = transform.settings(defaults.transform, (height, width), channels)
    interpolation = settings["interpolation"]
    reader = ImageReader(
        image_size=(height, width),
        channels=channels,
        interpolation="bicubic" if interpolation == "random" else interpolation,
        max_pixels=max_pixels,
        **{name: settings[name] for name in ("crop_pct", "crop_mode", "mean", "std")},
    )
    training = transform.build(defaults.transform, (height, width), channels, training=True)
    return PreparedImages(reader, training, f"{transform} over {defaults.transform}")
