"""`diffmm.generate` beside the GPU's own time of a step, and Hugging Face's `generate`.

    python -m benchmarks.generation [--models softmax,v1,v2] [--prompts 100,1000,4000] [--out DIR]

The model is that of `benchmarks.decode` (492 M parameters in bfloat16), with one sequence or
`--batch` of them. In each round and for each prompt length:

* `step`: one compiled step in a CUDA graph, replayed, with a cache as long as that of the middle of
  the continuation: the time of the GPU alone;
* `generate`: `--new` tokens by `generate` with the compiled model, sampled with `top_k=50`, from
  the end of the prompt's processing on, which includes capturing the graph;
* `replay`: of the same tokens, those from the tenth on, without the capture;
* `later`: `generate` again, after further calls;
* `uncompiled`: `generate` without `torch.compile`;
* `prompt`: the compiled processing of the prompt, and `forward`: the bare compiled forward pass of
  the features over as many tokens;
* `hf`: `LlamaForCausalLM` of the same size with a static cache (softmax only), likewise.

Each model, prompt length and round has a process of its own, like a command that generates: all
graphs of a process are slower from its fourth capture on, which is that of `later`. Ratios are to
`step` (to `forward` for `prompt`); the medians over all rounds are shown. `--kernels` lists the
kernels of a replayed step instead. With `--smoke`, tiny sizes on the CPU test this program, in one
process.
"""

import argparse
import json
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
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


def token_seconds(model: Any, prompt: Tensor, new: int) -> tuple[float, float]:
    """Seconds per new token after the first, which the prompt yields, and after the ninth."""
    tokens = stream(model, prompt, max_new_tokens=new, top_k=50)
    next(tokens)
    first = seconds_of(lambda: [next(tokens) for _ in range(8)])
    rest = seconds_of(lambda: list(tokens))
    return (first + rest) / (new - 1), rest / (new - 9)


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
    size: TextSize, name: str, length: int, options: argparse.Namespace
) -> dict[str, float]:
    """Seconds of each way, of one model and prompt length."""
    torch._dynamo.config.cache_size_limit = 64
    device = "cuda" if torch.cuda.is_available() else "cpu"
    longest = length + options.new + 512
    prompt = torch.randint(size.vocab_size, (options.batch, length), device=device)
    if name == "hf":
        with torch.device(device):
            hf = size.hugging_face("softmax", longest).to(torch.bfloat16).eval()
        return {"hf": hf_token_seconds(hf, prompt, options.new)}
    with torch.device(device):
        model = size.ours(name, "auto", longest).to(torch.bfloat16).eval()
    decoder = Decoder(model)
    token_seconds(decoder.compiled, prompt, options.new)  # compiles
    if options.kernels:
        lines = kernel_lines(decoder.compiled, prompt, options.new)
        print(f"{name}, prompt of {length}:", *lines, sep="\n", flush=True)
        return {}
    # The second and the third capture of the process.
    generate, replay = token_seconds(decoder.compiled, prompt, options.new)
    turn = decoder.take_turn(options.batch, length + options.new // 2, min(48, options.new // 2))
    return {
        "step": turn.get("graph", turn["compiled"]),
        "generate": generate,
        "replay": replay,
        "later": token_seconds(decoder.compiled, prompt, options.new)[0],
        "uncompiled": token_seconds(model, prompt, options.new)[0],
        **prompt_seconds(model, decoder.compiled, prompt),
    }


def in_own_process(*arguments: Any) -> dict[str, float]:
    """`measure`, in a new process."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(measure, *arguments).result()


def rows_of(name: str, length: int, found: list[dict[str, float]]) -> list[dict[str, Any]]:
    """The medians over rounds, a row per way."""
    rows = []
    for way in found[0]:
        base = "forward" if way in ("prompt", "forward") else "step"
        rows.append(
            {
                "model": name,
                "prompt": length,
                "way": way,
                "ms": 1e3 * median(seconds[way] for seconds in found),
                "ratio": median(seconds[base] / seconds[way] for seconds in found),
            }
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
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    print(f"{where}, torch {torch.__version__}", "SMOKE: sizes mean nothing" * options.smoke)
    prompts = [int(number) for number in options.prompts.split(",")]
    size, run = TEXT_GROUPED, in_own_process
    if options.smoke:
        prompts, options.new, options.rounds, options.hf = [5], 12, 1, False
        size, run = TEXT_SMOKE, measure
    rows = []
    for name in chosen(options.models, MODELS):
        for length in prompts:
            found = []
            for _ in range(options.rounds):
                found.append(run(size, name, length, options))
                if options.kernels:
                    continue
                if name == "softmax" and options.hf:
                    found[-1] |= run(size, "hf", length, options)
                print(f"  {name} {length}: {found[-1]}", flush=True)
            rows += rows_of(name, length, found)
    if options.kernels:
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
