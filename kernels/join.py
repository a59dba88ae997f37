"""Passes over maps, row by row: the residual join, its backward, and what is a special case of them.

forward   reads raw (and residual), writes out = act(affine(raw) + affine(residual)): rows * C values each, once. With
          statistics also [2, programs, C] float32 partials. ``grad_affine`` is this pass with the gradient as raw;
          ``statistics`` is it without out.
backward  reads grad, raw (and residual, base), writes out = base + scale * dz with dz the gradient under the
          activation's mask. With sums also [2 or 3, programs, C] float32 partials. ``dgrad_epilogue`` is this pass
          after a vendor's input gradient.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..activations import parse
from .helpers import (
    SIZES,
    activate,
    add_row,
    affine,
    align,
    aligned,
    block,
    empty_map,
    gradient,
    is_wide,
    launch,
    moments_of_rows,
    offsets,
    pitch_or_zero,
    rows_of,
    store_partial,
    vector,
    vectors,
)
from .reduce import merge


@dataclass(frozen=True)
class PassConfig:
    """A program walks ``chunk`` rows of ``BLOCK_C`` channels in tiles of ``BLOCK_M`` rows."""

    BLOCK_M: int
    BLOCK_C: int
    chunk: int
    num_warps: int = 4


def pass_config(rows: int, channels: int, tile: int = 2048) -> PassConfig:
    """Tiles of ``tile`` values (16 a thread: two 128-bit loads a map in 16-bit storage), whole cache lines of channels,
    and rows per program such that thousands of programs are left: enough for any GPU, few enough that partials stay
    below a hundredth of the traffic.
    """
    block_c = block(channels, 8, 128)
    block_m = block(rows, 1, tile // block_c)
    tiles = triton.cdiv(rows, block_m) * triton.cdiv(channels, block_c)
    return PassConfig(block_m, block_c, block_m * max(1, min(32, tiles // 4096)))


@triton.jit(do_not_specialize=SIZES)
def join_forward_kernel(
    raw, raw_pitch, scale, shift, residual, residual_pitch, residual_scale, residual_shift, out, out_pitch, partials,
    rows, C, chunk, ACT: tl.constexpr, ALIGN: tl.constexpr, WIDE: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Program (i, j): the i-th chunk of rows, the j-th block of channels."""
    C = aligned(C, ALIGN)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = c < C
    scales, shifts = vector(scale, c, inside, 1.0), vector(shift, c, inside, 0.0)
    residual_scales, residual_shifts = vector(residual_scale, c, inside, 1.0), vector(residual_shift, c, inside, 0.0)
    first = tl.program_id(0) * chunk
    last = tl.minimum(first + chunk, rows)
    mean = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    m2 = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    step = 0.0
    for start in range(first, last, BLOCK_M):
        m = start + tl.arange(0, BLOCK_M)
        mask = (m < last)[:, None] & inside[None, :]
        z = affine(tl.load(raw + offsets(m, raw_pitch, c, ALIGN, WIDE), mask=mask, other=0.0), scales, shifts)
        if residual is not None:
            other = tl.load(residual + offsets(m, residual_pitch, c, ALIGN, WIDE), mask=mask, other=0.0)
            z += affine(other, residual_scales, residual_shifts)
        # statistics are those of what is stored, so that they normalise exactly what the next reader loads
        stored = activate(z, ACT).to(raw.dtype.element_ty)
        if out is not None:
            tl.store(out + offsets(m, out_pitch, c, ALIGN, WIDE), stored, mask=mask)
        if partials is not None:
            new_mean, new_m2 = add_row(mean, m2, stored.to(tl.float32), step)
            mean, m2 = tl.where(mask, new_mean, mean), tl.where(mask, new_m2, m2)
            step += 1.0
    if partials is not None:
        count = tl.cdiv(tl.maximum(last - first - tl.arange(0, BLOCK_M), 0), BLOCK_M).to(tl.float32)
        _, mean_c, m2_c = moments_of_rows(count, mean, m2)
        store_partial(partials, 0, tl.program_id(0), tl.num_programs(0), c, C, mean_c)
        store_partial(partials, 1, tl.program_id(0), tl.num_programs(0), c, C, m2_c)


