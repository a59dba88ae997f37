"""Fused Triton kernels: pending forms applied where a map is loaded, statistics and sums reduced where it is written.

The contracts are those of :mod:`fusedres.backends.eager`. Serves GPUs, and CPU tensors through Triton's interpreter
(for tests: set TRITON_INTERPRET=1 before the first import). For each convolution a plan chooses between the fused
kernel and the vendor's convolution between this module's passes; :class:`use_plan` overrides it.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor

from ..kernels import conv_dgrad as _dgrad
from ..kernels import conv_forward as _forward
from ..kernels import conv_wgrad as _wgrad
from ..kernels.batchnorm import bn_backward, bn_coefficients, bn_frozen
from ..kernels.helpers import INTERPRETED, pitch
from ..kernels.join import dgrad_epilogue, grad_affine, join_backward, join_forward, statistics
from ..kernels.pool import pool_backward, pool_forward
from . import vendor

__all__ = [
    "bn_backward", "bn_coefficients", "bn_frozen", "conv_backward", "conv_forward", "dgrad_epilogue", "grad_affine",
    "join_backward", "join_forward", "name", "pool_backward", "pool_forward", "statistics", "supports", "use_plan",
]  # fmt: skip

name = "triton"

PLANS = ("fused", "vendor", "auto")
_plan = "auto"

# A 1x1 convolution of C to K channels does C * K / (C + K) multiply-adds for each value it moves. Below this many it is
# limited by memory on every GPU from sm_80 on, and the arithmetic of the prologue and epilogue hides behind the loads.
MEMORY_BOUND = 256


class use_plan:
    """Choose how convolutions run inside a ``with``: ``"fused"``, ``"vendor"`` or ``"auto"`` (see :func:`_is_fused`).

    For the whole process, as use_backend: autograd runs the backward of CUDA tensors on threads of its own, which a
    context variable would not reach.
    """

    def __init__(self, plan: str) -> None:
        if plan not in PLANS:
            raise ValueError(f"unknown plan {plan!r}: expected one of {', '.join(PLANS)}")
        self._chosen = plan

    def __enter__(self) -> None:
        global _plan
        self._previous, _plan = _plan, self._chosen

    def __exit__(self, *exc: object) -> None:
        global _plan
        _plan = self._previous


def _is_fused(x: Tensor, weight: Tensor, geometry) -> bool:
    """Whether this convolution runs as the fused kernel.

    The automatic choice is a static guess, measured on no GPU, that prefers not to lose: fused where the saved passes
    are certain to outweigh a slower product, which is a dense 1x1 convolution of stride 1 in 16 bits, limited by
    memory, all of whose accesses are 128 bits wide. Everything else is the vendor's: float32 because eager's may use
    TF32 and the kernels' product is IEEE. Under interpretation always fused, since that is what is to be tested.
    """
    if _plan != "auto":
        return _plan == "fused"
    if INTERPRETED:
        return True
    outputs, channels, *kernel = weight.shape
    pointwise = all(k == 1 for k in kernel) and geometry.groups == 1 and not any(geometry.padding)
    return (
        pointwise
        and all(s == 1 for s in geometry.stride)
        and x.element_size() == 2
        and channels % 8 == outputs % 8 == pitch(x) % 8 == 0
        and min(channels, outputs) >= 32
        and channels * outputs <= MEMORY_BOUND * (channels + outputs)
    )


def _passes():
    return sys.modules[__name__]


def conv_forward(
    x: Tensor,
    affine: Tensor | None,
    act: str,
    weight: Tensor,
    bias: Tensor | None,
    geometry,
    *,
    out: Tensor | None = None,
    stats: Tensor | None = None,
    out_affine: Tensor | None = None,
    residual: Tensor | None = None,
    residual_affine: Tensor | None = None,
    out_act: str = "none",
) -> Tensor:
    """See :func:`fusedres.backends.eager.conv_forward`."""
    epilogue = {
        "out": out, "stats": stats, "out_affine": out_affine, "residual": residual, "residual_affine": residual_affine,
        "out_act": out_act,
    }  # fmt: skip
    # the fused kernel reduces the convolution's statistics, not those of a sum
    if _is_fused(x, weight, geometry) and (stats is None or residual is None):
        return _forward.conv_forward(x, affine, act, weight, bias, geometry, **epilogue)
    return vendor.conv_forward(_passes(), x, affine, act, weight, bias, geometry, **epilogue)


def conv_backward(
    grad: Tensor,
    raw: Tensor | None,
    coeff: Tensor | None,
    x: Tensor,
    affine: Tensor | None,
    saved: Tensor | None,
    act: str,
    weight: Tensor,
    geometry,
    *,
    need_dx: bool = True,
    need_dw: bool = True,
    dx: Tensor | None = None,
    base: Tensor | None = None,
    accumulate: bool = False,
    scaled: bool = False,
    sums: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """See :func:`fusedres.backends.eager.conv_backward`."""
    target = {"dx": dx, "base": base, "accumulate": accumulate, "scaled": scaled, "sums": sums}
    if not _is_fused(x, weight, geometry):
        return vendor.conv_backward(
            _passes(), grad, raw, coeff, x, affine, saved, act, weight, geometry,
            need_dx=need_dx, need_dw=need_dw, **target,
        )  # fmt: skip
    dweight = _wgrad.conv_wgrad(grad, raw, coeff, x, affine, act, weight, geometry) if need_dw else None
    dinput = None
    if need_dx:
        dinput = _dgrad.conv_dgrad(grad, raw, coeff, x, affine, saved, act, weight, geometry, **target)
    return dinput, dweight


def supports(device: torch.device, dtype: torch.dtype) -> str | None:
    """None where this backend serves maps of ``dtype`` on ``device``, else the reason, to complete a sentence."""
    if dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"its kernels compute in float16, bfloat16 and float32, not {dtype}"
    if device.type == "cpu":
        if not INTERPRETED:
            return "its kernels run on GPUs (on CPU tensors for tests only, where TRITON_INTERPRET=1 is set at import)"
        return "Triton's interpreter computes bfloat16 wrongly" if dtype == torch.bfloat16 else None
    if device.type != "cuda":
        return f"its kernels run on GPUs, not on {device.type}"
    if INTERPRETED:
        return "TRITON_INTERPRET=1 is set, with which its kernels run on CPU tensors only"
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
        return "its kernels need compute capability 8.0 or newer"
    return None
