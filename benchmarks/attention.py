"""Time, rate and memory of one attention op: differential attention and softmax attention.

    python -m benchmarks.attention [--only d64] [--more] [--out FOLDER]
    python -m benchmarks.attention --choose [--lengths 1024,4096] [--widths 64]

With `--choose`, see `benchmarks.attention_choice`. Otherwise:

On one GPU in one run, for every shape: softmax attention by cuDNN and by torch's flash kernel with
the same number of query heads; v1 and v2 with the backends `sdpa` and `triton`, and with two plain
calls. All are in bfloat16; softmax is not compiled, the others are compiled for the one shape.
Times are medians of the GPU time with a cold L2 cache. The ratio is the time of forward + backward
relative to cuDNN's. The rate counts only the operations that the op needs, not those that an
implementation adds. Memory is the peak of forward + backward beyond the inputs. Host time is the
time to launch forward + backward; it matters where the GPU has nothing else to do.
"""

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
import triton
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.attention_choice import choose
from benchmarks.sdpa_composition import two_calls
from benchmarks.timing import host_ms, median_ms
from diffmm.ops import AttentionMask, diff_attention
from diffmm.ops.softmax_attention.sdpa import sdpa as softmax

# Floating-point operations of the matrix products (forward, backward), in units of D per query-key
# pair of one differential head, which is two query heads. Softmax's forward is QKᵀ and PV of both.
OPERATIONS = {"softmax": (8, 20), "v1": (12, 20), "v2": (8, 16)}


@dataclass(frozen=True)
class Shape:
    """A call with `pairs` differential heads, as many key groups, and twice as many query heads."""

    name: str
    batch: int
    length: int
    pairs: int
    D: int
    causal: bool

    def flops(self, kind: str) -> tuple[float, float]:
        """Floating-point operations of forward, and of forward + backward."""
        pairs = self.batch * self.pairs * self.length**2 / (2 if self.causal else 1)
        forward, backward = OPERATIONS[kind]
        return forward * self.D * pairs, (forward + backward) * self.D * pairs

    def inputs(self, kind: str) -> list[Tensor]:
        """Random q, k and v, and also lam for differential attention."""

        def random(*size: int) -> Tensor:
            tensor = torch.randn(self.batch, self.length, *size, device="cuda")
            return tensor.bfloat16().requires_grad_()

        if kind == "softmax":
            return [random(2 * self.pairs, self.D) for _ in range(3)]
        lam = torch.rand(self.batch, self.length, self.pairs, device="cuda", requires_grad=True)
        return [
            random(self.pairs, 2, self.D),
            random(self.pairs, 1 if kind == "v2" else 2, self.D),
            random(self.pairs, self.D if kind == "v2" else 2 * self.D),
            lam,
        ]


SHAPES = [
    Shape("d128-2k", 8, 2048, 12, 128, True),
    Shape("d128-8k", 2, 8192, 12, 128, True),
    Shape("d128-32k", 1, 32768, 12, 128, True),
    Shape("d64-4k", 4, 4096, 8, 64, True),
    Shape("d64-1k-full", 32, 1024, 8, 64, False),
    Shape("d64-197-full", 128, 197, 6, 64, False),
]
# Further shapes that `diffmm.ops.diff_attention.choose_backend` is based on.
MORE_SHAPES = [
    Shape("d32-2k", 8, 2048, 16, 32, True),
    Shape("d32-1k-full", 16, 1024, 16, 32, False),
    Shape("d32-197-full", 128, 197, 12, 32, False),
    Shape("d64-1k", 16, 1024, 8, 64, True),
    Shape("d64-2k", 8, 2048, 8, 64, True),
    Shape("d64-8k", 2, 8192, 8, 64, True),
    Shape("d64-4k-full", 4, 4096, 8, 64, False),
    Shape("d96-2k", 8, 2048, 12, 96, True),
    Shape("d128-512", 32, 512, 12, 128, True),
    Shape("d128-1k-full", 16, 1024, 8, 128, False),
    Shape("d128-197-full", 64, 197, 6, 128, False),
]


@dataclass(frozen=True)
class Row:
    """Measurements of one implementation for one shape."""

    shape: str
    kind: str
    by: str
    forward_ms: float
    both_ms: float
    forward_tflops: float
    both_tflops: float
    peak_mib: float
    host_ms: float


