"""Every source yields its documents, and names files that it cannot read."""

import gzip
import json
import os
import pickle
import sysconfig
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from datamodules.shared.bad_samples import BadSampleError, BadSamples, Triage
from datamodules.text.data import HuggingFaceText, StandardLibrary, TextFolder, TokenFiles
from datamodules.text.shards import Shards
from datamodules.text.token_documents import (
    Document,
    TokenDocuments,
    in_split,
    key_number,
    tokenize,
)
from datamodules.text.token_files import write_token_file
from diffmm.tokenizers import Tokenizer, load_tokenizer

BYTES = load_tokenizer("bytes")
MARK = "\N{ZERO WIDTH NO-BREAK SPACE}"


@pytest.fixture(autouse=True)
def _own_hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_OFFLINE", True)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "texts"
    (root / "deep").mkdir(parents=True)
    (root / "b.txt").write_text("second")
    (root / "a.txt").write_text("first — with é", encoding="utf-8")
    (root / "deep" / "c.txt").write_text("third")
    (root / "empty.txt").write_text("")
    (root / "notes.md").write_text("# not text")
    return root


def texts_of(documents: TokenDocuments) -> list[str]:
    return [
        BYTES.decode(documents.read(number, 0, int(documents.lengths[number])))
        for number in range(len(documents))
    ]


# ------------------------------------------------------------------ standard library


def test_the_standard_library_is_real_text() -> None:
    documents = list(StandardLibrary(max_bytes=300_000).documents())
    names = [document.key for document in documents]
    assert names == sorted(names)
    assert 250_000 < sum(len(document.text.encode()) for document in documents) <= 300_000
    assert all(name.endswith(".py") for name in names)
    assert not any("test" in name.split("/") or "site-packages" in name for name in names)
    assert names == [d.key for d in StandardLibrary(max_bytes=300_000).documents()]
    assert len({name[0] for name in names}) > 5  # a sample of all modules


