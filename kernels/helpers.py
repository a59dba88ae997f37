"""What every kernel shares: the view of a map as rows, the arithmetic on a tile in registers, and the launch.

A map (N x C x H x W, channels_last,
perhaps a channel slice of a wider buffer) is a matrix of ``rows`` = N*H*W rows of C values, ``pitch`` values apart. A
kernel takes the pointer of channel 0 and the pitch; everything else follows from the sizes. A per-channel vector is a
float32 pointer, or None: a kernel compiles to its shorter form where an operand is None, so no flag says what is there.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

# Arguments that change with the batch or the resolution, and by whose divisibility no access gets wider (channels are what
# is contiguous): one compilation serves all of them.
SIZES = ("N", "H", "W", "HO", "WO", "rows", "chunk", "tiles", "tile_rows")

# ---- on the device ---------------------------------------------------------------------------------------------------


@triton.jit
def aligned(size, ALIGN: tl.constexpr):
    """``size``, in a form in which the compiler knows that ALIGN divides it: a mask at a multiple of 8 keeps 128-bit
    loads."""
    return (size // ALIGN) * ALIGN


@triton.jit
def offsets(rows, pitch, c, ALIGN: tl.constexpr, WIDE: tl.constexpr):
    """The element offsets of channels ``c`` in ``rows``, as a tile; ALIGN divides the pitch, WIDE asks for 64 bits."""
    if WIDE:
        rows = rows.to(tl.int64)
    return tl.multiple_of(rows * pitch, ALIGN)[:, None] + c[None, :]


@triton.jit
def vector(pointer, c, inside, DEFAULT: tl.constexpr):
    """The float32 values of channels ``c``, 0 outside; DEFAULT everywhere where there is no such vector."""
    if pointer is None:
        values = tl.full(c.shape, DEFAULT, tl.float32)
    else:
        values = tl.load(pointer + c, mask=inside, other=0.0).to(tl.float32)
    return values


@triton.jit
def affine(tile, scale, shift):
    """``scale * tile + shift`` in float32, per channel."""
    return tile.to(tl.float32) * scale[None, :] + shift[None, :]


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(-x)), and one minus that without cancellation; both exponents are negative, so that neither overflows."""
    e = tl.exp(-tl.abs(x))
    larger = 1.0 / (1.0 + e)
    smaller = e * larger
    return tl.where(x < 0.0, smaller, larger), tl.where(x < 0.0, larger, smaller)


@triton.jit
def activate(z, ACT: tl.constexpr):
    """The activation of ``z``: NaN stays (a plain maximum would drop it)."""
    if ACT.kind == "relu":
        z = tl.maximum(z, 0.0, propagate_nan=tl.PropagateNan.ALL)
    elif ACT.kind == "leaky_relu":
        z = tl.where(z > 0.0, z, z * ACT.slope)
    elif ACT.kind == "relu6":
        z = tl.where(z < 0.0, 0.0, tl.where(z > 6.0, 6.0, z))
    elif ACT.kind == "hardswish":
        z = z * tl.where(z < -3.0, 0.0, tl.where(z > 3.0, 6.0, z + 3.0)) * (1.0 / 6.0)
    elif ACT.kind == "silu":
        below, _ = sigmoid(z)
        z = z * below
    elif ACT.kind == "gelu":
        z = z * (0.5 + 0.5 * tl.erf(z * 0.7071067811865476))
    elif ACT.kind == "gelu_tanh":
        # (1 + tanh(u)) / 2 is the sigmoid of 2 u
        below, _ = sigmoid(1.5957691216057308 * (z + 0.044715 * z * z * z))
        z = z * below
    return z


@triton.jit
def gradient(dz, z, ACT: tl.constexpr):
    """``dz`` times the derivative of the activation at ``z``, which at its kinks is the one that torch takes."""
    if ACT.kind == "relu":
        dz = tl.where(z <= 0.0, 0.0, dz)
    elif ACT.kind == "leaky_relu":
        dz = tl.where(z > 0.0, dz, dz * ACT.slope)
    elif ACT.kind == "relu6":
        dz = tl.where((z <= 0.0) | (z >= 6.0), 0.0, dz)
    elif ACT.kind == "hardswish":
        dz = tl.where(z <= -3.0, 0.0, tl.where(z >= 3.0, dz, dz * (z * (1.0 / 3.0) + 0.5)))
    elif ACT.kind == "silu":
        below, above = sigmoid(z)
        dz = dz * (below * (1.0 + z * above))
    elif ACT.kind == "gelu":
        below = 0.5 + 0.5 * tl.erf(z * 0.7071067811865476)
        dz = dz * (below + z * tl.exp(z * z * -0.5) * 0.3989422804014327)
    elif ACT.kind == "gelu_tanh":
        below, above = sigmoid(1.5957691216057308 * (z + 0.044715 * z * z * z))
        dz = dz * (below + z * below * above * (1.5957691216057308 * (1.0 + 0.134145 * z * z)))
    return dz


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
    return total, center + rest, spread - total * rest * rest


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


