"""Conversion of the pixels of image files to 8 bits.

Pillow's `convert` clips values that it does not scale: 16-bit images become white, float images
black. Here every kind of pixel is scaled correctly or raises an error.
"""

from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageCms, ImageFile

from diffmm.checks import DataError

_FLOAT_SLACK = 1e-5  # tolerance for the rounding of 0 and 1
_BITS, _PHOTOMETRIC, _SAMPLE_FORMAT = 258, 262, 339  # tags of TIFF
_SIGNED = 2  # a sample format
_WHITE_IS_ZERO = 0  # a photometric interpretation
_NARROW_PNG = {"L;2": 3, "L;4": 15}  # the largest value, by Pillow's raw mode


def eight_bits(image: Image.Image) -> Image.Image:
    """Convert a loaded image file to mode L or RGB.

    * 16-bit values are scaled by their full range: white is 65,535, or 4,095 in a 12-bit TIFF.
    * Float values are in [0, 1], from black to white.
    * CIELAB is converted to sRGB by LittleCMS, CMYK and YCbCr to RGB by Pillow.
    * Transparent images are composed over white.

    Raises:
        DataError: If the range of values is unknown: floats outside [0, 1], and signed or 32-bit
            integers. The message continues a sentence about the file.
    """
    tags: Any = getattr(image, "tag_v2", {})
    if _SIGNED in tags.get(_SAMPLE_FORMAT, ()):
        raise DataError(_unknown_range("signed integers"))
    if image.mode == "F" or image.mode.startswith("I"):
        gray = _from_floats(image) if image.mode == "F" else _from_integers(image, tags)
        # Pillow inverts 8-bit images of this kind, but not these.
        if tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO:
            gray = 255 - gray
        if "transparency" in image.info:
            gray[np.asarray(image) == image.info["transparency"]] = 255
        return Image.fromarray(gray)
    if image.mode == "LAB":
        return _lab_to_srgb().apply(image)
    if image.has_transparency_data:
        # Premultiplied gray, La, can only be converted to LA.
        colors = image.convert("LA") if image.mode == "La" else image
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, colors.convert("RGBA")).convert("RGB")
    if image.mode in ("L", "RGB"):
        return image
    return image.convert("L" if image.mode == "1" else "RGB")


def array_bytes(array: NDArray[Any]) -> NDArray[np.uint8]:
    """Convert pixels in memory to 8 bits: uint16 by its full range, floats from [0, 1].

    Raises:
        DataError: If floats are outside [0, 1]. The message continues a sentence about the array.
    """
    if array.dtype == np.uint16:
        return ((array.astype(np.uint32) * 255 + 32767) // 65535).astype(np.uint8)
    if array.dtype.kind != "f":
        return array
    low, high = float(array.min()), float(array.max())
    if not -_FLOAT_SLACK <= low <= high <= 1 + _FLOAT_SLACK:  # also true for NaN
        raise DataError(
            f"has floats from {low:g} to {high:g}, but they must be in [0, 1], from black to "
            f"white: rescale them, without the model's normalization, or convert them to uint8"
        )
    return np.rint(np.clip(array, 0, 1) * 255).astype(np.uint8)


def scale_transparency(image: ImageFile.ImageFile) -> None:
    """Scale the transparent color of a PNG that is not loaded yet to the 8 bits in which Pillow
    loads it."""
    color = image.info.get("transparency")
    layout = image.tile[0][3] if image.tile else None
    if isinstance(color, int) and layout in _NARROW_PNG:
        image.info["transparency"] = color * 255 // _NARROW_PNG[layout]
    elif isinstance(color, tuple) and layout == "RGB;16B":
        image.info["transparency"] = tuple(value >> 8 for value in color)


def _from_integers(image: Image.Image, tags: Any) -> NDArray[np.uint8]:
    # Pillow represents 16-bit values of some formats in 32 bits, but a TIFF may really have 32.
    if image.mode == "I" and image.format == "TIFF":
        raise DataError(_unknown_range("32-bit integers"))
    white = 2 ** tags.get(_BITS, (16,))[0] - 1
    values = np.asarray(image).astype(np.uint32)
    return ((values * 255 + white // 2) // white).astype(np.uint8)


def _from_floats(image: Image.Image) -> NDArray[np.uint8]:
    values = np.asarray(image)
    low, high = float(values.min()), float(values.max())
    if not -_FLOAT_SLACK <= low <= high <= 1 + _FLOAT_SLACK:  # also true for NaN
        raise DataError(_unknown_range(f"floats from {low:g} to {high:g}, not in [0, 1]"))
    return np.rint(np.clip(values, 0, 1) * 255).astype(np.uint8)


def _unknown_range(what: str) -> str:
    return (
        f"has {what}, whose range from black to white is unknown; save it with 8 or 16 bits, "
        f"or as floats in [0, 1]"
    )


@lru_cache
def _lab_to_srgb() -> ImageCms.ImageCmsTransform:
    lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
    return ImageCms.buildTransform(lab, srgb, "LAB", "RGB")
