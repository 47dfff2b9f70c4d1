"""Weights in several files with an index: read as those of one file, or refused as a whole."""

import json
import re
from pathlib import Path

import huggingface_hub
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import diffmm
from diffmm.cli import main
from diffmm.interop import read_model
from diffmm.models import BackboneConfig, ImageConfig, ImageModel, TextConfig, TextModel
from diffmm.models.job import Job
from diffmm.models.safetensors_files import INDEX_NAME, read_tensors, write_tensors
from diffmm.models.weights import load_description, load_model, load_weights, save_model

BACKBONE = BackboneConfig(dim=16, depth=2, num_heads=2, rope="2d")
CONFIG = ImageConfig(image_size=8, patch_size=4, num_classes=3, backbone=BACKBONE)


def image_model():
    model = ImageModel(CONFIG).eval()
    model.job = Job(class_names=("a", "b", "c"))
    return model


def names_in(folder):
    return sorted(file.name for file in folder.glob("*.safetensors*"))


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture
def shards(tmp_path):
    """A folder of a model in several files."""
    return image_model().save_pretrained(tmp_path / "model", max_shard_size="3KB")


@pytest.fixture
def refusals(tmp_path, monkeypatch, capsys):
    """The messages of a command that is refused and writes nothing."""
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)

    def run(*arguments):
        assert main([str(argument) for argument in arguments]) == 2
        assert not list(work.iterdir())
        return capsys.readouterr().err.splitlines()

    return run


def change_index(folder, change):
    index = json.loads((folder / INDEX_NAME).read_text())
    change(index["weight_map"])
    (folder / INDEX_NAME).write_text(json.dumps(index))


def test_a_model_in_several_files_is_one_model(tmp_path):
    model = image_model()
    folder = model.save_pretrained(tmp_path / "model", max_shard_size="3KB")
    files = names_in(folder)
    assert len(files) > 3
    assert files[0] == f"model-00001-of-{len(files) - 1:05d}.safetensors"
    assert files[-1] == INDEX_NAME
    for file in files[:-1]:
        tensors = load_file(folder / file).values()
        assert len(tensors) == 1 or sum(tensor.nbytes for tensor in tensors) <= 3000
    for path in (folder, folder / INDEX_NAME):
        assert same(load_model(path).state_dict(), model.state_dict())
        assert diffmm.load(path).job == model.job
        assert load_description(path) == load_description(model.save_pretrained(tmp_path / "one"))
    again = ImageModel(CONFIG)
    assert not load_weights(again, folder)
    assert same(again.state_dict(), model.state_dict())
    assert main(["convert", str(folder), str(tmp_path / "file.safetensors")]) == 0
    assert same(load_model(tmp_path / "file.safetensors").state_dict(), model.state_dict())
    # Whatever is saved next into the same folder is what is read from it.
    for size, number in ((None, 1), ("9KB", 3), ("1MB", 1), (10**9, 1)):
        model = image_model()
        model.save_pretrained(folder, max_shard_size=size)
        assert len(names_in(folder)) >= number
        assert (len(names_in(folder)) == 1) == (number == 1)
        assert same(load_model(folder).state_dict(), model.state_dict())


def test_files_by_the_writer_of_the_hub_have_the_settings_beside_them(tmp_path):
    """It knows nothing of diffmm, and leaves out the names of tied weights."""
    backbone = BackboneConfig(dim=16, depth=2, num_heads=2, rope="1d")
    model = TextModel(TextConfig(vocab_size=40, max_length=8, backbone=backbone)).eval()
    folder = model.save_pretrained(tmp_path / "model")
    (folder / "model.safetensors").unlink()
    huggingface_hub.save_torch_model(model, folder, max_shard_size="4KB")
    assert len(names_in(folder)) > 3
    tokens = torch.arange(8)[None]
    assert torch.equal(load_model(folder)(tokens), model(tokens))
    assert main(["convert", str(folder), str(tmp_path / "copy")]) == 0
    assert torch.equal(load_model(tmp_path / "copy")(tokens), model(tokens))


@pytest.mark.parametrize(
    "size", [0, -1, True, 2.5, "5", "5GiB", "-1GB", "0GB", "many", "GB", ".MB"]
)
def test_invalid_sizes_are_named(size, tmp_path):
    message = f"max_shard_size must be a positive number of bytes or a size .*, got {size!r}"
    with pytest.raises(ValueError, match=message):
        image_model().save_pretrained(tmp_path / "model", max_shard_size=size)
    with pytest.raises(ValueError, match=message):
        write_tensors({}, tmp_path / "model.safetensors", {}, max_shard_size=size)
    assert not list(tmp_path.iterdir())


def remove(shard):
    shard.unlink()


