"""Whole decoders of the authors' repository, compared with their blocks around their attention,
which `test_unilm.py` compares with recorded results."""

import json

import pytest
import torch
from hugging_face import assert_same
from safetensors.torch import load_file, save_file
from torch.nn.functional import linear, rms_norm, silu

from diffmm.interop import read_model, write_model
from diffmm.interop.conversion import FAMILIES
from diffmm.interop.unilm import load_attention
from diffmm.models import BackboneConfig, TextConfig, TextModel
from diffmm.models.weights import own_weights

SETTINGS = {
    "dim": 32,
    "n_layers": 3,
    "head_dim": 6,
    "hidden_dim": 40,
    "n_heads": 4,
    "n_kv_heads": 2,
    "norm_eps": 1e-3,
    "vocab_size": 50,
    "max_seq_len": 40,
    "rope_theta": 100.0,
}


@pytest.fixture(params=["v1", "v2"])
def folder(request, tmp_path):
    """A decoder with random weights, and its variant."""
    settings = SETTINGS | {"model_type": f"unilm_{request.param}", "model_parallel_size": 1}
    family = FAMILIES[settings["model_type"]]
    config = family.config_of(settings, "a test")
    names = family.table(config).to_theirs(own_weights(TextModel(config)))
    tensors = {
        name: torch.rand_like(x) + 0.5 if x.ndim == 1 else torch.randn_like(x) * x.shape[1] ** -0.5
        for name, x in names.items()
    }
    tensors |= {name: x * 0.3 for name, x in tensors.items() if "lambda_q" in name}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    save_file(tensors, tmp_path / "model.safetensors")
    return tmp_path, request.param


def decoder(tensors, variant, tokens):
    """The authors' decoder: blocks of attention and SwiGLU with RMSNorm."""
    x = tensors["tok_embeddings.weight"][tokens]
    for layer in range(SETTINGS["n_layers"]):
        own = {
            name.removeprefix(f"layers.{layer}."): tensor
            for name, tensor in tensors.items()
            if name.startswith(f"layers.{layer}.")
        }
        attention = load_attention(
            {n.removeprefix("attention."): t for n, t in own.items() if n.startswith("attention.")},
            variant=variant,
            num_heads=SETTINGS["n_heads"],
            num_kv_heads=SETTINGS["n_kv_heads"],
            layer_index=layer,
            rope_base=SETTINGS["rope_theta"],
        )
        x = x + attention(rms_norm(x, (32,), own["attention_norm.weight"], SETTINGS["norm_eps"]))
        y = rms_norm(x, (32,), own["ffn_norm.weight"], SETTINGS["norm_eps"])
        w1, w2, w3 = (own[f"feed_forward.w{i}.weight"] for i in (1, 2, 3))
        x = x + linear(silu(linear(y, w1)) * linear(y, w3), w2)
    x = rms_norm(x, (32,), tensors["norm.weight"], SETTINGS["norm_eps"])
    return linear(x, tensors["output.weight"])


def test_logits_are_those_of_the_authors_decoder(folder):
    path, variant = folder
    model = read_model(path)
    tokens = torch.randint(0, 50, (2, 9))
    assert_same(model(tokens), decoder(load_file(path / "model.safetensors"), variant, tokens))


def test_the_way_back_gives_the_same_files(folder, tmp_path):
    path, variant = folder
    back = write_model(read_model(path), tmp_path / "back", f"unilm_{variant}")
    first, second = (load_file(each / "model.safetensors") for each in (path, back))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    written = json.loads((back / "config.json").read_text())
    assert {name: written[name] for name in SETTINGS} == SETTINGS


def test_a_window_is_the_authors():
    config = FAMILIES["unilm_v2"].config_of(SETTINGS | {"sliding_window": 4}, "a test")
    assert config.backbone.window == 4


def test_what_the_authors_decoder_does_not_have_is_named(tmp_path):
    backbone = BackboneConfig(
        dim=32, depth=1, num_heads=4, rope="1d", attention="diff_v2", qk_norm=True
    )
    model = TextModel(TextConfig(vocab_size=50, max_length=8, backbone=backbone))
    with pytest.raises(ValueError, match="unilm_v2 cannot hold qk_norm=True, tie_embeddings=True"):
        write_model(model, tmp_path / "back", "unilm_v2")
    with pytest.raises(ValueError, match="unilm_v1 cannot hold attention='diff_v2'"):
        write_model(model, tmp_path / "back", "unilm_v1")
