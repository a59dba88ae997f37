"""Passes over maps, row by row: the residual addition with its activation, its backward, and what is a special case of them.

forward   reads raw (and residual), writes out = act(normalized raw + normalized residual): rows * C values each, once. With statistics
          also [2, programs, C] float32 partials. ``apply_grad_coeff`` is this pass with the gradient as raw; ``statistics`` is it
          without out.
backward  reads grad, raw (and residual, base), writes out = base + scale * dz with dz the gradient under the activation's mask. With
          sums also [2 or 3, programs, C] float32 partials. ``dgrad_epilogue`` is this pass after a library's input gradient.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .activations import activate, gradient
from .device import add_row, moments_of_rows, normalize, store_partial, vector
from .launch import SIZES, launch
from .layout import (
    align,
    aligned,
    check_scaled,
    empty_map,
    is_wide,
    offsets,
    pitch_or_zero,
    rows_of,
    vectors,
    xhat_vectors,
)
from .operands import Activation, GradTarget, LazyGrad, LazyMap, Normalized
from .reduce import Reduction, merge
from .tiles import cdiv, pass_config


@triton.jit(do_not_specialize=SIZES)
def add_act_forward_kernel(
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
        z = normalize(tl.load(raw + offsets(m, raw_pitch, c, ALIGN, WIDE), mask=mask, other=0.0), scales, shifts)
        if residual is not None:
            other = tl.load(residual + offsets(m, residual_pitch, c, ALIGN, WIDE), mask=mask, other=0.0)
            z += normalize(other, residual_scales, residual_shifts)
        if ACT is not None:
            z = activate(z, ACT)
        # statistics are those of what is stored, so that they normalise exactly what the next reader loads
        stored = z.to(raw.dtype.element_ty)
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
def add_act_backward_kernel(
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
        z = normalize(x, scales, shifts)
        if residual is not None:
            other = tl.load(residual + offsets(m, residual_pitch, c, ALIGN, WIDE), mask=mask, other=0.0).to(tl.float32)
            z += normalize(other, residual_scales, residual_shifts)
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


def _forward(
    raw: Tensor,
    scale_shift: tuple[Tensor | None, Tensor | None],
    residual: Tensor | None,
    residual_scale_shift: tuple[Tensor | None, Tensor | None],
    act: Activation | None,
    out: Tensor | None,
    stats: Tensor | Reduction | None,
) -> None:
    """One launch of the forward kernel, and the merge of its statistics; without ``act`` there is no activation."""
    rows, channels = rows_of(raw), raw.shape[1]
    config = pass_config(rows, channels)
    programs = cdiv(rows, config.chunk)
    partials = None
    if act is not None and act.kind == "none":
        act = None  # one kernel for both
    if stats is not None:
        partials = torch.empty(2, programs, channels, dtype=torch.float32, device=raw.device)
    pitches = [pitch_or_zero(x) for x in (raw, residual, out)]
    launch(
        add_act_forward_kernel, (programs, cdiv(channels, config.BLOCK_C)), raw.device,
        raw=raw, raw_pitch=pitches[0], scale=scale_shift[0], shift=scale_shift[1], residual=residual,
        residual_pitch=pitches[1], residual_scale=residual_scale_shift[0], residual_shift=residual_scale_shift[1],
        out=out, out_pitch=pitches[2], partials=partials, rows=rows, C=channels, chunk=config.chunk, ACT=act,
        ALIGN=align(channels, *pitches), WIDE=is_wide(raw, residual, out), BLOCK_M=config.BLOCK_M,
        BLOCK_C=config.BLOCK_C, num_warps=config.num_warps,
    )  # fmt: skip
    if stats is not None:
        merge(partials, stats, config.chunk, rows)


def _backward(
    grad: Tensor,
    x: Normalized,
    residual: Normalized | None,
    act: Activation,
    *,
    out: Tensor | None,
    base: Tensor | None = None,
    scaled: bool = False,
    sums: Tensor | Reduction | None = None,
    residual_sums: Tensor | Reduction | None = None,
) -> None:
    """One launch of the backward kernel under the activation ``act``, and the merge of its sums. ValueError where an operand lacks what
    these need."""
    raw, added = x.raw, None if residual is None else residual.raw
    rows, channels = rows_of(raw), raw.shape[1]
    config = pass_config(rows, channels)
    programs = cdiv(rows, config.chunk)
    reduced = [s for s in (sums, residual_sums) if s is not None]
    partials = None
    if reduced:
        partials = torch.empty(1 + len(reduced), programs, channels, dtype=torch.float32, device=raw.device)
    scale, shift = vectors(x.scale_shift)
    mean, invstd = xhat_vectors(x, sums)
    check_scaled(x, scaled)
    residual_scale, residual_shift = vectors(None if residual is None else residual.scale_shift)
    residual_mean = residual_invstd = None
    if residual is not None:
        residual_mean, residual_invstd = xhat_vectors(residual, residual_sums)
    elif residual_sums is not None:
        raise ValueError("residual_sums are asked for without a residual")
    pitches = [pitch_or_zero(t) for t in (grad, raw, added, base, out)]
    launch(
        add_act_backward_kernel, (programs, cdiv(channels, config.BLOCK_C)), raw.device,
        grad=grad, grad_pitch=pitches[0], raw=raw, raw_pitch=pitches[1], scale=scale, shift=shift, mean=mean,
        invstd=invstd, residual=added, residual_pitch=pitches[2], residual_scale=residual_scale,
        residual_shift=residual_shift, residual_mean=residual_mean, residual_invstd=residual_invstd, base=base,
        base_pitch=pitches[3], out=out, out_pitch=pitches[4], partials=partials, rows=rows, C=channels,
        chunk=config.chunk, ACT=act, SCALED=scaled, ALIGN=align(channels, *pitches), WIDE=is_wide(grad, raw, added,
        base, out), BLOCK_M=config.BLOCK_M, BLOCK_C=config.BLOCK_C, num_warps=config.num_warps,
    )  # fmt: skip
    for i, target in enumerate(reduced):
        # each pair is (sum dz, its own sum dz * xhat): the parts 0 and 1 + i
        merge(partials[:: 1 + i][:2], target)


def statistics(x: Tensor, stats: Tensor | Reduction) -> None:
    """``stats`` (mean, M2) of the map ``x`` per channel."""
    _forward(x, (None, None), None, (None, None), None, None, stats)


def add_act_forward(
    x: Normalized,
    residual: Normalized | None,
    act: Activation,
    *,
    out: Tensor | None = None,
    stats: Tensor | Reduction | None = None,
) -> Tensor:
    """``out = act(x + residual)``; ``stats`` are those of out. The operands' own activations are not applied."""
    out = empty_map(x.raw.shape, x.raw) if out is None else out
    added, scale_shift = (None, None) if residual is None else (residual.raw, residual.scale_shift)
    _forward(x.raw, vectors(x.scale_shift), added, vectors(scale_shift), act, out, stats)
    return out


