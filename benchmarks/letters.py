"""Draws a folder of letter images: 26 classes, with separate fonts for validation.

    python -m benchmarks.letters FOLDER --train-fonts DIR... --val-fonts DIR...

Each class gets `--per-class` training images and a third as many for validation, grayscale with
64 x 64 pixels: upper-case letters with random size, position, rotation, foreground and background,
and a little noise. `datamodules.image.ImageFolder` reads the folder, which resembles a user's own
small data set. On Debian, the packages fonts-dejavu, fonts-liberation and fonts-freefont-ttf for
training, and fonts-lato and fonts-urw-base35 for validation, provide enough fonts.
"""

import argparse
import string
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

SIDE = 64
SUFFIXES = (".ttf", ".otf")
# Fonts of symbols and pictures, or with letters that cannot be distinguished.
NOT_LETTERS = ("Dingbats", "D050000L", "Emoji", "Symbol", "StandardSymbols")


def find_fonts(folders: Sequence[str]) -> list[Path]:
    """The font files below `folders`, sorted."""
    found = sorted(
        path
        for folder in folders
        for path in Path(folder).rglob("*")
        if path.suffix in SUFFIXES and not any(name in path.name for name in NOT_LETTERS)
    )
    if not found:
        raise SystemExit(f"no font ({' or '.join(SUFFIXES)}) in {', '.join(folders)}")
    return found


def draw_letter(letter: str, font: Path, rng: np.random.Generator) -> Image.Image:
    """Draw a grayscale image of `letter`, with random properties from `rng`."""
    paper, ink = rng.uniform(150, 255), rng.uniform(0, 105)
    image = Image.new("L", (SIDE, SIDE), round(paper))
    face = ImageFont.truetype(str(font), round(rng.uniform(32, 52)))
    left, top, right, bottom = face.getbbox(letter)
    room_x, room_y = SIDE - (right - left), SIDE - (bottom - top)
    place = rng.uniform(0.25, 0.75, 2) * (room_x, room_y) - (left, top)
    ImageDraw.Draw(image).text(tuple(place), letter, fill=round(ink), font=face)
    tilt = rng.uniform(-10, 10)
    image = image.rotate(tilt, Image.Resampling.BICUBIC, fillcolor=round(paper))
    pixels = np.asarray(image) + rng.normal(0, 8, (SIDE, SIDE))
    return Image.fromarray(pixels.round().clip(0, 255).astype(np.uint8))


def make_letters(
    folder: Path, train_fonts: list[Path], val_fonts: list[Path], per_class: int, seed: int = 0
) -> None:
    """Write `folder/train/<letter>/*.png` and `folder/val/<letter>/*.png`."""
    splits = {"train": (train_fonts, per_class), "val": (val_fonts, max(1, per_class // 3))}
    for split, (fonts, count) in splits.items():
        for letter in string.ascii_uppercase:
            place = folder / split / letter
            place.mkdir(parents=True)
            rng = np.random.default_rng([seed, split == "val", ord(letter)])
            for number in range(count):
                image = draw_letter(letter, fonts[rng.integers(len(fonts))], rng)
                image.save(place / f"{number:04d}.png")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.letters",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", type=Path, help="folder to create")
    parser.add_argument("--train-fonts", nargs="+", required=True, metavar="DIR")
    parser.add_argument("--val-fonts", nargs="+", required=True, metavar="DIR")
    parser.add_argument("--per-class", type=int, default=120, metavar="N")
    options = parser.parse_args(arguments)
    if options.folder.exists():
        raise SystemExit(f"{options.folder} exists already: choose another folder")
    train_fonts, val_fonts = find_fonts(options.train_fonts), find_fonts(options.val_fonts)
    make_letters(options.folder, train_fonts, val_fonts, options.per_class)
    print(f"{len(train_fonts)} fonts for training, {len(val_fonts)} for validation")


if __name__ == "__main__":
    main()