@triton.jit(do_not_specialize=SIZES)
def join_backward_kernel(
    grad, grad_pitch, raw, raw_pitch, scale, shift, mean, invstd,
    residual, residual_pitch, residual_scale, residual_shift, residual_mean, residual_invstd,
    base, base_pitch, out, out_pitch, partials,
    rows, C, chunk, ACT: tl.constexpr, SCALED: tl.constexpr, ALIGN: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Program (i, j): the i-th chunk of rows, the j-th block of channels. Partials: sum dz,
    sum dz * xhat of raw where it has a mean, and of residual where that has one."""
    C = aligned(C, ALIGN)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = c < C
    scales, shifts = vector(scale, c, inside, 1.0), vector(shift, c, inside, 0.0)
    residual_scales, residual_shifts = vector(residual_scale, c, inside, 1.0), vector(residual_shift, c, inside, 0.0)
    means, invstds = vector(mean, c, inside, 0.0), vector(invstd, c, inside, 0.0)
    residual_means, residual_invstds = vector(residual_mean, c, inside, 0.0), vector(residual_invstd, c, inside, 0.0)
    first = tl.program_id(0) * chunk
    last = tl.minimum(first + chunk, rows)
    sum_dz = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    sum_xhat = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    sum_residual = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    for start in range(first, last, BLOCK_M):
        m = start + tl.arange(0, BLOCK_M)
        mask = (m < last)[:, None] & inside[None, :]
        dz = tl.load(grad + offsets(m, grad_pitch, c, ALIGN, WIDE), mask=mask, other=0.0).to(tl.float32)
        x = tl.load(raw + offsets(m, raw_pitch, c, ALIGN, WIDE), mask=mask, other=0.0).to(tl.float32)
        z = affine(x, scales, shifts)
        if residual is not None:
            other = tl.load(residual + offsets(m, residual_pitch, c, ALIGN, WIDE), mask=mask, other=0.0).to(tl.float32)
            z += affine(other, residual_scales, residual_shifts)
        dz = gradient(dz, z, ACT)
        if partials is not None:
            sum_dz += dz
            if mean is not None:
                sum_xhat += dz * ((x - means[None, :]) * invstds[None, :])
            if residual_mean is not None:
                sum_residual += dz * ((other - residual_means[None, :]) * residual_invstds[None, :])
        if out is not None:
            if SCALED:
                dz = dz * scales[None, :]
            if base is not None:
                dz += tl.load(base + offsets(m, base_pitch, c, ALIGN, WIDE), mask=mask, other=0.0).to(tl.float32)
            tl.store(out + offsets(m, out_pitch, c, ALIGN, WIDE), dz.to(out.dtype.element_ty), mask=mask)
    if partials is not None:
        part, parts = tl.program_id(0), tl.num_programs(0)
        store_partial(partials, 0, part, parts, c, C, tl.sum(sum_dz, 0))
        if mean is not None:
            store_partial(partials, 1, part, parts, c, C, tl.sum(sum_xhat, 0))
            if residual_mean is not None:
                store_partial(partials, 2, part, parts, c, C, tl.sum(sum_residual, 0))
        elif residual_mean is not None:
            store_partial(partials, 1, part, parts, c, C, tl.sum(sum_residual, 0))


def _forward(raw, scale, shift, residual, residual_scale, residual_shift, act, out, stats) -> None:
    rows, channels = rows_of(raw), raw.shape[1]
    config = pass_config(rows, channels)
    programs = triton.cdiv(rows, config.chunk)
    partials = None
    if stats is not None:
        partials = torch.empty(2, programs, channels, dtype=torch.float32, device=raw.device)
    pitches = [pitch_or_zero(x) for x in (raw, residual, out)]
    launch(
        join_forward_kernel, (programs, triton.cdiv(channels, config.BLOCK_C)), raw.device,
        raw=raw, raw_pitch=pitches[0], scale=scale, shift=shift, residual=residual, residual_pitch=pitches[1],
        residual_scale=residual_scale, residual_shift=residual_shift, out=out, out_pitch=pitches[2], partials=partials,
        rows=rows, C=channels, chunk=config.chunk, ACT=parse(act), ALIGN=align(channels, *pitches),
        WIDE=is_wide(raw, residual, out), BLOCK_M=config.BLOCK_M, BLOCK_C=config.BLOCK_C, num_warps=config.num_warps,
    )  # fmt: skip
    if stats is not None:
        merge(partials, stats, config.chunk, rows)


def _backward(
    grad, raw, affine, saved, act, *, residual=None, residual_affine=None, residual_saved=None, base=None, out=None,
    scaled=False, sums=None, residual_sums=None,
) -> None:  # fmt: skip
    rows, channels = rows_of(raw), raw.shape[1]
    config = pass_config(rows, channels)
    programs = triton.cdiv(rows, config.chunk)
    reduced = [s for s in (sums, residual_sums) if s is not None]
    partials = None
    if reduced:
        partials = torch.empty(1 + len(reduced), programs, channels, dtype=torch.float32, device=raw.device)
    scale, shift = vectors(affine)
    mean, invstd = vectors(None if sums is None else saved)
    residual_scale, residual_shift = vectors(residual_affine)
    residual_mean, residual_invstd = vectors(None if residual_sums is None else residual_saved)
    pitches = [pitch_or_zero(x) for x in (grad, raw, residual, base, out)]
    launch(
        join_backward_kernel, (programs, triton.cdiv(channels, config.BLOCK_C)), raw.device,
        grad=grad, grad_pitch=pitches[0], raw=raw, raw_pitch=pitches[1], scale=scale, shift=shift, mean=mean,
        invstd=invstd, residual=residual, residual_pitch=pitches[2], residual_scale=residual_scale,
        residual_shift=residual_shift, residual_mean=residual_mean, residual_invstd=residual_invstd, base=base,
        base_pitch=pitches[3], out=out, out_pitch=pitches[4], partials=partials, rows=rows, C=channels,
        chunk=config.chunk, ACT=parse(act), SCALED=scaled, ALIGN=align(channels, *pitches), WIDE=is_wide(grad, raw,
        residual, base, out), BLOCK_M=config.BLOCK_M, BLOCK_C=config.BLOCK_C, num_warps=config.num_warps,
    )  # fmt: skip
    for i, target in enumerate(reduced):
        # each pair is (sum dz, its own sum dz * xhat): the parts 0 and 1 + i
        merge(partials[:: 1 + i][:2], target)


def statistics(x: Tensor, stats: Tensor) -> None:
    """``stats`` (mean, M2) of the map ``x`` per channel."""
    _forward(x, None, None, None, None, None, "none", None, stats)


def join_forward(
    raw: Tensor,
    affine: Tensor | None,
    residual: Tensor | None,
    residual_affine: Tensor | None,
    act: str,
    *,
    out: Tensor | None = None,
    stats: Tensor | None = None,
) -> Tensor:
    """``out = act(affine(raw) + residual_affine(residual))``; ``stats`` are those of out."""
    out = empty_map(raw.shape, raw) if out is None else out
    _forward(raw, *vectors(affine), residual, *vectors(residual_affine), act, out, stats)
    return out


def grad_affine(grad: Tensor, raw: Tensor | None, coeff: Tensor, *, out: Tensor | None = None) -> Tensor:
    """``p * grad + q * raw + r``: a join whose residual is raw, scaled by q."""
    out = empty_map(grad.shape, grad) if out is None else out
    p, q, r = coeff.unbind(0)
    _forward(grad, p, r, raw, None if raw is None else q, None, "none", out, None)
    return out


def join_backward(
    grad: Tensor,
    raw: Tensor,
    affine: Tensor | None,
    saved: Tensor | None,
    act: str,
    *,
    sums: Tensor | None = None,
    residual: Tensor | None = None,
    residual_affine: Tensor | None = None,
    residual_saved: Tensor | None = None,
    residual_sums: Tensor | None = None,
) -> Tensor:
    """``dz`` of a join, and the sums that its BatchNorms need; ``grad`` itself without an activation."""
    out = grad if act == "none" else empty_map(raw.shape, raw)
    if out is not grad or sums is not None or residual_sums is not None:
        _backward(
            grad, raw, affine, saved, act, residual=residual, residual_affine=residual_affine,
            residual_saved=residual_saved, out=None if out is grad else out, sums=sums, residual_sums=residual_sums,
        )  # fmt: skip
    return out


def dgrad_epilogue(
    da: Tensor,
    x: Tensor,
    affine: Tensor | None,
    saved: Tensor | None,
    act: str,
    *,
    dx: Tensor | None = None,
    base: Tensor | None = None,
    accumulate: bool = False,
    scaled: bool = False,
    sums: Tensor | None = None,
) -> Tensor:
    """The pass after a vendor's input gradient ``da``, in whose place it writes where no ``dx`` is given."""
    dx = da if dx is None else dx
    _backward(da, x, affine, saved, act, base=dx if accumulate else base, out=dx, scaled=scaled, sums=sums)
    return dx
