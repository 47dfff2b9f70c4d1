"""`diffmm export` writes ONNX files that the code of docs/serving.md serves as diffmm does."""

import importlib.util
import json
import re
import shlex
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnxruntime
import pytest
import soundfile
import torch
from PIL import Image

import diffmm
from datamodules.audio import AudioReader
from datamodules.image import ImageReader
from diffmm.cli import main
from diffmm.cli.export import make_parser
from diffmm.export import onnx_file
from diffmm.export.formats import FORMATS
from diffmm.models import (
    AudioConfig,
    AudioModel,
    BackboneConfig,
    ImageConfig,
    ImageModel,
    TextConfig,
    TextModel,
)
from diffmm.models.job import Job, text_reader
from diffmm.models.tokenizer_files import byte_definition
from diffmm.models.weights import save_model

DOCS = Path(__file__).parents[2] / "docs"


def backbone(rope, attention, **options):
    return BackboneConfig(
        dim=32, depth=1, num_heads=4, rope=rope, attention=attention, init_std=0.3, **options
    )


def image_model():
    reader = ImageReader(
        image_size=(16, 16),
        channels=3,
        interpolation="bilinear",
        crop_pct=0.8,
        crop_mode="center",
        mean=(0.4, 0.5, 0.6),
        std=(0.2, 0.2, 0.2),
    )
    config = ImageConfig(
        backbone=backbone("2d", "diff_v1"), image_size=16, patch_size=8, num_classes=3
    )
    model = ImageModel(config)
    model.job = Job(reader.describe(), ("cat", "dog", "bird"))
    return model


def audio_model():
    reader = AudioReader(sample_rate_hz=8000, clip_samples=3000)
    config = AudioConfig(
        # The fewest operators: the exporter takes long for each.
        backbone=backbone("none", "softmax", norm="layernorm", feed_forward="gelu"),
        learned_positions=True,
        clip_seconds=1.5,
        sample_rate_hz=8000,
        num_mels=16,
        num_classes=2,
        stem="frame",
    )
    model = AudioModel(config)
    model.job = Job(reader.describe(), ("bark", "meow"), multi_label=True)
    return model


def text_model():
    config = TextConfig(vocab_size=259, max_length=64, backbone=backbone("1d", "softmax"))
    model = TextModel(config)
    model.job = Job(text_reader("bytes"))
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("served")


def exported(folder, model, name):
    """The ONNX file that `diffmm export` writes of a model, and the model as `diffmm.load` reads
    it."""
    torch.manual_seed(0)
    weights = save_model(model().eval(), folder / f"{name}.safetensors")
    file = folder / f"{name}.onnx"
    assert main(["export", str(weights), str(file), "--to", "onnx"]) == 0
    assert str(Path(diffmm.__file__).parent).encode() not in file.read_bytes()
    return str(file), diffmm.load(weights)


def example(name):
    """The module `docs/examples/NAME.py`, which docs/serving.md shows as it is."""
    path = DOCS / f"examples/{name}.py"
    assert f"```python\n{path.read_text()}```" in (DOCS / "serving.md").read_text()
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Session:
    """Stands for a session of ONNX Runtime with a program that has the given metadata and gives the
    given logits; keeps the inputs of the last call."""

    def __init__(self, about, logits):
        self.about, self.logits = about, np.float32(logits)
        self.inputs = None

    def get_modelmeta(self):
        return SimpleNamespace(custom_metadata_map={"diffmm": json.dumps(self.about)})

    def get_inputs(self):
        return []

    def run(self, _, inputs):
        self.inputs = inputs
        return [self.logits]


@pytest.fixture
def session(monkeypatch):
    def start(about, logits):
        new = Session({"multi_label": False, "class_names": ["a", "b"]} | about, logits)
        monkeypatch.setattr(onnxruntime, "InferenceSession", lambda file: new)
        return new

    return start


