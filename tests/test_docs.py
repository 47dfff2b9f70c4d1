"""The commands and examples of the guides run as printed, on small data and for a few steps."""

import re
import shlex
import sys
import wave
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import lightning.pytorch  # noqa: F401 (its log goes to the stderr it finds when imported)
import numpy as np
import pytest
import soundfile
import tokenizers
from PIL import Image

from diffmm.cli import main, sweep
from diffmm.hub.registry import create_model
from diffmm.interop import write_model
from diffmm.layers.attention import ATTENTIONS
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
from diffmm.models.weights import save_model

ROOT = Path(__file__).parent.parent
BLOCK = re.compile(r"```(sh|python)\n(.*?)```", flags=re.DOTALL)
QUICK = {
    "trainer.accelerator": "cpu",
    "trainer.max_steps": 2,
    "trainer.val_check_interval": 2,
    "trainer.limit_val_batches": 1,
    "trainer.num_sanity_val_steps": 0,
    "trainer.log_every_n_steps": 1,
    "trainer.enable_model_summary": "false",
    "data.num_workers": 0,
}
"""Overrides that shorten a recipe, in addition to `SMALLER`."""

SMALLER = {
    "image/finetune": "--vars.image_size 32 --model.model.config.backbone.depth 1",
    "image/finetune_layer_decay": "--vars.image_size 32",
    "image/finetune_lora": "--vars.image_size 32",
    "text/instruct": "--vars.sequence_length 64 --vars.vocab_size 259",
    "audio/finetune": "--vars.clip_seconds 0.5 --model.model.config.backbone.depth 1",
    "image_text/shapes_tiny": "--data.batch_size 8",
    "multimodal/shapes_and_sounds_tiny": "--data.batch_size 8",
    "image_text/shapes_captions_tiny": "--data.batch_size 8 --model.max_new_tokens 4",
    "text/stdlib_tiny": "--data.source.max_bytes 1000000",
    "text/finetune": "--vars.sequence_length 64 --model.model.config.backbone.depth 1",
}

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*LeafSpec"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
]


def photos(folder: Path) -> None:
    random = np.random.default_rng(0)
    lines = ["file,label"]
    for label in ("cat", "dog"):
        (folder / "photos" / label).mkdir(parents=True)
        for number in range(12):
            pixels = random.integers(0, 256, (40, 48, 3), dtype=np.uint8)
            path = folder / "photos" / label / f"{number:03d}.png"
            Image.fromarray(pixels).save(path)
            lines.append(f"photos/{label}/{path.name},{label}")
    (folder / "photos.csv").write_text("\n".join(lines) + "\n")
    (folder / "new_photos").mkdir()
    Image.new("RGB", (50, 30), "red").save(folder / "new_photos/001.png")
    Image.new("L", (8, 8)).save(folder / "seven.png")


def sounds(folder: Path) -> None:
    random = np.random.default_rng(0)
    for name in [*(f"sounds/{c}/{n}" for c in ("dog", "cat") for n in range(12)), "new_sounds/001"]:
        path = folder / f"{name}.wav"
        path.parent.mkdir(parents=True, exist_ok=True)
        with wave.open(str(path), "wb") as file:
            file.setnchannels(1)
            file.setsampwidth(2)
            file.setframerate(8000)
            file.writeframes(random.integers(-3000, 3000, 4000, dtype=np.int16).tobytes())


def described(folder: Path) -> None:
    """Pictures with texts, and classifiers with the encoders of recipes."""
    (folder / "described").mkdir()
    for number, color in enumerate(("red", "blue", "green") * 8):
        picture = Image.new("RGB", (40, 30 + number), color)
        picture.save(folder / f"described/{number:03d}.png")
        picture.save(folder / f"{color}.png")
        (folder / f"described/{number:03d}.txt").write_text(f"a {color} picture\n{number}\n")
    save_model(create_model("image_text/shapes_captions_tiny").encoder, folder / "encoder")
    model = create_model("image_text/shapes_tiny").image
    model.reset_classifier(3)
    save_model(model, folder / "classifier")


def stereo(folder: Path) -> None:
    waveform = np.random.default_rng(0).uniform(-0.5, 0.5, (8000, 2))
    soundfile.write(folder / "stereo.wav", waveform, 8000)


def texts(folder: Path) -> None:
    (folder / "texts").mkdir()
    for number in range(30):
        (folder / f"texts/{number}.txt").write_text(f"Once upon a time, number {number}. " * 20)


def llama(folder: Path) -> None:
    inner = tokenizers.Tokenizer(tokenizers.models.BPE({chr(n): n for n in range(32, 127)}, []))
    inner.decoder = tokenizers.decoders.Fuse()
    inner.add_special_tokens(["</s>"])
    backbone = BackboneConfig(dim=32, depth=1, num_heads=4, rope="1d", attention="softmax")
    model = TextModel(TextConfig(vocab_size=128, max_length=64, backbone=backbone))
    reader = text_reader("its own")
    reader["init_args"]["definition"] = inner.to_str()
    model.job = Job(reader=reader)
    write_model(model, folder / "published", "llama")


