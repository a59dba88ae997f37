"""``tune``: which convolutions of a model are faster fused, and in which tiles, measured on the user's machine."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from ..backends import select
from ..backends.contract import Backend, Wrapped
from . import plans
from .plans import LIBRARY, Plan, Problem
from .step import Tuner, run_step, unchanged

Measure = Callable[[Callable[[], object]], float]


@dataclass(frozen=True)
class Tuned:
    """One convolution: the chosen plan, its seconds, and those of the library's convolution with its passes. Of one kernel for both
    gradients: those of its own, or of the two plans of one each."""

    problem: Problem
    plan: Plan
    seconds: float
    library_seconds: float


class TuningReport(list[Tuned]):
    """What :func:`tune` measured; ``str()`` is a table, or says why there was nothing to measure."""

    def __init__(self, rows: list[Tuned], reason: str = "", file: Path | None = None) -> None:
        super().__init__(rows)
        self.reason, self.file = reason, file

    def __str__(self) -> str:
        if not self:
            return f"fusedres.tune: nothing measured: {self.reason}"
        lines = [f"{'':8}{'input':24}{'weight':20}{'plan':40}{'us':>10}{'library us':>12}"]
        for row in self:
            shape, weight = ("x".join(map(str, sizes)) for sizes in (row.problem.x, row.problem.weight))
            times = f"{row.seconds * 1e6:10.1f}{row.library_seconds * 1e6:12.1f}"
            lines.append(f"{row.problem.op:8}{shape:24}{weight:20}{str(row.plan):40}{times}")
        return "\n".join([*lines, f"{len(self)} convolutions, kept in {self.file}"])


def tune(
    model: nn.Module, *example: object, again: bool = False, measure: Measure | None = None, **keywords: object
) -> TuningReport:
    """Measure every convolution that the converted ``model`` runs on GPU for ``model(*example, **keywords)``, fused in several tiles and by
    the library, and use the faster from now on, in this process and in later ones.

    A model in training mode is also run backward. Parameters, gradients, buffers and random numbers are as before afterwards. What was
    measured before is not measured ``again`` unless asked for. Where no convolution runs on a backend with a choice nothing is done, and
    the report says why. ``measure`` gives the seconds of a call (default: the median of ``triton.testing.do_bench``). Raises TypeError for
    what is no module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"tune expects a torch.nn.Module, found {type(model).__name__}")
    found, others = record(model, example, keywords)
    if not found:
        ran = f"its fused blocks ran on {', '.join(sorted(others))}" if others else "no fused block ran"
        return TuningReport(
            [], f"only convolutions of the triton backend are tuned, and {ran}; see fusedres.report(model)"
        )
    rows: list[Tuned] = []
    file = None
    for device, of_device in found.items():
        known: plans.Table = {} if again else plans.table(device)
        new = {problem: tuner for problem, tuner in of_device.items() if problem not in known}
        if measure is None:
            _compile(new, device)
        for group in _groups(new):
            tuned = _tune_group(group, new[group[0]], device, measure or _do_bench)
            # kept at once: what is interrupted goes on where it was
            file = plans.remember(device, {row.problem: row.plan for row in tuned})
            rows += tuned
    return TuningReport(rows, "every convolution has a plan already; again=True measures anew", file)


# ---- which convolutions ----------------------------------------------------------------------------------------------

#: by device, the problems and who tunes them
Found = dict[torch.device, dict[Problem, Tuner]]


class _Recorder(Wrapped):
    """A backend, with the problems of its convolutions noted by device."""

    def __init__(self, inner: Backend, tuner: Tuner, found: Found) -> None:
        super().__init__(inner)
        self._tuner, self._found = tuner, found

    def call(self, primitive: str, *args: Any, **kwargs: Any) -> Any:
        """Note what can be chosen of the call, and run it."""
        problems = self._tuner.problems(primitive, *args, **kwargs)
        if problems:
            given = inspect.signature(getattr(Backend, primitive)).bind(self, *args, **kwargs).arguments
            device = given["x"].raw.device
            self._found.setdefault(device, {}).update(dict.fromkeys(problems, self._tuner))
        return super().call(primitive, *args, **kwargs)


