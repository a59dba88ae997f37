"""Checks of a description's parts against the input of a call: whatever is wrong, the original modules run and raise it."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from . import activations
from .errors import Unsupported
from .specs import BlockSpec, Conv, Norm, Shape, Unit


def check_map(x: Tensor, dtype: torch.dtype, spec: BlockSpec, dims: int = 4) -> None:
    """Check that ``x`` is an ordinary N x C x H x W tensor of ``dtype``, or one of ``dims`` dimensions, and not empty unless other
    processes wait for ``spec``. Raises Unsupported."""
    if type(x) not in (Tensor, nn.Parameter):
        raise Unsupported(f"its input is a {type(x).__name__}")
    if x.dim() != dims or x.numel() == 0 and (min(x.shape[1:]) == 0 or not spec.exchanges):
        expected = "N x C x H x W" if dims == 4 else "N x C x D x H x W"
        raise Unsupported(f"its input has shape {tuple(x.shape)}, not a non-empty {expected}")
    if x.dtype != dtype:
        raise Unsupported(f"its input is {x.dtype}, its weights {dtype}")


def _check_ordinary(*tensors: Tensor | None) -> None:
    """Check that kernels can read weights: a subclass (a DTensor between two uses, a quantised weight) holds its values elsewhere."""
    for tensor in tensors:
        if tensor is not None and type(tensor) not in (Tensor, nn.Parameter):
            raise Unsupported(f"a weight is a {type(tensor).__name__}")


def check_conv(conv: Conv, shape: Shape, like: Tensor) -> Shape:
    """Check ``conv`` against its input of ``shape``; returns the shape of its output. Raises Unsupported."""
    _check_ordinary(conv.weight, conv.bias)
    if conv.weight.device != like.device or conv.weight.dtype != like.dtype:
        raise Unsupported(
            f"its input is {like.dtype} on {like.device}, a weight {conv.weight.dtype} on {conv.weight.device}"
        )
    expected = conv.weight.shape[1] * conv.geometry.groups
    if shape[1] != expected:
        raise Unsupported(f"a convolution expects {expected} channels and finds {shape[1]}")
    out = conv.out_shape(shape)
    if min(out[2:]) < 1:
        raise Unsupported("a kernel larger than its padded input")
    return out


def check_norm(norm: Norm, shape: Shape, like: Tensor) -> None:
    """Check ``norm`` against its input of ``shape``. Raises Unsupported; one value per channel in training, or an activation that is
    unknown, is a ValueError here, before any statistic is updated."""
    activations.parse(norm.act)
    _check_ordinary(norm.weight, norm.bias, norm.running_mean, norm.running_var)
    for tensor in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
        if tensor is None:
            continue
        if tensor.numel() != shape[1] or tensor.device != like.device:
            raise Unsupported(
                f"a BatchNorm of {tensor.numel()} channels on {tensor.device} meets {shape[1]} on {like.device}"
            )
        if tensor.dtype != like.dtype and (norm.promotes or tensor.dtype != torch.float32):
            raise Unsupported(f"a BatchNorm in {tensor.dtype} meets {like.dtype}")
    if norm.training and norm.group is None and shape[0] * math.prod(shape[2:]) == 1:
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {torch.Size(shape)}")


def check_unit(unit: Unit, shape: Shape, like: Tensor) -> Shape:
    """Check a unit against its input of ``shape``; returns the shape of its output. Raises as :func:`check_norm`."""
    shape = check_conv(unit.conv, shape, like)
    if unit.norm is not None:
        check_norm(unit.norm, shape, like)
    return shape
