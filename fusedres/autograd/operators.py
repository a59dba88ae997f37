"""The families as PyTorch operators, for compilers and exporters: ``torch.ops.fusedres.residual_*``, ``dense_*`` and ``transition_*``.

    *_forward(text, x, source, stats, weights, statistics) -> [y, stats of y, *the statistics that move, *what backward needs]
    *_backward(text, grad, held, source, weights, kept, need) -> [the gradients that are needed, of x, source and weights]
    *_infer(text, x, source, stats, weights, statistics) -> [y, stats of y, *the statistics that move]

They run what a call in eager runs, on the backend that is chosen for the tensors when they are called. A description goes as text
(:mod:`.encoding`). Nothing is written into an argument and no results share memory: statistics that move are results, and what is not there
is a tensor without elements. Maps of any layout are taken; those that are returned are channels_last. ``*_forward`` has an autograd formula
(:func:`_differentiate`), outside of what a compiler traces, so that it knows whether a backward is differentiated itself. Their fake
implementations are the same schedules on the eager backend, which takes tensors without values.

For programs that have no Python, :func:`inlined` leaves in a trace the primitives themselves instead of the operators.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import FlopCounterMode, register_flop_formula

from ..backends import select
from ..backends.contract import Backend
from ..backends.conv3d import for_maps
from ..backends.eager import BACKEND as EAGER
from ..backends.layout import as_map, format_of, has_symbols
from ..specs import BlockSpec, Norm, instances
from .dense import Dense
from .encoding import decode, moving
from .residual import Residual
from .steps import replay, replays
from .transition import Transition

#: by their names in those of operators
FAMILIES: dict[type[BlockSpec], str] = {Residual: "residual", Dense: "dense", Transition: "transition"}
#: texts, and measures of each, that are remembered
_MOST_PASSED, _MOST_MEASURES = 4096, 64
#: what fake calls have returned, by what they were given
_faked: dict[Any, Any] = {}
#: the backend whose primitives a tracer sees in the place of operators
_inlined: ContextVar[Backend | None] = ContextVar("fusedres_inlined", default=None)


class Operators(NamedTuple):
    """The operators of a family."""

    forward: Any
    backward: Any
    infer: Any


def _backend(x: Tensor) -> Backend:
    """As a call in eager chooses, which a batch without samples reaches where processes share statistics."""
    return (select.resolve(x.device, x.dtype) if x.numel() else None) or EAGER


def _without_autocast(x: Tensor) -> contextlib.AbstractContextManager[object]:
    kind = x.device.type
    on = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return torch.autocast(kind, enabled=False) if on else contextlib.nullcontext()


def _key(tensor: Tensor) -> int:
    """What all views of a tensor share."""
    return tensor.untyped_storage()._cdata


def _is_dense(tensor: Tensor) -> bool:
    return tensor.is_contiguous() or tensor.is_contiguous(memory_format=format_of(tensor.dim()))


def _sharing(results: Iterable[Tensor | None], arguments: Iterable[Tensor | None]) -> list[bool]:
    """Which of the ``results`` lie in memory of an argument or of one before them, or in a part of one."""
    taken = {_key(t) for t in arguments if t is not None}
    found: list[bool] = []
    for result in results:
        shares = result is not None and bool(
            _key(result) in taken or result.storage_offset() != 0 or not _is_dense(result)
        )
        if result is not None and not shares:
            taken.add(_key(result))
        found.append(shares)
    return found


class _Known:
    """What is known of the schedules of a text: what a backend keeps of them (:meth:`~.contract.Backend.run_schedule`), the measures of
    tensors that were checked, and which results share memory, as of their first run: they go the same way each time."""

    def __init__(self) -> None:
        self.memo: dict[Any, Any] = {}
        self.checked: set[tuple[Any, ...]] = set()
        self.shared: dict[Any, list[bool]] = {}

    def check(self, spec: BlockSpec, x: Tensor, source: Tensor | None, tensors: Iterable[Tensor]) -> None:
        """Check ``spec`` against its maps as a call in eager does, where none with such maps and ``tensors`` was. Without samples there is
        nothing to compute, unless these are what a BatchNorm in training has to normalise by. Raises Unsupported and ValueError."""
        measures = tuple(None if t is None else (t.dtype, t.device, t.shape) for t in (x, source, *tensors))
        if measures in self.checked:
            return
        maps = (x,) if source is None else (x, source)
        if x.numel() == 0 and not any(norm.training for norm in instances(spec, Norm)):
            maps = tuple(m.new_empty((1, *m.shape[1:])) for m in maps)
        spec.check(*maps)
        if len(self.checked) >= _MOST_MEASURES:
            self.checked.clear()
        self.checked.add(measures)

    def shares(self, key: Any, results: list[Tensor | None], arguments: Iterable[Tensor | None]) -> list[bool]:
        """As :func:`_sharing` at the first run of a schedule. ``key``: what it is, on which backend, for maps that lie how."""
        found = self.shared.get(key)
        if found is None:
            if len(self.shared) >= _MOST_MEASURES:
                self.shared.clear()
            found = self.shared[key] = _sharing(results, arguments)
        return found


_known: dict[str, _Known] = {}


def _of(text: str) -> _Known:
    known = _known.get(text)
    if known is None:
        if len(_known) >= _MOST_PASSED:
            _known.clear()
        known = _known[text] = _Known()
    return known


def _like(grad: Tensor, tensor: Tensor) -> Tensor:
    """``grad`` with the strides of what it is the gradient of."""
    pairs = zip(tensor.shape, grad.stride(), tensor.stride(), strict=True)
    same = all(own == wanted or size == 1 for size, own, wanted in pairs)
    return grad if same else torch.empty_like(tensor).copy_(grad)


def _apart(
    known: _Known | None,
    which: Any,
    maps: Sequence[Tensor | None],
    results: list[Tensor | None],
    x: Tensor,
    arguments: Iterable[Tensor | None],
) -> list[Tensor]:
    """``results`` in memory of their own, tensors without elements for those that are None. ``arguments``: all that the schedule could
    have returned."""
    if known is None:
        shared = _sharing(results, arguments)
    else:
        lie = [None if t is None else (t.dtype, t.shape, t.stride()) for t in maps]
        shared = known.shares((which, *lie), results, arguments)
    return [
        x.new_empty(0) if result is None else result.clone() if shares else result
        for result, shares in zip(results, shared, strict=True)
    ]


def _forward(
    backend: Backend,
    text: str,
    x: Tensor,
    source: Tensor | None,
    stats: Tensor | None,
    weights: list[Tensor],
    statistics: list[Tensor],
    recorded: bool,
    valueless: bool = False,
) -> list[Tensor]:
    """``valueless``: the tensors are a tracer's: sizes may be symbols, and were checked when the trace was planned."""
    with torch.no_grad(), _without_autocast(x):
        moves = moving(text)
        own = [*statistics]
        for i in moves:
            own[i] = own[i].clone()
        given, beside = as_map(x), None if source is None else as_map(source)
        backend = for_maps(backend, x.dim())

        known = None if valueless else _of(text)

        def schedule() -> list[Tensor | None]:
            spec = decode(text, tuple(given.shape[2:]), weights, own, valueless)
            if known is not None:
                known.check(spec, given, beside, (*weights, *own))
            if recorded:
                y, measured, kept = spec.record(backend, given, beside, stats)
                return [y, measured, *kept]
            return [*spec.run(backend, given, beside, stats=stats)]

        maps = (given, beside, stats)
        memo = {} if known is None else known.memo
        y, measured, *kept = backend.run_schedule(memo, recorded, maps, (*weights, *own), schedule)
        results = [y, measured, *(own[i] for i in moves), *kept]
        arguments = (x, given, source, beside, stats, *weights, *statistics)
        return _apart(known, (recorded, backend.name), maps, results, x, arguments)


