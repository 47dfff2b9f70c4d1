"""Context-aware decoding: its equation, and answers that it changes."""

import pytest
import torch
from torch import nn

from diffmm.analysis.context_aware import context_aware_accuracy, context_aware_logits
from diffmm.analysis.contexts import ContextBatch
from diffmm.batch import IGNORE_INDEX
from diffmm.layers.attention import ATTENTIONS
from diffmm.models import BackboneConfig, TextConfig, TextModel


def text_model(attention="softmax", **settings):
    own = {"num_kv_heads": 2, "signal_per_noise": 2} if attention == "diff_grouped" else {}
    backbone = BackboneConfig(32, 2, 4, rope="1d", attention=attention, **own)
    return TextModel(TextConfig(40, 16, backbone, **settings)).eval()


def batch_of(spans, num_tokens=9):
    """Random tokens, an answer after the last one, and a context with these ends per sample."""
    tokens = torch.randint(40, (len(spans), num_tokens))
    targets = torch.full_like(tokens, IGNORE_INDEX)
    targets[:, -1] = 7
    place = torch.arange(num_tokens)
    context = torch.stack([(place >= start) & (place < end) for start, end in spans])
    return ContextBatch(tokens, targets, context)


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_logits_are_those_with_and_without_the_context(attention):
    """Hidden tokens are as if they were removed, also where something precedes them."""
    model, batch = text_model(attention), batch_of([(0, 5), (2, 6)])
    found = context_aware_logits(model, batch, strength=0.5)
    with torch.no_grad():
        for sample in range(2):
            tokens, rest = batch.tokens[sample, None], ~batch.context[sample]
            removed = model(tokens[:, rest])[0]
            expected = 1.5 * model(tokens)[0, rest] - 0.5 * removed
            torch.testing.assert_close(found[sample, rest], expected, atol=1e-5, rtol=1e-4)
        plain = context_aware_logits(model, batch, strength=0.0)
        torch.testing.assert_close(plain, model(batch.tokens))
    assert not torch.allclose(found, plain, atol=1e-3)


class Prior(nn.Module):
    """Prefers token 3 by what it has learned, less so with a context that says token 7."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.config = TextConfig(40, 16, BackboneConfig(32, 1, 4, rope="1d"))

    def forward(self, tokens, mask=None, positions=None):
        logits = torch.zeros(*tokens.shape, 40)
        logits[..., 3] = 2.0
        if mask is None:
            logits[..., 7] = 1.5
        return logits


@pytest.mark.parametrize(("strength", "accuracy"), [(0.0, 0.0), (0.3, 0.0), (0.4, 1.0)])
def test_an_answer_of_the_context_prevails_over_the_prior(strength, accuracy):
    """1.5 (1 + a) exceeds 2 from a = 1/3 on."""
    batches = [batch_of([(0, 5), (1, 3)]), batch_of([(0, 2)])]
    assert context_aware_accuracy(Prior(), batches, strength=strength) == accuracy


def test_training_mode_is_restored():
    model = text_model().train()
    context_aware_logits(model, batch_of([(0, 5)]), strength=1.0)
    assert model.training


def test_refusals():
    batch = batch_of([(0, 5)])
    with pytest.raises(ValueError, match="needs a causal text model, got causal=False"):
        context_aware_logits(text_model(causal=False), batch, strength=0.5)
    for strength in (-0.5, float("inf"), float("nan")):
        with pytest.raises(ValueError, match=f"at least 0 and finite, got {strength}"):
            context_aware_logits(text_model(), batch, strength=strength)
    with pytest.raises(ValueError, match="batches is empty"):
        context_aware_accuracy(text_model(), [], strength=0.5)
