"""The distance of a map's pixels. Needs no Triton: for every backend that launches kernels."""

from __future__ import annotations

from collections.abc import Sequence


def pitch_of(shape: Sequence[int], stride: Sequence[int]) -> int:
    """The distance of the pixels of a map of that shape in values. ValueError where it is not a map."""
    n, c, h, w = shape
    sn, sc, sh, sw = stride
    # the stride of a dimension of size 1 says nothing
    found = sw if w > 1 else sh if h > 1 else sn if n > 1 else c
    if (c > 1 and sc != 1) or found < c or (h > 1 and sh != w * found) or (n > 1 and sn != h * w * found):
        raise ValueError(
            "expected a channels_last map or a channel slice of one, "
            f"found shape {tuple(shape)} and strides {tuple(stride)}"
        )
    return found
