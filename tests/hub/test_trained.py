"""Trained models with the description of their task."""

import dataclasses
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open

import diffmm
from diffmm.checkpoint_folders import find_state
from diffmm.cli import main
from diffmm.models.job import Job
from diffmm.models.weights import load_model, load_weights, save_model

RUN = "runs/image/digits_tiny/first"


@pytest.fixture
def trained(there):
    return diffmm.load(RUN)


def files_of(folder: str) -> list[Path]:
    return sorted(Path(folder).rglob("*.png"))


def test_a_checkpoint_carries_the_job_in_plain_values(there):
    checkpoint = torch.load(find_state(Path(RUN)), weights_only=True)
    job = checkpoint["job"]
    assert json.loads(json.dumps(job)) == job
    assert job["class_names"] == [str(digit) for digit in range(10)]
    assert (job["multi_label"], job["recipe"]) == (False, "image/digits_tiny")
    assert job["reader"]["class_path"] == "datamodules.image.ImageReader"
    assert job["reader"]["init_args"]["image_size"] == [8, 8]
    assert job["reader"]["init_args"]["mean"] == [0.305]


def test_predictions_of_files_one_by_one_are_those_of_validation(there, trained, capsys):
    files = files_of("digits")
    right, losses = 0, []
    for file in files:
        prediction = trained.predict(file, top_k=10)
        scores = dict(zip(prediction.labels, prediction.scores, strict=True))
        right += prediction.label == file.parent.name
        losses.append(-np.log(scores[file.parent.name]))
    assert main(["validate", RUN]) == 0
    printed = capsys.readouterr().out
    accuracy, loss = (
        float(re.search(rf"val/{name}\s+│\s+([\d.]+)", printed)[1]) for name in ("accuracy", "loss")
    )
    assert right / len(files) == pytest.approx(accuracy, abs=1e-6)
    assert np.mean(losses) == pytest.approx(loss, abs=1e-4)
    assert 0.6 < accuracy < 1.0


def test_a_model_in_training_mode_is_refused_because_dropout_makes_its_results_random(trained):
    trained.model.train()
    for compute, action in ((trained.predict, "predicting"), (trained.features, "computing")):
        with pytest.raises(ValueError, match=rf"mode: call model.eval\(\) before {action}"):
            compute(np.zeros((8, 8), np.uint8))


def test_a_file_a_picture_and_an_array_are_the_same_to_it(there, trained):
    file = Path("seven.png")
    picture = Image.open(file)
    array = np.asarray(picture)
    expected = trained.predict(file).scores
    for same in (
        str(file),
        picture,
        array,
        array[..., None],
        torch.from_numpy(array.copy()),
        picture.convert("RGB"),
        np.stack([array] * 3, axis=2),
        picture.convert("RGBA"),
    ):
        assert trained.predict(same).scores == pytest.approx(expected, abs=1e-5)
    assert trained.predict(file).file == "seven.png"
    assert trained.predict(array).file is None
    assert "transparency" not in picture.info


def test_arrays_of_other_types_are_the_same_image(there, trained):
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
    expected = trained.reader.read(pixels)["images"]
    floats = pixels / 255
    for array in (
        floats,
        floats.astype(np.float16),
        pixels.astype(np.uint16) * 257,
        torch.from_numpy(floats).permute(2, 0, 1),
        torch.from_numpy(floats).permute(2, 0, 1).to(torch.float16),
    ):
        assert trained.reader.read(array)["images"].equal(expected)
    with pytest.raises(ValueError, match="without the model's normalization"):
        trained.predict(expected)


