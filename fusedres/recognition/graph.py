"""What the forward of a module computes, whatever its class is called: its steps in rows.

A module whose forward is one row of steps, or two that meet in a sum (and may share their beginning), has a :class:`BlockGraph`. It names
the steps; what they are is looked up at every reading, so that a parameter, a flag or a whole convolution may be replaced at any time. All
that was read to find the steps is kept with them: a module that no longer agrees runs its own forward.

Every call that the forward makes on a map is in exactly one row, or is the sum itself: a forward in which one is left over has no graph.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .. import activations
from ..errors import Unsupported
from . import harmless
from .calls import is_sequential
from .evaluate import Evaluator
from .families import norm_act
from .lookup import Beside
from .modules import CONVOLUTIONS, child_of, class_of, has_own_code, holds, is_uninitialised, norm_types, unhooked
from .trace import Node, Reads, Refused, is_plain

#: more convolutions than any residual block has: larger modules are networks, and their parts are looked at instead
MOST_CONVOLUTIONS = 8

_ON_SHORTCUTS = (*activations.FUNCTIONS, operator.getitem, F.pad, F.avg_pool2d, F.max_pool2d, F.dropout, F.dropout2d)
CONCATENATIONS = (torch.cat, torch.concat, torch.concatenate)
SUMS = (operator.add, operator.iadd, torch.add, "add", "add_")


@dataclass(frozen=True)
class FunctionStep:
    """A step that is no module: a function (or, by name, a method of the map) with constants; ``at`` says where the map goes."""

    target: Callable[..., Any] | str
    args: tuple[Any, ...]
    kwargs: tuple[tuple[str, Any], ...]
    at: int | str

    def __call__(self, x: Tensor) -> Tensor:
        args, kwargs = list(self.args), dict(self.kwargs)
        if isinstance(self.at, int):
            args[self.at] = x
        else:
            kwargs[self.at] = x
        if isinstance(self.target, str):
            return getattr(args[0], self.target)(*args[1:], **kwargs)
        return self.target(*args, **kwargs)

    def arguments(self, *names: str) -> dict[str, Any]:
        """The arguments by the ``names`` of the first parameters."""
        return {**dict(zip(names, self.args, strict=False)), **dict(self.kwargs)}


Step = str | FunctionStep


@dataclass(frozen=True)
class BlockGraph:
    """``after(main(x) + shortcut(main[:shared](x)))``, each a row of steps; without a shortcut (None) just ``main(x)``; a dense layer's
    (``dense``): x and ``main(x)`` side by side.

    ``main_first``: whether the forward computes its main row before its shortcut, None where their steps alternate. ``argument``: the name
    of the forward's parameter. ``through``: the paths of the modules inside that were gone through. ``shortcut_left``: whether the
    shortcut is the first operand of the sum, whose memory format the sum has. ``spare``: the paths of the modules that must not overwrite
    the map that they are given, since somebody else reads it.
    """

    main: tuple[Step, ...]
    shortcut: tuple[Step, ...] | None = None
    shared: int = 0
    after: tuple[Step, ...] = ()
    dense: bool = False
    main_first: bool | None = True
    argument: str = "x"
    through: tuple[str, ...] = ()
    reads: Reads = field(default_factory=Reads, compare=False)
    shortcut_left: bool = False
    spare: tuple[str, ...] = ()

    @property
    def steps(self) -> tuple[Step, ...]:
        """All steps."""
        return (*self.main, *(self.shortcut or ()), *self.after)

    def outside(self) -> list[Any]:
        """What was read outside of the modules, as it is now, to be compared by identity with what it was."""
        return self.reads.outside.values()


#: the graphs of a module by mode
Graphs = Mapping[bool, BlockGraph]


# ---- from a trace to rows ----------------------------------------------------------------------------------------------


def unary(node: Node) -> tuple[Node, Step] | None:
    """``(what node reads, its step)`` where that is one map and constants."""
    if node.target in CONCATENATIONS:
        return None  # what it reads are several maps, whatever they are called
    places: list[tuple[int | str, Any]] = [*enumerate(node.args), *node.kwargs.items()]
    at = [place for place, value in places if isinstance(value, Node)]
    if len(at) != 1 or not all(_constant(value) for place, value in places if place != at[0]):
        return None
    source = dict(places)[at[0]]
    if node.op == "module":
        return (source, node.target) if len(places) == 1 else None
    if node.op == "method" and at[0] != 0 or node.op not in ("function", "method"):
        return None
    args = tuple(None if place == at[0] else value for place, value in enumerate(node.args))
    kwargs = tuple((name, None if name == at[0] else value) for name, value in node.kwargs.items())
    return source, FunctionStep(node.target, args, kwargs, at[0])


def _constant(value: Any) -> bool:
    return all(map(_constant, value)) if isinstance(value, list | tuple) else is_plain(value)


Row = list[tuple[Node, Step]]


def _row(node: Node, start: Node) -> Row | None:
    """The steps from ``start`` to ``node``, each with its node."""
    row: Row = []
    while node is not start:
        found = unary(node)
        if found is None:
            return None
        row.append((node, found[1]))
        node = found[0]
    return row[::-1]


def _concatenated(node: Node, start: Node) -> Row | None:
    """The row whose channels a concatenation puts behind those of ``start``."""
    found = {**dict(zip(("tensors", "dim"), node.args, strict=False)), **node.kwargs}
    tensors = found.get("tensors")
    if set(found) != {"tensors", "dim"} or found["dim"] != 1 or not isinstance(tensors, list | tuple):
        return None
    if len(tensors) != 2 or tensors[0] is not start or not isinstance(tensors[1], Node):
        return None
    return _row(tensors[1], start)


@dataclass(frozen=True)
class _Match:
    """Rows of a trace and the ``join`` of the first two, None where there is one row."""

    main: Row
    join: Node | None = None
    shortcut: Row | None = None
    shared: int = 0
    after: Row = field(default_factory=list)
    dense: bool = False
    shortcut_left: bool = False

    def nodes(self) -> list[Node]:
        """Every node that the rows stand for, in any order."""
        rows = (self.main, self.shortcut or [], self.after)
        return [*(node for row in rows for node, _ in row), *([] if self.join is None else [self.join])]


def _match(module: nn.Module, start: Node, output: Any) -> _Match | None:
    if not isinstance(output, Node):
        return None
    join, after = output, []
    while join is not start:
        found = unary(join)
        if found is None:
            break
        after.insert(0, (join, found[1]))
        join = found[0]
    if join is start:
        return _Match(after)
    if join.inside:
        return None  # the block is a module inside
    if join.target in CONCATENATIONS:
        row = _concatenated(join, start)
        return None if row is None or after else _Match(row, join, dense=True)
    if join.target not in SUMS or len(join.args) != 2 or join.kwargs:
        return None
    sides = [_row(arg, start) if isinstance(arg, Node) else None for arg in join.args]
    if sides[0] is None or sides[1] is None:
        return None
    main, other = sorted((sides[0], sides[1]), key=lambda row: -sum(_is_conv(module, step) for _, step in row))
    shared = 0
    while shared < min(len(main), len(other)) and main[shared][0] is other[shared][0]:
        shared += 1
    if any(isinstance(step, FunctionStep) and step.target not in _ON_SHORTCUTS for _, step in other[shared:]):
        return None  # what is added may be no map at all
    return _Match(main, join, other[shared:], shared, after, shortcut_left=main is sides[1])


def _is_conv(module: nn.Module, step: Step) -> bool:
    return isinstance(step, str) and isinstance(module.get_submodule(step), nn.Conv2d)


def _account(match: _Match, nodes: list[Node], start: Node) -> None:
    """Check that every call is in the rows, once; raises Refused."""
    counts = Counter(map(id, match.nodes()))
    for node in nodes:
        if node is start or not node.is_map:
            continue
        if counts[id(node)] != 1:
            raise Refused(f"its forward computes {_name(node)} beside what it returns")


def _name(node: Node) -> str:
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "what is no row")


def _check_in_place(module: nn.Module, nodes: list[Node], start: Node) -> None:
    """Check that what is overwritten in place is nobody else's; raises Refused."""
    read = Counter(id(source) for node in nodes if node.is_map for source in node.sources)
    for node in nodes:
        source = node
        while node.in_place and (source is node or not is_fresh(module, source)):
            at = source.sources[0]
            if at is start or read[id(at)] > 1:
                raise Refused(f"its forward overwrites, by {_name(node)}, what is still read")
            source = at


