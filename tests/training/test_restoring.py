"""`load_from_checkpoint` and Lightning's learning rate finder, as with any Lightning module."""

import pickle
from pathlib import Path

import pytest
import timm
import torch
from lightning.pytorch.tuner import Tuner
from torch import nn
from torch.utils.data import DataLoader, StackDataset

from diffmm.training import (
    CausalLM,
    Checkpoints,
    Classification,
    FineTuneConfig,
    MaskedAutoencoding,
    MixingConfig,
    OptimizerConfig,
    ScheduleConfig,
    Task,
)

NAMES = ("causal_lm", "masked_lm", "image", "audio", "image_mae", "audio_mae")
SETTINGS = {
    "optimizer": OptimizerConfig(2e-3, betas=(0.8, 0.9), lambda_learning_rate=1e-3),
    "schedule": ScheduleConfig(50, kind="linear", warmup_steps=5),
}


def saved(task, batch, fit, folder) -> Path:
    run = fit(task, [batch], max_steps=2, logger=False, default_root_dir=folder)
    run.save_checkpoint(folder / "saved.ckpt")
    return folder / "saved.ckpt"


def same(found, expected):
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


@pytest.mark.parametrize("name", NAMES)
def test_a_checkpoint_is_a_task(name, make, fit, trainer, tmp_path):
    task, batch = make.task(name, **SETTINGS), make.batch(name)
    path = saved(task, batch, fit, tmp_path)
    restored = Task.load_from_checkpoint(path)
    assert type(restored) is type(task) is type(type(task).load_from_checkpoint(path))
    assert all(module.training for module in restored.modules())
    same(restored.state_dict(), task.state_dict())
    assert restored.optimizer_config == SETTINGS["optimizer"]
    assert restored.schedule_config == SETTINGS["schedule"]
    data = DataLoader(StackDataset(**batch), batch_size=6)
    results = [trainer(logger=False).predict(each, data)[0] for each in (task, restored)]
    same(*results)
    assert isinstance(restored.to("meta"), Task)


def test_settings_of_the_task_come_back(make, fit, tmp_path):
    other = make.image()
    torch.save({"state_dict": {f"model.{k}": v for k, v in other.state_dict().items()}},
               tmp_path / "start.ckpt")  # fmt: skip
    task = make.task(
        "image",
        mixing=MixingConfig(mixup_alpha=0.2),
        label_smoothing=0.1,
        seed=3,
        finetune=FineTuneConfig(str(tmp_path / "start.ckpt"), freeze=1),
        activation_checkpointing=True,
    )
    path = saved(task, make.batch("image"), fit, tmp_path)
    (tmp_path / "start.ckpt").unlink()
    restored = Classification.load_from_checkpoint(path, label_smoothing=0.0)
    assert restored.mixing == task.mixing
    assert restored.seed == 3
    assert restored.label_smoothing == 0.0
    assert restored.finetune == FineTuneConfig(freeze=1)
    assert len(restored.frozen) > 0
    assert restored.model.backbone.activation_checkpointing
    # The deleted file is not needed any longer.
    fit(restored, [make.batch("image")], max_steps=1, logger=False)


def test_a_run_and_a_folder_are_checkpoints_too(make, fit, tmp_path):
    task = make.task("image")
    fit(task, [make.batch("image")], max_steps=2, logger=False, enable_checkpointing=True,
        callbacks=[Checkpoints(every_n_steps=1)])  # fmt: skip
    for path in (tmp_path, tmp_path / "checkpoints" / "step_00000002"):
        same(Task.load_from_checkpoint(path).state_dict(), task.state_dict())
    (tmp_path / "checkpoints" / "step_00000002" / "state.ckpt").write_bytes(b"short")
    with pytest.raises(ValueError, match=r"state.ckpt has 5 bytes"):
        Task.load_from_checkpoint(tmp_path / "checkpoints" / "step_00000002")


class Weighted(Classification):
    """A user's own task, with an additional argument and weight."""

    def __init__(self, model, optimizer, schedule, *, temperature: float = 1.0) -> None:
        super().__init__(model, optimizer, schedule)
        self.temperature = temperature
        self.scale = nn.Parameter(torch.tensor(temperature))


def test_a_subclass_comes_back_with_what_is_its_own(make, fit, tmp_path):
    task = Weighted(make.image(), SETTINGS["optimizer"], SETTINGS["schedule"], temperature=2.0)
    path = saved(task, make.batch("image"), fit, tmp_path)
    with torch.no_grad():
        task.scale += 1
    for family in (Task, Classification, Weighted):
        restored = family.load_from_checkpoint(path)
        assert type(restored) is Weighted
        assert restored.temperature == 2.0
        assert restored.scale == 2.0
    changed(path, lambda content: content["state_dict"].pop("scale"))
    with pytest.raises(ValueError, match=r"does not fit Weighted: missing \['scale'\]"):
        Weighted.load_from_checkpoint(path)
    with pytest.warns(UserWarning, match=r"missing \['scale'\]"):
        Weighted.load_from_checkpoint(path, strict=False)
    plain = saved(make.task("image", seed=5), make.batch("image"), fit, tmp_path)
    with pytest.raises(ValueError, match="has settings that Weighted does not know: multi_label"):
        Weighted.load_from_checkpoint(plain)


class Renamed(Classification):
    """A subclass with the same arguments."""


