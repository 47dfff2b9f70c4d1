"""Training steps of compiled models: rate and peak memory with softmax, v1 and v2.

    python -m benchmarks.train_step [--only text2048,vit] [--models softmax,v1-triton] [--out DIR]

A step is forward, backward and AdamW (fused) under bfloat16 autocast with float32 weights. The
model and the loss are compiled together with static shapes, for every model alike. Cases, each on
one GPU:

* text2048, text8192: a decoder of 748 M parameters (dim 2048, 12 blocks, 16 heads of 128), 16,384
  tokens per step, compared with HF's Llama and DiffLlama with torch's fused attention;
* text8192-kv4: the same with 4 key and value heads, as grouped differential attention needs them
  (4 signal heads per noise head);
* vit: ViT-B/16 at 224, 256 images per step, compared with timm's, and with timm's with
  `attn_layer="diff"` for as many pairs as ours (`timm-diff`) and by default, with twice as many
  pairs of half the width (`timm-diff-12`);
* audio: the same blocks on 1024 patches of 20.48 s of sound, 32 clips per step.

The models alternate for `--rounds` rounds, with one or more warmup steps and then `--steps`
measured steps per turn. Ratios are those of the rates to softmax attention in the same round, and
the median over all rounds is shown. Memory is the peak of a step, including weights and optimizer.
The first round compiles, which takes most of the time; its results are printed as they are
measured. With `--smoke`, tiny sizes on the CPU test this program.
"""

import argparse
import gc
import json
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from benchmarks.models import TEXT_748M, TEXT_KV4, TEXT_SMOKE, VIT_B, VIT_SMOKE

Maker = Callable[[], nn.Module]


@dataclass(frozen=True)
class Case:
    """One task for several models.

    Args:
        name: Name of the case.
        unit: Unit of the rate, such as "tokens".
        units_per_step: Number of units per step.
        make_batch: Creates inputs and integer targets on the default device.
        models: Functions that create the models, by name; softmax first, then the most important.
    """

    name: str
    unit: str
    units_per_step: int
    make_batch: Callable[[], tuple[Tensor, Tensor]]
    models: dict[str, Maker]


def ours(make: Callable[[str, str], nn.Module], others: dict[str, Maker]) -> dict[str, Maker]:
    """Our models with every attention and backend, together with `others`."""
    return {
        "softmax": partial(make, "softmax", "auto"),
        "v1-triton": partial(make, "v1", "triton"),
        "v2-triton": partial(make, "v2", "triton"),
        **others,
        "v1-sdpa": partial(make, "v1", "sdpa"),
        "v2-sdpa": partial(make, "v2", "sdpa"),
    }


