"""`diffmm check --read-data` and `--data`: a summary of the data, and the errors that would stop a
run."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from diffmm.recipes.locations import DataPath


def write_image(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(path)


@pytest.fixture
def table(tmp_path):
    """Images of two classes, one of which is missing from `val`, with one missing file."""
    rows = ["a/0.png,a,train", "gone.png,b,train", "a/1.png,b,train", "b/0.png,b,val"]
    for name in ("a/0", "a/1", "b/0"):
        write_image(tmp_path / f"{name}.png")
    path = tmp_path / "photos.csv"
    path.write_text("\n".join(["file,label,split", *rows]) + "\n")
    return path


def lines_of(result):
    return dict(line.split(maxsplit=1) for line in result.out.splitlines())


def test_counts_by_split_and_class(run):
    result = run("check", "image/digits_tiny", "--read-data")
    assert result.code == 0, result.err
    lines = lines_of(result)
    assert lines["train"].startswith("1,438 samples: 142 0; 146 1; ")
    assert lines["val"].startswith("359 samples: ")
    assert lines["read"].startswith("128 samples")
    assert "test" not in lines
    assert "train" not in lines_of(run("check", "image/digits_tiny"))


@pytest.mark.parametrize(
    ("recipe", "place", "way"),
    [
        ("image/finetune", "data/images does", "--data PATH, or --data.source.train PATH"),
        (
            "image/imagenet_vit_s",
            "data/imagenet/train, data/imagenet/val do",
            "--data PATH, or --vars.imagenet PATH",
        ),
        ("text/instruct", "data/conversations.jsonl does", "--data PATH, or --data.source.data_f"),
    ],
)
def test_a_place_for_data_that_does_not_exist_is_said(run, recipe, place, way):
    """It is no mistake: the recipe is right, and the data may be elsewhere."""
    result = run("check", recipe)
    assert result.code == 0
    (line,) = [line for line in result.err.splitlines() if "not checked" in line]
    assert f"the data were not checked: {place} not exist, which a run needs; name your" in line
    assert f"name your data with {way}" in line
    (mistake, *_) = run("check", recipe, "--read-data").mistakes
    assert place.partition(",")[0].removesuffix(" does") in mistake


@pytest.mark.parametrize("recipe", ["image/digits_tiny", "image/cifar10", "text/wikitext103"])
def test_generated_installed_and_downloaded_data_need_no_place(run, recipe):
    assert "not checked" not in run("check", recipe).err


def test_a_place_for_data_that_exists_is_not_mentioned(run):
    write_image(Path("data/images/a/0.png"))
    assert "not checked" not in run("check", "image/finetune").err


def test_patterns_exist_where_their_folder_does(tmp_path):
    path = f"{tmp_path}/shards/{{000..031}}.tar"
    assert not DataPath("vars.shards", path).exists
    (tmp_path / "shards").mkdir()
    assert DataPath("vars.shards", path).exists


def test_files_that_are_missing_and_classes_of_one_split(run, table):
    result = run("check", "image/digits_tiny", "--data", table)
    assert result.code == 2
    assert lines_of(result)["train"] == "3 samples: 1 a; 2 b"
    assert result.mistakes == [f"train: image 1 ({table.parent / 'gone.png'}) does not exist"]
    assert "diffmm: warning: the val split has no samples of a\n" in result.err
    # It is not an error if the run tolerates it.
    policy = ("--data.bad_samples.policy", "substitute")
    result = run("check", "image/digits_tiny", "--data", table, *policy)
    assert result.code == 0
    assert "gone.png) does not exist\n" in result.err


def test_the_first_the_last_and_some_between_are_read(run, tmp_path):
    for name in ("a", "b"):
        for number in range(200):
            write_image(tmp_path / "train" / name / f"{number:03}.png")
        write_image(tmp_path / "val" / name / "0.png")
    bad = [tmp_path / "train" / "a" / "000.png", tmp_path / "train" / "b" / "199.png"]
    for path in bad:
        path.write_text("no image")
    result = run("check", "image/digits_tiny", "--data", tmp_path)
    assert [str(path) in mistake for path, mistake in zip(bad, result.mistakes, strict=True)]
    assert "cannot be decoded" in result.mistakes[0]
    assert lines_of(result)["read"].startswith("66 samples")
    for path in bad:
        write_image(path)
    for path in (tmp_path / "train").rglob("1*.png"):
        path.write_text("no image")
    mistakes = run("check", "image/digits_tiny", "--data", tmp_path).mistakes
    assert len(mistakes) == 6
    assert "more samples" in mistakes[-1]


def test_the_number_of_classes_is_compared(run):
    key = "--model.model.config.num_classes"
    result = run("check", "image/digits_tiny", "--read-data", key, "8")
    assert result.mistakes == ["the data have 10 classes, but the model's num_classes is 8"]
    result = run("check", "image/digits_tiny", "--read-data", key, "12")
    assert result.code == 0
    assert "warning: the model's num_classes is 12, but the data have 10 classes" in result.err
    result = run("check", "image/digits_tiny", "--read-data", "--model.multi_label", "true")
    assert result.mistakes == ["the data's multi_label is False, but the task's is True"]


def test_many_classes_and_one_that_training_lacks(run, tmp_path):
    names = [f"class {number:02}" for number in range(13)]
    for name in names[1:]:
        write_image(tmp_path / f"{name}.png")
        write_image(tmp_path / f"{name} again.png")
    write_image(tmp_path / "third.png")
    (tmp_path / "classes.txt").write_text("\n".join(names))
    rows = [f"{name}.png,{name}" for name in names[1:]]
    (tmp_path / "a.csv").write_text("\n".join(["file,label", *rows, f"third.png,{names[3]}"]))
    others = [f"{name} again.png,{name}" for name in names[1:]]
    (tmp_path / "b.csv").write_text("\n".join(["file,label", *others]))
    table, other = str(tmp_path / "a.csv"), str(tmp_path / "b.csv")
    given = ("--data.source.classes", tmp_path / "classes.txt", "--data.source.val", other)
    result = run("check", "image/digits_tiny", "--data", table, *given)
    assert lines_of(result)["train"] == (
        "13 samples: 13 classes, from 0 (class 00) to 2 (class 03)"
    )
    assert result.mistakes == ["the train split has no samples of class 00"]


def test_texts(run, tmp_path):
    for number in range(4):
        (tmp_path / f"{number}.txt").write_text("A text. " * 500)
    result = run("check", "text/stdlib_tiny", "--data", tmp_path)
    assert result.code == 0, result.err
    lines = lines_of(result)
    assert set(lines) >= {"training", "validation", "test"}
    assert "tokens" in lines["validation"]


def test_what_is_not_there_is_not_downloaded(run):
    result = run("check", "image/cifar10", "--read-data")
    assert result.mistakes == ["the data have not been downloaded yet: diffmm fit downloads them"]
    result = run("check", "image/imagenet_vit_s", "--read-data")
    assert result.mistakes == ["folder data/imagenet/train does not exist"]
    assert not list(Path().iterdir())


def test_empty_classes_hide_no_unreadable_images(run, tmp_path):
    tmp_path /= "photos"
    for name in ("a/0", "a/1", "b/0"):
        write_image(tmp_path / f"{name}.png")
    bad = [tmp_path / "a/bad.png", tmp_path / "b/worse.png"]
    for path in bad:
        path.write_text("no image")
    for name in ("empty", "void"):
        (tmp_path / name).mkdir()
    (mistake,) = run("check", "image/digits_tiny", "--data", tmp_path).mistakes
    assert f"{tmp_path / 'empty'} and {tmp_path / 'void'} have no files ending in" in mistake
    assert all(f"{path} cannot be decoded" in mistake for path in bad)
