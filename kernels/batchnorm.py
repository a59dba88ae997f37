"""The C-sized arithmetic of BatchNorm: one launch each, a few C float32 values read and written, nothing of a map's
size.

``coefficients_kernel`` turns (mean, M2) or running statistics into affine and saved, and updates the running
statistics; ``gradient_kernel`` turns the two sums of backward into the pending form (p, q, r) of the gradient. Where
the moments or sums are a :class:`~fusedres.kernels.reduce.Reduction`, both merge them from the partials (2 * tiles * C
float32 read) instead of reading them from a launch of its own.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .helpers import SIZES, launch, vector, vectors
from .reduce import Reduction, merge_blocks, merge_warps, merged_moments, merged_sum

BLOCK_C = 256


@triton.jit(do_not_specialize=SIZES)
def coefficients_kernel(
    mean, m2, partials, tiles, stride, tile_rows, rows, weight, bias, running_mean, running_var, scale, shift,
    saved_mean, saved_invstd, C, count, unbiased_count, momentum, eps, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
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
    tl.store(saved_mean + c, center, mask=inside)
    tl.store(saved_invstd + c, invstd, mask=inside)


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


def bn_coefficients(
    stats: Tensor | Reduction,
    count: int,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    momentum: float,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """``(affine, saved)`` from ``stats``; updates the running statistics in place where they are given."""
    return _coefficients(stats, count, weight, bias, running_mean, running_var, momentum, eps, stats)


def bn_frozen(
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """``(affine, saved)`` from the running statistics. ``dtype`` is float32: no map served here asks for another."""
    return _coefficients(None, 1, weight, bias, running_mean, running_var, 0.0, eps, running_mean)


def _coefficients(stats, count, weight, bias, running_mean, running_var, momentum, eps, like) -> tuple[Tensor, Tensor]:
    channels = like.shape[-1]
    affine, saved = torch.empty(2, 2, channels, dtype=torch.float32, device=like.device).unbind(0)
    merging = _Merging(stats, channels)
    mean, m2 = vectors(None if merging.partials is not None else stats)
    scale, shift = affine.unbind(0)
    saved_mean, saved_invstd = saved.unbind(0)
    launch(
        coefficients_kernel, (triton.cdiv(channels, merging.block_c),), like.device,
        mean=mean, m2=m2, partials=merging.partials, tiles=merging.tiles, stride=merging.stride,
        tile_rows=merging.tile_rows, rows=merging.rows, weight=weight, bias=bias, running_mean=running_mean,
        running_var=running_var, scale=scale,
        shift=shift, saved_mean=saved_mean, saved_invstd=saved_invstd, C=channels, count=float(count),
        unbiased_count=float(max(count - 1, 1)), momentum=float(momentum), eps=float(eps),
        BLOCK_T=merging.block_t, BLOCK_C=merging.block_c, num_warps=merging.warps,
    )  # fmt: skip
    return affine, saved


class _Merging:
    """How a C-sized kernel merges what it reads, where that is left to it; else only the block of channels."""

    def __init__(self, reduced: Tensor | Reduction | None, channels: int) -> None:
        self.partials, self.tiles, self.stride, self.tile_rows, self.rows = None, 0, 0, 0, 0
        self.block_t, self.block_c, self.warps = 1, BLOCK_C, 4
        if isinstance(reduced, Reduction):
            self.partials, self.tile_rows, self.rows = reduced.partials, reduced.tile_rows, reduced.rows
            self.tiles, self.stride = self.partials.shape[1], self.partials.stride(0)
            self.block_t, self.block_c = merge_blocks(self.tiles, channels)
            self.warps = merge_warps(self.block_t, self.block_c)


def bn_backward(
    sums: Tensor | Reduction,
    count: int,
    weight: Tensor | None,
    saved: Tensor,
    training: bool,
    coeff: Tensor,
    accumulate: bool = False,
) -> None:
    """``coeff`` (p, q, r) from ``sums``; with ``accumulate`` q and r are added to and p is left alone."""
    channels = coeff.shape[1]
    merging, values, rounded = _Merging(sums, channels), sums, None
    if isinstance(sums, Reduction):
        values = sums.values[torch.float32] = torch.empty(2, channels, dtype=torch.float32, device=coeff.device)
        if weight is not None and weight.dtype != torch.float32:
            rounded = sums.values[weight.dtype] = torch.empty_like(values, dtype=weight.dtype)
    mean, invstd = saved.unbind(0)
    p, q, r = coeff.unbind(0)
    launch(
        gradient_kernel, (triton.cdiv(channels, merging.block_c),), coeff.device,
        sums=values, sums_stride=values.stride(0), partials=merging.partials, tiles=merging.tiles,
        stride=merging.stride, rounded=rounded, weight=weight, mean=mean, invstd=invstd, p=p, q=q, r=r, C=channels,
        count=float(count), TRAINING=training, ACCUMULATE=accumulate,
        BLOCK_T=merging.block_t, BLOCK_C=merging.block_c, num_warps=merging.warps,
    )  # fmt: skip
