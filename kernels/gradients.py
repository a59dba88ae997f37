"""What the kernels of a convolution's gradients share on the device: both operands as they are multiplied, and what becomes of the product
of the input's gradient."""

from __future__ import annotations

import triton
import triton.language as tl

from .activations import activate
from .device import normalize
from .layout import offsets


@triton.jit
def pending_gradient(
    grad, raw, p, ps, qs, rs, rows, k, inside, mask, grad_pitch, raw_pitch, ALIGN: tl.constexpr, WIDE: tl.constexpr
):
    """``p * grad + q * raw + r`` in the dtype of grad, with ``ps qs rs`` the values for channels ``k`` (p None: grad itself); zero in rows
    that are not ``inside``."""
    g = tl.load(grad + offsets(rows, grad_pitch, k, ALIGN, WIDE), mask=mask, other=0.0)
    if p is not None:
        z = normalize(g, ps, rs)
        if raw is not None:
            y = tl.load(raw + offsets(rows, raw_pitch, k, ALIGN, WIDE), mask=mask, other=0.0)
            z += y.to(tl.float32) * qs[None, :]
        # r must not leak into pixels that do not exist
        g = tl.where(inside[:, None], z, 0.0).to(grad.dtype.element_ty)
    return g


@triton.jit
def activated(a, scale, scales, shifts, inside, ACT: tl.constexpr):
    """``act(scale * a + shift)`` in the dtype of ``a``; zero in rows that are not ``inside``."""
    if ACT.kind != "none" or scale is not None:
        z = activate(normalize(a, scales, shifts), ACT)
        # the padding's zeros come after scale and shift
        a = tl.where(inside[:, None], z, 0.0).to(a.dtype)
    return a


@triton.jit
def store_gradient(
    dx, base, dz, scales, rows, c, mask, dx_pitch, base_pitch, SCALED: tl.constexpr, ALIGN: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """Writes ``base + (scale if SCALED else 1) * dz``."""
    if SCALED:
        dz *= scales[None, :]
    if base is not None:
        dz += tl.load(base + offsets(rows, base_pitch, c, ALIGN, WIDE), mask=mask, other=0.0).to(tl.float32)
    tl.store(dx + offsets(rows, dx_pitch, c, ALIGN, WIDE), dz.to(dx.dtype.element_ty), mask=mask)
