"""The text tower: pooling, positions, causality, and the checks of its config."""

import pytest
import torch

from diffmm.models import BackboneConfig, TextTower, TextTowerConfig
from diffmm.models.weights import load_model, save_model


def tower(rope="none", **changes):
    backbone = BackboneConfig(24, 2, 4, init_std=0.2, rope=rope)
    settings = {"vocab_size": 30, "max_length": 8, "num_outputs": 5}
    return TextTower(TextTowerConfig(backbone=backbone, **settings | changes)).eval()


TOKENS = torch.tensor([[4, 9, 2, 9, 1, 0], [2, 1, 2, 4, 3, 0]])


@pytest.mark.parametrize(
    ("changes", "at"),
    [
        ({}, [1, 3]),
        ({"pool": "eos", "eos_id": 2}, [2, 0]),
        ({"pool": "first"}, [0, 0]),
        ({"pool": "last"}, [5, 5]),
    ],
)
def test_the_features_of_one_token_are_projected(changes, at):
    model = tower(**changes)
    features = model.forward_features(TOKENS)[torch.arange(2), at]
    torch.testing.assert_close(model(TOKENS), features @ model.head.weight.T)
    assert tower(num_outputs=0, **changes)(TOKENS).shape == (2, 24)


PADDED = (
    {"pool": "eos", "eos_id": 2},
    {"pool": "last"},
    {"causal": False, "pool": "mean"},
    {"causal": False, "pool": "mean", "learned_positions": False, "rope": "1d"},
    {"pool": "mean"},
)


@pytest.mark.parametrize("changes", PADDED)
def test_padding_does_not_change_a_text(changes):
    """Alone, and in a batch with a longer text, whatever the padding."""
    model, text = tower(**changes), torch.tensor([[4, 9, 2]])
    alone = model(text, torch.tensor([3]))
    torch.testing.assert_close(alone, model(text))
    for filler in (2, 7):
        batch = torch.tensor([[4, 9, 2, filler, filler, filler], [1, 3, 8, 9, 4, 2]])
        together = model(batch, torch.tensor([3, 6]))
        torch.testing.assert_close(together[:1], alone)
        assert not torch.allclose(together[1:], alone, atol=1e-3)


def test_the_mean_is_over_real_tokens():
    model, num_tokens = tower(pool="mean", causal=False), torch.tensor([2, 6])
    features = model.forward_features(TOKENS, num_tokens)
    mean = torch.stack([features[0, :2].mean(0), features[1].mean(0)])
    torch.testing.assert_close(model(TOKENS, num_tokens), mean @ model.head.weight.T)
    unpadded = model.forward_features(TOKENS).mean(1)
    torch.testing.assert_close(model(TOKENS), unpadded @ model.head.weight.T)


@pytest.mark.parametrize("causal", [True, False])
def test_the_future_has_a_gradient_only_without_causality(causal):
    model = tower(causal=causal)
    model.forward_features(TOKENS)[:, 2].sum().backward(inputs=[model.embedding.weight])
    later = model.embedding.weight.grad[[1, 3, 0]]  # tokens that come after position 2 only
    assert (later.abs().sum(-1) == 0).tolist() == [False, causal, causal]


def test_positions_matter_and_short_texts_are_taken():
    model = tower(pool="last", causal=False)
    turned = TOKENS[:, [1, 0, 2, 3, 4, 5]]
    assert not torch.allclose(model(TOKENS), model(turned), atol=1e-3)
    with torch.no_grad():
        model.positions.grid.zero_()
    torch.testing.assert_close(model(TOKENS), model(turned))
    assert model(TOKENS[:, :3]).shape == (2, 5)
    with pytest.raises(ValueError, match="a sequence of 9 tokens is longer than max_length=8"):
        model(torch.zeros(1, 9, dtype=torch.int64))


def test_a_saved_tower_is_the_same(tmp_path):
    model = tower(head_bias=True, pool="eos", eos_id=3)
    again = load_model(save_model(model, tmp_path / "tower.safetensors"))
    assert again.config == model.config
    assert torch.equal(again(TOKENS), model(TOKENS))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"rope": "1d"},
            "learned_positions=True the backbone's rope must be 'none', got '1d'",
        ),
        ({"learned_positions": False}, "learned_positions=False the backbone's rope must be '1d'"),
        ({"vocab_size": 0}, "vocab_size must be at least 1, got 0"),
        ({"num_outputs": -1}, "num_outputs must be at least 0, got -1"),
        (
            {"pool": "max"},
            "pool must be one of 'argmax', .*'last', 'mean', got 'max'",
        ),
        ({"pool": "eos"}, "eos_id is for pool='eos', got None with 'eos'"),
        ({"eos_id": 2}, "eos_id is for pool='eos', got 2 with 'argmax'"),
    ],
)
def test_the_config_is_checked(changes, message):
    with pytest.raises(ValueError, match=message):
        tower(**changes)
