"""Runs that are out of memory, or cannot read their data, end with a message."""

from pathlib import Path

import pytest
import torch

from datamodules.image.sources import ArrayImages
from datamodules.shared.bad_samples import BadSampleError
from diffmm.checkpoint_folders import find_whole
from diffmm.recipes.catalog import find_recipe
from diffmm.recipes.out_of_memory import Remedy, estimate, is_out_of_memory, remedies
from diffmm.recipes.settings import load
from diffmm.training import CausalLM

CUDA = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.10 GiB. "
    "If reserved but unallocated memory is large try setting PYTORCH_ALLOC_CONF"
)
CPU = "[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory: 8192 bytes"


def values_of(name, *overrides):
    return {**load([find_recipe(name)], overrides), "run_dir": "runs"}


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError(CUDA), MemoryError(), RuntimeError(CPU)], ids=type
)
def test_a_run_out_of_memory_says_what_would_help(run, recipe, text_changes, monkeypatch, error):
    train = CausalLM.training_step

    def step(self, batch, batch_idx):
        if self.global_step == 3:
            raise error
        return train(self, batch, batch_idx)

    monkeypatch.setattr(CausalLM, "training_step", step)
    changes = {"trainer.max_steps": 6, "trainer.val_check_interval": 2}
    # The sequence is long, so that halving activations, not weights, saves the most memory.
    changes["vars.sequence_length"] = 128
    path = recipe("text/stdlib_tiny", **{**text_changes, **changes})
    result = run("fit", "--config", path, "--run_dir", "kept")
    assert result.code == 1
    assert "Traceback" not in result.err
    first, second, third, *lines = result.err.split("diffmm: error: ")[1].splitlines()
    assert first.startswith("out of memory after 3 steps: ")
    assert str(error).partition(" If")[0] in first
    assert "PYTORCH_ALLOC_CONF" not in first
    assert second.startswith("a step takes about ")
    assert " MiB per device: weights " in second
    assert third == "it would take about"
    flags = [line.split("--", 1)[1] for line in lines if line.startswith("  ") and "--" in line]
    assert flags[0].startswith("data.batch_size 1 --trainer.accumulate_grad_batches 2  (the same")
    assert flags[1].startswith("model.activation_checkpointing true  (")
    assert flags[2].startswith("trainer.precision bf16-mixed  (")
    assert lines[3].endswith("with all of them")
    # The last checkpoint is complete and named in the message.
    checkpoint = find_whole(Path("kept/checkpoints"))
    assert checkpoint is not None
    assert lines[4].startswith(f"the last checkpoint is complete: {checkpoint}. ")
    assert "diffmm finetune --config kept/config.yaml --weights kept" in lines[4]
    monkeypatch.setattr(CausalLM, "training_step", train)
    assert run("fit", "--resume", "kept").code == 0


def test_other_failures_are_no_want_of_memory(run, recipe, text_changes, monkeypatch):
    assert not is_out_of_memory(RuntimeError("shapes cannot be multiplied"))
    assert not is_out_of_memory(ValueError(CPU))

    def step(self, batch, batch_idx):
        raise RuntimeError("shapes cannot be multiplied")

    monkeypatch.setattr(CausalLM, "training_step", step)
    path = recipe("text/stdlib_tiny", **text_changes)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        run("fit", "--config", path)


def test_each_flag_gives_the_memory_that_it_promises():
    """Each suggestion is a valid recipe, whose own memory estimate is the one that is printed."""
    values = values_of("text/stdlib_tiny")
    before = estimate(values)
    assert before is not None
    found = list(remedies(values))
    assert len(found) == 3
    for remedy in found:
        after = estimate(values_of("text/stdlib_tiny", *remedy.flags.split()))
        assert after is not None
        assert after.total < before.total
        assert after.weights == before.weights


def test_on_devices_states_are_shared_out():
    several = list(remedies(values_of("image/imagenet_vit_b")))
    assert [remedy.flags for remedy in several] == [
        "--data.batch_size 64 --trainer.accumulate_grad_batches 2",
        "--model.activation_checkpointing true",
        "--trainer.strategy fsdp2",
    ]
    (last,) = list(remedies(values_of("image/cifar10")))[-1:]
    assert last.settings["trainer.strategy"] == "fsdp2"
    assert "--vars.devices 8" in last.flags
    assert "divide the batch size" in last.what
    sharded = remedies(values_of("image/imagenet_vit_b", "--trainer.strategy", "fsdp2"))
    assert all("trainer.strategy" not in remedy.settings for remedy in sharded)


def test_a_setting_that_is_a_variable_is_set_there():
    values = values_of("text/stdlib_tiny")
    values["vars"]["size"] = 6
    values["data"]["init_args"]["batch_size"] = "${vars.size}"
    first = next(iter(remedies(values)))
    assert first.flags == "--vars.size 3 --trainer.accumulate_grad_batches 2"
    values["vars"]["size"] = 1
    assert next(iter(remedies(values))).settings == {"model.activation_checkpointing": True}
    assert Remedy("", {"a": "b c", "d": True}).flags == "--a 'b c' --d true"


def test_data_that_cannot_be_read_ends_a_run_in_one_line(run, recipe, monkeypatch):
    read, calls = ArrayImages.read, []

    def failing(self, index):
        calls.append(index)
        if len(calls) > 20:
            raise BadSampleError(f"image {index} (some.png) cannot be decoded: cut off")
        return read(self, index)

    monkeypatch.setattr(ArrayImages, "read", failing)
    path = recipe(**{"data.batch_size": 8, "trainer.max_steps": 4, "trainer.val_check_interval": 4})
    result = run("fit", "--config", path)
    assert result.code == 1
    (line,) = result.mistakes
    assert line.startswith(f"image {calls[-1]} (some.png) cannot be decoded: cut off; to continue")
    assert "Traceback" not in result.err
