"""Our attention layers compared with other implementations: recorded results of the authors' code,
and the installed timm and Hugging Face."""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from diffmm.interop.unilm import attention_tensors, load_attention
from diffmm.layers import ATTENTIONS, DiffAttentionV1, RotaryEmbedding
from diffmm.ops import AttentionMask

GOLDEN = Path(__file__).parents[1] / "golden"
CASES = sorted(path.stem for path in GOLDEN.glob("*.safetensors"))


def assert_same(actual, truth, name="", tolerance=1e-5):
    """Check equality to 1e-5 of the largest number in `truth`, the precision of float32 sums."""
    error = ((actual - truth).abs().max() / truth.abs().max()).item()
    assert error < tolerance, f"{name} is off by {error:.1e} of its largest number"


class Golden:
    """A layer of the authors' code: its case, weights, input, output and gradients."""

    def __init__(self, name):
        with safe_open(GOLDEN / f"{name}.safetensors", framework="pt") as file:
            self.case = json.loads(file.metadata()["case"])
            self.tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118

    def __getitem__(self, key):
        return self.tensors[key]

    def under(self, prefix):
        return {
            key.removeprefix(prefix): tensor
            for key, tensor in self.tensors.items()
            if key.startswith(prefix)
        }

    def load(self, weights=None, **changed):
        arguments = {
            "variant": self.case["variant"],
            "num_heads": self.case["num_heads"],
            "num_kv_heads": self.case["num_kv_heads"],
            "layer_index": self.case["depth"] or 0,
            "rope_base": self.case["rope_base"],
            "causal": self.case["causal"],
        }
        return load_attention(
            self.under("weight.") if weights is None else weights, **arguments | changed
        )


def ours(name):
    """Our name of a parameter of the authors' code."""
    return {"subln.weight": "norm.weight", "o_proj.weight": "out_proj.weight"}.get(name, name)


def test_all_vectors_are_here():
    assert CASES == ["v1_gqa", "v1_mha", "v2_gqa", "v2_mha"]


@pytest.mark.parametrize("backend", ["reference", "sdpa"])
@pytest.mark.parametrize("name", CASES)
def test_outputs_and_all_gradients_are_the_authors(name, backend):
    golden = Golden(name)
    layer = golden.load()
    layer.attention.backend = backend
    x = golden["x"].requires_grad_()
    out = layer(x)
    assert_same(out, golden["out"], "out")
    out.backward(golden["grad_out"])
    assert_same(x.grad, golden["grad_x"], "grad_x")
    parameters = dict(layer.attention.named_parameters())
    gradients = golden.under("grad.")
    assert {ours(key) for key in gradients} == set(parameters)
    for key, gradient in gradients.items():
        assert_same(parameters[ours(key)].grad, gradient, key)


def reordered(golden, key, order, head_dim):
    weights = golden.under("weight.")
    rows = weights[key].unflatten(0, (-1, head_dim))
    return weights | {key: rows[order].flatten(0, 1)}


def misreadings():
    """Layouts of the same weights that have the right shapes but are wrong."""

    def halves(golden):
        num_raw, head_dim = 2 * golden.case["num_heads"], golden.case["head_dim"]
        order = torch.arange(num_raw).unflatten(0, (2, -1)).T.flatten()
        return golden.load(reordered(golden, "q_proj.weight", order, head_dim))

    def one_key_for_both(golden):
        # The authors' plain module: raw head j reads raw key j // (h // g), here both components
        # the first key of their pair.
        order = torch.arange(2 * golden.case["num_kv_heads"]) // 2 * 2
        return golden.load(reordered(golden, "k_proj.weight", order, golden.case["head_dim"]))

    def scale_of_the_value_width(golden):
        weights = golden.under("weight.")
        return golden.load(weights | {"q_proj.weight": weights["q_proj.weight"] * 2**-0.5})

    def another_layer(golden):
        return golden.load(layer_index=golden.case["depth"] + 1)

    def another_base(golden):
        return golden.load(rope_base=2 * golden.case["rope_base"])

    def sees_the_future(golden):
        return golden.load(causal=False)

    yield from (
        (wrong, name)
        for wrong in (halves, scale_of_the_value_width, another_base, sees_the_future)
        for name in CASES
    )
    yield from ((w, n) for w in (one_key_for_both, another_layer) for n in ("v1_gqa", "v1_mha"))


@pytest.mark.parametrize(("misread", "name"), list(misreadings()))
def test_the_vectors_tell_a_misreading_apart(misread, name):
    golden = Golden(name)
    error = (misread(golden)(golden["x"]) - golden["out"]).norm() / golden["out"].norm()
    assert error > 1e-3


