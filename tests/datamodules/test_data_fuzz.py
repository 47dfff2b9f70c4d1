"""Real files with random changes give their content, or are refused by name."""

import json
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from datamodules.audio.clips import FileClips
from datamodules.audio.reader import ClipReader
from datamodules.image.sources import FileImages
from datamodules.text.data import TokenFiles, write_token_file
from datamodules.text.token_documents import Document
from diffmm.tokenizers import load_tokenizer

pytestmark = pytest.mark.usefixtures("within_a_minute")


def bounded(max_examples: int) -> settings:
    """Run a fixed number of examples, the same in every run."""
    return settings(
        max_examples=max_examples,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )


Edits = list[tuple[int, int]]


def lengths(content: bytes) -> st.SearchStrategy[int]:
    """The length to which `content` is cut."""
    return st.integers(0, len(content) - 1)


def edits(content: bytes, header: int = 200) -> st.SearchStrategy[Edits]:
    """A few positions in `content`, most of them in its header, and the bytes to write there."""
    places = st.integers(0, min(header, len(content)) - 1) | st.integers(0, len(content) - 1)
    values = st.sampled_from([0, 1, 0x7F, 0x80, 0xFF]) | st.integers(0, 255)
    return st.lists(st.tuples(places, values), min_size=1, max_size=4)


def edited(content: bytes, changes: Edits) -> bytes:
    changed = bytearray(content)
    for place, value in changes:
        changed[place] = value
    return bytes(changed)


def held(path: Path, content: bytes, read: Callable[[Path], Any]) -> Any:
    """The result of reading `path` with this content; `None` if it is refused by name."""
    path.write_bytes(content)
    try:
        return read(path)
    except ValueError as error:
        refusal = str(error)
    assert str(path.parent / path.stem.split(".")[0]) in refusal
    return None


# ------------------------------------------------------------------ images

NOISE = np.random.default_rng(0).integers(0, 256, (24, 32, 4), np.uint8)


def picture(kind: str, values: np.ndarray = NOISE[..., :3], **arguments: Any) -> bytes:
    content = BytesIO()
    Image.fromarray(values).save(content, kind, **arguments)
    return content.getvalue()


def exif() -> Image.Exif:
    turned = Image.Exif()
    turned[0x0112] = 6
    return turned


PICTURES = {
    "bmp": picture("BMP"),
    "gif": picture("GIF", NOISE[..., 0]),
    "jpeg": picture("JPEG", exif=exif()),
    "progressive jpeg": picture("JPEG", progressive=True),
    "png": picture("PNG", exif=exif()),
    "png with alpha": picture("PNG", NOISE),
    "png of 16 bits": picture("PNG", NOISE[..., 0].astype(np.uint16) * 257),
    "black png": picture("PNG", np.zeros((24, 32), np.uint8)),
    "ppm": picture("PPM"),
    "tiff": picture("TIFF"),
    "tiff of 16 bits": picture("TIFF", NOISE[..., 0].astype(np.uint16) * 257),
    "tiff of floats": picture("TIFF", NOISE[..., 0].astype(np.float32) / 255),
    "lzw tiff": picture("TIFF", compression="tiff_lzw", exif=exif()),
    "webp": picture("WEBP"),
}


def read_picture(path: Path) -> np.ndarray:
    image = FileImages([path], [(0,)], max_pixels=10_000).read(0)
    assert image.mode in ("L", "RGB")
    assert image.width * image.height <= 10_000
    return np.asarray(image)


@pytest.mark.parametrize("kind", PICTURES)
def test_pictures(kind: str, tmp_path: Path) -> None:
    path, content = tmp_path / "a.png", PICTURES[kind]
    whole = held(path, content, read_picture)
    assert whole is not None

    @bounded(60)
    @given(lengths(content))
    def cut(length: int) -> None:
        pixels = held(path, content[:length], read_picture)
        assert pixels is None or np.array_equal(pixels, whole)

    @bounded(80)
    @given(edits(content))
    def changed(changes: Edits) -> None:
        held(path, edited(content, changes), read_picture)

    cut()
    changed()


# ------------------------------------------------------------------ sounds


