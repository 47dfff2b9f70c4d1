"""diffmm's attention in models of transformers, compared with their own eager attention."""

import copy

import pytest
import torch
import transformers
from hugging_face import assert_same, random_model
from transformers import masking_utils as masks
from transformers.models.diffllama.modeling_diffllama import DiffLlamaAttention

from diffmm.interop import transformers_attention
from diffmm.interop.transformers_attention import mask, settings_of
from diffmm.ops import AttentionMask

GREEDY = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "max_new_tokens": 8}
SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
MODELS = {
    "Llama": {},
    "Mistral": {"sliding_window": 4},
    "Qwen3": {"head_dim": 16},
    "Gemma2": {"sliding_window": 4, "head_dim": 8, "query_pre_attn_scalar": 5},
    "DiffLlama": {},
}


def models(family, dtype=torch.float32, **settings):
    """The model with its eager attention, and a copy with diffmm's."""
    config = getattr(transformers, f"{family}Config")(**SIZES, **MODELS[family], **settings)
    eager = random_model(getattr(transformers, f"{family}ForCausalLM"), config).to(dtype)
    ours = copy.deepcopy(eager)
    ours.set_attn_implementation("diffmm")
    return eager, ours


def prompts(length=11):
    return torch.randint(0, 64, (2, length))


def left_padding(length=11):
    attention_mask = torch.ones(2, length, dtype=torch.long)
    attention_mask[0, :4] = 0
    return attention_mask


@pytest.fixture
def calls(monkeypatch):
    """The masks of all calls of diffmm's ops, by the op's name."""
    found = []

    def record(name, op):
        def recorded(*args, **options):
            found.append((name, options["mask"]))
            return op(*args, **options)

        monkeypatch.setattr(transformers_attention, name, recorded)

    for name in ("softmax_attention", "diff_attention"):
        record(name, getattr(transformers_attention, name))
    return found


def inputs(case):
    if case == "padding":
        return {"attention_mask": left_padding()}
    if case == "packed":
        positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4, 5, 6]] * 2)
        return {"position_ids": positions, "use_cache": False}
    return {}


@pytest.mark.parametrize("case", ["causal", "padding", "packed"])
@pytest.mark.parametrize("family", MODELS)
def test_outputs_and_gradients_are_those_of_eager_attention(family, case, calls):
    eager, ours = models(family)
    tokens, given = prompts(), inputs(case)
    logits = [model(tokens, **given).logits for model in (eager, ours)]
    real = given.get("attention_mask", torch.ones_like(tokens)).bool()
    assert_same(logits[1][real], logits[0][real], "logits")
    weights = torch.randn_like(logits[0][real])
    for each in logits:
        (each[real] * weights).sum().backward()
    for (name, expected), found in zip(eager.named_parameters(), ours.parameters(), strict=True):
        assert_same(found.grad, expected.grad, name)
    op = "diff_attention" if family == "DiffLlama" else "softmax_attention"
    assert [name for name, _ in calls] == [op] * 2
    for index, (_, used) in enumerate(calls):
        assert used.causal
        has_window = family == "Mistral" or (family == "Gemma2" and index == 0)
        assert used.window == (4 if has_window else None)
        assert (used.key_padding is not None) == (case == "padding")
        assert (used.document_ids is not None) == (case == "packed")


@pytest.mark.parametrize("family", ["Llama", "DiffLlama"])
def test_the_error_in_bfloat16_is_at_most_twice_that_of_eager_attention(family):
    exact, _ = models(family, dtype=torch.float64)
    eager, ours = models(family, dtype=torch.bfloat16)
    tokens = prompts()
    weights = torch.randn(2, 11, 64)
    for model in (exact, eager, ours):
        logits = model(tokens).logits
        (logits * weights.to(logits.dtype)).sum().backward()
    truth = exact(tokens).logits

    def errors(model):
        found = [model(tokens).logits, *(parameter.grad for parameter in model.parameters())]
        right = [truth, *(parameter.grad for parameter in exact.parameters())]
        return [
            ((a.double() - b).norm() / b.norm()).item() for a, b in zip(found, right, strict=True)
        ]

    for found, allowed in zip(errors(ours), errors(eager), strict=True):
        assert found < 2 * allowed


