"""Batches of sound: crops, padding, buckets and augmentation, independent of the workers."""

import numpy as np
import pytest
import soundfile
import torch
from jsonargparse import ArgumentParser
from lightning import LightningDataModule

from datamodules.audio.augment import AudioAugment, Augmenter
from datamodules.audio.buckets import BucketSampler
from datamodules.audio.clips import FileClips
from datamodules.audio.data import AudioData
from datamodules.audio.reader import ClipReader
from datamodules.audio.sound_events import SoundEvents
from datamodules.audio.sources import SoundFolder

RATE_HZ = 8000


def events(num_clips=24, seconds=(0.2, 0.6), **arguments):
    return SoundEvents(num_clips, 10, sample_rate_hz=RATE_HZ, clip_seconds=seconds, **arguments)


def audio_data(source=None, batch_size=6, **arguments):
    data = AudioData(source or events(), sample_rate_hz=RATE_HZ, batch_size=batch_size, **arguments)
    data.prepare_data()
    data.setup()
    return data


def train_batches(data, epoch=0):
    loader = data.train_dataloader()
    loader.sampler.set_epoch(epoch)
    return list(loader)


def same(batches, others):
    return len(batches) == len(others) and all(
        a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
        for a, b in zip(batches, others, strict=True)
    )


def write_tone(path, pitch_hz, rate_hz, seconds):
    path.parent.mkdir(parents=True, exist_ok=True)
    phase = 2 * np.pi * pitch_hz * np.arange(int(seconds * rate_hz)) / rate_hz
    soundfile.write(path, 0.5 * np.sin(phase), rate_hz)


def test_the_default_needs_nothing():
    data = AudioData(batch_size=4)
    data.prepare_data()
    data.setup()
    assert data.num_classes == len(data.class_names) == 10
    batch = next(iter(data.train_dataloader()))
    assert batch["waveforms"].shape == (4, 16000)
    assert batch["waveforms"].dtype == torch.float32
    assert (
        batch["labels"].dtype == batch["num_samples"].dtype == batch["index"].dtype == torch.int64
    )
    assert batch["labels"].tolist() == (batch["index"] % 10).tolist()


def test_classes_are_known_after_setup():
    with pytest.raises(RuntimeError, match=r"after setup\(\)"):
        _ = AudioData().num_classes


def test_batches_are_padded_to_their_longest_clip():
    data = audio_data()
    clips = data.splits.train
    for batch in train_batches(data):
        assert batch["waveforms"].shape[1] == batch["num_samples"].max()
        for waveform, length, index in zip(
            batch["waveforms"], batch["num_samples"], batch["index"], strict=True
        ):
            assert length == clips.info(int(index)).num_samples
            assert torch.equal(waveform[:length], torch.from_numpy(clips.read(int(index))))
            assert not waveform[length:].any()


def test_evaluation_takes_every_clip_once_in_order():
    data = audio_data()
    for loader in (data.val_dataloader(), data.test_dataloader(), data.predict_dataloader()):
        assert torch.cat([batch["index"] for batch in loader]).tolist() == list(range(10))


def test_training_crops_differ_by_epoch_and_stay_by_seed():
    data = audio_data(clip_seconds=0.1, seed=3)
    epochs = [
        {
            int(i): w
            for b in train_batches(data, e)
            for i, w in zip(b["index"], b["waveforms"], strict=True)
        }
        for e in (0, 1)
    ]
    assert epochs[0].keys() == epochs[1].keys()
    moved = [not torch.equal(epochs[0][index], epochs[1][index]) for index in epochs[0]]
    assert all(moved)
    for index, waveform in epochs[0].items():
        assert waveform.shape == (800,)
        whole = torch.from_numpy(data.splits.train.read(index))
        assert (whole.unfold(0, 800, 1) == waveform).all(dim=1).any(), "a stretch of the clip"
    assert same(train_batches(data), train_batches(audio_data(clip_seconds=0.1, seed=3)))
    assert not same(train_batches(data), train_batches(audio_data(clip_seconds=0.1, seed=4)))


@pytest.mark.parametrize("eval_crop", ["start", "center", "full"])
def test_evaluation_crops_are_where_they_are_asked(eval_crop):
    data = audio_data(clip_seconds=0.1, eval_crop=eval_crop)
    clips = data.splits.val
    for batch in data.val_dataloader():
        for row, index in enumerate(batch["index"].tolist()):
            whole = torch.from_numpy(clips.read(index))
            start = {"start": 0, "center": round((len(whole) - 800) / 2), "full": 0}[eval_crop]
            length = len(whole) if eval_crop == "full" else 800
            assert batch["num_samples"][row] == length
            assert torch.equal(batch["waveforms"][row, :length], whole[start : start + length])


def test_fixed_batches_have_one_shape():
    data = audio_data(clip_seconds=0.4, batching="fixed")
    shapes = {batch["waveforms"].shape[1] for batch in train_batches(data)}
    shapes |= {batch["waveforms"].shape[1] for batch in data.val_dataloader()}
    assert shapes == {3200}
    lengths = torch.cat([batch["num_samples"] for batch in train_batches(data)])
    assert lengths.min() < 3200, "shorter clips say how long they are"


