"""Rotary positions, norms and the cache."""

import pytest
import torch

import diffmm
from diffmm.layers import KVCache, LayerNorm, RMSNorm, RotaryEmbedding, apply_rope


def test_rotation_is_complex_multiplication():
    rope = RotaryEmbedding(8, base=100.0)
    positions = torch.tensor([0.0, 3.0, 10.0])
    x = torch.randn(2, 3, 4, 8, dtype=torch.float64)
    turns = torch.polar(torch.ones(3, 4), positions[:, None] * 100.0 ** (-torch.arange(4) / 4))
    expected = torch.view_as_real(torch.view_as_complex(x.view(2, 3, 4, 4, 2)) * turns[:, None])
    found = apply_rope(x, rope(positions))
    torch.testing.assert_close(found, expected.flatten(-2), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("num_axes", [1, 2])
def test_scores_depend_on_differences_alone(num_axes):
    rope = RotaryEmbedding(16, num_axes=num_axes)
    q, k = torch.randn(1, 5, 2, 16), torch.randn(1, 5, 2, 16)
    positions = torch.randint(0, 50, (5, 2) if num_axes == 2 else (5,)).float()

    def scores(shift):
        rotation = rope(positions + shift)
        return torch.einsum("bnhd,bmhd->bhnm", apply_rope(q, rotation), apply_rope(k, rotation))

    torch.testing.assert_close(scores(0), scores(23), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("base", "head_dim"), [(10000.0, 64), (500000.0, 128), (100.0, 6)])
def test_frequencies_are_rounded_once(base, head_dim):
    steps = torch.arange(0, head_dim, 2, dtype=torch.float64)
    expected = (base ** (-steps / head_dim)).float()
    frequencies = RotaryEmbedding(head_dim, base).frequencies
    for moved in (frequencies, frequencies.half(), frequencies.double()):
        assert moved.value.float().equal(expected)


@pytest.mark.parametrize("sound", [False, True])
def test_models_of_the_meta_device_take_weights_by_assignment(sound):
    """Rotations, windows and filters are in no state, and must not stay on the meta device."""
    name = "audio/sound_events_tiny" if sound else "text/stdlib_tiny"
    model = diffmm.create_model(name).eval()
    inputs = torch.randn(2, 8000) if sound else torch.randint(256, (2, 9))
    with torch.device("meta"):
        other = type(model)(model.config)
    other.load_state_dict(model.state_dict(), assign=True)
    torch.testing.assert_close(other.eval()(inputs), model(inputs), rtol=0, atol=0)


def test_position_zero_is_no_rotation():
    x = torch.randn(1, 1, 2, 8)
    torch.testing.assert_close(apply_rope(x, RotaryEmbedding(8)(torch.zeros(1))), x)


def test_axes_turn_their_own_dims():
    rope = RotaryEmbedding(8, num_axes=2)
    x = torch.randn(1, 1, 1, 8)
    turned = apply_rope(x, rope(torch.tensor([[5.0, 0.0]])))
    assert not torch.allclose(turned[..., :4], x[..., :4])
    torch.testing.assert_close(turned[..., 4:], x[..., 4:])


def test_positions_a_sample_equal_positions_for_all():
    x, rope = torch.randn(2, 5, 2, 8), RotaryEmbedding(8)
    positions = torch.arange(5)
    torch.testing.assert_close(
        apply_rope(x, rope(positions.expand(2, 5))), apply_rope(x, rope(positions))
    )


def test_angles_are_exact_far_out_whatever_the_precision():
    rope = RotaryEmbedding(8).bfloat16()
    cos, _ = rope(torch.tensor([10_000]))
    assert cos.dtype == torch.float32
    assert cos[0, 0].item() == pytest.approx(torch.tensor(10_000.0).cos().item(), abs=1e-6)


@pytest.mark.parametrize("num_axes", [1, 2])
@pytest.mark.parametrize("num_tokens", [5, 1])
def test_compiled_graphs_compute_rotations_once(num_tokens, num_axes):
    rope, graphs = RotaryEmbedding(8, num_axes=num_axes), []

    def turn(q, k, positions):
        rotation = rope(positions)
        return apply_rope(q, rotation), apply_rope(k, rotation)

    def backend(graph, _):
        graphs.append([str(node.target) for node in graph.graph.nodes])
        return graph

    q, k = torch.randn(2, 1, num_tokens, 2, 8)
    positions = torch.arange(2 * num_tokens).view(num_tokens, 2)[:, :num_axes].squeeze(-1)
    for found, wanted in zip(
        torch.compile(turn, fullgraph=True, dynamic=True, backend=backend)(q, k, positions),
        turn(q, k, positions),
        strict=True,
    ):
        torch.testing.assert_close(found, wanted)
    (targets,) = graphs
    assert targets.count("diffmm.rotation_at.default") == (num_tokens > 1)
    assert targets.count("cos") == (num_tokens == 1)


def test_compiled_rotations_of_any_positions():
    rope = RotaryEmbedding(8)
    compiled = torch.compile(rope, fullgraph=True, backend="aot_eager")
    whole = torch.arange(10).view(5, 2)
    for positions in (
        whole.T,
        whole[:1].expand(5, 2),
        whole.float(),
        whole.float().requires_grad_(),
    ):
        for found, wanted in zip(compiled(positions), rope(positions), strict=True):
            torch.testing.assert_close(found, wanted)
            assert found.requires_grad == wanted.requires_grad


def test_an_exported_rotation_has_torchs_operators_alone():
    rope = RotaryEmbedding(8)
    exported = torch.export.export(rope, (torch.arange(5),))
    assert not any("diffmm" in str(node.target) for node in exported.graph.nodes)
    torch.testing.assert_close(exported.module()(torch.arange(5)), rope(torch.arange(5)))


@pytest.mark.parametrize(
    "positions",
    [
        torch.rand(5, 1),
        torch.rand(2, 5, 1),
        torch.rand(5, 2),
        torch.rand(5, 2).mT.unsqueeze(-1),
        torch.rand(1, 5, 1).expand(3, 5, 1),
        torch.arange(5).view(5, 1),
    ],
    ids=["N1", "BN1", "N2", "transposed", "expanded", "integers"],
)
def test_the_operator_of_rotations_is_well_formed(positions):
    """Its outputs have the strides on which machine code relies, whatever those of its input."""
    operator, frequencies = torch.ops.diffmm.rotation_at.default, torch.rand(4)
    torch.library.opcheck(operator, (positions, frequencies, 1.5))
    found = operator(positions, frequencies, 1.5)
    promised = operator(positions.to("meta"), frequencies.to("meta"), 1.5)
    for ours, theirs in zip(found, promised, strict=True):
        assert ours.stride() == theirs.stride()


def test_odd_head_dims_are_refused():
    with pytest.raises(ValueError, match="over 2 axes needs .* a multiple of 4, got 6"):
        RotaryEmbedding(6, num_axes=2)


def test_rms_norm_is_torchs():
    ours, theirs = RMSNorm(8), torch.nn.RMSNorm(8, eps=1e-5)
    torch.nn.init.normal_(ours.weight)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(3, 8)
    torch.testing.assert_close(ours(x), theirs(x))
    assert not ours(torch.zeros(1, 8)).any()


@pytest.mark.parametrize("norm", [RMSNorm(8), LayerNorm(8)])
def test_norms_compute_in_float32(norm):
    x = (torch.randn(4, 8) * 1e3).bfloat16()
    assert norm(x).dtype == torch.bfloat16
    torch.testing.assert_close(norm(x), norm(x.float()).bfloat16())


def test_the_cache_grows_and_refuses_to_overflow():
    cache = KVCache([(2, 4)], [(2, 3)], batch=1, max_length=5, dtype=torch.float32, device="cpu")
    first, second = torch.randn(1, 3, 2, 4), torch.randn(1, 2, 2, 4)
    values = torch.randn(1, 3, 2, 3)
    cache.layers(1)[0].update(first, values)
    cache.advance(3)
    keys, _ = cache.layers(1)[0].update(second, values[:, :2])
    torch.testing.assert_close(keys, torch.cat([first, second], dim=1))
    cache.advance(2)
    with pytest.raises(ValueError, match="the cache holds 5 tokens, but 6 are needed"):
        cache.layers(1)[0].update(second[:, :1], values[:, :1])
