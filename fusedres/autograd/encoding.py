"""Descriptions as text, for operators: their schemas know tensors, numbers and strings, and a program that holds them is saved and loaded
elsewhere. The text says everything but the tensors, of which it has the places in two lists."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, cast

from torch import Tensor

from ..errors import Unsupported
from ..specs import BlockSpec, Conv, Geometry, Norm, Pool, Shape, Unit
from .dense import Dense, Layer
from .residual import Residual, Shortcut, Subsample
from .transition import Transition

_PARTS: dict[str, type] = {
    part.__name__: part
    for part in (Residual, Dense, Transition, Layer, Shortcut, Subsample, Unit, Conv, Norm, Pool, Geometry)
}
#: what stands in front of the place of a tensor
_WEIGHT, _STATISTIC, _COUNTER = "weight", "statistic", "counter"


@dataclass(frozen=True)
class Encoded:
    """A description as ``text``, and its tensors: ``weights``, the differentiable ones in the order of ``BlockSpec.tensors`` without those
    that are None, and ``statistics``, each once, with the counters of cumulative averages; ``moves``: the places of those that a call
    moves."""

    text: str
    weights: list[Tensor]
    statistics: list[Tensor]
    moves: tuple[int, ...]


def encode(spec: BlockSpec, counters: dict[int, Tensor]) -> Encoded:
    """``spec`` as text. ``counters``: of cumulative averages, by the ``id`` of the running mean, the number of batches, which makes the
    momentum of a step. Raises Unsupported for what processes exchange."""
    if spec.exchanges:
        raise Unsupported("processes share its statistics, which compilers do not trace")
    weights = [t for t in spec.tensors if t is not None]
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
            return ["Norm", *affine, *places, value.training, momentum, value.eps, value.act, None, value.promotes]
        if isinstance(value, Tensor):
            return [_WEIGHT, at[id(value)]]
        if is_dataclass(value):
            return [type(value).__name__, *(written(getattr(value, f.name)) for f in fields(value))]
        if isinstance(value, tuple):
            name = type(value).__name__
            return [name if name in _PARTS else "tuple", *map(written, cast(tuple[Any, ...], value))]
        return value

    block = written(spec)
    text = json.dumps([block, list(moves)], separators=(",", ":"))
    return Encoded(text, weights, [t for _, t in statistics.values()], tuple(moves))


@functools.lru_cache(maxsize=4096)
def _parsed(text: str) -> Any:
    return json.loads(text)


def updated(text: str) -> list[int]:
    """The places of the statistics that a call of the description moves."""
    return _parsed(text)[1]


def decode(
    text: str, size: Shape, weights: Sequence[Tensor], statistics: Sequence[Tensor] | None, counts: bool = True
) -> Any:
    """The description of ``text`` with those tensors, for a map of spatial ``size``, which is the window of a mean over the whole map.
    ``statistics``: None for a backward, which reads none. ``counts``: whether counters may be read on the host, for cumulative averages."""

    def read(value: Any) -> Any:
        if not isinstance(value, list):
            return value
        name, *rest = value
        if name == _WEIGHT:
            return weights[rest[0]]
        if name == _STATISTIC:
            return None if statistics is None else statistics[rest[0]]
        if name == _COUNTER:
            return 1.0 / (float(statistics[rest[0]]) + 1.0) if counts and statistics is not None else 0.0
        if name == "tuple":
            return tuple(map(read, rest))
        if name == "Pool" and rest[1] == ["tuple"]:
            return Pool(rest[0], tuple(size), tuple(size), (0,) * len(size))
        return _PARTS[name](*map(read, rest))

    return read(_parsed(text)[0])
