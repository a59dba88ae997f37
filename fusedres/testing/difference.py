"""The first primitive of a block whose result is not as right as eager's: where to begin to read when a number is wrong."""

from __future__ import annotations

import copy
import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ..accuracy import allowance, error, holds
from ..backends import select
from ..backends.contract import Backend, Reduction, Wrapped, accum_dtype
from ..backends.eager import BACKEND as EAGER
from ..backends.layout import as_map
from ..operands import Epilogue, GradTarget, LazyGrad, LazyMap
from ..specs import BlockSpec, Norm, instances

_OPERANDS = (LazyMap, LazyGrad, Epilogue, GradTarget)
#: what the primitives return, in the words of the contract
_RESULTS = {
    "conv_forward": ("out",),
    "conv_backward": ("dx", "dweight"),
    "dgrad_epilogue": ("dx",),
    "add_act_forward": ("out",),
    "add_act_backward": ("dz",),
    "highway_forward": ("out",),
    "highway_backward": ("dz", "dgate", "dcarry"),
    "apply_grad_coeff": ("grad",),
    "pool_forward": ("out", "index"),
    "pool_backward": ("dx",),
    "bn_coefficients": ("scale_shift", "mean_invstd"),
    "bn_frozen": ("scale_shift", "mean_invstd"),
}
#: eager's own error is that of its worst run, of one in the dtype and of these in accumulation precision, on operands moved by a rounding
_NUDGED = 3


@dataclasses.dataclass(frozen=True)
class Difference:
    """The first result that is not as right as eager's.

    ``backend`` ran the ``primitive``, ``call`` calls of which had gone before, all right. ``tensor`` is the result or the operand that was
    written, in the contract's words, ``channel`` the worst of its channels (of a weight's gradient: its output channels). ``error`` and
    ``eager_error`` are those of the whole tensor, relative in the 2-norm (infinite where it is not finite, 1 and 0 where numbers that have
    to be equal are not).
    """

    backend: str
    primitive: str
    call: int
    tensor: str
    channel: int | None
    error: float
    eager_error: float

    def __str__(self) -> str:
        where = "" if self.channel is None else f", worst in channel {self.channel}"
        return (
            f"{self.primitive} (call {self.call} of it, on {self.backend!r}): {self.tensor} is off by {self.error:.2g}{where}; "
            f"eager's own error is {self.eager_error:.2g}"
        )


def _mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """``value``, an argument of a primitive, with every tensor changed."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, _OPERANDS):
        return type(value)(*(_mapped(item, change) for item in value))
    if isinstance(value, Norm):
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        return dataclasses.replace(value, **{k: change(v) for k, v in fields.items() if isinstance(v, Tensor)})
    return value


def _tensors(value: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of an argument, by the last of the names that lead to it."""
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, Norm):
        for field in dataclasses.fields(value):
            yield from _tensors(getattr(value, field.name), field.name)
    elif isinstance(value, _OPERANDS):
        for field, item in zip(value._fields, value, strict=True):
            yield from _tensors(item, field)


