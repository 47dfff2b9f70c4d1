"""The per-query float32 vectors that the backward kernels read, stored per head."""

import triton
import triton.language as tl
from torch import Tensor

from diffmm.ops.diff_attention.triton.tiles import (
    MAX_BLOCK,
    UNSPECIALIZED,
    cdiv,
    pad,
    strides_of,
)

LSE1, LSE2, DELTA1, DELTA2, WEIGHT = (tl.constexpr(row) for row in range(5))
"""The log-sum-exps of both maps, `delta_i = dO·O_i`, and the weight of the second map, -lam."""

NUM_ROWS = tl.constexpr(5)


@triton.jit(do_not_specialize=[*UNSPECIALIZED, "P"])
def _rows_kernel(
    grad, out, second, lam, lse, rows, lam_grad, g_b, g_n, g_h, lam_b, lam_n, lam_h, N, P, H,
    E: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    pair = tl.program_id(1).to(tl.int64)
    batch, head = pair // H, pair % H
    n, e = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_E)
    inside = n < N
    mask = inside[:, None] & (e[None, :] < E)
    g_rows = grad + batch * g_b + n[:, None].to(tl.int64) * g_n + head * g_h + e[None, :]
    o_rows = ((batch * N + n[:, None]) * H + head) * E + e[None, :]
    g = tl.load(g_rows, mask=mask, other=0.0).to(tl.float32)
    o = tl.load(out + o_rows, mask=mask, other=0.0).to(tl.float32)
    delta1 = tl.sum(g * o, 1)
    NUM_MAPS: tl.constexpr = 1 if second is None else 2
    lse += (batch * H + head) * NUM_MAPS * N + n
    rows += (batch * H + head) * NUM_ROWS * P + n
    # Rows beyond the end have a log-sum-exp of +inf and so no weight in any sum.
    tl.store(rows + LSE1 * P, tl.load(lse, mask=inside, other=float("inf")))
    if second is not None:
        o2 = tl.load(second + o_rows, mask=mask, other=0.0).to(tl.float32)
        lam_rows = lam + batch * lam_b + n.to(tl.int64) * lam_n + head * lam_h
        weight = tl.load(lam_rows, mask=inside, other=0.0)
        delta2 = tl.sum(g * o2, 1)
        delta1 += weight * delta2
        tl.store(rows + LSE2 * P, tl.load(lse + N, mask=inside, other=float("inf")))
        tl.store(rows + DELTA2 * P, delta2)
        tl.store(rows + WEIGHT * P, -weight)
        tl.store(lam_grad + (batch * N + n) * H + head, -delta2, mask=inside)
    tl.store(rows + DELTA1 * P, delta1)


def query_rows(
    grad: Tensor, out: Tensor, second: Tensor | None, lam: Tensor | None, lse: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Compute the per-query vectors, `[B, H, rows, P]` with queries padded to whole tiles, and the
    gradient of lambda, `[B, N, H]`. With one map, there is no lambda, and only the first rows of
    each kind are written."""
    B, N, H, E = out.shape
    padded = cdiv(N, MAX_BLOCK) * MAX_BLOCK
    rows = lse.new_empty(B, H, NUM_ROWS.value, padded)
    lam_grad = None if lam is None else lam.new_empty(B, N, H)
    block = 16
    _rows_kernel[(padded // block, B * H)](
        grad, out, second, lam, lse, rows, lam_grad, *grad.stride()[:3], *strides_of(lam), N,
        padded, H, E=E, BLOCK_N=block, BLOCK_E=pad(E), num_warps=4,
    )  # fmt: skip
    return rows, lam_grad
