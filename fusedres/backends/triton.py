"""Fused Triton kernels: pending forms applied where a map is loaded, statistics and sums reduced where it is written.

The contracts are those of :mod:`fusedres.backends.eager`. Serves GPUs, and CPU tensors through Triton's interpreter
(for tests: set TRITON_INTERPRET=1 before the first import). For each convolution a plan chooses between the fused
kernel and the vendor's convolution between this module's passes: a measured one (:mod:`fusedres.plans`), else a static
guess; :class:`use_plan` overrides both.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor

from .. import activations, plans
from ..kernels import conv_dgrad as _dgrad
from ..kernels import conv_forward as _forward
from ..kernels import conv_wgrad as _wgrad
from ..kernels.batchnorm import bn_backward, bn_coefficients, bn_frozen
from ..kernels.conv_forward import ConvConfig
from ..kernels.helpers import INTERPRETED, meant, pitch, pitch_or_zero
from ..kernels.highway import highway_backward, highway_forward
from ..kernels.join import dgrad_epilogue, grad_affine, join_backward, join_forward, statistics
from ..kernels.pool import pool_backward, pool_forward
from ..kernels.reduce import Reduction
from ..plans import Plan, Problem
from . import vendor

__all__ = [
    "backward_plans", "backward_problems", "bn_backward", "bn_coefficients", "bn_frozen", "conv_backward", "conv_forward",
    "dgrad_epilogue", "forward_plan", "forward_problem", "grad_affine", "highway_backward", "highway_forward", "join_backward",
    "join_forward", "name", "new_reduction",
    "pool_backward", "pool_forward", "statistics", "supports", "use_plan",
]  # fmt: skip

name = "triton"

PLANS = {"fused": Plan(True), "vendor": Plan(False), "auto": None}
_plan: Plan | None = None

# A 1x1 convolution of C to K channels does C * K / (C + K) multiply-adds for each value it moves. Below this many it is
# limited by memory on every GPU from sm_80 on, and the arithmetic of the prologue and epilogue hides behind the loads.
MEMORY_BOUND = 256


class use_plan:
    """Choose how convolutions run inside a ``with``: ``"fused"``, ``"vendor"``, ``"auto"`` (measured plans, else
    :func:`_is_guessed_fused`), or one :class:`~fusedres.plans.Plan` for all.

    For the whole process, as use_backend: autograd runs the backward of CUDA tensors on threads of its own, which a
    context variable would not reach.
    """

    def __init__(self, plan: str | Plan) -> None:
        if isinstance(plan, str) and plan not in PLANS:
            raise ValueError(f"unknown plan {plan!r}: expected one of {', '.join(PLANS)}")
        self._chosen = PLANS[plan] if isinstance(plan, str) else plan

    def __enter__(self) -> None:
        global _plan
        self._previous, _plan = _plan, self._chosen

    def __exit__(self, *exc: object) -> None:
        global _plan
        _plan = self._previous


def _features(**there: object) -> tuple[str, ...]:
    """The names of what is there; of an activation (``act``, ``out_act``) the kind, because its parameter costs no time."""
    names = []
    for name, value in there.items():
        if isinstance(value, str):
            names += [] if value == "none" else [name.removesuffix("act") + activations.parse(value).kind]
        elif value is not None and value is not False:
            names.append(name)
    return tuple(names)


def _problem(op: str, x: Tensor, y_pitch: int, weight: Tensor, geometry, features: tuple[str, ...]) -> Problem:
    dtype = str(x.dtype).removeprefix("torch.")
    return Problem(op, dtype, tuple(x.shape), pitch(x), y_pitch, tuple(weight.shape), *geometry, features)


def forward_problem(x, affine, act, weight, bias, geometry, *, out=None, stats=None, out_affine=None, residual=None,
                    residual_affine=None, out_act="none") -> Problem:  # fmt: skip
    """A call of :func:`conv_forward` as a key of plans."""
    features = _features(
        affine=affine, act=act, bias=bias, stats=stats, out_affine=out_affine, residual=residual,
        residual_affine=residual_affine, out_act=out_act,
    )  # fmt: skip
    return _problem("forward", x, weight.shape[0] if out is None else pitch(out), weight, geometry, features)


def backward_problems(grad, raw, coeff, x, affine, saved, act, weight, geometry, *, need_dx=True, need_dw=True, dx=None,
                      base=None, accumulate=False, scaled=False, sums=None) -> list[Problem]:  # fmt: skip
    """A call of :func:`conv_backward` as keys of plans: dgrad and wgrad, or the one that is needed."""
    features = _features(
        both=need_dx and need_dw, coeff=coeff, raw=None if coeff is None else raw, affine=affine, act=act,
        base=base, accumulate=accumulate, scaled=scaled, sums=sums,
    )  # fmt: skip
    needed = [op for op, need in (("dgrad", need_dx), ("wgrad", need_dw)) if need]
    return [_problem(op, x, pitch_or_zero(grad), weight, geometry, features) for op in needed]


def _is_guessed_fused(x: Tensor, weight: Tensor, geometry) -> bool:
    """Whether this convolution runs as the fused kernel where nobody has measured it.

    A static guess, measured on no GPU, that prefers not to lose: fused where the saved passes are certain to outweigh a
    slower product, which is a dense 1x1 convolution of stride 1 in 16 bits, limited by memory, all of whose accesses
    are 128 bits wide. Everything else is the vendor's: float32 because eager's may use TF32 and the kernels' product is
    IEEE. Under interpretation always fused, since that is what is to be tested.
    """
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


def forward_plan(x, affine, act, weight, bias, geometry, **epilogue) -> Plan:
    """How such a call of :func:`conv_forward` runs."""
    if epilogue.get("stats") is not None and epilogue.get("residual") is not None:
        return Plan(False)  # the fused kernel reduces the convolution's statistics, not those of a sum
    plan, measured = _plan, plans.table(meant(x.device))
    if plan is None and measured:
        plan = measured.get(forward_problem(x, affine, act, weight, bias, geometry, **epilogue))
    return plan or Plan(_is_guessed_fused(x, weight, geometry))


def backward_plans(grad, raw, coeff, x, affine, saved, act, weight, geometry, **target) -> tuple[Plan, Plan]:
    """How such a call of :func:`conv_backward` runs: dgrad and wgrad."""
    chosen: dict[str, Plan] = {}
    measured = plans.table(meant(x.device))
    if _plan is None and measured:
        problems = backward_problems(grad, raw, coeff, x, affine, saved, act, weight, geometry, **target)
        chosen = {p.op: measured[p] for p in problems if p in measured}
    default = _plan or Plan(_is_guessed_fused(x, weight, geometry))
    return chosen.get("dgrad", default), chosen.get("wgrad", default)


def new_reduction(channels: int, like: Tensor) -> Reduction:
    """Room for two reductions of a map like ``like`` that ``bn_coefficients`` or ``bn_backward`` reads next."""
    return Reduction(channels, like.device)


def _config(plan: Plan) -> ConvConfig | None:
    return None if plan.config is None else ConvConfig(*plan.config)


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
    plan = forward_plan(x, affine, act, weight, bias, geometry, **epilogue)
    if plan.fused:
        return _forward.conv_forward(x, affine, act, weight, bias, geometry, **epilogue, config=_config(plan))
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
    operands = (grad, raw, coeff, x, affine, saved, act, weight, geometry)
    dgrad, wgrad = backward_plans(*operands, need_dx=need_dx, need_dw=need_dw, **target)
    # what is left to the vendor is one call, which shares the materialised gradient
    vendor_dx, vendor_dw = need_dx and not dgrad.fused, need_dw and not wgrad.fused
    dinput = dweight = None
    if need_dw and wgrad.fused:
        dweight = _wgrad.conv_wgrad(grad, raw, coeff, x, affine, act, weight, geometry, config=_config(wgrad))
    if vendor_dx or vendor_dw:
        results = vendor.conv_backward(_passes(), *operands, need_dx=vendor_dx, need_dw=vendor_dw, **target)
        dinput, dweight = results[0], dweight if results[1] is None else results[1]
    if need_dx and dgrad.fused:
        dinput = _dgrad.conv_dgrad(*operands, **target, config=_config(dgrad))
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
