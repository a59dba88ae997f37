"""Modules that run as they stand and are known to do nothing but compute, so that a recording of their operators may stand for them."""

from __future__ import annotations

import operator
from typing import Any

import torch.nn.functional as F
from torch import nn

from ..errors import Unsupported
from .calls import call_is_plain
from .flow import ONE_MAP, Flow, follow
from .modules import class_of, has_own_code, norm, norm_types, plain, unhooked
from .trace import Node

#: torch's own that hold no other module, with the function behind each
_FUNCTIONS: dict[type[nn.Module], str | None] = {
    nn.AdaptiveAvgPool2d: "adaptive_avg_pool2d",
    nn.AdaptiveMaxPool2d: "adaptive_max_pool2d",
    nn.AvgPool2d: "avg_pool2d",
    nn.ChannelShuffle: "channel_shuffle",
    nn.Conv1d: "conv1d",
    nn.Conv2d: "conv2d",
    nn.Dropout: "dropout",
    nn.Dropout2d: "dropout2d",
    nn.ELU: "elu",
    nn.Flatten: None,
    nn.GELU: "gelu",
    nn.GroupNorm: "group_norm",
    nn.Hardsigmoid: "hardsigmoid",
    nn.Hardswish: "hardswish",
    nn.Hardtanh: "hardtanh",
    nn.Identity: None,
    nn.LayerNorm: "layer_norm",
    nn.LeakyReLU: "leaky_relu",
    nn.Linear: "linear",
    nn.MaxPool2d: "max_pool2d",
    nn.Mish: "mish",
    nn.PixelShuffle: "pixel_shuffle",
    nn.PixelUnshuffle: "pixel_unshuffle",
    nn.PReLU: "prelu",
    nn.ReLU: "relu",
    nn.ReLU6: "relu6",
    nn.Sigmoid: None,
    nn.SiLU: "silu",
    nn.Softmax: "softmax",
    nn.Softplus: "softplus",
    nn.Tanh: None,
    nn.Upsample: "interpolate",
}
_functions = operator.itemgetter(*filter(None, _FUNCTIONS.values()))


def functions_behind() -> tuple[Any, ...]:
    """The functions by which torch's own modules compute, to be compared by identity with what they were."""
    return _functions(F.__dict__)


def computing(module: nn.Module) -> tuple[Flow, ...]:
    """The flows by which a call of ``module`` with one map computes in its present mode, none for a module of torch's; raises Unsupported
    where it is not known to do nothing but that."""
    unhooked(module)
    own = has_own_code(module) or module.__dict__.get("_compiled_call_impl") is not None
    if own or not call_is_plain(module):
        raise Unsupported(f"the call of its {type(module).__name__} is overridden")
    if class_of(module) in _FUNCTIONS:
        plain(module, class_of(module))
        return ()
    if isinstance(module, norm_types()) and not module.training:
        norm(module, "none")
        return ()
    flow = follow(module, ONE_MAP, module.training)
    flow.check(module)
    if flow.stored or flow.asks:
        raise Unsupported(f"its {type(module).__name__} does more than compute")
    inner = [computing(module.get_submodule(node.target)) for node in flow.nodes if _is_called(node)]
    return (flow, *(found for flows in inner for found in flows))


def _is_called(node: Node) -> bool:
    """Whether a module is called; raises Unsupported where that is with more than one map, and of what is no computation."""
    if node.op in ("get", "set") or node.grad is not None:
        raise Unsupported("its forward does more than compute")
    if node.op == "module" and (len(node.args) != 1 or node.kwargs or not isinstance(node.args[0], Node)):
        raise Unsupported(f"its {node.target} is called with more than one map")
    return node.op == "module"
