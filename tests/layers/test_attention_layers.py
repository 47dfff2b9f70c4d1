"""Properties of the three attention layers."""

import math

import pytest
import torch

from diffmm.layers import ATTENTIONS, DiffAttentionV1, DiffAttentionV2, KVCache, RotaryEmbedding
from diffmm.layers import SoftmaxAttention as Softmax
from diffmm.layers.attention import lambda_init_at, register_attention
from diffmm.ops import AttentionMask
from diffmm.ops.diff_attention import BACKENDS

DIM = 64
KINDS = list(ATTENTIONS)
CAUSAL = AttentionMask(causal=True)


def make(kind: str, **changes):
    """An attention layer with four heads; in `diff_grouped`, one noise head serves two of them."""
    own = {"num_kv_heads": 2, "signal_per_noise": 2} if kind == "diff_grouped" else {}
    return ATTENTIONS[kind](DIM, **{"num_heads": 4, **own, **changes})


def num_parameters(layer: torch.nn.Module) -> int:
    return sum(p.numel() for p in layer.parameters())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_kv_heads": 2},
        {"output_gate": "head", "exclusive": True},
        {"output_gate": "element"},
    ],
    ids=str,
)
def test_every_parameter_has_a_finite_gradient(kind, changes):
    layer = make(kind, qkv_bias=True, out_bias=True, qk_norm=True, **changes)
    rope = RotaryEmbedding(layer.head_dim)(torch.arange(7))
    out = layer(torch.randn(2, 7, DIM), mask=CAUSAL, rope=rope)
    assert out.shape == (2, 7, DIM)
    out.square().sum().backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any() or name == "k_proj.bias", name


def test_head_counts_are_those_of_the_softmax_model():
    shapes = {
        kind: (layer.q_shape, layer.k_shape, layer.v_shape, layer.out_proj.in_features)
        for kind in KINDS
        for layer in [make(kind, num_heads=8, num_kv_heads=4)]
    }
    assert shapes == {
        "softmax": ((8, 8), (4, 8), (4, 8), 64),
        "diff_v1": ((4, 2, 8), (2, 2, 8), (2, 16), 64),
        "diff_v2": ((8, 2, 8), (4, 1, 8), (4, 8), 64),
        "diff_grouped": ((4, 3, 8), (4, 8), (4, 8), 64),
    }


def test_v1_has_the_parameters_of_softmax_and_its_lambdas():
    softmax, v1 = Softmax(DIM, num_heads=4), DiffAttentionV1(DIM, num_heads=4)
    assert num_parameters(v1) == num_parameters(softmax) + 4 * 16 + 2 * 16


@pytest.mark.parametrize("kind", KINDS)
def test_backends_share_one_state_dict_and_agree(kind):
    layers = [make(kind, num_kv_heads=2, backend=b) for b in BACKENDS]
    layers[1].load_state_dict(layers[0].state_dict())
    x = torch.randn(2, 9, DIM)
    torch.testing.assert_close(layers[1](x, mask=CAUSAL), layers[0](x, mask=CAUSAL))


def test_lambda_of_v1_is_equation_2():
    layer = DiffAttentionV1(DIM, num_heads=4, layer_index=3)
    dots = [
        sum(
            a * b
            for a, b in zip(
                getattr(layer, f"lambda_q{i}").tolist(),
                getattr(layer, f"lambda_k{i}").tolist(),
                strict=True,
            )
        )
        for i in (1, 2)
    ]
    start = 0.8 - 0.6 * math.exp(-0.9)
    assert layer.lambda_init == pytest.approx(start)
    expected = math.exp(dots[0]) - math.exp(dots[1]) + start
    assert layer.lam(torch.empty(0)).item() == pytest.approx(expected, rel=1e-5)


def test_lambda_init_grows_with_depth():
    assert lambda_init_at(0) == pytest.approx(0.2)
    assert lambda_init_at(100) == pytest.approx(0.8)
    assert DiffAttentionV1(DIM, num_heads=4, layer_index=5, lambda_init=0.5).lambda_init == 0.5


