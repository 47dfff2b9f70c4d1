"""The table of variants: what is run next, the statistics, and a whole table of tiny models."""

import csv
import gzip
import json
import lzma
import math
import shutil
import struct
import sys
from dataclasses import asdict, replace

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image

from benchmarks.quality import __main__ as quality
from benchmarks.quality import plan
from benchmarks.quality.cells import kept_in, next_cells, read_cells
from benchmarks.quality.engine import Run, append, read
from benchmarks.quality.plan import Settings, pending, results, steps_in_time, tune
from benchmarks.quality.prepared import Sources, fingerprint, prepare, unpack
from benchmarks.quality.table import draw, half_width, lines, markdown, write_csv
from benchmarks.quality.tasks import SEPARATOR, TASKS
from benchmarks.quality.variants import ABLATIONS, ALL, ALTERNATIVES, VARIANTS, overrides
from diffmm import load
from diffmm.recipes.catalog import find_recipe
from diffmm.recipes.mistakes import find_mistakes
from diffmm.recipes.settings import load as load_values
from diffmm.tokenizers import load_tokenizer

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
]


@pytest.fixture(autouse=True)
def _on_the_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


GRID = (1e-3, 2e-3, 4e-3)
SETTINGS = Settings(seeds=(0, 1, 2), tuning_seeds=(0,), rates=GRID, steps=100)


def row_of(cell, value, pace=0.1):
    return {**asdict(cell), "loss": value, "accuracy": value, "parameters": 1000} | {
        "seconds_per_step": pace,
        "timed": True,
        "device": "a device",
        "torch": "2",
    }


def fill(value_of, *, settings=SETTINGS, task="text", paces=None, variants=("softmax", "diff_v1")):
    """Run all pending cells with a function of (variant, rate, seed), and return the rows."""
    rows = []
    while cells := [c for v in variants for c in pending(rows, settings, task, v)]:
        for cell in cells:
            pace = (paces or {}).get(cell.variant, 0.1)
            rows.append(row_of(cell, value_of(cell.variant, cell.rate, cell.seed), pace))
    return rows


def bowl(best):
    """A loss that is lowest at a rate."""
    return lambda variant, rate, seed: abs(math.log2(rate / best)) + 0.1 * seed


def test_tuning_comes_first_and_then_all_seeds():
    first = pending([], SETTINGS, "text", "diff_v1")
    assert [(cell.rate, cell.seed) for cell in first] == [(rate, 0) for rate in GRID]
    rows = [row_of(cell, bowl(2e-3)(0, cell.rate, 0)) for cell in first]
    assert [(c.rate, c.seed) for c in pending(rows, SETTINGS, "text", "diff_v1")] == [
        (2e-3, 1),
        (2e-3, 2),
    ]
    assert pending(rows[:1], SETTINGS, "text", "diff_v1") == first[1:]


@pytest.mark.parametrize(
    ("best", "tried", "at_edge"),
    [
        (2e-3, {*GRID}, False),
        (4e-3, {*GRID, 8e-3}, False),
        (5e-4, {*GRID, 5e-4, 2.5e-4}, False),
        (1.0, {*GRID, 8e-3, 16e-3, 32e-3}, True),
    ],
)
def test_the_grid_is_extended_at_its_ends(best, tried, at_edge):
    rows = fill(bowl(best), variants=("softmax",))
    assert {row["rate"] for row in rows} == tried
    tuned = tune(rows, SETTINGS, "text", "softmax")
    assert tuned.at_edge is at_edge
    assert tuned.best == min(tried, key=lambda rate: abs(math.log(rate / best)))


def test_a_run_that_diverged_is_the_worst_and_accuracy_is_better_if_larger():
    nan = fill(lambda v, rate, seed: math.nan if rate < 2e-3 else rate, variants=("softmax",))
    assert tune(nan, SETTINGS, "text", "softmax").best == 2e-3
    high = fill(lambda v, rate, seed: -abs(rate - 2e-3), task="digits", variants=("softmax",))
    assert tune(high, SETTINGS, "digits", "softmax").best == 2e-3


