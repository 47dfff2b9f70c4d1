"""The log-mel spectrogram: exact lengths and exact precision."""

import math
import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn

from diffmm.layers.spectrogram import LogMelSpectrogram, fft_size, zero_beyond
from diffmm.layers.stem import PatchStem

RATE = 8000


def spectrogram(**changes: float) -> LogMelSpectrogram:
    arguments = {"num_mels": 40, "window_seconds": 0.025, "hop_seconds": 0.010} | changes
    return LogMelSpectrogram(RATE, **arguments)


def test_one_frame_a_hop() -> None:
    log_mel = spectrogram()
    for num_samples, num_frames in ((1, 1), (80, 1), (81, 2), (8000, 100)):
        assert log_mel(torch.randn(2, num_samples))[0].shape == (2, 40, num_frames)
        assert log_mel.num_frames(num_samples) == num_frames


def test_a_tone_stands_in_its_band_and_a_click_in_its_frame() -> None:
    log_mel = spectrogram()
    seconds = torch.arange(8000) / RATE
    tone = log_mel(torch.sin(2 * math.pi * 1000.0 * seconds)[None])[0][0]
    top = 2595 * math.log10(1 + RATE / 2 / 700)
    band = 2595 * math.log10(1 + 1000 / 700) / top * 41 - 1
    assert abs(tone[:, 50].argmax().item() - band) < 1
    click = torch.zeros(1, 8000)
    click[0, 40 * 80 + 40] = 1.0  # the center of frame 40
    energy = log_mel(click)[0][0].mean(dim=0)
    assert energy.argmax().item() == 40
    torch.testing.assert_close(energy[39], energy[41], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("num_samples", [1, 79, 80, 1234, 3999])
def test_padding_changes_no_frame(num_samples: int) -> None:
    log_mel, clips = spectrogram(), torch.randn(2, 4000)
    alone, _ = log_mel(clips[:1, :num_samples])
    # Values after the end of a clip have no influence, even if they are not silence.
    padded, num_frames = log_mel(clips, torch.tensor([num_samples, 4000]))
    assert num_frames.tolist() == [alone.shape[2], 50]
    torch.testing.assert_close(padded[:1, :, : alone.shape[2]], alone, rtol=1e-5, atol=1e-5)
    assert (padded[0, :, alone.shape[2] :] == 0).all()


def test_normalization() -> None:
    clips = torch.randn(1, 800)
    raw = spectrogram()(clips)[0]
    torch.testing.assert_close(spectrogram(mean=-4.0, std=2.0)(clips)[0], (raw + 4.0) / 2.0)
    silence = spectrogram()(torch.zeros(1, 800))[0]
    torch.testing.assert_close(silence, torch.full_like(silence, math.log(1e-7)))


def test_always_float32() -> None:
    log_mel, clips = spectrogram(), 0.01 * torch.randn(2, 4000)
    expected = log_mel(clips)[0]
    with torch.autocast("cpu", torch.bfloat16):
        assert log_mel(clips)[0].equal(expected)
    for cast in (log_mel.bfloat16(), log_mel.half(), log_mel.to(torch.bfloat16)):
        assert {buffer.dtype for buffer in cast.buffers()} == {torch.float32}
        assert cast(clips)[0].equal(expected)
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert spectrogram()(clips)[0].equal(expected)
    finally:
        torch.set_default_dtype(torch.float32)
    wide = spectrogram().double()(clips.double())[0]
    assert wide.dtype == torch.float64
    torch.testing.assert_close(wide.float(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rate", [8000, 16000, 44100, 48000])
@pytest.mark.parametrize("num_mels", [40, 80, 128, 256])
def test_no_band_is_empty(rate: int, num_mels: int) -> None:
    # torchaudio would warn of an empty band, and warnings are errors here.
    layer = LogMelSpectrogram(rate, num_mels=num_mels, window_seconds=0.025, hop_seconds=0.010)
    assert (layer.filters.value.sum(dim=0) > 0).all()


def test_fft_size_is_a_power_of_two_that_holds_the_window() -> None:
    assert fft_size(400, 16000, 40) == 512
    assert fft_size(512, 16000, 40) == 512
    assert fft_size(513, 16000, 40) == 1024


def test_no_buffer_in_checkpoints() -> None:
    assert not spectrogram().state_dict()


def test_meta_device() -> None:
    with torch.device("meta"):
        layer = spectrogram()
        assert layer(torch.randn(2, 800))[0].shape == (2, 40, 10)


def test_the_meta_device_does_not_reach_the_constants_of_torchaudio() -> None:
    """They are made when it is imported, which is when the first spectrogram is made."""
    program = (
        "import torch\n"
        "from diffmm.layers.spectrogram import mel_filters\n"
        "with torch.device('meta'):\n"
        "    mel_filters(64, 8000, 8)\n"
        "from torchaudio.compliance import kaldi\n"
        "print(kaldi.fbank(torch.zeros(1, 800), sample_frequency=8000).device)\n"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert ended.stdout == "cpu\n", ended.stderr


@pytest.mark.parametrize(("num_samples", "window"), [(800, 256), (901, 200)])
def test_the_operator_of_power_spectra_is_well_formed(num_samples: int, window: int) -> None:
    args = (torch.randn(2, num_samples), torch.hann_window(window), 256, 80)
    torch.library.opcheck(torch.ops.diffmm.power_spectrum.default, args)


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
def test_sounds_of_any_length_compile_to_machine_code() -> None:
    layer = nn.ModuleDict({"spectrogram": spectrogram(), "stem": PatchStem(40, 8, (16, 16))})

    def tokens(clips: Tensor) -> Tensor:
        return layer["stem"](layer["spectrogram"](clips)[0])

    compiled = torch.compile(tokens, fullgraph=True, dynamic=True)
    clips = torch.randn(2, 4000)
    found, expected = [], []
    for call, results in ((compiled, found), (tokens, expected)):
        layer.zero_grad()
        out = call(clips)
        out.square().sum().backward()
        results += [out, *(parameter.grad for parameter in layer.parameters())]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_zero_beyond() -> None:
    x = torch.ones(2, 3, 4)
    assert zero_beyond(x, torch.tensor([1, 4])).sum(dim=(1, 2)).tolist() == [3, 12]


def test_refusals() -> None:
    with pytest.raises(ValueError, match=r"hop_seconds .* at most window_seconds, got 0.03 and"):
        spectrogram(hop_seconds=0.03)
    with pytest.raises(ValueError, match=r"must be positive, got 8000, 0 and 1.0"):
        spectrogram(num_mels=0)
    with pytest.raises(ValueError, match=r"waveforms must be \[B, S\].*got shape \(2, 1, 800\)"):
        spectrogram()(torch.randn(2, 1, 800))
    with pytest.raises(ValueError, match=r"at least one sample.*got shape \(2, 0\)"):
        spectrogram()(torch.randn(2, 0))
    with pytest.raises(ValueError, match=r"num_samples must be \[B\].*\(1,\) for 2 waveforms"):
        spectrogram()(torch.randn(2, 800), torch.tensor([800]))
