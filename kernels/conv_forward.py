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

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .activations import activate
from .device import as_stored, begin, epilogue, normalize, store_moments, vector
from .launch import SIZES, Prepared, arch_of, prepare, product_precision
from .layout import Form, align, aligned, form, form_of, is_wide, map_form, offsets, partials_form, pitch_or_zero
from .operands import Activation, Epilogue, Geometry, LazyMap
from .reduce import merge
from .tiles import Arch, ConvConfig, ConvSize, cdiv, check, forward_config


@triton.jit(do_not_specialize=SIZES)
def conv_forward_kernel(
    x, scale, shift, weight, bias, out, partials, out_scale, out_shift, residual, residual_scale, residual_shift,
    x_pitch, out_pitch, residual_pitch,
    rows, H, W, HO, WO, C, K, GEOMETRY: tl.constexpr, R: tl.constexpr, S: tl.constexpr, ACT: tl.constexpr,
    OUT_ACT: tl.constexpr, EVEN_C: tl.constexpr, ALIGN_C: tl.constexpr, ALIGN_K: tl.constexpr, WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """Program (i, group): one tile of out; neighbours share their rows of x. C and K are those of one group."""
    begin(DEPENDENT)
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
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    n += first_n
    mask = (m < rows)[:, None] & in_n[None, :]
    other = None
    if residual is not None:
        other = tl.load(residual + offsets(m, residual_pitch, n, ALIGN_K, WIDE), mask=mask, other=0.0)
    acc = epilogue(acc, other, n, in_n, bias, out_scale, out_shift, residual_scale, residual_shift, OUT_ACT)
    stored = acc.to(out.dtype.element_ty)
    at = offsets(m, out_pitch, n, ALIGN_K, WIDE)
    tl.store(out + at, stored, mask=mask)
    if partials is not None:
        stored = as_stored(out + at, stored, rows < 0)
        tiles, width = tl.cdiv(rows, BLOCK_M), K * tl.num_programs(1)
        left = rows - tile_m * BLOCK_M
        # all tiles but the last one spare the masks
        if left < BLOCK_M:
            store_moments(partials, tile_m, tiles, n, in_n, width, stored, left, False)
        else:
            store_moments(partials, tile_m, tiles, n, in_n, width, stored, left, True)


class _Forward(NamedTuple):
    """A launch with the forms of what it writes; partials (None: nothing is reduced) are each of ``tile_rows`` rows."""

    launch: Prepared
    out: Form
    partials: Form | None
    rows: int
    tile_rows: int


@prepare
def _forward(
    x: Form,
    scale_shift: Form | None,
    weight: Form,
    bias: Form | None,
    given: Form | None,
    reduces: bool,
    out_scale_shift: Form | None,
    residual: Form | None,
    residual_scale_shift: Form | None,
    geometry: Geometry,
    act: Activation,
    out_act: Activation,
    config: ConvConfig | None,
    precision: str,
    arch: Arch,
) -> _Forward:
    """``given``: the map that is written into, None for one of its own."""
    batch, _, height, width = x.shape
    all_outputs, channels, *kernel = weight.shape
    out_height, out_width = (
        (size + 2 * geometry.padding[i] - geometry.dilation[i] * (kernel[i] - 1) - 1) // geometry.stride[i] + 1
        for i, size in enumerate((height, width))
    )
    out = map_form((batch, all_outputs, out_height, out_width), x) if given is None else given
    outputs, rows, taps = all_outputs // geometry.groups, out.rows, kernel[0] * kernel[1]
    if config is None:
        config = forward_config(ConvSize(rows, channels, outputs, taps, x.dtype.itemsize), arch)
    check("forward", taps, arch, config)
    tiles = cdiv(rows, config.BLOCK_M)
    partials = partials_form(2, tiles, all_outputs, x) if reduces else None
    x_pitch, out_pitch, residual_pitch = x.pitch, out.pitch, pitch_or_zero(residual)
    launch = Prepared(
        conv_forward_kernel, (tiles * cdiv(outputs, config.BLOCK_N), geometry.groups), arch,
        {
            "x": x, "scale shift": scale_shift, "weight": weight, "bias": bias, "out": out, "partials": partials,
            "out_scale out_shift": out_scale_shift, "residual": residual,
            "residual_scale residual_shift": residual_scale_shift,
        },
        x_pitch=x_pitch, out_pitch=out_pitch, residual_pitch=residual_pitch, rows=rows, H=height, W=width,
        HO=out_height,
        WO=out_width, C=channels, K=outputs, GEOMETRY=geometry, R=kernel[0], S=kernel[1], ACT=act, OUT_ACT=out_act,
        EVEN_C=channels % config.BLOCK_K == 0, ALIGN_C=align(channels, x_pitch),
        ALIGN_K=align(outputs, out_pitch, residual_pitch), WIDE=is_wide(x, out, residual), PRECISION=precision,
        BLOCK_M=config.BLOCK_M,
        BLOCK_N=config.BLOCK_N, BLOCK_K=config.BLOCK_K, num_warps=config.num_warps, num_stages=config.num_stages,
        registers=config.registers,
    )  # fmt: skip
    return _Forward(launch, out, partials, rows, config.BLOCK_M)


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
    raw, out, stats, residual = x.raw, epilogue.out, epilogue.stats, epilogue.residual
    added, added_scale_shift = (None, None) if residual is None else (residual.raw, residual.scale_shift)
    weight = weight.contiguous(memory_format=torch.channels_last)
    run = _forward(
        form_of(raw), form(x.scale_shift), form_of(weight), form(bias), form(out), stats is not None,
        form(epilogue.scale_shift), form(added), form(added_scale_shift), geometry, x.act, epilogue.act, config,
        product_precision(x.raw.dtype), arch_of(raw.device),
    )  # fmt: skip
    if out is None:
        out = run.out.new()
    partials = None if run.partials is None else run.partials.new()
    run.launch(raw, x.scale_shift, weight, bias, out, partials, epilogue.scale_shift, added, added_scale_shift)
    if partials is not None and stats is not None:
        merge(partials, stats, run.tile_rows, run.rows)
    return out
