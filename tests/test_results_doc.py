"""The figures in docs/results.md and the README are those of the runs in docs/results."""

import csv
import re
import statistics
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest

from benchmarks.quality.cells import read_cells
from benchmarks.quality.engine import Row, read
from benchmarks.quality.plan import Settings, steps_in_time
from benchmarks.quality.table import Line, lines
from benchmarks.quality.tasks import TASKS
from benchmarks.upcycling import best_factor, rows_of
from diffmm.runs.seeds import half_width

ROOT = Path(__file__).parents[1]
DOC = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
README = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
ROWS = read_cells(ROOT / "docs" / "results")
LONGER, LONGER_STEPS = "text, 80 M tokens", 1221
LONGER_ROWS = read_cells(ROOT / "docs" / "results" / "longer")

SECTIONS = {
    "Text": "text",
    "Text with 80 M tokens": LONGER,
    "Needles in a text": "needles",
    "Associative recall": "recall",
    "Many-shot classification": "many_shot",
    "Fashion-MNIST": "fashion_mnist",
    "Letters": "letters",
    "Digits": "digits",
    "Sound events": "sound_events",
    "Spoken languages": "speech",
    "Transcripts": "transcripts",
    "Image-text retrieval": "shapes",
    "Captions": "captions",
    "Emoji": "emoji",
    "Separate towers": "shapes_and_sounds",
    "Two of four blocks shared": "shapes_and_sounds_partly_shared",
    "One backbone": "shapes_and_sounds_shared",
}
UPCYCLED = {
    "Upcycled on text": "text",
    "Upcycled on Fashion-MNIST": "fashion_mnist",
    "Upcycled on digits": "digits",
    "Upcycled on spoken languages": "speech",
}
UPCYCLING_ROWS = read(ROOT / "docs" / "results" / "upcycling.jsonl")
LABELS = {
    "softmax, exclusive": "softmax_exclusive",
    "softmax with a gate": "softmax_gate",
    "softmax, one key head": "softmax_fewer_keys",
    "clipped softmax": "clipped_softmax",
    "cosFormer": "cosformer",
    "strided sparse": "strided_sparse",
    "routed": "routed",
    "diff_grouped with a gate": "diff_grouped_gate",
    "v1, exclusive": "v1_exclusive",
    "v2, exclusive": "v2_exclusive",
    "v1, shared queries": "v1_shared_q",
    "v1, shared keys": "v1_shared_k",
    "v1, constant lambda": "v1_constant_lambda",
    "v1, no headwise norm": "v1_no_norm",
    "v1, addition": "v1_add",
}
DIFFERENTIAL = {"v1": "diff_v1", "v2": "diff_v2", "grouped": "diff_grouped"}


def table_below(heading: str) -> list[dict[str, str]]:
    """The rows of the first table below a heading, by column."""
    (section,) = re.findall(rf"^##+ {re.escape(heading)}\n(.*?)(?=^##|\Z)", DOC, re.M | re.S)
    found = re.search(r"(?:^\|.*\n)+", section, re.M)
    assert found, heading
    header, _, *rows = (
        [cell.strip() for cell in line.strip("|").split("|")] for line in found[0].splitlines()
    )
    return [dict(zip(header, row, strict=True)) for row in rows]


def variant_of(label: str) -> str:
    return (
        "softmax_half_heads" if re.match(r"softmax, \d heads", label) else LABELS.get(label, label)
    )


def runs_of(task: str) -> list[Row]:
    return LONGER_ROWS if task == LONGER else [row for row in ROWS if row["task"] == task]


@cache
def lines_of(
    task: str, num_seeds: int = 4, budget: str = "tokens", tuning_seeds: tuple[int, ...] = (0,)
) -> dict[str, Line]:
    """The lines of a task, by variant."""
    settings = Settings(
        range(num_seeds),
        tuning_seeds,
        compiled=task in ("text", LONGER),
        steps=LONGER_STEPS if task == LONGER else None,
    )
    found = lines(runs_of(task), settings)
    return {line.variant: line for line in found if line.budget == budget}


def as_shown(mean: float, half: float | None, text: str, *, is_clear: bool) -> str:
    """A difference with as many decimals as `text` has; bold if clear."""
    decimals = len(re.sub(r"\*", "", text).split(" ±")[0].partition(".")[2])
    shown = f"{mean:+.{decimals}f} ± {half:.{decimals}f}"
    return f"**{shown}**" if is_clear else shown


