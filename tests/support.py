"""What only tests need: which backends they run on, and random operands for primitives."""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

from fusedres.backends import select
from fusedres.backends.contract import accum_dtype
from fusedres.backends.layout import format_of
from fusedres.operands import LazyGrad, LazyMap
from fusedres.swap import state_of

#: training and inference, as the argument ``training``
each_mode = pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])


def served(backend: str, dtype: torch.dtype, device: str = "cpu") -> None:
    """Skip the test where this installation's ``backend`` does not serve maps of ``dtype``, for the reason that it gives."""
    if reason := select.why_not(backend, torch.device(device), dtype):
        pytest.skip(f"{backend}: {reason}")


def ran(block: nn.Module) -> str:
    """How the last call of a fused block went: the backend's name, or ``original modules: `` and the reason."""
    state = state_of(block)
    assert state is not None and state.outcome is not None, "it has not been called"
    return str(state.outcome)


def dtype_name(dtype: object) -> str:
    """``float32`` for ``torch.float32``: for test ids."""
    return str(dtype).removeprefix("torch.")


class _Room(NamedTuple):
    """A slice of a wider buffer, along dimension 1, with what has to surround it."""

    buffer: Tensor
    start: int
    stop: int


class _Numbers:
    """Normal numbers of a seed, as a generator gives them for one size after another. Those of the last sizes are kept: the same step runs
    on several backends, in several dtypes, and drawing takes longer than computing."""

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)
        self._start = self._generator.get_state()
        #: sizes, numbers, and the generator's state behind them
        self._kept: list[tuple[int, Tensor, Tensor]] = []

    def draw(self, sizes: list[int]) -> Tensor:
        """The last of so many, only to be read."""
        same = 0
        while same < min(len(sizes), len(self._kept)) and sizes[same] == self._kept[same][0]:
            same += 1
        if same < len(sizes):
            del self._kept[same:]
            self._generator.set_state(self._kept[-1][2] if same else self._start)
            for size in sizes[same:]:
                values = torch.randn(size, generator=self._generator, dtype=torch.float64)
                self._kept.append((size, values, self._generator.get_state()))
        return self._kept[len(sizes) - 1][1]


_numbers_of = functools.cache(_Numbers)