def test_tasks_that_all_solve_are_compared_over_training():
    row = {"task": "needles", "accuracy": 1.0, "points": [{"accuracy": x} for x in (0.2, 0.7, 1.0)]}
    assert plan.value_of(row) == pytest.approx(1.9 / 3)
    assert plan.value_of({**row, "task": "digits"}) == 1.0
    assert TASKS["needles"].title == "mean accuracy over training"


def test_equal_time_has_as_many_steps_as_fit():
    paces = {"softmax": 0.1, "diff_v1": 0.125, "diff_v2": 0.101, "diff_grouped": 0.05}
    rows = fill(bowl(2e-3), paces=paces, variants=tuple(paces))
    in_time = {v: steps_in_time(rows, SETTINGS, "text", v) for v in paces}
    assert in_time == {"softmax": 100, "diff_v1": 80, "diff_v2": 100, "diff_grouped": 125}
    timed = [row for row in rows if row["budget"] == "time"]
    assert {(row["variant"], row["steps"]) for row in timed} == {
        ("diff_v1", 80),
        ("diff_grouped", 125),
    }
    assert len(timed) == 6
    own = results(rows, SETTINGS, "text", "diff_v1", "time")
    assert [row["steps"] for row in own.values()] == [80] * 3
    # About as fast as softmax: its cells of equal tokens.
    same = results(rows, SETTINGS, "text", "diff_v2", "time")
    assert {row["budget"] for row in same.values()} == {"tokens"}


def test_times_of_cells_that_shared_the_device_are_not_compared():
    rows = fill(bowl(2e-3), paces={"diff_v1": 0.2})
    assert steps_in_time(rows, SETTINGS, "text", "diff_v1") == 50
    assert results(rows, SETTINGS, "text", "diff_v1", "time")
    own = [row for row in rows if row["budget"] == "tokens"]
    some = [
        row if row["seed"] == 0 else {**row, "timed": False, "seconds_per_step": 9.0} for row in own
    ]
    assert steps_in_time(some, SETTINGS, "text", "diff_v1") == 50
    (softmax, v1) = lines(some, SETTINGS)[:2]
    assert (softmax.seconds, v1.seconds) == (pytest.approx(10), pytest.approx(20))
    shared = [{**row, "timed": row["variant"] != "diff_v1"} for row in own]
    assert steps_in_time(shared, SETTINGS, "text", "diff_v1") is None
    assert not results(shared, SETTINGS, "text", "diff_v1", "time")
    assert pending(shared, SETTINGS, "text", "diff_v1") == []


def test_cells_of_equal_time_can_be_left_out():
    paces = {"softmax": 0.1, "diff_v1": 0.125}
    rows = [
        row
        for row in fill(bowl(2e-3), paces=paces, variants=tuple(paces))
        if row["budget"] == "tokens"
    ]
    pairs = [("text", variant) for variant in paces]
    wanted = next_cells(rows, SETTINGS, pairs)
    assert {(cell.variant, cell.budget) for cell in wanted} == {("diff_v1", "time")}
    assert next_cells(rows, SETTINGS, pairs, equal_time=False) == []


def test_equal_time_waits_for_softmax():
    rows = fill(bowl(2e-3), variants=("diff_v1",))
    assert {row["budget"] for row in rows} == {"tokens"}
    assert steps_in_time(rows, SETTINGS, "text", "diff_v1") is None


def test_other_sizes_steps_and_seeds_are_other_cells():
    rows = fill(bowl(2e-3))
    assert pending(rows, SETTINGS, "text", "softmax") == []
    for other in (
        replace(SETTINGS, size="tiny"),
        replace(SETTINGS, compiled=True),
        replace(SETTINGS, steps=99),
    ):
        assert len(pending(rows, other, "text", "softmax")) == 3
    more = replace(SETTINGS, seeds=(0, 1, 2, 3))
    assert [cell.seed for cell in pending(rows, more, "text", "softmax")] == [3]