@pytest.mark.parametrize("heading", SECTIONS)
def test_tables_are_those_of_the_runs(heading: str) -> None:
    task = SECTIONS[heading]
    rows = table_below(heading)
    assert [row["attention"] for row in rows][:4] == ["softmax", *DIFFERENTIAL.values()]
    (seeds,) = (name for name in rows[0] if name.startswith("seeds"))
    num_seeds = int(seeds[-1]) + 1
    for row in rows:
        line = lines_of(task, num_seeds)[variant_of(row["attention"])]
        assert float(row["rate"]) == line.rate
        decimals = len(row["mean"].partition(".")[2])
        assert row[seeds] == " ".join(f"{v:.{decimals}f}" for v in line.values.values())
        assert len(line.values) == num_seeds
        assert row["mean"] == f"{line.mean:.{decimals}f}"
        if "training time" in row:
            assert row["training time"] == f"{line.seconds:.1f} s"
        for column, part in (("pictures", "image_to_text"), ("sounds", "audio_to_text")):
            if column in row:
                assert row[column] == f"{line.parts[f'{part}_recall_1']:.1f}"
        if row["attention"] == "softmax":
            assert row["difference"] == ""
            continue
        assert line.mean_difference is not None
        is_clear = line.verdict in ("better", "worse")
        text = row["difference"]
        assert text == as_shown(line.mean_difference, line.half_width, text, is_clear=is_clear)


def test_the_summary_has_a_line_per_table() -> None:
    summary = table_below("Should I use it?")
    headings = [re.findall(r"\[(.*?)\]\(#(.*?)\)", row["task"])[0] for row in summary]
    tables = [f"{name[0].upper()}{name[1:]}" for name, _ in headings]
    assert tables == [*SECTIONS, *UPCYCLED]
    assert all(anchor == name.lower().replace(" ", "-") for name, anchor in headings)
    for row, heading in zip(summary, tables, strict=True):
        below = {part["attention"]: part for part in table_below(heading)}
        (column,) = (name for name in below["softmax"] if "seeds" in name)
        assert int(row["seeds"]) == int(column[-1]) + 1
        shown = {name: below[variant]["difference"] for name, variant in DIFFERENTIAL.items()}
        assert {name: row[name] for name in DIFFERENTIAL} == shown
        exclusive = below.get("softmax, exclusive", {"difference": ""})
        assert row["softmax, exclusive"] == exclusive["difference"]
        assert row["clear"] == in_words(shown, lower="lower is better" in row["measure"])


def in_words(shown: dict[str, str], *, lower: bool) -> str:
    """Which differences are clear, and in which direction: "v1 better, grouped worse"."""
    found = []
    for word, sign in (("better", "-" if lower else "+"), ("worse", "+" if lower else "-")):
        clear = [name for name, text in shown.items() if text.startswith(f"**{sign}")]
        if clear:
            found.append(f"{'all three' if len(clear) == 3 else ', '.join(clear)} {word}")
    return "; ".join(found) or "none"


@pytest.mark.parametrize("heading", UPCYCLED)
def test_tables_of_upcycled_models_are_those_of_the_runs(heading: str) -> None:
    task = UPCYCLED[heading]
    spec = TASKS[task]
    values: dict[str, list[float]] = {}

    def shown(value: float) -> str:
        return f"{value:.{spec.num_shown}f}"

    rows = table_below(heading)
    (column,) = (name for name in rows[0] if "seeds" in name)
    seeds = range(int(column.removeprefix("after, seeds 0 to ")) + 1)
    for row in rows:
        name = row["attention"]
        factor = best_factor(UPCYCLING_ROWS, task, name, 0)
        own = {
            run["seed"]: run
            for seed in seeds
            for run in rows_of(UPCYCLING_ROWS, task, name, seed)
            if run["factor"] == factor
        }
        values[name] = [spec.unit * own[seed]["metric"] for seed in seeds]
        assert row["parameters"] == f"{own[0]['parameters']:,}"
        before = statistics.fmean(spec.unit * own[seed]["before"] for seed in seeds)
        assert row["before"] == shown(before)
        assert row[column] == " ".join(shown(value) for value in values[name])
        assert row["mean"] == shown(statistics.fmean(values[name]))
        if name == "softmax":
            continue
        gaps = [a - b for a, b in zip(values[name], values["softmax"], strict=True)]
        half = half_width(gaps)
        assert half is not None
        mean = statistics.fmean(gaps)
        is_clear = abs(mean) > half
        assert row["difference"] == as_shown(mean, half, row["difference"], is_clear=is_clear)
        assert is_clear == (task == "text" or (task, name) == ("fashion_mnist", "diff_grouped"))
        is_same = task == "digits" and name in ("diff_grouped", "dex")
        assert (gaps == [0.0] * len(gaps)) == is_same
        assert is_same or mean * spec.sign > 0 or task == "speech"


