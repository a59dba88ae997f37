"""The operands of the launchers, by their fields: :mod:`fusedres.operands` and :mod:`fusedres.specs` have these, and nothing of those is
imported here. ``act`` arrives parsed. What the fields mean is said there.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from .reduce import Reduction


class Activation(Protocol):
    """A parsed activation."""

    @property
    def kind(self) -> str: ...
    @property
    def slope(self) -> float: ...


class Normalized(Protocol):
    """``scale * raw + shift``, applied where it is loaded."""

    @property
    def raw(self) -> Tensor: ...
    @property
    def scale_shift(self) -> Tensor | None: ...
    @property
    def mean_invstd(self) -> Tensor | None: ...


class LazyMap(Normalized, Protocol):
    """``act(scale * raw + shift)``, applied where it is loaded."""

    @property
    def act(self) -> Activation: ...


class LazyGrad(Protocol):
    """``p * grad + q * raw + r``, applied where it is loaded."""

    @property
    def grad(self) -> Tensor: ...
    @property
    def raw(self) -> Tensor | None: ...
    @property
    def coeff(self) -> Tensor | None: ...


class Epilogue(Protocol):
    """What a convolution does to its output, and where that is written."""

    @property
    def out(self) -> Tensor | None: ...
    @property
    def stats(self) -> Tensor | Reduction | None: ...
    @property
    def scale_shift(self) -> Tensor | None: ...
    @property
    def residual(self) -> Normalized | None: ...
    @property
    def act(self) -> Activation: ...


class GradTarget(Protocol):
    """Where an input gradient goes, what is added to it, and what is reduced on the way."""

    @property
    def dx(self) -> Tensor | None: ...
    @property
    def base(self) -> Tensor | None: ...
    @property
    def accumulate(self) -> bool: ...
    @property
    def scaled(self) -> bool: ...
    @property
    def sums(self) -> Tensor | Reduction | None: ...


class Geometry(Protocol):
    """Stride, padding and dilation for each dimension, and groups. Hashable: kernels compile for it."""

    @property
    def stride(self) -> tuple[int, ...]: ...
    @property
    def padding(self) -> tuple[int, ...]: ...
    @property
    def dilation(self) -> tuple[int, ...]: ...
    @property
    def groups(self) -> int: ...


class Pool(Protocol):
    """A pooling window. Hashable: kernels compile for it."""

    @property
    def kind(self) -> str: ...
    @property
    def kernel(self) -> tuple[int, ...]: ...
    @property
    def stride(self) -> tuple[int, ...]: ...
    @property
    def padding(self) -> tuple[int, ...]: ...


class Norm(Protocol):
    """A BatchNorm in one step."""

    @property
    def weight(self) -> Tensor | None: ...
    @property
    def bias(self) -> Tensor | None: ...
    @property
    def running_mean(self) -> Tensor | None: ...
    @property
    def running_var(self) -> Tensor | None: ...
    @property
    def training(self) -> bool: ...
    @property
    def momentum(self) -> float: ...
    @property
    def eps(self) -> float: ...