def text_case(length: int, *, grouped: bool = False, smoke: bool) -> Case:
    """Next-token prediction with sequences of `length`; `grouped` uses four query heads per key
    head."""
    size = TEXT_SMOKE if smoke else TEXT_KV4 if grouped else TEXT_748M
    name, tokens_per_step = f"text{length}" + "-kv4" * grouped, 16384
    if smoke:
        length, tokens_per_step = 32, 64

    def make_batch() -> tuple[Tensor, Tensor]:
        tokens = torch.randint(size.vocab_size, (tokens_per_step // length, length + 1))
        return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    return Case(
        name,
        "tokens",
        tokens_per_step,
        make_batch,
        ours(
            partial(size.ours, length=length),
            {
                "grouped": partial(size.ours, "grouped", "auto", length),
                "grouped-triton": partial(size.ours, "grouped", "triton", length),
            }
            if grouped
            else {
                "hf-llama": partial(size.hugging_face, "softmax", length),
                "hf-diffllama": partial(size.hugging_face, "v1", length),
            },
        ),
    )


def vit_case(*, smoke: bool) -> Case:
    """Classification of images."""
    size, image_size, batch = (VIT_SMOKE, 32, 2) if smoke else (VIT_B, 224, 256)
    heads = size.num_heads
    return Case(
        "vit",
        "images",
        batch,
        lambda: (torch.randn(batch, 3, image_size, image_size), torch.randint(1000, (batch,))),
        ours(
            partial(size.image, image_size=image_size),
            {
                "timm": partial(size.timm_image, "softmax", heads, image_size),
                "timm-diff": partial(size.timm_image, "v1", heads // 2, image_size),
                "timm-diff-12": partial(size.timm_image, "v1", heads, image_size),
            },
        ),
    )


def audio_case(*, smoke: bool) -> Case:
    """Classification of clips."""
    size, clip_seconds, batch = (VIT_SMOKE, 0.64, 2) if smoke else (VIT_B, 20.48, 32)
    num_samples = round(16000 * clip_seconds)
    return Case(
        "audio",
        "clips",
        batch,
        lambda: (0.1 * torch.randn(batch, num_samples), torch.randint(527, (batch,))),
        ours(partial(size.audio, clip_seconds=clip_seconds), {}),
    )


def all_cases(*, smoke: bool) -> dict[str, Case]:
    """Every case, the most important first."""
    return {
        "text2048": text_case(2048, smoke=smoke),
        "vit": vit_case(smoke=smoke),
        "text8192": text_case(8192, smoke=smoke),
        "text8192-kv4": text_case(8192, grouped=True, smoke=smoke),
        "audio": audio_case(smoke=smoke),
    }


def loss_of(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    """The mean cross-entropy, computed in float32."""
    logits = model(inputs)
    logits = getattr(logits, "logits", logits)
    return cross_entropy(logits.flatten(0, -2).float(), targets.flatten())


@dataclass(frozen=True)
class Turn:
    """Seconds per step, peak memory in bytes, and the last loss of one turn."""

    seconds: float
    peak_bytes: int
    loss: float


class Contestant:
    """A model that alternates with others on one device; between turns it only holds its weights.

    Args:
        model: Model on its device; it is set to training mode and compiled together with its loss.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model.train()
        # Otherwise Dynamo would treat sizes that differ between two models as dynamic.
        self.loss = torch.compile(partial(loss_of, model), dynamic=False)
        self.num_parameters = sum(p.numel() for p in model.parameters())
        self.turns: list[Turn] = []

    def take_turn(self, batch: tuple[Tensor, Tensor], steps: int, warmup: int) -> None:
        """Train for `warmup` unmeasured and `steps` measured steps."""
        weights = list(self.model.parameters())
        optimizer = torch.optim.AdamW(weights, lr=1e-4, weight_decay=0.1, fused=True)
        device = batch[0].device.type
        held_by_others = allocated_bytes() - sum(p.numel() * p.element_size() for p in weights)

        def step() -> Tensor:
            with torch.autocast(device, torch.bfloat16):
                loss = self.loss(*batch)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            return loss

        for _ in range(warmup):
            step()
        synchronize()
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        for _ in range(steps):
            loss = step()
        synchronize()
        seconds = (time.perf_counter() - start) / steps
        peak = allocated_bytes(peak=True) - held_by_others
        self.turns.append(Turn(seconds, peak, loss.item()))


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def allocated_bytes(*, peak: bool = False) -> int:
    """Allocated GPU memory in bytes, now or the peak since the last reset; 0 on a CPU."""
    if not torch.cuda.is_available():
        return 0
    return torch.cuda.max_memory_allocated() if peak else torch.cuda.memory_allocated()


def row_of(case: Case, name: str, contestant: Contestant, base: Contestant) -> dict[str, Any]:
    """The medians of one model, and its rate relative to that of `base` in each round."""
    turns = contestant.turns
    ratios = [b.seconds / t.seconds for t, b in zip(turns, base.turns, strict=True)]
    seconds = median(t.seconds for t in turns)
    return {
        "case": case.name,
        "model": name,
        "parameters": contestant.num_parameters,
        "unit": case.unit,
        "rate": case.units_per_step / seconds,
        "step_ms": 1e3 * seconds,
        "ratio": median(ratios),
        "ratios": ratios,
        "peak_gib": max(t.peak_bytes for t in turns) / 2**30,
        "loss": turns[-1].loss,
    }


def line_of(row: dict[str, Any]) -> str:
    return (
        f"{row['case']:9} {row['model']:13} {row['parameters'] / 1e6:6.1f} M "
        f"{row['rate']:10.0f} {row['unit']:6}/s {row['step_ms']:8.1f} ms  "
        f"x{row['ratio']:.3f}  {row['peak_gib']:5.1f} GiB"
    )


def run_case(
    case: Case, names: list[str], device: str, *, rounds: int, steps: int
) -> list[dict[str, Any]]:
    """Compile and measure the models with these names; return one row per model."""
    contestants: dict[str, Contestant] = {}
    with torch.device(device):
        batch = case.make_batch()
    for name in names:
        start = time.perf_counter()
        torch.manual_seed(0)
        with torch.device(device):
            contestants[name] = Contestant(case.models[name]())
        contestants[name].take_turn(batch, steps, warmup=3)
        row = row_of(case, name, contestants[name], contestants[names[0]])
        seconds = time.perf_counter() - start
        print(f"  {line_of(row)}  loss {row['loss']:.3f}  ({seconds:.0f} s)", flush=True)
    start = time.perf_counter()
    for _ in range(rounds - 1):
        for contestant in contestants.values():
            contestant.take_turn(batch, steps, warmup=1)
    print(f"  {rounds - 1} more rounds: {time.perf_counter() - start:.0f} s", flush=True)
    base = contestants[names[0]]
    return [row_of(case, name, contestant, base) for name, contestant in contestants.items()]


def chosen(wanted: str, names: Iterable[str]) -> list[str]:
    """Parse a comma-separated list of elements of `names`; all by default."""
    names = list(dict.fromkeys(names))
    for name in wanted.split(",") if wanted else ():
        if name not in names:
            raise SystemExit(f"there is no {name!r}: choose from {','.join(names)}")
    return wanted.split(",") if wanted else names


def main(arguments: list[str] | None = None) -> None:
    """Print one line per model when it is compiled, and finally the table of medians."""
    parser = argparse.ArgumentParser(description="Training steps of compiled models.")
    parser.add_argument("--only", default="", help="cases, comma-separated; all by default")
    parser.add_argument("--models", default="", help="models, comma-separated; all by default")
    parser.add_argument("--rounds", type=int, default=3, help="number of turns per model")
    parser.add_argument("--steps", type=int, default=5, help="measured steps per turn")
    parser.add_argument("--out", type=Path, help="folder for train_step.json")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes; also runs on a CPU")
    options = parser.parse_args(arguments)

    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not options.smoke:
        raise SystemExit("this needs a CUDA device; --smoke tests the program without one")
    torch.set_float32_matmul_precision("high")
    torch._dynamo.config.cache_size_limit = 64
    where = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    print(f"{where}, torch {torch.__version__}", "SMOKE: the results mean nothing" * options.smoke)

    rows: list[dict[str, Any]] = []
    cases = all_cases(smoke=options.smoke)
    models = chosen(options.models, (name for case in cases.values() for name in case.models))
    if device == "cpu":
        print("the backend triton needs a GPU: its models are skipped")
        models = [name for name in models if "triton" not in name]
    for case in (cases[name] for name in chosen(options.only, cases)):
        start = time.perf_counter()
        print(f"\n{case.name}")
        names = [name for name in case.models if name in models]
        rows += run_case(case, names, device, rounds=options.rounds, steps=options.steps)
        print(f"  {case.name} took {time.perf_counter() - start:.0f} s", flush=True)
        if options.out:
            options.out.mkdir(parents=True, exist_ok=True)
            (options.out / "train_step.json").write_text(json.dumps(rows, indent=1))
        torch._dynamo.reset()
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()

    print("\nmedians; ratios are to the first model of a case")
    print("\n".join(line_of(row) for row in rows))


if __name__ == "__main__":
    main()