def _backward(
    backend: Backend,
    text: str,
    grad: Tensor,
    held: Tensor,
    source: Tensor | None,
    weights: list[Tensor],
    kept: list[Tensor],
    need: list[bool],
    valueless: bool = False,
) -> list[Tensor]:
    """``valueless``: as in :func:`_forward`."""
    with torch.no_grad(), _without_autocast(held):
        g, x, beside = as_map(grad), as_map(held), None if source is None else as_map(source)
        there = [t if t.numel() else None for t in kept]
        backend = for_maps(backend, x.dim())

        def schedule() -> list[Tensor | None]:
            spec = decode(text, tuple(held.shape[2:]), weights, None, valueless)
            at = {id(t): i for i, t in enumerate(weights, 2)}
            wanted = [*need[:2], *(t is not None and need[at[id(t)]] for t in spec.tensors)]
            found = spec.gradients(backend, g, x, beside, there, spec.tensors, wanted)
            totals: dict[int, Tensor | None] = dict(enumerate(found[:2]))
            for t, dt in zip(spec.tensors, found[2:], strict=True):
                if t is not None and dt is not None:
                    i, dt = at[id(t)], _like(dt, t)
                    before = totals.get(i)  # one weight may stand at several places
                    totals[i] = dt if before is None else before + dt
            return [totals[i] for i, wants in enumerate(need) if wants]

        known, which, maps = None if valueless else _of(text), ("gradients", *need), (g, x, beside)
        memo = {} if known is None else known.memo
        results = backend.run_schedule(memo, which, maps, (*there, *weights), schedule)
        arguments = (grad, g, held, x, source, beside, *weights, *kept)
        return _apart(known, (which, backend.name), maps, [*results], held, arguments)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    """What ``*_forward`` leaves for :func:`_differentiate`; of its results y alone is differentiable."""
    text, x, source, _, weights, statistics = inputs
    spec = decode(text, tuple(x.shape[2:]), weights, statistics, valueless=True)
    ctx.text, ctx.weights, ctx.keeps_output = text, len(weights), spec.keeps_output
    ctx.statistics = statistics  # not saved: they may move before backward, which reads none that do
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[0] if spec.keeps_output else x, source, *weights, *output[2 + len(moving(text)) :])
    ctx.mark_non_differentiable(*output[1:])


