"""`--data PATH`: a recipe on the user's own folder or table."""

import gzip
import json
import re
from pathlib import Path

import numpy as np
import pandas
import pytest
import soundfile
import yaml
from PIL import Image

from datamodules.image.own_data import OWN_TRANSFORM
from datamodules.image.transform import ImageTransform
from datamodules.text import TextFolder
from diffmm.recipes.catalog import find_recipe
from diffmm.recipes.errors import InputError
from diffmm.recipes.own_data import on_own_data
from diffmm.recipes.references import resolve
from diffmm.recipes.trainer import RecipeCLI

SPLITS = ("train", "val", "test")
SMALL = ("--vars.image_size", "8", "--data.batch_size", "4")
QUICK = (
    *("--trainer.max_steps", "2", "--trainer.val_check_interval", "1"),
    *("--trainer.num_sanity_val_steps", "0", "--trainer.enable_model_summary", "false"),
    *("--trainer.log_every_n_steps", "1"),
)


def write_images(folder, count, *, gray=False, size=(12, 10)):
    folder.mkdir(parents=True)
    rng = np.random.default_rng(len(folder.name))
    for number in range(count):
        pixels = rng.integers(0, 256, size if gray else (*size, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"bild {number}.png")


def write_sounds(folder, count, rate_hz):
    folder.mkdir(parents=True)
    for number in range(count):
        tone = np.sin(np.arange(rate_hz // 4) * (number + 1) / 20)
        soundfile.write(folder / f"{number}.wav", 0.5 * tone, rate_hz)


@pytest.fixture
def photos(tmp_path):
    for name in ("Käse & Brot", "hund", "it's"):
        write_images(tmp_path / "photos" / name, 10)
    (tmp_path / "photos" / ".thumbnails").mkdir()
    return tmp_path / "photos"


def own(recipe, path, *overrides, inputs_may_change=True):
    """The resolved values, and the printed lines."""
    found = on_own_data(
        [find_recipe(recipe)], overrides, str(path), inputs_may_change=inputs_may_change
    )
    values, mistakes = resolve({**found.values, "run_dir": "runs"})
    assert not mistakes
    return values, found.lines


def source(values):
    return values["data"]["init_args"]["source"]


def model_config(values):
    return values["model"]["init_args"]["model"]["init_args"]["config"]


def test_a_folder_of_classes_trains_and_the_run_needs_no_data_option(run, photos):
    command = ("fit", "--config", "image/digits_tiny", "--data", photos, "--name", "a")
    result = run(*command, *QUICK, *SMALL)
    assert result.code == 0, result.err
    first, second = (line for line in result.out.splitlines() if line.startswith("data: "))
    assert first == (
        f"data: {photos} has 30 images of 3 classes (Käse & Brot, hund, it's): 27 for training, "
        f"3 held out for validation; color, 10 x 12 pixels"
    )
    assert "model.model.config.num_classes 3" in second
    assert "batch_size" not in second
    saved = yaml.safe_load(Path("runs/image/digits_tiny/a/config.yaml").read_text("utf-8"))
    assert model_config(saved)["num_classes"] == 3
    assert model_config(saved)["in_channels"] == 3
    assert saved["data"]["init_args"]["batch_size"] == 4
    assert source(saved)["init_args"] == {"train": str(photos)}
    longer = ("--trainer.max_steps", "4")
    assert run("fit", "--resume", "runs/image/digits_tiny/a", *longer).code == 0
    config = "runs/image/digits_tiny/a/config.yaml"
    result = run("validate", "--config", config, "--weights", "runs/image/digits_tiny/a")
    assert result.code == 0, result.err


def test_the_same_command_goes_on_with_its_run(run, photos):
    command = ("fit", "--config", "image/digits_tiny", "--data", photos, "--resume", "auto")
    for _ in range(2):
        assert run(*command, *QUICK, *SMALL).code == 0
    assert len(list(Path("runs/image/digits_tiny").iterdir())) == 1


@pytest.mark.parametrize("names", [("train", "val"), ("train", "validation", "test")])
def test_folders_of_splits(tmp_path, names):
    for name in names:
        for label in ("a", "b"):
            write_images(tmp_path / name / label, 2, gray=True)
    (tmp_path / "annotations").mkdir()
    values, lines = own("image/finetune", tmp_path)
    splits = dict(
        zip(("train", "val", "test"), (str(tmp_path / name) for name in names), strict=False)
    )
    assert source(values)["init_args"] == {**splits, "val_fraction": 0.1}
    assert values["vars"]["num_classes"] == 2
    assert values["vars"]["channels"] == model_config(values)["in_channels"] == 1
    assert values["data"]["init_args"]["batch_size"] == 4
    assert "4 for training, 4 for validation" in lines[0]
    assert ("4 for testing" in lines[0]) == ("test" in names)
    # Pretrained weights fix the number of channels of the recipe.
    values, _ = own("image/finetune", tmp_path, inputs_may_change=False)
    assert values["vars"]["channels"] == 3


def test_data_may_lie_in_a_hidden_folder(tmp_path):
    for name in ("a", "b"):
        write_images(tmp_path / ".cache" / "photos" / name, 10)
    _, lines = own("image/digits_tiny", tmp_path / ".cache" / "photos")
    assert "2 classes (a, b)" in lines[0]


def test_a_class_that_is_called_train_is_one(tmp_path):
    for name in ("train", "plane"):
        write_images(tmp_path / name, 10)
    values, lines = own("image/digits_tiny", tmp_path)
    assert source(values)["init_args"] == {"train": str(tmp_path)}
    assert "2 classes (plane, train)" in lines[0]


def test_a_table_by_the_names_of_its_columns(photos):
    table = photos.parent / "photos.csv"
    rows = [
        f"photos/hund/bild {n}.png,{'ab'[n % 2]},{'train' if n < 6 else 'dev'}" for n in range(10)
    ]
    table.write_text("\n".join(["Image,Class,Set", *rows]) + "\n", "utf-8")
    values, lines = own("image/finetune", table)
    assert source(values)["class_path"] == "datamodules.image.ImageTable"
    assert source(values)["init_args"] == {
        "train": str(table),
        "file_column": "Image",
        "label_column": "Class",
        "split_column": "Set",
        "val_fraction": 0.1,
    }
    assert "10 images of 2 classes (a, b): 6 for training, 4 for validation" in lines[0]


@pytest.mark.parametrize(("name", "mark"), [("a.csv", ";"), ("a.csv", "\t"), ("a.tsv", "\t")])
def test_tables_of_semicolons_and_tabs(run, photos, name, mark):
    table = photos.parent / name
    rows = [mark.join((f"photos/hund/bild {n}.png", "ab"[n % 2])) for n in range(10)]
    table.write_text("\n".join([mark.join(("File", "Label")), *rows]) + "\n", "utf-8-sig")
    result = run("check", "image/digits_tiny", "--data", table, *SMALL)
    assert result.code == 0, result.err
    assert "10 images of 2 classes (a, b)" in result.out


def test_settings_of_the_command_line_win(photos):
    given = ("--vars.num_classes", "7", "--data.source.val_fraction", "0.3")
    values, lines = own("image/finetune", photos, *given)
    assert model_config(values)["num_classes"] == 7
    assert "vars.num_classes 7 (as given; the data have 3)" in lines[1]
    assert "21 for training, 9 held out" in lines[0]
    assert source(values)["init_args"]["val_fraction"] == 0.3


def test_nothing_is_mirrored_unless_the_recipe_says_so(photos):
    values, _ = own("image/digits_tiny", photos)
    assert ImageTransform(**values["data"]["init_args"]["transform"]) == ImageTransform(
        **{k: list(v) if isinstance(v, tuple) else v for k, v in vars(OWN_TRANSFORM).items()}
    )
    assert OWN_TRANSFORM.hflip == 0.0
    shipped = yaml.safe_load(find_recipe("image/finetune").read_text())
    transform = shipped["data"]["init_args"]["transform"]
    assert transform == values["data"]["init_args"]["transform"]
    # The recipe's own transform is kept.
    values, _ = own("image/cifar10", photos)
    assert values["data"]["init_args"]["transform"]["hflip"] == 0.5


def test_what_the_recipe_calls_timms_default_is_that():
    lines = find_recipe("image/finetune").read_text().splitlines()
    said = [line.split(":")[0].strip() for line in lines if "# timm's default" in line]
    said.remove("color_jitter")  # the recipe has another number
    assert len(said) == 8
    for training in (True, False):
        without = ImageTransform(
            **{k: v for k, v in OWN_TRANSFORM.given().items() if k not in said}
        )
        builds = [
            t.build(ImageTransform(), (32, 32), 3, training=training)
            for t in (OWN_TRANSFORM, without)
        ]
        assert str(builds[0]) == str(builds[1])


@pytest.mark.parametrize(
    ("rate_hz", "may_change", "rate_of_model", "resample"),
    [
        (8000, True, 8000, True),
        (8000, False, 16000, True),
        (44100, True, 16000, True),
        (4000, True, 16000, True),
    ],
)
def test_sounds_and_their_sample_rate(tmp_path, rate_hz, may_change, rate_of_model, resample):
    for name in ("a", "b"):
        write_sounds(tmp_path / name, 10, rate_hz)
    recipe = [find_recipe("audio/finetune")]
    unresolved, lines = on_own_data(recipe, (), str(tmp_path), inputs_may_change=may_change)
    values, _ = resolve({**unresolved, "run_dir": "runs"})
    assert model_config(values)["sample_rate_hz"] == rate_of_model
    assert values["data"]["init_args"]["sample_rate_hz"] == rate_of_model
    assert values["data"]["init_args"]["resample"] is resample
    assert f"{rate_hz:,} Hz, 0.25 to 0.25 s" in lines[0]
    RecipeCLI({**unresolved, "run_dir": "runs"}, build=False)


def test_sounds_of_another_rate_are_resampled_in_a_recipe_that_refused_them(run, tmp_path):
    for name in ("a", "b"):
        write_sounds(tmp_path / "sounds" / name, 10, 11025)
    data = tmp_path / "sounds"
    command = ("fit", "--config", "audio/sound_events_tiny", "--data", data, "--name", "a")
    result = run(*command, *QUICK, "--data.batch_size", "4")
    assert result.code == 0, result.err
    assert "data: set: data.resample True" in result.out


def test_texts(run, tmp_path):
    texts = tmp_path / "texts"
    texts.mkdir()
    for number in range(3):
        (texts / f"größe {number}.TXT").write_text(f"Text number {number}. " * 60)
    (texts / "notes.log").write_text("left out")
    command = ("fit", "--config", "text/stdlib_tiny", "--data", texts, "--name", "a", *QUICK)
    result = run(*command, "--vars.sequence_length", "16", "--data.batch_size", "2")
    assert result.code == 0, result.err
    said = f"data: {texts} has 3 texts (.txt, 2.637 KiB), and 1 other file that is skipped (.log); "
    assert f"{said}--data.source.pattern '**/*.log' reads those instead" in result.out
    values, _ = own("text/finetune", texts)
    assert source(values)["init_args"] == {"root": str(texts), "pattern": "**/*.[tT][xX][tT]"}
    assert values["data"]["init_args"]["split_by"] == "position"
    values, _ = own("text/finetune", texts / "größe 1.TXT")
    assert source(values)["init_args"] == {"root": str(texts), "pattern": "größe 1.TXT"}


def test_texts_in_rows_and_in_splits(tmp_path):
    for split in ("train", "val"):
        (tmp_path / split).mkdir()
        rows = [json.dumps({"text": f"row {n}"}) for n in range(4)]
        (tmp_path / split / "a.jsonl").write_text("\n".join(rows))
    values, lines = own("text/finetune", tmp_path)
    arguments = values["data"]["init_args"]
    assert arguments["source"]["class_path"] == "datamodules.text.HuggingFaceText"
    assert arguments["validation_source"]["init_args"] == {
        "name": "json",
        "data_files": [str(tmp_path / "val" / "a.jsonl")],
    }
    assert arguments["test_fraction"] == 0.0
    assert "split_by" not in arguments
    assert "for train" in lines[0]


def write_texts(folder, **texts):
    for name, text in texts.items():
        stem, _, ending = name.partition("_")
        (folder / (f"{stem}.{ending}" if ending else stem)).write_text(text)


def test_all_kinds_of_plain_text_in_a_folder_are_read_and_a_pattern_chooses_others(run, tmp_path):
    long = "A text about something. " * 40
    write_texts(tmp_path, a_txt="ten bytes.", b_md=long, c_py=long, d_jsonl="{}", LICENSE=long)
    values, (first, _) = own("text/finetune", tmp_path)
    pattern = source(values)["init_args"]["pattern"]
    assert pattern == ["**/*.txt", "**/*.md", "**/*.py"]
    documents = TextFolder(**source(values)["init_args"]).documents()
    assert [document.key for document in documents] == ["a.txt", "b.md", "c.py"]
    assert f"{tmp_path} has 3 texts (.txt, .md, .py, 1.885 KiB), and 2 other files that " in first
    assert "skipped (no extension, .jsonl); --data.source.pattern '**/*' reads all files;" in first
    chosen = ("--data.source.pattern", "**/*.py")
    values, (first, _) = own("text/finetune", tmp_path, *chosen)
    assert source(values)["init_args"]["pattern"] == "**/*.py"
    assert f"{tmp_path} has 1 text (.py, 960 bytes), and 4 other files that are skipped" in first
    result = run("check", "text/finetune", "--data", tmp_path, *chosen)
    assert result.code == 0, result.err
    assert "training     1 document, 865 tokens" in result.out


def test_a_folder_of_unknown_extensions_gets_advice_that_can_be_copied(tmp_path):
    write_texts(tmp_path, a_log="A line. " * 90, b_log="Another line. " * 90, c_gz="packed")
    with pytest.raises(InputError, match=r"3 others: \.log, \.gz\).*pattern '\*\*/\*\.log'$"):
        own("text/finetune", tmp_path)
    _, (first, *_) = own("text/finetune", tmp_path, "--data.source.pattern", "**/*.log")
    assert "has 2 texts (.log, 1.934 KiB)" in first
    with pytest.raises(InputError, match=r"no file in \S* matches '\*\.rst'"):
        own("text/finetune", tmp_path, "--data.source.pattern", "*.rst")
    with pytest.raises(InputError, match="is a file: --data.source.pattern is for a folder"):
        own("text/finetune", tmp_path / "a.log", "--data.source.pattern", "*.rst")


@pytest.mark.parametrize("name", ["a.log", "a.txt.gz", "a.parquet.gz"])
def test_a_text_file_that_is_not_read_says_what_to_do(tmp_path, name):
    (tmp_path / name).write_text("text")
    advice = "unpack them" if name.endswith(".gz") else "rename it so that it ends in .txt"
    with pytest.raises(InputError, match=advice):
        own("text/finetune", tmp_path / name)


def write_rows(file, texts):
    """Write a table of texts in the format of the file's extension."""
    rows = [json.dumps({"text": text}) for text in texts]
    if file.name == "list.json":
        file.write_text(f"[{', '.join(rows)}]")
    elif file.suffix == ".parquet":
        pandas.DataFrame({"text": texts}).to_parquet(file)
    elif file.suffix == ".csv":
        pandas.DataFrame({"text": texts}).to_csv(file, index=False)
    elif file.suffix == ".gz":
        file.write_bytes(gzip.compress("\n".join(rows).encode()))
    else:
        file.write_text("\n".join(rows), "utf-8-sig" if file.stem == "marked" else "utf-8")


@pytest.mark.parametrize(
    "name", ["a.jsonl", "marked.jsonl", "list.json", "a.parquet", "a.csv", "a.jsonl.gz"]
)
def test_the_few_texts_of_a_table_are_split_by_position(run, tmp_path, name):
    file = tmp_path / name
    write_rows(file, [f"Text {number}. " * 200 for number in range(3)])
    result = run("check", "text/finetune", "--data", file)
    assert result.code == 0, result.err
    ending = name.partition(".")[2]
    assert f"data: {file} has 3 rows (.{ending}, " in result.out
    assert "validation and test use the end of them" in result.out
    assert "validation   1 document" in result.out
    write_rows(file, [f"Text {number}." for number in range(120)])
    values, (first, *_) = own("text/finetune", file)
    assert "split_by" not in values["data"]["init_args"]
    assert "has at least 100 rows" in first


def test_few_texts_can_be_streamed_if_that_is_asked_for(tmp_path):
    write_rows(tmp_path / "a.jsonl", [f"Text {number}." for number in range(3)])
    streaming = ("--data.source.streaming", "true")
    values, _ = own("text/finetune", tmp_path / "a.jsonl", *streaming)
    assert "split_by" not in values["data"]["init_args"]
    # That the recipe streams its own data does not matter.
    assert "streaming: true" in find_recipe("text/fineweb_edu_350m").read_text()
    values, _ = own("text/fineweb_edu_350m", tmp_path / "a.jsonl")
    assert values["data"]["init_args"]["split_by"] == "position"


def test_no_message_about_texts_is_code(run, tmp_path):
    write_rows(tmp_path / "a.jsonl", [f"Text {number}." for number in range(3)])
    given = ("--data.split_by", "key", "--data.validation_fraction", "0.000001")
    (mistake,) = run("check", "text/finetune", "--data", tmp_path / "a.jsonl", *given).mistakes
    said = f"the validation split is empty: {tmp_path / 'a.jsonl'} has 3 documents with text; use"
    assert mistake.startswith(said)
    write_rows(tmp_path / "c.jsonl", [f"Text {number % 2}." for number in range(150)])
    (mistake,) = run("check", "text/finetune", "--data", tmp_path / "c.jsonl", *given).mistakes
    assert "has 150 documents with text, of which only 2 differ (equal ones are in the" in mistake
    (tmp_path / "b.jsonl").write_text("{no json")
    (mistake,) = run("check", "text/finetune", "--data", tmp_path / "b.jsonl").mistakes
    assert mistake.startswith(f"the datasets library cannot load {tmp_path / 'b.jsonl'}: ")


def talks(count):
    for number in range(count):
        messages = [
            {"role": "user", "content": f"What is {number}?"},
            {"role": "assistant", "content": "A number. " * 30},
        ]
        yield json.dumps({"messages": messages})


@pytest.mark.parametrize("recipe", ["text/finetune", "text/instruct"])
def test_a_batch_has_at_most_as_many_samples_as_there_are(run, tmp_path, recipe):
    if recipe == "text/finetune":
        data, count, size = tmp_path / "a.py", 11, 8
        data.write_text("x = 1\n" * 1100)
    else:
        data, count, size = tmp_path / "a.jsonl", 6, 4
        data.write_text("\n".join(talks(8)))
    short = ("--vars.sequence_length", "512", "--data.validation_fraction", "0.1")
    result = run("check", recipe, "--data", data, *short)
    assert result.code == 0, result.err
    assert f"data.batch_size {size}" in result.out
    (mistake,) = run("check", recipe, "--data", data, *short, "--data.batch_size", "32").mistakes
    assert mistake == (
        f"{count} training samples do not fill one batch: batch_size is 32 on 1 process(es); set "
        f"--data.batch_size {size} or use more data"
    )
    values, lines = own(recipe, data, *short, "--vars.sequence_length", "16")
    assert "batch_size" not in str(lines)
    assert values["data"]["init_args"]["batch_size"] > size


def test_check_reports_that_images_do_not_fill_a_batch(run, photos):
    given = ("--vars.image_size", "8", "--data.batch_size", "32")
    (mistake,) = run("check", "image/digits_tiny", "--data", photos, *given).mistakes
    assert mistake.startswith("27 training samples do not fill one batch: batch_size is 32 on 1 ")
    assert advised(mistake, "batch_size") == ["--data.batch_size", "16"]


def odd(kind, folder):
    """Create data of the given kind, and return its path."""
    if kind == "one class":
        write_images(folder / "cats", 20)
    elif kind == "empty class":
        write_images(folder / "cats", 20)
        (folder / "dogs").mkdir()
    elif kind == "no folders":
        write_images(folder / "photos", 2)
        return folder / "photos"
    elif kind == "class in val alone":
        for name in ("train/a", "train/b", "val/a", "val/b", "val/c"):
            write_images(folder / name, 2)
    elif kind == "val twice":
        for name in ("train/a", "val/a", "valid/a"):
            write_images(folder / name, 2)
    elif kind == "one file":
        write_images(folder / "photos", 1)
        return folder / "photos" / "bild 0.png"
    elif kind == "semicolons and commas":
        (folder / "a.csv").write_text("file;label,x\na.png;b\n")
        return folder / "a.csv"
    elif kind == "a reference":
        folder = folder / "${vars.seed}"
        write_images(folder / "a", 2)
    return folder


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("one class", "has 20 images of 1 class (cats)"),
        ("empty class", "dogs has no files ending in .jpg"),
        ("no folders", "has 2 images but no folders: use one folder per class, or"),
        ("class in val alone", "has classes that"),
        ("val twice", "has both val and valid: rename one of them"),
        ("one file", "is a single file: use a folder with one folder of images per class, or a"),
        ("semicolons and commas", "needs a column 'file' (or path, filename"),
        ("a reference", "the name contains ${, which recipes use for references"),
        ("nothing", "has no folders and no images"),
    ],
)
def test_odd_data_are_refused_in_one_line_and_nothing_is_left(run, tmp_path, kind, message):
    path = tmp_path / "own"
    path.mkdir()
    result = run("fit", "--config", "image/digits_tiny", "--data", odd(kind, path))
    assert result.code == 2
    (mistake,) = result.mistakes
    assert message in mistake
    assert not list(Path().iterdir())


def test_what_takes_no_data(run, photos):
    result = run("fit", "--config", "image/digits_tiny", "--data", "datamodules.ImageData")
    assert "no such file or folder (to use another datamodule class, set --data.class_path)" in str(
        result.mistakes
    )
    result = run("fit", "--resume", "runs/a", "--data", photos)
    assert "it takes no recipe, data or name" in result.mistakes[0]


@pytest.mark.parametrize(
    "name",
    ["image/imagenet_vit_s", "image/imagenet_mae", "audio/speech_commands", "text/wikitext103"],
)
def test_nothing_of_the_recipes_own_data_is_left(name, tmp_path):
    kind = name.partition("/")[0]
    for label in ("a", "b"):
        if kind == "image":
            write_images(tmp_path / label, 10)
        elif kind == "audio":
            write_sounds(tmp_path / label, 10, 16000)
        else:
            (tmp_path / f"{label}.txt").write_text("A text. " * 50)
    found = on_own_data([find_recipe(name)], (), str(tmp_path), inputs_may_change=True)
    text = yaml.safe_dump(found.values["data"])
    assert "imagenet" not in text
    assert "class_path: datamodules.audio.SpeechCommands" not in text
    assert "wikitext" not in text
    assert "imagenet" not in found.values["vars"]
    RecipeCLI({**found.values, "run_dir": "runs"}, build=False)
    if kind == "text":
        arguments = found.values["data"]["init_args"]
        assert arguments["validation_source"] is None
        assert arguments["split_by"] == "position"


def test_several_labels_per_sample(tmp_path):
    for label in ("a", "b"):
        write_sounds(tmp_path / "sounds" / label, 5, 16000)
    given = ("--data.source.val_fraction", "0.3")
    with pytest.raises(InputError, match="multi_label=False, but the recipe's model has True"):
        own("audio/audioset_ast", tmp_path / "sounds", *given)
    table = tmp_path / "a.csv"
    rows = [f"sounds/{label}/{n}.wav,{'x;y' if n < 2 else 'y'}" for label in "ab" for n in range(5)]
    table.write_text("\n".join(["file,label", *rows]))
    values, lines = own("audio/audioset_ast", table, *given)
    assert source(values)["init_args"]["multi_label"] is True
    assert source(values)["init_args"]["file_column"] == "file"
    assert "2 classes (x, y)" in lines[0]


def advised(mistake, key):
    """The option in an error message, as it stands there."""
    (option,) = re.findall(rf"--data\.{re.escape(key)} [\w-]+", mistake)
    return option.split()


def test_the_advice_on_a_bad_file_can_be_copied(run, photos, tmp_path):
    command = ("fit", "--config", "image/digits_tiny", "--data", photos, *QUICK, *SMALL)
    for path in (photos / "hund").iterdir():
        path.write_text("no image")
    (mistake,) = run(*command).mistakes
    given = (*advised(mistake, "bad_samples.policy"), "--data.bad_samples.max_bad_fraction", "1")
    assert run(*command, *given).code == 0
    # Too many for the default fraction: the run is removed, and the message has its list.
    quarantine = ("--data.bad_samples.policy", "quarantine", "--name", "q")
    result = run(*command, *quarantine)
    assert result.code in (1, 2)
    found = re.search(r"put in quarantine: (.*)", result.err)[1].split(", ")
    assert len(found) >= 2
    assert all(Path(name).parent == photos / "hund" and Path(name).is_file() for name in found)


def test_the_advice_on_another_encoding_can_be_copied(run, tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    for number in range(20):
        (folder / f"{number}.txt").write_bytes("Käse und Brot. ".encode("latin-1") * 50)
    text = ("--vars.sequence_length", "32", "--data.batch_size", "2")
    command = ("fit", "--config", "text/stdlib_tiny", "--data", folder, *QUICK, *text)
    (mistake,) = run(*command).mistakes
    assert run(*command, *advised(mistake, "source.encoding")).code == 0


def test_the_advice_on_two_sources_can_be_copied(run, tmp_path):
    for number in range(6):
        Image.new("RGB", (9, 9)).save(tmp_path / f"{number}.png")
        (tmp_path / f"{number}.txt").write_text(f"text {number}")
    command = ("check", "multimodal/shapes_and_sounds_tiny", "--data.batch_size", "4")
    (mistake,) = run(*command, "--data", tmp_path).mistakes
    value = re.search(r"--data.image_source '(.*)'", mistake)[1].replace("FOLDER", str(tmp_path))
    result = run(*command, "--data.image_source", value, "--read-data")
    assert result.code == 0, result.err
    assert "5 images with 1 text each; 8,000 sounds" in result.out


def test_images_beside_the_folders_of_classes_are_not_ignored_silently(run, photos, caplog):
    for number in range(3):
        Image.new("RGB", (9, 9)).save(photos / f"loose {number}.png")
    (photos / "notes.txt").write_text("no image")
    for _ in range(2):
        assert run("check", "image/digits_tiny", "--data", photos, *SMALL).code == 0
    lines = [record.message for record in caplog.records if "no folder" in record.message]
    assert lines == [
        f"{photos} has 3 files that are in no folder of a class, such as loose 0.png: they are "
        f"ignored"
    ]


def test_a_flat_folder_gets_the_right_advice(run, tmp_path):
    write_images(tmp_path / "flat", 12)
    write_images(tmp_path / "flat" / "old", 2)
    (mistake,) = run("check", "image/digits_tiny", "--data", tmp_path / "flat").mistakes
    assert mistake == (
        f"--data {tmp_path / 'flat'} has 12 images that are in no folder (such as bild 0.png), and "
        f"2 in folders (old): move them into one folder per class, or use a CSV file with the "
        f"columns file and label"
    )
