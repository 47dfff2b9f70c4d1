"""`diffmm analyze`: tables, page and files; what cannot be measured is said."""

import csv
import errno
import re
import shutil
import subprocess
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import diffmm
from diffmm.analysis.attention_scores import Spans, attention_scores
from diffmm.analysis.comparison import COLORS
from diffmm.batch import IGNORE_INDEX
from diffmm.cli import main
from diffmm.cli.analyze_subjects import label_of
from diffmm.tokenizers import ByteTokenizer

TEXT = "The code is 42. Later, the code is "
SPAN = "12:14"


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder with two runs of two steps, `text` and `image`."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "texts").mkdir()
    for number in range(20):
        (folder / "texts" / f"{number}.txt").write_text(f"Text number {number} of twenty. " * 9)
    quick = ["max_steps=2", "val_check_interval=2", "limit_val_batches=1", "log_every_n_steps=1"]
    quick += ["accelerator=cpu", "num_sanity_val_steps=0", "enable_model_summary=false"]
    for name, recipe, changes in (
        ("image", "image/digits_tiny", ["--model.model.config.backbone.depth=2"]),
        (
            "text",
            "text/stdlib_tiny",
            [
                "--data.source.class_path=datamodules.text.TextFolder",
                f"--data.source.init_args.root={folder / 'texts'}",
                "--data.validation_fraction=0.3",
                "--vars.sequence_length=64",
                "--model.model.config.backbone.depth=2",
            ],
        ),
    ):
        arguments = [f"--trainer.{setting}" for setting in quick]
        arguments += ["--vars.attention=diff_v2", "--data.num_workers=0"]
        run_dir = f"--run_dir={folder / 'runs' / name}"
        assert main(["fit", "--config", recipe, run_dir, *arguments, *changes]) == 0
    return folder / "runs"


@pytest.fixture(scope="module")
def page(runs, tmp_path_factory):
    """The page of both runs."""
    path = tmp_path_factory.mktemp("page") / "page.html"
    assert main(["analyze", str(runs), "--samples", "2", "--output", str(path)]) == 0
    return path


