"""Folders for the Hugging Face hub. The hub itself is replaced by local folders."""

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub import ModelCard
from huggingface_hub.errors import HTTPError
from safetensors.torch import load_file, save_file

import diffmm
from diffmm.cli import main
from diffmm.hub.metrics import metrics_at
from diffmm.interop import read_model, write_model
from diffmm.models import (
    AudioConfig,
    AudioModel,
    BackboneConfig,
    ImageConfig,
    ImageModel,
    MaskedAutoencoder,
    MaskedAutoencoderConfig,
    TextConfig,
    TextModel,
    TextTower,
    TextTowerConfig,
    folders,
)
from diffmm.models.hub_files import is_hub_name
from diffmm.models.job import Job, text_reader
from diffmm.models.tokenizer_files import byte_definition, starting_with, tokenizer_files
from diffmm.runs.directories import CONFIG_NAME
from diffmm.tokenizers import ByteTokenizer, HuggingFaceTokenizer, load_tokenizer

RUN = "runs/image/digits_tiny/first"


def backbone(**settings):
    return BackboneConfig(**{"dim": 16, "depth": 1, "num_heads": 2, "rope": "1d", **settings})


def text_model(**settings):
    model = TextModel(TextConfig(vocab_size=320, max_length=32, backbone=backbone(), **settings))
    model.job = Job(reader=text_reader("bytes"), recipe="text/stdlib_tiny")
    return model


def image_config(**settings):
    return ImageConfig(image_size=8, patch_size=4, backbone=backbone(rope="2d"), **settings)


