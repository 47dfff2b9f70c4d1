"""Decoding with a key-value cache: tokens per second of models, and the attention op alone.

    python -m benchmarks.decode [--models softmax,v1-triton] [--out DIR]

Runs on one GPU, for 1, 16 and 64 sequences with contexts of 1K and 32K tokens. The model (dim 2048,
8 blocks, 16 query heads of 128, 4 key heads, 492 M parameters in bfloat16) reads the cache of
`diffmm.generate`, filled with random numbers, and selects the most likely token:

* `compiled`: consecutive steps of the compiled model, as in `generate`;
* `graph`: one such step in a CUDA graph, replayed, which measures GPU time only.

`op` is the attention op alone, with a query of one token per sequence and the cache of one layer,
uncompiled in a CUDA graph with a cold L2 cache. The models alternate for `--rounds` rounds; ratios
are those of the rates to softmax attention in the same round, and the medians over all rounds are
shown. With `--smoke`, tiny sizes on the CPU test this program (without graphs).
"""

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from benchmarks.models import TEXT_GROUPED, TEXT_SMOKE, TextSize
from benchmarks.timing import median_ms
from benchmarks.train_step import chosen, synchronize
from diffmm.layers.cache import KVCache
from diffmm.models import TextModel
from diffmm.ops import AttentionMask, diff_attention, softmax_attention

# Kind and backend of the attention op, softmax first and then the most important ones.
MODELS = {
    "softmax": ("softmax", "auto"),
    "v1-triton": ("v1", "triton"),
    "v2-triton": ("v2", "triton"),
    "v1-sdpa": ("v1", "sdpa"),
    "v2-sdpa": ("v2", "sdpa"),
}
CONTEXTS, BATCHES = (1024, 32768), (1, 16, 64)


@dataclass(frozen=True)
class Row:
    """Medians of one model or op for one shape, with the rate in tokens per second."""

    what: str
    model: str
    batch: int
    context: int
    rate: float
    ms: float
    ratio: float


class Decoder:
    """A compiled model that alternates with others; between turns it only holds its weights."""

    def __init__(self, model: TextModel) -> None:
        self.model = model.eval()
        self.compiled = torch.compile(model, dynamic=True)

    def step(self, tokens: Tensor, position: Tensor, cache: KVCache) -> Tensor:
        """The most likely next token of each sequence, `[B, 1]`."""
        mask = AttentionMask(causal=True)
        logits = self.compiled(tokens, mask=mask, positions=position, cache=cache)
        return logits[:, -1:].argmax(dim=-1)

    @torch.no_grad()
    def take_turn(self, batch: int, context: int, steps: int) -> dict[str, float]:
        """Seconds per step with about `context` tokens in the cache, for each way of running it."""
        # As in `generate`, the cache always has room for one more token: a full one is recompiled.
        cache = self.model.new_cache(batch, context + 1)
        for buffer in (*cache.keys, *cache.values):
            buffer.normal_()
        tokens = torch.zeros(batch, 1, dtype=torch.long, device=buffer.device)
        position = torch.full((1,), context - 1, device=buffer.device)
        warmup = 4  # compiles, and fills the allocator
        cache.length = context - steps - warmup
        for _ in range(warmup):
            tokens = self.step(tokens, position, cache)
        synchronize()
        start = time.perf_counter()
        for _ in range(steps):
            tokens = self.step(tokens, position, cache)
        synchronize()
        seconds = {"compiled": (time.perf_counter() - start) / steps}
        if not tokens.is_cuda:
            return seconds

        cache.length = context - 1
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.step(tokens, position, cache)
        graph.replay()
        synchronize()
        start = time.perf_counter()
        for _ in range(steps):
            graph.replay()
        synchronize()
        return {**seconds, "graph": (time.perf_counter() - start) / steps}


def measure_models(
    decoders: dict[str, Decoder], batch: int, context: int, *, rounds: int, steps: int
) -> list[Row]:
    """Return a row for every model and way of running a step."""
    turns: dict[str, list[dict[str, float]]] = {name: [] for name in decoders}
    for _ in range(rounds):
        for name, decoder in decoders.items():
            turns[name].append(decoder.take_turn(batch, context, steps))
    base = next(iter(turns.values()))
    rows = []
    for way in base[0]:
        for name, taken in turns.items():
            seconds = median(t[way] for t in taken)
            ratio = median(b[way] / t[way] for t, b in zip(taken, base, strict=True))
            rows.append(Row(way, name, batch, context, batch / seconds, 1e3 * seconds, ratio))
    return rows