def rows(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def warnings_of(result):
    start = "diffmm: warning: "
    return [line.removeprefix(start) for line in result.err.splitlines() if line.startswith(start)]


def test_runs_give_tables_and_files(run, runs, tmp_path):
    tables, figures = tmp_path / "csv", tmp_path / "png"
    result = run(
        "analyze", runs, "--samples", "3", "--csv", tables, "--png", figures, "--device", "cpu"
    )
    assert result.code == 0
    head, _, image, text, *_ = result.out.splitlines()
    assert head.split()[:4] == ["run", "attention", "parameters", "samples"]
    assert image.split()[:2] == ["image", "diff_v2"]
    assert image.split()[3] == text.split()[3] == "3"
    for title in ("Concentration", "Lambda", "Outliers", "Quantization", "Gradients at the start"):
        assert title in result.out.splitlines()
    assert [
        line.partition(": the data")[0].removesuffix(" data") for line in warnings_of(result)
    ] == [
        "attention scores: text",
        "attention maps: the runs have different",
    ]

    drawn = {file.stem for file in figures.glob("*.png")}
    assert {"figure_lambda", "figure_quantization_loss", "figure_concentration_hoyer"} < drawn
    assert drawn < {file.stem for file in tables.glob("*.csv")}
    for file in figures.iterdir():
        with Image.open(file) as picture:
            picture.verify()
    for name, count in (("concentration_by_head", 2 * 3 * (8 + 8)), ("lambda", 4)):
        found = rows(tables / f"{name}.csv")
        assert {row["run"] for row in found} == {"image", "text"}
        if name == "lambda":
            assert len(found) == count
    curve = [row for row in rows(tables / "lambda_over_training.csv") if row["run"] == "text"]
    assert {row["step"] for row in curve} == {"1", "2"}


def test_the_page_is_complete_and_needs_no_network(page):
    text = page.read_text(encoding="utf-8")
    assert not re.search(r"https?:|<script|url\((?!#)", text)
    identifiers = re.findall(r'\bid="([^"]+)"', text)
    assert len(identifiers) == len(set(identifiers))
    assert set(re.findall(r'href="#([^"]+)"', text)) <= set(identifiers)
    for title in ("Runs", "Concentration", "Lambda", "Outliers", "Quantization"):
        assert f">{title}</h2>" in text
    assert text.count('<svg class="figure"') > 10
    assert "No attention maps: the runs have different data." in text
    # As on the page of `diffmm compare`.
    assert text.count('id="curves"') == 1
    assert {"train/loss", "val/loss", "λ, mean of the layers"} <= set(
        re.findall(r'<text class="title"[^>]*>([^<]*)', text)
    )


def test_the_page_of_a_run_has_attention_maps(run, runs, tmp_path):
    page, files = tmp_path / "page.html", tmp_path / "files"
    outputs = ["--output", page, "--csv", files, "--png", files]
    assert run("analyze", runs / "text", "--samples", "1", *outputs).code == 0
    text = page.read_text(encoding="utf-8")
    assert 'href="#maps"' in text
    assert text.count('id="maps"') == 1
    assert text.count("data:image/png;base64,") == 3  # both maps and their difference
    for name in ("a1", "a2", "difference"):
        with Image.open(files / f"figure_map_1_of_run_1_{name}.png") as picture:
            picture.verify()
        with (files / f"figure_map_1_of_run_1_{name}.csv").open(newline="") as file:
            head, *weights = csv.reader(file)
        assert len(head) == len(weights) + 1 == len(weights[0])
        sums = [sum(map(float, row[1:])) for row in weights]
        if name != "difference":
            assert sums == pytest.approx([1.0] * len(weights), rel=1e-4)


def test_a_text_with_an_answer_has_attention_scores(run, runs, tmp_path):
    result = run("analyze", runs / "text", "--text", TEXT, "--span", SPAN, "--csv", tmp_path / "c")
    assert result.code == 0
    assert warnings_of(result) == []
    trained = diffmm.load(runs / "text")
    tokens = torch.tensor([trained.tokenizer.encode(TEXT)])
    marks = torch.zeros(2, *tokens.shape, dtype=torch.bool)
    marks[0, :, 12:14] = True
    marks[1, :, -1] = True
    expected = attention_scores(trained.model, tokens, spans=Spans(*marks))
    (row,) = rows(tmp_path / "c" / "scores.csv")
    assert float(row["share to answer"]) == pytest.approx(expected.answer, rel=1e-5)
    assert float(row["signal to noise"]) == pytest.approx(expected.signal_to_noise, rel=1e-5)
    assert len(rows(tmp_path / "c" / "scores_by_head.csv")) == sum(
        len(layer.answer) for layer in expected.layers
    )


def test_data_with_evidence_have_attention_scores(run, runs, tmp_path, monkeypatch):
    """Special tokens are no noise, and batches are cut to the number of samples."""
    tokens = torch.randint(256, (3, 12))
    tokens[:, 0] = ByteTokenizer.eos_id
    targets = torch.full_like(tokens, IGNORE_INDEX)
    targets[:, -1] = 65
    evidence = torch.zeros(3, 12, dtype=torch.bool)
    evidence[:, 4:6] = True
    batch = {"tokens": tokens, "targets": targets, "evidence": evidence}
    data = SimpleNamespace(val_dataloader=lambda: [batch, batch], tokenizer=ByteTokenizer())
    monkeypatch.setattr("diffmm.cli.weights_data.validation_data", lambda *a, **k: data)
    result = run("analyze", runs / "text", "--samples", "2", "--csv", tmp_path / "csv")
    assert result.code == 0
    assert warnings_of(result) == []
    spans = Spans(evidence[:2], targets[:2] != IGNORE_INDEX, special=tokens[:2] > 255)
    expected = attention_scores(diffmm.load(runs / "text").model, tokens[:2], spans=spans)
    (row,) = rows(tmp_path / "csv" / "scores.csv")
    assert float(row["share to noise"]) == pytest.approx(expected.noise, rel=1e-5)


def test_the_page_of_weights_has_no_curves(run, runs, tmp_path):
    file, page = diffmm.load(runs / "text").save(tmp_path / "weights"), tmp_path / "page.html"
    assert run("analyze", file, "--text", TEXT, "--output", page).code == 0
    text = page.read_text(encoding="utf-8")
    assert "Concentration" in text
    assert 'id="curves"' not in text
    assert "No attention maps: they are drawn for samples of the runs' own data." in text.replace(
        "&#x27;", "'"
    )


def test_encoders_of_text_have_no_token_that_asks(run, tmp_path):
    model = diffmm.create_model("text/stdlib_mlm_tiny", attention="softmax", exclusive=True)
    folder = tmp_path / "encoder"
    model.save_pretrained(folder)
    arguments = ["analyze", folder, "--text", TEXT, "--span", SPAN]
    result = run(*arguments)
    assert "names no tokenizer: give one (--tokenizer bytes)" in result.err
    result = run(*arguments, "--tokenizer", "bytes")
    assert result.code == 0
    assert "softmax (exclusive)" in result.out
    assert any("they need a causal model" in line for line in warnings_of(result)), result.err


def test_a_full_disk_leaves_no_folder(run, runs, tmp_path, monkeypatch):
    writer, tables = csv.writer, []

    def on_a_full_disk(*args, **settings):
        tables.append(args)
        if len(tables) > 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        return writer(*args, **settings)

    monkeypatch.setattr("diffmm.cli.analyze.csv.writer", on_a_full_disk)
    folder = tmp_path / "csv"
    result = run("analyze", runs / "text", "--samples", "2", "--csv", folder)
    assert result.code == 2
    assert result.mistakes == [f"{folder}: No space left on device"]
    assert [path.name for path in tmp_path.iterdir()] == ["work"]  # where the command ran


@pytest.mark.parametrize(
    ("settings", "label"),
    [
        ({"attention": "diff_v1"}, "diff_v1"),
        ({"attention": "softmax", "dex": True}, "softmax (dex)"),
        ({"attention": "diff_v2", "output_gate": "head"}, "diff_v2 (gate per head)"),
        (
            {"attention": "softmax", "output_gate": "element", "exclusive": True},
            "softmax (exclusive and gate per element)",
        ),
    ],
)
def test_labels_say_what_is_added_to_the_heads(settings, label):
    assert label_of(diffmm.BackboneConfig(32, 1, 4, **settings).make_attention(0)) == label


@pytest.mark.parametrize(
    ("name", "arguments", "warning"),
    [
        ("text", ["--span", "30:99"], "attention scores: .*the span 30:99 is not inside the text"),
        ("image", [], ".*image: it is an ImageModel: --text needs a text model"),
    ],
)
def test_what_does_not_fit_is_said_and_the_rest_appears(run, runs, name, arguments, warning):
    result = run("analyze", runs / name, runs / "text", "--text", TEXT, *arguments)
    assert result.code == 0
    assert any(re.match(warning, line) for line in warnings_of(result)), result.err
    assert "Concentration" in result.out
    assert name in result.out


def test_it_fails_if_nothing_can_be_measured(run, runs, tmp_path):
    (tmp_path / "empty").mkdir()
    result = run("analyze", runs / "image", tmp_path / "empty", "--text", TEXT)
    assert result.code == 2
    assert result.out == ""
    problems = result.err.splitlines()
    assert "it is an ImageModel: --text needs a text model" in problems[0]
    assert "the folder is empty: it has no run and no file of weights" in problems[1]


def test_a_run_without_a_checkpoint_shows_its_curves(run, runs, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(runs / "image", copy, ignore=shutil.ignore_patterns("checkpoints"))
    result = run("analyze", copy, "--png", tmp_path / "png")
    assert result.code == 0
    (warning,) = warnings_of(result)
    assert warning.startswith(f"{copy}: {copy} has no checkpoint yet: continue the run")
    names = [file.stem for file in (tmp_path / "png").iterdir()]
    assert names == ["figure_lambda_over_training_of_run_1"]


def test_it_fails_if_only_files_would_show_the_curves(run, runs, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(runs / "image", copy, ignore=shutil.ignore_patterns("checkpoints"))
    result = run("analyze", copy)
    assert result.code == 2
    assert result.out == ""
    assert "has no checkpoint yet: continue the run" in result.err


def test_weights_use_the_data_of_their_recipe_and_other_data_can_be_given(run, runs, tmp_path):
    trained = diffmm.load(runs / "image")
    file = trained.save(tmp_path / "weights")
    result = run("analyze", file, "--samples", "2")
    assert result.code == 0
    assert "Concentration" in result.out

    for label in ("0", "1"):
        (tmp_path / "images" / label).mkdir(parents=True)
        for number in range(2):
            Image.new("L", (8, 8), 90 * number).save(tmp_path / "images" / label / f"{number}.png")
    result = run("analyze", file, "--data", tmp_path / "images")
    assert result.code == 0
    assert result.out.splitlines()[2].split()[3] == "4"

    trained.job = diffmm.models.job.Job(class_names=trained.class_names)
    trained.model.job = trained.job
    result = run("analyze", trained.save(tmp_path / "nameless"))
    assert result.code == 2
    assert "does not name the shipped recipe that trained it" in result.err


def test_a_text_longer_than_the_model_takes_is_said(run, runs):
    result = run("analyze", runs / "text", "--text", TEXT * 9, "--span", SPAN)
    assert result.code == 2
    assert "nothing was measured, for the reasons above" in result.err
    found = [line for line in warnings_of(result) if "longer than max_length=64" in line]
    assert {line.partition(":")[0] for line in found} > {"attention scores", "concentration"}


def test_texts_in_files(run, runs, tmp_path):
    (tmp_path / "a.txt").write_text(TEXT)
    (tmp_path / "b.txt").write_text(TEXT * 99)
    result = run("analyze", runs / "text", "--data", tmp_path)
    assert result.code == 0
    assert result.out.splitlines()[2].split()[3] == "2"
    (tmp_path / "empty").mkdir()
    for path, message in (
        (tmp_path / "none", "there is no such file or folder"),
        (tmp_path / "empty", "there are no .txt files in it"),
    ):
        result = run("analyze", runs / "text", "--data", path)
        assert result.code == 2
        assert f"--data {path}: {message}" in result.err


@pytest.mark.parametrize(
    ("arguments", "mistake"),
    [
        (["none"], "there is no run or file of weights at none"),
        ([".", "--span", "1:2"], "--span 1:2 marks the answer in a text: give --text TEXT"),
        ([".", "--text", "a", "--span", "1-2"], "--span must be A:B, .* got '1-2'"),
        ([".", "--text", "a", "--span", "2:2"], "--span 2:2 is empty: A must be less than B"),
        ([".", "--text", ""], "--text is empty"),
        ([".", "--text", "a", "--data", "."], "--text and --data exclude each other"),
        ([".", "--device", "abacus"], "device 'abacus' is not available"),
        ([".", "--samples", "0"], "--samples must be at least 1, got 0"),
        ([".", "--output", "page.txt"], "page.txt must end in .html"),
        ([".", "--csv", "none/csv"], "there is no folder none to make csv in"),
        ([".", "--png", "file"], "file is a file: give a folder"),
    ],
)
def test_mistakes_are_one_line(run, tmp_path, arguments, mistake):
    (tmp_path / "work" / "file").write_text("")
    result = run("analyze", *arguments)
    assert result.code == 2
    (line,) = result.mistakes
    assert re.match(mistake, line)


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium")
@pytest.mark.parametrize("width", [500, 900, 1400])
def test_the_page_is_drawn_by_a_browser(page, width, tmp_path):
    picture = tmp_path / "picture.png"
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={width},3000"]
    subprocess.run(
        [*command, f"--screenshot={picture}", page.as_uri()],
        check=True,
        capture_output=True,
        timeout=60,
    )
    pixels = np.asarray(Image.open(picture).convert("RGB")).astype(int)
    assert pixels.shape[1] == width
    for number in (0, 1):  # lines of both runs
        color = tuple(int(COLORS[number][i : i + 2], 16) for i in (1, 3, 5))
        assert (abs(pixels - color).sum(axis=-1) < 9).sum() > 300
