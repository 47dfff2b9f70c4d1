"""`diffmm doctor`: whether the installed packages and the GPU work together, and how to fix
them."""

import argparse
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import diffmm

TRIO = ("torch", "torchvision", "torchaudio")
"""Packages whose builds must match each other."""

MATCHING = ("torch==2.11.0", "torchvision==0.26.0", "torchaudio==2.11.0")
"""Matching versions, on CPU and GPU: those with which this library is benchmarked."""

IMPORTS = {"pillow": "PIL", "pyyaml": "yaml", "scikit-learn": "sklearn"}
"""Import names of packages, where they differ from the package names."""

GPU_REPORT = """
import torch
if torch.cuda.is_available():
    for index in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(index)
        print(f"{p.name}, {p.total_memory / 2**30:.0f} GiB, compute {p.major}.{p.minor}")
    a = torch.ones(64, 64, device="cuda", dtype=torch.bfloat16)
    assert (a @ a).sum().item() == 64**3
"""


class Finding(NamedTuple):
    """One line of the report."""

    name: str
    text: str
    problem: str | None = None
    """The problem, if any."""
    packages: tuple[str, ...] = ()
    """Packages to install to fix the problem."""


class Outcome(NamedTuple):
    """Output of a separate Python process, and whether it succeeded."""

    works: bool
    output: str


def run(verb: str, arguments: Sequence[str]) -> int:
    """Print the report, and return 1 if something is broken."""
    argparse.ArgumentParser(
        prog="diffmm doctor",
        description="Check the installed versions and the GPU against what diffmm needs, and print "
        "the command that fixes what is broken. Exits with 1 if something is broken.",
    ).parse_args(arguments)
    if importlib.util.find_spec("packaging") is None:
        print("BROKEN packaging  missing, and versions cannot be compared without it")
        print(f"\nTo fix it:   {sys.executable} -m pip install packaging")
        return 1
    findings = [
        Finding("python", f"{platform.python_version()} on {platform.machine()}"),
        *package_findings(requirements(), installed_version),
        *import_findings(requirements(), python),
        extras_finding(extras(), installed_version),
        gpu_finding(python, has_nvidia_gpu()),
    ]
    width = max(len(finding.name) for finding in findings)
    for finding in findings:
        print(f"{'BROKEN' if finding.problem else 'ok':<7}{finding.name:<{width}}  {finding.text}")
    broken = [finding for finding in findings if finding.problem]
    for finding in broken:
        print(f"\n{finding.name}: {finding.problem}")
    if broken:
        print(f"\nTo fix it:   {remedy(broken)}")
    return 1 if broken else 0


def requirements() -> list[str]:
    """Return the requirements of diffmm, from the installed package or its source tree."""
    try:
        declared = importlib.metadata.requires("diffmm")
    except importlib.metadata.PackageNotFoundError:
        declared = None
    if declared is None:
        declared = _project()["dependencies"]
    return [requirement for requirement in declared if "extra ==" not in requirement]


def extras() -> dict[str, list[str]]:
    """Return the requirements of each extra for users, from where `requirements` finds its."""
    from packaging.requirements import Requirement

    try:
        about = importlib.metadata.metadata("diffmm")
    except importlib.metadata.PackageNotFoundError:
        declared: dict[str, list[str]] = dict(_project()["optional-dependencies"])
    else:
        needed = [Requirement(text) for text in importlib.metadata.requires("diffmm") or []]
        declared = {
            extra: [
                f"{each.name}{each.specifier}"
                for each in needed
                if each.marker and each.marker.evaluate({"extra": extra})
            ]
            for extra in about.get_all("Provides-Extra") or []
        }
    declared.pop("dev", None)
    return declared


def _project() -> dict[str, Any]:
    import tomllib

    file = Path(diffmm.__file__).parent.parent / "pyproject.toml"
    project: dict[str, Any] = tomllib.loads(file.read_text(encoding="utf-8"))["project"]
    return project


