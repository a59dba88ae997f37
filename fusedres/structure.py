"""Recognition by structure: what the forward of a module computes, read off its torch.fx graph, whatever its class is called.

A module whose forward is one row of steps, or two that meet in a sum (and may share their beginning), has a :class:`Plan`. It names the
steps; what they are is looked up at every call, so that a parameter, a flag or a whole convolution may be replaced at any time. What the
trace itself has seen of a module (its children, plain attributes such as a drop rate) is kept in the plan's stamps, and a module that no
longer agrees with them runs its own forward. Nothing is traced outside of ``convert``.
"""

from __future__ import annotations

import operator
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from . import activations

#: more convolutions than any residual block has: larger modules are networks, and their parts are looked at instead
MOST_CONVOLUTIONS = 8

#: those of two dimensions, and of three, in which dense blocks run fused
CONVOLUTIONS = (nn.Conv2d, nn.Conv3d)

_ON_SHORTCUTS = (*activations.FUNCTIONS, operator.getitem, F.pad, F.avg_pool2d, F.max_pool2d, F.dropout, F.dropout2d)
_CONCATENATIONS = (torch.cat, torch.concat, torch.concatenate)
_SUMS = (operator.add, operator.iadd, torch.add, "add", "add_")
_PLAIN = (int, float, str, type(None), FunctionType, torch.dtype)
# a function of constants that a name cannot find again would neither copy nor pickle
_CONSTANT = (int, float, str, type(None), torch.dtype, slice, type(Ellipsis))


@dataclass(frozen=True)
class Call:
    """A step that is no module: a function (or, by name, a method of the map) with constants; ``at`` says where the map goes."""

    target: Callable | str
    args: tuple
    kwargs: tuple[tuple[str, Any], ...]
    at: int | str

    def __call__(self, x: Tensor) -> Tensor:
        args, kwargs = list(self.args), dict(self.kwargs)
        if isinstance(self.at, int):
            args[self.at] = x
        else:
            kwargs[self.at] = x
        return (
            self.target(*args, **kwargs)
            if callable(self.target)
            else getattr(args[0], self.target)(*args[1:], **kwargs)
        )

    def __deepcopy__(self, memo) -> Call:
        return self  # constants only; deepcopy cannot copy a slice on every Python


Step = str | Call


def norm_types() -> tuple[type[nn.Module], ...]:
    """The BatchNorms that the schedules compute."""
    # a model of torchvision's can only be given where torchvision is loaded
    frozen = getattr(sys.modules.get("torchvision.ops.misc"), "FrozenBatchNorm2d", None)
    return (nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, *(() if frozen is None else (frozen,)))


@dataclass(frozen=True)
class Stamp:
    """What the trace has seen of one module that it went through: the types of its children, its plain attributes."""

    path: str
    children: tuple[tuple[str, type], ...]
    attributes: tuple[tuple[str, Any], ...]

    def fits(self, module: nn.Module, training: bool) -> bool:
        """Whether ``module`` is still as it was, in the mode of the block around it."""
        children, own = module._modules, module.__dict__
        return (
            module.training is training
            and "forward" not in own
            and len(children) == len(self.children)
            and all(type(children.get(name)) is kind for name, kind in self.children)
            and all(own.get(name) == value for name, value in self.attributes)
        )


@dataclass(frozen=True)
class Plan:
    """``behind(main(x) + shortcut(main[:shared](x)))``, each a row of steps; without a shortcut (None) just ``main(x)``; a dense layer's
    (``dense``): x and ``main(x)`` side by side."""

    main: tuple[Step, ...]
    shortcut: tuple[Step, ...] | None = None
    shared: int = 0
    behind: tuple[Step, ...] = ()
    dense: bool = False
    stamps: tuple[Stamp, ...] = ()


def class_of(module: nn.Module) -> type[nn.Module]:
    """The class that ``module`` had before it was converted."""
    original = getattr(type(module), "original_class", None)
    return type(module) if original is None else original()


def original_forward(module: nn.Module) -> Callable:
    """The forward of the class that ``module`` had before it was converted."""
    return class_of(module).forward


def _view(module: nn.Module) -> nn.Module:
    """``module`` under its original class: the same object in everything but its type."""
    if class_of(module) is type(module):
        return module
    view = object.__new__(class_of(module))
    view.__dict__ = module.__dict__
    return view