def published(folder: Path) -> None:
    """A text, an image and an audio model of others, a photo and a sound."""
    llama(folder)
    usual = {"attention": "softmax", "norm": "layernorm", "norm_eps": 1e-6, "feed_forward": "gelu"}
    usual |= {"qkv_bias": True, "out_bias": True, "feed_forward_bias": True}
    backbone = BackboneConfig(dim=24, depth=1, num_heads=2, **usual)
    shared = {"backbone": backbone, "num_classes": 2, "learned_positions": True}
    settings = {"image_size": [16, 16], "channels": 3, "interpolation": "bicubic"}
    settings |= {"crop_pct": 0.9, "crop_mode": "center", "mean": [0.5] * 3, "std": [0.5] * 3}
    vit = ImageModel(ImageConfig(image_size=16, patch_size=8, **shared))
    vit.job = Job({"class_path": "datamodules.image.ImageReader", "init_args": settings})
    write_model(vit, folder / "vit", "timm")
    for name in ("cat", "dog"):
        (folder / "photos" / name).mkdir(parents=True)
        Image.new("RGB", (20, 20), "blue").save(folder / "photos" / name / "001.png")
    Image.new("RGB", (50, 30), "red").save(folder / "photo.png")
    more = {"dist_token": True, "pool": "cls_dist", "pool_norm": True, "spectrogram": "kaldi"}
    more |= {"num_mels": 20, "patch_size": 8, "patch_stride": 5, "partial_patches": False}
    ast = AudioModel(AudioConfig(sample_rate_hz=8000, clip_seconds=0.425, **shared, **more))
    write_model(ast, folder / "ast", "audio-spectrogram-transformer")
    soundfile.write(folder / "bark.wav", np.random.default_rng(0).uniform(-0.5, 0.5, 6000), 8000)


def pretrained(folder: Path) -> None:
    """A pretrained image model, photos, a decoder and conversations."""
    photos(folder)
    backbone = BackboneConfig(dim=32, depth=1, num_heads=2, attention="diff_v2")
    settings = {"image_size": [32, 32], "channels": 3, "interpolation": "bicubic"}
    settings |= {"crop_pct": 0.9, "crop_mode": "center", "mean": [0.5] * 3, "std": [0.5] * 3}
    size = {"image_size": 32, "patch_size": 16, "num_classes": 7, "learned_positions": True}
    config = ImageConfig(**size, backbone=backbone)
    vit = ImageModel(config)
    vit.job = Job({"class_path": "datamodules.image.ImageReader", "init_args": settings})
    save_model(vit, folder / "pretrained")
    backbone = BackboneConfig(dim=32, depth=1, num_heads=2, rope="1d", attention="diff_v2")
    decoder = TextModel(TextConfig(vocab_size=259, max_length=64, backbone=backbone))
    decoder.job = Job(text_reader("bytes"))
    save_model(decoder, folder / "decoder")
    chat = (
        '{"messages": [{"role": "user", "content": "%d"}, {"role": "assistant", "content": "2"}]}'
    )
    (folder / "chats.jsonl").write_text("\n".join(chat % number for number in range(80)))


def run_command(line: str) -> None:
    """A line of a guide, with shortened training."""
    program, verb, *arguments = shlex.split(line)
    assert program == "diffmm"
    if verb in ("fit", "finetune", "sweep"):
        recipe = arguments[arguments.index("--config") + 1]
        arguments += [f"--{key}={value}" for key, value in QUICK.items()]
        arguments += SMALLER.get(recipe, "").split()
    elif verb == "check":
        arguments += SMALLER[arguments[0]].split()
    assert main([verb, *arguments]) == 0, line


@pytest.mark.slow
@pytest.mark.parametrize(
    ("guide", "make_data"),
    [
        ("docs/images.md", photos),
        ("docs/sounds.md", sounds),
        ("docs/pairs.md", described),
        ("docs/text.md", texts),
        ("docs/load.md", stereo),
        ("docs/convert.md", published),
        ("docs/finetuning.md", pretrained),
        ("docs/huggingface.md", None),
        ("docs/python.md", photos),
        ("docs/compare.md", None),
        ("docs/analyze.md", None),
        ("docs/alternatives.md", None),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_guides_run(
    guide: str,
    make_data: Callable[[Path], None] | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sweep, "launch", main)  # A process for each run would only cost time.
    # A guide imports the module that registers its attentions, whatever ran before it.
    monkeypatch.delitem(sys.modules, "benchmarks.quality.alternatives", raising=False)
    if make_data is not None:
        make_data(tmp_path)
    names: dict[str, object] = {}
    blocks = BLOCK.findall((ROOT / guide).read_text())
    assert blocks
    with patch.dict(ATTENTIONS):
        for language, block in blocks:
            if language == "python":
                exec(compile(block, guide, "exec"), names)
                continue
            for line in block.strip().splitlines():
                run_command(line)


def test_the_front_door_of_the_readme_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    photos(tmp_path)
    run_command("diffmm fit --config image/digits_tiny --name first")
    run_command("diffmm fit --config text/stdlib_tiny --name first --vars.sequence_length 32")
    first = BLOCK.search((ROOT / "README.md").read_text())
    assert first is not None
    capsys.readouterr()
    exec(compile(first[2], "README.md", "exec"), {})
    assert "seven.png" in capsys.readouterr().out


def test_files_that_a_contributor_is_told_of_hold_what_is_said() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    named = re.findall(r"`((?:diffmm|datamodules|tests|docs)/[\w/]+\.\w+)`", text)
    assert len(named) > 15
    assert [name for name in named if not (ROOT / name).is_file()] == []
    pairs = text.split("## Adding a pair of modalities")[1].split("## ")[0]
    rows = [row.split("|")[1:3] for row in pairs.splitlines() if row.startswith("| `")]
    assert len(rows) == 5
    for file, held in rows:
        content = (ROOT / file.strip(" `")).read_text()
        for name in re.findall(r"`(\w+)`", held):
            assert re.search(rf"\b{name}\b", content), (file, name)


@pytest.mark.parametrize("page", sorted((ROOT / "docs").glob("*.md")), ids=lambda path: path.name)
def test_linked_files_exist(page: Path) -> None:
    links = re.findall(r"\]\(([^)#:]+)\)", page.read_text())
    missing = [link for link in links if not (page.parent / link).exists()]
    assert not missing