def op_of(size: TextSize, name: str, batch: int, context: int) -> Callable[[], Tensor]:
    """One call of a model's attention op, on random inputs with the shapes in its layers."""
    kind, backend = MODELS[name]
    with torch.device("meta"):
        attention = size.ours(kind, backend, context).config.backbone.make_attention(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"

    def random(num_tokens: int, shape: tuple[int, ...]) -> Tensor:
        return torch.randn(batch, num_tokens, *shape, device=device, dtype=torch.bfloat16)

    q = random(1, attention.q_shape)
    k, v = random(context, attention.k_shape), random(context, attention.v_shape)
    mask = AttentionMask(causal=True)
    if kind == "softmax":
        return partial(softmax_attention, q, k, v, mask=mask, backend=backend)
    lam = torch.rand(batch, 1, q.shape[2], device=device)
    return partial(diff_attention, q, k, v, lam, mask=mask, backend=backend)


@torch.no_grad()
def op_ms(op: Callable[[], Tensor]) -> float:
    """Median milliseconds of a call, in a CUDA graph if CUDA is available."""
    op()
    if not torch.cuda.is_available():
        start = time.perf_counter()
        op()
        return 1e3 * (time.perf_counter() - start)
    synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        op()
    return median_ms(graph.replay)


def measure_ops(size: TextSize, names: list[str], batch: int, context: int) -> list[Row]:
    """Return a row for the op of every model."""
    times = {name: op_ms(op_of(size, name, batch, context)) for name in names}
    base = times[names[0]]
    return [
        Row("op", name, batch, context, 1e3 * batch / ms, ms, base / ms)
        for name, ms in times.items()
    ]


def line_of(row: Row) -> str:
    return (
        f"{row.batch:3} x {row.context:<6} {row.what:9} {row.model:10} "
        f"{row.rate:10.0f} tokens/s {row.ms:8.3f} ms  x{row.ratio:.3f}"
    )


def table_of(rows: list[Row], names: list[str]) -> str:
    """Format the ratios to the first model, one line per shape and way."""
    found = {(row.batch, row.context, row.what, row.model): row.ratio for row in rows}
    lines = [" " * 24 + "".join(f"{name:>11}" for name in names)]
    for batch, context, what in dict.fromkeys(key[:3] for key in found):
        ratios = "".join(f"{found[batch, context, what, name]:11.3f}" for name in names)
        lines.append(f"{batch:3} x {context:<6} {what:9}   {ratios}")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    """Print all results as they are measured, and finally the table of ratios."""
    parser = argparse.ArgumentParser(description="Decoding with a key-value cache.")
    parser.add_argument("--models", default="", help="models, comma-separated; all by default")
    parser.add_argument("--rounds", type=int, default=7, help="number of turns per model")
    parser.add_argument("--steps", type=int, default=48, help="measured steps per turn")
    parser.add_argument("--out", type=Path, help="folder for decode.json")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes; also runs on a CPU")
    options = parser.parse_args(arguments)

    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not options.smoke:
        raise SystemExit("this needs a CUDA device; --smoke tests the program without one")
    names = chosen(options.models, MODELS)
    where = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    print(f"{where}, torch {torch.__version__}", "SMOKE: the results mean nothing" * options.smoke)
    if device == "cpu":
        print("the backend triton needs a GPU: its models are skipped")
        names = [name for name in names if "triton" not in name]
    size = TEXT_SMOKE if options.smoke else TEXT_GROUPED
    contexts, batches = ((64, 128), (1, 2)) if options.smoke else (CONTEXTS, BATCHES)
    torch._dynamo.config.cache_size_limit = 64

    decoders = {}
    for name in names:
        torch.manual_seed(0)
        with torch.device(device):
            model = size.ours(*MODELS[name], max(contexts)).bfloat16()
        decoders[name] = Decoder(model)
        count = sum(p.numel() for p in model.parameters()) / 1e6
        print(f"{name}: {count:.1f} M parameters")

    rows: list[Row] = []
    for context in reversed(contexts):
        for batch in batches:
            start = time.perf_counter()
            new = measure_models(
                decoders, batch, context, rounds=options.rounds, steps=options.steps
            )
            new += measure_ops(size, names, batch, context)
            print("\n".join(map(line_of, new)))
            print(f"  took {time.perf_counter() - start:.0f} s", flush=True)
            rows += new
            if options.out:
                options.out.mkdir(parents=True, exist_ok=True)
                (options.out / "decode.json").write_text(
                    json.dumps([asdict(row) for row in rows], indent=1)
                )
    print(f"\nrates relative to {names[0]}\n{table_of(rows, names)}")


if __name__ == "__main__":
    main()
