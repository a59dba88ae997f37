"""From ops to descriptions: the last step, in which modules become tensors and numbers."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from .. import activations
from ..autograd.dense import Dense, Layer
from ..autograd.residual import Residual, Shortcut
from ..autograd.transition import Transition
from ..errors import Unsupported
from ..specs import Pool, Unit
from . import families
from .graph import BlockGraph, check_graph
from .modules import (
    CONVOLUTIONS,
    activation,
    child_of,
    class_of,
    conv,
    hooked,
    next_step,
    norm,
    norm_types,
    plain,
    pool,
    unhooked,
)
from .ops import Op, ops
from .part import Part
from .pieces import module_of, norm_of

Dtype = torch.dtype | None

# ---- rows of modules -----------------------------------------------------------------------------------------------------


def _stem(children: Sequence[nn.Module | None], dtype: Dtype) -> tuple[Residual, list[nn.Module]]:
    convolution, batch_norm, act, pooling = children
    if convolution is None or batch_norm is None:
        raise Unsupported("a stem without its convolution or its BatchNorm")
    unit = Unit(conv(convolution, dtype), norm(batch_norm, activation(act)))
    no_pool = pooling is None or class_of(pooling) is nn.Identity and not hooked(pooling)
    return Residual((unit,), pool=None if no_pool or pooling is None else pool(pooling)), [batch_norm]


def stem_part(children: Sequence[nn.Module | None]) -> Part:
    """Convolution, BatchNorm, activation or None, max pool or None."""
    return Part(functools.partial(_stem, tuple(children)))


def conv_runs(children: Sequence[nn.Module]) -> list[tuple[int, int]]:
    """Where (start, stop) conv-BN[-act][-max pool] stands in a row of modules."""
    runs, i, norms = [], 0, norm_types()
    while i < len(children) - 1:
        if isinstance(children[i], nn.Conv2d) and isinstance(children[i + 1], norms):
            stop = i + 2
            if stop < len(children) and activations.of_module(children[stop]) is not None:
                stop += 1
            if stop < len(children) and isinstance(children[stop], nn.MaxPool2d):
                stop += 1
            runs.append((i, stop))
            i = stop
        else:
            i += 1
    return runs


def run_part(run: Sequence[nn.Module]) -> Part:
    """A stretch that :func:`conv_runs` has found."""
    convolution, batch_norm, *rest = run
    act = next((c for c in rest if not isinstance(c, nn.MaxPool2d)), None)
    pooling = next((c for c in rest if isinstance(c, nn.MaxPool2d)), None)
    return stem_part((convolution, batch_norm, act, pooling))


def norm_part(batch_norm: nn.Module) -> Part:
    """Nothing but a BatchNorm; hooks on it are not in the way, being its caller's to fire."""
    return Part(lambda dtype: (Residual((), next_step(batch_norm, "none")), [batch_norm]))


def _highway(block: Any, dtype: Dtype) -> tuple[Residual, list[nn.Module]]:
    found: list[Any] = [child_of(block, name) for name in ("conv1", "bn1", "relu", "gate", "sigmoid")]
    conv1, bn1, relu, gate_conv, sigmoid = found
    # a gate without a BatchNorm has None there, which is no child
    gate_bn: Any = None if "gate_bn" in block.__dict__ else child_of(block, "gate_bn")
    plain(sigmoid, nn.Sigmoid)
    norms = [module for module in (bn1, gate_bn) if module is not None]
    gate = Unit(conv(gate_conv, dtype), None if gate_bn is None else norm(gate_bn, "none"))
    act = activation(relu)
    if act not in ("none", "relu"):
        name = type(relu).__name__
        raise Unsupported(f"a highway's candidate is fused with ReLU or nothing behind it, found {name}")
    candidate = Unit(conv(conv1, dtype), norm(bn1, act))
    return Residual((candidate,), shortcut=Shortcut(unit=gate, gated=True)), norms


