"""The primitives as PyTorch operators, ``torch.ops.fusedres.*``: schemas and fake implementations for compilers and exporters.

Each operator runs the primitive of its name on the backend that :mod:`fusedres.dispatch` chooses for the tensors, and on ``eager`` where
that leaves only the original modules. What is written is an argument (``out``, ``stats``, ``sums``, ...), never a result that shares
memory with one. Shapes, dtypes and equations: :mod:`fusedres.backends.eager`. No autograd formulas: gradients are the schedules' affair.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import dispatch
from .backends import eager
from .backends.eager import Geometry, Pool


def _backend(x: Tensor):
    return dispatch.resolve(x.device, x.dtype) or eager


def _geometry(stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], groups: int) -> Geometry:
    return Geometry(tuple(stride), tuple(padding), tuple(dilation), groups)


def _pool(kind: str, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int]) -> Pool:
    return Pool(kind, tuple(kernel), tuple(stride), tuple(padding))


@torch.library.custom_op("fusedres::statistics", mutates_args=("stats",))
def statistics(x: Tensor, stats: Tensor) -> None:
    """Mean and M2 of every channel of x, into ``stats``."""
    _backend(x).statistics(x, stats)


@torch.library.custom_op("fusedres::conv_forward", mutates_args=("out", "stats"))
def conv_forward(
    x: Tensor,
    affine: Tensor | None,
    act: str,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    out: Tensor,
    stats: Tensor | None,
    out_affine: Tensor | None,
    residual: Tensor | None,
    residual_affine: Tensor | None,
    out_act: str,
) -> None:
    """A convolution with its prologue and epilogue, into ``out``."""
    geometry = _geometry(stride, padding, dilation, groups)
    _backend(x).conv_forward(
        x, affine, act, weight, bias, geometry, out=out, stats=stats, out_affine=out_affine, residual=residual,
        residual_affine=residual_affine, out_act=out_act,
    )  # fmt: skip


@torch.library.custom_op("fusedres::conv_dgrad", mutates_args=("dx", "sums"))
def conv_dgrad(
    grad: Tensor,
    raw: Tensor | None,
    coeff: Tensor | None,
    x: Tensor,
    affine: Tensor | None,
    saved: Tensor | None,
    act: str,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    dx: Tensor,
    base: Tensor | None,
    accumulate: bool,
    scaled: bool,
    sums: Tensor | None,
) -> None:
    """The input gradient of a convolution, under the prologue's activation, into ``dx``."""
    geometry = _geometry(stride, padding, dilation, groups)
    _backend(x).conv_backward(
        grad, raw, coeff, x, affine, saved, act, weight, geometry, need_dw=False, dx=dx, base=base, accumulate=accumulate,
        scaled=scaled, sums=sums,
    )  # fmt: skip


