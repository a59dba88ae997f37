"""A map on its way from one fused block to the next, and how it enters from and leaves for code that is not ours.

Inside a region of fused blocks that call each other directly maps are channels_last, a dense block's buffer is read where it lies, and
statistics that a map's writer has reduced go with it. Code that is not ours gets what eager would have given it: a map in eager's memory
format that is nobody else's, so that it may be overwritten.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from ..backends.layout import as_map
from ..recognition import global_hooks, hooked
from ..swap import FusedBlock, resume, runs_fused, state_of
from .calls import made

if TYPE_CHECKING:
    from .state import BlockState

_MODULE_CALL = nn.Module.__call__

#: how a map lies in memory: its dimensions from the outermost to the innermost; None where torch takes it for channels_last
Order = tuple[int, ...] | None


class Handover(NamedTuple):
    """``x``: the map. ``stats``: its ``[2, C]`` statistics, where its writer has reduced them. ``keeper``: the state of the block that
    keeps ``x`` itself for its backward. ``owes_nchw``: eager's map would be contiguous here, and this one is channels_last."""

    x: Tensor
    stats: Tensor | None = None
    keeper: BlockState | None = None
    owes_nchw: bool = False

    def leave(self) -> Tensor:
        """The map as code that is not ours may have it."""
        if self.keeper is not None:
            *before, last = self.keeper.records
            self.keeper.records = (*before, None if last is None else last._replace(copied=True))
        if self.owes_nchw:
            return made(torch.clone, self.x, memory_format=torch.contiguous_format)
        return self.x if self.keeper is None else made(torch.clone, self.x)


class _ToChannelsLast(torch.autograd.Function):
    """A map from outside in channels_last; its gradient leaves contiguous, as eager's would be."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return as_map(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.contiguous()


def enter(x: Tensor) -> Tensor:
    """A map from outside that is not channels_last, as one."""
    return _ToChannelsLast.apply(x) if x.requires_grad and torch.is_grad_enabled() else as_map(x)


def is_expanded(x: object) -> bool:
    """Whether ``x`` is a map with one value in the place of many along a dimension, so that in a sum the other map says how that lies."""
    return isinstance(x, Tensor) and any(
        [step == 0 and size > 1 for size, step in zip(x.shape, x.stride(), strict=True)]
    )


def mixes(read: list[Any]) -> bool:
    """Whether how a result lies follows from several maps that it is made of (handovers) at once, each of which has to lie as eager's."""
    # lists, which a compiler follows
    return any([value.owes_nchw for value in read]) and any([is_expanded(value.x) for value in read])


def suggests_channels_last(x: Tensor) -> bool:
    """Whether torch's convolutions take ``x``, a map or a weight, for channels_last and return their output so: its strides grow from the
    channels over the pixels to the batch; where sizes of 1 leave it open it is taken for contiguous."""
    shape, strides = x.shape, x.stride()
    if len(shape) == 4:
        n, c, h, w = shape
        if c > 1 and strides == (h * w * c, 1, w * c, c):  # what it is nearly always, and clear
            return True
    if strides[-1] < (strides[1] * shape[1] if shape[1] > 1 else strides[1]) or strides[1] == 0:
        return False
    least = 0
    for d in (1, *range(len(shape) - 1, 1, -1), 0):
        if strides[d] < least or d == 0 and least == strides[1]:
            return False
        least = strides[d] * max(shape[d], 1)
    return True


def contiguous(dims: int) -> Order:
    """The order of a contiguous map of so many dimensions."""
    return tuple(range(dims))


def order_of(x: Tensor) -> Order:
    """How the result of arithmetic on ``x``, a map from outside, would lie in memory: as ``x`` does, without gaps."""
    if suggests_channels_last(x):
        return None
    if x.is_contiguous():
        return contiguous(x.dim())
    strides = torch.empty_like(x, device="meta").stride()
    return tuple(sorted(range(x.dim()), key=lambda dim: (-strides[dim], dim)))


def in_order(x: Tensor, order: tuple[int, ...]) -> Tensor:
    """A copy of ``x`` that lies so in memory."""
    strides, step = [0] * x.dim(), 1
    for dim in reversed(order):
        strides[dim] = step
        step *= max(x.shape[dim], 1)
    return torch.empty_strided(x.shape, strides, dtype=x.dtype, device=x.device).copy_(x)


def arrive(given: Handover, x: Tensor) -> tuple[Tensor, Order]:
    """``x``, the map of ``given`` or a cast of it, in channels_last, and how eager's lies in memory."""
    order = order_of(x)
    if order is not None:
        x = made(enter, x)
    return x, contiguous(x.dim()) if given.owes_nchw else order


def calls_directly(cls: type) -> bool:
    """Whether what calls a module of ``cls`` comes to the fused forward, as far as classes go."""
    return runs_fused(cls) and is_called_as_module(cls)


def is_called_as_module(cls: type) -> bool:
    """Whether modules of ``cls`` are called as torch's are."""
    return cls.__call__ is _MODULE_CALL


def is_direct(module: nn.Module) -> bool:
    """Whether calling ``module`` is calling its fused forward and nothing else, so that a map may be handed over to it."""
    if not isinstance(resume(module), FusedBlock):
        return False
    own = module.__dict__
    return (
        calls_directly(type(module))
        and "forward" not in own
        and own.get("_compiled_call_impl") is None
        and not hooked(module)
        and not global_hooks()
        and state_of(module) is not None
    )
