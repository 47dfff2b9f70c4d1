"""Every kind of sound file gives correct samples, or an error that names it."""

import os
import struct
import time
import tracemalloc
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import soundfile

from datamodules.audio import clips as audio_clips
from datamodules.audio.clips import FileClips
from datamodules.audio.data import AudioData
from datamodules.audio.reader import ClipReader
from datamodules.audio.sources import SoundFolder
from datamodules.shared.bad_samples import BadSampleError, BadSamples

RATE_HZ = 8000
NOISE = np.random.default_rng(0).integers(-(2**14), 2**14, 20_000).astype(np.float32) / 2**15


def sound(format: str, subtype: str | None = None, *, waveform=NOISE, rate_hz=RATE_HZ, **other):
    content = BytesIO()
    soundfile.write(content, waveform, rate_hz, format=format, subtype=subtype, **other)
    return content.getvalue()


def changed(content: bytes, place: int, new: bytes) -> bytes:
    return content[:place] + new + content[place + len(new) :]


def without_length(flac: bytes) -> bytes:
    """A FLAC file as written to a pipe, without a number of samples or an MD5."""
    return changed(flac, 21, bytes([flac[21] & 0xF0]) + bytes(4 + 16))


def with_length(wav: bytes, length: int) -> bytes:
    return changed(wav, wav.index(b"data") + 4, struct.pack("<I", length))


FLAC, WAV, OGG = sound("FLAC"), sound("WAV"), sound("OGG", waveform=np.tile(NOISE, 3))
WITH_CHUNK = WAV[:4] + struct.pack("<I", len(WAV) + 4) + b"WAVEJUNK\3\0\0\0abc\0" + WAV[12:]
PAGES = [place for place in range(len(OGG)) if OGG[place : place + 4] == b"OggS"]


@pytest.fixture
def clip(tmp_path: Path):
    """The clip of a file with this content."""

    def write(content: bytes, name: str = "a.wav") -> FileClips:
        (tmp_path / name).write_bytes(content)
        return FileClips([tmp_path / name], [(0,)])

    return write


WHOLE = {
    "flac": FLAC,
    "flac without its length": without_length(FLAC),
    "wav": WAV,
    "wav of extensible format": sound("WAVEX"),
    "wav of 64 bits": sound("RF64"),
    "wav of the other byte order": sound("WAV", endian="BIG"),
    "wav from FFmpeg's pipe": with_length(WAV, 0xFFFFFFFF),
    "wav from SoX's pipe": with_length(WAV, 0x7FFFF000),
    "wav from arecord's pipe": with_length(WAV, 0x80000000),
    "wav with a chunk before": WITH_CHUNK,
}


@pytest.mark.parametrize("name", WHOLE)
def test_whole_files_are_read_at_any_place(name: str, clip) -> None:
    clips = clip(WHOLE[name])
    assert clips.info(0) == (20_000, RATE_HZ)
    np.testing.assert_array_equal(clips.read(0), NOISE)
    for start, length in ((0, 1), (5000, 100), (4096, 4096), (19_000, 1000), (19_999, 1)):
        np.testing.assert_array_equal(clips.read(0, start, length), NOISE[start : start + length])


@pytest.mark.parametrize(
    "name", ["\udcff.wav", "\U0001f600 a\nb.flac"], ids=["of other bytes", "of odd characters"]
)
def test_names_need_not_be_utf_8(name: str, clip) -> None:
    assert np.array_equal(clip(FLAC, name).read(0), clip(FLAC, "a.flac").read(0))
    with pytest.raises(BadSampleError, match="is not a readable sound file"):
        clip(b"no sound", name).read(0)


@pytest.mark.parametrize("length", [1, 4096, 8192, 8193])
def test_a_flac_without_its_length_of_whole_blocks(length: int, clip) -> None:
    clips = clip(without_length(sound("FLAC", waveform=NOISE[:length])))
    assert clips.info(0).num_samples == length
    np.testing.assert_array_equal(clips.read(0), NOISE[:length])


@pytest.mark.parametrize("subtype", ["GSM610", "G721_32", "NMS_ADPCM_16", "IMA_ADPCM", "MS_ADPCM"])
def test_wavs_that_cannot_be_sought_in(subtype: str, clip) -> None:
    tone = 0.5 * np.sin(np.arange(20_000, dtype=np.float32) / 10)
    clips = clip(sound("WAV", subtype, waveform=tone))
    whole = clips.read(0)
    assert (
        20_000 <= len(whole) == clips.info(0).num_samples < 20_600
    )  # codecs fill their last block
    assert np.corrcoef(whole[100:20_000], tone[100:])[0, 1] > 0.95
    np.testing.assert_array_equal(clips.read(0, 7000, 500), whole[7000:7500])