def highway_part(block: nn.Module) -> Part:
    """A highway block, by the names of its children."""
    return Part(functools.partial(_highway, block))


# ---- dense blocks --------------------------------------------------------------------------------------------------------


def dense_layer(layer: nn.Module, graph: BlockGraph | None = None) -> list[Op]:
    """What a dense layer does to what it reads: by its graph, or by the names of its children. Raises Unsupported."""
    unhooked(layer)
    if graph is not None:
        check_graph(layer, graph)
        return ops(layer, graph.main)
    names = families.in_dense_layer(layer)
    if names is None:
        raise Unsupported(f"a {type(layer).__name__} among its layers")
    found = ops(layer, names)
    drop_rate: Any = layer.drop_rate
    if layer.training and drop_rate > 0:
        drop = functools.partial(nn.functional.dropout, p=drop_rate, training=True)
        found.append(Op("other", (drop,)))
    return found


def in_buffer(found: Sequence[Op]) -> bool:
    """Whether a dense layer can write straight into the buffer: norm-act-conv, with or without norm-act-conv behind it."""
    return [op.kind for op in found] in (["norm", "conv"], ["norm", "conv", "norm", "conv"])


def _layer(found: Sequence[Op], dtype: Dtype) -> Layer:
    read: list[Any] = []
    for op in found:
        module = module_of(op)
        read.append(norm(module, op.value) if op.kind == "norm" else conv(module, dtype, *CONVOLUTIONS))
    return Layer(*read)


def _dense(layers: Sequence[Sequence[Op]], dtype: Dtype) -> tuple[Dense, list[nn.Module]]:
    norms = [module_of(op) for found in layers for op in found if op.kind == "norm"]
    if len(set(map(id, norms))) < len(norms):
        raise Unsupported("a BatchNorm that stands twice among its layers")
    return Dense(tuple(_layer(found, dtype) for found in layers)), norms


def dense_part(layers: Sequence[Sequence[Op]]) -> Part:
    """A dense block all of whose layers :func:`in_buffer` says yes to."""
    return Part(functools.partial(_dense, tuple(map(tuple, layers))))


def is_transition(found: Sequence[Op]) -> bool:
    """Whether a row is a DenseNet's transition: norm, act, conv (1x1), pool (mean)."""
    return [op.kind for op in found] == ["norm", "conv", "pool"] and module_of(found[1]).kernel_size == (1, 1)


def _transition(block: nn.Module, graph: BlockGraph, dtype: Dtype) -> tuple[Transition, list[nn.Module]]:
    check_graph(block, graph)
    found = ops(block, graph.main)
    if not is_transition(found):
        raise Unsupported("a transition that is not a BatchNorm, a 1x1 convolution and a mean pool")
    convolution, window = conv(module_of(found[1]), dtype), found[2].value
    plain(module_of(found[2]), nn.AvgPool2d)
    if convolution.geometry.stride != (1, 1) or convolution.geometry.padding != (0, 0) or window.ceil:
        raise Unsupported("a transition that is not a 1x1 convolution and a mean pool")
    norms: list[nn.Module] = []
    return Transition(norm_of(found[0], norms), window, convolution), norms


def transition_part(block: nn.Module, graph: BlockGraph | None = None) -> Part:
    """A transition: by its graph, or its children in a row."""
    row = BlockGraph(tuple(block._modules)) if graph is None else graph
    return Part(functools.partial(_transition, block, row))


def last_norm(features: nn.Module) -> nn.Module:
    """The BatchNorm that ends the features of a DenseNet; raises Unsupported."""
    children = list(features.children())
    if not children:
        raise Unsupported("its features are empty")
    plain(children[-1], *norm_types())
    unhooked(features)
    return children[-1]


def head_part(batch_norm: nn.Module, size: tuple[int, ...]) -> Part:
    """BatchNorm, ReLU and the mean over ``size``."""
    window = Pool("mean", size, size, (0,) * len(size))
    return Part(lambda dtype: (Transition(norm(batch_norm, "relu"), window, None), [batch_norm]))