def _differentiate(backward: Callable[..., list[Tensor]], ctx: Any, grads: list[Tensor | None]) -> tuple[Any, ...]:
    """The gradients of ``*_forward``: by the operator ``backward``, or in plain PyTorch where they are differentiated themselves."""
    _, needs_x, needs_source, _, needs_weights, needs_statistics = ctx.needs_input_grad
    need, grad = [needs_x, needs_source, *needs_weights], grads[0]
    if grad is None:
        found: list[Tensor | None] = [None] * len(need)
    elif replays(grad):
        found = _replayed(ctx, grad, needs_x)
    else:
        held, source, *rest = ctx.saved_tensors
        weights, kept = rest[: ctx.weights], rest[ctx.weights :]
        given = iter(backward(ctx.text, grad, held, source, weights, kept, need))
        found = [next(given) if wants else None for wants in need]
    dx, dsource, *of_weights = found
    return None, dx, dsource, None, of_weights, [None] * len(needs_statistics)


def _replayed(ctx: Any, grad: Tensor, needs_x: bool) -> list[Tensor | None]:
    """The gradients of x, source and weights by :func:`~.steps.replay`."""
    held, source, *rest = ctx.saved_tensors
    text, statistics, size = ctx.text, ctx.statistics, tuple(held.shape[2:])

    def described(weights: Sequence[Tensor]) -> Any:
        # with the processes of a SyncBatchNorm, which has no second derivative and says so
        return decode(text, size, weights, statistics)

    def reference(x: Tensor, source: Tensor | None, *weights: Tensor) -> Tensor:
        spec = described(weights)
        return spec.reference(x, source, *spec.tensors)

    weights, x = rest[: ctx.weights], held
    if ctx.keeps_output:
        # x is the first channels of y, whose gradient this node hands on to x alone
        with torch.enable_grad():
            x = held[:, : held.shape[1] - described(weights).growth]
        x = x if needs_x else x.detach()
    return replay(reference, (x, source, *weights), grad)