def test_an_interpreter_without_sources(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(FileNotFoundError, match="no source files in .*choose another source"):
        list(StandardLibrary().documents())


def test_max_bytes_must_be_positive() -> None:
    with pytest.raises(ValueError, match="max_bytes must be at least 1, got 0"):
        StandardLibrary(max_bytes=0)


# ------------------------------------------------------------------ folders


def test_a_folder_of_texts(folder: Path) -> None:
    assert list(TextFolder(str(folder)).documents()) == [
        Document("a.txt", "first — with é"),
        Document("b.txt", "second"),
        Document("deep/c.txt", "third"),
        Document("empty.txt", ""),
    ]
    assert [d.key for d in TextFolder(str(folder), "*.md").documents()] == ["notes.md"]
    loaded = TextFolder(str(folder)).load(BYTES)
    assert texts_of(loaded) == ["first — with é", "second", "third"]  # none from the empty file


def test_files_are_split_where_asked(folder: Path) -> None:
    (folder / "a.txt").write_text("one<|end|>two<|end|>")
    source = TextFolder(str(folder), "a.txt", separator="<|end|>")
    assert list(source.documents())[:2] == [Document("a.txt#0", "one"), Document("a.txt#1", "two")]
    assert texts_of(source.load(BYTES)) == ["one", "two"]
    with pytest.raises(ValueError, match="separator must not be empty"):
        TextFolder(str(folder), separator="")


def test_a_folder_that_cannot_be_read_is_named(folder: Path) -> None:
    with pytest.raises(FileNotFoundError, match="text folder .*nowhere does not exist"):
        TextFolder(str(folder / "nowhere")).load(BYTES)
    with pytest.raises(FileNotFoundError, match=r"no file in .*texts matches '\*\.rst'"):
        TextFolder(str(folder), "*.rst").load(BYTES)
    (folder / "latin.txt").write_bytes("é".encode("latin-1"))
    with pytest.raises(ValueError, match=r"latin\.txt\) is not utf-8 text .*set its encoding"):
        TextFolder(str(folder)).load(BYTES)
    latin = TextFolder(str(folder), "latin.txt", encoding="latin-1")
    assert texts_of(latin.load(BYTES)) == ["é"]


@pytest.mark.parametrize("mark", ["utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"])
def test_the_encoding_of_a_byte_order_mark_is_advised(folder: Path, mark: str) -> None:
    (folder / "a.txt").write_bytes(f"{MARK}Käse".encode(mark))
    with pytest.raises(ValueError, match=rf"--data.source.encoding {mark[:6]}\)"):
        TextFolder(str(folder), "a.txt").load(BYTES)
    source = TextFolder(str(folder), "a.txt", encoding=mark[:6])
    assert texts_of(source.load(BYTES)) == ["Käse"]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16", "utf-16-le", "utf-32-be"])
def test_a_byte_order_mark_is_no_text(folder: Path, encoding: str) -> None:
    # Python writes such a file itself, and reads it if the name does not specify the byte order.
    text = "one|two" if encoding == "utf-16" else f"{MARK}one|two"
    (folder / "a.txt").write_text(text, encoding)
    source = TextFolder(str(folder), "a.txt", encoding=encoding)
    assert list(source.documents()) == [Document("a.txt", "one|two")]
    split = TextFolder(str(folder), "a.txt", encoding=encoding, separator="|")
    assert [document.text for document in split.documents()] == ["one", "two"]


@pytest.mark.parametrize("encoding", ["utf8x", "hex"])
def test_unknown_encodings_are_named(folder: Path, encoding: str) -> None:
    with pytest.raises(ValueError, match=f"encoding '{encoding}' is not a known text encoding"):
        TextFolder(str(folder), encoding=encoding)


def test_fingerprints_follow_the_files(folder: Path) -> None:
    source = TextFolder(str(folder))
    before = source.fingerprint()
    assert before == TextFolder(str(folder)).fingerprint()
    assert before != TextFolder(str(folder), separator="\n").fingerprint()
    (folder / "b.txt").write_text("second, changed")
    assert source.fingerprint() != before


# ------------------------------------------------------------------ Hugging Face datasets

ROWS = [{"body": f"document {number}", "id": number} for number in range(7)]


@pytest.fixture(params=["json", "parquet", "text"])
def rows_file(request: pytest.FixtureRequest, tmp_path: Path) -> dict[str, Any]:
    kind = request.param
    path = tmp_path / f"rows.{kind}"
    if kind == "json":
        path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    elif kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    else:
        path.write_text("".join(row["body"] + "\n" for row in ROWS))
    column = "text" if kind == "text" else "body"
    return {"name": kind, "data_files": str(path), "text_column": column}


@pytest.mark.parametrize("streaming", [False, True])
def test_datasets_from_files(rows_file: dict[str, Any], streaming: bool) -> None:
    source = HuggingFaceText(**rows_file, streaming=streaming)
    assert [document.text for document in source.documents()] == [row["body"] for row in ROWS]


def test_rows_that_are_lines_are_joined(tmp_path: Path) -> None:
    path = tmp_path / "wiki.parquet"
    first = [" = One = \n", "", " text one\n", " = = Part = = \n", " more\n"]
    second = [" = Two = \n", "x"]
    pyarrow.parquet.write_table(pyarrow.table({"text": ["", *first, *second]}), path)
    source = HuggingFaceText("parquet", data_files=str(path), document_start=r" = [^=]")
    assert texts_of(source.load(BYTES)) == ["".join(first), "".join(second)]


@pytest.mark.parametrize("streaming", [False, True])
def test_a_byte_order_mark_is_no_text_of_a_dataset(tmp_path: Path, streaming: bool) -> None:
    files = []
    for number in range(2):
        files.append(str(tmp_path / f"{number}.txt"))
        Path(files[-1]).write_text(f"{MARK}first of {number}\nsecond\n", "utf-8")
    source = HuggingFaceText("text", data_files=files, streaming=streaming)
    expected = ["first of 0", "second", "first of 1", "second"]
    assert [document.text for document in source.documents()] == expected
    if streaming:
        shards = Shards(source, Triage(BadSamples()))
        assert [text for shard in range(2) for text in shards.texts(shard)] == expected


@pytest.mark.usefixtures("within_a_minute")
@pytest.mark.parametrize("streaming", [False, True])
def test_hidden_files_and_pipes_are_no_part_of_a_dataset(tmp_path: Path, streaming: bool) -> None:
    for name in ("a.txt", "._a.txt", ".hidden/b.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"{name}\n")
    os.mkfifo(tmp_path / "pipe.txt")
    source = HuggingFaceText("text", data_files=f"{tmp_path}/**/*.txt", streaming=streaming)
    assert [document.text for document in source.documents()] == ["a.txt"]
    pipe = HuggingFaceText("text", data_files=f"{tmp_path}/pipe.txt", streaming=streaming)
    with pytest.raises(BadSampleError, match="cannot load .*pipe.txt"):
        list(pipe.documents())


NO_TEXT: dict[str, tuple[list[Any], str]] = {
    "lists": ([["a", "b"]] * 3, "a list"),
    "numbers": ([1, 2, 3], "an int"),
    "bytes": ([b"a", b"b", b"c"], "a bytes"),
    "some lists": (["a", ["b"], "c"], "a list"),
}


@pytest.mark.parametrize("name", NO_TEXT)
@pytest.mark.parametrize("streaming", [False, True])
def test_columns_of_something_else_are_named(tmp_path: Path, name: str, streaming: bool) -> None:
    values, kind = NO_TEXT[name]
    path = tmp_path / "rows.json"
    if name == "bytes":
        path = tmp_path / "rows.parquet"
        pyarrow.parquet.write_table(pyarrow.table({"text": values}), path)
    else:
        path.write_text("".join(json.dumps({"text": value}) + "\n" for value in values))
    source = HuggingFaceText(path.suffix[1:], data_files=str(path), streaming=streaming)
    number = 1 if name == "some lists" else 0
    message = f"has {kind} in column 'text' instead of text: set --data.source.text_column"
    with pytest.raises(BadSampleError, match=f"row {number} of dataset '.*' {message}"):
        list(source.documents())
    source.triage = Triage(BadSamples("substitute", max_bad_fraction=1.0))
    kept = [value for value in values if isinstance(value, str)]
    assert [document.text for document in source.documents()] == kept
    assert (source.triage.num_bad, source.triage.num_read) == (
        len(values) - len(kept),
        3 + (not streaming),
    )
    if streaming:
        for tolerance in (BadSamples(), BadSamples("substitute")):
            texts = Shards(source, Triage(tolerance)).texts(0)
            assert [next(texts) for _ in range(number)] == ["a"] * number
            with pytest.raises(
                BadSampleError,
                match=rf"shard 0 \(.*rows.*\) cannot be read from row {number} onward: .*{kind}",
            ):
                next(texts)


def test_bad_datasets_are_named(tmp_path: Path, rows_file: dict[str, Any]) -> None:
    with pytest.raises(
        ValueError, match=r"no column 'prose', its columns .*--data.source.text_column"
    ):
        HuggingFaceText(**{**rows_file, "text_column": "prose"}).load(BYTES)
    with pytest.raises(ValueError, match=r"no column 'prose'"):
        list(HuggingFaceText(**{**rows_file, "text_column": "prose"}, streaming=True).documents())
    table = tmp_path / "excel.csv"
    table.write_text("text;id\nhello;1\n")
    with pytest.raises(ValueError, match=r"columns are text;id: separate them by commas"):
        HuggingFaceText("csv", data_files=str(table)).load(BYTES)
    with pytest.raises(ValueError, match=r"library cannot load \S*missing.json: "):
        HuggingFaceText("json", data_files=str(tmp_path / "missing.json")).load(BYTES)
    with pytest.raises(ValueError, match="shuffle_buffer must be at least 1, got 0"):
        HuggingFaceText("json", shuffle_buffer=0)
    with pytest.raises(ValueError, match=r"document_start '\(' is not a regular expression"):
        HuggingFaceText("json", document_start="(")
    with pytest.raises(ValueError, match="document_start needs rows in order"):
        HuggingFaceText("json", document_start="x", streaming=True)


BAD_LINES: dict[str, tuple[bytes, str]] = {
    "cut": (b'{"text": "a"}\n{"text": "b"\n', r"line 2 of \S*rows.jsonl is not JSON \(Expecting"),
    "number": (
        b'{"text": "a"}\n\n{"text": 5}\n\n{"text": "b"}',
        r"line 3 of \S*rows.jsonl has an int in column 'text' instead of text: correct or remove",
    ),
    "no object": (b'{"text": "a"}\n"b"\n', r"line 2 of \S*rows.jsonl is str, not an object"),
    "latin-1": (
        b'{"text": "a"}\n{"text": "caf\xe9"}\n',
        r"row 1 of \S*rows.jsonl is not UTF-8 text \(.*\): save the file as UTF-8",
    ),
}


@pytest.mark.parametrize("name", BAD_LINES)
def test_bad_lines_of_json_are_named_with_the_way_out(tmp_path: Path, name: str) -> None:
    content, message = BAD_LINES[name]
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    with pytest.raises(BadSampleError, match=message):
        list(HuggingFaceText("json", data_files=str(path)).documents())
    if name == "cut":
        path.with_suffix(".jsonl.gz").write_bytes(gzip.compress(content))
        source = HuggingFaceText("json", data_files=f"{tmp_path}/*.gz")
        with pytest.raises(BadSampleError, match=r"line 2 of \S*rows.jsonl.gz is not JSON"):
            list(source.documents())


def test_a_missing_file_of_rows_says_so(tmp_path: Path) -> None:
    source = HuggingFaceText("json", data_files=str(tmp_path / "gone.jsonl"))
    with pytest.raises(
        BadSampleError, match=r"gone.jsonl does not exist: restore it, or set --data"
    ):
        list(source.documents())


# ------------------------------------------------------------------ token files


class Large(type(BYTES)):  # type: ignore[misc]
    """Bytes with ids beyond 16 bits."""

    vocab_size = 100_000
    eos_id = 99_999
    fingerprint = "large"
    name = "large"


@pytest.mark.parametrize("tokenizer", [BYTES, Large()], ids=["uint16", "uint32"])
def test_token_files_hold_what_was_written(
    tmp_path: Path, folder: Path, tokenizer: Tokenizer
) -> None:
    source = TextFolder(str(folder))
    path = write_token_file(tmp_path / "out" / "a.bin", source.documents(), tokenizer)
    header = json.loads(path.with_suffix(".json").read_text())
    assert header["dtype"] == ("uint16" if tokenizer is BYTES else "uint32")
    assert header["num_documents"] == 3
    assert sorted(p.name for p in path.parent.iterdir()) == ["a.bin", "a.documents.npy", "a.json"]
    loaded, direct = TokenFiles([str(path)]).load(tokenizer), source.load(tokenizer)
    assert texts_of(loaded) == texts_of(direct)
    assert loaded.keys.tolist() == direct.keys.tolist()
    assert loaded.read(0, 0, int(loaded.lengths[0]))[-1] == tokenizer.eos_id


def test_several_token_files_are_one_corpus(tmp_path: Path) -> None:
    paths = []
    for number in range(3):
        documents = [Document(f"{number}{part}", f"text {number}{part}") for part in "abc"]
        paths.append(str(write_token_file(tmp_path / f"{number}.bin", documents, BYTES)))
    corpus = TokenFiles(paths).load(BYTES)
    expected = [f"text {number}{part}" for number in range(3) for part in "abc"]
    assert texts_of(corpus) == expected
    chosen = corpus.held_out(0.3, 0.9)
    assert 0 < len(chosen) < 9
    assert set(texts_of(chosen)) < set(expected)
    # A worker that is not forked receives the paths, not the content of the files.
    data = pickle.dumps(corpus)
    assert texts_of(pickle.loads(data)) == expected
    assert b"text 0a" not in data


def test_token_files_that_do_not_fit_are_named(tmp_path: Path) -> None:
    path = write_token_file(tmp_path / "a.bin", [Document("x", "some text")], BYTES)
    with pytest.raises(
        ValueError, match=r"a\.bin was written with tokenizer 'bytes' \(259 tokens\)"
    ):
        TokenFiles([str(path)]).load(Large())
    with pytest.raises(FileExistsError, match=r"a\.bin already exists"):
        write_token_file(path, [], BYTES)
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(
        ValueError,
        match=r"a\.bin\) is damaged: it has 1 documents of 9 tokens, but its header says 1 .* 10",
    ):
        TokenFiles([str(path)]).load(BYTES)
    header = path.with_suffix(".json")
    header.write_text(header.read_text().replace('"format": 1', '"format": 9'))
    with pytest.raises(ValueError, match=r"a\.json has format 9, but this version reads 1"):
        TokenFiles([str(path)]).load(BYTES)
    header.unlink()
    with pytest.raises(FileNotFoundError, match=r"a\.bin needs .*a\.json, which does not exist"):
        TokenFiles([str(path)]).load(BYTES)
    with pytest.raises(ValueError, match="at least one path"):
        TokenFiles([])
    with pytest.raises(ValueError, match=r"must end in \.bin, got .*a\.tokens"):
        write_token_file(tmp_path / "a.tokens", [], BYTES)


def test_a_token_file_that_fails_leaves_nothing(tmp_path: Path) -> None:
    def broken() -> Any:
        yield from (Document(str(number), "text") for number in range(100))
        raise OSError("disk")

    with pytest.raises(OSError, match="disk"):
        write_token_file(tmp_path / "a.bin", broken(), BYTES)
    with pytest.raises(ValueError, match="no text to write"):
        write_token_file(tmp_path / "a.bin", [Document("x", "")], BYTES)
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------ splits


def test_keys_are_the_same_everywhere() -> None:
    assert key_number("os.py") == 711829667462946289
    numbers = np.array([key_number(str(number)) for number in range(2000)], np.uint64)
    assert in_split(numbers, 0.1, 0.3).mean() == pytest.approx(0.2, abs=0.03)
    parts = [in_split(numbers, *bounds) for bounds in ((0, 0.1), (0.1, 0.3), (0.3, 1))]
    assert (np.sum(parts, axis=0) == 1).all()
    assert in_split(np.array([2**64 - 1], np.uint64), 0.3, 1.0).all()


def test_documents_without_text_are_left_out() -> None:
    named = [Document("a", "x"), Document("b", ""), Document("c", "y")]
    assert [document.tokens.tolist() for document in tokenize(named, BYTES)] == [
        [ord("x"), 256],
        [ord("y"), 256],
    ]
