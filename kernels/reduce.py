"""Merges of per-tile partial results, in a fixed order: the second half of every reduction over a map's rows.

Reads ``partials [parts, tiles, C]`` float32 (parts * tiles * C * 4 bytes), writes ``out [parts, C]``: the sums over the
tiles, or with ``tile_rows`` the (mean, M2) of all rows by Chan's formula from those of each tile. Many tiles are merged
in two levels, the first of which writes partials of the same form; the last level of what only one C-sized kernel reads
is left to that kernel (:class:`Reduction`). No atomics: the order depends on the sizes alone.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .device import begin, merge_moments, moments_of_rows
from .launch import SIZES, Prepared, arch_of, prepare
from .layout import Form, form_of, partials_form
from .tiles import Arch, block, cdiv, next_power_of_2

PROGRAMS = 256  # about as many as leave no GPU idle
ONE_LEVEL = 1024  # tiles that one program merges in a row; more are split among programs first
TILE = 4096  # values that a program has in flight: what a merge costs is the latency of its loads, one tile after the other


@triton.jit
def merged_moments(
    partials, stride, C, c, inside, first, last, tile_rows, rows, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr
):
    """The (mean, M2) of channels ``c`` over the tiles from ``first`` to ``last``: in each lane those of every BLOCK_T-th
    tile, then those of the lanes."""
    count = tl.zeros((BLOCK_T, 1), tl.float32)
    mean = tl.zeros((BLOCK_T, BLOCK_C), tl.float32)
    m2 = tl.zeros((BLOCK_T, BLOCK_C), tl.float32)
    for start in range(first, last, BLOCK_T):
        tile = start + tl.arange(0, BLOCK_T)
        mask = (tile < last)[:, None] & inside[None, :]
        at = tile.to(tl.int64)[:, None] * C + c[None, :]
        # how many rows a tile has follows from its number: all are full but the last
        counts = tl.minimum(tile_rows, rows - tile * tile_rows).to(tl.float32)
        counts = tl.where(tile < last, counts, 0.0)[:, None]
        means = tl.load(partials + at, mask=mask, other=0.0)
        m2s = tl.load(partials + stride + at, mask=mask, other=0.0)
        count, mean, m2 = merge_moments(count, mean, m2, counts, means, m2s)
    _, mean_c, m2_c = moments_of_rows(tl.sum(count, 1), mean, m2)
    return mean_c, m2_c


@triton.jit
def merged_sum(partials, C, c, inside, first, last, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr):
    """The sum of channels ``c`` over the tiles from ``first`` to ``last``."""
    total = tl.zeros((BLOCK_T, BLOCK_C), tl.float32)
    for start in range(first, last, BLOCK_T):
        tile = start + tl.arange(0, BLOCK_T)
        mask = (tile < last)[:, None] & inside[None, :]
        total += tl.load(partials + tile.to(tl.int64)[:, None] * C + c[None, :], mask=mask, other=0.0)
    return tl.sum(total, 0)


@triton.jit(do_not_specialize=SIZES)
def merge_kernel(
    partials, out, tiles, C, chunk, partials_stride, out_stride, tile_rows, rows,
    MOMENTS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """Program (i, j, part) merges the j-th ``chunk`` of tiles, the i-th block of channels (of both parts, for
    moments)."""
    begin(DEPENDENT)
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    first = tl.program_id(1) * chunk
    last = tl.minimum(first + chunk, tiles)
    out += tl.program_id(1).to(tl.int64) * C
    inside = c < C
    if MOMENTS:
        mean, m2 = merged_moments(
            partials, partials_stride, C, c, inside, first, last, tile_rows, rows, BLOCK_T, BLOCK_C
        )
        tl.store(out + c, mean, mask=inside)
        tl.store(out + out_stride + c, m2, mask=inside)
    else:
        part = tl.program_id(2).to(tl.int64)
        total = merged_sum(partials + part * partials_stride, C, c, inside, first, last, BLOCK_T, BLOCK_C)
        tl.store(out + part * out_stride + c, total.to(out.dtype.element_ty), mask=inside)


class Reduction:
    """The two moments or sums of a map per channel that one C-sized kernel reads next, and merges from the partials.

    In the place of a tensor ``[2, C]`` wherever a primitive reduces; ``bn_coefficients`` takes it for the statistics,
    ``bn_backward`` for the sums, whose values it has afterwards.
    """

    def __init__(self, channels: int, device: torch.device) -> None:
        self.shape, self.device = (2, channels), device
        self.partials: Tensor | None = None
        self.tile_rows = self.rows = 0
        self.values: dict[torch.dtype, Tensor] = {}

    @property
    def reduced(self) -> Tensor:
        """The partials. ValueError where nothing has been reduced yet."""
        if self.partials is None:
            raise ValueError("a reduction is read before anything was reduced into it")
        return self.partials

    def __getitem__(self, row: int) -> Tensor:
        return self.values[torch.float32][row]

    def as_gradient(self, row: int, dtype: torch.dtype) -> Tensor:
        """A row of the sums in the dtype of a parameter."""
        return self.values[dtype][row] if dtype in self.values else self[row].to(dtype)


class _Merge(NamedTuple):
    """The launches of a merge: ``first`` into ``level``, where there are two levels, with the tiles' rows behind it; then ``last``, which
    is not there where that is left to another kernel."""

    first: Prepared | None
    level: Form | None
    tile_rows: int
    last: Prepared | None


@prepare
def _merges(partials: Form, out: Form | None, tile_rows: int, rows: int, arch: Arch) -> _Merge:
    first = level = None
    parts, tiles, channels = partials.shape
    if tiles > ONE_LEVEL:
        chunk = next_power_of_2(math.isqrt(tiles))
        level = partials_form(parts, cdiv(tiles, chunk), channels, partials)
        first = _launch(partials, level, level.shape[1], chunk, tile_rows, rows, arch)
        tile_rows *= chunk
    merged = partials if level is None else level
    last = None if out is None else _launch(merged, out, 1, merged.shape[1], tile_rows, rows, arch)
    return _Merge(first, level, tile_rows, last)


def merge(partials: Tensor, out: Tensor | Reduction, tile_rows: int = 0, rows: int = 0) -> None:
    """``out [parts, C]`` from ``partials [parts, tiles, C]`` (each part contiguous): sums, or with the tiles'
    ``tile_rows`` and the map's ``rows`` the two moments."""
    left = isinstance(out, Reduction)
    merges = _merges(form_of(partials), None if left else form_of(out), tile_rows, rows, arch_of(partials.device))
    if merges.first is not None and merges.level is not None:
        level = merges.level.new()
        merges.first(partials, level)
        partials = level
    if left:
        out.partials, out.tile_rows, out.rows = partials, merges.tile_rows, rows
    elif merges.last is not None:
        merges.last(partials, out)


def merge_blocks(tiles: int, channels: int) -> tuple[int, int]:
    """``(BLOCK_T, BLOCK_C)``: few tiles of many columns (a weight's gradient) stream, many tiles of few channels share
    out the channels."""
    block_c = block(channels // PROGRAMS, 32, 128)
    return block(tiles, 1, TILE // block_c), block_c


def merge_warps(block_t: int, block_c: int) -> int:
    """16 values a thread."""
    return max(1, min(8, block_t * block_c // 512))


def _launch(partials: Form, out: Form, chunks: int, chunk: int, tile_rows: int, rows: int, arch: Arch) -> Prepared:
    parts, tiles, channels = partials.shape
    block_t, block_c = merge_blocks(chunk, channels)
    return Prepared(
        merge_kernel, (cdiv(channels, block_c), chunks, 1 if tile_rows else parts), arch,
        {"partials": partials, "out": out},
        tiles=tiles, C=channels, chunk=chunk, partials_stride=partials.stride[0], out_stride=out.stride[0],
        tile_rows=tile_rows, rows=rows, MOMENTS=tile_rows > 0, BLOCK_T=block_t, BLOCK_C=block_c,
        num_warps=merge_warps(block_t, block_c),
    )  # fmt: skip
