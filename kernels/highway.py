"""The highway block's gated sum and its backward, row by row.

forward   reads raw, gate and carry, writes out = t * act(normalized raw) + (1 - t) * carry with t = sigmoid(normalized gate): four maps of
          rows * C values, each once.
backward  reads grad, raw, gate and carry, writes the gradients of the normalized raw, of the normalized gate and of carry: seven maps.
          With sums also [2, programs, C] float32 partials for each BatchNorm that asks for them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .activations import activate, gradient
from .device import normalize, store_partial, vector
from .launch import SIZES, launch
from .layout import align, aligned, empty_map, is_wide, offsets, pitch, rows_of, vectors, xhat_vectors
from .operands import LazyMap
from .reduce import Reduction, merge
from .tiles import cdiv, pass_config


@triton.jit(do_not_specialize=SIZES)
def highway_forward_kernel(
    raw, raw_pitch, scale, shift, gate, gate_pitch, gate_scale, gate_shift, carry, carry_pitch, out, out_pitch,
    rows, C, chunk, ACT: tl.constexpr, ALIGN: tl.constexpr, WIDE: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Program (i, j): the i-th chunk of rows, the j-th block of channels."""
    C = aligned(C, ALIGN)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = c < C
    scales, shifts = vector(scale, c, inside, 1.0), vector(shift, c, inside, 0.0)
    gate_scales, gate_shifts = vector(gate_scale, c, inside, 1.0), vector(gate_shift, c, inside, 0.0)
    first = tl.program_id(0) * chunk
    last = tl.minimum(first + chunk, rows)
    for start in range(first, last, BLOCK_M):
        m = start + tl.arange(0, BLOCK_M)
        mask = (m < last)[:, None] & inside[None, :]
        x = tl.load(raw + offsets(m, raw_pitch, c, ALIGN, WIDE), mask=mask, other=0.0)
        h = activate(normalize(x, scales, shifts), ACT)
        g = tl.load(gate + offsets(m, gate_pitch, c, ALIGN, WIDE), mask=mask, other=0.0)
        t = tl.sigmoid(normalize(g, gate_scales, gate_shifts))
        kept = tl.load(carry + offsets(m, carry_pitch, c, ALIGN, WIDE), mask=mask, other=0.0).to(tl.float32)
        y = t * h + (1.0 - t) * kept
        tl.store(out + offsets(m, out_pitch, c, ALIGN, WIDE), y.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=SIZES)
