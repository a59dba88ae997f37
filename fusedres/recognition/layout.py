"""A block in the fewest pieces: what runs fused as one, and what stands between as it is. Every op is in exactly one piece."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..errors import Unsupported
from .graph import BlockGraph, check_graph
from .ops import Op, act_of, ops
from .pieces import Piece, Unit

Value = TypeVar("Value")


@dataclass(frozen=True)
class Layout:
    """A block in pieces: ``head``, then ``aside`` for what the shortcut reads and ``body`` from the same map, whose last piece joins
    them, then ``tail``. ``main_first``: whether the body runs up to its last piece before what stands aside. ``pieces``: all of them, in
    the order in which they run."""

    head: tuple[Piece, ...] = ()
    aside: tuple[Piece, ...] = ()
    body: tuple[Piece, ...] = ()
    tail: tuple[Piece, ...] = ()
    main_first: bool = False
    pieces: tuple[Piece, ...] = field(init=False)

    def __post_init__(self) -> None:
        body, join = self.body[:-1], self.body[-1:]
        middle = (*body, *self.aside) if self.main_first else (*self.aside, *body)
        object.__setattr__(self, "pieces", (*self.head, *middle, *join, *self.tail))

    @property
    def last(self) -> Piece:
        """The piece whose output is the block's."""
        return (*self.body, *self.tail)[-1]

    def run(self, x: Value, run_piece: Callable[[Piece, Value, Value | None], Value]) -> Value:
        """The output of the block for ``x``, a map or what stands for one: ``run_piece(piece, x, source)`` runs one piece, ``source`` being
        what its shortcut reads where that is not x."""
        for piece in self.head:
            x = run_piece(piece, x, None)
        source = x
        *body, join = self.body
        if not self.main_first:
            for piece in self.aside:
                source = run_piece(piece, source, None)
        for piece in body:
            x = run_piece(piece, x, None)
        if self.main_first:
            for piece in self.aside:
                source = run_piece(piece, source, None)
        # a map that is added as it is, to itself even, is two inputs
        reads_x = join.shortcut is None or source is x and bool(join.row)
        x = run_piece(join, x, None if reads_x else source)
        for piece in self.tail:
            x = run_piece(piece, x, None)
        return x


# ---- rows ----------------------------------------------------------------------------------------------------------------


def pieces_of(found: Sequence[Op]) -> tuple[Piece, ...]:
    """The fewest pieces for a row of ops."""
    pieces: list[Piece] = []
    i = 0
    while i < len(found):
        start, first = i, None
        units: list[Unit] = []
        if found[i].kind == "norm":
            first = found[i]
            i += 1
        while i < len(found) and found[i].kind == "conv":
            behind = found[i + 1] if i + 1 < len(found) and found[i + 1].kind == "norm" else None
            units.append((found[i], behind))
            i += 1 if behind is None else 2
            if behind is None:
                break
        i = max(i, start + 1)
        pieces.append(Piece(tuple(found[start:i]), first, tuple(units)))
    return tuple(pieces)


def layer_pieces(found: Sequence[Op]) -> tuple[Piece, ...]:
    """The fewest pieces for a row of ops; raises Unsupported where none of them would run fused."""
    _check_norms(found, ())
    pieces = pieces_of(found)
    if not any(piece.first is not None and piece.units for piece in pieces):
        raise Unsupported("no convolution behind a BatchNorm")
    return pieces


# ---- blocks --------------------------------------------------------------------------------------------------------------

_ON_A_SHORTCUT = ("subsample", "pool")


def _split_shortcut(found: list[Op]) -> tuple[list[Op], tuple[Op, ...]]:
    """A shortcut's ops in two: what has to run before, and what the addition takes over (pool, subsampling, convolution, norm)."""
    k = len(found)
    if k > 1 and found[k - 1].kind == "norm" and found[k - 1].value == "none" and found[k - 2].kind == "conv":
        k -= 2
    elif k and found[k - 1].kind == "conv":
        k -= 1
    for kind in _ON_A_SHORTCUT:
        if k and found[k - 1].kind == kind:
            k -= 1
    return found[:k], tuple(found[k:])