def test_paired_differences_have_students_interval():
    # The spread between seeds is large and common to both variants.
    gaps = (-0.05, -0.07, -0.06)

    def value(variant, rate, seed):
        return 3 * seed + abs(math.log2(rate / 2e-3)) + (variant == "diff_v1") * gaps[seed]

    found = lines(fill(value), SETTINGS)
    softmax, v1, v1_time = found
    assert (softmax.variant, softmax.mean_difference, softmax.half_width) == ("softmax", None, None)
    assert v1_time.budget == "time"
    assert v1.mean_difference == pytest.approx(-0.06)
    # t of 2 degrees of freedom is 4.303; s = 0.01, n = 3.
    assert v1.half_width == pytest.approx(4.3027 * 0.01 / math.sqrt(3), rel=1e-4)
    assert v1.verdict == "better"
    assert replace(v1, differences={0: -0.05, 1: 0.07, 2: 0.01}).verdict == "no clear difference"
    assert replace(v1, differences={0: 0.05, 1: 0.07, 2: 0.06}).verdict == "worse"
    accuracy = replace(v1, task="digits", differences={0: 0.05, 1: 0.07, 2: 0.06})
    assert accuracy.verdict == "better"
    assert half_width([1.0]) is None
    diverged = replace(v1, differences={0: math.inf, 1: 0.07})
    assert (diverged.half_width, diverged.verdict) == (None, "")


def test_the_table_shows_every_seed(tmp_path):
    def value(variant, rate, seed):
        return 2 + 0.01 * seed + abs(math.log2(rate / 1.0)) - (variant == "diff_v1") * 0.0625

    rows = fill(value, paces={"diff_v1": 0.2})
    found = lines(rows, SETTINGS)
    text = markdown(found)
    assert "## text: loss at equal tokens" in text
    assert "## text: loss at equal time" in text
    assert (
        "| diff_v1 | 0.032* | 6.913 | 6.903 6.913 6.923 | -0.062 ± 0.000 | better | 1,000 | 100 "
        "| 20.0 |" in text
    )
    assert "| 50 | 10.0 |" in text
    # Softmax is the reference of both tables.
    tables = text.split("## text: loss at equal ")[1:]
    assert [table.count("| softmax |") for table in tables] == [1, 1]
    assert "\\* The best rate is at an end of all rates that were tried." in text
    write_csv(found, tmp_path / "quality.csv")
    written = list(csv.DictReader((tmp_path / "quality.csv").read_text().splitlines()))
    assert len(written) == 9
    assert {row["seed"] for row in written} == {"0", "1", "2"}
    assert float(written[3]["difference"]) == pytest.approx(-0.0625)
    draw(found, tmp_path / "quality.png")
    with Image.open(tmp_path / "quality.png") as image:
        assert image.size[0] > 400
    with pytest.raises(SystemExit, match="nothing to draw"):
        draw(found[:1], tmp_path / "quality.png")


def test_rows_have_nine_digits(tmp_path):
    path = tmp_path / "cells.jsonl"
    row = {"task": "digits", "size": "tiny", "variant": "softmax", "seed": 0}
    append(path, {**row, "steps": 1234567, "rate": 2.5e-4, "points": [{"loss": 0.12345678949}]})
    append(path, {**row, "loss": math.inf})
    assert path.read_text().splitlines()[0].endswith('"points":[{"loss":0.123456789}]}')
    one, two = read(path)
    assert (one["steps"], one["rate"], two["loss"]) == (1234567, 2.5e-4, math.inf)


def test_a_line_that_was_cut_off_is_run_again(tmp_path, capsys):
    path = tmp_path / "cells.jsonl"
    rows = [{"task": "digits", "size": "tiny", "variant": "softmax", "seed": n} for n in range(3)]
    assert read(path) == []
    append(path, rows[0])
    append(path, rows[1])
    path.write_bytes(path.read_bytes()[:-3])
    assert read(path) == rows[:1]
    # What follows a line that was cut off is on a line of its own.
    append(path, rows[2])
    capsys.readouterr()
    assert read(path) == [rows[0], rows[2]]
    assert capsys.readouterr().err == f"{path}, line 2 is not a complete run: left out\n"
    for line in ("garbage", '{"task": "digits"}', "[1]"):
        path.write_text(f"{json.dumps(rows[0])}\n{line}\n")
        assert read(path) == rows[:1]
        assert "line 2 is not a complete run" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--tasks", "digits", "--variants", "softmax", "--rates", "0"], "error: .*learning_rate"),
        (["--tasks", "digits", "--out", "FILE/out"], "error: .*FILE"),
    ],
)
def test_mistakes_end_the_command_with_one_line(given, message, tmp_path, monkeypatch):
    (tmp_path / "FILE").write_text("a file")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["quality", "--size", "tiny", *given])
    with pytest.raises(SystemExit, match=message):
        quality.command()


