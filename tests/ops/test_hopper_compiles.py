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


def compiled(dtype, C, *, looked_up=False, **constants):
    from triton.backends.compiler import GPUTarget

    from diffmm.ops.diff_attention.triton.hopper import _key_kernel

    D, E = 128, 256
    types = {
        "q_desc": f"tensordesc<{dtype}[1, 64, 1, 1, {D}],{layout(5)}>",
        "g_desc": f"tensordesc<{dtype}[1, 64, 1, {E}],{layout(4)}>",
        "k_desc": f"tensordesc<{dtype}[1, 64, 1, 1, {D}],{layout(5)}>",
        "v_desc": f"tensordesc<{dtype}[1, 64, 1, {E}],{layout(4)}>",
        "ds_desc": f"tensordesc<{dtype}[64, 64],{layout(2)}>",
        "rows_desc": f"tensordesc<fp32[8, 64],{layout(2, 0, 32)}>",
        "dk": f"*{dtype}", "dv": f"*{dtype}", "scale": "fp32",
    }  # fmt: skip
    constants |= {"C": C, "D": D, "E": E, "BLOCK_D": D, "BLOCK_E": E}
    looks = {"window": "i32", "prefix": "*i32", "documents": "*i64", "padding": "*i8"}
    looks["ranges"] = "*i32"
    if looked_up:
        types |= looks
    else:
        constants |= dict.fromkeys(looks)
    names = _key_kernel.arg_names
    signature = {n: "constexpr" if n in constants else types.get(n, "i32") for n in names}
    aligned = {
        (index,): [["tt.divisibility", 16]]
        for index, name in enumerate(names)
        if signature[name].startswith("*")
    }
    source = gluon.GluonASTSource(_key_kernel, signature, constants, aligned)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 8})


def report(kernel, folder):
    """What the assembler says of a kernel."""
    ptx = folder / "kernel.ptx"
    ptx.write_text(kernel.asm["ptx"])
    command = [PTXAS, "-v", "-arch=sm_90a", ptx, "-o", folder / "kernel.cubin"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize(("C", "causal"), [(2, True), (2, False), (1, True)])
def test_in_registers_and_in_flight(C, causal, dtype, tmp_path):
    kernel = compiled(dtype, C, CAUSAL=causal, FOLDED=causal)
    said = report(kernel, tmp_path)
    spilled = int(re.search(r"(\d+) bytes spill stores", said)[1])
    # What the tensor cores' operands and a tile's temporaries leave over: never the accumulators.
    assert spilled <= 64, said
    # The assembler waits for each product where it cannot see through the schedule.
    assert "serialized" not in said, said
    assert kernel.metadata.shared <= 227 * 1024


def test_looked_up_masks(tmp_path):
    said = report(compiled("bf16", 2, looked_up=True, CAUSAL=True, FOLDED=False), tmp_path)
    assert int(re.search(r"(\d+) bytes spill stores", said)[1]) <= 128, said
    assert "serialized" not in said, said
