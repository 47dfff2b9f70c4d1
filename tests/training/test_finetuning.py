"""Starting from pretrained weights, and freezing a part of them."""

import pytest
import torch
from lightning.pytorch import Callback

from diffmm.models import TextConfig, TextModel
from diffmm.models.weights import save_model
from diffmm.training import (
    CausalLM,
    Classification,
    FineTuneConfig,
    OptimizerConfig,
    ScheduleConfig,
)


def snapshot(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def changed(model, before):
    return {n for n, tensor in model.state_dict().items() if not torch.equal(tensor, before[n])}


STILL = OptimizerConfig(1e-45, eps=1e10)
"""Settings with updates of zero, so that the final weights equal the initial ones."""


@pytest.mark.parametrize("name", ["image", "audio"])
def test_a_linear_probe_moves_the_head_alone(name, make, fit):
    finetune = FineTuneConfig(freeze="all_but_head")
    optimizer = OptimizerConfig(1e-2, weight_decay=0.5)
    task = make.task(name, finetune=finetune, optimizer=optimizer)
    before = snapshot(task.model)
    fit(task, [make.batch(name)], [make.batch(name)], max_steps=3, val_check_interval=1)
    assert changed(task.model, before) == {"head.weight", "head.bias"}


@pytest.mark.parametrize("name", ["causal_lm", "image", "audio"])
def test_the_first_blocks_stay(name, make, fit):
    changes = {"dropout": 0.1, "drop_path": 0.1}
    task = make.task(name, finetune=FineTuneConfig(freeze=1), backbone=changes)
    before = snapshot(task.model)
    fit(task, [make.batch(name)], max_steps=3)
    moved = changed(task.model, before)
    expected = {n for n, _ in task.model.named_parameters()
                if n.startswith(("backbone.blocks.1.", "backbone.norm.", "head."))}  # fmt: skip
    assert moved == expected


def test_frozen_modules_stay_in_evaluation_mode(make, fit):
    task = make.task("image", finetune=FineTuneConfig(freeze=1), backbone={"dropout": 0.5})
    modes = []

    class Recorded(Callback):
        def on_train_batch_start(self, trainer, pl_module, *args):
            modes.append({name for name, part in task.model.named_modules() if part.training})

    batch = make.batch("image")
    fit(task, [batch], [batch], max_steps=3, val_check_interval=1, callbacks=[Recorded()])
    assert len(modes) == 3
    for training in modes:
        assert {
            "",
            "head",
            "backbone.norm",
            "backbone.blocks.1.attention_branch.dropout",
        } < training
        assert not any(n.startswith(("backbone.blocks.0", "patch_embedding")) for n in training)


def test_a_run_starts_from_weights_with_a_new_head(make, fit, tmp_path):
    source = make.image()
    file = save_model(source, tmp_path / "weights")
    task = make.task("image", finetune=FineTuneConfig(weights=str(file)),
                     optimizer=STILL)  # fmt: skip
    head = task.model.head.weight.detach().clone()
    fit(task, [make.batch("image")])
    assert changed(task.model, snapshot(source)) == {"head.weight"}
    assert torch.equal(task.model.head.weight, head)


def test_the_head_of_the_weights_can_be_kept(make, fit, tmp_path):
    source = make.image()
    file = save_model(source, tmp_path / "weights")
    finetune = FineTuneConfig(weights=str(file), new_head=False)
    task = make.task("image", finetune=finetune, optimizer=STILL)
    fit(task, [make.batch("image")])
    assert not changed(task.model, snapshot(source))


def test_an_autoencoder_s_encoder_starts_a_classifier(make, fit, tmp_path):
    pretraining = make.task("image_mae")
    trainer = fit(pretraining, [make.batch("image_mae")])
    trainer.save_checkpoint(tmp_path / "pretrained.ckpt")
    finetune = FineTuneConfig(weights=str(tmp_path / "pretrained.ckpt"))
    task = make.task("image", finetune=finetune, optimizer=STILL)
    fit(task, [make.batch("image")], logger=False)
    encoder = pretraining.model.encoder.state_dict()
    for name, tensor in task.model.state_dict().items():
        if not name.startswith("head."):
            assert torch.equal(tensor, encoder[name]), name


def test_a_resumed_run_does_not_start_again(make, fit, tmp_path):
    file = save_model(make.image(), tmp_path / "weights")
    finetune = FineTuneConfig(weights=str(file))
    trainer = fit(make.task("image", finetune=finetune), [make.batch("image")], max_steps=2)
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    checkpoint = torch.load(tmp_path / "run.ckpt", weights_only=True)
    saved = {n.removeprefix("model."): w for n, w in checkpoint["state_dict"].items()}
    file.unlink()
    resumed = make.task("image", finetune=finetune)
    fit(resumed, [make.batch("image")], max_steps=2, ckpt_path=tmp_path / "run.ckpt", logger=False)
    assert not changed(resumed.model, saved)


def test_missing_weights_are_named(make, fit, tmp_path):
    task = make.task("image", finetune=FineTuneConfig(weights=str(tmp_path / "none.ckpt")))
    with pytest.raises(FileNotFoundError, match="none.ckpt"):
        fit(task, [make.batch("image")])


def test_what_cannot_be_frozen_is_refused(make):
    settings = (OptimizerConfig(1e-3), ScheduleConfig(10))
    with pytest.raises(ValueError, match="freeze=3 blocks, but ImageModel has 2"):
        make.task("image", finetune=FineTuneConfig(freeze=3))
    with pytest.raises(ValueError, match="MaskedAutoencoder lacks one of them"):
        make.task("image_mae", finetune=FineTuneConfig(freeze=1))
    tied = TextModel(TextConfig(24, 32, make.text().config.backbone, tie_embeddings=True))
    with pytest.raises(ValueError, match="TextModel ties its head to it"):
        CausalLM(tied, *settings, finetune=FineTuneConfig(freeze=1))
    for freeze in (-1, True, "head"):
        with pytest.raises(
            ValueError, match="freeze must be a number of blocks, 'all_but_head' or"
        ):
            FineTuneConfig(freeze=freeze)


def test_freezing_nothing_trains_everything(make):
    task = Classification(make.image(), OptimizerConfig(1e-3), ScheduleConfig(10))
    assert all(parameter.requires_grad for parameter in task.model.parameters())
    assert all(module.training for module in task.model.modules())
