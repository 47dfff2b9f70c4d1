"""ONNX files, by torch's exporter, checked with ONNX Runtime."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffmm.export.program import METADATA_KEY, Call, quiet, trace
from diffmm.export.signature import Signature

OPSET = 20
"""Version of ONNX's operators in the files; ONNX Runtime reads the files from version 1.18
on."""

EXTERNAL_BYTES = 1_500_000_000
"""Weights of more bytes are written to a file beside the model (`model.onnx.data`), because an ONNX
file has at most 2 GiB."""


def write_onnx(signature: Signature, file: Path, metadata: Mapping[str, Any]) -> Call:
    """Write a model as ONNX, and return it as ONNX Runtime runs it on the CPU. The metadata are in
    the entry `diffmm` of the model's `metadata_props`.

    Raises:
        ValueError: If a package is not installed.
    """
    try:
        import onnxruntime
        import onnxscript  # noqa: F401 (torch's exporter needs it)
        from onnx_ir import Shape
    except ImportError as error:
        raise ValueError(f"ONNX files need more packages ({error}): install diffmm[onnx]") from None
    with quiet():
        program = torch.onnx.export(
            trace(signature),
            dynamo=True,
            opset_version=OPSET,
            input_names=[port.name for port in signature.inputs],
            output_names=[port.name for port in signature.outputs],
            verbose=False,
        )
    assert program is not None
    graph = program.model.graph
    for values, ports in ((graph.inputs, signature.inputs), (graph.outputs, signature.outputs)):
        for value, port in zip(values, ports, strict=True):
            value.shape = Shape(port.shape)  # with the names of axes
    for node in graph.all_nodes():
        node.metadata_props.clear()  # torch's notes for its developers, larger than the graph
    program.model.metadata_props[METADATA_KEY] = json.dumps(metadata)
    size = sum(p.numel() * p.element_size() for p in signature.module.parameters())
    program.save(file, external_data=size > EXTERNAL_BYTES)
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])

    def call(*inputs: Tensor) -> list[Tensor]:
        named = zip(signature.inputs, inputs, strict=True)
        results = session.run(None, {port.name: tensor.numpy() for port, tensor in named})
        return [torch.from_numpy(result) for result in results]

    return call