def test_lambda_init_enters_as_the_start_of_lambda_and_as_the_scale_of_the_heads():
    golden = Golden("v1_gqa")
    attention = golden.load().attention
    lambda_init = 0.8 - 0.6 * math.exp(-0.3 * 3)
    assert attention.lambda_init == pytest.approx(lambda_init, abs=1e-12)
    weights = golden.under("weight.")
    ends = [
        (weights[f"lambda_q{i}"].double() * weights[f"lambda_k{i}"].double()).sum().exp()
        for i in (1, 2)
    ]
    expected = (ends[0] - ends[1] + lambda_init).item()
    assert attention.lam(golden["x"]).item() == pytest.approx(expected, abs=1e-6)
    # The norm gives heads a mean square of 1 for any lambda; their scale also depends on lambda.
    heads = {}
    attention.out_proj.register_forward_pre_hook(lambda _, args: heads.update(out=args[0]))
    attention.norm.weight.data.fill_(1.0)
    attention(golden["x"], mask=AttentionMask(causal=True))
    scales = heads["out"].unflatten(-1, (-1, 16)).square().mean(-1).sqrt()
    assert scales.median().item() == pytest.approx(1 - lambda_init, rel=1e-2)


def test_lambda_keeps_its_precision_when_the_module_is_cast():
    golden = Golden("v1_gqa")
    layer = golden.load()
    exact = layer.attention.lam(golden["x"])
    layer.bfloat16()
    assert layer.attention.q_proj.weight.dtype == torch.bfloat16
    assert layer.attention.lam(golden["x"].bfloat16()).dtype == torch.float32
    assert torch.equal(layer.attention.lam(golden["x"].bfloat16()), exact)
    assert layer(golden["x"].bfloat16()).dtype == torch.bfloat16


def test_weights_in_half_precision_leave_lambda_in_float32():
    golden = Golden("v1_mha")
    weights = golden.under("weight.")
    halved = {
        key: tensor if key.startswith("lambda") else tensor.bfloat16()
        for key, tensor in weights.items()
    }
    layer = golden.load(halved)
    assert torch.equal(layer.attention.lam(golden["x"]), golden.load().attention.lam(golden["x"]))


def test_float64_weights_are_computed_in_float64():
    golden = Golden("v2_gqa")
    layer = golden.load({key: tensor.double() for key, tensor in golden.under("weight.").items()})
    out = layer(golden["x"].double())
    assert out.dtype == torch.float64
    assert_same(out.float(), golden["out"], "out")


def test_gradients_agree_where_the_two_maps_cancel():
    golden = Golden("v1_mha")
    weights = golden.under("weight.")
    head_dim = golden.case["head_dim"]
    for key in ("q_proj.weight", "k_proj.weight"):
        # The two components are nearly equal and lambda (below) is nearly 1, so that heads are
        # about 1e-4, which the norm scales up by its largest gain.
        rows = weights[key].double().unflatten(0, (-1, 2, head_dim))
        rows[:, 1] = rows[:, 0] + 1e-4 * rows[:, 1]
        weights[key] = rows.flatten(0, 2)
    weights = {key: tensor.double() for key, tensor in weights.items()}
    gradients = {}
    for backend in ("reference", "sdpa"):
        layer = golden.load(weights)
        layer.attention.backend = backend
        layer.attention.lambda_init = 1.0 - 1e-4 - (layer.attention.lam(golden["x"]).item() - 0.2)
        x = golden["x"].double().requires_grad_()
        layer(x).backward(golden["grad_out"].double())
        gradients[backend] = [x.grad, *(p.grad for p in layer.attention.parameters())]
    for reference, sdpa in zip(*gradients.values(), strict=True):
        assert_same(sdpa, reference, tolerance=1e-8)


def test_missing_and_unknown_weights_are_named():
    golden = Golden("v1_mha")
    weights = golden.under("weight.")
    del weights["subln.weight"]
    weights["o_proj.weight"] = weights.pop("out_proj.weight")
    with pytest.raises(
        ValueError, match=r"missing: out_proj.weight, subln.weight; unknown: o_proj"
    ):
        golden.load(weights)


def test_a_shape_that_does_not_fit_is_named():
    golden = Golden("v1_gqa")
    with pytest.raises(
        ValueError, match=r"k_proj.weight has shape \(32, 96\).*num_kv_heads=3 need \(48, 96\)"
    ):
        golden.load(num_kv_heads=3)
    with pytest.raises(ValueError, match=r"q_proj.weight of shape \(96, 96\).*num_heads=7 heads"):
        golden.load(num_heads=7)
    with pytest.raises(ValueError, match="variant must be one of 'v1', 'v2', got 'v3'"):
        golden.load(variant="v3")


def test_groups_that_would_split_a_pair_are_refused():
    golden = Golden("v2_gqa")
    with pytest.raises(ValueError, match="num_kv_heads must divide num_heads, got 3 and 8"):
        golden.load(num_kv_heads=3)


def assert_same_gradients(theirs, ours, x, pairs):
    """Compare an output and its gradients, for the input and for `pairs` of parameters."""
    grad_out = torch.randn_like(x)
    grads = []
    outs = []
    for forward in (theirs, ours):
        leaf = x.clone().requires_grad_()
        out = forward(leaf)
        out.backward(grad_out)
        outs.append(out)
        grads.append(leaf.grad)
    assert_same(outs[1], outs[0], "out")
    assert_same(grads[1], grads[0], "grad_x")
    for their_parameter, our_parameter in pairs:
        assert_same(our_parameter.grad, their_parameter.grad)


