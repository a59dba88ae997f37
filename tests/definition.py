"""Every primitive once more, as the mathematics of :mod:`fusedres.backends.contract` says it: by torch.nn.functional, every derivative by
autograd. Slow, for float64 alone, and without a line in common with the package's own backends."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fusedres.backends.contract import Backend
from fusedres.operands import FRESH, PLAIN, Epilogue, GradTarget, LazyGrad, LazyMap
from fusedres.specs import Geometry, Norm, Pool

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda z: z,
    "relu": F.relu,
    "relu6": F.relu6,
    "leaky_relu:0.1": lambda z: F.leaky_relu(z, 0.1),
    "leaky_relu:-0.5": lambda z: F.leaky_relu(z, -0.5),
    "hardswish": F.hardswish,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"),
    "mish": F.mish,
}


def _column(vector: Tensor) -> Tensor:
    return vector.view(1, -1, 1, 1)


def _z(x: LazyMap) -> Tensor:
    """What x's activation is applied to."""
    return x.raw if x.scale_shift is None else _column(x.scale_shift[0]) * x.raw + _column(x.scale_shift[1])


def _value(x: LazyMap) -> Tensor:
    return ACTIVATIONS[x.act](_z(x))


def _grad_value(grad: LazyGrad) -> Tensor:
    if grad.coeff is None:
        return grad.grad
    p, q, r = (_column(row) for row in grad.coeff)
    return p * grad.grad + r if grad.raw is None else p * grad.grad + q * grad.raw + r


def _gradients(function: Callable[..., Tensor], operands: Sequence[Tensor], grad: Tensor) -> Sequence[Tensor]:
    """The gradients of ``function(*operands)`` by its operands."""
    leaves = [t.detach().clone().requires_grad_() for t in operands]
    with torch.enable_grad():
        return torch.autograd.grad(function(*leaves), leaves, grad)


def _into(value: Tensor, out: Tensor | None) -> Tensor:
    return value.clone(memory_format=torch.channels_last) if out is None else out.copy_(value)


def _write_sums(dz: Tensor, x: LazyMap, sums: Tensor) -> None:
    mean, invstd = (_column(row) for row in x.mean_invstd)
    sums[0] = dz.sum((0, 2, 3))
    sums[1] = (dz * (x.raw - mean) * invstd).sum((0, 2, 3))


def _convolution(x: Tensor, weight: Tensor, bias: Tensor | None, g: Geometry) -> Tensor:
    return F.conv2d(x, weight, bias, g.stride, g.padding, g.dilation, g.groups)


def _pool(x: Tensor, pool: Pool) -> Tensor:
    if pool.kind == "mean":
        return F.avg_pool2d(x, pool.kernel, pool.stride)
    return F.max_pool2d(x, pool.kernel, pool.stride, pool.padding)


def _highway(z: Tensor, gate: Tensor, carry: Tensor, act: str) -> Tensor:
    t = gate.sigmoid()
    return t * ACTIVATIONS[act](z) + (1 - t) * carry


