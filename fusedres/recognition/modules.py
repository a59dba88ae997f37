"""Readers of modules, one kind each: what a convolution, a BatchNorm, an activation or a pool is at the moment, or why it is not fused.

A module of torch's is what its class says only as long as the code of that class is torch's (:func:`plain`).
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable
from types import FunctionType
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.parameter import is_lazy

from .. import activations
from ..errors import Unsupported
from ..specs import Conv, Geometry, Norm, Pool, Shape
from ..swap import original_class as class_of
from . import families

#: those of two dimensions, and of three, in which dense blocks run fused
CONVOLUTIONS = (nn.Conv2d, nn.Conv3d)

# ---- the code that is read by its names ------------------------------------------------------------------------------

#: what a module may compute by, on its class or on itself
_METHODS = ("forward", "_forward_impl", "_conv_forward", "_check_input_dim", "bn_function")
_CALLS = ("__call__", "_call_impl", "_wrapped_call_impl")
_CODE = frozenset((*_METHODS, *_CALLS))
_FUNCTIONAL = (
    "conv2d",
    "conv3d",
    "batch_norm",
    "relu",
    "max_pool2d",
    "avg_pool2d",
    "leaky_relu",
    "silu",
    "gelu",
    "hardtanh",
)
_GLOBAL_HOOKS = tuple(f"_global_{kind}_hooks" for kind in ("forward", "forward_pre", "backward", "backward_pre"))
_KNOWN = (
    *CONVOLUTIONS, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, nn.MaxPool2d, nn.AvgPool2d, nn.Sigmoid, nn.Identity,
    nn.ReLU, nn.ReLU6, nn.Hardtanh, nn.LeakyReLU, nn.SiLU, nn.Hardswish, nn.GELU, nn.ZeroPad3d, nn.ConstantPad3d, nn.Sequential,
)  # fmt: skip


def _code(cls: type) -> tuple[Any, ...]:
    """The functions by which a class computes."""
    return tuple(getattr(cls, name, None) for name in _METHODS)


_of_module, _of_functional = operator.itemgetter(*_CALLS), operator.itemgetter(*_FUNCTIONAL)
_hooks = operator.itemgetter(*_GLOBAL_HOOKS)


def _calls() -> tuple[Any, ...]:
    """What stands around the forward of every module, and below those of torch's."""
    return _of_module(nn.Module.__dict__), _of_functional(F.__dict__)


def _is_torchs(code: tuple[Any, ...]) -> bool:
    return all(function is None or function.__module__.startswith("torch.nn.modules") for function in code)


def computes_by(name: str) -> bool:
    """Whether a module may compute by what it holds under ``name``."""
    return name in _CODE


def methods_of(module: nn.Module) -> tuple[str, ...]:
    """The names of the methods by which ``module`` computes, its class's or its own."""
    return tuple(name for name in _METHODS if hasattr(module, name))


# as they were before anything could change them; what had been changed even before is not known
_TORCHS = {cls: code for cls in _KNOWN if _is_torchs(code := _code(cls))}
_TORCHS_CALLS = _calls()


@functools.cache
def _getter(cls: type) -> Callable[[type], tuple[Any, ...]]:
    """What gives the functions by which a class computes, of those that it has."""
    names = [name for name in _METHODS if hasattr(cls, name)] or ["__call__"]
    # of one name alone it would give the function, and not a tuple
    return operator.attrgetter(*(names if len(names) > 1 else names * 2))


def classes_of(modules: list[nn.Module]) -> list[type]:
    """The classes by which ``modules`` compute, each once."""
    return [class_of(module) for module in {type(m): m for m in modules}.values()]


def watched(classes: list[type]) -> list[Any]:
    """The code by which modules of ``classes`` compute, to be compared with what it was: one that has changed is another function."""
    found: list[Any] = []
    for cls in classes:
        found += _getter(cls)(cls)
    return found


def has_global_hooks() -> bool:
    """Whether a hook waits for every module of the process."""
    return any(_hooks(torch_module.__dict__))


def global_hooks() -> bool:
    """Whether something waits for every module of the process, which inner modules must run into: a hook, or another ``__call__``."""
    return has_global_hooks() or _calls() != _TORCHS_CALLS


def call_is_plain(module: nn.Module) -> bool:
    """Whether calling ``module`` calls its forward and its hooks alone."""
    cls, own = class_of(module), module.__dict__
    return all(getattr(cls, name) is getattr(nn.Module, name) and name not in own for name in _CALLS)


def has_own_code(module: nn.Module) -> bool:
    """Whether a method by which ``module`` computes was replaced on itself."""
    return not module.__dict__.keys().isdisjoint(_CODE)