@pytest.mark.parametrize("causal", [False, True])
def test_timm_differential_attention(causal):
    from timm.layers import DiffAttention

    theirs = DiffAttention(64, num_heads=4, qkv_bias=True, depth=5)
    torch.nn.init.uniform_(theirs.sub_norm.weight, 0.5, 1.5)
    ours = DiffAttentionV1(64, num_heads=8, layer_index=5, qkv_bias=True, out_bias=True)
    state = {
        f"{part}_proj.{kind}": tensor
        for kind in ("weight", "bias")
        for part, tensor in zip("qkv", getattr(theirs.qkv, kind).chunk(3), strict=True)
    }
    state |= {f"out_proj.{key}": tensor for key, tensor in theirs.proj.state_dict().items()}
    state |= {name: getattr(theirs, name) for name in DiffAttentionV1.LAMBDA_NAMES}
    ours.load_state_dict(state | {"norm.weight": theirs.sub_norm.weight})
    assert_same_gradients(
        lambda x: theirs(x, is_causal=causal),
        lambda x: ours(x, mask=AttentionMask(causal=causal)),
        torch.randn(2, 19, 64),
        [
            (theirs.lambda_q1, ours.lambda_q1),
            (theirs.sub_norm.weight, ours.norm.weight),
            (theirs.proj.weight, ours.out_proj.weight),
        ],
    )


@pytest.mark.parametrize("num_kv_heads", [8, 4])
def test_hugging_face_diffllama_attention(num_kv_heads):
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    from transformers.models.diffllama.modeling_diffllama import (
        DiffLlamaAttention,
        DiffLlamaRotaryEmbedding,
    )

    config = transformers.DiffLlamaConfig(
        hidden_size=64,
        num_attention_heads=8,
        num_key_value_heads=num_kv_heads,
        rms_norm_eps=1e-5,
        attn_implementation="sdpa",
    )
    theirs = DiffLlamaAttention(config, layer_idx=2)
    ours = DiffAttentionV1(64, num_heads=8, num_kv_heads=num_kv_heads, layer_index=2)
    ours.norm.weight.requires_grad_(False)

    def interleaved(weight, num_raw, halves_to_pairs):
        # Raw head c·h + i is our 2i + c, and dims pair as (j, j + D/2) there, (2j, 2j + 1) here.
        heads = weight.unflatten(0, (2, num_raw // 2, -1)).transpose(0, 1)
        if halves_to_pairs:
            heads = heads.unflatten(2, (2, -1)).transpose(2, 3).flatten(2, 3)
        return heads.flatten(0, 2)

    with torch.no_grad():
        ours.q_proj.weight.copy_(interleaved(theirs.q_proj.weight, 8, True))
        ours.k_proj.weight.copy_(interleaved(theirs.k_proj.weight, num_kv_heads, True))
        # The value of head i consists of raw values i and i + K/2.
        ours.v_proj.weight.copy_(interleaved(theirs.v_proj.weight, num_kv_heads, False))
        ours.out_proj.weight.copy_(theirs.o_proj.weight)
        for name in DiffAttentionV1.LAMBDA_NAMES:
            getattr(ours, name).copy_(getattr(theirs, name))

    positions = torch.arange(19)
    x = torch.randn(2, 19, 64)
    rotation = DiffLlamaRotaryEmbedding(config)(x, positions[None])
    rope = RotaryEmbedding(8, config.rope_parameters["rope_theta"])
    assert_same_gradients(
        lambda x: theirs(x, rotation)[0],
        lambda x: ours(x, mask=AttentionMask(causal=True), rope=rope(positions)),
        x,
        [(theirs.lambda_k2, ours.lambda_k2), (theirs.o_proj.weight, ours.out_proj.weight)],
    )


@pytest.mark.parametrize("name", CASES)
def test_a_layer_is_written_as_it_was_read(name):
    weights = Golden(name).under("weight.")
    written = attention_tensors(Golden(name).load().attention)
    assert written.keys() == weights.keys()
    for key, tensor in written.items():
        assert torch.equal(tensor, weights[key])


@pytest.mark.parametrize(
    ("attention", "settings", "message"),
    [
        ("softmax", {}, "the authors have no SoftmaxAttention, only diff_v1 and diff_v2"),
        ("diff_v2", {"exclusive": True, "window": 3}, "hold window=3, exclusive=True"),
        ("diff_v2", {"output_gate": "head"}, "hold gate_proj.weight"),
        ("diff_v1", {"headwise_norm": False}, "v1 attention cannot hold without norm.weight"),
        ("diff_v1", {"lambda_init": 0.5}, "hold lambda_init=0.5"),
        ("diff_v1", {"combine": "add"}, "hold combine='add'"),
        ("diff_v1", {"headwise_norm_eps": 1e-6}, "hold headwise_norm_eps=1e-06"),
        ("diff_v1", {"share": "k"}, r"keys per head=\(2, 1\)"),
    ],
)
def test_what_the_authors_do_not_have_is_refused(attention, settings, message):
    layer = ATTENTIONS[attention](32, num_heads=4, layer_index=1, **settings)
    with pytest.raises(ValueError, match=message):
        attention_tensors(layer)
