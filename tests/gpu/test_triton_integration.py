"""The fused operators with torch's tools: opcheck, compilation, recomputation, CUDA graphs."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._inductor.utils import run_and_get_code

from benchmarks.gradients import make_decoder
from diffmm.ops import AttentionMask, diff_attention

pytestmark = pytest.mark.gpu

BATCH, HEADS, GROUPS = 2, 4, 2
V1, V2, WIDE = (64, 128, 2), (128, 128, 1), (128, 256, 2)  # D, E, C
NAMES = ("out", "q", "k", "v", "lam")


def make_inputs(N, M, widths):
    D, E, C = widths
    shapes = (BATCH, N, HEADS, 2, D), (BATCH, M, GROUPS, C, D), (BATCH, M, GROUPS, E)
    inputs = [torch.randn(shape, device="cuda", dtype=torch.bfloat16) for shape in shapes]
    return [x.requires_grad_() for x in (*inputs, torch.rand(BATCH, N, HEADS, device="cuda"))]


def make_mask(name, num_keys):
    keys = torch.arange(num_keys, device="cuda")
    return {
        "full": AttentionMask(),
        "causal": AttentionMask(causal=True),
        "window": AttentionMask(causal=True, window=40),
        "documents": AttentionMask(causal=True, document_ids=keys.repeat(BATCH, 1) // 50),
        "padding": AttentionMask(key_padding=keys >= torch.tensor([[0], [9]], device="cuda")),
        "prefix": AttentionMask(causal=True, prefix_lengths=torch.tensor([3, 30], device="cuda")),
    }[name]


def run(op, inputs, mask):
    """The output and the gradients of all inputs."""
    out = op(*inputs, mask)
    grad = torch.linspace(-1, 1, out.numel(), device="cuda", dtype=out.dtype).view_as(out)
    return out, *torch.autograd.grad(out, inputs, grad)


def fused(q, k, v, lam, mask):
    return diff_attention(q, k, v, lam, mask=mask, backend="triton")


@pytest.mark.parametrize("name", ["causal", "window", "documents", "padding", "prefix"])
@pytest.mark.parametrize("widths", [V1, V2, WIDE], ids=str)
def test_operators_pass_opcheck(widths, name):
    import diffmm.ops.diff_attention.triton  # noqa: F401

    inputs, mask = make_inputs(60, 60, widths), make_mask(name, 60)
    flags = mask.causal, mask.window
    given = mask.prefix_lengths, mask.document_ids, mask.key_padding
    tensors = given
    if mask.document_ids is not None:
        label = torch.ops.diffmm.document_labels.default
        torch.library.opcheck(label, (mask.document_ids, mask.key_padding, 60))
        tensors = mask.prefix_lengths, label(mask.document_ids, mask.key_padding, 60), None
    forward = torch.ops.diffmm.diff_attention.default
    plain = [x.detach() for x in inputs]
    torch.library.opcheck(forward, (*inputs, *flags, *tensors, 0.125, True))
    torch.library.opcheck(forward, (*plain, *flags, *tensors, 0.125, False))
    out, second, lse = forward(*plain, *flags, *tensors, 0.125, True)
    torch.library.opcheck(
        torch.ops.diffmm.diff_attention_backward.default,
        (torch.randn_like(out), *plain, out, second, lse, *flags, *tensors, 0.125),
    )
    few = plain[0][:, :3], *plain[1:3], plain[3][:, :3]
    decode = torch.ops.diffmm.diff_attention_decode.default
    torch.library.opcheck(decode, (*few, *flags, *given, None, 0.125))
    if mask.document_ids is None:
        end = torch.tensor(plain[1].shape[1] - 2, device="cuda")
        torch.library.opcheck(decode, (*few, *flags, *given, end, 0.125))


@pytest.mark.parametrize("name", ["full", "causal", "documents"])
@pytest.mark.parametrize("widths", [V1, V2, WIDE], ids=str)
def test_one_graph_serves_every_length(widths, name):
    counter = CompileCounterWithBackend("inductor")

    @torch.compile(fullgraph=True, backend=counter)
    def layer(q, k, v, lam, mask):
        return fused(q * 1.5, k, v, lam.sigmoid(), mask) * 2

    def plain(q, k, v, lam, mask):
        return fused(q * 1.5, k, v, lam.sigmoid(), mask) * 2

    for length in (130, 197, 64, 333):
        inputs, mask = make_inputs(length, length, widths), make_mask(name, length)
        for tensor in (*inputs, mask.document_ids):
            if tensor is not None:
                torch._dynamo.mark_dynamic(tensor, 1)
        found, wanted = run(layer, inputs, mask), run(plain, inputs, mask)
        for what, f, w in zip(NAMES, found, wanted, strict=True):
            assert (f - w).norm() <= 2e-2 * w.norm(), (length, what)
    assert counter.frame_count == 1


@pytest.mark.parametrize("name", ["causal", "window", "documents", "padding", "prefix"])
@pytest.mark.parametrize("widths", [V1, V2, WIDE], ids=str)
def test_one_graph_launches_the_kernels_of_decoding_at_every_length(widths, name):
    inputs, mask = [x.detach() for x in make_inputs(1, 600, widths)], make_mask(name, 600)
    counter = CompileCounterWithBackend("inductor")

    def step(q, k, v, lam, mask, length):
        documents, padding = (
            None if x is None else x[:, :length] for x in (mask.document_ids, mask.key_padding)
        )
        mask = AttentionMask(mask.causal, mask.window, mask.prefix_lengths, documents, padding)
        return fused(q * 1.5, k[:, :length], v[:, :length], lam, mask) * 2

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=counter)
    _, (code,) = run_and_get_code(compiled, *inputs, mask, 590)
    assert "_split_kernel" in code
    assert "ops.diffmm" not in code
    for length in (590, 591, 64, 100):
        found, wanted = compiled(*inputs, mask, length), step(*inputs, mask, length)
        assert (found - wanted).norm() <= 2e-2 * wanted.norm(), length
    assert counter.frame_count == 1


def test_auto_chooses_within_a_graph():
    from diffmm.ops.diff_attention import choose_backend

    inputs, mask = make_inputs(256, 256, V1), AttentionMask(causal=True)
    is_hopper = torch.cuda.get_device_capability()[0] == 9
    assert choose_backend(*inputs[:3], mask, 0.125) == ("triton" if is_hopper else "sdpa")

    @torch.compile(fullgraph=True)
    def layer(q, k, v, lam, mask):
        return diff_attention(q, k, v, lam, mask=mask)

    for f, w in zip(run(layer, inputs, mask), run(fused, inputs, mask), strict=True):
        assert (f - w).norm() <= 2e-2 * w.norm()


@pytest.mark.parametrize("attention", ["diff_v1", "diff_v2"])
def test_recomputed_blocks_have_the_same_gradients(attention):
    model = make_decoder(attention, head_dim=64, backend="triton", dim=256, depth=2).cuda()
    tokens = torch.randint(0, 512, (2, 200), device="cuda")

    def gradients(forward):
        model.zero_grad()
        with torch.autocast("cuda", torch.bfloat16):
            forward(tokens).float().square().mean().backward()
        return [parameter.grad.clone() for parameter in model.parameters()]

    kept = gradients(model)
    model.backbone.activation_checkpointing = True
    recomputed = gradients(model)
    assert all(torch.equal(a, b) for a, b in zip(kept, recomputed, strict=True))

    compiled = gradients(torch.compile(model, fullgraph=True))
    for (name, _), c, k in zip(model.named_parameters(), compiled, kept, strict=True):
        if "lambda" not in name:  # see test_compiled_gradients.py
            assert (c - k).norm() <= 5e-2 * k.norm(), name


@pytest.mark.parametrize("name", ["causal", "documents"])
@pytest.mark.parametrize("widths", [V1, V2, WIDE], ids=str)
def test_a_cuda_graph_replays_forward_and_backward(widths, name):
    inputs, mask = make_inputs(197, 197, widths), make_mask(name, 197)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run(fused, inputs, mask)  # compiles
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = run(fused, inputs, mask)
    with torch.no_grad():
        for x in inputs:
            x.copy_(torch.rand_like(x))
    graph.replay()
    for what, f, w in zip(NAMES, replayed, run(fused, inputs, mask), strict=True):
        assert torch.equal(f, w), what


@pytest.mark.parametrize("widths", [V1, V2, WIDE], ids=str)
def test_a_cuda_graph_replays_decoding(widths):
    inputs = [x.detach() for x in make_inputs(1, 700, widths)]
    mask = AttentionMask(causal=True)
    fused(*inputs, mask)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = fused(*inputs, mask)
    for x in inputs:
        x.copy_(torch.rand_like(x))
    graph.replay()
    assert torch.equal(replayed, fused(*inputs, mask))
