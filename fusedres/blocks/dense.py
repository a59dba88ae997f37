"""Dense blocks: layers that each read everything before them, in one buffer; with dropout in them, layer by layer."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import Unsupported
from ..recognition import (
    BlockGraph,
    Op,
    Part,
    Piece,
    check_family,
    dense_layer,
    dense_part,
    in_buffer,
    layer_pieces,
    read,
    read_layers,
    transition_part,
)
from ..specs import BlockSpec
from ..swap import is_converted, original_class
from .base import Kind, Original, Ran, note, run_part
from .handover import Handover, Order, contiguous
from .plan import Planner
from .residual import SinglePart, tell_piece
from .sequential import in_a_row, pass_on
from .state import BlockState
from .stretch import beside, through


def _is_row(block: nn.Module) -> bool:
    return original_class(block).forward is nn.Sequential.forward


def _behind_concatenation(spec: BlockSpec, x: Order, source: Order) -> Order:
    """What a concatenation makes of the memory format of its first map: maps of several formats give one that is contiguous."""
    return None if x is None else contiguous(len(x))


class DenseKind(Kind):
    """A dense block; in a Sequential its layers may stand behind other modules, which run as they are."""

    key, title = "dense", "dense block"
    attributes = ("drop_rate",)

    def _layers(self, block: Any, state: BlockState) -> dict[str, BlockGraph] | None:
        """The graphs of the layers that put their channels behind their input's by themselves and end a Sequential; None where the block's
        own forward concatenates."""
        if not _is_row(block):
            return None
        if state.layers is None:
            state.layers = read_layers(block)
        if list(state.layers) != list(block._modules)[-len(state.layers) :]:
            raise Unsupported("it has changed since it was converted; fusedres.convert reads it anew")
        return {name: graphs[block._modules[name].training] for name, graphs in state.layers.items()}

    def graphs(self, block: Any, state: BlockState) -> tuple[BlockGraph, ...]:
        return tuple((self._layers(block, state) or {}).values())

    def _ops(self, block: Any, state: BlockState) -> list[list[Op]]:
        """What every layer does to what it reads."""
        layers = self._layers(block, state)
        if layers is None:
            if is_converted(block):
                check_family(block, self.key)
            found = [dense_layer(layer, None) for layer in block._modules.values()]
        else:
            found = [dense_layer(block._modules[name], graph) for name, graph in layers.items()]
        if not found:
            raise Unsupported("it has no layers")
        return found

    def read(self, block: Any, state: BlockState) -> Part | list[tuple[Piece, ...]]:
        """One part where all layers can write into the buffer, else the layers in pieces."""
        ops = self._ops(block, state)
        return dense_part(ops) if all(map(in_buffer, ops)) else [layer_pieces(of_layer) for of_layer in ops]

    def parts(self, found: Part | list[tuple[Piece, ...]]) -> list[Part]:
        if isinstance(found, Part):
            return [found]
        return [piece.part for pieces in found for piece in pieces if piece.fused]

    def calls(
        self, block: Any, state: BlockState, found: Part | list[tuple[Piece, ...]], plain: bool
    ) -> list[nn.Module] | None:
        children = list(block._modules.values())
        before = [] if state.layers is None else through(children[: len(children) - len(state.layers)], plain)
        if isinstance(found, Part):
            inside: list[nn.Module] | None = [block]
        else:
            calls = [run for pieces in found for piece in pieces for run in piece.unfused]
            inside = beside(block, [torch.cat, *calls], plain)
        return None if before is None or inside is None else [*before, *inside]

    def run(
        self,
        block: Any,
        state: BlockState,
        found: Part | list[tuple[Piece, ...]],
        original: Original,
        given: Handover,
        place: Tensor | None,
    ) -> Handover:
        if state.layers is not None:
            children = list(block._modules.values())
            first = len(children) - len(state.layers)
            given = pass_on(given, children[:first])
            original = functools.partial(in_a_row, children=children[first:])
        if not isinstance(found, Part):
            return self._in_pieces(block, state, found, given)
        ran = run_part(self, block, state, found, original, given, behind=_behind_concatenation)
        note(state, [ran])
        # the buffer is what backward reads again
        return ran.y._replace(keeper=state) if ran.outcome.fused and ran.y.x.requires_grad else ran.y

    def tell(self, block: Any, state: BlockState, found: Part | list[tuple[Piece, ...]], planner: Planner) -> Any:
        children, x = list(block._modules.values()), 0
        first = len(children) - len(state.layers or ())
        if state.layers is not None:
            for child in children[:first]:
                x = planner.child(child, x)
        if isinstance(found, Part):
            instead = planner.in_a_row(children[first:]) if first else ()
            return ("slot", planner.fused(found, x, None, _behind_concatenation, instead))
        features = [x]
        for pieces in found:
            x = planner.call(torch.cat, ("list", tuple(("slot", x) for x in features)), ("constant", 1))
            for piece in pieces:
                x = tell_piece(planner, piece, x, None)
            features.append(x)
        return ("slot", planner.call(torch.cat, ("list", tuple(("slot", x) for x in features)), ("constant", 1)))

    def _in_pieces(self, block: Any, state: BlockState, layers: list[tuple[Piece, ...]], given: Handover) -> Handover:
        """The output where layers are split: each reads a concatenation, as in the original."""
        features, results = [given.leave()], list[Ran]()
        for pieces in layers:
            h = Handover(torch.cat(features, 1))
            for piece in pieces:
                if piece.fused:
                    results.append(run_part(self, block, state, piece.part, piece.original, h))
                    h = results[-1].y
                else:
                    h = Handover(piece.original(h.leave()))
            features.append(h.leave())
        note(state, results)
        return Handover(torch.cat(features, 1))


class TransitionKind(SinglePart):
    """A DenseNet's transition: norm-act-conv(1x1)-pool(mean), the mean taken first."""

    key, title = "transition", "transition"

    def graph(self, block: Any, state: BlockState) -> BlockGraph:
        """The steps of the block in its present mode; raises Unsupported."""
        if _is_row(block):
            return BlockGraph(tuple(block._modules))
        if state.structure is None:
            state.structure = read(block)
        return state.structure[block.training]

    def graphs(self, block: Any, state: BlockState) -> tuple[BlockGraph, ...]:
        return (self.graph(block, state),)

    def read(self, block: Any, state: BlockState) -> Part:
        return transition_part(block, self.graph(block, state))
