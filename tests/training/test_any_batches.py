"""Tasks accept the batches of other loaders: tuples, tensors, dicts without an index."""

import re

import pytest
import torch
from lightning import LightningDataModule
from torch.utils.data import DataLoader, StackDataset, TensorDataset

TUPLES = {
    "image": ("images", "labels"),
    "audio": ("waveforms", "num_samples", "labels"),
    "causal_lm": ("tokens", "targets"),
    "masked_lm": ("tokens", "targets"),
    "image_mae": ("images", "labels"),
    "audio_mae": ("waveforms", "num_samples"),
}
UNNEEDED = {"index", "num_bytes"}


def without(batch, *names):
    return {name: tensor for name, tensor in batch.items() if name not in names}


def tuples(name, batch):
    return DataLoader(TensorDataset(*(batch[field] for field in TUPLES[name])), batch_size=3)


def dicts(name, batch):
    needed = without(batch, *UNNEEDED)
    if "mae" in name:
        needed = without(needed, "labels")
    return DataLoader(StackDataset(**needed), batch_size=3)


@pytest.fixture
def same_start(make):
    """Two tasks of the same kind with the same initial weights."""

    def build(name, **settings):
        tasks = [make.task(name, **settings) for _ in range(2)]
        tasks[1].load_state_dict(tasks[0].state_dict())
        return tasks

    return build


@pytest.mark.parametrize("loader", [tuples, dicts])
@pytest.mark.parametrize("name", list(TUPLES))
def test_a_task_needs_no_index_and_no_names(name, loader, make, same_start, trainer):
    batch = make.batch(name)
    plain, ours = same_start(name)
    results = []
    for task, data in ((plain, loader(name, batch)), (ours, DataLoader(StackDataset(**batch), 3))):
        torch.manual_seed(0)
        run = trainer(max_steps=2, logger=False)
        run.fit(task, data, data)
        metrics = dict(run.callback_metrics)
        (tested,) = trainer(logger=False).test(task, data, verbose=False)
        predicted = trainer(logger=False).predict(task, data)
        results.append((metrics, tested, predicted))
    (metrics, tested, predicted), (expected, expected_test, expected_predicted) = results
    left_out = {"val/bits_per_byte", "test/bits_per_byte"} if name.endswith("_lm") else set()
    assert expected.keys() - metrics.keys() == left_out & expected.keys()
    assert expected_test.keys() - tested.keys() == left_out & expected_test.keys()
    assert metrics["train/samples_per_second"] > 0
    if "mae" in name:  # other patches are masked
        assert all(loss.isfinite() for loss in metrics.values())
    else:
        speeds = {"train/samples_per_second", "train/tokens_per_second", "train/data_wait"}
        for key in metrics.keys() - speeds:
            torch.testing.assert_close(metrics[key], expected[key])
    for found, wanted in zip(predicted, expected_predicted, strict=True):
        assert wanted.keys() - found.keys() == UNNEEDED & wanted.keys()
        if "mae" not in name:
            torch.testing.assert_close(found, without(wanted, *UNNEEDED))


@pytest.mark.parametrize("name", ["causal_lm", "image_mae", "audio_mae"])
def test_a_tensor_alone_is_enough(name, make, same_start, trainer):
    batch = make.batch(name)
    plain, ours = same_start(name)
    if name == "causal_lm":
        tokens = torch.cat([batch["tokens"], batch["targets"][:, -1:]], dim=1)
        expected = (batch["tokens"], batch["targets"])
    else:
        tokens = batch[TUPLES[name][0]]
        expected = (tokens, *(batch[each] for each in TUPLES[name][1:2] if "samples" in each))
        if name == "audio_mae":
            expected = (tokens, torch.full((len(tokens),), tokens.shape[1]))
    losses = []
    for task, data in ((plain, list(tokens.split(3))), (ours, TensorDataset(*expected))):
        torch.manual_seed(0)
        run = trainer(max_steps=2, logger=False)
        loader = DataLoader(data, batch_size=None if isinstance(data, list) else 3)
        run.fit(task, loader)
        losses.append(run.callback_metrics["train/loss"])
    torch.testing.assert_close(losses[0], losses[1])


def test_sounds_need_no_lengths(make, trainer):
    batch = make.batch("audio")
    task = make.task("audio")
    data = DataLoader(TensorDataset(batch["waveforms"], batch["labels"]), batch_size=3)
    trainer(logger=False).fit(task, data, data)
    (first, _) = trainer(logger=False).predict(task, data)
    with torch.no_grad():
        expected = task.model(batch["waveforms"][:3]).softmax(dim=1)
    torch.testing.assert_close(first["probabilities"], expected)


