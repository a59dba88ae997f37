"""Concatenation without ``torch.cat``: producers write into their slices of one buffer.

A branch that ends in a fused residual block or row is told where its slice lies, and its last pass writes there. What any other branch
gives is copied in, once. The branches keep their own autograd nodes; one more (:class:`JoinedFunction`) stands for the buffer, and its
backward is no work: it hands every branch its slice of the gradient, which the fused backwards read where it lies.

For the buffer to be there before its producers run, their shapes must be known: :func:`fusedres.blocks.sequential.out_shape` tells that
of a fused block, of the common modules, and of any module with a method ``out_shape(shape)``. A branch of which nobody can tell runs first.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .backends.layout import as_map, empty_map
from .blocks.base import autocast_dtype, take
from .blocks.handover import Handover, is_direct
from .blocks.sequential import in_a_row, out_shape
from .recognition import hooked
from .specs import Shape


@dataclass(frozen=True)
class Branch:
    """A producer: ``out_shape(shape of what it reads)`` (None where that cannot be told), and ``run(x, place)``, which returns its output:
    ``place`` itself where it could write there, which it need not."""

    out_shape: Callable[[Shape], Shape | None]
    run: Callable[[Tensor, Tensor | None], Tensor]


def branch_of(module: nn.Module, shared: bool) -> Branch:
    """A module as a producer; ``shared``: others than the buffer read its output."""
    return Branch(functools.partial(out_shape, module), functools.partial(call_into, module, shared=shared))


def _is_row(module: nn.Module) -> bool:
    return isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward


def call_into(module: nn.Module, x: Tensor, place: Tensor | None, shared: bool) -> Tensor:
    """``module(x)``, written into ``place`` where the module can; hooks fire. Where its output is not ``shared`` it may be what the module
    keeps: it is copied into the buffer and given to nobody else."""
    if _is_row(module) and len(module) and not hooked(module):  # type: ignore[arg-type]
        *before, last = module  # type: ignore[misc]
        return call_into(last, in_a_row(x, before), place, shared)
    if not is_direct(module):
        return module(x)
    y = take(module, Handover(x), place)
    return y.leave() if shared and y.x is not place else y.x


def is_traced(inputs: Sequence[Tensor]) -> bool:
    """Whether a compiler traces the call, or tensors of another kind do: they are to see :func:`plain`."""
    tracing = torch.compiler.is_compiling() or torch.jit.is_tracing() or torch.jit.is_scripting()
    return tracing or any(type(x) not in (Tensor, nn.Parameter) for x in inputs)


def plain(
    inputs: Sequence[Tensor], branches: Sequence[Callable[[Tensor], Tensor]], reads: Sequence[int | None]
) -> Tensor:
    """The definition: every branch's output, concatenated."""
    found: list[Tensor] = []
    for i, branch in enumerate(branches):
        read = reads[i]
        found.append(branch(inputs[i % len(inputs)] if read is None else found[read]))
    return torch.cat(found, 1)


def run(inputs: Sequence[Tensor], branches: Sequence[Branch], reads: Sequence[int | None]) -> Tensor:
    """The outputs of ``branches`` side by side, in one channels_last buffer. Branch i reads the output of branch ``reads[i]``, or its
    input where that is None: the only one of ``inputs``, or the i-th.

    Raises ValueError where sizes do not agree.
    """
    found: dict[int, Tensor] = {}

    def produce(i: int, place: Tensor | None = None) -> Tensor:
        if i not in found:
            read = reads[i]
            x = inputs[i % len(inputs)] if read is None else produce(read)
            found[i] = branches[i].run(x, place)
        return found[i]

    shapes: list[Shape] = []
    for i, branch in enumerate(branches):
        read = reads[i]
        shape = branch.out_shape(tuple(inputs[i % len(inputs)].shape) if read is None else shapes[read])
        shapes.append(tuple(produce(i).shape) if shape is None else tuple(shape))
    _check(shapes)
    like = inputs[0]
    dtype = autocast_dtype(like) or like.dtype
    buffer, places = _allocate(shapes, dtype, like)
    for i, place in enumerate(places):
        if tuple(produce(i, place).shape) != shapes[i]:
            raise ValueError(f"Concat: branch {i} gives {tuple(found[i].shape)}, where its out_shape said {shapes[i]}")
    outputs = [found[i] for i in range(len(branches))]
    common = functools.reduce(torch.promote_types, (y.dtype for y in outputs))
    if common != dtype:
        buffer, places = _allocate(shapes, common, like)
    with torch.no_grad():
        for y, place in zip(outputs, places, strict=True):
            if y is not place:
                place.copy_(y)
    if torch.is_grad_enabled() and any(y.requires_grad for y in outputs):
        return JoinedFunction.apply((buffer,), any(read is not None for read in reads), *outputs)
    return buffer


def _check(shapes: list[Shape]) -> None:
    first = shapes[0]
    for i, shape in enumerate(shapes):
        if len(shape) < 3 or (shape[0], shape[2:]) != (first[0], first[2:]):
            raise ValueError(
                f"Concat: branch {i} gives {shape}, branch 0 gives {first}; maps side by side agree in all sizes but their channels"
            )


def _allocate(shapes: list[Shape], dtype: torch.dtype, like: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The buffer, and the slices of it. They are no views to autograd: each is the output of another node."""
    first, widths = shapes[0], [shape[1] for shape in shapes]
    buffer = empty_map((first[0], sum(widths), *first[2:]), like, dtype)
    return buffer, [piece.data for piece in buffer.split(widths, 1)]


class JoinedFunction(torch.autograd.Function):
    """``apply((buffer,), shared, *outputs) -> buffer``, into which the ``outputs`` have been written. ``shared``: a branch reads another's
    slice, and may keep it for backward; autograd then has to notice if somebody changes the buffer in the meantime."""

    @staticmethod
    def forward(ctx: Any, held: tuple[Tensor], shared: bool, *outputs: Tensor) -> Tensor:
        (buffer,) = held
        ctx.widths, ctx.dtypes = [y.shape[1] for y in outputs], [y.dtype for y in outputs]
        if shared:
            ctx.save_for_backward(buffer)
        return buffer

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        _ = ctx.saved_tensors  # raises where the buffer has been changed
        pieces = as_map(grad).split(ctx.widths, 1)
        need = ctx.needs_input_grad[2:]
        grads = [g.to(dtype) if n else None for g, dtype, n in zip(pieces, ctx.dtypes, need, strict=True)]
        return None, None, *grads
