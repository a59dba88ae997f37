"""What runs a fused module: from its call to the autograd block and back, one way.

    state.py       BlockState, the one attribute of a fused module; Outcome and CallRecord, what its last call left for
                   ``report``; the kinds by their keys
    reading.py     what a block has read of itself, kept while nothing that it was read from changes
    handover.py    Handover: a map on its way from one fused block to the next, and how it leaves for code that is not ours
    base.py        Kind: how a kind of block is read and run; ``prepare``, the only way to a backend
    residual.py dense.py sequential.py networks.py    the kinds; general.py: a block of any other shape

The class that a module gets stands in :mod:`fusedres.swap`: one mixin without names of its own, which would hide what a user has called
so.

    adopt(module, kind, recompute=, structure=, layers=, flows=)    make ``module`` a fused block of the kind with that key
    release(module)                                         give it back its class
    kind_key(module) -> str | None                          the key of its kind, None where it is no fused block
    kinds() -> dict[str, Kind]                              every kind, by its key
    parts_of(module) -> list[Part]                          what would run fused as the module stands; raises Unsupported
    BlockState(kind_of(key))                                the state of a class that is fused from the start
"""

from __future__ import annotations

from torch import nn

from ..recognition import Flows, Graphs, Part
from ..swap import KEY, FusedBlock, is_converted, mixed_class, original_class, resume, state_of
from .base import Kind
from .dense import DenseKind, TransitionKind
from .general import GeneralKind
from .networks import HeadKind, StemKind, SyncNormKind
from .residual import (
    BasicKind,
    BottleneckKind,
    HighwayKind,
    PlainKind,
    PreActBasicKind,
    PreActBottleneckKind,
    ResidualKind,
)
from .sequential import SEQUENTIAL
from .state import BlockState, CallRecord, Outcome, kind_of, kinds, register

__all__ = [
    "BlockState", "CallRecord", "FusedBlock", "Kind", "Outcome", "adopt", "is_converted", "kind_key", "kind_of", "kinds", "parts_of",
    "register", "release",
]  # fmt: skip

for _kind in (
    ResidualKind(), BasicKind(), BottleneckKind(), PreActBasicKind(), PreActBottleneckKind(), PlainKind(), HighwayKind(), DenseKind(),
    TransitionKind(), GeneralKind(), SEQUENTIAL, StemKind(), HeadKind(), SyncNormKind(),
):  # fmt: skip
    register(_kind)


def adopt(
    module: nn.Module,
    kind: str,
    *,
    recompute: bool = False,
    structure: Graphs | None = None,
    layers: dict[str, Graphs] | None = None,
    flows: Flows | None = None,
) -> None:
    """Make ``module``, fused or not, a fused block of ``kind`` with a state of its own, in place. ``structure``, ``layers``, ``flows``:
    what recognition has read, for kinds that run by it; without it the block reads it itself. Raises ValueError for an unknown kind.
    """
    state = BlockState(kind_of(kind), recompute, structure, layers, flows)
    resume(module)
    if not isinstance(module, FusedBlock):
        module.__class__ = mixed_class(type(module))
    module.__dict__[KEY] = state.of(module)


def release(module: nn.Module) -> None:
    """Undo :func:`adopt` in place; does nothing to a module that is not converted."""
    resume(module)
    if is_converted(module):
        module.__dict__.pop(KEY, None)
        module.__class__ = original_class(module)


def kind_key(module: nn.Module) -> str | None:
    """The key of the kind of a fused module, None for any other."""
    state = state_of(resume(module))
    return None if state is None else state.kind.key


def parts_of(module: nn.Module) -> list[Part]:
    """What would run fused as ``module``, a fused block, stands; raises Unsupported."""
    state = state_of(module)
    assert state is not None
    return state.kind.parts(state.kind.recall(module, state))
