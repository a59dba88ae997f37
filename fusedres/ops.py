"""The primitives as PyTorch operators, ``torch.ops.fusedres.*``: schemas and fake implementations for compilers and exporters.

Each operator runs the primitive of its name on the backend that :mod:`fusedres.backends.select` chooses for the tensors, and on ``eager``
where that leaves only the original modules. What is written is an argument (``out``, ``stats``, ``sums``, ...), never a result that shares
memory with one. A schema knows tensors and numbers only, so that the operands (:mod:`fusedres.operands`) stand here field by field. Shapes,
dtypes and equations: :mod:`fusedres.backends.contract`. No autograd formulas: gradients are the affair of :mod:`fusedres.autograd`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .backends import select
from .backends.contract import Backend
from .backends.eager import BACKEND as EAGER
from .operands import Epilogue, GradTarget, LazyGrad, LazyMap
from .specs import Geometry, Norm, Pool


def _backend(x: Tensor) -> Backend:
    return select.resolve(x.device, x.dtype) or EAGER


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
    scale_shift: Tensor | None,
    act: str,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    out: Tensor,
    stats: Tensor | None,
    out_scale_shift: Tensor | None,
    residual: Tensor | None,
    residual_scale_shift: Tensor | None,
    out_act: str,
) -> None:
    """A convolution with its prologue and epilogue, into ``out``."""
    geometry = _geometry(stride, padding, dilation, groups)
    added = None if residual is None else LazyMap(residual, residual_scale_shift)
    epilogue = Epilogue(out, stats, out_scale_shift, added, out_act)
    _backend(x).conv_forward(LazyMap(x, scale_shift, act), weight, bias, geometry, epilogue)


@torch.library.custom_op("fusedres::conv_dgrad", mutates_args=("dx", "sums"))
def conv_dgrad(
    grad: Tensor,
    raw: Tensor | None,
    coeff: Tensor | None,
    x: Tensor,
    scale_shift: Tensor | None,
    mean_invstd: Tensor | None,
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
    lazy, target = LazyMap(x, scale_shift, act, mean_invstd), GradTarget(dx, base, accumulate, scaled, sums)
    _backend(x).conv_backward(LazyGrad(grad, raw, coeff), lazy, weight, geometry, target, need_dw=False)


@torch.library.custom_op("fusedres::conv_wgrad", mutates_args=())
def conv_wgrad(
    grad: Tensor,
    raw: Tensor | None,
    coeff: Tensor | None,
    x: Tensor,
    scale_shift: Tensor | None,
    act: str,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """The weight gradient of a convolution, contiguous."""
    geometry = _geometry(stride, padding, dilation, groups)
    lazy = LazyMap(x, scale_shift, act)
    _, dweight = _backend(x).conv_backward(LazyGrad(grad, raw, coeff), lazy, weight, geometry, target=None)
    assert dweight is not None
    return dweight.contiguous()


@conv_wgrad.register_fake
def _(grad, raw, coeff, x, scale_shift, act, weight, stride, padding, dilation, groups):
    return weight.new_empty(weight.shape)


@torch.library.custom_op("fusedres::add_act_forward", mutates_args=("out", "stats"))
def add_act_forward(
    raw: Tensor,
    scale_shift: Tensor | None,
    residual: Tensor | None,
    residual_scale_shift: Tensor | None,
    act: str,
    out: Tensor,
    stats: Tensor | None,
) -> None:
    """BatchNorm, shortcut and activation in one pass, into ``out``."""
    added = None if residual is None else LazyMap(residual, residual_scale_shift)
    _backend(raw).add_act_forward(LazyMap(raw, scale_shift), added, act, out=out, stats=stats)


@torch.library.custom_op("fusedres::add_act_backward", mutates_args=("sums", "residual_sums"))
def add_act_backward(
    grad: Tensor,
    raw: Tensor,
    scale_shift: Tensor | None,
    mean_invstd: Tensor | None,
    act: str,
    sums: Tensor | None,
    residual: Tensor | None,
    residual_scale_shift: Tensor | None,
    residual_mean_invstd: Tensor | None,
    residual_sums: Tensor | None,
) -> Tensor:
    """dz and the sums; with act "none", where dz is grad itself, the result has no elements."""
    added = None if residual is None else LazyMap(residual, residual_scale_shift, "none", residual_mean_invstd)
    lazy = LazyMap(raw, scale_shift, "none", mean_invstd)
    dz = _backend(raw).add_act_backward(grad, lazy, added, act, sums=sums, residual_sums=residual_sums)
    return grad.new_empty(0) if act == "none" else dz


@add_act_backward.register_fake
def _(
    grad, raw, scale_shift, mean_invstd, act, sums, residual, residual_scale_shift, residual_mean_invstd, residual_sums
):
    return grad.new_empty(0) if act == "none" else torch.empty_like(raw, memory_format=torch.channels_last)


@torch.library.custom_op("fusedres::highway_forward", mutates_args=("out",))
def highway_forward(
    raw: Tensor,
    scale_shift: Tensor | None,
    act: str,
    gate: Tensor,
    gate_scale_shift: Tensor | None,
    carry: Tensor,
    out: Tensor,
) -> None:
    """Candidate and carry, mixed by their gate in one pass, into ``out``."""
    _backend(raw).highway_forward(LazyMap(raw, scale_shift, act), LazyMap(gate, gate_scale_shift), carry, out=out)


@torch.library.custom_op("fusedres::highway_backward", mutates_args=("sums", "gate_sums"))
def highway_backward(
    grad: Tensor,
    raw: Tensor,
    scale_shift: Tensor | None,
    mean_invstd: Tensor | None,
    act: str,
    gate: Tensor,
    gate_scale_shift: Tensor | None,
    gate_mean_invstd: Tensor | None,
    carry: Tensor,
    sums: Tensor | None,
    gate_sums: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of candidate, gate and carry, and the sums."""
    lazy = LazyMap(raw, scale_shift, act, mean_invstd)
    lazy_gate = LazyMap(gate, gate_scale_shift, "none", gate_mean_invstd)
    return _backend(raw).highway_backward(grad, lazy, lazy_gate, carry, sums=sums, gate_sums=gate_sums)


