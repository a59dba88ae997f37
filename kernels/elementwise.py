"""Passes over maps, row by row: the residual addition with its activation, its backward, and what is a special case of them.

forward   reads raw (and residual), writes out = act(normalized raw + normalized residual): rows * C values each, once. With statistics
          also [2, programs, C] float32 partials. ``apply_grad_coeff`` is this pass with the gradient as raw; ``statistics`` is it
          without out.
backward  reads grad, raw (and residual, base), writes out = base + scale * dz with dz the gradient under the activation's mask. With
          sums also [2 or 3, programs, C] float32 partials. ``dgrad_epilogue`` is this pass after a library's input gradient.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .activations import activate, gradient
from .device import add_row, begin, moments_of_rows, normalize, store_partial, vector
from .launch import SIZES, Prepared, arch_of, prepare
from .layout import (
    Form,
    align,
    check_scaled,
    empty_map,
    form,
    form_of,
    is_wide,
    mean_invstd_form,
    offsets,
    pitch_or_zero,
)
from .operands import Activation, GradTarget, LazyGrad, LazyMap, Normalized
from .passes import Pass, block_of_channels, chunk_of_rows, pass_over, tile_of_rows
from .reduce import Reduction, merge
from .tiles import Arch


@triton.jit(do_not_specialize=SIZES)
def add_act_forward_kernel(
    raw, scale, shift, residual, residual_scale, residual_shift, out, partials, raw_pitch, residual_pitch, out_pitch,
    rows, C, chunk, ACT: tl.constexpr, ALIGN: tl.constexpr, WIDE: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """Program (i, j): the i-th chunk of rows, the j-th block of channels."""
    begin(DEPENDENT)
    C, c, inside = block_of_channels(C, ALIGN, BLOCK_C)
    scales, shifts = vector(scale, c, inside, 1.0), vector(shift, c, inside, 0.0)
    residual_scales, residual_shifts = vector(residual_scale, c, inside, 1.0), vector(residual_shift, c, inside, 0.0)
    first, last = chunk_of_rows(rows, chunk)
    mean = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    m2 = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    step = 0.0
    for start in range(first, last, BLOCK_M):
        m, mask = tile_of_rows(start, last, inside, BLOCK_M)
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
    grad, raw, scale, shift, mean, invstd, residual, residual_scale, residual_shift, residual_mean, residual_invstd,
    base, out, partials, grad_pitch, raw_pitch, residual_pitch, base_pitch, out_pitch,
    rows, C, chunk, ACT: tl.constexpr, SCALED: tl.constexpr, ALIGN: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """Program (i, j): the i-th chunk of rows, the j-th block of channels. Partials: sum dz,
    sum dz * xhat of raw where it has a mean, and of residual where that has one."""
    begin(DEPENDENT)
    C, c, inside = block_of_channels(C, ALIGN, BLOCK_C)
    scales, shifts = vector(scale, c, inside, 1.0), vector(shift, c, inside, 0.0)
    residual_scales, residual_shifts = vector(residual_scale, c, inside, 1.0), vector(residual_shift, c, inside, 0.0)
    means, invstds = vector(mean, c, inside, 0.0), vector(invstd, c, inside, 0.0)
    residual_means, residual_invstds = vector(residual_mean, c, inside, 0.0), vector(residual_invstd, c, inside, 0.0)
    first, last = chunk_of_rows(rows, chunk)
    sum_dz = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    sum_xhat = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    sum_residual = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    for start in range(first, last, BLOCK_M):
        m, mask = tile_of_rows(start, last, inside, BLOCK_M)
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


class _Pass(NamedTuple):
    """A launch with the form of its partials (None: nothing is reduced), each of ``chunk`` rows, and that of what is written."""

    launch: Prepared
    partials: Form | None
    rows: int = 0
    chunk: int = 0


@prepare
def _forward(
    raw: Form,
    scale_shift: Form | None,
    residual: Form | None,
    residual_scale_shift: Form | None,
    out: Form | None,
    reduces: bool,
    act: Activation | None,
    arch: Arch,
) -> _Pass:
    grid = pass_over(raw.rows, raw.shape[1])
    partials = grid.partials(2 if reduces else 0, raw)
    vectors = {"scale shift": scale_shift}, {"residual_scale residual_shift": residual_scale_shift}
    return _Pass(_over_rows(raw, vectors, residual, out, partials, act, grid, arch), partials, grid.rows, grid.chunk)


@prepare
def _combination(grad: Form, p: Form, q: Form | None, r: Form, raw: Form | None, out: Form, arch: Arch) -> Prepared:
    vectors = {"scale": p, "shift": r}, {"residual_scale": q, "residual_shift": None}
    return _over_rows(grad, vectors, raw, out, None, None, pass_over(grad.rows, grad.shape[1]), arch)


def _over_rows(
    raw: Form,
    vectors: tuple[dict[str, Form | None], dict[str, Form | None]],
    residual: Form | None,
    out: Form | None,
    partials: Form | None,
    act: Activation | None,
    grid: Pass,
    arch: Arch,
) -> Prepared:
    """A launch of the forward kernel; without ``act`` there is no activation."""
    if act is not None and act.kind == "none":
        act = None  # one kernel for both
    pitches = [pitch_or_zero(x) for x in (raw, residual, out)]
    return Prepared(
        add_act_forward_kernel, grid.grid, arch,
        {"raw": raw, **vectors[0], "residual": residual, **vectors[1], "out": out, "partials": partials},
        raw_pitch=pitches[0], residual_pitch=pitches[1], out_pitch=pitches[2], rows=grid.rows, C=grid.channels,
        chunk=grid.chunk, ACT=act, ALIGN=align(grid.channels, *pitches), WIDE=is_wide(raw, residual, out),
        BLOCK_M=grid.BLOCK_M, BLOCK_C=grid.BLOCK_C, num_warps=grid.num_warps,
    )  # fmt: skip


@prepare
def _backward(
    grad: Form,
    raw: Form,
    scale_shift: Form | None,
    mean_invstd: Form | None,
    residual: Form | None,
    residual_scale_shift: Form | None,
    residual_mean_invstd: Form | None,
    base: Form | None,
    out: Form | None,
    reduces: bool,
    reduces_residual: bool,
    scaled: bool,
    act: Activation,
    arch: Arch,
) -> _Pass:
    """ValueError where an operand lacks what is asked for of it."""
    check_scaled(scale_shift, scaled)
    if residual is None and reduces_residual:
        raise ValueError("residual_sums are asked for without a residual")
    grid = pass_over(raw.rows, raw.shape[1])
    reduced = reduces + reduces_residual
    partials = grid.partials(1 + reduced if reduced else 0, raw)
    pitches = [pitch_or_zero(t) for t in (grad, raw, residual, base, out)]
    launch = Prepared(
        add_act_backward_kernel, grid.grid, arch,
        {
            "grad": grad, "raw": raw, "scale shift": scale_shift, "mean invstd": mean_invstd_form(mean_invstd, reduces),
            "residual": residual, "residual_scale residual_shift": residual_scale_shift,
            "residual_mean residual_invstd": mean_invstd_form(residual_mean_invstd, reduces_residual), "base": base,
            "out": out,
            "partials": partials,
        },
        grad_pitch=pitches[0], raw_pitch=pitches[1], residual_pitch=pitches[2], base_pitch=pitches[3],
        out_pitch=pitches[4],
        rows=grid.rows, C=grid.channels, chunk=grid.chunk, ACT=act, SCALED=scaled, ALIGN=align(grid.channels, *pitches),
        WIDE=is_wide(grad, raw, residual, base, out), BLOCK_M=grid.BLOCK_M, BLOCK_C=grid.BLOCK_C,
        num_warps=grid.num_warps,
    )  # fmt: skip
    return _Pass(launch, partials)


def _run_forward(
    x: Normalized,
    residual: Normalized | None,
    act: Activation | None,
    out: Tensor | None,
    stats: Tensor | Reduction | None,
) -> None:
    """One launch of the forward kernel, and the merge of its statistics."""
    raw = x.raw
    added, added_scale_shift = (None, None) if residual is None else (residual.raw, residual.scale_shift)
    run = _forward(
        form_of(raw), form(x.scale_shift), form(added), form(added_scale_shift), form(out), stats is not None, act,
        arch_of(raw.device),
    )  # fmt: skip
    partials = None if run.partials is None else run.partials.new()
    run.launch(raw, x.scale_shift, added, added_scale_shift, out, partials)
    if partials is not None and stats is not None:
        merge(partials, stats, run.chunk, run.rows)


def _run_backward(
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
    raw = x.raw
    added = added_scale_shift = added_mean_invstd = None
    if residual is not None:
        added, added_scale_shift, added_mean_invstd = residual.raw, residual.scale_shift, residual.mean_invstd
    run = _backward(
        form_of(grad), form_of(raw), form(x.scale_shift), form(x.mean_invstd), form(added), form(added_scale_shift),
        form(added_mean_invstd), form(base), form(out), sums is not None, residual_sums is not None, scaled, act,
        arch_of(raw.device),
    )  # fmt: skip
    partials = None if run.partials is None else run.partials.new()
    run.launch(
        grad, raw, x.scale_shift, None if sums is None else x.mean_invstd, added, added_scale_shift,
        None if residual_sums is None else added_mean_invstd, base, out, partials,
    )  # fmt: skip
    if partials is not None:
        for i, target in enumerate(s for s in (sums, residual_sums) if s is not None):
            # each pair is (sum dz, its own sum dz * xhat): the parts 0 and 1 + i
            merge(partials if partials.shape[0] == 2 else partials[:: 1 + i][:2], target)


class _Plain(NamedTuple):
    """A map that nothing is pending of."""

    raw: Tensor
    scale_shift: Tensor | None = None
    mean_invstd: Tensor | None = None


def statistics(x: Tensor, stats: Tensor | Reduction) -> None:
    """``stats`` (mean, M2) of the map ``x`` per channel."""
    _run_forward(_Plain(x), None, None, None, stats)


def add_act_forward(
    x: Normalized,
    residual: Normalized | None,
    act: Activation,
    *,
    out: Tensor | None = None,
    stats: Tensor | Reduction | None = None,
) -> Tensor:
    """``out = act(x + residual)``; ``stats`` are those of out. The operands' own activations are not applied."""
    out = empty_map(x.raw) if out is None else out
    _run_forward(x, residual, act, out, stats)
    return out


