"""Pooling of a normalised map that is never stored: max or mean of act(scale * x + shift), and the backward.

forward   reads x (N*H*W*C values; overlapping windows meet in the cache), writes out (N*HO*WO*C) and, for max, the
          uint8 position of the maximum in its window (N*HO*WO*C bytes). With statistics of out also [2, programs, C]
          float32 partials.
backward  a gather: each pixel of x sums the windows that chose it. Reads grad, index (N*HO*WO*C each) and x (N*H*W*C),
          and either reduces the two sums ([2, programs, C] float32 partials) or writes dx = p * dz + q * x + r
          (N*H*W*C).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .activations import activate, gradient
from .device import add_row, moments_of_rows, normalize, store_partial, vector
from .launch import SIZES, launch
from .layout import align, aligned, empty_map, is_wide, offsets, pitch, pitch_or_zero, rows_of, vectors, xhat_vectors
from .operands import LazyMap, Pool
from .reduce import Reduction, merge
from .tiles import cdiv, pass_config

TILE = 1024  # values of a program's tile: a window's bookkeeping (best value, its position) doubles what a pass holds


@triton.jit(do_not_specialize=SIZES)
def pool_forward_kernel(
    x, x_pitch, scale, shift, out, out_pitch, index, partials,
    rows, H, W, HO, WO, C, chunk, POOL: tl.constexpr, ACT: tl.constexpr, ALIGN: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Program (i, j): the i-th chunk of output pixels, the j-th block of channels. A max where there is an index, else
    a mean."""
    KH: tl.constexpr = POOL.kernel[0]
    KW: tl.constexpr = POOL.kernel[1]
    C = aligned(C, ALIGN)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    in_c = c < C
    scales, shifts = vector(scale, c, in_c, 1.0), vector(shift, c, in_c, 0.0)
    first = tl.program_id(0) * chunk
    last = tl.minimum(first + chunk, rows)
    mean = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    m2 = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    step = 0.0
    for start in range(first, last, BLOCK_M):
        m = start + tl.arange(0, BLOCK_M)
        mask = (m < last)[:, None] & in_c[None, :]
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
    grad, grad_pitch, index, x, x_pitch, scale, shift, mean, invstd, p, q, r, dx, dx_pitch, partials,
    rows, H, W, HO, WO, C, chunk, POOL: tl.constexpr, ACT: tl.constexpr, ALIGN: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Program (i, j): the i-th chunk of pixels of x, the j-th block of channels."""
    KH: tl.constexpr = POOL.kernel[0]
    KW: tl.constexpr = POOL.kernel[1]
    STRIDE_H: tl.constexpr = POOL.stride[0]
    STRIDE_W: tl.constexpr = POOL.stride[1]
    # how many windows a pixel can lie in
    REACH_H: tl.constexpr = (KH + STRIDE_H - 1) // STRIDE_H
    REACH_W: tl.constexpr = (KW + STRIDE_W - 1) // STRIDE_W
    C = aligned(C, ALIGN)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    in_c = c < C
    scales, shifts = vector(scale, c, in_c, 1.0), vector(shift, c, in_c, 0.0)
    means, invstds = vector(mean, c, in_c, 0.0), vector(invstd, c, in_c, 0.0)
    ps, qs, rs = vector(p, c, in_c, 1.0), vector(q, c, in_c, 0.0), vector(r, c, in_c, 0.0)
    first = tl.program_id(0) * chunk
    last = tl.minimum(first + chunk, rows)
    sum_dz = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    sum_xhat = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    for start in range(first, last, BLOCK_M):
        m = start + tl.arange(0, BLOCK_M)
        mask = (m < last)[:, None] & in_c[None, :]
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


def pool_forward(
    x: LazyMap, pool: Pool, *, out: Tensor | None = None, stats: Tensor | Reduction | None = None
) -> tuple[Tensor, Tensor | None]:
    """``(pool(x), index)``; ``stats`` are those of the result."""
    raw = x.raw
    batch, channels, height, width = raw.shape
    out_height, out_width = (
        (size + 2 * pool.padding[i] - pool.kernel[i]) // pool.stride[i] + 1 for i, size in enumerate((height, width))
    )
    if out is None:
        out = empty_map((batch, channels, out_height, out_width), raw)
    index = None
    _check_kind(pool)
    if pool.kind == "max":
        index = torch.empty(out.shape, dtype=torch.uint8, device=raw.device, memory_format=torch.channels_last)
    rows = rows_of(out)
    config = pass_config(rows, channels, TILE)
    programs = cdiv(rows, config.chunk)
    partials = None
    if stats is not None:
        partials = torch.empty(2, programs, channels, dtype=torch.float32, device=raw.device)
    scale, shift = vectors(x.scale_shift)
    launch(
        pool_forward_kernel, (programs, cdiv(channels, config.BLOCK_C)), raw.device,
        x=raw, x_pitch=pitch(raw), scale=scale, shift=shift, out=out, out_pitch=pitch(out), index=index, partials=partials,
        rows=rows, H=height, W=width, HO=out_height, WO=out_width, C=channels, chunk=config.chunk, POOL=pool,
        ACT=x.act, ALIGN=align(channels, pitch(raw), pitch(out)), WIDE=is_wide(raw, out), BLOCK_M=config.BLOCK_M,
        BLOCK_C=config.BLOCK_C, num_warps=config.num_warps,
    )  # fmt: skip
    if stats is not None:
        merge(partials, stats, config.chunk, rows)
    return out, index


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
    _check_kind(pool)
    if (index is None) != (pool.kind == "mean"):
        raise ValueError(f"a {pool.kind} pool goes back with its index if it is a max, without one if it is a mean")
    _, channels, height, width = raw.shape
    if coeff is None:
        dx = None
    elif dx is None:
        dx = empty_map(raw.shape, raw)
    rows = rows_of(raw)
    config = pass_config(rows, channels, TILE)
    programs = cdiv(rows, config.chunk)
    partials = None
    if sums is not None:
        partials = torch.empty(2, programs, channels, dtype=torch.float32, device=raw.device)
    scale, shift = vectors(x.scale_shift)
    mean, invstd = xhat_vectors(x, sums)
    p, q, r = (None, None, None) if coeff is None else coeff.unbind(0)
    grad_pitch, x_pitch, dx_pitch = pitch(grad), pitch(raw), pitch_or_zero(dx)
    launch(
        pool_backward_kernel, (programs, cdiv(channels, config.BLOCK_C)), raw.device,
        grad=grad, grad_pitch=grad_pitch, index=index, x=raw, x_pitch=x_pitch, scale=scale, shift=shift, mean=mean,
        invstd=invstd, p=p, q=q, r=r, dx=dx, dx_pitch=dx_pitch, partials=partials, rows=rows, H=height, W=width,
        HO=grad.shape[2], WO=grad.shape[3], C=channels, chunk=config.chunk, POOL=pool, ACT=x.act,
        ALIGN=align(channels, grad_pitch, x_pitch, dx_pitch), WIDE=is_wide(grad, raw, dx), BLOCK_M=config.BLOCK_M,
        BLOCK_C=config.BLOCK_C, num_warps=config.num_warps,
    )  # fmt: skip
    if sums is not None:
        merge(partials, sums)
    return dx