@highway_backward.register_fake
def _(grad, raw, scale_shift, mean_invstd, act, gate, gate_scale_shift, gate_mean_invstd, carry, sums, gate_sums):
    return tuple(torch.empty_like(raw, memory_format=torch.channels_last) for _ in range(3))


@torch.library.custom_op("fusedres::apply_grad_coeff", mutates_args=("out",))
def apply_grad_coeff(grad: Tensor, raw: Tensor | None, coeff: Tensor, out: Tensor) -> None:
    """``p * grad + q * raw + r``, into ``out``."""
    _backend(grad).apply_grad_coeff(LazyGrad(grad, raw, coeff), out=out)


@torch.library.custom_op("fusedres::pool_forward", mutates_args=("out", "stats"))
def pool_forward(
    x: Tensor,
    scale_shift: Tensor | None,
    act: str,
    kind: str,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    out: Tensor,
    stats: Tensor | None,
) -> Tensor:
    """A pooled, normalised map into ``out``; the result is the index of the maxima, without elements for a mean."""
    window = _pool(kind, kernel, stride, padding)
    _, index = _backend(x).pool_forward(LazyMap(x, scale_shift, act), window, out=out, stats=stats)
    return x.new_empty(0, dtype=torch.uint8) if index is None else index


@pool_forward.register_fake
def _(x, scale_shift, act, kind, kernel, stride, padding, out, stats):
    if kind == "mean":
        return x.new_empty(0, dtype=torch.uint8)
    return torch.empty_like(out, dtype=torch.uint8, memory_format=torch.channels_last)


@torch.library.custom_op("fusedres::pool_backward", mutates_args=("sums", "dx"))
def pool_backward(
    grad: Tensor,
    index: Tensor | None,
    x: Tensor,
    scale_shift: Tensor | None,
    mean_invstd: Tensor | None,
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
    lazy = LazyMap(x, scale_shift, act, mean_invstd)
    _backend(x).pool_backward(grad, index, lazy, window, sums=sums, coeff=coeff, dx=dx)


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
    """Affine and mean_invstd of a BatchNorm in training; updates the running statistics."""
    norm = Norm(weight, bias, running_mean, running_var, True, momentum, eps, "none")
    return _backend(stats).bn_coefficients(norm, stats, count)


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
    """Affine and mean_invstd, in ``dtype``, of a BatchNorm that normalises by its running statistics."""
    norm = Norm(weight, bias, running_mean, running_var, False, 0.0, eps, "none")
    return _backend(running_mean).bn_frozen(norm, dtype)


@bn_frozen.register_fake
def _(weight, bias, running_mean, running_var, eps, dtype):
    shape = (2, running_mean.numel())
    return running_mean.new_empty(shape, dtype=dtype), running_mean.new_empty(shape, dtype=dtype)


@torch.library.custom_op("fusedres::bn_backward", mutates_args=("coeff",))
def bn_backward(
    sums: Tensor,
    count: int,
    weight: Tensor | None,
    mean_invstd: Tensor,
    training: bool,
    coeff: Tensor,
    accumulate: bool,
) -> None:
    """The pending form of the gradient behind a BatchNorm, into ``coeff``."""
    norm = Norm(weight, None, None, None, training, 0.0, 0.0, "none")
    _backend(sums).bn_backward(norm, sums, count, mean_invstd, coeff, accumulate)