class Hooked(Unsupported):
    """A hook is in the way, which may be removed at any time."""


def unhooked(module: nn.Module) -> None:
    """Check that no hook waits on ``module``; raises Hooked."""
    if hooked(module):
        raise Hooked(f"a hook is registered on its {class_of(module).__name__}")


def hooked(module: nn.Module) -> bool:
    """Whether a hook waits on ``module`` that running it fused would not fire."""
    own = module.__dict__  # asked of every module at every call: past nn.Module's __getattr__
    return bool(
        own["_forward_hooks"] or own["_forward_pre_hooks"] or own["_backward_hooks"] or own["_backward_pre_hooks"]
    )


def plain(module: nn.Module, *types: type[nn.Module]) -> None:
    """Check that ``module`` is exactly one of ``types`` (a subclass may compute something else), that its code is its class's and that of
    the class what it was, and that no hook waits on it. Raises Unsupported."""
    cls = class_of(module)
    if cls not in types:
        raise Unsupported(f"found {cls.__name__} where {' or '.join(t.__name__ for t in types)} is expected")
    unhooked(module)
    if has_own_code(module):
        raise Unsupported(f"the forward of its {cls.__name__} is overridden")
    if _code(cls) != _TORCHS[cls] if cls in _TORCHS else not families.is_published(module):
        raise Unsupported(f"the forward of {cls.__name__} has been replaced")


# ---- what stands where -------------------------------------------------------------------------------------------------


def child_of(module: nn.Module, path: str) -> nn.Module | None:
    """What stands at ``path`` inside ``module``; raises Unsupported where there is nothing."""
    found: Any = module
    try:
        for name in path.split(".") if path else ():
            found = found._modules[name]
    except (KeyError, AttributeError):
        raise Unsupported(f"it has no {path} any more; fusedres.convert reads it anew") from None
    return found


def holds(module: nn.Module, *kinds: type[nn.Module]) -> bool:
    """Whether there is one of ``kinds`` inside ``module``, which is none itself."""
    return not isinstance(module, kinds) and any(isinstance(m, kinds) for m in module.modules())


def is_uninitialised(module: nn.Module) -> bool:
    """Whether a module inside waits for its first input to know its shape."""
    return any(
        isinstance(m, LazyModuleMixin) and any(p is not None and is_lazy(p) for p in m._parameters.values())
        for m in module.modules()
    )


def norm_types() -> tuple[type[nn.Module], ...]:
    """The BatchNorms that run fused."""
    return (nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, *families.frozen_norms())


# ---- readers -----------------------------------------------------------------------------------------------------------


