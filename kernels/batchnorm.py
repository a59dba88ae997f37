"""The C-sized arithmetic of BatchNorm: one launch each, a few C float32 values read and written, nothing of a map's
size.

``coefficients_kernel`` turns (mean, M2) or running statistics into scale and shift, mean and invstd, and updates the
running statistics; ``gradient_kernel`` turns the two sums of backward into the pending form (p, q, r) of the gradient. Where
the moments or sums are a :class:`~fusedres.kernels.reduce.Reduction`, both merge them from the partials (2 * tiles * C
float32 read) instead of reading them from a launch of its own.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .device import vector
from .launch import SIZES, launch
from .layout import vectors
from .operands import Norm
from .reduce import Reduction, merge_blocks, merge_warps, merged_moments, merged_sum
from .tiles import cdiv

BLOCK_C = 256


@triton.jit(do_not_specialize=SIZES)
def coefficients_kernel(
    mean, m2, partials, tiles, stride, tile_rows, rows, weight, bias, running_mean, running_var, scale, shift,
    out_mean, out_invstd, C, count, unbiased_count, momentum, eps, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """From the (mean, M2) or their partials, updating the running statistics if given; without both from the running
    statistics."""
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = c < C
    if mean is None and partials is None:
        center = vector(running_mean, c, inside, 0.0)
        variance = vector(running_var, c, inside, 0.0)
    else:
        if partials is None:
            center = vector(mean, c, inside, 0.0)
            spread = vector(m2, c, inside, 0.0)
        else:
            center, spread = merged_moments(partials, stride, C, c, inside, 0, tiles, tile_rows, rows, BLOCK_T, BLOCK_C)
        variance = spread / count
        if running_mean is not None:
            blend(running_mean, c, inside, center, momentum)
            blend(running_var, c, inside, spread / unbiased_count, momentum)
    invstd = tl.rsqrt(variance + eps)
    gain = invstd * vector(weight, c, inside, 1.0)
    tl.store(scale + c, gain, mask=inside)
    tl.store(shift + c, vector(bias, c, inside, 0.0) - center * gain, mask=inside)
    tl.store(out_mean + c, center, mask=inside)
    tl.store(out_invstd + c, invstd, mask=inside)


@triton.jit
def blend(running, c, inside, value, momentum):
    """``running`` moved towards ``value`` by the factor ``momentum``; exact at factors 0 and 1, as torch.lerp."""
    old = vector(running, c, inside, 0.0)
    value = value.to(running.dtype.element_ty).to(tl.float32)
    new = tl.where(momentum < 0.5, old + momentum * (value - old), value - (value - old) * (1.0 - momentum))
    tl.store(running + c, new.to(running.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=SIZES)
def gradient_kernel(
    sums, sums_stride, partials, tiles, stride, rounded, weight, mean, invstd, p, q, r, C, count,
    TRAINING: tl.constexpr, ACCUMULATE: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """p = gamma * invstd, q = -p * invstd * mean(dz * xhat), r = -p * mean(dz) - q * mean. With partials the sums are
    merged from them and written, ``rounded`` too, in its dtype."""
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = c < C
    if partials is None:
        sum_dz = vector(sums, c, inside, 0.0)
        sum_dz_xhat = vector(sums + sums_stride, c, inside, 0.0)
    else:
        sum_dz = merged_sum(partials, C, c, inside, 0, tiles, BLOCK_T, BLOCK_C)
        sum_dz_xhat = merged_sum(partials + stride, C, c, inside, 0, tiles, BLOCK_T, BLOCK_C)
        tl.store(sums + c, sum_dz, mask=inside)
        tl.store(sums + sums_stride + c, sum_dz_xhat, mask=inside)
        if rounded is not None:
            tl.store(rounded + c, sum_dz.to(rounded.dtype.element_ty), mask=inside)
            tl.store(rounded + C + c, sum_dz_xhat.to(rounded.dtype.element_ty), mask=inside)
    rstd = vector(invstd, c, inside, 0.0)
    gain = rstd * vector(weight, c, inside, 1.0)
    slope = tl.zeros((BLOCK_C,), tl.float32)
    constant = tl.zeros((BLOCK_C,), tl.float32)
    if ACCUMULATE:
        slope = vector(q, c, inside, 0.0)
        constant = vector(r, c, inside, 0.0)
    else:
        tl.store(p + c, gain, mask=inside)
    if TRAINING:
        own = -gain * rstd * sum_dz_xhat / count
        slope += own
        constant -= gain * sum_dz / count + own * vector(mean, c, inside, 0.0)
    tl.store(q + c, slope, mask=inside)
    tl.store(r + c, constant, mask=inside)


def bn_coefficients(norm: Norm, stats: Tensor | Reduction, count: int) -> tuple[Tensor, Tensor]:
    """``(scale_shift, mean_invstd)`` from ``stats``; updates the running statistics in place where there are any."""
    merging = _Merging(stats, stats.shape[-1])
    mean, m2 = (None, None) if merging.partials is not None else vectors(stats)
    return _coefficients(norm, merging, mean, m2, count, stats.shape[-1], stats.device)


def bn_frozen(norm: Norm) -> tuple[Tensor, Tensor]:
    """``(scale_shift, mean_invstd)`` from the running statistics, in float32: no map served here asks for another dtype.
    ValueError where there are none."""
    if norm.running_mean is None or norm.running_var is None:
        raise ValueError("a BatchNorm without running statistics is no frozen one")
    channels, device = norm.running_mean.shape[0], norm.running_mean.device
    return _coefficients(norm, _Merging(None, channels), None, None, 1, channels, device)


def _coefficients(
    norm: Norm,
    merging: _Merging,
    mean: Tensor | None,
    m2: Tensor | None,
    count: int,
    channels: int,
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    scale_shift, mean_invstd = torch.empty(2, 2, channels, dtype=torch.float32, device=device).unbind(0)
    scale, shift = scale_shift.unbind(0)
    out_mean, out_invstd = mean_invstd.unbind(0)
    launch(
        coefficients_kernel, (cdiv(channels, merging.block_c),), device,
        mean=mean, m2=m2, partials=merging.partials, tiles=merging.tiles, stride=merging.stride,
        tile_rows=merging.tile_rows, rows=merging.rows, weight=norm.weight, bias=norm.bias,
        running_mean=norm.running_mean, running_var=norm.running_var, scale=scale, shift=shift, out_mean=out_mean,
        out_invstd=out_invstd, C=channels, count=float(count), unbiased_count=float(max(count - 1, 1)),
        momentum=float(norm.momentum), eps=float(norm.eps), BLOCK_T=merging.block_t, BLOCK_C=merging.block_c,
        num_warps=merging.warps,
    )  # fmt: skip
    return scale_shift, mean_invstd


class _Merging:
    """How a C-sized kernel merges what it reads, where that is left to it; else only the block of channels."""

    def __init__(self, reduced: Tensor | Reduction | None, channels: int) -> None:
        self.partials: Tensor | None = None
        self.tiles = self.stride = self.tile_rows = self.rows = 0
        self.block_t, self.block_c, self.warps = 1, BLOCK_C, 4
        if isinstance(reduced, Reduction):
            self.partials, self.tile_rows, self.rows = reduced.partials, reduced.tile_rows, reduced.rows
            self.tiles, self.stride = self.partials.shape[1], self.partials.stride(0)
            self.block_t, self.block_c = merge_blocks(self.tiles, channels)
            self.warps = merge_warps(self.block_t, self.block_c)


def bn_backward(
    norm: Norm,
    sums: Tensor | Reduction,
    count: int,
    mean_invstd: Tensor,
    coeff: Tensor,
    accumulate: bool = False,
) -> None:
    """``coeff`` (p, q, r) from ``sums``; with ``accumulate`` q and r are added to and p is left alone."""
    channels, weight = coeff.shape[1], norm.weight
    merging, values, rounded = _Merging(sums, channels), sums, None
    if isinstance(sums, Reduction):
        values = sums.values[torch.float32] = torch.empty(2, channels, dtype=torch.float32, device=coeff.device)
        if weight is not None and weight.dtype != torch.float32:
            rounded = sums.values[weight.dtype] = torch.empty_like(values, dtype=weight.dtype)
    mean, invstd = mean_invstd.unbind(0)
    p, q, r = coeff.unbind(0)
    launch(
        gradient_kernel, (cdiv(channels, merging.block_c),), coeff.device,
        sums=values, sums_stride=values.stride(0), partials=merging.partials, tiles=merging.tiles,
        stride=merging.stride, rounded=rounded, weight=weight, mean=mean, invstd=invstd, p=p, q=q, r=r, C=channels,
        count=float(count), TRAINING=norm.training, ACCUMULATE=accumulate, BLOCK_T=merging.block_t,
        BLOCK_C=merging.block_c, num_warps=merging.warps,
    )  # fmt: skip
