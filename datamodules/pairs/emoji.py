"""Emoji with their names in many languages, from two packages of Debian; needs no network."""

import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, features

from datamodules.image.sources import LabelledImages
from datamodules.image.transform import ImageTransform
from datamodules.pairs.image_sources import ImagePairSource
from datamodules.pairs.sources import (
    Medium,
    Pairs,
    PairSplits,
    check_fractions,
    three_splits,
)
from datamodules.shared.files import check_file
from datamodules.shared.fingerprints import Fingerprint, digest
from diffmm.checks import DataError, did_you_mean

FONT = "/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf"
ANNOTATIONS = "/usr/share/unicode/cldr/common"
FOLDERS = ("annotations", "annotationsDerived")

POINTS = 109
"""The only size of the font's bitmaps, which are 136 x 128 pixels."""
SIDE = 136

_INHERITED = "↑↑↑"  # the name is that of the parent language
_TONES = re.compile("[\U0001f3fb-\U0001f3ff]")
_SIGNS = re.compile("\u200d[♀♂]")
_ALIKE = {
    variant: variants[0]
    for variants in (
        ("🧑", "👨", "👩"),
        ("🧒", "👦", "👧"),
        ("🧓", "👴", "👵"),
        ("🫅", "🤴", "👸"),
        ("🫄", "🫃", "🤰"),
        ("🧑\u200d🎄", "🎅", "🤶"),
        ("🧑\u200d🤝\u200d🧑", "👫", "👬", "👭"),
        ("🧑\u200d❤\u200d🧑", "💑"),
        ("🧑\u200d❤\u200d💋\u200d🧑", "💏"),
        ("🕺", "💃"),
        ("🤝", "🫱\u200d🫲"),
    )
    for variant in variants[1:]
}
"""Emoji that differ in gender or by name alone, by the one that stands for all of them."""
_FAMILY = re.compile("[🧑🧒](\u200d[🧑🧒])+")


def group_of(emoji: str) -> str:
    """What is the same for all skin-tone and gender variants of an emoji.

    >>> group_of("👩🏽‍🚀") == group_of("👨🏿‍🚀") == group_of("🧑‍🚀")
    True
    """
    plain = _SIGNS.sub("", _TONES.sub("", emoji.replace("\ufe0f", "")))
    plain = _ALIKE.get(plain) or "".join(_ALIKE.get(each, each) for each in plain)
    return "👪" if _FAMILY.fullmatch(plain) else plain or emoji


class Emoji(ImagePairSource):
    """The emoji of the font Noto Color Emoji, with the names and keywords of Unicode's Common
    Locale Data Repository (CLDR).

    On Debian, the packages fonts-noto-color-emoji and unicode-cldr-core contain them. Emoji that
    the font does not have or that have no name are left out. Emoji are held out together with all
    their skin-tone and gender variants.

    Validation and test texts are the names. Training texts are the names and, as one more text per
    language, the keywords, separated by commas.

    Args:
        languages: Languages of the names, such as `en`, `de` or `zh_Hant`; each adds texts to every
            emoji.
        keywords: Whether keywords are training texts.
        skin_tones: Whether to include variants with skin tones, more than half of all.
        val_fraction: Fraction of emoji (without counting variants) to hold out for validation, the
            same in every run.
        test_fraction: Fraction to hold out for testing.
        font: The font file.
        annotations: The folder that contains `annotations` and `annotationsDerived`.

    Raises:
        ValueError: If there are no languages, or the fractions are out of range.
    """

    image_size = 64
    transform = ImageTransform(
        mean=(0.5,),
        std=(0.5,),
        interpolation="bicubic",
        crop_pct=1.0,
        scale=(0.8, 1.0),
        ratio=(0.9, 1.1),
        hflip=0.0,
        color_jitter=0.0,
    )

    def __init__(
        self,
        languages: Sequence[str] = ("en",),
        *,
        keywords: bool = True,
        skin_tones: bool = True,
        val_fraction: float = 0.1,
        test_fraction: float = 0.1,
        font: str = FONT,
        annotations: str = ANNOTATIONS,
    ) -> None:
        if isinstance(languages, str) or not languages:
            raise ValueError(f"languages must be a list of at least one, got {languages!r}")
        check_fractions(val_fraction, test_fraction)
        self.languages = list(languages)
        self.keywords = keywords
        self.skin_tones = skin_tones
        self.val_fraction = val_fraction
        self.test_fraction = test_fraction
        self.font = font
        self.annotations = annotations

    def splits(self, medium: Medium[LabelledImages]) -> PairSplits[LabelledImages]:
        _check_installed(Path(self.font), "fonts-noto-color-emoji", "font")
        names: dict[str, list[str]] = {}
        keywords: dict[str, list[str]] = {}
        for language in self.languages:
            for emoji, is_name, text in read_annotations(Path(self.annotations), language):
                (names if is_name else keywords).setdefault(emoji, []).append(text)
        known = [
            emoji
            for emoji in names
            if is_drawn(self.font, emoji) and (self.skin_tones or not _TONES.search(emoji))
        ]
        if not known:
            raise ValueError(f"{self.font} has none of the {len(names):,} emoji that have names")
        groups = [group_of(emoji) for emoji in known]
        parts = three_splits(groups, self.val_fraction, self.test_fraction)
        more = keywords if self.keywords else {}
        train, val, test_pairs = (
            self._pairs([known[i] for i in indices], names, more if indices is parts[0] else {})
            for indices in parts
        )
        return PairSplits(train, val, test_pairs)

    def _pairs(
        self, emoji: list[str], names: dict[str, list[str]], keywords: dict[str, list[str]]
    ) -> Pairs[LabelledImages]:
        texts = [[*names[each], *keywords.get(each, ())] for each in emoji]
        return Pairs(DrawnEmoji(emoji, self.font), [list(dict.fromkeys(each)) for each in texts])


