"""The activations that fused blocks compute, each known by a name: what descriptions hold and primitives take as ``act``.

    none, relu, relu6, leaky_relu:SLOPE, hardswish, silu, gelu (by erf), gelu_tanh, mish

One row of the table below says what an activation computes in plain PyTorch and which modules and functions it stands for. The kernels have
one row each of their own: ``kernels/activations.py``, ``csrc/cuda/activation.cuh``, and ``csrc/cpu/activation.h`` with
``activation-inl.h``. A kind that one of them does not know is an error there.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Target = Callable[..., Any] | str


class Activation(NamedTuple):
    """What a name says: the ``kind``, and the slope on the negative side of a leaky ReLU (else 0)."""

    kind: str
    slope: float


class _Form(NamedTuple):
    """How an activation is written: by a module's class, by a function, or (a string) by a method of the map. ``parameters``: the
    attributes of the module, or the arguments behind the map in their order; ``defaults``: those of the arguments."""

    targets: tuple[Target, ...]
    parameters: tuple[str, ...] = ()
    defaults: Mapping[str, Any] = {}


class _Row(NamedTuple):
    """``value(z, slope)``, differentiable; ``gradient(dy, z, slope)``, the gradient of z, with torch's choices at kinks; the forms that
    stand for it where ``fits(parameters)``; ``slope(parameters)`` for a kind that has one."""

    value: Callable[[Tensor, float], Tensor]
    gradient: Callable[[Tensor, Tensor, float], Tensor]
    forms: tuple[_Form, ...] = ()
    fits: Callable[[Mapping[str, Any]], bool] = lambda given: True
    slope: Callable[[Mapping[str, Any]], float] | None = None


_aten = torch.ops.aten
_CLIP, _SIX = ("min_val", "max_val"), {"min_val": 0.0, "max_val": 6.0}
_TABLE: dict[str, _Row] = {
    "none": _Row(lambda z, slope: z, lambda dy, z, slope: dy),
    "relu": _Row(
        lambda z, slope: torch.relu(z),
        lambda dy, z, slope: torch.where(z <= 0, torch.zeros_like(dy), dy),
        (
            _Form((nn.ReLU,)),
            _Form((F.relu,), ("inplace",)),
            _Form((F.relu_, torch.relu, torch.relu_, "relu", "relu_")),
        ),
    ),
    "leaky_relu": _Row(
        lambda z, slope: F.leaky_relu(z, slope),
        lambda dy, z, slope: _aten.leaky_relu_backward(dy, z, slope, False),
        (
            _Form((nn.LeakyReLU,), ("negative_slope",)),
            _Form((F.leaky_relu,), ("negative_slope", "inplace"), {"negative_slope": 0.01}),
            _Form((F.leaky_relu_,), ("negative_slope",), {"negative_slope": 0.01}),
        ),
        slope=lambda given: given["negative_slope"],
    ),
    "relu6": _Row(
        lambda z, slope: F.relu6(z),
        lambda dy, z, slope: _aten.hardtanh_backward(dy, z, 0.0, 6.0),
        (
            _Form((nn.ReLU6, nn.Hardtanh), _CLIP),
            _Form((F.relu6,), ("inplace",), _SIX),
            _Form((F.hardtanh,), (*_CLIP, "inplace"), {"min_val": -1.0, "max_val": 1.0}),
            _Form((F.hardtanh_,), _CLIP, {"min_val": -1.0, "max_val": 1.0}),
        ),
        fits=lambda given: (given["min_val"], given["max_val"]) == (0, 6),
    ),
    "hardswish": _Row(
        lambda z, slope: F.hardswish(z),
        lambda dy, z, slope: _aten.hardswish_backward(dy, z),
        (_Form((nn.Hardswish,)), _Form((F.hardswish,), ("inplace",))),
    ),
    "silu": _Row(
        lambda z, slope: F.silu(z),
        lambda dy, z, slope: _aten.silu_backward(dy, z),
        (_Form((nn.SiLU,)), _Form((F.silu,), ("inplace",))),
    ),
    "gelu": _Row(
        lambda z, slope: F.gelu(z),
        lambda dy, z, slope: _aten.gelu_backward(dy, z, approximate="none"),
        (_Form((nn.GELU,), ("approximate",)), _Form((F.gelu,), ("approximate",), {"approximate": "none"})),
        fits=lambda given: given["approximate"] == "none",
    ),
    "gelu_tanh": _Row(
        lambda z, slope: F.gelu(z, approximate="tanh"),
        lambda dy, z, slope: _aten.gelu_backward(dy, z, approximate="tanh"),
        (_Form((nn.GELU,), ("approximate",)), _Form((F.gelu,), ("approximate",), {"approximate": "none"})),
        fits=lambda given: given["approximate"] == "tanh",
    ),
    "mish": _Row(
        lambda z, slope: F.mish(z),
        lambda dy, z, slope: _aten.mish_backward(dy, z),
        (_Form((nn.Mish,)), _Form((F.mish,), ("inplace",))),
    ),
}
KINDS = tuple(_TABLE)


@functools.lru_cache(maxsize=256)
def parse(act: str) -> Activation:
    """The activation of a name; ValueError for one that is unknown."""
    kind, colon, parameter = act.partition(":")
    if kind in _TABLE and bool(colon) == (_TABLE[kind].slope is not None):
        try:
            return Activation(kind, float(parameter or 0.0))
        except ValueError:
            pass
    names = ", ".join(repr(kind if row.slope is None else f"{kind}:SLOPE") for kind, row in _TABLE.items())
    raise ValueError(f"unknown activation {act!r}: expected one of {names}")


def leaky(slope: float) -> str:
    """The name of a leaky ReLU."""
    return f"leaky_relu:{float(slope)!r}"


def value(z: Tensor, act: str) -> Tensor:
    """``act(z)``, differentiable. Raises ValueError for an unknown ``act``."""
    kind, slope = parse(act)
    return _TABLE[kind].value(z, slope)


def gradient(dy: Tensor, z: Tensor, act: str) -> Tensor:
    """The gradient of z by ``act(z)``, with torch's choices where that has a kink. Raises ValueError for an unknown ``act``."""
    kind, slope = parse(act)
    return _TABLE[kind].gradient(dy, z, slope)


