"""Clip art with its titles, from a package of Debian; needs no network."""

import html
import re
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

from datamodules.image.sources import FileImages, LabelledImages
from datamodules.pairs.image_sources import ImagePairSource
from datamodules.pairs.sources import (
    Medium,
    Pairs,
    PairSplits,
    check_fractions,
    three_splits,
)
from diffmm.checks import check_count

FOLDER = "/usr/share/openclipart/png"

MAX_PIXELS = 2**24
"""Larger pictures, of which the package has a few, are left out."""

_WORDS = re.compile(r"[^\W\d_]+")


class ClipArt(ImagePairSource):
    """The pictures of the Open Clip Art Library, with the titles that their authors gave them and
    with their categories.

    On Debian, the package openclipart-png contains them: PNG files whose `Title` is part of the
    file, in folders that are categories, such as `animals/birds`. Pictures without a title, links
    to other pictures and pictures of more than 16 million pixels are left out. So are pictures
    whose title is that of many, which is the name of a collection. Pictures whose titles differ in
    numbers, case or punctuation only are held out together.

    Validation and test texts are the titles. Training texts are the titles and, as a second text,
    the categories, separated by commas.

    Args:
        categories: Whether categories are training texts.
        most_alike: Maximum number of pictures with the same title, up to numbers, case and
            punctuation.
        val_fraction: Fraction of titles to hold out for validation, the same in every run.
        test_fraction: Fraction to hold out for testing.
        root: The folder of the pictures.

    Raises:
        ValueError: If `most_alike` is below 1, or the fractions are out of range.
    """

    def __init__(
        self,
        *,
        categories: bool = True,
        most_alike: int = 3,
        val_fraction: float = 0.1,
        test_fraction: float = 0.1,
        root: str = FOLDER,
    ) -> None:
        check_count("most_alike", most_alike)
        check_fractions(val_fraction, test_fraction)
        self.categories = categories
        self.most_alike = most_alike
        self.val_fraction = val_fraction
        self.test_fraction = test_fraction
        self.root = root

    def splits(self, medium: Medium[LabelledImages]) -> PairSplits[LabelledImages]:
        root = Path(self.root)
        if not root.is_dir():
            raise FileNotFoundError(
                f"{root} does not exist: install openclipart-png, or set --data.source.root"
            )
        titled = [(path, title, group_of(title)) for path, title in read_titles(root)]
        counts = Counter(group for _, _, group in titled)
        kept = [each for each in titled if each[2] and counts[each[2]] <= self.most_alike]
        if not kept:
            raise ValueError(f"{root} has no PNG files with titles: set --data.source.root")
        groups = [group for _, _, group in kept]
        train, val, test = three_splits(groups, self.val_fraction, self.test_fraction)

        def pairs(indices: list[int], *, categories: bool = False) -> Pairs[LabelledImages]:
            paths = [kept[i][0] for i in indices]
            texts = [[kept[i][1]] for i in indices]
            if categories:
                for path, own in zip(paths, texts, strict=True):
                    own += filter(None, [category_of(path, root)])
            return Pairs(FileImages(paths, [()] * len(paths)), texts)

        return PairSplits(pairs(train, categories=self.categories), pairs(val), pairs(test))


def read_titles(root: Path) -> Iterator[tuple[Path, str]]:
    """The PNG files below a folder that have a title, with the title on one line."""
    for path in sorted(root.rglob("*.png")):
        if path.is_symlink() or not path.is_file():
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            try:
                with Image.open(path, formats=["PNG"]) as image:
                    title, (width, height) = str(image.info.get("Title", "")), image.size
            except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
                continue  # damaged or far too large
        title = " ".join(html.unescape(title).replace("_", " ").split())
        if title and width * height <= MAX_PIXELS:
            yield path, title


def group_of(title: str) -> str:
    """The words of a title in lower case, without numbers and punctuation.

    >>> group_of("Red Apple 02") == group_of("red_apple")
    True
    """
    return " ".join(_WORDS.findall(title.casefold()))


def category_of(path: Path, root: Path) -> str:
    """The names of a picture's folders below `root`, separated by commas."""
    return ", ".join(name.replace("_", " ") for name in path.relative_to(root).parts[:-1])
