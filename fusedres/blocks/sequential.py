"""Rows of modules: what is fused inside runs fused, and neighbours hand their maps over."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

from torch import Tensor, nn

from ..errors import Unsupported
from ..recognition import Part, conv_runs, is_sequential, shape_behind
from ..recognition import run_part as part_of_run
from ..swap import FusedBlock, state_of
from .base import Kind, Original, Ran, behind_convolutions, run_part, take
from .calls import made
from .handover import Handover, is_direct
from .plan import Planner
from .state import BlockState, Outcome
from .stretch import Steps, as_one, through


def in_a_row(x: Tensor, children: Sequence[nn.Module]) -> Tensor:
    """``children`` one after the other, as a Sequential calls them."""
    for child in children:
        x = child(x)
    return x


def pass_on(given: Handover, children: Sequence[nn.Module], place: Tensor | None = None) -> Handover:
    """``children`` one after the other: those that are fused hand their maps over. ``place`` is for the output of the last."""
    for i, child in enumerate(children, 1):
        if is_direct(child):
            given = take(child, given, place if i == len(children) else None)
        else:
            given = Handover(made(child, given.leave()))
    return given


def out_shape(module: nn.Module, shape: tuple[int, ...]) -> tuple[int, ...] | None:
    """The shape of the output of ``module`` for a map of ``shape``, None where it cannot be told without running it."""
    state = state_of(module) if isinstance(module, FusedBlock) else None
    if state is not None:
        try:
            return state.kind.out_shape(module, state, shape)
        except Unsupported:
            return None
    if is_sequential(module):
        return _shape_of_row(list(cast(nn.Sequential, module)), shape)
    return shape_behind(module, shape)


def _shape_of_row(children: Sequence[nn.Module], shape: tuple[int, ...]) -> tuple[int, ...] | None:
    found: tuple[int, ...] | None = shape
    for child in children:
        found = None if found is None else out_shape(child, found)
    return found


class Step(NamedTuple):
    """Children of a row: ``part``, where they run as one; else there is one of them."""

    children: tuple[nn.Module, ...]
    part: Part | None = None


class SequentialKind(Kind):
    """A Sequential: every conv-BN[-act][-max pool] in it runs fused, fused children hand their maps over, the rest runs as it is."""

    key, title = "sequential", "sequential"
    casts = True

    def read(self, block: Any, state: BlockState) -> tuple[Step, ...]:
        steps: list[Step] = []
        children, at = list(block), 0
        for start, stop in conv_runs(children):
            steps += [Step((child,)) for child in children[at:start]]
            steps.append(Step(tuple(children[start:stop]), part_of_run(children[start:stop])))
            at = stop
        return (*steps, *(Step((child,)) for child in children[at:]))

    def parts(self, found: tuple[Step, ...]) -> list[Part]:
        return [step.part for step in found if step.part is not None]

    def inside(self, block: Any, state: BlockState) -> list[nn.Module]:
        children = list(block)
        return [block, *(child for start, stop in conv_runs(children) for child in children[start:stop])]

    def calls(self, block: Any, state: BlockState, found: Sequence[Step], plain: bool) -> list[nn.Module] | None:
        children = through((step.children[0] for step in found if step.part is None), plain)
        return None if children is None else [block, *children]

    def run(
        self,
        block: Any,
        state: BlockState,
        found: tuple[Step, ...],
        original: Original,
        given: Handover,
        place: Tensor | None,
    ) -> Handover:
        if place is not None:
            return self._run_steps(block, state, found, given, place)

        def calls(at: int, plain: bool) -> list[nn.Module] | None:
            return through(found[at].children, plain) if found[at].part is None else []

        def run(start: int, stop: int, given: Handover) -> Handover:
            return self._run_steps(block, state, found[start:stop], given, goes_on=start > 0)

        return as_one(block, state, given, Steps(len(found), calls, run))

    def _run_steps(
        self,
        block: Any,
        state: BlockState,
        steps: Sequence[Step],
        given: Handover,
        place: Tensor | None = None,
        goes_on: bool = False,
    ) -> Handover:
        """The output of ``steps``; ``goes_on``: the state tells of those before, too."""
        results: list[Ran] = []
        outcomes: list[Outcome] = []
        for i, step in enumerate(steps, 1):
            into = place if i == len(steps) else None
            if step.part is None:
                given = pass_on(given, step.children, into)
                inner = state_of(step.children[0])
                if inner is not None and inner.outcome is not None:
                    outcomes.append(inner.outcome)
                continue
            one_by_one = functools.partial(in_a_row, children=step.children)
            results.append(run_part(self, block, state, step.part, one_by_one, given, None, into))
            given = results[-1].y
        own = [r.outcome for r in results]
        if goes_on and state.outcome is not None:
            (own if state.records else outcomes).insert(0, state.outcome)
        # a row without parts of its own went as its children did
        outcomes = own or outcomes
        if outcomes:
            state.outcome = next((o for o in outcomes if not o.fused), outcomes[-1])
        state.records = (*(state.records if goes_on else ()), *(r.record for r in results))
        return given

    def tell(self, block: Any, state: BlockState, found: tuple[Step, ...], planner: Planner) -> Any:
        return ("slot", self._tell_steps(found, planner))

    def tell_but_last(self, block: Any, state: BlockState, planner: Planner) -> int:
        """Tell the steps of all children but the last, which stands alone; the slot of their output."""
        *steps, last = self.recall(block, state)
        if last.part is not None:
            raise Unsupported("its last norm does not stand alone")
        planner.depends_on(self.inside(block, state))
        return self._tell_steps(steps, planner)

    def _tell_steps(self, steps: Sequence[Step], planner: Planner) -> int:
        x = 0
        for step in steps:
            if step.part is None:
                x = planner.child(step.children[0], x)
            else:
                instead = planner.in_a_row(step.children)
                # told of another block, too, a network around this row
                x = planner.fused(step.part, x, None, behind_convolutions, instead, self.casts)
        return x

    def calls_but_last(self, block: Any, state: BlockState, plain: bool) -> list[nn.Module] | None:
        """As :meth:`calls`, of :meth:`run_but_last`."""
        try:
            *steps, last = self.reading(block, state)
        except Unsupported:
            return through(list(block)[:-1], plain)
        return through(list(block)[:-1], plain) if last.part is not None else self.calls(block, state, steps, plain)

    def run_but_last(self, block: Any, state: BlockState, given: Handover) -> Handover:
        """The output of all children but the last, which stands alone."""
        try:
            *steps, last = self.reading(block, state)
        except Unsupported:
            return pass_on(given, list(block)[:-1])
        if last.part is not None:
            return pass_on(given, list(block)[:-1])
        return self._run_steps(block, state, steps, given)

    def out_shape(self, block: Any, state: BlockState, shape: tuple[int, ...]) -> tuple[int, ...] | None:
        found: tuple[int, ...] | None = shape
        for step in self.reading(block, state):
            if found is None:
                return None
            if step.part is None:
                found = out_shape(step.children[0], found)
            else:
                found = step.part.describe(None)[0].out_shape(found)
        return found


SEQUENTIAL = SequentialKind()