def test_a_stopped_command_says_how_to_go_on(tmp_path, monkeypatch):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(quality, "fill", stop)
    monkeypatch.setattr(sys, "argv", ["quality", "--out", str(tmp_path)])
    with pytest.raises(SystemExit, match="stopped: the same command continues"):
        quality.command()


@pytest.mark.parametrize("task", TASKS)
def test_every_variant_of_every_task_has_the_parameters_of_softmax(task, tmp_path):
    spec = TASKS[task]
    counts = {}
    # All variants of a decoder and of an encoder; those that depend on the size in every task.
    whole = task in ("text", "digits")
    for variant in ALL if whole else ("softmax", "diff_v1", "diff_grouped", "v2_half_heads"):
        of_task = spec.given("full", tmp_path, tmp_path)
        given = [*of_task, *overrides(variant, spec.recipe, of_task, spec.backbones)]
        values = {**load_values([find_recipe(spec.recipe)], given), "run_dir": "runs"}
        found = find_mistakes(values)
        assert found.mistakes == []
        counts[variant] = sum(p.numel() for p in found.model.model.parameters())
    for count in counts.values():
        assert count == pytest.approx(counts["softmax"], rel=0.01)
    assert not whole or set(ABLATIONS) < set(counts)
    if task == "text":
        assert counts["softmax"] == pytest.approx(42e6, rel=0.02)


def test_a_task_with_two_backbones(tmp_path, monkeypatch):
    monkeypatch.setattr(plan, "MAX_EXTENSIONS", 0)
    tiny = ["--size", "tiny", "--seeds", "0", "--rates", "1e-3", "--steps", "2"]
    names = ["softmax", "diff_grouped", "v2_half_heads"]
    quality.main(
        ["--tasks", "shapes", "--variants", ",".join(names), *tiny, "--out", str(tmp_path)]
    )
    rows = {row["variant"]: row for row in read_cells(tmp_path)}
    assert list(rows) == names
    for row in rows.values():
        assert 0.0 <= row["media_to_text_recall_1"] <= row["media_to_text_recall_10"] <= 1.0
        assert math.isfinite(row["loss"])


def test_a_task_with_images_and_sounds(tmp_path, monkeypatch, capsys):
    """Towers that share all blocks; the table shows each modality beside both together."""
    monkeypatch.setattr(plan, "MAX_EXTENSIONS", 0)
    tiny = ["--size", "tiny", "--seeds", "0", "--rates", "1e-3", "--steps", "2"]
    task, out = "shapes_and_sounds_shared", ["--out", str(tmp_path)]
    quality.main(["--tasks", task, "--variants", "softmax", *tiny, *out])
    (row,) = rows = read_cells(tmp_path)
    both = [row[name] for name in TASKS[task].parts]
    assert 0.0 <= row["media_to_text_recall_1"] <= max(both) <= 1.0
    found = lines(rows, Settings(seeds=(0,), rates=(1e-3,), size="tiny", steps=2))
    text = markdown(found).splitlines()
    header = next(line for line in text if line.startswith("| variant"))
    assert header.endswith("| seconds | image_to_text_recall_1 | audio_to_text_recall_1 |")
    (cells,) = (line.split(" | ")[-2:] for line in text if line.startswith("| softmax"))
    assert [cell.strip(" |") for cell in cells] == [f"{100 * value:.2f}" for value in both]


