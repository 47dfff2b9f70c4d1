"""`diffmm probe`."""

import re
from pathlib import Path

import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

import diffmm
from diffmm.models.weights import load_model, save_model


@pytest.fixture
def digits(tmp_path):
    """A folder of digits: 40 of each of two classes for training, 20 for validation."""
    found = load_digits()
    for digit in (0, 1):
        for number, pixels in enumerate(found.images[found.target == digit][:60]):
            folder = Path("digits", "train" if number < 40 else "val", f"digit {digit}")
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray((pixels * 15).astype("uint8")).save(folder / f"{number}.png")
    return "digits"


def encoder_weights(name="encoder", **settings):
    model = diffmm.create_model("image/digits_tiny", num_classes=2, cls_token=True, **settings)
    reader = {
        "class_path": "datamodules.image.ImageReader",
        "init_args": {
            "image_size": [8, 8],
            "channels": 1,
            "interpolation": "bicubic",
            "crop_pct": 1.0,
            "crop_mode": "center",
            "mean": [0.3],
            "std": [0.4],
        },
    }
    model.job = diffmm.models.job.Job(reader=reader, class_names=("a", "b"))
    return save_model(model, name)


def accuracies(out):
    return [float(value) for value in re.findall(r"accuracy ([\d.]+)", out)]


def test_features_of_weights_on_own_images(run, digits):
    encoder_weights()
    result = run("probe", "encoder", "--data", digits, "--output", "probed", "--device", "cpu")
    assert result.code == 0, result.err
    first, linear, neighbors, saved = result.out.splitlines()
    assert first == "encoder: 64 features of 80 training and 40 validation samples of 2 classes"
    assert linear.startswith("linear probe: accuracy ")
    assert linear.endswith("chosen on training samples)")
    assert neighbors.startswith("20 nearest neighbors: accuracy ")
    assert saved == "probed/model.safetensors"
    # Zeros and ones differ even in the features of random weights.
    assert min(accuracies(result.out)) > 0.8

    # The saved head predicts what the probe did, under the classes of the data.
    probed = diffmm.load("probed")
    assert probed.class_names == ("digit 0", "digit 1")
    predictions = probed.predict("digits/val")
    hits = [each.label == Path(each.file).parent.name for each in predictions]
    assert sum(hits) / len(hits) == pytest.approx(accuracies(linear)[0], abs=1e-4)
    before, after = load_model("encoder").state_dict(), load_model("probed").state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"head.weight", "head.bias"}

    token = run("probe", "encoder", "--data", digits, "--pool", "cls", "--device", "cpu")
    assert token.code == 0, token.err
    assert token.out.splitlines()[1:] != [linear, neighbors]
    mean = run("probe", "encoder", "--data", digits, "--pool", "mean", "--device", "cpu")
    assert mean.out.splitlines()[1:] == [linear, neighbors]  # as the model's head pools


def test_a_run_is_probed_on_its_own_data(run, recipe):
    path = recipe("image/digits_mae_tiny")
    assert run("fit", "--config", path, "--run_dir", "pretrained").code == 0
    decay = ("--weight-decay", "0.01", "--neighbors", "3")
    result = run("probe", "pretrained", *decay, "--device", "cpu")
    assert result.code == 0, result.err
    first, linear, neighbors = result.out.splitlines()
    assert first.endswith(" features of 1,438 training and 359 validation samples of 10 classes")
    assert "weight decay 1.0e-02, given" in linear
    assert "top 5" in linear
    assert neighbors.startswith("3 nearest neighbors: ")
    assert min(accuracies(result.out)) > 0.3
    pooled = run("probe", "pretrained", *decay, "--pool", "cls", "--device", "cpu")
    assert pooled.code == 2
    assert "pool='cls' needs cls_token=True" in pooled.mistakes[0]


def test_clips_with_several_labels(run, recipe):
    source = "data.init_args.source.init_args."
    few = {f"{source}num_clips": 96, f"{source}num_val_clips": 64}
    path = recipe("audio/sound_events_multilabel_tiny", **few)
    assert run("fit", "--config", path, "--run_dir", "sounds").code == 0
    result = run("probe", "sounds", "--weight-decay", "0.01", "--device", "cpu", "--output", "s")
    assert result.code == 0, result.err
    assert "linear probe: mean average precision 0." in result.out
    assert diffmm.load("s").job.multi_label


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--weight-decay", "-1"), "--weight-decay must be finite and at least 0, got -1.0"),
        (("--weight-decay", "inf"), "--weight-decay must be finite and at least 0, got inf"),
        (("--data", "digits", "--output", "x.pt"), "x.pt ends in .pt, but weights are saved as"),
        (("--neighbors", "0"), "--neighbors must be at least 1, got 0"),
        ((), "encoder is not in a run: give labeled data (--data)"),
        (("--data", "digits", "--output", "notes.py"), "notes.py is a file: give a folder, or"),
        (("--data", "nothing"), "--data nothing: no such file or folder"),
        (("--data", "digits", "--output", "encoder"), "encoder/model.safetensors exists"),
        (("--data", "digits", "--device", "tpu"), "device 'tpu' is not available"),
    ],
)
def test_bad_input(run, digits, options, message):
    encoder_weights()
    Path("notes.py").write_text("")
    result = run("probe", "encoder", *options)
    assert result.code == 2
    (mistake,) = result.mistakes
    assert message in mistake


def test_bad_files_are_named_or_skipped(run, digits):
    encoder_weights()
    bad = Path("digits/train/digit 0/3.png")
    bad.write_bytes(b"not an image")
    result = run("probe", "encoder", "--data", digits, "--device", "cpu")
    assert result.code == 2
    assert str(bad) in result.mistakes[0]
    assert result.mistakes[0].endswith("to continue without it, use --skip-bad")
    skipped = run("probe", "encoder", "--data", digits, "--device", "cpu", "--skip-bad")
    assert skipped.code == 0, skipped.err
    assert "80 training" in skipped.out


def test_a_text_model_has_no_features_to_measure(run):
    save_model(diffmm.create_model("text/stdlib_tiny"), "text")
    result = run("probe", "text", "--data", ".")
    assert result.code == 2
    assert "only the features of image and audio models are measured" in result.mistakes[0]


def test_a_class_without_a_second_sample_needs_a_weight_decay(run):
    for name in ("a", "b"):
        for split in ("train", "val"):
            folder = Path("few", split, name)
            folder.mkdir(parents=True)
            Image.new("L", (8, 8), 200 if name == "a" else 20).save(folder / "1.png")
    encoder_weights()
    result = run("probe", "encoder", "--data", "few", "--device", "cpu")
    assert result.code == 2
    assert "none of 2 training samples can be held out" in result.mistakes[0]
    given = run("probe", "encoder", "--data", "few", "--weight-decay", "1", "--device", "cpu")
    assert "\n2 nearest neighbors" in given.out
    assert accuracies(given.out) == [1.0, 1.0]


def test_a_head_that_cannot_hold_the_probe(run, digits):
    encoder_weights(head_bias=False)
    result = run("probe", "encoder", "--data", digits, "--output", "probed", "--device", "cpu")
    assert result.code == 2
    assert "is not a linear layer with a bias" in result.mistakes[0]
    assert not Path("probed").exists()
