"""`diffmm compare`: settings that differ, curves, the page."""

import csv
import re
from pathlib import Path

import pytest
import yaml

from diffmm.analysis.lambdas import mean_lambda_curve
from diffmm.cli.compare import text_table
from diffmm.recipes.catalog import find_recipe
from diffmm.recipes.errors import InputError
from diffmm.recipes.settings import load, override
from diffmm.runs import records
from diffmm.runs.metrics import read_curves
from diffmm.runs.summaries import (
    differing,
    find_runs,
    is_smaller_better,
    short_settings,
    shown,
    summarize,
)


def write_log(run, version, rows):
    folder = run / "csv" / f"version_{version}"
    folder.mkdir(parents=True)
    names = list(dict.fromkeys(name for row in rows for name in row))
    with (folder / "metrics.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(rows)


def write_run(path, changes=(), *, recipe="image/digits_tiny", log=True):
    values = load([find_recipe(recipe)])
    for key, value in dict(changes).items():
        override(values, key, value)
    path.mkdir(parents=True)
    (path / "config.yaml").write_text(f"# A recipe.\n{yaml.safe_dump(values, sort_keys=False)}")
    if log:
        rate = {"train/samples_per_second": 100}
        rows = [{"step": 0, "train/loss": 2.0, **rate}, {"step": 3, "val/loss": 1.5}]
        rows += [{"step": 3, "val/accuracy": 0.5}, {"step": 7, "val/accuracy": 0.25}]
        write_log(path, 0, [*rows, {"step": 7, "val/loss": 1.75, "train/loss": 1.0}])
    return path


def test_the_curves_of_a_resumed_run_are_one(tmp_path):
    def rows(steps, value):
        return [{"epoch": 0, "step": step, "a": value, "b": ""} for step in steps]

    write_log(tmp_path, 0, rows(range(0, 6), 0))
    # Repeated from step 4, and named so that 10 must follow 9.
    write_log(tmp_path, 9, rows(range(4, 8), 9))
    write_log(tmp_path, 10, [*rows([6], 10), {"step": 6, "b": 5}, {"step": "", "a": 1}])
    curves = read_curves(tmp_path)
    assert curves["a"] == [(1, 0), (2, 0), (3, 0), (4, 0), (5, 9), (6, 9), (7, 10)]
    assert curves["b"] == [(7, 5)]


def test_a_runs_numbers_are_its_own(run):
    write_run(Path("runs/base"), log=False)
    write_run(Path("runs/base/lr3"))
    assert read_curves(Path("runs/base")) == {}
    assert read_curves(Path("runs/base/lr3"))["val/loss"] == [(4, 1.5), (8, 1.75)]
    result = run("compare", "runs/base")
    assert "runs/base has no metrics in a CSV file" in result.err


def test_what_is_no_number_and_a_line_that_is_cut_off(tmp_path):
    write_log(tmp_path, 0, [{"step": 0, "a": "nan"}, {"step": 1, "a": 2}, {"step": 2, "a": "x"}])
    path = tmp_path / "csv" / "version_0" / "metrics.csv"
    path.write_text(path.read_text() + "3")
    assert read_curves(tmp_path) == {"a": [(2, 2.0)]}
    path.write_bytes(b"step,a\n0,\xff")
    with pytest.raises(InputError, match=r"metrics.csv is not a CSV file in UTF-8"):
        read_curves(tmp_path)


def test_only_what_differs_in_meaning_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("DIFFMM_TEST_SECRET", "hush")
    runs = [
        write_run(tmp_path / "a", {"vars.attention": "softmax", "vars.learning_rate": 1.0}),
        write_run(
            tmp_path / "b",
            {
                "model.optimizer.learning_rate": 2e-3,
                "model.optimizer.weight_decay": 0.5,
                "trainer.default_root_dir": "${oc.env:DIFFMM_TEST_SECRET}",
            },
        ),
    ]
    summaries = summarize(runs)
    assert differing(summaries) == [
        "vars.attention",
        "vars.learning_rate",
        "trainer.default_root_dir",
        "model.optimizer.learning_rate",
        "model.optimizer.weight_decay",
    ]
    assert shown(summaries[1], "trainer.default_root_dir") == "${oc.env:DIFFMM_TEST_SECRET}"
    assert short_settings(differing(summaries)) == [
        "attention",
        "vars.learning_rate",
        "default_root_dir",
        "optimizer.learning_rate",
        "weight_decay",
    ]


def test_the_runs_of_a_sweep_keep_its_order(tmp_path):
    for name in ("attention=softmax", "attention=diff_v1", "another"):
        write_run(tmp_path / name, log=False)
    by_name = ["another", "attention=diff_v1", "attention=softmax"]
    assert [run.name for run in find_runs([str(tmp_path)])] == by_name
    records.begin(tmp_path, ["vars.attention"])
    for name in ("attention=softmax", "attention=diff_v1"):
        records.note(tmp_path, name, 0)
    in_order = ["attention=softmax", "attention=diff_v1", "another"]
    assert [run.name for run in find_runs([str(tmp_path)])] == in_order


def test_the_table(run, tmp_path):
    write_run(Path("one folder/a"), {"vars.attention": "softmax"})
    write_run(Path("one folder/b"), {"data.bad_samples.policy": "substitute"})
    write_run(Path("c"), log=False)
    result = run("compare", "one folder", "c")
    assert result.code == 0
    head, _, *rows = (re.split(r"\s{2,}", line) for line in result.out.splitlines())
    measured = ["val/accuracy best", "step", "last", "val/loss best", "step", "last"]
    assert head == ["run", "attention", "policy", *measured, "steps", "parameters", "samples/s"]
    results = ["0.5", "4", "0.25", "1.5", "4", "1.75", "8"]
    assert rows[0] == ["one folder/a", "softmax", "-", *results, rows[0][-2], "100"]
    assert rows[1] == ["one folder/b", "diff_v2", "substitute", *results, rows[1][-2], "100"]
    assert int(rows[0][-2].replace(",", "")) > 100_000
    assert rows[2][:3] == ["c", "diff_v2", "-"]
    assert "diffmm: warning: c has no metrics in a CSV file" in result.err


def table(lines):
    """The cells of a printed table."""
    return [re.split(r"\s{2,}", line.strip()) for line in lines if "─" not in line]


def test_seeds_are_averaged_and_paired(run):
    values = {"softmax": (0.5, 0.7, 0.6), "diff_v1": (0.6, 0.9, 0.6), "diff_v2": (0.3,)}
    for attention, accuracies in values.items():
        for seed, accuracy in enumerate(accuracies):
            changes = {"vars.attention": attention, "vars.seed": seed}
            path = write_run(Path(f"runs/{attention}_{seed}"), changes, log=False)
            rows = [{"step": 3, "val/accuracy": accuracy}, {"step": 7, "val/accuracy": 0.25}]
            write_log(path, 0, rows)
    order = [f"runs/{name}_{seed}" for name in ("softmax", "diff_v1") for seed in range(3)]
    result = run("compare", *order, "runs/diff_v2_0")
    assert result.code == 0, result.err
    _, means, differences = result.out.split("\n\n")
    assert table(means.splitlines()) == [
        ["mean ± std of", "seeds", "val/accuracy best", "val/accuracy last"],
        ["attention=softmax", "3", "0.6 ± 0.1", "0.25 ± 0"],
        ["attention=diff_v1", "3", "0.7 ± 0.17", "0.25 ± 0"],
        ["attention=diff_v2", "1", "0.3", "0.25"],
    ]
    # Differences of 0.1, 0.2 and 0 have a standard deviation of 0.1; t is 4.303 for three of them.
    assert table(differences.splitlines()) == [
        ["minus attention=softmax (± 95 %)", "pairs", "val/accuracy best", "val/accuracy last"],
        ["attention=diff_v1", "3", "+0.1 ± 0.25", "+0 ± 0"],
    ]
    assert run("compare", *order, "--output", "page.html").code == 0
    page = Path("page.html").read_text()
    assert "<th>mean ± std of</th>" in page
    assert "<td>attention=diff_v1</td><td>3</td><td>+0.1 ± 0.25</td>" in page
    assert "λ, mean" not in page
    assert "mean" not in run("compare", "runs/softmax_0", "runs/diff_v1_0").out
    only = run("compare", *order[:3]).out.split("\n\n")
    assert len(only) == 2
    assert table(only[1].splitlines())[1][:2] == ["all runs", "3"]


def test_the_page_has_lambda_over_training(run):
    write_run(Path("a"), log=False)
    rows = [{"step": 4, "lambda/layer_0": 0.2, "lambda/layer_1": 0.4}]
    rows += [{"step": 9, "lambda/layer_0": 0.3, "lambda/layer_1": 0.7}]
    write_log(Path("a"), 0, [*rows, {"step": 9, "val/loss": 1.0}])
    curves = read_curves(Path("a"))
    assert mean_lambda_curve(curves) == [(5, pytest.approx(0.3)), (10, 0.5)]
    assert mean_lambda_curve({"val/loss": [(1, 2.0)]}) == []
    write_run(Path("b"))
    assert run("compare", "a", "b", "--output", "page.html").code == 0
    title = "λ, mean of the layers"
    assert f'aria-label="{title}: 1 ends at 0.500"' in Path("page.html").read_text()


def test_runs_of_different_recipes_have_a_readable_table(run):
    write_run(Path("runs/a"))
    write_run(Path("runs/b"), recipe="text/stdlib_tiny")
    write_run(Path("runs/c"), recipe="audio/sound_events_tiny")
    result = run("compare", "runs", "--csv", "all.csv")
    assert result.code == 0
    head, rule, *rows = result.out.splitlines()
    assert max(map(len, (head, rule, *rows))) < 250
    assert [row.split()[0] for row in rows[:3]] == ["a", "b", "c"]
    (left_out,) = re.findall(r"(\d+) more settings differ: --csv FILE.csv lists all", result.out)
    with open("all.csv", newline="") as file:
        columns = csv.DictReader(file).fieldnames
    assert sum("val/" not in column for column in columns) > int(left_out) > 20


def test_a_last_value_that_is_not_of_the_last_step_says_so(run):
    path = write_run(Path("a"))
    write_log(path, 1, [{"step": 11, "train/loss": 0.5}])
    result = run("compare", "a", "--csv", "a.csv")
    row = re.split(r"\s{2,}", result.out.splitlines()[2])
    assert row[1:8] == ["0.5", "4", "0.25 (step 8)", "1.5", "4", "1.75 (step 8)", "12"]
    with open("a.csv", newline="") as file:
        (values,) = csv.DictReader(file)
    assert values["val/accuracy last step"] == "8"


def test_the_table_as_csv(run):
    write_run(Path("runs/a"), {"vars.seed": 3})
    write_run(Path("runs/b"))
    assert run("compare", "runs", "--csv", "out.csv").code == 0
    with open("out.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["run"] for row in rows] == ["runs/a", "runs/b"]
    assert [row["vars.seed"] for row in rows] == ["3", "0"]
    assert rows[0]["val/accuracy best step"] == "4"
    assert rows[0]["samples_per_second"] == "100.0"


def test_which_values_are_better():
    values = load([find_recipe("image/digits_tiny")])
    assert not is_smaller_better("val/accuracy", values)
    assert is_smaller_better("val/loss", values)
    override(values, "trainer.callbacks", [{"init_args": {"monitor": "val/x", "mode": "min"}}])
    assert is_smaller_better("val/x", values)
    assert not is_smaller_better("val/y", values)


def test_somebody_elses_code_is_not_imported(tmp_path, monkeypatch):
    (tmp_path / "strange.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    path = write_run(tmp_path / "a", {"model.class_path": "strange.Model"})
    (summary,) = summarize([path])
    assert summary.num_parameters is None
    assert summary.best("val/accuracy").value == 0.5


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Runs with two attention variants and checkpoints."""
    from diffmm.cli import main

    folder = tmp_path_factory.mktemp("trained")
    quick = "--trainer.max_steps 2 --trainer.val_check_interval 1 --trainer.log_every_n_steps 1"
    quick += " --trainer.enable_model_summary false --trainer.num_sanity_val_steps 0"
    for attention in ("softmax", "diff_v1"):
        place = ["--run_dir", str(folder / f'<{attention}> & "co"')]
        setting = f"--vars.attention={attention}"
        code = main(["fit", "--config", "image/digits_tiny", *place, setting, *quick.split()])
        assert code == 0
    return folder


def test_the_page_has_table_curves_and_maps_of_all_runs(run, trained):
    result = run("compare", trained, "--output", "page.html")
    assert result.code == 0
    assert result.err == ""
    page = Path("page.html").read_text()
    assert "&lt;softmax&gt; &amp; &quot;co&quot;" in page
    assert "<softmax>" not in page
    assert set(re.findall(r'<text class="title"[^>]*>([^<]*)', page)) == {
        "train/loss",
        "val/loss",
        "val/accuracy",
        "val/accuracy_top5",
        "λ, mean of the layers",
    }
    for number in (1, 2):
        assert page.count(f'class="group {number}"') == 3  # one sample for each of three classes
    assert page.count("data:image/png") > 12
    assert not re.search(r'(src|href)="(?!data:|#)', page)
    assert "<script" not in page


def test_a_page_without_maps_says_why(run, trained):
    write_run(Path("a"), log=True)
    result = run("compare", *trained.iterdir(), "a", "--output", "page.html")
    assert result.code == 0
    assert "the page has no attention maps: a has no checkpoint yet" in result.err
    page = Path("page.html").read_text()
    assert "No attention maps: a has no checkpoint yet" in page
    assert "val/accuracy" in page
    write_run(Path("b"), {"data.source.val_fraction": 0.5})
    result = run("compare", "a", "b", "--output", "page.html")
    assert "no attention maps: the runs have different data" in result.err


def test_maps_of_texts(run, recipe, text_changes):
    path = recipe("text/stdlib_tiny", **text_changes)
    assert run("fit", "--config", path, "--name", "a").code == 0
    result = run("compare", "runs/recipe/a", "--output", "page.html")
    assert (result.code, result.err) == (0, "")
    assert 'class="sample text"' in Path("page.html").read_text()


def test_cells_are_shortened_unless_different_ones_become_equal():
    end = "learning_rate=0.002, accelerator=cpu, steps=20"
    names = [f"attention={attention}, {end}" for attention in ("softmax", "diff_v2")]
    assert text_table(["group"], [[name] for name in names]).splitlines()[2:] == names
    (line,) = text_table(["group"], [names[:1]]).splitlines()[2:]
    assert line == f"…{names[0][-39:]}"


def test_what_cannot_be_compared_or_written(run, tmp_path):
    assert run("compare", "nowhere").mistakes == [
        "nowhere is not a run directory: there is no nowhere/config.yaml"
    ]
    write_run(Path("a"))
    for option, message in (
        (("--output", "a.pdf"), "a.pdf must end in .html"),
        (("--output", "no/a.html"), "there is no folder no to write a.html to"),
        (("--csv", "a.html"), "a.html must end in .csv"),
    ):
        assert run("compare", "a", *option).mistakes == [message]
    assert find_runs(["a", "./a/", "a"]) == [Path("a")]
