"""Convolution forward as an implicit GEMM over a channels_last map: rows are output pixels, K runs over (channel, tap).

Reads x (N*H*W*C values; a tile's taps after the first come from cache), the weight (K*C*R*S), writes out (N*HO*WO*K)
into a map or channel slice. The pending scale, shift and activation of x are applied between load and product, the padding's
zeros after them. With statistics also [2, tiles, K] float32 partials, reduced from the accumulator as it is stored; for
inference the epilogue applies a scale and shift, adds a residual (read once, N*HO*WO*K) and activates. Why three of these are
not one kernel for a whole block: docs/whole-block-fusion.md.

Programs that run side by side share their rows of x, the larger operand, and walk the columns of the weight, which is
5 MB at most in a ResNet-50 and stays in L2 whatever the order: x comes from DRAM once, without grouping programs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .activations import activate
from .device import moments_of_rows, normalize, vector
from .launch import SIZES, arch_of, launch
from .layout import align, aligned, empty_map, is_wide, offsets, pitch, pitch_or_zero, rows_of, vectors
from .operands import Epilogue, Geometry, LazyMap
from .reduce import merge
from .tiles import ConvConfig, ConvSize, cdiv, check, forward_config


@triton.jit(do_not_specialize=SIZES)
def conv_forward_kernel(
    x, x_pitch, scale, shift, weight, bias, out, out_pitch, partials,
    out_scale, out_shift, residual, residual_pitch, residual_scale, residual_shift,
    rows, H, W, HO, WO, C, K, GEOMETRY: tl.constexpr, R: tl.constexpr, S: tl.constexpr, ACT: tl.constexpr,
    OUT_ACT: tl.constexpr, EVEN_C: tl.constexpr, ALIGN_C: tl.constexpr, ALIGN_K: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Program (i, group): one tile of out; neighbours share their rows of x. C and K are those of one group."""
    STRIDE_H: tl.constexpr = GEOMETRY.stride[0]
    STRIDE_W: tl.constexpr = GEOMETRY.stride[1]
    PAD_H: tl.constexpr = GEOMETRY.padding[0]
    PAD_W: tl.constexpr = GEOMETRY.padding[1]
    POINTWISE: tl.constexpr = R * S * STRIDE_H * STRIDE_W == 1 and PAD_H + PAD_W == 0
    C = aligned(C, ALIGN_C)
    K = aligned(K, ALIGN_K)
    tiles_n = tl.cdiv(K, BLOCK_N)
    tile_m = tl.program_id(0) // tiles_n
    n = tl.program_id(0) % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)
    in_n = n < K
    first_c = tl.program_id(1) * C
    first_n = tl.program_id(1) * K
    m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    # rows past the end repeat row 0: loads need no mask for them, and nothing of theirs is stored
    pixel = tl.where(m < rows, m, 0)
    if not POINTWISE:
        h = pixel // WO % HO * STRIDE_H - PAD_H
        w = pixel % WO * STRIDE_W - PAD_W
        pixel = (pixel // WO // HO * H + h) * W + w
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for i in range(tl.cdiv(C, BLOCK_K) * (R * S)):
        # taps run fastest: their loads of x overlap and meet in the cache
        tap = i % (R * S)
        c = i // (R * S) * BLOCK_K + tl.arange(0, BLOCK_K)
        in_c = c < C
        if POINTWISE:
            at = offsets(pixel, x_pitch, first_c + c, ALIGN_C, WIDE)
            mask = in_c[None, :]
        else:
            dh = tap // S * GEOMETRY.dilation[0]
            dw = tap % S * GEOMETRY.dilation[1]
            at = offsets(pixel + (dh * W + dw), x_pitch, first_c + c, ALIGN_C, WIDE)
            mask = (h + dh >= 0) & (h + dh < H) & (w + dw >= 0) & (w + dw < W)
            mask = mask[:, None] & in_c[None, :]
        if POINTWISE and EVEN_C:
            a = tl.load(x + at)
        else:
            a = tl.load(x + at, mask=mask, other=0.0)
        if ACT.kind != "none" or scale is not None:
            z = normalize(a, vector(scale, first_c + c, in_c, 1.0), vector(shift, first_c + c, in_c, 0.0))
            z = activate(z, ACT)
            if PAD_H + PAD_W > 0:
                z = tl.where(mask, z, 0.0)
            a = z.to(x.dtype.element_ty)
        b_at = ((first_n + n) * (R * S) + tap)[None, :] * C + c[:, None]
        b = tl.load(weight + b_at, mask=in_c[:, None] & in_n[None, :], other=0.0)
        acc = tl.dot(a, b, acc, input_precision="ieee")
    n += first_n
    if bias is not None:
        acc += vector(bias, n, in_n, 0.0)[None, :]
    valid = m < rows
    mask = valid[:, None] & in_n[None, :]
    if out_scale is not None:
        acc = normalize(acc, vector(out_scale, n, in_n, 1.0), vector(out_shift, n, in_n, 0.0))
    if residual is not None:
        other = tl.load(residual + offsets(m, residual_pitch, n, ALIGN_K, WIDE), mask=mask, other=0.0)
        acc += normalize(other, vector(residual_scale, n, in_n, 1.0), vector(residual_shift, n, in_n, 0.0))
    acc = activate(acc, OUT_ACT)
    stored = acc.to(out.dtype.element_ty)
    tl.store(out + offsets(m, out_pitch, n, ALIGN_K, WIDE), stored, mask=mask)
    if partials is not None:
        # of what is stored, so that they normalise exactly what the next reader loads
        count = valid.to(tl.float32)
        zeros = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        _, mean, m2 = moments_of_rows(count, stored.to(tl.float32), zeros)
        tiles = tl.cdiv(rows, BLOCK_M)
        all_k = K * tl.num_programs(1)
        tl.store(partials + tile_m * all_k + n, mean, mask=in_n)
        tl.store(partials + (tiles + tile_m) * all_k + n, m2, mask=in_n)


def conv_forward(
    x: LazyMap,
    weight: Tensor,
    bias: Tensor | None,
    geometry: Geometry,
    epilogue: Epilogue,
    config: ConvConfig | None = None,
) -> Tensor:
    """The convolution of ``x`` with its epilogue, in tiles of ``config`` (default: :func:`~.tiles.forward_config`); returns what was
    written. ``epilogue.stats`` are those of the convolution: not together with a residual. ValueError for a tile that is not allowed."""
    raw, out, residual = x.raw, epilogue.out, epilogue.residual
    batch, _, height, width = raw.shape
    all_outputs, channels, *kernel = weight.shape
    out_height, out_width = (
        (size + 2 * geometry.padding[i] - geometry.dilation[i] * (kernel[i] - 1) - 1) // geometry.stride[i] + 1
        for i, size in enumerate((height, width))
    )
    if out is None:
        out = empty_map((batch, all_outputs, out_height, out_width), raw)
    weight = weight.contiguous(memory_format=torch.channels_last)
    outputs, rows, taps, arch = all_outputs // geometry.groups, rows_of(out), kernel[0] * kernel[1], arch_of(raw.device)
    if config is None:
        config = forward_config(ConvSize(rows, channels, outputs, taps, raw.element_size()), arch)
    check("forward", taps, arch, config)
    tiles = cdiv(rows, config.BLOCK_M)
    partials = None
    if epilogue.stats is not None:
        partials = torch.empty(2, tiles, all_outputs, dtype=torch.float32, device=raw.device)
    scale, shift = vectors(x.scale_shift)
    out_scale, out_shift = vectors(epilogue.scale_shift)
    added = None if residual is None else residual.raw
    residual_scale, residual_shift = vectors(None if residual is None else residual.scale_shift)
    x_pitch, out_pitch, residual_pitch = pitch(raw), pitch(out), pitch_or_zero(added)
    launch(
        conv_forward_kernel, (tiles * cdiv(outputs, config.BLOCK_N), geometry.groups), raw.device,
        x=raw, x_pitch=x_pitch, scale=scale, shift=shift, weight=weight, bias=bias, out=out, out_pitch=out_pitch,
        partials=partials, out_scale=out_scale, out_shift=out_shift, residual=added, residual_pitch=residual_pitch,
        residual_scale=residual_scale, residual_shift=residual_shift, rows=rows, H=height, W=width, HO=out_height,
        WO=out_width, C=channels, K=outputs, GEOMETRY=geometry, R=kernel[0], S=kernel[1], ACT=x.act,
        OUT_ACT=epilogue.act, EVEN_C=channels % config.BLOCK_K == 0, ALIGN_C=align(channels, x_pitch),
        ALIGN_K=align(outputs, out_pitch, residual_pitch), WIDE=is_wide(raw, out, added), BLOCK_M=config.BLOCK_M,
        BLOCK_N=config.BLOCK_N, BLOCK_K=config.BLOCK_K, num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    if epilogue.stats is not None:
        merge(partials, epilogue.stats, config.BLOCK_M, rows)
    return out
