"""Peak memory and time of saving a sharded model: each process writes its own shard, or the first
process gathers all weights and moments.

    python -m benchmarks.sharded_save

Two processes on the CPU (gloo) shard a text model of about 100 M parameters by FSDP2, take a step
of AdamW and save. Each way runs in new processes. Memory is the peak resident set beyond the memory
that the process held before saving.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
)
from torch.utils.data import DataLoader, TensorDataset

from diffmm.models import BackboneConfig, TextConfig, TextModel
from diffmm.recipes.trainer import leave_processes
from diffmm.training import CausalLM, OptimizerConfig, ScheduleConfig
from diffmm.training.resilience.checkpoints.snapshot import num_bytes

WAYS = ("whole", "shares")


def memory_mib(name: str) -> float:
    """Memory of this process in MiB: `VmRSS` is the current and `VmHWM` the peak resident set."""
    lines = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[name].split()[0]) / 1024


def save_whole(trainer: Trainer, file: Path) -> int:
    """Gather the state in the first process and save it there, as older versions did."""
    whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
    model, (optimizer,) = trainer.strategy.model, trainer.optimizers
    assert model is not None
    state: dict[str, Any] = {"state_dict": get_model_state_dict(model, options=whole)}
    state["optimizer_states"] = [get_optimizer_state_dict(model, optimizer, options=whole)]
    if trainer.is_global_zero:
        torch.save(state, file)
    return num_bytes(state)


def measure(way: str, dim: int, depth: int) -> None:
    """Train one step and save; the first process prints the measurements."""
    backbone = BackboneConfig(dim, depth, dim // 64, attention="diff_v2", rope="1d")
    model = TextModel(TextConfig(32000, 64, backbone, tie_embeddings=False))
    size = sum(parameter.numel() for parameter in model.parameters())
    task = CausalLM(model, OptimizerConfig(1e-4), ScheduleConfig(10))
    trainer = Trainer(
        accelerator="cpu", devices=2, strategy="fsdp2", max_steps=1, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(task, DataLoader(TensorDataset(torch.randint(32000, (4, 33))), batch_size=2))
    # Memory that the step used and freed would hide the memory of the save: reset the peak.
    Path("/proc/self/clear_refs").write_text("5")
    before = memory_mib("VmRSS")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(trainer.strategy.broadcast(folder)) / "state.ckpt"
        start = time.perf_counter()
        if way == "whole":
            save_whole(trainer, path)
        else:
            trainer.save_checkpoint(path)
        trainer.strategy.barrier()
        seconds = time.perf_counter() - start
        peak = memory_mib("VmHWM")
        if trainer.is_global_zero:
            files = [file for file in Path(folder).rglob("*") if file.is_file()]
            written = sum(file.stat().st_size for file in files) / 2**20
            print(json.dumps({
                "way": way, "parameters": size, "held_mib": round(before),
                "peak_over_it_mib": round(peak - before), "seconds": round(seconds, 1),
                "written_mib": round(written),
            }), flush=True)  # fmt: skip
        trainer.strategy.barrier()
    leave_processes(0)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--way", choices=WAYS, help="way of saving; both by default")
    parser.add_argument("--dim", type=int, default=640)
    parser.add_argument("--depth", type=int, default=12)
    options = parser.parse_args()
    if options.way:
        measure(options.way, options.dim, options.depth)
    for way in () if options.way else WAYS:
        size = ["--dim", str(options.dim), "--depth", str(options.depth)]
        command = [sys.executable, "-m", "benchmarks.sharded_save", "--way", way, *size]
        subprocess.run(command, check=True)
