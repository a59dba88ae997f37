"""Whether modules hold the very same objects as before: asked of all that is inside a block at every call of it, so that it is in C++ where
the extension is built."""

from __future__ import annotations

import itertools
import operator
from array import array
from collections.abc import Iterable
from typing import Any

_own = operator.attrgetter("__dict__")
#: of what a module holds by its attributes: everything else that it holds
contents = operator.itemgetter(
    "_parameters", "_buffers", "_modules", "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"
)  # fmt: skip
Mappings = tuple[dict[str, object], ...]


def in_python(three: tuple[Any, ...], mappings: Mappings, lengths: bytes, values: tuple[object, ...]) -> bool:
    """What ``fusedres._C.unchanged`` says of the same arguments."""
    objects = three[::3]
    now = itertools.chain(map(type, objects), map(_own, objects))
    return (
        all(map(operator.is_, now, (*three[1::3], *three[2::3])))
        and [*map(len, mappings)] == array("I", lengths).tolist()
        and all(map(operator.is_, _values(mappings), values))
    )


def _values(mappings: Mappings) -> Iterable[object]:
    return itertools.chain.from_iterable(map(dict.values, mappings))


try:
    from fusedres._C import unchanged
except ImportError:
    unchanged = in_python


class Held:
    """What ``objects`` are, and what ``mappings`` hold: their ``values``, at the time of this."""

    def __init__(self, objects: Iterable[Any], mappings: Iterable[dict[str, object]]) -> None:
        self._three = tuple(itertools.chain.from_iterable((o, type(o), o.__dict__) for o in objects))
        self._mappings = tuple(mappings)
        self._lengths = array("I", map(len, self._mappings)).tobytes()
        self.values = tuple(_values(self._mappings))

    def is_unchanged(self) -> bool:
        """Whether all objects are of the same class with the same attributes, and all values the very same objects in the same order."""
        return unchanged(self._three, self._mappings, self._lengths, self.values)
