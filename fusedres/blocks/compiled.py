"""A fused module under a compiler or exporter: :func:`forward` is what is traced, a loop over the steps of a plan (:mod:`.plan`).

The plan is made at the time of the trace, outside of it. Whatever it depends on is read once more in traced code (:func:`_watch`), so that
it is guarded: modes, momenta, hooks, children, plain attributes; tensors are arguments of the graph. A change of one of them makes a new
plan.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.modules import module as torch_module

from ..autograd.operators import OPERATORS, infer
from ..backends.layout import format_of
from ..swap import FusedBlock
from .handover import enter, mixes, suggests_channels_last
from .plan import FUNCTIONS, ORDINARY, Call, Fused, Plan, module_at, tensor_at

#: how a forward of one map is called, and what no argument is written as
_ONE_MAP, _UNWRITTEN = "((..., ), {})", "?"


class _Map(NamedTuple):
    """A value on its way, as :class:`~.handover.Handover`: what a part has returned is in channels_last, whatever eager's is. ``kept``: by
    the part, for its backward. ``recorded``: whether gradients were, when it was made; None where that is as it is for its block."""

    x: Any
    stats: Tensor | None = None
    owes_nchw: bool = False
    kept: bool = False
    recorded: bool | None = None


def _left(value: _Map) -> Any:
    """A value for code that is not ours, which may overwrite it, in eager's memory format; gradients flow through a copy as they do through
    the value."""
    if value.recorded is not None:
        with torch.set_grad_enabled(value.recorded):
            return _left(_Map(value.x, value.stats, value.owes_nchw, value.kept))
    if value.kept:
        return value.x.clone(memory_format=torch.contiguous_format if value.owes_nchw else torch.preserve_format)
    if not value.owes_nchw:
        return value.x
    if isinstance(value.x, Tensor):
        return value.x.contiguous()
    return type(value.x)([x.contiguous() for x in value.x])


def _watch(block: Any, plan: Plan) -> None:
    """Read everything that the plan depends on, as it was: a tracer guards what it has read."""
    same = (
        len(torch_module._global_forward_hooks) == len(torch_module._global_forward_pre_hooks) == 0
        and len(torch_module._global_backward_hooks) == len(torch_module._global_backward_pre_hooks) == 0
        and block._fusedres.recompute == plan.recompute
    )
    recorded = torch.is_grad_enabled() or any([step.grad is True for step in plan.steps])
    for fact in plan.facts:  # read by names: Dynamo of torch 2.11 cannot unpack a named tuple that is a constant
        module = module_at(block, fact.path)
        same = same and (len(module._forward_hooks), len(module._forward_pre_hooks)) == fact.hooks
        if recorded:
            same = same and (len(module._backward_hooks), len(module._backward_pre_hooks)) == fact.backward_hooks
        if fact.children is not None:
            same = same and tuple(module._modules) == fact.children
        for name, value in fact.attributes:
            same = same and getattr(module, name) == value
        for name in fact.functions:
            same = same and callable(getattr(module, name))
        for name, group in fact.groups:
            same = same and getattr(module, name).group_name == group
        for name, missing in fact.parameters:
            same = same and (module._parameters[name] is None) == missing
        for name, missing in fact.buffers:
            same = same and (module._buffers[name] is None) == missing
    if not same:
        raise RuntimeError("fusedres: a block has changed while it was traced")


def _filled(block: Any, value: Any, values: list[Any], raw: bool) -> Any:
    kind, inner = value
    if kind == "slot":
        return values[inner].x if raw else _left(values[inner])
    if kind == "constant":
        return inner
    if kind == "tensor":
        return tensor_at(block, inner)
    found = [_filled(block, v, values, raw) for v in inner]
    if kind == "slice":
        return slice(found[0], found[1], found[2])
    return tuple(found) if kind == "tuple" else found


def _called(block: Any, step: Call, values: list[Any]) -> _Map:
    keeps = step.keeps_layout and not mixes([values[slot] for slot in step.reads])
    raw = step.measures or keeps
    if step.direct:
        return _handed(module_at(block, step.path), values[step.reads[0]])
    for slot in step.reads:
        # whoever reads it later reads what has been written into it, or into a view of it
        if (step.overwrites or values[slot].kept) and not step.measures:
            values[slot] = _Map(_left(values[slot]))
    args = [_filled(block, value, values, raw) for value in step.args]
    kwargs = {name: _filled(block, value, values, raw) for name, value in step.kwargs}
    if step.keeps:
        return _Map(_kept(module_at(block, step.path), step.function, args))
    y = (module_at(block, step.path) if step.function == "" else getattr(FUNCTIONS, step.function))(*args, **kwargs)
    owes = keeps and not step.to_channels_last and _owes_behind(step, y, values)
    if owes and isinstance(y, Tensor) and y.dim() != 4:
        return _Map(y.contiguous())
    return _Map(y, None, owes)


def _kept(module: Any, name: str, args: list[Any]) -> Any:
    if len(args) == 0:
        return getattr(module, name)
    setattr(module, name, args[0])
    return None


def _owes_behind(step: Call, y: Any, values: list[Any]) -> bool:
    """Whether eager's result of a call that keeps the layout would be contiguous."""
    if isinstance(y, Tensor):
        for slot in step.reads:
            read = values[slot].x
            if isinstance(read, Tensor) and read.shape == y.shape:
                return values[slot].owes_nchw
    return any(values[slot].owes_nchw for slot in step.reads)


