"""`diffmm.generate` beside the GPU's own time of a step, and Hugging Face's `generate`.

    python -m benchmarks.generation [--models softmax,v1,v2] [--prompts 100,1000,4000] [--out DIR]

The model is that of `benchmarks.decode` (492 M parameters in bfloat16), with one sequence or
`--batch` of them. In each round and for each prompt length:

* `step`: one compiled step in a CUDA graph, replayed, with a cache as long as that of the middle of
  the continuation: the time of the GPU alone;
* `generate`: `--new` tokens by `generate` with the compiled model, sampled with `top_k=50`, from
  the end of the prompt's processing on, which includes capturing the graph;
* `replay`: the same, but from the tenth token on, without the capture;
* `uncompiled`: `generate` without `torch.compile`;
* `prompt`: the compiled processing of the prompt, and `forward`: the bare compiled forward pass of
  the features over as many tokens;
* `hf`: `LlamaForCausalLM` of the same size with a static cache (softmax only), likewise.

Ratios are to `step` (to `forward` for `prompt`); the medians over all rounds are shown. `--kernels`
lists the kernels of a replayed step instead. With `--smoke`, tiny sizes on the CPU test this
program.
"""

import argparse
import json
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from benchmarks.decode import Decoder
from benchmarks.models import TEXT_GROUPED, TEXT_SMOKE, TextSize
from benchmarks.train_step import chosen, synchronize
from diffmm.models import TextModel
from diffmm.models.generation import compiled_features, stream
from diffmm.ops import AttentionMask

MODELS = ("softmax", "v1", "v2")


def seconds_of(run: Any) -> float:
    """Seconds that `run` takes, all its work on the device included."""
    synchronize()
    start = time.perf_counter()
    run()
    synchronize()
    return time.perf_counter() - start


def token_seconds(model: Any, prompt: Tensor, new: int, *, after: int = 1) -> float:
    """Seconds per new token after the first `after`; the prompt yields the first of all."""

    def run() -> float:
        tokens = stream(model, prompt, max_new_tokens=new, top_k=50)
        for _ in range(after):
            next(tokens)
        return seconds_of(lambda: list(tokens)) / (new - after)

    run()  # compiles
    return run()


def kernel_lines(model: Any, prompt: Tensor, new: int) -> list[str]:
    """The kernels of the last steps of `generate`, in microseconds and launches per step."""
    tokens, count = stream(model, prompt, max_new_tokens=new, top_k=50), 8
    for _ in range(new - count):
        next(tokens)
    synchronize()
    with torch.profiler.profile() as profile:
        list(tokens)
        synchronize()
    taken: dict[str, list[float]] = {}
    for event in profile.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            taken.setdefault(event.name, []).append(event.time_range.elapsed_us())
    total = sum(map(sum, taken.values())) / count
    order = sorted(taken.items(), key=lambda item: -sum(item[1]))
    return [f"{total:9.1f} us in all kernels"] + [
        f"{sum(us) / count:9.1f} us {len(us) / count:6.1f}x  {name[:90]}" for name, us in order
    ]


@torch.no_grad()
def prompt_seconds(model: TextModel, compiled: Any, prompt: Tensor) -> dict[str, float]:
    """Seconds for the prompt as in `generate`, and for a bare forward pass of as many tokens."""
    positions = torch.arange(prompt.shape[1], device=prompt.device)
    cache = model.new_cache(len(prompt), prompt.shape[1])
    features = compiled_features(compiled)
    mask = AttentionMask(causal=True)

    def process() -> Tensor:
        cache.length = 0
        return model.logits(features(prompt, mask=mask, positions=positions, cache=cache)[:, -1])

    bare = torch.compile(lambda tokens: model.forward_features(tokens, mask=mask), dynamic=False)
    for run in (process, lambda: bare(prompt)):
        run()  # compiles
    return {
        "prompt": median(seconds_of(process) for _ in range(5)),
        "forward": median(seconds_of(lambda: bare(prompt)) for _ in range(5)),
    }


