"""The wheel is complete: installed in an empty environment, it trains a recipe by name."""

import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, ROOT]
    subprocess.run(command, check=True, capture_output=True)
    (built,) = folder.glob("*.whl")
    return built


def test_the_wheel_holds_both_packages_and_every_recipe(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    packages = [*(ROOT / "diffmm").rglob("*.py"), *(ROOT / "datamodules").rglob("*.py")]
    for path in packages:
        assert str(path.relative_to(ROOT)) in names
    recipes = list((ROOT / "recipes").rglob("*.yaml"))
    assert recipes
    for path in recipes:
        assert f"diffmm/_recipes/{path.relative_to(ROOT / 'recipes')}" in names
    assert not [name for name in names if name.startswith("tests/")]


@pytest.mark.slow
def test_the_wheel_trains_by_recipe_name_in_an_empty_environment(wheel, tmp_path):
    environment = tmp_path / "environment"
    venv.create(environment, with_pip=True)
    python = environment / "bin" / "python"
    install = [python, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", wheel]
    subprocess.run(install, check=True)
    # Third-party packages are borrowed by path. A path file inside a borrowed folder is not read,
    # so the editable diffmm of this environment stays out of sight.
    site = Path(
        subprocess.run(
            [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
            check=True,
            capture_output=True,
            text=True,
        ).stdout.strip()
    )
    (site / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    where = subprocess.run(
        [python, "-c", "import diffmm, datamodules; print(diffmm.__file__, datamodules.__file__)"],
        check=True,
        capture_output=True,
        text=True,
        cwd=tmp_path,
    ).stdout
    assert where.count(str(site)) == 2

    fit = [environment / "bin" / "diffmm", "fit", "--config", "image/digits_tiny"]
    done = subprocess.run(
        [*fit, "--trainer.max_steps", "2"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert list((tmp_path / "runs").rglob("config.yaml"))
    assert list((tmp_path / "runs").rglob("*.ckpt"))
