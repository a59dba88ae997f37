"""The definition of every primitive, in plain PyTorch: the oracle, the documentation and the last resort.

Conventions shared by every backend
-----------------------------------
map       an N x C x H x W tensor, channels_last, possibly a channel slice of a wider channels_last buffer:
          ``stride(1) == 1`` and pixel ``(n, h, w)`` starts at ``((n * H + h) * W + w) * P`` with ``P >= C``, so that a map is
          a matrix of ``M = N * H * W`` rows of C values, P apart. dtype float16, bfloat16, float32 or float64.
accum     float64 for float64 maps, float32 otherwise: the dtype of every per-channel tensor below and of all arithmetic.
affine    ``[2, C]`` (scale, shift): a normalised map is ``scale * raw + shift``, never stored.
saved     ``[2, C]`` (mean, invstd) with which ``xhat = (raw - mean) * invstd``.
stats     ``[2, C]`` (mean, M2): M2 is the sum of squared deviations from the mean, over the M rows.
coeff     ``[3, C]`` (p, q, r): the pending form of a gradient, ``g = p * grad + q * raw + r``.
sums      ``[2, C]`` (sum of dz, sum of dz * xhat), what a BatchNorm's backward needs from a pass.
act       a name of :mod:`fusedres.activations`; NaN passes, and where ReLU is NaN so does the gradient.
geometry  a :class:`Geometry`; convolution padding is zero *after* affine and act.

Per-channel tensors may be column slices of wider ones (``stride(1) == 1``, any ``stride(0)``). An ``out``, ``stats``, ``dx``,
``sums`` or ``coeff`` that is passed in is overwritten (or accumulated where said) and may hold NaN before; a map that is
returned fresh is channels_last. No primitive keeps a reference to its arguments.
"""

from __future__ import annotations

import sys
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import activations
from . import vendor

name = "eager"