def record(model: nn.Module, example: tuple[object, ...], keywords: Mapping[str, object]) -> tuple[Found, set[str]]:
    """The problems of one step, and the names of what else ran: of backends without a choice, or the original modules."""
    found: Found = {}
    others: set[str] = set()

    def wrap(inner: Backend | None) -> Backend | None:
        if inner is not None and inner.tuner is not None:
            return _Recorder(inner, inner.tuner, found)
        others.add("the original modules" if inner is None else inner.name)
        return inner

    with unchanged(model), select.observe(wrap):
        run_step(model, example, keywords)
    return found, others


# ---- measurement -----------------------------------------------------------------------------------------------------


def _do_bench(function: Callable[[], object]) -> float:
    from triton.testing import do_bench

    # in ms: two models are some four thousand measurements
    median = cast(float, do_bench(function, warmup=2, rep=10, return_mode="median"))
    return median / 1e3


def _compile(problems: Mapping[Problem, Tuner], device: torch.device) -> None:
    """Compile in parallel what the measurements will launch; what fails to compile fails again where it is measured."""
    by_tuner: dict[int, tuple[Tuner, list[Problem]]] = {}
    for problem, tuner in problems.items():
        by_tuner.setdefault(id(tuner), (tuner, []))[1].append(problem)
    for tuner, of_tuner in by_tuner.values():
        with tuner.recording(device) as launches:
            for problem in of_tuner:
                for plan in (LIBRARY, *tuner.candidates(problem, device)):
                    tuner.call(problem, {problem.op}, plan, torch.device("meta"))()
        tuner.compile(launches, device)


def _groups(problems: Iterable[Problem]) -> list[list[Problem]]:
    """Problems that one call solves: the two gradients of a convolution."""
    groups: dict[Problem, list[Problem]] = {}
    for problem in problems:
        key = problem if "both" not in problem.features else problem._replace(op="backward")
        groups.setdefault(key, []).append(problem)
    return list(groups.values())


def _tune_group(group: list[Problem], tuner: Tuner, device: torch.device, measure: Measure) -> list[Tuned]:
    """The faster way for each problem; two gradients that both go to the library share a call and its passes. One kernel for both gradients
    is compared with the faster way of all others."""

    def seconds(problem: Problem, plan: Plan, needed: Iterable[Problem]) -> float:
        return _seconds(tuner, problem, {p.op for p in needed}, plan, device, measure)

    def faster(problem: Problem, otherwise: float) -> tuple[Plan, float]:
        tried = {plan: seconds(problem, plan, [problem]) for plan in tuner.candidates(problem, device)}
        plan, spent = min(tried.items(), key=lambda item: item[1])
        return (plan, spent) if spent < otherwise else (LIBRARY, otherwise)

    one, alone = ([p for p in group if (p.op == "backward") == both] for both in (True, False))
    library = {p: seconds(p, LIBRARY, [p]) for p in alone}
    chosen = {p: faster(p, library[p]) for p in alone}
    if len(alone) > 1:
        together = seconds(alone[0], LIBRARY, alone)
        if together <= sum(spent for _, spent in chosen.values()):
            share = together / sum(library.values())
            library = {p: spent * share for p, spent in library.items()}
            chosen = {p: (LIBRARY, library[p]) for p in alone}
    for problem in one:
        library[problem] = sum(spent for _, spent in chosen.values())
        chosen[problem] = faster(problem, library[problem])
    return [Tuned(p, *chosen[p], library[p]) for p in group]


def _seconds(
    tuner: Tuner, problem: Problem, needed: set[str], plan: Plan, device: torch.device, measure: Measure
) -> float:
    """The time of one call by ``plan``; infinite where a fused one cannot run."""
    call = tuner.call(problem, needed, plan, device)
    try:
        return measure(call)
    # a kernel may need more than this device has, which its compiler or driver says in errors of its own
    except Exception as error:
        if not plan.fused:
            raise
        if isinstance(error, torch.cuda.OutOfMemoryError):
            torch.cuda.empty_cache()
        return float("inf")