def test_lambda_vectors_stay_float32_to_the_bit_in_half_precision():
    layer = DiffAttentionV1(DIM, num_heads=4)
    before = layer.lam(torch.empty(0)).item()
    layer.bfloat16()
    assert layer.q_proj.weight.dtype == torch.bfloat16
    assert layer.lambda_q1.dtype == torch.float32
    assert layer.lam(torch.empty(0)).item() == before
    out = layer(torch.randn(1, 5, DIM, dtype=torch.bfloat16), mask=CAUSAL)
    assert out.dtype == torch.bfloat16
    assert layer.double().lambda_q1.dtype == torch.float64


def test_lambda_vectors_are_float32_under_a_half_default():
    torch.set_default_dtype(torch.bfloat16)
    try:
        layer = DiffAttentionV1(DIM, num_heads=4)
    finally:
        torch.set_default_dtype(torch.float32)
    assert layer.q_proj.weight.dtype == torch.bfloat16
    assert layer.lambda_k2.dtype == torch.float32


def test_lambda_of_v2_is_a_sigmoid_a_token_and_head():
    layer = DiffAttentionV2(DIM, num_heads=4)
    x = torch.randn(2, 5, DIM)
    lam = layer.lam(x)
    assert lam.shape == (2, 5, 4)
    torch.testing.assert_close(lam, layer.lambda_proj(x).sigmoid())
    assert layer.bfloat16().lam(x.bfloat16()).dtype == torch.float32


def test_v2_without_second_map_is_softmax_attention():
    v2, softmax = DiffAttentionV2(DIM, num_heads=4), Softmax(DIM, num_heads=4)
    with torch.no_grad():
        first = v2.q_proj.weight.view(4, 2, 16, DIM)[:, 0].reshape(DIM, DIM)
        softmax.q_proj.weight.copy_(first)
        for name in ("k_proj", "v_proj", "out_proj"):
            getattr(softmax, name).weight.copy_(getattr(v2, name).weight)
    v2.sign = 0.0
    x = torch.randn(2, 6, DIM)
    torch.testing.assert_close(v2(x, mask=CAUSAL), softmax(x, mask=CAUSAL))


@pytest.mark.parametrize("share", ["q", "k"])
def test_sharing_makes_components_equal(share):
    layer = DiffAttentionV1(DIM, num_heads=4, share=share)
    full = DiffAttentionV1(DIM, num_heads=4)
    assert num_parameters(layer) == num_parameters(full) - DIM * DIM // 2
    projection = f"{share}_proj.weight"
    state = layer.state_dict()
    rows = state[projection].view(2, 1, 16, DIM).expand(2, 2, 16, DIM).reshape(DIM, DIM)
    full.load_state_dict(state | {projection: rows})
    x = torch.randn(2, 6, DIM)
    torch.testing.assert_close(layer(x, mask=CAUSAL), full(x, mask=CAUSAL))


def test_without_headwise_norm_heads_come_out_as_they_are():
    layer = DiffAttentionV1(DIM, num_heads=4, headwise_norm=False)
    assert not [name for name, _ in layer.named_parameters() if "norm" in name]
    x = torch.randn(1, 1, DIM)
    value = layer.v_proj(x)  # one token attends only to itself: both maps are 1
    expected = layer.out_proj((1 - layer.lam(x)) * value)
    torch.testing.assert_close(layer(x, mask=CAUSAL), expected)


@pytest.mark.parametrize("attention", [DiffAttentionV1, DiffAttentionV2])
def test_addition_flips_lambda(attention):
    subtract, add = attention(DIM, num_heads=4), attention(DIM, num_heads=4, combine="add")
    add.load_state_dict(subtract.state_dict())
    x = torch.randn(1, 5, DIM)
    torch.testing.assert_close(add.lam(x), -subtract.lam(x))
    assert not torch.allclose(add(x, mask=CAUSAL), subtract(x, mask=CAUSAL))


