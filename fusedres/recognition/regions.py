"""A forward of any shape as a fixed order of actions: pieces that run fused, and every other call as it stands.

Calls that read one map alone, each what the one before has made and nobody else reads, are a row. A row falls into pieces as a block's main
path does (``layout.py``). A sum takes over the piece in front of it, another piece of one convolution as its shortcut, and the activation
behind it. A piece runs where its last call stands; all other calls run in the order of the forward, on the very maps that it hands them.
Every call is in exactly one action.
"""

from __future__ import annotations

import functools
import operator
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..errors import Unsupported
from . import harmless
from .actions import Action, Fused, Getter, Plain, Program, Setter, Slot
from .flow import Flow
from .graph import CONCATENATIONS, SUMS, is_fresh, may_overwrite, shares, unary
from .layout import pieces_of
from .modules import child_of, class_of
from .ops import Op, act_of, of_step
from .pieces import Piece
from .trace import Held, Node, own

# ---- rows --------------------------------------------------------------------------------------------------------------


@dataclass
class _Link:
    """A call of a row: what it reads, and what it does; nothing (None) at rest."""

    node: Node
    source: Node
    op: Op | None


@dataclass(eq=False)
class _Stretch:
    """Calls that run as one piece."""

    piece: Piece
    nodes: list[Node]
    x: Node
    source: Node | None = None

    @property
    def result(self) -> Node:
        return self.nodes[-1]

    @property
    def reads(self) -> list[Node]:
        return [self.x] if self.source is None else [self.x, self.source]


_IN_ROWS = ("conv", "norm", "act")


def _link(block: nn.Module, node: Node) -> _Link | None:
    """``node`` as a call of a row, None where it is none."""
    found = unary(node)
    if found is None or not node.is_map or not found[0].is_map:
        return None
    try:
        ops = of_step(block, found[1])
        if any(op.kind not in _IN_ROWS for op in ops) or len(ops) > 1:
            return None
        if ops and ops[0].kind == "act":
            act_of(ops[0])
    except Unsupported:
        return None
    return _Link(node, found[0], ops[0] if ops else None)


def _ops_of(chain: Sequence[_Link]) -> list[tuple[Op, list[Node]]]:
    """What a row does, with the calls of each op: an activation belongs to the BatchNorm before it."""
    found: list[tuple[Op, list[Node]]] = []
    for link in chain:
        op, last = link.op, found[-1][0] if found else None
        if op is None:
            found[-1][1].append(link.node)
        elif op.kind == "act" and last is not None and last.kind == "norm" and last.value == "none":
            found[-1] = last._replace(run=last.run + op.run, value=act_of(op)), [*found[-1][1], link.node]
        else:
            found.append((op, [link.node]))
    return found