def apply_grad_coeff(grad: LazyGrad, *, out: Tensor | None = None) -> Tensor:
    """``p * grad + q * raw + r``: an addition whose residual is raw, scaled by q. ValueError for a gradient without coefficients."""
    if grad.coeff is None:
        raise ValueError("there is no coeff to apply")
    out = empty_map(grad.grad) if out is None else out
    p, q, r = grad.coeff.unbind(0)
    q = None if grad.raw is None else q
    launch = _combination(
        form_of(grad.grad), form_of(p), form(q), form_of(r), form(grad.raw), form_of(out), arch_of(grad.grad.device)
    )
    launch(grad.grad, p, r, grad.raw, q, None, out, None)
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
    out = grad if act.kind == "none" else empty_map(x.raw)
    if out is not grad or sums is not None or residual_sums is not None:
        _run_backward(grad, x, residual, act, out=None if out is grad else out, sums=sums, residual_sums=residual_sums)
    return out


def dgrad_epilogue(da: Tensor, x: LazyMap, target: GradTarget) -> Tensor:
    """The pass after a library's input gradient ``da``, in whose place it writes where ``target`` has no dx."""
    dx = da if target.dx is None else target.dx
    base = dx if target.accumulate else target.base
    _run_backward(da, x, None, x.act, out=dx, base=base, scaled=target.scaled, sums=target.sums)
    return dx
