"""The calls that a thread makes, written down so that they can be made again: parts that run fused, and what stands beside them."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from torch import Tensor

from ..backends.contract import Backend
from ..specs import BlockSpec


class PartCall(NamedTuple):
    """A part that ran fused: ``spec`` on the map ``given``, and on ``beside``, with the ``stats`` of the map, into ``out``; ``counters``,
    those of its BatchNorms. ``lasts``: the description is that of the next call, too. It gave ``y`` and its ``y_stats``."""

    backend: Backend
    spec: BlockSpec
    counters: dict[Tensor, int]
    given: Tensor
    beside: Tensor | None
    stats: Tensor | None
    out: Tensor | None
    lasts: bool
    y: Tensor
    y_stats: Tensor | None


class PlainCall(NamedTuple):
    """``call(*args, **kwargs)``, which gave ``y``."""

    call: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    y: Any

    @property
    def given(self) -> tuple[Any, ...]:
        """All arguments."""
        return (*self.args, *self.kwargs.values())


Calls = list[PartCall | PlainCall]

#: of a thread: where its calls are written down
_following = threading.local()


@contextlib.contextmanager
def follow() -> Iterator[Calls]:
    """The calls that this thread makes inside the ``with``, in their order."""
    previous = following()
    _following.calls = calls = list[PartCall | PlainCall]()
    try:
        yield calls
    finally:
        _following.calls = previous


def following() -> Calls | None:
    """Where this thread's calls are written down, None where they are not."""
    return getattr(_following, "calls", None)


def made(call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """``call(*args, **kwargs)``, which runs as it stands."""
    calls = following()
    if calls is None:
        return call(*args, **kwargs)
    before = len(calls)
    y = call(*args, **kwargs)
    del calls[before:]  # what it makes itself, it makes itself again
    calls.append(PlainCall(call, args, kwargs, y))
    return y
