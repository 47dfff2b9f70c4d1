"""Finds the best tiles of the fused kernels, which `triton/tiles.py` uses.

    python -m benchmarks.attention_tiles [--out FOLDER] [--only v1-128]

Compiles every candidate in parallel processes and compares each with the float64 reference on a
small problem. Then times the correct ones, one kernel at a time, together with cuDNN's softmax
attention with the same number of query heads, on one GPU in one run. On Hopper, the kernels written
for it are also candidates; `combined` is the forward pass with one value product
(`benchmarks.combined_forward`), which the library does not use. Prints the best candidates for
every kernel and shape, and their total time without `combined`; `--out` receives every number as
JSON.
"""

import argparse
import importlib
import json
import multiprocessing
import os
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.combined_forward import combined_forward
from benchmarks.timing import median_ms
from diffmm.ops import AttentionMask
from diffmm.ops.diff_attention.reference import reference
from diffmm.ops.diff_attention.triton.backward import key_gradients, query_gradient
from diffmm.ops.diff_attention.triton.forward import forward
from diffmm.ops.diff_attention.triton.masking import KernelMask
from diffmm.ops.diff_attention.triton.rows import query_rows
from diffmm.ops.diff_attention.triton.tiles import Tile
from diffmm.ops.softmax_attention.sdpa import sdpa as softmax

# Maximum relative error of a correct candidate; bfloat16 kernels have errors of 2e-3 to 6e-3.
TOLERANCE = 2e-2
SECONDS_TO_COMPILE = 200
HOPPER_PACKAGE = "diffmm.ops.diff_attention.triton.hopper"


@dataclass(frozen=True)
class Problem:
    """One shape of differential attention, with as many key groups as heads."""

    name: str
    batch: int
    length: int
    heads: int
    D: int
    E: int
    C: int
    causal: bool

    def flops(self, kernel: str) -> float:
        """Floating-point operations of a kernel's matrix products."""
        score, value = 2 * self.D, self.E  # multiply-adds per pair: both maps, one value product
        count = {
            "forward": score + 2 * value,
            "combined": 2 * score + value,
            "key": 2 * score + 2 * value,
            "query": 2 * score + value,
            "gradients": 3 * score + 2 * value,
        }[kernel]
        pairs = self.batch * self.heads * self.length**2 / (2 if self.causal else 1)
        return 2.0 * count * pairs


PROBLEMS = [
    Problem("v1-128-2k", 8, 2048, 12, 128, 256, 2, True),
    Problem("v1-128-8k", 2, 8192, 12, 128, 256, 2, True),
    Problem("v2-128-2k", 8, 2048, 12, 128, 128, 1, True),
    Problem("v2-128-8k", 2, 8192, 12, 128, 128, 1, True),
    Problem("v1-64-4k", 4, 4096, 8, 64, 128, 2, True),
    Problem("v1-64-1k-full", 32, 1024, 8, 64, 128, 2, False),
    Problem("v1-64-197-full", 128, 197, 6, 64, 128, 2, False),
]


@dataclass(frozen=True)
class Candidate:
    """A kernel (`gradients` computes key and query gradients together), the widths and the mask
    that it is compiled for, and its tile or its module in `hopper`."""

    kernel: str
    D: int
    E: int
    C: int
    causal: bool
    tile: Tile | None = None
    hopper: str = ""

    def label(self) -> str:
        tile = self.tile
        if tile is None:
            return f"hopper.{self.hopper}"
        name = f"n{tile.block_n} m{tile.block_m} w{tile.num_warps} s{tile.num_stages}"
        return f"{name}{' split' if tile.split else ''}"