def test_dex_subtracts_a_projection_of_every_head():
    """Against the loop over heads of the paper's figure 9."""
    layer = Softmax(DIM, num_heads=4, dex=True)
    own = layer.head_projections
    torch.nn.init.normal_(own.weight)
    torch.nn.init.normal_(own.lambda_per_head)
    plain = Softmax(DIM, num_heads=4)
    plain.load_state_dict(
        {n: w for n, w in layer.state_dict().items() if "head_projections" not in n}
    )
    heads = []
    plain.out_proj.register_forward_pre_hook(lambda _, inputs: heads.append(inputs[0]))
    x = torch.randn(2, 7, DIM)
    plain(x, mask=CAUSAL)
    changed = []
    for head, output in enumerate(heads[0].split(16, dim=-1)):
        mapped = output + output @ own.weight[head].T
        changed.append(output - own.lambda_per_head[head] * mapped)
    expected = plain.out_proj(torch.cat(changed, dim=-1))
    torch.testing.assert_close(layer(x, mask=CAUSAL), expected, atol=1e-5, rtol=1e-5)


def test_cosine_logits_ignore_the_length_of_queries_and_keys():
    layer = Softmax(DIM, num_heads=4, cosine_logits=True)
    x = torch.randn(2, 6, DIM)
    before = layer(x, mask=CAUSAL)
    with torch.no_grad():
        layer.q_proj.weight.mul_(7.0)
        layer.k_proj.weight.mul_(0.1)
    torch.testing.assert_close(layer(x, mask=CAUSAL), before)
    with torch.no_grad():
        layer.q_norm.logit_scale.fill_(100.0)
    q = layer.q_norm(layer.q_proj(x).unflatten(-1, layer.q_shape))
    torch.testing.assert_close(q.norm(dim=-1), torch.full((2, 6, 4), 100.0))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Softmax(DIM, num_heads=5), "num_heads must divide dim, got 5 heads for dim 64"),
        (lambda: Softmax(DIM, num_heads=4, num_kv_heads=3), "got 3 and 4"),
        (lambda: Softmax(DIM, num_heads=4, cosine_logits=True, qk_norm=True), "remove qk_norm"),
        (
            lambda: DiffAttentionV1(60, num_heads=5),
            "diff_v1 pairs its heads, so num_heads must be even, got 5",
        ),
        (
            lambda: DiffAttentionV1(DIM, num_heads=4, num_kv_heads=1),
            "num_kv_heads must be even, got 1",
        ),
        (lambda: DiffAttentionV1(DIM, num_heads=4, share="v"), "share must be one of .* got 'v'"),
        (
            lambda: DiffAttentionV2(DIM, num_heads=4, combine="substract"),
            "got 'substract'; did you mean 'subtract'",
        ),
    ],
)
def test_bad_arguments_are_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def gated(layer, x):
    """A layer's output, computed step by step: heads, exclusion of own values, norm and gate."""
    q, k, v = layer.project(x, None)
    heads = layer.attend(x, q, k, v, CAUSAL)
    if layer.exclusive:
        direction = v / v.norm(dim=-1, keepdim=True)
        direction = direction.repeat_interleave(heads.shape[2] // v.shape[2], dim=2)
        heads = heads - (heads * direction).sum(-1, keepdim=True) * direction
    heads = layer.finish(heads)
    if layer.gate_proj is not None:
        gates = layer.gate_proj(x).sigmoid()
        per_head = gates.shape[-1] == heads.shape[2]
        heads = heads * (gates.unsqueeze(-1) if per_head else gates.view_as(heads))
    return layer.out_proj(heads.flatten(2))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("output_gate", [None, "head", "element"])
@pytest.mark.parametrize("exclusive", [False, True])
def test_gates_and_exclusion_are_their_equations(kind, output_gate, exclusive):
    layer = make(kind, output_gate=output_gate, exclusive=exclusive)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    x = torch.randn(2, 6, DIM)
    torch.testing.assert_close(layer(x, mask=CAUSAL), gated(layer, x))


@pytest.mark.parametrize("kind", KINDS)
def test_exclusive_heads_are_orthogonal_to_their_own_values(kind):
    layer = make(kind, exclusive=True)
    x, seen = torch.randn(2, 6, DIM), []
    layer.finish = lambda heads: seen.append(heads) or heads
    layer(x, mask=CAUSAL)
    value = layer.project(x, None)[2]
    own = value.repeat_interleave(seen[0].shape[2] // value.shape[2], dim=2)
    torch.testing.assert_close(
        (seen[0] * own).sum(-1), torch.zeros(own.shape[:3]), atol=1e-5, rtol=0
    )


@pytest.mark.parametrize("kind", KINDS)
def test_gates_and_exclusion_look_at_the_tokens_that_come_with_a_cache(kind):
    layer = make(kind, output_gate="element", exclusive=True)
    x = torch.randn(2, 6, DIM)
    cache = KVCache(
        [layer.k_shape], [layer.v_shape], batch=2, max_length=6, dtype=x.dtype, device="cpu"
    )
    parts = []
    for start, end in ((0, 4), (4, 5), (5, 6)):
        parts.append(layer(x[:, start:end], mask=CAUSAL, cache=cache.layers(1)[0]))
        cache.advance(end - start)
    torch.testing.assert_close(torch.cat(parts, 1), layer(x, mask=CAUSAL))


def test_grouped_with_one_signal_per_noise_head_is_v2_to_the_bit():
    v2 = make("diff_v2", num_kv_heads=2, output_gate="head", exclusive=True)
    grouped = make("diff_grouped", signal_per_noise=1, output_gate="head", exclusive=True)
    grouped.load_state_dict(v2.state_dict())
    x = torch.randn(2, 6, DIM)
    outs = [layer(x, mask=CAUSAL) for layer in (v2, grouped)]
    torch.testing.assert_close(outs[1], outs[0], rtol=0, atol=0)
    grads = [
        torch.autograd.grad(out.square().sum(), list(layer.parameters()))
        for out, layer in zip(outs, (v2, grouped), strict=True)
    ]
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_grouped_is_v2_whose_noise_heads_are_copies():
    grouped = make("diff_grouped")
    v2 = make("diff_v2", num_kv_heads=2)
    state = grouped.state_dict()
    raw = state["q_proj.weight"].view(2, 3, 16, DIM)
    pairs = torch.stack([raw[:, :2], raw[:, 2:].expand(-1, 2, -1, -1)], dim=2)
    v2.load_state_dict({**state, "q_proj.weight": pairs.reshape(-1, DIM)})
    x = torch.randn(2, 6, DIM)
    torch.testing.assert_close(grouped(x, mask=CAUSAL), v2(x, mask=CAUSAL))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"signal_per_noise": 3},
            "must divide num_heads / signal_per_noise, got 4 heads and 2 key",
        ),
        ({"num_kv_heads": 4}, "got 4 heads and 4 key and value heads: set a smaller num_kv_heads"),
        ({"signal_per_noise": 0}, "signal_per_noise must be at least 1, got 0"),
        (
            {"output_gate": "layer"},
            "output_gate must be one of None, 'head', 'element', got 'layer'",
        ),
    ],
)
def test_grouped_refuses(changes, message):
    with pytest.raises(ValueError, match=message):
        make("diff_grouped", **changes)


@pytest.mark.parametrize("kind", KINDS)
def test_layers_declare_what_they_are(kind):
    layer = make(kind, output_gate="head", qk_norm=True)
    with_parameters = {n for n, part in layer.named_children() if list(part.parameters())}
    assert with_parameters <= layer.split.keys()
    assert layer.label
    assert layer.equation
    assert layer.is_differential == (layer.lam(torch.randn(1, 3, DIM)) is not None)
    assert {"num_heads", "output_gate", "backend"} <= set(layer.config_fields())


def test_a_registered_name_belongs_to_one_class():
    @register_attention("for_this_test")
    class Mine(Softmax):
        pass

    assert ATTENTIONS.pop("for_this_test") is Mine
    with pytest.raises(
        ValueError, match="'softmax' is already diffmm.layers.attention.softmax.SoftmaxAtt"
    ):
        register_attention("softmax")(Mine)
    with pytest.raises(ValueError, match="'lin' must be a subclass of Attention, got <class"):
        register_attention("lin")(torch.nn.Linear)
