"""The datamodule of images with texts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar

from torch import Tensor

from datamodules.image.files import EXTENSIONS, MAX_PIXELS
from datamodules.image.inputs import ImageInputs, prepare_images
from datamodules.image.own_data import IN_WORDS, inspect_images
from datamodules.image.reader import ImageReader
from datamodules.image.sources import FileImages, LabelledImages, checked_max_pixels
from datamodules.image.transform import ImageTransform
from datamodules.pairs.data import PairData
from datamodules.pairs.image_sources import ImagePairSource
from datamodules.pairs.own_data import own_pairs
from datamodules.pairs.reader import ReadsTexts
from datamodules.pairs.shapes import RenderedShapes
from datamodules.pairs.sources import IMAGES, Medium, PairSource
from datamodules.shared.bad_samples import BadSamples
from datamodules.shared.fingerprints import Fingerprint
from datamodules.shared.own_data import OwnData
from datamodules.shared.stored import AnyFile


class Images(Medium[LabelledImages]):
    """Image files.

    Args:
        max_pixels: Maximum number of pixels; larger images raise an error.
    """

    noun = IMAGES
    extensions = EXTENSIONS

    def __init__(self, max_pixels: int = MAX_PIXELS) -> None:
        self.max_pixels = max_pixels

    def of_files(self, files: Sequence[AnyFile]) -> FileImages:
        return FileImages(files, [()] * len(files), self.max_pixels)


@dataclass(frozen=True, kw_only=True)
class ImageTextReader(ReadsTexts, ImageReader):
    """Reads images as `ImageReader` does, and encodes texts.

    `read` takes an image and `read_text` a text; `collate` takes the results of either, or dicts
    with the fields of both.
    """

    class_path: ClassVar[str] = "datamodules.pairs.ImageTextReader"

    def collate(self, samples: list[dict[str, Any]]) -> dict[str, Tensor]:
        images = ImageReader.collate(self, samples) if "images" in samples[0] else {}
        return {**images, **self.collate_texts(samples)}


class ImageTextData(PairData[LabelledImages]):
    """Images with texts as `PairBatch`es, for contrastive training and captioning.

    Args:
        source: Source of the pairs, a class of `datamodules.pairs`; by default generated
            `RenderedShapes`, which need no files.
        tokenizer: Name of the tokenizer, as in `TextData`; it must have an end-of-text token.
        start_ids: Ids placed before every text; none by default. The tokenizer of CLIP has the
            beginning-of-text token 49406.
        max_tokens: Maximum number of tokens of a text, including the end of text. Longer texts are
            cut, which is reported once.
        pad_texts: Whether texts are padded to `max_tokens` instead of the longest of the batch, so
            that shapes are static for compiled models.
        image_size: Height and width of the images in pixels; by default the source's.
        channels: Number of channels, 1 for gray or 3 for color; by default the source's.
        transform: Crops, augmentation and normalization; unset fields have the source's defaults.
            Beware of mirroring and color jitter, which change what a text may describe.
        max_pixels: Maximum number of pixels of an image file; larger ones raise an error. At most
            178,956,970, Pillow's limit.
        pairs_per_row: Number of pairs that are packed into each row of a training batch, without
            padding between their texts; for captioning. The model's `max_length` must fit them.
        batch_size: Number of samples per batch and process, a multiple of `pairs_per_row`.
        num_workers: Number of data loader workers per process; 0 loads in the training process.
        seed: Seed of the order, the augmentation, and the choice among several texts.
        bad_samples: How to handle samples that cannot be read; by default, raise an error.

    Raises:
        ValueError: If an argument is out of range or the source has sounds; the message names it.
    """

    reader: ImageTextReader

    def __init__(
        self,
        source: PairSource | None = None,
        *,
        tokenizer: str = "bytes",
        start_ids: Sequence[int] = (),
        max_tokens: int = 128,
        pad_texts: bool = False,
        image_size: int | tuple[int, int] | None = None,
        channels: int | None = None,
        transform: ImageTransform | None = None,
        max_pixels: int = MAX_PIXELS,
        pairs_per_row: int = 1,
        batch_size: int = 64,
        num_workers: int = 0,
        seed: int = 0,
        bad_samples: BadSamples | None = None,
    ) -> None:
        source = source or RenderedShapes()
        defaults: Any = source if isinstance(source, ImagePairSource) else ImagePairSource
        prepared = prepare_images(
            defaults, image_size, channels, transform, checked_max_pixels(max_pixels)
        )
        images = {f.name: getattr(prepared.reader, f.name) for f in fields(prepared.reader)}
        reader = ImageTextReader(
            tokenizer=tokenizer,
            start_ids=tuple(start_ids),
            max_tokens=max_tokens,
            pad_texts=pad_texts,
            **images,
        )
        super().__init__(
            source,
            Images(max_pixels),
            reader,
            pairs_per_row=pairs_per_row,
            batch_size=batch_size,
            num_workers=num_workers,
            seed=seed,
            bad_samples=bad_samples,
        )
        self._transform = prepared.settings
        self.transforms = {True: prepared.training, False: reader.transform}

    @classmethod
    def own_data(cls, path: str, given: Mapping[str, Any], *, inputs_may_change: bool) -> OwnData:
        """Settings for a folder of images with text files, or a table of images and texts.

        Args:
            path: Path of the folder or table.
            given: Arguments of the recipe for this class.
            inputs_may_change: Whether the model's number of channels may change to that of the
                images.

        Raises:
            FileNotFoundError: If the path does not exist.
            ValueError: If it has no images with texts.
        """
        found = own_pairs(path, given, Images(given.get("max_pixels", MAX_PIXELS)), 64)
        channels, sizes = inspect_images(found.splits.train.media)
        facts = {"channels": channels} if inputs_may_change else {}
        summary = f"{found.summary}; {IN_WORDS[channels]}, {sizes} pixels"
        return OwnData(found.settings, facts, summary)

    def inputs(self, media: LabelledImages, *, training: bool) -> ImageInputs:
        transform = self.transforms[True] if training else None
        return ImageInputs(media, reader=self.reader, transform=transform, seed=self.seed)

    def fingerprint(self) -> Fingerprint:
        return {
            **super().fingerprint(),
            "image_size": self.reader.image_size,
            "channels": self.reader.channels,
            "transform": self._transform,
        }
