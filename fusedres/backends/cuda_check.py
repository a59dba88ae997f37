"""The CUDA C++ kernels at their first use on a GPU, beside plain PyTorch: what computes something else there, by a fault of a compiler, a
driver or ours, is not used.

Every kernel runs on a small map, for accesses of 16 bytes and of one value; what only large maps need (several levels of merges, offsets of
64 bits) is not seen. It takes some milliseconds for each dtype and GPU of a process, beside the compilation.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..first_use import DRAWS, are_right
from ..operands import GradTarget, LazyGrad, LazyMap
from ..specs import Norm, Pool
from .contract import Backend, accum_dtype
from .eager import BACKEND as EAGER

#: images, rows and columns; channels that are whole vectors in every dtype, and those that are none
SIZE, CHANNELS = (2, 7, 5), (24, 5)

Case = Callable[["_Draw", Backend], list[Tensor]]


class _Draw:
    """Random operands on a device, the same for one ``seed``: of ``dtype``, or the same values in float64 if ``exact``."""

    def __init__(self, device: torch.device, dtype: torch.dtype, channels: int, seed: int, exact: bool) -> None:
        self._device, self._dtype, self._channels, self._exact = device, dtype, channels, exact
        self._generator = torch.Generator().manual_seed(seed)

    def _random(self, shape: tuple[int, ...], dtype: torch.dtype, low: float, high: float) -> Tensor:
        drawn = torch.rand(shape, generator=self._generator, dtype=torch.float64) * (high - low) + low
        found = drawn.to(self._device, dtype)
        return found.double() if self._exact else found

    def map(self, rows: int = SIZE[1], columns: int = SIZE[2]) -> Tensor:
        shape = SIZE[0], self._channels, rows, columns
        return self._random(shape, self._dtype, -2.0, 2.0).to(memory_format=torch.channels_last)

    def numbers(self, rows: int, low: float = 0.5, high: float = 1.5) -> Tensor:
        """Per channel, in the dtype of arithmetic."""
        return self._random((rows, self._channels), accum_dtype(self._dtype), low, high)

    def room(self) -> Tensor:
        return torch.full_like(self.numbers(2), float("nan"))

    def lazy(self, act: str = "none") -> LazyMap:
        return LazyMap(self.map(), self.numbers(2), act, self.numbers(2))

    def norm(self) -> Norm:
        weight, bias, mean, variance = (self.numbers(4)[i].clone() for i in range(4))
        return Norm(weight, bias, mean, variance, True, 0.3, 1e-5, "relu")


def _addition(draw: _Draw, backend: Backend) -> list[Tensor]:
    x, residual, grad, stats = draw.lazy(), draw.lazy(), draw.map(), draw.room()
    sums, residual_sums = draw.room(), draw.room()
    y = backend.add_act_forward(x, residual, "relu", stats=stats)
    dz = backend.add_act_backward(grad, x, residual, "relu", sums=sums, residual_sums=residual_sums)
    return [y, stats, dz, sums, residual_sums]


def _gradient(draw: _Draw, backend: Backend) -> list[Tensor]:
    da, x, base, sums = draw.map(), draw.lazy("silu"), draw.map(), draw.room()
    grad = LazyGrad(draw.map(), draw.map(), draw.numbers(3))
    return [
        backend.apply_grad_coeff(grad),
        backend.dgrad_epilogue(da, x, GradTarget(base=base, scaled=True, sums=sums)),
        sums,
    ]


def _pool(pool: Pool) -> Case:
    def case(draw: _Draw, backend: Backend) -> list[Tensor]:
        x, stats, sums, coeff = draw.lazy("relu"), draw.room(), draw.room(), draw.numbers(3)
        grad = draw.map(*pool.out_shape((*SIZE[:1], 1, *SIZE[1:]))[2:])
        y, index = backend.pool_forward(x, pool, stats=stats)
        backend.pool_backward(grad, index, x, pool, sums=sums)
        dx = backend.pool_backward(grad, index, x, pool, coeff=coeff)
        assert dx is not None
        return [y, stats, sums, dx]

    return case


def _highway(draw: _Draw, backend: Backend) -> list[Tensor]:
    x, gate, carry, grad = draw.lazy("relu"), draw.lazy(), draw.map(), draw.map()
    sums, gate_sums = draw.room(), draw.room()
    y = backend.highway_forward(x, gate, carry)
    return [y, *backend.highway_backward(grad, x, gate, carry, sums=sums, gate_sums=gate_sums), sums, gate_sums]


def _batchnorm(draw: _Draw, backend: Backend) -> list[Tensor]:
    """With the partial results that kernels hand on."""
    x, grad, norm, coeff = draw.map(), draw.map(), draw.norm(), draw.numbers(3)
    count, channels = x.numel() // x.shape[1], x.shape[1]
    stats, sums = backend.new_reduction(channels, x), backend.new_reduction(channels, x)
    backend.statistics(x, stats)
    scale_shift, mean_invstd = backend.bn_coefficients(norm, stats, count)
    backend.add_act_backward(grad, LazyMap(x, scale_shift, "none", mean_invstd), None, "relu", sums=sums)
    backend.bn_backward(norm, sums, count, mean_invstd, coeff)
    assert norm.running_mean is not None and norm.running_var is not None
    frozen = backend.bn_frozen(norm, accum_dtype(x.dtype))
    moved = [norm.running_mean, norm.running_var]
    return [scale_shift, mean_invstd, coeff, sums[0], sums[1], *frozen, *moved]


CASES: dict[str, Case] = {
    "an addition": _addition,
    "the correction of a gradient": _gradient,
    "a max pool": _pool(Pool("max", (3, 3), (2, 2), (1, 1))),
    "a mean pool": _pool(Pool("mean", (2, 2), (2, 2), (0, 0))),
    "a highway block": _highway,
    "a BatchNorm": _batchnorm,
}


def differing(backend: Backend, device: torch.device, dtype: torch.dtype) -> str | None:
    """What of ``backend`` computes something else there than PyTorch, in words; None where nothing does."""
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        for name, case in CASES.items():
            for channels in CHANNELS:
                if not any(_is_right(backend, case, device, dtype, channels, seed) for seed in range(DRAWS)):
                    return f"{name} of {channels} channels in {str(dtype).removeprefix('torch.')}"
    return None


def _is_right(backend: Backend, case: Case, device: torch.device, dtype: torch.dtype, channels: int, seed: int) -> bool:
    def results(of: Backend, exact: bool = False) -> list[Tensor]:
        return case(_Draw(device, dtype, channels, seed, exact), of)

    return are_right(results(backend), results(EAGER), results(EAGER, exact=True), dtype)
