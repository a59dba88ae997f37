"""The extension's own convolutions (CPU; float32, and bfloat16 where the processor multiplies pairs of it): everything pending is applied
while an operand is loaded, everything that follows while the result is in cache, so that a convolution reads its maps once, writes one,
and nothing lies between.

What they do not take (other dtypes, groups, odd channels in bfloat16, very large kernels) goes to the vendor's library between passes.
The contracts are those of :mod:`fusedres.backends.eager`; ``passes`` is the backend module.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ..activations import parse
from . import vendor

_ops = torch.ops.fusedres_cpp
_MAX_KERNEL = 16
_MAX_STRIDE = 16  # product of both strides: the phases of an input gradient


@functools.cache
def _bfloat16() -> bool:
    """Whether this process has kernels for bfloat16 that are worth having."""
    from .. import _C

    return _C.cpu_capability() == "avx512_bf16"


def _takes(dtype: torch.dtype, weight: torch.Size) -> bool:
    if dtype == torch.bfloat16:  # in pairs of channels
        return weight[0] % 2 == weight[1] % 2 == 0 and _bfloat16()
    return dtype == torch.float32


@functools.lru_cache(maxsize=4096)
def _plan(
    shape: torch.Size, weight: torch.Size, dtype: torch.dtype, geometry
) -> tuple[tuple[int, ...], list[int]] | None:
    """``(the shape of the output, the geometry as the operators take it)`` for an input of ``shape``, None where the native kernels do not
    take the convolution."""
    if (
        len(weight) != 4
        or not _takes(dtype, weight)
        or geometry.groups != 1
        or max(weight[2:]) > _MAX_KERNEL
        or geometry.stride[0] * geometry.stride[1] > _MAX_STRIDE
    ):
        return None
    spatial = (
        (size + 2 * pad - dilation * (kernel - 1) - 1) // stride + 1
        for size, kernel, stride, pad, dilation in zip(shape[2:], weight[2:], *geometry[:3], strict=True)
    )
    return (shape[0], weight[0], *spatial), [*geometry.stride, *geometry.padding, *geometry.dilation]


def conv_forward(
    passes, x, affine, act, weight, bias, geometry, *, out=None, stats=None, out_affine=None, residual=None, residual_affine=None,
    out_act="none",
) -> Tensor:  # fmt: skip
    """See :func:`fusedres.backends.eager.conv_forward`."""
    plan = _plan(x.shape, weight.shape, weight.dtype, geometry)
    if plan is None or (affine is None and act != "none"):
        return vendor.conv_forward(
            passes, x, affine, act, weight, bias, geometry, out=out, stats=stats, out_affine=out_affine, residual=residual,
            residual_affine=residual_affine, out_act=out_act,
        )  # fmt: skip
    if out is None:
        out = torch.empty(plan[0], dtype=x.dtype, memory_format=torch.channels_last)
    _ops.conv_forward(
        x, affine, *parse(act).code, weight, bias, plan[1], out, stats, out_affine, residual, residual_affine,
        *parse(out_act).code,
    )  # fmt: skip
    return out


def conv_backward(
    passes, grad, raw, coeff, x, affine, saved, act, weight, geometry, *, need_dx=True, need_dw=True, dx=None, base=None,
    accumulate=False, scaled=False, sums=None,
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    """See :func:`fusedres.backends.eager.conv_backward`."""
    plan = _plan(x.shape, weight.shape, weight.dtype, geometry)
    if plan is None or (affine is None and act != "none"):
        return vendor.conv_backward(
            passes, grad, raw, coeff, x, affine, saved, act, weight, geometry, need_dx=need_dx, need_dw=need_dw, dx=dx, base=base,
            accumulate=accumulate, scaled=scaled, sums=sums,
        )  # fmt: skip
    code, numbers, dweight = parse(act).code, plan[1], None
    if need_dw:
        dweight = torch.empty_like(weight)
        _ops.conv_wgrad(grad, raw, coeff, x, affine, *code, numbers, dweight)
    if not need_dx:
        return None, dweight
    if dx is None:
        dx = torch.empty(x.shape, dtype=x.dtype, memory_format=torch.channels_last)
    below = affine is not None or sums is not None
    _ops.conv_dgrad(
        grad, raw, coeff, weight, numbers, dx, x if below else None, affine, *code, saved, base, accumulate, scaled, sums
    )  # fmt: skip
    return dx, dweight
