"""The package of the attention kernels works without diffmm."""

import ast
import importlib.util
import os
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def script():
    path = ROOT / "scripts" / "package_kernels.py"
    spec = importlib.util.spec_from_file_location("package_kernels", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def target(script, tmp_path, capsys):
    script.main([str(tmp_path / "kernels"), "--repo-id", "someone/diffmm-attention"])
    assert capsys.readouterr().out == f"{tmp_path / 'kernels'}\n"
    return tmp_path / "kernels"


def test_the_operators_equal_their_references_without_diffmm(target, start):
    pytest.importorskip("triton", reason="the kernels need triton")
    environment = {
        "PYTHONPATH": os.pathsep.join([str(target / "torch-ext"), str(ROOT)]),
        "TRITON_INTERPRET": "1",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, str(ROOT / "tests/ops/packaged_attention.py")]
    with start(command, environment, cwd=target) as process:
        out, errors = process.finish(120)
    assert out == "all equal\n", errors


def test_the_files_are_those_of_kernel_builder(target):
    settings = tomllib.loads((target / "build.toml").read_text())
    assert settings["general"]["name"] == "diffmm-attention"
    assert settings["general"]["hub"] == {"repo-id": "someone/diffmm-attention"}
    assert settings["torch-noarch"] == {}
    assert 'get_kernel("someone/diffmm-attention")' in (target / "README.md").read_text()
    assert (target / "LICENSE").read_text() == (ROOT / "LICENSE").read_text()
    package = target / "torch-ext/diffmm_attention"
    names = {file.relative_to(package).as_posix() for file in package.rglob("*.py")}
    assert "diff_attention/triton/hopper/wide_keys.py" in names
    assert "linear_cross_entropy.py" not in names


def test_only_relative_imports_and_own_names_of_operators(target):
    roots = set()
    for file in (target / "torch-ext").rglob("*.py"):
        text = file.read_text()
        assert "diffmm::" not in text
        assert "diffmm." not in text
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Import):
                roots |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                roots.add(node.module.split(".")[0])
    assert roots - set(sys.stdlib_module_names) == {"torch", "triton"}


def test_the_name_of_the_operators_depends_on_the_code(script, monkeypatch):
    first = script.package()["_ops.py"]
    assert script.package()["_ops.py"] == first
    monkeypatch.setattr(script, "INIT", script.INIT + "# changed\n")
    assert script.package()["_ops.py"] != first


def test_what_exists_is_not_overwritten(script, target):
    with pytest.raises(SystemExit, match="kernels exists already: give another target"):
        script.main([str(target)])
    (target.parent / "file").write_text("")
    with pytest.raises(SystemExit, match="file exists already"):
        script.main([str(target.parent / "file")])
    assert {path.name for path in target.parent.iterdir()} == {"kernels", "file"}


def test_the_current_folder_is_a_target(script, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    script.main(["."])
    names = {"build.toml", "torch-ext", "README.md", "LICENSE"}
    assert {path.name for path in Path().iterdir()} == names


@pytest.mark.parametrize("module", ["diffmm.ops", "diffmm.layers"])
def test_imports_that_cannot_be_packaged(module, script, tmp_path, monkeypatch):
    (tmp_path / "mask.py").write_text(f"from {module} import something\n")
    monkeypatch.setattr(script, "ROOT", tmp_path)
    monkeypatch.setattr(script, "SOURCE", tmp_path)
    monkeypatch.setattr(script, "PUBLIC", {"AttentionMask": "mask"})
    with pytest.raises(ValueError, match=f"^mask.py imports {module}: .* by their own names"):
        script.modules()
