"""The dense block in one preallocated buffer (Huang et al. 2016, arXiv 1608.06993), with bottlenecks or without.

    X_0 = x,  slice_l = conv2_l(act(BN2_l(conv1_l(act(BN1_l([X_0 .. slice_{l-1}])))))) | conv1_l(act(BN1_l([X_0 .. slice_{l-1}])))

Every layer writes its k channels into its slice: nothing is concatenated. A channel's statistics do not depend on who reads it, so they
are reduced once, where it is written. Backward, with dz_lc the gradient at the output of layer l's first BatchNorm and M rows:

    dX_c = G_c - A_c - xhat_c * B_c,  G_c = dY_c + sum_l gamma_lc * invstd_c * dz_lc        (one buffer, accumulated in place)
    A_c  = sum_l gamma_lc * invstd_c * mean(dz_lc),  B_c = sum_l gamma_lc * invstd_c * mean(dz_lc * xhat_c)

The correction (A, B) is a pending coeff of the slice's gradient, applied once, where the slice's gradient is consumed.

Memory, in maps of one channel (M values), for C_0 channels in, C_L out, and layers of bottlenecks of m_l channels, C_{L-1} what the last
layer reads. Kept for backward: the buffer and each bottleneck's raw output, once.

    forward    C_L + sum_l m_l                      kept; C_L + max_l m_l with ``recompute`` and without gradients
    backward   C_{L-1}                              the one gradient buffer
               + max(max_l m_l, C_0)                the gradient of a bottleneck's output, and of x once those are gone

With ``recompute`` the bottleneck outputs are not kept: backward runs the 1x1 convolutions again, from the buffer, without statistics, and
the peak is C_L + C_{L-1} + max(2 max_l m_l, C_0). The extension's float32 convolutions hold to this to the byte; those of the vendor's
library add their own maps.

In three dimensions the same (:mod:`fusedres.backends.volume`): all but the 3x3x3 convolutions sees rows, and those are the vendor's.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from ..backends.volume import for_maps
from .common import (
    Conv,
    Norm,
    as_map,
    bias_gradient,
    channel_empty,
    coefficients,
    conv_tensors,
    count,
    double_backward,
    empty_map,
    frozen,
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
class Layer:
    """norm1-act-conv1-norm2-act-conv2, or, without a bottleneck, norm1-act-conv1."""

    norm1: Norm
    conv1: Conv
    norm2: Norm | None = None
    conv2: Conv | None = None

    @property
    def growth(self) -> int:
        """Channels that the layer adds."""
        return (self.conv1 if self.conv2 is None else self.conv2).weight.shape[0]

    @functools.cached_property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """The differentiable tensors: norm1, conv1, norm2, conv2, weight and bias each."""
        first = (*norm_tensors(self.norm1), *conv_tensors(self.conv1))
        if self.conv2 is None:
            return (*first, None, None, None, None)
        return (*first, *norm_tensors(self.norm2), *conv_tensors(self.conv2))


PER_LAYER = 8


def run(backend, layers: tuple[Layer, ...], x: Tensor, recompute: bool = False) -> tuple[Tensor, Tensor | None]:
    """``(X, stats)``: the concatenation of x and every layer's output, and its per-channel statistics where a layer is in training."""
    backend = for_maps(backend, x.dim())
    tensors = [t for layer in layers for t in layer.tensors]
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, *tensors)):
        return DenseFunction.apply(backend, layers, recompute, x, *tensors)
    buffer, stats, _ = _forward(backend, layers, as_map(x), keep=False)
    return buffer, stats


