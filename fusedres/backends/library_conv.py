"""Convolutions by the library (oneDNN, cuDNN) between the passes of a backend.

The composition that every backend can fall back to: a pending scale, shift and activation is materialised by one pass, the statistics are
one reduction, and the input gradient's epilogue is one pass. ``passes`` is the backend whose passes these are; the contracts are those of
:class:`~fusedres.backends.contract.Backend`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..operands import Epilogue, GradTarget, LazyGrad, LazyMap
from ..specs import Geometry
from .contract import Backend
from .layout import as_map, empty_map, has_symbols


def _convolved(passes: Backend, a: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
    if passes.stands_in and has_symbols(*a.shape):
        # torch's own answer would hold for some numbers of images alone, since it asks which library computes so many
        size = geometry.out_size(tuple(a.shape[2:]), tuple(weight.shape[2:]))
        return empty_map((a.shape[0], weight.shape[0], *size), a)
    return torch.ops.aten.convolution(
        a, weight, bias, geometry.stride, geometry.padding, geometry.dilation, False, [0] * len(geometry.padding),
        geometry.groups,
    )  # fmt: skip


def _gradients(
    passes: Backend, grad: Tensor, a: Tensor, weight: Tensor, geometry: Geometry, need_da: bool, need_dw: bool
) -> tuple[Tensor | None, Tensor | None]:
    if passes.stands_in and has_symbols(*a.shape):
        return empty_map(tuple(a.shape), a) if need_da else None, torch.empty_like(weight) if need_dw else None
    return torch.ops.aten.convolution_backward(
        grad, a, weight, None, geometry.stride, geometry.padding, geometry.dilation, False, [0] * len(geometry.padding),
        geometry.groups, [need_da, need_dw, False],
    )[:2]  # fmt: skip


def conv_forward(
    passes: Backend, x: LazyMap, weight: Tensor, bias: Tensor | None, geometry: Geometry, epilogue: Epilogue
) -> Tensor:
    """See :meth:`~fusedres.backends.contract.Backend.conv_forward`."""
    a = x.raw if x.is_plain else passes.materialize(x)
    raw = as_map(_convolved(passes, a, weight, bias, geometry))
    if not epilogue.is_plain or epilogue.out is not None:
        # nobody else has the library's output: where no place is given it is overwritten
        out = raw if epilogue.out is None else epilogue.out
        return passes.add_act_forward(
            LazyMap(raw, epilogue.scale_shift), epilogue.residual, epilogue.act, out=out, stats=epilogue.stats
        )
    if epilogue.stats is not None:
        passes.statistics(raw, epilogue.stats)
    return raw


def conv_backward(
    passes: Backend,
    grad: LazyGrad,
    x: LazyMap,
    weight: Tensor,
    geometry: Geometry,
    target: GradTarget | None,
    need_dw: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """See :meth:`~fusedres.backends.contract.Backend.conv_backward`."""
    g = grad.grad if grad.coeff is None else passes.apply_grad_coeff(grad)
    # the input gradient alone needs x only for its shape
    a = x.raw if x.is_plain or not need_dw else passes.materialize(x)
    da, dweight = _gradients(passes, g, a, weight, geometry, target is not None, need_dw)
    if target is None or da is None:
        return None, dweight
    da = as_map(da)
    return da if x.is_plain and target.is_plain else passes.dgrad_epilogue(da, x, target), dweight
