"""Package diffmm's attention for the Kernel Hub of Hugging Face's `kernels` library.

    python scripts/package_kernels.py TARGET [--repo-id user/diffmm-attention]

writes a folder for kernel-builder:

    build.toml                      name, license and backend; `[torch-noarch]`: nothing to compile
    torch-ext/diffmm_attention/     the operators, references and Triton and Gluon kernels
    README.md, LICENSE

The package imports only torch and, for the fused kernels, Triton. It is a copy of the modules of
`diffmm.ops` that attention needs, with relative imports, so that it can be loaded from any path and
several versions of it in the same process; its operators are registered under a name of their own.
"""

import argparse
import ast
import hashlib
import re
from pathlib import Path

from diffmm.new_folders import appearing

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "diffmm" / "ops"
PACKAGE = "diffmm_attention"

PUBLIC = {
    "diff_attention": "diff_attention",
    "grouped_diff_attention": "grouped_diff_attention",
    "AttentionMask": "mask",
    "softmax_attention": "softmax_attention",
}
"""The names that the package offers, and the modules of `diffmm.ops` that define them."""

INIT = '''"""Differential and softmax attention with fused kernels (https://arxiv.org/abs/2410.05258).

    mask = AttentionMask(causal=True)
    out = diff_attention(q, k, v, lam, mask=mask)

See the docstrings of the functions for shapes, masks and backends.
"""

{imports}

__all__ = [{names}]
'''

OPS = '''"""The name under which the operators are registered; kernel-builder writes its own."""

NAMESPACE = "{namespace}"


def add_op_namespace_prefix(name: str) -> str:
    """The full name of an operator."""
    return f"{{NAMESPACE}}::{{name}}"
'''

BUILD = """[general]
name = "diffmm-attention"
version = 1
edition = 6
license = "Apache-2.0"
backends = ["cuda"]
{hub}
[torch-noarch]
"""

README = """---
license: apache-2.0
tags:
- kernels
---

# diffmm-attention

Differential attention, `(softmax(Q1 K1ᵀ) - lam * softmax(Q2 K2ᵀ)) V` (Ye et al., ICLR 2025),
grouped differential attention and softmax attention of the library diffmm. Masks are causal,
sliding windows, prefixes, packed documents, padding, and all their combinations; keys may be
grouped, and there may be fewer queries than keys (decoding). Kernels are written in Triton, and for
Hopper GPUs in Gluon.

```python
import torch
from kernels import get_kernel

attention = get_kernel("{repo}")
q = torch.randn(2, 128, 8, 2, 64, device="cuda", dtype=torch.bfloat16)  # [B, N, H, 2, D]
k = torch.randn(2, 128, 4, 2, 64, device="cuda", dtype=torch.bfloat16)  # [B, M, G, 2, D]
v = torch.randn(2, 128, 4, 128, device="cuda", dtype=torch.bfloat16)  # [B, M, G, E]
mask = attention.AttentionMask(causal=True)
out = attention.diff_attention(q, k, v, 0.8, mask=mask)  # [B, N, H, E]
```
"""


def modules() -> dict[str, Path]:
    """The modules of `diffmm.ops` that the package needs, by their names in it.

    Raises:
        ValueError: If one of them imports another part of diffmm; the message names both.
    """
    found: dict[str, Path] = {}
    wanted = list(PUBLIC.values())
    while wanted:
        name = wanted.pop()
        file = file_of(name)
        if name in found or file is None:
            continue
        found[name] = file
        for parent in parents(name):
            wanted.append(parent)
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                imported = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module is not None:
                # A name that is imported from a package may be a module.
                imported = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
            else:
                continue
            for module in imported:
                if module.startswith("diffmm.ops."):
                    wanted.append(module.removeprefix("diffmm.ops."))
                elif module.split(".")[0] == "diffmm":
                    raise ValueError(
                        f"{file.relative_to(ROOT)} imports {module}: the package can hold only "
                        f"modules of diffmm.ops, imported by their own names"
                    )
    return found


def file_of(name: str) -> Path | None:
    """The file of a module of `diffmm.ops`; None if there is no such module."""
    path = SOURCE.joinpath(*name.split("."))
    files = (path / "__init__.py", path.with_suffix(".py"))
    return next((file for file in files if file.is_file()), None)


def parents(name: str) -> list[str]:
    """The packages that contain a module."""
    parts = name.split(".")
    return [".".join(parts[:count]) for count in range(1, len(parts))]


def packaged(file: Path) -> str:
    """The text of a module in the package."""
    text = file.read_text(encoding="utf-8")
    dots = "." * len(file.relative_to(SOURCE).parts)
    text, num_operators = re.subn(r'"diffmm::(\w+)"', r'add_op_namespace_prefix("\1")', text)
    text, num_types = re.subn(r'"diffmm\.ops\.(\w+)"', r'add_op_namespace_prefix("\1")', text)
    if num_operators or num_types:
        # Among the imports of the module, before the last one.
        last = list(re.finditer(r"^(?:from|import) .*$", text, flags=re.MULTILINE))[-1]
        line = f"from {dots}_ops import add_op_namespace_prefix"
        text = f"{text[: last.start()]}{line}\n{text[last.start() :]}"
    text = re.sub(r"\bfrom diffmm\.ops\.", f"from {dots}", text)
    return re.sub(r"\bdiffmm\.(ops\.)?(?=[A-Za-z_])", f"{PACKAGE}.", text)


def package() -> dict[str, str]:
    """The text of every file of the package by its path in it."""
    found = modules()
    texts = {
        file.relative_to(SOURCE).as_posix(): packaged(file) for _, file in sorted(found.items())
    }
    imports = "\n".join(f"from .{module} import {name}" for name, module in PUBLIC.items())
    names = ", ".join(f'"{name}"' for name in sorted(PUBLIC))
    texts["__init__.py"] = INIT.format(imports=imports, names=names)
    digest = hashlib.sha256(repr(sorted(texts.items())).encode()).hexdigest()[:12]
    texts["_ops.py"] = OPS.format(namespace=f"_{PACKAGE}_{digest}")
    return texts


def write(target: Path, repo_id: str | None = None) -> Path:
    """Write the folder, whole or not at all.

    Args:
        target: The folder, which must not exist or be empty.
        repo_id: Name of the repository on the hub.

    Raises:
        ValueError: If the folder is not empty.
    """
    if target.is_file() or (target.is_dir() and any(target.iterdir())):
        raise ValueError(f"{target} exists already: give another target, or remove it")
    hub = "" if repo_id is None else f'\n[general.hub]\nrepo-id = "{repo_id}"\n'
    files = {f"torch-ext/{PACKAGE}/{name}": text for name, text in package().items()}
    files["build.toml"] = BUILD.format(hub=hub)
    files["README.md"] = README.format(repo=repo_id or "user/diffmm-attention")
    files["LICENSE"] = (ROOT / "LICENSE").read_text(encoding="utf-8")
    with appearing(target) as unfinished:
        for name, text in files.items():
            file = unfinished / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text, encoding="utf-8")
    return target


def main(arguments: list[str] | None = None) -> None:
    """Write the folder and print its name."""
    parser = argparse.ArgumentParser(description="Package diffmm's attention for the Kernel Hub.")
    parser.add_argument("target", type=Path, help="the folder to write; it must not exist")
    parser.add_argument("--repo-id", metavar="NAME", help="the repository on the hub, user/name")
    options = parser.parse_args(arguments)
    try:
        print(write(options.target, options.repo_id))
    except ValueError as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    main()