class _Regions:
    """The calls of a flow, and how they come together."""

    def __init__(self, block: nn.Module, flow: Flow) -> None:
        self.block, self.flow = block, flow
        self.at = {id(node): i for i, node in enumerate(flow.nodes)}
        self.readers: dict[int, list[Node | None]] = {id(node): [] for node in flow.nodes}
        for node in flow.nodes:
            for source in node.sources:
                self.readers[id(source)].append(node)
        for node in _nodes_in(flow.output):
            self.readers[id(node)].append(None)
        self.links = {id(node): link for node in flow.nodes if (link := _link(block, node)) is not None}
        #: by its last call
        self.stretches: dict[int, _Stretch] = {}

    # ---- pieces ------------------------------------------------------------------------------------------------------

    def _chains(self) -> list[list[_Link]]:
        chains: list[list[_Link]] = []
        ends: dict[int, list[_Link]] = {}
        for node in self.flow.nodes:
            link = self.links.get(id(node))
            if link is None:
                continue
            chain = ends.get(id(link.source)) if self._is_read_once(link.source) else None
            if chain is not None and chain[-1].node.grad is not node.grad:
                chain = None
            if chain is not None:
                chain.append(link)
            elif link.op is None:
                continue
            else:
                chain = [link]
                chains.append(chain)
            ends[id(node)] = chain
        return chains

    def _is_read_once(self, node: Node) -> bool:
        return len(self.readers[id(node)]) == 1

    def find_rows(self) -> None:
        """Find the pieces of all rows."""
        for chain in self._chains():
            ops, x, at = _ops_of(chain), chain[0].source, 0
            for piece in pieces_of([op for op, _ in ops]):
                nodes = [node for _, of_op in ops[at : at + len(piece.row)] for node in of_op]
                at += len(piece.row)
                if piece.fused:
                    self.stretches[id(nodes[-1])] = _Stretch(piece, nodes, x)
                x = nodes[-1]

    def find_sums(self) -> None:
        """Find what sums take over, in their order."""
        spanning = self._spanning()
        for node in self.flow.nodes:
            if node.target in SUMS and len(node.args) == 2 and not node.kwargs:
                left, right = node.args
                if isinstance(left, Node) and isinstance(right, Node) and left in spanning and right in spanning:
                    self._add(node, left, right)

    def _spanning(self) -> set[Node]:
        """The values that may be as large as the inputs: what is kept, and what is reduced, is added to a map and is none."""
        found: set[Node] = set()
        for node in self.flow.nodes:
            if node.op in ("function", "method"):
                spans = _name(node) not in harmless.REDUCTIONS and any(source in found for source in node.sources)
            else:
                spans = node.op in ("input", "module")
            if spans:
                found.add(node)
        return found

    def _row_before(self, node: Node) -> _Stretch | None:
        """The piece that ends in ``node``, which a sum may take over."""
        stretch = self.stretches.get(id(node))
        if stretch is None or not self._is_read_once(node) or stretch.piece.shortcut is not None:
            return None
        return stretch if stretch.piece.last_act == "none" else None

    def _add(self, node: Node, left: Node, right: Node) -> None:
        rows = ((self._row_before(left), right), (self._row_before(right), left))
        sides = [(s, other) for s, other in rows if s and s.result.grad is node.grad]
        sides.sort(key=lambda side: -len(side[0].piece.units))
        act = self._act_behind(node)
        if sides:
            main, other = sides[0]
            beside = sides[1][0] if len(sides) > 1 and _is_projection(sides[1][0].piece) else None
            taken = [main] if beside is None else [beside, main]
        elif act is None:
            return  # nothing to be gained
        else:
            main, other, beside, taken = _Stretch(Piece(()), [], left), right, None, []
        if node.in_place and all(left is not s.result for s in taken) and not self._is_exclusive(left, node):
            return
        for stretch in taken:
            del self.stretches[id(stretch.result)]
        shortcut_left = bool(sides) and main.result is right
        nodes = [*(n for s in taken for n in s.nodes), node, *([] if act is None else [act.node])]
        source = other if beside is None else beside.x
        shortcut = () if beside is None else beside.piece.row
        piece = replace(main.piece, shortcut=shortcut, act=None if act is None else act.op, shortcut_left=shortcut_left)
        found = _Stretch(piece, nodes, main.x, None if source is main.x else source)
        self.stretches[id(found.result)] = found

    def _act_behind(self, node: Node) -> _Link | None:
        """The activation that alone reads ``node``."""
        reader = self.readers[id(node)][0] if self._is_read_once(node) else None
        link = None if reader is None else self.links.get(id(reader))
        if link is None or link.op is None or link.op.kind != "act" or link.node.grad is not node.grad:
            return None
        return link

    def _is_exclusive(self, node: Node, reader: Node) -> bool:
        """Whether nobody but ``reader`` reads what ``node`` may share memory with."""
        while self.readers[id(node)] == [reader] and node.op != "input":
            if id(node) in self.stretches or is_fresh(self.block, node):
                return True
            sources = [source for source in node.sources if source.is_map]
            if len(sources) != 1:
                return False
            reader, node = node, sources[0]
        return False

    # ---- checks ------------------------------------------------------------------------------------------------------

    def check_norms(self) -> None:
        """Check that no BatchNorm stands twice: pieces update them in an order of their own. Raises Unsupported."""
        ops = [link.op for link in self.links.values() if link.op is not None]
        norms = Counter(id(op.module) for op in ops if op.kind == "norm")
        if max(norms.values(), default=0) > 1:
            raise Unsupported("a BatchNorm that stands twice")
        if any(isinstance(op.module, nn.Conv3d | nn.BatchNorm3d) for op in ops):
            raise Unsupported("three dimensions, which only dense blocks run fused in")

    def check_memory(self) -> None:
        """Check that no call which stands by itself overwrites what a piece reads, once the piece may have read it: a piece reads its maps
        later than its first call does, and keeps them for backward. Raises Unsupported."""
        group = self._groups()
        fused = {id(node) for stretch in self.stretches.values() for node in stretch.nodes}
        alone = [node for node in self.flow.nodes if id(node) not in fused and node.op != "input" and node.is_map]
        read = [
            (group(source), self.at[id(stretch.result)], min(self.at[id(node)] for node in stretch.nodes))
            for stretch in self.stretches.values()
            for source in stretch.reads
        ]
        for node in alone:
            at = self.at[id(node)]
            if node.in_place:
                if any(of == group(node.args[0]) and first < at for of, _, first in read):
                    raise Unsupported(f"its forward overwrites, by {_name(node)}, what is fused")
            elif may_overwrite(self.block, node):
                given = {group(source) for source in node.sources if source.is_map}
                if any(of in given and first < at < last for of, last, first in read):
                    raise Unsupported(f"its {_name(node)} reads what a piece reads later, and may overwrite it")

    def check_held(self) -> None:
        """Check that nothing which pieces hold is read or overwritten beside them; raises Unsupported."""
        fused = {id(node) for stretch in self.stretches.values() for node in stretch.nodes}
        modules = [child_of(self.block, n.target) for n in self.flow.nodes if id(n) in fused and n.op == "module"]
        of_pieces = [module for module in modules if module is not None]
        moved = {id(buffer) for module in of_pieces for buffer in module.buffers()}
        held = moved | {id(parameter) for module in of_pieces for parameter in module.parameters()}
        overwritten = self.overwritten()
        for node in self.flow.nodes:
            if id(node) in fused:
                continue
            for place in (*_held_in(node.args), *_held_in(tuple(node.kwargs.values()))):
                if id(own(self.block.get_submodule(place.path), place.name)) in moved:
                    raise Unsupported(f"its forward reads {place.name}, which a piece moves")
            if node.op == "get":
                tensor = id(own(self.block.get_submodule(node.target.path), node.target.name))
                if tensor in moved or tensor in held and node in overwritten:
                    raise Unsupported(f"its forward reads or changes {node.target.name}, which a piece has")

    def overwritten(self) -> list[Node]:
        """What is kept that calls which stand by themselves overwrite."""
        group = self._groups()
        fused = {id(node) for stretch in self.stretches.values() for node in stretch.nodes}
        groups = {group(node) for node in self.flow.nodes if node.in_place and id(node) not in fused}
        return [node for node in self.flow.nodes if node.op == "get" and node.is_map and group(node) in groups]

    def _groups(self) -> Callable[[Node], int]:
        """What tells whether two values may share memory: they are of one group."""
        parent = {id(node): id(node) for node in self.flow.nodes}

        def group(node: Node) -> int:
            at = id(node)
            while parent[at] != at:
                at = parent[at]
            return at

        for first, second in zip(self.flow.inputs, self.flow.inputs[1:], strict=False):
            parent[group(first)] = group(second)
        fused = {id(node) for stretch in self.stretches.values() for node in stretch.nodes}
        for node in self.flow.nodes:
            if id(node) not in fused:
                for source in shares(self.block, node):
                    parent[group(node)] = group(source)
        return group

    # ---- the result --------------------------------------------------------------------------------------------------

    def actions(self) -> Iterator[Action]:
        """All actions in order; raises Unsupported where a call is in none, or in two."""
        inside = {id(node): stretch for stretch in self.stretches.values() for node in stretch.nodes}
        group = self._groups()
        maps = {group(n) for n in self.flow.nodes if n.is_map and n.op != "get" and not shares(self.block, n)}
        overwrites = any(n.in_place and group(n) in maps for n in self.flow.nodes if id(n) not in inside)
        covered: Counter[int] = Counter()
        for node in self.flow.nodes:
            if node.op == "input":
                continue
            stretch = inside.get(id(node))
            if stretch is None:
                covered[id(node)] += 1
                yield self._plain(node, overwrites)
            elif node is stretch.result:
                covered.update(map(id, stretch.nodes))
                if any(
                    r is None or inside.get(id(r)) is not stretch
                    for n in stretch.nodes[:-1]
                    for r in self.readers[id(n)]
                ):
                    raise Unsupported("its steps cannot all be told")
                source = None if stretch.source is None else self.at[id(stretch.source)]
                yield Fused(stretch.piece, self.at[id(stretch.x)], source, self.at[id(node)], node.grad)
        if covered != Counter(id(node) for node in self.flow.nodes if node.op != "input"):
            raise Unsupported("its steps cannot all be told")

    def _plain(self, node: Node, overwrites: bool) -> Plain:
        measures = node.op == "attribute"
        keeps = not overwrites and not node.in_place and self._keeps_layout(node)
        args, kwargs = self.slots(node.args), {name: self.slots(value) for name, value in node.kwargs.items()}
        reads = tuple(dict.fromkeys(self.at[id(source)] for source in node.sources))
        call, at = self._callable(node), self.at[id(node)]
        overwrites = overwrites or node.in_place or may_overwrite(self.block, node)
        return Plain(_name(node), call, args, kwargs, reads, at, keeps, measures, overwrites, node.grad)

    def kept(self) -> tuple[tuple[Getter, type], ...]:
        """What has to stand under the names that are read anew at every call."""
        read = [node for node in self.flow.nodes if node.op == "get"]
        changing = [node for node in read if (node.target.path, node.target.name) in self.flow.stored]
        return tuple((self.getter(node), node.target.kind) for node in changing)

    def getter(self, node: Node) -> Getter:
        """What reads what a node stands for."""
        return Getter(self.block.get_submodule(node.target.path), node.target.name)

    def _keeps_layout(self, node: Node) -> bool:
        if node.op == "module":
            return class_of(self.block.get_submodule(node.target)) in _MODULES_THAT_KEEP_LAYOUT
        return node.target in _FUNCTIONS_THAT_KEEP_LAYOUT and not self._is_left_view(node)

    def _is_left_view(self, node: Node) -> bool:
        """Whether a view leaves the block: with the strides of what it is part of, which a copy of it in another format would not have."""
        is_identity = node.op == "module" and class_of(self.block.get_submodule(node.target)) is nn.Identity
        if not is_identity and (node.op == "module" or node.target not in _VIEWS):
            return False
        return any(reader is None or self._is_left_view(reader) for reader in self.readers[id(node)])

    def _callable(self, node: Node) -> Callable[..., Any]:
        if node.op == "module":
            return self.block.get_submodule(node.target)
        if node.op == "get":
            return self.getter(node)
        if node.op == "set":
            return Setter(self.block.get_submodule(node.target.path), node.target.name)
        if node.op == "function":
            return node.target
        if node.op == "attribute" and node.target not in harmless.MEASURES:
            return attribute(node.target)
        return method(node.target)

    def slots(self, value: Any) -> Any:
        """``value`` with slots in the places of nodes, and the tensors that modules hold now."""
        if isinstance(value, Node):
            return Slot(self.at[id(value)])
        if isinstance(value, Held):
            return own(self.block.get_submodule(value.path), value.name)
        if isinstance(value, slice):
            return slice(*map(self.slots, (value.start, value.stop, value.step)))
        return type(value)(map(self.slots, value)) if type(value) in (tuple, list) else value


