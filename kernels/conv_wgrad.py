"""Convolution weight gradient: dW[k, r, s, c] = sum over output pixels of g[pixel, k] * a[pixel at tap (r, s), c].

Reads grad and, where the gradient is pending, the convolution's raw output (N*HO*WO*K values each, once per tile of C
and tap), x (N*H*W*C, once per tile of K and tap); both pending forms are applied between load and product. The pixels
are split among programs, each of which writes its share as float32: partials [splits, K*R*S*C], summed in a fixed order
by a second kernel, which writes dW in the weight's dtype.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .device import begin, vector
from .gradients import activated, pending_gradient
from .launch import SIZES, Prepared, arch_of, prepare, product_precision
from .layout import Form, align, aligned, form, form_of, is_wide, offsets, partials_form, pitch_or_zero
from .operands import Activation, Geometry, LazyGrad, LazyMap
from .reduce import merge
from .tiles import Arch, ConvConfig, ConvSize, cdiv, check, wgrad_config

PROGRAMS = 512  # about two waves of the largest GPUs; a constant, so that results do not depend on the device


@triton.jit(do_not_specialize=SIZES)
def conv_wgrad_kernel(
    grad, raw, p, q, r, x, scale, shift, out, grad_pitch, raw_pitch, x_pitch,
    rows, chunk, H, W, HO, WO, C, K, GEOMETRY: tl.constexpr, R: tl.constexpr, S: tl.constexpr, ACT: tl.constexpr,
    ALIGN_C: tl.constexpr, ALIGN_K: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """Program (i, split, group): one tile of dW at one tap, from ``chunk`` pixels. C and K are those of one group."""
    begin(DEPENDENT)
    STRIDE_H: tl.constexpr = GEOMETRY.stride[0]
    STRIDE_W: tl.constexpr = GEOMETRY.stride[1]
    PAD_H: tl.constexpr = GEOMETRY.padding[0]
    PAD_W: tl.constexpr = GEOMETRY.padding[1]
    POINTWISE: tl.constexpr = R * S * STRIDE_H * STRIDE_W == 1 and PAD_H + PAD_W == 0
    C = aligned(C, ALIGN_C)
    K = aligned(K, ALIGN_K)
    # taps run fastest: programs side by side read the same pixels
    tap = tl.program_id(0) % (R * S)
    tile = tl.program_id(0) // (R * S)
    tiles_m = tl.cdiv(C, BLOCK_M)
    c = tile % tiles_m * BLOCK_M + tl.arange(0, BLOCK_M)
    k = tile // tiles_m * BLOCK_N + tl.arange(0, BLOCK_N)
    in_k, in_c = k < K, c < C
    first_k = tl.program_id(2) * K
    first_c = tl.program_id(2) * C
    ps, qs = vector(p, first_k + k, in_k, 1.0), vector(q, first_k + k, in_k, 0.0)
    rs = vector(r, first_k + k, in_k, 0.0)
    scales, shifts = vector(scale, first_c + c, in_c, 1.0), vector(shift, first_c + c, in_c, 0.0)
    dh = tap // S * GEOMETRY.dilation[0] - PAD_H
    dw = tap % S * GEOMETRY.dilation[1] - PAD_W
    first = tl.program_id(1) * chunk
    last = tl.minimum(first + chunk, rows)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(first, last, BLOCK_K):
        m = start + tl.arange(0, BLOCK_K)
        valid = m < last
        g_mask = valid[:, None] & in_k[None, :]
        g = pending_gradient(
            grad, raw, p, ps, qs, rs, m, first_k + k, valid, g_mask, grad_pitch, raw_pitch, ALIGN_K, WIDE
        )
        pixel, inside = m, valid
        if not POINTWISE:
            h = m // WO % HO * STRIDE_H + dh
            w = m % WO * STRIDE_W + dw
            pixel = (m // WO // HO * H + h) * W + w
            inside = valid & (h >= 0) & (h < H) & (w >= 0) & (w < W)
        a_mask = inside[:, None] & in_c[None, :]
        a = tl.load(x + offsets(pixel, x_pitch, first_c + c, ALIGN_C, WIDE), mask=a_mask, other=0.0)
        a = activated(a, scale, scales, shifts, inside, ACT)
        acc = tl.dot(tl.trans(a), g, acc, input_precision=PRECISION)
    size = tl.num_programs(2).to(tl.int64) * K * C * (R * S)
    at = ((first_k + k) * (R * S) + tap)[None, :] * C + c[:, None]
    tl.store(out + tl.program_id(1) * size + at, acc.to(out.dtype.element_ty), mask=in_c[:, None] & in_k[None, :])


@prepare
def _wgrad(
    grad: Form,
    raw: Form | None,
    coeff: Form | None,
    x: Form,
    scale_shift: Form | None,
    flat: Form,
    weight: tuple[int, ...],
    geometry: Geometry,
    act: Activation,
    config: ConvConfig | None,
    precision: str,
    arch: Arch,
) -> tuple[Prepared, Form | None]:
    """``flat``: the result as ``[1, values]``, which is of the shape ``weight``. The launch, and the form of its partials: None where
    the pixels are not split."""
    all_outputs, channels, *kernel = weight
    outputs, rows, taps = all_outputs // geometry.groups, grad.rows, kernel[0] * kernel[1]
    if config is None:
        config = wgrad_config(ConvSize(rows, channels, outputs, taps, x.dtype.itemsize, raw is not None), arch)
    check("wgrad", taps, arch, config)
    tiles = cdiv(channels, config.BLOCK_M) * cdiv(outputs, config.BLOCK_N) * taps
    # a split has at least 8 steps, or its share of partials costs more than it brings
    splits = max(1, min(PROGRAMS // (tiles * geometry.groups), cdiv(rows, 8 * config.BLOCK_K)))
    chunk = cdiv(cdiv(rows, splits), config.BLOCK_K) * config.BLOCK_K
    splits = cdiv(rows, chunk)
    partials = partials_form(1, splits, flat.shape[1], x) if splits > 1 else None
    grad_pitch, raw_pitch, x_pitch = grad.pitch, pitch_or_zero(raw), x.pitch
    launch = Prepared(
        conv_wgrad_kernel, (tiles, splits, geometry.groups), arch,
        {
            "grad": grad, "raw": raw, "p q r": coeff, "x": x, "scale shift": scale_shift,
            "out": flat if partials is None else partials,
        },
        grad_pitch=grad_pitch, raw_pitch=raw_pitch, x_pitch=x_pitch, rows=rows, chunk=chunk, H=x.shape[2], W=x.shape[3],
        HO=grad.shape[2], WO=grad.shape[3], C=channels, K=outputs, GEOMETRY=geometry, R=kernel[0], S=kernel[1], ACT=act,
        ALIGN_C=align(channels, x_pitch), ALIGN_K=align(outputs, grad_pitch, raw_pitch), WIDE=is_wide(grad, raw, x),
        PRECISION=precision,
        BLOCK_M=config.BLOCK_M, BLOCK_N=config.BLOCK_N, BLOCK_K=config.BLOCK_K, num_warps=config.num_warps,
        num_stages=config.num_stages, registers=config.registers,
    )  # fmt: skip
    return launch, partials


def conv_wgrad(
    grad: LazyGrad, x: LazyMap, weight: Tensor, geometry: Geometry, config: ConvConfig | None = None
) -> Tensor:
    """The gradient of ``weight``, in its shape and dtype, channels_last, in tiles of ``config`` (default:
    :func:`~.tiles.wgrad_config`). ValueError for a tile that is not allowed."""
    below, raw = x.raw, None if grad.coeff is None else grad.raw
    dw = torch.empty_like(weight, memory_format=torch.channels_last)
    flat = dw.permute(0, 2, 3, 1).view(1, -1)
    launch, partial = _wgrad(
        form_of(grad.grad), form(raw), form(grad.coeff), form_of(below), form(x.scale_shift), form_of(flat),
        weight.shape,
        geometry, x.act, config, product_precision(x.raw.dtype), arch_of(below.device),
    )  # fmt: skip
    partials = flat if partial is None else partial.new()
    launch(grad.grad, raw, grad.coeff, below, x.scale_shift, partials)
    if partial is not None:
        merge(partials, flat)
    return dw
