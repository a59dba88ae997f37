"""Blocks of any shape: rows and sums run fused, everything between them runs as it is, in the order of the forward."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..errors import Unsupported
from ..recognition import (
    ONE_MAP,
    Flow,
    Form,
    Fused,
    Part,
    Plain,
    Program,
    Slot,
    child_of,
    follow,
    form_of,
    program,
    read_flows,
)
from .base import Kind, Original, Ran, note, note_unfused, run_part
from .calls import made
from .handover import Handover, contiguous, enter, mixes, order_of, suggests_channels_last
from .plan import Planner
from .reading import Sets
from .residual import behind_sum
from .state import BlockState
from .stretch import Steps, as_one, beside

_AS_IT_IS = contextlib.nullcontext()

#: a block that is called in more forms than this runs its original modules in the others
MOST_FORMS = 16


class Programs:
    """What a block runs as, by the form of its call: a program, or why there is none. ``last``: that of the last call, as far as there was
    one."""

    def __init__(self, by_form: dict[Form, Program | Unsupported]) -> None:
        self.by_form = by_form
        self.last: Program | None = None

    def get(self, form: Form) -> Program:
        """The program for ``form``, which is known; raises Unsupported."""
        found = self.by_form[form]
        if isinstance(found, Unsupported):
            raise found.anew()
        self.last = found
        return found

    def shown(self) -> Program:
        """The last program that ran, or the first that there is; raises Unsupported."""
        return self.get(next(iter(self.by_form))) if self.last is None else self.last


class GeneralKind(Kind):
    """A block of which :func:`fusedres.recognition.follow` knows the calls in their order. It may take and return several maps, in lists
    and tuples, and constants."""

    key, title = "general", "general block"

    def _flows(self, block: Any, state: BlockState) -> dict[Form, Flow | Unsupported]:
        """The flows of the block in its present mode, by form; raises Unsupported."""
        if state.flows is None:
            state.flows = read_flows(block)
        return dict(state.flows[block.training])

    def graphs(self, block: Any, state: BlockState) -> tuple[Flow, ...]:
        return tuple(flow for flow in self._flows(block, state).values() if isinstance(flow, Flow))

    def sets(self, block: Any, state: BlockState) -> Sets:
        flows = self.graphs(block, state)
        read = {name for flow in flows for name in flow.reads.attributes}
        found: dict[nn.Module, set[str]] = {}
        for path, name in {name for flow in flows for name in flow.stored} - read:
            module = child_of(block, path)
            if module is not None:
                found.setdefault(module, set()).add(name)
        return found

    def read(self, block: Any, state: BlockState) -> Programs:
        found: dict[Form, Program | Unsupported] = {}
        flows = self._flows(block, state)
        for form, flow in flows.items():
            if isinstance(flow, Unsupported):
                found[form] = flow
                continue
            try:
                flow.check(block)
                found[form] = program(block, flow)
            except Unsupported as reason:
                found[form] = reason.anew()
            if not flow.asks and form.other not in flows:
                found[form.other] = found[form]
        return Programs(found)

    def parts(self, found: Programs) -> list[Part]:
        return [piece.part for piece in found.shown().pieces]

    def calls(self, block: Any, state: BlockState, found: Programs, plain: bool) -> list[nn.Module] | None:
        chosen, *others = {id(program): program for program in found.by_form.values()}.values()
        if others or isinstance(chosen, Unsupported) or not isinstance(chosen.output, Slot):
            return None
        if not chosen.only_computes or chosen.found or chosen.overwrites or self.sets(block, state):
            return None
        return beside(block, [action.call for action in chosen.actions if isinstance(action, Plain)], plain)

    def label(self, block: Any, state: BlockState) -> str:
        try:
            unfused = self.recall(block, state).shown().unfused
        except Unsupported:
            return self.title
        return f"{self.title}, unfused: {', '.join(unfused)}" if unfused else self.title

    # ---- a call ------------------------------------------------------------------------------------------------------

    def _program(
        self, block: Any, state: BlockState, found: Programs, form: Form, maps: Sequence[Tensor] = ()
    ) -> Program:
        """What the block runs as when it is called in ``form`` with ``maps``: followed now, where that is new. Raises Unsupported."""
        if form not in found.by_form:
            known = self._flows(block, state)
            if len(known) >= MOST_FORMS:
                raise Unsupported("its forward is called in too many ways")
            flow: Flow | Unsupported
            try:
                stored = {name for of in known.values() if isinstance(of, Flow) for name in of.stored}
                flow = follow(block, form, block.training, stored)
            except Unsupported as reason:
                flow = reason.anew()
            assert state.flows is not None
            state.flows = {**state.flows, block.training: {**known, form: flow}}
            state.reading = None  # it depends on what the new flow has read
            found = self.reading(block, state)
        chosen = found.get(form)
        _check_kept(chosen, maps)
        return chosen

    def forward(
        self, block: Any, state: BlockState, original: Original, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        try:
            found = self.reading(block, state)
            form, maps = form_of(args, kwargs)
            chosen = self._program(block, state, found, form, maps)
        except Unsupported as reason:
            note_unfused(state, reason)
            return original(*args, **kwargs)
        if _may_be_one(form, chosen):
            return self._as_one(block, state, found, chosen, Handover(maps[0])).leave()
        return _Call(self, block, state, chosen, [Handover(x) for x in maps]).run(leaves=True)

    def run(
        self, block: Any, state: BlockState, found: Programs, original: Original, given: Handover, place: Tensor | None
    ) -> Handover:
        try:
            form, maps = form_of((given.x,), {})
            chosen = self._program(block, state, found, form, maps)
        except Unsupported as reason:
            note_unfused(state, reason)
            return Handover(original(given.leave()))
        if _may_be_one(form, chosen):
            return self._as_one(block, state, found, chosen, given)
        inputs = [given] if maps and maps[0] is given.x else [Handover(x) for x in maps]
        # what is copied later would be copied with gradients recorded as they are there
        y = _Call(self, block, state, chosen, inputs).run(leaves=chosen.switches)
        return y if isinstance(y, Handover) else Handover(y)

    def _as_one(self, block: Any, state: BlockState, found: Programs, chosen: Program, given: Handover) -> Handover:
        def calls(at: int, plain: bool) -> list[nn.Module] | None:
            inside = self.calls(block, state, found, plain)
            return None if inside is None else inside[1:]

        def run(start: int, stop: int, given: Handover) -> Handover:
            return cast(Handover, _Call(self, block, state, chosen, [given]).run(leaves=False))

        return as_one(block, state, given, Steps(1, calls, run))

    # ---- for compilers -----------------------------------------------------------------------------------------------

    def check_form(self, block: Any, form: Form) -> None:
        if not form.count():
            raise Unsupported("its forward was called without a map")

    def tell(self, block: Any, state: BlockState, found: Programs, planner: Planner) -> Any:
        chosen = self._program(block, state, found, planner.form)
        for getter in chosen.overwrites:
            held = getter.held()
            if isinstance(held, Tensor) and held.dim() > 1:
                raise Unsupported(
                    f"its forward overwrites {getter.name}, and a trace cannot tell whether it is given that"
                )
        at = {i: i for i in range(planner.size)}
        for action in chosen.actions:
            if isinstance(action, Fused):
                source = None if action.source is None else at[action.source]
                original = planner.original(action.piece, source is not None)
                at[action.result] = planner.fused(
                    action.piece.part, at[action.x], source, behind_sum(action.piece), original, grad=action.grad
                )
                continue
            is_convolution = isinstance(action.call, nn.Conv2d)
            at[action.result] = planner.call(
                action.call,
                *(_told(v, at, planner) for v in action.args),
                kwargs=tuple((name, _told(v, at, planner)) for name, v in action.kwargs.items()),
                keeps_layout=action.keeps_layout,
                measures=action.measures,
                overwrites=action.overwrites,
                to_channels_last=is_convolution and suggests_channels_last(action.call.weight),
                reads=tuple(at[slot] for slot in action.reads),
                grad=action.grad,
            )
        return _told(chosen.output, at, planner)


def _may_be_one(form: Form, chosen: Program) -> bool:
    """Whether a call in ``form`` is of one map alone and computes another, so that it may be recorded for maps like that."""
    return form.args == ONE_MAP.args and not form.kwargs and isinstance(chosen.output, Slot) and chosen.only_computes


def _check_kept(chosen: Program, maps: Sequence[Tensor]) -> None:
    """Check that there is, what a program takes for granted where it reads what is another at every call; raises Unsupported."""
    if chosen.switches and torch.is_inference_mode_enabled():
        raise Unsupported("its forward records gradients or not, in inference mode")
    for getter, kind in chosen.found:
        held = getter.held()
        if not isinstance(held, Tensor) if kind is Tensor else type(held) is not kind:
            raise Unsupported(f"its {getter.name} is a {type(held).__name__}, and was a {kind.__name__}")
    if chosen.overwrites:
        given = {x.untyped_storage().data_ptr() for x in maps if x.numel()}
        for getter in chosen.overwrites:
            held = getter.held()
            if isinstance(held, Tensor) and held.numel() and held.untyped_storage().data_ptr() in given:
                raise Unsupported(f"its forward overwrites {getter.name}, which it is given")


def _told(value: Any, at: dict[int, int], planner: Planner) -> Any:
    """``value`` as a plan has it, with the slots of a program as those of the plan. Raises Unsupported."""
    if isinstance(value, Slot):
        return ("slot", at[value.at])
    if isinstance(value, slice):
        return ("slice", tuple(_told(v, at, planner) for v in (value.start, value.stop, value.step)))
    if type(value) in (tuple, list):
        return (type(value).__name__, tuple(_told(v, at, planner) for v in value))
    return planner.written(value)


class _Call:
    """A call of a block: ``values``, by slot, as far as they are still read."""

    def __init__(
        self, kind: GeneralKind, block: nn.Module, state: BlockState, chosen: Program, inputs: Sequence[Handover]
    ) -> None:
        self.kind, self.block, self.state, self.program = kind, block, state, chosen
        self.values: list[Any] = [*inputs, *[None] * (chosen.size - len(inputs))]
        #: by slot, whether gradients were recorded when its value was made
        self.recorded = [torch.is_grad_enabled()] * chosen.size
        #: maps in channels_last of those that are not, which several pieces read
        self.entered: dict[int, Handover] = {}
        self.results: list[Ran] = []

    def run(self, leaves: bool) -> Any:
        """The output; ``leaves``: for code that is not ours, else a single map is handed over."""
        for action in self.program.actions:
            result = self._fused(action) if isinstance(action, Fused) else self._plain(action)
            if action.grad is not None:
                self.recorded[action.result] = action.grad
            self.values[action.result] = result
            for slot in action.done:
                self.values[slot] = None
                self.entered.pop(slot, None)
        if self.results:
            note(self.state, self.results)
        output = self.program.output
        return self.values[output.at] if isinstance(output, Slot) and not leaves else self.program.leaving(self._leave)

    def _fused(self, action: Fused) -> Handover:
        x = self._map(action.x)
        source = None if action.source is None else self._map(action.source)
        piece = action.piece
        with _recording(action.grad):
            ran = run_part(
                self.kind, self.block, self.state, piece.part, piece.original, x, source, behind=behind_sum(piece)
            )
        self.results.append(ran)
        return self.results[-1].y

    def _as_made(self, slot: int) -> contextlib.AbstractContextManager[Any]:
        """A context in which a value is copied: gradients flow through the copy as they do through the value."""
        return _recording(self.recorded[slot] if self.program.switches else None)

    def _map(self, slot: int) -> Handover:
        """A map for a piece: in channels_last, once for all pieces that read it, where eager's would be that or contiguous."""
        value: Handover = self.values[slot]
        if slot not in self.program.often or not isinstance(value.x, Tensor) or value.x.dim() != 4:
            return value
        if slot not in self.entered:
            if order_of(value.x) != contiguous(value.x.dim()):
                return value
            with self._as_made(slot):
                self.entered[slot] = value._replace(x=made(enter, value.x), owes_nchw=True)
        return self.entered[slot]

    def _plain(self, action: Plain) -> Handover:
        keeps = action.keeps_layout and not mixes([self.values[slot] for slot in action.reads])
        take = self._raw if action.measures or keeps else self._leave
        fill_args, fill_kwargs = action.arguments
        args, kwargs = fill_args(take), dict(zip(action.kwargs, fill_kwargs(take), strict=True))
        if action.overwrites:
            self.entered.clear()
        with _recording(action.grad):
            # what is asked of a map is the same for all maps like it
            y = action.call(*args, **kwargs) if action.measures else made(action.call, *args, **kwargs)
            owes = keeps and self._owes_behind(action, y)
            if owes and isinstance(y, Tensor) and y.dim() != 4:  # of what owes, only a map may stay so
                y = made(torch.Tensor.contiguous, y)
        return Handover(y, owes_nchw=owes and not _is_contiguous(y))

    def _owes_behind(self, action: Plain, y: Any) -> bool:
        """Whether eager's result of a call that keeps the layout would be contiguous: arithmetic has the format of its first operand, a
        concatenation is channels_last where all of its maps are, a convolution where its weight is."""
        if not any([self.values[slot].owes_nchw for slot in action.reads]):
            return False
        if isinstance(action.call, nn.Conv2d) and suggests_channels_last(action.call.weight):
            return False
        read: list[Handover] = [self.values[slot] for slot in action.reads]
        if isinstance(y, Tensor):
            operands = (value for value in read if isinstance(value.x, Tensor) and value.x.shape == y.shape)
            first = next(operands, None)
            if first is not None:
                return first.owes_nchw
        return any(value.owes_nchw for value in read)

    def _raw(self, slot: int) -> Any:
        value: Handover = self.values[slot]
        return value.x if value.keeper is None else self._leave(slot)

    def _leave(self, slot: int) -> Any:
        """A value for code that is not ours, which may overwrite it: the same for all of it, without what was known of its contents."""
        value: Handover = self.values[slot]
        if value.stats is None and value.keeper is None and not value.owes_nchw:
            return value.x
        with self._as_made(slot):
            if isinstance(value.x, Tensor):
                left = value.leave()
            elif value.owes_nchw:
                several = cast(Sequence[Tensor], value.x)
                left = type(value.x)(Handover(x, owes_nchw=True).leave() for x in several)
            else:
                left = value.x
        self.values[slot] = Handover(left)
        return left


def _recording(mode: bool | None) -> contextlib.AbstractContextManager[Any]:
    """A context in which gradients are recorded or not; None: as they are."""
    return _AS_IT_IS if mode is None else torch.set_grad_enabled(mode)


def _is_contiguous(y: Any) -> bool:
    return isinstance(y, Tensor) and y.is_contiguous()