def conv(module: Any, dtype: torch.dtype | None, *types: type[nn.Module]) -> Conv:
    """A ``nn.Conv2d`` (or another of ``types``); ``dtype`` casts its weights, as autocast does. Raises Unsupported."""
    plain(module, *(types or (nn.Conv2d,)))
    if module.padding_mode != "zeros":
        raise Unsupported(f"padding_mode {module.padding_mode!r}")
    padding = module.padding
    if padding == "valid":
        padding = (0,) * len(module.kernel_size)
    elif padding == "same":
        reach = [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True)]
        if any(r % 2 for r in reach):
            raise Unsupported("padding 'same' that is wider on one side")
        padding = tuple(r // 2 for r in reach)
    weight, bias = module.weight, module.bias
    if dtype is not None:
        weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
    return Conv(weight, bias, Geometry(module.stride, padding, module.dilation, module.groups))


def norm(module: nn.Module, act: str) -> Norm:
    """A BatchNorm with the activation ``act`` behind it, and what its next step does, without doing it. Raises Unsupported."""
    inside = families.norm_act(module)
    if inside is None:
        plain(module, *norm_types())
    else:
        plain(module, class_of(module))
        if not at_rest(inside[0]) or hooked(inside[0]):
            raise Unsupported(f"{type(inside[0]).__name__} inside a BatchNorm")
        own = activation(inside[1])
        act = act if own == "none" else own
    return next_step(module, act)


def next_step(module: Any, act: str) -> Norm:
    """What the next step of a BatchNorm does, whatever hooks wait on it."""
    weight, bias = module.weight, module.bias
    if not isinstance(module, _BatchNorm):  # a frozen one: buffers in every mode
        return Norm(weight, bias, module.running_mean, module.running_var, False, 0.0, module.eps, act, promotes=True)
    training = module.training or (module.running_mean is None and module.running_var is None)
    tracking = training and module.training and module.track_running_stats and module.running_mean is not None
    momentum = module.momentum
    if tracking and momentum is None:
        batches = cast(Tensor, module.num_batches_tracked)
        momentum = 1.0 / (float(batches) + 1.0)  # torch reads the counter on the host, too
    running = (module.running_mean, module.running_var) if tracking or not training else (None, None)
    group = _group(module) if isinstance(module, nn.SyncBatchNorm) else None
    return Norm(weight, bias, *running, training, momentum or 0.0, module.eps, act, group)


def _group(module: nn.SyncBatchNorm) -> dist.ProcessGroup | None:
    """The processes with which a SyncBatchNorm shares its statistics, None where it has its own batch alone."""
    if not (module.training and dist.is_available() and dist.is_initialized()):
        return None
    group = module.process_group or dist.group.WORLD
    return group if dist.get_world_size(group) > 1 else None


def activation(module: nn.Module | None) -> str:
    """The name of an activation module, in :mod:`fusedres.activations`; raises Unsupported."""
    if module is None:
        return "none"
    act = "none" if class_of(module) is nn.Identity else activations.of_module(module)
    if act is None:
        raise not_fused(module)
    plain(module, class_of(module))
    return act


def not_fused(module: nn.Module) -> Unsupported:
    """Why an activation is not fused."""
    return Unsupported(f"found {type(module).__name__}, which is not among the activations that are fused")


def pair(value: int | tuple[int, ...]) -> tuple[int, ...]:
    """One number for both dimensions, or one for each."""
    return (value, value) if isinstance(value, int) else tuple(value)


def pool(module: Any) -> Pool:
    """A ``nn.MaxPool2d`` or ``nn.AvgPool2d``; raises Unsupported."""
    plain(module, nn.MaxPool2d, nn.AvgPool2d)
    kernel, stride, padding = (pair(value) for value in (module.kernel_size, module.stride, module.padding))
    if isinstance(module, nn.AvgPool2d):
        if stride != kernel or padding != (0, 0) or module.divisor_override is not None:
            raise Unsupported("a mean pool with overlapping, padded or re-weighted windows")
        return Pool("mean", kernel, stride, padding, module.ceil_mode)
    if module.ceil_mode:
        raise Unsupported("pooling with ceil_mode")
    if pair(module.dilation) != (1, 1) or module.return_indices:
        raise Unsupported("a max pool with dilation or return_indices")
    if kernel[0] * kernel[1] > 255:
        raise Unsupported("a max pool whose window has more than 255 positions")
    return Pool("max", kernel, stride, padding)


def at_rest(module: nn.Module) -> bool:
    """Whether a dropout does nothing in its present mode."""
    if has_own_code(module) or not isinstance(class_of(module).forward, FunctionType):
        return False
    if isinstance(module, _DropoutNd) and class_of(module).__module__ == _DropoutNd.__module__:
        return not module.training or module.p == 0
    return class_of(module) is nn.Identity


# ---- shapes ------------------------------------------------------------------------------------------------------------

#: what changes no shape, and what stands among the activations and does
_ELEMENTWISE = (nn.Identity, _BatchNorm, _DropoutNd)
_RESHAPING = (nn.GLU, nn.MultiheadAttention)


def shape_behind(module: nn.Module, shape: Shape) -> Shape | None:
    """The shape of ``module``'s output for an input of ``shape``, None where it cannot be told without running it. A module that knows
    has a method ``out_shape(shape)``."""
    told = getattr(module, "out_shape", None)
    if callable(told):
        return cast("Shape | None", told(shape))
    if isinstance(module, nn.Sequential) and class_of(module).forward is nn.Sequential.forward:
        behind: Shape | None = shape
        for child in module:
            behind = None if behind is None else shape_behind(child, behind)
        return behind
    try:
        if class_of(module) is nn.Conv2d:
            return conv(module, None).out_shape(shape)
        if class_of(module) in (nn.MaxPool2d, nn.AvgPool2d):
            return pool(module).out_shape(shape)
    except Unsupported:
        return None
    if isinstance(module, nn.Upsample):
        return _upsampled(module, shape)
    is_activation = class_of(module).__module__ == nn.ReLU.__module__ and not isinstance(module, _RESHAPING)
    return shape if is_activation or isinstance(module, _ELEMENTWISE) else None


def _upsampled(module: nn.Upsample, shape: Shape) -> Shape:
    spatial = shape[2:]
    given: Any = module.scale_factor if module.size is None else module.size
    values = given if isinstance(given, tuple) else (given,) * len(spatial)
    if module.size is None:
        values = tuple(math.floor(size * scale) for size, scale in zip(spatial, values, strict=True))
    return (*shape[:2], *values)
