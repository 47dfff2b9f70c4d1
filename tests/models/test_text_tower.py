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
        ({"rope": "1d"}, "the backbone's rope must be 'none', got '1d'"),
        ({"vocab_size": 0}, "vocab_size must be at least 1, got 0"),
        ({"num_outputs": -1}, "num_outputs must be at least 0, got -1"),
        ({"pool": "mean"}, "pool must be one of 'argmax', 'eos', 'first', 'last', got 'mean'"),
        ({"pool": "eos"}, "eos_id is for pool='eos', got None with 'eos'"),
        ({"eos_id": 2}, "eos_id is for pool='eos', got 2 with 'argmax'"),
    ],
)
def test_the_config_is_checked(changes, message):
    with pytest.raises(ValueError, match=message):
        tower(**changes)
