"""The residual chain: conv-BN-act units in a row, with or without a shortcut around them, with or without a max pool behind them.

    raw_i = conv_i(a_{i-1}),  a_i = act_i(BN_i(raw_i)),  a_0 = x
    y     = act(BN_n(raw_n) + shortcut),  shortcut = x | BN_d(conv_d(x)) | nothing

One schedule for the basic block (2 units), the bottleneck (3), the plain conv-BN-act (1) and the stem (1 and a pool). He et al. 2015
(arXiv 1512.03385), figures 2 and 5. Kept for backward: x, every raw, and C-sized vectors; the join's mask is rebuilt from its operands,
so that y is not kept. With ``recompute`` the raws of 1x1 convolutions are not kept either: backward runs those convolutions again, from
what is kept, without statistics.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..backends.eager import Pool
from .common import (
    Unit,
    as_map,
    bias_gradient,
    channel_empty,
    coefficients,
    conv_tensors,
    count,
    double_backward,
    frozen,
    gradient_of,
    new_stats,
    norm_tensors,
    reference_conv,
    reference_norm,
)


@dataclass(frozen=True)
class Chain:
    """A residual chain. ``projection`` and ``identity`` exclude each other; ``pool`` (max) excludes both and wants one unit.

    ``act`` is the activation of the join; the last unit's own is then ``"none"``. Without a shortcut the last unit's activation is the
    chain's and ``act`` is ``"none"``.
    """

    units: tuple[Unit, ...]
    identity: bool = False
    projection: Unit | None = None
    act: str = "none"
    pool: Pool | None = None
    recompute: bool = False

    @property
    def all_units(self) -> tuple[Unit, ...]:
        """The units of the main path, then the projection."""
        return self.units if self.projection is None else (*self.units, self.projection)

    def cheap(self, i: int) -> bool:
        """Whether backward recomputes the raw of unit ``i``."""
        return self.recompute and all(size == 1 for size in self.all_units[i].conv.weight.shape[2:])

    def tensors(self) -> list[Tensor | None]:
        """The differentiable tensors, four per unit: convolution weight and bias, BatchNorm weight and bias."""
        return [t for u in self.all_units for t in (*conv_tensors(u.conv), *norm_tensors(u.norm))]


def run(backend, chain: Chain, x: Tensor) -> Tensor:
    """``y`` of the chain for the map ``x``; differentiable where gradients are asked for."""
    x = as_map(x)  # out here, so that what the Function keeps is its input, which double backward differentiates
    tensors = chain.tensors()
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, *tensors)):
        return ChainFunction.apply(backend, chain, x, *tensors)
    if any(u.norm.training for u in chain.all_units):
        return _forward(backend, chain, x)[0]
    return infer(backend, chain, x)


def infer(backend, chain: Chain, x: Tensor) -> Tensor:
    """The chain by running statistics: each convolution with its affine, activation and join in one epilogue."""
    residual, residual_affine = (x if chain.identity else None), None
    if chain.projection is not None:
        conv = chain.projection.conv
        residual = backend.conv_forward(x, None, "none", conv.weight, conv.bias, conv.geometry)
        residual_affine = frozen(backend, chain.projection.norm, residual)[0]
    h = x
    for unit in chain.units:
        last = unit is chain.units[-1] and residual is not None
        conv, norm = unit.conv, unit.norm
        h = backend.conv_forward(
            h, None, "none", conv.weight, conv.bias, conv.geometry,
            out_affine=frozen(backend, norm, x)[0],
            residual=residual if last else None,
            residual_affine=residual_affine if last else None,
            out_act=chain.act if last else norm.act,
        )  # fmt: skip
    return h if chain.pool is None else backend.pool_forward(h, None, "none", chain.pool)[0]


def _conv_bn(backend, unit: Unit, x: Tensor, affine: Tensor | None, act: str) -> tuple[Tensor, Tensor, Tensor]:
    conv = unit.conv
    stats = new_stats(unit.norm, conv.weight.shape[0], x)
    raw = backend.conv_forward(x, affine, act, conv.weight, conv.bias, conv.geometry, stats=stats)
    return raw, *coefficients(backend, unit.norm, stats, raw)


def _forward(backend, chain: Chain, x: Tensor):
    """``(y, index of the pool, raws, affines, saveds)``, one entry per unit, the projection's last."""
    raws, affines, saveds = [], [], []
    h, affine, act = x, None, "none"
    for unit in chain.units:
        h, affine, saved = _conv_bn(backend, unit, h, affine, act)
        act = unit.norm.act
        raws.append(h), affines.append(affine), saveds.append(saved)
    residual, residual_affine = (x if chain.identity else None), None
    if chain.projection is not None:
        residual, residual_affine, saved = _conv_bn(backend, chain.projection, x, None, "none")
        raws.append(residual), affines.append(residual_affine), saveds.append(saved)
    if chain.pool is not None:
        y, index = backend.pool_forward(h, affine, act, chain.pool)
    else:
        joined = chain.act if residual is not None else act
        y, index = backend.join_forward(h, affine, residual, residual_affine, joined), None
    return y, index, raws, affines, saveds