def may_overwrite(module: nn.Module, node: Node) -> bool:
    """Whether it is a module of the user's inside ``module``, which may do anything to its maps."""
    if node.op != "module":
        return False
    called = child_of(module, node.target)
    return called is not None and not class_of(called).__module__.startswith("torch.nn.modules")


def _memory(module: nn.Module, node: Node) -> list[Node]:
    """The values whose memory ``node`` may be given: what it reads, and what these may share memory with."""
    found: list[Node] = []
    left = [source for source in node.sources if source.is_map]
    while left:
        found.append(left.pop())
        left += shares(module, found[-1])
    return found


def _sharing(module: nn.Module, nodes: list[Node]) -> tuple[str, ...]:
    """The paths of the user's modules that are given what somebody else reads."""
    read = Counter(id(source) for node in nodes if node.is_map for source in node.sources)
    users = [node for node in nodes if may_overwrite(module, node)]
    return tuple(node.target for node in users if any(read[id(at)] > 1 for at in _memory(module, node)))


def _check_spare(module: nn.Module, paths: Iterable[str], training: bool) -> None:
    """Check that the modules of the user's at ``paths`` do not overwrite the map that they are given; raises Refused."""
    for path in paths:
        called = child_of(module, path)
        if called is not None and _overwrites_its_map(called, training):
            raise Refused(f"its {path} may overwrite what is still read")