def truncate(shard):
    shard.write_bytes(shard.read_bytes()[:-1])


def empty(shard):
    shard.write_bytes(b"")


def lose(shard):
    tensors = load_file(shard)
    del tensors["head.weight"]
    save_file(tensors, shard)


def gain(shard):
    save_file({**load_file(shard), "more": torch.zeros(1)}, shard)


def relabel(shard):
    with safe_open(shard, framework="pt") as opened:
        metadata = opened.metadata()
    save_file(load_file(shard), shard, metadata={**metadata, "job": json.dumps({"recipe": "x"})})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (remove, "{folder} has no file {name}, which its {index} names"),
        (truncate, "{shard} is not a complete safetensors file: "),
        (empty, "{shard} is not a complete safetensors file: "),
        (lose, "{shard} does not contain head.weight, as {index} says"),
        (gain, "{shard} contains more, which {index} does not say"),
        (relabel, "{shard} has another 'job' in its metadata than the files before it in {index}"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_damaged_file_is_named(damage, message, shards, refusals):
    name = json.loads((shards / INDEX_NAME).read_text())["weight_map"]["head.weight"]
    damage(shards / name)
    expected = message.format(folder=shards, name=name, index=INDEX_NAME, shard=shards / name)
    with pytest.raises(ValueError, match=re.escape(expected)):
        diffmm.load(shards)
    (line,) = refusals("convert", shards, "never")
    assert line.startswith(f"diffmm: error: {expected}")


NO_NAME = "{index} names {value!r}, which is not the name of a safetensors file beside it"


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("../outside.safetensors", NO_NAME),
        ("{parent}/outside.safetensors", NO_NAME),
        ("sub/inside.safetensors", NO_NAME),
        ("..", NO_NAME),
        ("", NO_NAME),
        ("config.json", NO_NAME),
        (5, "{index} has no weight_map of tensors to files"),
    ],
)
def test_an_index_names_only_safetensors_files_beside_it(value, message, shards):
    for name in ("outside.safetensors", "model/sub/inside.safetensors"):
        file = shards.parent / name
        file.parent.mkdir(exist_ok=True)
        save_file({"head.weight": torch.zeros(16)}, file)
    value = value.format(parent=shards.parent) if isinstance(value, str) else value
    change_index(shards, lambda places: places.update({"head.weight": value}))
    expected = message.format(index=shards / INDEX_NAME, value=value)
    with pytest.raises(ValueError, match=re.escape(expected)):
        diffmm.load(shards)


@pytest.mark.parametrize(
    "text", ["[]", "{}", '{"weight_map": {}}', "{", '{"weight_map": 1}', "\xff"]
)
def test_an_index_that_is_none_is_named(text, shards):
    (shards / INDEX_NAME).write_bytes(text.encode("latin1"))
    with pytest.raises(ValueError, match=f"{INDEX_NAME} (is not JSON|has no weight_map)"):
        diffmm.load(shards)


def test_files_without_their_index_are_named(shards, refusals):
    (shards / INDEX_NAME).unlink()
    first = names_in(shards)[0]
    with pytest.raises(FileNotFoundError, match=f"no {INDEX_NAME}, which {first} needs$"):
        diffmm.load(shards)
    (line,) = refusals("convert", shards, "never")
    assert line.endswith(f"no {INDEX_NAME}, which {first} needs")


def test_one_of_several_files_is_no_model(shards):
    first, count = names_in(shards)[0], len(names_in(shards)) - 1
    message = f"{first} is one of {count} files of the same weights: give their folder, or their"
    for read in (diffmm.load, read_model):
        with pytest.raises(ValueError, match=message):
            read(shards / first)
    one = image_model()
    save_model(one, shards.parent / "other-00001-of-00001.safetensors")
    again = load_model(shards.parent / "other-00001-of-00001.safetensors")
    assert same(again.state_dict(), one.state_dict())


def test_one_file_is_preferred_to_an_index(tmp_path):
    """As transformers prefers it."""
    model = image_model()
    folder = model.save_pretrained(tmp_path / "model")
    (folder / INDEX_NAME).write_text("{")
    assert same(load_model(folder).state_dict(), model.state_dict())


def test_metadata_of_others_may_differ(tmp_path):
    places = {}
    for number in range(2):
        name = f"model-{number}-of-2.safetensors"
        save_file({f"t{number}": torch.ones(1)}, tmp_path / name, metadata={"part": str(number)})
        places[f"t{number}"] = name
    index = Path(tmp_path, INDEX_NAME)
    index.write_text(json.dumps({"weight_map": places}))
    tensors, metadata = read_tensors(index)
    assert tensors.keys() == places.keys()
    assert metadata == {"part": "0"}
