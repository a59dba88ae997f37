"""What passes over maps share: which rows and channels a program walks, on the device, and its tile and grid, on the host.

Program (i, j) walks the i-th chunk of rows, in tiles of BLOCK_M rows, of the j-th block of BLOCK_C channels.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from .layout import Form, aligned, partials_form
from .tiles import cdiv, pass_config

# ---- on the device ---------------------------------------------------------------------------------------------------


@triton.jit
def block_of_channels(C, ALIGN: tl.constexpr, BLOCK_C: tl.constexpr):
    """``C``, known to be a multiple of ALIGN, this program's channels, and which of them are there."""
    C = aligned(C, ALIGN)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    return C, c, c < C


@triton.jit
def chunk_of_rows(rows, chunk):
    """This program's first row, and the one behind its last."""
    first = tl.program_id(0) * chunk
    return first, tl.minimum(first + chunk, rows)


@triton.jit
def tile_of_rows(start, last, inside, BLOCK_M: tl.constexpr):
    """The rows of the tile at ``start``, and which of its values are there."""
    m = start + tl.arange(0, BLOCK_M)
    return m, (m < last)[:, None] & inside[None, :]


# ---- on the host -----------------------------------------------------------------------------------------------------

VALUES = 2048  # of a tile: 16 a thread, two 128-bit loads a map in 16-bit storage


class Pass(NamedTuple):
    """A pass over ``rows`` of ``channels``: its tile and grid."""

    rows: int
    channels: int
    chunk: int
    grid: tuple[int, int]
    BLOCK_M: int
    BLOCK_C: int
    num_warps: int

    def partials(self, parts: int, like: Form) -> Form | None:
        """The form of ``parts`` partial results per program and channel, None of none."""
        return partials_form(parts, self.grid[0], self.channels, like) if parts else None


def pass_over(rows: int, channels: int, values: int = VALUES) -> Pass:
    """The pass in tiles of so many ``values``."""
    config = pass_config(rows, channels, values)
    grid = cdiv(rows, config.chunk), cdiv(channels, config.BLOCK_C)
    return Pass(rows, channels, config.chunk, grid, config.BLOCK_M, config.BLOCK_C, config.num_warps)
