"""Convolutions by the vendor's library (oneDNN, cuDNN) between the passes of a backend.

The composition that every backend can fall back to: the pending affine is materialised by one pass, the statistics are one
reduction, and the input gradient's epilogue is one pass. ``passes`` is any backend module; the contracts are those of
:mod:`fusedres.backends.eager`.
"""

from __future__ import annotations

import torch
from torch import Tensor


def conv_forward(
    passes, x, affine, act, weight, bias, geometry, *, out=None, stats=None, out_affine=None, residual=None, residual_affine=None,
    out_act="none",
) -> Tensor:  # fmt: skip
    """See :func:`fusedres.backends.eager.conv_forward`."""
    a = passes.join_forward(x, affine, None, None, act) if affine is not None or act != "none" else x
    raw = torch.ops.aten.convolution(
        a, weight, bias, geometry.stride, geometry.padding, geometry.dilation, False, [0] * len(geometry.padding),
        geometry.groups,
    )  # fmt: skip
    raw = as_map(raw)
    if out_affine is not None or residual is not None or out_act != "none":
        return passes.join_forward(raw, out_affine, residual, residual_affine, out_act, out=out, stats=stats)
    if out is not None:
        return passes.join_forward(raw, None, None, None, "none", out=out, stats=stats)
    if stats is not None:
        passes.statistics(raw, stats)
    return raw


def conv_backward(
    passes, grad, raw, coeff, x, affine, saved, act, weight, geometry, *, need_dx=True, need_dw=True, dx=None, base=None,
    accumulate=False, scaled=False, sums=None,
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    """See :func:`fusedres.backends.eager.conv_backward`."""
    g = grad if coeff is None else passes.grad_affine(grad, raw, coeff)
    pending = affine is not None or act != "none"
    # the input gradient alone needs x only for its shape
    a = passes.join_forward(x, affine, None, None, act) if pending and need_dw else x
    da, dw, _ = torch.ops.aten.convolution_backward(
        g, a, weight, None, geometry.stride, geometry.padding, geometry.dilation, False, [0] * len(geometry.padding),
        geometry.groups, [need_dx, need_dw, False],
    )  # fmt: skip
    if not need_dx:
        return None, dw
    da = as_map(da)
    if not pending and sums is None and base is None and not scaled and not accumulate and dx is None:
        return da, dw
    return (
        passes.dgrad_epilogue(
            da, x, affine, saved, act, dx=dx, base=base, accumulate=accumulate, scaled=scaled, sums=sums
        ),
        dw,
    )


_FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}


def format_of(dims: int) -> torch.memory_format:
    """The memory format of maps of so many dimensions."""
    return _FORMATS.get(dims, torch.contiguous_format)


def as_map(x: Tensor) -> Tensor:
    """``x`` in channels_last (itself where it is already, or is a channel slice of a map)."""
    return x if is_slice(x) else x.contiguous(memory_format=format_of(x.dim()))


def is_slice(x: Tensor) -> bool:
    """Whether ``x`` is a channel slice of a wider map: rows of channels side by side, one pitch apart."""
    if x.dim() not in _FORMATS or x.stride(1) != 1:
        return False
    pitch = None
    rows = 1
    # from the fastest dimension to the slowest; the stride of a dimension of size 1 says nothing
    for size, stride in zip((x.shape[0], *x.shape[2:])[::-1], (x.stride(0), *x.stride()[2:])[::-1], strict=True):
        if size > 1:
            pitch = stride if pitch is None else pitch
            if stride != rows * pitch:
                return False
        rows *= size
    return pitch is not None and pitch > x.shape[1]