# ---- on the host -----------------------------------------------------------------------------------------------------

INTERPRETED = not isinstance(affine, triton.JITFunction)
EPILOGUE_BYTES = 24 * 1024  # shared memory that epilogues use beside the loop's stages, at most


class Launch(NamedTuple):
    """One kernel launch: the jitted function, its grid, and every argument and option by name."""

    kernel: object
    grid: tuple[int, ...]
    arguments: dict[str, object]


class Limits(NamedTuple):
    """What a configuration must know of a device: the shared memory that a block may take, and the threads of a
    warp."""

    shared: int
    warp: int


_record: list[Launch] | None = None
_limits = Limits(163 * 1024, 32)  # of sm_80, where no device says otherwise
_device: torch.device | None = None


@contextlib.contextmanager
def record(limits: Limits = _limits, device: torch.device | None = None) -> Iterator[list[Launch]]:
    """Collect launches instead of running them: to compile or count the kernels of a call, for meta tensors, without a
    GPU. ``limits`` are those of the device that is meant, ``device`` is that device where it is here."""
    global _record, _limits, _device
    previous, _record, _limits, _device = (_record, _limits, _device), [], limits, device
    try:
        yield _record
    finally:
        _record, _limits, _device = previous


def meant(device: torch.device) -> torch.device:
    """``device``, or for meta tensors the one that :func:`record` was told."""
    return _device if _device is not None and device.type == "meta" else device


def launch(kernel, grid: tuple[int, ...], device: torch.device, *, num_warps: int, **arguments) -> None:
    """Run ``kernel`` over ``grid`` on ``device``, which need not be the current one; ``num_warps`` counts warps of 32
    threads, so that a configuration means the same number of threads everywhere."""
    arguments["num_warps"] = max(1, num_warps * 32 // limits(device).warp)
    if _record is not None:
        _record.append(Launch(kernel, grid, arguments))
    elif device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            kernel[grid](**arguments)
    else:
        kernel[grid](**arguments)


def pitch(x: Tensor) -> int:
    """The distance of the pixels of the map ``x`` in values. ValueError where x is not a map."""
    n, c, h, w = x.shape
    sn, sc, sh, sw = x.stride()
    # the stride of a dimension of size 1 says nothing
    found = sw if w > 1 else sh if h > 1 else sn if n > 1 else c
    if (c > 1 and sc != 1) or found < c or (h > 1 and sh != w * found) or (n > 1 and sn != h * w * found):
        raise ValueError(
            "expected a channels_last map or a channel slice of one, "
            f"found shape {tuple(x.shape)} and strides {x.stride()}"
        )
    return found


def rows_of(x: Tensor) -> int:
    """N*H*W."""
    return x.shape[0] * x.shape[2] * x.shape[3]


def empty_map(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """An uninitialised channels_last map."""
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=torch.channels_last)


def pitch_or_zero(x: Tensor | None) -> int:
    """:func:`pitch`, for a map that may be absent."""
    return 0 if x is None else pitch(x)


def align(*sizes: int) -> int:
    """The largest power of two up to 16 that divides all ``sizes`` (an absent map's pitch, 0, does not count)."""
    return math.gcd(16, *sizes)


def is_wide(*maps: Tensor | None) -> bool:
    """Whether an offset into one of ``maps`` needs 64 bits."""
    return any(x is not None and rows_of(x) * pitch(x) >= 2**31 for x in maps)


def vectors(tensor: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """The two rows of an affine or of saved statistics."""
    return (None, None) if tensor is None else tensor.unbind(0)


def block(size: int, smallest: int, largest: int) -> int:
    """The power of two that covers ``size``, within limits."""
    return max(smallest, min(largest, triton.next_power_of_2(size)))


def limits(device: torch.device) -> Limits:
    """Those of ``device``; without a GPU those which :func:`record` is told."""
    return _limits_of(device) if device.type == "cuda" else _limits


@functools.cache
def _limits_of(device: torch.device) -> Limits:
    properties = torch.cuda.get_device_properties(device)
    shared = getattr(properties, "shared_memory_per_block_optin", 0) or properties.shared_memory_per_block
    return Limits(shared, properties.warp_size)


def stages(bytes_per_stage: int, device: torch.device) -> int:
    """How many steps of a loop can be in flight in shared memory, three at most. It changes no result."""
    shared, warp = limits(device)
    # warps of 64 are AMD's, where the newest step waits in registers, if it is small enough for them
    waiting = int(warp == 64 and 2 * bytes_per_stage <= shared)
    return max(1, min(3, (shared - EPILOGUE_BYTES) // bytes_per_stage + waiting))