@pytest.mark.parametrize("size", [(277, 301), (299, 284), (350, 224), (448, 448)])
def test_images_of_all_sizes(size, session):
    reader = ImageReader(
        image_size=(224, 224),
        channels=1,
        interpolation="bicubic",
        crop_pct=1.0,
        crop_mode="center",
        mean=(0.5,),
        std=(0.5,),
    )
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, size, dtype=np.uint8))
    program = session({"reader": reader.describe()}, [[0, 1]])
    example("serve_images").classify("", image)
    wanted = reader.read(image)["images"]
    torch.testing.assert_close(torch.tensor(program.inputs["images"][0]), wanted)


def odd_images(folder):
    """Files that a camera, a scanner or an icon set may hold."""
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 4), dtype=np.uint8)
    turned = Image.Exif()
    turned[274] = 6  # the camera was turned
    Image.fromarray(pixels[..., :3]).save(folder / "turned.jpg", exif=turned)
    Image.fromarray(pixels).save(folder / "transparent.png")
    Image.fromarray(pixels).convert("LA").save(folder / "transparent_gray.png")
    Image.fromarray(pixels[..., :3]).quantize(16).save(folder / "palette.png", transparency=3)
    Image.fromarray(pixels[..., :3]).convert("CMYK").save(folder / "print.jpg")
    Image.fromarray(pixels[..., 0].astype(np.uint16) * 256).save(folder / "scan.png")
    return sorted(folder.iterdir())


@pytest.mark.parametrize("channels", [1, 3])
def test_odd_images_are_what_predict_reads(channels, session, tmp_path):
    reader = ImageReader(
        image_size=(16, 16),
        channels=channels,
        interpolation="bicubic",
        crop_pct=1.0,
        crop_mode="center",
        mean=(0.5,) * channels,
        std=(0.5,) * channels,
    )
    files = odd_images(tmp_path)
    assert len(files) == 6
    for file in files:
        program = session({"reader": reader.describe()}, [[0, 1]])
        example("serve_images").classify("", Image.open(file))
        found, wanted = torch.tensor(program.inputs["images"][0]), reader.read(file)["images"]
        torch.testing.assert_close(found, wanted, msg=lambda text, file=file: f"{file}: {text}")


@pytest.mark.parametrize("crop", ["full", "start", "center"])
def test_crops_of_sounds(crop, session, tmp_path):
    sound = str(tmp_path / "a.wav")
    soundfile.write(sound, np.random.default_rng(0).uniform(-0.5, 0.5, 5000), 16000)
    reader = AudioReader(sample_rate_hz=8000, clip_samples=1000, crop=crop)
    program = session({"reader": reader.describe(), "sample_rate_hz": 8000}, [[0, 1]])
    example("serve_sounds").classify("", sound)
    wanted = reader.read(sound)["waveforms"]
    assert len(wanted) == (2500 if crop == "full" else 1000)
    np.testing.assert_allclose(program.inputs["waveforms"][0], wanted, atol=1e-6)


def test_where_texts_end(session):
    complete = example("serve_text").complete
    mark = "<|endoftext|>"
    for arguments in ({"tokenizer": "bytes"}, {"tokenizer": "x", "definition": byte_definition()}):
        about = {"max_length": 16, "stop_ids": [100, 256], "reader": {"init_args": arguments}}
        program = session(about, [[np.arange(300) == 97]])
        assert complete("", "To be", 4) == "aaaa"
        assert complete("", "To be") == "a" * 11
        with pytest.raises(ValueError, match="has 16 tokens: it must have fewer than 16"):
            complete("", "b" * 16)
        for id in (257, 258, 270):  # special tokens, and one that the tokenizer does not have
            program.logits = np.float32([[np.arange(300) == id]])
            assert complete("", "To be", 4) == ""
        for id in (100, 256):
            program.logits = np.float32([[np.arange(300) == id]])
            assert complete("", mark) == ""
            assert program.inputs["tokens"].tolist() == [list(mark.encode())]  # the first step


