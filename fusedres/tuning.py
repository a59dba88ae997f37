"""``tune``: which convolutions of a model are faster fused, and in which tiles, measured on the user's machine; and
``precompile``: the kernels of a model's step compiled in parallel, before its first call would compile them in a row."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from . import activations, dispatch, plans
from .plans import Plan, Problem

Measure = Callable[[Callable[[], object]], float]


@dataclass(frozen=True)
class Tuned:
    """One convolution: the chosen plan, its seconds, and those of the vendor's convolution with its passes."""

    problem: Problem
    plan: Plan
    seconds: float
    vendor_seconds: float


class TuningReport(list[Tuned]):
    """What :func:`tune` measured; ``str()`` is a table, or says why there was nothing to measure."""

    def __init__(self, rows: list[Tuned], reason: str = "", file: Path | None = None) -> None:
        super().__init__(rows)
        self.reason, self.file = reason, file

    def __str__(self) -> str:
        if not self:
            return f"fusedres.tune: nothing measured: {self.reason}"
        lines = [f"{'':8}{'input':24}{'weight':20}{'plan':24}{'us':>10}{'vendor us':>11}"]
        for row in self:
            shape, weight = ("x".join(map(str, sizes)) for sizes in (row.problem.x, row.problem.weight))
            config = "x".join(map(str, row.plan.config or ("default",)))
            plan = f"fused {config}" if row.plan.fused else "vendor"
            lines.append(
                f"{row.problem.op:8}{shape:24}{weight:20}{plan:24}{row.seconds * 1e6:10.1f}{row.vendor_seconds * 1e6:11.1f}"
            )
        return "\n".join([*lines, f"{len(self)} convolutions, kept in {self.file}"])


def tune(
    model: nn.Module, *example: object, again: bool = False, measure: Measure | None = None, **keywords: object
) -> TuningReport:
    """Measure every convolution that the converted ``model`` runs on GPU for ``model(*example, **keywords)``, fused in several tiles and by
    the vendor's library, and use the faster from now on, in this process and in later ones.

    A model in training mode is also run backward. Parameters, gradients, buffers and random numbers are as before afterwards. What was
    measured before is not measured ``again`` unless asked for. Where no convolution runs on the triton backend nothing is done, and the
    report says why. ``measure`` gives the seconds of a call (default: the median of ``triton.testing.do_bench``).
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"tune expects a torch.nn.Module, found {type(model).__name__}")
    problems, others = _record(model, example, keywords)
    if not problems:
        ran = f"its fused blocks ran on {', '.join(sorted(others))}" if others else "no fused block ran"
        return TuningReport(
            [], f"only convolutions of the triton backend are tuned, and {ran}; see fusedres.report(model)"
        )
    rows: list[Tuned] = []
    file = None
    for device, wanted in problems.items():
        known = {} if again else plans.table(device)
        new = [p for p in wanted if p not in known]
        if measure is None:
            _compile(new, device)
        for group in _groups(new):
            tuned = _tune_group(group, device, measure or _do_bench)
            # kept at once: what is interrupted goes on where it was
            file = plans.remember(device, {row.problem: row.plan for row in tuned})
            rows += tuned
    return TuningReport(rows, "every convolution has a plan already; again=True measures anew", file)


def precompile(model: nn.Module, *example: object, **keywords: object) -> int:
    """Compile in parallel every Triton kernel that the converted ``model`` launches for ``model(*example, **keywords)`` by the plans that
    hold now, and keep them in Triton's cache on disk; returns how many.

    A first call compiles its kernels one after the other, which takes minutes for a large model on a machine with an empty cache. Nothing
    runs here: the step is followed on meta tensors, of a model in training mode also backward. Returns 0 where the triton backend would
    not run.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"precompile expects a torch.nn.Module, found {type(model).__name__}")
    first = next((t for t in (*_tensors(example), *_tensors(keywords)) if t.is_floating_point()), None)
    backend = None if first is None else dispatch.resolve(first.device, first.dtype)
    if backend is None or backend.name != "triton":
        return 0
    from .kernels import helpers

    launches = _followed(model, example, keywords, first.device)
    return 0 if helpers.INTERPRETED else _compile_launches(launches, first.device)


def _followed(model: nn.Module, example, keywords, device: torch.device) -> list:
    """The launches of one step on ``device``, from meta tensors."""
    from .backends import triton as backend
    from .kernels import helpers

    def to_meta(value: object) -> object:
        if isinstance(value, Tensor):
            return value.detach().to("meta").requires_grad_(value.requires_grad)
        if isinstance(value, Mapping):
            return {name: to_meta(v) for name, v in value.items()}
        return type(value)(map(to_meta, value)) if isinstance(value, (list, tuple)) else value

    # a copy whose tensors have no values: what deepcopy finds in its memo it does not copy
    memo: dict[int, object] = {id(b): b.to("meta") for b in model.buffers()}
    memo |= {id(p): nn.Parameter(p.detach().to("meta"), p.requires_grad) for p in model.parameters()}
    twin = copy.deepcopy(model, memo)
    # the outer choice is the triton backend, which serves no meta tensors by itself
    with (
        dispatch.use_backend(None),
        dispatch.observe(lambda inner: backend),
        helpers.record(helpers.limits(device), device) as launches,
    ):
        _step(twin, to_meta(example), to_meta(keywords))
    return launches