def _is_row(module: nn.Module) -> bool:
    """Whether a module inside another is a row of steps itself: one that holds a convolution, or one that holds nothing and computes by
    calls alone (a lambda of slices and pads, a drop path at rest). Anything else is a step."""
    if "forward" in module.__dict__ or type(module).__module__.startswith("torch.nn.modules"):
        return False
    if not _holds(module, nn.Conv2d):
        for holds in (module.children(), module.parameters(), module.buffers()):
            if next(holds, None) is not None:
                return False
    plan = _trace(module)
    return plan is not None and plan.shortcut is None and not plan.dense


def _holds(module: nn.Module, *kinds: type[nn.Module]) -> bool:
    """Whether there is one of ``kinds`` inside ``module``, which is none itself."""
    return not isinstance(module, kinds) and any(isinstance(m, kinds) for m in module.modules())


class _Tracer(fx.Tracer):
    """Goes through rows inside the module, or (``deep``) through whatever holds a BatchNorm; hooks do not fire."""

    def __init__(self, deep: bool) -> None:
        super().__init__()
        self._deep = deep
        self._inside: list[nn.Module] = []
        self.passed: dict[str, nn.Module] = {}

    def call_module(self, m, forward, args, kwargs):
        if "forward" not in m.__dict__ and (
            original_forward(m) is nn.Sequential.forward or self._deep and _holds(m, *norm_types()) or _is_row(m)
        ):
            self.passed[self.path_of_module(m)] = m
            self._inside.append(m)
            try:
                return original_forward(m)(m, *args, **kwargs)
            finally:
                self._inside.pop()
        return self.create_proxy("call_module", self.path_of_module(m), args, kwargs)

    def create_node(self, *args, **kwargs) -> fx.Node:
        node = super().create_node(*args, **kwargs)
        node.meta["inside"] = bool(self._inside)
        return node


def _constant(value) -> bool:
    if isinstance(value, slice):
        return all(_constant(v) for v in (value.start, value.stop, value.step))
    return all(map(_constant, value)) if isinstance(value, tuple | list) else isinstance(value, _CONSTANT)


def _unary(node: fx.Node) -> tuple[fx.Node, Step] | None:
    """``(what node reads, its step)`` where that is one map and constants."""
    places: list[tuple[int | str, Any]] = [*enumerate(node.args), *node.kwargs.items()]
    at = [place for place, value in places if isinstance(value, fx.Node)]
    if len(at) != 1 or not all(_constant(value) for place, value in places if place != at[0]):
        return None
    source = dict(places)[at[0]]
    if node.op == "call_module":
        return (source, node.target) if len(places) == 1 else None
    if node.op == "call_method" and at[0] != 0 or node.op not in ("call_function", "call_method"):
        return None
    args = tuple(None if place == at[0] else value for place, value in enumerate(node.args))
    kwargs = tuple((name, None if name == at[0] else value) for name, value in node.kwargs.items())
    return source, Call(node.target, args, kwargs, at[0])


def _row(node: fx.Node, start: fx.Node) -> list[tuple[fx.Node, Step]] | None:
    """The steps from ``start`` to ``node``, each with its node."""
    row: list[tuple[fx.Node, Step]] = []
    while node is not start:
        found = _unary(node)
        if found is None:
            return None
        row.append((node, found[1]))
        node = found[0]
    return row[::-1]


def _in_place(module: nn.Module, step: Step) -> bool:
    if isinstance(step, Call):
        named = step.target if isinstance(step.target, str) else getattr(step.target, "__name__", "")
        known = step.target in activations.FUNCTIONS
        given = activations.arguments(step.target, step.args, dict(step.kwargs)) if known else dict(step.kwargs)
        return (named.endswith("_") and not named.endswith("__")) or given.get("inplace", False) is True
    return getattr(module.get_submodule(step), "inplace", False) is True


def _is_conv(module: nn.Module) -> Callable[[Step], bool]:
    return lambda step: isinstance(step, str) and isinstance(module.get_submodule(step), nn.Conv2d)


def _concatenated(node: fx.Node, start: fx.Node) -> list[tuple[fx.Node, Step]] | None:
    """The row whose channels a concatenation puts behind those of ``start``."""
    found = {**dict(zip(("tensors", "dim"), node.args, strict=False)), **node.kwargs}
    tensors = found.get("tensors")
    if set(found) != {"tensors", "dim"} or found["dim"] != 1 or not isinstance(tensors, list | tuple):
        return None
    if len(tensors) != 2 or tensors[0] is not start or not isinstance(tensors[1], fx.Node):
        return None
    return _row(tensors[1], start)


