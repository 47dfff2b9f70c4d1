"""Files and folders that appear whole or not at all: what an error names."""

import errno
import os
from pathlib import Path

import pytest

from diffmm.checkpoint_folders import write_text
from diffmm.new_folders import discard, naming, workspace
from diffmm.recipes.errors import message_of

FULL = Path("/dev/full")
needs_full = pytest.mark.skipif(not FULL.exists(), reason="needs a device that is always full")


@needs_full
def test_a_file_on_a_full_disk_is_named(tmp_path):
    file = tmp_path / "page.html"
    file.with_name(f".page.html.{os.getpid()}").symlink_to(FULL)  # where it is written
    with pytest.raises(OSError, match="No space left") as refused:
        write_text(file, "text")
    assert message_of(refused.value) == f"{file}: No space left on device"
    assert list(tmp_path.iterdir()) == []


@needs_full
def test_a_workspace_on_a_full_disk_is_named(tmp_path):
    file = tmp_path / "new" / "model.onnx"
    with pytest.raises(OSError, match="No space left") as refused, workspace(file):
        FULL.write_bytes(b"0")
    assert message_of(refused.value) == f"{file}: No space left on device"
    assert list(tmp_path.iterdir()) == []


def test_a_file_on_a_read_only_disk_is_named(tmp_path, monkeypatch):
    """There, even removing a file that does not exist is an error, with a temporary name."""

    def refuse(path, *_, **__):
        raise OSError(errno.EROFS, "Read-only file system", str(path))

    file = tmp_path / "table.csv"
    for method in ("write_text", "unlink"):
        monkeypatch.setattr(Path, method, refuse)
    with pytest.raises(OSError, match="Read-only") as refused:
        write_text(file, "text")
    assert message_of(refused.value) == f"{file}: Read-only file system"
    discard(file)


@pytest.mark.parametrize("file", [None, ".page.html.x1", "a/.page.html.x1/new/model.safetensors"])
def test_a_full_disk_is_said_of_the_file_that_was_to_appear(file):
    named = () if file is None else (file,)
    with pytest.raises(OSError, match=".") as raised, naming(Path("a/page.html")):
        raise OSError(errno.ENOSPC, "No space left on device", *named)
    assert message_of(raised.value) == "a/page.html: No space left on device"


@pytest.mark.parametrize("error", [FileNotFoundError(errno.ENOENT, "no", "other"), OSError("why")])
def test_errors_that_say_enough_are_kept(error):
    expected = message_of(error)
    with pytest.raises(OSError, match=".") as raised, naming(Path("page.html")):
        raise error
    assert message_of(raised.value) == expected