def test_the_table_of_cancellation_is_that_of_the_runs() -> None:
    with (ROOT / "docs" / "results" / "cancellation.csv").open(encoding="utf-8") as file:
        runs = list(csv.DictReader(file))

    def values(blocks: str, part: str, column: str) -> list[float]:
        own = [row for row in runs if (row["shared_blocks"], row["part"]) == (blocks, part)]
        assert [row["seed"] for row in own] == ["0", "1", "2"]
        return [float(row[column]) for row in own]

    least_on_sounds = []
    for row in table_below("Does what the second map cancels depend on the modality?"):
        blocks = row["shared blocks"]
        for part, recall, cancelled in (
            ("image", "recall, images", "cancelled, images"),
            ("text", None, "texts"),
            ("audio", "recall, sounds", "sounds"),
        ):
            mean = statistics.fmean(values(blocks, part, "cancelled"))
            assert row[cancelled] == f"{mean:.2f}"
            if recall:
                mean = 100 * statistics.fmean(values(blocks, part, "recall_1"))
                assert row[recall] == f"{mean:.1f}"
        # The order of the modalities, as the text says.
        images, texts, sounds = (
            values(blocks, part, "cancelled") for part in ("image", "text", "audio")
        )
        found = list(zip(images, texts, sounds, strict=True))
        assert all(image > max(text, sound) for image, text, sound in found)
        least_on_sounds += [sound < text for _, text, sound in found]
        for name, column in (
            ("between modalities, seeds 0 to 2", "variance by modality"),
            ("heads of a modality, seeds 0 to 2", "heads of a modality"),
        ):
            shared = [] if blocks == "0" else values(blocks, "shared layers", column)
            assert row[name] == " ".join(f"{value:.2f}" for value in shared)
    assert (sum(least_on_sounds), len(least_on_sounds)) == (8, 9)


def test_comparisons_of_text_models_with_each_other() -> None:
    found = lines_of("text")
    text = " ".join(DOC.split())

    def gap(one: str, other: str) -> tuple[str, str, bool]:
        """Mean, half width, and whether `one` is better with every seed."""
        gaps = [found[one].values[seed] - found[other].values[seed] for seed in range(4)]
        width = half_width(gaps)
        assert width is not None
        return f"{statistics.fmean(gaps):.3f}", f"{width:.3f}", max(gaps) < 0

    mean, half, _ = gap("softmax_exclusive", "diff_v2")
    assert f"better than v2 by {mean.strip('-')} ± {half}" in text
    assert gap("softmax_exclusive", "diff_v1")[2]
    assert gap("softmax_exclusive", "diff_grouped")[2]
    wide = {name: gap(name, "softmax_half_heads") for name in DIFFERENTIAL.values()}
    assert [wide[name][2] for name in DIFFERENTIAL.values()] == [False, True, True]
    for name, words in (
        ("diff_v2", "v2 is still better with every seed"),
        ("diff_v1", "while v1"),
        ("diff_grouped", "and grouped"),
    ):
        assert f"{words} ({wide[name][0]} ± {wide[name][1]})" in text
    smallest = max(
        gap for name in DIFFERENTIAL.values() for gap in found[name].differences.values()
    )
    assert f"with every seed, by {-smallest:.2f} nats or more" in text


