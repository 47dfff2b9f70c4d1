"""Bad samples are refused, replaced by the same samples on every process, or listed, always with a
message."""

import logging
import multiprocessing
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image

from datamodules import AudioTextData, ImageTextData
from datamodules.audio.data import AudioData
from datamodules.audio.sources import SoundFolder
from datamodules.image.data import ImageData
from datamodules.image.sources import ImageFolder
from datamodules.pairs import PairFolder
from datamodules.pairs.data import PairData
from datamodules.shared.bad_samples import (
    BadSampleError,
    BadSamples,
    TooManyBadSamplesError,
    Triage,
)
from datamodules.shared.sampling import SeededDataset

RATE_HZ = 8000


def cut(path: Path) -> None:
    """Truncate a file to half its size."""
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def break_header(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[:4] = b"JUNK"
    path.write_bytes(content)


def empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Twenty-four noise images of two classes, three of them damaged."""
    rng = np.random.default_rng(0)
    for number in range(24):
        folder = tmp_path / "pictures" / "ab"[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 256, (16, 16, 3), np.uint8)
        suffix = "png" if number % 3 else "jpg"
        Image.fromarray(pixels).save(folder / f"{number:02d}.{suffix}")
    cut(tmp_path / "pictures" / "a" / "00.jpg")
    cut(tmp_path / "pictures" / "b" / "01.png")
    empty(tmp_path / "pictures" / "a" / "02.png")
    return tmp_path / "pictures"


@pytest.fixture
def sounds(tmp_path: Path) -> Path:
    """Twenty-four noise sounds of two classes, four of them damaged."""
    rng = np.random.default_rng(0)
    for number in range(24):
        folder = tmp_path / "sounds" / "ab"[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        suffix = ("wav", "flac", "ogg")[number % 3]
        noise = rng.uniform(-0.5, 0.5, 2000 + 50 * number).astype(np.float32)
        soundfile.write(folder / f"{number:02d}.{suffix}", noise, RATE_HZ)
    break_header(tmp_path / "sounds" / "a" / "00.wav")
    cut(tmp_path / "sounds" / "b" / "01.flac")
    cut(tmp_path / "sounds" / "a" / "02.ogg")
    empty(tmp_path / "sounds" / "b" / "03.wav")
    return tmp_path / "sounds"


def image_data(folder: Path, **arguments: Any) -> ImageData:
    data = ImageData(
        ImageFolder(str(folder), str(folder)), image_size=16, batch_size=4, **arguments
    )
    data.setup()
    return data


def audio_data(folder: Path, **arguments: Any) -> AudioData:
    data = AudioData(
        SoundFolder(str(folder), val=str(folder)),
        sample_rate_hz=RATE_HZ,
        clip_seconds=0.2,
        batch_size=4,
        **arguments,
    )
    data.setup()
    return data


def pair_data(kind: str, folder: Path, **arguments: Any) -> PairData[Any]:
    """Pairs whose texts are the names of the folders, and a good one to validate on."""
    good = next((folder / "a").glob("04.*"))
    other = folder.with_name("val") / "a" / good.name
    other.parent.mkdir(parents=True, exist_ok=True)
    other.write_bytes(good.read_bytes())
    source = PairFolder(str(folder), str(folder.with_name("val")), texts="folders")
    settings: dict[str, Any] = {"max_tokens": 4, "batch_size": 4, **arguments}
    data: PairData[Any] = (
        ImageTextData(source, image_size=16, **settings)
        if kind.endswith("pictures")
        else AudioTextData(source, sample_rate_hz=RATE_HZ, clip_seconds=0.2, **settings)
    )
    data.setup()
    return data


def make(kind: str, folder: Path, **arguments: Any) -> Any:
    if kind.startswith("described"):
        return pair_data(kind, folder, **arguments)
    return (image_data if kind == "pictures" else audio_data)(folder, **arguments)


def paths_of(samples: Any) -> list[Path]:
    """The files of a dataset or a split, by index."""
    samples = getattr(samples, "samples", getattr(samples, "pairs", samples))
    return getattr(samples, "media", samples).paths


def labels_of(batches: list[dict[str, torch.Tensor]]) -> list[str]:
    """The folders that the samples are from, by their label or text."""
    if "tokens" in batches[0]:
        return [chr(int(row[0])) for batch in batches for row in batch["tokens"]]
    return ["ab"[int(label)] for batch in batches for label in batch["labels"]]


BROKEN = {
    "pictures": {"a/00.jpg", "b/01.png", "a/02.png"},
    "sounds": {"a/00.wav", "b/01.flac", "a/02.ogg", "b/03.wav"},
}
BROKEN |= {f"described {kind}": files for kind, files in BROKEN.items()}


@pytest.fixture(params=list(BROKEN))
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def folder(kind: str, request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(kind.split()[-1])


LENIENT = BadSamples("substitute", max_bad_fraction=0.5)


def epoch_of(data: Any, epoch: int) -> list[dict[str, torch.Tensor]]:
    loader = data.train_dataloader()
    loader.sampler.set_epoch(epoch)
    return list(loader)


def same(left: list[Any], right: list[Any]) -> bool:
    return len(left) == len(right) and all(
        a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
        for a, b in zip(left, right, strict=True)
    )


def named(caplog: pytest.LogCaptureFixture, folder: Path) -> list[str]:
    """The files that the log names."""
    found = []
    for record in caplog.records:
        message = record.getMessage()
        assert "\n" not in message
        match = re.search(rf"\w+ \d+ \({re.escape(str(folder))}/([^)]+)\)", message)
        assert match, message
        found.append(match[1])
    return found


def test_the_first_bad_sample_stops_a_run_by_default(kind: str, folder: Path) -> None:
    dataset: Any = make(kind, folder).as_evaluated("train").dataset
    paths = [path.relative_to(folder).as_posix() for path in paths_of(dataset)]
    for index, path in enumerate(paths):
        if path not in BROKEN[kind]:
            assert dataset[index]["index"] == index
            continue
        with pytest.raises(BadSampleError, match=rf" {index} \(.*{path}\).*policy substitute"):
            dataset[index]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_another_sample_stands_in(kind: str, folder: Path, num_workers: int) -> None:
    data = make(kind, folder, bad_samples=LENIENT, num_workers=num_workers)
    batches = epoch_of(data, 1)
    assert [len(batch["index"]) for batch in batches] == [4] * 6
    bad = [
        index
        for index, path in enumerate(paths_of(data.splits.train))
        if path.relative_to(folder).as_posix() in BROKEN[kind]
    ]
    indices = torch.cat([batch["index"] for batch in batches]).tolist()
    assert not set(bad) & set(indices)
    # All good samples are there; a label or text is that of the substitute.
    assert set(indices) == set(range(24)) - set(bad)
    assert labels_of(batches) == [
        paths_of(data.splits.train)[index].parent.name for index in indices
    ]


def test_workers_epochs_and_processes_draw_the_same(kind: str, folder: Path) -> None:
    alone = make(kind, folder, bad_samples=LENIENT)
    assert same(epoch_of(alone, 1), epoch_of(make(kind, folder, bad_samples=LENIENT), 1))
    with_workers = make(kind, folder, bad_samples=LENIENT, num_workers=2)
    assert same(epoch_of(alone, 1), epoch_of(with_workers, 1))
    # In another epoch, there are other substitutes.
    dataset: Any = alone.train_dataloader().dataset
    bad = next(i for i, path in enumerate(paths_of(dataset)) if "00." in path.name)
    assert len({int(dataset[epoch, bad]["index"]) for epoch in range(8)}) > 1


def test_each_bad_file_is_named_once_by_a_process(
    kind: str, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = make(kind, folder, bad_samples=LENIENT)
    loader = data.as_evaluated("train")
    with caplog.at_level(logging.WARNING, "datamodules"):
        for _ in range(2):
            list(loader)
    assert sorted(named(caplog, folder)) == sorted(BROKEN[kind])


def test_quarantine_is_remembered(
    kind: str, folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    listed = tmp_path / "deep" / "bad.txt"
    quarantine = BadSamples("quarantine", 0.5, str(listed))
    first = epoch_of(make(kind, folder, bad_samples=quarantine, num_workers=2), 3)
    assert set(listed.read_text().splitlines()) == {str(folder / name) for name in BROKEN[kind]}
    before = listed.read_text()
    with caplog.at_level(logging.WARNING, "datamodules"):
        # The list does not change the samples that are drawn, and a limit of zero is respected.
        strict = BadSamples("quarantine", 0.0, str(listed))
        again = epoch_of(make(kind, folder, bad_samples=strict), 3)
    assert same(first, again)
    assert same(first, epoch_of(make(kind, folder, bad_samples=LENIENT), 3))
    assert listed.read_text() == before


def test_buckets_pass_over_what_has_no_length(sounds: Path) -> None:
    with pytest.raises(BadSampleError, match=r"00.wav\) is not a readable sound"):
        audio_data(sounds, batching="bucketed").train_dataloader()
    data = audio_data(sounds, batching="bucketed", bad_samples=LENIENT)
    assert [len(batch["index"]) for batch in epoch_of(data, 0)] == [4] * 6


def test_too_many_stop_the_run(kind: str, folder: Path) -> None:
    few = BadSamples("substitute", max_bad_fraction=0.01)
    loader = make(kind, folder, bad_samples=few).as_evaluated("train")
    message = r"2 of \d+ samples read by this process are bad, which exceeds .*\(0.01 of .*last"
    with pytest.raises(TooManyBadSamplesError, match=message):
        list(loader)


class Numbers(SeededDataset[int]):
    """Integers; those from `first_bad` cannot be read."""

    def __init__(self, count: int, first_bad: int) -> None:
        self.count = count
        self.first_bad = first_bad

    def __len__(self) -> int:
        return self.count

    def sample(self, epoch: int, index: int) -> int:
        if index >= self.first_bad:
            raise BadSampleError(f"number {index} is bad")
        return index


def test_bad_substitutes_are_replaced_too_but_not_forever() -> None:
    numbers = Numbers(20, first_bad=2)
    numbers.triage = Triage(BadSamples("substitute", max_bad_fraction=1.0))
    assert {numbers[epoch, 10] for epoch in range(10)} == {0, 1}
    numbers = Numbers(20, first_bad=0)
    numbers.triage = Triage(BadSamples("substitute", max_bad_fraction=1.0))
    with pytest.raises(ValueError, match="sample 3 of 20 cannot be read, nor can 100 substitutes"):
        numbers[3]


def test_the_rate_counts_what_was_read() -> None:
    numbers = Numbers(1000, first_bad=990)
    numbers.triage = Triage(BadSamples("substitute", max_bad_fraction=0.02))
    for index in range(1000):
        numbers[index]
    assert numbers.triage.num_read == 1000 + numbers.triage.num_bad
    assert 10 <= numbers.triage.num_bad <= 12
    with pytest.raises(TooManyBadSamplesError, match=r"2\d of 10\d\d samples read"):
        list(map(numbers.__getitem__, [995] * 20))


def _append_many(path: str, process: int) -> None:
    triage = Triage(BadSamples("quarantine", 1.0, path))
    triage.num_read = 200
    for number in range(200):
        file = f"/{process}/{number}/" + "x" * 100
        triage.note(BadSampleError("bad", file), instead="")


def test_processes_append_whole_lines(tmp_path: Path) -> None:
    listed = tmp_path / "bad.txt"
    context = multiprocessing.get_context("fork")
    processes = [
        context.Process(target=_append_many, args=(str(listed), number)) for number in range(4)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    expected = {f"/{p}/{n}/" + "x" * 100 for p in range(4) for n in range(200)}
    lines = listed.read_text().splitlines()
    assert len(lines) == 800
    assert set(lines) == expected


def test_settings_are_checked(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="bad_samples.policy must be one of 'raise'.*'skip'"):
        BadSamples("skip")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"max_bad_fraction must be in \[0, 1\], got 1.5"):
        BadSamples("substitute", 1.5)
    with pytest.raises(ValueError, match="quarantine_file is not used by policy 'raise'"):
        BadSamples(quarantine_file="list.txt")
    with pytest.raises(ValueError, match="no run directory.*--data.bad_samples.quarantine_file"):
        Triage(BadSamples("quarantine"))
    assert Triage(BadSamples("quarantine"), tmp_path).quarantined == frozenset()
