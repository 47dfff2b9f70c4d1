"""A folder of letters: 26 classes drawn in the machine's fonts, validation in fonts of its own.

    python -m benchmarks.letters FOLDER --train-fonts DIR... --val-fonts DIR...

Each class gets `--per-class` training images and a third as many for validation, 64 x 64 pixels of
gray: upper case, of random size, place, tilt, ink and paper, with a little noise. The folder is
what `datamodules.image.ImageFolder` reads, and what somebody's first own data look like.
On Debian the packages fonts-dejavu, fonts-liberation and fonts-freefont-ttf for training, and
fonts-lato and fonts-urw-base35 for validation, bring fonts enough.
"""

import argparse
import string
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

SIDE = 64
SUFFIXES = (".ttf", ".otf")
# Of symbols, or of letters that nobody could tell apart.
NOT_LETTERS = ("Dingbats", "D050000L", "Symbol", "StandardSymbols")


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
    """One gray image of `letter`, drawn from `rng`."""
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
    parser.add_argument("folder", type=Path, help="made anew")
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