def test_images(folder, capsys):
    file, trained = exported(folder, image_model, "pets")
    assert "pets.onnx: onnx, inputs images; largest difference" in capsys.readouterr().out
    session = onnxruntime.InferenceSession(file)
    assert [(port.name, port.shape) for port in session.get_inputs()] == [
        ("images", ["batch", 3, 16, 16])
    ]
    assert [(port.name, port.shape) for port in session.get_outputs()] == [("logits", ["batch", 3])]
    for batch in (1, 5):
        images = torch.randn(batch, 3, 16, 16)
        (logits,) = session.run(None, {"images": images.numpy()})
        with torch.no_grad():
            torch.testing.assert_close(torch.tensor(logits), trained.model(images))

    pixels = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    found = example("serve_images").classify(file, image)
    wanted = trained.predict(image)
    assert tuple(found) == wanted.labels
    assert list(found.values()) == pytest.approx(wanted.scores, abs=1e-5)


def test_sounds(folder, monkeypatch):
    monkeypatch.setattr(onnx_file, "EXTERNAL_BYTES", 1)  # as weights of gigabytes are written
    file, trained = exported(folder, audio_model, "animals")
    assert (folder / "animals.onnx.data").stat().st_size > (folder / "animals.onnx").stat().st_size
    session = onnxruntime.InferenceSession(file)
    for batch, samples in ((1, 1), (2, 81), (3, 9001)):
        lengths = torch.tensor([samples, 1 + samples // 2, 1])[:batch]
        inputs = (torch.randn(batch, samples), lengths)
        names = ("waveforms", "num_samples")
        (logits,) = session.run(None, {n: x.numpy() for n, x in zip(names, inputs, strict=True)})
        with torch.no_grad():
            torch.testing.assert_close(
                torch.tensor(logits), trained.model(*inputs), atol=1e-4, rtol=1e-4
            )

    sound = str(folder / "bark.wav")
    soundfile.write(sound, np.random.default_rng(0).uniform(-0.5, 0.5, (9000, 2)), 16000)
    found = example("serve_sounds").classify(file, sound)
    wanted = trained.predict(sound)
    assert tuple(found) == wanted.labels
    assert list(found.values()) == pytest.approx(wanted.scores, abs=1e-4)


def test_text(folder):
    file, trained = exported(folder, text_model, "writer")
    session = onnxruntime.InferenceSession(file)
    about = json.loads(session.get_modelmeta().custom_metadata_map["diffmm"])
    assert (about["max_length"], about["eos_id"], about["stop_ids"]) == (64, 256, [256])
    assert [port.name for port in session.get_inputs()] == [
        "tokens",
        "num_padding",
        "past_key_0",
        "past_value_0",
    ]
    assert [(port.name, port.shape) for port in session.get_outputs()] == [
        ("logits", ["batch", "tokens", 259]),
        ("present_key_0", ["batch", "past + tokens", 4, 8]),
        ("present_value_0", ["batch", "past + tokens", 4, 8]),
    ]
    wanted = trained.generate("To be", max_new_tokens=24, temperature=0.0)
    assert len(set(wanted)) > 3  # a text in which a wrong token would show
    assert example("serve_text").complete(file, "To be", 24) == wanted


def test_the_rest_of_the_guide(capsys):
    text = (DOCS / "serving.md").read_text()
    commands = "".join(re.findall(r"```sh\n(.*?)```", text, flags=re.DOTALL)).splitlines()
    assert len(commands) == 4
    for line in commands:
        program, verb, *arguments = shlex.split(line)
        assert (program, verb) == ("diffmm", "export")
        assert make_parser().parse_args(arguments).to in FORMATS
    assert all(f"| `{name}` |" in text for name in FORMATS)
    exec(re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)[-1], {})
    assert capsys.readouterr().out.splitlines() == [
        "torch.Size([8, 16, 64]) torch.Size([8, 16, 64])",
        "torch.Size([1, 5, 2, 32])",
    ]
