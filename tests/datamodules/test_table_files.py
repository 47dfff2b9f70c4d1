"""Tables as people write them have their right rows, or are refused by line."""

import os
import re
import shutil
import unicodedata

import pytest
from PIL import Image

from datamodules.audio import SoundTable
from datamodules.image import ImageFolder, ImageTable
from datamodules.pairs import PairFolder, PairTable
from datamodules.pairs.image_text import Images
from datamodules.shared.own_data import find_columns
from datamodules.shared.table_files import header_of, read_rows

ROWS = [("0.png", "a dog"), ("1.png", "a cat, with\nstripes"), ("2.png", 'the "third" one')]
PLAIN = 'file,text\n0.png,a dog\n1.png,"a cat, with\nstripes"\n2.png,"the ""third"" one"\n'

AS_WRITTEN = {
    "plain": PLAIN.encode(),
    "byte order mark": b"\xef\xbb\xbf" + PLAIN.encode(),
    "without an end": PLAIN.rstrip("\n").encode(),
    "blank lines": PLAIN.replace("\n0", "\n\n\n0").encode() + b"\n\n",
    "other columns": PLAIN.replace("file,text", "file,text,file 2,file 2").encode(),
    "semicolons": PLAIN.replace(",text", ";text").replace("g,", "g;").encode(),
    "tabs": PLAIN.replace(",text", "\ttext").replace("g,", "g\t").encode(),
    "semicolons and quotes": PLAIN.replace("file,text", '"file";"text"')
    .replace("g,", "g;")
    .encode(),
    "empty fields at the end": PLAIN.replace("a dog", "a dog,,").encode(),
}


@pytest.mark.parametrize("name", AS_WRITTEN)
def test_tables_have_the_same_rows(name, tmp_path):
    path = tmp_path / "table.csv"
    path.write_bytes(AS_WRITTEN[name])
    rows = [row.values for row in read_rows(path, ["file", "text"])]
    assert [(row["file"], row["text"]) for row in rows] == ROWS


@pytest.mark.parametrize("end", ["\r\n", "\r"])
def test_lines_may_end_as_elsewhere(end, tmp_path):
    path = tmp_path / "table.tsv"
    lines = ["file\ttext", '0.png\t"a\ttab"', "1.png\ta, comma"]
    path.write_bytes((end.join(lines) + end).encode())
    assert header_of(path) == ["file", "text"]
    rows = list(read_rows(path, ["file", "text"]))
    assert [(line, row["text"]) for line, row in rows] == [(2, "a\ttab"), (3, "a, comma")]