def _autocast(x: Tensor) -> torch.dtype | None:
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


def _is_recorded(x: Tensor, source: Tensor | None, weights: list[Any]) -> bool:
    if not torch.is_grad_enabled():
        return False
    if x.requires_grad or source is not None and source.requires_grad:
        return True
    for weight in weights:
        if weight.requires_grad:
            return True
    return False


def _entered(value: _Map) -> tuple[_Map, str]:
    """``(a map in channels_last, how eager's lies: "channels_last", "contiguous" or "other")``."""
    x = value.x
    if suggests_channels_last(x):
        order = "contiguous" if value.owes_nchw else "channels_last"
        return _Map(x.contiguous(memory_format=format_of(x.dim())), value.stats), order
    return _Map(enter(x), value.stats), "contiguous" if value.owes_nchw or x.is_contiguous() else "other"


def _as_eager(step: Fused, y: Tensor, x: Tensor, order: str, source: Tensor, source_order: str) -> tuple[Tensor, bool]:
    """``(y, or a copy of it that lies as eager's would, whether it owes being contiguous)``."""
    at = 2 * (order != "channels_last") + (source_order != "channels_last") - 1
    lies = step.lies[at] if at >= 0 else "channels_last"
    like = x
    if lies == "x":
        lies = order
    elif lies == "source":
        lies, like = source_order, source
    if lies == "other":
        return torch.empty_like(like, dtype=y.dtype).copy_(y), False
    return y, lies == "contiguous"


def _ran(block: Any, step: Fused, given: _Map, source: _Map | None) -> _Map:
    """The output of a part by its operator."""
    cast = _autocast(given.x)
    arrived = given.x if cast is None else given.x.to(cast)
    x, order = _entered(_Map(arrived, given.stats, given.owes_nchw))
    beside, beside_order = (None, order) if source is None else _entered(source)
    weights = [tensor_at(block, where) for where in step.weights]
    if cast is not None:
        weights = [w.to(cast) if casts else w for w, casts in zip(weights, step.casts)]  # noqa: B905
    statistics = [tensor_at(block, where) for where in step.statistics]
    beside_x = None if beside is None else beside.x
    recorded = not step.infers and _is_recorded(x.x, beside_x, weights)
    if recorded:
        found = OPERATORS[step.family].forward(step.text, x.x, beside_x, x.stats, weights, statistics)
    else:
        found = infer(step.family, step.text, x.x, beside_x, x.stats, weights, statistics)
    for i, place in enumerate(step.moves):
        statistics[place].copy_(found[2 + i])
    for where, times in step.counters:
        tensor_at(block, where).add_(times)
    y, owes = _as_eager(step, found[0], arrived, order, arrived if source is None else source.x, beside_order)
    return _Map(y, found[1] if step.measures else None, owes, recorded and step.keeps_output)