@pytest.mark.parametrize("family", ["Llama", "DiffLlama"])
@pytest.mark.parametrize("use_cache", [True, False])
def test_under_autocast_attention_is_in_its_precision(family, use_cache, monkeypatch):
    dtypes = []
    for name in ("softmax_attention", "diff_attention"):
        op = getattr(transformers_attention, name)
        monkeypatch.setattr(
            transformers_attention,
            name,
            lambda *qkv, _op=op, **options: (
                dtypes.extend(x.dtype for x in qkv[:3]),
                _op(*qkv, **options),
            )[1],
        )
    eager, ours = models(family)
    tokens = prompts()
    truth = eager(tokens).logits
    with torch.autocast("cpu", torch.bfloat16):
        found, other = (m(tokens, use_cache=use_cache).logits for m in (ours, eager))
    assert set(dtypes) == {torch.bfloat16}
    assert (found - truth).norm() < 2 * (other - truth).norm()


@pytest.mark.parametrize("family", MODELS)
def test_generated_tokens_are_those_of_eager_attention(family):
    eager, ours = models(family)
    tokens, options = prompts(), [{}, {"num_beams": 2}]
    if family != "Gemma2":
        options.append({"cache_implementation": "static"})
    for each in options:
        settings = {"attention_mask": left_padding(), **GREEDY, **each}
        assert torch.equal(ours.generate(tokens, **settings), eager.generate(tokens, **settings))


# torch raises this about itself when it compiles a function in parts.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("family", ["Mistral", "DiffLlama"])
def test_compiled_models_use_the_same_masks(family, calls):
    eager, ours = models(family)
    compiled, tokens = torch.compile(ours, backend="eager"), prompts()
    window = 4 if family == "Mistral" else None
    for given, documents in (({}, False), (inputs("packed"), True)):
        calls.clear()
        found = compiled(tokens, **{**given, "use_cache": False}).logits
        assert_same(found, eager(tokens, **{**given, "use_cache": False}).logits)
        ((_, first), (_, second)) = calls
        assert (first.causal, first.window, first.key_padding) == (True, window, None)
        assert (first.document_ids is not None) == documents
        assert first.document_ids is second.document_ids


def test_compiled_as_one_graph():
    eager, ours = models("DiffLlama")
    tokens, padding = prompts(), left_padding()
    compiled = torch.compile(ours, backend="eager", fullgraph=True)
    options = {"attention_mask": padding, "use_cache": False}
    real = padding.bool()
    assert_same(compiled(tokens, **options).logits[real], eager(tokens, **options).logits[real])
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match="compile without fullgraph=True"):
        compiled(tokens, use_cache=False)


def test_other_implementations_call_transformers_own_function(calls):
    eager, ours = models("DiffLlama")
    tokens = prompts()
    ours.set_attn_implementation("sdpa")
    assert_same(ours(tokens).logits, eager(tokens).logits)
    assert not calls
    assert DiffLlamaAttention.forward is transformers_attention.diffllama_forward


CAUSAL = masks.causal_mask_function
BOTH = masks.bidirectional_mask_function
DOCUMENTS = torch.tensor([[0, 0, 1, 1, 1], [0, 1, 1, 1, 2]])
KNOWN = {
    "causal": CAUSAL,
    "full": BOTH,
    "window": masks.sliding_window_causal_mask_function(3),
    "window both ways": masks.sliding_window_bidirectional_mask_function(2),
    "packed": masks.and_masks(CAUSAL, masks.packed_sequence_mask_function(DOCUMENTS)),
    "packed window": masks.and_masks(
        masks.sliding_window_causal_mask_function(2),
        masks.packed_sequence_mask_function(DOCUMENTS),
    ),
}
UNKNOWN = {
    "chunks": masks.chunked_causal_mask_function(2, torch.zeros(2, dtype=torch.long)),
    "blocks": masks.or_masks(CAUSAL, masks.blockwise_overlay(DOCUMENTS)),
    "one-sided": masks.sliding_window_overlay(2),
    "two windows": masks.and_masks(
        masks.sliding_window_causal_mask_function(2), masks.sliding_window_overlay(3)
    ),
}


