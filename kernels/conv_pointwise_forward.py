"""Convolution forward of a dense 1x1 of stride 1 as a product of matrices by tensor descriptors: for NVIDIA's GPUs from Hopper on, whose
copy engine (TMA) moves boxes between memory and shared memory, while threads compute.

Reads x (M*C values, M pixels), the weight (K*C, once per tile of rows, from L2), the residual (M*K); writes out (M*K): a map or channel
slice, whose pitch is the descriptor's stride, so that nothing is masked. Epilogue and partials of statistics as in conv_forward.py. x is
multiplied as it is: with something pending on it, operands go through registers, and the loop is no shorter than conv_forward.py's.

Programs are persistent: each computes every so many-th tile, one loop over the steps of all of its tiles, so that the loads of the next
tile are on their way while one is finished. Neighbouring tiles share their rows of x. As Triton's tutorial of persistent products does it
(https://triton-lang.org/main/getting-started/tutorials/09-persistent-matmul.html). What it costs: docs/descriptors.md.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .device import begin, epilogue, store_moments
from .launch import SIZES, Prepared, arch_of, prepare, product_precision
from .layout import Form, align, aligned, form, form_of, map_form, partials_form, pitch_or_zero
from .operands import Activation, Epilogue, Geometry, LazyMap
from .reduce import merge
from .tiles import (
    DESCRIPTOR_ALIGN,
    MOST_BOX,
    SPECIALIZED,
    Arch,
    ConvConfig,
    ConvSize,
    cdiv,
    check,
    described_bytes,
    is_described,
    is_since_hopper,
)


@triton.jit(do_not_specialize=(*SIZES, "steps"))
def conv_pointwise_forward_kernel(
    x, weight, bias, out, partials, out_scale, out_shift, residual, residual_scale, residual_shift,
    rows, steps, K, OUT_ACT: tl.constexpr, ALIGN_K: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr, WHOLE: tl.constexpr, SPECIALIZE: tl.constexpr,
    DEPENDENT: tl.constexpr,
):  # fmt: skip
    """Program i: every tile whose number is i modulo the number of programs. x, weight, out and residual are descriptors; WHOLE: all
    channels are one step, and then the residual is loaded ahead like the operands."""
    begin(DEPENDENT)
    K = aligned(K, ALIGN_K)
    tiles_m = tl.cdiv(rows, BLOCK_M)
    tiles_n = tl.cdiv(K, BLOCK_N)
    for tile in tl.range(
        tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0),
        num_stages=STAGES, flatten=not WHOLE, warp_specialize=SPECIALIZE,
    ):  # fmt: skip
        tile_m = tile // tiles_n
        first_m = tile_m * BLOCK_M
        first_n = tile % tiles_n * BLOCK_N
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        if WHOLE:
            acc = tl.dot(x.load([first_m, 0]), weight.load([first_n, 0]).T, acc, input_precision=PRECISION)
        else:
            for step in range(steps):
                a = x.load([first_m, step * BLOCK_K])
                b = weight.load([first_n, step * BLOCK_K])
                acc = tl.dot(a, b.T, acc, input_precision=PRECISION)
        n = first_n + tl.arange(0, BLOCK_N)
        in_n = n < K
        other = None
        if residual is not None:
            other = residual.load([first_m, first_n])
        acc = epilogue(acc, other, n, in_n, bias, out_scale, out_shift, residual_scale, residual_shift, OUT_ACT)
        stored = acc.to(out.dtype)
        out.store([first_m, first_n], stored)
        if partials is not None:
            store_moments(partials, tile_m, tiles_m, n, in_n, K, stored, rows - first_m, False)


class _Limit(threading.local):
    programs: int | None = None


_limit = _Limit()


@contextlib.contextmanager
def in_few_programs(programs: int) -> Iterator[None]:
    """In this thread so many programs at most, so that on a small map, too, one computes several tiles."""
    previous, _limit.programs = _limit.programs, programs
    try:
        yield
    finally:
        _limit.programs = previous


class _Forward(NamedTuple):
    """As conv_forward.py's."""

    launch: Prepared
    out: Form
    partials: Form | None
    rows: int
    tile_rows: int