def _once(change: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """``change``, which makes of one tensor one tensor however often it is met: an output may be an input."""
    known: dict[int, Tensor] = {}

    def changed(t: Tensor) -> Tensor:
        if id(t) not in known:
            known[id(t)] = change(t)
        return known[id(t)]

    return changed


def _copied(t: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    made = t.detach().to(dtype if dtype is not None and t.is_floating_point() else t.dtype, copy=True)
    return as_map(made) if made.dim() >= 4 else made


def _nudged(t: Tensor, generator: torch.Generator) -> Tensor:
    made = _copied(t, accum_dtype(t.dtype))
    if made.is_floating_point():
        noise = torch.rand(made.shape, generator=generator, dtype=torch.float64).to(made) * 2 - 1
        made *= 1 + noise * (torch.finfo(made.dtype).eps / 2)
    return made


def _channel_errors(primitive: str, name: str, difference: Tensor) -> Tensor:
    dim = 0 if difference.dim() == 1 or (primitive, name) == ("conv_backward", "dweight") else 1
    return difference.transpose(0, dim).flatten(1).norm(dim=1)


class Beside(Wrapped):
    """A backend whose every primitive also runs on eager, on copies of the same operands, until one is not as right as eager's: then
    :attr:`difference` says which."""

    def __init__(self, inner: Backend) -> None:
        super().__init__(inner)
        self.difference: Difference | None = None
        self.calls: dict[str, int] = {}

    def new_reduction(self, channels: int, like: Tensor) -> Reduction:
        """A tensor, which can be read at once."""
        return Backend.new_reduction(self, channels, like)

    def call(self, primitive: str, *args: Any, **kwargs: Any) -> Any:
        """Run ``primitive`` on the inner backend, and compare."""
        self.calls[primitive] = self.calls.get(primitive, 0) + 1
        if self.difference is not None:
            return super().call(primitive, *args, **kwargs)
        bound = _signature(primitive).bind(self, *args, **kwargs)
        given = dict(list(bound.arguments.items())[1:])
        runs = [self._eager(primitive, given, _copied), self._eager(primitive, given, _to_float64)]
        for seed in range(_NUDGED):
            generator = torch.Generator().manual_seed(seed)
            runs.append(self._eager(primitive, given, functools.partial(_nudged, generator=generator)))
        result = super().call(primitive, *args, **kwargs)
        eager, truth, *nudged = (_named(primitive, *run) for run in runs)
        for (name, value), *others in zip(_named(primitive, given, result), eager, truth, *nudged, strict=True):
            self._compare(primitive, name, value, *(other for _, other in others))
            if self.difference is not None:
                break
        return result

    def _eager(self, primitive: str, given: dict[str, Any], change: Callable[[Tensor], Tensor]) -> tuple[dict, Any]:
        """The arguments, changed, and what eager returns for them."""
        change = _once(change)
        arguments = {name: _mapped(value, change) for name, value in given.items()}
        return arguments, getattr(EAGER, primitive)(**arguments)

    def _compare(self, primitive: str, name: str, value: Tensor, eager: Tensor, truth: Tensor, *nudged: Tensor) -> None:
        if not value.is_floating_point():
            unequal = value != eager
            found = (1.0, 0.0) if unequal.any() else None
            difference = unequal.double()
        else:
            allowed = allowance(value.dtype)
            value, truth, *others = _without_equal_nan(value, truth, eager, *nudged)
            ours, theirs = error(value, truth), [error(run, truth) for run in others]
            pairs = zip(ours, (max(e) for e in zip(*theirs, strict=True)), strict=True)
            found = (ours[0], max(e[0] for e in theirs)) if not all(holds(a, b, allowed) for a, b in pairs) else None
            difference = (value.double() - truth.double()).nan_to_num(torch.inf)
        if found is not None:
            worst = None if difference.dim() == 0 else int(_channel_errors(primitive, name, difference).argmax())
            self.difference = Difference(self.name, primitive, self.calls[primitive], name, worst, *found)


def _without_equal_nan(value: Tensor, truth: Tensor, *others: Tensor) -> list[Tensor]:
    """All of them, with zeros where ``value`` and ``truth`` are NaN, or the same infinity."""
    equal = (value.isnan() & truth.isnan()) | (value.isinf() & (value == truth))
    return [t.masked_fill(equal, 0.0) if equal.any() else t for t in (value, truth, *others)]


def _to_float64(t: Tensor) -> Tensor:
    return _copied(t, torch.float64)


@functools.cache
def _signature(primitive: str) -> inspect.Signature:
    return inspect.signature(getattr(Backend, primitive))


def _named(primitive: str, arguments: dict[str, Any], result: Any) -> list[tuple[str, Tensor]]:
    """What a call has returned and what it may have written, by name; a library's gradient that a pass may write over is no result."""
    results = result if isinstance(result, tuple) else (result,)
    found = [(n, t) for n, t in zip(_RESULTS.get(primitive, ()), results, strict=False) if t is not None]
    for name, value in arguments.items():
        found += [] if name == "da" else _tensors(value, name)
    return found


def first_difference(
    block: nn.Module | BlockSpec, x: Tensor, *, backend: str | Backend | None = None, seed: int = 0
) -> Difference | None:
    """Run ``block`` forward and backward with each primitive beside eager on the same operands, and name the first one whose result is not
    as right: None where all are.

    ``block``: a converted block, or a model of such, of which a copy runs in the mode that it is in (and, where that is evaluation, also
    without gradients: inference has other epilogues); or a description. ``backend``: what runs the primitives, by name or itself; else what
    would run them. ``seed``: of the random output gradient. The rule is that of every test, for one call: against float64, an error of at
    most twice eager's own, which is that of its worst run on operands that differ by less than a rounding, plus one rounding; what is not
    floating point has to be equal. Operands that a primitive may only read are compared too: one that is written is named.

    Reductions are merged where they are made. Raises ValueError where no primitive ran, because the original modules did.

    >>> print(first_difference(fusedres.convert(model).layer1[0], x, backend="cpp"))
    """
    seen: list[Beside] = []

    def wrap(chosen: Backend | None) -> Backend | None:
        inner = backend if isinstance(backend, Backend) else chosen
        if inner is None:
            return None
        seen.append(Beside(inner))
        return seen[-1]

    if isinstance(block, BlockSpec):
        _run_spec(block, x, wrap, backend if isinstance(backend, str) else None, seed)
    else:
        model = copy.deepcopy(block)
        named = select.use_backend(backend) if isinstance(backend, str) else nullcontext()
        with named, select.observe(wrap):
            if not model.training:
                with torch.no_grad():
                    model(x)
            _backward(model, x, list(model.parameters()), seed)
    if not any(beside.calls for beside in seen):
        raise ValueError("no primitive ran: fusedres.report says why the original modules did")
    return next((beside.difference for beside in seen if beside.difference is not None), None)


def _run_spec(
    spec: BlockSpec, x: Tensor, wrap: Callable[[Backend | None], Backend | None], name: str | None, seed: int
) -> None:
    running = [t for norm in instances(spec, Norm) for t in (norm.running_mean, norm.running_var) if t is not None]
    kept = [t.clone() for t in running]
    wrapped = wrap(select.resolve(x.device, x.dtype) if name is None else select.get(name))
    if wrapped is None:
        return
    tensors = [t for t in spec.tensors if t is not None]
    try:
        _backward(lambda leaf: spec.run(wrapped, as_map(leaf))[0], x, tensors, seed)
    finally:
        for t, before in zip(running, kept, strict=True):
            t.copy_(before)


def _backward(function: Callable[[Tensor], Tensor], x: Tensor, tensors: list[Tensor], seed: int) -> None:
    """One forward and backward by x and ``tensors``, none of which gets a ``grad``."""
    with torch.enable_grad():
        leaf = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
        y = function(leaf)
        generator = torch.Generator().manual_seed(seed)
        grad = torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y)
        torch.autograd.grad(y, [leaf, *(t for t in tensors if t.requires_grad)], grad, allow_unused=True)
