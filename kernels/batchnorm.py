"""The C-sized arithmetic of BatchNorm: one launch each, a few C float32 values read and written, nothing of a map's
size.

``coefficients_kernel`` turns (mean, M2) or running statistics into scale and shift, mean and invstd, and updates the
running statistics; ``frozen_kernel`` does so for several BatchNorms that normalise by theirs, in one launch;
``gradient_kernel`` turns the two sums of backward into the pending form (p, q, r) of the gradient. Where
the moments or sums are a :class:`~fusedres.kernels.reduce.Reduction`, both merge them from the partials (2 * tiles * C
float32 read) instead of reading them from a launch of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .device import begin, vector
from .launch import SIZES, Prepared, arch_of, prepare
from .layout import Form, form, form_of, vectors_form
from .operands import Norm
from .reduce import Reduction, merge_blocks, merge_warps, merged_moments, merged_sum
from .tiles import Arch, cdiv

BLOCK_C = 256
#: BatchNorms of one launch of ``frozen_kernel``
TOGETHER = 8
#: of whose multiple the channels of each begin there: 16 bytes divide their addresses
ALIGN_C = 32


@triton.jit(do_not_specialize=SIZES)
def coefficients_kernel(
    mean, m2, partials, weight, bias, running_mean, running_var, scale, shift, out_mean, out_invstd, momentum,
    tiles, stride, tile_rows, rows, C, count, unbiased_count, eps, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
    DEPENDENT: tl.constexpr,
):  # fmt: skip
    """From the (mean, M2) or their partials, updating the running statistics if given; without both from the running
    statistics."""
    begin(DEPENDENT)
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = c < C
    if mean is None and partials is None:
        center = vector(running_mean, c, inside, 0.0)
        variance = vector(running_var, c, inside, 0.0)
    else:
        if partials is None:
            center = vector(mean, c, inside, 0.0)
            spread = vector(m2, c, inside, 0.0)
        else:
            center, spread = merged_moments(partials, stride, C, c, inside, 0, tiles, tile_rows, rows, BLOCK_T, BLOCK_C)
        variance = spread / count
        if running_mean is not None:
            blend(running_mean, c, inside, center, momentum)
            blend(running_var, c, inside, spread / unbiased_count, momentum)
    store_coefficients(weight, bias, center, variance, eps, c, inside, scale, shift, out_mean, out_invstd)


@triton.jit
def store_coefficients(weight, bias, center, variance, eps, c, inside, scale, shift, out_mean, out_invstd):
    """Scale and shift, mean and invstd of channels ``c`` from their mean ``center`` and ``variance``."""
    invstd = tl.rsqrt(variance + eps)
    gain = invstd * vector(weight, c, inside, 1.0)
    tl.store(scale + c, gain, mask=inside)
    tl.store(shift + c, vector(bias, c, inside, 0.0) - center * gain, mask=inside)
    tl.store(out_mean + c, center, mask=inside)
    tl.store(out_invstd + c, invstd, mask=inside)


@triton.jit(do_not_specialize=[f"{name}{i}" for name in ("channels", "at") for i in range(8)])
def frozen_kernel(
    weight0, bias0, mean0, var0, weight1, bias1, mean1, var1, weight2, bias2, mean2, var2, weight3, bias3, mean3, var3,
    weight4, bias4, mean4, var4, weight5, bias5, mean5, var5, weight6, bias6, mean6, var6, weight7, bias7, mean7, var7,
    scale, shift, out_mean, out_invstd,
    channels0, at0, eps0, channels1, at1, eps1, channels2, at2, eps2, channels3, at3, eps3,
    channels4, at4, eps4, channels5, at5, eps5, channels6, at6, eps6, channels7, at7, eps7,
    COUNT: tl.constexpr, BLOCK_C: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """Program (block, i): of BatchNorm i the block of channels; what it writes begins at its ``at``."""
    begin(DEPENDENT)
    weights = (weight0, weight1, weight2, weight3, weight4, weight5, weight6, weight7)
    biases = (bias0, bias1, bias2, bias3, bias4, bias5, bias6, bias7)
    means = (mean0, mean1, mean2, mean3, mean4, mean5, mean6, mean7)
    variances = (var0, var1, var2, var3, var4, var5, var6, var7)
    channels = (channels0, channels1, channels2, channels3, channels4, channels5, channels6, channels7)
    ats = (at0, at1, at2, at3, at4, at5, at6, at7)
    epsilons = (eps0, eps1, eps2, eps3, eps4, eps5, eps6, eps7)
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    for i in tl.static_range(COUNT):
        if tl.program_id(1) == i:
            inside = c < channels[i]
            center = vector(means[i], c, inside, 0.0)
            variance = vector(variances[i], c, inside, 0.0)
            at = ats[i]
            store_coefficients(
                weights[i], biases[i], center, variance, epsilons[i], c, inside,
                scale + at, shift + at, out_mean + at, out_invstd + at,
            )  # fmt: skip


@triton.jit
def blend(running, c, inside, value, momentum):
    """``running`` moved towards ``value`` by the factor ``momentum``; exact at factors 0 and 1, as torch.lerp."""
    old = vector(running, c, inside, 0.0)
    value = value.to(running.dtype.element_ty).to(tl.float32)
    new = tl.where(momentum < 0.5, old + momentum * (value - old), value - (value - old) * (1.0 - momentum))
    tl.store(running + c, new.to(running.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=SIZES)
def gradient_kernel(
    sums, sums_xhat, partials, rounded, weight, mean, invstd, p, q, r, tiles, stride, C, count,
    TRAINING: tl.constexpr, ACCUMULATE: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
    DEPENDENT: tl.constexpr,
):  # fmt: skip
    """p = gamma * invstd, q = -p * invstd * mean(dz * xhat), r = -p * mean(dz) - q * mean. With partials the sums are
    merged from them and written, ``rounded`` too, in its dtype."""
    begin(DEPENDENT)
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = c < C
    if partials is None:
        sum_dz = vector(sums, c, inside, 0.0)
        sum_dz_xhat = vector(sums_xhat, c, inside, 0.0)
    else:
        sum_dz = merged_sum(partials, C, c, inside, 0, tiles, BLOCK_T, BLOCK_C)
        sum_dz_xhat = merged_sum(partials + stride, C, c, inside, 0, tiles, BLOCK_T, BLOCK_C)
        tl.store(sums + c, sum_dz, mask=inside)
        tl.store(sums_xhat + c, sum_dz_xhat, mask=inside)
        if rounded is not None:
            tl.store(rounded + c, sum_dz.to(rounded.dtype.element_ty), mask=inside)
            tl.store(rounded + C + c, sum_dz_xhat.to(rounded.dtype.element_ty), mask=inside)
    rstd = vector(invstd, c, inside, 0.0)
    gain = rstd * vector(weight, c, inside, 1.0)
    slope = tl.zeros((BLOCK_C,), tl.float32)
    constant = tl.zeros((BLOCK_C,), tl.float32)
    if ACCUMULATE:
        slope = vector(q, c, inside, 0.0)
        constant = vector(r, c, inside, 0.0)
    else:
        tl.store(p + c, gain, mask=inside)
    if TRAINING:
        own = -gain * rstd * sum_dz_xhat / count
        slope += own
        constant -= gain * sum_dz / count + own * vector(mean, c, inside, 0.0)
    tl.store(q + c, slope, mask=inside)
    tl.store(r + c, constant, mask=inside)


class _Merging:
    """How a C-sized kernel merges what it reads, where that is left to it; else only the block of channels."""

    def __init__(self, partials: Form | None, channels: int) -> None:
        self.tiles = self.stride = 0
        self.block_t, self.block_c, self.warps = 1, BLOCK_C, 4
        if partials is not None:
            self.tiles, self.stride = partials.shape[1], partials.stride[0]
            self.block_t, self.block_c = merge_blocks(self.tiles, channels)
            self.warps = merge_warps(self.block_t, self.block_c)


class _Parameters(NamedTuple):
    """The forms of a BatchNorm's tensors."""

    weight: Form | None
    bias: Form | None
    running_mean: Form | None
    running_var: Form | None


