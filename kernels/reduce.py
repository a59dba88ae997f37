"""Merges of per-tile partial results, in a fixed order: the second half of every reduction over a map's rows.

Reads ``partials [parts, tiles, C]`` float32 (parts * tiles * C * 4 bytes), writes ``out [parts, C]``: the sums over the
tiles, or with ``tile_rows`` the (mean, M2) of all rows by Chan's formula from those of each tile. Many tiles are merged
in two levels, the first of which writes partials of the same form. No atomics: the order depends on the sizes alone.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .helpers import block, launch, merge_moments, moments_of_rows

BLOCK_TILES = 32
PROGRAMS = 256  # about as many as leave no GPU idle
ONE_LEVEL = 512  # tiles that one program merges in a row; more are split among programs first


@triton.jit
def merge_kernel(
    partials, out, tiles, C, chunk, partials_stride, out_stride, tile_rows, rows,
    MOMENTS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Program (i, j, part) merges the j-th ``chunk`` of tiles, the i-th block of channels (of both parts, for
    moments)."""
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    first = tl.program_id(1) * chunk
    last = tl.minimum(first + chunk, tiles)
    out += tl.program_id(1).to(tl.int64) * C
    inside = c < C
    if MOMENTS:
        count = 0.0
        mean = tl.zeros((BLOCK_C,), tl.float32)
        m2 = tl.zeros((BLOCK_C,), tl.float32)
        for start in range(first, last, BLOCK_T):
            tile = start + tl.arange(0, BLOCK_T)
            mask = (tile < last)[:, None] & inside[None, :]
            at = tile.to(tl.int64)[:, None] * C + c[None, :]
            # how many rows a tile has follows from its number: all are full but the last
            counts = tl.minimum(tile_rows, rows - tile * tile_rows).to(tl.float32)
            counts = tl.where(tile < last, counts, 0.0)
            means = tl.load(partials + at, mask=mask, other=0.0)
            m2s = tl.load(partials + partials_stride + at, mask=mask, other=0.0)
            count_b, mean_b, m2_b = moments_of_rows(counts, means, m2s)
            count, mean, m2 = merge_moments(count, mean, m2, count_b, mean_b, m2_b)
        tl.store(out + c, mean, mask=inside)
        tl.store(out + out_stride + c, m2, mask=inside)
    else:
        part = tl.program_id(2).to(tl.int64)
        total = tl.zeros((BLOCK_T, BLOCK_C), tl.float32)
        for start in range(first, last, BLOCK_T):
            tile = start + tl.arange(0, BLOCK_T)
            mask = (tile < last)[:, None] & inside[None, :]
            at = tile.to(tl.int64)[:, None] * C + c[None, :]
            total += tl.load(partials + part * partials_stride + at, mask=mask, other=0.0)
        tl.store(out + part * out_stride + c, tl.sum(total, 0).to(out.dtype.element_ty), mask=inside)


def merge(partials: Tensor, out: Tensor, tile_rows: int = 0, rows: int = 0) -> None:
    """``out [parts, C]`` from ``partials [parts, tiles, C]`` (each part contiguous): sums, or with the tiles'
    ``tile_rows`` and the map's ``rows`` the two moments."""
    parts, tiles, channels = partials.shape
    if tiles > ONE_LEVEL:
        chunk = triton.cdiv(math.isqrt(tiles), BLOCK_TILES) * BLOCK_TILES
        level = torch.empty(parts, triton.cdiv(tiles, chunk), channels, dtype=torch.float32, device=partials.device)
        _merge(partials, level, level.shape[1], chunk, tile_rows, rows)
        partials, tile_rows = level, tile_rows * chunk
    _merge(partials, out, 1, partials.shape[1], tile_rows, rows)


def _merge(partials: Tensor, out: Tensor, chunks: int, chunk: int, tile_rows: int, rows: int) -> None:
    parts, tiles, channels = partials.shape
    # few tiles of many columns (a weight's gradient) stream; many tiles of few channels share out the channels
    block_t = block(tiles, 1, BLOCK_TILES)
    block_c = block(channels // PROGRAMS, 32, 4096 // block_t)
    launch(
        merge_kernel, (triton.cdiv(channels, block_c), chunks, 1 if tile_rows else parts), out.device,
        partials=partials, out=out, tiles=tiles, C=channels, chunk=chunk, partials_stride=partials.stride(0),
        out_stride=out.stride(0), tile_rows=tile_rows, rows=rows, MOMENTS=tile_rows > 0, BLOCK_T=block_t,
        BLOCK_C=block_c, num_warps=4,
    )  # fmt: skip
