"""Residual blocks and rows: one autograd block, or several around what no description knows."""

from __future__ import annotations

import functools
from typing import Any, ClassVar, cast

from torch import Tensor, nn

from ..autograd.residual import Residual
from ..errors import Unsupported
from ..recognition import BlockGraph, Layout, Part, Piece, child_of, highway_part, layout, norm_types, read
from ..specs import BlockSpec
from .base import Behind, Kind, Original, Ran, behind_convolutions, note, run_part
from .calls import made
from .handover import Handover, Order, contiguous, suggests_channels_last
from .plan import Planner
from .state import BlockState
from .stretch import beside


class SinglePart(Kind):
    """A kind whose reading is the one part that it runs as."""

    def parts(self, found: Part) -> list[Part]:
        return [found]

    def calls(self, block: Any, state: BlockState, found: Part, plain: bool) -> list[nn.Module]:
        return [block]

    def run(
        self, block: Any, state: BlockState, found: Part, original: Original, given: Handover, place: Tensor | None
    ) -> Handover:
        ran = run_part(self, block, state, found, original, given, None, place)
        note(state, [ran])
        return ran.y

    def tell(self, block: Any, state: BlockState, found: Part, planner: Planner) -> Any:
        return ("slot", planner.fused(found, 0, None, behind_convolutions))


def behind_sum(piece: Piece) -> Behind:
    """What convolutions, and a sum behind them, make of the memory format: a sum has that of its first operand."""
    if piece.shortcut is None:
        return behind_convolutions
    shortcut_left = piece.shortcut_left

    def behind(spec: BlockSpec, x: Order, source: Order) -> Order:
        residual = cast(Residual, spec)
        if shortcut_left:
            shortcut = residual.shortcut
            assert shortcut is not None
            first, units = source, () if shortcut.unit is None else (shortcut.unit,)
            keeps = shortcut.pool is None and (shortcut.subsample is None or not shortcut.subsample.pads)
        else:
            first, units, keeps = x, residual.units, residual.first is None
        if first is None or any(suggests_channels_last(unit.conv.weight) for unit in units):
            return None
        return first if keeps and not units else contiguous(len(first))

    return behind


def tell_piece(planner: Planner, piece: Piece, x: int, source: int | None) -> int:
    """Tell the ``planner`` a piece, of the map in slot ``x``; the slot of its output. Raises Unsupported."""
    if piece.fused:
        return planner.fused(piece.part, x, source, behind_sum(piece), planner.original(piece, source is not None))
    for op in piece.row:
        for run in op.run:
            x = planner.call(run, ("slot", x))
    return x


class ResidualKind(Kind):
    """A block of which :func:`fusedres.recognition.read` knows the graph."""

    key = "residual"
    title = "residual block"

    def graph(self, block: Any, state: BlockState) -> BlockGraph:
        """The steps of the block in its present mode; raises Unsupported."""
        if state.structure is None:
            state.structure = read(block)
        return state.structure[block.training]

    def graphs(self, block: Any, state: BlockState) -> tuple[BlockGraph, ...]:
        return (self.graph(block, state),)

    def read(self, block: Any, state: BlockState) -> Layout:
        return layout(block, self.graph(block, state))

    def parts(self, found: Layout) -> list[Part]:
        return [piece.part for piece in found.pieces if piece.fused]

    def calls(self, block: Any, state: BlockState, found: Layout, plain: bool) -> list[nn.Module] | None:
        return beside(block, [run for piece in found.pieces for run in piece.unfused], plain)

    def run(
        self, block: Any, state: BlockState, found: Layout, original: Original, given: Handover, place: Tensor | None
    ) -> Handover:
        if len(found.pieces) == 1:
            (piece,) = found.pieces
            ran = run_part(self, block, state, piece.part, original, given, None, place, behind_sum(piece))
            note(state, [ran])
            return ran.y
        results: list[Ran] = []

        def run_piece(piece: Piece, given: Handover, source: Handover | None) -> Handover:
            if not piece.fused:
                maps = (given.leave(),) if source is None else (given.leave(), source.leave())
                return Handover(made(piece.original, *maps))
            into = place if piece is found.last else None
            results.append(
                run_part(self, block, state, piece.part, piece.original, given, source, into, behind_sum(piece))
            )
            return results[-1].y

        y = found.run(given, run_piece)
        note(state, results)
        return y

    def tell(self, block: Any, state: BlockState, found: Layout, planner: Planner) -> Any:
        return ("slot", found.run(0, functools.partial(tell_piece, planner)))

    def out_shape(self, block: Any, state: BlockState, shape: tuple[int, ...]) -> tuple[int, ...] | None:
        found = self.reading(block, state)
        pieces = (*found.head, *found.body, *found.tail)
        if not all(piece.fused for piece in pieces):
            return None
        for piece in pieces:
            shape = piece.part.describe(None)[0].out_shape(shape)
        return shape

    def label(self, block: Any, state: BlockState) -> str:
        try:
            graph = self.graph(block, state)
            steps = [child_of(block, step) for step in graph.main if isinstance(step, str)]
        except Unsupported:
            return self.title
        if graph.shortcut is None:
            return "conv-bn row"
        convolutions = sum(isinstance(step, nn.Conv2d) for step in steps)
        name = {2: "basic block", 3: "bottleneck"}.get(convolutions, self.title)
        return f"pre-activation {name}" if steps and isinstance(steps[0], norm_types()) else name


