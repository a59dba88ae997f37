"""BatchNorm, activation, mean pool and, for a transition, its 1x1 convolution.

    transition (Huang et al. 2016): conv(act(BN(x))) then a 2x2 mean. A 1x1 convolution and a mean commute, so the mean comes first:
    a quarter of the FLOPs, and the convolution's full-size output never exists.
    head: the mean is global and nothing follows.

Kept for backward: x (the dense buffer, which the block keeps anyway) and C-sized vectors. The pooled map is read off x again in backward:
one more read of x there, against keeping a quarter of a map.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..backends.eager import Pool
from .common import (
    Conv,
    Norm,
    as_map,
    channel_empty,
    coefficients,
    conv_tensors,
    count,
    double_backward,
    gradient_of,
    map_bias_gradient,
    new_stats,
    norm_backward,
    norm_tensors,
    reduction,
    reference_conv,
    reference_norm,
    replays,
)


@dataclass(frozen=True)
class NormPool:
    """``conv(pool(act(norm(x))))``; ``pool`` is a mean, ``conv`` a 1x1 of stride 1 or None."""

    norm: Norm
    pool: Pool
    conv: Conv | None

    @functools.cached_property
    def tensors(self) -> list[Tensor | None]:
        """The differentiable tensors: BatchNorm weight and bias, convolution weight and bias."""
        return [*norm_tensors(self.norm), *((None, None) if self.conv is None else conv_tensors(self.conv))]


def run(backend, block: NormPool, x: Tensor, stats: Tensor | None = None) -> Tensor:
    """The block's output for the map ``x``; ``stats`` are x's statistics where its writer has reduced them already."""
    x = as_map(x)  # out here, so that what the Function keeps is its input, which double backward differentiates
    tensors = block.tensors
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, *tensors)):
        return NormPoolFunction.apply(backend, block, stats, x, *tensors)
    return _forward(backend, block, x, stats)[0]


def _forward(backend, block: NormPool, x: Tensor, stats: Tensor | None):
    if block.norm.training and stats is None:
        stats = new_stats(backend, block.norm, x.shape[1], x)
        backend.statistics(x, stats)
    affine, saved = coefficients(backend, block.norm, stats, x)
    y, _ = backend.pool_forward(x, affine, block.norm.act, block.pool)
    if block.conv is not None:
        y = backend.conv_forward(y, None, "none", block.conv.weight, block.conv.bias, block.conv.geometry)
    return y, affine, saved


class NormPoolFunction(torch.autograd.Function):
    """``apply(backend, block, stats, x, *block.tensors) -> y``; x is a map."""

    @staticmethod
    def forward(ctx, backend, block, stats, x, *tensors):
        y, affine, saved = _forward(backend, block, x, stats)
        ctx.backend, ctx.block = backend, block
        ctx.save_for_backward(x, affine, saved, *tensors)
        return y

    @staticmethod
    def backward(ctx, grad):
        backend, block, need = ctx.backend, ctx.block, ctx.needs_input_grad[3:]
        x, affine, saved, *tensors = ctx.saved_tensors
        if replays(grad):
            return None, None, None, *double_backward(backend, lambda *t: reference(block, *t), (x, *tensors), grad)
        gamma, beta, weight, bias = tensors
        grad = as_map(grad)
        dweight = dbias = None
        dpooled = grad
        if block.conv is not None:
            pooled, _ = backend.pool_forward(x, affine, block.norm.act, block.pool)
            below = any(need[:3])
            if need[4]:
                dbias = map_bias_gradient(grad, bias)
            dpooled, dweight = backend.conv_backward(
                grad,
                None,
                None,
                pooled,
                None,
                None,
                "none",
                weight,
                block.conv.geometry,
                need_dx=below,
                need_dw=need[3],
            )
        dx = dgamma = dbeta = None
        if any(need[:3]):
            sums, coeff = reduction(backend, block.norm, x.shape[1], x), channel_empty(3, x.shape[1], x)
            args = (dpooled, None, x, affine, saved, block.norm.act, block.pool)
            backend.pool_backward(*args, sums=sums)
            norm_backward(backend, block.norm, sums, count(x), gamma, saved, coeff)
            dgamma, dbeta = gradient_of(sums, 1, gamma, need[1]), gradient_of(sums, 0, beta, need[2])
            if need[0]:
                dx = backend.pool_backward(*args, coeff=coeff)
        return None, None, None, dx, dgamma, dbeta, dweight, dbias


def reference(block: NormPool, x: Tensor, gamma, beta, weight, bias) -> Tensor:
    """The definition, in plain PyTorch, in the order in which DenseNet writes it; running statistics untouched."""
    h = reference_norm(x, block.norm, gamma, beta)
    if block.conv is not None:
        h = reference_conv(h, block.conv, weight, bias)
    return F.avg_pool2d(h, block.pool.kernel, block.pool.stride)
