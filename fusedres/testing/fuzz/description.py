"""What a random network is: nested frozen descriptions, which print as the Python that makes them.

Every field has its simplest value as default, so that a description shrinks by setting fields back (:mod:`.shrink`) and is printed by what
is unusual in it. Numbers of channels are no part of it: they follow from ``width`` and the joins.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from typing import Any


@dataclass(frozen=True, repr=False)
class Description:
    """What all descriptions share: a repr with what differs from the default, which evaluates to an equal one."""

    def __repr__(self) -> str:
        given = (f"{f.name}={getattr(self, f.name)!r}" for f in fields(self) if getattr(self, f.name) != f.default)
        return f"{type(self).__name__}({', '.join(given)})"

    def features(self) -> Iterator[str]:
        """What is unusual in it, as ``Class.field=value``, of everything inside."""
        for f in fields(self):
            value = getattr(self, f.name)
            parts = list(_parts(value))
            for part in parts:
                yield from part.features()
            if not parts and value != f.default:
                yield f"{type(self).__name__}.{f.name}={value}"


def _parts(value: Any) -> Iterator[Description]:
    """The descriptions in a field, which may be a tuple of tuples of them."""
    if isinstance(value, Description):
        yield value
    elif isinstance(value, tuple):
        for item in value:
            yield from _parts(item)


@dataclass(frozen=True, repr=False)
class Act(Description):
    """An activation. ``name``: one of ``snippets.ACTIVATIONS``; ``form``: module, module_, function, function_, torch or method, with ``_``
    in place. What an activation has no such form of is a module."""

    name: str = "relu"
    form: str = "module"


@dataclass(frozen=True, repr=False)
class Conv(Description):
    """A convolution. ``groups`` 0: depthwise. Padding keeps the size of a map, but for the stride."""

    kernel: int = 3
    stride: int = 1
    groups: int = 1
    dilation: int = 1
    bias: bool = False
    padding_mode: str = "zeros"


@dataclass(frozen=True, repr=False)
class Norm(Description):
    """A normalisation: ``kind`` batch, group or instance."""

    kind: str = "batch"
    momentum: float | None = 0.1
    eps: float = 1e-5
    affine: bool = True
    track: bool = True


@dataclass(frozen=True, repr=False)
class Unit(Description):
    """A row of steps. ``order``: letters c (convolution), n (norm), a (activation), d (dropout), p (pool), s (squeeze and excitation),
    i (identity). ``home``: where its modules stand: in the block (children), in an nn.Sequential, or in a module of their own. ``times``:
    how often it is called, with the same modules. ``pool``: max, avg or lp, with ``pool_stride``; ``ceil``: whether it rounds sizes up, as
    a shortcut needs it."""

    order: str = "cn"
    conv: Conv = Conv()
    norm: Norm = Norm()
    act: Act = Act()
    pool: str = "max"
    pool_stride: int = 1
    ceil: bool = True
    drop: float = 0.5
    times: int = 1
    home: str = "children"


@dataclass(frozen=True, repr=False)
class Effect(Description):
    """Something that forward does beside: one of ``snippets.EFFECTS`` behind unit number ``at``, or one of ``snippets.CONTEXTS`` or
    ``METHODS`` around it."""

    kind: str = "store"
    at: int = 0


@dataclass(frozen=True, repr=False)
class Join(Description):
    """How main path y and shortcut s meet: ``op``, one of ``snippets.JOINS``; ``flipped``: operands exchanged where that means the same.
    ``main``, ``shortcut``, ``after``: activations in front of the join and behind it. ``returns``: out, or a pair of out and y, s, or
    the value before the last activation."""

    op: str = "add"
    flipped: bool = False
    main: Act | None = None
    shortcut: Act | None = None
    after: Act | None = None
    returns: str = "out"


@dataclass(frozen=True, repr=False)
class Residual(Description):
    """``join(main(prefix(x)), shortcut(x or prefix(x)))``. ``shortcut``: identity, conv, convbn, pool (with a 1x1 convolution and a norm),
    slice (strided, padded with zeros) or unit (``side``); what an identity cannot join becomes a
    convolution. ``style``: how the class is written, one of ``snippets.STYLES``."""

    main: tuple[Unit, ...] = (Unit(),)
    join: Join = Join()
    shortcut: str = "identity"
    side: Unit = Unit()
    prefix: tuple[Unit, ...] = ()
    from_prefix: bool = False
    effects: tuple[Effect, ...] = ()
    width: int = 8
    nested: bool = False
    style: str = ""


@dataclass(frozen=True, repr=False)
class Dense(Description):
    """Layers that concatenate. ``order``: xy or yx (each layer a module of one map), sequential (such layers in
    an nn.Sequential), features (modules of a list of maps, as torchvision's), or loop (the block does it)."""

    layers: tuple[tuple[Unit, ...], ...] = ((Unit("nac"),),)
    order: str = "xy"
    growth: int = 4
    effects: tuple[Effect, ...] = ()


@dataclass(frozen=True, repr=False)
class Row(Description):
    """Units one after another: a module with a forward, or (``sequential``) an nn.Sequential of everything."""

    units: tuple[Unit, ...] = (Unit(),)
    sequential: bool = False
    effects: tuple[Effect, ...] = ()
    width: int = 8


@dataclass(frozen=True, repr=False)
class Gather(Description):
    """One-shot aggregation: every unit's output, and with ``keep`` the input, are concatenated, and a last ``unit`` reads that; ``split``:
    a half of the channels goes through the units instead; ``residual``: the input is added."""

    units: tuple[Unit, ...] = (Unit(),)
    last: Unit = Unit()
    keep: bool = True
    split: bool = False
    residual: bool = False
    effects: tuple[Effect, ...] = ()


Block = Residual | Dense | Row | Gather


@dataclass(frozen=True, repr=False)
class Network(Description):
    """Blocks one after another. ``behind``: for each block what the network's own code does with its output (one of ``snippets.BEHIND``);
    ``container``: module (a forward) or sequential; ``keyword``: blocks are called by keyword; ``twice``: the last block is called twice
    where its shapes allow; ``names``: a seed for the names, 0 for plain ones; ``expressions``: a unit is one expression, not a row of
    statements."""

    blocks: tuple[Block, ...] = (Residual(),)
    behind: tuple[str, ...] = ()
    container: str = "module"
    keyword: bool = False
    head: str = ""
    names: int = 0
    expressions: bool = False
    channels: int = 8


@dataclass(frozen=True, repr=False)
class Step(Description):
    """A call of the model after a ``change`` of its state: one of ``changes.CHANGES``, done to module or parameter number ``where``, modulo
    the number of those to which it can be done. ``kind``: train, no_grad, inference, penalty (second order) or double (two calls, one
    backward)."""

    kind: str = "train"
    training: bool = True
    change: str = ""
    where: int = 0


@dataclass(frozen=True, repr=False)
class Case(Description):
    """A network, its input and what happens to it. ``layout``: one of ``twins.LAYOUTS``. ``recompute`` and
    ``verify``: what convert is asked for; without its proof what is wrong shows in the numbers. ``report``: whether that is asked for at
    the end."""

    network: Network = Network()
    steps: tuple[Step, ...] = (Step(),)
    layout: str = "nchw"
    dtype: str = "float64"
    batch: int = 2
    size: int = 6
    needs_gradient: bool = True
    model_layout: str = "nchw"
    recompute: bool = False
    verify: bool = False
    report: bool = False
    seed: int = field(default=0)


@dataclass(frozen=True, repr=False)
class Action(Description):
    """Something that a user does: one of ``actions.ACTIONS``, with ``where`` as in a :class:`Step`."""

    kind: str = "train"
    where: int = 0


@dataclass(frozen=True, repr=False)
class Session(Description):
    """Actions on the network of a case (whose steps are not run), one after another."""

    case: Case = Case()
    actions: tuple[Action, ...] = (Action("convert"), Action())


KINDS = (Act, Conv, Norm, Unit, Effect, Join, Residual, Dense, Row, Gather, Network, Step, Case, Action, Session)


def parse(text: str) -> Case | Session:
    """The case or session that ``text``, its repr, describes: to run again what a log has printed. Raises ValueError for anything else."""
    found: Any = eval(text, {"__builtins__": {}}, {kind.__name__: kind for kind in KINDS})
    if not isinstance(found, Case | Session):
        raise ValueError(f"expected the repr of a Case or a Session, found that of a {type(found).__name__}")
    return found
