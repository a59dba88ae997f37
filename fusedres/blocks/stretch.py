"""A stretch: fused blocks that hand their maps to each other, in inference recorded and played as one schedule.

Between two blocks there is Python that asks what has changed since the last call, and what it reads has been driven out of the caches by
the maps in between. In a stretch all of it is asked at once, in front of the first block; then the schedules of all blocks go by
(:mod:`fusedres.backends.tape`) without Python in between, and on a GPU all launches are queued by one call.

What is recorded is the blocks' own run, one by one, with all of its checks. It is played while every object that one of them depends on is
the very same (:mod:`.reading`); what changes inside of tensors (dtype, shape, strides) a tape checks by itself. Whatever is in the way, the
blocks run one by one.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..backends import select, tape
from ..errors import Unsupported
from ..recognition import BlockGraph, Flow
from ..swap import state_of
from .base import autocast_dtype
from .handover import Handover, calls_directly, is_direct
from .reading import Seen
from .state import BlockState, CallRecord, Outcome

#: runs of a block in inference before its stretch is looked at: what comes once is not worth it
RUNS_BEFORE = 1
#: runs for maps of one kind after which a stretch that was never played is given up: the backend does not record, or could not
RUNS_IN_VAIN = tape.RUNS_BEFORE_RECORDING + 2
#: runs before a stretch that was given up is looked at again, twice as many each time: what was in the way may be gone, and asking costs
RUNS_AFTER_FAILURE, MOST_RUNS_AFTER_FAILURE = 16, 4096


class _Left(NamedTuple):
    """What a run leaves beside its output: how the calls of the blocks went, and whether the output owes eager's memory format."""

    calls: tuple[tuple[BlockState, Outcome | None, tuple[CallRecord | None, ...]], ...]
    owes_nchw: bool


class _Known(NamedTuple):
    """A stretch that was looked at: its ``length`` in steps, everything that its blocks depend on, the classes of those that are called,
    the states of all, the tensors that they read, and what the backend has recorded of them (``memo``). By kind of map, how often they ran
    one by one, and what that ``left``."""

    length: int
    seen: Seen
    classes: tuple[type, ...]
    states: tuple[BlockState, ...]
    tensors: tuple[Tensor, ...]
    memo: dict[Any, Any]
    runs: dict[Any, int]
    left: dict[Any, _Left]

    def holds(self) -> bool:
        """Whether nothing has changed since."""
        return all(map(calls_directly, self.classes)) and self.seen.holds()


#: of a thread: whether a stretch runs, so that those that begin inside of it leave recording to it
_inside = threading.local()


def through(modules: Iterable[nn.Module]) -> list[nn.Module] | None:
    """The fused blocks that calls of ``modules`` run, one after the other; None where something else runs."""
    found: list[nn.Module] = []
    for module in modules:
        state = state_of(module) if is_direct(module) else None
        if state is None:
            return None
        try:
            blocks = state.kind.calls(module, state, state.kind.reading(module, state))
        except Unsupported:
            return None
        if blocks is None:
            return None
        found += blocks
    return found


class Steps(NamedTuple):
    """What a block's forward does one after the other, as far as that are fused blocks: ``count`` steps. ``calls(i)``: the fused blocks
    that step ``i`` runs beside parts of the block's own; None where it runs anything else. ``run(start, stop, given)`` runs some."""

    count: int
    calls: Callable[[int], list[nn.Module] | None]
    run: Callable[[int, int, Handover], Handover]

    def run_all(self, given: Handover) -> Handover:
        """All of them as they are."""
        return self.run(0, self.count, given)


def as_one(block: nn.Module, state: BlockState, given: Handover, steps: Steps) -> Handover:
    """The ``steps`` of a ``block`` that has been read, the first of them from the recording where there is one."""
    x = given.x
    if (
        torch.is_grad_enabled()
        or type(x) is not Tensor
        or given.stats is not None
        or given.keeper is not None
        or getattr(_inside, "a_stretch", False)
        or select.is_observed()
        or autocast_dtype(x) is not None
    ):
        return steps.run_all(given)
    if state.stretch is None:
        state.stretch = Stretch()
    return state.stretch.run(block, given, steps)


