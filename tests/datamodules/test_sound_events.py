"""The synthesizer: the labels of a clip match its sound."""

import time

import numpy as np
import pytest
import torch

from datamodules.audio.sound_events import EVENTS, SoundEvents, background

RATE_HZ = 16000


def synthesize(name, pitch_hz, seconds=1.0, seed=0):
    rng = np.random.default_rng(seed)
    return EVENTS[name](pitch_hz, int(seconds * RATE_HZ), RATE_HZ, rng)


def spectrum(waveform):
    """Frequencies in Hz, and the power at each."""
    power = np.abs(np.fft.rfft(waveform)) ** 2
    return np.fft.rfftfreq(len(waveform), 1 / RATE_HZ), power


def peak_hz(waveform):
    freqs_hz, power = spectrum(waveform)
    return freqs_hz[power.argmax()]


def centroid_hz(waveform):
    freqs_hz, power = spectrum(waveform)
    return (freqs_hz * power).sum() / power.sum()


def envelope(waveform, window=160):
    """RMS per 10 milliseconds."""
    frames = waveform[: len(waveform) // window * window].reshape(-1, window)
    return np.sqrt((frames**2).mean(axis=1))


@pytest.mark.parametrize("name", EVENTS)
@pytest.mark.parametrize("num_samples", [1600, 16000, 16001, 15991])
def test_events_have_unit_rms_and_fade_out(name, num_samples):
    waveform = EVENTS[name](440.0, num_samples, RATE_HZ, np.random.default_rng(1))
    assert waveform.shape == (num_samples,)
    assert waveform.dtype == np.float32
    assert np.sqrt((waveform**2).mean()) == pytest.approx(1.0, rel=1e-3)
    assert abs(waveform[-1]) < 1e-3


@pytest.mark.parametrize("name", ["tone", "harmonic", "tremolo", "pluck", "bell"])
@pytest.mark.parametrize("pitch_hz", [150.0, 437.3, 1500.0])
def test_pitched_events_peak_at_their_pitch(name, pitch_hz):
    freqs_hz, power = spectrum(synthesize(name, pitch_hz))
    # The strongest overtone of a string may be a higher one, so the test looks near the pitch.
    near = (freqs_hz > pitch_hz * 0.7) & (freqs_hz < pitch_hz * 1.5)
    assert freqs_hz[near][power[near].argmax()] == pytest.approx(pitch_hz, rel=0.01, abs=2)
    assert power[near].max() > 100 * np.median(power)


def test_a_tone_is_one_line_and_a_harmonic_tone_is_several():
    for name, expected in (("tone", 1), ("harmonic", 6)):
        freqs_hz, power = spectrum(synthesize(name, 500.0))
        lines = [
            k
            for k in range(1, 9)
            if power[np.abs(freqs_hz - 500.0 * k) < 5].max() > 1e-3 * power.max()
        ]
        assert lines == list(range(1, expected + 1))


def test_a_bell_has_the_partials_of_a_bar_and_the_high_ones_die_first():
    waveform = synthesize("bell", 500.0)
    freqs_hz, power = spectrum(waveform)
    _, late_power = spectrum(np.r_[np.zeros(3200, np.float32), waveform[3200:]])
    fade = []
    for partial in (500.0, 500.0 * 2.756, 500.0 * 5.404):
        near = np.abs(freqs_hz - partial) < 20
        outside = (np.abs(freqs_hz - partial) > 100) & (np.abs(freqs_hz - partial) < 200)
        assert power[near].max() > 20 * power[outside].max()
        fade.append(late_power[near].sum() / power[near].sum())
    assert fade == sorted(fade, reverse=True)


@pytest.mark.parametrize(("name", "direction"), [("chirp_up", 1), ("chirp_down", -1), ("tone", 0)])
def test_chirps_move_and_pass_their_pitch_halfway(name, direction):
    for seed in range(5):
        waveform = synthesize(name, 600.0, seed=seed)
        centroids = [centroid_hz(part) for part in np.array_split(waveform, 8)]
        steps = np.diff(centroids)
        if direction == 0:
            assert np.abs(steps).max() < 5
            continue
        assert (steps * direction > 20).all()
        assert centroid_hz(waveform[7200:8800]) == pytest.approx(600.0, rel=0.03)
        octaves = abs(np.log2(centroids[-1] / centroids[0]))
        assert 0.8 < octaves < 2.0


def test_tremolo_swings_in_strength_and_vibrato_in_pitch():
    swing = {
        name: envelope(synthesize(name, 700.0))[2:-2] for name in ("tone", "tremolo", "vibrato")
    }
    assert swing["tremolo"].min() < 0.3 * swing["tremolo"].max()
    assert swing["tone"].min() > 0.9 * swing["tone"].max()
    assert swing["vibrato"].min() > 0.9 * swing["vibrato"].max()
    pitches = {
        name: [peak_hz(part) for part in np.array_split(synthesize(name, 700.0), 40)]
        for name in ("tone", "vibrato")
    }
    assert np.ptp(pitches["vibrato"]) >= 40
    assert np.ptp(pitches["tone"]) <= 40 / 2  # the resolution of 25 milliseconds


def test_a_noise_band_is_noise_around_its_pitch():
    waveform = synthesize("noise_band", 1000.0)
    assert centroid_hz(waveform) == pytest.approx(1000.0, rel=0.1)
    freqs_hz, power = spectrum(waveform)
    share = power[np.abs(freqs_hz - 1000) < 750].sum() / power.sum()
    assert share > 0.99
    assert power.max() / power.sum() < 0.1, "no single line"


@pytest.mark.parametrize("name", ["pluck", "bell"])
def test_struck_events_die_away(name):
    strength = envelope(synthesize(name, 400.0, seconds=2.0))
    assert strength[:10].max() == strength.max()
    assert strength[150:].max() < 0.2 * strength[:10].max()


def test_clicks_are_short_and_many():
    strength = envelope(synthesize("clicks", 1000.0))
    loud = strength > 0.3 * strength.max()
    onsets = np.flatnonzero(np.diff(loud.astype(int)) == 1)
    assert 5 <= len(onsets) <= 17
    assert loud.mean() < 0.4


def test_background_falls_with_frequency():
    slopes = []
    for seed in range(20):
        freqs_hz, power = spectrum(background(16000, np.random.default_rng(seed)))
        low, high = ((freqs_hz > a) & (freqs_hz < 2 * a) for a in (100, 3200))
        slopes.append(10 * np.log10(power[low].mean() / power[high].mean()) / 5)  # dB per octave
    assert min(slopes) > -0.7
    assert max(slopes) < 7.0
    assert np.ptp(slopes) > 3, "of different colors"


def test_a_clip_is_a_function_of_seed_split_and_number():
    first, again, other = (SoundEvents(seed=seed).splits() for seed in (0, 0, 1))
    for index in (0, 7, 1999):
        assert np.array_equal(first.train.read(index), again.train.read(index))
        assert not np.array_equal(first.train.read(index), other.train.read(index))
    clips = [first.train.read(0), first.train.read(10), first.val.read(0), first.test.read(0)]
    for i, clip in enumerate(clips):
        assert not any(np.array_equal(clip, another) for another in clips[:i])


def test_more_clips_do_not_change_the_first():
    few = SoundEvents(10, clip_seconds=(0.5, 2.0)).splits().train
    many = SoundEvents(20, clip_seconds=(0.5, 2.0)).splits().train
    assert all(np.array_equal(few.read(index), many.read(index)) for index in range(10))


def test_part_of_a_clip_is_that_part_of_the_whole():
    clips = SoundEvents().splits().train
    assert np.array_equal(clips.read(3, 1000, 500), clips.read(3)[1000:1500])


def test_clips_have_the_promised_lengths_levels_and_classes():
    source = SoundEvents(200, clip_seconds=(0.4, 1.2), sample_rate_hz=8000, peak_db=(-12.0, -6.0))
    clips = source.splits().train
    lengths = [clips.info(index).num_samples for index in range(200)]
    assert 3200 <= min(lengths) < 4000
    assert 9000 < max(lengths) <= 9600
    for index in range(40):
        waveform = clips.read(index)
        assert len(waveform) == lengths[index]
        assert 10 ** (-12.1 / 20) < np.abs(waveform).max() < 10 ** (-5.9 / 20)
    counts = np.bincount([label for (label,) in clips.labels])
    assert counts.tolist() == [20] * 10


def test_several_events_make_several_labels():
    splits = SoundEvents(300, events_per_clip=(1, 3)).splits()
    assert splits.multi_label
    assert {len(labels) for labels in splits.train.labels} == {1, 2, 3}
    assert all(len(set(labels)) == len(labels) for labels in splits.train.labels)
    assert {label for labels in splits.train.labels for label in labels} == set(range(10))
    target = splits.target((1, 4))
    assert target.dtype == torch.float32
    assert target.nonzero().flatten().tolist() == [1, 4]


def test_the_events_are_louder_than_the_background_as_asked():
    tone = list(EVENTS).index("tone")
    for snr_db in (0.0, 20.0):
        clips = SoundEvents(30, snr_db=(snr_db, snr_db)).splits().train
        shares = []
        for index in range(tone, 30, 10):
            _, power = spectrum(clips.read(index))
            shares.append(np.sort(power)[-20:].sum() / power.sum())
        assert (np.mean(shares) > 0.9) == (snr_db == 20.0)


def test_a_batch_is_fast():
    clips = SoundEvents().splits().train

    def batch_seconds():
        start = time.process_time()
        for index in range(32):
            clips.read(index)
        return time.process_time() - start

    assert min(batch_seconds() for _ in range(5)) < 0.1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_clips": 0}, "num_clips must be at least 1, got 0"),
        ({"sample_rate_hz": 4000}, "sample_rate_hz must be at least 8000, got 4000"),
        (
            {"clip_seconds": (2.0, 1.0)},
            r"clip_seconds must be two increasing numbers.*\(2.0, 1.0\)",
        ),
        ({"events_per_clip": (1, 11)}, r"events_per_clip must be .* in \[1, 10\], got \(1, 11\)"),
        ({"peak_db": (-3.0, 3.0)}, r"peak_db must be .*got \(-3.0, 3.0\)"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        SoundEvents(**arguments)
