"""Resuming with changed data: refused with the changes, or reported and continued."""

import numpy as np
import pytest
from PIL import Image

from diffmm.checkpoint_folders import checkpoints, find_whole, read_manifest

NUM_STEPS = 6


@pytest.fixture
def interrupted(run, recipe, tmp_path):
    """A run that stopped after 3 of 6 steps, in an epoch of 12 images in batches of 8, and its
    data."""
    rng = np.random.default_rng(0)
    for name in ("a", "b"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for number in range(6):
            pixels = rng.integers(0, 255, (8, 8), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / name / f"{number}.png")
    folder = {"train": str(tmp_path / "images"), "val": str(tmp_path / "images")}
    source = {"class_path": "datamodules.image.ImageFolder", "init_args": folder}
    path = recipe(
        **{"data.source": source, "data.batch_size": 2, "data.channels": 1, "data.image_size": 8},
        **{"model.model.config.num_classes": 2, "trainer.max_steps": 3},
        **{"trainer.val_check_interval": 3, "trainer.limit_val_batches": 1},
    )
    assert run("fit", "--config", path, "--run_dir", "there").code == 0
    return tmp_path / "images"


def go_on(run, *flags):
    return run("fit", "--resume", "there", "--trainer.max_steps", str(NUM_STEPS), *flags)


def step(directory):
    return read_manifest(find_whole(directory))["step"]


def test_data_as_they_were(run, interrupted, tmp_path):
    result = go_on(run)
    assert result.code == 0, result.err
    assert "differ from those of the checkpoint" not in result.err
    assert step(tmp_path / "work" / "there" / "checkpoints") == NUM_STEPS


def changed(folder):
    Image.new("L", (8, 8), 7).save(folder / "a" / "0.png")


def fewer(folder):
    # The position of the checkpoint lies beyond the end of such an epoch.
    for path in (*(folder / "a").glob("[1-5].png"), *(folder / "b").glob("[2-5].png")):
        path.unlink()


def more(folder):
    for number in range(6, 20):
        Image.new("L", (8, 8), number).save(folder / "a" / f"{number}.png")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (changed, "(sizes of files differ; contents of files differ)"),
        (fewer, "samples: 12, now 3"),
        (more, "samples: 12, now 26"),
    ],
)
def test_changed_data(run, interrupted, tmp_path, change, told):
    kept = tmp_path / "work" / "there" / "checkpoints"
    before = [found.step for found in checkpoints(kept)]
    change(interrupted)
    result = go_on(run)
    assert result.code == 2
    (line,) = result.mistakes
    assert told in line
    assert "--allow-changed-data" in line
    assert [found.step for found in checkpoints(kept)] == before
    with pytest.warns(UserWarning, match="differ from those of the checkpoint"):
        result = go_on(run, "--allow-changed-data")
    assert result.code == 0, result.err
    assert step(kept) == NUM_STEPS


def test_the_flag_is_for_runs_that_go_on(run, recipe):
    result = run("fit", "--config", recipe(), "--allow-changed-data")
    assert (result.code, result.mistakes) == (
        2,
        ["--allow-changed-data is for resumed runs: it needs --resume"],
    )
