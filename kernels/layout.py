"""A map in memory, as kernels see it: a matrix of rows, each a pixel's channels.

A map (N x C x H x W, channels_last, perhaps a channel slice of a wider buffer) is a matrix of ``rows`` = N*H*W rows of C values, ``pitch``
values apart. A kernel takes the pointer of channel 0 and the pitch; everything else follows from the sizes. A per-channel vector is a
float32 pointer, or None: a kernel compiles to its shorter form where an operand is None, so no flag says what is there.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .pitch import pitch_of

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


class Form(NamedTuple):
    """What a launch depends on of a tensor, besides its address."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @property
    def pitch(self) -> int:
        """The distance of the pixels of a map in values. ValueError for what is no map."""
        return pitch_of(self.shape, self.stride)

    @property
    def rows(self) -> int:
        """N*H*W of a map."""
        return self.shape[0] * self.shape[2] * self.shape[3]

    def new(self) -> Tensor:
        """An uninitialised tensor of this form."""
        return torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device=self.device)


def form(x: Tensor | None) -> Form | None:
    """The form of a tensor, None for one that is absent."""
    return None if x is None else Form(x.shape, x.stride(), x.dtype, x.device)


def form_of(x: Tensor) -> Form:
    """The form of a tensor that is there."""
    return Form(x.shape, x.stride(), x.dtype, x.device)


def vectors_form(rows: int, channels: int, like: Form) -> Form:
    """Of ``[rows, channels]`` in float32, contiguous, where ``like`` is."""
    return Form((rows, channels), (channels, 1), torch.float32, like.device)


def partials_form(parts: int, tiles: int, channels: int, like: Form) -> Form:
    """Of ``[parts, tiles, channels]`` in float32, contiguous, where ``like`` is."""
    return Form((parts, tiles, channels), (tiles * channels, channels, 1), torch.float32, like.device)


@functools.lru_cache(1024)
def _channels_last(shape: tuple[int, ...]) -> tuple[int, ...]:
    return torch.empty(shape, device="meta", memory_format=torch.channels_last).stride()


def map_form(shape: tuple[int, ...], like: Form) -> Form:
    """Of a channels_last map in the dtype of ``like``, where that is."""
    return Form(tuple(shape), _channels_last(tuple(shape)), like.dtype, like.device)


def empty_map(like: Tensor) -> Tensor:
    """An uninitialised channels_last map of the shape of ``like``."""
    return torch.empty_like(like, memory_format=torch.channels_last)


def pitch_or_zero(x: Form | None) -> int:
    """Its pitch, for a map that may be absent."""
    return 0 if x is None else x.pitch


def align(*sizes: int) -> int:
    """The largest power of two up to 16 that divides all ``sizes`` (an absent map's pitch, 0, does not count)."""
    return math.gcd(16, *sizes)


def is_wide(*maps: Form | None) -> bool:
    """Whether an offset into one of ``maps`` needs 64 bits."""
    return any(x is not None and x.rows * x.pitch >= 2**31 for x in maps)


def mean_invstd_form(mean_invstd: Form | None, reduces: bool) -> Form | None:
    """Of a map's mean_invstd where sums of it are reduced, else None. ValueError where it has none."""
    if not reduces:
        return None
    if mean_invstd is None:
        raise ValueError("sums are asked for of a map without its mean_invstd")
    return mean_invstd


def check_scaled(scale_shift: Form | None, scaled: bool) -> None:
    """ValueError where a gradient is to be scaled by what its map has not."""
    if scaled and scale_shift is None:
        raise ValueError("a scaled gradient is asked for of a map without its scale_shift")
