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
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import diffmm

TRIO = ("torch", "torchvision", "torchaudio")
"""These are built for each other, and have to match."""

MATCHING = ("torch==2.11.0", "torchvision==0.26.0", "torchaudio==2.11.0")
"""A trio that works together, on CPU and GPU: the one on which this library is measured."""

IMPORTS = {"pillow": "PIL", "pyyaml": "yaml", "scikit-learn": "sklearn"}
"""What packages are imported as, where it is not their name."""

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
    """What would break, if anything."""
    packages: tuple[str, ...] = ()
    """What to install to fix it."""


class Outcome(NamedTuple):
    """What a Python process of its own printed, and whether it ended well."""

    works: bool
    output: str


def run(verb: str, arguments: Sequence[str]) -> int:
    """Print the report; 1 if something is broken."""
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
    """What diffmm needs, as `name<bounds`: of the installed package, or of its source tree."""
    try:
        declared = importlib.metadata.requires("diffmm")
    except importlib.metadata.PackageNotFoundError:
        declared = None
    if declared is None:
        import tomllib

        project = Path(diffmm.__file__).parent.parent / "pyproject.toml"
        declared = tomllib.loads(project.read_text(encoding="utf-8"))["project"]["dependencies"]
    return [requirement for requirement in declared if "extra ==" not in requirement]


def installed_version(name: str) -> str | None:
    """The version of an installed package."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def python(code: str) -> Outcome:
    """Run `code` in a process of its own, since a broken package can take its process along."""
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True
    )
    lines = (result.stdout if result.returncode == 0 else result.stderr).strip().splitlines()
    if result.returncode < 0:
        lines.append(f"the process was killed by signal {-result.returncode}")
    return Outcome(result.returncode == 0, "\n".join(lines))


def has_nvidia_gpu() -> bool:
    """Whether there is a driver for one, whatever torch says."""
    return shutil.which("nvidia-smi") is not None or os.path.exists("/dev/nvidia0")


def package_findings(
    needed: Sequence[str], version_of: Callable[[str], str | None]
) -> list[Finding]:
    """Each requirement against what is installed."""
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


def import_findings(needed: Sequence[str], python: Callable[[str], Outcome]) -> list[Finding]:
    """Whether the packages can be imported, the trio together and everything after it."""
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
    """Whether torch sees the GPU and can compute on it."""
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
    """The command that fixes everything."""
    packages = dict.fromkeys(package for finding in broken for package in finding.packages)
    pinned = {package.partition("==")[0] for package in packages if "==" in package}
    quoted = " ".join(
        f'"{package}"'
        for package in packages
        if "==" in package or package.partition(">")[0] not in pinned
    )
    # A torch without CUDA has the version that is asked for, and must be replaced all the same.
    force = " --force-reinstall" if pinned else ""
    return f"{sys.executable} -m pip install --upgrade{force} {quoted}"


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "it ended without a message"