def _residual(before: list[Op], main: list[Op], other: list[Op], after: list[Op], graph: BlockGraph) -> Layout:
    early, taken = _split_shortcut(other)
    act, tail = None, after
    if after and after[0].kind == "act":
        act, tail = after[0], after[1:]
        act_of(act)  # one that is not fused leaves the block alone
    if _projects_activated(before, main, early, taken) and not tail:
        (piece,) = pieces_of([*before, *main])
        piece = replace(piece, shortcut=taken, activated=True, act=act, shortcut_left=graph.shortcut_left)
        return Layout(body=(piece,))
    body = list(pieces_of(main))
    # an activation in front of the addition stays with its row, and the addition is a piece of its own
    join = body.pop() if body and body[-1].fused and body[-1].last_act == "none" else Piece(())
    body.append(replace(join, shortcut=taken, act=act, shortcut_left=graph.shortcut_left))
    if graph.main_first is None and _acts_by_itself(early) and _acts_by_itself(main):
        raise Unsupported("the steps of its shortcut and of its main path alternate")
    return Layout(pieces_of(before), pieces_of(early), tuple(body), pieces_of(tail), graph.main_first is not False)


def _acts_by_itself(found: Iterable[Op]) -> bool:
    """Whether one of the ops is not known: it may draw random numbers, whose order counts."""
    return any(op.kind == "other" for op in found)


def _projects_activated(before: list[Op], main: list[Op], early: list[Op], taken: tuple[Op, ...]) -> bool:
    """Whether one description can both activate the input and project it: where nothing else stands on either path."""
    kinds = {op.kind for op in taken}
    if len(before) != 1 or before[0].kind != "norm" or early or "conv" not in kinds or "subsample" in kinds:
        return False
    pieces = pieces_of([*before, *main])
    return len(pieces) == 1 and pieces[0].last_act == "none"


def _account(laid: Layout, before: list[Op], main: list[Op], other: list[Op], after: list[Op]) -> None:
    """Check that every op is in one piece, in its order; raises Unsupported."""

    def rows(pieces: Iterable[Piece]) -> list[Op]:
        return [op for piece in pieces for op in piece.row]

    added = [piece for piece in laid.pieces if piece.shortcut is not None or piece.act is not None]
    taken = [op for piece in added for op in piece.shortcut or ()]
    acts = [piece.act for piece in added if piece.act is not None]
    found: tuple[list[Op], ...] = (
        rows((*laid.head, *laid.body)), [*rows(laid.aside), *taken], [*acts, *rows(laid.tail)]
    )  # fmt: skip
    if found != ([*before, *main], other, after) or len(added) > 1:
        raise Unsupported("its steps cannot all be told")


def _check_norms(main: Iterable[Op], other: Iterable[Op]) -> None:
    """Check that a BatchNorm which stands twice is updated in the order of the forward: where both are in the main row, each by the same
    factor. Raises Unsupported."""
    seen: set[int] = set()
    beside = {id(op.module) for op in other}
    for op in (*main, *other):
        if op.kind != "norm":
            continue
        if id(op.module) in seen:
            if id(op.module) in beside:
                raise Unsupported("a BatchNorm that stands on both of its paths")
            if isinstance(op.module, _BatchNorm) and op.module.momentum is None:
                raise Unsupported("a BatchNorm that stands twice and averages over all of its calls")
        seen.add(id(op.module))


def layout(block: nn.Module, graph: BlockGraph, training: bool | None = None) -> Layout:
    """``block`` in the fewest pieces. ``training``: as if in that mode, by structure alone. Raises Unsupported where none of them would be
    fused."""
    check_graph(block, graph, training)
    before, main = ops(block, graph.main[: graph.shared]), ops(block, graph.main[graph.shared :])
    if any(isinstance(op.module, nn.Conv3d | nn.BatchNorm3d) for op in (*before, *main)):
        raise Unsupported("three dimensions, which only dense blocks run fused in")
    if graph.shortcut is None:
        row, other, after = ops(block, graph.main), [], []
        laid = Layout(body=pieces_of(row))
        _account(laid, [], row, other, after)
    else:
        row, other, after = [*before, *main], ops(block, graph.shortcut), ops(block, graph.after)
        laid = _residual(before, main, other, after, graph)
        _account(laid, before, main, other, after)
    _check_norms([*row, *after], other)
    if not any(norm is not None for piece in laid.pieces for _, norm in piece.units) and not any(
        piece.first is not None and piece.units for piece in laid.pieces
    ):
        raise Unsupported("no convolution with a BatchNorm before or behind it")
    return laid