def installed_version(name: str) -> str | None:
    """Return the version of a package; `None` if it is not installed."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def python(code: str) -> Outcome:
    """Run `code` in a separate process, because a broken package can crash it."""
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True
    )
    lines = (result.stdout if result.returncode == 0 else result.stderr).strip().splitlines()
    if result.returncode < 0:
        lines.append(f"the process was killed by signal {-result.returncode}")
    return Outcome(result.returncode == 0, "\n".join(lines))


def has_nvidia_gpu() -> bool:
    """Whether an NVIDIA driver is installed, independently of torch."""
    return shutil.which("nvidia-smi") is not None or os.path.exists("/dev/nvidia0")


def package_findings(
    needed: Sequence[str], version_of: Callable[[str], str | None]
) -> list[Finding]:
    """Compare each requirement with the installed version."""
    from packaging.requirements import Requirement

    findings = []
    for text in needed:
        requirement = Requirement(text)
        version = version_of(requirement.name)
        bounds = str(requirement.specifier) or "any version"
        problem = None
        if version is None:
            problem = f"is not installed; diffmm needs {bounds}"
        elif not requirement.specifier.contains(version, prereleases=True):
            problem = f"{version} does not satisfy {bounds}"
        packages = MATCHING if requirement.name in TRIO else (text,)
        findings.append(
            Finding(
                requirement.name,
                f"{version or 'missing'} (needs {bounds})",
                problem,
                packages if problem else (),
            )
        )
    return findings


def extras_finding(
    needed: Mapping[str, Sequence[str]], version_of: Callable[[str], str | None]
) -> Finding:
    """Which extras are installed; those that are not are no problem."""
    missing = {
        extra: [finding for finding in package_findings(texts, version_of) if finding.problem]
        for extra, texts in needed.items()
    }
    text = ", ".join(extra for extra in needed if not missing[extra]) or "none"
    absent = [extra for extra in needed if missing[extra]]
    if absent:
        text += f" (without {', '.join(absent)}: pip install 'diffmm[{absent[0]}]')"
    return Finding("extras", text)


def import_findings(needed: Sequence[str], python: Callable[[str], Outcome]) -> list[Finding]:
    """Check that the packages can be imported, first the trio and then all of them."""
    from packaging.requirements import Requirement

    trio = python("import " + ", ".join(TRIO))
    if not trio.works:
        return [
            Finding(
                "imports",
                "torch, torchvision and torchaudio do not import together",
                f"{_last_line(trio.output)}: these three must be built for each other",
                MATCHING,
            )
        ]
    names = [Requirement(text).name for text in needed]
    modules = [IMPORTS.get(name.lower(), name.replace("-", "_")) for name in names]
    everything = python(f"import {', '.join(modules)}, diffmm.training")
    if everything.works:
        return [Finding("imports", "all packages import together")]
    for text, module in zip(needed, modules, strict=True):
        alone = python(f"import {module}")
        if not alone.works:
            return [
                Finding("imports", f"{module} does not import", _last_line(alone.output), (text,))
            ]
    return [
        Finding(
            "imports",
            "the packages do not import together",
            _last_line(everything.output),
            tuple(needed),
        )
    ]


def gpu_finding(python: Callable[[str], Outcome], has_driver: bool) -> Finding:
    """Check that torch finds the GPU and can compute on it."""
    report = python(GPU_REPORT)
    if not report.works:
        return Finding(
            "gpu",
            "torch cannot compute on it",
            f"{_last_line(report.output)}: training on the GPU would fail; update its driver, or "
            f"install a torch that is built for it",
            MATCHING,
        )
    if report.output:
        return Finding("gpu", report.output.replace("\n", "; "))
    if has_driver:
        return Finding(
            "gpu",
            "there is an NVIDIA driver, but torch sees no GPU",
            "torch is built without CUDA, or for a newer driver: training would run on the CPU",
            MATCHING,
        )
    return Finding("gpu", "none: recipes for the CPU run, others need --trainer.accelerator cpu")


def remedy(broken: Sequence[Finding]) -> str:
    """Return the command that fixes all findings."""
    packages = dict.fromkeys(package for finding in broken for package in finding.packages)
    pinned = {package.partition("==")[0] for package in packages if "==" in package}
    quoted = " ".join(
        f'"{package}"'
        for package in packages
        if "==" in package or package.partition(">")[0] not in pinned
    )
    # A torch without CUDA may already have the requested version, and must still be replaced.
    force = " --force-reinstall" if pinned else ""
    return f"{sys.executable} -m pip install --upgrade{force} {quoted}"


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "it ended without a message"