def apply_grad_coeff(grad: LazyGrad, *, out: Tensor | None = None) -> Tensor:
    """``p * grad + q * raw + r``: an addition whose residual is raw, scaled by q. ValueError for a gradient without coefficients."""
    if grad.coeff is None:
        raise ValueError("there is no coeff to apply")
    out = empty_map(grad.grad.shape, grad.grad) if out is None else out
    p, q, r = grad.coeff.unbind(0)
    _forward(grad.grad, (p, r), grad.raw, (None if grad.raw is None else q, None), None, out, None)
    return out


def add_act_backward(
    grad: Tensor,
    x: Normalized,
    residual: Normalized | None,
    act: Activation,
    *,
    sums: Tensor | Reduction | None = None,
    residual_sums: Tensor | Reduction | None = None,
) -> Tensor:
    """``dz`` of ``act(x + residual)``, and the sums that its BatchNorms need; ``grad`` itself without an activation."""
    out = grad if act.kind == "none" else empty_map(x.raw.shape, x.raw)
    if out is not grad or sums is not None or residual_sums is not None:
        _backward(grad, x, residual, act, out=None if out is grad else out, sums=sums, residual_sums=residual_sums)
    return out


def dgrad_epilogue(da: Tensor, x: LazyMap, target: GradTarget) -> Tensor:
    """The pass after a library's input gradient ``da``, in whose place it writes where ``target`` has no dx."""
    dx = da if target.dx is None else target.dx
    base = dx if target.accumulate else target.base
    _backward(da, x, None, x.act, out=dx, base=base, scaled=target.scaled, sums=target.sums)
    return dx
