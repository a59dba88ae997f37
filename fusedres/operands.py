"""The operands of the primitives: what always travels together has one name.

Shapes: a *map* is N x C x H x W (or N x C x D x H x W), channels_last, possibly a channel slice of a wider buffer; per-channel tensors
are ``[rows, C]`` in the *accumulation dtype* (float64 for float64 maps, float32 for all others) and may be column slices.

    LazyMap       a normalised, activated map that is never stored: ``act(scale * raw + shift)``
    LazyGrad      a gradient whose BatchNorm correction is still pending: ``p * grad + q * raw + r``
    Epilogue      what a convolution does to its output before it is written, and where that is
    GradTarget    where an input gradient goes, what is added to it, and what is reduced on the way

They hold references and compute nothing; ``fusedres.backends.contract`` says what each primitive makes of them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

if TYPE_CHECKING:
    from .backends.contract import Reduction


class LazyMap(NamedTuple):
    """``act(scale * raw + shift)``, applied by whoever loads it.

    ``raw``: the map as its producer wrote it. ``scale_shift``: ``[2, C]``, None for the identity. ``act``: a name of
    :mod:`fusedres.activations`. ``mean_invstd``: ``[2, C]``, with which ``xhat = (raw - mean) * invstd``; read only where sums are asked
    for.
    """

    raw: Tensor
    scale_shift: Tensor | None = None
    act: str = "none"
    mean_invstd: Tensor | None = None

    @property
    def is_plain(self) -> bool:
        """Whether the values are those of ``raw``."""
        return self.scale_shift is None and self.act == "none"

    @property
    def before_act(self) -> LazyMap:
        """The map in front of its activation."""
        return LazyMap(self.raw, self.scale_shift, "none", self.mean_invstd)


class LazyGrad(NamedTuple):
    """The gradient of a convolution's output: ``p * grad + q * raw + r`` with the rows p, q, r of ``coeff`` (``[3, C]``), or ``grad``
    itself without it. ``raw`` is that output; None takes q as zero."""

    grad: Tensor
    raw: Tensor | None = None
    coeff: Tensor | None = None


class Epilogue(NamedTuple):
    """``act(scale_shift(y) + residual)`` for the output y of a convolution.

    ``out``: the map, or channel slice of one, to write into (None: a fresh map). ``stats``: room for ``[2, C]`` (mean, M2) of what is
    written. ``residual``: added; its own ``act`` is "none". Training passes ``stats`` and at most a residual, inference everything else.
    """

    out: Tensor | None = None
    stats: Reduction | None = None
    scale_shift: Tensor | None = None
    residual: LazyMap | None = None
    act: str = "none"

    @property
    def is_plain(self) -> bool:
        """Whether what is written is the convolution's output itself."""
        return self.scale_shift is None and self.residual is None and self.act == "none"


class GradTarget(NamedTuple):
    """``dx = [base | dx if accumulate | 0] + (scale if scaled else 1) * dz``, with dz the gradient of ``scale * raw + shift``.

    ``dx``: the map or slice to write into (None: a fresh map). ``base``: another map that is added. ``scaled``: whether the BatchNorm's
    scale is applied. ``sums``: room for ``[2, C]`` (sum dz, sum dz * xhat), xhat by the map's ``mean_invstd``.
    """

    dx: Tensor | None = None
    base: Tensor | None = None
    accumulate: bool = False
    scaled: bool = False
    sums: Reduction | None = None

    @property
    def is_plain(self) -> bool:
        """Whether the result is dz itself, in a map of its own."""
        return self.dx is None and self.base is None and not self.accumulate and not self.scaled and self.sums is None


PLAIN = Epilogue()
FRESH = GradTarget()