# Tiles whose accumulators do not fit, or that were far slower on an H100, are omitted. `WIDE` is
# for `E > 128`.
WIDE: dict[str, list[tuple[int, int, int, int]]] = {
    "forward split": [(128, 64, 8, 3), (128, 64, 8, 4), (128, 128, 8, 2), (64, 64, 4, 2),
                      (64, 32, 4, 3), (64, 32, 4, 4), (128, 32, 8, 4)],
    "combined": [(128, 64, 8, 2), (128, 32, 8, 2), (128, 32, 8, 3), (64, 64, 4, 2), (64, 32, 4, 3)],
    "key": [(64, 64, 8, 2), (32, 64, 8, 2)],
    "query": [(128, 32, 8, 2), (128, 32, 8, 3), (64, 16, 4, 2), (64, 32, 4, 2), (128, 64, 8, 1)],
}  # fmt: skip
NARROW: dict[str, list[tuple[int, int, int, int]]] = {
    "forward": [(64, 64, 4, 2), (64, 64, 4, 3), (128, 64, 8, 2), (128, 64, 8, 3), (64, 32, 4, 3)],
    "forward split": [(64, 64, 4, 2), (128, 128, 8, 3)],
    "combined": [(64, 64, 4, 2), (64, 64, 4, 3), (128, 64, 8, 3), (128, 64, 4, 3),
                 (128, 128, 8, 2), (64, 128, 4, 2)],
    "key": [(32, 64, 4, 2), (64, 64, 4, 2), (32, 64, 4, 3), (32, 128, 8, 2), (64, 128, 8, 2)],
    "query": [(64, 64, 4, 2), (64, 32, 4, 2), (64, 32, 4, 3), (64, 32, 4, 4), (128, 32, 8, 3),
              (128, 64, 8, 3)],
}  # fmt: skip
HOPPER = [("forward", "forward"), ("gradients", "backward")]


def candidates() -> list[Candidate]:
    """All candidates; each width has its own list, because the number of registers is limited."""
    found = []
    for D, E, C, causal in sorted({(p.D, p.E, p.C, p.causal) for p in PROBLEMS}):
        for name, tiles in (WIDE if E > 128 else NARROW).items():
            kernel, split = name.removesuffix(" split"), name.endswith(" split")
            found += [Candidate(kernel, D, E, C, causal, Tile(*t, split=split)) for t in tiles]
        if torch.cuda.get_device_capability()[0] == 9:
            for kernel, module in HOPPER:
                found.append(Candidate(kernel, D, E, C, causal, hopper=module))
    return found


class Inputs:
    """Random tensors of one problem, and the intermediate results of the kernels."""

    def __init__(self, batch: int, length: int, heads: int, D: int, E: int, C: int, causal: bool):
        def random(*size: int) -> Tensor:
            return torch.randn(*size, device="cuda", dtype=torch.bfloat16)

        self.q, self.k = random(batch, length, heads, 2, D), random(batch, length, heads, C, D)
        self.v, self.grad = random(batch, length, heads, E), random(batch, length, heads, E)
        self.lam = torch.rand(batch, length, heads, device="cuda")
        self.mask, self.scale = (
            KernelMask.of(AttentionMask(causal=causal), length, length),
            D**-0.5,
        )
        tile = Tile(64, 32, 4, 2, split=E > 128)
        out, second, self.lse = self.forward(tile)
        assert second is not None
        self.out, self.second = out, second
        self.rows, self.lam_grad = query_rows(self.grad, self.out, self.second, self.lam, self.lse)

    def forward(self, tile: Tile) -> tuple[Tensor, Tensor | None, Tensor]:
        return forward(
            self.q, self.k, self.v, self.lam, self.mask, self.scale, keep_second=True, tile=tile
        )

    def run(self, candidate: Candidate) -> tuple[Tensor, ...]:
        shared = (self.grad, self.q, self.k, self.v, self.rows, self.mask, self.scale)
        if candidate.tile is None:
            module = importlib.import_module(f"{HOPPER_PACKAGE}.{candidate.hopper}")
            if candidate.kernel == "forward":
                found = module.forward(self.q, self.k, self.v, self.lam, self.mask, self.scale)
            else:
                found = module.gradients(*shared)
            return tuple(found)
        if candidate.kernel == "forward":
            out, second, lse = self.forward(candidate.tile)
            assert second is not None
            return out, second, lse
        if candidate.kernel == "combined":
            found = combined_forward(
                self.q, self.k, self.v, self.lam, causal=candidate.causal, scale=self.scale,
                tile=candidate.tile,
            )  # fmt: skip
            return (found,)
        if candidate.kernel == "query":
            return (query_gradient(*shared, tile=candidate.tile),)
        return key_gradients(*shared, tile=candidate.tile)


@dataclass(frozen=True)
class Truth:
    """A small problem of irregular size and its results in float64."""

    inputs: Inputs
    out: Tensor
    dq: Tensor
    dk: Tensor
    dv: Tensor
    dlam: Tensor

    @classmethod
    def of(cls, D: int, E: int, C: int, causal: bool) -> "Truth":
        torch.manual_seed(0)
        inputs = Inputs(1, 333, 2, D, E, C, causal)
        leaves = [t.double().requires_grad_() for t in (inputs.q, inputs.k, inputs.v, inputs.lam)]
        out = reference(*leaves, mask=AttentionMask(causal=causal), scale=inputs.scale)
        return cls(inputs, out.detach(), *torch.autograd.grad(out, leaves, inputs.grad.double()))


