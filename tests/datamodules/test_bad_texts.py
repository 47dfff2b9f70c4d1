"""Bad files of a corpus that is read before training are skipped if the policy allows it."""

import gzip
import json
import logging
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from datamodules import TextData
from datamodules.shared.bad_samples import (
    BadSampleError,
    BadSamples,
    TooManyBadSamplesError,
    Triage,
)
from datamodules.text.data import HuggingFaceText, TextFolder, TokenFiles, write_token_file
from datamodules.text.sources import Corpus
from datamodules.text.token_documents import TokenDocuments
from diffmm.tokenizers import load_tokenizer

BYTES = load_tokenizer("bytes")
LENIENT = BadSamples("substitute", max_bad_fraction=0.5)


@pytest.fixture(autouse=True)
def _own_hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_OFFLINE", True)


def cut(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def folder_source(root: Path) -> tuple[Corpus, Path]:
    for number in range(4):
        (root / f"{number}.txt").write_text(f"text {number}")
    (root / "2.txt").write_bytes(b"text \xff\xfe 2")
    return TextFolder(str(root)), root / "2.txt"


def lines_source(root: Path) -> tuple[Corpus, Path]:
    for number in range(4):
        with gzip.open(root / f"{number}.jsonl.gz", "wt") as file:
            file.write(json.dumps({"text": f"text {number}"}) + "\n")
    cut(root / "2.jsonl.gz")
    return HuggingFaceText("json", data_files=str(root / "*.gz")), root / "2.jsonl.gz"


def parquet_source(root: Path) -> tuple[Corpus, Path]:
    for number in range(4):
        table = pyarrow.table({"text": [f"text {number}"]})
        pyarrow.parquet.write_table(table, root / f"{number}.parquet")
    cut(root / "2.parquet")
    return HuggingFaceText("parquet", data_files=str(root / "*.parquet")), root / "2.parquet"


def token_source(root: Path) -> tuple[Corpus, Path]:
    for number in range(4):
        texts = root / f"{number}"
        texts.mkdir()
        (texts / "a.txt").write_text(f"text {number}")
        write_token_file(root / f"{number}.bin", TextFolder(str(texts)).documents(), BYTES)
    cut(root / "2.bin")
    return TokenFiles([str(root / f"{number}.bin") for number in range(4)]), root / "2.bin"


@pytest.fixture(params=[folder_source, lines_source, parquet_source, token_source])
def corpus(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Corpus, Path]:
    """Four files with one document each, of which number 2 is damaged."""
    root = tmp_path / "corpus"
    root.mkdir()
    return request.param(root)


def texts_of(documents: TokenDocuments) -> list[str]:
    return [
        BYTES.decode(documents.read(number, 0, int(documents.lengths[number]) - 1))
        for number in range(len(documents))
    ]


def test_a_bad_file_stops_a_run_by_default(corpus: tuple[Corpus, Path]) -> None:
    with pytest.raises(BadSampleError):
        corpus[0].load(BYTES)


def test_a_bad_file_is_left_out(
    corpus: tuple[Corpus, Path], caplog: pytest.LogCaptureFixture
) -> None:
    source, path = corpus
    source.triage = Triage(LENIENT)
    with caplog.at_level(logging.WARNING, "datamodules"):
        assert texts_of(source.load(BYTES)) == ["text 0", "text 1", "text 3"]
    messages = [
        record.getMessage() for record in caplog.records if record.name.startswith("datamodules")
    ]
    assert len(messages) == 1
    assert f"file 2 ({path}) " in messages[0]
    assert messages[0].endswith("; skipping it")
    assert "\n" not in messages[0]


def test_a_listed_file_is_not_opened(
    corpus: tuple[Corpus, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source, path = corpus
    listed = tmp_path / "bad.txt"
    settings = BadSamples("quarantine", 0.5, str(listed))
    source.triage = Triage(settings)
    first = texts_of(source.load(BYTES))
    assert listed.read_text() == f"{path}\n"
    caplog.clear()
    source.triage = Triage(settings)
    assert texts_of(source.load(BYTES)) == first
    assert not [record for record in caplog.records if record.name.startswith("datamodules")]


def test_too_many_bad_files_stop_the_run(tmp_path: Path) -> None:
    for number in range(4):
        (tmp_path / f"{number}.txt").write_bytes(b"\xff" if number else b"good")
    source = TextFolder(str(tmp_path))
    source.triage = Triage(BadSamples("substitute", max_bad_fraction=0.02))
    with pytest.raises(TooManyBadSamplesError, match=r"3 of 4 samples.*file 3 \(.*3.txt\)"):
        source.load(BYTES)


def test_the_datamodule_passes_its_policy_on(tmp_path: Path) -> None:
    root = tmp_path / "texts"
    root.mkdir()
    source, _ = folder_source(root)
    arguments = {"validation_fraction": 0.0, "test_fraction": 0.0, "sequence_length": 1}
    with pytest.raises(BadSampleError, match=r"2.txt\) is not utf-8 text.*policy substitute"):
        TextData(source, cache_dir=str(tmp_path / "cache"), **arguments).prepare_data()  # type: ignore[arg-type]
    data = TextData(
        source,
        cache_dir=str(tmp_path / "cache"),
        bad_samples=LENIENT,
        **arguments,  # type: ignore[arg-type]
    )
    data.prepare_data()
    data.setup()
    assert len(data.train_dataloader()) > 0
    # A strict run does not use the cache without the skipped documents.
    with pytest.raises(BadSampleError):
        TextData(source, cache_dir=str(tmp_path / "cache"), **arguments).prepare_data()  # type: ignore[arg-type]