def sound(format: str, subtype: str | None = None) -> bytes:
    waveform = np.random.default_rng(0).uniform(-0.5, 0.5, (3000, 2)).astype(np.float32)
    content = BytesIO()
    channels = waveform[:, 0] if subtype == "GSM610" else waveform
    soundfile.write(content, channels, 8000, format=format, subtype=subtype)
    return content.getvalue()


def unmeasured_flac() -> bytes:
    content = bytearray(sound("FLAC"))
    content[21] &= 0xF0
    content[22:42] = bytes(20)
    return bytes(content)


SOUNDS = {
    "wav": sound("WAV"),
    "float wav": sound("WAV", "FLOAT"),
    "adpcm wav": sound("WAV", "IMA_ADPCM"),
    "gsm wav": sound("WAV", "GSM610"),
    "extensible wav": sound("WAVEX"),
    "wav of 64 bits": sound("RF64"),
    "flac": sound("FLAC"),
    "flac without its length": unmeasured_flac(),
    "ogg": sound("OGG"),
    "opus": sound("OGG", "OPUS"),
}


def read_sound(path: Path) -> np.ndarray:
    reader = ClipReader(FileClips([path], [(0,)]), sample_rate_hz=8000, resample=True)
    stretch = reader.read(0, max_samples=500, position=0.5)
    assert len(stretch) <= 500
    waveform = reader.read(0)
    assert waveform.dtype == np.float32
    assert np.isfinite(waveform).all()
    assert len(waveform) == reader.num_samples(0) > 0
    return waveform


@pytest.mark.parametrize("kind", SOUNDS)
def test_sounds(kind: str, tmp_path: Path) -> None:
    path, content = tmp_path / "a.wav", SOUNDS[kind]
    whole = held(path, content, read_sound)
    assert whole is not None

    @bounded(60)
    @given(lengths(content))
    def cut(length: int) -> None:
        samples = held(path, content[:length], read_sound)
        # The length of a FLAC file without a number of samples is unknown.
        end = len(samples) if samples is not None and "without" in kind else None
        assert samples is None or np.array_equal(samples, whole[:end])

    @bounded(80)
    @given(edits(content, header=60))
    def changed(changes: Edits) -> None:
        held(path, edited(content, changes), read_sound)

    cut()
    changed()


# ------------------------------------------------------------------ token files

BYTES = load_tokenizer("bytes")
SUFFIXES = (".bin", ".json", ".documents.npy")


def read_tokens(path: Path) -> list[list[int]]:
    corpus = TokenFiles([str(path.with_name("a.bin"))]).load(BYTES)
    read = []
    for number in range(len(corpus)):
        length = int(corpus.lengths[number])
        assert length > 0
        read.append(corpus.read(number, 0, length).tolist())
        assert len(read[-1]) == length
        assert max(read[-1]) < BYTES.vocab_size
    return read


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_token_files(suffix: str, tmp_path: Path) -> None:
    documents = [Document(str(number), f"text {number}") for number in range(20)]
    path = write_token_file(tmp_path / "a.bin", documents, BYTES).with_suffix(suffix)
    content = path.read_bytes()
    whole = read_tokens(path)

    @bounded(100)
    @given(lengths(content))
    def cut(length: int) -> None:
        tokens = held(path, content[:length], read_tokens)
        assert tokens is None or tokens == whole

    @bounded(200)
    @given(edits(content))
    def changed(changes: Edits) -> None:
        tokens = held(path, edited(content, changes), read_tokens)
        assert tokens is None or suffix == ".bin" or tokens == whole or len(tokens) == len(whole)

    cut()
    changed()


FIELDS = ("format", "dtype", "tokenizer", "tokenizer_fingerprint", "vocab_size", "num_documents")
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)


def test_headers_of_token_files(tmp_path: Path) -> None:
    documents = [Document(str(number), f"text {number}") for number in range(20)]
    path = write_token_file(tmp_path / "a.bin", documents, BYTES).with_suffix(".json")
    header, whole = json.loads(path.read_text()), read_tokens(path)
    values = SCALARS | st.sampled_from(["O", "<u2", "uint32", 2**63, -1]) | st.lists(SCALARS)

    @bounded(300)
    @given(st.dictionaries(st.sampled_from((*FIELDS, "num_tokens")), values, min_size=1))
    def changed(fields: dict[str, Any]) -> None:
        tokens = held(path, json.dumps({**header, **fields}).encode(), read_tokens)
        assert tokens is None or tokens == whole

    changed()