# ---- which convolutions ----------------------------------------------------------------------------------------------


class _Recorder:
    """The triton backend, with the problems of its convolutions noted by device."""

    def __init__(self, inner, problems: dict[torch.device, dict[Problem, None]]) -> None:
        self._inner, self._problems, self.name = inner, problems, inner.name

    def __getattr__(self, name: str):
        return getattr(self._inner, name)

    def conv_forward(self, x, *rest, **more):
        self._problems.setdefault(x.device, {})[self._inner.forward_problem(x, *rest, **more)] = None
        return self._inner.conv_forward(x, *rest, **more)

    def conv_backward(self, grad, *rest, **more):
        found = self._inner.backward_problems(grad, *rest, **more)
        self._problems.setdefault(grad.device, {}).update(dict.fromkeys(found))
        return self._inner.conv_backward(grad, *rest, **more)


def _record(model: nn.Module, example, keywords) -> tuple[dict[torch.device, dict[Problem, None]], set[str]]:
    """The problems of one step by device, and the names of the other backends that ran."""
    problems: dict[torch.device, dict[Problem, None]] = {}
    others: set[str] = set()

    def wrap(inner):
        if inner is not None and inner.name == "triton":
            return _Recorder(inner, problems)
        others.add("the original modules" if inner is None else inner.name)
        return inner

    with _unchanged(model), dispatch.observe(wrap):
        _step(model, example, keywords)
    return problems, others


def _step(model: nn.Module, example, keywords) -> None:
    """A call, of a model in training mode also backward."""
    with torch.set_grad_enabled(model.training):
        result = model(*example, **keywords)
        if model.training:
            outputs = [t for t in _tensors(result) if t.requires_grad]
            torch.autograd.backward(outputs, [torch.ones_like(t) for t in outputs])


def _tensors(value: object) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    values = value.values() if isinstance(value, Mapping) else value if isinstance(value, (list, tuple)) else ()
    return [t for v in values for t in _tensors(v)]


@contextmanager
def _unchanged(model: nn.Module):
    """Put gradients, buffers and the random number generators back afterwards."""
    gradients = [(p, p.grad) for p in model.parameters()]
    buffers = [(b, b.clone()) for b in model.buffers()]
    for parameter, _ in gradients:
        parameter.grad = None
    try:
        with torch.random.fork_rng():
            yield
    finally:
        for parameter, gradient in gradients:
            parameter.grad = gradient
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)


# ---- measurement -----------------------------------------------------------------------------------------------------


def _do_bench(function: Callable[[], object]) -> float:
    from triton.testing import do_bench

    # in ms: two models are some four thousand measurements
    return do_bench(function, warmup=2, rep=10, return_mode="median") / 1e3


def _compile(problems: Iterable[Problem], device: torch.device) -> None:
    """Compile in parallel what the measurements will launch; what fails to compile fails again where it is measured."""
    from .backends import triton as backend
    from .kernels import helpers

    with helpers.record(helpers.limits(device)) as launches:
        for problem in problems:
            call = _call(problem, {problem.op}, torch.device("meta"))
            for plan in (Plan(False), *_fused_plans(problem, device)):
                with backend.use_plan(plan):
                    call()
    _compile_launches(launches, device)


def _compile_launches(launches: Iterable, device: torch.device) -> int:
    """Compile each distinct launch for ``device`` in parallel; returns how many there are."""
    from triton.runtime._async_compile import AsyncCompileMode

    with torch.cuda.device(device), ThreadPoolExecutor(os.cpu_count()) as pool:
        with AsyncCompileMode(pool, ignore_errors=True) as mode:
            for launch in launches:
                launch.kernel.warmup(grid=launch.grid, **launch.arguments)
        return len(mode.future_kernels)


def _groups(problems: Iterable[Problem]) -> list[list[Problem]]:
    """Problems that one call solves: the two gradients of a convolution."""
    groups: dict[Problem, list[Problem]] = {}
    for problem in problems:
        key = problem if "both" not in problem.features else problem._replace(op="backward")
        groups.setdefault(key, []).append(problem)
    return list(groups.values())


def _tune_group(group: list[Problem], device: torch.device, measure: Measure) -> list[Tuned]:
    """The faster way for each problem; two gradients that both go to the vendor share a call and its passes."""
    vendor = {p: _seconds(p, [p], Plan(False), device, measure) for p in group}
    best: dict[Problem, tuple[Plan, float]] = {}
    for problem in group:
        tried = {plan: _seconds(problem, [problem], plan, device, measure) for plan in _fused_plans(problem, device)}
        best[problem] = min(tried.items(), key=lambda item: item[1])
    chosen = {p: best[p] if best[p][1] < vendor[p] else (Plan(False), vendor[p]) for p in group}
    if len(group) > 1:
        together = _seconds(group[0], group, Plan(False), device, measure)
        if together <= sum(seconds for _, seconds in chosen.values()):
            share = together / sum(vendor.values())
            vendor = {p: seconds * share for p, seconds in vendor.items()}
            chosen = {p: (Plan(False), vendor[p]) for p in group}
    return [Tuned(p, *chosen[p], vendor[p]) for p in group]


