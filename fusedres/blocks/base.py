"""How a kind of block is read and run; :func:`prepare` is the only way from a part of a block to a backend."""

from __future__ import annotations

import contextlib
import functools
import inspect
import operator
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.fx._symbolic_trace import is_fx_symbolic_tracing

from ..autograd.steps import functorch_active
from ..backends.contract import Backend
from ..backends.eager import BACKEND as EAGER
from ..backends.select import resolve
from ..errors import Unsupported
from ..recognition import MAP, BlockGraph, Flow, Form, Part, global_hooks, has_global_hooks, read_form
from ..specs import BlockSpec
from ..swap import FusedBlock, original_class, state_of
from . import compiled
from .calls import PartCall, following, made
from .handover import Handover, Order, arrive, contiguous, in_order, suggests_channels_last
from .plan import Measures, Plan, Planner, part_takes
from .reading import Sets, recall
from .state import BlockState, CallRecord, Outcome

#: a forward of original modules
Original = Callable[..., Tensor]


class Kind(ABC):
    """A kind of block. ``key`` names it in states and pickles; ``title`` is what ``report`` calls it."""

    key: ClassVar[str]
    title: ClassVar[str]
    #: whether autocast casts the input of the block: where a convolution comes first
    casts: ClassVar[bool] = False

    #: attributes of the modules inside that are read where no graph says so
    attributes: ClassVar[tuple[str, ...]] = ()

    # ---- what a kind says ----------------------------------------------------------------------------------------

    @abstractmethod
    def read(self, block: Any, state: BlockState) -> Any:
        """What the block runs as; raises Unsupported."""

    @abstractmethod
    def parts(self, found: Any) -> list[Part]:
        """The parts that run fused, of what :meth:`read` has found, in the order in which a call records them."""

    @abstractmethod
    def run(
        self, block: Any, state: BlockState, found: Any, original: Original, given: Handover, place: Tensor | None
    ) -> Handover:
        """The block's output, by what has been ``found``; written into ``place`` where that is given and it can be."""

    @abstractmethod
    def tell(self, block: Any, state: BlockState, found: Any, planner: Planner) -> Any:
        """Tell the ``planner`` the steps of :meth:`run`, of the map in slot 0, and of those behind it where its form has several; the
        output, as it writes values. Raises Unsupported."""

    def inside(self, block: Any, state: BlockState) -> list[nn.Module]:
        """The modules, the block among them, on which :meth:`read` depends."""
        return list(block.modules())

    def calls(self, block: Any, state: BlockState, found: Any, plain: bool) -> list[nn.Module] | None:
        """The fused modules that :meth:`run` goes through, the block among them, where it runs their parts and nothing else; with
        ``plain`` it may run modules, too, that do nothing but compute as they stand (:func:`fusedres.recognition.computing`), which are
        told, and functions. None where it may run anything else."""
        return None

    def graphs(self, block: Any, state: BlockState) -> tuple[BlockGraph | Flow, ...]:
        """The graphs on which :meth:`read` depends."""
        return ()

    def sets(self, block: Any, state: BlockState) -> Sets:
        """What the forward of the block sets; raises Unsupported."""
        return {}

    def label(self, block: Any, state: BlockState) -> str:
        """What ``report`` calls this block."""
        return self.title

    def out_shape(self, block: Any, state: BlockState, shape: tuple[int, ...]) -> tuple[int, ...] | None:
        """The shape of the output for a map of ``shape`` where the block can write it into a place, else None."""
        return None

    # ---- what they share -----------------------------------------------------------------------------------------

    def reading(self, block: Any, state: BlockState) -> Any:
        """What :meth:`read` finds, remembered while nothing inside changes; raises Unsupported."""
        _refuse_tracers()
        return self.recall(block, state)

    def recall(self, block: Any, state: BlockState) -> Any:
        """As :meth:`reading`, whoever looks on."""
        return recall(
            state,
            lambda: self.inside(block, state),
            lambda: self.graphs(block, state),
            lambda: self.sets(block, state),
            lambda: self.read(block, state),
        )

    def forward(
        self, block: Any, state: BlockState, original: Original, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """The block's forward, for code that is not ours. ``original``: that of its class."""
        try:
            x = args[0] if len(args) == 1 and not kwargs else _only_argument(original_class(block), args, kwargs)
            found = self.reading(block, state)
        except Unsupported as reason:
            note_unfused(state, reason)
            return original(*args, **kwargs)
        return self.run(block, state, found, original, Handover(x), None).leave()

    # ---- for compilers -----------------------------------------------------------------------------------------------

    def trace(self, block: Any, original: Original, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The block's forward as compilers and exporters trace it."""
        return compiled.forward(block, original, args, kwargs)

    def check_form(self, block: Any, form: Form) -> None:
        """Check that the block may be called in ``form``: with one map, by whatever name; raises Unsupported."""
        if _only_argument(original_class(block), form.args, dict(form.kwargs)) != MAP:
            raise Unsupported("its forward was not called with one map")

    def plan(self, block: Any, state: BlockState, written: str) -> Plan:
        """The steps that :meth:`trace` goes through in the form that is ``written``; without any the original forward runs."""
        state.plan = Plan()
        try:
            if functorch_active():
                raise Unsupported("torch.func transforms the original modules")
            if has_global_hooks():
                raise Unsupported("a global module hook is registered")
            form = read_form(written)
            self.check_form(block, form)
            found = self.recall(block, state)
            planner = Planner(block, state.recompute, self.casts, form)
            output = self.tell(block, state, found, planner)
            read = (name for graph in self.graphs(block, state) for name in graph.reads.names)
            planner.depends_on(self.inside(block, state), (*self.attributes, *read))
            state.plan = planner.plan(output)
        except Unsupported:
            pass
        return state.plan

    @staticmethod
    def measured(*measures: Any) -> Measures:
        """What a trace knows of a part's maps, one by one, since its constants are."""
        return Measures(*measures)

    def takes(self, block: Any, state: BlockState, at: int, measures: Measures) -> bool:
        """Whether part ``at`` of the plan runs on maps like these."""
        assert state.plan is not None
        return part_takes(block, state.plan, at, measures)

    def cast(self, x: Tensor, dtype: torch.dtype | None) -> Tensor:
        """The input as autocast to ``dtype`` would hand it to the first module; raises Unsupported where that is not known."""
        if dtype is None or x.dtype == dtype:
            return x
        if not self.casts:
            raise Unsupported(f"its input is {x.dtype} under autocast to {dtype}")
        return x.to(dtype)


def _refuse_tracers() -> None:
    """Raise Unsupported where somebody looks on who has to see the original modules."""
    if torch.jit.is_tracing() or torch.jit.is_scripting():
        raise Unsupported("torch.jit traces the original modules")
    if functorch_active():
        raise Unsupported("torch.func transforms the original modules")
    if forward_ad._current_level >= 0:
        raise Unsupported("forward-mode differentiation goes through the original modules")
    if is_fx_symbolic_tracing():
        raise Unsupported("torch.fx traces the original modules")
    if global_hooks():
        raise Unsupported("a global module hook is registered")


@functools.lru_cache(maxsize=1024)
def _signature(forward: Callable[..., Any]) -> inspect.Signature:
    return inspect.signature(forward)


def _only_argument(cls: type[nn.Module], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The one argument of a call of the forward of ``cls``, however it was given; raises Unsupported where there are others."""
    try:
        signature = _signature(cls.forward)
        (_, *given) = signature.bind(None, *args, **kwargs).arguments.items()
    except (TypeError, ValueError) as error:
        raise Unsupported(f"its forward does not take these arguments: {error}") from None
    if len(given) == 1:
        name, value = given[0]
        if signature.parameters[name].kind is inspect.Parameter.POSITIONAL_OR_KEYWORD:
            return value
    raise Unsupported("its forward was not called with one map")


# ---- from a part to its backend --------------------------------------------------------------------------------------


_has_autocast = functools.cache(torch.amp.is_autocast_available)


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype that autocast computes in where ``x`` lives, None where it is off."""
    kind = x.device.type
    if not _has_autocast(kind) or not torch.is_autocast_enabled(kind):
        return None
    return torch.get_autocast_dtype(kind)


#: what a part is about to run: a backend, the description, the counters of the BatchNorms that use a batch, the map, whether autocast is on
Prepared = tuple[Backend, BlockSpec, dict[Tensor, int], Tensor, bool]


def prepare(kind: Kind, state: BlockState, part: Part, x: Tensor, source: Tensor | None) -> Prepared:
    """Describe, cast, check, choose; raises Unsupported, or ValueError as torch would."""
    cast = autocast_dtype(x) if isinstance(x, Tensor) else None
    spec, counters = part.describe(cast)
    x = kind.cast(x, cast)
    if source is None:
        part.check(spec, x)
    else:
        part.check(spec, x, source)
    return choose_backend(spec, x), with_recompute(spec, state), counters, x, cast is not None


def with_recompute(spec: BlockSpec, state: BlockState) -> BlockSpec:
    """``spec`` as the block was converted: recomputing or not."""
    return spec.recomputing if state.recompute else spec


def choose_backend(spec: BlockSpec, x: Tensor) -> Backend:
    """The backend that runs ``spec`` on ``x``; raises Unsupported.

    Where processes share statistics they have to exchange the same numbers in the same order, or all wait for ever. The autograd block is
    that order, whatever the backend, so that what may differ between processes only chooses the backend: the size of a batch, empty ones
    included, and what is installed. Whether a block runs fused at all follows from the model, its modes and the dtype, which are the same
    everywhere, or a SyncBatchNorm could not work either. A hook may be one process's own: where it makes a block run its original modules
    their SyncBatchNorms are of the kind ``sync_norm``, which exchanges what the block would, in the order of the block's forward and of
    autograd: the same one, except where a forward computes a normalised shortcut first.
    """
    backend = resolve(x.device, x.dtype) if x.numel() else None
    if backend is None:
        if not spec.exchanges:
            raise Unsupported(f"no fused backend serves {x.dtype} on {x.device}")
        return EAGER
    return backend


#: how eager's output of a description would lie in memory, by how its input and what its shortcut reads would
Behind = Callable[[BlockSpec, Order, Order], Order]


def behind_convolutions(spec: BlockSpec, x: Order, source: Order) -> Order:
    """What convolutions make of the memory format of their input: channels_last stays, or is where a weight is; else contiguous."""
    if x is None or any(suggests_channels_last(t) for t in spec.tensors if t is not None and t.dim() > 2):
        return None
    return contiguous(len(x))


class Ran(NamedTuple):
    """How a part went: its output, and what is left for ``report``."""

    y: Handover
    outcome: Outcome
    record: CallRecord | None


def count(counters: dict[Tensor, int]) -> None:
    """Add to each of the ``counters`` how often its BatchNorm is about to use a batch."""
    if counters:
        times = [*counters.values()]
        # one number for all, as nearly always, takes half as long as one for each
        torch._foreach_add_([*counters], times[0] if times.count(times[0]) == len(times) else times)


_AS_IT_IS = contextlib.nullcontext()
_shape, _needs_grad = operator.attrgetter("shape"), operator.attrgetter("requires_grad")


@functools.cache
def _on(backend: str) -> Outcome:
    return Outcome(backend)


def run_part(
    kind: Kind,
    block: nn.Module,
    state: BlockState,
    part: Part,
    original: Original,
    given: Handover,
    source: Handover | None = None,
    place: Tensor | None = None,
    behind: Behind = behind_convolutions,
) -> Ran:
    """The output of ``part``: fused, or by ``original(x, source)`` where it cannot be. ``place``: where it is written, if it can be.
    ``behind``: asked for the output's memory format where a map in eager would not be channels_last."""
    x = given.x
    try:
        backend, spec, counters, prepared, autocast = prepare(
            kind, state, part, x, None if source is None else source.x
        )
    except Unsupported as reason:
        maps = (given.leave(),) if source is None else (given.leave(), source.leave())
        return Ran(Handover(original(*maps)), Outcome(reason=str(reason)), None)
    prepared, given_order = arrive(given, prepared)
    beside, beside_order = (None, given_order) if source is None else arrive(source, source.x)
    maps = (prepared,) if beside is None else (prepared, beside)
    count(counters)
    if place is not None and not (
        spec.writes_into and place.dtype == prepared.dtype and place.shape == spec.out_shape(tuple(prepared.shape))
    ):
        place = None
    with torch.autocast(prepared.device.type, enabled=False) if autocast else _AS_IT_IS:
        y, stats = spec.run(backend, prepared, beside, stats=given.stats, out=place)
    calls = following()
    if calls is not None:
        lasts = part.lasting is not None and with_recompute(part.lasting, state) is spec
        calls.append(PartCall(backend, spec, counters, prepared, beside, given.stats, place, lasts, y, stats))
    order = None
    if y is not place and (given_order is not None or beside_order is not None):
        order = behind(spec, given_order, beside_order)
    owes = order is not None
    if order is not None and order != contiguous(len(order)):
        y, owes = made(in_order, y, order), False
    record = CallRecord(
        block.training,
        torch.is_grad_enabled(),
        prepared.device,
        prepared.dtype,
        tuple(map(_shape, maps)),
        tuple(map(_needs_grad, maps)),
        (id(x),) if source is None else (id(x), id(source.x)),
        owes,
    )
    return Ran(Handover(y, stats, None, owes), _on(backend.name), record)


def note_unfused(state: BlockState, reason: Unsupported) -> None:
    """Leave in ``state`` that the block ran its original modules, and why."""
    state.outcome, state.records = Outcome(reason=str(reason)), (None,)


def note(state: BlockState, ran: list[Ran]) -> None:
    """Leave in ``state`` how its parts went: of the reasons the first, which says more than another part's success."""
    if len(ran) == 1:
        _, state.outcome, record = ran[0]
        state.records = (record,)
        return
    outcomes = [r.outcome for r in ran]
    state.outcome = next((o for o in outcomes if not o.fused), outcomes[-1])
    state.records = tuple(r.record for r in ran)


def take(block: nn.Module, given: Handover, place: Tensor | None = None) -> Handover:
    """The output of a fused block that is called directly (:func:`~fusedres.blocks.handover.is_direct`), without ``__call__``."""
    state = state_of(block)
    assert state is not None
    original = super(FusedBlock, block).forward  # type: ignore[misc]
    try:
        found = state.kind.reading(block, state)
    except Unsupported as reason:
        note_unfused(state, reason)
        return Handover(original(given.leave()))
    return state.kind.run(block, state, found, original, given, place)