def models():
    plain = backbone(rope="none", attention="softmax")
    audio = {"sample_rate_hz": 8000, "clip_seconds": 0.1, "num_mels": 16, "patch_size": 4}
    return {
        "text-generation": text_model(),
        "fill-mask": text_model(causal=False),
        "image-classification": ImageModel(image_config(num_classes=3)),
        "audio-classification": AudioModel(
            AudioConfig(backbone=backbone(rope="2d"), num_classes=2, **audio)
        ),
        "tower": TextTower(TextTowerConfig(vocab_size=9, max_length=4, backbone=plain)),
        "autoencoder": MaskedAutoencoder(
            MaskedAutoencoderConfig(encoder=image_config(), decoder=backbone(rope="2d"))
        ),
    }


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub in a local folder: `{name: folder}` and the requests for them."""
    requests = []

    def download(name, **options):
        requests.append((name, options["revision"], options["token"]))
        return str(tmp_path / "hub" / name)

    class Api:
        endpoint = "https://hub"

        def __init__(self, token=None):
            self.token = token

        def create_repo(self, name, *, private, exist_ok):
            requests.append(("create", name, private))
            (tmp_path / "hub" / name).mkdir(parents=True, exist_ok=exist_ok)

        def file_exists(self, name, file, *, revision):
            return (tmp_path / "hub" / name / file).exists()

        def upload_folder(
            self,
            *,
            repo_id,
            folder_path,
            revision,
            commit_message,
            ignore_patterns,
            delete_patterns,
        ):
            for pattern in delete_patterns:
                for file in (tmp_path / "hub" / repo_id).glob(pattern):
                    file.unlink()
            for file in folder_path.iterdir():
                if file.name not in (ignore_patterns or []):
                    shutil.copy(file, tmp_path / "hub" / repo_id)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.chdir(tmp_path)
    return requests


@pytest.mark.parametrize("kind", models())
def test_every_model_comes_back_from_its_folder(kind, tmp_path):
    model = models()[kind].eval()
    folder = model.save_pretrained(tmp_path / "folder", metrics={"val/loss": 1.25})
    again = type(model).from_pretrained(folder)
    assert again.config == model.config
    assert again.job == getattr(model, "job", None)
    expected = model.state_dict()
    assert again.state_dict().keys() == expected.keys()
    assert all(torch.equal(expected[name], each) for name, each in again.state_dict().items())
    card = ModelCard.load(folder / "README.md")
    assert card.data.library_name == "diffmm"
    assert card.data.pipeline_tag == (kind if "-" in kind else None)
    assert ("differential-attention" in card.data.tags) == (kind != "tower")
    count = sum(parameter.numel() for parameter in model.parameters())
    assert f"| parameters | {count:,} |" in card.text
    assert "| val/loss | 1.25 |" in card.text
    assert ("AutoModelForCausalLM" in card.text) == (kind == "text-generation")


def test_a_model_of_another_class_is_refused(tmp_path):
    text_model().save_pretrained(tmp_path / "text")
    with pytest.raises(ValueError, match="contains a model of class TextModel, not ImageModel"):
        ImageModel.from_pretrained(tmp_path / "text")
    with pytest.raises(ValueError, match="revision='main' is for names on the hub, but got"):
        TextModel.from_pretrained(tmp_path / "text", revision="main")
    with pytest.raises(FileNotFoundError, match="no file of weights at .*nowhere"):
        TextModel.from_pretrained(tmp_path / "nowhere")


def test_files_are_replaced_but_the_card_is_kept(tmp_path):
    folder = text_model().save_pretrained(tmp_path / "text")
    (folder / "README.md").write_text("mine")
    (folder / "notes.txt").write_text("notes")
    model = text_model(tie_embeddings=False)
    model.save_pretrained(folder)
    assert (folder / "README.md").read_text() == "mine"
    assert (folder / "notes.txt").read_text() == "notes"
    assert not TextModel.from_pretrained(folder).config.tie_embeddings
    assert [path.name for path in tmp_path.iterdir()] == ["text"]
    with pytest.raises(ValueError, match=r"notes.txt is a file: give the name of a folder"):
        model.save_pretrained(folder / "notes.txt")


STALE = (
    "chat_template.jinja",
    "model-00001-of-00002.safetensors",
    "model.safetensors.index.json",
    "special_tokens_map.json",
)


def test_files_of_an_earlier_model_are_removed(hub, tmp_path, monkeypatch):
    folder = text_model().save_pretrained(tmp_path / "text")
    repository = tmp_path / "hub/someone/model"
    shutil.copytree(folder, repository)
    plain = text_model().eval()
    plain.job = None
    expected = {"README.md", "config.json", "model.safetensors"}
    for place in (folder, repository):
        for name in STALE:
            (place / name).write_text("{}")
        (place / "notes.txt").write_text("notes")
    monkeypatch.chdir(folder)  # which stays the folder that it is
    plain.save_pretrained(".")
    plain.push_to_hub("someone/model")
    for place in (Path(), repository):
        assert {file.name for file in place.iterdir()} == {*expected, "notes.txt"}
    again = plain.save_pretrained(tmp_path / "new")
    assert {file.name for file in again.iterdir()} == expected
    assert "# new" in (again / "README.md").read_text().splitlines()
    assert 'diffmm.load("new")' in (again / "README.md").read_text()
    assert again.stat().st_mode == (tmp_path / "hub").stat().st_mode


def test_threads_save_to_the_same_folder(tmp_path):
    model = ImageModel(image_config(num_classes=3)).eval()
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(model.save_pretrained, [tmp_path / "new" / "same"] * 12))
    assert {file.name for file in (tmp_path / "new").iterdir()} == {"same"}
    names = {file.name for file in (tmp_path / "new/same").iterdir()}
    assert names == {"README.md", "config.json", "model.safetensors"}
    ImageModel.from_pretrained(tmp_path / "new/same")


def test_a_folder_appears_whole_or_not_at_all(tmp_path, monkeypatch):
    model = ImageModel(image_config(num_classes=3))
    model.job = Job(class_names=("a", "b"))
    with pytest.raises(ValueError, match="the model has 3 classes, but its job names 2"):
        model.save_pretrained(tmp_path / "bad")
    model.job = None
    with pytest.raises(ValueError, match="the metric 'val/loss' must be a number, got None"):
        model.save_pretrained(tmp_path / "bad", metrics={"val/loss": None})
    monkeypatch.setattr(folders, "write_contents", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model.save_pretrained(tmp_path / "bad/worse")
    assert not list(tmp_path.iterdir())


def test_weights_that_others_saved_are_described_by_the_settings_beside_them(tmp_path):
    model = text_model().eval()
    folder = model.save_pretrained(tmp_path / "text")
    save_file(load_file(folder / "model.safetensors"), folder / "model.safetensors")
    trained = diffmm.load(folder)
    assert trained.job == model.job
    tokens = torch.randint(0, 256, (1, 8))
    assert torch.equal(trained.model(tokens), model(tokens))
    assert main(["convert", str(folder), str(tmp_path / "copy.safetensors")]) == 0
    assert diffmm.load(tmp_path / "copy.safetensors").job == model.job


def test_a_run_is_published_with_its_metrics_and_preprocessing(there, tmp_path):
    trained = diffmm.load(RUN)
    folder = trained.save_pretrained(tmp_path / "digits")
    again = diffmm.load(folder)
    assert again.predict("seven.png") == trained.predict("seven.png")
    text = (folder / "README.md").read_text()
    rows = dict(line.strip("| ").split(" | ") for line in text.splitlines() if "| val/" in line)
    assert 0.6 < float(rows["val/accuracy"]) < 1.0
    assert "| recipe | `image/digits_tiny` |" in text
    prepared = json.loads((folder / "preprocessor_config.json").read_text())
    assert prepared == trained.job.reader
    assert "## Metrics" not in (again.save_pretrained(tmp_path / "copy") / "README.md").read_text()


def test_metrics_are_those_at_the_checkpoint(tmp_path):
    (tmp_path / "csv").mkdir()
    (tmp_path / CONFIG_NAME).write_text("model: {}\n")
    rows = ["step,train/loss,val/loss,val/accuracy", "9,1,3,0.5", "19,1,2,0.25", "29,1,1,0.75"]
    (tmp_path / "csv/metrics.csv").write_text("\n".join(rows) + "\n")
    states = {step: tmp_path / f"checkpoints/step_{step:08d}/state.ckpt" for step in (5, 20, 30)}
    assert metrics_at(str(states[5])) == {}
    assert metrics_at(str(states[20])) == {"val/accuracy": 0.25, "val/loss": 2.0}
    assert metrics_at(str(states[30])) == {"val/accuracy": 0.75, "val/loss": 1.0}
    assert metrics_at(str(tmp_path / "model.safetensors")) == {}
    (tmp_path / "csv/metrics.csv").write_bytes(b"step,val/loss\n\xff,1\n")
    trained = diffmm.TrainedModel(text_model(), Job(), origin=str(states[20]))
    with pytest.raises(ValueError, match=r"metrics.csv is not a CSV .*, or give the metrics"):
        trained.save_pretrained(tmp_path / "saved")
    card = trained.save_pretrained(tmp_path / "saved", metrics={"val/loss": 2.5}) / "README.md"
    assert "| val/loss | 2.5 |" in card.read_text()


def test_names_on_the_hub(hub, tmp_path, capsys):
    model = text_model().eval()
    assert model.push_to_hub("someone/model", private=True) == "https://hub/someone/model"
    assert hub == [("create", "someone/model", True)]
    card = tmp_path / "hub/someone/model/README.md"
    assert 'diffmm.load("someone/model")' in card.read_text()
    assert diffmm.load("someone/model", revision="v1", token="t").job == model.job
    assert hub[-1] == ("someone/model", "v1", "t")
    assert TextModel.from_pretrained("someone/model").config == model.config
    assert main(["generate", "someone/model", "a", "--max-new-tokens", "2"]) == 0
    assert main(["convert", "someone/model", "again.safetensors"]) == 0
    assert diffmm.load("again.safetensors").job == model.job
    trained = diffmm.load("someone/model")
    card.unlink()
    trained.push_to_hub("someone/model", metrics={"val/loss": 0.5}, private=True)
    assert hub[-1] == ("create", "someone/model", True)
    assert "| val/loss | 0.5 |" in card.read_text()
    card.write_text("mine")
    trained.push_to_hub("someone/model")
    assert card.read_text() == "mine"


def test_a_folder_of_this_name_is_no_name_on_the_hub(hub, tmp_path):
    (tmp_path / "runs").mkdir()
    with pytest.raises(FileNotFoundError, match="no file of weights at runs/typo"):
        diffmm.load("runs/typo")
    for name in ("weights/model.safetensors", "weights/last.CKPT"):
        for read in (diffmm.load, TextModel.from_pretrained, read_model):
            with pytest.raises(FileNotFoundError, match=f"no file .*{name}"):
                read(name)
    assert not hub
    assert is_hub_name("someone/model-2.5")


def test_without_a_network_errors_say_how_to_go_on(monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    advice = "without a network, give a folder that has its config.json and safetensors"
    with pytest.raises(ValueError, match=advice) as caught:
        diffmm.load("someone/model")
    assert "\n" not in str(caught.value)
    upload = "someone/model cannot be uploaded .* save_pretrained writes the same folder"
    with pytest.raises(ValueError, match=upload):
        text_model().push_to_hub("someone/model")


def test_only_errors_of_the_hub_are_named_so(hub, monkeypatch):
    def failing(error):
        def fail(*_, **__):
            raise error

        return fail

    for error, reason in ((TimeoutError(), "TimeoutError"), (HTTPError("\nno\nroute"), "no")):
        monkeypatch.setattr(huggingface_hub, "snapshot_download", failing(error))
        monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", failing(error))
        with pytest.raises(ValueError, match=rf"cannot be fetched .* hub \({reason}\): without"):
            diffmm.load("someone/model")
        with pytest.raises(ValueError, match=rf"cannot be uploaded .* hub \({reason}\): save_"):
            text_model().push_to_hub("someone/model")
    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", failing(AttributeError("a bug")))
    with pytest.raises(AttributeError, match="a bug"):
        text_model().push_to_hub("someone/model")


def test_weights_of_others_are_named_as_such(hub, tmp_path, monkeypatch):
    config = TextConfig(vocab_size=9, max_length=8, backbone=backbone(attention="softmax"))
    folder = write_model(TextModel(config), tmp_path / "hub/someone/llama", "llama")
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    advice = "convert it first: diffmm convert someone/llama TARGET"
    with pytest.raises(ValueError, match=advice):
        diffmm.load("someone/llama")
    write_model(TextModel(config), ".", "llama")  # which stays the folder that it is
    assert json.loads(Path("config.json").read_text())["model_type"] == "llama"
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    with pytest.raises(FileNotFoundError, match=advice):
        diffmm.load("someone/llama")


TEXTS = ["def main():\n\treturn 'é ü ß 中文 🎉'", "  two  spaces\r\n", "\x00\x7f\u200b"]


def test_the_byte_tokenizer_as_a_file_has_the_same_ids():
    ours, theirs = ByteTokenizer(), HuggingFaceTokenizer.of_definition("b", byte_definition())
    for text in TEXTS:
        assert theirs.encode(text) == ours.encode(text)
        assert theirs.decode(ours.encode(text)) == text
    assert theirs.vocab_size == ours.vocab_size
    assert (theirs.eos_id, theirs.mask_id, theirs.pad_id) == (256, 257, 258)


@pytest.mark.parametrize("start_ids", [(), (256,), (256, 257)])
def test_the_tokenizer_of_the_files_starts_texts_as_the_reader_does(start_ids):
    from tokenizers import Tokenizer

    own = Tokenizer.from_str(starting_with(byte_definition(), (257,)))  # places [MASK] first
    assert own.encode("a").ids == [257, 97]
    definition = own.to_str()
    reader = {"tokenizer": "t", "definition": definition, "start_ids": list(start_ids)}
    job = Job(reader={"class_path": "datamodules.text.TextReader", "init_args": reader}).plain()
    files, ids = tokenizer_files(job, max_length=7)
    written = Tokenizer.from_str(files["tokenizer.json"])
    assert written.encode("ab").ids == [*start_ids, 97, 98]
    starts = {"bos_token_id": start_ids[0]} if start_ids else {}
    assert ids == {"eos_token_id": 256, "pad_token_id": 258, **starts}
    assert json.loads(files["tokenizer_config.json"])["model_max_length"] == 7
    assert load_tokenizer("t", files["tokenizer.json"]).start_ids == start_ids


def test_a_tokenizer_that_is_only_named_has_no_files():
    assert tokenizer_files(Job(reader=text_reader("gpt2")).plain(), 8) == ({}, {})
    assert tokenizer_files(None, 8) == ({}, {})
