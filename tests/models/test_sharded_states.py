"""Sharded states: a single process reads them, and they cannot run code."""

import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.metadata import MetadataIndex

from diffmm.checkpoint_folders import find_state, finish, start
from diffmm.models import BackboneConfig, ImageConfig, ImageModel, sharded_states
from diffmm.models.checkpoint_files import read_checkpoint
from diffmm.models.sharded_states import read_metadata, write_sharded_state
from diffmm.models.weights import describe, load_model, load_weights

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def model() -> ImageModel:
    torch.manual_seed(0)
    backbone = BackboneConfig(16, 1, 2, attention="diff_v1", rope="2d")
    return ImageModel(ImageConfig(backbone=backbone, num_classes=3, image_size=8, patch_size=4))


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A sharded checkpoint in a checkpoint folder, and the state that it holds."""
    ours = model()
    state = {f"model.{name}": value for name, value in ours.state_dict().items()}
    optimizer = {
        "state": {
            name: {"exp_avg": torch.randn_like(p), "step": torch.tensor(3.0), "note": "plain"}
            for name, p in ((f"model.{n}", p) for n, p in ours.named_parameters())
        },
        "param_groups": [{"lr": 0.1, "params": [f"model.{n}" for n, _ in ours.named_parameters()]}],
    }
    content = {"state_dict": state, "optimizer_states": [optimizer], "global_step": 4}
    content |= {"model": describe(ours), "tokenizer": "bytes"}
    folder = start(tmp_path_factory.mktemp("run") / "checkpoints", 4)
    write_sharded_state(folder / "state.ckpt", content, is_first=True)
    return finish(folder, {"step": 4}), content


@pytest.fixture
def folder(written, tmp_path):
    """A copy that may be damaged."""
    return Path(shutil.copytree(written[0] / "state.ckpt", tmp_path / "state.ckpt"))


def test_it_is_the_state_that_one_process_would_have_saved(written):
    path, content = written
    found = read_checkpoint(path / "state.ckpt", optimizer=True)
    assert found.keys() == content.keys()
    for name, weight in content["state_dict"].items():
        assert torch.equal(found["state_dict"][name], weight)
    (optimizer,), (expected,) = found["optimizer_states"], content["optimizer_states"]
    assert optimizer["param_groups"] == [{"lr": 0.1, "params": list(range(len(expected["state"])))}]
    for number, values in enumerate(expected["state"].values()):
        assert optimizer["state"][number].keys() == values.keys()
        assert torch.equal(optimizer["state"][number]["exp_avg"], values["exp_avg"])
        assert optimizer["state"][number]["note"] == "plain"


def test_whoever_wants_weights_reads_no_moments(written, monkeypatch):
    asked = []
    original = sharded_states.read_tensors

    def watched(path, tensors, **settings):
        asked.extend(tensors)
        return original(path, tensors, **settings)

    monkeypatch.setattr(sharded_states, "read_tensors", watched)
    assert read_checkpoint(written[0] / "state.ckpt", weights=False)["tokenizer"] == "bytes"
    assert not asked
    load_model(written[0])
    assert set(asked) == {f"state_dict.{name}" for name in written[1]["state_dict"]}


def test_models_come_from_a_run_a_folder_and_a_state(written):
    path, expected = written[0], model().state_dict()
    for place in (path.parents[1], path, path / "state.ckpt"):
        loaded = load_model(place)
        assert all(torch.equal(loaded.state_dict()[n], value) for n, value in expected.items())
    ours = model()
    nn.init.zeros_(ours.head.weight)
    assert load_weights(ours, path) == []
    assert torch.equal(ours.head.weight, expected["head.weight"])


@pytest.mark.parametrize("name", [".metadata", "meta.pt", "__0_0.distcp"])
@pytest.mark.parametrize("damage", ["cut", "changed", "gone"])
def test_the_manifest_finds_damage(name, damage, written, tmp_path):
    path = Path(shutil.copytree(written[0], tmp_path / "step_00000004"))
    file = path / "state.ckpt" / name
    content = file.read_bytes()
    if damage == "gone":
        file.unlink()
    else:
        other = content[:-1] if damage == "cut" else content[:-1] + bytes([content[-1] ^ 1])
        file.write_bytes(other)
    with pytest.raises(ValueError, match=rf"is damaged: .*state.ckpt/{name} ") as refused:
        find_state(path)
    assert "\n" not in str(refused.value)
    # Without a manifest, the reader detects the damage, or reads the original values.
    if damage != "changed":
        with pytest.raises((ValueError, FileNotFoundError), match="state.ckpt"):
            load_model(path / "state.ckpt")


def rewrite(folder, metadata):
    metadata.storage_meta = None  # with a path in it, as this library reads them
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


class Hostile:
    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize(
    "call",
    [
        (os.system, ("touch owned",)),
        (eval, ("open('owned', 'w')",)),
        (getattr, ("", "join")),
        (torch.load, ("owned",)),
        (pickle.loads, (b"",)),
    ],
    ids=lambda call: call[0].__name__,
)
def test_a_hostile_metadata_is_refused(call, folder, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    hostile = Hostile(*call)
    for content in (hostile, {"a": [hostile]}):
        (folder / ".metadata").write_bytes(pickle.dumps(content))
        with pytest.raises(ValueError, match=r"\.metadata cannot be read: it names .* not allowed"):
            load_model(folder)
    assert not Path("owned").exists()


def test_a_hostile_plain_part_is_refused(folder):
    torch.save({"x": Hostile(os.system, ("touch owned",))}, folder / "meta.pt")
    with pytest.raises(ValueError, match=r"meta\.pt is not a complete file of plain values"):
        load_model(folder)


def test_a_hostile_share_is_refused(folder):
    """A shard is only read as tensors, whatever the metadata contain."""
    metadata = read_metadata(folder)
    file = folder / "__0_0.distcp"
    torch.save(Hostile(os.system, ("touch owned",)), folder / "evil")
    evil, content = (folder / "evil").read_bytes(), file.read_bytes()
    (folder / "evil").unlink()
    file.write_bytes(content + evil)
    for info in metadata.storage_data.values():
        info.offset, info.length = len(content), len(evil)
    rewrite(folder, metadata)
    with pytest.raises(ValueError, match=r"state\.ckpt cannot be read: Weights only load failed"):
        load_model(folder)


def change_place(**changes):
    def change(metadata):
        for info in metadata.storage_data.values():
            for name, value in changes.items():
                setattr(info, name, value)

    return change


def enlarge(metadata):
    entry = metadata.state_dict_metadata["state_dict.model.head.weight"]
    entry.size = entry.chunks[0].sizes = torch.Size([2**40, 16])


def lose_a_part(metadata):
    metadata.state_dict_metadata["state_dict.model.head.weight"].chunks.clear()


def lose_a_place(metadata):
    metadata.storage_data.pop(MetadataIndex("state_dict.model.head.weight", torch.Size([0, 0])))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (change_place(relative_path="../../etc/passwd"), "which is not a file in this folder"),
        (change_place(relative_path="/etc/passwd"), "which is not a file in this folder"),
        (change_place(relative_path="__7_0.distcp"), "__7_0.distcp is missing or truncated"),
        (change_place(length=2**50), "__0_0.distcp is missing or truncated"),
        (change_place(offset=-1), "__0_0.distcp is missing or truncated"),
        (change_place(transform_descriptors=["zstd"]), "which is not a file in this folder"),
        (enlarge, "its tensors need .* bytes, but the files have"),
        (lose_a_part, "the parts of state_dict.model.head.weight do not form a tensor"),
        (lose_a_place, "cannot be read"),
        (lambda metadata: setattr(metadata, "storage_data", None), "it is not the metadata"),
    ],
)
def test_metadata_must_agree_with_the_files(change, words, folder):
    metadata = read_metadata(folder)
    change(metadata)
    rewrite(folder, metadata)
    with pytest.raises(ValueError, match=words) as refused:
        load_model(folder)
    assert "\n" not in str(refused.value)


def test_a_folder_of_something_else_is_no_state(tmp_path):
    (tmp_path / "state.ckpt").mkdir()
    with pytest.raises(ValueError, match=r"is not a sharded checkpoint: it has no meta\.pt"):
        load_model(tmp_path / "state.ckpt")


def test_a_full_disk_is_an_error_of_the_system(written, tmp_path, monkeypatch):
    def full(*args, **settings):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("torch.distributed.checkpoint.filesystem.torch.save", full)
    with pytest.raises(OSError, match="No space left on device") as refused:
        write_sharded_state(tmp_path / "state.ckpt", written[1], is_first=True)
    assert "\n" not in str(refused.value)
