"""What a forward may call: functions and methods that do nothing but compute, on maps and on constants.

A call on a map is a step: it runs again in every forward, with the map's value. It may draw random numbers, since it draws them then; it
may overwrite its first argument, where that is known (:func:`overwrites`). What it must not do is keep anything, or answer differently by
anything but its arguments.
"""

from __future__ import annotations

import builtins
import functools
import inspect
import math
import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import activations


def _of(space: Any, names: str) -> set[Callable[..., Any]]:
    return {getattr(space, name) for name in names.split()}


#: functions of maps
FUNCTIONS: frozenset[Callable[..., Any]] = frozenset(
    {f for f in activations.FUNCTIONS if callable(f)}
    | _of(
        F,
        "adaptive_avg_pool2d adaptive_max_pool2d avg_pool2d avg_pool3d celu dropout dropout2d dropout3d elu gelu glu hardsigmoid "
        "hardswish hardtanh interpolate leaky_relu logsigmoid log_softmax max_pool2d max_pool3d mish normalize pad pixel_shuffle "
        "pixel_unshuffle relu relu6 rrelu selu sigmoid silu softmax softplus softshrink softsign tanh tanhshrink threshold",
    )
    | _of(
        torch,
        "abs add amax amin bmm cat channel_shuffle chunk clamp clone concat concatenate div exp flatten flip log matmul maximum "
        "mean minimum mul narrow neg permute pow relu relu_ reshape roll rsqrt sigmoid softmax split sqrt square squeeze stack sub "
        "sum tanh tensor_split transpose unbind unsqueeze",
    )
    | _of(operator, "add sub mul truediv floordiv mod pow matmul neg pos abs getitem iadd isub imul itruediv")
)

#: methods of maps
METHODS: frozenset[str] = frozenset(
    (
        "abs add add_ amax amin bernoulli_ chunk clamp clamp_ clone contiguous detach dim div div_ double exp expand expand_as flatten "
        "flip float half hardtanh_ item log matmul mean mul mul_ narrow new_empty numel permute pow relu relu_ reshape reshape_as roll "
        "rsqrt sigmoid sigmoid_ size softmax split sqrt square squeeze sub sub_ sum tanh tanh_ to transpose type_as unbind unsqueeze "
        "view view_as"
    ).split()
)
#: attributes of maps, which no step changes
ATTRIBUTES = frozenset({"shape", "ndim", "dtype", "device"})
#: methods whose result is no map
MEASURES = frozenset({"size", "dim", "numel"})

#: methods of lists that outlive a forward
OF_LISTS = frozenset({"append", "clear", "extend"})

#: what results in memory of its own, by name
FRESH = frozenset(
    (
        "abs add amax amin bmm clone div exp log matmul mean mul neg pow rsqrt sigmoid softmax sqrt square sub sum tanh truediv"
    ).split()
)

#: what results in less than a map, by name
REDUCTIONS = frozenset({"amax", "amin", "item", "mean", "sum"})

#: contexts in which gradients are recorded, or not
GRAD_MODES: dict[Any, bool] = {torch.no_grad: False, torch.enable_grad: True}

#: functions of constants
STATIC: frozenset[Callable[..., Any]] = frozenset(
    _of(builtins, "abs all any bool divmod float int len max min range round sorted str sum")
    | _of(math, "ceil floor gcd log2 prod sqrt")
)
#: functions that rearrange what they are given, maps among it
CONTAINERS: frozenset[Callable[..., Any]] = frozenset(_of(builtins, "enumerate list reversed tuple zip"))

#: questions with one answer whenever a block runs fused: it does not while torch.jit or torch.compile looks on
ANSWERS: dict[Callable[..., Any], Any] = {
    torch.jit.is_scripting: False,
    torch.jit.is_tracing: False,
    torch.compiler.is_compiling: False,
    torch.compiler.is_dynamo_compiling: False,
    torch._C._get_tracing_state: None,
    torch._C._log_api_usage_once: None,
}

_IN_PLACE_OPERATORS = _of(operator, "iadd isub imul itruediv")


@functools.cache
def _parameters(target: Callable[..., Any]) -> tuple[str, ...]:
    """The names of the parameters of ``target``, none where it does not tell."""
    try:
        return tuple(inspect.signature(target).parameters)
    except ValueError:
        return ()


def overwrites(target: Callable[..., Any] | str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a call overwrites its first argument."""
    if isinstance(target, str):
        return target.endswith("_")
    if target in _IN_PLACE_OPERATORS or getattr(target, "__name__", "").endswith("_"):
        return True
    names = _parameters(target)
    return {**dict(zip(names, args, strict=False)), **kwargs}.get("inplace", False) is not False


#: the binary operators of Python's syntax, and those of augmented assignments
BINARY: dict[str, Callable[[Any, Any], Any]] = {
    "Add": operator.add,
    "Sub": operator.sub,
    "Mult": operator.mul,
    "Div": operator.truediv,
    "FloorDiv": operator.floordiv,
    "Mod": operator.mod,
    "Pow": operator.pow,
    "MatMult": operator.matmul,
}
AUGMENTED: dict[str, Callable[[Any, Any], Any]] = {
    "Add": operator.iadd,
    "Sub": operator.isub,
    "Mult": operator.imul,
    "Div": operator.itruediv,
}
COMPARED: dict[str, Callable[[Any, Any], Any]] = {
    "Eq": operator.eq,
    "NotEq": operator.ne,
    "Lt": operator.lt,
    "LtE": operator.le,
    "Gt": operator.gt,
    "GtE": operator.ge,
    "Is": operator.is_,
    "IsNot": operator.is_not,
    "In": lambda a, b: a in b,
    "NotIn": lambda a, b: a not in b,
}
UNARY: dict[str, Callable[[Any], Any]] = {
    "USub": operator.neg,
    "UAdd": operator.pos,
    "Not": operator.not_,
}

#: what ``isinstance(map, ...)`` may be asked about
MAP_TYPES: tuple[type, ...] = (Tensor,)
