"""A synthesizer of labeled sound events, for small audio tasks that need no files.

Each event is a function of its pitch, its length and a random generator; a clip contains one or
several of them at random times in background noise. Clips are synthesized on access, in about one
millisecond, and are a function of the source's seed, the split and the clip's index.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from scipy.signal import lfilter

from datamodules.audio.clips import AudioClips, ClipInfo
from datamodules.audio.sources import AudioSource
from datamodules.shared.fingerprints import Fingerprint
from datamodules.shared.sampling import sample_rng
from datamodules.shared.sources import Labels, Splits

Waveform = NDArray[np.float32]
Event = Callable[[float, int, int, Generator], Waveform]
"""`event(pitch_hz, num_samples, rate_hz, rng)`: a sound with an RMS of about 1 and faded ends."""

PITCH_HZ = (150.0, 1500.0)
"""The range of pitches, drawn uniformly on a logarithmic scale. Chirps and overtones are higher."""


def tone(pitch_hz: float, num_samples: int, rate_hz: int, rng: Generator) -> Waveform:
    """A sine wave."""
    return _finish(np.sin(_phase(pitch_hz, num_samples, rate_hz, rng)), rate_hz)


def harmonic(pitch_hz: float, num_samples: int, rate_hz: int, rng: Generator) -> Waveform:
    """A sawtooth-like tone: up to six harmonics below the Nyquist frequency, with amplitudes
    `1 / k`."""
    phase = _phase(pitch_hz, num_samples, rate_hz, rng)
    audible = [k for k in range(1, 7) if k * pitch_hz < rate_hz / 2]
    return _finish(sum(np.sin(k * phase) / np.float32(k) for k in audible), rate_hz)


def tremolo(pitch_hz: float, num_samples: int, rate_hz: int, rng: Generator) -> Waveform:
    """A sine wave whose amplitude varies 5 to 12 times per second, almost to silence."""
    swing = 1 + 0.9 * np.sin(_phase(rng.uniform(5, 12), num_samples, rate_hz, rng))
    carrier = np.sin(_phase(pitch_hz, num_samples, rate_hz, rng))
    return _finish(carrier * swing, rate_hz)


def vibrato(pitch_hz: float, num_samples: int, rate_hz: int, rng: Generator) -> Waveform:
    """A sine wave whose pitch varies 4 to 8 times per second, by one to three semitones."""
    swings_hz, semitones = rng.uniform(4, 8), rng.uniform(1, 3)
    deviation_hz = pitch_hz * (2 ** (semitones / 12) - 1)
    # The integral of pitch + deviation * cos(2 pi swings t).
    swing = np.sin(_phase(swings_hz, num_samples, rate_hz, rng)) * (deviation_hz / swings_hz)
    return _finish(np.sin(_phase(pitch_hz, num_samples, rate_hz, rng) + swing), rate_hz)


def chirp_up(pitch_hz: float, num_samples: int, rate_hz: int, rng: Generator) -> Waveform:
    """A sine wave that rises linearly by one to two octaves and reaches `pitch_hz` halfway."""
    return _chirp(pitch_hz, num_samples, rate_hz, rng.uniform(1, 2), rng)


def chirp_down(pitch_hz: float, num_samples: int, rate_hz: int, rng: Generator) -> Waveform:
    """A sine wave that falls linearly by one to two octaves and reaches `pitch_hz` halfway."""
    return _chirp(pitch_hz, num_samples, rate_hz, -rng.uniform(1, 2), rng)


def noise_band(pitch_hz: float, num_samples: int, rate_hz: int, rng: Generator) -> Waveform:
    """White noise, filtered by a Gaussian around `pitch_hz` that is `pitch_hz / 6` to
    `pitch_hz / 2` wide."""
    spectrum = np.fft.rfft(rng.standard_normal(num_samples, dtype=np.float32))
    freqs_hz = np.fft.rfftfreq(num_samples, 1 / rate_hz)
    width_hz = pitch_hz * rng.uniform(1 / 6, 1 / 2) / 2
    window = np.exp(-0.5 * ((freqs_hz - pitch_hz) / width_hz) ** 2)
    return _finish(np.fft.irfft(spectrum * window, num_samples), rate_hz)


def pluck(pitch_hz: float, num_samples: int, rate_hz: int, rng: Generator) -> Waveform:
    """A plucked string (Karplus and Strong, 1983): noise in a low-pass delay line.

    `y[n] = x[n] + g (y[n-P] + y[n-P-1]) / 2`, where `x` is one period of noise. Interpolation
    between neighboring samples makes the period exact (Jaffe and Smith, 1983).
    """
    # The two-point mean delays by half a sample; the rest is P whole samples and a fraction.
    period = rate_hz / pitch_hz - 0.5
    whole, fraction = int(period), period % 1.0
    gain = 10 ** (-3 / (rng.uniform(0.5, 2.0) * pitch_hz))  # 60 dB in 0.5 to 2 seconds
    feedback = np.zeros(whole + 3, np.float32)
    feedback[0] = 1.0
    feedback[whole:] = -0.5 * gain * np.array([1 - fraction, 1.0, fraction])
    burst = np.zeros(num_samples, np.float32)
    excitation = rng.uniform(-1, 1, min(whole + 1, num_samples))
    burst[: len(excitation)] = excitation - excitation.mean()
    return _finish(lfilter([np.float32(1.0)], feedback, burst), rate_hz, attack=False)


def bell(pitch_hz: float, num_samples: int, rate_hz: int, rng: Generator) -> Waveform:
    """A struck free bar: partials 1, 2.756 and 5.404, of which higher ones decay faster."""
    seconds = np.arange(num_samples, dtype=np.float32) / np.float32(rate_hz)
    decay_seconds = rng.uniform(0.1, 0.4)
    partials: Any = 0.0
    for ratio in (1.0, 2.756, 5.404):
        if ratio * pitch_hz < rate_hz / 2:
            fade = np.exp(seconds * np.float32(-ratio / decay_seconds))
            phase = _phase(ratio * pitch_hz, num_samples, rate_hz, rng)
            partials = partials + np.sin(phase) * fade
    return _finish(partials, rate_hz, attack=False)


def clicks(pitch_hz: float, num_samples: int, rate_hz: int, rng: Generator) -> Waveform:
    """Clicks, 6 to 16 per second: noise and a tone at `pitch_hz` that decay within a few
    milliseconds."""
    width = int(0.01 * rate_hz)
    seconds = np.arange(width) / rate_hz
    ring = np.sin(2 * np.pi * pitch_hz * seconds) + 0.5 * rng.standard_normal(width)
    click = ring * np.exp(-seconds / 0.002)
    spacing = int(rate_hz / rng.uniform(6, 16))
    train = np.zeros(num_samples + width, np.float32)
    for start in range(int(rng.integers(spacing)) % max(num_samples // 2, 1), num_samples, spacing):
        train[start : start + width] += click
    return _finish(train[:num_samples], rate_hz, attack=False)


EVENTS: dict[str, Event] = {
    event.__name__: event
    for event in (
        tone,
        harmonic,
        tremolo,
        vibrato,
        chirp_up,
        chirp_down,
        noise_band,
        pluck,
        bell,
        clicks,
    )
}
"""The classes, in order of their indices."""


def background(num_samples: int, rng: Generator) -> Waveform:
    """Noise with an RMS of 1 and a power of `1 / f ** a`, with `a` between 0 (white) and 2
    (brown)."""
    spectrum = np.fft.rfft(rng.standard_normal(num_samples, dtype=np.float32))
    slope = np.arange(1, len(spectrum) + 1, dtype=np.float32) ** np.float32(-rng.uniform(0, 2) / 2)
    return _unit_rms(np.fft.irfft(spectrum * slope, num_samples))


def _phase(pitch_hz: float, num_samples: int, rate_hz: int, rng: Generator) -> Waveform:
    steps = np.arange(num_samples) * (2 * np.pi * pitch_hz / rate_hz)
    return (steps + rng.uniform(0, 2 * np.pi)).astype(np.float32)


def _chirp(
    pitch_hz: float, num_samples: int, rate_hz: int, octaves: float, rng: Generator
) -> Waveform:
    first_hz = 2 * pitch_hz / (1 + 2**octaves)
    rise_hz = 2 * (pitch_hz - first_hz) * rate_hz / num_samples  # per second
    seconds = np.arange(num_samples) / rate_hz
    phase = 2 * np.pi * (first_hz + rise_hz / 2 * seconds) * seconds + rng.uniform(0, 2 * np.pi)
    return _finish(np.sin(phase.astype(np.float32)), rate_hz)


def _finish(waveform: Any, rate_hz: int, attack: bool = True) -> Waveform:
    """Fade the ends over 10 milliseconds (the beginning only with `attack`) and normalize the RMS
    to 1."""
    width = min(int(0.01 * rate_hz), len(waveform) // 2)
    fade = np.sin(np.linspace(0, np.pi / 2, width, dtype=np.float32)) ** 2
    waveform = waveform.astype(np.float32)
    if attack:
        waveform[:width] *= fade
    waveform[len(waveform) - width :] *= fade[::-1]
    return _unit_rms(waveform)


def _unit_rms(waveform: Any) -> Waveform:
    waveform = waveform.astype(np.float32)
    rms = float(np.sqrt(np.mean(np.square(waveform))))
    return waveform / np.float32(max(rms, 1e-8))


class SoundEvents(AudioSource):
    """Synthetic clips of labeled sound events in background noise; needs no files.

    Clip `i` has class `i % 10` (so that classes are balanced) or, with several events, distinct
    random classes; pitch, length, onset, level and noise are random. The clip is a function of
    `(seed, split, i)`.

    Args:
        num_clips: Number of training clips.
        num_val_clips: Number of validation clips, and of test clips.
        sample_rate_hz: Sample rate of the clips in Hz, at least 8000.
        clip_seconds: Range of the clips' lengths in seconds, at least 0.2.
        events_per_clip: Range of the number of events per clip. `(1, 1)` gives one class per clip;
            otherwise the data are multi-label.
        snr_db: Range of the events' level above the background noise, in decibels.
        peak_db: Range of the clips' peak level relative to full scale in decibels, at most 0.
        seed: Seed of all clips.

    Raises:
        ValueError: If an argument is out of range; the message names it.
    """

    def __init__(
        self,
        num_clips: int = 2000,
        num_val_clips: int = 500,
        *,
        sample_rate_hz: int = 16000,
        clip_seconds: tuple[float, float] = (1.0, 1.0),
        events_per_clip: tuple[int, int] = (1, 1),
        snr_db: tuple[float, float] = (0.0, 30.0),
        peak_db: tuple[float, float] = (-20.0, -1.0),
        seed: int = 0,
    ) -> None:
        for name, number, least in (
            ("num_clips", num_clips, 1),
            ("num_val_clips", num_val_clips, 1),
            ("sample_rate_hz", sample_rate_hz, 8000),
            ("seed", seed, 0),
        ):
            if number < least:
                raise ValueError(f"{name} must be at least {least}, got {number}")
        ranges: tuple[tuple[str, tuple[float, float], float, float], ...] = (
            ("clip_seconds", clip_seconds, 0.2, np.inf),
            ("events_per_clip", events_per_clip, 1, len(EVENTS)),
            ("snr_db", snr_db, -np.inf, np.inf),
            ("peak_db", peak_db, -np.inf, 0.0),
        )
        for name, (low, high), lowest, highest in ranges:
            if not lowest <= low <= high <= highest:
                raise ValueError(
                    f"{name} must be two increasing numbers in [{lowest}, {highest}], got "
                    f"{(low, high)}"
                )
        self.num_clips = num_clips
        self.num_val_clips = num_val_clips
        self.sample_rate_hz = sample_rate_hz
        self.clip_seconds = clip_seconds
        self.events_per_clip = events_per_clip
        self.snr_db = snr_db
        self.peak_db = peak_db
        self.seed = seed

    def splits(self) -> Splits[AudioClips]:
        return Splits(
            class_names=list(EVENTS),
            train=SyntheticClips(self, 0, self.num_clips),
            val=SyntheticClips(self, 1, self.num_val_clips),
            test=SyntheticClips(self, 2, self.num_val_clips),
            multi_label=self.events_per_clip[1] > 1,
        )


class SyntheticClips(AudioClips):
    """One split of `SoundEvents`."""

    def __init__(self, source: SoundEvents, split: int, num_clips: int) -> None:
        self.source = source
        self.split = split
        # Lengths and classes have their own random streams, so they need no synthesis.
        lengths = self._rng(0).uniform(*source.clip_seconds, size=num_clips)
        self._num_samples = np.round(lengths * source.sample_rate_hz).astype(int)
        self.labels = self._draw_labels(num_clips)

    def describe(self, index: int) -> str:
        return f"synthetic clip {index}"

    def fingerprint(self) -> Fingerprint:
        return {**super().fingerprint(), "source": str(vars(self.source))}

    def info(self, index: int) -> ClipInfo:
        return ClipInfo(int(self._num_samples[index]), self.source.sample_rate_hz)

    def read(self, index: int, start: int = 0, num_samples: int | None = None) -> Waveform:
        source, total = self.source, int(self._num_samples[index])
        rng = self._rng(2, index)
        clip = background(total, rng) * np.float32(10 ** (-rng.uniform(*source.snr_db) / 20))
        for label in self.labels[index]:
            # An event fills 40% to 100% of the clip, and at least 0.2 seconds.
            least = min(max(int(0.4 * total), int(0.2 * source.sample_rate_hz)), total)
            length = int(rng.integers(least, total, endpoint=True))
            onset = int(rng.integers(0, total - length, endpoint=True))
            pitch_hz = float(np.exp(rng.uniform(*np.log(PITCH_HZ))))
            event = list(EVENTS.values())[label]
            clip[onset : onset + length] += event(pitch_hz, length, source.sample_rate_hz, rng)
        clip *= np.float32(10 ** (rng.uniform(*source.peak_db) / 20) / np.abs(clip).max())
        return clip[start:] if num_samples is None else clip[start : start + num_samples]

    def _rng(self, *key: int) -> Generator:
        return sample_rng(self.source.seed, self.split, *key)

    def _draw_labels(self, num_clips: int) -> list[Labels]:
        if self.source.events_per_clip[1] == 1:
            return [(index % len(EVENTS),) for index in range(num_clips)]
        rng, (low, high) = self._rng(1), self.source.events_per_clip
        counts = rng.integers(low, high, size=num_clips, endpoint=True)
        return [
            tuple(sorted(rng.permutation(len(EVENTS))[:count].tolist()))
            for count in counts.tolist()
        ]