BAD = {
    "twice": ("file,text,text\n0.png,a,b\n", r" has 2 columns 'text': rename all but one of them"),
    "never closed": (
        'file,text\n0.png,a\n1.png,"b\n2.png,c\n',
        r" .*unexpected end of data, in the row that begins after line 2: put a text with double",
    ),
    "quoted within": ('file,text\n0.png,"a" b\n', r" .*expected after .*begins after line 1: put"),
    "unquoted": ("file,text\n0.png,a, b\n", r", line 2 has more fields than the first line: put"),
    "another encoding": (
        "file,text\n0.png,\udce9\n",
        r" is not a UTF-8 CSV file: .*: save it as UTF-8$",
    ),
    "another encoding of names": (
        "file,text,gr\udcf6\udcdfe\n0.png,a,1\n",
        r" is not a UTF-8 CSV file: .*: save it as UTF-8$",
    ),
    "header alone": ("file,text\n", " has no rows"),
    "nothing": ("", r" has no column 'file', only nothing"),
    "semicolons and commas": ("file;text,a\n0.png;a\n", " has no column 'file', only file;text, a"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_would_be_read_wrongly_is_refused(name, tmp_path):
    path = tmp_path / "table.csv"
    content, message = BAD[name]
    path.write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match=f"table.csv{message}"):
        PairTable(str(path)).splits(Images())
    for kind in (SoundTable, ImageTable):
        with pytest.raises(ValueError, match=f"table.csv{message}"):
            kind(str(path), label_column="text").splits()


def test_the_separator_of_a_table_is_named(tmp_path):
    wanted = {"file_column": ("file",), "text_column": ("text", "caption")}
    for name, header, message in (
        (
            "a.csv",
            ["file.text"],
            "separated by commas, semicolons or tabs; its first line is 'file",
        ),
        ("a.tsv", ["file,text"], "separated by tabs; its first line is 'file,text'; for another"),
        ("a.csv", ["fille", "text"], "is 'fille, text'; did you mean 'fille'.; for another name"),
    ):
        with pytest.raises(ValueError, match=message):
            find_columns(header, {}, tmp_path / name, **wanted)


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(4):
        Image.new("RGB", (4, 4)).save(folder / f"{number}.png")
    return folder


def write_table(folder, *rows):
    (folder / "a.csv").write_text("\n".join(["file,label", *rows]) + "\n")
    return str(folder / "a.csv")


def test_one_label_per_file_whatever_the_rows(photos):
    table = write_table(photos, "0.png,a", "1.png,b", "./0.png,b", "0.png,a", "2.png,b")
    message = (
        f"{photos / '0.png'} is 'a' in {table}, line 2, and 'b' in {table}, line 4: keep one of "
        f"these lines"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        ImageTable(table).splits()
    assert ImageTable(table, multi_label=True).splits().class_names == ["a", "b"]
    other = photos / "val.csv"
    other.write_text("file,label\n1.png,a\n")
    table = write_table(photos, "0.png,a", "1.png,b")
    with pytest.raises(
        ValueError, match=r"1.png is 'b' in \S*a.csv, line 3, and 'a' in \S*val.csv"
    ):
        ImageTable(table, str(other)).splits()


def test_rows_of_a_file_are_one_sample(photos, caplog):
    rows = [f"{number}.png,{'ab'[number % 2]}" for number in range(4)]
    table = write_table(photos, *rows, *rows, "./0.png,a")
    splits = ImageTable(table, val_fraction=0.5).splits()
    train, val = ({path.name for path in each.paths} for each in (splits.train, splits.val))
    assert not train & val
    assert len(splits.train.labels) == len(splits.val.labels) == 2
    assert caplog.messages == [
        f"{table}: 5 of the train rows are of an earlier row's file: they are one sample"
    ]
    table = write_table(photos, "0.png,b", "1.png,a", "0.png,a;b", "2.png,", "3.png,b")
    source = ImageTable(table, multi_label=True, val_fraction=0.5)
    splits = source.splits()
    labels = {
        path.name: found
        for each in (splits.train, splits.val)
        for path, found in zip(each.paths, each.labels, strict=True)
    }
    assert labels == {"0.png": (1, 0), "1.png": (0,), "2.png": (), "3.png": (1,)}
    assert len(source.labelled_as(["a", "b"], "val").labels) == 4


def test_classes_of_another_case_are_told_once(photos, tmp_path, caplog):
    table = write_table(photos, "0.png,red", "1.png,Red", "2.png,blue", "3.png,Blue")
    with pytest.raises(ValueError, match="the val split has no samples"):
        ImageTable(table).splits()
    for name in ("cat", "Cat", "dog"):
        (tmp_path / "folders" / name).mkdir(parents=True)
        for number in range(2):
            shutil.copy(photos / "0.png", tmp_path / "folders" / name / f"{number}.png")
    for _ in range(2):
        assert len(ImageFolder(str(tmp_path / "folders")).splits().class_names) == 3
    assert caplog.messages == [
        f"{table} has classes that differ only in case: 'Blue' and 'blue'; 'Red' and 'red'",
        f"{tmp_path / 'folders'} has classes that differ only in case: 'Cat' and 'cat'",
    ]


@pytest.mark.parametrize("multi_label", [False, True])
def test_a_file_is_in_one_split(multi_label, photos):
    text = "file,label,split\n0.png,a,train\n1.png,b,train\n2.png,a,val\n./0.png,a,val\n"
    (photos / "a.csv").write_text(text)
    source = ImageTable(
        str(photos / "a.csv"), split_column="split", multi_label=multi_label, val_fraction=0.5
    )
    message = (
        f"{photos / '0.png'} is in the train split ({photos / 'a.csv'}, line 2) and the val split "
        f"({photos / 'a.csv'}, line 5): keep it in one split"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        source.splits()
    assert len(source.labelled_as(["a", "b"], "val").labels) == 2
    (photos / "test.csv").write_text("file,label\n../photos/2.png,a\n1.png,b\n")
    (photos / "val.csv").write_text("file,label\n1.png,b\n2.png,a\n")
    (photos / "train.csv").write_text("file,label\n0.png,a\n3.png,b\n")
    tables = [str(photos / f"{split}.csv") for split in ("train", "val", "test")]
    with pytest.raises(ValueError, match=r"^2 files are in two splits, such as \S*2.png, which is"):
        ImageTable(*tables, multi_label=multi_label).splits()


def test_all_faults_of_rows_come_before_what_follows_from_them(photos):
    table = write_table(photos, "0.png,", "1.png,a", "gone.png,b", "2.png,a;b")
    message = (
        f"{table}, line 2: the label is missing; "
        f"{table}, line 5: {photos / '2.png'} has 2 labels, but exactly one is required, unless "
        f"the data are multi-label; "
        f"{table}, line 4: {photos / 'gone.png'} does not exist"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        ImageTable(table).splits()
    table = write_table(photos, "1.png,a", "gone.png,b")
    with pytest.raises(
        ValueError, match=r"^\S*, line 3: \S*gone.png does not exist; the val split"
    ):
        ImageTable(table).splits()
    table = write_table(photos, *(f"{number}.png," for number in range(20)))
    with pytest.raises(ValueError, match=r"line 9: the label is missing; and 28 more$"):
        ImageTable(table).splits()


def test_a_file_of_several_names_is_one_file(photos, monkeypatch):
    names = [
        "0.png",
        "1.png",
        "2.png",
        "3.png",
        "./0.png",
        "../photos/1.png",
        str(photos / "2.png"),
    ]
    text = "file,text\n" + "".join(f"{name},text {n}\n" for n, name in enumerate(names))
    (photos / "table.csv").write_text(text)
    monkeypatch.chdir(photos)
    pairs = PairTable("table.csv").all_pairs(Images())
    assert [list(texts) for texts in pairs.texts] == [
        ["text 0", "text 4"],
        ["text 1", "text 5"],
        ["text 2", "text 6"],
        ["text 3"],
    ]
    assert [str(file) for file in pairs.media.paths] == names[:4]
    (photos / "val.csv").write_text("file,text\n../photos/1.png,one\n")
    with pytest.raises(ValueError, match="1 files are in both the train and the val split"):
        PairTable("table.csv", "val.csv").splits(Images())


def test_parents_of_links_are_those_of_their_targets(photos, tmp_path):
    (tmp_path / "elsewhere/deep").mkdir(parents=True)
    Image.new("RGB", (4, 4)).save(tmp_path / "elsewhere/0.png")
    os.symlink(tmp_path / "elsewhere/deep", photos / "link")
    (photos / "table.csv").write_text("file,text\n0.png,here\nlink/../0.png,elsewhere\n")
    pairs = PairTable(str(photos / "table.csv")).all_pairs(Images())
    assert [list(texts) for texts in pairs.texts] == [["here"], ["elsewhere"]]


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_accents_of_names_may_be_written_in_two_ways(form, tmp_path):
    """As when a folder was copied from a Mac, and its table was written elsewhere."""
    other = {"NFC": "NFD", "NFD": "NFC"}[form]
    lines = ["file,text,label"]
    for number in range(2):
        name = f"Käse {number}"
        Image.new("RGB", (4, 4)).save(tmp_path / unicodedata.normalize(form, f"{name}.png"))
        lines.append(unicodedata.normalize(other, f"{name}.png,text {number},cheese"))
        (tmp_path / unicodedata.normalize(other, f"{name}.txt")).write_text(f"text {number}")
    (tmp_path / "table.csv").write_text("\n".join(lines), encoding="utf-8")
    for source in (PairTable(str(tmp_path / "table.csv")), PairFolder(str(tmp_path))):
        pairs = source.all_pairs(Images())
        assert [list(texts) for texts in pairs.texts] == [["text 0"], ["text 1"]]
        assert [pairs.media.read(index).size for index in range(2)]
    splits = ImageTable(str(tmp_path / "table.csv"), val_fraction=0.5).splits()
    assert splits.train.read(0).size


def test_texts_without_an_image_are_told(photos, caplog):
    for number in range(6):
        (photos / f"{number}.txt").write_text(f"text {number}")
    assert len(PairFolder(str(photos)).all_pairs(Images())) == 4
    (message,) = caplog.messages
    assert message == (
        f"2 of the 6 text files in {photos} are left out, because no image is beside them, such as "
        f"{photos / '4.txt'}"
    )
