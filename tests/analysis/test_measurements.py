"""All measurements of a model, and their sections, also where some cannot be made."""

import math

import pytest
import torch
from torch import nn

import diffmm
from diffmm.analysis.analysis_page import AnalysisPage, render_analysis
from diffmm.analysis.attention_scores import attention_scores
from diffmm.analysis.batches import evaluate
from diffmm.analysis.concentration import concentration
from diffmm.analysis.measurements import Measurements, measure, spans_of
from diffmm.analysis.sections import Analyzed, figures_of, sections_of, tables_of
from diffmm.batch import IGNORE_INDEX
from diffmm.ops import AttentionMask

CAUSAL = AttentionMask(causal=True)


def text_model(attention, **settings):
    settings = {"dim": 32, "depth": 2, "num_heads": 4, "rope": "1d", **settings}
    backbone = diffmm.BackboneConfig(attention=attention, **settings)
    return diffmm.TextModel(diffmm.models.TextConfig(40, 16, backbone)).eval()


def needle_batch():
    tokens = torch.randint(30, (3, 10))
    targets = torch.full_like(tokens, IGNORE_INDEX)
    targets[:2, -2:] = 7
    evidence = torch.zeros(3, 10, dtype=torch.bool)
    evidence[:, 3:5] = True
    return {"tokens": tokens, "targets": targets, "evidence": evidence}


def summaries(sections):
    return {
        section.title: section.summary and [list(row) for row in section.summary.rows]
        for section in sections
    }


def test_measurements_are_those_of_the_functions():
    model, batch = text_model("diff_v1"), needle_batch()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    found = measure(model, [batch], spans=spans_of, bits=(8, 4))
    assert not found.problems
    tokens = batch["tokens"]
    scores = attention_scores(model, tokens, spans=spans_of(batch))
    assert found.scores.answer == scores.answer
    expected = concentration(model, tokens, mask=CAUSAL)[1].maps["A2"]["hoyer"]
    assert torch.equal(found.concentration[1].maps["A2"]["hoyer"], expected)
    assert found.effects[0].metrics == evaluate(model, [batch])
    assert len(found.effects) == 7
    assert [layer.name for layer in found.lambdas] == [x.name for x in found.map_errors]
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in model.modules())


def test_spans_of_a_batch_of_retrieval():
    batch = needle_batch()
    batch["tokens"][:, 0] = 39
    spans = spans_of(batch, {39, 38})
    assert spans.queries.sum(dim=1).tolist() == [2, 2, 0]
    assert spans.noise[0].nonzero().squeeze(1).tolist() == [1, 2, 5, 6, 7, 8, 9]
    assert spans_of({"tokens": batch["tokens"]}) is None
    assert spans_of({**batch, "evidence": torch.zeros(3, 10, dtype=torch.bool)}) is None


def test_sections_of_several_runs():
    torch.manual_seed(1)
    batch = needle_batch()
    curves = {0: [(1, 0.2), (5, 0.3)]}
    runs = [
        Analyzed(name, measure(text_model(name), [batch], spans=spans_of), curves)
        for name in ("diff_v1", "diff_v2")
    ]
    sections = sections_of(runs)
    rows = summaries(sections)
    assert [row[:2] for row in rows["Concentration"]] == [
        [name, kind] for name in ("diff_v1", "diff_v2") for kind in ("A1", "A2", "A1 - lam A2")
    ]
    scores = runs[1].measured.scores
    assert rows["Attention scores"][1] == [
        "diff_v2", scores.answer, scores.noise, scores.signal_to_noise, 0.0, 0.0,
    ]  # fmt: skip
    logits = runs[0].measured.outliers.logits
    assert rows["Outliers"][0][2] == max(float(layer.top[0]) for layer in logits.values())
    assert [row[:3] for row in rows["Quantization"]][:2] == [
        ["diff_v1", "nothing", "-"],
        ["diff_v1", "attention logits", 8],
    ]
    again = sections_of([*runs, Analyzed("more", runs[1].measured)])
    (gradients,) = (each for each in again if each.title == "Gradients at the start")
    assert {row[0] for row in gradients.summary.rows} == {"all 3 runs"}
    # Both models have the same twins.
    assert {row[0] for row in rows["Gradients at the start"]} == {"diff_v1, diff_v2"}
    names = [figure.name for figure in figures_of(sections)]
    assert len(names) == len(set(names)) > 10
    tables = dict(tables_of(sections))
    assert len(tables["scores_by_head"]) == 1 + 2 * 2 + 4 * 2  # heads of both layers
    assert tables["lambda_over_training"][1:3] == [["diff_v1", 0, 1, 0.2], ["diff_v1", 0, 5, 0.3]]
    assert {f"figure_{name}" for name in names} < tables.keys()
    scales = {f.limits for f in figures_of(sections) if f.name.startswith("scores_of_run")}
    answers = [row[3] for row in tables["scores_by_head"][1:]]
    assert scales == {(min(answers), max(answers))}
    nothing, at_8_bits = (effect.metrics["loss"] for effect in runs[0].measured.effects[:2])
    label, _, change = min(tables["figure_quantization_loss"][1:], key=lambda row: -row[1])
    assert (label, change) == ("diff_v1: attention logits", at_8_bits - nothing)
    assert not any(section.problems for section in sections)


