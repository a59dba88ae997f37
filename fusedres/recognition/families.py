"""What is known of torchvision's and timm's classes: the only file that names them.

A class counts only as long as its code is what its library has published: a method that was replaced, on the class or on the module, is
somebody else's, and what it computes is not known by a name.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from types import FunctionType
from typing import Any, NamedTuple

from torch import nn

from ..errors import Unsupported
from ..swap import original_class


class Family(NamedTuple):
    """The ``kind`` of block that a class of a library becomes; ``methods``: those that the fused forward stands for; ``children``: those
    that a dense layer calls one after the other."""

    kind: str
    file: str
    name: str
    methods: tuple[str, ...] = ("forward",)
    children: tuple[str, ...] = ()

    @property
    def cls(self) -> type[nn.Module] | None:
        """The class, None where its library is not loaded: no model can then have it."""
        return getattr(sys.modules.get(self.file), self.name, None)


_LAYER = ("forward", "bn_function", "any_requires_grad", "call_checkpoint_bottleneck")
FAMILIES = (
    Family("stem", "torchvision.models.resnet", "ResNet", ("forward", "_forward_impl")),
    Family("dense", "torchvision.models.densenet", "_DenseBlock"),
    Family("head", "torchvision.models.densenet", "DenseNet"),
    Family("dense", "timm.models.densenet", "DenseBlock"),
)
_IN_LAYERS = ("norm1", "relu1", "conv1", "norm2", "relu2", "conv2")
_IN_TIMMS = ("norm1", "conv1", "norm2", "conv2")
_DENSE_LAYERS = (
    Family("dense layer", "torchvision.models.densenet", "_DenseLayer", _LAYER, _IN_LAYERS),
    Family("dense layer", "timm.models.densenet", "DenseLayer", ("forward", *_LAYER[2:], "bottleneck_fn"), _IN_TIMMS),
    Family("dense layer", "fusedres.nn", "DenseLayer", children=_IN_LAYERS),
)
#: timm's BatchNorms with a dropout and an activation inside
_NORM_ACTS = (
    Family("norm", "timm.layers.norm_act", "BatchNormAct2d"),
    Family("norm", "timm.layers.norm_act", "SyncBatchNormAct"),
)
#: torchvision's BatchNorm of buffers alone
_FROZEN = Family("norm", "torchvision.ops.misc", "FrozenBatchNorm2d")


def _published(cls: type, method: str) -> bool:
    """Whether a method of ``cls`` is the one that stands in the file of its class."""
    function = getattr(cls, method, None)
    owner = next((base for base in cls.__mro__ if method in base.__dict__), None)
    if owner is None:
        return True  # a version of the library without it
    file = getattr(sys.modules.get(owner.__module__), "__file__", None)
    return (
        isinstance(function, FunctionType)
        and function.__qualname__ == f"{owner.__qualname__}.{method}"
        and function.__code__.co_filename == file
    )


def _belongs(module: nn.Module, family: Family) -> bool:
    cls, base = original_class(module), family.cls
    if base is None or not issubclass(cls, base):
        return False
    return all(
        getattr(cls, m, None) is getattr(base, m, None) and m not in module.__dict__ and _published(base, m)
        for m in family.methods
    )


def _first(module: nn.Module, families: Sequence[Family]) -> Family | None:
    return next((family for family in families if _belongs(module, family)), None)


def kind_of(module: nn.Module) -> str | None:
    """The kind of block that ``module`` is by its class, None where it is none that is known."""
    family = _first(module, FAMILIES)
    return None if family is None else family.kind


def check_family(block: nn.Module, kind: str) -> None:
    """Check that ``block``, whose ``kind`` was told by its class, still has that class's forward; raises Unsupported."""
    if kind_of(block) != kind:
        raise Unsupported(f"the forward of {original_class(block).__name__} has been replaced")


def in_dense_layer(module: nn.Module) -> tuple[str, ...] | None:
    """The names of the children that a dense layer calls one after the other, None where ``module`` is none that is known."""
    family = _first(module, _DENSE_LAYERS)
    return None if family is None else family.children


def norm_act(module: Any) -> tuple[nn.Module, nn.Module] | None:
    """``(dropout, activation)`` of timm's BatchNorms with both inside, None where ``module`` is another."""
    cls = original_class(module)
    if all(cls is not family.cls for family in _NORM_ACTS) or _first(module, _NORM_ACTS) is None:
        return None
    return module.drop, module.act


def frozen_norms() -> tuple[type[nn.Module], ...]:
    """The BatchNorms of buffers alone, which normalise by their running statistics in every mode."""
    cls = _FROZEN.cls
    return () if cls is None else (cls,)


def is_published(module: nn.Module) -> bool:
    """Whether the forward of ``module`` is the one in the file of its class."""
    return "forward" not in module.__dict__ and _published(original_class(module), "forward")
