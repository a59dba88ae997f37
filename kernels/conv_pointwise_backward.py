"""Both gradients of a dense 1x1 convolution in one kernel: dx = g @ W and dW = g^T @ a, from one look at what both need.

Reads grad and, where the gradient is pending, the convolution's raw output (M*K values each, M pixels; once per tile of C, whose programs
run side by side, so that all but the first find it in L2), x (M*C), the weight (K*C, once per program), and base (M*C); writes dx (M*C).
Two kernels (conv_dgrad.py, conv_wgrad.py) read grad, raw and x twice. The pending gradient p * grad + q * raw + r is formed once a
step, for both products.

A program walks a chunk of pixels. It keeps its tile of dW for all K in registers, and writes it as float32: partials [splits, K*C], and
with sums [2, splits, C], merged in a fixed order. dx may be base: an element is read before it is written, by one program.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .activations import gradient
from .device import begin, normalize, store_partial, vector
from .gradients import activated, pending_gradient, store_gradient
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
from .operands import Activation, GradTarget, LazyGrad, LazyMap
from .reduce import merge
from .tiles import Arch, ConvConfig, ConvSize, backward_config, cdiv, check

PROGRAMS = 512  # about four waves of the largest GPUs, of one program a multiprocessor; a constant, as in conv_wgrad.py
LEAST_STEPS = 16  # of a split, or its share of partials costs more than it brings


@triton.jit(do_not_specialize=SIZES)
def conv_pointwise_backward_kernel(
    grad, raw, p, q, r, weight, x, scale, shift, mean, invstd, base, dx, out, partials,
    grad_pitch, raw_pitch, x_pitch, base_pitch, dx_pitch, rows, chunk, C, K, ACT: tl.constexpr, SCALED: tl.constexpr,
    ALIGN_C: tl.constexpr, ALIGN_K: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """Program (i, split): the i-th tile of columns of dx and of dW, from ``chunk`` pixels, BLOCK_M a step."""
    begin(DEPENDENT)
    C = aligned(C, ALIGN_C)
    K = aligned(K, ALIGN_K)
    c = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    in_c, in_k = c < C, k < K
    scales, shifts = vector(scale, c, in_c, 1.0), vector(shift, c, in_c, 0.0)
    means, invstds = vector(mean, c, in_c, 0.0), vector(invstd, c, in_c, 0.0)
    w = tl.load(weight + (k[:, None] * C + c[None, :]), mask=in_k[:, None] & in_c[None, :], other=0.0)
    split = tl.program_id(1)
    first = split * chunk
    last = tl.minimum(first + chunk, rows)
    dw = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    sum_dz = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    sum_dz_xhat = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(first, last, BLOCK_M):
        m = start + tl.arange(0, BLOCK_M)
        valid = m < last
        # loaded anew at each step: for so many outputs they would take the registers of a tenth of dW
        ps, qs, rs = vector(p, k, in_k, 1.0), vector(q, k, in_k, 0.0), vector(r, k, in_k, 0.0)
        g_mask = valid[:, None] & in_k[None, :]
        g = pending_gradient(grad, raw, p, ps, qs, rs, m, k, valid, g_mask, grad_pitch, raw_pitch, ALIGN_K, WIDE)
        mask = valid[:, None] & in_c[None, :]
        values = tl.load(x + offsets(m, x_pitch, c, ALIGN_C, WIDE), mask=mask, other=0.0)
        # g is the second operand of both products, so that it is stored once; the first one's rows are channels, 64 of which
        # fill a matrix instruction however few pixels a step has
        dz = tl.trans(tl.dot(tl.trans(w), tl.trans(g), input_precision=PRECISION))
        a = activated(values, scale, scales, shifts, valid, ACT)
        dw = tl.dot(tl.trans(a), g, dw, input_precision=PRECISION)
        values = values.to(tl.float32)
        dz = gradient(dz, normalize(values, scales, shifts), ACT)
        if partials is not None:
            dz = tl.where(valid[:, None], dz, 0.0)
            sum_dz += dz
            sum_dz_xhat += dz * ((values - means[None, :]) * invstds[None, :])
        store_gradient(dx, base, dz, scales, m, c, mask, dx_pitch, base_pitch, SCALED, ALIGN_C, WIDE)
    at = k[None, :] * C + c[:, None]
    tl.store(out + split.to(tl.int64) * K * C + at, dw.to(out.dtype.element_ty), mask=in_k[None, :] & in_c[:, None])
    if partials is not None:
        splits = tl.num_programs(1)
        store_partial(partials, 0, split, splits, c, C, tl.sum(sum_dz, 0))
        store_partial(partials, 1, split, splits, c, C, tl.sum(sum_dz_xhat, 0))


@prepare
def _backward(
    grad: Form,
    raw: Form | None,
    coeff: Form | None,
    weight: Form,
    x: Form,
    scale_shift: Form | None,
    mean_invstd: Form | None,
    base: Form | None,
    dx: Form,
    flat: Form,
    reduces: bool,
    scaled: bool,
    act: Activation,
    config: ConvConfig | None,
    precision: str,
    arch: Arch,
) -> tuple[Prepared, Form | None, Form | None]:
    """``flat``: the weight's gradient as ``[1, values]``. The launch, the form of its partials (None: the pixels are not split), and of
    those of the sums (None: nothing is reduced). ValueError for a tile that does not hold all outputs, and where x lacks what is asked for
    of it."""
    check_scaled(scale_shift, scaled)
    outputs, channels, *_ = weight.shape
    rows = x.rows
    if config is None:
        config = backward_config(ConvSize(rows, channels, outputs, 1, x.dtype.itemsize, raw is not None), arch)
    check("backward", 1, arch, config)
    if config.BLOCK_K < outputs:
        raise ValueError(f"a program of both gradients holds all {outputs} outputs, found a tile of {config}")
    tiles = cdiv(channels, config.BLOCK_N)
    splits = max(1, min(PROGRAMS // tiles, cdiv(rows, LEAST_STEPS * config.BLOCK_M)))
    # of no pixels at all there is one split too, which writes zeros
    chunk = max(1, cdiv(cdiv(rows, splits), config.BLOCK_M)) * config.BLOCK_M
    splits = max(1, cdiv(rows, chunk))
    partials = partials_form(1, splits, flat.shape[1], x) if splits > 1 else None
    sums = partials_form(2, splits, channels, x) if reduces else None
    grad_pitch, raw_pitch, x_pitch, base_pitch, dx_pitch = map(pitch_or_zero, (grad, raw, x, base, dx))
    launch = Prepared(
        conv_pointwise_backward_kernel, (tiles, splits), arch,
        {
            "grad": grad, "raw": raw, "p q r": coeff, "weight": weight, "x": x, "scale shift": scale_shift,
            "mean invstd": mean_invstd_form(mean_invstd, reduces), "base": base, "dx": dx,
            "out": flat if partials is None else partials, "partials": sums,
        },
        grad_pitch=grad_pitch, raw_pitch=raw_pitch, x_pitch=x_pitch, base_pitch=base_pitch, dx_pitch=dx_pitch,
        rows=rows, chunk=chunk, C=channels, K=outputs, ACT=act, SCALED=scaled,
        ALIGN_C=align(channels, x_pitch, base_pitch, dx_pitch), ALIGN_K=align(outputs, grad_pitch, raw_pitch),
        WIDE=is_wide(grad, raw, x, base, dx), PRECISION=precision, BLOCK_M=config.BLOCK_M, BLOCK_N=config.BLOCK_N,
        BLOCK_K=config.BLOCK_K, num_warps=config.num_warps, num_stages=config.num_stages, registers=config.registers,
    )  # fmt: skip
    return launch, partials, sums


def conv_pointwise_backward(
    grad: LazyGrad, x: LazyMap, weight: Tensor, target: GradTarget, config: ConvConfig | None = None
) -> tuple[Tensor, Tensor]:
    """``(dx, dW)`` of a 1x1 convolution of stride 1 without padding and groups, as :func:`~.conv_dgrad.conv_dgrad` and
    :func:`~.conv_wgrad.conv_wgrad` give them, in tiles of ``config`` (default: :func:`~.tiles.backward_config`). ValueError for a tile
    that is not allowed, and where x lacks what sums or a scaled gradient need."""
    below, sums = x.raw, target.sums
    dx = empty_map(below) if target.dx is None else target.dx
    base = dx if target.accumulate else target.base
    raw = None if grad.coeff is None else grad.raw
    dw = torch.empty_like(weight, memory_format=torch.channels_last)
    flat = dw.permute(0, 2, 3, 1).view(1, -1)
    weight = weight.contiguous(memory_format=torch.channels_last)
    launch, split, summed = _backward(
        form_of(grad.grad), form(raw), form(grad.coeff), form_of(weight), form_of(below), form(x.scale_shift),
        form(x.mean_invstd), form(base), form_of(dx), form_of(flat), sums is not None, target.scaled, x.act, config,
        product_precision(below.dtype), arch_of(below.device),
    )  # fmt: skip
    out, partials = flat if split is None else split.new(), None if summed is None else summed.new()
    launch(
        grad.grad, raw, grad.coeff, weight, below, x.scale_shift, None if sums is None else x.mean_invstd, base, dx,
        out, partials,
    )  # fmt: skip
    if split is not None:
        merge(out, flat)
    if partials is not None and sums is not None:
        merge(partials, sums)
    return dx, dw
