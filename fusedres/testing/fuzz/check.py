"""Whether converting changes what a case computes."""

from __future__ import annotations

import copy
import statistics
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

import fusedres
from fusedres.swap import state_of

from . import changes
from .build import Built
from .description import Case, Step
from .twins import (
    Difference,
    Invalid,
    Record,
    compare,
    compare_forms,
    compare_states,
    copied,
    distance,
    generators,
    run_step,
    seed_everything,
    state,
)

Convert = Callable[[nn.Module], nn.Module]

#: draws by which a case in low precision is judged where one misses the rule
DRAWS = 9


@dataclass
class Result:
    """``differences``: none where converting changes nothing; ``fused``: the kinds of blocks that a backend ran; ``invalid``: why the case
    says nothing, where eager cannot run it; ``at``: the number of the last action of a session."""

    differences: list[Difference] = field(default_factory=list)
    fused: set[str] = field(default_factory=set)
    invalid: str | None = None
    at: int = 0


def convert(case: Case) -> Convert:
    """How the twin of a case is converted."""
    return lambda model: fusedres.convert(model, recompute=case.recompute, verify=case.verify)


def check(case: Case) -> Result:
    """Run the case, plain and converted, and compare; never raises because of either."""
    dtype = getattr(torch, case.dtype)
    if dtype == torch.float64:
        return _run(case, dtype, _exact)
    result = _run(case, dtype, _by_parity)
    if result.differences and all(d.what in NUMBERS for d in result.differences):
        return _judge(case, result)
    return result


# ---- float64 ---------------------------------------------------------------------------------------------------------

Compare = Callable[["Trio", Step, int], list[Difference]]
NUMBERS = ("output", "gradient", "buffer", "input")


class Trio:
    """The plain model, its converted twin and, in low precision, the truth in float64."""

    def __init__(self, case: Case, built: Built, dtype: torch.dtype) -> None:
        self.case, self.code = case, built.module
        seed_everything(case.seed)
        self.eager = built.make().to(dtype)
        if case.model_layout == "channels_last":
            self.eager.to(memory_format=torch.channels_last)
        self.ours = copied(self.eager)
        self.truth = copied(self.eager).double() if dtype != torch.float64 else None
        self.errors: dict[str, tuple[float, float]] = {}

    def convert(self) -> list[Difference]:
        """Convert the twin: nothing but the classes may change."""
        before = generators()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                self.ours = convert(self.case)(self.ours)
            except Exception as error:
                return [Difference("conversion", "raises", f"{type(error).__name__}: {error}")]
        found = [Difference("conversion", "warns", str(w.message)) for w in caught if "fusedres" in str(w.message)]
        if generators() != before:
            found.append(Difference("conversion", "generators", "moved"))
        return found + [
            Difference("conversion", d.where, d.detail)
            for d in compare_states(state(self.ours), state(self.eager), 0.0)
        ]

    def models(self) -> list[nn.Module]:
        return [self.eager, self.ours, *([] if self.truth is None else [self.truth])]

    def change(self, step: Step) -> None:
        for model in self.models():
            model.train(step.training)
        if step.change in changes.SHARED:
            changes.CHANGES[step.change](self.eager, step.where, self.code)
        elif step.change:
            for model in self.models():
                changes.CHANGES[step.change](model, step.where, self.code)

    def run(self, model: nn.Module, step: Step, number: int) -> Record:
        counts = self.code.COUNTS
        counts.clear()
        record = run_step(model, self.case, step, number, self.case.network.channels)
        record.state["COUNTS"] = dict(counts)
        return record

    def fused(self) -> set[str]:
        """The keys of the kinds of blocks that the last call ran fused."""
        return fused_kinds(self.ours)


def fused_kinds(model: nn.Module) -> set[str]:
    """The keys of the kinds of blocks in ``model`` whose last call ran fused."""
    states = [state_of(module) for module in model.modules()]
    return {s.kind.key for s in states if s is not None and s.outcome is not None and s.outcome.fused}


def reported(model: nn.Module) -> list[Difference]:
    """What is wrong with ``report``: nothing where it neither raises nor draws."""
    before = generators()
    try:
        fusedres.report(model)
    except Exception as error:
        return [Difference("report", type(error).__name__, str(error)[:200])]
    return [] if generators() == before else [Difference("report", "generators", "moved")]


def _exact(trio: Trio, step: Step, number: int) -> list[Difference]:
    try:
        eager = trio.run(trio.eager, step, number)
    except Exception as error:
        raise Invalid(f"{type(error).__name__}: {error}") from error
    try:
        ours = trio.run(trio.ours, step, number)
    except Exception as error:
        return [raised(error)]
    return compare(ours, eager)


def raised(error: Exception) -> Difference:
    """What the converted model raises where eager does not."""
    return Difference("raises", type(error).__name__, str(error).strip().split("\n")[0][:200])


