"""Every kind of image file gives correct values, or an error that names it."""

import os
import struct
import zlib
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import numpy as np
import PIL
import pytest
from packaging.version import Version
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from datamodules.image.data import ImageData
from datamodules.image.files import read_image
from datamodules.image.sources import FileImages, ImageFolder
from datamodules.image.transform import ImageTransform
from datamodules.shared.bad_samples import BadSampleError, BadSamples

GRAYS = np.array([[0, 60, 128], [129, 254, 255]], np.uint8)
WIDE = GRAYS.astype(np.uint16) * 257  # 0 to 65,535


def pixels(path: Path) -> list:
    return np.asarray(read_image(path)).tolist()


ROUNDED = ("lab", "ycbcr")  # of libraries that may round differently


def saved(image: Image.Image, suffix: str, **arguments) -> bytes:
    content = BytesIO()
    image.save(content, suffix, **arguments)
    return content.getvalue()


def tiff(samples: np.ndarray, order: str = "<", **tags: int) -> bytes:
    """An uncompressed grayscale TIFF of one strip, with the given tags."""
    data = samples.astype(samples.dtype.newbyteorder(order)).tobytes()
    height, width = samples.shape
    bits = samples.dtype.itemsize * 8
    sample_format = {"u": 1, "i": 2, "f": 3}[samples.dtype.kind]
    entries = {256: width, 257: height, 258: bits, 259: 1, 262: 1, 273: 0, 277: 1}
    entries |= {278: height, 279: len(data), 339: sample_format}
    entries |= {int(name[1:]): value for name, value in tags.items()}
    entries[273] = 8 + 2 + 12 * len(entries) + 4
    rows = [struct.pack(f"{order}HHII", tag, 4, 1, entries[tag]) for tag in sorted(entries)]
    head = struct.pack(f"{order}2sHIH", b"II" if order == "<" else b"MM", 42, 8, len(rows))
    return head + b"".join(rows) + bytes(4) + data