def test_the_best_checkpoint_of_a_run(there, tmp_path):
    run = tmp_path / "run"
    settings = {"max_steps": 6, "val_check_interval": 2, "num_sanity_val_steps": 0}
    given = [f"--trainer.{name}={value}" for name, value in settings.items()]
    # The best value is the first one, because the loss decreases and the highest counts.
    given += ["--trainer.callbacks.0.monitor=val/loss", "--trainer.callbacks.0.mode=max"]
    assert main(["fit", "--config", "image/digits_tiny", "--run_dir", str(run), *given]) == 0
    assert diffmm.load(run).origin.endswith("step_00000006/state.ckpt")
    assert diffmm.load(run, checkpoint="best").origin.endswith("step_00000002/state.ckpt")
    with pytest.raises(ValueError, match="checkpoint must be one of 'newest', 'best', got 'last'"):
        diffmm.load(run, checkpoint="last")
    with pytest.raises(ValueError, match="checkpoints is not a run directory"):
        diffmm.load(run / "checkpoints", checkpoint="best")
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(config.replace("monitor: val/loss", "monitor: null"))
    with pytest.raises(ValueError, match="monitors no metric"):
        diffmm.load(run, checkpoint="best")


@pytest.mark.parametrize("name", ["x.pt", "x.CKPT", "x.onnx"])
def test_a_name_of_another_format_is_no_folder(there, trained, tmp_path, name):
    with pytest.raises(ValueError, match="weights are saved as safetensors: give a name that"):
        trained.save(tmp_path / name)
    assert not list(tmp_path.iterdir())
    assert trained.save(tmp_path / "v1.5").parent == tmp_path / "v1.5"


def test_timm_prepares_images_as_the_run_did(there, trained, tmp_path):
    from timm.data import create_transform, resolve_model_data_config

    trained.save(tmp_path / "saved")
    array = np.random.default_rng(0).integers(0, 256, (20, 13), np.uint8)
    expected = trained.reader.read(array)["images"]
    for model in (trained.model, diffmm.load(tmp_path / "saved").model):
        found = resolve_model_data_config(model)
        assert found["input_size"] == (1, 8, 8)
        assert (found["mean"], found["std"], found["crop_pct"]) == ((0.305,), (0.376,), 1.0)
        assert model.default_cfg == model.pretrained_cfg
        prepared = create_transform(**found, is_training=False)(Image.fromarray(array))
        torch.testing.assert_close(prepared, expected)
    model.reset_classifier(3)
    assert (model.pretrained_cfg["mean"], model.pretrained_cfg["num_classes"]) == ((0.305,), 3)
    model.job = None
    assert "mean" not in model.pretrained_cfg


def test_lists_and_folders_are_predicted_in_order(there, trained):
    files = files_of("digits/3")
    of_folder = trained.predict("digits/3", batch_size=5)
    assert [prediction.file for prediction in of_folder] == [str(file) for file in files]
    of_list = trained.predict([*files[:2], Image.open(files[2])], top_k=1)
    assert [p.label for p in of_list] == [p.label for p in of_folder[:3]]
    assert [len(prediction.labels) for prediction in of_list] == [1, 1, 1]
    assert len(trained.predict(files[0], top_k=99).labels) == 10
    assert trained.predict([]) == []


