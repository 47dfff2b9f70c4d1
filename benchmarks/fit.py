"""What `diffmm fit` makes of a GPU: its rate and memory beside the bare training step.

    python -m benchmarks.fit [--only text42m,vit] [--attentions softmax,diff_v1] [--ways fit,graph]
        [--steps 60] [--rounds 1] [--out DIR]

Each case is a recipe with random data in memory. It is trained in these ways, each in a process of
its own, on the same model, batches, precision, optimizer and clipping:

* fit: the command line, with its data loader, logs, monitors and checkpoints;
* graph: a loop of forward, backward, clipping and optimizer step over batches that are on the GPU,
  with model and plain loss in one compiled graph;
* outside: the same with the task's model compiled as `fit` compiles it, and what remains of the
  loss outside the graph;
* trainer: Hugging Face's `Trainer`, if `transformers` and `accelerate` are installed (text only).

Cases: text42m (64 packed sequences of 1,024 tokens), text350m (8 of 2,048), vocab100k (a vocabulary
of 100,288 at 16,384 tokens; look at its memory), vit (ViT-B/16, 256 images), ast (AudioSet's AST,
12 clips), and loop, a decoder so small that its rate shows what the loop itself takes of the host.

Rates are over `--steps` steps after 20 unmeasured ones; the ratio is to `graph` in the same round,
and what is shown is the median over the rounds. Memory is the peak that torch allocated. With
`--smoke`, tiny sizes on the CPU check this program.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import cycle
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
import yaml
from lightning.pytorch import Callback, LightningDataModule
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy
from torch.utils.data import DataLoader, Dataset

from datamodules.text.sources import Corpus
from datamodules.text.token_documents import TokenDocuments, TokenizedDocument, key_number
from diffmm.recipes.catalog import find_recipe
from diffmm.recipes.settings import load, override
from diffmm.recipes.trainer import RecipeCLI
from diffmm.tokenizers import Tokenizer

WARMUP = 20
WAYS = ("fit", "graph", "outside", "trainer")


class RandomTokens(Corpus):
    """Documents of random bytes, with lengths from an exponential distribution.

    Args:
        num_tokens: Total number of tokens.
        mean_length: Mean length of a document, in tokens.
    """

    def __init__(self, num_tokens: int, mean_length: int = 500) -> None:
        self.num_tokens, self.mean_length = num_tokens, mean_length

    def load(self, tokenizer: Tokenizer) -> TokenDocuments:
        random = np.random.default_rng(0)
        lengths = 1 + random.exponential(self.mean_length, self.num_tokens // self.mean_length)

        def documents() -> Iterator[TokenizedDocument]:
            for number, length in enumerate(lengths):
                tokens = random.integers(256, size=int(length), dtype=np.uint32)
                yield TokenizedDocument(key_number(str(number)), tokens)

        return TokenDocuments.in_memory(documents())


class _Repeated(Dataset[dict[str, Tensor]]):
    """One sample after another of a few in memory."""

    def __init__(self, samples: dict[str, Tensor], length: int) -> None:
        self.samples, self.length = samples, length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {name: each[index % len(each)] for name, each in self.samples.items()}


class RandomSamples(LightningDataModule):
    """Random images in uint8, normalized on the device, or random waveforms.

    Args:
        shape: Shape of a sample; three axes are an image, one is a waveform.
        num_classes: Number of classes.
        batch_size: Number of samples per batch.
        num_workers: Number of data loader workers.
        multi_label: Whether labels are vectors of zeros and ones.
    """

    def __init__(
        self,
        shape: list[int],
        num_classes: int,
        batch_size: int,
        num_workers: int = 8,
        multi_label: bool = False,
    ) -> None:
        super().__init__()
        self.shape, self.num_classes, self.multi_label = shape, num_classes, multi_label
        self.batch_size, self.num_workers = batch_size, num_workers

    def train_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        random = torch.Generator().manual_seed(0)
        if len(self.shape) == 3:
            inputs = {"images": torch.randint(256, (512, *self.shape), generator=random).byte()}
        else:
            inputs = {"waveforms": 0.1 * torch.randn(64, *self.shape, generator=random)}
        count = len(next(iter(inputs.values())))
        labels = torch.randint(self.num_classes, (count,), generator=random)
        if self.multi_label:
            labels = nn.functional.one_hot(labels, self.num_classes).float()
        return DataLoader(
            _Repeated({**inputs, "labels": labels}, 1_000_000),
            self.batch_size,
            num_workers=self.num_workers,
            pin_memory=torch.cuda.is_available(),
            persistent_workers=self.num_workers > 0,
        )

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return {name: normalized(each) for name, each in batch.items()}


def normalized(tensor: Tensor) -> Tensor:
    return tensor.float() / 127.5 - 1.0 if tensor.dtype == torch.uint8 else tensor


class Clock(Callback):
    """Measures the steps of a run after `WARMUP`.

    Args:
        path: JSON file to write.
    """

    def __init__(self, path: str) -> None:
        self.path, self.start = path, 0.0

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        # After all that the first logging step does, which compiles what it needs.
        if trainer.global_step == WARMUP:
            self.start = now()

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == trainer.max_steps:
            seconds = (now() - self.start) / (trainer.max_steps - WARMUP)
            Path(self.path).write_text(json.dumps({"seconds": seconds, "gib": peak_gib()}))


def now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def peak_gib() -> float:
    return torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else 0.0


@dataclass(frozen=True)
class Case:
    """A recipe with changed settings.

    Args:
        recipe: Name of the recipe.
        unit: What its rate counts.
        units_per_step: How many of them a step takes.
        changes: Settings, by their keys in the recipe.
        smoke: Further settings that make it tiny.
    """

    recipe: str
    unit: str
    units_per_step: int
    changes: dict[str, Any]
    smoke: dict[str, Any] = field(default_factory=dict)


CONFIG = "model.init_args.model.init_args.config."
BACKBONE = f"{CONFIG}backbone."
TINY = {f"{BACKBONE}dim": 32, f"{BACKBONE}depth": 2, f"{BACKBONE}num_heads": 2}


def text_case(
    batch: int, length: int, vocab: int, dim: int, depth: int, heads: int, steps: int = 200
) -> Case:
    """Next-token prediction over packed documents."""

    def settings(batch: int, length: int, vocab: int) -> dict[str, Any]:
        num_tokens = max(50_000, min(20_000_000, steps * batch * length))
        return {
            "vars.vocab_size": vocab,
            "vars.sequence_length": length,
            "data.init_args.batch_size": batch,
            "data.init_args.source": {
                "class_path": "benchmarks.fit.RandomTokens",
                "init_args": {"num_tokens": num_tokens},
            },
        }

    return Case(
        "text/fineweb_edu_350m",
        "tokens",
        batch * length,
        {
            **settings(batch, length, vocab),
            "vars.tokenizer": "bytes",
            "trainer.accumulate_grad_batches": 1,
            "trainer.limit_val_batches": 0,
            "data.init_args.validation_fraction": 0.0,
            "data.init_args.test_fraction": 0.0,
            f"{BACKBONE}dim": dim,
            f"{BACKBONE}depth": depth,
            f"{BACKBONE}num_heads": heads,
        },
        {**TINY, **settings(2, 32, 300), "data.init_args.num_workers": 0},
    )


def sample_case(recipe: str, unit: str, data: dict[str, Any], small: dict[str, Any]) -> Case:
    """Classification of random samples."""

    def settings(data: dict[str, Any]) -> dict[str, Any]:
        return {"data": {"class_path": "benchmarks.fit.RandomSamples", "init_args": data}}

    return Case(
        recipe,
        unit,
        data["batch_size"],
        {
            **settings(data),
            "model.init_args.mixing": None,
            "trainer.limit_val_batches": 0,
            "trainer.log_every_n_steps": 10,  # the first logging compiles: before the clock starts
            "vars.devices": 1,
        },
        {**TINY, **settings({**data, **small, "batch_size": 2, "num_workers": 0})},
    )


CASES = {
    "text42m": text_case(64, 1024, 32000, 512, 8, 8),
    "text350m": text_case(8, 2048, 50304, 1024, 24, 16),
    "vocab100k": text_case(8, 2048, 100288, 1024, 8, 16),
    "vit": sample_case(
        "image/imagenet_vit_b",
        "images",
        {"shape": [3, 224, 224], "num_classes": 1000, "batch_size": 256},
        {"shape": [3, 32, 32]},
    ),
    "ast": sample_case(
        "audio/audioset_ast",
        "clips",
        {"shape": [160000], "num_classes": 527, "batch_size": 12, "multi_label": True},
        {},
    ),
    "loop": text_case(1, 64, 320, 64, 1, 2),
}


def recipe_of(case: Case, attention: str, steps: int, *, smoke: bool) -> dict[str, Any]:
    """The recipe of a case, complete."""
    values = load([find_recipe(case.recipe)])
    changes = {
        **case.changes,
        **(case.smoke if smoke else {}),
        "vars.attention": attention,
        "trainer.max_steps": WARMUP + steps,
        "trainer.accelerator": "gpu" if torch.cuda.is_available() else "cpu",
    }
    if not torch.cuda.is_available():
        changes |= {"trainer.precision": "32-true", "model.init_args.compile": False}
    if smoke and case.unit == "images":
        changes["vars.image_size"] = 32
    for key, value in changes.items():
        override(values, key, value)
    for unused in ("imagenet", "audioset"):
        values["vars"].pop(unused, None)
    kept = [c for c in values["trainer"]["callbacks"] if not c["class_path"].endswith("Averaging")]
    override(values, "trainer.callbacks", kept)
    return values


def train_by_fit(values: dict[str, Any], folder: Path) -> dict[str, float]:
    """Run the command line."""
    found, file = folder / "found.json", folder / "recipe.yaml"
    clock = {"class_path": "benchmarks.fit.Clock", "init_args": {"path": str(found)}}
    values["trainer"]["callbacks"].append(clock)
    file.write_text(yaml.safe_dump(values, sort_keys=False))
    command = [sys.executable, "-m", "diffmm.cli", "fit", "--config", str(file)]
    command += ["--run_dir", str(folder / "run")]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(
            f"{' '.join(command)} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
        )
    return json.loads(found.read_text())


def parts_of(values: dict[str, Any]) -> tuple[Any, list[dict[str, Tensor]], Any]:
    """The task on its device, eight batches there, and the optimizer."""
    cli = RecipeCLI({**values, "run_dir": "runs"})
    task, data = cli.model, cli.datamodule
    data.trainer = None
    data.prepare_data()
    data.setup("fit")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    task.trainer = cli.trainer
    task.to(device).train()
    loader = iter(data.train_dataloader())
    batches = [
        {name: normalized(tensor.to(device)) for name, tensor in next(loader).items()}
        for _ in range(8)
    ]
    return task, batches, task.configure_optimizers()["optimizer"]


def plain_loss(task: Any, batch: dict[str, Tensor]) -> Tensor:
    """The mean loss, written as in a textbook."""
    if "tokens" in batch:
        from diffmm.ops import AttentionMask

        mask = AttentionMask(causal=True, document_ids=batch.get("document_ids"))
        logits = task.model(batch["tokens"], mask=mask)
        return cross_entropy(logits.flatten(0, 1).float(), batch["targets"].flatten())
    if "waveforms" in batch:
        logits = task.model(batch["waveforms"]).float()
        return binary_cross_entropy_with_logits(logits, batch["labels"])
    logits = task.model(batch["images"]).float()
    return cross_entropy(logits, batch["labels"], label_smoothing=task.label_smoothing)


def train_bare(values: dict[str, Any], steps: int, *, in_graph: bool) -> dict[str, float]:
    """Run a loop without anything around it."""
    torch._dynamo.config.cache_size_limit = 64
    task, batches, optimizer = parts_of(values)
    is_compiled = values["model"]["init_args"]["compile"]
    loss_of: Callable[[dict[str, Tensor]], Tensor]
    if in_graph:

        def loss_of(batch: dict[str, Tensor]) -> Tensor:
            return plain_loss(task, batch)

        if is_compiled:
            loss_of = torch.compile(loss_of)
    else:
        if is_compiled:
            task.model.compile()

        def loss_of(batch: dict[str, Tensor]) -> Tensor:
            return task.training_loss(batch, 0)

    half = "bf16" in values["trainer"]["precision"]
    clip = values["trainer"].get("gradient_clip_val")
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    stream = cycle(batches)
    start = 0.0
    for step in range(WARMUP + steps):
        if step == WARMUP:
            start = now()
        batch = next(stream)
        with torch.autocast(batch[next(iter(batch))].device.type, torch.bfloat16, enabled=half):
            loss = loss_of(batch)
        optimizer.zero_grad()
        loss.backward()
        if clip:
            nn.utils.clip_grad_norm_(weights, clip)
        optimizer.step()
    return {"seconds": (now() - start) / steps, "gib": peak_gib()}


def train_by_trainer(values: dict[str, Any], steps: int, folder: Path) -> dict[str, float]:
    """Run Hugging Face's `Trainer` on the same model and batches."""
    from transformers import Trainer, TrainerCallback, TrainingArguments

    task, batches, _ = parts_of(values)

    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.task = task

        def forward(self, **batch: Tensor) -> dict[str, Tensor]:
            return {"loss": plain_loss(self.task, batch)}

    class Watch(TrainerCallback):
        start = 0.0

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == WARMUP:
                Watch.start = now()

    fields = ("tokens", "targets", "document_ids")
    samples = {n: torch.cat([b[n] for b in batches]).cpu() for n in fields if n in batches[0]}
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=len(batches[0]["tokens"]),
        max_steps=WARMUP + steps,
        bf16="bf16" in values["trainer"]["precision"],
        torch_compile=values["model"]["init_args"]["compile"],
        max_grad_norm=values["trainer"]["gradient_clip_val"] or 0.0,
        optim="adamw_torch_fused",
        logging_steps=20,
        save_strategy="no",
        report_to=[],
        remove_unused_columns=False,
        dataloader_num_workers=4,
        dataloader_drop_last=True,
        disable_tqdm=True,
    )
    data = _Repeated(samples, 10_000_000)
    trainer = Trainer(Wrapped(), arguments, train_dataset=data, callbacks=[Watch()])
    trainer.train()
    return {"seconds": (now() - Watch.start) / steps, "gib": peak_gib()}


