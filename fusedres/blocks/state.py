"""What a fused module knows of itself: its kind, what it was converted with, what it has read, and how its last call went."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

if TYPE_CHECKING:
    from ..recognition import Flows, Graphs
    from .base import Kind
    from .plan import Plan
    from .reading import Reading
    from .stretch import Stretch


class Outcome(NamedTuple):
    """How a call went: on a ``backend``, by its name, or by the original modules, for a ``reason``."""

    backend: str | None = None
    reason: str | None = None

    @property
    def fused(self) -> bool:
        """Whether a backend ran it."""
        return self.backend is not None

    def __str__(self) -> str:
        return f"original modules: {self.reason}" if self.backend is None else self.backend


class CallRecord(NamedTuple):
    """What remains of a part's call: the block's mode, whether autograd recorded it, and what its maps were, but for their values.
    ``identities`` tell which of the maps of one block are the same. ``was_nchw``: eager's output would not be channels_last, so that it is
    converted where it leaves; ``copied``: its output was copied for code that is not ours, since its writer keeps it."""

    mode: bool
    recorded: bool
    device: torch.device
    dtype: torch.dtype
    shapes: tuple[torch.Size, ...]
    needed: tuple[bool, ...]
    identities: tuple[int, ...]
    was_nchw: bool = False
    copied: bool = False


def _constant(method: Callable[..., Any]) -> Callable[..., Any]:
    """``method`` with the mark of torch.compiler.assume_constant_result, which would import the compiler: one runs it outside of its trace,
    and takes what it returns for a constant."""
    method._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return method


@dataclass(eq=False, slots=True)
class BlockState:
    """The state of a fused module, of one alone (:meth:`of`). ``recompute``: backward recomputes cheap convolutions instead of keeping
    their outputs. ``structure``: the block's graphs by mode; ``layers``: those of the dense layers at the end of a Sequential; ``flows``:
    those of a general block by mode and form of the call; None: to be read when they are needed.

    ``reading`` is what the block has read of itself (:mod:`fusedres.blocks.reading`), ``plan`` what a compiler has last traced
    (:mod:`fusedres.blocks.plan`), ``stretches`` what of it is asked once, without gradients and with them (:mod:`fusedres.blocks.stretch`).
    ``outcome`` and ``records`` are the last call's, one record for each part, None for one that ran its original modules; all of them are
    replaced as a whole and never written into, so that threads do not see half of them.
    """

    kind: Kind
    recompute: bool = False
    structure: Graphs | None = None
    layers: dict[str, Graphs] | None = None
    flows: Flows | None = None
    reading: Reading | None = field(default=None, repr=False)
    plan: Plan | None = field(default=None, repr=False)
    stretches: tuple[Stretch, Stretch] | None = field(default=None, repr=False)
    outcome: Outcome | None = None
    records: tuple[CallRecord | None, ...] = ()
    module: weakref.ref[nn.Module] | None = field(default=None, repr=False)

    def of(self, module: nn.Module) -> BlockState:
        """Itself, as the state of ``module``."""
        self.module = weakref.ref(module)
        return self

    def is_of(self, module: nn.Module) -> bool:
        """Whether it is the state of ``module``, and not of one whose attributes somebody has copied by hand."""
        return self.module is not None and self.module() is module

    def _owner(self) -> nn.Module:
        module = None if self.module is None else self.module()
        if module is None:
            raise RuntimeError("the state of a fused module that is gone")
        return module

    @_constant
    def planned(self, form: str) -> Plan:
        """What a compiler traces of the module, as it is now, where it is called in a ``form``, which is written as
        :func:`~fusedres.recognition.read_form` reads it."""
        return self.kind.plan(self._owner(), self, form)

    @_constant
    def takes(self, at: int, *measures: Any) -> bool:
        """Whether the part number ``at`` runs fused with maps of these ``measures``, those of :meth:`~.base.Kind.measured`."""
        return self.kind.takes(self._owner(), self, at, self.kind.measured(*measures))

    def fresh(self) -> BlockState:
        """The same of no module, without anything that a call has left."""
        # a flow may hold parameters of the block itself, which a copy has its own of
        return BlockState(self.kind, self.recompute, self.structure, self.layers)

    def __copy__(self) -> BlockState:
        return self.fresh()

    def __deepcopy__(self, memo: dict[int, Any]) -> BlockState:
        return self.fresh()  # graphs are never written into

    def __reduce__(self) -> tuple[Any, ...]:
        # graphs hold functions, which no pickle of weights may, and say nothing that the module does not
        return restore, (self.kind.key, self.recompute)


#: by their keys, which stand in pickles
_kinds: dict[str, Kind] = {}


def register(kind: Kind) -> None:
    """Add a kind under its key. Raises ValueError where there is one already."""
    if kind.key in _kinds:
        raise ValueError(f"there is a kind {kind.key!r} already")
    _kinds[kind.key] = kind


def kinds() -> Mapping[str, Kind]:
    """Every kind, by its key."""
    return _kinds


def kind_of(key: str) -> Kind:
    """The kind with that key. Raises ValueError where there is none."""
    if key not in _kinds:
        raise ValueError(f"unknown kind of block {key!r}: expected one of {', '.join(_kinds)}")
    return _kinds[key]


def restore(key: str, recompute: bool) -> BlockState:
    """The state of a module that comes from a pickle. Raises ValueError for a kind that is not known."""
    return BlockState(kind_of(key), recompute)


torch.serialization.add_safe_globals([restore])
