"""Convolution input gradient as an implicit GEMM by gather: rows are input pixels, K runs over (output channel, tap).

Reads grad and, where the gradient is pending, the convolution's raw output (N*HO*WO*K values each), the weight
(K*C*R*S), and for the epilogue x and base (N*H*W*C each); writes dx (N*H*W*C) into a map or channel slice, and with
sums [2, tiles, C] float32 partials. The pending gradient p * grad + q * raw + r is formed between load and product. The
epilogue rebuilds the activation's mask from x, reduces sum dz and sum dz * xhat, and adds scale * dz to what is there.

A strided convolution splits the input pixels by their residue (h mod stride, w mod stride): within a residue every
pixel meets the same taps, so that no product with a zero is computed.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .activations import gradient
from .device import begin, normalize, vector
from .gradients import pending_gradient, store_gradient
from .launch import SIZES, Prepared, arch_of, prepare, product_precision
from .layout import (
    Form,
    align,
    aligned,
    check_scaled,
    empty_map,
    form,
    form_of,
    is_wide,
    mean_invstd_form,
    offsets,
    partials_form,
    pitch_or_zero,
)
from .operands import Activation, Geometry, GradTarget, LazyGrad, LazyMap
from .reduce import merge
from .tiles import Arch, ConvConfig, ConvSize, cdiv, check, dgrad_config


@triton.jit
def first_tap(phase, EXTENT: tl.constexpr, STRIDE: tl.constexpr, DILATION: tl.constexpr):
    """The first tap t for which ``phase - t * DILATION`` is a multiple of STRIDE; EXTENT where there is none."""
    first = EXTENT
    for i in tl.static_range(EXTENT):
        # -t * DILATION, made positive for the remainder
        first = tl.where((phase + (EXTENT - 1 - i) * DILATION * (STRIDE - 1)) % STRIDE == 0, EXTENT - 1 - i, first)
    return first


@triton.jit(do_not_specialize=SIZES)
def conv_dgrad_kernel(
    grad, raw, p, q, r, weight, x, scale, shift, mean, invstd, base, dx, partials,
    grad_pitch, raw_pitch, x_pitch, base_pitch, dx_pitch,
    N, H, W, HO, WO, C, K, GEOMETRY: tl.constexpr, R: tl.constexpr, S: tl.constexpr, STEP_R: tl.constexpr,
    STEP_S: tl.constexpr, ACT: tl.constexpr, SCALED: tl.constexpr, ALIGN_C: tl.constexpr, ALIGN_K: tl.constexpr,
    WIDE: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    DEPENDENT: tl.constexpr,
):  # fmt: skip
    """Program (i, group, residue): one tile of dx. C and K are those of a group; a residue's taps are STEP_R, STEP_S
    apart."""
    begin(DEPENDENT)
    STRIDE_H: tl.constexpr = GEOMETRY.stride[0]
    STRIDE_W: tl.constexpr = GEOMETRY.stride[1]
    C = aligned(C, ALIGN_C)
    K = aligned(K, ALIGN_K)
    tiles_n = tl.cdiv(C, BLOCK_N)
    tile_m = tl.program_id(0) // tiles_n
    c = tl.program_id(0) % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)
    in_c = c < C
    first_k = tl.program_id(1) * K
    # the pixels of this residue are a map of HR x WR
    top = tl.program_id(2) // STRIDE_W
    left = tl.program_id(2) % STRIDE_W
    HR = (H - top + STRIDE_H - 1) // STRIDE_H
    WR = (W - left + STRIDE_W - 1) // STRIDE_W
    m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    valid = m < N * HR * WR
    i_w = m % tl.maximum(WR, 1)
    i_h = m // tl.maximum(WR, 1) % tl.maximum(HR, 1)
    i_n = m // tl.maximum(HR * WR, 1)
    row = (i_n * H + i_h * STRIDE_H + top) * W + i_w * STRIDE_W + left
    pixel = (i_n * HO + i_h) * WO + i_w
    top += GEOMETRY.padding[0]
    left += GEOMETRY.padding[1]
    first_r = first_tap(top, R, STRIDE_H, GEOMETRY.dilation[0])
    first_s = first_tap(left, S, STRIDE_W, GEOMETRY.dilation[1])
    taps_s = tl.cdiv(S - first_s, STEP_S)
    taps = tl.cdiv(R - first_r, STEP_R) * taps_s
    steps = tl.cdiv(K, BLOCK_K) * taps
    # a pipelined loop computes addresses ahead, also those of no step: there is no division by a residue's zero taps
    taps, taps_s = tl.maximum(taps, 1), tl.maximum(taps_s, 1)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for i in range(steps):
        tap = i % taps
        k = i // taps * BLOCK_K + tl.arange(0, BLOCK_K)
        in_k = k < K
        tap_r = first_r + tap // taps_s * STEP_R
        tap_s = first_s + tap % taps_s * STEP_S
        # both divisions are exact: that is what chose the taps
        dh = (top - tap_r * GEOMETRY.dilation[0]) // STRIDE_H
        dw = (left - tap_s * GEOMETRY.dilation[1]) // STRIDE_W
        inside = valid & (i_h + dh >= 0) & (i_h + dh < HO) & (i_w + dw >= 0) & (i_w + dw < WO)
        mask = inside[:, None] & in_k[None, :]
        from_pixel = pixel + (dh * WO + dw)
        ks = first_k + k
        ps, qs, rs = vector(p, ks, in_k, 1.0), vector(q, ks, in_k, 0.0), vector(r, ks, in_k, 0.0)
        g = pending_gradient(
            grad, raw, p, ps, qs, rs, from_pixel, ks, inside, mask, grad_pitch, raw_pitch, ALIGN_K, WIDE
        )
        b_at = (ks * (R * S) + tap_r * S + tap_s)[:, None] * C + c[None, :]
        b = tl.load(weight + b_at, mask=in_k[:, None] & in_c[None, :], other=0.0)
        acc = tl.dot(g, b, acc, input_precision=PRECISION)
    c += tl.program_id(1) * C
    mask = valid[:, None] & in_c[None, :]
    scales = vector(scale, c, in_c, 1.0)
    if x is not None:
        values = tl.load(x + offsets(row, x_pitch, c, ALIGN_C, WIDE), mask=mask, other=0.0).to(tl.float32)
        acc = gradient(acc, normalize(values, scales, vector(shift, c, in_c, 0.0)), ACT)
        if partials is not None:
            acc = tl.where(valid[:, None], acc, 0.0)
            xhat = (values - vector(mean, c, in_c, 0.0)[None, :]) * vector(invstd, c, in_c, 0.0)[None, :]
            tiles = tl.num_programs(0) // tiles_n
            part = tl.program_id(2) * tiles + tile_m
            parts = tl.num_programs(2) * tiles
            all_c = C * tl.num_programs(1)
            tl.store(partials + part * all_c + c, tl.sum(acc, 0), mask=in_c)
            tl.store(partials + (parts + part) * all_c + c, tl.sum(acc * xhat, 0), mask=in_c)
    store_gradient(dx, base, acc, scales, row, c, mask, dx_pitch, base_pitch, SCALED, ALIGN_C, WIDE)


@prepare
def _dgrad(
    grad: Form,
    raw: Form | None,
    coeff: Form | None,
    weight: Form,
    x: Form,
    scale_shift: Form | None,
    mean_invstd: Form | None,
    base: Form | None,
    dx: Form,
    reduces: bool,
    scaled: bool,
    geometry: Geometry,
    act: Activation,
    config: ConvConfig | None,
    precision: str,
    arch: Arch,
) -> tuple[Prepared, Form | None, bool]:
    """The launch, the form of its partials (None: nothing is reduced), and whether it reads x. ValueError where x lacks what is asked for
    of it."""
    check_scaled(scale_shift, scaled)
    batch, all_channels, height, width = x.shape
    all_outputs, channels, *kernel = weight.shape
    outputs, residues = all_outputs // geometry.groups, geometry.stride[0] * geometry.stride[1]
    # residue (0, 0) has the most pixels
    rows = batch * cdiv(height, geometry.stride[0]) * cdiv(width, geometry.stride[1])
    taps = kernel[0] * kernel[1] * residues
    if config is None:
        config = dgrad_config(ConvSize(rows, channels, outputs, taps, x.dtype.itemsize, raw is not None), arch)
    check("dgrad", taps, arch, config)
    tiles = cdiv(rows, config.BLOCK_M)
    partials = partials_form(2, residues * tiles, all_channels, x) if reduces else None
    # without a mask and sums the epilogue needs nothing of x
    operand = x if act.kind != "none" or reduces else None
    grad_pitch, raw_pitch, x_pitch, base_pitch, dx_pitch = map(pitch_or_zero, (grad, raw, operand, base, dx))
    launch = Prepared(
        conv_dgrad_kernel, (tiles * cdiv(channels, config.BLOCK_N), geometry.groups, residues), arch,
        {
            "grad": grad, "raw": raw, "p q r": coeff, "weight": weight, "x": operand, "scale shift": scale_shift,
            "mean invstd": mean_invstd_form(mean_invstd, reduces), "base": base, "dx": dx, "partials": partials,
        },
        grad_pitch=grad_pitch, raw_pitch=raw_pitch, x_pitch=x_pitch, base_pitch=base_pitch, dx_pitch=dx_pitch, N=batch,
        H=height, W=width, HO=grad.shape[2], WO=grad.shape[3], C=channels, K=outputs, GEOMETRY=geometry, R=kernel[0],
        S=kernel[1], STEP_R=_tap_step(geometry, 0), STEP_S=_tap_step(geometry, 1), ACT=act, SCALED=scaled,
        ALIGN_C=align(channels, x_pitch, base_pitch, dx_pitch), ALIGN_K=align(outputs, grad_pitch, raw_pitch),
        WIDE=is_wide(grad, raw, x, base, dx), PRECISION=precision, BLOCK_M=config.BLOCK_M, BLOCK_N=config.BLOCK_N,
        BLOCK_K=config.BLOCK_K,
        num_warps=config.num_warps, num_stages=config.num_stages, registers=config.registers,
    )  # fmt: skip
    return launch, partials, operand is not None


def _tap_step(geometry: Geometry, dimension: int) -> int:
    """The distance of the taps that an input pixel meets."""
    return geometry.stride[dimension] // math.gcd(geometry.stride[dimension], geometry.dilation[dimension])


def conv_dgrad(
    grad: LazyGrad,
    x: LazyMap,
    weight: Tensor,
    geometry: Geometry,
    target: GradTarget,
    config: ConvConfig | None = None,
) -> Tensor:
    """``dx = [base | dx if accumulate | 0] + (scale if scaled else 1) * dz`` and dz's sums, in tiles of ``config`` (default:
    :func:`~.tiles.dgrad_config`), with dz the gradient of x's ``scale * raw + shift``. ValueError for a tile that is not allowed, and
    where x lacks what sums or a scaled gradient need."""
    below, sums = x.raw, target.sums
    dx = empty_map(below) if target.dx is None else target.dx
    base = dx if target.accumulate else target.base
    raw = None if grad.coeff is None else grad.raw
    weight = weight.contiguous(memory_format=torch.channels_last)
    launch, partial, reads = _dgrad(
        form_of(grad.grad), form(raw), form(grad.coeff), form_of(weight), form_of(below), form(x.scale_shift),
        form(x.mean_invstd), form(base), form_of(dx), sums is not None, target.scaled, geometry, x.act, config,
        product_precision(x.raw.dtype), arch_of(below.device),
    )  # fmt: skip
    partials = None if partial is None else partial.new()
    launch(
        grad.grad, raw, grad.coeff, weight, below if reads else None, x.scale_shift,
        None if sums is None else x.mean_invstd,
        base, dx, partials,
    )  # fmt: skip
    if partials is not None and sums is not None:
        merge(partials, sums)
    return dx