def test_scores_of_each_query_are_a_table_and_a_figure():
    measured = measure(text_model("diff_v1"), [needle_batch()], spans=spans_of)
    scores, *_ = sections_of([Analyzed("a", measured)])
    tables = dict(tables_of([scores]))
    assert tables["scores_by_query"] == [
        ["run", "query", "share to answer", "share to noise"],
        *(["a", i, q.answer, q.noise] for i, q in enumerate(measured.scores.queries)),
    ]
    assert len(tables["scores_by_query"]) == 3  # two queries
    assert [row[1:] for row in tables["figure_scores_by_query"][1:]] == [
        [i, q.answer] for i, q in enumerate(measured.scores.queries)
    ]


def test_where_lambda_is_one_scores_say_so_and_the_rest_appears():
    model = text_model("diff_v1", lambda_init=1.0)
    for name, parameter in model.named_parameters():
        if "lambda_" in name:
            nn.init.zeros_(parameter)
    found = measure(model, [needle_batch()], spans=spans_of)
    scores, concentrated, *_ = sections_of([Analyzed("a", found)])
    assert scores.problems == [
        "a: lambda is within 0.05 of 1 at every query, where scores divided by 1 - lambda are not "
        "defined"
    ]
    assert math.isnan(scores.summary.rows[0][1])
    assert not [figure for figure in scores.figures if figure.name == "scores_of_run_1"]
    assert concentrated.summary is not None
    page = AnalysisPage(
        "Title", "", ["run"], [["a"]], ["b: lost"], [scores], None, [], "no maps here", "facts"
    )
    text = render_analysis(page)
    assert scores.problems[0] in text
    assert "b: lost" in text
    assert "no maps here" in text


def test_what_fails_does_not_prevent_the_rest():
    model = text_model("softmax")
    found = measure(model, [{"tokens": torch.randint(40, (1, 5))}], spans=spans_of)
    assert found.problems["quantization"] == "the loss of a text model needs a batch with targets"
    assert found.problems["gradients"] == found.problems["quantization"]
    assert "do not say which tokens hold an answer" in found.problems["scores"]
    assert "--text TEXT --span A:B" in found.problems["scores"]
    assert len(found.concentration) == 2
    nothing = measure(nn.Linear(2, 2), [{"x": torch.zeros(1, 2)}], spans=spans_of)
    assert "Linear has no description" in nothing.problems["gradients"]
    assert nothing.problems["maps"] == "Linear contains no attention layer of diffmm"
    sections = sections_of([Analyzed("a", found), Analyzed("b", nothing), Analyzed("c", found)])
    scores, maps, lambdas, *_ = sections
    assert scores.problems[0].startswith("a, c: ")
    assert len(scores.problems) == 1  # another model has no answers
    assert maps.problems == ["b: Linear contains no attention layer of diffmm"]
    assert {row[0] for row in maps.summary.rows} == {"a", "c"}
    assert lambdas.problems[0] == "a: its attention has no lambda"
    empty = sections_of([Analyzed("d", Measurements())])
    assert not figures_of(empty)
    assert not any(section.summary for section in empty)


@pytest.mark.parametrize("recipe", ["image/digits_mae_tiny", "audio/sound_events_tiny"])
def test_other_modalities(recipe):
    model = diffmm.create_model(recipe, attention="diff_v2")
    if "audio" in recipe:
        batch = {"waveforms": torch.rand(2, 8000), "labels": torch.tensor([0, 1])}
    else:
        batch = {"images": torch.rand(2, 1, 8, 8)}
    state = torch.random.get_rng_state()
    found = measure(model, [batch], spans=spans_of, bits=(8,))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not found.problems
    assert "Attention scores" not in {
        section.title for section in sections_of([Analyzed("a", found)])
    }
    assert ("accuracy" in found.effects[0].metrics) == ("audio" in recipe)