def test_the_gains_on_text_become_smaller() -> None:
    (section,) = re.findall(r"^### Text with 80 M tokens\n(.*?)^### ", DOC, re.M | re.S)
    (header, _, *shown) = re.findall(r"^\|.*\n", section.split("training:\n")[1], re.M)
    runs = {
        (row["variant"], row["seed"]): row
        for row in LONGER_ROWS
        if row["rate"] == lines_of(LONGER)[row["variant"]].rate
    }
    steps = [point["step"] for point in runs["softmax", 0]["points"]]
    assert header.split(" | ")[1:-1] == [f"{step:,}" for step in steps]

    def gap(variant: str, value: Callable[[Row], float]) -> float:
        return statistics.fmean(
            value(runs[variant, seed]) - value(runs["softmax", seed]) for seed in range(4)
        )

    for variant, text in zip(DIFFERENTIAL.values(), shown, strict=True):
        gaps = [gap(variant, lambda run, i=i: run["points"][i]["loss"]) for i in range(len(steps))]
        trained = gap(variant, lambda run: run["train_loss"])
        cells = " | ".join(f"{value:.3f}" for value in [*gaps, trained])
        assert text == f"| {variant} | {cells} |\n"
        assert gaps[2:] == sorted(gaps[2:])
        assert (trained < gaps[-1] - 0.03) == (variant != "diff_v1")
    before, after = lines_of("text"), lines_of(LONGER)
    left = [
        (after[name].mean_difference or 0) / (before[name].mean_difference or 1)
        for name in DIFFERENTIAL.values()
    ]
    assert left == pytest.approx([1 / 2, 1 / 3, 1 / 3], abs=0.05)
    in_time = {
        name: steps_in_time(LONGER_ROWS, Settings(steps=LONGER_STEPS, compiled=True), "text", name)
        for name in DIFFERENTIAL.values()
    }
    assert in_time["diff_v1"] == LONGER_STEPS
    words = (
        f"v2 would complete {in_time['diff_v2']:,} steps and grouped {in_time['diff_grouped']:,}"
    )
    assert words in " ".join(section.split())
    shared = {(row["variant"], row["seed"]) for row in LONGER_ROWS if not row["timed"]}
    every = {("softmax", seed) for seed in (2, 3)}
    every |= {(name, seed) for name in DIFFERENTIAL.values() for seed in (2, 3)}
    assert shared == every | {("diff_v2", 1), ("diff_grouped", 1)}


def test_what_the_alternatives_answer_at_the_end() -> None:
    text = " ".join(DOC.split())

    def answered(variant: str) -> list[str]:
        rate = lines_of("needles")[variant].rate
        own = [r for r in runs_of("needles") if (r["variant"], r["rate"]) == (variant, rate)]
        assert len(own) == 4
        return sorted({f"{100 * row['accuracy']:.0f}" for row in own}, key=int)

    routed, cosformer = answered("routed"), answered("cosformer")
    assert answered("strided_sparse") == ["96"]
    assert f"{routed[0]} to {routed[-1]} % and {cosformer[0]} to {cosformer[-1]} %" in text
    clipped = lines_of("needles")["clipped_softmax"]
    assert min(clipped.differences.values()) > 0


def gaps_to(one: Line, other: Line) -> str:
    """The mean and the interval of a difference without its sign, as the text has it."""
    gaps = [one.values[seed] - other.values[seed] for seed in range(4)]
    width = half_width(gaps)
    assert width is not None
    return f"{abs(statistics.fmean(gaps)):.1f} ± {width:.1f}"


def test_comparisons_on_sound_events() -> None:
    found = lines_of("sound_events")
    (section,) = re.findall(r"^### Sound events\n(.*?)^### ", DOC, re.M | re.S)
    text = " ".join(section.split("\n\n**All three")[1].split())
    pairs = [(name, "softmax_half_heads") for name in DIFFERENTIAL.values()]
    pairs += [(f"v1_{name}", "diff_v1") for name in ("shared_k", "add", "shared_q")]
    pairs += [(f"v1_{name}", "diff_v1") for name in ("constant_lambda", "no_norm", "exclusive")]
    pairs += [("v1_exclusive", "softmax_exclusive"), ("v2_exclusive", "diff_v2")]
    pairs += [("v2_exclusive", "softmax_exclusive")]
    shown = [gaps_to(found[one], found[other]) for one, other in pairs]
    assert re.findall(r"\d+\.\d ± \d+\.\d", text) == shown
    for one, other in pairs[:3]:
        assert all(found[one].values[seed] > found[other].values[seed] for seed in range(4))
    # Only shared keys are clearly worse than v1.
    clear = [float(gap.split()[0]) > float(gap.split()[2]) for gap in shown[3:8]]
    assert clear == [True, False, False, False, False]
    kept = [name for name in found if name.startswith("v1_") and found[name].verdict == "better"]
    assert sorted(kept) == ["v1_constant_lambda", "v1_exclusive", "v1_no_norm"]


def test_recall_tuned_with_two_seeds() -> None:
    text = " ".join(DOC.split())
    found = lines_of("recall", tuning_seeds=(0, 1))
    softmax, v2 = found["softmax"], found["diff_v2"]
    assert (softmax.rate, v2.rate) == (2e-3, 2e-3)
    assert min(*softmax.values.values(), *v2.values.values()) > 99
    gap = as_shown(v2.mean_difference or 0, v2.half_width, "0.00", is_clear=False)
    assert f"v2 has {v2.mean:.2f} and softmax {softmax.mean:.2f}, a difference of {gap}" in text