def measure(shape: Shape, kind: str, by: str, op: Callable[..., Tensor]) -> Row:
    """Time `op` on fresh inputs of `kind`."""
    inputs = shape.inputs(kind)
    grad = torch.randn_like(op(*inputs))

    def step() -> None:
        torch.autograd.grad(op(*inputs), inputs, grad)

    step()  # compiles the backward pass
    torch.cuda.synchronize()
    held = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    peak = (torch.cuda.max_memory_allocated() - held) / 2**20
    forward, both = median_ms(lambda: op(*inputs)), median_ms(step)
    forward_flops, both_flops = shape.flops(kind)
    return Row(
        shape.name, kind, by, forward, both,
        forward_flops / forward * 1e-9, both_flops / both * 1e-9, peak,
        host_ms(step),
    )  # fmt: skip


def implementations(shape: Shape, kind: str) -> dict[str, Callable[..., Tensor]]:
    """All implementations of attention of `kind`, by name."""
    mask, scale = AttentionMask(causal=shape.causal), shape.D**-0.5
    if kind == "softmax":
        plain = partial(softmax, mask=mask, scale=scale)
        return {
            "cuDNN": _with(SDPBackend.CUDNN_ATTENTION, plain),
            "flash": _with(SDPBackend.FLASH_ATTENTION, plain),
        }
    ops: dict[str, Callable[..., Tensor]] = {
        "sdpa": partial(diff_attention, mask=mask, backend="sdpa"),
        "triton": partial(diff_attention, mask=mask, backend="triton"),
        "two calls": partial(two_calls, mask=mask, scale=scale),
    }
    # Otherwise Dynamo would treat sizes that differ between two shapes as dynamic.
    return {by: torch.compile(op, dynamic=False) for by, op in ops.items()}


def _with(backend: SDPBackend, op: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def run(*inputs: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return op(*inputs)

    return run


def main() -> None:
    """Print the table, one line per implementation."""
    parser = argparse.ArgumentParser(description="Differential and softmax attention.")
    parser.add_argument("--only", default="", help="only shapes whose names start with this")
    parser.add_argument("--more", action="store_true", help="also the shapes behind choose_backend")
    parser.add_argument("--out", type=Path, help="folder for attention.json")
    parser.add_argument("--choose", action="store_true", help="the faster backend on this GPU")
    parser.add_argument("--lengths", default="256,1024,4096,16384", help="for --choose")
    parser.add_argument("--widths", default="64,128", help="head dimensions, for --choose")
    options = parser.parse_args()
    torch._dynamo.config.cache_size_limit = 64
    if not torch.cuda.is_available():
        raise SystemExit("this needs a CUDA device")

    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, Triton {triton.__version__}")
    if options.choose:
        lengths, widths = (
            [int(number) for number in each.split(",")]
            for each in (options.lengths, options.widths)
        )
        times = choose(lengths, widths)
        if options.out:
            options.out.mkdir(parents=True, exist_ok=True)
            (options.out / "choice.json").write_text(json.dumps([asdict(t) for t in times]))
        return
    rows: list[Row] = []
    shapes = SHAPES + MORE_SHAPES * options.more
    for shape in (s for s in shapes if s.name.startswith(options.only)):
        print(f"\n{shape.name}: 2 x {shape.pairs} heads, {shape.length} x {shape.batch}")
        print(
            f"  {'':17} {'forward':>9} {'both':>9} {'ratio':>6} {'TFLOP/s':>11} {'peak':>10} "
            f"{'host':>8}"
        )
        base = None
        for kind in OPERATIONS:
            for by, op in implementations(shape, kind).items():
                row = measure(shape, kind, by, op)
                rows.append(row)
                base = base or row.both_ms
                print(
                    f"  {kind:7} {by:9} {row.forward_ms:6.3f} ms {row.both_ms:6.3f} ms "
                    f"{row.both_ms / base:6.2f} {row.forward_tflops:5.0f} {row.both_tflops:5.0f} "
                    f"{row.peak_mib:6.0f} MiB {row.host_ms:5.2f} ms",
                    flush=True,
                )
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "attention.json").write_text(
            json.dumps([asdict(row) for row in rows], indent=1)
        )


if __name__ == "__main__":
    main()
