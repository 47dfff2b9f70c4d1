"""The text model: visibility of tokens, errors, and equality with the compiled model."""

import pytest
import torch
from torch.nn.functional import cross_entropy

from diffmm.models import BackboneConfig, TextConfig, TextModel
from diffmm.ops import AttentionMask

ATTENTIONS = ("softmax", "diff_v1", "diff_v2")


def make_model(attention="diff_v1", *, causal=True, tie_embeddings=True, max_length=64, **changes):
    fields = {"dim": 64, "depth": 2, "num_heads": 4, "num_kv_heads": 2, "rope": "1d"} | changes
    config = TextConfig(
        vocab_size=40,
        max_length=max_length,
        backbone=BackboneConfig(attention=attention, **fields),
        causal=causal,
        tie_embeddings=tie_embeddings,
    )
    model = TextModel(config)
    # Larger queries and keys, because with the usual initialization all maps are nearly uniform.
    for name, parameter in model.named_parameters():
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            parameter.data.mul_(6.0)
    return model


def influence(model, tokens, query, **options):
    """`[B, N]`: the effect of each token's embedding on the logits at position `query`."""
    taken = []
    handle = model.embedding.register_forward_hook(
        lambda *args: taken.append(args[-1]) or args[-1].retain_grad()
    )
    model(tokens, **options)[:, query].square().sum().backward()
    handle.remove()
    return taken[0].grad.norm(dim=-1)


