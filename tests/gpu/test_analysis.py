"""Measurements on a GPU equal those on a CPU, and long sequences fit."""

import copy

import pytest
import torch

import diffmm
from diffmm.analysis.attention_scores import Spans, attention_scores
from diffmm.analysis.concentration import concentration
from diffmm.analysis.measurements import measure, spans_of

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("attention", ["softmax", "diff_v1", "diff_v2"])
def test_measurements_equal_those_on_a_cpu(attention):
    model = diffmm.create_model("text/stdlib_tiny", attention=attention).eval()
    tokens = torch.randint(256, (2, 33))
    evidence = torch.zeros(2, 32, dtype=torch.bool)
    evidence[:, 4:7] = True
    batch = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "evidence": evidence}
    on_gpu = {name: tensor.cuda() for name, tensor in batch.items()}
    state = torch.cuda.get_rng_state()
    found = measure(copy.deepcopy(model).cuda(), [on_gpu], spans=spans_of)
    assert torch.equal(torch.cuda.get_rng_state(), state)
    expected = measure(model, [batch], spans=spans_of)
    assert not found.problems
    assert found.scores.answer == pytest.approx(expected.scores.answer, rel=1e-2)
    for one, other in zip(found.concentration, expected.concentration, strict=True):
        for name, measures in one.maps.items():
            for measure_name, values in measures.items():
                torch.testing.assert_close(
                    values, other.maps[name][measure_name], rtol=1e-2, atol=1e-3
                )
    for one, other in zip(found.effects, expected.effects, strict=True):
        assert one.metrics["loss"] == pytest.approx(other.metrics["loss"], rel=1e-2)


def test_65536_tokens_fit():
    """Each map of the layer would take 17 GB."""
    length = 2**16
    backbone = diffmm.BackboneConfig(dim=64, depth=1, num_heads=2, attention="diff_v1", rope="1d")
    model = diffmm.TextModel(diffmm.models.TextConfig(256, length, backbone)).cuda().eval()
    tokens = torch.randint(256, (1, length), device="cuda")
    evidence, queries = torch.zeros(2, 1, length, dtype=torch.bool)
    evidence[:, 1000:1010] = queries[:, -20:] = True
    torch.cuda.reset_peak_memory_stats()
    spans = Spans(evidence, queries)
    scores = attention_scores(model, tokens, spans=spans, max_bytes=2**30)
    assert scores.answer + scores.noise == pytest.approx(1.0, abs=1e-4)
    (layer,) = concentration(model, tokens, max_bytes=2**30)
    assert 0.0 < float(layer.maps["A1"]["entropy"].mean()) < 11.1  # log 65,536
    assert torch.cuda.max_memory_allocated() < 3 * 2**30