def test_what_it_cannot_predict(there, trained):
    Path("empty").mkdir()
    Path("notes.txt").write_text("no picture")
    for wrong, message in (
        ("nowhere.png", "nowhere.png does not exist"),
        ("notes.txt", "notes.txt cannot be decoded"),
        ("empty", "folder empty contains no image files, which end in .jpg, .jpeg"),
        (3, "an image must be a path, a Pillow image or an array, got int"),
        (np.zeros((4, 4), int), "floats in [0, 1], with 1, 3 or 4 channels, got (4, 4) in int64"),
        (np.zeros((4, 4, 2), np.uint8), "got (4, 4, 2) in uint8"),
        (torch.zeros(5, 4, 3), "must be [C, H, W] in uint8"),
        (np.full((4, 4), -1.5), "floats from -1.5 to -1.5, but they must be in [0, 1]"),
        (np.full((4, 4), np.nan), "floats from nan to nan"),
        (["seven.png", None], "got NoneType"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            trained.predict(wrong)
    with pytest.raises(ValueError, match="num_workers=2 needs a list of inputs"):
        trained.stream(iter(["seven.png"]), num_workers=2)
    with pytest.raises(ValueError, match="num_workers must be an integer of at least 0"):
        trained.stream(["seven.png"], num_workers=-1)
    for argument in ("top_k", "batch_size"):
        with pytest.raises(ValueError, match=f"{argument} must be an integer of at least 1"):
            trained.predict("seven.png", **{argument: 0})


def test_no_more_than_a_batch_is_read_ahead(there, trained):
    taken = []

    def endless():
        while True:
            taken.append(1)
            yield "seven.png"

    stream = trained.stream(endless(), batch_size=4)
    for _ in range(5):
        next(stream)
    assert len(taken) == 8


def test_what_goes_wrong_can_be_passed_over(there, trained):
    bad = []
    items = ["seven.png", "nowhere.png", "seven.png"]
    found = list(trained.stream(items, on_error=lambda item, error: bad.append((item, str(error)))))
    assert [prediction.label for prediction in found] == ["7", "7"]
    assert bad == [("nowhere.png", "nowhere.png does not exist")]


def test_the_job_stays_through_saving_and_loading(there, trained, tmp_path):
    file = trained.save(tmp_path / "one")
    with safe_open(file, "pt") as opened:
        assert json.loads(opened.metadata()["job"]) == trained.job.plain()
    again = save_model(load_model(file), tmp_path / "two")
    assert diffmm.load(again).job == trained.job
    assert diffmm.load(again).predict("seven.png") == trained.predict("seven.png")


def test_new_classes_need_new_names(there, tmp_path):
    model = load_model(RUN)
    model.reset_classifier(3)
    with pytest.raises(ValueError, match="the model has 3 classes, but its job names 10: set"):
        save_model(model, tmp_path)
    model.job = dataclasses.replace(model.job, class_names=("a", "b", "c"))
    assert diffmm.load(save_model(model, tmp_path)).predict("seven.png").label in "abc"


def test_a_model_without_a_job_says_what_is_missing_and_takes_it(there, trained, tmp_path):
    model = diffmm.create_model("image/digits_tiny")
    load_weights(model, RUN)
    file = save_model(model, tmp_path)
    bare = diffmm.load(file)
    message = (
        f"{file} does not say how its inputs are prepared: give the recipe that trained it "
        f"(diffmm predict --config RECIPE), or a reader and class_names (diffmm.load)"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        bare.predict("seven.png")
    for reader in (trained.reader, trained.job.reader):
        given = diffmm.load(file, reader=reader, class_names=[f"digit {n}" for n in range(10)])
        prediction = given.predict("seven.png")
        assert prediction.label == "digit 7"
        assert prediction.scores == trained.predict("seven.png").scores
    assert diffmm.load(file, reader=trained.reader).predict("seven.png").label == "7"
    with pytest.raises(ValueError, match="class_names has 2 names, but the model"):
        diffmm.load(file, class_names=["a", "b"])


STRANGE = {
    "strange_reader.Reader": "a file of weights may only name readers of datamodules",
    "os.system": "may only name readers of datamodules",
    "datamodules": "may only name readers of datamodules",
    "datamodules.image.reader.Path": "which is not a reader",
    "datamodules.image.Digits": "which is not a reader",
    "datamodules.image.read_image": "may only name readers of datamodules",
    "datamodules.nothing.Reader": "cannot be imported: No module named 'datamodules.nothing'",
    "datamodules.image.Nothing": "which is not a reader",
    "datamodules.image.__init__.os.X": "may only name readers of datamodules",
}


@pytest.mark.parametrize("class_path", STRANGE)
def test_a_file_has_nothing_but_readers_imported(class_path, there, trained, tmp_path, monkeypatch):
    (tmp_path / "strange_reader.py").write_text("class Reader: pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    model = trained.model
    reader = {**trained.job.reader, "class_path": class_path}
    file = diffmm.TrainedModel(model, dataclasses.replace(trained.job, reader=reader)).save(
        tmp_path
    )
    strange = diffmm.load(file)
    with pytest.raises(ValueError, match=re.escape(STRANGE[class_path])) as refused:
        strange.predict("seven.png")
    assert str(file) in str(refused.value)
    assert "strange_reader" not in sys.modules


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"image_size": [16, 16]},
            "has image_size=(16, 16), but its model has image_size=8: use another reader",
        ),
        (
            {"channels": 3, "mean": [0.5], "std": [0.5]},
            "has channels=3, but its model has in_channels=",
        ),
        ({"image_size": [0, 8]}, "image_size must be a height and a width, got (0, 8)"),
        ({"image_size": 8}, "cannot be created"),
        ({"interpolation": "best"}, "interpolation must be one of"),
        ({"sharpen": True}, "got an unexpected keyword argument 'sharpen'"),
        ({"crop_pct": float("nan")}, "crop_pct must be finite"),
    ],
)
def test_a_reader_that_does_not_fit_is_refused(changes, message, there, trained):
    arguments = {**trained.job.reader["init_args"], **changes}
    job = dataclasses.replace(trained.job, reader={**trained.job.reader, "init_args": arguments})
    # The error is the reader's, not that of a file.
    with pytest.raises(ValueError, match=re.escape(message)):
        diffmm.TrainedModel(trained.model, job).stream(["seven.png"], on_error=print)


