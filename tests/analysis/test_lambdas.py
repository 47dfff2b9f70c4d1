"""Lambda of layers and its curves."""

import torch
from constructed_maps import layer_of

from diffmm.analysis.lambdas import LambdaMeter, LayerLambda, lambda_curves
from diffmm.ops import AttentionMask


def test_statistics_without_padding_over_batches():
    meter = LambdaMeter()
    maps = [0.5, 0.25, 0.25], [0.2, 0.4, 0.4]
    mask = AttentionMask(key_padding=torch.tensor([[True, True, False]]))
    meter.add(layer_of(*maps, lam=torch.tensor([0.5, 1.5, 9.0]), mask=mask))
    meter.add(layer_of(*maps, lam=torch.tensor([0.25, 0.75, 1.0])))
    meter.add(layer_of(maps[0]))  # softmax attention
    assert meter.layers() == [LayerLambda("layer", 0.8, 0.25, 1.5, 0.2)]


def test_curves_are_in_the_order_of_the_layers():
    curves = {
        "lambda/layer_10": [(1, 0.5)],
        "train/loss": [(1, 2.0)],
        "lambda/layer_02": [(1, 0.2)],
    }
    found = lambda_curves(curves)
    assert list(found.items()) == [(2, [(1, 0.2)]), (10, [(1, 0.5)])]