@functools.cache
def attribute(name: str) -> Callable[..., Any]:
    """What reads the attribute ``name``: the same function for every caller."""
    return lambda x: getattr(x, name)


@functools.cache
def method(name: str) -> Callable[..., Any]:
    """What calls the method ``name`` of its first argument: the same function for every caller."""
    return lambda x, *args, **kwargs: getattr(x, name)(*args, **kwargs)


#: parts of maps
_VIEWS = frozenset({torch.chunk, torch.split, "chunk", "split", "narrow", operator.getitem})
#: what computes the same in every memory format, and gives back the one it gets
_FUNCTIONS_THAT_KEEP_LAYOUT = frozenset(
    {*CONCATENATIONS, *_VIEWS, operator.add, operator.mul, torch.add, torch.mul, "add", "mul", F.relu, torch.relu, "relu", torch.sigmoid,
     F.sigmoid, "sigmoid", F.max_pool2d, F.avg_pool2d}
)  # fmt: skip
_MODULES_THAT_KEEP_LAYOUT = frozenset({nn.Identity, nn.ReLU, nn.MaxPool2d, nn.AvgPool2d, nn.Conv2d, nn.BatchNorm2d})


def _nodes_in(value: Any) -> list[Node]:
    if isinstance(value, Node):
        return [value]
    return [node for item in value for node in _nodes_in(item)] if type(value) in (tuple, list) else []


