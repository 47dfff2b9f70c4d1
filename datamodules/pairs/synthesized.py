"""Synthesized sounds with captions, which need no files.

A clip has one to three sound events in sequence, in background noise. The caption says the pitch
and the kind of each, in order: "a low bell, then a high rising chirp". The events are those of
`datamodules.audio.sound_events`.
"""

from itertools import product

import numpy as np

from datamodules.audio.clips import AudioClips, ClipInfo
from datamodules.audio.sound_events import EVENTS, Waveform, background
from datamodules.pairs.captions import Kind, diagonal, draw_distinct, draw_kinds
from datamodules.pairs.sources import SOUNDS, Medium, Pairs, PairSource, PairSplits
from datamodules.shared.fingerprints import Fingerprint, digest
from datamodules.shared.sampling import sample_rng

PITCHES_HZ = {"low": (150.0, 300.0), "high": (750.0, 1500.0)}
"""Range of each pitch, drawn uniformly on a logarithmic scale."""

NAMES = {
    "tone": "pure tone",
    "harmonic": "buzz",
    "tremolo": "pulsing tone",
    "vibrato": "wavering tone",
    "chirp_up": "rising chirp",
    "chirp_down": "falling chirp",
    "noise_band": "hiss",
    "pluck": "plucked string",
    "bell": "bell",
    "clicks": "clicking",
}
"""The words for each of `EVENTS`."""

Scene = tuple[Kind, ...]
"""The pitch and the event of each sound of a clip, in order."""


def caption_of(scene: Scene) -> str:
    """The description of a clip.

    >>> caption_of((("low", "bell"), ("high", "chirp_up")))
    'a low bell, then a high rising chirp'
    """
    return ", then ".join(f"a {pitch} {NAMES[event]}" for pitch, event in scene)


class SynthesizedSounds(PairSource):
    """Clips of sound events in sequence, with captions.

    Combinations of a pitch and a kind of event are held out: no training clip has an event of such
    a combination, and every validation and test clip has at least one. All captions of a validation
    or test split differ.

    Args:
        num_clips: Number of training clips.
        num_val_clips: Number of validation clips, and of test clips.
        sample_rate_hz: Sample rate of the clips in Hz, at least 8000.
        clip_seconds: Range of the clips' lengths in seconds, at least 0.5.
        events_per_clip: Range of the number of events per clip, in [1, 3].
        snr_db: Range of the events' level above the background noise, in decibels.
        peak_db: Range of the clips' peak level relative to full scale in decibels, at most 0.
        held_out_fraction: Fraction of the 20 combinations of pitch and event that is held out; 0
            holds out none, so that validation sounds are new, but what is in them is not.
        seed: Seed of all clips.

    Raises:
        ValueError: If an argument is out of range, or there are fewer different captions than
            validation clips; the message names it.
    """

    kinds = (SOUNDS,)

    def __init__(
        self,
        num_clips: int = 4000,
        num_val_clips: int = 500,
        *,
        sample_rate_hz: int = 16000,
        clip_seconds: tuple[float, float] = (1.5, 2.0),
        events_per_clip: tuple[int, int] = (1, 3),
        snr_db: tuple[float, float] = (10.0, 30.0),
        peak_db: tuple[float, float] = (-20.0, -1.0),
        held_out_fraction: float = 0.2,
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
            ("clip_seconds", clip_seconds, 0.5, np.inf),
            ("events_per_clip", events_per_clip, 1, 3),
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
        self.held_out_fraction = held_out_fraction
        self.seed = seed
        _ = self.held_out  # checks the fraction

    @property
    def held_out(self) -> list[Kind]:
        """The combinations of pitch and event that no training clip has."""
        return [
            (pitch, event)
            for event, pitch in diagonal(list(EVENTS), list(PITCHES_HZ), self.held_out_fraction)
        ]

    def splits(self, medium: Medium[AudioClips]) -> PairSplits[AudioClips]:
        train, val, test = (
            self._pairs(split, count)
            for split, count in enumerate((self.num_clips, self.num_val_clips, self.num_val_clips))
        )
        return PairSplits(train, val, test)

    def _pairs(self, split: int, count: int) -> Pairs[AudioClips]:
        rng, held_out = sample_rng(self.seed, split, 0), self.held_out
        known = [kind for kind in product(PITCHES_HZ, EVENTS) if split or kind not in held_out]

        def draw() -> Scene:
            number = int(rng.integers(*self.events_per_clip, endpoint=True))
            return tuple(draw_kinds(rng, number, known, held_out if split else ()))

        if split:
            advice = f"reduce num_val_clips ({count}), or increase events_per_clip"
            scenes = draw_distinct(count, draw, caption_of, advice)
        else:
            scenes = [draw() for _ in range(count)]
        return Pairs(SequencedClips(self, split, scenes), [[caption_of(s)] for s in scenes])


class SequencedClips(AudioClips):
    """One split of `SynthesizedSounds`, synthesized on access.

    A clip is a function of the source's seed, the split and the clip's index.
    """

    def __init__(self, source: SynthesizedSounds, split: int, scenes: list[Scene]) -> None:
        self.source = source
        self.split = split
        self.scenes = scenes
        self.labels = [()] * len(scenes)
        lengths = sample_rng(source.seed, split, 1).uniform(*source.clip_seconds, len(scenes))
        self._num_samples = np.round(lengths * source.sample_rate_hz).astype(int)

    def describe(self, index: int) -> str:
        return f"synthesized clip {index}"

    def fingerprint(self) -> Fingerprint:
        scenes = digest(str(scene) for scene in self.scenes)
        settings = str(vars(self.source))
        return {**super().fingerprint(), "contents of scenes": scenes, "source": settings}

    def info(self, index: int) -> ClipInfo:
        return ClipInfo(int(self._num_samples[index]), self.source.sample_rate_hz)

    def read(self, index: int, start: int = 0, num_samples: int | None = None) -> Waveform:
        source, total = self.source, int(self._num_samples[index])
        rng = sample_rng(source.seed, self.split, 2, index)
        clip = background(total, rng) * np.float32(10 ** (-rng.uniform(*source.snr_db) / 20))
        scene = self.scenes[index]
        borders = np.linspace(0, total, len(scene) + 1).astype(int)
        for (pitch, event), low, high in zip(scene, borders, borders[1:], strict=False):
            # An event fills 60% to 95% of its part of the clip.
            length = int((high - low) * rng.uniform(0.6, 0.95))
            onset = int(rng.integers(low, high - length, endpoint=True))
            pitch_hz = float(np.exp(rng.uniform(*np.log(PITCHES_HZ[pitch]))))
            sound = EVENTS[event](pitch_hz, length, source.sample_rate_hz, rng)
            clip[onset : onset + length] += sound
        clip *= np.float32(10 ** (rng.uniform(*source.peak_db) / 20) / np.abs(clip).max())
        return clip[start:] if num_samples is None else clip[start : start + num_samples]