def test_tasks_whose_models_write_texts(tmp_path, monkeypatch):
    """Captions are generated, and transcripts are those of recorded prompts."""
    monkeypatch.setattr(plan, "MAX_EXTENSIONS", 0)
    folder = tmp_path / "en"
    folder.mkdir()
    texts = [f"word {number} of {number % 7}" for number in range(30)]
    for number in range(len(texts)):
        noise = np.random.default_rng(number).normal(0, 0.1, 4000)
        soundfile.write(folder / f"p{number}.wav", noise, 8000)
    told = "".join(f"p{number}: {text}\n" for number, text in enumerate(texts))
    (tmp_path / "told.gz").write_bytes(gzip.compress(told.encode()))
    sources = Sources(sounds=tmp_path, transcripts=tmp_path / "told.gz")
    prepare("transcripts", tmp_path / "transcripts", sources)
    written = {
        split: {path.read_text() for path in (tmp_path / "transcripts" / split).glob("*.txt")}
        for split in ("train", "val")
    }
    assert not written["train"] & written["val"]
    assert written["train"] | written["val"] < set(texts)
    sounds = list((tmp_path / "transcripts" / "val").glob("*.flac"))
    assert len(sounds) == len(written["val"])
    assert len(soundfile.read(sounds[0])[0]) == 4000

    tiny = ["--size", "tiny", "--seeds", "0", "--rates", "1e-3", "--steps", "2"]
    where = ["--data", str(tmp_path), "--out", str(tmp_path / "out")]
    run = ["--tasks", "captions,transcripts", "--variants", "softmax,diff_v2", *tiny, *where]
    quality.main(run)
    rows = {(r["task"], r["variant"]): r for r in read_cells(tmp_path / "out")}
    assert len(rows) == 4
    for (task, _), row in rows.items():
        # Every validation generates texts, not only the first.
        values = [point[TASKS[task].metric] for point in row["points"]]
        assert len(values) == 2
        assert all(math.isfinite(value) for value in values)
    assert TASKS["transcripts"].sign == -1
    assert TASKS["captions"].sign == 1


def test_the_sharing_is_that_of_the_task(tmp_path):
    counts = {}
    for name in (
        "shapes_and_sounds",
        "shapes_and_sounds_partly_shared",
        "shapes_and_sounds_shared",
    ):
        spec = TASKS[name]
        values = load_values([find_recipe(spec.recipe)], spec.given("full", tmp_path, tmp_path))
        model = find_mistakes({**values, "run_dir": "runs"}).model.model
        counts[name] = sum(p.numel() for p in model.parameters())
    separate, partly, shared = counts.values()
    assert separate > partly > shared
    assert separate - partly == pytest.approx(partly - shared)


def test_alternatives_are_variants_that_are_asked_for_by_name(tmp_path, monkeypatch):
    from benchmarks.quality import alternatives

    assert set(alternatives.ALTERNATIVES) == set(ALTERNATIVES)
    assert not set(ALTERNATIVES) & set(VARIANTS)
    monkeypatch.setattr(plan, "MAX_EXTENSIONS", 0)
    tiny = ["--size", "tiny", "--seeds", "0", "--rates", "4e-3", "--steps", "2"]
    names = ",".join(["softmax", *ALTERNATIVES])
    run = ["run", "--tasks", "digits", "--variants", names, *tiny, "--out", str(tmp_path)]
    quality.main(run)
    rows = {row["variant"]: row for row in read_cells(tmp_path)}
    assert set(rows) == {"softmax", *ALTERNATIVES}
    # They are other models from the same weights and data.
    assert len({row["train_loss"] for row in rows.values()}) == len(rows)
    assert len({row["parameters"] for row in rows.values()}) == 1


TINY = ["--size", "tiny", "--seeds", "0,1", "--rates", "4e-3,8e-3", "--steps", "6"]