class Definition(Backend):
    """See above."""

    name = "definition"

    def supports(self, device: torch.device, dtype: torch.dtype) -> str | None:
        return None if dtype == torch.float64 else "it is the truth in float64"

    def statistics(self, x: Tensor, stats: Any) -> None:
        variance, mean = torch.var_mean(x, (0, 2, 3), correction=0)
        stats[0], stats[1] = mean, variance * (x.numel() // x.shape[1])

    def conv_forward(
        self, x: LazyMap, weight: Tensor, bias: Tensor | None, geometry: Geometry, epilogue: Epilogue = PLAIN
    ) -> Tensor:
        y = _z(LazyMap(_convolution(_value(x), weight, bias, geometry), epilogue.scale_shift))
        if epilogue.residual is not None:
            y = y + _z(epilogue.residual)
        return self._deliver(ACTIVATIONS[epilogue.act](y), epilogue.out, epilogue.stats)

    def _deliver(self, y: Tensor, out: Tensor | None, stats: Any) -> Tensor:
        if stats is not None:
            self.statistics(y, stats)
        return _into(y, out)

    def conv_backward(
        self,
        grad: LazyGrad,
        x: LazyMap,
        weight: Tensor,
        geometry: Geometry,
        target: GradTarget | None = FRESH,
        need_dw: bool = True,
    ) -> tuple[Tensor | None, Tensor | None]:
        def conv(z: Tensor, w: Tensor) -> Tensor:
            return _convolution(ACTIVATIONS[x.act](z), w, None, geometry)

        dz, dw = _gradients(conv, (_z(x), weight), _grad_value(grad))
        return None if target is None else self._target(dz, x, target), dw if need_dw else None

    def _target(self, dz: Tensor, x: LazyMap, target: GradTarget) -> Tensor:
        if target.sums is not None:
            _write_sums(dz, x, target.sums)
        dx = dz * _column(x.scale_shift[0]) if target.scaled else dz
        before = target.dx if target.accumulate else target.base
        return _into(dx if before is None else before + dx, target.dx)

    def dgrad_epilogue(self, da: Tensor, x: LazyMap, target: GradTarget = FRESH) -> Tensor:
        return self._target(_gradients(ACTIVATIONS[x.act], (_z(x),), da)[0], x, target)

    def add_act_forward(
        self,
        x: LazyMap,
        residual: LazyMap | None = None,
        act: str = "none",
        *,
        out: Tensor | None = None,
        stats: Any = None,
    ) -> Tensor:
        z = _z(x) if residual is None else _z(x) + _z(residual)
        return self._deliver(ACTIVATIONS[act](z), out, stats)

    def add_act_backward(
        self,
        grad: Tensor,
        x: LazyMap,
        residual: LazyMap | None = None,
        act: str = "none",
        *,
        sums: Any = None,
        residual_sums: Any = None,
    ) -> Tensor:
        z = _z(x) if residual is None else _z(x) + _z(residual)
        dz = grad if act == "none" else _gradients(ACTIVATIONS[act], (z,), grad)[0]
        if sums is not None:
            _write_sums(dz, x, sums)
        if residual_sums is not None:
            _write_sums(dz, residual, residual_sums)
        return dz if act == "none" else _into(dz, None)

    def highway_forward(self, x: LazyMap, gate: LazyMap, carry: Tensor, *, out: Tensor | None = None) -> Tensor:
        return _into(_highway(_z(x), _z(gate), carry, x.act), out)

    def highway_backward(
        self, grad: Tensor, x: LazyMap, gate: LazyMap, carry: Tensor, *, sums: Any = None, gate_sums: Any = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        operands = (_z(x), _z(gate), carry)
        dz, dgate, dcarry = _gradients(lambda *o: _highway(*o, x.act), operands, grad)
        if sums is not None:
            _write_sums(dz, x, sums)
        if gate_sums is not None:
            _write_sums(dgate, gate, gate_sums)
        return _into(dz, None), _into(dgate, None), _into(dcarry, None)

    def apply_grad_coeff(self, grad: LazyGrad, *, out: Tensor | None = None) -> Tensor:
        return _into(_grad_value(grad), out)

    def pool_forward(
        self, x: LazyMap, pool: Pool, *, out: Tensor | None = None, stats: Any = None
    ) -> tuple[Tensor, Tensor | None]:
        return self._deliver(_pool(_value(x), pool), out, stats), None

    def pool_backward(
        self,
        grad: Tensor,
        index: Tensor | None,
        x: LazyMap,
        pool: Pool,
        *,
        sums: Any = None,
        coeff: Tensor | None = None,
        dx: Tensor | None = None,
    ) -> Tensor | None:
        (dz,) = _gradients(lambda z: _pool(ACTIVATIONS[x.act](z), pool), (_z(x),), grad)
        if sums is not None:
            _write_sums(dz, x, sums)
        return None if coeff is None else _into(_grad_value(LazyGrad(dz, x.raw, coeff)), dx)

    def bn_coefficients(self, norm: Norm, stats: Any, count: int) -> tuple[Tensor, Tensor]:
        mean, variance = stats[0], stats[1] / count
        if norm.running_mean is not None:
            norm.running_mean.data.mul_(1 - norm.momentum).add_(norm.momentum * mean)
            unbiased = stats[1] / max(count - 1, 1)
            norm.running_var.data.mul_(1 - norm.momentum).add_(norm.momentum * unbiased)
        return self._coefficients(norm, mean, variance)

    def bn_frozen(self, norm: Norm, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        return self._coefficients(norm, norm.running_mean, norm.running_var)

    @staticmethod
    def _coefficients(norm: Norm, mean: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
        """What ``F.batch_norm`` makes of two values, which is a straight line."""
        ends = torch.stack([torch.zeros_like(mean), torch.ones_like(mean)])
        low, high = F.batch_norm(ends, mean, variance, norm.weight, norm.bias, False, 0.0, norm.eps)
        return torch.stack([high - low, low]), torch.stack([mean, (variance + norm.eps).rsqrt()])

    def bn_backward(
        self, norm: Norm, sums: Any, count: int, mean_invstd: Tensor, coeff: Tensor, accumulate: bool = False
    ) -> None:
        mean, invstd = mean_invstd
        p = invstd if norm.weight is None else norm.weight * invstd
        q = -p * invstd * sums[1] / count if norm.training else torch.zeros_like(p)
        r = -p * sums[0] / count - q * mean if norm.training else torch.zeros_like(p)
        if accumulate:
            coeff[1] += q
            coeff[2] += r
        else:
            coeff[0], coeff[1], coeff[2] = p, q, r