def error_of(candidate: Candidate, truth: Truth) -> float:
    """The largest relative error of a candidate's outputs; NaN if any output is NaN."""
    # The memory that the allocator returns next holds NaN wherever a kernel does not write.
    poison = torch.full((64 << 20,), torch.nan, device="cuda", dtype=torch.bfloat16)
    del poison
    results = truth.inputs.run(candidate)
    wanted = {
        "forward": (truth.out,),
        "combined": (truth.out,),
        "key": (truth.dk, truth.dv),
        "query": (truth.dq,),
        "gradients": (truth.dq, truth.dk, truth.dv),
    }[candidate.kernel]
    assert truth.inputs.lam_grad is not None
    pairs = [(truth.inputs.lam_grad, truth.dlam), *zip(results, wanted, strict=False)]
    errors = [(got.double() - want).norm() / want.norm() for got, want in pairs]
    return torch.stack(errors).max().item()


def compile_and_check(todo: list[tuple[int, Candidate]], path: str) -> None:
    """A worker process: write a line for every candidate; exit if the CUDA context is lost."""
    truths: dict[tuple[int, int, int, bool], Truth] = {}
    with open(path, "a") as file:
        for number, candidate in todo:
            start = time.time()
            line: dict[str, object] = {"number": number}
            file.write(json.dumps({"number": number, "started": True}) + "\n")
            file.flush()
            lost = False
            try:
                widths = (candidate.D, candidate.E, candidate.C, candidate.causal)
                if widths not in truths:
                    truths[widths] = Truth.of(*widths)
                line["error"] = error_of(candidate, truths[widths])
            except Exception as failure:
                text = f"{type(failure).__name__}: {failure}".splitlines()[0][:200]
                line["failure"] = text
                lost = "CUDA error" in text or "illegal" in text
            line["seconds"] = round(time.time() - start, 1)
            file.write(json.dumps(line) + "\n")
            file.flush()
            if lost:
                os._exit(1)


def check_all(todo: list[Candidate], processes: int) -> list[dict[str, object]]:
    """Return the error or failure of every candidate, computed by parallel processes, which also
    fill Triton's cache."""
    results: list[dict[str, object]] = [{"failure": "not run"} for _ in todo]
    with tempfile.TemporaryDirectory() as folder:
        context = multiprocessing.get_context("spawn")
        # Neighbors in the list take similar times to compile, so they are distributed in turn.
        hands = [list(enumerate(todo))[start::processes] for start in range(processes)]
        paths = [f"{folder}/{worker}.jsonl" for worker in range(processes)]
        workers = [
            context.Process(target=compile_and_check, args=(hand, path), daemon=True)
            for hand, path in zip(hands, paths, strict=True)
        ]
        for worker in workers:
            worker.start()
        deadline = time.time() + SECONDS_TO_COMPILE
        while time.time() < deadline and any(worker.is_alive() for worker in workers):
            time.sleep(0.5)
            for index, worker in enumerate(workers):
                done = _lines(paths[index])
                if not worker.is_alive() and worker.exitcode:
                    left = [pair for pair in hands[index] if pair[0] not in done]
                    hands[index] = left
                    if left:
                        workers[index] = context.Process(
                            target=compile_and_check, args=(left, paths[index]), daemon=True
                        )
                        workers[index].start()
        for worker in workers:
            if worker.is_alive():
                worker.kill()
        for path in paths:
            for number, line in _lines(path).items():
                results[number] = line
    return results


def _lines(path: str) -> dict[int, dict[str, object]]:
    if not Path(path).exists():
        return {}
    lines: dict[int, dict[str, object]] = {}
    for text in Path(path).read_text().splitlines():
        line = json.loads(text)
        if line.pop("started", False):
            line["failure"] = "did not return"
        lines[line["number"]] = line
    return lines


