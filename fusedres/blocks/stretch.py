"""A stretch: fused blocks that hand their maps to each other, asked once, in front of the first, whether anything has changed.

Between two blocks there is Python that asks what has changed since the last call, and what it reads has been driven out of the caches by
the maps in between. In a stretch all of it is asked at once. Without gradients the schedules of all blocks are one that is recorded, and
then goes by (:mod:`fusedres.backends.tape`) without Python in between, so that on a GPU all launches are queued by one call. Where
gradients are recorded the parts of all blocks run one after the other, each a node of autograd, so that gradients arrive block by block,
and what stands beside them is called between them.

What is recorded is the blocks' own run, one by one, with all of its checks. It is repeated while every object that one of them depends on
is the very same (:mod:`.reading`); what changes inside of tensors (dtype, shape, strides) a tape checks by itself, and in front of a run
that records gradients is asked here. Whatever is in the way, the blocks run one by one.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..backends import select, tape
from ..backends.contract import Backend
from ..errors import Unsupported
from ..recognition import BlockGraph, Fill, Flow, Slot, computing, filled, functions_behind
from ..specs import BlockSpec
from ..swap import FusedBlock, resume, state_of
from .base import autocast_dtype, count
from .calls import Calls, PartCall, PlainCall, follow
from .handover import Handover, calls_directly, is_called_as_module, is_direct
from .reading import Seen
from .state import BlockState, CallRecord, Outcome

#: runs of a block in inference before its stretch is looked at: what comes once is not worth it
RUNS_BEFORE = 1
#: runs for maps of one kind after which a stretch that was never played is given up: the backend does not record, or could not
RUNS_IN_VAIN = tape.RUNS_BEFORE_RECORDING + 2
#: runs with gradients, for maps of one kind, after which it is: every one was of tensors of other measures than the one before
MOST_RUNS_OF_A_ROW = 8
#: runs before a stretch that was given up is looked at again, twice as many each time: what was in the way may be gone, and asking costs
RUNS_AFTER_FAILURE, MOST_RUNS_AFTER_FAILURE = 16, 4096


class _Left(NamedTuple):
    """What a run leaves beside its output: how the calls of the blocks went, who keeps the output, and whether that owes eager's memory
    format."""

    calls: tuple[tuple[BlockState, Outcome | None, tuple[CallRecord | None, ...]], ...]
    keeper: BlockState | None
    owes_nchw: bool

    def behind(self, y: Tensor, stats: Tensor | None = None) -> Handover:
        """The output ``y`` on its way, with the blocks told how they went."""
        for state, outcome, records in self.calls:
            state.outcome, state.records = outcome, records
        return Handover(y, stats, self.keeper, self.owes_nchw)


class _Part(NamedTuple):
    """A part in a row: of which values it reads (0: the row's map, i: what call i has made), and whether it is handed the map's
    statistics. ``done``: the values that nobody reads any more."""

    spec: BlockSpec
    given: int
    beside: int | None
    with_stats: bool
    done: tuple[int, ...]


class _Plain(NamedTuple):
    """A call in a row that is made as it stands, with what its arguments are made of the row's values. ``done``: as of :class:`_Part`."""

    call: Callable[..., Any]
    args: Fill
    names: tuple[str, ...]
    kwargs: Fill
    done: tuple[int, ...]


class _Row(NamedTuple):
    """A stretch as it runs where gradients are recorded: the ``measures`` of the tensors that its parts read, the ``counters`` of all their
    BatchNorms, the ``calls``, whether the output has its statistics with it, and what is ``left``."""

    measures: list[Any]
    counters: dict[Tensor, int]
    calls: tuple[_Part | _Plain, ...]
    measured: bool
    left: _Left

    def run(self, backend: Backend, x: Tensor) -> Handover:
        """The output for a map like the one that it was made of."""
        count(self.counters)
        values: list[Any] = [x]
        stats: list[Tensor | None] = [None]
        for call in self.calls:
            if isinstance(call, _Part):
                beside = None if call.beside is None else values[call.beside]
                of = stats[call.given] if call.with_stats else None
                y, y_stats = call.spec.run(backend, values[call.given], beside, stats=of)
            else:
                args = call.args(values.__getitem__)
                kwargs = dict(zip(call.names, call.kwargs(values.__getitem__), strict=True))
                y, y_stats = call.call(*args, **kwargs), None
            values.append(y)
            stats.append(y_stats)
            for at in call.done:
                values[at] = stats[at] = None
        return self.left.behind(values[-1], stats[-1] if self.measured else None)


class _Known(NamedTuple):
    """A stretch that was looked at: its ``length`` in steps, everything that its blocks depend on, the classes of those that are called
    (``plain``: of modules that run as they stand, with ``functions``, those behind torch's own), whether anything does (``mixed``), the
    states of all, the tensors that they read, and what the backend has recorded of them (``memo``). By kind of map, how often they ran one
    by one, and what that ``left``, or the ``rows`` that it was, None where it is none."""

    length: int
    seen: Seen
    classes: tuple[type, ...]
    plain: tuple[type, ...]
    functions: tuple[Any, ...]
    mixed: bool
    states: tuple[BlockState, ...]
    tensors: tuple[Tensor, ...]
    memo: dict[Any, Any]
    runs: dict[Any, int]
    left: dict[Any, _Left]
    rows: dict[Any, _Row | None]

    def holds(self) -> bool:
        """Whether nothing has changed since."""
        if not all(map(calls_directly, self.classes)) or not all(map(is_called_as_module, self.plain)):
            return False
        return (not self.plain or functions_behind() == self.functions) and self.seen.holds()


#: of a thread: whether a stretch runs, so that those that begin inside of it leave recording to it
_inside = threading.local()


def _measures(t: Tensor) -> tuple[Any, ...]:
    """What the checks of descriptions ask of a tensor, what the output's memory format follows from, and whether autograd records."""
    return t.dtype, t.device, t.shape, t.stride(), t.requires_grad


def through(modules: Iterable[nn.Module], plain: bool) -> list[nn.Module] | None:
    """The fused blocks that calls of ``modules`` run, one after the other, and with ``plain`` the modules that do nothing but compute as
    they stand; None where something else runs."""
    found: list[nn.Module] = []
    for module in modules:
        inside = (
            _through_block(module, plain) if isinstance(resume(module), FusedBlock) else _through_plain(module, plain)
        )
        if inside is None:
            return None
        found += inside
    return found


def _through_block(module: nn.Module, plain: bool) -> list[nn.Module] | None:
    state = state_of(module) if is_direct(module) else None
    if state is None:
        return None
    try:
        return state.kind.calls(module, state, state.kind.reading(module, state), plain)
    except Unsupported:
        return None


def _through_plain(module: nn.Module, plain: bool) -> list[nn.Module] | None:
    if not plain:
        return None
    try:
        computing(module)
    except Unsupported:
        return None
    inside = through(_outermost(module), plain)
    return None if inside is None else [module, *inside]


def _outermost(module: nn.Module) -> Iterator[nn.Module]:
    """The fused blocks inside ``module``, those of them that are in no other."""
    for child in module.children():
        if isinstance(child, FusedBlock):
            yield child
        else:
            yield from _outermost(child)


def beside(block: nn.Module, calls: Iterable[Callable[..., Any]], plain: bool) -> list[nn.Module] | None:
    """A fused ``block`` and the modules of ``calls``, which it makes as they stand beside its parts, as :func:`through` tells them; those
    that are no modules are functions that its reading knows to compute."""
    called = list(calls)
    inside = through((call for call in called if isinstance(call, nn.Module)), plain) if plain or not called else None
    return None if inside is None else [block, *inside]


class Steps(NamedTuple):
    """What a block's forward does one after the other, as far as that are fused blocks: ``count`` steps. ``calls(i, plain)``: what step
    ``i`` runs beside parts of the block's own, as :func:`through` tells it. ``run(start, stop, given)`` runs some."""

    count: int
    calls: Callable[[int, bool], list[nn.Module] | None]
    run: Callable[[int, int, Handover], Handover]

    def run_all(self, given: Handover) -> Handover:
        """All of them as they are."""
        return self.run(0, self.count, given)


def as_one(block: nn.Module, state: BlockState, given: Handover, steps: Steps) -> Handover:
    """The ``steps`` of a ``block`` that has been read, the first of them from the recording where there is one."""
    x = given.x
    if (
        type(x) is not Tensor
        or given.stats is not None
        or given.keeper is not None
        or getattr(_inside, "a_stretch", False)
        or select.is_observed()
        or autocast_dtype(x) is not None
    ):
        return steps.run_all(given)
    if state.stretches is None:
        state.stretches = Stretch(), Stretch()
    return state.stretches[torch.is_grad_enabled()].run(block, given, steps)


class Stretch:
    """The stretch at the beginning of a block, with gradients or without. Threads that come together replace what is known as a whole."""

    __slots__ = ("_failures", "_known", "_plain", "_wait")

    def __init__(self) -> None:
        self._known: _Known | None = None
        #: whether what computes as it stands is part of it: as long as that could be recorded
        self._plain = True
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
        way = self._as_row if torch.is_grad_enabled() else self._as_schedule
        behind = way(backend, known, given, steps)
        return behind if known.length == steps.count else steps.run(known.length, steps.count, behind)

    def _as_schedule(self, backend: Backend, known: _Known, given: Handover, steps: Steps) -> Handover:
        """The output of what is known, without gradients."""
        ran: list[Handover] = []

        def schedule() -> tuple[Tensor]:
            ran.append(_one_by_one(known, given, steps))
            return (ran[0].x,)

        which = ("stretch", given.owes_nchw)
        (y,) = backend.run_schedule(known.memo, which, (given.x,), known.tensors, schedule)
        kind = (*which, backend.name, given.x.device, tape.measures(given.x))
        left = known.left.get(kind)
        if ran:
            known.left[kind] = self._note(known, kind, ran[0], RUNS_IN_VAIN)
            if ran[0].x.untyped_storage().data_ptr() == given.x.untyped_storage().data_ptr():
                self._give_up()  # a view of what it was given, which a tape's would not say of itself
            return ran[0]
        if left is None or y is None:  # another thread has recorded it at this moment
            return _one_by_one(known, given, steps)
        self._failures = 0
        return left.behind(y)

    def _as_row(self, backend: Backend, known: _Known, given: Handover, steps: Steps) -> Handover:
        """The output of what is known, with gradients."""
        kind = (given.owes_nchw, backend.name, given.x.device, tape.measures(given.x), given.x.requires_grad)
        measures = [*map(_measures, known.tensors)]
        row = known.rows.get(kind)
        if row is not None and row.measures == measures:
            self._failures = 0
            return row.run(backend, given.x)
        with follow() as calls:
            behind = _one_by_one(known, given, steps)
        left = self._note(known, kind, behind, MOST_RUNS_OF_A_ROW)
        known.rows[kind] = _row(backend, measures, given.x, calls, behind, left)
        return behind

    def _look(self, block: nn.Module, steps: Steps) -> _Known | None:
        """What is known of the stretch; None where it cannot be recorded now."""
        known = self._known
        if known is None:
            known = self._known = _look_at(block, steps, self._plain)
        elif not known.holds():
            known = None
        if known is None:
            self._give_up()
        return known

    def _note(self, known: _Known, kind: Any, y: Handover, most: int) -> _Left:
        """What a run of its blocks, one by one, has left, which gave ``y``. Given up where nothing can come of it, as after ``most``."""
        calls = tuple((state, state.outcome, state.records) for state in known.states)
        times = known.runs[kind] = known.runs.get(kind, 0) + 1
        fused = all(outcome is not None and outcome.fused for _, outcome, _ in calls)
        alone = torch.is_grad_enabled() or (y.stats is None and y.keeper is None)
        if times > most and known.mixed:
            self._plain, self._known = False, None
        elif not fused or not alone or times > most or len(known.runs) > tape.MOST_SCHEDULES:
            self._give_up()
        return _Left(calls, y.keeper, y.owes_nchw)

    def _give_up(self) -> None:
        self._plain, self._known = True, None
        self._wait = min(RUNS_AFTER_FAILURE << self._failures, MOST_RUNS_AFTER_FAILURE)
        self._failures = min(self._failures + 1, MOST_RUNS_AFTER_FAILURE.bit_length())


def _one_by_one(known: _Known, given: Handover, steps: Steps) -> Handover:
    """The output of what is known, block by block."""
    _inside.a_stretch = True
    try:
        return steps.run(0, known.length, given)
    finally:
        _inside.a_stretch = False


class _NoRow(Exception):
    """A call will not be the same the next time, or was given what no other has made."""


def _row(backend: Backend, measures: list[Any], x: Tensor, calls: Calls, behind: Handover, left: _Left) -> _Row | None:
    """The row that ``calls`` were, from ``x`` to what is ``behind`` them; None where there is none, or something else came between the last
    one and the output."""
    # a number that follows from numbers alone is the same the next time
    calls = [call for call in calls if isinstance(call, PartCall) or _holds_tensors((call.y, *call.given))]
    if not calls or behind.x is not calls[-1].y:
        return None
    values = _Values(x)
    found: list[_Part | _Plain] = []
    counters: dict[Tensor, int] = {}
    try:
        for call in calls:
            if isinstance(call, PartCall):
                found.append(_part(call, backend, values))
                values.add(call.y, call.y_stats)
                for counter, times in call.counters.items():
                    counters[counter] = counters.get(counter, 0) + times
            else:
                found.append(_plain(call, values))
                values.add(call.y, None)
    except _NoRow:
        return None
    if behind.stats is not None and behind.stats is not values.stats[-1]:
        return None
    ran = tuple(call._replace(done=done) for call, done in zip(found, values.done(), strict=True))
    return _Row(measures, counters, ran, behind.stats is not None, left)


def _part(call: PartCall, backend: Backend, values: _Values) -> _Part:
    if not call.lasts or call.backend is not backend or call.out is not None:
        raise _NoRow
    given = values.find(call.given)
    beside = None if call.beside is None else values.find(call.beside)
    if call.stats is not None and call.stats is not values.stats[given]:
        raise _NoRow
    return _Part(call.spec, given, beside, call.stats is not None, ())


def _plain(call: PlainCall, values: _Values) -> _Plain:
    if not _holds_tensors(call.y):
        raise _NoRow  # a number that may follow from what is in a map
    args, kwargs = values.written(call.args), values.written((*call.kwargs.values(),))
    return _Plain(call.call, filled(args), (*call.kwargs,), filled(kwargs), ())


def _holds_tensors(value: Any) -> bool:
    return isinstance(value, Tensor) or (isinstance(value, tuple | list) and any(map(_holds_tensors, value)))


class _Values:
    """The values of a row while it is put together, by their identities, as the calls that have made them hold them, with the ``stats`` of
    those that are maps."""

    def __init__(self, x: Tensor) -> None:
        self._at = {id(x): 0}
        self.stats: list[Tensor | None] = [None]
        #: by value, the call that is the last to read it
        self._last: dict[int, int] = {}

    def add(self, y: Any, stats: Tensor | None) -> None:
        """What the next call has made."""
        self._at[id(y)] = len(self.stats)
        self.stats.append(stats)

    def find(self, value: Any) -> int:
        """Which value that is, which the next call reads; raises _NoRow."""
        at = self._at.get(id(value))
        if at is None:
            raise _NoRow
        self._last[at] = len(self.stats) - 1
        return at

    def written(self, value: Any) -> Any:
        """An argument of the next call, with a :class:`Slot` in the place of each value; raises _NoRow."""
        if isinstance(value, Tensor) or id(value) in self._at:
            return Slot(self.find(value))
        if type(value) in (tuple, list):
            return type(value)(map(self.written, value))
        if isinstance(value, slice):
            return slice(*map(self.written, (value.start, value.stop, value.step)))
        return value

    def done(self) -> list[tuple[int, ...]]:
        """By call, the values that it is the last to read."""
        found: list[list[int]] = [[] for _ in self.stats[1:]]
        for at, end in self._last.items():
            found[end].append(at)
        return [*map(tuple, found)]


def _look_at(block: nn.Module, steps: Steps, plain: bool) -> _Known | None:
    """What the longest row of ``steps`` that are fused, or with ``plain`` compute as they stand, depends on; None where there are not two
    parts in it, or a weight is of a class that makes its own of operators, or was computed and would be kept with its graph."""
    called, length = list[nn.Module](), 0
    while length < steps.count:
        inside = steps.calls(length, plain)
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
        if state is None:
            modules.update(dict.fromkeys(of.modules()))
            graphs += computing(of)
            continue
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
    classes = tuple(dict.fromkeys(type(of) for of in called if state_of(of) is not None))
    as_they_are = tuple(dict.fromkeys(type(inside) for of in called if state_of(of) is None for inside in of.modules()))
    seen = Seen([*modules], tuple(graphs), {})
    mixed = any(steps.calls(at, False) is None for at in range(length))
    return _Known(length, seen, classes, as_they_are, functions_behind(), mixed, tuple(states), tensors, {}, {}, {}, {})
