"""Programs of models, by `torch.export`."""

import io
import json
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram

from diffmm.export.signature import Signature

METADATA_KEY = "diffmm"
"""The name of the metadata in a file of any format, as JSON."""

TOLERANCE = 1e-4
"""Largest difference of a program's outputs from the model's, relative to the largest output."""

Call = Callable[..., Any]
"""Takes the inputs of a program in order and returns its outputs."""


@torch.no_grad()
def trace(signature: Signature) -> ExportedProgram:
    """The program of a model, for all sizes of its dynamic axes. It has no paths of source files,
    which torch records by default."""
    with quiet():
        program = torch.export.export(
            signature.module,
            signature.example(),
            dynamic_shapes=signature.dynamic_shapes(),
            # Conditions on sizes that torch cannot prove are checked when the program runs.
            prefer_deferred_runtime_asserts_over_guards=True,
        )
    for module in program.graph_module.modules():
        for node in getattr(getattr(module, "graph", None), "nodes", ()):
            for name in ("stack_trace", "nn_module_stack", "source_fn_stack", "torch_fn"):
                node.meta.pop(name, None)
    return program


@contextmanager
def _in_memory(file: Path) -> Iterator[io.BytesIO]:
    """Yield a buffer, which is written to a file at the end of the `with` statement: torch ends the
    process if it cannot write an archive itself, as on a full disk."""
    written = io.BytesIO()
    yield written
    file.write_bytes(written.getbuffer())


def write_pt2(signature: Signature, file: Path, metadata: Mapping[str, Any]) -> Call:
    """Write a program for `torch.export.load`, and return the program as it is read back. The
    metadata are in the extra file `diffmm`."""
    with _in_memory(file) as written:
        extra_files = {METADATA_KEY: json.dumps(metadata)}
        torch.export.save(trace(signature), written, extra_files=extra_files)
    with quiet():
        return torch.export.load(file).module()


def write_aoti(signature: Signature, file: Path, metadata: Mapping[str, Any]) -> Call:
    """Write a program as machine code (AOTInductor), and return it as it is loaded. It runs on the
    kind of device and CPU on which it was compiled.

    Raises:
        ValueError: If there is no C++ compiler.
    """
    from torch._inductor import aoti_compile_and_package, aoti_load_package
    from torch._inductor.cpp_builder import get_cpp_compiler

    try:
        get_cpp_compiler()
    except RuntimeError as error:
        raise ValueError(
            f"machine code needs a C++ compiler, which torch does not find "
            f"({str(error).splitlines()[0]}): install one, or use the format pt2"
        ) from error
    # Values of this setting are strings.
    settings = {"aot_inductor.metadata": {METADATA_KEY: json.dumps(metadata)}}
    program = trace(signature)
    with quiet():
        with _in_memory(file) as written:
            aoti_compile_and_package(program, package_path=written, inductor_configs=settings)
        return aoti_load_package(str(file))


@torch.no_grad()
def largest_difference(signature: Signature, program: Call) -> float:
    """The largest difference between the outputs of a program and of its model, on random inputs of
    other sizes than the program was traced with, relative to the largest output; NaN if any output
    has a NaN.

    Raises:
        ValueError: If outputs have other shapes than the model's; the message names the output.
    """
    inputs = signature.example(**signature.other_sizes())
    ours, theirs = (_as_tuple(each(*inputs)) for each in (program, signature.module))
    differences = []
    for port, one, other in zip(signature.outputs, ours, theirs, strict=True):
        if one.shape != other.shape:
            raise ValueError(
                f"the output {port.name} of the program has shape {tuple(one.shape)}, and the "
                f"model's {tuple(other.shape)}: nothing was written"
            )
        size = other.abs().max().clamp(min=1e-30)
        differences.append((one.float() - other.float()).abs().max() / size)
    return float(torch.stack(differences).max())  # which keeps NaN, unlike Python's max


def _as_tuple(outputs: Any) -> tuple[Tensor, ...]:
    return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)


@contextmanager
def quiet() -> Iterator[None]:
    """Hide torch's warnings about its own code in the body of the `with` statement."""
    with warnings.catch_warnings():
        for category in (FutureWarning, DeprecationWarning, UserWarning):
            warnings.simplefilter("ignore", category)
        yield
