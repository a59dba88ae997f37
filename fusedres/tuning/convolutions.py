"""The triton backend's convolutions as problems: the key of a call, the plans worth a measurement, and a call that stands for a problem."""

# fusedres.kernels is the folder kernels/, which setup.py says and a type checker does not see
# pyright: reportMissingImports=false
from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable, Collection, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import activations
from ..backends.contract import Backend
from ..kernels import tiles
from ..kernels.launch import INTERPRETED, Launch, arch_of, product_precision, record
from ..kernels.layout import Form, form, form_of
from ..operands import FRESH, Epilogue, GradTarget, LazyGrad, LazyMap
from ..specs import Geometry
from .plans import FUSED, Plan, Problem

if TYPE_CHECKING:
    from ..backends.triton import TritonBackend

_SIGNATURES = {name: inspect.signature(getattr(Backend, name)) for name in ("conv_forward", "conv_backward")}


def operands(primitive: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
    """The arguments of a call of ``conv_forward`` or ``conv_backward`` by name, defaults included."""
    bound = _SIGNATURES[primitive].bind(None, *args, **kwargs)
    bound.apply_defaults()
    del bound.arguments["self"]
    return bound.arguments


# ---- the key of a call -----------------------------------------------------------------------------------------------


_KINDS = frozenset(activations.KINDS)

#: an operand or a property by name: whether it is there, or which activation
Feature = tuple[str, bool | str]


def _names(features: tuple[Feature, ...]) -> tuple[str, ...]:
    """The names of what is there; of an activation (``act``, ``out_act``) the kind, because its parameter costs no time."""
    names: list[str] = []
    for name, value in features:
        if isinstance(value, str):
            names += [] if value == "none" else [name.removesuffix("act") + activations.parse(value).kind]
        elif value:
            names.append(name)
    return tuple(names)


@functools.lru_cache(4096)
def _problem(
    op: str,
    x: Form,
    y: Form | None,
    weight: tuple[int, ...],
    geometry: Geometry,
    precision: str,
    features: tuple[Feature, ...],
) -> Problem:
    """``y``: the convolution's output or its gradient, None for a map of its own. Found by what a call has at hand, at every call."""
    dtype = str(x.dtype).removeprefix("torch.")
    names = (*_names(features), *(("tf32",) if precision == "tf32" else ()))
    y_pitch = weight[0] if y is None else y.pitch
    return Problem(op, dtype, tuple(x.shape), x.pitch, y_pitch, tuple(weight), *geometry, names)


def has_fused_form(epilogue: Epilogue) -> bool:
    """Whether the forward kernel can do this: it reduces the statistics of the convolution, not those of a sum."""
    return epilogue.stats is None or epilogue.residual is None


def has_one_kernel(
    x: LazyMap, weight: Tensor, geometry: Geometry, target: GradTarget | None, need_dw: bool, arch: tiles.Arch
) -> bool:
    """Whether one kernel can make what a call of ``conv_backward`` asks for: both gradients of a dense 1x1 of stride 1."""
    dtype = x.raw.dtype
    return (
        target is not None
        and need_dw
        and weight.shape[0] * x.raw.shape[1] == weight.numel()  # one tap, one group
        and max(geometry.stride) == 1
        and not any(geometry.padding)
        and tiles.has_both(weight.shape[0], dtype == torch.float32 and product_precision(dtype) == "ieee", arch)
    )


def may_be_described(problem: Problem) -> bool:
    """Whether tensor descriptors can say it: a forward of such a form, with nothing pending on its input (:func:`~.tiles.is_described`). A
    residual's pitch is no part of a problem: one that is not aligned is left to the other kernel by the launcher."""
    pending = "scale_shift" in problem.features or not _KINDS.isdisjoint(problem.features)
    # float32's own products have their operands in registers, which spill
    exact = problem.dtype == "float32" and "tf32" not in problem.features
    return (
        problem.op == "forward"
        and not pending
        and not exact
        and tiles.is_described(problem.size, (problem.x_pitch, problem.y_pitch), problem.geometry)
    )


def forward_problem(x: LazyMap, weight: Tensor, bias: Tensor | None, geometry: Geometry, epilogue: Epilogue) -> Problem:
    """A call of ``conv_forward`` as a key of plans."""
    raw, residual = x.raw, epilogue.residual
    features = (
        ("scale_shift", x.scale_shift is not None), ("act", x.act), ("bias", bias is not None),
        ("stats", epilogue.stats is not None), ("out_scale_shift", epilogue.scale_shift is not None),
        ("residual", residual is not None),
        ("residual_scale_shift", residual is not None and residual.scale_shift is not None), ("out_act", epilogue.act),
    )  # fmt: skip
    precision = product_precision(raw.dtype)
    return _problem("forward", form_of(raw), form(epilogue.out), weight.shape, geometry, precision, features)


def backward_problem(
    op: str,
    grad: LazyGrad,
    x: LazyMap,
    weight: Tensor,
    geometry: Geometry,
    target: GradTarget | None,
    need_dw: bool,
) -> Problem:
    """The ``op`` (dgrad, wgrad or backward) of a call of ``conv_backward`` as a key of plans."""
    raw, goal = x.raw, FRESH if target is None else target
    features = (
        ("both", target is not None and need_dw), ("coeff", grad.coeff is not None),
        ("raw", grad.coeff is not None and grad.raw is not None), ("scale_shift", x.scale_shift is not None), ("act", x.act),
        ("base", goal.base is not None), ("accumulate", goal.accumulate), ("scaled", goal.scaled),
        ("sums", goal.sums is not None),
    )  # fmt: skip
    precision = product_precision(raw.dtype)
    return _problem(op, form_of(raw), form_of(grad.grad), weight.shape, geometry, precision, features)


# ---- what tune and precompile ask a backend --------------------------------------------------------------------------


class TritonTuner:
    """The triton backend's side of tuning: what can be chosen, and how a choice is measured."""

    def __init__(self, backend: TritonBackend) -> None:
        self._backend = backend

    def problems(self, primitive: str, *args: Any, **kwargs: Any) -> list[Problem]:
        """The convolutions of a call for which there is a choice; none for other primitives."""
        if primitive not in _SIGNATURES:
            return []
        given = operands(primitive, *args, **kwargs)
        if primitive == "conv_backward":
            x, weight, geometry, target, need_dw = (
                given[name] for name in ("x", "weight", "geometry", "target", "need_dw")
            )
            one = has_one_kernel(x, weight, geometry, target, need_dw, arch_of(x.raw.device))
            needed = (("dgrad", target is not None), ("wgrad", need_dw), ("backward", one))
            return [backward_problem(op, **given) for op, need in needed if need]
        return [forward_problem(**given)] if has_fused_form(given["epilogue"]) else []

    def candidates(self, problem: Problem, device: torch.device) -> list[Plan]:
        """The fused plans that are worth a measurement, the default tile first."""
        arch, described = arch_of(device), list[tiles.ConvConfig]()
        if may_be_described(problem):
            described = tiles.described_candidates(problem.size, problem.features, arch)
        return [
            FUSED,
            *(Plan(True, c) for c in (*tiles.conv_candidates(problem.op, problem.size, arch), *described)),
        ]

    def recording(self, device: torch.device) -> AbstractContextManager[list[Launch]]:
        """A context in which meta tensors stand for tensors on ``device`` and nothing is launched; gives the list of launches."""
        return record(device)

    def compile(self, launches: Iterable[Launch], device: torch.device) -> int:
        """Compile each distinct launch for ``device`` in parallel, into Triton's cache; returns how many there are (0 where kernels are
        interpreted). What fails to compile is left out: it fails again where it is launched."""
        if INTERPRETED:
            return 0
        from triton.runtime._async_compile import AsyncCompileMode

        with torch.cuda.device(device), ThreadPoolExecutor(os.cpu_count()) as pool:
            with AsyncCompileMode(pool, ignore_errors=True) as mode:
                for launch in launches:
                    launch.kernel.warmup(grid=launch.grid, **launch.arguments)
            return len(mode.future_kernels)

    def call(self, problem: Problem, needed: Collection[str], plan: Plan, device: torch.device) -> Callable[[], object]:
        """A call that solves the problem by ``plan``, on random operands of its sizes and pitches on ``device``; of a convolution's two
        gradients those that are ``needed`` (dgrad, wgrad; backward is both). It raises where a kernel cannot be built."""
        draw = Draw(problem, device)
        if problem.op == "forward":
            arguments = draw.forward()
            return lambda: self._backend.forward_by(plan, *arguments)
        grad, x, weight, geometry, target = draw.backward()
        gradients = BOTH if "backward" in needed else needed
        goal, need_dw, chosen = target if "dgrad" in gradients else None, "wgrad" in gradients, by(plan, needed)
        return lambda: self._backend.backward_by(chosen, grad, x, weight, geometry, goal, need_dw)


#: the two gradients of a convolution
BOTH = ("dgrad", "wgrad")


def by(plan: Plan, needed: Collection[str]) -> dict[str, Plan]:
    """The plans that make of ``needed`` what ``plan`` says: of backward both gradients, where that is not one kernel."""
    return dict.fromkeys(BOTH if "backward" in needed and not plan.fused else needed, plan)


def _activation(features: Collection[str], prefix: str = "") -> str:
    """An activation of the kind that ``features`` name."""
    kind = next((kind for kind in activations.KINDS if prefix + kind in features), "none")
    return activations.leaky(0.01) if kind == "leaky_relu" else kind


class Draw:
    """Random operands for a problem."""

    def __init__(self, problem: Problem, device: torch.device) -> None:
        self.problem, self.device, self.has = problem, device, set(problem.features)
        self.dtype: torch.dtype = getattr(torch, problem.dtype)

    def map(self, channels: int, pitch: int, size: tuple[int, ...]) -> Tensor:
        """A map, as a slice of a buffer of ``pitch`` channels."""
        buffer = torch.randn(self.problem.x[0], pitch, *size, device=self.device).to(self.dtype)
        return buffer.contiguous(memory_format=torch.channels_last)[:, :channels]

    def vectors(self, rows: int, channels: int, feature: str) -> Tensor | None:
        """Per-channel values where the problem has the feature."""
        return torch.rand(rows, channels, device=self.device) if feature in self.has else None

    def x(self) -> LazyMap:
        """The convolution's input."""
        p, channels = self.problem, self.problem.x[1]
        mean_invstd = torch.rand(2, channels, device=self.device)
        return LazyMap(
            self.map(channels, p.x_pitch, p.x[2:]), self.vectors(2, channels, "scale_shift"), _activation(self.has),
            mean_invstd,
        )  # fmt: skip

    def weight(self) -> Tensor:
        """Its weight."""
        p = self.problem
        weight = (torch.randn(p.weight, device=self.device) / (p.x[1] * 9) ** 0.5).to(self.dtype)
        return weight.contiguous(memory_format=torch.channels_last)

    def forward(self) -> tuple[LazyMap, Tensor, Tensor | None, Geometry, Epilogue]:
        """The arguments of ``conv_forward``."""
        p, outputs, size = self.problem, self.problem.weight[0], self.problem.out_size
        residual = None
        if "residual" in self.has:
            residual = LazyMap(self.map(outputs, outputs, size), self.vectors(2, outputs, "residual_scale_shift"))
        # a pitch of its own: a map that blocks let the backend allocate
        out = None if p.y_pitch == outputs else self.map(outputs, p.y_pitch, size)
        epilogue = Epilogue(
            out, self.vectors(2, outputs, "stats"), self.vectors(2, outputs, "out_scale_shift"), residual,
            _activation(self.has, "out_"),
        )  # fmt: skip
        bias = torch.randn(outputs, device=self.device).to(self.dtype) if "bias" in self.has else None
        return self.x(), self.weight(), bias, p.geometry, epilogue

    def backward(self) -> tuple[LazyGrad, LazyMap, Tensor, Geometry, GradTarget]:
        """The arguments of ``conv_backward``."""
        p, outputs, channels = self.problem, self.problem.weight[0], self.problem.x[1]
        raw = self.map(outputs, p.y_pitch, p.out_size) if "raw" in self.has else None
        grad = LazyGrad(self.map(outputs, p.y_pitch, p.out_size), raw, self.vectors(3, outputs, "coeff"))
        into = bool(self.has & {"base", "accumulate"})
        target = GradTarget(
            self.map(channels, p.x_pitch, p.x[2:]) if into else None,
            self.map(channels, p.x_pitch, p.x[2:]) if "base" in self.has else None,
            "accumulate" in self.has, "scaled" in self.has, self.vectors(2, channels, "sums"),
        )  # fmt: skip
        return grad, self.x(), self.weight(), p.geometry, target