def _fused_plans(problem: Problem, device: torch.device) -> list[Plan]:
    """The default configuration of the kernel, and its other candidates."""
    from .kernels import conv_dgrad, conv_forward, conv_wgrad

    n, _, *size = problem.x
    outputs, channels, *kernel = problem.weight
    out = _out_size(problem)
    itemsize = getattr(torch, problem.dtype).itemsize
    sizes = (channels, outputs // problem.groups, itemsize)
    pending = "raw" in problem.features
    if problem.op == "forward":
        found = conv_forward.forward_candidates(n * out[0] * out[1], *sizes, device)
    elif problem.op == "dgrad":
        rows = n * -(-size[0] // problem.stride[0]) * -(-size[1] // problem.stride[1])
        found = conv_dgrad.dgrad_candidates(rows, *sizes, pending, device)
    else:
        found = conv_wgrad.wgrad_candidates(n * out[0] * out[1], *sizes, pending, device)
    return [Plan(True), *(Plan(True, (c.BLOCK_M, c.BLOCK_N, c.BLOCK_K, c.num_warps, c.num_stages)) for c in found)]


def _out_size(problem: Problem) -> list[int]:
    sizes = zip(
        problem.x[2:], problem.weight[2:], problem.stride, problem.padding, problem.dilation, strict=True
    )  # fmt: skip
    return [(size + 2 * pad - step * (k - 1) - 1) // stride + 1 for size, k, stride, pad, step in sizes]


def _seconds(problem: Problem, needed: list[Problem], plan: Plan, device: torch.device, measure: Measure) -> float:
    """The time of one call by ``plan``; infinite where it cannot run."""
    from .backends import triton as backend

    call = _call(problem, {p.op for p in needed}, device)
    try:
        with backend.use_plan(plan):
            return measure(call)
    # a configuration may need more than this device has, which its compiler or driver says in errors of its own
    except Exception as error:
        if plan.config is None:
            raise
        if isinstance(error, torch.cuda.OutOfMemoryError):
            torch.cuda.empty_cache()
        return float("inf")


def _activation(features: set[str], prefix: str = "") -> str:
    """An activation of the kind that ``features`` name."""
    kind = next((kind for kind in activations.KINDS if prefix + kind in features), "none")
    return activations.leaky(0.01) if kind == "leaky_relu" else kind


def _call(problem: Problem, needed: set[str], device: torch.device) -> Callable[[], object]:
    """The call that the problem stands for, on operands of its sizes and pitches."""
    from .backends import triton as backend
    from .backends.eager import Geometry

    dtype, has = getattr(torch, problem.dtype), set(problem.features)
    (n, c, *size), (k, *_), out = problem.x, problem.weight, _out_size(problem)

    def new_map(channels: int, pitch: int, size: list[int]) -> Tensor:
        buffer = torch.randn(n, pitch, *size, device=device).to(dtype)
        return buffer.contiguous(memory_format=torch.channels_last)[:, :channels]

    def vectors(rows: int, channels: int, name: str) -> Tensor | None:
        return torch.rand(rows, channels, device=device) if name in has else None

    x = new_map(c, problem.x_pitch, size)
    weight = (torch.randn(problem.weight, device=device) / (c * 9) ** 0.5).to(dtype)
    weight = weight.contiguous(memory_format=torch.channels_last)
    geometry = Geometry(problem.stride, problem.padding, problem.dilation, problem.groups)
    affine, act = vectors(2, c, "affine"), _activation(has)
    y = new_map(k, problem.y_pitch, out)
    if problem.op == "forward":
        epilogue = {
            "out": y, "stats": vectors(2, k, "stats"), "out_affine": vectors(2, k, "out_affine"),
            "residual": new_map(k, k, out) if "residual" in has else None,
            "residual_affine": vectors(2, k, "residual_affine"), "out_act": _activation(has, "out_"),
        }  # fmt: skip
        if problem.y_pitch == k:
            del epilogue["out"]  # a map of its own, as the schedules let the backend allocate it
        bias = torch.randn(k, device=device).to(dtype) if "bias" in has else None
        return lambda: backend.conv_forward(x, affine, act, weight, bias, geometry, **epilogue)
    raw = new_map(k, problem.y_pitch, out) if "raw" in has else None
    coeff = vectors(3, k, "coeff")
    target = {
        "dx": new_map(c, problem.x_pitch, size) if has & {"base", "accumulate"} else None,
        "base": new_map(c, problem.x_pitch, size) if "base" in has else None,
        "accumulate": "accumulate" in has, "scaled": "scaled" in has, "sums": vectors(2, c, "sums"),
    }  # fmt: skip
    saved = torch.rand(2, c, device=device) if "affine" in has else None
    return lambda: backend.conv_backward(
        y, raw, coeff, x, affine, saved, act, weight, geometry,
        need_dx="dgrad" in needed, need_dw="wgrad" in needed, **target,
    )  # fmt: skip