class Geometry(NamedTuple):
    """Stride, padding, dilation (each per spatial dimension) and groups of a convolution."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int


class Pool(NamedTuple):
    """A pooling window: ``kind`` is ``"max"`` (any stride and padding, -inf outside) or ``"mean"`` (stride equal to kernel,
    no padding; a remainder at the border is dropped, or, with ``ceil``, averaged over what there is of it: that is for schedules,
    the primitives take it only where nothing remains)."""

    kind: str
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    ceil: bool = False

    def out_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the output for an input of ``shape``."""
        windows = zip(shape[2:], self.kernel, self.stride, self.padding, strict=True)
        if self.ceil:
            return (*shape[:2], *(-(-size // stride) for size, _, stride, _ in windows))
        return (*shape[:2], *((size + 2 * pad - kernel) // stride + 1 for size, kernel, stride, pad in windows))


def accum_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of statistics, affines and arithmetic for maps of ``dtype``."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def channel_view(vector: Tensor, like: Tensor) -> Tensor:
    """A ``[C]`` vector shaped to broadcast over the map ``like``."""
    return vector.view(1, -1, *([1] * (like.dim() - 2)))


def _passes():
    return sys.modules[__name__]


def _reduce(x: Tensor) -> Tensor:
    return x.sum([d for d in range(x.dim()) if d != 1])


def _deliver(value: Tensor, out: Tensor | None, like: Tensor) -> Tensor:
    """``value`` rounded to the storage dtype, into ``out`` or as a fresh channels_last map."""
    if out is not None:
        return out.copy_(value)
    fmt = torch.channels_last if value.dim() == 4 else torch.contiguous_format
    return value.to(like.dtype).contiguous(memory_format=fmt)


def _activate(raw: Tensor, affine: Tensor | None, act: str) -> Tensor:
    """``act(affine(raw))`` in accum precision."""
    z = raw.to(accum_dtype(raw.dtype))
    if affine is not None:
        z = torch.addcmul(channel_view(affine[1], raw), z, channel_view(affine[0], raw))
    return activations.value(z, act)


def _xhat(raw: Tensor, saved: Tensor) -> Tensor:
    return (raw.to(saved.dtype) - channel_view(saved[0], raw)) * channel_view(saved[1], raw)


def _write_sums(dz: Tensor, raw: Tensor, saved: Tensor, sums: Tensor) -> None:
    sums[0].copy_(_reduce(dz))
    sums[1].copy_(_reduce(dz * _xhat(raw, saved)))


def statistics(x: Tensor, stats: Tensor) -> None:
    """``stats`` (mean, M2) of the map ``x`` per channel. Reads x."""
    values = x.to(stats.dtype)
    mean = values.mean([d for d in range(x.dim()) if d != 1])
    stats[0].copy_(mean)
    stats[1].copy_(_reduce((values - channel_view(mean, x)).square()))


def conv_forward(
    x: Tensor,
    affine: Tensor | None,
    act: str,
    weight: Tensor,
    bias: Tensor | None,
    geometry: Geometry,
    *,
    out: Tensor | None = None,
    stats: Tensor | None = None,
    out_affine: Tensor | None = None,
    residual: Tensor | None = None,
    residual_affine: Tensor | None = None,
    out_act: str = "none",
) -> Tensor:
    """``raw = conv(act(affine(x)), weight) + bias``; returns ``out_act(out_affine(raw) + residual_affine(residual))``.

    Training passes ``stats`` and at most a residual (a pre-activation join); inference passes the epilogue and no ``stats``. ``stats``
    are those of what is written. ``out`` may be a channel slice. Reads x (and residual), writes out.
    """
    return vendor.conv_forward(
        _passes(), x, affine, act, weight, bias, geometry, out=out, stats=stats, out_affine=out_affine, residual=residual,
        residual_affine=residual_affine, out_act=out_act,
    )  # fmt: skip


def conv_backward(
    grad: Tensor,
    raw: Tensor | None,
    coeff: Tensor | None,
    x: Tensor,
    affine: Tensor | None,
    saved: Tensor | None,
    act: str,
    weight: Tensor,
    geometry: Geometry,
    *,
    need_dx: bool = True,
    need_dw: bool = True,
    dx: Tensor | None = None,
    base: Tensor | None = None,
    accumulate: bool = False,
    scaled: bool = False,
    sums: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """Both gradients of ``conv(act(affine(x)), weight)``; returns ``(dx, dweight)``, None where not needed.

    The gradient of the convolution's output is ``g = p * grad + q * raw + r`` with ``coeff`` (``grad`` itself without it), where
    ``raw`` is that output (None: q is taken as zero). With ``da`` the input gradient of the convolution and ``dz`` that of affine(x),
    ``dz = da * act'(affine(x))`` (rebuilt from x and affine):

    - ``sums`` receives (sum dz, sum dz * xhat) with xhat from ``saved`` (mean, invstd of x);
    - ``dx = [base | dx if accumulate | 0] + (affine scale if scaled else 1) * dz``; ``base`` and ``dx`` may be slices.

    ``dweight`` has weight's shape and dtype; deterministic. Reads grad, raw, x; writes dx.
    """
    return vendor.conv_backward(
        _passes(), grad, raw, coeff, x, affine, saved, act, weight, geometry, need_dx=need_dx, need_dw=need_dw, dx=dx, base=base,
        accumulate=accumulate, scaled=scaled, sums=sums,
    )  # fmt: skip


def dgrad_epilogue(
    da: Tensor,
    x: Tensor,
    affine: Tensor | None,
    saved: Tensor | None,
    act: str,
    *,
    dx: Tensor | None = None,
    base: Tensor | None = None,
    accumulate: bool = False,
    scaled: bool = False,
    sums: Tensor | None = None,
) -> Tensor:
    """The pass after a vendor's input gradient ``da`` (which it may overwrite): dz, sums and dx as :func:`conv_backward` says."""
    dz = da.to(accum_dtype(x.dtype))
    if act != "none":
        dz = activations.gradient(dz, _activate(x, affine, "none"), act)
    if sums is not None:
        _write_sums(dz, x, saved, sums)
    if scaled:
        dz = dz * channel_view(affine[0], x)
    if accumulate:
        dz = dz + dx
    elif base is not None:
        dz = dz + base
    return _deliver(dz, dx, x)


def join_forward(
    raw: Tensor,
    affine: Tensor | None,
    residual: Tensor | None,
    residual_affine: Tensor | None,
    act: str,
    *,
    out: Tensor | None = None,
    stats: Tensor | None = None,
) -> Tensor:
    """``out = act(affine(raw) + residual_affine(residual))``, one pass; ``stats`` are those of out.

    Without residual it materialises a normalised map; without anything it copies into a slice. Reads raw and residual, writes out.
    """
    z = _activate(raw, affine, "none")
    if residual is not None:
        z = z + _activate(residual, residual_affine, "none")
    y = _deliver(activations.value(z, act), out, raw)
    if stats is not None:
        statistics(y, stats)
    return y


def join_backward(
    grad: Tensor,
    raw: Tensor,
    affine: Tensor | None,
    saved: Tensor | None,
    act: str,
    *,
    sums: Tensor | None = None,
    residual: Tensor | None = None,
    residual_affine: Tensor | None = None,
    residual_saved: Tensor | None = None,
    residual_sums: Tensor | None = None,
) -> Tensor:
    """``dz``, the gradient of ``affine(raw) + residual_affine(residual)`` under ``act``, and the sums that its BatchNorms need.

    The activation's derivative is rebuilt from the operands of :func:`join_forward` (the output is not needed, so nobody has to keep it).
    ``sums`` uses xhat of raw by ``saved``; ``residual_sums`` that of residual by ``residual_saved``. With ``act="none"`` the result is
    ``grad`` itself (not a copy). Reads grad, raw and residual, writes dz.
    """
    dz = grad.to(accum_dtype(raw.dtype))
    if act != "none":
        z = _activate(raw, affine, "none")
        if residual is not None:
            z = z + _activate(residual, residual_affine, "none")
        dz = activations.gradient(dz, z, act)
    if sums is not None:
        _write_sums(dz, raw, saved, sums)
    if residual_sums is not None:
        _write_sums(dz, residual, residual_saved, residual_sums)
    return grad if act == "none" else _deliver(dz, None, raw)


def highway_forward(
    raw: Tensor,
    affine: Tensor | None,
    act: str,
    gate: Tensor,
    gate_affine: Tensor | None,
    carry: Tensor,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """``out = t * act(affine(raw)) + (1 - t) * carry`` with the transform gate ``t = sigmoid(gate_affine(gate))`` (Srivastava et al. 2015,
    arXiv 1505.00387), one pass. Reads raw, gate and carry, writes out: four maps."""
    t = torch.sigmoid(_activate(gate, gate_affine, "none"))
    return _deliver(t * _activate(raw, affine, act) + (1 - t) * carry, out, raw)


def highway_backward(
    grad: Tensor,
    raw: Tensor,
    affine: Tensor | None,
    saved: Tensor | None,
    act: str,
    gate: Tensor,
    gate_affine: Tensor | None,
    gate_saved: Tensor | None,
    carry: Tensor,
    *,
    sums: Tensor | None = None,
    gate_sums: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """``(dz, dgate, dcarry)``, the gradients of affine(raw), of gate_affine(gate) and of carry by :func:`highway_forward`, one pass.

    Everything is rebuilt from the operands: the output is not needed. ``sums`` are of dz, with xhat of raw by ``saved``, ``gate_sums`` of
    dgate, with xhat of gate by ``gate_saved``. Reads grad, raw, gate and carry, writes the three: seven maps.
    """
    g, z = grad.to(accum_dtype(raw.dtype)), _activate(raw, affine, "none")
    t = torch.sigmoid(_activate(gate, gate_affine, "none"))
    dz = activations.gradient(g * t, z, act)
    dgate = g * (_activate(raw, affine, act) - carry) * (t * (1 - t))
    if sums is not None:
        _write_sums(dz, raw, saved, sums)
    if gate_sums is not None:
        _write_sums(dgate, gate, gate_saved, gate_sums)
    return _deliver(dz, None, raw), _deliver(dgate, None, raw), _deliver(g * (1 - t), None, raw)


def grad_affine(grad: Tensor, raw: Tensor | None, coeff: Tensor, *, out: Tensor | None = None) -> Tensor:
    """``p * grad + q * raw + r`` (q taken as zero without raw). ``out`` may be ``grad``. Reads both, writes one."""
    g = grad.to(coeff.dtype) * channel_view(coeff[0], grad) + channel_view(coeff[2], grad)
    if raw is not None:
        g = torch.addcmul(g, raw.to(coeff.dtype), channel_view(coeff[1], grad))
    return _deliver(g, out, grad)


def pool_forward(
    x: Tensor,
    affine: Tensor | None,
    act: str,
    pool: Pool,
    *,
    out: Tensor | None = None,
    stats: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """``pool(act(affine(x)))`` and, for max, the uint8 position in the window of each maximum (``kh * KW + kw``, the first one
    in that order, NaN winning; channels_last), which costs an eighth of a map in bf16. ``stats`` are those of out.
    Reads x, writes out."""
    a = _activate(x, affine, act)
    index = None
    if pool.kind == "mean":
        y = F.avg_pool2d(a, pool.kernel, pool.stride)
    else:
        y, flat = F.max_pool2d(a, pool.kernel, pool.stride, pool.padding, return_indices=True)
        ho, wo = y.shape[2:]
        top = torch.arange(ho, device=x.device).view(-1, 1) * pool.stride[0] - pool.padding[0]
        left = torch.arange(wo, device=x.device) * pool.stride[1] - pool.padding[1]
        index = (flat // x.shape[3] - top) * pool.kernel[1] + flat % x.shape[3] - left
        index = index.to(torch.uint8).contiguous(memory_format=torch.channels_last)
    y = _deliver(y, out, x)
    if stats is not None:
        statistics(y, stats)
    return y, index


def pool_backward(
    grad: Tensor,
    index: Tensor | None,
    x: Tensor,
    affine: Tensor | None,
    saved: Tensor | None,
    act: str,
    pool: Pool,
    *,
    sums: Tensor | None = None,
    coeff: Tensor | None = None,
    dx: Tensor | None = None,
) -> Tensor | None:
    """The backward of :func:`pool_forward`, without ever storing dz: called once with ``sums`` and once with ``coeff``.

    dz is the gradient of affine(x): pool's gradient times the activation's derivative. With ``sums`` it only reduces them (returns None);
    with ``coeff`` it returns ``dx = p * dz + q * x + r`` (into ``dx`` if given). Reads grad and x, writes dx in the second call.
    """
    z = _activate(x, affine, "none")
    dy = grad.to(z.dtype)
    if pool.kind == "mean":
        kh, kw = pool.kernel
        dz = torch.zeros_like(z)
        dz[:, :, : kh * dy.shape[2], : kw * dy.shape[3]] = (
            (dy / (kh * kw)).repeat_interleave(kh, 2).repeat_interleave(kw, 3)
        )
    else:
        ho, wo = dy.shape[2:]
        position = index.long()
        row = position // pool.kernel[1] + torch.arange(ho, device=x.device).view(-1, 1) * pool.stride[0]
        col = position % pool.kernel[1] + torch.arange(wo, device=x.device) * pool.stride[1]
        flat = (row - pool.padding[0]) * x.shape[3] + col - pool.padding[1]
        dz = torch.zeros_like(z, memory_format=torch.contiguous_format).flatten(2)
        dz = dz.scatter_add_(2, flat.flatten(2), dy.flatten(2)).view(z.shape)
    dz = activations.gradient(dz, z, act)
    if sums is not None:
        _write_sums(dz, x, saved, sums)
    if coeff is None:
        return None
    g = dz * channel_view(coeff[0], x) + _activate(x, coeff[1:], "none")
    return _deliver(g, dx, x)


def bn_coefficients(
    stats: Tensor,
    count: int | Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    momentum: float,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """``(affine, saved)`` of a BatchNorm in training from ``stats`` over ``count`` rows; updates the running statistics in place
    (unbiased variance, factor ``momentum``) where they are given. C-sized. In this backend alone ``count`` may be a tensor."""
    mean, m2 = stats[0], stats[1]
    degrees = (count - 1).clamp(min=1) if isinstance(count, Tensor) else max(count - 1, 1)
    invstd = torch.rsqrt(m2 / count + eps)
    if running_mean is not None:
        running_mean.lerp_(mean.to(running_mean.dtype), momentum)
        running_var.lerp_((m2 / degrees).to(running_var.dtype), momentum)
    saved = torch.stack([mean, invstd])
    return _affine_of(saved, weight, bias), saved


def bn_frozen(
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """``(affine, saved)`` in accum ``dtype`` of a BatchNorm that normalises by its running statistics. C-sized."""
    saved = torch.stack([running_mean.to(dtype), torch.rsqrt(running_var.to(dtype) + eps)])
    return _affine_of(saved, weight, bias), saved


def _affine_of(saved: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    scale = saved[1] if weight is None else saved[1] * weight.to(saved.dtype)
    shift = -saved[0] * scale
    return torch.stack([scale, shift if bias is None else shift + bias.to(saved.dtype)])


def bn_backward(
    sums: Tensor,
    count: int,
    weight: Tensor | None,
    saved: Tensor,
    training: bool,
    coeff: Tensor,
    accumulate: bool = False,
) -> None:
    """The pending form of the gradient of raw, from the ``sums`` over ``count`` rows: writes ``coeff``. C-sized.

    p = gamma * invstd, and in training q = -p * invstd * mean(dz * xhat), r = -p * mean(dz) - q * mean (Ioffe and Szegedy 2015, section 3);
    not in training q = r = 0. With ``accumulate`` (several readers of one map, whose p the passes have applied already) q and r are
    added to those in ``coeff`` and p is left alone. The gradients of gamma and beta are ``sums[1]`` and ``sums[0]``.
    """
    mean, invstd = saved[0], saved[1]
    p = invstd if weight is None else invstd * weight.to(invstd.dtype)
    if not accumulate:
        coeff[0].copy_(p)
        coeff[1:].zero_()
    if training:
        q = -p * invstd * sums[1] / count
        coeff[1].add_(q)
        coeff[2].sub_(p * sums[0] / count + q * mean)


def supports(device: torch.device, dtype: torch.dtype) -> str | None:
    """None where this backend serves maps of ``dtype`` on ``device``, else the reason in words that complete a sentence."""
    if dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        return f"it computes in floating point, not {dtype}"
    if device.type == "meta":
        return "meta tensors hold no values"
    return None
