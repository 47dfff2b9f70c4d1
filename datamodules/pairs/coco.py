"""COCO captions, and data sets in the format of Karpathy's splits."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from datamodules.pairs.image_sources import ImagePairSource
from datamodules.pairs.sources import Media, Medium, Pairs, PairSplits
from datamodules.shared.files import read_text
from diffmm.checks import DataError, check_choice

KARPATHY_SPLITS = {"train": "train", "restval": "train", "val": "val", "test": "test"}


class CocoCaptions(ImagePairSource):
    """COCO captions (Chen et al., 2015): about five captions per image.

    The layout is that of the distributed archives: `root/annotations/captions_train2017.json` and
    `captions_val2017.json`, and the images in `root/train2017` and `root/val2017`.

    Args:
        root: The folder that contains `annotations` and the folders of images.
        year: `"2017"` (118,287 training and 5,000 validation images) or `"2014"` (82,783 and
            40,504). The test images have no captions; validation images are used instead.
        split_file: The splits of Karpathy and Fei-Fei (2015), `dataset_coco.json` (113,287, 5,000
            and 5,000 images of 2014), on which retrieval is usually compared; then `annotations` is
            not read. `dataset_flickr30k.json` has the same format.

    Raises:
        ValueError: If `year` is unknown.
    """

    def __init__(
        self, root: str, *, year: Literal["2017", "2014"] = "2017", split_file: str | None = None
    ) -> None:
        check_choice("year", year, ("2017", "2014"))
        self.root = root
        self.year = year
        self.split_file = split_file

    def splits(self, medium: Medium[Media]) -> PairSplits[Media]:
        if not Path(self.root).is_dir():
            raise FileNotFoundError(
                f"folder {self.root} does not exist: set --data.source.root to the folder of COCO"
            )
        if self.split_file is not None:
            return self._karpathy(medium, Path(self.split_file))
        train, val = (self._official(medium, f"{split}{self.year}") for split in ("train", "val"))
        return PairSplits(train, val, val)

    def _official(self, medium: Medium[Media], split: str) -> Pairs[Media]:
        path = Path(self.root, "annotations", f"captions_{split}.json")
        values = read_json(path)
        try:
            files = {image["id"]: _text(image, "file_name") for image in values["images"]}
            texts: dict[int, list[str]] = {}
            for annotation in values["annotations"]:
                texts.setdefault(annotation["image_id"], []).append(_text(annotation, "caption"))
            # In the order of the images; those without captions are left out.
            known = [image for image in files if image in texts]
            if unknown := texts.keys() - files.keys():
                raise DataError(f"{path} has captions of unknown images, such as {min(unknown)}")
        except (KeyError, TypeError) as error:
            raise DataError(f"{path} is not a file of COCO captions: {error!r}") from error
        folder = Path(self.root, split)
        return Pairs(
            medium.of_files([folder / files[image] for image in known]),
            [texts[image] for image in known],
        )

    def _karpathy(self, medium: Medium[Media], path: Path) -> PairSplits[Media]:
        images: dict[str, list[tuple[Path, list[str]]]] = {"train": [], "val": [], "test": []}
        try:
            for image in read_json(path)["images"]:
                folder = _text(image, "filepath") if "filepath" in image else ""
                file = Path(self.root, folder, _text(image, "filename"))
                texts = [_text(sentence, "raw") for sentence in image["sentences"]]
                images[KARPATHY_SPLITS[image["split"]]].append((file, texts))
        except (KeyError, TypeError) as error:
            raise DataError(f"{path} is not a file of Karpathy's splits: {error!r}") from error
        train, val, test = (_paired(medium, images[name]) for name in ("train", "val", "test"))
        return PairSplits(train, val, test)


def _text(values: Any, field: str) -> str:
    """A text in a file of captions.

    Raises:
        KeyError, TypeError: If it is not there, or not a text.
    """
    value = values[field]
    if not isinstance(value, str):
        raise TypeError(f"{field} must be a text, got {value!r:.60}")
    return value


def _paired(medium: Medium[Media], images: Iterable[tuple[Path, list[str]]]) -> Pairs[Media]:
    known = [(file, texts) for file, texts in images if texts]
    return Pairs(medium.of_files([file for file, _ in known]), [texts for _, texts in known])


def read_json(path: Path) -> Any:
    """The values of a JSON file.

    Raises:
        FileNotFoundError: If it does not exist.
        DataError: If it is not JSON.
    """
    try:
        return json.loads(read_text(path, "file of captions"))
    except (json.JSONDecodeError, RecursionError) as error:
        raise DataError(f"{path} is not a JSON file: {error}") from error