def _parameters(norm: Norm) -> _Parameters:
    return _Parameters(form(norm.weight), form(norm.bias), form(norm.running_mean), form(norm.running_var))


@prepare
def _coefficients(
    stats: Form | None,
    partials: Form | None,
    own: _Parameters,
    tile_rows: int,
    rows: int,
    count: int,
    eps: float,
    like: Form,
    arch: Arch,
) -> tuple[Form, Prepared]:
    """``like``: what has the channels last. The form of what is written, twice, and the launch."""
    channels = like.shape[-1]
    merging = _Merging(partials, channels)
    out = vectors_form(2, channels, like)
    return out, Prepared(
        coefficients_kernel, (cdiv(channels, merging.block_c),), arch,
        {
            "mean m2": stats, "partials": partials, "weight": own.weight, "bias": own.bias,
            "running_mean": own.running_mean,
            "running_var": own.running_var, "scale shift": out, "out_mean out_invstd": out,
        },
        late=("momentum",), tiles=merging.tiles, stride=merging.stride, tile_rows=tile_rows, rows=rows, C=channels,
        count=float(count), unbiased_count=float(max(count - 1, 1)), eps=eps, BLOCK_T=merging.block_t,
        BLOCK_C=merging.block_c, num_warps=merging.warps,
    )  # fmt: skip


