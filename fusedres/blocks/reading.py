"""What a block has read of itself, kept from call to call, because reading takes longer than running a small block.

A block is read once. That holds while every object that it was read from is the very same one: children and their types, parameters and
buffers, plain attributes (modes, strides, momenta), hooks, the code of forwards, and what graphs have read outside of modules. What changes
inside an object is looked at again at every call: dtype, device and shape of tensors (:class:`fusedres.recognition.Part`).
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..errors import Unsupported
from ..recognition import BlockGraph, Flow, classes_of, watched
from .state import BlockState
from .unchanged import Held, contents

#: the names of the attributes that a block's forward sets, by the module that has them
Sets = Mapping[nn.Module, set[str]]


class Seen:
    """Every object that a reading of ``modules`` and ``graphs`` depends on, but for what the block itself sets (``sets``). Asked at every
    call, so that what it is found by is kept: the classes of the modules, and the dictionaries in them."""

    def __init__(self, modules: list[nn.Module], graphs: tuple[BlockGraph | Flow, ...], sets: Sets) -> None:
        self._graphs, self._classes = graphs, classes_of(modules)
        mappings: list[dict[str, object]] = []
        #: with the names that do not count
        self._set: list[tuple[dict[str, object], set[str]]] = []
        for module in modules:
            held, names = module.__dict__, sets.get(module)
            if names is None:
                mappings += (held, *contents(held))
            else:
                self._set += ((mapping, names) for mapping in (held, *contents(held)))
        self._held = Held(modules, mappings)
        self._then = self._beside()

    def _beside(self) -> list[object]:
        """What is beside all that modules hold."""
        found: list[object] = watched(self._classes)
        for mapping, names in self._set:
            found += [value for name, value in mapping.items() if name not in names]
        for graph in self._graphs:
            found += graph.outside()
        return found

    def objects(self) -> Iterator[object]:
        """All of them, as they were."""
        return itertools.chain(self._held.values, self._then)

    def holds(self) -> bool:
        """Whether all of them are the very same still."""
        if not self._held.is_unchanged():
            return False
        now = self._beside()
        return len(now) == len(self._then) and all(map(operator.is_, now, self._then))


@dataclass(frozen=True)
class Reading:
    """``found``, or why there is nothing, and ``seen``, what it depends on."""

    seen: Seen
    found: Any

    def holds(self) -> bool:
        """Whether nothing has changed since."""
        return self.seen.holds()


def recall(
    state: BlockState,
    inside: Callable[[], list[nn.Module]],
    graphs: Callable[[], tuple[BlockGraph | Flow, ...]],
    sets: Callable[[], Sets],
    read: Callable[[], Any],
) -> Any:
    """``read()``, or what it gave before where nothing of the modules ``inside()`` and of ``graphs()`` has changed since but what the block
    ``sets()``; raises Unsupported."""
    known = state.reading
    if known is None or not known.holds():
        known = _read(state, inside, graphs, sets, read)
    if isinstance(known.found, Unsupported):
        raise known.found.anew()
    return known.found


def _read(
    state: BlockState,
    inside: Callable[[], list[nn.Module]],
    graphs: Callable[[], tuple[BlockGraph | Flow, ...]],
    sets: Callable[[], Sets],
    read: Callable[[], Any],
) -> Reading:
    modules, depends, found = [], (), None
    try:
        modules = inside()
        depends = graphs()
        seen = Seen(modules, depends, sets())
        found = read()
    except Unsupported as reason:
        seen, found = Seen(modules, depends, {}), reason.anew()
    reading = Reading(seen, found)
    # weights that were computed (torch.func.functional_call) would be kept with their graph
    if not any(isinstance(o, Tensor) and o.grad_fn is not None for o in seen.objects()):
        state.reading = reading
    return reading
