"""Descriptions as text, for operators: their schemas know tensors, numbers and strings, and a program that holds them is saved and loaded
elsewhere. The text says everything but the tensors, of which it has the places in two lists, and how the weights lie in memory."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, NamedTuple, cast

from torch import Tensor

from ..specs import BlockSpec, Conv, Geometry, Norm, Pool, Shape, Unit
from .dense import Dense, Layer
from .exchange import group_of, name_of
from .residual import Residual, Shortcut, Subsample
from .transition import Transition

_PARTS: dict[str, Callable[..., Any]] = {
    part.__name__: part
    for part in (Residual, Dense, Transition, Layer, Shortcut, Subsample, Unit, Conv, Norm, Pool, Geometry)
}
_PARTS["tuple"] = lambda *items: items
#: what stands in front of the place of a tensor
_WEIGHT, _STATISTIC, _COUNTER = "weight", "statistic", "counter"
#: what stands in front of the name of a group of processes
_PROCESSES = "processes"


@dataclass(frozen=True)
class Encoded:
    """A description as ``text``, and its tensors, each once: ``weights``, the differentiable ones in the order of ``BlockSpec.tensors``,
    and ``statistics``, with the counters of cumulative averages; ``moves``: the places of those that a call moves."""

    text: str
    weights: list[Tensor]
    statistics: list[Tensor]
    moves: tuple[int, ...]


def encode(spec: BlockSpec, counters: dict[int, Tensor]) -> Encoded:
    """``spec`` as text. ``counters``: of cumulative averages, by the ``id`` of the running mean, the number of batches, which makes the
    momentum of a step."""
    weights = list({id(t): t for t in spec.tensors if t is not None}.values())
    at = {id(t): i for i, t in enumerate(weights)}
    statistics: dict[int, tuple[int, Tensor]] = {}
    moves: dict[int, None] = {}

    def place(tensor: Tensor) -> int:
        return statistics.setdefault(id(tensor), (len(statistics), tensor))[0]

    def written(value: Any) -> Any:
        if isinstance(value, Norm):
            mean, variance = value.running_mean, value.running_var
            places = [None if t is None else [_STATISTIC, place(t)] for t in (mean, variance)]
            if value.training:
                moves.update({place(t): None for t in (mean, variance) if t is not None})
            counter = counters.get(id(mean))
            momentum = value.momentum if counter is None else [_COUNTER, place(counter)]
            affine = [written(value.weight), written(value.bias)]
            group = None if value.group is None else [_PROCESSES, name_of(value.group)]
            return ["Norm", *affine, *places, value.training, momentum, value.eps, value.act, group, value.promotes]
        if isinstance(value, Tensor):
            return [_WEIGHT, at[id(value)]]
        if is_dataclass(value):
            return [type(value).__name__, *(written(getattr(value, f.name)) for f in fields(value))]
        if isinstance(value, tuple):
            name = type(value).__name__
            return [name if name in _PARTS else "tuple", *map(written, cast(tuple[Any, ...], value))]
        return value

    block = written(spec)
    # what a backend keeps of a text is then of tensors that lie alike
    lie = [[list(t.shape), list(t.stride())] for t in weights]
    text = json.dumps([block, list(moves), lie], separators=(",", ":"))
    return Encoded(text, weights, [t for _, t in statistics.values()], tuple(moves))


class _Tensors(NamedTuple):
    """What a description is made of, beside its text."""

    size: Shape
    weights: Sequence[Tensor]
    statistics: Sequence[Tensor] | None
    valueless: bool


#: makes a part of a description of its tensors
_Maker = Callable[[_Tensors], Any]


def _weight(place: int) -> _Maker:
    return lambda given: given.weights[place]


def _statistic(place: int) -> _Maker:
    return lambda given: None if given.statistics is None else given.statistics[place]


def _momentum(place: int) -> _Maker:
    """That of a cumulative average: torch reads the counter on the host, too."""

    def make(given: _Tensors) -> float:
        return 0.0 if given.valueless or given.statistics is None else 1.0 / (float(given.statistics[place]) + 1.0)

    return make


def _processes(name: str) -> _Maker:
    """What is traced in one process must not wait for others."""
    return lambda given: None if given.valueless else group_of(name)


def _window(kind: str) -> _Maker:
    """A mean over the whole map."""
    return lambda given: Pool(kind, tuple(given.size), tuple(given.size), (0,) * len(given.size))


def _part(make: Callable[..., Any], arguments: list[tuple[_Maker | None, Any]]) -> tuple[_Maker | None, Any]:
    """``(a maker, None)`` of a part, ``(None, the part)`` where no tensor is in it."""
    if all(maker is None for maker, _ in arguments):
        return None, make(*(value for _, value in arguments))

    def made(given: _Tensors) -> Any:
        return make(*[value if maker is None else maker(given) for maker, value in arguments])

    return made, None


def _maker(value: Any) -> tuple[_Maker | None, Any]:
    if not isinstance(value, list):
        return None, value
    name, *rest = value
    if name == _WEIGHT:
        return _weight(rest[0]), None
    if name == _STATISTIC:
        return _statistic(rest[0]), None
    if name == _COUNTER:
        return _momentum(rest[0]), None
    if name == _PROCESSES:
        return _processes(rest[0]), None
    if name == "Pool" and rest[1] == ["tuple"]:
        return _window(rest[0]), None
    return _part(_PARTS[name], list(map(_maker, rest)))


@functools.lru_cache(maxsize=4096)
def _read(text: str) -> tuple[_Maker, tuple[int, ...]]:
    """``(what makes the description of its tensors, the places of the statistics that move)``."""
    block, moves, _ = json.loads(text)
    maker, _ = _maker(block)
    assert maker is not None  # there is a weight or a statistic in every description
    return maker, tuple(moves)


def moving(text: str) -> tuple[int, ...]:
    """The places of the statistics that a call of the description moves."""
    return _read(text)[1]


def decode(
    text: str, size: Shape, weights: Sequence[Tensor], statistics: Sequence[Tensor] | None, valueless: bool = False
) -> Any:
    """The description of ``text`` with those tensors, for a map of spatial ``size``, which is the window of a mean over the whole map.
    ``statistics``: None for a backward, which reads none. ``valueless``: the tensors are a tracer's, without values: counters are not read
    on the host, for cumulative averages, and nothing is exchanged with other processes."""
    return _read(text)[0](_Tensors(size, weights, statistics, valueless))