def bn_coefficients(norm: Norm, stats: Tensor | Reduction, count: int) -> tuple[Tensor, Tensor]:
    """``(scale_shift, mean_invstd)`` from ``stats``; updates the running statistics in place where there are any."""
    if isinstance(stats, Reduction):
        return _write_coefficients(norm, None, stats.reduced, stats.tile_rows, stats.rows, count)
    return _write_coefficients(norm, stats, None, 0, 0, count)


def bn_frozen(norm: Norm) -> tuple[Tensor, Tensor]:
    """``(scale_shift, mean_invstd)`` from the running statistics, in float32: no map served here asks for another dtype.
    ValueError where there are none."""
    if norm.running_mean is None or norm.running_var is None:
        raise ValueError("a BatchNorm without running statistics is no frozen one")
    return _write_coefficients(norm, None, None, 0, 0, 1)


@prepare
def _frozen(
    parameters: tuple[_Parameters, ...], epsilons: tuple[float, ...], like: Form, arch: Arch
) -> tuple[Form, tuple[int, ...], Prepared]:
    """The form of what is written, where in it each BatchNorm begins, and the launch."""
    channels = [own.running_mean.shape[0] if own.running_mean is not None else 0 for own in parameters]
    starts = [0]
    for size in channels:
        starts.append(starts[-1] + cdiv(size, ALIGN_C) * ALIGN_C)
    out = vectors_form(4, starts[-1], like)
    missing = TOGETHER - len(parameters)
    operands: dict[str, Form | None] = {}
    for i, own in enumerate((*parameters, *[_Parameters(None, None, None, None)] * missing)):
        operands |= {
            f"weight{i}": own.weight,
            f"bias{i}": own.bias,
            f"mean{i}": own.running_mean,
            f"var{i}": own.running_var,
        }
    numbers: dict[str, object] = {}
    for i, (size, at, eps) in enumerate(
        zip((*channels, *[0] * missing), (*starts[:-1], *[0] * missing), (*epsilons, *[0.0] * missing), strict=True)
    ):
        numbers |= {f"channels{i}": size, f"at{i}": at, f"eps{i}": eps}
    launch = Prepared(
        frozen_kernel, (cdiv(max(channels), BLOCK_C), len(parameters)), arch,
        operands | {"scale shift out_mean out_invstd": out},
        **numbers, COUNT=len(parameters), BLOCK_C=BLOCK_C, num_warps=4,
    )  # fmt: skip
    return out, tuple(starts[:-1]), launch


