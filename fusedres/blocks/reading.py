"""What a block has read of itself, kept from call to call, because reading takes longer than running a small block.

A block is read once. That holds while every object that it was read from is the very same one: children and their types, parameters and
buffers, plain attributes (modes, strides, momenta), hooks, the code of forwards, and what graphs have read outside of modules. What changes
inside an object is looked at again at every call: dtype, device and shape of tensors (:class:`fusedres.recognition.Part`).
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..errors import Unsupported
from ..recognition import BlockGraph, Flow, watched
from ..swap import KEY
from .state import BlockState

_contents = operator.itemgetter(
    "_parameters", "_buffers", "_modules", "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"
)  # fmt: skip


@dataclass(frozen=True)
class Reading:
    """``found``, or why there is nothing, and ``seen``, what it depends on: all that :func:`_seen` finds of ``modules`` and ``graphs``."""

    modules: list[nn.Module]
    graphs: tuple[BlockGraph | Flow, ...]
    seen: list[object]
    found: Any

    def holds(self) -> bool:
        """Whether nothing has changed since."""
        now = _seen(self.modules, self.graphs)
        return len(now) == len(self.seen) and all(map(operator.is_, now, self.seen))


def _seen(modules: list[nn.Module], graphs: Iterable[BlockGraph | Flow]) -> list[object]:
    """Every object that a reading of ``modules`` depends on."""
    found: list[object] = [*map(type, modules), *watched(modules)]
    for module in modules:
        own = module.__dict__
        if KEY in own:
            found += [value for name, value in own.items() if name != KEY]
        else:
            found += own.values()
        for contents in _contents(own):
            if contents:
                found += contents.values()
    for graph in graphs:
        found += graph.outside()
    return found


def recall(
    state: BlockState,
    inside: Callable[[], list[nn.Module]],
    graphs: Callable[[], tuple[BlockGraph | Flow, ...]],
    read: Callable[[], Any],
) -> Any:
    """``read()``, or what it gave before where nothing of the modules ``inside()`` and of ``graphs()`` has changed since; raises
    Unsupported."""
    known = state.reading
    if known is None or not known.holds():
        known = _read(state, inside, graphs, read)
    if isinstance(known.found, Unsupported):
        raise known.found.anew()
    return known.found


def _read(
    state: BlockState,
    inside: Callable[[], list[nn.Module]],
    graphs: Callable[[], tuple[BlockGraph | Flow, ...]],
    read: Callable[[], Any],
) -> Reading:
    modules, depends, found = [], (), None
    try:
        modules = inside()
        depends = graphs()
        seen = _seen(modules, depends)
        found = read()
    except Unsupported as reason:
        seen, found = _seen(modules, depends), reason.anew()
    reading = Reading(modules, depends, seen, found)
    # weights that were computed (torch.func.functional_call) would be kept with their graph
    if not any(isinstance(o, Tensor) and o.grad_fn is not None for o in seen):
        state.reading = reading
    return reading