@pytest.mark.parametrize("batching", ["padded", "bucketed"])
def test_workers_change_nothing(batching):
    arguments = {
        "clip_seconds": 0.3,
        "batching": batching,
        "augment": AudioAugment(gain_db=(-6.0, 0.0), snr_db=(10.0, 30.0)),
    }
    alone, helped = (audio_data(num_workers=n, **arguments) for n in (0, 2))
    loader = helped.train_dataloader()
    for epoch in (0, 1):  # the workers persist
        loader.sampler.set_epoch(epoch)
        assert same(train_batches(alone, epoch), list(loader))


def test_bucketed_batches_pad_less_and_differ_by_epoch():
    source = events(96, seconds=(0.2, 2.0))

    def padding(batches):
        real = sum(int(batch["num_samples"].sum()) for batch in batches)
        return 1 - real / sum(batch["waveforms"].numel() for batch in batches)

    bucketed, padded = (audio_data(source, batching=b) for b in ("bucketed", "padded"))
    first, second = train_batches(bucketed), train_batches(bucketed, 1)
    assert padding(first) < 0.1 < 0.25 < padding(train_batches(padded))
    for batches in (first, second):
        assert sorted(torch.cat([b["index"] for b in batches]).tolist()) == list(range(96))
    assert not same(first, second)


def test_buckets_are_shared_evenly_and_steps_are_alike():
    lengths = np.random.default_rng(0).integers(1, 1000, 107).tolist()
    ranks = [
        BucketSampler(lengths, batch_size=4, pool_batches=5, seed=1, rank=r, world_size=2)
        for r in range(2)
    ]
    one = [index for _, index in BucketSampler(lengths, batch_size=8, pool_batches=5, seed=1)]
    shares = [[index for _, index in sampler] for sampler in ranks]
    assert len(shares[0]) == len(shares[1]) == len(ranks[0])
    assert not set(shares[0]) & set(shares[1])
    for step in range(13):  # 107 = 13 batches of 8, and 3 samples that are dropped
        together = [share[step * 4 : step * 4 + 4] for share in shares]
        assert sorted(together[0] + together[1]) == sorted(one[step * 8 : step * 8 + 8])
        spread = np.ptp([lengths[i] for i in together[0] + together[1]])
        assert spread < 500
    steps = [np.mean([lengths[i] for i in one[s * 8 : s * 8 + 8]]) for s in range(13)]
    assert steps != sorted(steps), "batches come in random order"


def test_buckets_resume_where_they_stopped():
    lengths = list(range(40))
    sampler = BucketSampler(lengths, batch_size=4, seed=5)
    sampler.set_epoch(2)
    whole = list(sampler)
    resumed = BucketSampler(lengths, batch_size=4, seed=5)
    resumed.load_state_dict(sampler.state_dict(12))
    assert list(resumed) == whole[12:]
    other = BucketSampler(lengths, batch_size=8, seed=5)
    with pytest.raises(ValueError, match="order"):
        other.load_state_dict(sampler.state_dict(12))


def test_too_few_clips_for_a_batch():
    for batching in ("padded", "bucketed"):
        data = audio_data(events(5), batching=batching)
        with pytest.raises(ValueError, match="5 training samples do not fill one batch: .* 6 on 1"):
            data.train_dataloader()


def test_several_labels_a_clip():
    data = audio_data(events(events_per_clip=(1, 3)))
    batch = train_batches(data)[0]
    assert batch["labels"].shape == (6, 10)
    assert batch["labels"].dtype == torch.float32
    for row, index in zip(batch["labels"], batch["index"].tolist(), strict=True):
        assert tuple(row.nonzero().flatten().tolist()) == data.splits.train.labels[index]


def test_other_sample_rates_are_resampled_or_refused(tmp_path):
    for name in ("a", "b"):
        for number in range(4):
            write_tone(tmp_path / name / f"{number}.wav", 440, 44100, 1.5)
    source = SoundFolder(str(tmp_path), val_fraction=0.25)
    data = audio_data(source, batch_size=2, num_workers=0)
    with pytest.raises(
        ValueError, match=r"clip \d \(.*\.wav\) .* 44100 Hz, not 8000 Hz: set --data.resample true"
    ):
        train_batches(data)
    data = audio_data(source, batch_size=2, resample=True, clip_seconds=1.0)
    for batch in train_batches(data):
        assert batch["num_samples"].tolist() == [8000, 8000]
        power = torch.fft.rfft(batch["waveforms"]).abs()
        assert power.argmax(dim=1).tolist() == [440, 440]


@pytest.mark.parametrize("rate_hz", [8000, 11025, 22050, 44100, 48000])
def test_a_reader_knows_the_length_of_what_it_reads(tmp_path, rate_hz):
    write_tone(tmp_path / "a.wav", 300, rate_hz, 0.3337)
    reader = ClipReader(
        FileClips([tmp_path / "a.wav"], [(0,)]), sample_rate_hz=RATE_HZ, resample=True
    )
    assert len(reader.read(0)) == reader.num_samples(0)
    for position in (0.0, 0.37, 1.0):
        assert len(reader.read(0, max_samples=1000, position=position)) == 1000


