"""The parts of which block descriptions are made: plain data, hashable by identity, without behaviour beyond shapes.

A *description* (:class:`BlockSpec`) is what recognition makes of a module and what :mod:`fusedres.autograd` runs:
``autograd.residual.Residual``, ``autograd.dense.Dense``, ``autograd.transition.Transition``. It owns how it is checked (``check``), how it
runs (``run``) and what it is compared with (``reference``).
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from . import activations

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from .backends.contract import Backend

Shape = tuple[int, ...]


class Geometry(NamedTuple):
    """Stride, padding, dilation (each per spatial dimension) and groups of a convolution."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    def out_size(self, size: Shape, kernel: Shape) -> Shape:
        """The spatial size of the output for an input of spatial ``size``."""
        return tuple(
            (n + 2 * pad - step * (k - 1) - 1) // stride + 1
            for n, k, stride, pad, step in zip(size, kernel, self.stride, self.padding, self.dilation, strict=True)
        )


class Pool(NamedTuple):
    """A pooling window: ``kind`` is ``"max"`` (any stride and padding, -inf outside) or ``"mean"`` (stride equal to kernel, no padding; a
    remainder at the border is dropped, or, with ``ceil``, averaged over what there is of it: primitives take that only where nothing
    remains)."""

    kind: str
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    ceil: bool = False

    def out_shape(self, shape: Shape) -> Shape:
        """The shape of the output for an input of ``shape``."""
        windows = zip(shape[2:], self.kernel, self.stride, self.padding, strict=True)
        if self.ceil:
            return (*shape[:2], *(-(-size // stride) for size, _, stride, _ in windows))
        return (*shape[:2], *((size + 2 * pad - kernel) // stride + 1 for size, kernel, stride, pad in windows))

    def leaves_remainder(self, size: Shape) -> bool:
        """Whether windows at the border of a map of spatial ``size`` are cut and averaged over what there is of them."""
        return self.ceil and any(n % kernel for n, kernel in zip(size, self.kernel, strict=True))


@dataclass(frozen=True)
class Norm:
    """A BatchNorm in one step.

    ``training``: normalise by the statistics of the batch (else by the running ones). ``momentum`` is the factor of this step's update of
    the running statistics, which is skipped where they are None. ``act``: the activation behind it, a name of
    :mod:`fusedres.activations`. ``group``: the processes whose batches are normalised as one, by a SyncBatchNorm in training; None for this
    process's batch alone. ``promotes``: whether its float32 tensors make a float32 map of one in 16 bits, as arithmetic on tensors does and
    a BatchNorm does not.
    """

    weight: Tensor | None
    bias: Tensor | None
    running_mean: Tensor | None
    running_var: Tensor | None
    training: bool
    momentum: float
    eps: float
    act: str
    group: ProcessGroup | None = None
    promotes: bool = False

    def reference(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        """``act(BatchNorm(x))`` in plain PyTorch, running statistics untouched; RuntimeError for one with a ``group``."""
        if self.group is not None:
            raise RuntimeError("fusedres: a SyncBatchNorm in training has no double backward, here as in torch")
        running = (None, None) if self.training else (self.running_mean, self.running_var)
        y = F.batch_norm(x, *running, weight, bias, self.training, 0.0, self.eps)
        return activations.value(y, self.act)


@dataclass(frozen=True)
class Conv:
    """A convolution."""

    weight: Tensor
    bias: Tensor | None
    geometry: Geometry

    def out_shape(self, shape: Shape) -> Shape:
        """The shape of the output for an input of ``shape``."""
        return (
            shape[0],
            self.weight.shape[0],
            *self.geometry.out_size(tuple(shape[2:]), tuple(self.weight.shape[2:])),
        )

    def reference(self, x: Tensor, weight: Tensor, bias: Tensor | None, behind: Norm | None = None) -> Tensor:
        """The convolution in plain PyTorch. ``behind``: the BatchNorm behind it, which in training removes the bias, whose derivatives are
        zero then instead of rounding."""
        g = self.geometry
        if bias is not None and behind is not None and behind.training:
            bias = bias.detach() + 0 * bias
        return torch.convolution(
            x, weight, bias, g.stride, g.padding, g.dilation, False, [0] * len(g.padding), g.groups
        )


@dataclass(frozen=True)
class Unit:
    """A convolution followed by its BatchNorm and activation, or by nothing."""

    conv: Conv
    norm: Norm | None


class Forward(NamedTuple):
    """What a forward that is recorded leaves: its output ``y``, the ``stats`` of it where the block measures them, and what is ``kept`` for
    backward beside the block's input (or its output, where :attr:`BlockSpec.keeps_output`) and its tensors."""

    y: Tensor
    stats: Tensor | None
    kept: list[Tensor | None]


class BlockSpec(ABC):
    """What every description offers. ``norms`` in the order of the forward: that of collectives."""

    @property
    @abstractmethod
    def tensors(self) -> list[Tensor | None]:
        """The differentiable tensors, in the order in which the Function and :meth:`reference` take them."""

    @abstractmethod
    def out_shape(self, shape: Shape) -> Shape:
        """The shape of the output for a map of ``shape``."""

    @abstractmethod
    def check(self, x: Tensor, source: Tensor | None = None) -> None:
        """Check the description against its input (``source``: what a shortcut reads where that is another map). Raises Unsupported, or
        ValueError as torch would."""

    @abstractmethod
    def run(
        self,
        backend: Backend,
        x: Tensor,
        source: Tensor | None = None,
        *,
        stats: Tensor | None = None,
        out: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """``(y, its [2, C] statistics where the block measures them)`` for the map ``x``; differentiable where gradients are asked for.

        ``stats``: x's statistics where its writer has reduced them already. ``out``: the map, or channel slice of one, that y is written
        into where :attr:`writes_into`, else ignored.
        """

    @abstractmethod
    def record(
        self, backend: Backend, x: Tensor, source: Tensor | None, stats: Tensor | None, out: Tensor | None = None
    ) -> Forward:
        """The forward of :meth:`run` for maps, as an autograd node runs it: with all that :meth:`gradients` needs."""

    @abstractmethod
    def gradients(
        self,
        backend: Backend,
        grad: Tensor,
        held: Tensor,
        source: Tensor | None,
        kept: Sequence[Tensor | None],
        tensors: Sequence[Tensor | None],
        need: Sequence[bool],
    ) -> tuple[Tensor | None, ...]:
        """The gradients of x, of ``source`` and of ``tensors`` (those of :attr:`tensors`), as far as they are in ``need``, for the map
        ``grad``. ``held``: x, or y where :attr:`keeps_output`; ``kept`` is what :meth:`record` has left."""

    @abstractmethod
    def reference(self, x: Tensor, source: Tensor | None, *tensors: Tensor | None) -> Tensor:
        """The definition, in plain PyTorch, for the tensors of :attr:`tensors`; running statistics untouched."""

    @property
    def recomputing(self) -> BlockSpec:
        """The same, but that backward runs cheap convolutions again instead of keeping their outputs; itself where there are none."""
        return self

    @property
    def writes_into(self) -> bool:
        """Whether :meth:`run` takes ``out``."""
        return False

    @property
    def measures(self) -> bool:
        """Whether the statistics of the output are reduced where it is written."""
        return False

    @property
    def keeps_output(self) -> bool:
        """Whether backward reads the output, and not the input, which is in it."""
        return False

    @functools.cached_property
    def operands(self) -> list[Tensor]:
        """Every tensor that it holds: those of :attr:`tensors`, and running statistics."""
        return [*dict.fromkeys(instances(self, Tensor))]

    @functools.cached_property
    def memo(self) -> dict[Any, Any]:
        """Where a backend keeps how its schedules went (:meth:`~.backends.contract.Backend.run_schedule`)."""
        return {}

    @property
    def exchanges(self) -> bool:
        """Whether running it exchanges anything with other processes."""
        return any(norm.group is not None for norm in instances(self, Norm))


def instances(value: object, kind: type) -> Iterator[Any]:
    """Every ``kind`` in a description."""
    if isinstance(value, kind):
        yield value
    elif isinstance(value, tuple):
        for item in cast(tuple[object, ...], value):
            yield from instances(item, kind)
    elif is_dataclass(value):
        for field in fields(value):
            yield from instances(getattr(value, field.name), kind)
