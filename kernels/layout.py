"""A map in memory, as kernels see it: a matrix of rows, each a pixel's channels.

A map (N x C x H x W, channels_last, perhaps a channel slice of a wider buffer) is a matrix of ``rows`` = N*H*W rows of C values, ``pitch``
values apart. A kernel takes the pointer of channel 0 and the pitch; everything else follows from the sizes. A per-channel vector is a
float32 pointer, or None: a kernel compiles to its shorter form where an operand is None, so no flag says what is there.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

if TYPE_CHECKING:
    from .operands import Normalized
    from .reduce import Reduction

# ---- on the device ---------------------------------------------------------------------------------------------------


@triton.jit
def aligned(size, ALIGN: tl.constexpr):
    """``size``, in a form in which the compiler knows that ALIGN divides it: a mask at a multiple of 8 keeps 128-bit loads."""
    return (size // ALIGN) * ALIGN


@triton.jit
def offsets(rows, pitch, c, ALIGN: tl.constexpr, WIDE: tl.constexpr):
    """The element offsets of channels ``c`` in ``rows``, as a tile; ALIGN divides the pitch, WIDE asks for 64 bits."""
    if WIDE:
        rows = rows.to(tl.int64)
    return tl.multiple_of(rows * pitch, ALIGN)[:, None] + c[None, :]


# ---- on the host -----------------------------------------------------------------------------------------------------


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


def pitch_or_zero(x: Tensor | None) -> int:
    """:func:`pitch`, for a map that may be absent."""
    return 0 if x is None else pitch(x)


def rows_of(x: Tensor) -> int:
    """N*H*W."""
    return x.shape[0] * x.shape[2] * x.shape[3]


def empty_map(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """An uninitialised channels_last map."""
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=torch.channels_last)


def align(*sizes: int) -> int:
    """The largest power of two up to 16 that divides all ``sizes`` (an absent map's pitch, 0, does not count)."""
    return math.gcd(16, *sizes)


def is_wide(*maps: Tensor | None) -> bool:
    """Whether an offset into one of ``maps`` needs 64 bits."""
    return any(x is not None and rows_of(x) * pitch(x) >= 2**31 for x in maps)


def vectors(tensor: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """The two rows of a scale and shift, or of a mean and inverse deviation."""
    return (None, None) if tensor is None else tensor.unbind(0)


def xhat_vectors(x: Normalized, sums: Tensor | Reduction | None) -> tuple[Tensor | None, Tensor | None]:
    """Mean and inverse deviation where ``sums`` of x are reduced. ValueError where x has none."""
    if sums is None:
        return None, None
    if x.mean_invstd is None:
        raise ValueError("sums are asked for of a map without its mean_invstd")
    return vectors(x.mean_invstd)


def check_scaled(x: Normalized, scaled: bool) -> None:
    """ValueError where a gradient is to be scaled by what x has not."""
    if scaled and x.scale_shift is None:
        raise ValueError("a scaled gradient is asked for of a map without its scale_shift")