def _measures(argument: Any) -> Any:
    """What of an argument says what a call returns, but for its values. Raises TypeError for sizes that are symbols."""
    if isinstance(argument, Tensor):
        if has_symbols(*argument.shape, *argument.stride()):
            raise TypeError("a size is a symbol")
        return argument.shape, argument.stride(), argument.dtype, argument.device
    return tuple(map(_measures, argument)) if isinstance(argument, list) else argument


def _fake(run: Callable[..., list[Tensor]], *arguments: Any) -> list[Tensor]:
    """What ``run`` returns, without values; remembered, since tracers ask several times for every call, and blocks are alike."""
    try:
        key = (run, _measures(list(arguments)))
    except TypeError:
        return run(EAGER, *arguments)
    if key not in _faked:
        if len(_faked) >= _MOST_PASSED:
            _faked.clear()
        _faked[key] = _measures(run(EAGER, *arguments))
    return [torch.empty_strided(*place, dtype=dtype, device=device) for *place, dtype, device in _faked[key]]


def _flops(run: Callable[..., Any], last: tuple[Any, ...]) -> Callable[..., int]:
    """The formula of an operator for torch.utils.flop_counter: those of the convolutions that it runs."""

    def count(*args: Any, out_val: Any = None, **kwargs: Any) -> int:
        with FlopCounterMode(display=False) as counter:
            run(EAGER, *tree_map_only(Tensor, lambda t: t.to("meta"), args), *last)
        return counter.get_total_flops()

    return count


_FORWARD = "(str text, Tensor x, Tensor? source, Tensor? stats, Tensor[] weights, Tensor[] statistics) -> Tensor[]"
_BACKWARD = (
    "(str text, Tensor grad, Tensor held, Tensor? source, Tensor[] weights, Tensor[] kept, bool[] need) -> Tensor[]"
)


def _operator(name: str, schema: str, run: Callable[..., list[Tensor]], *last: bool) -> Any:
    """The operator ``fusedres::name``: ``run`` on the backend of its first tensor, with ``last`` behind its arguments."""
    qualified = f"fusedres::{name}"
    # not torch.library.custom_op, which goes twice through Python, and asks each time what opcheck asks in the tests
    torch.library.define(qualified, schema, tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.impl(qualified, "default", lambda text, first, *rest: run(_backend(first), text, first, *rest, *last))
    torch.library.register_fake(qualified, lambda *given: _fake(run, *given, *last, True))
    packet = getattr(torch.ops.fusedres, name)
    register_flop_formula(packet, get_raw=True)(_flops(run, (*last, True)))
    return packet.default


def _define(family: str) -> Operators:
    forward = _operator(f"{family}_forward", _FORWARD, _forward, True)
    backward = _operator(f"{family}_backward", _BACKWARD, _backward)
    infer = _operator(f"{family}_infer", _FORWARD, _forward, False)
    torch.library.register_autograd(
        f"fusedres::{family}_forward", functools.partial(_differentiate, backward), setup_context=_keep
    )
    return Operators(forward, backward, infer)


OPERATORS = {family: _define(family) for family in FAMILIES.values()}


@contextlib.contextmanager
def inlined(backend: Backend) -> Iterator[None]:
    """Inside, in this thread, :func:`infer` runs the schedule of a family on ``backend`` instead of its operator, so that an exporter that
    traces it without Dynamo sees the primitives of ``backend``."""
    token = _inlined.set(backend)
    try:
        yield
    finally:
        _inlined.reset(token)


def infer(
    family: str,
    text: str,
    x: Tensor,
    source: Tensor | None,
    stats: Tensor | None,
    weights: list[Tensor],
    statistics: list[Tensor],
) -> list[Tensor]:
    """What ``*_infer`` of the ``family`` returns: by the operator, or :func:`inlined`."""
    backend = None if torch.compiler.is_dynamo_compiling() else _inlined.get()
    if backend is None:
        return OPERATORS[family].infer(text, x, source, stats, weights, statistics)
    return _forward(backend, text, x, source, stats, weights, statistics, recorded=False, valueless=True)