def _overwrites_its_map(called: nn.Module, training: bool) -> bool:
    """Whether a module of the user's overwrites the map that it is given, or that cannot be told."""
    tracer = Tracer(called, training, False, {})
    try:
        _, start, _ = tracer.forward()
    except Unsupported:
        return True
    return any(
        start in _memory(called, node)
        and (
            node.in_place
            or may_overwrite(called, node)
            and _overwrites_its_map(called.get_submodule(node.target), training)
        )
        for node in tracer.nodes
    )


def is_fresh(module: nn.Module, node: Node) -> bool:
    """Whether the result of a call shares no memory with what it reads."""
    if node.in_place:
        return False
    if node.op == "module":
        return isinstance(module.get_submodule(node.target), (*CONVOLUTIONS, _BatchNorm))
    if node.op not in ("function", "method"):
        return False
    name = node.target if isinstance(node.target, str) else node.target.__name__
    return name in harmless.FRESH or node.target in (*CONCATENATIONS, F.relu, torch.relu, "relu")


def shares(module: nn.Module, node: Node) -> list[Node]:
    """What the result of a call may share memory with, of what it reads."""
    if node.op == "set" or is_fresh(module, node):
        return []
    return [source for source in node.args[:1] if isinstance(source, Node)] if node.in_place else node.sources


def _order(match: _Match, nodes: list[Node]) -> bool | None:
    """Whether the main row stands before the shortcut, None where they alternate."""
    at = {id(node): i for i, node in enumerate(nodes)}
    main = [at[id(node)] for node, _ in match.main[match.shared :]]
    other = [at[id(node)] for node, _ in match.shortcut or ()]
    if not main or not other or max(main) < min(other):
        return True
    return False if max(other) < min(main) else None


# ---- reading a module --------------------------------------------------------------------------------------------------


class Tracer(Evaluator):
    """Follows the forward of a module and of the rows inside it."""

    def __init__(
        self,
        root: nn.Module,
        training: bool,
        deep: bool,
        rows: dict[tuple[int, bool], bool],
        beside: Beside | None = None,
    ) -> None:
        super().__init__(root, training, deep, beside)
        self._rows = rows

    def reads_as_row(self, module: nn.Module) -> bool:
        key = id(module), self.training
        if key not in self._rows:
            self._rows[key] = False  # a module that calls itself is none
            try:
                graph = _trace(module, self.training, self._rows)
            except Unsupported:
                return False
            self._rows[key] = graph.shortcut is None and not graph.dense
        return self._rows[key]


def _traced(module: nn.Module, training: bool, deep: bool, rows: dict[tuple[int, bool], bool]) -> BlockGraph:
    tracer = Tracer(module, training, deep, rows)
    argument, start, output = tracer.forward()
    tracer.reads.outside.close()
    match = _match(module, start, output)
    if match is None:
        raise Unsupported("its forward is no row of steps, nor two that are added")
    _account(match, tracer.nodes, start)
    _check_in_place(module, tracer.nodes, start)
    spare = _sharing(module, tracer.nodes)
    _check_spare(module, spare, training)

    def steps(row: Row) -> tuple[Step, ...]:
        return tuple(step for _, step in row)

    return BlockGraph(
        steps(match.main),
        None if match.shortcut is None else steps(match.shortcut),
        match.shared,
        steps(match.after),
        match.dense,
        _order(match, tracer.nodes),
        argument,
        tuple(tracer.through),
        tracer.reads,
        match.shortcut_left,
        spare,
    )


