"""Images with texts and sounds with texts in one batch."""

import itertools

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image

from datamodules import AudioTextData, ImageAudioTextData, ImageTextData
from datamodules.pairs import ImageAudioTextReader, PairFolder, RenderedShapes, SynthesizedSounds
from datamodules.shared.bad_samples import BadSamples
from datamodules.shared.sampling import MixedSampler, OverfitMixedSampler
from diffmm.batch import samples_of, size_of

RATE_HZ = 8000


def shapes(count=12, val=5):
    return RenderedShapes(count, val, picture_size=16)


def sounds(count=8, val=3):
    return SynthesizedSounds(count, val, sample_rate_hz=RATE_HZ, clip_seconds=(0.5, 0.6))


def made(image_source=None, audio_source=None, **changes):
    settings = {"image_size": 8, "sample_rate_hz": RATE_HZ, "max_tokens": 100, "batch_size": 6}
    data = ImageAudioTextData(
        image_source or shapes(), audio_source or sounds(), **{**settings, **changes}
    )
    data.setup("fit")
    return data


def test_a_batch_has_both():
    data = made(audio_fraction=1 / 3)
    assert data.has_test_split
    batch = next(iter(data.train_dataloader()))
    assert batch["images"].shape == (4, 3, 8, 8)
    assert len(batch["waveforms"]) == len(batch["num_samples"]) == data.num_sounds == 2
    assert len(batch["tokens"]) == len(batch["num_tokens"]) == len(batch["index"]) == 6
    assert size_of(batch) == 6
    # The index counts through both, and that of the media counts each.
    assert batch["index"][:4].tolist() == batch["media_index"][:4].tolist()
    assert batch["index"][4:].tolist() == (batch["media_index"][4:] + 12).tolist()


def test_samples_are_those_of_the_parts():
    """Images and sounds are read, augmented and described as by their own datamodules."""
    data = made(seed=3)
    alone = {
        "images": ImageTextData(shapes(), image_size=8, max_tokens=100, seed=3),
        "sounds": AudioTextData(sounds(), sample_rate_hz=RATE_HZ, max_tokens=100, seed=3),
    }
    dataset = data.train_dataloader().dataset
    for field, part, first in (("images", alone["images"], 0), ("waveforms", alone["sounds"], 12)):
        part.setup()
        expected = part.dataset(part.splits.train, training=True)[5, 7]
        found = dataset[5, first + 7]
        assert np.array_equal(found[field], expected[field])
        assert np.array_equal(found["tokens"], expected["tokens"])
        assert (found["index"], found["media_index"]) == (first + 7, 7)
    with pytest.raises(IndexError, match="index 20 is out of range for 20 samples"):
        dataset[0, 20]


def keys(sampler, epoch=0):
    sampler.set_epoch(epoch)
    return list(sampler)


def test_every_batch_of_every_process_has_its_share():
    settings = {"shuffle": True, "seed": 1}
    whole = keys(MixedSampler([20, 9], [4, 2], **settings), 3)
    assert len(whole) == 5 * 6
    batches = [whole[i : i + 6] for i in range(0, 30, 6)]
    for batch in batches:
        assert [index < 20 for _, index in batch] == [True] * 4 + [False] * 2
    images = [index for batch in batches for _, index in batch[:4]]
    assert sorted(images) == list(range(20))
    # Of the nine sounds, eight are in the first pass, and the second one draws them anew.
    second = [key for batch in batches for key in batch[4:]]
    assert len({index for _, index in second[:8]}) == 8
    assert [epoch for epoch, _ in second] == [6] * 8 + [7] * 2
    shares = [
        keys(MixedSampler([20, 9], [2, 1], rank=rank, world_size=2, **settings), 3)
        for rank in (0, 1)
    ]
    for number, batch in enumerate(batches):
        own = [share[3 * number : 3 * number + 3] for share in shares]
        assert sorted(itertools.chain(*own)) == sorted(batch)