def _channels(x: Tensor) -> int:
    """The channels of a map as a number, where all sizes are symbols, too: a range has no symbols for its ends."""
    return len(range(x.shape[1]))


def _step(block: Any, step: Any, values: list[Any], original: Callable[..., Any]) -> _Map:
    if isinstance(step, Call):
        return _called(block, step, values)
    given, source = values[step.x], None if step.source < 0 else values[step.source]
    x, beside = given.x, None if source is None else _channels(source.x)
    if not block._fusedres.takes(step.at, _autocast(x), x.dtype, x.device, x.dim(), _channels(x), beside):
        maps = [_left(given)] if source is None else [_left(given), _left(source)]
        if len(step.instead) == 0:
            return _Map(original(*maps))
        inner = [_Map(maps[0]), _Map(maps[-1])]
        for call in step.instead:
            inner.append(_called(block, call, inner))
        return inner[-1]
    return _ran(block, step, given, source)


def _run(block: Any, plan: Plan, given: list[_Map], original: Callable[..., Any]) -> list[Any]:
    values: list[Any] = [*given, *[None] * (plan.size - len(given))]
    switches, recorded = any([step.grad is not None for step in plan.steps]), torch.is_grad_enabled()
    if switches:
        for i, value in enumerate(given):
            values[i] = _Map(value.x, value.stats, value.owes_nchw, value.kept, recorded)
    for step in plan.steps:
        if not switches:
            values[step.result] = _step(block, step, values, original)
            continue
        mode = recorded if step.grad is None else step.grad
        with torch.set_grad_enabled(mode):
            y = _step(block, step, values, original)
        values[step.result] = _Map(y.x, y.stats, y.owes_nchw, y.kept, mode)
    return values


def _handed(block: Any, given: _Map) -> _Map:
    """The output of a fused child, to which a map is handed over."""
    original = super(FusedBlock, block).forward  # type: ignore[misc]
    plan = block._fusedres.planned(_ONE_MAP)
    if len(plan.steps) == 0:
        return _Map(original(_left(given)))
    _watch(block, plan)
    values = _run(block, plan, [given], original)
    kind, inner = plan.output
    return values[inner] if kind == "slot" else _Map(_filled(block, plan.output, values, False))


def forward(block: Any, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The forward of a fused module, for compilers and exporters to trace; by the ``original`` one where it is called with what is neither
    a map nor a constant, or nothing of it would run fused."""
    maps: list[_Map] = []
    form = _written(args, kwargs, maps)
    if _UNWRITTEN in form:
        return original(*args, **kwargs)
    plan = block._fusedres.planned(form)
    if len(plan.steps) == 0:
        return original(*args, **kwargs)
    _watch(block, plan)
    return _filled(block, plan.output, _run(block, plan, maps, original), False)


def _written(args: Any, kwargs: dict[str, Any], maps: list[_Map]) -> str:
    """How a forward is called, for :func:`~fusedres.recognition.read_form`; with what cannot be written where there is some. The maps that
    it is given are added to ``maps``."""
    places = _argument(args, maps)
    named = [f"'{name}': {_argument(value, maps)}, " for name, value in kwargs.items()]
    return f"({places}, {{{''.join(named)}}})"


def _argument(value: Any, maps: list[_Map]) -> str:
    if type(value) in ORDINARY:
        maps.append(_Map(value))
        return "..."
    if type(value) in (tuple, list):
        inner = "".join([_argument(item, maps) + ", " for item in value])
        return f"({inner})" if type(value) is tuple else f"[{inner}]"
    return str(value) if value is None or type(value) is bool else _UNWRITTEN