@prepare
def _forward(
    x: Form,
    weight: Form,
    bias: Form | None,
    given: Form | None,
    reduces: bool,
    out_scale_shift: Form | None,
    residual: Form | None,
    residual_scale_shift: Form | None,
    geometry: Geometry,
    out_act: Activation,
    config: ConvConfig,
    limit: int | None,
    precision: str,
    arch: Arch,
) -> _Forward | None:
    """``given``: as conv_forward.py's. None for a form that has no descriptors, and for a GPU that has none."""
    batch, channels, height, width = x.shape
    outputs, _, *kernel = weight.shape
    size = ConvSize(x.rows, channels, outputs, kernel[0] * kernel[1], x.dtype.itemsize)
    pitches = x.pitch, outputs if given is None else given.pitch, pitch_or_zero(residual)
    interpreted = x.device.type == "cpu"
    if (
        not (interpreted or is_since_hopper(arch))
        or not is_described(size, pitches, geometry)
        or max(config.BLOCK_M, config.BLOCK_N, config.BLOCK_K) > MOST_BOX
    ):
        return None
    out = map_form((batch, outputs, height, width), x) if given is None else given
    check("forward", 1, arch, config)
    rows, tiles = x.rows, cdiv(x.rows, config.BLOCK_M)
    steps = cdiv(channels, config.BLOCK_K)
    partials = partials_form(2, tiles, outputs, x) if reduces else None
    programs = min(
        tiles * cdiv(outputs, config.BLOCK_N), limit or programs_of(config, size, residual is not None, arch)
    )
    # warps that finish tiles have too few registers for what is loaded ahead
    specialize = arch.family in SPECIALIZED and steps > 1
    launch = Prepared(
        conv_pointwise_forward_kernel, (programs,), arch,
        {
            "x": x, "weight": weight, "bias": bias, "out": out, "partials": partials,
            "out_scale out_shift": out_scale_shift, "residual": residual,
            "residual_scale residual_shift": residual_scale_shift,
        },
        {
            "x": (config.BLOCK_M, config.BLOCK_K), "weight": (config.BLOCK_N, config.BLOCK_K),
            "out": (config.BLOCK_M, config.BLOCK_N), "residual": (config.BLOCK_M, config.BLOCK_N),
        },
        rows=rows, steps=steps, K=outputs, OUT_ACT=out_act, ALIGN_K=align(outputs), PRECISION=precision,
        BLOCK_M=config.BLOCK_M, BLOCK_N=config.BLOCK_N, BLOCK_K=config.BLOCK_K, STAGES=config.num_stages,
        WHOLE=steps == 1, SPECIALIZE=specialize, num_warps=config.num_warps,
        num_stages=config.num_stages, registers=config.registers,
    )  # fmt: skip
    return _Forward(launch, out, partials, rows, config.BLOCK_M)


def programs_of(config: ConvConfig, size: ConvSize, has_residual: bool, arch: Arch) -> int:
    """One on each multiprocessor, or two where shared memory and registers hold them."""
    fits = 2 * described_bytes(config, size, has_residual) <= arch.shared
    two = fits and config.num_warps <= 4 and arch.family not in SPECIALIZED
    return arch.multiprocessors * (2 if two else 1)


def conv_pointwise_forward(
    x: LazyMap, weight: Tensor, bias: Tensor | None, geometry: Geometry, epilogue: Epilogue, config: ConvConfig
) -> Tensor | None:
    """The convolution of ``x`` as :func:`~.conv_forward.conv_forward` gives it, by descriptors, in tiles of ``config``; None, with nothing
    done, where descriptors cannot say it: another form than :func:`~.tiles.is_described`, something pending on x, an address that 16 bytes
    do not divide, an older GPU. ValueError for a tile that is not allowed."""
    raw, out, stats, residual = x.raw, epilogue.out, epilogue.stats, epilogue.residual
    added, added_scale_shift = (None, None) if residual is None else (residual.raw, residual.scale_shift)
    if x.scale_shift is not None or x.act.kind != "none":
        return None
    weight = weight.contiguous(memory_format=torch.channels_last)
    if any(t is not None and t.data_ptr() % DESCRIPTOR_ALIGN for t in (raw, weight, out, added)):
        return None
    run = _forward(
        form_of(raw), form_of(weight), form(bias), form(out), stats is not None, form(epilogue.scale_shift), form(added),
        form(added_scale_shift), geometry, epilogue.act, config, _limit.programs, product_precision(raw.dtype),
        arch_of(raw.device),
    )  # fmt: skip
    if run is None:
        return None
    if out is None:
        out = run.out.new()
    partials = None if run.partials is None else run.partials.new()
    run.launch(raw, weight, bias, out, partials, epilogue.scale_shift, added, added_scale_shift)
    if partials is not None and stats is not None:
        merge(partials, stats, run.tile_rows, run.rows)
    return out
