"""Fixtures that run commands in this process, each in its own directory."""

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import lightning.pytorch  # noqa: F401 (its log goes to the stderr it finds when imported)
import pytest
import yaml

from diffmm.cli import main
from diffmm.recipes.catalog import find_recipe
from diffmm.recipes.settings import load, override

IGNORED_WARNINGS = (
    # Lightning 2.6 under torch 2.11.
    "ignore:.*LeafSpec.*:FutureWarning",
    # The tiny recipes load data in the training process, because workers would only cost time.
    "ignore:.*does not have many workers.*",
)

QUICK = {
    "trainer.max_steps": 2,
    "trainer.val_check_interval": 2,
    "trainer.limit_val_batches": 1,
    "trainer.log_every_n_steps": 1,
    "trainer.num_sanity_val_steps": 0,
    "trainer.enable_model_summary": False,
}
"""Settings that make two steps of a tiny recipe."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            for warning in IGNORED_WARNINGS:
                item.add_marker(pytest.mark.filterwarnings(warning))


class Result(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def mistakes(self) -> list[str]:
        """The error messages on stderr."""
        start = "diffmm: error: "
        return [
            line.removeprefix(start) for line in self.err.splitlines() if line.startswith(start)
        ]


Run = Callable[..., Result]
Recipe = Callable[..., Path]
WaitUntil = Callable[..., None]


@pytest.fixture
def wait_until() -> WaitUntil:
    """`wait_until(is_so, seconds)` waits for a condition and fails the test after a time limit."""

    def wait(is_so: Callable[[], bool], seconds: float = 30.0) -> None:
        end = time.monotonic() + seconds
        while not is_so():
            assert time.monotonic() < end, f"not within {seconds:g} seconds"
            time.sleep(0.02)

    return wait


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    """`run("fit", "--config", ...)` runs a command in an empty working directory."""
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)

    def call(*arguments: str) -> Result:
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        return Result(code, *capsys.readouterr())

    return call


@pytest.fixture(scope="session")
def recipe_in() -> Recipe:
    """`recipe_in(folder, "image/digits_tiny", **{"data.batch_size": 3})` writes a quick variant of
    a shipped recipe to a folder; `None` removes a key."""

    def write(
        folder: Path, name: str = "image/digits_tiny", quick: bool = True, **changes: Any
    ) -> Path:
        values = load([find_recipe(name)])
        for key, value in {**(QUICK if quick else {}), **changes}.items():
            override(values, key, value)
        path = folder / "recipe.yaml"
        path.write_text(yaml.safe_dump(values, sort_keys=False))
        return path

    return write


@pytest.fixture
def recipe(recipe_in: Recipe, tmp_path: Path) -> Recipe:
    """`recipe_in` in the folder of the test."""
    return partial(recipe_in, tmp_path)


@pytest.fixture
def text_changes(tmp_path: Path) -> dict[str, Any]:
    """Overrides that train a text recipe on a few small files."""
    folder = tmp_path / "texts"
    folder.mkdir()
    for number in range(40):
        (folder / f"{number}.txt").write_text(f"Text number {number} of forty. " * 20)
    return {
        "data.source": {
            "class_path": "datamodules.text.TextFolder",
            "init_args": {"root": str(folder)},
        },
        "data.validation_fraction": 0.3,
        "data.batch_size": 2,
        "vars.sequence_length": 32,
        "model.model.config.backbone.depth": 2,
    }