def test_what_the_runs_took() -> None:
    shown = table_below("What the runs took")
    assert [row["task"] for row in shown] == list(SECTIONS)
    for row in shown:
        own = runs_of(SECTIONS[row["task"]])
        assert row["runs"] == str(len(own))
        assert row["hours"] == f"{sum(run['wall_seconds'] for run in own) / 3600:.1f}"
        (device,) = {run["device"].removeprefix("NVIDIA ").split(",")[0] for run in own}
        assert row["device"] == device


def test_limits() -> None:
    text = " ".join(DOC.split())
    summary = table_below("Should I use it?")
    assert f"these {len(summary) * len(DIFFERENTIAL)} intervals" in text
    assert sum(row["v2"].startswith("**") for row in summary) == 5
    assert {row["clear"] for row in summary if "worse" in row["clear"]} == {"grouped worse"}
    assert "clearly better in five lines of the table and clearly worse in none" in text

    def is_clear(task: str, variant: str) -> bool:
        """Without seed 0, which chooses the rate."""
        gaps = [gap for seed, gap in lines_of(task)[variant].differences.items() if seed > 0]
        width = half_width(gaps)
        assert width is not None
        return abs(statistics.fmean(gaps)) > width

    for task in ("text", "sound_events"):
        assert all(is_clear(task, variant) for variant in DIFFERENTIAL.values())
    assert is_clear("recall", "diff_grouped")
    for task in ("fashion_mnist", "many_shot"):
        assert not any(is_clear(task, variant) for variant in DIFFERENTIAL.values())
    seconds = {name: line.seconds for name, line in lines_of("text").items()}
    longer = [
        f"{100 * (seconds[name] / seconds['softmax'] - 1):.0f} %"
        for name in ("softmax_exclusive", "diff_v1", "diff_v2")
    ]
    assert f"{longer[0]} longer than with softmax if it is exclusive" in text
    assert f"{longer[1]} with v1, and {longer[2]} with v2" in text


def test_equal_time() -> None:
    in_time = lines_of("text", budget="time")
    v1 = lines_of("text")["diff_v1"]
    assert in_time["diff_v1"] == replace(v1, budget="time")
    v2 = in_time["diff_v2"]
    assert list(v2.values) == [0]
    assert v2.mean_difference is not None
    assert f"v2 completes {v2.steps} steps" in DOC
    text = " ".join(DOC.split())
    assert f"a loss of {v2.mean:.3f}, which is {-v2.mean_difference:.3f} below softmax" in text


def test_the_readme_says_what_the_tables_say() -> None:
    text = {name: line.mean_difference for name, line in lines_of("text").items()}
    v1, v2, grouped, exclusive = (
        f"{-(text[name] or 0):.2f}"
        for name in ("diff_v1", "diff_v2", "diff_grouped", "softmax_exclusive")
    )
    assert f"end {v1} (v1), {v2} (v2) and {grouped} nats (grouped) below softmax" in README
    assert f"ends {exclusive} nats below softmax after 39 M tokens of text" in README
    longer = {name: line.mean_difference for name, line in lines_of(LONGER).items()}
    v1, v2, grouped = (f"{-(longer[name] or 0):.2f}" for name in DIFFERENTIAL.values())
    assert f"After twice the tokens, {v1}, {v2} and {grouped} nats are left." in README
    sounds = {name: line.mean_difference or 0 for name, line in lines_of("sound_events").items()}
    three = [sounds[name] for name in DIFFERENTIAL.values()]
    assert f"{min(three):.0f} to {max(three):.0f} points better than softmax" in README
    assert f"is {sounds['softmax_exclusive']:.0f} points better on sound events" in README
    gaps = [
        float(row["difference"].strip("*").split()[0])
        for row in table_below("Upcycled on text")
        if row["difference"]
    ]
    assert f"ends {-max(gaps):.2f} to {-min(gaps):.2f} nats lower" in README
    whole = [lines_of("text")[variant].mean_difference or 0 for variant in DIFFERENTIAL.values()]
    shares = [100 * gap / of for gap, of in zip(gaps, whole, strict=True)]
    assert f"The differences are {min(shares):.0f} to {max(shares):.0f} % of those" in DOC


def test_no_runs_of_other_texts_are_added_to_those_whose_data_were_not_kept() -> None:
    assert {row["data"] for row in ROWS if row["task"] == "text"} == {"not kept"}