@pytest.mark.parametrize(
    ("job", "message"),
    [
        ({"clases": []}, "a job has no field 'clases'"),
        ({"class_names": "cat"}, "class_names must be a list of strings"),
        ({"class_names": [1]}, "class_names must be a list of strings"),
        ({"multi_label": 1}, "multi_label must be true or false, got 1"),
        ({"reader": "ImageReader"}, "reader must have a class_path and init_args"),
        ({"recipe": 3}, "recipe must be a string, got 3"),
        ([], "a job needs its fields by name"),
        ({"class_names": ["a"]}, "the model has 10 classes, but its job names 1"),
    ],
)
def test_a_broken_job_is_told_with_its_file(job, message, there, tmp_path):
    checkpoint = torch.load(find_state(Path(RUN)), weights_only=True)
    torch.save({**checkpoint, "job": job}, tmp_path / "broken.ckpt")
    with pytest.raises(ValueError, match=re.escape(message)) as refused:
        diffmm.load(tmp_path / "broken.ckpt")
    assert str(refused.value).startswith(
        f"{tmp_path / 'broken.ckpt'} has an invalid job of its model"
    )


def test_features_are_what_the_head_reads(there, trained):
    features = trained.features("digits/7", batch_size=5)
    assert features.shape == (len(files_of("digits/7")), 64)
    assert features.dtype == torch.float32
    with torch.inference_mode():
        scores = trained.model.head(features).softmax(1)
    predicted = trained.predict("digits/7")
    assert [trained.class_names[i] for i in scores.argmax(1)] == [each.label for each in predicted]
    one = trained.features(Image.open("seven.png"))
    assert torch.allclose(one, trained.features(["seven.png"]), atol=1e-6)
    assert trained.features([]).shape == (0, 64)
    with pytest.raises(ValueError, match="batch_size must be an integer of at least 1, got 0"):
        trained.features("seven.png", batch_size=0)
    Path("nothing").mkdir(exist_ok=True)
    with pytest.raises(ValueError, match="folder .* contains no image files"):
        trained.features("nothing")


def test_attention_maps_of_a_file(there, trained):
    maps = trained.attention_maps("seven.png", layers=[-1])
    assert [part.combined.shape for part in maps] == [(1, 4, 16, 16)]


def test_it_moves_and_says_what_it_is(there, trained):
    assert repr(trained) == "TrainedModel(ImageModel, recipe='image/digits_tiny', 10 classes)"
    assert trained.to("cpu") is trained
    with pytest.raises(ValueError, match="device 'cuda:99' is not available"):
        diffmm.load(RUN, device="cuda:99")
    with pytest.raises(FileNotFoundError, match="there is no file of weights at nowhere"):
        diffmm.load("nowhere")
    with pytest.raises(ValueError, match="reader and tokenizer exclude each other"):
        diffmm.load(RUN, reader=trained.reader, tokenizer="bytes")
    assert trained.job == Job.of(trained.job.plain())


def test_a_model_without_classes_predicts_none():
    model = diffmm.create_model("image/digits_mae_tiny")
    with pytest.raises(ValueError, match="contains a MaskedAutoencoder, which has no classes"):
        diffmm.TrainedModel(model, Job()).predict("seven.png")