def softmax_ms(problem: Problem) -> tuple[float, float]:
    """Milliseconds of forward and backward of cuDNN's softmax attention of the same size."""
    size = (problem.batch, problem.length, 2 * problem.heads, problem.D)
    q, k, v = (
        torch.randn(*size, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        for _ in range(3)
    )
    mask, scale = AttentionMask(causal=problem.causal), problem.D**-0.5
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        out = softmax(q, k, v, mask=mask, scale=scale)
        grad = torch.randn_like(out)
        forward_ms = median_ms(lambda: softmax(q, k, v, mask=mask, scale=scale))
        backward_ms = median_ms(
            lambda: torch.autograd.grad(out, (q, k, v), grad, retain_graph=True)
        )
    return forward_ms, backward_ms


def measure(
    problem: Problem,
    right: list[tuple[Candidate, dict[str, object]]],
    table: list[dict[str, object]],
    num_printed: int,
) -> str:
    """Time every candidate for one problem, add the results to `table` and return a summary."""
    base_forward, base_backward = softmax_ms(problem)
    widths = (problem.D, problem.E, problem.C, problem.causal)
    inputs = Inputs(problem.batch, problem.length, problem.heads, *widths)

    def time_of(candidate: Candidate) -> float:
        return median_ms(lambda: inputs.run(candidate), warmup=2, repeats=7)

    times: dict[str, list[tuple[float, str]]] = {}
    for candidate, check in right:
        if (candidate.D, candidate.E, candidate.C, candidate.causal) != widths:
            continue
        ms = time_of(candidate)
        times.setdefault(candidate.kernel, []).append((ms, candidate.label()))
        table.append({"problem": problem.name, **asdict(candidate), "ms": ms, **check})
    rows = median_ms(
        lambda: query_rows(inputs.grad, inputs.out, inputs.second, inputs.lam, inputs.lse)
    )
    print(
        f"\n{problem.name}: cuDNN softmax {base_forward:.3f} + {base_backward:.3f} ms, "
        f"rows {rows:.3f} ms"
    )
    best = {}
    for kernel, found in times.items():
        found.sort()
        best[kernel] = found[0][0]
        for ms, label in found[:num_printed]:
            rate = problem.flops(kernel) / ms * 1e-9
            print(f"  {kernel:11} {ms:7.3f} ms {rate:5.0f} TF/s  {label}")
    nothing = float("inf")
    gradients = min(
        best.get("gradients", nothing), best.get("key", nothing) + best.get("query", nothing)
    )
    first, second = best.get("forward", nothing), gradients + rows
    both = base_forward + base_backward
    return (
        f"{problem.name:16} softmax {both:7.2f} ms  forward x{first / base_forward:.2f}  "
        f"backward x{second / base_backward:.2f}  both x{(first + second) / both:.2f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Find the best tiles of the fused kernels.")
    parser.add_argument("--out", type=Path, help="folder for tiles.json")
    parser.add_argument("--only", default="", help="only problems whose names start with this")
    parser.add_argument("--processes", type=int, default=min(14, os.cpu_count() or 1))
    parser.add_argument(
        "--best", type=int, default=3, help="number of candidates to print per kernel"
    )
    options = parser.parse_args()

    problems = [p for p in PROBLEMS if p.name.startswith(options.only)]
    widths = {(p.D, p.E, p.C, p.causal) for p in problems}
    todo = [c for c in candidates() if (c.D, c.E, c.C, c.causal) in widths]
    start = time.time()
    checks = check_all(todo, options.processes)
    print(f"{len(todo)} candidates compiled and checked in {time.time() - start:.0f} s")
    kinds: dict[str, int] = {}
    for candidate, check in zip(todo, checks, strict=True):
        failure = str(check.get("failure", ""))
        error = check.get("error")
        if not failure and not (isinstance(error, float) and error < TOLERANCE):
            failure = f"wrong: {error}"
            print("WRONG", candidate.kernel, candidate.D, candidate.E, candidate.label(), error)
        if failure:
            kinds[failure[:90]] = kinds.get(failure[:90], 0) + 1
        check["right"] = not failure
    for failure, count in sorted(kinds.items()):
        print(f"  {count} x {failure}")

    right = [(c, check) for c, check in zip(todo, checks, strict=True) if check["right"]]
    table: list[dict[str, object]] = []
    summary = [measure(problem, right, table, options.best) for problem in problems]
    print(f"\n{torch.cuda.get_device_name()}, {time.time() - start:.0f} s, ratios to cuDNN softmax")
    print("\n".join(summary))
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "tiles.json").write_text(json.dumps({"table": table, "checks": [
            {**asdict(candidate), **check} for candidate, check in zip(todo, checks, strict=True)
        ]}, indent=1))  # fmt: skip


if __name__ == "__main__":
    main()