@pytest.mark.parametrize("padding", [None, torch.tensor([[1, 1, 1, 1, 1], [0, 1, 1, 1, 1]]) > 0])
@pytest.mark.parametrize("name", KNOWN)
def test_known_masks_are_the_same_keys_as_transformers(name, padding):
    found = mask(2, 5, 5, mask_function=KNOWN[name], attention_mask=padding)
    assert isinstance(found, AttentionMask)
    expected = masks.sdpa_mask(
        2, 5, 5, mask_function=KNOWN[name], attention_mask=padding, allow_is_causal_skip=False
    )
    assert torch.equal(found.to_bool(5, 5).expand(2, 1, 5, 5), expected)


@pytest.mark.parametrize("name", UNKNOWN)
def test_other_masks_are_tensors(name):
    assert settings_of(UNKNOWN[name]) is None
    found = mask(2, 5, 5, mask_function=UNKNOWN[name])
    expected = masks.sdpa_mask(2, 5, 5, mask_function=UNKNOWN[name], allow_is_causal_skip=False)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("family", ["Llama", "DiffLlama"])
def test_masks_per_query_are_obeyed(family):
    eager, ours = models(family)
    tokens = prompts(5)
    visible = mask(2, 5, 5, mask_function=UNKNOWN["chunks"])
    hidden = torch.zeros(visible.shape).masked_fill(~visible, float("-inf"))
    expected = eager(tokens, attention_mask=hidden).logits
    for given in (visible, hidden):
        assert_same(ours(tokens, attention_mask=given).logits, expected)


def test_bidirectional_layers_are_not_causal(calls):
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48,
        image_size=8, patch_size=4,
    )  # fmt: skip
    eager = random_model(transformers.ViTModel, config)
    ours = copy.deepcopy(eager)
    ours.set_attn_implementation("diffmm")
    images = torch.randn(2, 3, 8, 8)
    assert_same(ours(images).last_hidden_state, eager(images).last_hidden_state)
    ((name, used),) = calls
    assert name == "softmax_attention"
    assert used.is_full


def test_what_is_not_supported_is_refused():
    q, k = torch.randn(1, 2, 3, 8), torch.randn(1, 1, 3, 8)
    layer = torch.nn.Module()
    for given, named in (
        ({"dropout": 0.1}, "dropout=0.1"),
        ({"output_attentions": True}, "output_attentions"),
        ({"s_aux": q, "position_bias": q}, "position_bias, s_aux"),
        ({"block_indices": k, "position_ids": k, "future": None}, "block_indices"),
    ):
        with pytest.raises(ValueError, match=f"does not support {named}: use 'eager'"):
            transformers_attention.attention(layer, q, k, k, None, **given)
    visible = torch.ones(1, 1, 3, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"softcap=5.0 with a static cache or a mask per query"):
        transformers_attention.attention(layer, q, k, k, visible, softcap=5.0)
    _, ours = models("DiffLlama")
    with pytest.raises(ValueError, match="does not support output_attentions: use 'eager'"):
        ours(prompts(), output_attentions=True)
    with pytest.raises(ValueError, match="does not support block_indices: use 'eager'"):
        ours(prompts(), block_indices=q)
    layer_mask = mask(1, 3, 3)
    with pytest.raises(ValueError, match="is not a tensor and has no parts: use 'eager'"):
        layer_mask[:, :2]
    with pytest.raises(AttributeError, match="is not a tensor and has no dtype: use 'eager'"):
        _ = layer_mask.dtype


@pytest.mark.parametrize("family", ["Llama", "DiffLlama"])
def test_arguments_that_change_nothing_are_passed_on(family):
    eager, ours = models(family)
    tokens = prompts(5)
    given = {"labels": tokens, "output_hidden_states": True, "max_length_q": 5, "use_cache": True}
    found, expected = (model(tokens, **given) for model in (ours, eager))
    assert_same(found.logits, expected.logits)
    assert len(found.hidden_states) == 3


def test_without_a_mask_is_causal_decides():
    _, ours = models("DiffLlama")
    layer, x = ours.model.layers[0].self_attn, torch.randn(1, 5, 32)
    rotary = ours.model.rotary_emb(x, torch.arange(5)[None])
    causal, again, full = (layer(x, rotary, is_causal=each)[0] for each in (None, True, False))
    assert torch.equal(causal, again)
    layer.config._attn_implementation = "eager"
    hidden = torch.full((5, 5), float("-inf")).triu(1)[None, None]
    assert_same(causal, layer(x, rotary, hidden)[0])
    assert_same(full, layer(x, rotary, torch.zeros(1, 1, 5, 5))[0])
