"""The definition of every primitive, in plain PyTorch: the oracle, the documentation and the last resort.

Conventions and aliasing rules: :mod:`fusedres.backends.contract`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import activations
from ..operands import FRESH, PLAIN, Epilogue, GradTarget, LazyGrad, LazyMap
from ..specs import Geometry, Norm, Pool
from . import library_conv
from .contract import Backend, Reduction, accum_dtype
from .layout import format_of, has_symbols


def channel_view(vector: Tensor, like: Tensor) -> Tensor:
    """A ``[C]`` vector shaped to broadcast over the map ``like``."""
    return vector.view(1, -1, *([1] * (like.dim() - 2)))


def _sum(x: Tensor) -> Tensor:
    return x.sum([d for d in range(x.dim()) if d != 1])


def _deliver(value: Tensor, out: Tensor | None, like: Tensor) -> Tensor:
    """``value`` rounded to the storage dtype, into ``out`` or as a fresh channels_last map."""
    if out is not None:
        return out.copy_(value)
    fresh = value.to(like.dtype).contiguous(memory_format=format_of(value.dim()))
    return fresh.clone() if fresh is like else fresh


def _normalized(x: LazyMap) -> Tensor:
    """``scale * raw + shift`` in accumulation precision."""
    z = x.raw.to(accum_dtype(x.raw.dtype))
    if x.scale_shift is None:
        return z
    scale, shift = (channel_view(v, z) for v in x.scale_shift)
    return torch.addcmul(shift, z, scale)


def _value(x: LazyMap) -> Tensor:
    return activations.value(_normalized(x), x.act)


def _write_sums(dz: Tensor, x: LazyMap, sums: Reduction) -> None:
    if x.mean_invstd is None:
        raise ValueError("sums are asked for of a map without its mean_invstd")
    mean, invstd = (channel_view(v, dz) for v in x.mean_invstd)
    sums[0].copy_(_sum(dz))
    sums[1].copy_(_sum(dz * ((x.raw.to(dz.dtype) - mean) * invstd)))


def _coefficients(mean: Tensor, invstd: Tensor, norm: Norm) -> tuple[Tensor, Tensor]:
    scale = invstd if norm.weight is None else invstd * norm.weight.to(invstd.dtype)
    shift = -mean * scale
    if norm.bias is not None:
        shift = shift + norm.bias.to(shift.dtype)
    return torch.stack([scale, shift]), torch.stack([mean, invstd])


def _batch_coefficients(
    norm: Norm, stats: Reduction, count: int | Tensor, degrees: int | Tensor
) -> tuple[Tensor, Tensor]:
    mean, m2 = stats[0], stats[1]
    if norm.running_mean is not None and norm.running_var is not None:
        norm.running_mean.data.lerp_(mean.to(norm.running_mean.dtype), norm.momentum)
        norm.running_var.data.lerp_((m2 / degrees).to(norm.running_var.dtype), norm.momentum)
    return _coefficients(mean, torch.rsqrt(m2 / count + norm.eps), norm)


class EagerBackend(Backend):
    """Plain PyTorch, on every device; it takes meta and fake tensors, too: what it returns of them is what every backend would."""

    name = "eager"
    stands_in = True

    def supports(self, device: torch.device, dtype: torch.dtype) -> str | None:
        if dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
            return f"it computes in floating point, not {dtype}"
        if device.type == "meta":
            return "meta tensors hold no values"
        return None

    def statistics(self, x: Tensor, stats: Reduction) -> None:
        values = x.to(accum_dtype(x.dtype))
        mean = values.mean([d for d in range(x.dim()) if d != 1])
        stats[0].copy_(mean)
        stats[1].copy_(_sum((values - channel_view(mean, x)).square()))

    def conv_forward(
        self, x: LazyMap, weight: Tensor, bias: Tensor | None, geometry: Geometry, epilogue: Epilogue = PLAIN
    ) -> Tensor:
        return library_conv.conv_forward(self, x, weight, bias, geometry, epilogue)

    def conv_backward(
        self,
        grad: LazyGrad,
        x: LazyMap,
        weight: Tensor,
        geometry: Geometry,
        target: GradTarget | None = FRESH,
        need_dw: bool = True,
    ) -> tuple[Tensor | None, Tensor | None]:
        return library_conv.conv_backward(self, grad, x, weight, geometry, target, need_dw)

    def dgrad_epilogue(self, da: Tensor, x: LazyMap, target: GradTarget = FRESH) -> Tensor:
        dz = da.to(accum_dtype(x.raw.dtype))
        if x.act != "none":
            dz = activations.gradient(dz, _normalized(x), x.act)
        if target.sums is not None:
            _write_sums(dz, x, target.sums)
        if target.scaled:
            if x.scale_shift is None:
                raise ValueError("a scaled gradient is asked for of a map without its scale_shift")
            dz = dz * channel_view(x.scale_shift[0], dz)
        base = target.dx if target.accumulate else target.base
        return _deliver(dz if base is None else dz + base, target.dx, x.raw)

    def add_act_forward(
        self,
        x: LazyMap,
        residual: LazyMap | None = None,
        act: str = "none",
        *,
        out: Tensor | None = None,
        stats: Reduction | None = None,
    ) -> Tensor:
        y = _deliver(activations.value(self._sum_of(x, residual), act), out, x.raw)
        if stats is not None:
            self.statistics(y, stats)
        return y

    def add_act_backward(
        self,
        grad: Tensor,
        x: LazyMap,
        residual: LazyMap | None = None,
        act: str = "none",
        *,
        sums: Reduction | None = None,
        residual_sums: Reduction | None = None,
    ) -> Tensor:
        dz = grad.to(accum_dtype(x.raw.dtype))
        if act != "none":
            dz = activations.gradient(dz, self._sum_of(x, residual), act)
        if sums is not None:
            _write_sums(dz, x, sums)
        if residual_sums is not None:
            if residual is None:
                raise ValueError("residual_sums are asked for without a residual")
            _write_sums(dz, residual, residual_sums)
        return grad if act == "none" else _deliver(dz, None, x.raw)

    @staticmethod
    def _sum_of(x: LazyMap, residual: LazyMap | None) -> Tensor:
        if x.act != "none" or (residual is not None and residual.act != "none"):
            raise ValueError("an operand of an addition has an activation of its own")
        z = _normalized(x)
        return z if residual is None else z + _normalized(residual)

    def highway_forward(self, x: LazyMap, gate: LazyMap, carry: Tensor, *, out: Tensor | None = None) -> Tensor:
        t = torch.sigmoid(_normalized(gate))
        return _deliver(t * _value(x) + (1 - t) * carry, out, x.raw)

    def highway_backward(
        self,
        grad: Tensor,
        x: LazyMap,
        gate: LazyMap,
        carry: Tensor,
        *,
        sums: Reduction | None = None,
        gate_sums: Reduction | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        g, t = grad.to(accum_dtype(x.raw.dtype)), torch.sigmoid(_normalized(gate))
        dz = activations.gradient(g * t, _normalized(x), x.act)
        dgate = g * (_value(x) - carry) * (t * (1 - t))
        if sums is not None:
            _write_sums(dz, x, sums)
        if gate_sums is not None:
            _write_sums(dgate, gate, gate_sums)
        return _deliver(dz, None, x.raw), _deliver(dgate, None, x.raw), _deliver(g * (1 - t), None, x.raw)

    def apply_grad_coeff(self, grad: LazyGrad, *, out: Tensor | None = None) -> Tensor:
        if grad.coeff is None:
            raise ValueError("there is no coeff to apply")
        p, q, r = (channel_view(v, grad.grad) for v in grad.coeff)
        g = grad.grad.to(p.dtype) * p + r
        if grad.raw is not None:
            g = torch.addcmul(g, grad.raw.to(p.dtype), q)
        return _deliver(g, out, grad.grad)

    def pool_forward(
        self, x: LazyMap, pool: Pool, *, out: Tensor | None = None, stats: Reduction | None = None
    ) -> tuple[Tensor, Tensor | None]:
        a, index = _value(x), None
        if pool.kind == "mean":
            # a window whose size is a symbol, which avg_pool2d does not take, is the whole map
            whole = has_symbols(*pool.kernel)
            y = a.mean((2, 3), keepdim=True) if whole else F.avg_pool2d(a, pool.kernel, pool.stride)
        elif pool.kind == "max":
            y, flat = F.max_pool2d(a, pool.kernel, pool.stride, pool.padding, return_indices=True)
            top, left = _window_origins(y, pool)
            index = (flat // a.shape[3] - top) * pool.kernel[1] + flat % a.shape[3] - left
            index = index.to(torch.uint8).contiguous(memory_format=torch.channels_last)
        else:
            raise ValueError(f"unknown pool {pool.kind!r}: expected 'max' or 'mean'")
        y = _deliver(y, out, x.raw)
        if stats is not None:
            self.statistics(y, stats)
        return y, index

    def pool_backward(
        self,
        grad: Tensor,
        index: Tensor | None,
        x: LazyMap,
        pool: Pool,
        *,
        sums: Reduction | None = None,
        coeff: Tensor | None = None,
        dx: Tensor | None = None,
    ) -> Tensor | None:
        z = _normalized(x)
        dy = grad.to(z.dtype)
        if pool.kind == "mean":
            kh, kw = pool.kernel
            da = torch.zeros_like(z)
            n, c, h, w = dy.shape
            spread = (dy / (kh * kw)).view(n, c, h, 1, w, 1).expand(n, c, h, kh, w, kw)
            da[:, :, : kh * h, : kw * w] = spread.reshape(n, c, kh * h, kw * w)
        elif pool.kind == "max" and index is not None:
            top, left = _window_origins(dy, pool)
            position = index.long()
            flat = (position // pool.kernel[1] + top) * z.shape[3] + position % pool.kernel[1] + left
            da = torch.zeros_like(z, memory_format=torch.contiguous_format).flatten(2)
            da = da.scatter_add_(2, flat.flatten(2), dy.flatten(2)).view(z.shape)
        else:
            raise ValueError(f"unknown pool {pool.kind!r}, or a max pool without its index")
        dz = activations.gradient(da, z, x.act)
        if sums is not None:
            _write_sums(dz, x, sums)
        if coeff is None:
            return None
        g = dz * channel_view(coeff[0], z) + _normalized(LazyMap(x.raw, coeff[1:]))
        return _deliver(g, dx, x.raw)

    def bn_coefficients(self, norm: Norm, stats: Reduction, count: int) -> tuple[Tensor, Tensor]:
        return _batch_coefficients(norm, stats, count, max(count - 1, 1))

    def bn_coefficients_on_device(self, norm: Norm, stats: Reduction, count: Tensor) -> tuple[Tensor, Tensor]:
        """:meth:`bn_coefficients` where the number of rows is known on the device alone: it was exchanged with other processes."""
        return _batch_coefficients(norm, stats, count, (count - 1).clamp(min=1))

    def bn_frozen(self, norm: Norm, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        if norm.running_mean is None or norm.running_var is None:
            raise ValueError("a BatchNorm without running statistics is no frozen one")
        mean, variance = norm.running_mean.to(dtype), norm.running_var.to(dtype)
        return _coefficients(mean, torch.rsqrt(variance + norm.eps), norm)

    def bn_backward(
        self, norm: Norm, sums: Reduction, count: int, mean_invstd: Tensor, coeff: Tensor, accumulate: bool = False
    ) -> None:
        mean, invstd = mean_invstd[0], mean_invstd[1]
        p = invstd if norm.weight is None else invstd * norm.weight.to(invstd.dtype)
        if not accumulate:
            coeff[0].copy_(p)
            coeff[1:].zero_()
        if norm.training:
            q = -p * invstd * sums[1] / count
            coeff[1].add_(q)
            coeff[2].sub_(p * sums[0] / count + q * mean)


def _window_origins(y: Tensor, pool: Pool) -> tuple[Tensor, Tensor]:
    """Row and column where the window of each pixel of ``y`` begins, shaped to broadcast over it."""
    ho, wo = y.shape[2:]
    top = torch.arange(ho, device=y.device).view(-1, 1) * pool.stride[0] - pool.padding[0]
    return top, torch.arange(wo, device=y.device) * pool.stride[1] - pool.padding[1]


BACKEND = EagerBackend()
