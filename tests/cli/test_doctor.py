"""`diffmm doctor`: its findings, and the commands it suggests."""

import sys

import pytest

from diffmm.cli import doctor
from diffmm.cli.doctor import (
    MATCHING,
    Outcome,
    extras,
    extras_finding,
    gpu_finding,
    import_findings,
    package_findings,
    remedy,
    requirements,
)

NEEDED = [
    "torch<2.15,>=2.11",
    "torchvision>=0.26",
    "torchaudio>=2.11",
    "rich<15,>=13.7",
    "pyyaml>=6",
]
VERSIONS = {
    "torch": "2.11.0",
    "torchvision": "0.26.0",
    "torchaudio": "2.11.0",
    "rich": "14.3.4",
    "pyyaml": "6.0.4",
}


def works(code):
    return Outcome(True, "")


def test_requirements_are_those_of_the_package_without_extras():
    names = [text.split(">")[0].split("<")[0].split("[")[0] for text in requirements()]
    assert {"torch", "torchvision", "torchaudio", "lightning", "timm"} <= set(names)
    assert "pytest" not in names


def test_extras_are_those_of_the_package_for_users():
    found = extras()
    assert {"onnx", "app", "lm-eval", "peft"} <= set(found)
    assert "dev" not in found
    assert any(text.startswith("gradio") and ">=" in text for text in found["app"])


def test_which_extras_are_installed_is_told_and_is_no_problem():
    needed = {"app": ["gradio>=6"], "onnx": ["onnx>=1.17", "onnxruntime"], "old": ["torch>=9"]}
    versions = {"gradio": "6.31", "onnx": "1.18", "torch": "2.11.0"}
    found = extras_finding(needed, versions.get)
    assert found == ("extras", "app (without onnx, old: pip install 'diffmm[onnx]')", None, ())
    assert extras_finding({"app": ["gradio>=6"]}, versions.get).text == "app"
    assert extras_finding({"app": ["x"]}, versions.get).text.startswith("none (without app: ")


def test_versions_inside_of_their_bounds_are_well():
    findings = package_findings(NEEDED, VERSIONS.get)
    assert [finding.name for finding in findings] == list(VERSIONS)
    assert not any(finding.problem for finding in findings)
    assert findings[0].text.startswith("2.11.0 (needs ")


def test_a_version_outside_of_its_bounds_is_told():
    findings = package_findings(NEEDED, {**VERSIONS, "rich": "15.0.0"}.get)
    (broken,) = [finding for finding in findings if finding.problem]
    assert broken.problem == "15.0.0 does not satisfy <15,>=13.7"
    assert remedy([broken]) == f'{sys.executable} -m pip install --upgrade "rich<15,>=13.7"'


def test_a_missing_package_is_told():
    findings = package_findings(NEEDED, {**VERSIONS, "pyyaml": None}.get)
    (broken,) = [finding for finding in findings if finding.problem]
    assert broken.problem == "is not installed; diffmm needs >=6"


def test_a_torch_too_new_for_torchaudio_is_mended_by_a_matching_trio():
    findings = package_findings(NEEDED, {**VERSIONS, "torch": "2.15.0"}.get)
    (broken,) = [finding for finding in findings if finding.problem]
    command = remedy([broken])
    for package in MATCHING:
        assert f'"{package}"' in command
    assert "--force-reinstall" in command


def test_a_trio_that_does_not_import_together_is_told():
    def python(code):
        return Outcome(False, "Traceback\nOSError: undefined symbol")

    (finding,) = import_findings(NEEDED, python)
    assert finding.problem == (
        "OSError: undefined symbol: these three must be built for each other"
    )
    assert finding.packages == MATCHING


def test_a_package_that_does_not_import_is_named():
    def python(code):
        broken = "yaml" in code
        return Outcome(not broken, "ImportError: no good" if broken else "")

    (finding,) = import_findings(NEEDED, python)
    assert (finding.text, finding.problem) == ("yaml does not import", "ImportError: no good")
    assert finding.packages == ("pyyaml>=6",)
    (finding,) = import_findings(NEEDED, works)
    assert finding.problem is None


@pytest.mark.parametrize(
    ("outcome", "driver", "problem", "text"),
    [
        (Outcome(True, "NVIDIA H100, 79 GiB, compute 9.0"), True, None, "NVIDIA H100"),
        (Outcome(True, ""), False, None, "none: recipes for the CPU run"),
        (Outcome(True, ""), True, "torch is built without CUDA", "torch sees no GPU"),
        (Outcome(False, "RuntimeError: no kernel image"), True, "no kernel image", "cannot"),
    ],
)
def test_the_gpu(outcome, driver, problem, text):
    finding = gpu_finding(lambda code: outcome, driver)
    assert text in finding.text
    assert (problem is None) == (finding.problem is None)
    if problem:
        assert problem in finding.problem


def test_a_process_that_dies_is_told():
    outcome = doctor.python("import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    assert outcome == Outcome(False, "the process was killed by signal 9")
    assert doctor.python("print(1)") == Outcome(True, "1")
    assert doctor.python("import no_such_thing").output.endswith("'no_such_thing'")


def test_exit_code_and_report(run, monkeypatch):
    monkeypatch.setattr(doctor, "requirements", lambda: NEEDED)
    monkeypatch.setattr(doctor, "python", works)
    monkeypatch.setattr(doctor, "has_nvidia_gpu", lambda: False)
    monkeypatch.setattr(doctor, "installed_version", VERSIONS.get)
    result = run("doctor")
    assert result.code == 0
    assert "To fix it" not in result.out
    assert all(line.startswith("ok ") for line in result.out.splitlines())

    monkeypatch.setattr(doctor, "installed_version", {**VERSIONS, "torch": "2.15.0"}.get)
    result = run("doctor")
    assert result.code == 1
    assert "BROKEN torch" in result.out
    assert result.out.count("To fix it") == 1


def test_every_requirement_imports_under_the_name_that_doctor_tries():
    lines = []

    def noted(code):
        lines.append(code)
        return works(code)

    import_findings(requirements(), noted)
    assert len(lines) == 2
    # In one process instead of two; the second line contains the packages of the first.
    outcome = doctor.python("\n".join(lines))
    assert outcome.works, outcome.output