class Stretch:
    """The stretch at the beginning of a block. Threads that come together replace what is known as a whole."""

    __slots__ = ("_failures", "_known", "_wait")

    def __init__(self) -> None:
        self._known: _Known | None = None
        self._wait, self._failures = RUNS_BEFORE, 0

    def run(self, block: nn.Module, given: Handover, steps: Steps) -> Handover:
        """See :func:`as_one`."""
        if self._wait > 0:
            self._wait -= 1
            return steps.run_all(given)
        backend = select.resolve(given.x.device, given.x.dtype)
        known = self._look(block, steps) if backend is not None else None
        if backend is None or known is None:
            return steps.run_all(given)
        ran: list[Handover] = []

        def schedule() -> tuple[Tensor]:
            _inside.a_stretch = True
            try:
                ran.append(steps.run(0, known.length, given))
            finally:
                _inside.a_stretch = False
            return (ran[0].x,)

        which = ("stretch", given.owes_nchw)
        (y,) = backend.run_schedule(known.memo, which, (given.x,), known.tensors, schedule)
        kind = (*which, backend.name, given.x.device, tape.measures(given.x))
        left = known.left.get(kind)
        if ran:
            self._note(known, kind, ran[0])
            (behind,) = ran
        elif left is None or y is None:  # another thread has recorded it at this moment
            return steps.run_all(given)
        else:
            self._failures = 0
            for state, outcome, records in left.calls:
                state.outcome, state.records = outcome, records
            behind = Handover(y, owes_nchw=left.owes_nchw)
        return behind if known.length == steps.count else steps.run(known.length, steps.count, behind)

    def _look(self, block: nn.Module, steps: Steps) -> _Known | None:
        """What is known of the stretch; None where it cannot be recorded now."""
        known = self._known
        if known is None:
            known = self._known = _look_at(block, steps)
        elif not known.holds():
            known = None
        if known is None:
            self._give_up()
        return known

    def _note(self, known: _Known, kind: Any, y: Handover) -> None:
        """Leave in ``known`` that its blocks ran, one by one, and gave ``y``."""
        calls = tuple((state, state.outcome, state.records) for state in known.states)
        times = known.runs[kind] = known.runs.get(kind, 0) + 1
        known.left[kind] = _Left(calls, y.owes_nchw)
        fused = all(outcome is not None and outcome.fused for _, outcome, _ in calls)
        alone = y.stats is None and y.keeper is None
        if not fused or not alone or times > RUNS_IN_VAIN or len(known.runs) > tape.MOST_SCHEDULES:
            self._give_up()

    def _give_up(self) -> None:
        self._known = None
        self._wait = min(RUNS_AFTER_FAILURE << self._failures, MOST_RUNS_AFTER_FAILURE)
        self._failures = min(self._failures + 1, MOST_RUNS_AFTER_FAILURE.bit_length())


def _look_at(block: nn.Module, steps: Steps) -> _Known | None:
    """What the longest row of ``steps`` that are fused depends on; None where there are not two parts in it, or a weight is of a class that
    makes its own of operators, or was computed and would be kept with its graph."""
    called, length = list[nn.Module](), 0
    while length < steps.count:
        inside = steps.calls(length)
        if inside is None:
            break
        called += inside
        length += 1
    modules: dict[nn.Module, None] = {}
    graphs: list[BlockGraph | Flow] = []
    states: list[BlockState] = []
    parts = 0
    for of in (block, *called):
        state = state_of(of)
        assert state is not None
        kind = state.kind
        modules.update(dict.fromkeys(kind.inside(of, state)))
        graphs += kind.graphs(of, state)
        states.append(state)
        parts += len(kind.parts(kind.reading(of, state)))
    held = [t for module in modules for t in (*module._parameters.values(), *module._buffers.values())]
    tensors = tuple(dict.fromkeys(t for t in held if t is not None and t.is_floating_point()))
    kept = all(type(t) in (Tensor, nn.Parameter) and t.grad_fn is None for t in tensors)
    if length == 0 or parts < 2 or not kept:
        return None
    classes = tuple(dict.fromkeys(map(type, called)))
    return _Known(length, Seen([*modules], tuple(graphs), {}), classes, tuple(states), tensors, {}, {}, {})
