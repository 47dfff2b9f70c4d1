"""Motif compared with its equations, written here in Motif's own layout."""

import json
import math

import pytest
import torch
from hugging_face import assert_same
from safetensors.torch import load_file, save_file

from diffmm.interop import read_model, write_model
from diffmm.interop.conversion import FAMILIES
from diffmm.models.generation import generate
from diffmm.models.weights import own_weights

SETTINGS = {
    "model_type": "Motif",
    "architectures": ["MotifForCausalLM"],
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 50,
    "max_position_embeddings": 40,
    "rms_norm_eps": 1e-6,
    "attn_rms_norm_eps": 1e-4,
    "rope_theta": 100.0,
    "hidden_act": "poly_norm",
}
GROUPED = {
    "num_attention_heads": 8,  # six signal heads and two noise heads
    "num_noise_heads": 2,
    "num_key_value_heads": 4,
    "head_dim": 6,
    "k_ratio": 1,
    "tie_word_embeddings": True,
}
CASES = [SETTINGS, SETTINGS | {"use_bias": True}, SETTINGS | GROUPED]


def rms(x, eps, weight=1.0):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight


def rotated(x, base):
    """Rotate `[B, heads, N, D]` in the dimensions `(j, j + D/2)`."""
    half = x.shape[-1] // 2
    angles = torch.arange(x.shape[2])[:, None] * base ** (-torch.arange(half) / half)
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()], -1)


class Motif:
    """The equations of Motif, as a function of its own tensors."""

    def __init__(self, settings, tensors):
        self.settings, self.tensors = settings, tensors

    def linear(self, name, x):
        bias = self.tensors.get(f"{name}.bias")
        return torch.nn.functional.linear(x, self.tensors[f"{name}.weight"], bias)

    def heads(self, name, x, head_dim):
        return self.linear(name, x).unflatten(-1, (-1, head_dim)).transpose(1, 2)

    def attention(self, name, x, layer):
        s, t = self.settings, self.tensors
        head_dim = s.get("head_dim") or s["hidden_size"] // s["num_attention_heads"]
        noise = s.get("num_noise_heads") or s["num_attention_heads"] // 2
        ratio = s["num_attention_heads"] // noise - 1
        groups = s["num_key_value_heads"] // 2
        q, k = (rotated(self.heads(f"{name}.{p}_proj", x, head_dim), s["rope_theta"]) for p in "qk")
        v = self.heads(f"{name}.v_proj", x, 2 * head_dim)
        init = 0.8 - 0.6 * math.exp(-0.3 * (layer - 1))
        first, second = (
            (t[f"{name}.lambda_q{i}"] * t[f"{name}.lambda_k{i}"]).sum().exp() for i in (1, 2)
        )
        future = torch.full((x.shape[1], x.shape[1]), -math.inf).triu(1)
        out = []
        for j in range(noise):
            group = j // (noise // groups)
            for i in range(ratio):
                pairs = ((j * (ratio + 1) + i, 2 * group), (j * (ratio + 1) + ratio, 2 * group + 1))
                maps = [
                    (q[:, a] @ k[:, b].mT * head_dim**-0.5 + future).softmax(-1) for a, b in pairs
                ]
                head = (maps[0] - (first - second + init) * maps[1]) @ v[:, group]
                out.append(
                    rms(head, s["attn_rms_norm_eps"], t[f"{name}.subln.weight"]) * (1 - init)
                )
        return self.linear(f"{name}.o_proj", torch.cat(out, -1))

    def feed_forward(self, name, x):
        gate = self.linear(f"{name}.gate_proj", x)
        w, b = (self.tensors[f"{name}.act_fn.{kind}"] for kind in ("weight", "bias"))
        gate = w[0] * rms(gate**3, 1e-6) + w[1] * rms(gate**2, 1e-6) + w[2] * rms(gate, 1e-6) + b
        return self.linear(f"{name}.down_proj", gate * self.linear(f"{name}.up_proj", x))

    def __call__(self, tokens):
        s, t = self.settings, self.tensors
        x = t["model.embed_tokens.weight"][tokens]
        for layer in range(s["num_hidden_layers"]):
            name = f"model.layers.{layer}"
            y = rms(x, s["rms_norm_eps"], t[f"{name}.input_layernorm.weight"])
            x = x + self.attention(f"{name}.self_attn", y, layer)
            y = rms(x, s["rms_norm_eps"], t[f"{name}.post_attention_layernorm.weight"])
            x = x + self.feed_forward(f"{name}.mlp", y)
        x = rms(x, s["rms_norm_eps"], t["model.norm.weight"])
        tied = s.get("tie_word_embeddings", False)
        return x @ t["model.embed_tokens.weight" if tied else "lm_head.weight"].T


@pytest.fixture(params=CASES, ids=["2.6B", "biases", "grouped"])
def folder(request, tmp_path):
    """A Motif with random weights."""
    settings = request.param
    config = FAMILIES["motif"].config_of(settings, "a test")
    model = FAMILIES["motif"].model(config)
    names = FAMILIES["motif"].table(config).to_theirs(own_weights(model))
    tensors = {
        name: torch.rand_like(x) + 0.5
        if "norm" in name or "subln" in name
        else torch.randn_like(x) * (0.3 if x.ndim == 1 else x.shape[-1] ** -0.5)
        for name, x in names.items()
    }
    (tmp_path / "config.json").write_text(json.dumps(settings))
    save_file(tensors, tmp_path / "model.safetensors")
    return tmp_path


def test_logits_and_gradients_are_those_of_the_equations(folder):
    tensors = load_file(folder / "model.safetensors")
    truth = Motif(
        json.loads((folder / "config.json").read_text()),
        {name: x.double().requires_grad_() for name, x in tensors.items()},
    )
    ours = read_model(folder)
    tokens = torch.randint(0, 50, (2, 9))
    assert_same(ours(tokens), truth(tokens).float(), "logits")
    # The gradients of scalars are sums that cancel, too inaccurate in float32.
    ours.double()
    logits = [truth(tokens), ours(tokens)]
    weights = torch.randn_like(logits[1])
    for each in logits:
        (each * weights).sum().backward()
    table = FAMILIES["motif"].table(ours.config)
    found = table.to_theirs({name: p.grad for name, p in ours.named_parameters()})
    assert found.keys() == tensors.keys()
    for name, gradient in found.items():
        assert_same(gradient, truth.tensors[name].grad, name)


def test_generation_and_the_way_back(folder, tmp_path):
    ours = read_model(folder)
    tokens = torch.randint(0, 50, (2, 5))
    ids = tokens
    for _ in range(6):
        ids = torch.cat([ids, ours(ids)[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(generate(ours, tokens, max_new_tokens=6, temperature=0), ids[:, 5:])
    back = write_model(ours, tmp_path / "back", "motif")
    first, second = (load_file(each / "model.safetensors") for each in (folder, back))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert torch.equal(read_model(back)(tokens), ours(tokens))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"k_ratio": 2}, "k_ratio=2, but diffmm can hold only 1: a key group has one key per map"),
        ({"use_sliding_window": True}, "use_sliding_window=True, but diffmm can hold only False"),
        ({"num_noise_heads": 3}, "num_noise_heads=3, but diffmm can hold a divisor"),
        ({"expanded": True}, "settings that diffmm does not know, .*: expanded=True"),
    ],
)
def test_what_diffmm_cannot_hold_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        FAMILIES["motif"].config_of(SETTINGS | GROUPED | changes, "a test")