def test_gain_and_noise_are_as_strong_as_asked():
    rng = np.random.default_rng(0)
    waveform = np.sin(np.arange(8000, dtype=np.float32)) / 10
    level = np.sqrt((waveform**2).mean())

    def augmented(**arguments):
        return Augmenter(AudioAugment(**arguments), sample_rate_hz=RATE_HZ, resample=False)(
            waveform, rng
        )

    louder = augmented(gain_db=(6.0, 6.0))
    np.testing.assert_allclose(louder, waveform * 10**0.3, rtol=1e-5)
    noise = augmented(snr_db=(20.0, 20.0)) - waveform
    assert np.sqrt((noise**2).mean()) == pytest.approx(level / 10, rel=1e-3)
    assert not np.array_equal(augmented(gain_db=(-6.0, 6.0)), augmented(gain_db=(-6.0, 6.0)))
    assert np.array_equal(augmented(), waveform)


def test_noise_from_recordings(tmp_path):
    write_tone(tmp_path / "hum" / "mains.wav", 50, RATE_HZ, 0.2)  # shorter than the clip
    augment = AudioAugment(snr_db=(0.0, 0.0), noise_folder=str(tmp_path))
    waveform = np.sin(2 * np.pi * 1000 * np.arange(8000, dtype=np.float32) / RATE_HZ)
    noisy = Augmenter(augment, sample_rate_hz=RATE_HZ, resample=False)(
        waveform, np.random.default_rng(0)
    )
    power = np.abs(np.fft.rfft(noisy))
    assert sorted(power.argsort()[-2:].tolist()) == [50, 1000]
    refused = Augmenter(augment, sample_rate_hz=16000, resample=False)
    with pytest.raises(ValueError, match=r"mains.wav\) has a sample rate of 8000 Hz, not 16000 Hz"):
        refused(waveform, np.random.default_rng(0))


def test_augmentation_is_for_training_alone():
    augment = AudioAugment(gain_db=(-20.0, -6.0))
    plain, varied = audio_data(), audio_data(augment=augment)
    assert same(list(plain.val_dataloader()), list(varied.val_dataloader()))
    assert not same(train_batches(plain), train_batches(varied))


def test_loud_clips_stay_in_range():
    data = audio_data(augment=AudioAugment(gain_db=(30.0, 30.0)))
    assert max(batch["waveforms"].abs().max() for batch in train_batches(data)) == 1.0


def test_an_unreadable_clip_is_named_by_the_loader(tmp_path):
    write_tone(tmp_path / "a" / "good.wav", 300, RATE_HZ, 0.2)
    (tmp_path / "a" / "bad.wav").write_text("no sound")
    data = audio_data(SoundFolder(str(tmp_path), val=str(tmp_path)), batch_size=2, num_workers=1)
    with pytest.raises(ValueError, match=r"clip 0 \(.*bad.wav\) is not a readable sound"):
        train_batches(data)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"eval_crop": "centre"}, "eval_crop must be one of .*'centre'; did you mean 'center'"),
        ({"batching": "bucket"}, "batching must be one of .*'bucket'; did you mean 'bucketed'"),
        ({"sample_rate_hz": 0}, "sample_rate_hz must be at least 1, got 0"),
        ({"clip_seconds": 0.0}, "clip_seconds must be at least one sample long, got 0.0"),
        ({"batching": "fixed"}, "batching='fixed' .* got None and 'center'"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        AudioData(events(), **arguments)


def test_bad_augmentation_is_named(tmp_path):
    with pytest.raises(
        ValueError, match=r"gain_db must be two increasing numbers, got \(6.0, 0.0\)"
    ):
        AudioAugment(gain_db=(6.0, 0.0))
    with pytest.raises(ValueError, match="noise_folder needs snr_db"):
        AudioAugment(noise_folder="noise")
    with pytest.raises(FileNotFoundError, match="noise folder .*gone does not exist"):
        Augmenter(
            AudioAugment(snr_db=(0.0, 9.0), noise_folder=str(tmp_path / "gone")),
            sample_rate_hz=RATE_HZ,
            resample=False,
        )
    with pytest.raises(ValueError, match="has no files ending in .wav"):
        Augmenter(
            AudioAugment(snr_db=(0.0, 9.0), noise_folder=str(tmp_path)),
            sample_rate_hz=RATE_HZ,
            resample=False,
        )


def test_a_recipe_says_it_in_yaml():
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(LightningDataModule, "data")
    recipe = """
    class_path: datamodules.AudioData
    init_args:
      source:
        class_path: datamodules.audio.SoundEvents
        init_args: {num_clips: 8, sample_rate_hz: 8000, clip_seconds: [0.2, 0.5]}
      sample_rate_hz: 8000
      clip_seconds: 0.3
      batching: fixed
      augment: {gain_db: [-6, 6], snr_db: [10, 30]}
      batch_size: 4
    """
    data = parser.instantiate(parser.parse_args([f"--data={recipe}"])).data
    data.setup()
    assert [batch["waveforms"].shape for batch in train_batches(data)] == [(4, 2400)] * 2