def png(
    rows: list[bytes], width: int, depth: int, color: int, *, height: int = 0, **chunks: bytes
) -> bytes:
    """A PNG of these lines, with a `height` that may be wrong."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        )

    head = struct.pack(">IIBBBBB", width, height or len(rows), depth, color, 0, 0, 0)
    return b"".join(
        (
            b"\x89PNG\r\n\x1a\n",
            chunk(b"IHDR", head),
            *(chunk(name.encode(), data) for name, data in chunks.items()),
            chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row for row in rows))),
            chunk(b"IEND", b""),
        )
    )


def pnm(magic: str, samples: np.ndarray, most: str) -> bytes:
    height, width = samples.shape
    return f"{magic}\n{width} {height}\n{most}\n".encode() + samples.tobytes()


def in_mode(mode: str, values: tuple[int, ...]) -> Image.Image:
    """An image of one color, in any mode."""
    bands = [Image.new("L", (2, 2), value) for value in values]
    return bands[0] if len(bands) == 1 else Image.merge(mode, bands)


def palette(alpha: bytes | None = None) -> tuple[Image.Image, dict]:
    """Entry 1 is green, and entry 0 is red."""
    image = Image.new("P", (2, 2), 1)
    image.putpalette([255, 0, 0, 0, 255, 0])
    return image, {} if alpha is None else {"transparency": alpha}


PA = Image.frombytes("PA", (2, 2), bytes([1, 128] * 4))
PA.putpalette([255, 0, 0, 0, 255, 0])
THIRDS = np.array([[0.0, 1 / 3, 2 / 3, 1.0]], np.float32)
TWELVE = np.frombuffer(bytes([0x00, 0x0F, 0xFF, 0x80, 0x00, 0x00]), np.uint8).reshape(1, 6)

VALUES: dict[str, tuple[bytes, list]] = {
    # 16 bits over their full range, in Pillow's modes I;16, I;16B and I
    "16.png": (saved(Image.fromarray(WIDE), "PNG"), GRAYS.tolist()),
    "16.tif": (saved(Image.fromarray(WIDE), "TIFF"), GRAYS.tolist()),
    "16_lzw.tif": (saved(Image.fromarray(WIDE), "TIFF", compression="tiff_lzw"), GRAYS.tolist()),
    "16_big_endian.tif": (tiff(WIDE, ">"), GRAYS.tolist()),
    "16_white_is_zero.tif": (tiff(WIDE, _262=0), (255 - GRAYS).tolist()),
    "16.ppm": (pnm("P5", WIDE.astype(">u2"), "65535"), GRAYS.tolist()),
    "10.ppm": (pnm("P5", np.array([[0, 511, 1023]], ">u2"), "1023"), [[0, 127, 255]]),
    "16_rounded.png": (
        saved(Image.fromarray(np.array([[128, 129, 385, 386]], np.uint16)), "PNG"),
        [[0, 1, 1, 2]],
    ),
    "12.tif": (tiff(TWELVE, _256=4, _258=12), [[0, 255, 128, 0]]),
    "16_rgb.png": (
        png([struct.pack(">3H", 257 * 9, 257 * 99, 65535)], 1, 16, 2),
        [[[9, 99, 255]]],
    ),
    # floats from black to white
    "float.tif": (tiff(THIRDS), [[0, 85, 170, 255]]),
    "float_big_endian.tif": (tiff(THIRDS, ">"), [[0, 85, 170, 255]]),
    "float_white_is_zero.tif": (tiff(THIRDS, _262=0), [[255, 170, 85, 0]]),
    "float_rounded.tif": (tiff(np.float32([[-1e-7, 1 + 1e-6]])), [[0, 255]]),
    "float.ppm": (pnm("Pf", THIRDS, "-1.0"), [[0, 85, 170, 255]]),
    # other colors
    "1.png": (saved(Image.fromarray(GRAYS > 128), "PNG"), [[0, 0, 0], [255, 255, 255]]),
    "cmyk.tif": (saved(in_mode("CMYK", (0, 255, 255, 0)), "TIFF"), [[[255, 0, 0]] * 2] * 2),
    "ycbcr.tif": (saved(in_mode("YCbCr", (76, 85, 255)), "TIFF"), [[[254, 0, 0]] * 2] * 2),
    "lab.tif": (saved(in_mode("LAB", (255, 128, 128)), "TIFF"), [[[254, 255, 254]] * 2] * 2),
    "lab_red.tif": (saved(in_mode("LAB", (138, 209, 198)), "TIFF"), [[[251, 5, 4]] * 2] * 2),
    # on white
    "rgba.png": (saved(in_mode("RGBA", (0, 0, 200, 0)), "PNG"), [[[255] * 3] * 2] * 2),
    "half.png": (saved(in_mode("RGBA", (0, 0, 255, 128)), "PNG"), [[[127, 127, 255]] * 2] * 2),
    "opaque.webp": (
        saved(in_mode("RGBA", (1, 2, 3, 255)), "WEBP", lossless=True),
        [[[1, 2, 3]] * 2] * 2,
    ),
    "la.png": (saved(in_mode("LA", (100, 0)), "PNG"), [[[255] * 3] * 2] * 2),
    "la_opaque.tif": (saved(in_mode("LA", (100, 255)), "TIFF"), [[[100] * 3] * 2] * 2),
    "la_premultiplied.tif": (  # half of 100 remains, and half of the white background is added
        tiff(np.uint8([[50, 128, 0, 0]]), _256=2, _277=2, _338=1),
        [[[177] * 3, [255] * 3]],
    ),
    "rgba_premultiplied.tif": (
        tiff(np.uint8([[0, 0, 128, 128]]), _256=1, _262=2, _277=4, _338=1),
        [[[127, 127, 255]]],
    ),
    "pa.tif": (saved(PA, "TIFF"), [[[127, 255, 127]] * 2] * 2),
    "palette.png": (saved(palette()[0], "PNG"), [[[0, 255, 0]] * 2] * 2),
    "palette_half.png": (
        saved(palette()[0], "PNG", transparency=bytes([255, 128])),
        [[[127, 255, 127]] * 2] * 2,
    ),
    "palette.gif.jpg": (saved(palette()[0], "GIF", transparency=1), [[[255] * 3] * 2] * 2),
    "gray_key.png": (
        saved(Image.fromarray(GRAYS), "PNG", transparency=60),
        [[[0] * 3, [255] * 3, [128] * 3], [[129] * 3, [254] * 3, [255] * 3]],
    ),
    "gray_key_2_bits.png": (  # levels 0 to 3, of which 1 is transparent
        png([bytes([0b00011011])], 4, 2, 0, tRNS=struct.pack(">H", 1)),
        [[[0] * 3, [255] * 3, [170] * 3, [255] * 3]],
    ),
    "gray_key_16_bits.png": (
        png([struct.pack(">3H", 0, 257 * 9, 257 * 9 + 1)], 3, 16, 0, tRNS=struct.pack(">H", 2313)),
        [[0, 255, 9]],
    ),
    "rgb_key.png": (
        png([bytes([1, 2, 3, 4, 5, 6])], 2, 8, 2, tRNS=struct.pack(">3H", 1, 2, 3)),
        [[[255] * 3, [4, 5, 6]]],
    ),
    "rgb_key_16_bits.png": (
        png([struct.pack(">6H", 513, 2, 3, 4, 5, 6)], 2, 16, 2, tRNS=struct.pack(">3H", 513, 2, 3)),
        [[[255] * 3, [0, 0, 0]]],
    ),
}  # fmt: skip


OF_PILLOW_13 = ("ycbcr.tif", "la_premultiplied.tif")
"""Files that older versions of Pillow do not decode."""


@pytest.mark.parametrize("name", VALUES)
def test_values_are_kept(name: str, tmp_path: Path) -> None:
    if name in OF_PILLOW_13 and Version(PIL.__version__) < Version("13"):
        pytest.skip("needs Pillow 13, and Gradio 6.31 an older one")
    content, expected = VALUES[name]
    (tmp_path / name).write_bytes(content)
    tolerance = 2 if name.startswith(ROUNDED) else 0
    np.testing.assert_allclose(pixels(tmp_path / name), expected, atol=tolerance)


REFUSED: dict[str, tuple[bytes, str]] = {
    "signed.tif": (tiff(np.int16([[0, 5]])), "has signed integers, .*save it with 8 or 16"),
    "signed_8.tif": (tiff(np.int8([[0, -5]])), "has signed integers"),
    "signed_32.tif": (tiff(np.int32([[0, -5]])), "has signed integers"),
    "32.tif": (tiff(np.uint32([[0, 5]])), "has 32-bit integers, .*unknown"),
    "bright.tif": (tiff(np.float32([[0, 255]])), r"has floats from 0 to 255, not in \[0, 1\]"),
    "dark.tif": (tiff(np.float32([[-1, 1]])), "has floats from -1 to 1, not in"),
    "nan.tif": (tiff(np.float32([[0, np.nan]])), "has floats from nan to nan, not in"),
    "double.tif": (
        tiff(np.float64([[0, 1]])),
        "cannot be decoded: Pillow does not recognize it as one of BMP, GIF, JPEG, PNG",
    ),
    "text.png": (
        b"no image",
        "cannot be decoded: Pillow does not recognize it as one of BMP, GIF, JPEG, PNG",
    ),
    "icon.png": (
        saved(Image.new("RGB", (16, 16)), "ICO"),
        "cannot be decoded: Pillow does not recognize it as one of BMP",
    ),
    "empty.jpg": (b"", "cannot be decoded: Pillow does not recognize it as one of BMP"),
    "short.png": (
        png([b"\7"], 1, 8, 0, height=3),
        "is incomplete: it has data for only a part of its 1 x 3 pixels",
    ),
    "short.tif": (
        tiff(np.uint8([[1, 2]]), _257=4),
        "is incomplete: it has data for only a part of its 2 x 4 pixels",
    ),
    "short_planes.tif": (
        tiff(np.uint8([[1, 2]]), _277=3, _262=2, _284=2),
        "cannot be decoded|is incomplete",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_right_values_is_refused(name: str, tmp_path: Path) -> None:
    content, message = REFUSED[name]
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(BadSampleError, match=rf"image 0 \(.*{name}\) ({message})"):
        FileImages([path], [(0,)]).read(0)


def test_black_lines_that_are_there_are_kept(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png([b"\7", b"\0"], 1, 8, 0))
    assert pixels(tmp_path / "a.png") == [[7], [0]]
    # Interlaced (Adam7) images store their lines in another order.
    values = np.arange(11 * 9, dtype=np.uint8).reshape(9, 11)
    passes = [(0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2)]
    rows = [
        row.tobytes() for x, y, dx, dy in [*passes, (0, 1, 1, 2)] for row in values[y::dy, x::dx]
    ]
    for held, fault in ((rows, None), (rows[:-1], "a part of its 11 x 9 pixels")):
        content = png(held, 11, 8, 0, height=9)
        head = bytearray(content[12:29])
        head[-1] = 1
        content = content[:12] + head + struct.pack(">I", zlib.crc32(head)) + content[33:]
        (tmp_path / "b.png").write_bytes(content)
        if fault is None:
            assert pixels(tmp_path / "b.png") == values.tolist()
        else:
            with pytest.raises(ValueError, match=fault):
                read_image(tmp_path / "b.png")


TURNS: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    1: lambda upright: upright,
    2: np.fliplr,
    3: lambda upright: np.rot90(upright, 2),
    4: np.flipud,
    5: np.transpose,
    6: lambda upright: np.rot90(upright, 1),
    7: lambda upright: np.rot90(upright, 2).T,
    8: lambda upright: np.rot90(upright, -1),
}
"""The pixels that a rotated camera stores, by EXIF orientation."""


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", TURNS)
def test_orientation_is_obeyed(kind: str, orientation: int, tmp_path: Path) -> None:
    upright = np.kron(
        np.array([[0, 90, 170], [40, 210, 250]], np.uint8), np.ones((16, 16), np.uint8)
    )
    turned = Image.fromarray(np.ascontiguousarray(TURNS[orientation](upright)))
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "a.jpg"
    path.write_bytes(saved(turned, kind, exif=exif, quality=100))
    got = read_image(path)
    assert got.size == (48, 32)
    np.testing.assert_allclose(np.asarray(got.convert("L")), upright, atol=4)


def test_a_turned_picture_of_16_bits_with_broken_exif(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 3
    whole = saved(Image.fromarray(WIDE), "PNG", exif=exif)
    (tmp_path / "a.png").write_bytes(whole)
    assert pixels(tmp_path / "a.png") == GRAYS[::-1, ::-1].tolist()
    for broken in (b"MM\0*\0\0\0\x08\xff\xff\1", b"Exif\0\0no such thing"):
        (tmp_path / "b.png").write_bytes(saved(Image.fromarray(GRAYS), "PNG", exif=broken))
        assert pixels(tmp_path / "b.png") == GRAYS.tolist()


def test_the_content_decides_about_the_format(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "a.png").write_bytes(saved(Image.new("RGB", (4, 4), "lime"), "JPEG"))
    assert read_image(tmp_path / "a.png").getpixel((0, 0)) == (0, 255, 1)
    # Pillow would call Ghostscript for this one.
    eps = saved(Image.new("RGB", (4, 4)), "EPS")
    (tmp_path / "b.png").write_bytes(eps)
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", pytest.fail)
    with pytest.raises(
        ValueError, match="not recognize it as one of BMP, GIF, JPEG, PNG, PPM, TIFF, WEBP"
    ):
        read_image(tmp_path / "b.png")


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF", "MPO"])
def test_of_several_frames_the_first(kind: str, tmp_path: Path) -> None:
    first, second = (Image.new("RGB", (4, 4), color) for color in ("lime", "red"))
    lossless = {"lossless": True} if kind == "WEBP" else {}
    content = saved(first, kind, save_all=True, append_images=[second], **lossless)
    (tmp_path / "a.png").write_bytes(content)
    expected = np.full((4, 4, 3), (0, 255, 0))
    np.testing.assert_allclose(pixels(tmp_path / "a.png"), expected, atol=2)


def test_bombs_are_refused_before_they_take_memory(tmp_path: Path) -> None:
    line = bytes(13_000 // 8)
    path = tmp_path / "a.png"
    path.write_bytes(png([line] * 13_000, 13_000, 1, 0))
    with pytest.raises(
        ValueError,
        match=r"has 13000 x 13000 pixels, which exceeds max_pixels \(89,478,485\): resize",
    ):
        read_image(path)
    path.write_bytes(png([line], 13_000, 1, 0, height=2**31 - 1))
    with pytest.raises(ValueError, match="is too large: Image size .*resize it"):
        read_image(path)
    path.write_bytes(png([bytes(2)] * 10, 10, 1, 0))
    assert read_image(path, max_pixels=100).size == (10, 10)
    with pytest.raises(ValueError, match="has 10 x 10 pixels, which exceeds max_pixels .99."):
        read_image(path, max_pixels=99)
    with pytest.raises(ValueError, match=r"max_pixels must be in \[1, 178956970\], got 0"):
        ImageFolder("train", "val", max_pixels=0)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three color noise images in each of two classes, and a bad file of each kind."""
    rng = np.random.default_rng(0)
    for name in ("a", "b"):
        (tmp_path / "data" / name).mkdir(parents=True)
        for number in range(3):
            noise = Image.fromarray(rng.integers(0, 256, (16, 16, 3), np.uint8))
            noise.save(tmp_path / "data" / name / f"z{number}.png")
    return tmp_path / "data"