class NamedResidual(ResidualKind):
    """A block of :mod:`fusedres.nn`, whose graph is known by the names of its children: ``main``, of which the shortcut reads the first
    ``shared`` steps, ``after`` behind the addition; ``downsample``, where there is one, is the shortcut."""

    main: ClassVar[tuple[str, ...]] = ()
    after: ClassVar[tuple[str, ...]] = ()
    shared: ClassVar[int] = 0

    def graph(self, block: Any, state: BlockState) -> BlockGraph:
        aside = () if block.downsample is None else ("downsample",)
        return BlockGraph(self.main, aside, self.shared if aside else 0, self.after)

    def label(self, block: Any, state: BlockState) -> str:
        return self.title


class BasicKind(NamedResidual):
    """conv1-bn1-relu-conv2-bn2, ``downsample``, add, relu."""

    key, title = "basic", "basic block"
    main, after = ("conv1", "bn1", "relu", "conv2", "bn2"), ("relu",)


class BottleneckKind(NamedResidual):
    """conv1-bn1-relu-conv2-bn2-relu-conv3-bn3, ``downsample``, add, relu."""

    key, title = "bottleneck", "bottleneck"
    main, after = ("conv1", "bn1", "relu", "conv2", "bn2", "relu", "conv3", "bn3"), ("relu",)


class PreActBasicKind(NamedResidual):
    """bn1-relu-conv1-bn2-relu-conv2, ``downsample`` of the activated input, add."""

    key, title = "preact_basic", "pre-activation basic block"
    main, shared = ("bn1", "relu", "conv1", "bn2", "relu", "conv2"), 2


class PreActBottleneckKind(NamedResidual):
    """bn1-relu-conv1-bn2-relu-conv2-bn3-relu-conv3, ``downsample`` of the activated input, add."""

    key, title = "preact_bottleneck", "pre-activation bottleneck"
    main, shared = ("bn1", "relu", "conv1", "bn2", "relu", "conv2", "bn3", "relu", "conv3"), 2


class PlainKind(NamedResidual):
    """conv1-bn1-relu-conv2-bn2-relu: no shortcut."""

    key, title = "plain", "plain block"

    def graph(self, block: Any, state: BlockState) -> BlockGraph:
        return BlockGraph(("conv1", "bn1", "relu", "conv2", "bn2", "relu"))


class HighwayKind(SinglePart):
    """conv1-bn1-relu, and beside it ``gate`` (with ``gate_bn`` behind it or not) and sigmoid, which mixes that with the input."""

    key, title = "highway", "highway block"

    def read(self, block: Any, state: BlockState) -> Part:
        return highway_part(block)

    def out_shape(self, block: Any, state: BlockState, shape: tuple[int, ...]) -> tuple[int, ...] | None:
        return self.reading(block, state).describe(None)[0].out_shape(shape)