def highway_backward_kernel(
    grad, grad_pitch, raw, raw_pitch, scale, shift, mean, invstd,
    gate, gate_pitch, gate_scale, gate_shift, gate_mean, gate_invstd, carry, carry_pitch,
    dz, dz_pitch, dgate, dgate_pitch, dcarry, dcarry_pitch, partials, gate_partials,
    rows, C, chunk, ACT: tl.constexpr, ALIGN: tl.constexpr, WIDE: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Program (i, j): the i-th chunk of rows, the j-th block of channels. Partials: sum dz, sum dz * xhat of raw; those of the gate
    the same of dgate."""
    C = aligned(C, ALIGN)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = c < C
    scales, shifts = vector(scale, c, inside, 1.0), vector(shift, c, inside, 0.0)
    means, invstds = vector(mean, c, inside, 0.0), vector(invstd, c, inside, 0.0)
    gate_scales, gate_shifts = vector(gate_scale, c, inside, 1.0), vector(gate_shift, c, inside, 0.0)
    gate_means, gate_invstds = vector(gate_mean, c, inside, 0.0), vector(gate_invstd, c, inside, 0.0)
    first = tl.program_id(0) * chunk
    last = tl.minimum(first + chunk, rows)
    sum_dz = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    sum_xhat = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    sum_gate = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    sum_gate_xhat = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    for start in range(first, last, BLOCK_M):
        m = start + tl.arange(0, BLOCK_M)
        mask = (m < last)[:, None] & inside[None, :]
        dy = tl.load(grad + offsets(m, grad_pitch, c, ALIGN, WIDE), mask=mask, other=0.0).to(tl.float32)
        x = tl.load(raw + offsets(m, raw_pitch, c, ALIGN, WIDE), mask=mask, other=0.0).to(tl.float32)
        z = normalize(x, scales, shifts)
        g = tl.load(gate + offsets(m, gate_pitch, c, ALIGN, WIDE), mask=mask, other=0.0).to(tl.float32)
        t = tl.sigmoid(normalize(g, gate_scales, gate_shifts))
        kept = tl.load(carry + offsets(m, carry_pitch, c, ALIGN, WIDE), mask=mask, other=0.0).to(tl.float32)
        through = gradient(dy * t, z, ACT)
        opening = dy * (activate(z, ACT) - kept) * (t * (1.0 - t))
        if partials is not None:
            sum_dz += through
            sum_xhat += through * ((x - means[None, :]) * invstds[None, :])
        if gate_partials is not None:
            sum_gate += opening
            sum_gate_xhat += opening * ((g - gate_means[None, :]) * gate_invstds[None, :])
        tl.store(dz + offsets(m, dz_pitch, c, ALIGN, WIDE), through.to(dz.dtype.element_ty), mask=mask)
        tl.store(dgate + offsets(m, dgate_pitch, c, ALIGN, WIDE), opening.to(dgate.dtype.element_ty), mask=mask)
        passing = (dy * (1.0 - t)).to(dcarry.dtype.element_ty)
        tl.store(dcarry + offsets(m, dcarry_pitch, c, ALIGN, WIDE), passing, mask=mask)
    part, parts = tl.program_id(0), tl.num_programs(0)
    if partials is not None:
        store_partial(partials, 0, part, parts, c, C, tl.sum(sum_dz, 0))
        store_partial(partials, 1, part, parts, c, C, tl.sum(sum_xhat, 0))
    if gate_partials is not None:
        store_partial(gate_partials, 0, part, parts, c, C, tl.sum(sum_gate, 0))
        store_partial(gate_partials, 1, part, parts, c, C, tl.sum(sum_gate_xhat, 0))


def highway_forward(x: LazyMap, gate: LazyMap, carry: Tensor, *, out: Tensor | None = None) -> Tensor:
    """``t * x + (1 - t) * carry`` with ``t = sigmoid(gate)``."""
    raw = x.raw
    out = empty_map(raw.shape, raw) if out is None else out
    rows, channels = rows_of(raw), raw.shape[1]
    config = pass_config(rows, channels)
    (scale, shift), (gate_scale, gate_shift) = vectors(x.scale_shift), vectors(gate.scale_shift)
    maps = (raw, gate.raw, carry, out)
    pitches = [pitch(m) for m in maps]
    launch(
        highway_forward_kernel, (cdiv(rows, config.chunk), cdiv(channels, config.BLOCK_C)), raw.device,
        raw=raw, raw_pitch=pitches[0], scale=scale, shift=shift, gate=gate.raw, gate_pitch=pitches[1],
        gate_scale=gate_scale, gate_shift=gate_shift, carry=carry, carry_pitch=pitches[2], out=out,
        out_pitch=pitches[3], rows=rows, C=channels, chunk=config.chunk, ACT=x.act, ALIGN=align(channels, *pitches),
        WIDE=is_wide(*maps), BLOCK_M=config.BLOCK_M, BLOCK_C=config.BLOCK_C, num_warps=config.num_warps,
    )  # fmt: skip
    return out


def highway_backward(
    grad: Tensor,
    x: LazyMap,
    gate: LazyMap,
    carry: Tensor,
    *,
    sums: Tensor | Reduction | None = None,
    gate_sums: Tensor | Reduction | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """``(dz, dgate, dcarry)`` of :func:`highway_forward`, and the sums that its BatchNorms need."""
    raw = x.raw
    rows, channels = rows_of(raw), raw.shape[1]
    config = pass_config(rows, channels)
    programs = cdiv(rows, config.chunk)
    dz, dgate, dcarry = (empty_map(raw.shape, raw) for _ in range(3))
    partials, gate_partials = (
        None if s is None else torch.empty(2, programs, channels, dtype=torch.float32, device=raw.device)
        for s in (sums, gate_sums)
    )
    (scale, shift), (gate_scale, gate_shift) = vectors(x.scale_shift), vectors(gate.scale_shift)
    mean, invstd = xhat_vectors(x, sums)
    gate_mean, gate_invstd = xhat_vectors(gate, gate_sums)
    maps = (grad, raw, gate.raw, carry, dz, dgate, dcarry)
    pitches = [pitch(m) for m in maps]
    launch(
        highway_backward_kernel, (programs, cdiv(channels, config.BLOCK_C)), raw.device,
        grad=grad, grad_pitch=pitches[0], raw=raw, raw_pitch=pitches[1], scale=scale, shift=shift, mean=mean,
        invstd=invstd, gate=gate.raw, gate_pitch=pitches[2], gate_scale=gate_scale, gate_shift=gate_shift,
        gate_mean=gate_mean, gate_invstd=gate_invstd, carry=carry, carry_pitch=pitches[3], dz=dz,
        dz_pitch=pitches[4], dgate=dgate, dgate_pitch=pitches[5], dcarry=dcarry, dcarry_pitch=pitches[6],
        partials=partials, gate_partials=gate_partials, rows=rows, C=channels, chunk=config.chunk, ACT=x.act,
        ALIGN=align(channels, *pitches), WIDE=is_wide(*maps), BLOCK_M=config.BLOCK_M, BLOCK_C=config.BLOCK_C,
        num_warps=config.num_warps,
    )  # fmt: skip
    for target, found in ((sums, partials), (gate_sums, gate_partials)):
        if target is not None:
            merge(found, target)
    return dz, dgate, dcarry
