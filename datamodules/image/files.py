"""Image files as whole pictures, upright, of 8 bits."""

import struct
import warnings
import zlib
from pathlib import Path
from typing import Any, BinaryIO

from PIL import Image, ImageFile

from datamodules.image.values import eight_bits, scale_transparency
from datamodules.shared.files import why_no_file
from diffmm.checks import DataError

EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".ppm", ".tif", ".tiff", ".webp", ".gif")
"""Of the files that are looked for in a folder."""

FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
"""What a file may be by its content, whatever its name: of all that Pillow opens, what pictures of
the accepted names are in practice. (A GIF on the web is often called something else.)"""

MAX_PIXELS = 89_478_485
"""Pillow's own limit: a quarter of a GiB in color."""
PILLOWS_MOST = 2 * MAX_PIXELS
"""Pillow opens nothing larger."""

_ORIENTATION = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def read_image(path: Path, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """The picture in a file, in mode L or RGB: see `eight_bits` for what becomes of its values.

    It is turned as its EXIF orientation says. Of several frames or pages it is the first.

    Raises:
        DataError: (to follow the file's name) if it is no regular file, none of `FORMATS`, larger
            than `max_pixels`, lacks a part, or has values that mean no brightness.
        Exception: of many types, Pillow's, if it is broken in another way.
    """
    if fault := why_no_file(path):
        raise DataError(fault)
    with warnings.catch_warnings():
        # They are of what does not matter here, and of sizes, which are looked at here.
        warnings.simplefilter("ignore")
        # Given a name, Pillow 13 maps a plain TIFF, and garbles it where it is to be turned.
        with path.open("rb") as file, _opened(file) as image:
            _check_size(image, max_pixels)
            scale_transparency(image)
            image.load()
            _check_complete(image, file)
            return _upright(eight_bits(image), image)


def picture(image: Image.Image, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """An image that is in memory as `read_image` gives that of a file.

    Raises:
        DataError: (to follow a name) as `read_image`.
    """
    _check_size(image, max_pixels)
    return _upright(eight_bits(image), image)


def _check_size(image: Image.Image, max_pixels: int) -> None:
    width, height = image.size
    if width * height > max_pixels:
        raise DataError(
            f"has {width} x {height} pixels, more than max_pixels ({max_pixels:,}): "
            f"scale it down, or raise that"
        )


def _opened(file: BinaryIO) -> ImageFile.ImageFile:
    try:
        return Image.open(file, formats=FORMATS)
    except Image.UnidentifiedImageError as error:
        raise DataError(
            f"cannot be decoded: it is no {', '.join(FORMATS)} file of a kind that Pillow knows"
        ) from error
    except Image.DecompressionBombError as error:
        raise DataError(f"is too large: {error}; scale it down") from error


def _upright(picture: Image.Image, image: Image.Image) -> Image.Image:
    try:
        turn = _UPRIGHT.get(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # of many types: EXIF that cannot be read says nothing of the picture
        turn = None
    return picture if turn is None else picture.transpose(turn)


def _check_complete(image: Image.Image, file: BinaryIO) -> None:
    """Refuse a picture of which Pillow leaves a part black, because the file has no data for it.

    Others that are cut off do not decode. (A JPEG that ends properly, but before its last line, is
    the exception: its decoder makes up the rest, and does not tell.)
    """
    missing = False
    if image.format == "TIFF":
        missing = _lacks_strips(image)
    elif image.format == "PNG":
        # A last line that is not black was there.
        black = not image.crop((0, image.height - 1, *image.size)).tobytes().strip(b"\0")
        missing = bool(black or image.info.get("interlace")) and _lacks_lines(file)
    if missing:
        raise DataError(f"has data for a part of its {image.width} x {image.height} pixels only")


def _lacks_strips(image: Any) -> bool:
    """Whether a TIFF has fewer strips or tiles than its size needs."""
    tags = image.tag_v2
    width, height = tags[256], tags[257]
    if 322 in tags:
        pieces, offsets = -(-width // tags[322]) * -(-height // tags[323]), tags[324]
    else:
        pieces, offsets = -(-height // tags.get(278, height)), tags[273]
    planes = tags.get(277, 1) if tags.get(284, 1) == 2 else 1
    return len(offsets) < pieces * planes


_PNG_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # by color type
_PNG_PASSES = (  # each one's first column and line, and how far apart they are
    ((0, 0, 1, 1),),
    (
        (0, 0, 8, 8),
        (4, 0, 8, 8),
        (0, 4, 4, 8),
        (2, 0, 4, 4),
        (0, 2, 2, 4),
        (1, 0, 2, 2),
        (0, 1, 1, 2),
    ),
)


def _lacks_lines(file: BinaryIO) -> bool:
    """Whether a PNG's compressed data end before its last line."""
    needed, held, inflate = 0, 0, zlib.decompressobj()
    file.seek(8)
    while len(head := file.read(8)) == 8:
        length, name = struct.unpack(">I4s", head)
        following = file.tell() + length + 4
        if name == b"IHDR":
            width, height, depth, color, interlaced = struct.unpack(">IIBBxxB", file.read(13))
            for column, line, apart, below in _PNG_PASSES[interlaced]:
                columns, lines = -(-(width - column) // apart), -(-(height - line) // below)
                if columns > 0 and lines > 0:
                    needed += lines * (1 + -(-columns * depth * _PNG_CHANNELS[color] // 8))
        elif name == b"IDAT":
            compressed = file.read(length)
            while compressed and held < needed:
                held += len(inflate.decompress(compressed, 2**20))
                compressed = inflate.unconsumed_tail
        file.seek(following)
    return held < needed
