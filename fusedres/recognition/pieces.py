"""A piece of a block: what runs as one description, or as it is."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..autograd.residual import Residual, Shortcut
from ..errors import Unsupported
from ..specs import Norm
from ..specs import Unit as UnitSpec
from .modules import conv, norm, unhooked
from .ops import Op, act_of
from .part import Part

Unit = tuple[Op, Op | None]


def in_a_row(x: Tensor, steps: Iterable[Op]) -> Tensor:
    """The originals of ``steps`` one after the other."""
    for op in steps:
        for run in op.run:
            x = run(x)
    return x


@dataclass(frozen=True)
class Piece:
    """A stretch of a block: ``row``, the ops of the main path in it, with ``shortcut`` what is added behind them (None: nothing), and
    ``act`` the activation behind that. ``activated``: the shortcut reads the map behind the first BatchNorm, not the input.
    ``shortcut_left``: the shortcut is the first operand of the sum, whose memory format the sum has.

    Where it runs fused, the row is ``first``, a BatchNorm, and ``units``, convolutions with their BatchNorms.
    """

    row: tuple[Op, ...]
    first: Op | None = None
    units: tuple[Unit, ...] = ()
    shortcut: tuple[Op, ...] | None = None
    activated: bool = False
    act: Op | None = None
    shortcut_left: bool = False

    def __post_init__(self) -> None:
        if self.fused and self.row != self._taken:
            raise Unsupported("its steps cannot all be fused where they stand")
        if self.shortcut is not None and self.last_act != "none":
            raise Unsupported("an activation right in front of the addition")

    @property
    def _taken(self) -> tuple[Op, ...]:
        units = tuple(op for unit in self.units for op in unit if op is not None)
        return units if self.first is None else (self.first, *units)

    @property
    def fused(self) -> bool:
        """Whether it can run fused: a BatchNorm or an addition is in it."""
        return self.first is not None or any(norm is not None for _, norm in self.units) or self.shortcut is not None

    @property
    def last_act(self) -> str:
        """The activation behind the row."""
        last = self.units[-1][1] if self.units else self.first
        return "none" if last is None else str(last.value)

    def original(self, x: Tensor, source: Tensor | None = None) -> Tensor:
        """The same by the original modules: of ``x``, and of ``source``, what the shortcut reads where it is not x."""
        if self.shortcut is None:
            return in_a_row(x, self.row)
        if self.activated:
            x = in_a_row(x, self.row[:1])
        y = in_a_row(x, self.row[1:] if self.activated else self.row)
        beside = in_a_row(x if source is None else source, self.shortcut)
        y = beside + y if self.shortcut_left else y + beside
        return y if self.act is None else in_a_row(y, (self.act,))

    @property
    def unfused(self) -> list[Callable[[Tensor], Tensor]]:
        """The originals that run as they stand, none where it runs fused."""
        return [] if self.fused else [run for op in self.row for run in op.run]

    @functools.cached_property
    def part(self) -> Part:
        """The piece, to be run as one description."""
        return Part(functools.partial(residual, self))


# ---- as a description ---------------------------------------------------------------------------------------------------

_SHORTCUT_ORDER = ("pool", "subsample", "conv", "norm")


def _shortcut(piece: Piece, dtype: torch.dtype | None, norms: list[nn.Module]) -> Shortcut | None:
    if piece.shortcut is None:
        return None
    found = {op.kind: op for op in piece.shortcut}
    if [kind for kind in _SHORTCUT_ORDER if kind in found] != [op.kind for op in piece.shortcut]:
        raise Unsupported("a shortcut whose steps cannot all be fused")
    unit = None
    if "conv" in found:
        behind = None
        if "norm" in found:
            if found["norm"].value != "none":
                raise Unsupported("a shortcut with an activation in front of the addition")
            behind = norm_of(found["norm"], norms)
        unit = UnitSpec(conv(module_of(found["conv"]), dtype), behind)
    for op in piece.shortcut:
        if op.module is not None:
            unhooked(op.module)
    pooled, subsampled = (found[kind].value if kind in found else None for kind in _SHORTCUT_ORDER[:2])
    return Shortcut(pooled, subsampled, unit, piece.activated)


def module_of(op: Op) -> nn.Module:
    """The module of an op; raises Unsupported where it has none."""
    if op.module is None:
        raise Unsupported(f"a {op.kind} that is no module")
    return op.module


def norm_of(op: Op, norms: list[nn.Module]) -> Norm:
    """The BatchNorm of an op, whose module joins ``norms``. Raises Unsupported."""
    module = module_of(op)
    norms.append(module)
    return norm(module, op.value)


def residual(piece: Piece, dtype: torch.dtype | None) -> tuple[Residual, list[nn.Module]]:
    """``(the description of a piece, its BatchNorms)``; raises Unsupported."""
    norms: list[nn.Module] = []
    first = None if piece.first is None else norm_of(piece.first, norms)
    units = tuple(
        UnitSpec(conv(module_of(c), dtype), None if behind is None else norm_of(behind, norms))
        for c, behind in piece.units
    )
    act = "none" if piece.act is None else act_of(piece.act)
    return Residual(units, first, _shortcut(piece, dtype, norms), act), norms