def test_gray_of_color_and_color_of_gray(folder: Path) -> None:
    Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16)).save(folder / "a" / "gray.png")
    source = ImageFolder(str(folder), str(folder))
    whole = ImageTransform(crop_pct=1.0, interpolation="nearest")
    for channels, mode in ((1, "L"), (3, "RGB")):
        data = ImageData(source, image_size=16, channels=channels, batch_size=7, transform=whole)
        data.setup()
        assert next(iter(data.train_dataloader()))["images"].shape == (7, channels, 16, 16)
        # With timm's mean and standard deviation for color, and their averages for grayscale.
        mean, std = (np.array(numbers) for numbers in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD))
        if channels == 1:
            mean, std = mean.mean(keepdims=True), std.mean(keepdims=True)
        images = next(iter(data.val_dataloader()))["images"]
        for index, path in enumerate(data.splits.val.paths):
            values = np.asarray(Image.open(path).convert(mode)).reshape(16, 16, channels) / 255
            expected = ((values - mean) / std).transpose(2, 0, 1)
            np.testing.assert_allclose(images[index], expected, atol=1e-5)


@pytest.mark.usefixtures("within_a_minute")
def test_bad_pictures_are_replaced_where_asked(folder: Path, caplog) -> None:
    for name, (content, _) in REFUSED.items():
        (folder / "a" / name).write_bytes(content)
    os.mkfifo(folder / "a" / "pipe.png")
    data = ImageData(
        ImageFolder(str(folder), str(folder)),
        image_size=16,
        batch_size=7,
        bad_samples=BadSamples("substitute", max_bad_fraction=1.0),
    )
    data.setup()
    batches = list(data.val_dataloader())
    paths = data.splits.val.paths
    assert len(paths) == 6 + len(REFUSED) + 1
    assert sum(len(batch["index"]) for batch in batches) == len(paths)
    assert {paths[i].name[0] for batch in batches for i in batch["index"]} == {"z"}
    told = "\n".join(record.getMessage() for record in caplog.records)
    assert all(f"{name}) " in told for name in (*REFUSED, "pipe.png"))
    assert "pipe.png) is a named pipe, not a regular file" in told