def test_predictions_need_no_targets(make, trainer):
    images = make.batch("image")["images"]
    task = make.task("image")
    (alone,) = trainer(logger=False).predict(task, DataLoader(images, batch_size=6))
    assert alone.keys() == {"probabilities"}


WRONG = {
    "image": [
        (lambda b: b["images"], "Classification takes batches that are (images, labels), or a dict"
         " with images and labels: got a tensor alone"),
        (lambda b: (b["labels"], b["images"]), "labels have shape (6, 3, 8, 8)"),
        (lambda b: (b["images"], b["labels"], b["labels"]), "got 3 tensors"),
        (lambda b: (b["images"], ["cat"] * 6), "got a tuple with a list in it"),
        (lambda b: without(b, "labels"), "got a dict of images, index without labels"),
        (lambda b: (b["images"], b["labels"].float()), "labels must be int64 class indices, got"),
        (lambda b: (b["images"], b["labels"] + 5), "label 7 of batch entry 2 is outside"),
        (lambda b: "cat.jpg", "got a str"),
    ],
    "causal_lm": [
        (lambda b: (b["tokens"], b["targets"][:, 1:]), "targets with (6, 15) torch.int64"),
        (lambda b: b["tokens"][:, :1], "tokens alone must be [B, N + 1] with N >= 1, got (6, 1)"),
        (lambda b: b["tokens"].float(), "got tokens with (6, 15) torch.float32"),
    ],
    "masked_lm": [
        (lambda b: b["tokens"], "MaskedLM takes batches that are (tokens, targets), or a dict"),
    ],
    "image_mae": [
        (lambda b: {"pictures": b["images"]}, "got a dict of pictures without images"),
    ],
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [(name, *case) for name, cases in WRONG.items() for case in cases],
)
def test_a_wrong_batch_gets_one_clear_line(name, change, words, make, trainer):
    data = DataLoader([change(make.batch(name))], batch_size=None, collate_fn=lambda batch: batch)
    with pytest.raises(ValueError, match=re.escape(words)) as refused:
        trainer(logger=False).fit(make.task(name), data)
    assert "\n" not in str(refused.value)


class HasHooks(LightningDataModule):
    """A user's datamodule that changes its tuples in transfer hooks, as in other projects."""

    def __init__(self, samples):
        super().__init__()
        self.samples = samples

    def train_dataloader(self):
        return DataLoader(self.samples, batch_size=3)

    def on_after_batch_transfer(self, batch, dataloader_idx):
        images, labels = batch
        return 2.0 * images, labels


def test_a_datamodule_with_hooks_of_its_own_gets_its_own_batches(make, same_start, trainer):
    batch = make.batch("image")
    hooked, ours = same_start("image")
    runs = [trainer(max_steps=2, logger=False) for _ in range(2)]
    runs[0].fit(hooked, HasHooks(TensorDataset(batch["images"], batch["labels"])))
    runs[1].fit(ours, DataLoader(TensorDataset(2.0 * batch["images"], batch["labels"]), 3))
    losses = [run.callback_metrics["train/loss"] for run in runs]
    assert torch.equal(*losses)
    wrong = HasHooks(TensorDataset(batch["images"], batch["labels"] + 5))
    with pytest.raises(ValueError, match="label 7 of batch entry"):
        trainer(logger=False).fit(make.task("image"), wrong)


def test_masks_without_an_index_are_drawn_anew_in_training_only(make, trainer):
    images = make.batch("image_mae")["images"]
    seen = {"train": [], "val": []}
    task = make.task("image_mae")
    for stage, step in (("train", "training_step"), ("val", "validation_step")):
        original = getattr(task, step)

        def watched(batch, number, stage=stage, original=original):
            seen[stage].append(batch["mask_noise"])
            return original(batch, number)

        setattr(task, step, watched)
    data = DataLoader(images, batch_size=6)
    trainer(max_steps=2, max_epochs=2, logger=False).fit(task, data, data)
    assert not torch.equal(*seen["train"])
    assert torch.equal(*seen["val"])
    assert not torch.equal(seen["val"][0][0], seen["val"][0][1])


@pytest.mark.filterwarnings("ignore:step .* skipped")
def test_a_skipped_step_does_not_ask_for_an_index(make, trainer, tmp_path, caplog):
    images = make.batch("image")["images"].index_fill(0, torch.tensor([1]), torch.inf)
    data = DataLoader(TensorDataset(images, make.batch("image")["labels"]), batch_size=3)
    trainer(max_steps=1).fit(make.task("image"), data)
    assert "samples unknown" in caplog.text
    assert '"samples": []' in (tmp_path / "bad_steps.jsonl").read_text()