def bn_frozen_together(norms: Sequence[Norm]) -> list[tuple[Tensor, Tensor]]:
    """What :func:`bn_frozen` gives of each of the ``norms``, in a launch for every :data:`TOGETHER` of them. ValueError where one has no
    running statistics."""
    found: list[tuple[Tensor, Tensor]] = []
    for first in range(0, len(norms), TOGETHER):
        group = norms[first : first + TOGETHER]
        tensors: list[Tensor | None] = []
        for norm in group:
            if norm.running_mean is None or norm.running_var is None:
                raise ValueError("a BatchNorm without running statistics is no frozen one")
            tensors += (norm.weight, norm.bias, norm.running_mean, norm.running_var)
        like = next(t for t in tensors if t is not None)
        form_out, starts, launch = _frozen(
            tuple(map(_parameters, group)),
            tuple(float(norm.eps) for norm in group),
            form_of(like),
            arch_of(like.device),
        )
        out = form_out.new()
        launch(*tensors, *[None] * (4 * (TOGETHER - len(group))), out)
        for start, mean in zip(starts, tensors[2::4], strict=True):
            assert mean is not None
            part = out[:, start : start + mean.shape[0]]
            found.append((part[:2], part[2:]))
    return found


def _write_coefficients(
    norm: Norm, stats: Tensor | None, partials: Tensor | None, tile_rows: int, rows: int, count: int
) -> tuple[Tensor, Tensor]:
    like = next(t for t in (partials, stats, norm.running_mean) if t is not None)
    out, launch = _coefficients(
        form(stats), form(partials), _parameters(norm), tile_rows, rows, count, float(norm.eps), form_of(like),
        arch_of(like.device),
    )  # fmt: skip
    scale_shift, mean_invstd = out.new(), out.new()
    launch(
        stats, partials, norm.weight, norm.bias, norm.running_mean, norm.running_var, scale_shift, mean_invstd,
        late=(float(norm.momentum),),
    )  # fmt: skip
    return scale_shift, mean_invstd


@prepare
def _gradient(
    sums: Form,
    partials: Form | None,
    rounded: Form | None,
    weight: Form | None,
    mean_invstd: Form,
    coeff: Form,
    count: int,
    training: bool,
    accumulate: bool,
    arch: Arch,
) -> Prepared:
    channels = coeff.shape[1]
    merging = _Merging(partials, channels)
    return Prepared(
        gradient_kernel, (cdiv(channels, merging.block_c),), arch,
        {
            "sums sums_xhat": sums, "partials": partials, "rounded": rounded, "weight": weight,
            "mean invstd": mean_invstd,
            "p q r": coeff,
        },
        tiles=merging.tiles, stride=merging.stride, C=channels, count=float(count), TRAINING=training,
        ACCUMULATE=accumulate, BLOCK_T=merging.block_t, BLOCK_C=merging.block_c, num_warps=merging.warps,
    )  # fmt: skip


def bn_backward(
    norm: Norm,
    sums: Tensor | Reduction,
    count: int,
    mean_invstd: Tensor,
    coeff: Tensor,
    accumulate: bool = False,
) -> None:
    """``coeff`` (p, q, r) from ``sums``; with ``accumulate`` q and r are added to and p is left alone."""
    weight, partials, rounded = norm.weight, None, None
    if isinstance(sums, Reduction):
        partials = sums.reduced
        values = sums.values[torch.float32] = torch.empty(sums.shape, dtype=torch.float32, device=coeff.device)
        if weight is not None and weight.dtype != torch.float32:
            rounded = sums.values[weight.dtype] = torch.empty(sums.shape, dtype=weight.dtype, device=coeff.device)
    else:
        values = sums
    launch = _gradient(
        form_of(values), form(partials), form(rounded), form(weight), form_of(mean_invstd), form_of(coeff), count,
        norm.training,
        accumulate, arch_of(coeff.device),
    )  # fmt: skip
    launch(values, partials, rounded, weight, mean_invstd, coeff)
