"""The C++ extension on CPU: every pass reads and writes each map once, vectorised, on torch's threads.

The contracts are those of :mod:`fusedres.backends.eager`; what is fresh is allocated here, and the operators write into it.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor

from ..activations import parse
from . import native as _convolutions
from .eager import Pool, accum_dtype

name = "cpp"

try:
    from fusedres import _C
except ImportError as error:
    _C, _missing = None, error
else:
    _C.cpu_capability()  # a wrong FUSEDRES_CPU_CAPABILITY is an error now, not in the middle of a step

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_this = sys.modules[__name__]  # what the convolutions call for the passes between them


def supports(device: torch.device, dtype: torch.dtype) -> str | None:
    """None where this backend serves maps of ``dtype`` on ``device``, else the reason in words that complete a sentence."""
    if device.type != "cpu":
        return f"its kernels run on CPU, not on {device.type}"
    if dtype not in _DTYPES:
        return f"it computes in floating point, not {dtype}"
    if _C is None:
        return (
            f"the C++ extension is not there ({_missing}); with a C++ compiler at hand, type FUSEDRES_BUILD=cpu pip install "
            "--no-build-isolation . in the folder of the sources"
        )
    return None


def cpu_capability() -> str | None:
    """The instruction set of the kernels (``default``, ``avx2`` or ``avx512``), None without the extension."""
    return None if _C is None else _C.cpu_capability()


if _C is not None:
    _ops = torch.ops.fusedres_cpp
    _statistics = _ops.statistics.default
    _join_forward = _ops.join_forward.default
    _join_backward = _ops.join_backward.default
    _highway_forward = _ops.highway_forward.default
    _highway_backward = _ops.highway_backward.default
    _grad_affine = _ops.grad_affine.default
    _dgrad_epilogue = _ops.dgrad_epilogue.default
    _pool_forward = _ops.pool_forward.default
    _pool_backward = _ops.pool_backward.default
    _bn_coefficients = _ops.bn_coefficients.default
    _bn_frozen = _ops.bn_frozen.default
    _bn_backward = _ops.bn_backward.default
    # every operator only writes into its arguments: for tracing there is nothing to infer
    for _name in (
        "statistics", "join_forward", "join_backward", "grad_affine", "dgrad_epilogue", "pool_forward", "pool_backward",
        "bn_coefficients", "bn_frozen", "bn_backward", "conv_forward", "conv_dgrad", "conv_wgrad", "highway_forward", "highway_backward",
    ):  # fmt: skip
        torch.library.register_fake(f"fusedres_cpp::{_name}", lambda *args: None)


def _like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.channels_last)


def statistics(x: Tensor, stats: Tensor) -> None:
    """See :func:`fusedres.backends.eager.statistics`."""
    _statistics(x, stats)


def conv_forward(x, affine, act, weight, bias, geometry, **epilogue) -> Tensor:
    """See :func:`fusedres.backends.eager.conv_forward`."""
    return _convolutions.conv_forward(_this, x, affine, act, weight, bias, geometry, **epilogue)


def conv_backward(
    grad, raw, coeff, x, affine, saved, act, weight, geometry, **epilogue
) -> tuple[Tensor | None, Tensor | None]:
    """See :func:`fusedres.backends.eager.conv_backward`."""
    return _convolutions.conv_backward(_this, grad, raw, coeff, x, affine, saved, act, weight, geometry, **epilogue)


def dgrad_epilogue(
    da: Tensor,
    x: Tensor,
    affine: Tensor | None,
    saved: Tensor | None,
    act: str,
    *,
    dx: Tensor | None = None,
    base: Tensor | None = None,
    accumulate: bool = False,
    scaled: bool = False,
    sums: Tensor | None = None,
) -> Tensor:
    """See :func:`fusedres.backends.eager.dgrad_epilogue`. Without ``dx``, ``da`` becomes it."""
    if dx is None:
        dx = da
    _dgrad_epilogue(da, x, affine, saved, *parse(act).code, dx, base, accumulate, scaled, sums)
    return dx


def join_forward(
    raw: Tensor,
    affine: Tensor | None,
    residual: Tensor | None,
    residual_affine: Tensor | None,
    act: str,
    *,
    out: Tensor | None = None,
    stats: Tensor | None = None,
) -> Tensor:
    """See :func:`fusedres.backends.eager.join_forward`."""
    if out is None:
        out = _like(raw)
    _join_forward(raw, affine, residual, residual_affine, *parse(act).code, out, stats)
    return out


def join_backward(
    grad: Tensor,
    raw: Tensor,
    affine: Tensor | None,
    saved: Tensor | None,
    act: str,
    *,
    sums: Tensor | None = None,
    residual: Tensor | None = None,
    residual_affine: Tensor | None = None,
    residual_saved: Tensor | None = None,
    residual_sums: Tensor | None = None,
) -> Tensor:
    """See :func:`fusedres.backends.eager.join_backward`."""
    dz = None if act == "none" else _like(raw)
    if dz is not None or sums is not None or residual_sums is not None:
        _join_backward(
            grad, raw, affine, saved, *parse(act).code, dz, sums, residual, residual_affine, residual_saved, residual_sums
        )  # fmt: skip
    return grad if dz is None else dz


def _is_relu(act: str) -> bool:
    if act not in ("none", "relu"):
        raise ValueError(f"a highway's pass knows the activations 'none' and 'relu', found {act!r}")
    return act == "relu"


def highway_forward(
    raw: Tensor,
    affine: Tensor | None,
    act: str,
    gate: Tensor,
    gate_affine: Tensor | None,
    carry: Tensor,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """See :func:`fusedres.backends.eager.highway_forward`."""
    if out is None:
        out = _like(raw)
    _highway_forward(raw, affine, _is_relu(act), gate, gate_affine, carry, out)
    return out


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
    *,
    sums: Tensor | None = None,
    gate_sums: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`fusedres.backends.eager.highway_backward`."""
    written = _like(raw), _like(raw), _like(raw)
    _highway_backward(
        grad, raw, affine, saved, _is_relu(act), gate, gate_affine, gate_saved, carry, *written, sums, gate_sums
    )
    return written


