"""The C-sized arithmetic of BatchNorm: one launch each, a few C float32 values read and written, nothing of a map's
size.

``coefficients_kernel`` turns (mean, M2) or running statistics into affine and saved, and updates the running
statistics; ``gradient_kernel`` turns the two sums of backward into the pending form (p, q, r) of the gradient.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .helpers import launch, vector, vectors

BLOCK_C = 256


@triton.jit
def coefficients_kernel(
    mean, m2, weight, bias, running_mean, running_var, scale, shift, saved_mean, saved_invstd,
    C, count, unbiased_count, momentum, eps, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """From the (mean, M2), updating the running statistics if given; without mean from the running statistics."""
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = c < C
    if mean is None:
        center = vector(running_mean, c, inside, 0.0)
        variance = vector(running_var, c, inside, 0.0)
    else:
        center = vector(mean, c, inside, 0.0)
        spread = vector(m2, c, inside, 0.0)
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


@triton.jit
def gradient_kernel(
    sum_dz, sum_dz_xhat, weight, mean, invstd, p, q, r, C, count,
    TRAINING: tl.constexpr, ACCUMULATE: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """p = gamma * invstd, q = -p * invstd * mean(dz * xhat), r = -p * mean(dz) - q * mean."""
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = c < C
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
        own = -gain * rstd * vector(sum_dz_xhat, c, inside, 0.0) / count
        slope += own
        constant -= gain * vector(sum_dz, c, inside, 0.0) / count + own * vector(mean, c, inside, 0.0)
    tl.store(q + c, slope, mask=inside)
    tl.store(r + c, constant, mask=inside)


def bn_coefficients(
    stats: Tensor,
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
    mean, m2 = vectors(stats)
    scale, shift = affine.unbind(0)
    saved_mean, saved_invstd = saved.unbind(0)
    launch(
        coefficients_kernel, (triton.cdiv(channels, BLOCK_C),), like.device,
        mean=mean, m2=m2, weight=weight, bias=bias, running_mean=running_mean, running_var=running_var, scale=scale,
        shift=shift, saved_mean=saved_mean, saved_invstd=saved_invstd, C=channels, count=float(count),
        unbiased_count=float(max(count - 1, 1)), momentum=float(momentum), eps=float(eps), BLOCK_C=BLOCK_C, num_warps=4,
    )  # fmt: skip
    return affine, saved


def bn_backward(
    sums: Tensor,
    count: int,
    weight: Tensor | None,
    saved: Tensor,
    training: bool,
    coeff: Tensor,
    accumulate: bool = False,
) -> None:
    """``coeff`` (p, q, r) from ``sums``; with ``accumulate`` q and r are added to and p is left alone."""
    channels = coeff.shape[1]
    sum_dz, sum_dz_xhat = sums.unbind(0)
    mean, invstd = saved.unbind(0)
    p, q, r = coeff.unbind(0)
    launch(
        gradient_kernel, (triton.cdiv(channels, BLOCK_C),), coeff.device,
        sum_dz=sum_dz, sum_dz_xhat=sum_dz_xhat, weight=weight, mean=mean, invstd=invstd, p=p, q=q, r=r, C=channels,
        count=float(count), TRAINING=training, ACCUMULATE=accumulate, BLOCK_C=BLOCK_C, num_warps=4,
    )  # fmt: skip