def run_one(case: Case, attention: str, way: str, options: argparse.Namespace) -> dict[str, float]:
    """Train in one way, in this process."""
    values = recipe_of(case, attention, options.steps, smoke=options.smoke)
    with tempfile.TemporaryDirectory() as folder:
        if way == "fit":
            return train_by_fit(values, Path(folder))
        if way == "trainer":
            return train_by_trainer(values, options.steps, Path(folder))
        return train_bare(values, options.steps, in_graph=way == "graph")


def run_apart(name: str, attention: str, way: str, options: argparse.Namespace) -> dict[str, float]:
    """Train in one way, in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.fit", "--one", name, attention, way]
    command += ["--steps", str(options.steps), *(["--smoke"] if options.smoke else [])]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        print(f"  {way} failed:\n{done.stdout[-1000:]}\n{done.stderr[-3000:]}", flush=True)
        return {}
    return json.loads(done.stdout.splitlines()[-1])


def chosen(wanted: str, names: Sequence[str]) -> list[str]:
    """The names in a list with commas, each one of `names`; all by default."""
    for name in wanted.split(",") if wanted else ():
        if name not in names:
            raise SystemExit(f"there is no {name!r}: choose from {','.join(names)}")
    return wanted.split(",") if wanted else list(names)


def main(arguments: list[str] | None = None) -> None:
    """Print one line per measurement, and the table of medians last."""
    parser = argparse.ArgumentParser(description="The rate of `diffmm fit`.")
    parser.add_argument("--only", default="", help="cases, separated by commas; all by default")
    parser.add_argument("--attentions", default="softmax,diff_v1", help="separated by commas")
    parser.add_argument("--ways", default="fit,graph,outside", help="separated by commas")
    parser.add_argument("--steps", type=int, default=60, help="measured steps")
    parser.add_argument("--rounds", type=int, default=1, help="repetitions of each measurement")
    parser.add_argument("--out", type=Path, help="folder for fit.json")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, on a CPU if need be")
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available() and not options.smoke:
        raise SystemExit("this needs a CUDA device; --smoke checks the program without one")
    torch.set_float32_matmul_precision("high")
    if options.one:
        name, attention, way = options.one
        print(json.dumps(run_one(CASES[name], attention, way, options)))
        return

    where = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    print(f"{where}, torch {torch.__version__}", "SMOKE: sizes mean nothing" * options.smoke)
    rows = []
    for name in chosen(options.only, list(CASES)):
        for attention in options.attentions.split(","):
            found: dict[str, list[dict[str, float]]] = {}
            ways = chosen(options.ways, WAYS)
            for _ in range(options.rounds):
                for way in ways:
                    if way == "trainer" and CASES[name].unit != "tokens":
                        continue
                    if one := run_apart(name, attention, way, options):
                        found.setdefault(way, []).append(one)
                        print(f"  {name} {attention} {way}: {one}", flush=True)
            rows += [row_of(name, attention, way, found) for way in found]
    print("\nmedians; ratios are of rates, to the bare step with model and loss in one graph")
    print("\n".join(map(line_of, rows)))
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "fit.json").write_text(json.dumps(rows, indent=1))


def row_of(
    name: str, attention: str, way: str, found: dict[str, list[dict[str, float]]]
) -> dict[str, Any]:
    """The medians of one way to train."""
    pairs = zip(found.get("graph", ()), found[way], strict=False)
    ratios = [graph["seconds"] / one["seconds"] for graph, one in pairs]
    seconds = median(one["seconds"] for one in found[way])
    return {
        "case": name,
        "attention": attention,
        "way": way,
        "unit": CASES[name].unit,
        "rate": CASES[name].units_per_step / seconds,
        "step_ms": 1e3 * seconds,
        "ratio": median(ratios) if ratios else None,
        "peak_gib": max(one["gib"] for one in found[way]),
    }


def line_of(row: dict[str, Any]) -> str:
    ratio = "" if row["ratio"] is None else f"x{row['ratio']:.3f}"
    return (
        f"{row['case']:10} {row['attention']:8} {row['way']:8} {row['rate']:12,.0f} "
        f"{row['unit']}/s {row['step_ms']:8.2f} ms  {ratio:7} {row['peak_gib']:5.1f} GiB"
    )


if __name__ == "__main__":
    main()
