"""The activations that schedules and backends compute, each known by a name: what descriptions hold and primitives take as ``act``.

    none, relu, relu6, leaky_relu:SLOPE, hardswish, silu, gelu (by erf), gelu_tanh

Each backend has one place that computes value and derivative from these names; here are those of plain PyTorch, and which modules and
functions the names stand for.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

#: the kinds, in the order in which csrc/cpu/activation.h counts them
KINDS = ("none", "relu", "leaky_relu", "relu6", "hardswish", "silu", "gelu", "gelu_tanh")


class Activation(NamedTuple):
    """What a name says: the ``kind``, the slope on the negative side of a leaky ReLU (else 0), and both with the kind as a number, as the
    C++ operators take them."""

    kind: str
    slope: float
    code: tuple[int, float]


@functools.lru_cache(maxsize=256)
def parse(act: str) -> Activation:
    """The activation of a name; ValueError for one that is unknown."""
    kind, colon, parameter = act.partition(":")
    if kind in KINDS and bool(colon) == (kind == "leaky_relu"):
        try:
            slope = float(parameter or 0.0)
        except ValueError:
            pass
        else:
            return Activation(kind, slope, (KINDS.index(kind), slope))
    names = ", ".join(repr(f"{k}:SLOPE" if k == "leaky_relu" else k) for k in KINDS)
    raise ValueError(f"unknown activation {act!r}: expected one of {names}")


def leaky(slope: float) -> str:
    """The name of a leaky ReLU."""
    return f"leaky_relu:{float(slope)!r}"


def value(z: Tensor, act: str) -> Tensor:
    """``act(z)``, differentiable."""
    kind, slope, _ = parse(act)
    if kind == "none":
        return z
    if kind == "relu":
        return torch.relu(z)
    if kind == "leaky_relu":
        return F.leaky_relu(z, slope)
    if kind == "gelu_tanh":
        return F.gelu(z, approximate="tanh")
    return getattr(F, kind)(z)


def gradient(dy: Tensor, z: Tensor, act: str) -> Tensor:
    """The gradient of z by ``act(z)``, with torch's choices where that has a kink."""
    kind, slope, _ = parse(act)
    aten = torch.ops.aten
    if kind == "none":
        return dy
    if kind == "relu":
        return torch.where(z <= 0, torch.zeros_like(dy), dy)
    if kind == "leaky_relu":
        return aten.leaky_relu_backward(dy, z, slope, False)
    if kind == "relu6":
        return aten.hardtanh_backward(dy, z, 0.0, 6.0)
    if kind == "hardswish":
        return aten.hardswish_backward(dy, z)
    if kind == "silu":
        return aten.silu_backward(dy, z)
    return aten.gelu_backward(dy, z, approximate="tanh" if kind == "gelu_tanh" else "none")


# ---- what the names stand for ----------------------------------------------------------------------------------------


def _clipped(low: float, high: float) -> str | None:
    return "relu6" if (low, high) == (0, 6) else None


#: by type, the name of a module's activation, None where its parameters are others
_MODULES: dict[type[nn.Module], Callable[[Any], str | None]] = {
    nn.ReLU: lambda m: "relu",
    nn.ReLU6: lambda m: _clipped(m.min_val, m.max_val),
    nn.Hardtanh: lambda m: _clipped(m.min_val, m.max_val),
    nn.LeakyReLU: lambda m: leaky(m.negative_slope),
    nn.SiLU: lambda m: "silu",
    nn.Hardswish: lambda m: "hardswish",
    nn.GELU: lambda m: {"none": "gelu", "tanh": "gelu_tanh"}.get(m.approximate),
}
#: timm's modules around the same functions
_TIMM = {"GELU": "gelu", "GELUTanh": "gelu_tanh"}


def of_module(module: nn.Module) -> str | None:
    """The name of a module's activation, None where it is none of these (a subclass may compute something else)."""
    name = _MODULES.get(type(module))
    if name is not None:
        return name(module)
    known = _TIMM.get(type(module).__name__)
    timm = sys.modules.get("timm.layers.activations")
    return known if known is not None and type(module) is getattr(timm, type(module).__name__, None) else None


#: functions, and methods of a map by their names, with their parameters behind the map
_FUNCTIONS: dict[Callable | str, tuple[str, ...]] = {
    **dict.fromkeys((F.relu, F.relu6, F.silu, F.hardswish), ("inplace",)),
    F.leaky_relu: ("negative_slope", "inplace"),
    F.hardtanh: ("min_val", "max_val", "inplace"),
    **dict.fromkeys((F.leaky_relu_,), ("negative_slope",)),
    **dict.fromkeys((F.hardtanh_,), ("min_val", "max_val")),
    **dict.fromkeys((F.relu_, F.gelu, torch.relu, torch.relu_, "relu", "relu_"), ()),
}
FUNCTIONS = tuple(_FUNCTIONS)
_CLIPPING, _LEAKY = (F.hardtanh, F.hardtanh_), (F.leaky_relu, F.leaky_relu_)
_NAMED: dict[Callable | str, str] = {F.relu6: "relu6", F.silu: "silu", F.hardswish: "hardswish"}


def arguments(target: Callable | str, args: tuple, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call of one of ``FUNCTIONS`` behind the map, by name."""
    return {**dict(zip(_FUNCTIONS[target], args[1:], strict=False)), **kwargs}


def of_call(target: Callable | str, args: tuple, kwargs: Mapping[str, Any]) -> str | None:
    """The name of the activation that a call computes, None where it is none of these."""
    if target not in _FUNCTIONS:
        return None
    given = arguments(target, args, kwargs)
    if target in _CLIPPING:
        return _clipped(given.get("min_val", -1.0), given.get("max_val", 1.0))
    if target in _LEAKY:
        return leaky(given.get("negative_slope", 0.01))
    if target is F.gelu:
        return {"none": "gelu", "tanh": "gelu_tanh"}.get(given.get("approximate", "none"))
    return _NAMED.get(target, "relu")
