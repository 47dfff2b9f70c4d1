"""Run by `test_packaged_kernels.py` with TRITON_INTERPRET=1, with the package on the path and
diffmm hidden: every operator of the package against its reference."""

import sys
from importlib.abc import MetaPathFinder


class Hidden(MetaPathFinder):
    """Makes diffmm seem not to be installed."""

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("diffmm", "datamodules"):
            raise ModuleNotFoundError(f"{name} is hidden", name=name)


hidden = Hidden()
sys.meta_path.insert(0, hidden)

import diffmm_attention  # noqa: E402
import torch  # noqa: E402
import triton.runtime.interpreter as interpreter  # noqa: E402
from diffmm_attention import (  # noqa: E402
    AttentionMask,
    diff_attention,
    grouped_diff_attention,
    softmax_attention,
)

patch = interpreter._patch_lang_tensor


def patched(tensor, scope):
    """Triton 3.6 converts one-element arrays to integers in a way that numpy 2.4 rejects."""
    patch(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))


interpreter._patch_lang_tensor = patched
assert "diffmm" not in sys.modules
assert diffmm_attention.__file__ is not None
torch.manual_seed(0)
documents = torch.tensor([[0] * 7 + [1] * 10])
masks = [AttentionMask(causal=True, window=9), AttentionMask(causal=True, document_ids=documents)]
k, v = torch.randn(1, 17, 1, 2, 16), torch.randn(1, 17, 1, 16)
lam = torch.rand(1, 17, 2)


def check(op, *inputs, mask, backends=("sdpa", "triton")):
    """Compare backends with the reference, and the gradients if an input requires them."""
    found = {}
    for backend in ("reference", *backends):
        out = op(*inputs, mask=mask, backend=backend)
        weights = torch.linspace(-1, 1, out.numel()).view_as(out)
        grads = torch.autograd.grad((out * weights).sum(), inputs) if out.requires_grad else ()
        found[backend] = (out, *grads)
    for backend in backends:
        for actual, expected in zip(found[backend], found["reference"], strict=True):
            torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)


window, packed = masks
inputs = [torch.randn(1, 17, 1, 2, 16), k, v, lam[..., :1]]
check(diff_attention, *(x.detach().clone().requires_grad_() for x in inputs), mask=packed)
check(softmax_attention, torch.randn(1, 1, 2, 16), k[..., 0, :], v, mask=window)
signals = torch.randn(1, 17, 1, 3, 16)
check(grouped_diff_attention, signals, k[..., 0, :], v, lam, mask=window, backends=["sdpa"])

with torch.no_grad():  # decoding
    q, mask = torch.randn(1, 1, 2, 2, 16), AttentionMask(causal=True)
    decoded = [diff_attention(q, k, v, 0.5, mask=mask, backend=b) for b in ("reference", "triton")]
torch.testing.assert_close(*decoded, atol=1e-4, rtol=1e-4)

# diffmm itself can be used beside the package.
sys.meta_path.remove(hidden)
import diffmm.ops.diff_attention.triton  # noqa: E402

ours = diffmm.ops.diff_attention(q, k, v, 0.5, mask=diffmm.ops.AttentionMask(causal=True))
torch.testing.assert_close(ours, decoded[0], atol=1e-4, rtol=1e-4)
print("all equal")
