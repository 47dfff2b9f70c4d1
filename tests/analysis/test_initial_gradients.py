"""Gradients of new twins, layer by layer."""

import math

import pytest
import torch
from torch import nn

import diffmm
from diffmm.analysis.batches import loss_of
from diffmm.analysis.initial_gradients import (
    SOFTMAX,
    UNSCALED,
    V1,
    gradient_norms,
    initial_gradients,
    ratios,
    twin_of,
)
from diffmm.layers.attention import lambda_init_at


def batch_of(size=2, length=12):
    tokens = torch.randint(256, (size, length + 1))
    return {"tokens": tokens[:, :-1], "targets": tokens[:, 1:]}


def test_the_factor_scales_the_gradient_of_what_follows_it():
    """The output projections receive heads times `1 - lambda_init`. They start so small here that
    the factor changes nothing else."""
    model = diffmm.create_model("text/stdlib_tiny", attention="diff_v2", depth=3, init_std=1e-3)
    batch, drawn = batch_of(), set()

    def loss(model):
        drawn.add(float(torch.rand(())))
        total, count, _ = loss_of(model, batch)
        return total / count

    state = torch.random.get_rng_state()
    found = initial_gradients(twin_of(model), loss, seed=3)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert list(found) == [SOFTMAX, V1, UNSCALED]
    for index, layer in enumerate(ratios(found[V1], found[UNSCALED])):
        assert layer.name == f"backbone.blocks.{index}"
        assert layer.norms["attention.out_proj"] == pytest.approx(
            1.0 - lambda_init_at(index), rel=0.02
        )
    compared = ratios(found[V1], found[SOFTMAX])
    assert {"attention.q_proj", "feed_forward.up_proj", "block"} <= compared[0].norms.keys()
    assert len(drawn) == 1
    again = initial_gradients(twin_of(model), loss, seed=3)
    assert again == found


def test_norms_are_those_of_the_gradients():
    model = diffmm.create_model("image/digits_tiny", attention="softmax")
    loss_of(model, {"images": torch.rand(3, 1, 8, 8), "labels": torch.tensor([0, 1, 2])})[
        0
    ].backward()
    first = gradient_norms(model)[0]
    block = model.backbone.blocks[0]
    assert first.norms["attention.q_proj"] == pytest.approx(
        float(block.attention.q_proj.weight.grad.norm())
    )
    every = torch.cat([p.grad.flatten() for p in block.parameters()])
    assert first.norms["block"] == pytest.approx(float(every.norm()), rel=1e-5)
    other = gradient_norms(model)
    block.attention.q_proj.weight.grad.zero_()
    assert math.isnan(ratios(other, gradient_norms(model))[0].norms["attention.q_proj"])


def test_twins_keep_all_settings_but_those_of_the_attention():
    model = diffmm.create_model("image/digits_mae_tiny", attention="diff_v1", lambda_init=0.5)
    twin = twin_of(model)("diff_v2")
    assert twin.config.encoder.backbone.attention == "diff_v2"
    assert twin.config.encoder.backbone.lambda_init is None
    assert twin.config.decoder == model.config.decoder
    with pytest.raises(ValueError, match="num_kv_heads must be even, got 1"):
        twin_of(diffmm.create_model("text/stdlib_tiny", attention="softmax", num_kv_heads=1))(V1)


def test_a_model_without_blocks_is_refused():
    with pytest.raises(ValueError, match="Linear contains no block of diffmm"):
        gradient_norms(nn.Linear(2, 2))
