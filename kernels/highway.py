"""The highway block's gated sum and its backward, row by row.

forward   reads raw, gate and carry, writes out = t * act(normalized raw) + (1 - t) * carry with t = sigmoid(normalized gate): four maps of
          rows * C values, each once.
backward  reads grad, raw, gate and carry, writes the gradients of the normalized raw, of the normalized gate and of carry: seven maps.
          With sums also [2, programs, C] float32 partials for each BatchNorm that asks for them.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .activations import activate, gradient
from .device import begin, normalize, store_partial, vector
from .launch import SIZES, Prepared, arch_of, prepare
from .layout import Form, align, empty_map, form, form_of, is_wide, mean_invstd_form, offsets
from .operands import Activation, LazyMap
from .passes import block_of_channels, chunk_of_rows, pass_over, tile_of_rows
from .reduce import Reduction, merge
from .tiles import Arch


@triton.jit(do_not_specialize=SIZES)
def highway_forward_kernel(
    raw, scale, shift, gate, gate_scale, gate_shift, carry, out, raw_pitch, gate_pitch, carry_pitch, out_pitch,
    rows, C, chunk, ACT: tl.constexpr, ALIGN: tl.constexpr, WIDE: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """Program (i, j): the i-th chunk of rows, the j-th block of channels."""
    begin(DEPENDENT)
    C, c, inside = block_of_channels(C, ALIGN, BLOCK_C)
    scales, shifts = vector(scale, c, inside, 1.0), vector(shift, c, inside, 0.0)
    gate_scales, gate_shifts = vector(gate_scale, c, inside, 1.0), vector(gate_shift, c, inside, 0.0)
    first, last = chunk_of_rows(rows, chunk)
    for start in range(first, last, BLOCK_M):
        m, mask = tile_of_rows(start, last, inside, BLOCK_M)
        x = tl.load(raw + offsets(m, raw_pitch, c, ALIGN, WIDE), mask=mask, other=0.0)
        h = activate(normalize(x, scales, shifts), ACT)
        g = tl.load(gate + offsets(m, gate_pitch, c, ALIGN, WIDE), mask=mask, other=0.0)
        t = tl.sigmoid(normalize(g, gate_scales, gate_shifts))
        kept = tl.load(carry + offsets(m, carry_pitch, c, ALIGN, WIDE), mask=mask, other=0.0).to(tl.float32)
        y = t * h + (1.0 - t) * kept
        tl.store(out + offsets(m, out_pitch, c, ALIGN, WIDE), y.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=SIZES)
def highway_backward_kernel(
    grad, raw, scale, shift, mean, invstd, gate, gate_scale, gate_shift, gate_mean, gate_invstd, carry,
    dz, dgate, dcarry, partials, gate_partials,
    grad_pitch, raw_pitch, gate_pitch, carry_pitch, dz_pitch, dgate_pitch, dcarry_pitch,
    rows, C, chunk, ACT: tl.constexpr, ALIGN: tl.constexpr, WIDE: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """Program (i, j): the i-th chunk of rows, the j-th block of channels. Partials: sum dz, sum dz * xhat of raw; those of the gate
    the same of dgate."""
    begin(DEPENDENT)
    C, c, inside = block_of_channels(C, ALIGN, BLOCK_C)
    scales, shifts = vector(scale, c, inside, 1.0), vector(shift, c, inside, 0.0)
    means, invstds = vector(mean, c, inside, 0.0), vector(invstd, c, inside, 0.0)
    gate_scales, gate_shifts = vector(gate_scale, c, inside, 1.0), vector(gate_shift, c, inside, 0.0)
    gate_means, gate_invstds = vector(gate_mean, c, inside, 0.0), vector(gate_invstd, c, inside, 0.0)
    first, last = chunk_of_rows(rows, chunk)
    sum_dz = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    sum_xhat = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    sum_gate = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    sum_gate_xhat = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    for start in range(first, last, BLOCK_M):
        m, mask = tile_of_rows(start, last, inside, BLOCK_M)
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


@prepare
def _forward(
    raw: Form,
    scale_shift: Form | None,
    gate: Form,
    gate_scale_shift: Form | None,
    carry: Form,
    out: Form,
    act: Activation,
    arch: Arch,
) -> Prepared:
    grid = pass_over(raw.rows, raw.shape[1])
    maps = (raw, gate, carry, out)
    pitches = [m.pitch for m in maps]
    return Prepared(
        highway_forward_kernel, grid.grid, arch,
        {
            "raw": raw, "scale shift": scale_shift, "gate": gate, "gate_scale gate_shift": gate_scale_shift,
            "carry": carry,
            "out": out,
        },
        raw_pitch=pitches[0], gate_pitch=pitches[1], carry_pitch=pitches[2], out_pitch=pitches[3], rows=grid.rows,
        C=grid.channels, chunk=grid.chunk, ACT=act, ALIGN=align(grid.channels, *pitches), WIDE=is_wide(*maps),
        BLOCK_M=grid.BLOCK_M, BLOCK_C=grid.BLOCK_C, num_warps=grid.num_warps,
    )  # fmt: skip


def highway_forward(x: LazyMap, gate: LazyMap, carry: Tensor, *, out: Tensor | None = None) -> Tensor:
    """``t * x + (1 - t) * carry`` with ``t = sigmoid(gate)``."""
    raw = x.raw
    out = empty_map(raw) if out is None else out
    launch = _forward(
        form_of(raw), form(x.scale_shift), form_of(gate.raw), form(gate.scale_shift), form_of(carry), form_of(out),
        x.act,
        arch_of(raw.device),
    )  # fmt: skip
    launch(raw, x.scale_shift, gate.raw, gate.scale_shift, carry, out)
    return out


class _Backward(NamedTuple):
    """A launch with the forms of its partials (None: nothing is reduced)."""

    launch: Prepared
    partials: Form | None
    gate_partials: Form | None


@prepare
def _backward(
    grad: Form,
    raw: Form,
    scale_shift: Form | None,
    mean_invstd: Form | None,
    gate: Form,
    gate_scale_shift: Form | None,
    gate_mean_invstd: Form | None,
    carry: Form,
    out: Form,
    reduces: bool,
    reduces_gate: bool,
    act: Activation,
    arch: Arch,
) -> _Backward:
    """``out``: of each of the three gradients."""
    grid = pass_over(raw.rows, raw.shape[1])
    partials, gate_partials = grid.partials(2 * reduces, raw), grid.partials(2 * reduces_gate, raw)
    maps = (grad, raw, gate, carry, out, out, out)
    pitches = [m.pitch for m in maps]
    launch = Prepared(
        highway_backward_kernel, grid.grid, arch,
        {
            "grad": grad, "raw": raw, "scale shift": scale_shift, "mean invstd": mean_invstd_form(mean_invstd, reduces),
            "gate": gate, "gate_scale gate_shift": gate_scale_shift,
            "gate_mean gate_invstd": mean_invstd_form(gate_mean_invstd, reduces_gate), "carry": carry, "dz": out,
            "dgate": out,
            "dcarry": out, "partials": partials, "gate_partials": gate_partials,
        },
        grad_pitch=pitches[0], raw_pitch=pitches[1], gate_pitch=pitches[2], carry_pitch=pitches[3], dz_pitch=pitches[4],
        dgate_pitch=pitches[5], dcarry_pitch=pitches[6], rows=grid.rows, C=grid.channels, chunk=grid.chunk, ACT=act,
        ALIGN=align(grid.channels, *pitches), WIDE=is_wide(*maps), BLOCK_M=grid.BLOCK_M, BLOCK_C=grid.BLOCK_C,
        num_warps=grid.num_warps,
    )  # fmt: skip
    return _Backward(launch, partials, gate_partials)


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
    dz, dgate, dcarry = (empty_map(raw) for _ in range(3))
    run = _backward(
        form_of(grad), form_of(raw), form(x.scale_shift), form(x.mean_invstd), form_of(gate.raw),
        form(gate.scale_shift),
        form(gate.mean_invstd), form_of(carry), form_of(dz), sums is not None, gate_sums is not None, x.act,
        arch_of(raw.device),
    )  # fmt: skip
    partials, gate_partials = (None if f is None else f.new() for f in (run.partials, run.gate_partials))
    run.launch(
        grad, raw, x.scale_shift, None if sums is None else x.mean_invstd, gate.raw, gate.scale_shift,
        None if gate_sums is None else gate.mean_invstd, carry, dz, dgate, dcarry, partials, gate_partials,
    )  # fmt: skip
    for target, found in ((sums, partials), (gate_sums, gate_partials)):
        if target is not None and found is not None:
            merge(found, target)
    return dz, dgate, dcarry
