"""Linear layers in float8: which are converted, and what is refused. A module takes the place of
torchao, whose layers need a recent GPU."""

import sys
from types import ModuleType

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from diffmm.models import TextConfig, TextModel
from diffmm.training import CausalLM, OptimizerConfig, ScheduleConfig, float8
from diffmm.training.float8 import use_float8

CPU = torch.device("cpu")


class Float8Linear(nn.Linear):
    """Counts its forward passes in training."""

    calls = 0

    def forward(self, input):
        type(self).calls += torch.is_grad_enabled()
        return super().forward(input)


@pytest.fixture
def torchao(monkeypatch):
    """A module with torchao's interface; returns the configs that it was called with."""
    configs = []

    def convert_to_float8_training(module, *, module_filter_fn=None, config=None):
        configs.append(config)
        for name, child in list(module.named_modules()):
            if isinstance(child, nn.Linear) and module_filter_fn(child, name):
                new = Float8Linear(child.in_features, child.out_features, device="meta")
                new.weight, new.bias = child.weight, child.bias
                module.get_submodule(name.rpartition(".")[0]).register_module(
                    name.rpartition(".")[2], new
                )
        return module

    fake = ModuleType("torchao.float8")
    fake.Float8LinearConfig = dict
    fake.convert_to_float8_training = convert_to_float8_training
    monkeypatch.setitem(sys.modules, "torchao", ModuleType("torchao"))
    monkeypatch.setitem(sys.modules, "torchao.float8", fake)
    monkeypatch.setattr(Float8Linear, "calls", 0)
    return configs


@pytest.fixture
def recent_gpu(monkeypatch):
    monkeypatch.setattr(float8, "capability", lambda device: (8, 9))


def text(make, attention="diff_v2", width=96, **changes):
    config = make.text(attention, feed_forward_width=width, **changes).config
    return TextModel(TextConfig(config.vocab_size, 32, config.backbone))


@pytest.mark.parametrize("attention", ["softmax", "diff_v1", "diff_v2"])
def test_the_layers_of_the_blocks_are_converted(make, attention, torchao, recent_gpu):
    model = text(make, attention)
    before = dict(model.named_parameters())
    use_float8(model, CPU)
    layers = {n: type(m) for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    kept = {name for name, kind in layers.items() if kind is not Float8Linear}
    lambdas = {f"backbone.blocks.{block}.attention.lambda_proj" for block in range(2)}
    assert kept == {"head"} | (lambdas if attention == "diff_v2" else set())
    assert len(layers) - len(kept) == 2 * 7
    after = dict(model.named_parameters())
    assert before.keys() == after.keys()
    assert all(after[name] is before[name] for name in before)
    assert torchao == [{"pad_inner_dim": True}]


def test_a_task_converts_for_training_alone(make, fit, trainer, tmp_path, torchao, recent_gpu):
    torch.manual_seed(0)
    model = text(make)
    task = CausalLM(model, OptimizerConfig(1e-3), ScheduleConfig(10), fp8=True)
    batches = [make.batch("causal_lm")]
    run = fit(task, batches, max_steps=2, logger=False)
    assert Float8Linear.calls == 2 * 2 * 7
    run.save_checkpoint(tmp_path / "run.ckpt")
    fit(task, batches, max_steps=4, ckpt_path=tmp_path / "run.ckpt", logger=False)
    assert Float8Linear.calls == 4 * 2 * 7
    restored = CausalLM.load_from_checkpoint(tmp_path / "run.ckpt")
    assert restored.fp8
    assert not any(isinstance(module, Float8Linear) for module in restored.modules())
    trainer(logger=False).test(restored, DataLoader(batches, batch_size=None), verbose=False)
    assert Float8Linear.calls == 4 * 2 * 7


def test_without_torchao_the_extra_is_named(make, fit, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao", None)
    monkeypatch.setitem(sys.modules, "torchao.float8", None)
    task = make.task("causal_lm", fp8=True)
    with pytest.raises(ValueError, match=r"^fp8=True needs torchao \(.*\): install diffmm\[fp8\]"):
        fit(task, [make.batch("causal_lm")], logger=False)


def test_devices_without_float8_are_refused(make, monkeypatch, torchao):
    with pytest.raises(ValueError, match="of compute capability 8.9 or later, got a cpu: drop fp8"):
        use_float8(text(make), CPU)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A40")
    with pytest.raises(ValueError, match="capability 8.9 or later, got NVIDIA A40: drop fp8"):
        use_float8(text(make), torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    use_float8(text(make), torch.device("cuda"))


def test_models_that_do_not_fit_are_refused(make, torchao, recent_gpu):
    model = text(make, width=40)
    message = (
        "fp8=True needs linear layers whose widths are multiples of 16, but the weight of "
        "backbone.blocks.0.feed_forward.down_proj is 32 x 40: change its widths, or drop fp8"
    )
    with pytest.raises(ValueError, match=message):
        use_float8(model, CPU)
    assert not any(isinstance(module, Float8Linear) for module in model.modules())
    with pytest.raises(ValueError, match="layers inside blocks, and Linear has none: drop fp8"):
        use_float8(nn.Linear(16, 16), CPU)
