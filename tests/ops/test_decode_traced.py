"""Decoding in a compiled graph, for a GPU that is not present: one graph for every number of keys,
which launches the kernels itself and knows which tensors they write."""

import contextlib

import pytest
import torch
from torch._functorch.aot_autograd import aot_module_simplified, make_boxed_func
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from diffmm.ops import AttentionMask, diff_attention

triton = pytest.importorskip("triton", reason="needs the package triton")


@pytest.fixture
def hopper(monkeypatch):
    """To find the tensors that a kernel writes, torch has Triton compile it for the driver's
    GPU."""
    from triton.backends.compiler import GPUTarget
    from triton.backends.driver import DriverBase

    from diffmm.ops.diff_attention.triton import op
    from diffmm.ops.diff_attention.triton.tiles import GPU

    class Driver(DriverBase):
        def __init__(self):
            pass

        @staticmethod
        def is_active():
            return True

        def get_current_target(self):
            return GPUTarget("cuda", 90, 32)

        def map_python_to_cpp_type(self, name):
            return name

        def get_active_torch_device(self):
            return torch.device("cuda", 0)

        def get_benchmarker(self):
            return None

    monkeypatch.setattr(triton.runtime.driver, "_active", Driver())
    monkeypatch.setattr(op, "gpu_of", lambda tensor: GPU((9, 0), 132))
    monkeypatch.setattr(op, "_on", lambda tensor: contextlib.nullcontext())


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(("batch", "C"), [(1, 2), (40, 2), (40, 1)])
def test_one_graph_launches_the_kernels(hopper, batch, C, padded):
    from diffmm.ops.diff_attention.triton.decode import FEW_KEYS

    launches = []

    def compiler(graph, _):
        launches.append(
            [
                node.kwargs["tensors_to_clone"]
                for node in graph.graph.nodes
                if "triton_kernel_wrapper" in str(node.target)
            ]
        )
        assert "diff_attention" not in str([node.target for node in graph.graph.nodes])
        return graph

    def step(q, keys, values, lam, padding, length):
        mask = AttentionMask(causal=True, key_padding=padding[:, :length] if padded else None)
        k, v = keys[:, :length], values[:, :length]
        return diff_attention(q * 2, k, v, lam, mask=mask, backend="triton")

    compiled = torch.compile(
        step, fullgraph=True, dynamic=True,
        backend=lambda graph, inputs: aot_module_simplified(graph, inputs, fw_compiler=compiler),
    )  # fmt: skip
    with torch.no_grad(), FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True):
        shapes = (batch, 1, 8, 2, 64), (batch, 900, 4, C, 64), (batch, 900, 4, 128)
        q, k, v = (torch.empty(s, device="cuda", dtype=torch.bfloat16) for s in shapes)
        lam = torch.empty(batch, 1, 8, device="cuda")
        padding = torch.empty(batch, 900, device="cuda", dtype=torch.bool)
        for length in (500, 501, 420):
            assert compiled(q, k, v, lam, padding, length).shape == (batch, 1, 8, 128)
    looks = [["ranges"]] * (padded and batch * 420 > FEW_KEYS)
    assert launches == [[*looks, ["part", "part_lse"], ["out"]]]


def test_layers_of_a_compiled_model_share_the_labels_of_documents(monkeypatch):
    """One call serves the forward and the backward pass of both layers."""
    from diffmm.ops.diff_attention.triton import op

    monkeypatch.setattr(op, "INTERPRETED", True)  # accepts tensors on the CPU; nothing runs
    counts = []

    def compiler(graph, _):
        names = [str(node.target) for node in graph.graph.nodes]
        counts.append([sum(f"diffmm.{op}" in n for n in names) for op in ("document", "diff")])
        return make_boxed_func(graph)

    def two_layers(q, k, v, lam, documents):
        mask = AttentionMask(causal=True, document_ids=documents)
        for _ in range(2):
            q = diff_attention(q, k, v, lam, mask=mask, backend="triton").unflatten(3, (2, 64))
        return q

    compiled = torch.compile(
        two_layers, fullgraph=True,
        backend=lambda graph, inputs: aot_module_simplified(
            graph, inputs, fw_compiler=compiler, bw_compiler=compiler,
            partition_fn=min_cut_rematerialization_partition,
        ),
    )  # fmt: skip
    with FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True):
        shapes = (2, 300, 4, 2, 64), (2, 300, 4, 2, 64), (2, 300, 4, 128)
        q, k, v = (torch.empty(s, dtype=torch.bfloat16, requires_grad=True) for s in shapes)
        lam = torch.empty(2, 300, 4, requires_grad=True)
        documents = torch.empty(2, 300, dtype=torch.int64)
        compiled(q, k, v, lam, documents).sum().backward()
    assert counts == [[1, 2], [0, 2]]