def grad_affine(grad: Tensor, raw: Tensor | None, coeff: Tensor, *, out: Tensor | None = None) -> Tensor:
    """See :func:`fusedres.backends.eager.grad_affine`."""
    if out is None:
        out = _like(grad)
    _grad_affine(grad, raw, coeff, out)
    return out


def pool_forward(
    x: Tensor,
    affine: Tensor | None,
    act: str,
    pool: Pool,
    *,
    out: Tensor | None = None,
    stats: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """See :func:`fusedres.backends.eager.pool_forward`."""
    shape = (
        *x.shape[:2],
        *((x.shape[2 + i] + 2 * pool.padding[i] - pool.kernel[i]) // pool.stride[i] + 1 for i in (0, 1)),
    )
    if out is None:
        out = torch.empty(shape, dtype=x.dtype, memory_format=torch.channels_last)
    index = torch.empty(shape, dtype=torch.uint8, memory_format=torch.channels_last) if pool.kind == "max" else None
    _pool_forward(x, affine, *parse(act).code, [*pool.kernel, *pool.stride, *pool.padding], out, index, stats)
    return out, index


def pool_backward(
    grad: Tensor,
    index: Tensor | None,
    x: Tensor,
    affine: Tensor | None,
    saved: Tensor | None,
    act: str,
    pool: Pool,
    *,
    sums: Tensor | None = None,
    coeff: Tensor | None = None,
    dx: Tensor | None = None,
) -> Tensor | None:
    """See :func:`fusedres.backends.eager.pool_backward`."""
    if coeff is not None and dx is None:
        dx = _like(x)
    window = [*pool.kernel, *pool.stride, *pool.padding]
    _pool_backward(grad, index, x, affine, saved, *parse(act).code, window, sums, coeff, dx)
    return None if coeff is None else dx


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
    """See :func:`fusedres.backends.eager.bn_coefficients`."""
    affine = torch.empty(stats.shape, dtype=stats.dtype)  # fresh: stats may be columns of a wider tensor
    saved = torch.empty_like(affine)
    _bn_coefficients(stats, count, weight, bias, running_mean, running_var, momentum, eps, affine, saved)
    if running_mean is not None:
        # the operator writes through pointers, which autograd's version counters do not see, and these two the user can
        torch.autograd.graph.increment_version((running_mean, running_var))
    return affine, saved


def bn_frozen(
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """See :func:`fusedres.backends.eager.bn_frozen`."""
    affine = torch.empty((2, running_mean.numel()), dtype=accum_dtype(dtype))
    saved = torch.empty_like(affine)
    _bn_frozen(weight, bias, running_mean, running_var, eps, affine, saved)
    return affine, saved


def bn_backward(
    sums: Tensor,
    count: int,
    weight: Tensor | None,
    saved: Tensor,
    training: bool,
    coeff: Tensor,
    accumulate: bool = False,
) -> None:
    """See :func:`fusedres.backends.eager.bn_backward`."""
    _bn_backward(sums, count, weight, saved, training, coeff, accumulate)
