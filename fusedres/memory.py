"""What a block remembers of itself from call to call, because reading it takes longer than running a small one.

A block is read once: its pieces, their descriptions, the checks against its input. That holds while every object that it was read from is
the very same one: children and their types, parameters and buffers, plain attributes (modes, strides, momenta) and hooks. What changes
inside an object is looked at again: dtype, device and shape of the tensors, and of the input. What is remembered is replaced as a whole
and never written into, so that threads and replicas that share a module's attributes do not see half of it.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn

#: where a module keeps its memory; no part of a copy
KEY = "_fusedres_memory"
#: attributes of a block that say nothing about how it computes
_OUTCOMES = (KEY, "_fusedres_last", "_fusedres_calls")

_contents = operator.itemgetter(
    "_parameters", "_buffers", "_modules", "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"
)  # fmt: skip
_measures = operator.attrgetter("dtype", "device", "shape")


class Unsupported(Exception):
    """A block that runs its original modules; the message says why, for ``report``."""

    def anew(self) -> Unsupported:
        """The same without the frames that it has passed, which would be kept with it."""
        return type(self)(*self.args)


class Part:
    """A piece of a block that runs as one schedule. ``read(dtype)`` gives ``(its description, its BatchNorms)``, with convolution weights
    cast to ``dtype``; raises Unsupported."""

    def __init__(self, read: Callable[[torch.dtype | None], tuple[Any, Iterable[nn.Module]]]) -> None:
        self._read = read
        self._known: tuple[Any, dict[Tensor, int], list[Tensor]] | str | None = None
        self._passed: list[object] | None = None

    def describe(self, dtype: torch.dtype | None) -> tuple[Any, dict[Tensor, int]]:
        """``(description, counters of the BatchNorms that are about to use a batch, with how often)``; raises Unsupported."""
        known = self._known if dtype is None else None
        if known is None:
            try:
                description, norms = self._read(dtype)
            except Unsupported as reason:
                self._known = self._known or str(reason)
                raise
            norms = [
                norm for norm in norms if isinstance(norm, nn.modules.batchnorm._BatchNorm)
            ]  # a frozen one has no state
            known = description, _counters(norms), list(instances(description, Tensor))
            # a cast weight is another one in each step, and so is the momentum of a cumulative average; process groups come and go
            if dtype is None and not any(n.momentum is None or isinstance(n, nn.SyncBatchNorm) for n in norms):
                self._known = known
        elif isinstance(known, str):
            raise Unsupported(known)
        return known[:2]

    def check(self, check: Callable[..., None], description: Any, *maps: Tensor) -> None:
        """``check(description, *maps)``, unless it has passed for maps and tensors like these."""
        known, measures = self._known, None
        if isinstance(known, tuple) and known[0] is description and all(type(x) is Tensor for x in maps):
            measures = [*map(_measures, maps), *map(_measures, known[2])]
            if measures == self._passed:
                return
        check(description, *maps)
        self._passed = measures


def _counters(norms: Iterable[nn.Module]) -> dict[Tensor, int]:
    return Counter(
        norm.num_batches_tracked
        for norm in norms
        if norm.training and norm.track_running_stats and norm.num_batches_tracked is not None
    )


def instances(value: object, kind: type) -> Iterator[Any]:
    """Every ``kind`` in a description."""
    if isinstance(value, kind):
        yield value
    elif isinstance(value, tuple):
        for item in value:
            yield from instances(item, kind)
    elif is_dataclass(value):
        for field in fields(value):
            yield from instances(getattr(value, field.name), kind)


def _seen(block: nn.Module, modules: list[nn.Module]) -> list[object]:
    """Every object that a reading of ``modules`` depends on."""
    found: list[object] = [*map(type, modules)]
    for module in modules:
        own = module.__dict__
        if module is block:
            found += [value for name, value in own.items() if name not in _OUTCOMES]
        else:
            found += own.values()
        for contents in _contents(own):
            if contents:
                found += contents.values()
    return found


def recall(block: nn.Module, inside: Callable[[], list[nn.Module]], read: Callable[[], Any]) -> Any:
    """``read()``, or what it gave before where nothing of the modules ``inside()`` has changed since; raises Unsupported."""
    known = block.__dict__.get(KEY)
    if known is not None:
        modules, seen, found = known
        now = _seen(block, modules)
        if len(now) == len(seen) and all(map(operator.is_, now, seen)):
            if isinstance(found, Unsupported):
                raise found.anew()
            return found
    modules = inside()
    seen = _seen(block, modules)
    try:
        found = read()
    except Unsupported as reason:
        found = reason.anew()
    # weights that were computed (torch.func.functional_call) would be kept with their graph
    if not any(isinstance(o, Tensor) and o.grad_fn is not None for o in seen):
        block.__dict__[KEY] = modules, seen, found
    if isinstance(found, Unsupported):
        raise found.anew()
    return found
