"""Imports without garbage collections."""

import gc
import sys
import weakref

import pytest

from diffmm.recipes.importing import importing


class Node:
    """Garbage that only a collection finds."""

    def __init__(self) -> None:
        self.itself = self


@pytest.fixture
def module(tmp_path, monkeypatch):
    """The name of a module that makes as many objects as start many collections."""
    (tmp_path / "of_many_objects.py").write_text("objects = [[] for _ in range(100_000)]")
    monkeypatch.syspath_prepend(tmp_path)
    yield "of_many_objects"
    sys.modules.pop("of_many_objects", None)


@pytest.fixture
def collections():
    """The generations that were collected so far."""
    found = []

    def note(phase, info):
        if phase == "start":
            found.append(info["generation"])

    gc.callbacks.append(note)
    yield found
    gc.callbacks.remove(note)


def test_nothing_is_collected_and_what_is_imported_is_exempt(module, collections):
    __import__(module)
    assert collections
    del sys.modules[module]
    collections.clear()
    before = gc.get_freeze_count()
    with importing():
        imported = __import__(module)
        assert not collections
    assert gc.get_freeze_count() >= before + len(imported.objects)
    assert gc.isenabled()
    # What comes later is collected as always.
    node = weakref.ref(Node())
    gc.collect()
    assert node() is None


def test_nothing_is_exempt_if_nothing_was_imported():
    before = gc.get_freeze_count()
    with importing():
        import gc as again
    assert again is gc
    assert gc.get_freeze_count() == before
    assert gc.isenabled()


def test_the_setting_of_the_caller_is_restored():
    with pytest.raises(ModuleNotFoundError), importing():
        import nowhere_to_be_found  # noqa: F401
    assert gc.isenabled()
    gc.disable()
    try:
        with importing():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()
