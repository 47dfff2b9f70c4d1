"""Invalid token files: headers are checked against the content."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from datamodules import TextData
from datamodules.shared.bad_samples import BadSampleError, BadSamples, Triage
from datamodules.text.data import TokenFiles, write_token_file
from datamodules.text.token_documents import Document
from datamodules.text.token_files import DOCUMENT_FIELDS
from diffmm.tokenizers import load_tokenizer

BYTES = load_tokenizer("bytes")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Three documents of 6, 7 and 8 tokens."""
    documents = [Document(str(number), "x" * (5 + number)) for number in range(3)]
    return write_token_file(tmp_path / "a.bin", documents, BYTES)


def change_header(path: Path, **fields: Any) -> None:
    header = path.with_suffix(".json")
    header.write_text(json.dumps({**json.loads(header.read_text()), **fields}))


def change_lengths(path: Path, *lengths: int) -> None:
    table = np.zeros(len(lengths), DOCUMENT_FIELDS)
    table["length"] = lengths
    np.save(path.with_suffix(".documents.npy"), table)


def refused(path: Path, message: str) -> None:
    """Check that `path` is refused with this message, and skipped if the policy allows it."""
    source = TokenFiles([str(path)])
    with pytest.raises(BadSampleError, match=rf"token file 0 \(.*a\.bin\) is damaged: {message}"):
        source.load(BYTES)
    source.triage = Triage(BadSamples("substitute", max_bad_fraction=1.0))
    assert len(source.load(BYTES)) == 0
    assert source.triage.num_bad == 1


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("dtype", "O", "its header has dtype 'O', not uint16 or uint32; write it again"),
        ("dtype", "float32", "its header has dtype 'float32'"),
        ("dtype", "<u2,O", "its header has dtype '<u2,O'"),
        ("dtype", ["uint16"], r"its header .*a.json has dtype \['uint16'\]"),
        ("dtype", "uint32", "it has 3 documents of 10 tokens and 2 bytes, but its header says 3 "),
        ("dtype", None, "its header .* has dtype None"),
        ("num_tokens", -21, "its header .* has num_tokens -21"),
        ("num_tokens", 0, "its header .* has num_tokens 0"),
        ("num_tokens", 21.0, "its header .* has num_tokens 21.0"),
        ("num_tokens", "21", "its header .* has num_tokens '21'"),
        ("num_tokens", 2**64 + 21, "its header .* has num_tokens 18446744073709551637"),
        (
            "num_tokens",
            22,
            "it has 3 documents of 21 tokens, but its header says 3 .* of 22 tokens",
        ),
        ("num_documents", True, "its header .* has num_documents True"),
        ("num_documents", 4, "it has 3 documents of 21 tokens, but its header says 4 documents"),
        ("vocab_size", None, "its header .* has vocab_size None"),
        ("tokenizer", 5, "its header .* has tokenizer 5"),
        ("tokenizer_fingerprint", {}, "its header .* has tokenizer_fingerprint {}"),
    ],
)
def test_headers_that_lie(path: Path, field: str, value: Any, message: str) -> None:
    change_header(path, **{field: value})
    refused(path, message)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "its header .*a.json cannot be read: "),
        ("{", "its header .*a.json cannot be read: "),
        ("[" * 30_000, "its header .*a.json cannot be read: "),
        (" " * 2**17, "its header .*a.json cannot be read: it has 131072 bytes"),
        ("[]", "its header .*a.json is not an object"),
        ('"\\ud800"', "its header .*a.json is not an object"),
    ],
    ids=["empty", "cut", "deep", "large", "a list", "a string"],
)
def test_headers_that_are_none(path: Path, content: str, message: str) -> None:
    path.with_suffix(".json").write_text(content)
    refused(path, message)


@pytest.mark.parametrize(
    "lengths",
    [(6, 7, 9), (0, 13, 8), (-1, 14, 8), (2**62, 2**62 + 13, 2**63 + 8 - 2**64)],
    ids=["one more", "an empty one", "a negative one", "an overflow that adds up"],
)
def test_lengths_that_lie(path: Path, lengths: tuple[int, ...]) -> None:
    change_lengths(path, *lengths)
    refused(path, "the lengths of its documents do not add up to 21 tokens")


def test_lengths_that_overflow_to_the_right_sum(path: Path) -> None:
    most = 2**63 - 1
    lengths = (most, most, 23)
    assert np.array(lengths, np.int64).sum() == 21
    change_lengths(path, *lengths)
    refused(path, "the lengths of its documents do not add up to 21 tokens")


class Opened:
    """Pickled in a table of documents, this would create a file when it is loaded."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("opened"),)


def test_tables_that_lie(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(path.parent)
    table = path.with_suffix(".documents.npy")
    whole = table.read_bytes()
    np.save(table, np.array([Opened()], object), allow_pickle=True)
    refused(path, r".*a.documents.npy has .* bytes, but its header says object of shape \(1,\)")
    assert not Path("opened").exists()
    np.save(table, np.zeros(3, [("key", "<u8"), ("length", "<i8")]))
    refused(path, r".*has 3 rows and 0 bytes, but its header says \[\('key', '<u8'\), ")
    # 2 ** 60 rows would take 16 EiB
    table.write_bytes(whole.replace(b"(3,), }" + b" " * 18, b"(1152921504606846976,), }"))
    assert table.stat().st_size == len(whole)
    refused(
        path, r".*has 3 rows and 0 bytes, but its header says .* of shape \(1152921504606846976,\)"
    )
    table.write_bytes(whole[:-1])
    refused(path, r".*has 2 rows and 15 bytes, but its header says .* of shape \(3,\)")
    with table.open("wb") as file:
        np.savez(file, np.zeros(3))
    refused(path, r".*a.documents.npy is not a table of documents: ")
    np.save(table, np.zeros(0, DOCUMENT_FIELDS))
    refused(path, r".*has 0 rows and 0 bytes, but its header says .* of shape \(0,\)")


def test_bytes_that_make_no_token(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")
    refused(path, "it has 3 documents of 21 tokens and 1 bytes, but its header says 3 ")


def test_ids_beyond_the_vocabulary_are_refused_when_they_are_read(path: Path) -> None:
    tokens = np.fromfile(path, "<u2")
    tokens[7] = 259  # of the second document
    tokens.tofile(path)
    documents = TokenFiles([str(path)]).load(BYTES)
    assert documents.read(0, 0, 6).tolist() == [*b"xxxxx", 256]
    message = r"a\.bin has the id 259 among its tokens 6 to 13, but the tokenizer has 259 tokens"
    with pytest.raises(BadSampleError, match=message):
        documents.read(1, 0, 7)
    # Another sample is its substitute if the policy allows it.
    data = TextData(
        TokenFiles([str(path)]),
        validation_fraction=0.0,
        test_fraction=0.0,
        packing="padded",
        batch_size=3,
        bad_samples=BadSamples("substitute", max_bad_fraction=1.0),
    )
    data.setup()
    (batch,) = data.train_dataloader()
    assert sorted(set(batch["index"].tolist())) == [0, 2]
    assert int(batch["tokens"].max()) == 256