@torch.library.custom_op("fusedres::conv_wgrad", mutates_args=())
def conv_wgrad(
    grad: Tensor,
    raw: Tensor | None,
    coeff: Tensor | None,
    x: Tensor,
    affine: Tensor | None,
    act: str,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """The weight gradient of a convolution, contiguous."""
    geometry = _geometry(stride, padding, dilation, groups)
    _, dweight = _backend(x).conv_backward(
        grad, raw, coeff, x, affine, None, act, weight, geometry, need_dx=False
    )  # fmt: skip
    return dweight.contiguous()


@conv_wgrad.register_fake
def _(grad, raw, coeff, x, affine, act, weight, stride, padding, dilation, groups):
    return weight.new_empty(weight.shape)


@torch.library.custom_op("fusedres::join_forward", mutates_args=("out", "stats"))
def join_forward(
    raw: Tensor,
    affine: Tensor | None,
    residual: Tensor | None,
    residual_affine: Tensor | None,
    act: str,
    out: Tensor,
    stats: Tensor | None,
) -> None:
    """BatchNorm, shortcut and activation in one pass, into ``out``."""
    _backend(raw).join_forward(raw, affine, residual, residual_affine, act, out=out, stats=stats)


@torch.library.custom_op("fusedres::join_backward", mutates_args=("sums", "residual_sums"))
def join_backward(
    grad: Tensor,
    raw: Tensor,
    affine: Tensor | None,
    saved: Tensor | None,
    act: str,
    sums: Tensor | None,
    residual: Tensor | None,
    residual_affine: Tensor | None,
    residual_saved: Tensor | None,
    residual_sums: Tensor | None,
) -> Tensor:
    """dz and the sums; with act "none", where dz is grad itself, the result has no elements."""
    dz = _backend(raw).join_backward(
        grad, raw, affine, saved, act, sums=sums, residual=residual, residual_affine=residual_affine,
        residual_saved=residual_saved, residual_sums=residual_sums,
    )  # fmt: skip
    return grad.new_empty(0) if act == "none" else dz


@join_backward.register_fake
def _(grad, raw, affine, saved, act, sums, residual, residual_affine, residual_saved, residual_sums):
    return grad.new_empty(0) if act == "none" else torch.empty_like(raw, memory_format=torch.channels_last)


@torch.library.custom_op("fusedres::highway_forward", mutates_args=("out",))
def highway_forward(
    raw: Tensor, affine: Tensor | None, act: str, gate: Tensor, gate_affine: Tensor | None, carry: Tensor, out: Tensor
) -> None:
    """Candidate and carry, mixed by their gate in one pass, into ``out``."""
    _backend(raw).highway_forward(raw, affine, act, gate, gate_affine, carry, out=out)


@torch.library.custom_op("fusedres::highway_backward", mutates_args=("sums", "gate_sums"))
def highway_backward(
    grad: Tensor,
    raw: Tensor,
    affine: Tensor | None,
    saved: Tensor | None,
    act: str,
    gate: Tensor,
    gate_affine: Tensor | None,
    gate_saved: Tensor | None,
    carry: Tensor,
    sums: Tensor | None,
    gate_sums: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of candidate, gate and carry, and the sums."""
    return _backend(raw).highway_backward(
        grad, raw, affine, saved, act, gate, gate_affine, gate_saved, carry, sums=sums, gate_sums=gate_sums
    )


@highway_backward.register_fake
def _(grad, raw, affine, saved, act, gate, gate_affine, gate_saved, carry, sums, gate_sums):
    return tuple(torch.empty_like(raw, memory_format=torch.channels_last) for _ in range(3))


@torch.library.custom_op("fusedres::grad_affine", mutates_args=("out",))
def grad_affine(grad: Tensor, raw: Tensor | None, coeff: Tensor, out: Tensor) -> None:
    """``p * grad + q * raw + r``, into ``out``."""
    _backend(grad).grad_affine(grad, raw, coeff, out=out)


@torch.library.custom_op("fusedres::pool_forward", mutates_args=("out", "stats"))
def pool_forward(
    x: Tensor,
    affine: Tensor | None,
    act: str,
    kind: str,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    out: Tensor,
    stats: Tensor | None,
) -> Tensor:
    """A pooled, normalised map into ``out``; the result is the index of the maxima, without elements for a mean."""
    _, index = _backend(x).pool_forward(x, affine, act, _pool(kind, kernel, stride, padding), out=out, stats=stats)
    return x.new_empty(0, dtype=torch.uint8) if index is None else index


@pool_forward.register_fake
def _(x, affine, act, kind, kernel, stride, padding, out, stats):
    if kind == "mean":
        return x.new_empty(0, dtype=torch.uint8)
    return torch.empty_like(out, dtype=torch.uint8, memory_format=torch.channels_last)


@torch.library.custom_op("fusedres::pool_backward", mutates_args=("sums", "dx"))
def pool_backward(
    grad: Tensor,
    index: Tensor | None,
    x: Tensor,
    affine: Tensor | None,
    saved: Tensor | None,
    act: str,
    kind: str,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    sums: Tensor | None,
    coeff: Tensor | None,
    dx: Tensor | None,
) -> None:
    """The sums of a pooled map's BatchNorm, or with ``coeff`` the gradient of x into ``dx``."""
    window = _pool(kind, kernel, stride, padding)
    _backend(x).pool_backward(grad, index, x, affine, saved, act, window, sums=sums, coeff=coeff, dx=dx)


@torch.library.custom_op("fusedres::bn_coefficients", mutates_args=("running_mean", "running_var"))
def bn_coefficients(
    stats: Tensor,
    count: int,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    momentum: float,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Affine and saved of a BatchNorm in training; updates the running statistics."""
    return _backend(stats).bn_coefficients(stats, count, weight, bias, running_mean, running_var, momentum, eps)


@bn_coefficients.register_fake
def _(stats, count, weight, bias, running_mean, running_var, momentum, eps):
    return stats.new_empty(stats.shape), stats.new_empty(stats.shape)


@torch.library.custom_op("fusedres::bn_frozen", mutates_args=())
def bn_frozen(
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Affine and saved, in ``dtype``, of a BatchNorm that normalises by its running statistics."""
    return _backend(running_mean).bn_frozen(weight, bias, running_mean, running_var, eps, dtype)


@bn_frozen.register_fake
def _(weight, bias, running_mean, running_var, eps, dtype):
    shape = (2, running_mean.numel())
    return running_mean.new_empty(shape, dtype=dtype), running_mean.new_empty(shape, dtype=dtype)


@torch.library.custom_op("fusedres::bn_backward", mutates_args=("coeff",))
def bn_backward(
    sums: Tensor, count: int, weight: Tensor | None, saved: Tensor, training: bool, coeff: Tensor, accumulate: bool
) -> None:
    """The pending form of the gradient behind a BatchNorm, into ``coeff``."""
    _backend(sums).bn_backward(sums, count, weight, saved, training, coeff, accumulate)
