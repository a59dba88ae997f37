"""The fused blocks as functions of tensors, for models that hold their parameters their own way.

Every function takes N x C x H x W maps (channels_last is native, anything else is copied once) in float16, bfloat16, float32 or float64,
chooses a backend as the modules do, and runs the eager primitives where no faster backend serves the tensors. Descriptions are those of
:mod:`fusedres.specs` and :mod:`fusedres.autograd`: :class:`Unit` (a convolution, its BatchNorm and activation), :class:`Layer` (a dense
layer). Activations go by their names in :mod:`fusedres.activations`.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from . import concat as _concat
from .autograd.dense import Dense, Layer
from .autograd.residual import Residual, Shortcut, Subsample
from .autograd.transition import Transition
from .backends import select
from .backends.contract import Backend
from .backends.eager import BACKEND as EAGER
from .errors import Unsupported
from .specs import BlockSpec, Conv, Geometry, Norm, Pool, Unit

__all__ = [
    "Conv", "Geometry", "Layer", "Norm", "Pool", "Shortcut", "Subsample", "Unit", "concat", "conv_bn_act", "dense_block",
    "highway_block", "plain_block", "preact_block", "residual_block", "transition",
]  # fmt: skip


def _serve(spec: BlockSpec, x: Tensor) -> Backend:
    """The backend for ``x``, which is checked; what a module would leave to its original forward is an error here."""
    try:
        spec.check(x)
    except Unsupported as reason:
        raise ValueError(f"fusedres.functional: {reason}") from None
    return select.resolve(x.device, x.dtype) or EAGER


def _run(spec: BlockSpec, x: Tensor, out: Tensor | None = None) -> Tensor:
    return spec.run(_serve(spec, x), x, out=out)[0]


def residual_block(
    x: Tensor,
    units: tuple[Unit, ...],
    projection: Unit | None = None,
    act: str = "relu",
    *,
    shortcut: Shortcut | None = None,
) -> Tensor:
    """``act(units(x) + shortcut(x))``: the shortcut is ``projection`` (a Unit with act "none"), any other :class:`Shortcut`, or, without
    both, x itself.

    Raises ValueError where shapes, dtypes or devices do not fit, or a BatchNorm in training would see one value per channel.
    """
    return _run(Residual(tuple(units), shortcut=shortcut or Shortcut(unit=projection), act=act), x)


def preact_block(x: Tensor, norm: Norm, units: tuple[Unit, ...], shortcut: Shortcut | None = None) -> Tensor:
    """``units(norm(x)) + shortcut(x)``, a pre-activation block: ``norm`` with its activation comes first, the last unit has no BatchNorm
    (None), and an ``activated`` shortcut reads ``norm(x)``; without one x itself is added. Raises as :func:`residual_block`."""
    return _run(Residual(tuple(units), first=norm, shortcut=shortcut or Shortcut()), x)


def plain_block(x: Tensor, units: tuple[Unit, ...]) -> Tensor:
    """``units(x)``: convolutions in a row without a shortcut. Raises as :func:`residual_block`."""
    return _run(Residual(tuple(units)), x)


def highway_block(x: Tensor, units: tuple[Unit, ...], gate: Unit) -> Tensor:
    """``t * units(x) + (1 - t) * x`` with ``t = sigmoid(gate(x))``: ``gate`` is a Unit with act "none" or without BatchNorm, the last of
    ``units`` ends in ReLU or nothing, and both keep the shape of x. Raises as :func:`residual_block`."""
    return _run(Residual(tuple(units), shortcut=Shortcut(unit=gate, gated=True)), x)


def conv_bn_act(x: Tensor, unit: Unit, pool: Pool | None = None) -> Tensor:
    """Convolution, BatchNorm and activation, and a max pool behind them where given. Raises as :func:`residual_block`."""
    return _run(Residual((unit,), pool=pool), x)


def concat(
    inputs: Sequence[Tensor], branches: Sequence[tuple[Unit, ...]], reads: Sequence[int | None] | None = None
) -> Tensor:
    """The outputs of ``branches`` (units in a row; without any, what they read) side by side, written into one buffer. Branch i reads the
    output of branch ``reads[i]``, or where that is None its input: the only one of ``inputs``, or the i-th. Raises as
    :func:`residual_block`."""
    if len(inputs) not in (1, len(branches)):
        raise ValueError(f"concat of {len(branches)} branches takes one input, or one for each; found {len(inputs)}")

    def branch(units: tuple[Unit, ...]) -> _concat.Branch:
        if not units:
            return _concat.Branch(lambda shape: shape, lambda x, place: x)
        description = Residual(tuple(units))

        def run(x: Tensor, place: Tensor | None) -> Tensor:
            return _run(description, x, place if place is not None and place.dtype == x.dtype else None)

        return _concat.Branch(description.out_shape, run)

    return _concat.run(inputs, [branch(units) for units in branches], reads or [None] * len(branches))


def dense_block(x: Tensor, layers: tuple[Layer, ...]) -> Tensor:
    """x and the outputs of all ``layers``, each reading everything before it, side by side in one buffer. Backward reads that buffer again:
    whoever changes the result in place copies it before, or autograd raises. Raises as :func:`residual_block`."""
    return _run(Dense(tuple(layers)), x)


def transition(x: Tensor, norm: Norm, pool: Pool, conv: Conv | None = None) -> Tensor:
    """``conv(pool(act(norm(x))))`` with a mean pool and a 1x1 convolution or none: a DenseNet's transition or head. Raises as
    :func:`residual_block`."""
    return _run(Transition(norm, pool, conv), x)