def test_a_sampler_resumes_at_its_place():
    settings = {"shuffle": True, "seed": 1}
    sampler = MixedSampler([20, 9], [4, 2], **settings)
    expected = keys(sampler, 2)
    state = sampler.state_dict(12)
    again = MixedSampler([20, 9], [2, 1], rank=1, world_size=2, **settings)
    again.load_state_dict(state)
    again.set_epoch(2)
    assert list(again) == expected[13::2]
    assert keys(again, 3) != expected[1::2]
    other = MixedSampler([20, 9], [3, 3], **settings)
    with pytest.raises(ValueError, match=r"'global_batch': \[4, 2\].* is now .*\[3, 3\]"):
        other.load_state_dict(state)


def test_overfitting_repeats_the_first_of_both():
    sampler = MixedSampler([20, 9], [4, 2], shuffle=True).for_overfitting()
    assert isinstance(sampler, OverfitMixedSampler)
    assert keys(sampler, 0) == keys(sampler, 1)
    assert [index for _, index in keys(sampler)[:6]] == [0, 1, 2, 3, 20, 21]


def test_evaluation_takes_turns_and_has_every_sample_once():
    data = made(batch_size=2)
    batches = list(data.val_dataloader())
    assert len(batches) == len(data.val_dataloader()) == 3 + 2
    kinds = ["images" if "images" in batch else "waveforms" for batch in batches]
    assert kinds == ["images", "waveforms", "images", "waveforms", "images"]
    assert sorted(torch.cat([batch["index"] for batch in batches]).tolist()) == list(range(8))
    assert all(size_of(batch) <= 2 for batch in batches)


def test_samples_of_a_mixed_batch():
    batch = next(iter(made().train_dataloader()))
    some = samples_of(batch, slice(2, 5))
    assert torch.equal(some["images"], batch["images"][2:])
    assert torch.equal(some["waveforms"], batch["waveforms"][:2])
    assert torch.equal(some["num_samples"], batch["num_samples"][:2])
    for name in ("tokens", "num_tokens", "media_index", "index"):
        assert torch.equal(some[name], batch[name][2:5])
    last = samples_of(batch, slice(5, None))
    assert "images" not in last
    assert torch.equal(last["waveforms"], batch["waveforms"][2:])


def test_bad_samples_are_replaced_by_their_own_kind(tmp_path):
    for number in range(8):
        Image.new("RGB", (8, 8), (30 * number, 0, 0)).save(tmp_path / f"{number}.png")
        (tmp_path / f"{number}.txt").write_text(f"picture {number}")
    source = PairFolder(str(tmp_path), val_fraction=0.2)
    data = made(source, bad_samples=BadSamples("substitute", max_bad_fraction=0.5))
    training = data.parts["images"].splits.train.media
    training.file(0).write_bytes(b"no image")
    batches = list(data.train_dataloader())
    assert all(len(batch["images"]) == len(batch["waveforms"]) == 3 for batch in batches)
    assert all(0 not in batch["media_index"][:3].tolist() for batch in batches)
    with pytest.raises(ValueError, match="set --data.bad_samples.policy substitute"):
        list(made(source).train_dataloader())


def test_the_reader_reads_both(tmp_path):
    data = made()
    described = data.describe_inputs()["reader"]
    assert described["class_path"] == ImageAudioTextReader.class_path
    reader = ImageAudioTextReader(**described["init_args"])
    assert reader.resample
    soundfile.write(tmp_path / "a.wav", np.zeros(4000, np.float32), 16000)
    Image.new("RGB", (9, 9)).save(tmp_path / "b.png")
    assert reader.read(tmp_path / "a.wav")["num_samples"] == 2000
    assert reader.read(str(tmp_path / "b.png"))["images"].shape == (3, 8, 8)
    soundfile.write(tmp_path / "c.mp3", np.zeros(4000, np.float32), 16000)
    assert reader.read(tmp_path / "c.mp3")["num_samples"] == 2000
    (tmp_path / "c.mp3").unlink()
    assert reader.read((np.zeros(100, np.float32), RATE_HZ))["num_samples"] == 100
    assert [path.name for path in reader.files(tmp_path)] == ["a.wav", "b.png"]
    both = [reader.read(tmp_path / name) for name in ("b.png", "a.wav")]
    assert set(reader.collate(both)) == {"images", "waveforms", "num_samples"}
    with pytest.raises(ValueError, match="the images of a batch must precede its sounds"):
        reader.collate(both[::-1])