# ---- what the names stand for ----------------------------------------------------------------------------------------

_READERS: dict[Target, tuple[_Form, tuple[str, ...]]] = {}
for _kind, _row in _TABLE.items():
    for _form in _row.forms:
        for _target in _form.targets:
            _known = _READERS.get(_target, (_form, ()))[1]
            _READERS[_target] = _form, (*_known, _kind)

#: the functions, and by their names the methods of a map, that compute one of the activations
FUNCTIONS = tuple(target for target in _READERS if not isinstance(target, type))
#: timm's modules around the same functions
_TIMM = {"GELU": "gelu", "GELUTanh": "gelu_tanh"}


def _name(kinds: tuple[str, ...], given: Mapping[str, Any]) -> str | None:
    for kind in kinds:
        row = _TABLE[kind]
        if row.fits(given):
            return kind if row.slope is None else leaky(row.slope(given))
    return None


def of_module(module: nn.Module) -> str | None:
    """The name of a module's activation, None where it is none of these (a subclass may compute something else)."""
    if type(module) in _READERS:
        form, kinds = _READERS[type(module)]
        return _name(kinds, {name: getattr(module, name) for name in form.parameters})
    known = _TIMM.get(type(module).__name__)
    timm = sys.modules.get("timm.layers.activations")
    return known if known is not None and type(module) is getattr(timm, type(module).__name__, None) else None


def arguments(target: Target, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call of one of ``FUNCTIONS`` behind the map, by name."""
    form, _ = _READERS[target]
    return {**form.defaults, **dict(zip(form.parameters, args[1:], strict=False)), **kwargs}


def of_call(target: Target, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str | None:
    """The name of the activation that a call computes, None where it is none of these."""
    if target not in FUNCTIONS:
        return None
    return _name(_READERS[target][1], arguments(target, args, kwargs))
