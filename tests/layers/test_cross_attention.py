"""Cross-attention against a plain reference, its masks, its gate, and what it refuses."""

import pytest
import torch
from torch import nn
from torch.nn.functional import rms_norm

from diffmm.layers import ATTENTIONS, Context, CrossAttention, KVCache
from diffmm.layers.cross_attention import context_mask

DIM, HEADS, GROUPS, HEAD_DIM = 16, 4, 2, 4
B, N, M = 2, 5, 3
KINDS = list(ATTENTIONS)


def make(kind="diff_v1", *, gated=False, **changes):
    own = {"signal_per_noise": 2} if kind == "diff_grouped" else {}
    given = {"num_heads": HEADS, "num_kv_heads": GROUPS, "layer_index": 2, **own, **changes}
    attention = ATTENTIONS[kind](DIM, **given)
    return CrossAttention(attention, nn.LayerNorm(DIM), nn.Identity(), gated=gated).double()


def inputs(num_queries=N, num_keys=M):
    x, context = (torch.randn(B, n, DIM, dtype=torch.float64) for n in (num_queries, num_keys))
    return x.requires_grad_(True), context.requires_grad_(True)


def expected(layer, kind, x, context, visible):
    """The sublayer written out, head by head; `visible` is `[B, N, M]`."""
    attention = layer.attention
    normed = nn.functional.layer_norm(x, (DIM,), layer.norm.weight, layer.norm.bias)
    queries = (normed @ attention.q_proj.weight.T).unflatten(-1, (-1, HEAD_DIM))
    keys = (context @ attention.k_proj.weight.T).unflatten(-1, (-1, HEAD_DIM))
    width = attention.v_shape[-1]
    values = (context @ attention.v_proj.weight.T).unflatten(-1, (-1, width))

    def attend(query, key):
        scores = query @ key.mT / HEAD_DIM**0.5
        weights = scores.masked_fill(~visible, -torch.inf).softmax(dim=-1)
        return weights.nan_to_num(0.0)

    heads = []
    if kind == "diff_v1":
        dots = [
            (getattr(attention, f"lambda_q{i}") * getattr(attention, f"lambda_k{i}")).sum().exp()
            for i in (1, 2)
        ]
        lam = dots[0] - dots[1] + attention.lambda_init
        for head in range(HEADS // 2):
            group = head // (HEADS // GROUPS)
            first, second = (
                attend(queries[:, :, 2 * head + c], keys[:, :, 2 * group + c]) for c in (0, 1)
            )
            found = (first - lam * second) @ values[:, :, group]
            found = rms_norm(found, (width,), attention.norm.weight, attention.norm.eps)
            heads.append((1.0 - attention.lambda_init) * found)
    else:
        # Raw query heads of a head: itself, or its signal and its noise head.
        places = {
            "softmax": lambda head: (head,),
            "diff_v2": lambda head: (2 * head, 2 * head + 1),
            "diff_grouped": lambda head: (head + head // 2, 3 * (head // 2) + 2),
        }[kind]
        lam = None
        if kind != "softmax":
            lam = (normed @ attention.lambda_proj.weight.T).sigmoid()
        for head in range(HEADS):
            group = head // (HEADS // GROUPS)
            maps = [attend(queries[:, :, place], keys[:, :, group]) for place in places(head)]
            weights = maps[0] if lam is None else maps[0] - lam[:, :, head, None] * maps[1]
            heads.append(weights @ values[:, :, group])
    return x + torch.cat(heads, dim=-1) @ attention.out_proj.weight.T


@pytest.mark.parametrize("backend", ["reference", "sdpa"])
@pytest.mark.parametrize("num_keys", [3, 8])
@pytest.mark.parametrize("kind", KINDS)
def test_it_is_the_plain_reference_in_outputs_and_gradients(kind, num_keys, backend):
    """With padding, and of the second row with nothing to attend to."""
    layer = make(kind, backend=backend)
    x, context = inputs(num_keys=num_keys)
    real = torch.ones(B, num_keys, dtype=torch.bool)
    real[0, 2:] = False
    real[1] = False
    wanted = [x, context, *layer.parameters()]
    given = torch.randn(B, N, DIM, dtype=torch.float64)
    visible = real[:, None].expand(-1, N, -1)
    found = layer(x, Context(context, context_mask(real)))
    plain = expected(layer, kind, x, context, visible)
    torch.testing.assert_close(found, plain)
    torch.testing.assert_close(found[1], x[1])
    both = (torch.autograd.grad((out * given).sum(), wanted) for out in (found, plain))
    for one, other in zip(*both, strict=True):
        assert one.any()
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("kind", KINDS)
def test_queries_see_the_context_of_their_own_document(kind):
    layer = make(kind)
    x, context = inputs(num_keys=6)
    documents = torch.tensor([[0, 0, 1, 1, 2, 2], [1, 1, 1, 0, 0, 0]])
    own = torch.tensor([[2, 0, 0, 1, 3], [0, 1, 1, 1, 0]])  # document 3 has no context
    real = torch.ones(B, 6, dtype=torch.bool)
    real[0, 1] = False
    found = layer(x, Context(context, context_mask(real, documents, own)))
    visible = (own[:, :, None] == documents[:, None]) & real[:, None]
    torch.testing.assert_close(found, expected(layer, kind, x, context, visible))
    assert torch.equal(found[0, 4], x[0, 4])
    (gradient,) = torch.autograd.grad(found[0, 3].sum(), context)
    assert (gradient.abs().sum(dim=-1) > 0).tolist() == [
        [False, False, True, True, False, False],
        [False] * 6,
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_the_order_and_the_padding_of_the_context_change_nothing(kind):
    layer = make(kind)
    x, context = inputs()
    found = layer(x, Context(context, context_mask()))
    order = torch.tensor([2, 0, 1])
    torch.testing.assert_close(layer(x, Context(context[:, order], context_mask())), found)
    padded = torch.cat([context, torch.full((B, 2, DIM), 1e3, dtype=torch.float64)], dim=1)
    real = torch.tensor([[True] * 3 + [False] * 2] * B)
    torch.testing.assert_close(layer(x, Context(padded, context_mask(real))), found)
    assert not torch.allclose(layer(x, Context(padded, context_mask())), found), "a blind test"


@pytest.mark.parametrize("kind", KINDS)
def test_norms_gates_and_biases_have_gradients(kind):
    layer = make(kind, qkv_bias=True, out_bias=True, qk_norm=True, output_gate="head", gated=True)
    nn.init.constant_(layer.gate, 0.5)
    x, context = inputs()
    out = layer(x, Context(context, context_mask()))
    out.square().sum().backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad.any() or name.endswith("k_proj.bias"), name


def test_a_gate_is_closed_at_the_start_and_can_be_opened():
    layer = make(gated=True)
    x, context = inputs()
    found = layer(x, Context(context, context_mask()))
    assert torch.equal(found, x)
    (gradient,) = torch.autograd.grad(found.square().sum(), layer.gate)
    assert gradient.any()
    nn.init.constant_(layer.gate, 0.7)
    opened = layer(x, Context(context, context_mask())) - x
    layer.gate = None
    alone = layer(x, Context(context, context_mask())) - x
    torch.testing.assert_close(opened, torch.tensor(0.7).double().tanh() * alone)


def test_keys_and_values_are_computed_once():
    layer = make()
    x, context = inputs()
    shapes = [layer.attention.k_shape], [layer.attention.v_shape]
    cache = KVCache(*shapes, batch=B, max_length=9, dtype=torch.float64, device="cpu")
    real = torch.tensor([[True] * 3, [True, False, False]])
    first = layer(x, Context(context, context_mask(real)), cache.layers(1)[0])
    calls = []
    layer.attention.k_proj.register_forward_hook(lambda *_: calls.append(1))
    later = layer(x[:, :1], None, cache.layers(1)[0])
    torch.testing.assert_close(later, first[:, :1])
    assert not calls
    assert cache.length == 0
    with pytest.raises(ValueError, match="blocks with cross-attention need a context, the images"):
        layer(x, None)


def test_what_is_refused():
    with pytest.raises(ValueError, match="exclusive=True removes a token's own value"):
        make(exclusive=True)
    with pytest.raises(ValueError, match="window=3 counts tokens of one sequence"):
        make(window=3)
