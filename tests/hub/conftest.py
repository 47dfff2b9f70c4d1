"""A trained digits model, and images of digits."""

from pathlib import Path

import pytest

from diffmm.cli import main

IGNORED_WARNINGS = (
    # Lightning 2.6 under torch 2.11.
    "ignore:.*LeafSpec.*:FutureWarning",
    # The tiny recipes load data in the training process, because workers would only cost time.
    "ignore:.*does not have many workers.*",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            for warning in IGNORED_WARNINGS:
                item.add_marker(pytest.mark.filterwarnings(warning))


@pytest.fixture(scope="package")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a run of `image/digits_tiny`, `seven.png`, and the validation images in
    `digits/CLASS/NUMBER.png`."""
    folder = tmp_path_factory.mktemp("workplace")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        settings = {
            "vars.steps": 50,
            "model.schedule.warmup_steps": 10,
            "trainer.val_check_interval": 50,
            "trainer.num_sanity_val_steps": 0,
            "trainer.enable_model_summary": "false",
            "trainer.callbacks.1": "lightning.pytorch.callbacks.ModelSummary",  # no progress bar
        }
        arguments = [part for name, value in settings.items() for part in (f"--{name}", str(value))]
        assert main(["fit", "--config", "image/digits_tiny", "--name", "first", *arguments]) == 0
    from datamodules.image import Digits

    images = Digits().splits().val
    for number, (label,) in enumerate(images.labels):
        path = folder / "digits" / str(label) / f"{number:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        images.read(number).save(path)
    (folder / "seven.png").write_bytes(sorted((folder / "digits/7").iterdir())[0].read_bytes())
    return folder


@pytest.fixture
def there(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same directory, as the working directory."""
    monkeypatch.chdir(workplace)
    return workplace
