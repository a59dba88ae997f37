"""A forward of any shape: all its calls in their order, for one form of its arguments."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import Unsupported
from .graph import CONCATENATIONS, Tracer
from .lookup import Beside, Stores
from .modules import CONVOLUTIONS, child_of, is_uninitialised, norm_types, unhooked
from .trace import Node, Reads, Refused, Traced, is_plain

#: more attributes than the forward of a block sets
_MOST_STORED = 32
#: more convolutions than any block has whose paths split and meet again
MOST_CONVOLUTIONS = 16

# ---- what a forward is given -------------------------------------------------------------------------------------------


class Leaf(NamedTuple):
    """An argument: a map where ``kind`` is None, else the constant ``value`` of that type."""

    kind: type | None = None
    value: Any = None


class Several(NamedTuple):
    """A list or a tuple of arguments."""

    kind: type
    items: tuple[Leaf | Several, ...]


Given = Leaf | Several


class Form(NamedTuple):
    """How a forward is called: which arguments are maps, what the others are, and whether gradients are recorded."""

    args: tuple[Given, ...]
    kwargs: tuple[tuple[str, Given], ...] = ()
    grad: bool = True

    @property
    def other(self) -> Form:
        """The same with gradients recorded where they are not here, or the reverse."""
        return self._replace(grad=not self.grad)

    def count(self) -> int:
        """How many maps it has."""
        return sum(map(_maps_in, (*self.args, *(given for _, given in self.kwargs))))


def _maps_in(given: Given) -> int:
    return sum(map(_maps_in, given.items)) if isinstance(given, Several) else given.kind is None


MAP = Leaf()
#: a forward of one map
ONE_MAP = Form((MAP,))
#: what is tried of a module that has not been called yet: a map, a list of maps, two maps
_LIKELY = (
    ONE_MAP,
    Form((Several(list, (MAP,)),)),
    Form((Several(list, (MAP, MAP)),)),
    Form((MAP, MAP)),
)


def _given(value: Any, maps: list[Tensor]) -> Given:
    if isinstance(value, Tensor):
        maps.append(value)
        return MAP
    if type(value) in (list, tuple):
        return Several(type(value), tuple(_given(item, maps) for item in value))
    if isinstance(value, slice) or not is_plain(value):
        raise Unsupported(f"its forward is given a {type(value).__name__}")
    return Leaf(type(value), value)


def form_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Form, list[Tensor]]:
    """How a forward is called, and the maps that it is given, in order. Raises Unsupported for what is neither map nor constant."""
    maps: list[Tensor] = []
    places = tuple(_given(value, maps) for value in args)
    by_name = tuple((name, _given(value, maps)) for name, value in kwargs.items())
    return Form(places, by_name, torch.is_grad_enabled()), maps


def read_form(text: str) -> Form:
    """The form of a call that is written as ``(positional arguments, named arguments)``, with ``...`` in the places of maps."""

    def given(value: Any) -> Given:
        if value is ...:
            return MAP
        if type(value) in (list, tuple):
            return Several(type(value), tuple(map(given, value)))
        return Leaf(type(value), value)

    args, kwargs = ast.literal_eval(text)
    return Form(tuple(map(given, args)), tuple((n, given(v)) for n, v in kwargs.items()), torch.is_grad_enabled())


def arguments(form: Form, maps: Iterator[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments of that form, with ``maps`` in the places of maps."""

    def fill(given: Given) -> Any:
        if isinstance(given, Several):
            return given.kind(map(fill, given.items))
        return next(maps) if given.kind is None else given.value

    return tuple(map(fill, form.args)), {name: fill(given) for name, given in form.kwargs}