class ChainFunction(torch.autograd.Function):
    """``apply(backend, chain, x, *chain.tensors()) -> y``; x is a map."""

    @staticmethod
    def forward(ctx, backend, chain, x, *tensors):
        y, index, raws, affines, saveds = _forward(backend, chain, x)
        ctx.backend, ctx.chain = backend, chain
        kept = [None if chain.cheap(i) else raw for i, raw in enumerate(raws)]
        ctx.save_for_backward(x, index, *kept, *affines, *saveds, *tensors)
        return y

    @staticmethod
    def backward(ctx, grad):
        backend, chain, need = ctx.backend, ctx.chain, ctx.needs_input_grad[2:]
        n, total = len(chain.units), len(chain.all_units)
        x, index, *rest = ctx.saved_tensors
        raws, affines, saveds, tensors = (
            rest[:total],
            rest[total : 2 * total],
            rest[2 * total : 3 * total],
            rest[3 * total :],
        )
        if torch.is_grad_enabled():
            return None, None, *double_backward(backend, lambda *t: reference(chain, *t), (x, *tensors), grad)

        grads: list[Tensor | None] = [None] * len(tensors)
        sums = [channel_empty(2, affine.shape[1], x) for affine in affines]
        coeffs = [channel_empty(3, affine.shape[1], x) for affine in affines]

        def operand(i: int) -> tuple[Tensor, Tensor | None, Tensor | None, str]:
            """What unit i reads: a map with its affine, saved and activation."""
            if i == 0 or i == n:
                return x, None, None, "none"
            return raw(i - 1), affines[i - 1], saveds[i - 1], chain.units[i - 1].norm.act

        def raw(i: int) -> Tensor:
            """The raw output of unit i, recomputed on its first use where it was not kept."""
            if raws[i] is None:
                source, affine, _, act = operand(i)
                geometry = chain.all_units[i].conv.geometry
                raws[i] = backend.conv_forward(source, affine, act, tensors[4 * i], tensors[4 * i + 1], geometry)
            return raws[i]

        def finish_norm(i: int) -> None:
            """From the sums of unit i: the pending form of its raw's gradient, and its C-sized gradients."""
            unit, rows = chain.all_units[i], count(raw(i))
            backend.bn_backward(sums[i], rows, unit.norm.weight, saveds[i], unit.norm.training, coeffs[i])
            at, wanted = 4 * i, need[1 + 4 * i : 5 + 4 * i]
            grads[at + 1] = bias_gradient(sums[i], coeffs[i], saveds[i], rows, unit.conv, wanted[1])
            grads[at + 2] = gradient_of(sums[i][1], unit.norm.weight, wanted[2])
            grads[at + 3] = gradient_of(sums[i][0], unit.norm.bias, wanted[3])

        def backward_conv(i: int, g: Tensor, pending: bool, need_dx: bool, **target) -> Tensor | None:
            """The input gradient of unit i from the gradient behind its BatchNorm, and its weight's."""
            source, affine, saved, act = operand(i)
            own_raw = raw(i) if pending and chain.all_units[i].norm.training else None
            dx, grads[4 * i] = backend.conv_backward(
                g, own_raw, coeffs[i] if pending else None, source, affine, saved, act, tensors[4 * i],
                chain.all_units[i].conv.geometry, need_dx=need_dx, need_dw=need[1 + 4 * i], **target,
            )  # fmt: skip
            raws[i] = None  # its last use: freed here, not at the end
            return dx

        grad = as_map(grad)
        last, projected = n - 1, chain.projection is not None
        if chain.pool is not None:
            args = (grad, index, raw(last), affines[last], saveds[last], chain.units[last].norm.act, chain.pool)
            backend.pool_backward(*args, sums=sums[last])
            finish_norm(last)
            dz, pending = backend.pool_backward(*args, coeff=coeffs[last]), False
        else:
            joined = chain.identity or projected
            dz, pending = backend.join_backward(
                grad, raw(last), affines[last], saveds[last], chain.act if joined else chain.units[last].norm.act,
                sums=sums[last],
                residual=raw(n) if projected else x if chain.identity else None,
                residual_affine=affines[n] if projected else None,
                residual_saved=saveds[n] if projected else None,
                residual_sums=sums[n] if projected else None,
            ), True  # fmt: skip
            finish_norm(last)

        dx = None
        if projected:
            finish_norm(n)
            if need[0] or need[1 + 4 * n]:
                dx = backward_conv(n, dz, True, need[0])
        elif chain.identity:
            dx = dz

        g = dz
        for i in range(last, 0, -1):
            below = any(need[: 1 + 4 * i])
            if below or need[1 + 4 * i]:
                g = backward_conv(i, g, pending, below, sums=sums[i - 1] if below else None)
            if not below:
                return None, None, None, *grads
            finish_norm(i - 1)
            pending = True
        if need[0] or need[1]:
            # add to the shortcut's gradient: in place where it is ours and nobody reads it any more
            ours = dx is not None and dx is not grad and dx is not g
            target = {"dx": dx, "accumulate": True} if ours else {"base": dx}
            dx = backward_conv(0, g, pending, need[0], **target)
        return None, None, dx if need[0] else None, *grads


def reference(chain: Chain, x: Tensor, *tensors: Tensor | None) -> Tensor:
    """The definition, in plain PyTorch, for the tensors of :meth:`Chain.tensors`; running statistics untouched."""

    def unit(i: int, h: Tensor) -> Tensor:
        weight, bias, gamma, beta = tensors[4 * i : 4 * i + 4]
        u = chain.all_units[i]
        return reference_norm(reference_conv(h, u.conv, weight, bias), u.norm, gamma, beta)

    h = x
    for i in range(len(chain.units)):
        h = unit(i, h)
    if chain.identity or chain.projection is not None:
        h = h + (x if chain.identity else unit(len(chain.units), x))
        h = F.relu(h) if chain.act == "relu" else h
    return h if chain.pool is None else F.max_pool2d(h, chain.pool.kernel, chain.pool.stride, chain.pool.padding)
