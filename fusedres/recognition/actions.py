"""What a block of any shape runs as: a fixed order of pieces that run fused, and of calls as they stand."""

from __future__ import annotations

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
    asks for a map's shape or dtype alone. ``grad``: as of :class:`Fused`.
    """

    name: str
    call: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    reads: tuple[int, ...]
    result: int
    keeps_layout: bool
    measures: bool
    grad: bool | None = None
    done: tuple[int, ...] = ()

    @property
    def stands(self) -> bool:
        """Whether it is a call that might have been fused."""
        return not self.measures and not isinstance(self.call, Getter | Setter)


Action = Fused | Plain


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

    def __post_init__(self) -> None:
        pieces = tuple(action.piece for action in self.actions if isinstance(action, Fused))
        names = dict.fromkeys(a.name for a in self.actions if isinstance(a, Plain) and a.stands)
        switches = any(action.grad is not None for action in self.actions)
        beside = any(isinstance(a, Plain) and isinstance(a.call, Getter | Setter) for a in self.actions)
        object.__setattr__(self, "switches", switches)
        object.__setattr__(self, "only_computes", not (switches or beside or self.asks))
        object.__setattr__(self, "pieces", pieces)
        object.__setattr__(self, "unfused", tuple(names))
