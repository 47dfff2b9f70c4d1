"""The interpreter of Gluon: its results, and the faults of kernels that it detects."""

import pytest
import torch

triton = pytest.importorskip("triton", reason="needs the package triton")

if not triton.__version__.startswith("3.6."):
    pytest.skip("the interpreter is for Gluon of Triton 3.6", allow_module_level=True)

RACE, DEADLOCK = "RaceError", "DeadlockError"


def launch(name, inputs, *args, seed=0):
    """Run one of the kernels, with descriptors of 64 x 64 blocks of `inputs`."""
    import small_kernels
    from gluon_interpreter import interpreted
    from triton.experimental.gluon import language as gl

    from diffmm.ops.diff_attention.triton.hopper.common import gluon_describe

    layout = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    described = [gluon_describe(x, [64, 64]) for x in inputs]
    with interpreted(seed):
        getattr(small_kernels, name)[(1,)](*described, *args, layout=layout, num_warps=4)


def square(fault):
    a, out = torch.randn(60, 64).bfloat16(), torch.empty(64, 64)
    double = torch.empty_like(a)
    launch("square_kernel", (a, double), out, fault)
    return a, out, double


def gram(fault, seed=0, room=64 * 64):
    a, out = torch.randn(5 * 64, 64).bfloat16(), torch.empty(room)
    launch("gram_kernel", (a,), out, 5, fault, seed=seed)
    return a.float(), out.view(64, 64)


def test_numbers():
    import small_kernels
    from gluon_interpreter import interpreted

    x, y, out = torch.tensor([-7, 7, -4, 5]).int(), torch.ones(8).bfloat16(), torch.empty(56)
    with interpreted():
        small_kernels.numbers_kernel[(1,)](x, y, out, len(x), 2.0**-9)
    divided, rest, wrapped, longer, low, exact, last = out.view(7, 8).tolist()
    assert divided == [-1, 1, -1, 1, *[-2] * 4]
    assert rest == [-3, 3, 0, 1, *[-1] * 4]
    assert wrapped == [2.0**30, -(2.0**30), 0, 2.0**30, *[-(2.0**30)] * 4]
    assert longer == [-7, 7, -4, 5, *[-9] * 4]
    assert low == [1.0] * 8  # A number in the kernel adapts to bfloat16, which has not the bits,
    assert exact == [1.0 + 2.0**-9] * 8  # an argument is float32.
    assert last == [1, 1, 1, *[7] * 5]


def test_copies_and_products():
    a, out, double = square("none")
    whole = torch.nn.functional.pad(a, (0, 0, 0, 4)).float()
    torch.testing.assert_close(out, 2 * whole @ whole)
    assert torch.equal(double, 2 * a)


@pytest.mark.parametrize(
    ("fault", "error", "message"),
    [
        ("not initialized", RACE, r"the barrier of small_kernels.py:\d+ was not initialized"),
        ("too few bytes", RACE, r"too much arrives by .* at .*lacks 0 arrivals, -4096 bytes\)"),
        ("too many bytes", DEADLOCK, r"square_kernel waits at small_kernels.py:\d+ for parity 0 "
         r"of barrier 0 of small_kernels.py:\d+ \(phase 0 lacks 0 arrivals, 8192 bytes\)"),
        ("other phase", RACE, "the load of .* does not wait for the copy of"),
        ("copy not waited for", RACE, "the load of .* does not wait for the copy of"),
        ("nothing brought", RACE, "the load of .* reads what nobody wrote"),
        ("no fence", RACE, "the product of .* needs a fence after small_kernels"),
        ("stored meanwhile", RACE, "the store of .* does not wait for the product of"),
        ("refilled", RACE, "the copy of .* does not wait for the product of"),
        ("another waited for", "TypeError", "unsupported operand .*'UnfinishedProduct'"),
        ("product not waited for", "TypeError", "unsupported operand .*'UnfinishedProduct'"),
        ("stored while copied", RACE, "the store of .* does not wait for the copy of"),
        ("copy back not waited for", RACE, "nobody waits for the copy of"),
    ],
)  # fmt: skip
def test_faults_of_one_partition(fault, error, message):
    with pytest.raises(Exception, match=message) as found:
        square(fault)
    assert found.typename == error


@pytest.mark.parametrize("seed", range(5))
def test_partitions(seed):
    a, out = gram("none", seed)
    torch.testing.assert_close(out, a.T @ a)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(
    ("fault", "error", "message"),
    [
        ("no room", DEADLOCK, r"gram_kernel waits .* for parity \d of barrier .* lacks 1 arrivals"
         r".*\npartition 1 waits .* for parity 0 of .* \(phase 0 lacks 1 arrivals, 0 bytes\)"),
        ("room twice", RACE, "too much arrives by .* at barrier .* lacks -1 arrivals"),
        ("room too early", RACE, "the copy of .* does not wait for the product of"),
        ("no wait for room", RACE, "the copy of .* does not wait for|too much arrives"),
        ("no wait for data", RACE, "the product of .* (reads what nobody wrote|does not wait)"),
        ("fence by another", RACE, "the product of .* needs a fence after small_kernels"),
    ],
)  # fmt: skip
def test_faults_between_partitions(fault, error, message, seed):
    """Detected in any order of execution."""
    with pytest.raises(Exception, match=message) as found:
        gram(fault, seed)
    assert found.typename == error


def test_pointers_stay_in_their_tensor():
    with pytest.raises(IndexError, match="a pointer leaves its tensor of 4095 elements"):
        gram("none", room=4095)
