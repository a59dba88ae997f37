"""The extension's own convolutions (float32, CPU): everything pending is applied while an operand is loaded, everything that follows while
the result is in cache, so that a convolution reads its maps once, writes one, and nothing lies between.

What they do not take (other dtypes, groups, very large kernels) goes to the vendor's library between passes. The contracts are those of
:mod:`fusedres.backends.eager`; ``passes`` is the backend module.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import vendor

_MAX_KERNEL = 16
_MAX_STRIDE = 16  # product of both strides: the phases of an input gradient


def serves(weight: Tensor, geometry, affine: Tensor | None, act: str) -> bool:
    """Whether the native kernels take this convolution."""
    return (
        weight.dtype == torch.float32
        and weight.dim() == 4
        and geometry.groups == 1
        and max(weight.shape[2:]) <= _MAX_KERNEL
        and geometry.stride[0] * geometry.stride[1] <= _MAX_STRIDE
        and (act == "none" or affine is not None)
    )


def _numbers(geometry) -> list[int]:
    return [*geometry.stride, *geometry.padding, *geometry.dilation]


def _out_shape(x: Tensor, weight: Tensor, geometry) -> tuple[int, ...]:
    spatial = (
        (x.shape[2 + i] + 2 * geometry.padding[i] - geometry.dilation[i] * (weight.shape[2 + i] - 1) - 1)
        // geometry.stride[i] + 1
        for i in range(2)
    )  # fmt: skip
    return (x.shape[0], weight.shape[0], *spatial)


def conv_forward(
    passes, x, affine, act, weight, bias, geometry, *, out=None, stats=None, out_affine=None, residual=None, residual_affine=None,
    out_act="none",
) -> Tensor:  # fmt: skip
    """See :func:`fusedres.backends.eager.conv_forward`."""
    if not serves(weight, geometry, affine, act):
        return vendor.conv_forward(
            passes, x, affine, act, weight, bias, geometry, out=out, stats=stats, out_affine=out_affine, residual=residual,
            residual_affine=residual_affine, out_act=out_act,
        )  # fmt: skip
    if out is None:
        out = torch.empty(_out_shape(x, weight, geometry), dtype=x.dtype, memory_format=torch.channels_last)
    torch.ops.fusedres_cpp.conv_forward(
        x, affine, act == "relu", weight, bias, _numbers(geometry), out, stats, out_affine, residual, residual_affine,
        out_act == "relu",
    )  # fmt: skip
    return out


def conv_backward(
    passes, grad, raw, coeff, x, affine, saved, act, weight, geometry, *, need_dx=True, need_dw=True, dx=None, base=None,
    accumulate=False, scaled=False, sums=None,
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    """See :func:`fusedres.backends.eager.conv_backward`."""
    if not serves(weight, geometry, affine, act):
        return vendor.conv_backward(
            passes, grad, raw, coeff, x, affine, saved, act, weight, geometry, need_dx=need_dx, need_dw=need_dw, dx=dx, base=base,
            accumulate=accumulate, scaled=scaled, sums=sums,
        )  # fmt: skip
    relu, numbers, dweight = act == "relu", _numbers(geometry), None
    if need_dw:
        dweight = torch.empty_like(weight)
        torch.ops.fusedres_cpp.conv_wgrad(grad, raw, coeff, x, affine, relu, numbers, dweight)
    if not need_dx:
        return None, dweight
    if dx is None:
        dx = torch.empty(x.shape, dtype=x.dtype, memory_format=torch.channels_last)
    below = affine is not None or sums is not None
    torch.ops.fusedres_cpp.conv_dgrad(
        grad, raw, coeff, weight, numbers, dx, x if below else None, affine, relu, saved, base, accumulate, scaled, sums
    )
    return dx, dweight
