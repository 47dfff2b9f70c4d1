"""Reading image files: complete, upright, with 8 bits per channel."""

import struct
import warnings
import zlib
from typing import Any, BinaryIO

from PIL import Image, ImageFile

from datamodules.image.values import eight_bits, scale_transparency
from datamodules.shared.files import why_no_file
from datamodules.shared.stored import AnyFile
from diffmm.checks import DataError

EXTENSIONS = (
    *(".jpg", ".jpeg", ".png", ".bmp", ".ppm", ".tif", ".tiff", ".webp", ".gif"),
    *(".jpe", ".jfif", ".pgm", ".pbm", ".pnm"),
)
"""Extensions of the image files to find in a folder, in lower case: those of `FORMATS`."""

FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
"""Accepted formats, by Pillow's names. They are detected from the content of a file, whatever its
extension. (GIF files on the web often have another one.)"""

MAX_PIXELS = 89_478_485
"""Default limit, that of Pillow's warning: a quarter of a GiB in color."""
PILLOWS_MOST = 2 * MAX_PIXELS
"""The largest image that Pillow opens."""

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


def read_image(path: AnyFile, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Read an image file in mode L or RGB; `eight_bits` documents how values are converted.

    The image is rotated according to its EXIF orientation. Of several frames or pages the first one
    is read.

    Raises:
        DataError: If it is not a regular file or not one of `FORMATS`, exceeds `max_pixels`, is
            incomplete, or has values of unknown range; the message continues a sentence about it.
        Exception: Various types from Pillow, if the file is damaged in another way.
    """
    if fault := why_no_file(path):
        raise DataError(fault)
    with warnings.catch_warnings():
        # Pillow's warnings are not relevant here or concern sizes, which are checked below.
        warnings.simplefilter("ignore")
        # An open file and not a path: Pillow 13 would memory-map an uncompressed TIFF and garble it
        # when it is rotated.
        with path.open("rb") as file, _opened(file) as image:
            _check_size(image, max_pixels)
            scale_transparency(image)
            image.load()
            _check_complete(image, file)
            return _upright(eight_bits(image), image)


def picture(image: Image.Image, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Convert an in-memory image as `read_image` converts that of a file.

    Raises:
        DataError: As `read_image`.
    """
    _check_size(image, max_pixels)
    return _upright(eight_bits(image), image)


def _check_size(image: Image.Image, max_pixels: int) -> None:
    width, height = image.size
    if width * height > max_pixels:
        raise DataError(
            f"has {width} x {height} pixels, which exceeds max_pixels ({max_pixels:,}): "
            f"resize it, or increase max_pixels"
        )


def _opened(file: BinaryIO) -> ImageFile.ImageFile:
    try:
        return Image.open(file, formats=FORMATS)
    except Image.UnidentifiedImageError as error:
        raise DataError(
            f"cannot be decoded: Pillow does not recognize it as one of {', '.join(FORMATS)}"
        ) from error
    except Image.DecompressionBombError as error:
        raise DataError(f"is too large: {error}; resize it") from error


def _upright(picture: Image.Image, image: Image.Image) -> Image.Image:
    try:
        turn = _UPRIGHT.get(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # unreadable EXIF data, of various types, do not affect the image
        turn = None
    return picture if turn is None else picture.transpose(turn)


def _check_complete(image: Image.Image, file: BinaryIO) -> None:
    """Check for missing data that Pillow would silently replace by black pixels.

    Other truncated files do not decode. The exception is a JPEG that ends properly but before its
    last line, for which the decoder makes up the rest without an error.
    """
    missing = False
    if image.format == "TIFF":
        missing = _lacks_strips(image)
    elif image.format == "PNG":
        # If the last line is not black, it was in the file.
        black = not image.crop((0, image.height - 1, *image.size)).tobytes().strip(b"\0")
        missing = bool(black or image.info.get("interlace")) and _lacks_lines(file)
    if missing:
        raise DataError(
            f"is incomplete: it has data for only a part of its {image.width} x {image.height} "
            f"pixels"
        )


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
_PNG_PASSES = (  # first column, first line, column step and line step of each pass
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
