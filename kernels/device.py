"""Arithmetic on a tile in registers, shared by all kernels: vectors, scale and shift, epilogues, moments and their merges."""

from __future__ import annotations

import triton
import triton.language as tl

from .activations import activate


@triton.jit
def begin(DEPENDENT: tl.constexpr):
    """What every kernel does first. A DEPENDENT one, which the driver schedules while the kernel before it on the stream still runs, waits
    until that one has ended and what it wrote is visible. Only then may the kernel behind it be scheduled: no more than one waits where
    others could run. In PTX, since Triton's own functions for it are NVIDIA's alone."""
    if DEPENDENT:
        tl.inline_asm_elementwise("griddepcontrol.wait; // $0", "=r", [], dtype=tl.int32, is_pure=False, pack=1)
        tl.inline_asm_elementwise(
            "griddepcontrol.launch_dependents; // $0", "=r", [], dtype=tl.int32, is_pure=False, pack=1
        )


@triton.jit
def vector(pointer, c, inside, DEFAULT: tl.constexpr):
    """The float32 values of channels ``c``, 0 outside; DEFAULT everywhere where there is no such vector."""
    if pointer is None:
        values = tl.full(c.shape, DEFAULT, tl.float32)
    else:
        values = tl.load(pointer + c, mask=inside, other=0.0).to(tl.float32)
    return values


@triton.jit
def normalize(tile, scale, shift):
    """``scale * tile + shift`` in float32, per channel."""
    return tile.to(tl.float32) * scale[None, :] + shift[None, :]


@triton.jit
def moments_of_rows(count, mean, m2):
    """Chan's merge of the rows of a tile, each with its own ``count``: the count, mean and M2 of all of them together.

    The mean is refined once about its first estimate, so that a mean of 1e4 costs the deviations nothing.
    """
    total = tl.sum(count, 0)
    share = count / tl.maximum(total, 1.0)
    center = tl.sum(mean * share[:, None], 0)
    deviation = tl.where(count[:, None] > 0.0, mean - center[None, :], 0.0)
    rest = tl.sum(deviation * share[:, None], 0)
    spread = tl.sum(m2 + deviation * deviation * count[:, None], 0)
    # of equal rows the difference may round to less than nothing
    spread = tl.maximum(spread - total * rest * rest, 0.0, propagate_nan=tl.PropagateNan.ALL)
    return total, center + rest, spread


@triton.jit
def merge_moments(count_a, mean_a, m2_a, count_b, mean_b, m2_b):
    """Chan's merge of two sets of rows."""
    total = count_a + count_b
    share = count_b / tl.maximum(total, 1.0)
    delta = mean_b - mean_a
    return total, mean_a + delta * share, m2_a + m2_b + delta * delta * (count_a * share)


@triton.jit
def add_row(mean, m2, value, step):
    """Welford's update, elementwise: every element of the tile has seen ``step`` values before ``value``."""
    delta = value - mean
    mean = mean + delta * (1.0 / (step + 1.0))
    return mean, m2 + delta * (value - mean)


@triton.jit
def store_partial(partials, index, part, parts, c, C, value):
    """``value`` of channels ``c`` as ``partials[index, part, c]``, of a contiguous ``[.., parts, C]``."""
    tl.store(partials + (index * parts + part).to(tl.int64) * C + c, value, mask=c < C)


@triton.jit
def epilogue(acc, other, n, inside, bias, scale, shift, other_scale, other_shift, ACT: tl.constexpr):
    """What a convolution does to its sums ``acc`` of columns ``n``: bias, scale and shift, a tile ``other`` of the residual, activation."""
    if bias is not None:
        acc += vector(bias, n, inside, 0.0)[None, :]
    if scale is not None:
        acc = normalize(acc, vector(scale, n, inside, 1.0), vector(shift, n, inside, 0.0))
    if other is not None:
        acc += normalize(other, vector(other_scale, n, inside, 1.0), vector(other_shift, n, inside, 0.0))
    return activate(acc, ACT)


@triton.jit
def as_stored(pointers, tile, never):
    """``tile`` itself, held by the threads that store it to ``pointers``: several rows of the same columns each, so that most of a sum over
    rows needs no other thread, where the matrix units leave a row or two of many columns.

    A load that never happens, of which the compiler has to assume that it may: Triton has no other way to ask for this. Not in a pipelined
    loop, whose loads it moves ahead. ``never`` is false, which the compiler does not know.
    """
    return tl.load(pointers, mask=never, other=tile)


@triton.jit
def store_moments(partials, tile, tiles, n, inside, K, stored, rows, WHOLE: tl.constexpr):
    """The mean and M2 of the first ``rows`` rows of a tile (WHOLE: of all), as partials [2, tiles, K]: of what is ``stored``, so that they
    normalise exactly what the next reader loads. What the other rows hold is finite where those of the map are.

    Two passes, and the mean refined once about its first estimate, as :func:`moments_of_rows` does.
    """
    values = stored.to(tl.float32)
    if WHOLE:
        count = stored.shape[0] * 1.0
        center = tl.sum(values, 0) * (1.0 / count)
        deviation = values - center[None, :]
    else:
        count = tl.minimum(rows, stored.shape[0]).to(tl.float32)
        weight = (tl.arange(0, stored.shape[0]) < rows).to(tl.float32)[:, None]
        center = tl.sum(values * weight, 0) * (1.0 / count)
        deviation = (values - center[None, :]) * weight
    rest = tl.sum(deviation, 0) * (1.0 / count)
    spread = tl.sum(deviation * deviation, 0)
    # of equal rows the difference may round to less than nothing
    spread = tl.maximum(spread - count * rest * rest, 0.0, propagate_nan=tl.PropagateNan.ALL)
    tl.store(partials + tile * K + n, center + rest, mask=inside)
    tl.store(partials + (tiles + tile) * K + n, spread, mask=inside)