def _forward(backend, layers: tuple[Layer, ...], x: Tensor, keep: bool, recompute: bool = False):
    """``(buffer, stats, kept)``; kept holds per layer the bottleneck's raw output (None with ``recompute``) and both (affine, saved),
    flat, if ``keep``."""
    first = x.shape[1]
    total = first + sum(layer.growth for layer in layers)
    buffer = empty_map((x.shape[0], total, *x.shape[2:]), x)
    stats = channel_empty(2, total, x) if any(layer.norm1.training for layer in layers) else None

    def stats_of(start: int, stop: int) -> Tensor | None:
        return None if stats is None else stats[:, start:stop]

    backend.join_forward(x, None, None, None, "none", out=buffer[:, :first], stats=stats_of(0, first))
    kept: list[Tensor] = []
    end = first
    for layer in layers:
        seen, out = buffer[:, :end], buffer[:, end : end + layer.growth]
        affine1, saved1 = coefficients(backend, layer.norm1, stats_of(0, end), seen)
        conv1, conv2, norm2 = layer.conv1, layer.conv2, layer.norm2
        if conv2 is None:
            backend.conv_forward(
                seen, affine1, layer.norm1.act, conv1.weight, conv1.bias, conv1.geometry,
                out=out, stats=stats_of(end, end + layer.growth),
            )  # fmt: skip
            if keep:
                kept += [None, affine1, saved1, None, None]
            end += layer.growth
            continue
        if keep or norm2.training:
            mid_stats = new_stats(backend, norm2, conv1.weight.shape[0], x)
            mid = backend.conv_forward(
                seen, affine1, layer.norm1.act, conv1.weight, conv1.bias, conv1.geometry, stats=mid_stats
            )
            affine2, saved2 = coefficients(backend, norm2, mid_stats, mid)
            pending = (affine2, norm2.act)
            if keep:
                kept += [None if recompute else mid, affine1, saved1, affine2, saved2]
        else:
            mid = backend.conv_forward(
                seen, affine1, layer.norm1.act, conv1.weight, conv1.bias, conv1.geometry,
                out_affine=frozen(backend, norm2, x)[0], out_act=norm2.act,
            )  # fmt: skip
            pending = (None, "none")
        backend.conv_forward(
            mid, *pending, conv2.weight, conv2.bias, conv2.geometry, out=out, stats=stats_of(end, end + layer.growth)
        )
        del mid  # before the next layer's comes to life
        end += layer.growth
    return buffer, stats, kept


