"""The activations on the device: value and derivative of every kind, in float32. A kind that is not here does not compile.

``ACT`` is an :class:`~fusedres.kernels.operands.Activation`, of which a kernel reads ``kind`` and ``slope``.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(-x)), and one minus that without cancellation; both exponents are negative, so that neither overflows."""
    e = tl.exp(-tl.abs(x))
    larger = 1.0 / (1.0 + e)
    smaller = e * larger
    return tl.where(x < 0.0, smaller, larger), tl.where(x < 0.0, larger, smaller)


@triton.jit
def tanh_of_softplus(x):
    """tanh(log(1 + exp(x))), and one minus that without cancellation: with e = exp(-|x|) fractions of e that never overflow."""
    e = tl.exp(-tl.abs(x))
    grown = tl.where(x < 0.0, e * (e + 2.0), 1.0 + 2.0 * e)
    rest = tl.where(x < 0.0, 2.0, 2.0 * e * e)
    whole = 1.0 / (grown + rest)
    return grown * whole, rest * whole


@triton.jit
def activate(z, ACT: tl.constexpr):
    """The activation of ``z``: NaN stays (a plain maximum would drop it)."""
    if ACT.kind == "none":
        pass
    elif ACT.kind == "relu":
        z = tl.maximum(z, 0.0, propagate_nan=tl.PropagateNan.ALL)
    elif ACT.kind == "leaky_relu":
        z = tl.where(z > 0.0, z, z * ACT.slope)
    elif ACT.kind == "relu6":
        z = tl.where(z < 0.0, 0.0, tl.where(z > 6.0, 6.0, z))
    elif ACT.kind == "hardswish":
        z = z * tl.where(z < -3.0, 0.0, tl.where(z > 3.0, 6.0, z + 3.0)) * (1.0 / 6.0)
    elif ACT.kind == "silu":
        below, _ = sigmoid(z)
        z = z * below
    elif ACT.kind == "gelu":
        z = z * (0.5 + 0.5 * tl.erf(z * 0.7071067811865476))
    elif ACT.kind == "gelu_tanh":
        # (1 + tanh(u)) / 2 is the sigmoid of 2 u
        below, _ = sigmoid(1.5957691216057308 * (z + 0.044715 * z * z * z))
        z = z * below
    elif ACT.kind == "mish":
        gate, _ = tanh_of_softplus(z)
        z = z * gate
    else:
        tl.static_assert(False, "kernels/activations.py has no value for this kind of activation")
    return z


@triton.jit
def gradient(dz, z, ACT: tl.constexpr):
    """``dz`` times the derivative of the activation at ``z``, which at its kinks is the one that torch takes."""
    if ACT.kind == "none":
        pass
    elif ACT.kind == "relu":
        dz = tl.where(z <= 0.0, 0.0, dz)
    elif ACT.kind == "leaky_relu":
        dz = tl.where(z > 0.0, dz, dz * ACT.slope)
    elif ACT.kind == "relu6":
        dz = tl.where((z <= 0.0) | (z >= 6.0), 0.0, dz)
    elif ACT.kind == "hardswish":
        dz = tl.where(z <= -3.0, 0.0, tl.where(z >= 3.0, dz, dz * (z * (1.0 / 3.0) + 0.5)))
    elif ACT.kind == "silu":
        below, above = sigmoid(z)
        dz = dz * (below * (1.0 + z * above))
    elif ACT.kind == "gelu":
        below = 0.5 + 0.5 * tl.erf(z * 0.7071067811865476)
        dz = dz * (below + z * tl.exp(z * z * -0.5) * 0.3989422804014327)
    elif ACT.kind == "gelu_tanh":
        below, above = sigmoid(1.5957691216057308 * (z + 0.044715 * z * z * z))
        dz = dz * (below + z * below * above * (1.5957691216057308 * (1.0 + 0.134145 * z * z)))
    elif ACT.kind == "mish":
        gate, rest = tanh_of_softplus(z)
        below, _ = sigmoid(z)
        dz = dz * (gate + z * below * (rest * (1.0 + gate)))
    else:
        tl.static_assert(False, "kernels/activations.py has no derivative for this kind of activation")
    return dz