def _match(module: nn.Module, graph: fx.Graph) -> Plan | None:
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    output = next(node for node in graph.nodes if node.op == "output").args[0]
    if len(inputs) != 1 or not isinstance(output, fx.Node):
        return None
    start, join = inputs[0], output
    behind: list[tuple[fx.Node, Step]] = []
    while join is not start:
        found = _unary(join)
        if found is None:
            break
        behind.insert(0, (join, found[1]))
        join = found[0]
    if join is start:
        rows, plan = [behind], Plan(tuple(step for _, step in behind))
    elif join.target in _CONCATENATIONS:
        row = _concatenated(join, start)
        if row is None or behind or join.meta["inside"]:
            return None
        rows, plan = [row], Plan(tuple(step for _, step in row), dense=True)
    else:
        if join.target not in _SUMS or len(join.args) != 2 or join.kwargs or join.meta["inside"]:
            return None
        if not all(isinstance(arg, fx.Node) for arg in join.args):
            return None
        sides = [_row(arg, start) for arg in join.args]
        if None in sides:
            return None
        main, other = sorted(sides, key=lambda row: -sum(_is_conv(module)(step) for _, step in row))
        shared = 0
        while shared < min(len(main), len(other)) and main[shared][0] is other[shared][0]:
            shared += 1
        rows = [main, other[shared:], behind]
        if any(isinstance(step, Call) and step.target not in _ON_SHORTCUTS for _, step in rows[1]):
            return None  # what is added may be no map at all
        steps = [tuple(step for _, step in row) for row in rows]
        plan = Plan(steps[0], steps[1], shared, steps[2])
    # what is overwritten in place must be nobody else's
    read: dict[fx.Node, int] = {}
    for source in (_unary(node)[0] for row in rows for node, _ in row):
        read[source] = read.get(source, 0) + 1
    for arg in () if join is start else join.all_input_nodes:
        read[arg] = read.get(arg, 0) + 1
    for row in rows:
        for node, step in row:
            source = _unary(node)[0]
            if _in_place(module, step) and (source is start or read[source] > 1):
                return None
    return plan


def _stamp(path: str, module: nn.Module) -> Stamp:
    attributes = tuple(
        (name, value)
        for name, value in module.__dict__.items()
        if isinstance(value, _PLAIN)
        and name not in ("training", "_is_full_backward_hook")
        and not name.startswith("_fusedres")
    )
    return Stamp(path, tuple((name, type(child)) for name, child in module._modules.items()), attributes)


def _trace(module: nn.Module) -> Plan | None:
    """The plan of ``module`` in its present mode, None where it has none. Parts that are no rows are steps (an attention with BatchNorms
    of its own), unless going through them, too, gives a plan (a body that returns two maps)."""
    found = None
    for deep in (False, True):
        tracer = _Tracer(deep)
        try:
            with torch.no_grad():
                plan = _match(module, tracer.trace(_view(module)))
        except Exception:  # a forward may do anything; what cannot be traced is left alone
            continue
        if plan is not None:
            stamps = tuple(_stamp(path, m) for path, m in {"": module, **tracer.passed}.items())
            found = replace(plan, stamps=stamps)
            steps = [step for step in (*plan.main, *(plan.shortcut or ())) if isinstance(step, str)]
            if not any(_holds(module.get_submodule(step), *norm_types()) for step in steps):
                break
    return found


def read(module: nn.Module) -> dict[bool, Plan] | None:
    """The plans of ``module`` in training and in evaluation, None where it lacks one."""
    modes = [(m, m.training) for m in module.modules()]
    plans = {}
    try:
        for training in (True, False):
            for m, _ in modes:
                m.training = training
            plans[training] = _trace(module)
    finally:
        for m, training in modes:
            m.training = training
    return None if None in plans.values() else plans


def blocks(model: nn.Module) -> set[int]:
    """The ids of the modules of ``model`` that are small enough to be a block and hold what one is made of."""
    counts: dict[int, tuple[int, bool]] = {}

    def count(module: nn.Module) -> tuple[int, bool]:
        """Convolutions inside, and whether there is a BatchNorm."""
        if id(module) not in counts:
            found = [count(child) for child in module.children()]
            convolutions = isinstance(module, CONVOLUTIONS) + sum(c for c, _ in found)
            counts[id(module)] = convolutions, isinstance(module, norm_types()) or any(n for _, n in found)
        return counts[id(module)]

    count(model)
    return {i for i, (convolutions, norms) in counts.items() if 0 < convolutions <= MOST_CONVOLUTIONS and norms}
