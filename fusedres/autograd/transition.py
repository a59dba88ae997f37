"""BatchNorm, activation, mean pool and, for a transition, its 1x1 convolution.

    transition (Huang et al. 2016, arXiv 1608.06993): conv(act(BN(x))) then a 2x2 mean. A 1x1 convolution and a mean commute, so the mean
    comes first: a quarter of the FLOPs, and the convolution's full-size output never exists.
    head: the mean is global and nothing follows.

Kept for backward: x (the dense buffer, which the block keeps anyway) and C-sized vectors. The pooled map is read off x again in backward:
one more read of x there, against keeping a quarter of a map.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..backends.contract import Backend
from ..backends.layout import as_map, channel_empty, row_count
from ..checks import check_conv, check_map, check_norm
from ..errors import Unsupported
from ..operands import FRESH, LazyGrad, LazyMap
from ..specs import BlockSpec, Conv, Forward, Norm, Pool, Shape
from .steps import (
    bias_grad,
    gradients,
    kept_map,
    needs_autograd,
    new_reduction,
    norm_backward,
    norm_grads,
    normalize_input,
    record,
    replay,
    replays,
)


@dataclass(frozen=True)
class Transition(BlockSpec):
    """``conv(pool(act(norm(x))))``; ``pool`` is a mean, ``conv`` a 1x1 of stride 1 or None."""

    norm: Norm
    pool: Pool
    conv: Conv | None

    @functools.cached_property
    def tensors(self) -> list[Tensor | None]:
        """The differentiable tensors: BatchNorm weight and bias, convolution weight and bias."""
        conv = (None, None) if self.conv is None else (self.conv.weight, self.conv.bias)
        return [self.norm.weight, self.norm.bias, *conv]

    def out_shape(self, shape: Shape) -> Shape:
        pooled = self.pool.out_shape(shape)
        return pooled if self.conv is None else self.conv.out_shape(pooled)

    def check(self, x: Tensor, source: Tensor | None = None) -> None:
        check_map(x, x.dtype if self.conv is None else self.conv.weight.dtype, self)
        check_norm(self.norm, tuple(x.shape), x)
        pooled = self.pool.out_shape(tuple(x.shape))
        if min(pooled[2:]) < 1:
            raise Unsupported("a pooling window larger than its input")
        if self.conv is not None:
            check_conv(self.conv, pooled, x)

    def run(
        self,
        backend: Backend,
        x: Tensor,
        source: Tensor | None = None,
        *,
        stats: Tensor | None = None,
        out: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        if needs_autograd(x, *self.tensors):
            # out here, so that what the Function keeps is its input, which double backward differentiates
            x = kept_map(x, self.norm.weight, self.norm.bias)
            return TransitionFunction.apply(backend, self, stats, x, *self.tensors), None
        x = as_map(x)
        (y,) = backend.run_schedule(
            self.memo, "run", (x, stats), self.operands, lambda: (self.forward(backend, x, stats)[0],)
        )
        assert y is not None
        return y, None

    def forward(self, backend: Backend, x: Tensor, stats: Tensor | None) -> tuple[Tensor, LazyMap]:
        """``(y, x behind its BatchNorm)``."""
        lazy = normalize_input(backend, self.norm, x, stats)
        y, _ = backend.pool_forward(lazy, self.pool)
        if self.conv is not None:
            y = backend.conv_forward(LazyMap(y), self.conv.weight, self.conv.bias, self.conv.geometry)
        return y, lazy

    def record(
        self, backend: Backend, x: Tensor, source: Tensor | None, stats: Tensor | None, out: Tensor | None = None
    ) -> Forward:
        y, lazy = self.forward(backend, x, stats)
        return Forward(y, None, [lazy.scale_shift, lazy.mean_invstd])

    def gradients(
        self,
        backend: Backend,
        grad: Tensor,
        held: Tensor,
        source: Tensor | None,
        kept: Sequence[Tensor | None],
        tensors: Sequence[Tensor | None],
        need: Sequence[bool],
    ) -> tuple[Tensor | None, ...]:
        need_x, _, need_norm_weight, need_norm_bias, need_weight, need_bias = need
        below = need_x or need_norm_weight or need_norm_bias
        norm_weight, _, weight, bias = tensors
        scale_shift, mean_invstd = kept
        lazy = LazyMap(held, scale_shift, self.norm.act, mean_invstd)
        pooled_grad: Tensor | None = grad
        dweight = dbias = dx = None
        if self.conv is not None and weight is not None:
            pooled, _ = backend.pool_forward(lazy, self.pool)
            if need_bias and bias is not None:
                dbias = bias_grad(grad, bias)
            pooled_grad, dweight = backend.conv_backward(
                LazyGrad(grad), LazyMap(pooled), weight, self.conv.geometry, FRESH if below else None, need_weight
            )
        dnorm: tuple[Tensor | None, Tensor | None] = None, None
        if below:
            assert pooled_grad is not None and mean_invstd is not None
            channels = held.shape[1]
            sums, coeff = new_reduction(backend, self.norm, channels, held), channel_empty(3, channels, held)
            backend.pool_backward(pooled_grad, None, lazy, self.pool, sums=sums)
            norm_backward(backend, self.norm, norm_weight, sums, row_count(held), mean_invstd, coeff)
            dnorm = norm_grads(backend, self.norm, sums, need_norm_weight, need_norm_bias)
            if need_x:
                dx = backend.pool_backward(pooled_grad, None, lazy, self.pool, coeff=coeff)
        return dx, None, *dnorm, dweight, dbias

    def reference(self, x: Tensor, source: Tensor | None, *tensors: Tensor | None) -> Tensor:
        """In the order in which DenseNet writes it."""
        norm_weight, norm_bias, weight, bias = tensors
        h = self.norm.reference(x, norm_weight, norm_bias)
        if self.conv is not None and weight is not None:
            h = self.conv.reference(h, weight, bias)
        return F.avg_pool2d(h, self.pool.kernel, self.pool.stride)


class TransitionFunction(torch.autograd.Function):
    """``apply(backend, spec, stats, x, *spec.tensors) -> y``; x is a map."""

    @staticmethod
    def forward(
        ctx: Any, backend: Backend, spec: Transition, stats: Tensor | None, x: Tensor, *tensors: Tensor | None
    ) -> Tensor:
        y, _, kept = record(spec, backend, x, None, stats)
        ctx.backend, ctx.spec = backend, spec
        ctx.save_for_backward(x, *kept, *tensors)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        spec = ctx.spec
        x, scale_shift, mean_invstd, *tensors = ctx.saved_tensors
        if replays(grad):
            inputs = (x, *tensors)
            return None, None, None, *replay(lambda x, *t: spec.reference(x, None, *t), inputs, grad)
        need_x, *need = ctx.needs_input_grad[3:]
        dx, _, *grads = gradients(
            spec, ctx.backend, grad, x, None, (scale_shift, mean_invstd), tensors, (need_x, False, *need)
        )
        return None, None, None, dx, *grads