def gradients(model, tokens, forward=None):
    model.zero_grad()
    forward = model if forward is None else forward
    logits = forward(tokens[:, :-1])
    cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def assert_same_gradients(found, truth, tolerance):
    assert set(found) == set(truth)
    for name, gradient in truth.items():
        error = ((found[name] - gradient).norm() / gradient.norm()).item()
        assert error < tolerance, f"{name} is off by {error:.1e}"


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_a_decoder_sees_the_past_and_itself_alone(attention):
    model = make_model(attention)
    seen = influence(model, torch.randint(0, 40, (2, 12)), query=7)
    assert (seen[:, :8] > 0).all()
    assert (seen[:, 8:] == 0).all()


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_an_encoder_sees_everything(attention):
    model = make_model(attention, causal=False)
    assert (influence(model, torch.randint(0, 40, (2, 12)), query=3) > 0).all()


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_a_document_is_read_as_if_it_were_alone(attention):
    model = make_model(attention).eval()
    tokens = torch.randint(0, 40, (1, 12))
    ids = torch.tensor([[0] * 5 + [1] * 7])
    mask = AttentionMask(causal=True, document_ids=ids)
    seen = influence(model, tokens, query=8, mask=mask)
    assert torch.equal(seen[0] > 0, torch.tensor([False] * 5 + [True] * 4 + [False] * 3))
    # Rotary positions are relative, so the start of a document does not matter.
    torch.testing.assert_close(
        model(tokens, mask=mask)[:, 5:], model(tokens[:, 5:]), atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_padding_on_the_right_changes_nothing_in_an_encoder(attention):
    model = make_model(attention, causal=False).eval()
    tokens = torch.randint(0, 40, (2, 12))
    key_padding = torch.arange(12) < torch.tensor([[12], [7]])
    padded = model(tokens, mask=AttentionMask(key_padding=key_padding))
    torch.testing.assert_close(padded[:1], model(tokens[:1]), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(padded[1:, :7], model(tokens[1:, :7]), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("parts", [(9, 1, 1, 1), (1, 5, 6), (4, 8)])
def test_reading_in_parts_equals_one_forward(attention, parts):
    model = make_model(attention, num_heads=8, num_kv_heads=2).eval()
    tokens = torch.randint(0, 40, (2, sum(parts)))
    cache = model.new_cache(batch=2)
    with torch.no_grad():
        logits = [model(part, cache=cache) for part in tokens.split(parts, dim=1)]
        whole = model(tokens)
    assert cache.length == sum(parts)
    torch.testing.assert_close(torch.cat(logits, dim=1), whole, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("attention", ATTENTIONS)
def test_every_parameter_gets_a_finite_gradient(attention, causal):
    model = make_model(attention, causal=causal, tie_embeddings=False, qk_norm=True)
    for name, gradient in gradients(model, torch.randint(0, 40, (4, 17))).items():
        assert gradient.isfinite().all(), name
        assert gradient.abs().max() > 0, f"{name} takes no part"


def test_tied_embeddings_are_one_parameter():
    tied, untied = make_model(), make_model(tie_embeddings=False)
    assert tied.head.weight is tied.embedding.weight
    assert untied.head.weight is not untied.embedding.weight
    difference = sum(p.numel() for p in untied.parameters()) - sum(
        p.numel() for p in tied.parameters()
    )
    assert difference == 40 * 64


def test_features_are_what_the_head_reads():
    model = make_model().eval()
    tokens = torch.randint(0, 40, (2, 9))
    features = model.forward_features(tokens)
    assert features.shape == (2, 9, 64)
    torch.testing.assert_close(model.head(features), model(tokens))


def test_a_sequence_too_long_is_refused_with_both_numbers():
    model = make_model(max_length=16)
    assert model(torch.zeros(1, 16, dtype=torch.long)).shape == (1, 16, 40)
    with pytest.raises(ValueError, match="sequence of 17 tokens is longer than max_length=16"):
        model(torch.zeros(1, 17, dtype=torch.long))
    cache = model.new_cache(batch=1)
    model(torch.zeros(1, 12, dtype=torch.long), cache=cache)
    with pytest.raises(ValueError, match="sequence of 18 tokens is longer than max_length=16"):
        model(torch.zeros(1, 6, dtype=torch.long), cache=cache)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": 0}, "vocab_size must be at least 1, got 0"),
        ({"max_length": 0}, "max_length must be at least 1, got 0"),
        (
            {"backbone": BackboneConfig(dim=32, depth=1, num_heads=2, rope="none")},
            "rope of a text model must be '1d', got 'none'",
        ),
    ],
)
def test_configs_that_make_no_text_model_are_refused(changes, message):
    fields = {
        "vocab_size": 40,
        "max_length": 16,
        "backbone": BackboneConfig(dim=32, depth=1, num_heads=2, rope="1d"),
    }
    with pytest.raises(ValueError, match=message):
        TextConfig(**(fields | changes))


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_activation_checkpointing_gives_the_same_gradients(attention):
    model = make_model(attention)
    tokens = torch.randint(0, 40, (2, 17))
    truth = gradients(model, tokens)
    model.backbone.activation_checkpointing = True
    runs = []
    model.backbone.blocks[0].attention.register_forward_pre_hook(lambda *_: runs.append(1))
    assert_same_gradients(gradients(model, tokens), truth, 1e-6)
    assert len(runs) == 2, "nothing was recomputed"


# Heads of 32, and values of 64 in v1, for which compiled gradients were once wrong on a GPU.
WIDE = {"dim": 128, "num_heads": 4}


@pytest.mark.parametrize(
    ("attention", "num_kv_heads"),
    [("softmax", 2), ("diff_v1", 4), ("diff_v1", 2), ("diff_v2", 2)],
)
def test_compiled_gradients_are_the_eager_ones(attention, num_kv_heads):
    model = make_model(attention, num_kv_heads=num_kv_heads, **WIDE)
    tokens = torch.randint(0, 40, (2, 33))
    truth = gradients(model, tokens)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert_same_gradients(gradients(model, tokens, compiled), truth, 1e-5)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
def test_gradients_compiled_to_machine_code_are_the_eager_ones():
    model = make_model("diff_v1", **WIDE)
    tokens = torch.randint(0, 40, (2, 33))
    truth = gradients(model, tokens)
    compiled = torch.compile(model, fullgraph=True)
    assert_same_gradients(gradients(model, tokens, compiled), truth, 1e-5)
