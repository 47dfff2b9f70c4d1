"""Prompt lookup: the same tokens in fewer forward passes."""

import pytest
import torch

from diffmm.layers import ATTENTIONS
from diffmm.models import BackboneConfig, TextConfig, TextModel
from diffmm.models.generation import generate, stream
from diffmm.models.prompt_lookup import PromptLookup


def make_model(attention="diff_v2", **settings):
    torch.manual_seed(0)
    num_kv_heads = 1 if attention == "diff_grouped" else 2
    backbone = BackboneConfig(
        dim=32, depth=2, num_heads=4, num_kv_heads=num_kv_heads, attention=attention, rope="1d",
        init_std=0.3, **settings,
    )  # fmt: skip
    return TextModel(TextConfig(8, 96, backbone)).double().eval()


def passes_of(model):
    """The number of tokens of each forward pass, from now on."""
    seen = []
    model.backbone.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
    return seen


def test_guesses_are_what_followed_last():
    lookup = PromptLookup([1, 2, 3, 9, 2, 3, 7, 1, 2, 3])
    assert lookup.guess(9) == [9, 2, 3, 7, 1, 2, 3]  # three tokens say more than two
    assert lookup.guess(2) == [9, 2]
    lookup.append(4)
    assert lookup.guess(3) == []
    lookup.append(3)
    assert lookup.guess(3) == [4, 3]  # one token
    lookup.append(2)
    assert lookup.guess(1) == [3]  # where 2 came last
    assert PromptLookup([]).guess(3) == PromptLookup([5]).guess(3) == []
    assert PromptLookup([5, 5]).guess(3) == [5]


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_tokens_are_those_without_lookup(attention, temperature):
    model = make_model(attention)
    tokens = torch.randint(8, (1, 12))
    seen, found = passes_of(model), []
    for count in (None, 1, 5):
        seen.clear()
        generator = torch.Generator().manual_seed(3)
        settings = {"temperature": temperature, "top_k": 6, "generator": generator}
        new = generate(model, tokens, max_new_tokens=60, prompt_lookup_num_tokens=count, **settings)
        found.append((new, generator.get_state(), list(seen)))
    for new, state, sizes in found[1:]:
        assert torch.equal(new, found[0][0])
        assert torch.equal(state, found[0][1])  # as many random numbers
        assert len(sizes) < len(found[0][2]) == 60
    assert max(found[2][2][1:]) == 6  # one token and five guesses


def test_windows_padding_and_stops():
    model = make_model(window=7)
    tokens = torch.randint(8, (1, 12))
    key_padding = torch.arange(12)[None] > 3
    plain = generate(model, tokens, max_new_tokens=40, temperature=0, key_padding=key_padding)
    settings = {"max_new_tokens": 40, "temperature": 0, "prompt_lookup_num_tokens": 4}
    assert torch.equal(generate(model, tokens, key_padding=key_padding, **settings), plain)
    assert not torch.equal(generate(model, tokens, **settings), plain)
    # A guess that is a stop ends the text at its own place only.
    (place,) = (plain[0] == plain[0, 30]).nonzero()[0].tolist()
    stopped = generate(
        model, tokens, key_padding=key_padding, stop_ids=[int(plain[0, 30])], **settings
    )
    assert torch.equal(stopped, plain[:, : place + 1])


def test_a_text_fills_the_model_to_the_last_token():
    model = make_model()
    tokens = torch.randint(8, (1, 12))
    found = [
        generate(model, tokens, max_new_tokens=84, temperature=0, prompt_lookup_num_tokens=count)
        for count in (None, 50)
    ]
    assert found[0].shape == (1, 84)
    assert torch.equal(*found)


@pytest.mark.parametrize(
    ("rows", "settings", "message"),
    [
        (2, {}, "prompt lookup continues one prompt, got 2: generate them one by one"),
        (1, {"prompt_lookup_num_tokens": 0}, "prompt_lookup_num_tokens must be an integer of at l"),
    ],
)
def test_what_cannot_be_looked_up(rows, settings, message):
    tokens = torch.zeros(rows, 3, dtype=torch.int64)
    with pytest.raises(ValueError, match=message):
        stream(
            make_model(), tokens, **{"max_new_tokens": 2, "prompt_lookup_num_tokens": 3, **settings}
        )