class DrawnEmoji(LabelledImages):
    """Emoji, drawn on white on access.

    Args:
        emoji: The characters of each emoji.
        font: The font file.
    """

    def __init__(self, emoji: Sequence[str], font: str) -> None:
        self.emoji = emoji
        self.font = font
        self.labels = [()] * len(emoji)

    def describe(self, index: int) -> str:
        return f"emoji {index} ({self.emoji[index]})"

    def fingerprint(self) -> Fingerprint:
        drawn = digest([*self.emoji, Path(self.font).read_bytes()])
        return {**super().fingerprint(), "contents of emoji": drawn}

    def read(self, index: int) -> Image.Image:
        picture = Image.new("RGBA", (SIDE, SIDE), "white")
        place = (0, (SIDE - 128) // 2)
        ImageDraw.Draw(picture).text(
            place, self.emoji[index], font=_opened(self.font), embedded_color=True
        )
        return picture.convert("RGB")


def read_annotations(folder: Path, language: str) -> Iterator[tuple[str, bool, str]]:
    """The emoji and other characters that have names in a language, in the order of the files.

    Yields:
        The character, whether the text is its name, and the text: the name, or the keywords
        separated by commas.

    Raises:
        FileNotFoundError: If the package is not installed, or it does not have the language.
        DataError: If a file is not XML.
    """
    for name in FOLDERS:
        path = folder / name / f"{language}.xml"
        _check_installed(path.parent / "en.xml", "unicode-cldr-core", "annotations")
        if not path.exists():
            known = sorted(file.stem for file in path.parent.glob("*.xml"))
            raise FileNotFoundError(
                f"{path} does not exist: choose another language{did_you_mean(language, known)}"
            )
        try:
            root = ElementTree.parse(path).getroot()
        except ElementTree.ParseError as error:
            raise DataError(f"{path} is not an XML file: {error}") from error
        for node in root.iter("annotation"):
            emoji, text = node.get("cp", ""), (node.text or "").strip()
            if emoji and text and text != _INHERITED and not emoji.isascii():
                is_name = node.get("type") == "tts"
                yield emoji, is_name, text if is_name else ", ".join(text.split(" | "))


def is_drawn(font: str, emoji: str) -> bool:
    """Whether a font has one glyph for an emoji, and not one per character."""
    opened = _opened(font)
    left, top, right, bottom = opened.getbbox(emoji)
    return bottom > top and right - left <= SIDE


@lru_cache(maxsize=2)
def _opened(font: str) -> ImageFont.FreeTypeFont:
    if not features.check("raqm"):
        raise DataError(
            "emoji of several characters need Pillow with Raqm: install libraqm or Pillow's wheel"
        )
    try:
        return ImageFont.truetype(font, POINTS, layout_engine=ImageFont.Layout.RAQM)
    except OSError as error:
        raise DataError(
            f"{font} is not a font of bitmaps of {POINTS} points, such as Noto Color Emoji: {error}"
        ) from error


def _check_installed(path: Path, package: str, argument: str) -> None:
    if not path.exists():
        raise FileNotFoundError(
            f"{path} does not exist: install {package}, or set --data.source.{argument}"
        )
    check_file(path, "file")