def test_a_refinement_takes_what_its_base_was(checkpoint):
    assert type(Renamed.load_from_checkpoint(checkpoint)) is Renamed


def test_a_model_of_timm_is_given(fit, make, tmp_path):
    def model():
        return timm.create_model(
            "vit_tiny_patch16_224", img_size=8, patch_size=4, depth=1, num_classes=7
        )

    task = Classification(model(), SETTINGS["optimizer"], SETTINGS["schedule"])
    path = saved(task, make.batch("image"), fit, tmp_path)
    with pytest.raises(
        ValueError, match=r"not describe its model: pass one to Classification.load"
    ):
        Task.load_from_checkpoint(path)
    same(Task.load_from_checkpoint(path, model=model()).state_dict(), task.state_dict())


@pytest.fixture(scope="module")
def kept():
    """The bytes of a checkpoint, which is created once."""
    return []


@pytest.fixture
def checkpoint(kept, make, fit, tmp_path):
    path = tmp_path / "saved.ckpt"
    if not kept:
        kept.append(saved(make.task("image"), make.batch("image"), fit, tmp_path).read_bytes())
    path.write_bytes(kept[0])
    return path


def changed(path, change):
    content = torch.load(path, weights_only=True)
    change(content)
    torch.save(content, path)
    return path


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda c: c.pop("task"),
            "does not contain the arguments optimizer and schedule: pass",
        ),
        (lambda c: c.update(task=3), "has no usable description of its task, got 3"),
        (
            lambda c: c["task"].update(class_path="os.system"),
            "is a checkpoint of the task os.system, which is",
        ),
        (lambda c: c["task"]["init_args"].update(colour=1), r"does not know: colour"),
        (
            lambda c: c["task"]["init_args"]["optimizer"].update(eps=-1.0),
            "has an invalid optimizer: eps must be positive",
        ),
        (lambda c: c["model"].update(class_path="os.system"), "class_path"),
    ],
)
def test_what_a_file_says_is_checked(change, words, checkpoint):
    with pytest.raises(ValueError, match=words):
        Classification.load_from_checkpoint(changed(checkpoint, change))


def test_old_checkpoints_load_with_their_settings_given(checkpoint):
    changed(checkpoint, lambda content: content.pop("task"))
    restored = Classification.load_from_checkpoint(checkpoint, **SETTINGS)
    assert restored.optimizer_config == SETTINGS["optimizer"]


class Hostile:
    def __reduce__(self):
        return (pytest.fail, ("code ran",))


def test_no_code_of_a_file_runs(tmp_path):
    for name, write in (("a", torch.save), ("b", lambda v, p: p.write_bytes(pickle.dumps(v)))):
        path = tmp_path / f"{name}.ckpt"
        write({"state_dict": {}, "x": Hostile()}, path)
        with pytest.raises(ValueError, match="is not a complete checkpoint of tensors and plain"):
            Task.load_from_checkpoint(path)


def test_what_is_asked_wrongly_is_refused(checkpoint, tmp_path):
    for task in (CausalLM, MaskedAutoencoding):
        with pytest.raises(ValueError, match=rf"training.Classification, which is not a {task}"
                           .replace(str(task), task.__name__)):  # fmt: skip
            task.load_from_checkpoint(checkpoint)
    with pytest.raises(ValueError, match=r"no argument 'sed'; did you mean 'seed'\?"):
        Task.load_from_checkpoint(checkpoint, sed=1)
    with pytest.raises(ValueError, match="weights_only=False would run code"):
        Task.load_from_checkpoint(checkpoint, weights_only=False)
    with pytest.raises(ValueError, match="hparams_file is not supported"):
        Task.load_from_checkpoint(checkpoint, hparams_file="hparams.yaml")
    with pytest.raises(FileNotFoundError, match="there is no checkpoint at"):
        Task.load_from_checkpoint(tmp_path / "none.ckpt")


@pytest.mark.filterwarnings("ignore:The `srun` command is available")
@pytest.mark.parametrize("name", ["image", "causal_lm"])
def test_the_learning_rate_finder_finds_one(name, make, trainer, tmp_path):
    task = make.task(name, optimizer=OptimizerConfig(1e-7, lambda_learning_rate=1e-3))
    before = {key: value.clone() for key, value in task.state_dict().items()}
    batch = make.batch(name, size=32)
    if name == "image":
        batch["images"] = 0.1 * batch["images"] + batch["labels"][:, None, None, None] / 3 - 1
    else:
        batch["targets"] = (batch["tokens"] + 1) % make.vocab_size
    data = DataLoader(StackDataset(**batch), batch_size=8)
    run = trainer(max_steps=30, logger=False, callbacks=[Checkpoints()], enable_checkpointing=True)
    finder = Tuner(run).lr_find(task, train_dataloaders=data, num_training=40, max_lr=3.0)
    rate = finder.suggestion()
    assert task.learning_rate == task.optimizer_config.learning_rate == rate
    assert 1e-4 < rate < 1.0
    assert task.optimizer_config.lambda_learning_rate == 1e-3
    same(task.state_dict(), before)
    run.fit(task, data)
    assert run.optimizers[0].param_groups[0]["lr"] == rate
    assert run.callback_metrics["train/learning_rate"] == pytest.approx(rate)
    assert run.callback_metrics["train/loss"] < 0.8 * finder.results["loss"][0], rate