def _trace(module: nn.Module, training: bool, rows: dict[tuple[int, bool], bool]) -> BlockGraph:
    """The graph of ``module`` in a mode. Parts that are no rows are steps (an attention with BatchNorms of its own), unless going through
    them, too, gives a graph (a body that returns two maps). Raises Unsupported."""
    found: BlockGraph | None = None
    reason: Unsupported | None = None
    for deep in (False, True):
        try:
            graph = _traced(module, training, deep, rows)
        except Unsupported as why:
            reason = reason or why
            continue
        found = graph
        if not any(holds(module.get_submodule(step), *norm_types()) for step in graph.steps if isinstance(step, str)):
            break
    if found is None:
        raise Unsupported("it has no forward") if reason is None else reason
    return found


def read(module: nn.Module) -> Graphs:
    """The graphs of ``module`` by mode. Nothing of it runs and nothing of it changes. Raises Unsupported where it lacks one,
    :class:`~.trace.Refused` where that is because its forward does what is not known to be harmless."""
    if is_uninitialised(module):
        raise Refused("a module inside has not been initialised yet; fusedres.convert reads it after its first call")
    rows: dict[tuple[int, bool], bool] = {}
    return {training: _trace(module, training, rows) for training in (True, False)}


def follows(module: nn.Module) -> bool:
    """Whether calling ``module`` is known to do nothing but compute: it is torch's own, or its forward can be followed."""
    cls = class_of(module)
    if cls.__module__.startswith("torch.nn.modules"):
        return not has_own_code(module)
    if cls.forward is nn.Module.forward or norm_act(module) is not None:
        return True  # a container, which is not called, or what is known by its name
    try:
        for training in (True, False):
            Tracer(module, training, False, {}).forward()
    except Unsupported:
        return False
    return True


def read_layers(row: nn.Module) -> dict[str, Graphs]:
    """The graphs of the dense layers at the end of a Sequential, none where there is no such row."""
    layers: dict[str, Graphs] = {}
    if is_sequential(row):
        for name, child in reversed(list(row.named_children())):
            try:
                graphs = read(child)
            except Unsupported:
                break
            if not all(graph.dense for graph in graphs.values()):
                break
            layers[name] = graphs
    return dict(reversed(layers.items()))


def check_graph(block: nn.Module, graph: BlockGraph, training: bool | None = None) -> None:
    """Check that ``block`` is still what its graph was read from, and that no hook waits on a module that the graph goes through; with
    ``training`` (structure alone, whatever its mode) only the latter. Raises Unsupported."""
    if training is None:
        changed = graph.reads.changed(block)
        if changed is not None:
            raise Unsupported(f"{changed} has changed since it was converted; fusedres.convert reads it anew")
        _check_spare(block, graph.spare, block.training)
    for path in graph.through:
        module = child_of(block, path)
        if module is not None:
            unhooked(module)


def block_ids(model: nn.Module, most: int = MOST_CONVOLUTIONS) -> set[int]:
    """The ids of the modules of ``model`` that are small enough to be a block, with ``most`` convolutions, and hold what one is made of."""
    counts: dict[int, tuple[int, bool]] = {}

    def count(module: nn.Module) -> tuple[int, bool]:
        """Convolutions inside, and whether there is a BatchNorm."""
        if id(module) not in counts:
            found = [count(child) for child in module.children()]
            convolutions = isinstance(module, CONVOLUTIONS) + sum(c for c, _ in found)
            counts[id(module)] = convolutions, isinstance(module, norm_types()) or any(n for _, n in found)
        return counts[id(module)]

    count(model)
    return {i for i, (convolutions, norms) in counts.items() if 0 < convolutions <= most and norms}


def inside(block: nn.Module, graph: BlockGraph) -> list[nn.Module]:
    """The modules of ``block`` that its graph stands for, of those that it still has."""
    modules = dict(block.named_modules(remove_duplicate=False))
    found = [modules[path] for path in graph.through if path in modules]
    for step in graph.steps:
        module = modules.get(step) if isinstance(step, str) else None
        if isinstance(module, (*CONVOLUTIONS, *norm_types())):
            found += module.modules()
    return found
