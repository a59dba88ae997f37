"""Pooling of a normalised map that is never stored: max or mean of act(scale * x + shift), and the backward.

forward   reads x (N*H*W*C values; overlapping windows meet in the cache), writes out (N*HO*WO*C) and, for max, the
          uint8 position of the maximum in its window (N*HO*WO*C bytes). With statistics of out also [2, programs, C]
          float32 partials.
backward  a gather: each pixel of x sums the windows that chose it. Reads grad, index (N*HO*WO*C each) and x (N*H*W*C),
          and either reduces the two sums ([2, programs, C] float32 partials) or writes dx = p * dz + q * x + r
          (N*H*W*C).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .activations import activate, gradient
from .device import add_row, begin, moments_of_rows, normalize, store_partial, vector
from .launch import SIZES, Prepared, arch_of, prepare
from .layout import Form, align, empty_map, form, form_of, is_wide, map_form, mean_invstd_form, offsets, pitch_or_zero
from .operands import Activation, LazyMap, Pool
from .passes import block_of_channels, chunk_of_rows, pass_over, tile_of_rows
from .reduce import Reduction, merge
from .tiles import Arch

VALUES = 1024  # values of a program's tile: a window's bookkeeping (best value, its position) doubles what a pass holds


@triton.jit(do_not_specialize=SIZES)
def pool_forward_kernel(
    x, scale, shift, out, index, partials, x_pitch, out_pitch,
    rows, H, W, HO, WO, C, chunk, POOL: tl.constexpr, ACT: tl.constexpr, ALIGN: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """Program (i, j): the i-th chunk of output pixels, the j-th block of channels. A max where there is an index, else
    a mean."""
    begin(DEPENDENT)
    KH: tl.constexpr = POOL.kernel[0]
    KW: tl.constexpr = POOL.kernel[1]
    C, c, in_c = block_of_channels(C, ALIGN, BLOCK_C)
    scales, shifts = vector(scale, c, in_c, 1.0), vector(shift, c, in_c, 0.0)
    first, last = chunk_of_rows(rows, chunk)
    mean = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    m2 = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    step = 0.0
    for start in range(first, last, BLOCK_M):
        m, mask = tile_of_rows(start, last, in_c, BLOCK_M)
        top = m // WO % HO * POOL.stride[0] - POOL.padding[0]
        left = m % WO * POOL.stride[1] - POOL.padding[1]
        pixel = (m // WO // HO * H + top) * W + left
        if index is None:
            y = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
        else:
            y = tl.full((BLOCK_M, BLOCK_C), float("-inf"), tl.float32)
        position = tl.full((BLOCK_M, BLOCK_C), -1, tl.int32)
        for i in range(KH * KW):
            h = top + i // KW
            w = left + i % KW
            inside = (m < last) & (h >= 0) & (h < H) & (w >= 0) & (w < W)
            window = inside[:, None] & in_c[None, :]
            at = offsets(pixel + (i // KW * W + i % KW), x_pitch, c, ALIGN, WIDE)
            value = activate(normalize(tl.load(x + at, mask=window, other=0.0), scales, shifts), ACT)
            if index is None:
                y += tl.where(window, value, 0.0)
            else:
                # as torch: the first maximum, except that a NaN always wins
                better = window & ((value > y) | (value != value) | (position < 0))
                y = tl.where(better, value, y)
                position = tl.where(better, i, position)
        if index is None:
            y = y * (1.0 / (KH * KW))
        else:
            tl.store(index + offsets(m, C, c, ALIGN, WIDE), position.to(tl.uint8), mask=mask)
        stored = y.to(out.dtype.element_ty)
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
def pool_backward_kernel(
    grad, index, x, scale, shift, mean, invstd, p, q, r, dx, partials, grad_pitch, x_pitch, dx_pitch,
    rows, H, W, HO, WO, C, chunk, POOL: tl.constexpr, ACT: tl.constexpr, ALIGN: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """Program (i, j): the i-th chunk of pixels of x, the j-th block of channels."""
    begin(DEPENDENT)
    KH: tl.constexpr = POOL.kernel[0]
    KW: tl.constexpr = POOL.kernel[1]
    STRIDE_H: tl.constexpr = POOL.stride[0]
    STRIDE_W: tl.constexpr = POOL.stride[1]
    # how many windows a pixel can lie in
    REACH_H: tl.constexpr = (KH + STRIDE_H - 1) // STRIDE_H
    REACH_W: tl.constexpr = (KW + STRIDE_W - 1) // STRIDE_W
    C, c, in_c = block_of_channels(C, ALIGN, BLOCK_C)
    scales, shifts = vector(scale, c, in_c, 1.0), vector(shift, c, in_c, 0.0)
    means, invstds = vector(mean, c, in_c, 0.0), vector(invstd, c, in_c, 0.0)
    ps, qs, rs = vector(p, c, in_c, 1.0), vector(q, c, in_c, 0.0), vector(r, c, in_c, 0.0)
    first, last = chunk_of_rows(rows, chunk)
    sum_dz = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    sum_xhat = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    for start in range(first, last, BLOCK_M):
        m, mask = tile_of_rows(start, last, in_c, BLOCK_M)
        h = m // W % H + POOL.padding[0]
        w = m % W + POOL.padding[1]
        image = m // W // H * HO
        dz = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
        for i in range(REACH_H * REACH_W):
            ho = h // STRIDE_H - i // REACH_W
            wo = w // STRIDE_W - i % REACH_W
            kh = h - ho * STRIDE_H
            kw = w - wo * STRIDE_W
            inside = (m < last) & (ho >= 0) & (ho < HO) & (wo >= 0) & (wo < WO) & (kh < KH) & (kw < KW)
            window = inside[:, None] & in_c[None, :]
            from_pixel = (image + ho) * WO + wo
            dy = tl.load(grad + offsets(from_pixel, grad_pitch, c, ALIGN, WIDE), mask=window, other=0.0).to(tl.float32)
            if index is None:
                dz += dy * (1.0 / (KH * KW))
            else:
                chosen = tl.load(index + offsets(from_pixel, C, c, ALIGN, WIDE), mask=window, other=0).to(tl.int32)
                dz += tl.where(chosen == (kh * KW + kw)[:, None], dy, 0.0)
        value = tl.load(x + offsets(m, x_pitch, c, ALIGN, WIDE), mask=mask, other=0.0).to(tl.float32)
        dz = gradient(dz, normalize(value, scales, shifts), ACT)
        if partials is not None:
            sum_dz += dz
            sum_xhat += dz * ((value - means[None, :]) * invstds[None, :])
        if dx is not None:
            g = dz * ps[None, :] + normalize(value, qs, rs)
            tl.store(dx + offsets(m, dx_pitch, c, ALIGN, WIDE), g.to(dx.dtype.element_ty), mask=mask)
    if partials is not None:
        store_partial(partials, 0, tl.program_id(0), tl.num_programs(0), c, C, tl.sum(sum_dz, 0))
        store_partial(partials, 1, tl.program_id(0), tl.num_programs(0), c, C, tl.sum(sum_xhat, 0))


def _check_kind(pool: Pool) -> None:
    """ValueError for a kind that no kernel computes."""
    if pool.kind not in ("max", "mean"):
        raise ValueError(f"unknown pool {pool.kind!r}: expected 'max' or 'mean'")


class _Forward(NamedTuple):
    """A launch with the forms of what it writes; partials (None: nothing is reduced) are each of ``chunk`` rows."""

    launch: Prepared
    out: Form
    index: Form | None
    partials: Form | None
    rows: int
    chunk: int


@prepare
def _forward(
    x: Form, scale_shift: Form | None, given: Form | None, reduces: bool, pool: Pool, act: Activation, arch: Arch
) -> _Forward:
    """``given``: the map that is written into, None for one of its own."""
    _check_kind(pool)
    batch, channels, height, width = x.shape
    out_height, out_width = (
        (size + 2 * pool.padding[i] - pool.kernel[i]) // pool.stride[i] + 1 for i, size in enumerate((height, width))
    )
    own = map_form((batch, channels, out_height, out_width), x)
    out = own if given is None else given
    index = own._replace(dtype=torch.uint8) if pool.kind == "max" else None
    grid = pass_over(out.rows, channels, VALUES)
    partials = grid.partials(2 * reduces, x)
    launch = Prepared(
        pool_forward_kernel, grid.grid, arch,
        {"x": x, "scale shift": scale_shift, "out": out, "index": index, "partials": partials},
        x_pitch=x.pitch, out_pitch=out.pitch, rows=grid.rows, H=height, W=width, HO=out_height, WO=out_width,
        C=channels,
        chunk=grid.chunk, POOL=pool, ACT=act, ALIGN=align(channels, x.pitch, out.pitch), WIDE=is_wide(x, out),
        BLOCK_M=grid.BLOCK_M, BLOCK_C=grid.BLOCK_C, num_warps=grid.num_warps,
    )  # fmt: skip
    return _Forward(launch, out, index, partials, grid.rows, grid.chunk)


def pool_forward(
    x: LazyMap, pool: Pool, *, out: Tensor | None = None, stats: Tensor | Reduction | None = None
) -> tuple[Tensor, Tensor | None]:
    """``(pool(x), index)``; ``stats`` are those of the result."""
    raw = x.raw
    run = _forward(form_of(raw), form(x.scale_shift), form(out), stats is not None, pool, x.act, arch_of(raw.device))
    if out is None:
        out = run.out.new()
    index, partials = (None if f is None else f.new() for f in (run.index, run.partials))
    run.launch(raw, x.scale_shift, out, index, partials)
    if partials is not None and stats is not None:
        merge(partials, stats, run.chunk, run.rows)
    return out, index


@prepare
def _backward(
    grad: Form,
    index: Form | None,
    x: Form,
    scale_shift: Form | None,
    mean_invstd: Form | None,
    coeff: Form | None,
    dx: Form | None,
    reduces: bool,
    pool: Pool,
    act: Activation,
    arch: Arch,
) -> tuple[Prepared, Form | None]:
    """The launch and the form of its partials. ValueError for a max pool without its index."""
    _check_kind(pool)
    if (index is None) != (pool.kind == "mean"):
        raise ValueError(f"a {pool.kind} pool goes back with its index if it is a max, without one if it is a mean")
    _, channels, height, width = x.shape
    grid = pass_over(x.rows, channels, VALUES)
    partials = grid.partials(2 * reduces, x)
    grad_pitch, x_pitch, dx_pitch = grad.pitch, x.pitch, pitch_or_zero(dx)
    launch = Prepared(
        pool_backward_kernel, grid.grid, arch,
        {
            "grad": grad, "index": index, "x": x, "scale shift": scale_shift,
            "mean invstd": mean_invstd_form(mean_invstd, reduces), "p q r": coeff, "dx": dx, "partials": partials,
        },
        grad_pitch=grad_pitch, x_pitch=x_pitch, dx_pitch=dx_pitch, rows=grid.rows, H=height, W=width, HO=grad.shape[2],
        WO=grad.shape[3], C=channels, chunk=grid.chunk, POOL=pool, ACT=act,
        ALIGN=align(channels, grad_pitch, x_pitch, dx_pitch), WIDE=is_wide(grad, x, dx), BLOCK_M=grid.BLOCK_M,
        BLOCK_C=grid.BLOCK_C, num_warps=grid.num_warps,
    )  # fmt: skip
    return launch, partials


def pool_backward(
    grad: Tensor,
    index: Tensor | None,
    x: LazyMap,
    pool: Pool,
    *,
    sums: Tensor | Reduction | None = None,
    coeff: Tensor | None = None,
    dx: Tensor | None = None,
) -> Tensor | None:
    """With ``sums`` the reduction of dz, with ``coeff`` the gradient ``dx = p * dz + q * raw + r``.

    ValueError for a max pool without its index.
    """
    raw = x.raw
    if coeff is None:
        dx = None
    elif dx is None:
        dx = empty_map(raw)
    launch, partial = _backward(
        form_of(grad), form(index), form_of(raw), form(x.scale_shift), form(x.mean_invstd), form(coeff), form(dx),
        sums is not None, pool, x.act, arch_of(raw.device),
    )  # fmt: skip
    partials = None if partial is None else partial.new()
    launch(grad, index, raw, x.scale_shift, None if sums is None else x.mean_invstd, coeff, dx, partials)
    if partials is not None and sums is not None:
        merge(partials, sums)
    return dx