def test_the_content_decides_about_the_format(clip) -> None:
    assert clip(OGG, "a.wav").info(0).num_samples == 60_000
    assert clip(sound("MP3", waveform=NOISE), "a.wav").info(0).num_samples == 20_000


def tone(num_samples: int, rate_hz: int = 16_000) -> np.ndarray:
    return 0.5 * np.sin(2 * np.pi * 220 * np.arange(num_samples, dtype=np.float32) / rate_hz)


# The smallest frames, of 8 kbit/s in stereo, need the most frames before them.
SMALLEST = {"bitrate_mode": "CONSTANT", "compression_level": 0.99}
MP3 = {
    "a tone": (16_000, tone(120_000), {}),
    "in stereo at 44.1 kHz": (
        44_100,
        np.stack([tone(300_000, 44_100), np.resize(NOISE, 300_000)], 1),
        {},
    ),
    "of several blocks": (16_000, tone(2**20 + 2**17), {}),
    "of the smallest frames": (24_000, np.resize(NOISE, (300_000, 2)), SMALLEST),
}


@pytest.mark.parametrize("name", MP3)
def test_crops_of_an_mp3_are_those_of_the_whole(name: str, clip) -> None:
    rate_hz, waveform, how = MP3[name]
    content = sound("MP3", waveform=waveform, rate_hz=rate_hz, **how)
    whole = audio_clips.mono(soundfile.read(BytesIO(content), dtype="float32", always_2d=True)[0])
    clips = clip(content, "a.mp3")
    total = clips.info(0).num_samples
    assert total == len(whole)
    np.testing.assert_allclose(clips.read(0), whole, atol=1e-6)
    for start in (0, 50_000, total // 2, total - 20_000):
        crop = whole[start : start + 16_000]
        np.testing.assert_allclose(clips.read(0, start, 16_000), crop, atol=1e-6)


FLIPPED = len(FLAC) // 2
BAD = {
    "aiff.wav": (
        sound("AIFF"),
        "has format AIFF, which is not one of WAV, WAVEX, RF64, FLAC, OGG, MP3",
    ),
    "cut.wav": (
        WAV[:20_044],
        "is incomplete: it has 20000 of the 40000 bytes of audio in its header",
    ),
    "cut_end.wav": (WAV[:-1], "is incomplete: it has 39999 of the 40000 bytes"),
    "cut_chunk.wav": (WITH_CHUNK[:-2], "is incomplete: it has 39998 of the 40000 bytes"),
    "cut_gsm.wav": (
        sound("WAV", "GSM610")[:2000],
        r"is incomplete: it has \d+ of the \d+ bytes of audio",
    ),
    "cut_big.wav": (
        sound("WAV", endian="BIG")[:9000],
        "is incomplete: it has 8956 of the 40000 bytes",
    ),
    "cut_64.wav": (sound("RF64")[:9000], r"is incomplete: it has \d+ of the 40000 bytes of audio"),
    "cut.flac": (FLAC[:20_000], "cannot be decoded|ends after"),
    "cut_unknown.flac": (without_length(FLAC)[:20_000], "cannot be decoded"),
    "flipped.flac": (changed(FLAC, FLIPPED, bytes([FLAC[FLIPPED] ^ 85])), "cannot be decoded"),
    "flipped_unknown.flac": (
        without_length(changed(FLAC, FLIPPED, bytes([FLAC[FLIPPED] ^ 85]))),
        "cannot be decoded",
    ),
    "none_unknown.flac": (without_length(FLAC)[: 4 + 4 + 34], "is not a readable|has no samples"),
    # 68,719,476,735 samples would take 256 GiB
    "lying.flac": (changed(FLAC, 21, bytes([FLAC[21] | 15]) + b"\xff" * 4), "has 68,719,476,735 s"),
    "cut.ogg": (OGG[: PAGES[-1] + 50], "is incomplete .its last page is truncated"),
    "cut_page.ogg": (OGG[: PAGES[-1]], "is incomplete .*not marked as the end"),
    "cut_half.ogg": (OGG[: len(OGG) // 2], "is incomplete .its last page"),
    "as_integers.wav": (
        sound("WAV", "FLOAT", waveform=NOISE * 2**15),
        "has samples up to 16384, but full scale is 1: rescale",
    ),
    "1_hz.wav": (sound("WAV", rate_hz=1), "has a sample rate of 1 Hz, which cannot be converted"),
    "fast.wav": (
        sound("WAV", rate_hz=2**31 - 1),
        "has a sample rate of 2147483647 Hz, which cannot be converted to 8000 Hz: convert the",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_cut_or_beyond_reason_is_refused(name: str, clip) -> None:
    content, message = BAD[name]
    reader = ClipReader(clip(content, name), sample_rate_hz=RATE_HZ, resample=True)
    tracemalloc.start()
    with pytest.raises(BadSampleError, match=rf"clip 0 \(.*{name}\) ({message})"):
        reader.read(0)
    assert tracemalloc.get_traced_memory()[1] < 2**24
    tracemalloc.stop()


def test_a_header_that_promises_too_much_is_found_out_where_it_is_read(clip) -> None:
    clips = clip(BAD["lying.flac"][0])
    np.testing.assert_array_equal(clips.read(0, 100, 1000), NOISE[100:1100])
    with pytest.raises(BadSampleError, match="cannot be decoded|ends after 20000 of the 30000"):
        clips.read(0, 0, 30_000)


def test_no_more_is_decoded_than_memory_holds(clip, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audio_clips, "MAX_SAMPLES", 10_000)
    clips = clip(FLAC)
    assert len(clips.read(0, 0, 10_000)) == 10_000
    with pytest.raises(ValueError, match=r"has 20,000 samples of 1 channels, which exceeds"):
        clips.read(0)
    with pytest.raises(ValueError, match="has no length in its header and more than 10,000"):
        clip(without_length(FLAC)).info(0)


def test_channels_that_cancel_out_give_the_loudest(clip) -> None:
    one, other = NOISE[:1000], NOISE[1000:2000]
    cases = {
        "opposite": ((one, -one), one),
        "almost opposite": ((one, -0.99 * one), one),
        "the second is louder": ((0.99 * one, -one), -one),
        "partly opposite": ((one, -0.5 * one), one / 4),
        "different": ((one, other), (one + other) / 2),
        "one is silent": ((one, 0 * one), one / 2),
        "both are silent": ((0 * one, 0 * one), 0 * one),
        "beyond full scale": ((9 * one, 9 * one), 9 * one),
    }
    for name, (channels, expected) in cases.items():
        clips = clip(sound("WAV", "FLOAT", waveform=np.stack(channels, axis=1)))
        np.testing.assert_allclose(clips.read(0), expected, atol=1e-7, err_msg=name)


@pytest.mark.parametrize("rate_hz", [44_101, 15_999, 192_001])
def test_rates_without_a_common_factor(rate_hz: int, clip) -> None:
    seconds = np.arange(2 * rate_hz) / rate_hz
    tone = np.sin(2 * np.pi * 1000 * seconds).astype(np.float32)
    reader = ClipReader(
        clip(sound("WAV", "FLOAT", waveform=tone, rate_hz=rate_hz)),
        sample_rate_hz=16_000,
        resample=True,
    )
    tracemalloc.start()
    start = time.perf_counter()
    got = reader.read(0)
    assert time.perf_counter() - start < 10
    assert tracemalloc.get_traced_memory()[1] < 2**29
    tracemalloc.stop()
    assert len(got) == reader.num_samples(0) == 32_000
    expected = np.sin(2 * np.pi * 1000 * np.arange(32_000) / 16_000)
    np.testing.assert_allclose(got[100:-100], expected[100:-100], atol=2e-3)


@pytest.mark.usefixtures("within_a_minute")
def test_bad_sounds_are_replaced_where_asked(tmp_path: Path, caplog) -> None:
    for name, (content, _) in BAD.items():
        (tmp_path / "a").mkdir(exist_ok=True)
        (tmp_path / "a" / name).write_bytes(content)
    (tmp_path / "a" / "good.wav").write_bytes(WAV)
    (tmp_path / "a" / "good.flac").write_bytes(without_length(FLAC))
    os.mkfifo(tmp_path / "a" / "pipe.wav")
    source = SoundFolder(str(tmp_path), val=str(tmp_path))
    for batching in ("padded", "bucketed"):
        caplog.clear()
        data = AudioData(
            source,
            sample_rate_hz=RATE_HZ,
            resample=True,
            batching=batching,
            batch_size=4,
            bad_samples=BadSamples("substitute", max_bad_fraction=1.0),
        )
        data.setup()
        paths = data.splits.train.paths
        assert len(paths) == len(BAD) + 3
        for loader in (data.train_dataloader(), data.val_dataloader()):
            names = {paths[i].name for batch in loader for i in batch["index"]}
            assert names == {"good.wav", "good.flac"}
        told = "\n".join(record.getMessage() for record in caplog.records)
        assert all(f"{name}) " in told for name in BAD)
        assert "pipe.wav) is a named pipe, not a regular file" in told