def _by_parity(trio: Trio, step: Step, number: int) -> list[Difference]:
    assert trio.truth is not None
    try:
        eager = trio.run(trio.eager, step, number)
        truth = trio.run(trio.truth, step, number)
    except Exception as error:
        raise Invalid(f"{type(error).__name__}: {error}") from error
    try:
        ours = trio.run(trio.ours, step, number)
    except Exception as error:
        return [raised(error)]
    allowed = torch.finfo(getattr(torch, trio.case.dtype)).eps
    found = list(compare_forms(ours, eager))
    largest = max((g.double().norm().item() for g in truth.gradients.values() if g is not None), default=1.0)
    for what, where, value, other, true in _numbers(ours, eager, truth):
        if value is None or other is None or value.dtype != other.dtype or value.shape != other.shape:
            if value is not other:
                found.append(Difference(f"{what}", where, "another dtype, shape or None"))
            continue
        if true is None or true.shape != value.shape:
            raise Invalid("the truth is of another shape")
        # what is less than a rounding of the largest (a bias or two values in front of a norm) has no digits of its own
        nothing = what == "gradient" and true.norm().item() < allowed * largest
        scale = (largest if nothing else 0.05 * largest) if what == "gradient" else 1e-6 if what == "output" else 1.0
        errors = distance(value, true, scale), distance(other, true, scale)
        trio.errors[f"{number} {what} {where}"] = errors
        if not errors[0] <= 2 * errors[1] + allowed:
            found.append(Difference(what, where, f"error {errors[0]:.1e}, eager's own {errors[1]:.1e}"))
    return found


def _numbers(*records: Record) -> list[tuple[str, str, Tensor | None, Tensor | None, Tensor | None]]:
    ours, eager, truth = records
    rows: list[tuple] = [
        ("output", str(i), *parts)
        for i, parts in enumerate(zip(ours.outputs, eager.outputs, truth.outputs, strict=False))
    ]
    rows += [("gradient", n, ours.gradients.get(n), g, truth.gradients.get(n)) for n, g in eager.gradients.items()]
    for name, value in eager.state.items():
        if isinstance(value, Tensor) and value.is_floating_point():
            rows.append(("buffer", name, ours.state.get(name), value, truth.state.get(name)))
    return rows


def _judge(case: Case, first: Result) -> Result:
    """The medians over draws: one activation whose sign rounding decides moves a gradient by percents, in eager as in ours. Among many
    medians of few draws some miss by chance: where they do, more draws decide."""
    found: list[Difference] = []
    for draws in (range(1, DRAWS), range(DRAWS, 5 * DRAWS)):
        found = _over_draws(case, draws)
        if not found:
            break
    return Result(found, first.fused)


def _over_draws(case: Case, draws: range) -> list[Difference]:
    errors: dict[str, list[tuple[float, float]]] = {}
    dtype = getattr(torch, case.dtype)
    with Built(case.network) as built, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for draw in draws:
            trio = Trio(replace(case, seed=case.seed + 7919 * draw), built, dtype)
            trio.convert()
            try:
                for number, step in enumerate(case.steps):
                    trio.change(step)
                    _by_parity(trio, step, number)
            except Invalid:
                continue
            for name, pair in trio.errors.items():
                errors.setdefault(name, []).append(pair)
    medians = {n: tuple(statistics.median(pair[i] for pair in pairs) for i in (0, 1)) for n, pairs in errors.items()}
    found = []
    for name, (mine, other) in medians.items():
        what = name.split()[1]
        # a tensor is struck by chance, in eager as in ours: the worst of its kind is the measure where its own is small
        worst = max(pair[1] for key, pair in medians.items() if key.split()[1] == what)
        if not mine <= 2 * max(other, worst) + torch.finfo(dtype).eps:
            found.append(
                Difference(what, name, f"median error {mine:.1e}, eager's own {other:.1e}, its worst {worst:.1e}")
            )
    return found


def _run(case: Case, dtype: torch.dtype, compare_step: Compare) -> Result:
    result = Result()
    try:
        built = Built(case.network)
    except Exception as error:
        result.invalid = f"{type(error).__name__}: {error}"
        return result
    with built, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            trio = Trio(case, built, dtype)
        except Exception as error:
            result.invalid = f"{type(error).__name__}: {error}"
            return result
        result.differences = trio.convert()
        for number, step in enumerate(case.steps):
            if result.differences:
                break
            try:
                trio.change(step)
            except Exception as error:
                result.invalid = f"{step.change}: {error}" if number == 0 else None
                break
            try:
                result.differences = compare_step(trio, step, number)
            except Invalid as reason:
                result.invalid = str(reason) if number == 0 else None
                break
            result.fused |= trio.fused()
        if case.report and not result.differences:
            result.differences = reported(trio.ours)
    return result


def explain(case: Case) -> str:
    """What a person needs to see of a failing case."""
    with Built(case.network) as built:
        text = built.text.split("COUNTS = {}\n", 1)[1].strip("\n")
    differences = check(copy.copy(case)).differences
    return "\n".join([repr(case), "", text, "", *(f"  differs: {d}" for d in differences[:6])])