def hf_token_seconds(model: Any, prompt: Tensor, new: int) -> float:
    """Seconds per new token of Hugging Face's `generate`, less those of the first."""

    def run(count: int) -> float:
        settings = {"do_sample": True, "top_k": 50, "cache_implementation": "static"}
        return seconds_of(
            lambda: model.generate(prompt, max_new_tokens=count, min_new_tokens=count, **settings)
        )

    run(new)  # compiles
    return (run(new) - run(2)) / (new - 2)


def measure(
    size: TextSize, name: str, prompts: list[int], options: argparse.Namespace
) -> list[dict[str, Any]]:
    """The medians of one model, a row per prompt length and way."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    longest = max(prompts) + options.new + 512
    rows = []
    with torch.device(device):
        model = size.ours(name, "auto", longest).to(torch.bfloat16).eval()
    decoder = Decoder(model)
    ways: dict[int, dict[str, list[float]]] = {length: {} for length in prompts}
    hf = None
    if name == "softmax" and options.hf:
        with torch.device(device):
            hf = size.hugging_face("softmax", longest).to(torch.bfloat16).eval()
    for _ in range(options.rounds):
        for length in prompts:
            prompt = torch.randint(size.vocab_size, (options.batch, length), device=device)
            if options.kernels:
                token_seconds(decoder.compiled, prompt, options.new)
                lines = kernel_lines(decoder.compiled, prompt, options.new)
                print(f"{name}, prompt of {length}:", *lines, sep="\n", flush=True)
                continue
            context = length + options.new // 2
            turn = decoder.take_turn(options.batch, context, min(48, options.new // 2))
            found = {
                "step": turn.get("graph", turn["compiled"]),
                "generate": token_seconds(decoder.compiled, prompt, options.new),
                "replay": token_seconds(decoder.compiled, prompt, options.new, after=10),
                "uncompiled": token_seconds(model, prompt, options.new),
                **prompt_seconds(model, decoder.compiled, prompt),
            }
            if hf is not None:
                found["hf"] = hf_token_seconds(hf, prompt, options.new)
            for way, seconds in found.items():
                ways[length].setdefault(way, []).append(seconds)
            print(f"  {name} {length}: {found}", flush=True)
    for length, taken in ways.items():
        for way, times in taken.items():
            base = taken["forward" if way in ("prompt", "forward") else "step"]
            ratio = median(b / t for b, t in zip(base, times, strict=True))
            seconds = median(times)
            rows.append(
                {"model": name, "prompt": length, "way": way, "ms": 1e3 * seconds, "ratio": ratio}
            )
    return rows


def main(arguments: list[str] | None = None) -> None:
    """Print a line per measurement, and the table of medians last."""
    parser = argparse.ArgumentParser(description="Generation with a key-value cache.")
    parser.add_argument("--models", default="", help="models, comma-separated; all by default")
    parser.add_argument("--prompts", default="100,1000,4000", help="prompt lengths in tokens")
    parser.add_argument("--batch", type=int, default=1, help="number of sequences")
    parser.add_argument("--new", type=int, default=1000, help="tokens to generate")
    parser.add_argument("--rounds", type=int, default=3, help="number of rounds")
    parser.add_argument("--hf", action=argparse.BooleanOptionalAction, default=True, help="run HF")
    parser.add_argument("--kernels", action="store_true", help="list the kernels of a step")
    parser.add_argument("--out", type=Path, help="folder for generation.json")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes; also runs on a CPU")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available() and not options.smoke:
        raise SystemExit("this needs a CUDA device; --smoke tests the program without one")
    torch._dynamo.config.cache_size_limit = 64
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    print(f"{where}, torch {torch.__version__}", "SMOKE: sizes mean nothing" * options.smoke)
    prompts = [int(number) for number in options.prompts.split(",")]
    if options.smoke:
        prompts, options.new, options.rounds, options.hf = [5], 12, 1, False
    rows = []
    for name in chosen(options.models, MODELS):
        rows += measure(TEXT_SMOKE if options.smoke else TEXT_GROUPED, name, prompts, options)
    if not rows:
        return
    print("\nmedians; per token, but for prompt and forward")
    for row in rows:
        print(
            f"{row['model']:8} prompt {row['prompt']:6} {row['way']:10} {row['ms']:9.3f} ms "
            f"x{row['ratio']:.3f}"
        )
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "generation.json").write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
