"""Training steps of Hugging Face's DiffLlama: with its attentions, with diffmm's, as our model.

    python -m benchmarks.hf_diffllama [--only text2048] [--models ours,diffmm] [--out DIR]

All models have the same weights (748 M parameters, as in `benchmarks.train_step`, whose steps and
turns these are), so that their losses agree up to rounding. Models:

* ours: the same weights as a `diffmm.models.TextModel`;
* diffmm: DiffLlama with `attn_implementation="diffmm"`, one call of the fused kernels per layer;
* sdpa: DiffLlama with torch's fused attention, two calls per layer, without the mask in memory that
  rules out its fastest kernels;
* eager: DiffLlama with its maps in memory; with 8,192 tokens they need more memory than a GPU has,
  which is printed in place of a rate.

Ratios are those of the rates to our model in the same round, and the median over all rounds is
shown. With `--smoke`, tiny sizes on the CPU test this program.
"""

import argparse
import gc
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import diffmm.interop.transformers_attention  # noqa: F401 (registers `attn_implementation`)
from benchmarks.models import TEXT_748M, TEXT_SMOKE, TextSize
from benchmarks.train_step import Case, Contestant, chosen, line_of, row_of
from diffmm.interop.diffllama import DIFFLLAMA
from diffmm.interop.family import model_of
from diffmm.interop.source import Source

LENGTHS = (2048, 8192)
IMPLEMENTATIONS = {"diffmm": "diffmm", "sdpa": "sdpa_without_mask", "eager": "eager"}


def hugging_face(size: TextSize, length: int, implementation: str) -> nn.Module:
    """DiffLlama with one of its attentions, with weights that depend on nothing else."""
    torch.manual_seed(0)
    return size.hugging_face("v1", length, implementation)


def ours(size: TextSize, length: int) -> nn.Module:
    """The model of diffmm with DiffLlama's weights."""
    theirs: Any = hugging_face(size, length, "eager")
    settings = theirs.config.to_dict() | {"architectures": ["DiffLlamaForCausalLM"]}
    source = Source("DiffLlama", settings, theirs.state_dict(), None)
    device = next(theirs.parameters()).device
    return model_of(DIFFLLAMA.to_ours(source)).to(device)


def case_of(length: int, *, smoke: bool) -> Case:
    """Next-token prediction with 16,384 tokens per step."""
    size, tokens_per_step = (TEXT_SMOKE, 64) if smoke else (TEXT_748M, 16384)
    name = f"text{length}"
    length = length // 64 if smoke else length

    def make_batch() -> tuple[Tensor, Tensor]:
        tokens = torch.randint(size.vocab_size, (max(1, tokens_per_step // length), length + 1))
        return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    models: dict[str, Callable[[], nn.Module]] = {"ours": partial(ours, size, length)}
    for model, implementation in IMPLEMENTATIONS.items():
        models[model] = partial(hugging_face, size, length, implementation)
    return Case(name, "tokens", tokens_per_step, make_batch, models)


def run_case(
    case: Case, names: list[str], device: str, *, rounds: int, steps: int
) -> list[dict[str, Any]]:
    """Measure the models with these names, which alternate; one row per model that fits into
    memory."""
    torch.manual_seed(1)
    with torch.device(device):
        batch = case.make_batch()
    contestants: dict[str, Contestant] = {}
    for name in names:
        with torch.device(device):
            contestant = Contestant(case.models[name]())
        try:
            contestant.take_turn(batch, steps, warmup=3)
        except torch.OutOfMemoryError:
            print(f"  {case.name:9} {name:13} needs more memory than the device has", flush=True)
            contestant.model.zero_grad(set_to_none=True)
            continue
        contestants[name] = contestant
        base = contestants[next(iter(contestants))]
        print(f"  {line_of(row_of(case, name, contestant, base))}", flush=True)
    for _ in range(rounds - 1):
        for contestant in contestants.values():
            contestant.take_turn(batch, steps, warmup=1)
    base = contestants[next(iter(contestants))]
    return [row_of(case, name, contestant, base) for name, contestant in contestants.items()]


def main(arguments: list[str] | None = None) -> None:
    """Print one line per model when it is compiled, and finally the table of medians."""
    parser = argparse.ArgumentParser(description="Training steps of DiffLlama.")
    parser.add_argument("--only", default="", help="cases, comma-separated; all by default")
    parser.add_argument("--models", default="", help="models, comma-separated; all by default")
    parser.add_argument("--rounds", type=int, default=3, help="number of turns per model")
    parser.add_argument("--steps", type=int, default=5, help="measured steps per turn")
    parser.add_argument("--out", type=Path, help="folder for hf_diffllama.json")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes; also runs on a CPU")
    options = parser.parse_args(arguments)

    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not options.smoke:
        raise SystemExit("this needs a CUDA device; --smoke tests the program without one")
    torch.set_float32_matmul_precision("high")
    torch._dynamo.config.cache_size_limit = 64
    where = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    print(f"{where}, torch {torch.__version__}", "SMOKE: the results mean nothing" * options.smoke)
    cases = {case.name: case for case in (case_of(n, smoke=options.smoke) for n in LENGTHS)}
    rows: list[dict[str, Any]] = []
    for case in (cases[name] for name in chosen(options.only, cases)):
        print(f"\n{case.name}")
        names = chosen(options.models, case.models)
        rows += run_case(case, names, device, rounds=options.rounds, steps=options.steps)
        if options.out:
            options.out.mkdir(parents=True, exist_ok=True)
            (options.out / "hf_diffllama.json").write_text(json.dumps(rows, indent=1))
        torch._dynamo.reset()
        gc.collect()
        torch.cuda.empty_cache()
    print("\nmedians; ratios are to the first model of a case")
    print("\n".join(line_of(row) for row in rows))


if __name__ == "__main__":
    main()