def _held_in(value: Any) -> list[Held]:
    if isinstance(value, Held):
        return [value]
    return [held for item in value for held in _held_in(item)] if type(value) in (tuple, list) else []


def _is_projection(piece: Piece) -> bool:
    """Whether a piece can be a shortcut: a convolution and its BatchNorm."""
    return piece.first is None and [op.kind for op in piece.row] == ["conv", "norm"]


def _name(node: Node) -> str:
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))


def _without_the_done(actions: Sequence[Action], kept: Iterable[int]) -> tuple[Action, ...]:
    """The actions, each with the slots that it is the last to read."""
    seen = set(kept)
    found: list[Action] = []
    for action in reversed(actions):
        reads = (
            action.reads
            if isinstance(action, Plain)
            else (action.x, *(() if action.source is None else (action.source,)))
        )
        last = dict.fromkeys(slot for slot in (*reads, action.result) if slot not in seen)
        seen.update(last)
        found.append(replace(action, done=tuple(last)))
    return tuple(reversed(found))


def program(block: nn.Module, flow: Flow) -> Program:
    """What ``block`` runs as, in the form of ``flow``. Raises Unsupported where no convolution with its BatchNorm would run fused."""
    regions = _Regions(block, flow)
    regions.find_rows()
    regions.find_sums()
    regions.check_norms()
    regions.check_memory()
    regions.check_held()
    output = regions.slots(flow.output)
    kept = [regions.at[id(node)] for node in _nodes_in(flow.output)]
    made = Program(
        _without_the_done(tuple(regions.actions()), kept),
        len(flow.nodes),
        output,
        regions.kept(),
        tuple(map(regions.getter, regions.overwritten())),
        flow.asks,
    )
    units = [(piece, unit) for piece in made.pieces for unit in (*piece.units, *_unit_beside(piece))]
    if not any(norm is not None or piece.first is not None for piece, (_, norm) in units):
        raise Unsupported("no convolution with a BatchNorm before or behind it")
    return made


def _unit_beside(piece: Piece) -> list[tuple[Op, Op | None]]:
    """The convolution of a piece's shortcut, with its BatchNorm."""
    return [(piece.shortcut[0], piece.shortcut[1])] if piece.shortcut else []
