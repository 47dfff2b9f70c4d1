"""Muon trains the matrices of the blocks, and AdamW everything else, as one optimizer."""

import re

import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from torch.optim import AdamW, Muon

from diffmm.training import (
    Checkpoints,
    FineTuneConfig,
    NonFiniteGuard,
    OptimizerConfig,
    ScheduleConfig,
)
from diffmm.training.finetuning import freeze
from diffmm.training.muon import MuonAdamW
from diffmm.training.optimizer import make_optimizer, parameter_groups
from diffmm.training.resilience.non_finite import can_skip

MUON = OptimizerConfig(3e-3, kind="muon", weight_decay=0.1)
MATRIX = re.compile(
    r"((encoder\.)?backbone|decoder)\.blocks\.\d+\.(attention\.(q|k|v|out|gate)|feed_forward\.(gate|up|down))"
    r"_proj\.weight"
)
"""The names of the matrices of all models."""


def group_of(model, config=MUON):
    """The group of each trainable parameter, by its name."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = parameter_groups(model, config)
    pairs = [(names[id(p)], group) for group in groups for p in group["params"]]
    assert len(pairs) == len(dict(pairs))
    return dict(pairs)


@pytest.mark.parametrize("attention", ["softmax", "diff_v1", "diff_v2"])
@pytest.mark.parametrize("kind", ["text", "image", "audio", "autoencoder"])
def test_every_parameter_has_one_optimizer(kind, attention, make):
    changes = {"layer_scale": 1e-2, "qkv_bias": True, "qk_norm": True, "output_gate": "element"}
    model = getattr(make, kind)(attention, **changes)
    groups = group_of(model)
    assert groups.keys() == dict(model.named_parameters()).keys()
    muon = {name for name, group in groups.items() if group["name"] == "muon"}
    assert muon == {name for name in groups if MATRIX.fullmatch(name)}
    assert len(muon) >= 2 * 8
    for name, group in groups.items():
        if name not in muon:
            plain = group_of(model, OptimizerConfig(3e-3, weight_decay=0.1))[name]
            assert {**group, "params": 0} == {**plain, "params": 0}, name


def test_the_matrices_of_a_decoder_by_name(make):
    groups = group_of(make.text("diff_v2"))
    muon = [name for name, group in groups.items() if group["name"] == "muon"]
    assert muon[: len(muon) // 2] == [
        f"backbone.blocks.0.{name}.weight"
        for name in (
            *(f"attention.{name}_proj" for name in ("q", "k", "v", "out")),
            *(f"feed_forward.{name}_proj" for name in ("gate", "up", "down")),
        )
    ]
    assert groups["backbone.blocks.0.attention.lambda_proj.weight"]["name"] == "lambda"
    assert groups["embedding.weight"]["name"] == "no_decay"
    assert groups["head.weight"]["name"] == "decay"


def test_muon_has_its_own_rate_and_takes_that_of_its_layer(make):
    config = OptimizerConfig(
        1e-2, kind="muon", muon_learning_rate=4e-2, lambda_learning_rate=1.0, layer_decay=0.5
    )
    rates = {name: group["lr"] for name, group in group_of(make.text(), config).items()}
    assert rates["backbone.blocks.1.attention.q_proj.weight"] == 2e-2
    assert rates["backbone.blocks.0.attention.q_proj.weight"] == 1e-2
    assert rates["backbone.blocks.1.attention.lambda_q1"] == 0.5
    assert rates["head.weight"] == 1e-2
    (rate,) = {g["lr"] for name, g in group_of(make.text()).items() if MATRIX.fullmatch(name)}
    assert rate == 3e-3


def losses(model, batch, steps, optimizers):
    for step in range(steps):
        model(batch["images"]).square().mean().backward()
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = 3e-3 / (step + 1)
            optimizer.step()
            optimizer.zero_grad()


@pytest.mark.parametrize("is_skipping", [False, True])
def test_a_step_is_that_of_both_optimizers(make, is_skipping):
    """Bitwise, with `found_inf` of 0 too."""
    batch, models = make.batch("image"), []
    for _ in range(2):
        torch.manual_seed(0)
        models.append(make.image("diff_v2"))
    config = OptimizerConfig(3e-3, kind="muon", weight_decay=0.1, momentum=0.9, betas=(0.8, 0.9))
    ours = make_optimizer(models[0], config)
    if is_skipping:
        ours.found_inf = torch.zeros(())
    losses(models[0], batch, 4, [ours])
    plain = OptimizerConfig(3e-3, weight_decay=0.1)
    groups = parameter_groups(models[1], plain)
    matrices = [p for name, p in models[1].named_parameters() if MATRIX.fullmatch(name)]
    for group in groups:
        group["params"] = [p for p in group["params"] if not any(p is m for m in matrices)]
    muon = Muon(matrices, 3e-3, weight_decay=0.1, momentum=0.9, adjust_lr_fn="match_rms_adamw")
    losses(models[1], batch, 4, [muon, AdamW(groups, betas=(0.8, 0.9), fused=True)])
    torch.manual_seed(0)
    start = make.image("diff_v2").state_dict()
    for name, weight in models[0].named_parameters():
        assert weight.equal(models[1].get_parameter(name)), name
        assert not weight.equal(start[name]), name


def test_steps_are_as_large_as_those_of_adamw(make):
    """The root mean square of the changes is about 0.2 of the learning rate, for all shapes."""
    model, config = make.image(), OptimizerConfig(1e-3, kind="muon", weight_decay=0.0)
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    make_optimizer(model, config).step()
    for name in filter(MATRIX.fullmatch, before):
        change = (model.get_parameter(name) - before[name]).square().mean().sqrt()
        assert 0.15e-3 < change < 0.25e-3, name


def test_one_optimizer_for_lightning(make):
    """One state, one list of groups that a schedule scales, and a closure."""
    model = make.image()
    optimizer = make_optimizer(model, MUON)
    assert [group["name"] for group in optimizer.param_groups] == [
        "muon", "no_decay", "lambda", "decay",
    ]  # fmt: skip

    def closure():
        optimizer.zero_grad()
        loss = model(make.batch("image")["images"]).square().mean()
        loss.backward()
        return loss

    assert optimizer.step(closure).requires_grad
    state = optimizer.state_dict()
    assert len(state["state"]) == len(list(model.parameters()))
    kinds = {tuple(sorted(moments)) for moments in state["state"].values()}
    assert kinds == {("momentum_buffer",), ("exp_avg", "exp_avg_sq", "step")}
    added = torch.nn.Parameter(torch.ones(3))
    optimizer.add_param_group({"params": [added], "lr": 0.1})
    added.grad = torch.ones(3)
    optimizer.step()
    assert torch.allclose(added, torch.tensor(0.9), atol=2e-3)
    optimizer.zero_grad()
    assert all(parameter.grad is None for parameter in (*model.parameters(), added))


@pytest.fixture
def train(make, fit):
    """`train(batches, ...)` returns all that a step may change, at the end of a run."""

    def run(batches, **settings):
        torch.manual_seed(3)
        kinds = {"optimizer": MUON, "schedule": ScheduleConfig(1000, "constant")}
        changes = {name: settings.pop(name, value) for name, value in kinds.items()}
        task = make.task("image", **changes)
        settings = {"logger": False, "max_steps": len(batches), **settings}
        trainer = fit(task, batches, **settings)
        (optimizer,) = trainer.optimizers
        tensors = dict(task.state_dict())
        for number, moments in optimizer.state_dict()["state"].items():
            tensors |= {f"{number}.{name}": tensor for name, tensor in moments.items()}
        return optimizer, {name: tensor.clone() for name, tensor in tensors.items()}

    return run


def assert_same(one, two):
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        assert tensor.isfinite().all(), name
        assert torch.equal(tensor, two[name]), name


# A gradient scaler changes its scale in a bad step, and so the rounding of later gradients.
@pytest.mark.parametrize(
    ("pattern", "has_scaler"),
    [("x..", False), (".x.", False), ("..x", False), ("..x", True)],
)
def test_a_bad_step_changes_nothing(make, train, pattern, has_scaler):
    """Skipped by the optimizer on the device or, with a gradient scaler, on the host."""
    good = [make.batch("image") for _ in range(2)]
    bad = make.batch("image")
    bad["images"][2, 0, 3, 3] = float("nan")
    results = []
    for marks in (pattern, pattern.replace("x", "")):
        batches = iter(good)
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
        optimizer, state = train(
            [bad if mark == "x" else next(batches) for mark in marks],
            callbacks=[NonFiniteGuard()],
            plugins=[MixedPrecision("16-mixed", "cpu", scaler)] if has_scaler else None,
        )
        assert isinstance(optimizer, MuonAdamW)
        assert can_skip(optimizer) == (not has_scaler)
        results.append(state)
    assert_same(*results)


@pytest.mark.gpu
def test_a_step_is_skipped_without_waiting_for_the_gpu(make):
    model = make.image().cuda()
    optimizer = make_optimizer(model, MUON)
    batch = make.batch("image")["images"].cuda()
    for is_bad in (False, True):
        before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
        model(batch).square().mean().backward()
        optimizer.found_inf = torch.full((), float(is_bad), device="cuda")
        torch.cuda.set_sync_debug_mode("error" if is_bad else "default")
        try:
            optimizer.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        same = [weight.equal(before[name]) for name, weight in model.named_parameters()]
        assert all(same) if is_bad else not any(same)


def test_a_run_resumes_bitwise(make, train, tmp_path):
    """Within the decay of its schedule, from a checkpoint of `Checkpoints`."""
    schedule = ScheduleConfig(6, "wsd", warmup_steps=1, decay_fraction=0.7)
    batches = [make.batch("image")]
    keeper = Checkpoints(every_n_steps=1, every_minutes=None, keep_last=9)
    settings = {"schedule": schedule, "max_steps": 6}
    _, whole = train(batches, callbacks=[keeper], enable_checkpointing=True, **settings)
    for step in (1, 4):
        path = tmp_path / "checkpoints" / f"step_{step:08d}" / "state.ckpt"
        optimizer, resumed = train(batches, ckpt_path=path, **settings)
        assert_same(whole, resumed)
        assert optimizer.muon.state is optimizer.adamw.state is optimizer.state


def test_gradients_are_unscaled(make):
    """As `torch.amp.GradScaler` asks of an optimizer with a fused kernel."""
    batch, weights = make.batch("image"), []
    for scale in (None, 2.0**7):
        torch.manual_seed(0)
        model = make.image()
        optimizer = make_optimizer(model, MUON)
        is_scaled = scale is not None
        # The scale doubles after each step.
        scaler = torch.amp.GradScaler(
            "cpu", init_scale=scale or 1.0, growth_interval=1, enabled=is_scaled
        )
        for _ in range(3):
            optimizer.zero_grad()
            scaler.scale(model(batch["images"]).square().mean()).backward()
            scaler.step(optimizer)
            scaler.update()
        weights.append(model.state_dict())
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_frozen_matrices_are_left_out(make, train):
    model = make.image()
    freeze(model, FineTuneConfig(freeze=1))
    names = group_of(model)
    assert {name.split(".")[2] for name in names if MATRIX.fullmatch(name)} == {"1"}
    optimizer = make_optimizer(model, MUON)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(names)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            lambda make: torch.nn.Linear(2, 2),
            "kind='muon' trains the linear layers inside blocks, and Linear has none: use "
            "kind='adamw'",
        ),
        (
            lambda make: make.image(),
            "ImageModel has none that is trainable: use kind='adamw'",
        ),
    ],
)
def test_models_without_trainable_matrices_are_refused(make, model, message):
    model = model(make)
    if hasattr(model, "backbone"):
        freeze(model, FineTuneConfig(freeze="all_but_head"))
    with pytest.raises(ValueError, match=message):
        make_optimizer(model, MUON)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "muno"}, "kind must be one of 'adamw', 'muon', got 'muno'; did you mean 'muon'"),
        ({"momentum": 1.0, "kind": "muon"}, r"momentum must be in \[0, 1\), got 1.0"),
        (
            {"muon_learning_rate": 0.0, "kind": "muon"},
            "muon_learning_rate must be positive and at most 1000, got 0.0",
        ),
        ({"momentum": 0.9}, "momentum=0.9 is only for kind='muon', got kind='adamw': drop"),
        ({"muon_learning_rate": 0.1}, "muon_learning_rate=0.1 is only for kind='muon'"),
    ],
)
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        OptimizerConfig(1e-3, **settings)


@pytest.mark.parametrize("kinds", [("adamw", "muon"), ("muon", "adamw")])
def test_a_run_keeps_its_kind(make, fit, tmp_path, kinds):
    first, second = (
        make.task("image", optimizer=OptimizerConfig(1e-3, kind=kind)) for kind in kinds
    )
    optimizers = [make_optimizer(task.model, task.optimizer_config) for task in (first, second)]
    if kinds[1] == "muon":
        with pytest.raises(ValueError, match=r"has the groups \['no_decay', .* needs \['muon', "):
            optimizers[1].load_state_dict(optimizers[0].state_dict())
    batches, path = [make.batch("image")], tmp_path / "run.ckpt"
    fit(first, batches, max_steps=1, logger=False).save_checkpoint(path)
    message = f"saved with kind={kinds[0]!r}, which is now {kinds[1]!r}: resume with"
    with pytest.raises(ValueError, match=message):
        fit(second, batches, ckpt_path=path, max_steps=2, logger=False)
    # Another kind can start from the weights of the run.
    optimizer = OptimizerConfig(1e-3, kind=kinds[1])
    assert type(first).load_from_checkpoint(path, optimizer=optimizer).optimizer_config == optimizer