def test_other_pairs_of_one_kind_are_evaluated(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "0.png")
    (tmp_path / "0.txt").write_text("black")
    data = made()
    assert "1 image with 1 text" in data.evaluate_on_pairs(str(tmp_path), split="val")
    (batch,) = data.val_dataloader()
    assert "waveforms" not in batch
    assert data.describe_inputs() == made().describe_inputs()
    with pytest.raises(ValueError, match="set --data.image_source .*, and --data.audio_source l"):
        ImageAudioTextData.own_data(str(tmp_path), {}, inputs_may_change=False)
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ValueError, match="has no images .* has no sounds"):
        made().evaluate_on_pairs(str(empty), split="val")


def test_tables_of_one_kind_are_evaluated(tmp_path):
    soundfile.write(tmp_path / "a.wav", np.zeros(4000, np.float32), RATE_HZ)
    Image.new("RGB", (8, 8)).save(tmp_path / "b.png")

    def table(*names):
        rows = [f"{name},text {number}" for number, name in enumerate(names)]
        (tmp_path / "table.csv").write_text("\n".join(["file,text", *rows]))
        return str(tmp_path / "table.csv")

    for name, field in (("a.wav", "waveforms"), ("b.png", "images")):
        data = made()
        data.evaluate_on_pairs(table(name), split="val")
        (batch,) = data.val_dataloader()
        assert set(batch) & {"waveforms", "images"} == {field}
    with pytest.raises(
        ValueError, match=r"as images: it has sounds, such as .*a.wav; .* has images"
    ):
        made().evaluate_on_pairs(table("a.wav", "b.png"), split="val")
    (tmp_path / "table.csv").write_text("file,text,text\n")
    with pytest.raises(ValueError, match=r"^.*table.csv has 2 columns 'text': rename .* of them$"):
        made().evaluate_on_pairs(str(tmp_path / "table.csv"), split="val")


def test_a_report_names_both_and_the_data_are_recognized():
    data = made()
    found = data.examine(2)
    assert found.lines["train"] == "12 images with 1 text each; 8 sounds with 1 text each"
    assert "images: 6 samples" in found.lines["read"]
    assert found.faults == []
    assert data.fingerprint() == made().fingerprint()
    assert data.fingerprint() != made(audio_source=sounds(10)).fingerprint()
    assert data.fingerprint()["samples of images"] == 12


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"audio_fraction": 1.0}, "audio_fraction must be between 0 and 1, got 1.0"),
        ({"batch_size": 4, "audio_fraction": 0.1}, "batch_size=4 with audio_fraction=0.1 has 0"),
        ({"batching": "bucketed"}, "batching must be 'padded' or 'fixed', got 'bucketed'"),
        ({"image_source": SynthesizedSounds()}, "has sounds, but ImageTextData reads images"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        made(**settings)


def test_too_few_samples_for_a_batch():
    with pytest.raises(ValueError, match="8 training samples do not fill one batch, which has 10"):
        made(batch_size=20).train_dataloader()
    assert made(batch_size=20).examine(2).faults == [
        "8 sounds for training do not fill one batch, which has 10 of them: set a smaller "
        "--data.batch_size or use more data"
    ]
    assert not made(batch_size=8).examine(2).faults
