"""What a step of a block is."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, cast

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from .. import activations
from ..autograd.residual import Subsample
from ..errors import Unsupported
from . import families
from .calls import is_sequential
from .graph import FunctionStep, Step
from .modules import (
    CONVOLUTIONS,
    activation,
    at_rest,
    child_of,
    class_of,
    hooked,
    norm_types,
    not_fused,
    pair,
    pool,
    unhooked,
)


class Op(NamedTuple):
    """One step of a block. ``kind``: conv, norm, act, pool, subsample or other. ``run``: the originals, in a row; ``module``: what is read
    when it runs fused; ``value``: an activation's name (of a norm: that of the one behind it; None: not one that is fused), a pool, a
    subsampling."""

    kind: str
    run: tuple[Callable[[Tensor], Tensor], ...]
    module: nn.Module | None = None
    value: Any = None


#: activations, known or not: where a BatchNorm stands in front of one that is not fused, the block is left alone
_ACTIVATIONS = tuple(
    getattr(nn, name)
    for name in (
        "CELU ELU GELU GLU Hardshrink Hardsigmoid Hardswish Hardtanh LeakyReLU LogSigmoid Mish PReLU RReLU ReLU6 SELU Sigmoid SiLU "
        "Softplus Softshrink Softsign Tanh Tanhshrink Threshold"
    ).split()
)
_NORMS = (_NormBase, nn.GroupNorm, nn.LayerNorm, nn.LocalResponseNorm)


def _foreign_activation(module: nn.Module) -> bool:
    # timm's own activations hold nothing and stand in modules of that name
    return isinstance(module, _ACTIVATIONS) or ".activations" in class_of(module).__module__


def _of_module(module: nn.Module) -> Iterator[Op]:
    inside = families.norm_act(module)
    if is_sequential(module):
        unhooked(module)
        for child in module.children():
            yield from _of_module(child)
    elif isinstance(module, CONVOLUTIONS):
        yield Op("conv", (module,), module)
    elif inside is not None:
        drop, act = inside
        known = "none" if class_of(act) is nn.Identity else activations.of_module(act)
        if known is None and _foreign_activation(act):
            raise not_fused(act)
        if at_rest(drop) and known is not None:
            yield Op("norm", (module,), module, known)
        else:
            yield Op("other", (module,), module)
    elif isinstance(module, norm_types()):
        yield Op("norm", (module,), module, "none")
    elif class_of(module) is nn.AvgPool2d and not hooked(module):
        yield _average(module)
    elif class_of(module) in (nn.ZeroPad3d, nn.ConstantPad3d) and _pads_channels(module) and not hooked(module):
        yield Op("subsample", (module,), module, Subsample((1, 1), *cast(nn.ConstantPad3d, module).padding[4:]))
    elif at_rest(module) and not hooked(module):
        return
    elif _foreign_activation(module) or activations.of_module(module) is not None:
        yield Op("act", (module,), module, activations.of_module(module))
    elif isinstance(module, _NORMS):
        raise Unsupported(f"found {type(module).__name__} where BatchNorm2d is expected")
    else:
        yield Op("other", (module,), module)


def _average(module: Any) -> Op:
    kernel, stride = pair(module.kernel_size), pair(module.stride)
    if kernel == (1, 1) and pair(module.padding) == (0, 0) and module.divisor_override is None:
        return Op("subsample", (module,), module, Subsample((stride[0], stride[1]), 0, 0))
    try:
        return Op("pool", (module,), module, pool(module))
    except Unsupported:
        return Op("other", (module,), module)


def _pads_channels(module: Any) -> bool:
    """Whether ``module`` puts channels of zeros around a map: its third dimension from the end is that of the channels."""
    return module.value == 0 and not any(module.padding[:4]) and min(module.padding) >= 0


def _strides(step: FunctionStep) -> tuple[int, int] | None:
    """The strides of ``x[:, :, ::s, ::t]``."""
    if step.target is not operator.getitem or step.at != 0:
        return None
    index = step.args[1]
    if not isinstance(index, tuple) or len(index) != 4:
        return None
    every, steps = slice(None), []
    for i, s in enumerate(index):
        if not isinstance(s, slice) or s.start is not None or s.stop is not None or (i < 2 and s != every):
            return None
        steps.append(s.step or 1)
    return (steps[2], steps[3]) if min(steps) > 0 else None


def _zero_channels(step: FunctionStep) -> tuple[int, int] | None:
    """The channels before and behind of ``F.pad(x, (0, 0, 0, 0, front, back))``."""
    if step.target is not F.pad:
        return None
    found = step.arguments("input", "pad", "mode", "value")
    pad = list[int](found.get("pad") or ())
    zeros = found.get("mode", "constant") == "constant" and not found.get("value")
    if not zeros or len(pad) not in (6, 8) or any(pad[:4]) or any(pad[6:]) or min(pad) < 0:
        return None
    return pad[4], pad[5]


def _of_function(step: FunctionStep) -> Op | None:
    act = activations.of_call(step.target, step.args, dict(step.kwargs))
    if act is not None:
        return Op("act", (step,), None, act)
    strides, zeros = _strides(step), _zero_channels(step)
    if strides is not None or zeros is not None:
        return Op("subsample", (step,), None, Subsample(strides or (1, 1), *(zeros or (0, 0))))
    if step.target in (F.dropout, F.dropout2d, F.dropout3d):
        found = {"p": 0.5, "training": True, **step.arguments("input", "p", "training")}
        if not found["training"] or found["p"] == 0:
            return None
    return Op("other", (step,))


#: what most steps are, exactly: told by one look-up
_COMMON: dict[type, tuple[str, str | None]] = {
    **dict.fromkeys(CONVOLUTIONS, ("conv", None)),
    **dict.fromkeys((nn.BatchNorm2d, nn.BatchNorm3d), ("norm", "none")),
    nn.ReLU: ("act", "relu"),
}


def act_of(op: Op) -> str:
    """The activation of an op that runs fused; raises Unsupported."""
    return op.value if op.module is None else activation(op.module)


def of_step(block: nn.Module, step: Step) -> list[Op]:
    """What one step of ``block`` is: nothing where it does nothing. Raises Unsupported."""
    if isinstance(step, FunctionStep):
        op = _of_function(step)
        return [] if op is None else [op]
    module = child_of(block, step)
    if module is None:
        return []
    common = _COMMON.get(type(module))
    return [*_of_module(module)] if common is None else [Op(common[0], (module,), module, common[1])]


def ops(block: nn.Module, steps: tuple[Step, ...]) -> list[Op]:
    """What ``steps`` of ``block`` are: an activation belongs to the BatchNorm before it, a zero padding to the subsampling before it, and
    what does nothing is left out. Raises Unsupported."""
    found: list[Op] = []
    for step in steps:
        for op in of_step(block, step):
            last = found[-1] if found else None
            if op.kind == "act" and last is not None and last.kind == "norm" and last.value == "none":
                found[-1] = last._replace(run=last.run + op.run, value=act_of(op))
            elif op.kind == "subsample" and op.value.stride == (1, 1) and last is not None and last.kind == "subsample":
                front, back = op.value.front + last.value.front, op.value.back + last.value.back
                found[-1] = Op("subsample", last.run + op.run, None, Subsample(last.value.stride, front, back))
            else:
                found.append(op)
    return found
