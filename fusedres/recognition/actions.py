"""What a block of any shape runs as: a fixed order of pieces that run fused, and of calls as they stand."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from .pieces import Piece
from .trace import own


@dataclass(frozen=True)
class Slot:
    """Stands for a value that an action has made, or an input: its number."""

    at: int


@dataclass(frozen=True)
class Fused:
    """``piece`` of the map ``x`` (and of ``source``, where its shortcut reads another) gives ``result``; ``done``: the slots that nobody
    reads any more. ``grad``: whether gradients are recorded, None as the forward is called."""

    piece: Piece
    x: int
    source: int | None
    result: int
    grad: bool | None = None
    done: tuple[int, ...] = ()


@dataclass(frozen=True)
class Getter:
    """Reads what ``module`` keeps as ``name``."""

    module: nn.Module
    name: str

    def held(self) -> Any:
        """What is there now, without asking the class."""
        return own(self.module, self.name)

    def __call__(self) -> Any:
        return getattr(self.module, self.name)


@dataclass(frozen=True)
class Setter:
    """Sets what ``module`` keeps as ``name``."""

    module: nn.Module
    name: str

    def __call__(self, value: Any) -> None:
        setattr(self.module, self.name, value)


@dataclass(frozen=True)
class Plain:
    """``call(*args, **kwargs)`` as it stands gives ``result``; ``args`` and ``kwargs`` hold :class:`Slot` in the places of ``reads``.

    ``keeps_layout``: whether its values do not depend on the memory format of its maps, and its result has theirs; ``measures``: whether it
    asks for a map's shape or dtype alone; ``overwrites``: whether it, or a call behind it that may share its memory, may overwrite what it
    reads. ``grad``: as of :class:`Fused`.
    """

    name: str
    call: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    reads: tuple[int, ...]
    result: int
    keeps_layout: bool
    measures: bool
    overwrites: bool
    grad: bool | None = None
    done: tuple[int, ...] = ()

    @functools.cached_property
    def arguments(self) -> tuple[Fill, Fill]:
        """What gives ``args``, and the values of ``kwargs``, with what a function of a slot's number gives in the places of slots."""
        return filled(self.args), filled(tuple(self.kwargs.values()))

    @property
    def stands(self) -> bool:
        """Whether it is a call that might have been fused."""
        return not self.measures and not isinstance(self.call, Getter | Setter)


Action = Fused | Plain

#: a value, by what stands in the places of its slots
Fill = Callable[[Callable[[int], Any]], Any]


def filled(value: Any) -> Fill:
    """What gives ``value`` with what a function of a slot's number gives in the places of slots; lists are new ones every time."""
    if isinstance(value, Slot):
        at = value.at
        return lambda take: take(at)
    if isinstance(value, slice):
        ends = filled((value.start, value.stop, value.step))
        return lambda take: slice(*ends(take))
    if type(value) is tuple:
        inner = tuple(map(filled, value))
        return lambda take: tuple([fill(take) for fill in inner])
    if type(value) is list:
        items = tuple(map(filled, value))
        return lambda take: [fill(take) for fill in items]
    return lambda take: value


@dataclass(frozen=True)
class Program:
    """The ``actions`` of a forward in order, over ``size`` slots of which the inputs are the first; ``output`` holds :class:`Slot`.

    ``found``: what has to be kept when it is called, as what reads it and its type. ``overwrites``: what reads the tensors that are
    kept and that it overwrites. ``asks``: whether it is what runs with gradients recorded alone, or without.
    """

    actions: tuple[Action, ...]
    size: int
    output: Any
    found: tuple[tuple[Getter, type], ...] = ()
    overwrites: tuple[Getter, ...] = ()
    asks: bool = False
    switches: bool = field(init=False)
    only_computes: bool = field(init=False)
    pieces: tuple[Piece, ...] = field(init=False)
    unfused: tuple[str, ...] = field(init=False)
    #: the slots that several pieces read
    often: frozenset[int] = field(init=False)

    def __post_init__(self) -> None:
        pieces = tuple(action.piece for action in self.actions if isinstance(action, Fused))
        names = dict.fromkeys(a.name for a in self.actions if isinstance(a, Plain) and a.stands)
        switches = any(action.grad is not None for action in self.actions)
        beside = any(isinstance(a, Plain) and isinstance(a.call, Getter | Setter) for a in self.actions)
        object.__setattr__(self, "switches", switches)
        object.__setattr__(self, "only_computes", not (switches or beside or self.asks))
        object.__setattr__(self, "pieces", pieces)
        object.__setattr__(self, "unfused", tuple(names))
        fused = [action for action in self.actions if isinstance(action, Fused)]
        reads = Counter(slot for action in fused for slot in (action.x, action.source) if slot is not None)
        object.__setattr__(self, "often", frozenset(slot for slot, times in reads.items() if times > 1))

    @functools.cached_property
    def leaving(self) -> Fill:
        """What gives ``output``."""
        return filled(self.output)
