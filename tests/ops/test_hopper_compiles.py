"""The Hopper kernels compiled without a GPU: within the registers, and with products in flight."""

import re
import subprocess
from pathlib import Path

import pytest

triton = pytest.importorskip("triton", reason="needs the package triton")
gluon = pytest.importorskip("triton.experimental.gluon._runtime")

if not triton.__version__.startswith("3.6."):
    pytest.skip("the kernels are for Triton 3.6", allow_module_level=True)

PTXAS = Path(triton.__file__).parent / "backends/nvidia/bin/ptxas"


def layout(rank, swizzle=128, bits=16):
    return (
        f"NVMMASharedLayout(swizzle_byte_width={swizzle}, element_bitwidth={bits}, rank={rank}, "
        f"transposed=False, fp4_padded=False, cga_layout=[])"
    )


D, E = 128, 256
LOOKS = {"window": "i32", "prefix": "*i32", "documents": "*i64", "padding": "*i8", "ranges": "*i32"}


def compiled(kernel, dtype, *, num_warps, looked_up=False, **constants):
    from triton.backends.compiler import GPUTarget

    types = {
        "q_desc": f"tensordesc<{dtype}[1, 64, 1, 1, {D}],{layout(5)}>",
        "g_desc": f"tensordesc<{dtype}[1, 64, 1, {E}],{layout(4)}>",
        "k_desc": f"tensordesc<{dtype}[1, 64, 1, 1, {D}],{layout(5)}>",
        "v_desc": f"tensordesc<{dtype}[1, 64, 1, {E}],{layout(4)}>",
        "ds_desc": f"tensordesc<{dtype}[64, 64],{layout(2)}>",
        "rows_desc": f"tensordesc<fp32[8, 64],{layout(2, 0, 32)}>",
        "scale": "fp32", "lam": "*fp32", "lse": "*fp32",
        **dict.fromkeys(("dk", "dv", "out", "second"), f"*{dtype}"),
    }  # fmt: skip
    constants |= {"E": E, "BLOCK_D": D, "BLOCK_E": E}
    if looked_up:
        types |= LOOKS
    else:
        constants |= dict.fromkeys(LOOKS)
    names = kernel.arg_names
    signature = {n: "constexpr" if n in constants else types.get(n, "i32") for n in names}
    aligned = {
        (index,): [["tt.divisibility", 16]]
        for index, name in enumerate(names)
        if signature[name].startswith("*")
    }
    constants = {name: value for name, value in constants.items() if name in names}
    source = gluon.GluonASTSource(kernel, signature, constants, aligned)
    options = {"num_warps": num_warps}
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)


def key_kernel(dtype, C, **options):
    from diffmm.ops.diff_attention.triton.wide_backward import _key_kernel

    return compiled(_key_kernel, dtype, num_warps=8, C=C, D=D, **options)


def forward_kernel(dtype, C, **options):
    from diffmm.ops.diff_attention.triton.wide_forward import _forward_kernel

    return compiled(_forward_kernel, dtype, num_warps=4, C=C, **options)


def report(kernel, folder):
    """What the assembler says of a kernel."""
    ptx = folder / "kernel.ptx"
    ptx.write_text(kernel.asm["ptx"])
    command = [PTXAS, "-v", "-arch=sm_90a", ptx, "-o", folder / "kernel.cubin"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def check(kernel, folder, most_bytes):
    said = report(kernel, folder)
    assert int(re.search(r"(\d+) bytes spill stores", said)[1]) <= most_bytes, said
    # The assembler waits for each product where it cannot see through the schedule.
    assert "serialized" not in said, said
    assert kernel.metadata.shared <= 227 * 1024


# What the products' operands and a tile's temporaries leave over may spill, never accumulators.
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize(("C", "causal"), [(2, True), (2, False), (1, True)])
def test_in_registers_and_in_flight(C, causal, dtype, tmp_path):
    check(key_kernel(dtype, C, CAUSAL=causal, FOLDED=causal), tmp_path, 64)
    check(forward_kernel(dtype, C, CAUSAL=causal), tmp_path, 0)


def test_looked_up_masks(tmp_path):
    check(key_kernel("bf16", 2, looked_up=True, CAUSAL=True, FOLDED=False), tmp_path, 128)
    check(forward_kernel("bf16", 2, looked_up=True, CAUSAL=True), tmp_path, 64)