def test_a_tiny_table_from_first_to_last(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(plan, "MAX_EXTENSIONS", 0)
    out = ["--out", str(tmp_path / "out"), *TINY]
    run = ["--tasks", "digits", "--variants", "softmax,diff_v1", *out]
    quality.main([*run, "--minutes", "0"])
    assert "the time is over" in capsys.readouterr().out
    quality.main([*run, "--part", "1/2", "--shared"])
    assert {row["variant"] for row in read_cells(tmp_path / "out")} == {"diff_v1"}
    quality.main(run)
    rows = read_cells(tmp_path / "out")
    assert {(row["variant"], row["timed"]) for row in rows} == {
        ("softmax", True),
        ("diff_v1", False),
    }
    assert len({json.dumps([row[n] for n in list(row)[:7]]) for row in rows}) == len(rows)
    for row in rows:
        assert [point["step"] for point in row["points"]][-1] == row["steps"]
        assert row["points"][-1]["accuracy"] == row["accuracy"]
    capsys.readouterr()
    quality.main(run)
    assert capsys.readouterr().out.count("rate") == 0, "nothing is run twice"

    quality.main(["table", *out])
    assert "## digits: accuracy at equal tokens" in capsys.readouterr().out
    for name in ("quality.md", "quality.csv", "quality.png"):
        assert (tmp_path / "out" / name).stat().st_size > 100

    quality.main(["weights", str(tmp_path / "twins"), *run])
    twin = tmp_path / "twins" / "digits_diff_v1"
    model = load(twin).model
    assert model.config.backbone.attention == "diff_v1"
    (line,) = [
        line
        for line in lines(rows, Settings((0, 1), rates=(4e-3, 8e-3), size="tiny", steps=6))
        if (line.variant, line.budget) == ("diff_v1", "tokens")
    ]
    best = max(line.values.values())
    card = (twin / "README.md").read_text()
    # Training again gives the weights of the cell.
    assert f"| these weights | {best:.2f} |" in card
    assert f"| their cell of the table | {best:.2f} |" in card
    assert f"| mean over seeds | {line.mean:.2f} |" in card


def test_cells_that_train_together_are_those_that_train_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(plan, "MAX_EXTENSIONS", 0)
    order, loss = [], Run.loss
    monkeypatch.setattr(Run, "loss", lambda self, b: (order.append(id(self)), loss(self, b))[1])
    found = []
    for together in ("1", "3"):
        order.clear()
        out = ["--out", str(tmp_path / together), "--together", together, "--no-equal-time"]
        quality.main(["--tasks", "digits", "--variants", "softmax,diff_v2", *out, *TINY])
        rows = read_cells(tmp_path / together)
        for row in rows:
            for name in ("seconds_per_step", "wall_seconds"):
                del row[name]
        found.append(sorted(rows, key=json.dumps))
        assert len(order) == 6 * len(rows)
        # Two rates and two seeds of each variant: the first four are known from the start.
        assert len(set(order[:3])) == int(together)
    assert found[0] == found[1]
    assert len(found[0]) == 6


def idx(array):
    return (
        bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + bytes(array)
    )


def test_prepared_text_and_images_are_carried(tmp_path, monkeypatch):
    monkeypatch.setattr(plan, "MAX_EXTENSIONS", 0)
    for number in range(30):
        (tmp_path / "python" / f"m{number}.py").parent.mkdir(exist_ok=True)
        text = f"def function_{number}(x):\n    return x + {number}\n" * 20
        (tmp_path / "python" / f"m{number}.py").write_text(text)
    (tmp_path / "python" / "copy.py").write_text((tmp_path / "python" / "m1.py").read_text())
    (tmp_path / "python" / "latin.py").write_bytes(b"# \xff")
    images = tmp_path / "idx"
    images.mkdir()
    for part, count in (("train", 40), ("t10k", 10)):
        pixels = np.random.default_rng(0).integers(0, 256, (count, 28, 28), np.uint8)
        labels = (np.arange(count) % 10).astype(np.uint8)
        (images / f"{part}-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(pixels)))
        (images / f"{part}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(labels)))
    sources = Sources(python=[tmp_path / "python"], fashion_mnist=images)
    data = tmp_path / "data"
    data.mkdir()
    for name in ("text", "fashion_mnist"):
        prepare(name, data / name, sources)
    unpack(data, tmp_path / "cache")
    parts = {
        split: (tmp_path / "cache" / "text" / f"{split}.txt").read_text().split(SEPARATOR)
        for split in ("train", "val")
    }
    assert len(parts["val"]) == 1
    assert len(parts["train"]) == 29
    assert not set(parts["val"]) & set(parts["train"])
    tokenizer = load_tokenizer(str(data / "text" / "tokenizer.json"))
    text = parts["val"][0]
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.num_bytes(tokenizer.encode(text)) == len(text)

    run = ["--data", str(data), "--out", str(tmp_path / "out"), "--variants", "softmax"]
    quality.main(
        [
            *run,
            *TINY,
            "--tasks",
            "text,fashion_mnist",
            "--seeds",
            "0",
            "--rates",
            "1e-3",
            "--steps",
            "1",
        ]
    )
    rows = {row["task"]: row for row in read_cells(tmp_path / "out")}
    assert {name: row["data"] for name, row in rows.items()} == {
        name: fingerprint(data, name) for name in ("text", "fashion_mnist")
    }

    # Other data: rows are not compared, and what was unpacked is not used.
    other = tmp_path / "other"
    shutil.copytree(data, other)
    packed = other / "text" / "val.txt.xz"
    packed.write_bytes(lzma.compress(b"x = 1\n" * 500))
    again = [*run, *TINY, "--tasks", "text", "--seeds", "0,1", "--rates", "1e-3", "--steps", "1"]
    again[again.index(str(data))] = str(other)
    message = rf"text.jsonl has runs of text .* \({rows['text']['data']}\) than these"
    with pytest.raises(SystemExit, match=message):
        quality.main(again)
    assert len(read_cells(tmp_path / "out")) == 2
    unpack(other, tmp_path / "cache")
    assert (tmp_path / "cache" / "text" / "val.txt").read_text() == "x = 1\n" * 500
    kept = kept_in(tmp_path / "out", "text")
    older = [{name: value for name, value in row.items() if name != "data"} for row in read(kept)]
    kept.write_text("".join(f"{json.dumps(row)}\n" for row in older))
    quality.main(again)  # kept before fingerprints were
    assert len(read(kept)) == 2


def test_what_is_missing_is_named(tmp_path):
    nowhere = Sources(
        python=[tmp_path],
        fashion_mnist=tmp_path / "none",
        fonts=tmp_path,
        sounds=tmp_path,
        transcripts=tmp_path / "none",
        emoji=tmp_path / "none",
    )
    for name, message in (
        ("text", "there are no Python files in"),
        ("fashion_mnist", "none does not exist: install dataset-fashion-mnist"),
        ("letters", "no font"),
        ("speech", "none does not exist: install asterisk-core-sounds-en"),
        ("emoji", "none does not exist: install fonts-noto-color-emoji"),
        ("transcripts", "none does not exist: install asterisk-core-sounds-en"),
    ):
        with pytest.raises(SystemExit, match=message):
            prepare(name, tmp_path / "data" / name, nowhere)
        assert not (tmp_path / "data" / name).exists()
    with pytest.raises(SystemExit, match="prepare .* --tasks speech"):
        quality.main(["--tasks", "speech", "--data", str(tmp_path), "--out", str(tmp_path)])
    for verb in ("table", "weights"):
        given = [str(tmp_path / "x")] if verb == "weights" else []
        with pytest.raises(SystemExit, match="has no complete cells"):
            quality.main([verb, *given, "--out", str(tmp_path)])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--tasks", "chess"], "--tasks: 'chess' is not one of text, fashion_mnist"),
        (["--variants", "diff_v1"], "--variants needs softmax, which the others are compared with"),
        (["--variants", "softmax,diff_v9"], "'diff_v9' is not one of softmax"),
        (["--part", "2/2"], "--part must be I/N with 0 <= I < N, got 2/2"),
        (["--seeds", "1,1"], "--seeds must be different numbers of at least 0, got '1,1'"),
        (["--rates", "fast"], "--rates must be numbers separated by commas, got 'fast'"),
        (["prepare", "x", "--text-mib", "0"], "--text-mib must be at least 1, got 0"),
        (["--together", "0"], "--together must be at least 1, got 0"),
        (["--together", "2"], "--together needs --no-equal-time"),
        (["--steps", "0"], "--steps must be at least 1, got 0"),
    ],
)
def test_options_that_do_not_work(given, message, capsys):
    with pytest.raises(SystemExit):
        quality.main(given)
    assert message in capsys.readouterr().err