class DenseFunction(torch.autograd.Function):
    """``apply(backend, layers, recompute, x, *tensors) -> (X, stats)``; stats is not differentiable."""

    @staticmethod
    def forward(ctx, backend, layers, recompute, x, *tensors):
        buffer, stats, kept = _forward(backend, layers, as_map(x), keep=True, recompute=recompute)
        ctx.backend, ctx.layers = backend, layers
        replayed = x if backend.name == "eager" else None  # only a replay needs x itself; the buffer holds its values
        ctx.save_for_backward(replayed, buffer, *kept, *tensors)
        ctx.set_materialize_grads(False)
        if stats is not None:
            ctx.mark_non_differentiable(stats)
        return buffer, stats

    @staticmethod
    def backward(ctx, grad, _):
        backend, layers, need = ctx.backend, ctx.layers, ctx.needs_input_grad[3:]
        if grad is None:
            return (None,) * (4 + PER_LAYER * len(layers))
        x, buffer, *rest = ctx.saved_tensors
        kept, tensors = rest[: 5 * len(layers)], rest[5 * len(layers) :]
        total = buffer.shape[1]
        first = total - sum(layer.growth for layer in layers)
        if replays(grad):
            return None, None, None, *double_backward(backend, lambda *t: reference(layers, *t), (x, *tensors), grad)

        grad = as_map(grad)
        rows = count(buffer)
        below = total - layers[-1].growth  # the last layer's own slice is read by nobody
        gathered = empty_map((buffer.shape[0], below, *buffer.shape[2:]), buffer)
        coeff = channel_empty(3, total, buffer)
        coeff[0].fill_(1.0)
        coeff[1:].zero_()
        grads: list[Tensor | None] = [None] * len(tensors)
        end = total
        for i in range(len(layers) - 1, -1, -1):
            layer, at = layers[i], PER_LAYER * i
            wanted = need[1 + at : 1 + at + PER_LAYER]
            mid, affine1, saved1, affine2, saved2 = kept[5 * i : 5 * i + 5]
            start = end - layer.growth
            topmost = end == total
            own = grad[:, start:end] if topmost else gathered[:, start:end]
            own_raw, own_coeff = (None, None) if topmost else (buffer[:, start:end], coeff[:, start:end])
            conv1 = layer.conv1
            if layer.conv2 is None:
                grad1, raw1, coeff1 = own, own_raw, own_coeff
                if wanted[3]:
                    grads[at + 3] = map_bias_gradient(own, tensors[at + 3], own_raw, own_coeff)
            else:
                if mid is None:
                    mid = backend.conv_forward(
                        buffer[:, :start], affine1, layer.norm1.act, tensors[at + 2], tensors[at + 3], conv1.geometry
                    )
                # conv2 <- norm2
                sums2 = reduction(backend, layer.norm2, mid.shape[1], mid)
                coeff1 = channel_empty(3, mid.shape[1], mid)
                if wanted[7]:
                    grads[at + 7] = map_bias_gradient(own, tensors[at + 7], own_raw, own_coeff)
                grad1, grads[at + 6] = backend.conv_backward(
                    own, own_raw, own_coeff, mid, affine2, saved2, layer.norm2.act, tensors[at + 6],
                    layer.conv2.geometry, need_dw=wanted[6], sums=sums2,
                )  # fmt: skip
                norm_backward(backend, layer.norm2, sums2, rows, tensors[at + 4], saved2, coeff1)
                grads[at + 4] = gradient_of(sums2, 1, tensors[at + 4], wanted[4])
                grads[at + 5] = gradient_of(sums2, 0, tensors[at + 5], wanted[5])
                raw1 = mid if layer.norm2.training else None
                if wanted[3] and layer.norm2.group is not None:
                    grads[at + 3] = map_bias_gradient(grad1, tensors[at + 3], raw1, coeff1)
                else:
                    grads[at + 3] = bias_gradient(sums2, coeff1, saved2, rows, conv1, wanted[3])
            # conv1 <- norm1, into the one gradient buffer
            sums1 = reduction(backend, layer.norm1, start, buffer)
            _, grads[at + 2] = backend.conv_backward(
                grad1, raw1, coeff1, buffer[:, :start], affine1, saved1, layer.norm1.act, tensors[at + 2],
                conv1.geometry, need_dw=wanted[2], sums=sums1, scaled=True, dx=gathered[:, :start],
                base=grad[:, :start] if topmost else None, accumulate=not topmost,
            )  # fmt: skip
            norm_backward(backend, layer.norm1, sums1, rows, tensors[at], saved1, coeff[:, :start], accumulate=True)
            grads[at] = gradient_of(sums1, 1, tensors[at], wanted[0])
            grads[at + 1] = gradient_of(sums1, 0, tensors[at + 1], wanted[1])
            del mid, grad1, raw1  # before the next layer's come to life
            end = start
        dx = backend.grad_affine(gathered[:, :first], buffer[:, :first], coeff[:, :first]) if need[0] else None
        return None, None, None, dx, *grads


def reference(layers: tuple[Layer, ...], x: Tensor, *tensors: Tensor | None) -> Tensor:
    """The definition, in plain PyTorch, for eight tensors per layer; running statistics untouched."""
    seen = x
    for i, layer in enumerate(layers):
        gamma1, beta1, weight1, bias1, gamma2, beta2, weight2, bias2 = tensors[PER_LAYER * i : PER_LAYER * (i + 1)]
        mid = reference_conv(reference_norm(seen, layer.norm1, gamma1, beta1), layer.conv1, weight1, bias1)
        if layer.conv2 is not None:
            mid = reference_conv(reference_norm(mid, layer.norm2, gamma2, beta2), layer.conv2, weight2, bias2)
        seen = torch.cat([seen, mid], 1)
    return seen