# ---- what it does with it ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Flow:
    """A forward, followed for one form: the nodes of its ``inputs``, all ``nodes`` in the order of the forward, and its ``output``, one of
    them, or lists, tuples and constants around them. ``through``: the paths of the modules inside that were gone through. ``stored``: what
    it sets, as the paths of modules, each with the name of an attribute. ``asks``: whether it asks if gradients are recorded, so that it
    is the flow of that answer alone."""

    inputs: tuple[Node, ...]
    nodes: tuple[Node, ...]
    output: Any
    through: tuple[str, ...]
    reads: Reads
    stored: frozenset[tuple[str, str]] = frozenset()
    asks: bool = False

    def outside(self) -> list[Any]:
        """What was read outside of the modules, as it is now, to be compared by identity with what it was."""
        return self.reads.outside.values()

    def outline(self) -> tuple[tuple[str, str, bool | None], ...]:
        """The calls, by their names, and whether gradients are recorded."""
        return tuple((node.op, str(node.target), node.grad) for node in self.nodes)

    def inside(self, block: nn.Module) -> list[nn.Module]:
        """The modules of ``block`` that the flow goes through, and those of its calls that pieces are made of, of those that it still
        has."""
        modules = dict(block.named_modules(remove_duplicate=False))
        found = [modules[path] for path in self.through if path in modules]
        for node in self.nodes:
            module = modules.get(node.target) if node.op == "module" else None
            if isinstance(module, (*CONVOLUTIONS, *norm_types())):
                found += module.modules()
        return found

    def check(self, block: nn.Module) -> None:
        """Check that ``block`` is still what was followed, and that no hook waits on a module that was gone through; raises Unsupported."""
        changed = self.reads.changed(block)
        if changed is not None:
            raise Unsupported(f"{changed} has changed since it was converted; fusedres.convert reads it anew")
        for path in self.through:
            module = child_of(block, path)
            if path and module is not None:
                unhooked(module)


#: by mode and form; in the place of a flow why there is none
Flows = Mapping[bool, Mapping[Form, Flow | Unsupported]]


def _is_output(value: Any) -> bool:
    return isinstance(value, Node) or is_plain(value) or type(value) in (list, tuple) and all(map(_is_output, value))


def _follow(block: nn.Module, form: Form, training: bool, deep: bool, stored: Iterable[tuple[str, str]]) -> Flow:
    known = set(stored)
    for _ in range(_MOST_STORED):
        try:
            return _followed(block, form, training, deep, known)
        except Stores as found:
            known.add(found.attribute)
    raise Refused("its forward sets more attributes than a block's")


def _followed(block: nn.Module, form: Form, training: bool, deep: bool, stored: set[tuple[str, str]]) -> Flow:
    beside = Beside(form.grad, stored)
    tracer = Tracer(block, training, deep, {}, beside)
    inputs: list[Node] = []

    def stand_ins() -> Iterator[Traced]:
        while True:
            traced = tracer.record("input", "input", (), {})
            inputs.append(traced.node)
            yield traced

    output = tracer.follow(*arguments(form, stand_ins()))
    tracer.reads.outside.close()
    if not _is_output(output):
        raise Refused(f"its forward returns a {type(output).__name__}")
    started = set(map(id, inputs))
    for node in tracer.nodes:
        if node.target in CONCATENATIONS and any(id(argument) in started for argument in node.args[:1]):
            raise Refused("its forward concatenates what may be one map")
    return Flow(
        tuple(inputs),
        tuple(tracer.nodes),
        output,
        tuple(tracer.through),
        tracer.reads,
        frozenset(stored),
        beside.asks,
    )


def follow(block: nn.Module, form: Form, training: bool, stored: Iterable[tuple[str, str]] = ()) -> Flow:
    """The forward of ``block`` in a mode, called in that form. Modules that hold a BatchNorm are gone through; where one of them does what
    is not known to be harmless, only rows of steps are. ``stored``: what its other flows set. Nothing of it runs and nothing of it changes.
    Raises :class:`~.trace.Refused`."""
    if is_uninitialised(block):
        raise Refused("a module inside has not been initialised yet; fusedres.convert reads it after its first call")
    try:
        return _follow(block, form, training, True, stored)
    except Unsupported as reason:
        try:
            return _follow(block, form, training, False, stored)
        except Unsupported:
            raise (reason if isinstance(reason, Refused) else Refused(str(reason))) from None


def _flows_in(block: nn.Module, form: Form) -> Flows:
    stored: frozenset[tuple[str, str]] = frozenset()
    while True:
        flows: dict[bool, dict[Form, Flow]] = {}
        names = stored
        for training in (True, False):
            flow = follow(block, form, training, names)
            flows[training] = {form: flow}
            names |= flow.stored
            if flow.asks:
                other = follow(block, form.other, training, names)
                flows[training][form.other] = other
                names |= other.stored
        if all(flow.stored == names for of_mode in flows.values() for flow in of_mode.values()):
            return flows
        stored = names


def read_flows(block: nn.Module, likely: Sequence[Form] = _LIKELY) -> Flows:
    """The flows of ``block``, by mode, in the first form of those that are ``likely`` which it can be called in. Raises Refused."""
    first: Refused | None = None
    for form in likely:
        try:
            return _flows_in(block, form)
        except Refused as reason:
            first = first or reason
    assert first is not None
    raise first.anew()
