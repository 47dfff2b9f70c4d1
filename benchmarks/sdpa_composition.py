"""Correctness and speed of differential attention composed from torch's softmax attention.

    python -m benchmarks.sdpa_composition

Prints two tables, on one GPU in one run. The first is for decoders in bfloat16: the worst relative
error of a gradient relative to uncompiled float32, for lambda's parameters / all others, of the
uncompiled bfloat16 model and of two compiled runs (wrong gradients have differed between runs). The
second is for one compiled op: the median milliseconds of forward and of forward + backward, and of
softmax attention with the same number of query heads.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.gradients import gradients, make_decoder, relative_errors, worst
from benchmarks.timing import median_ms
from diffmm.ops import AttentionMask
from diffmm.ops.diff_attention import BACKENDS
from diffmm.ops.diff_attention.sdpa import sdpa as one_call
from diffmm.ops.softmax_attention.sdpa import sdpa as softmax

Op = Callable[..., Tensor]


def two_calls(
    q: Tensor, k: Tensor, v: Tensor, lam: Tensor, *, mask: AttentionMask, scale: float
) -> Tensor:
    """One call per component, with the full width of the values."""
    out1 = softmax(q[..., 0, :], k[..., 0, :], v, mask=mask, scale=scale)
    out2 = softmax(q[..., 1, :], k[..., -1, :], v, mask=mask, scale=scale)
    return out1 - lam.unsqueeze(-1).to(out1.dtype) * out2


def value_halves(
    q: Tensor, k: Tensor, v: Tensor, lam: Tensor, *, mask: AttentionMask, scale: float
) -> Tensor:
    """One call per component, with the halves of the values as separate heads, so that all head
    dimensions are equal."""
    halves = v.unflatten(-1, (-1, q.shape[-1])).flatten(2, 3)
    num = halves.shape[2] // v.shape[2]
    outs = [
        softmax(
            q[..., c, :].repeat_interleave(num, dim=2),
            k[..., min(c, k.shape[3] - 1), :].repeat_interleave(num, dim=2),
            halves,
            mask=mask,
            scale=scale,
        )
        .unflatten(2, (-1, num))
        .flatten(-2)
        for c in (0, 1)
    ]
    return outs[0] - lam.unsqueeze(-1).to(outs[0].dtype) * outs[1]


def padded(
    q: Tensor, k: Tensor, v: Tensor, lam: Tensor, *, mask: AttentionMask, scale: float
) -> Tensor:
    """One call, with queries and keys zero-padded to the width of the values, so that all head
    dimensions are equal."""
    pad = (0, v.shape[-1] - q.shape[-1])
    return one_call(
        torch.nn.functional.pad(q, pad),
        torch.nn.functional.pad(k, pad),
        v,
        lam,
        mask=mask,
        scale=scale,
    )


COMPOSITIONS: dict[str, Op] = {
    "one call": one_call,
    "two calls": two_calls,
    "value halves": value_halves,
    "padded": padded,
}


def gradient_errors(
    op: Op, attention: str, head_dim: int, causal: bool, grouped: bool
) -> list[tuple[float, float]]:
    """The worst relative gradient errors among lambda's parameters and among all others, of the
    uncompiled bfloat16 model and then of two compiled runs."""
    model = make_decoder(attention, head_dim=head_dim, causal=causal, grouped=grouped).cuda()
    tokens = torch.randint(0, 512, (8, 1025), device="cuda")
    BACKENDS["sdpa"] = op
    truth = gradients(model, model, tokens, torch.float32)
    candidates = [gradients(model, model, tokens, torch.bfloat16)]
    for _ in range(2):
        torch._dynamo.reset()
        candidates.append(gradients(model, torch.compile(model), tokens, torch.bfloat16))
    BACKENDS["sdpa"] = one_call
    errors = [relative_errors(candidate, truth) for candidate in candidates]
    return [(worst(e, lambdas=True), worst(e, lambdas=False)) for e in errors]


def op_times(
    op: Op | None, shape: tuple[int, int, int, int, bool], v2: bool
) -> tuple[float, float]:
    """Milliseconds of forward and of forward + backward; `None` means cuDNN's softmax attention."""
    batch, length, pairs, head_dim, causal = shape
    mask = AttentionMask(causal=causal)
    scale = head_dim**-0.5

    def random(*size: int) -> Tensor:
        return torch.randn(*size, device="cuda", dtype=torch.bfloat16, requires_grad=True)

    if op is None:
        inputs = [random(batch, length, 2 * pairs, head_dim) for _ in range(3)]
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return _times(lambda q, k, v: softmax(q, k, v, mask=mask, scale=scale), inputs)
    inputs = [
        random(batch, length, pairs, 2, head_dim),
        random(batch, length, pairs, 1 if v2 else 2, head_dim),
        random(batch, length, pairs, head_dim if v2 else 2 * head_dim),
        torch.rand(batch, length, pairs, device="cuda", requires_grad=True),
    ]
    # Otherwise Dynamo would treat sizes that differ between two shapes as dynamic.
    compiled = torch.compile(lambda *x: op(*x, mask=mask, scale=scale), dynamic=False)
    return _times(compiled, inputs)


def _times(run: Callable[..., Tensor], inputs: list[Tensor]) -> tuple[float, float]:
    grad = torch.randn_like(run(*inputs))

    def step() -> None:
        torch.autograd.grad(run(*inputs), inputs, grad)

    forward, both = median_ms(lambda: run(*inputs)), median_ms(step)
    return forward, both


def main() -> None:
    """Print both tables."""
    torch._dynamo.config.cache_size_limit = 64
    print(torch.cuda.get_device_name(), "torch", torch.__version__)
    print(
        "\nworst relative gradient error, lambda / others: uncompiled bfloat16, two compiled runs"
    )
    for head_dim, attention, causal, grouped in (
        (32, "diff_v1", True, False),
        (64, "diff_v1", True, True),
        (128, "diff_v1", True, False),
        (32, "diff_v2", True, True),
    ):
        for name, op in COMPOSITIONS.items():
            errors = gradient_errors(op, attention, head_dim, causal, grouped)
            print(
                f"{attention} d {head_dim:3} {'causal' if causal else 'full  '} "
                f"{'grouped' if grouped else '       '} {name:13}",
                *(f"{lam:8.4f} / {other:.4f}" for lam, other in errors),
                flush=True,
            )
    print("\nms, forward / forward + backward")
    for label, shape in (
        ("2 x 12 heads, d 128, 2048 x 8, causal", (8, 2048, 12, 128, True)),
        ("2 x 12 heads, d 128, 8192 x 2, causal", (2, 8192, 12, 128, True)),
        ("2 x 8 heads, d 64, 4096 x 4, causal", (4, 4096, 8, 64, True)),
        ("2 x 8 heads, d 64, 1024 x 32, full", (32, 1024, 8, 64, False)),
        ("2 x 6 heads, d 64, 197 x 128, full", (128, 197, 6, 64, False)),
    ):
        print(label)
        base = op_times(None, shape, False)
        print(f"  {'softmax cuDNN':17} {base[0]:8.3f} {base[1]:8.3f}")
        for v2 in (False, True):
            for name, op in COMPOSITIONS.items():
                forward, both = op_times(op, shape, v2)
                print(
                    f"  {'v2' if v2 else 'v1'} {name:14} {forward:8.3f} {both:8.3f}"
                    f"   x{both / base[1]:.2f}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