class Draw:
    """Random operands of primitives, the same numbers for the same seed: rounded to ``dtype``, and stored in float64 for the ``truth``.

    Maps are channel slices of channels_last buffers whose other channels hold NaN, ``pad`` of them before and behind (maps of their own
    with ``(0, 0)``); per-channel tensors are column slices of such buffers, with ``columns`` of NaN. :meth:`check` asserts afterwards that
    all of that NaN is still there and that what was drawn to be read is unchanged.
    """

    def __init__(
        self,
        dtype: torch.dtype,
        seed: int = 0,
        *,
        truth: bool = False,
        device: str = "cpu",
        pad: tuple[int, int] = (3, 5),
        columns: tuple[int, int] = (1, 2),
    ) -> None:
        self.dtype, self.truth, self.device, self.pad, self.columns = dtype, truth, device, pad, columns
        self.storage = torch.float64 if truth else dtype
        self.accum = accum_dtype(self.storage)
        self._seed, self._sizes = seed, list[int]()
        self._rooms: list[_Room] = []
        self._read: list[tuple[Tensor, Tensor]] = []

    def _numbers(self, *shape: int, spread: float = 1.0, mean: float = 0.0) -> Tensor:
        self._sizes.append(math.prod(shape))
        return _numbers_of(self._seed).draw(self._sizes).view(shape) * spread + mean

    def _reading(self, value: Tensor) -> Tensor:
        self._read.append((value, value.clone()))
        return value

    def placed(self, value: Tensor) -> Tensor:
        """A tensor where it is to lie in memory: here, or where a subclass moves it."""
        return value

    # ---- maps

    def hole(self, *shape: int) -> Tensor:
        """A slice that holds NaN, to be written into."""
        (before, behind), (n, c, *size) = self.pad, shape
        wide = (n, before + c + behind, *size)
        empty = torch.empty(wide, dtype=self.storage, device=self.device, memory_format=format_of(len(shape)))
        buffer = self.placed(empty)
        self._rooms.append(_Room(buffer.fill_(torch.nan), before, before + c))
        return buffer[:, before : before + c]

    def filled(self, *shape: int, mean: float = 0.0, spread: float = 1.0) -> Tensor:
        """A slice with values, which may be written into."""
        return self.hole(*shape).copy_(self._numbers(*shape, mean=mean, spread=spread).to(self.dtype))

    def map(self, *shape: int, mean: float = 0.0, spread: float = 1.0) -> Tensor:
        """A slice with values, which may only be read."""
        return self._reading(self.filled(*shape, mean=mean, spread=spread))

    def lazy(self, *shape: int, act: str = "none", normalised: bool = True, spread: float = 1.0) -> LazyMap:
        """A map, with a pending ``scale_shift`` where it is ``normalised``, and always with ``mean_invstd``."""
        raw, c = self.map(*shape, spread=spread), shape[1]
        return LazyMap(raw, self.scale_shift(c) if normalised else None, act, self.mean_invstd(c))

    def gradient(self, *shape: int, pending: str = "raw") -> LazyGrad:
        """A gradient: ``pending`` is "none" (it is final), "coeff" (p and r alone count, raw is None) or "raw"."""
        grad, raw, coeff = self.map(*shape), self.map(*shape), self.vectors(3, shape[1])
        return LazyGrad(grad, raw if pending == "raw" else None, None if pending == "none" else coeff)

    # ---- per-channel tensors

    def room(self, rows: int, channels: int) -> Tensor:
        """A column slice that holds NaN, in accumulation precision, to be written into."""
        before, behind = self.columns
        wide = (rows, before + channels + behind)
        buffer = self.placed(torch.full(wide, torch.nan, dtype=self.accum, device=self.device))
        self._rooms.append(_Room(buffer, before, before + channels))
        return buffer[:, before : before + channels]

    def kept(self, rows: int, channels: int) -> Tensor:
        """Values of either sign, away from zero, that may be written over."""
        values = self._numbers(rows, channels)
        values = values.sign() * (0.5 + values.abs())
        return self.room(rows, channels).copy_(values.to(accum_dtype(self.dtype)))

    def vectors(self, rows: int, channels: int) -> Tensor:
        """Values of either sign, away from zero, which may only be read."""
        return self._reading(self.kept(rows, channels))

    def scale_shift(self, channels: int) -> Tensor:
        """A pending BatchNorm."""
        return self.vectors(2, channels)

    def mean_invstd(self, channels: int) -> Tensor:
        """What a BatchNorm's backward reads: the second row is positive."""
        values = self.kept(2, channels)
        values[1].abs_()
        return self._reading(values)

    def moments(self, channels: int, count: int) -> Tensor:
        """Statistics of ``count`` rows."""
        values = self.kept(2, channels)
        values[1].abs_().mul_(count)
        return self._reading(values)

    # ---- parameters

    def weight(self, *shape: int) -> Tensor:
        """A convolution's weight that keeps the scale of what it reads."""
        fan = shape[1] * torch.Size(shape[2:]).numel()
        values = self._numbers(*shape, spread=(2 / fan) ** 0.5)
        return self._reading(self.placed(values.to(self.dtype).to(self.device, self.storage)))

    def parameter(self, channels: int, dtype: torch.dtype | None = None, *, positive: bool = False) -> Tensor:
        """A C-sized parameter or running statistic, of a ``dtype`` of its own where one is given; it may be written."""
        values = self._numbers(channels).to(dtype or self.dtype)
        values = values.abs() + 0.5 if positive else values
        return self.placed(values.to(self.device, torch.float64 if self.truth else values.dtype))

    # ---- afterwards

    def check(self) -> None:
        """Assert that nothing was written but what was drawn to be written."""
        for buffer, start, stop in self._rooms:
            for beside in (buffer[:, :start], buffer[:, stop:]):
                assert beside.numel() == 0 or beside.isnan().all(), "wrote beside a slice"
        for value, before in self._read:
            # almost always equal, and then quickly known to be; where there is NaN, the slower comparison decides
            if not torch.equal(value, before):
                torch.testing.assert_close(
                    value, before, rtol=0, atol=0, equal_nan=True, msg="wrote into what is only read"
                )


class Counts(nn.Module):
    """Counts its calls beside what it computes."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x + 1
