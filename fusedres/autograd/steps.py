"""The steps that the families of blocks share: from statistics to a lazy map, from sums to a lazy gradient, and the replay of a block
where its backward is differentiated."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch._C._functorch import is_legacy_batchedtensor

from ..backends.contract import Backend, Reduction, accum_dtype
from ..backends.eager import BACKEND as EAGER
from ..backends.layout import as_map, channel_empty, row_count
from ..operands import Epilogue, GradTarget, LazyMap
from ..specs import BlockSpec, Forward, Norm, Pool, Unit
from .exchange import gather_stats, mean_sums


def new_reduction(backend: Backend, norm: Norm, channels: int, like: Tensor) -> Reduction:
    """Room for two reductions per channel that one C-sized step of ``norm`` reads next (:func:`normalize`, :func:`norm_backward`). What
    processes exchange is merged before: always a tensor."""
    return backend.new_reduction(channels, like) if norm.group is None else channel_empty(2, channels, like)


def new_stats(backend: Backend, norm: Norm | None, channels: int, like: Tensor) -> Reduction | None:
    """Room for the statistics that a BatchNorm in training needs, None where it uses the running ones."""
    return new_reduction(backend, norm, channels, like) if norm is not None and norm.training else None


def frozen_ahead(backend: Backend, norms: Iterable[Norm | None]) -> Backend:
    """The ``backend`` for a schedule with these ``norms``: where none of them uses its batch, and so none changes what another reads, it
    may compute their scales and shifts at once, in front of all convolutions."""
    found = [norm for norm in norms if norm is not None]
    return backend if any(norm.training for norm in found) else backend.ahead(found)


def normalize(backend: Backend, norm: Norm | None, raw: Tensor, stats: Reduction | None) -> LazyMap:
    """``raw`` behind ``norm`` and its activation; updates the running statistics in training."""
    if norm is None:
        return LazyMap(raw)
    if stats is None:
        scale_shift, mean_invstd = backend.bn_frozen(norm, accum_dtype(raw.dtype))
    elif norm.group is None:
        scale_shift, mean_invstd = backend.bn_coefficients(norm, stats, row_count(raw))
    else:
        # the common number of rows stays on the device, where only eager's arithmetic takes it: C numbers, next to a collective
        assert isinstance(stats, Tensor)
        together, rows = gather_stats(stats, row_count(raw), norm.group)
        scale_shift, mean_invstd = EAGER.bn_coefficients_on_device(norm, together, rows)
    return LazyMap(raw, scale_shift, norm.act, mean_invstd)


def normalize_input(backend: Backend, norm: Norm | None, x: Tensor, stats: Reduction | None) -> LazyMap:
    """The map ``x`` behind ``norm``; ``stats`` are x's where its writer has reduced them, else one pass does."""
    if norm is not None and norm.training and stats is None:
        stats = new_reduction(backend, norm, x.shape[1], x)
        backend.statistics(x, stats)
    return normalize(backend, norm, x, stats if norm is not None and norm.training else None)


def conv_norm(backend: Backend, unit: Unit, x: LazyMap) -> LazyMap:
    """A convolution with its BatchNorm and activation."""
    conv = unit.conv
    stats = new_stats(backend, unit.norm, conv.weight.shape[0], x.raw)
    raw = backend.conv_forward(x, conv.weight, conv.bias, conv.geometry, Epilogue(stats=stats))
    return normalize(backend, unit.norm, raw, stats)


def norm_backward(
    backend: Backend,
    norm: Norm,
    weight: Tensor | None,
    sums: Reduction,
    rows: int,
    mean_invstd: Tensor,
    coeff: Tensor,
    accumulate: bool = False,
) -> None:
    """Write ``coeff`` from this process's ``sums`` over ``rows`` as the primitive ``bn_backward`` does, over the maps of all processes of
    ``norm.group``; ``sums`` stay this process's, as the gradients of weight and bias have to be. ``weight``: that of ``norm`` as autograd
    has saved it, which hooks (checkpointing's) may have replaced."""
    if weight is not norm.weight:
        norm = replace(norm, weight=weight)
    if norm.group is not None:
        # means instead of sums, over one row: the number of all rows is known on the device alone
        assert isinstance(sums, Tensor)
        sums, rows = mean_sums(sums, rows, norm.group), 1
    backend.bn_backward(norm, sums, rows, mean_invstd, coeff, accumulate)


def norm_grads(
    backend: Backend, norm: Norm, sums: Reduction, need_weight: bool, need_bias: bool
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of a BatchNorm's weight and bias from its ``sums``."""
    weight, bias = norm.weight, norm.bias
    return (
        backend.parameter_grad(sums, 1, weight.dtype) if need_weight and weight is not None else None,
        backend.parameter_grad(sums, 0, bias.dtype) if need_bias and bias is not None else None,
    )


def identity_coeff(channels: int, like: Tensor) -> Tensor:
    """``[3, C]`` with p = 1 and q = r = 0: a gradient to which nothing is pending yet."""
    coeff = channel_empty(3, channels, like)
    coeff[0].fill_(1.0)
    coeff[1:].zero_()
    return coeff


def bias_grad_behind_norm(norm: Norm, sums: Reduction, coeff: Tensor, bias: Tensor) -> Tensor:
    """The gradient of a bias in front of ``norm``, from C numbers: ``sum(p * dz + q * raw + r)``.

    In training it is zero, because normalisation removes the bias; computed, it would be the rounding of large terms that cancel. Not for a
    BatchNorm with a ``group``, whose mean is not that of this process's rows: :func:`bias_grad` there.
    """
    found = coeff[0] * sums[0]
    # times zero, so that what is not finite stays so
    return (0 * found if norm.training else found).to(bias.dtype)


def bias_grad(grad: Tensor, bias: Tensor, raw: Tensor | None = None, coeff: Tensor | None = None) -> Tensor:
    """The gradient of a bias that no BatchNorm follows: the sum of ``grad``, or of ``p * grad + q * raw + r`` with a pending coeff."""
    dims = [0, *range(2, grad.dim())]
    total = grad.sum(dims, dtype=accum_dtype(grad.dtype))
    if coeff is not None:
        total = coeff[0] * total + row_count(grad) * coeff[2]
        if raw is not None:
            total = total + coeff[1] * raw.sum(dims, dtype=total.dtype)
    return total.to(bias.dtype)


def mean_pool(backend: Backend, x: LazyMap, pool: Pool) -> Tensor:
    """The mean pool of ``x``; the library's, behind a pass, where windows leave a remainder."""
    if not pool.leaves_remainder(tuple(x.raw.shape[2:])):
        return backend.pool_forward(x, pool)[0]
    a = x.raw if x.is_plain else backend.materialize(x)
    return as_map(torch.ops.aten.avg_pool2d(a, pool.kernel, pool.stride, pool.padding, True, False))


def mean_pool_backward(backend: Backend, grad: Tensor, x: LazyMap, pool: Pool, sums: Reduction | None) -> Tensor:
    """``dz``, the gradient of x's ``scale * raw + shift`` by :func:`mean_pool`, times the scale where there is one; its ``sums`` if asked
    for."""
    if not pool.leaves_remainder(tuple(x.raw.shape[2:])):
        if sums is not None:
            backend.pool_backward(grad, None, x, pool, sums=sums)
        coeff = identity_coeff(x.raw.shape[1], x.raw)
        if x.scale_shift is not None:
            coeff[0].copy_(x.scale_shift[0])
        dz = backend.pool_backward(grad, None, x, pool, coeff=coeff)
        assert dz is not None
        return dz
    da = as_map(
        torch.ops.aten.avg_pool2d_backward(grad, x.raw, pool.kernel, pool.stride, pool.padding, True, False, None)
    )
    if x.is_plain:
        return da
    return backend.dgrad_epilogue(da, x, GradTarget(scaled=x.scale_shift is not None, sums=sums))


def needs_autograd(*tensors: Tensor | None) -> bool:
    """Whether a call has to be recorded. Inference mode records nothing, even where gradients are enabled inside of it."""
    if not torch.is_grad_enabled() or torch.is_inference_mode_enabled():
        return False
    return any(t is not None and t.requires_grad for t in tensors)


def kept_map(x: Tensor, *weights: Tensor | None) -> Tensor:
    """``x`` as a map that a recorded call keeps. ``weights``: those whose gradients need it. Where neither they nor ``x`` have any, eager
    would keep nothing of it, so that its owner may overwrite it before backward: a copy, if it is none yet."""
    found = as_map(x)
    return found.clone() if found is x and not needs_autograd(x, *weights) else found


def record(
    spec: BlockSpec, backend: Backend, x: Tensor, source: Tensor | None, stats: Tensor | None, out: Tensor | None = None
) -> Forward:
    """``spec.record(...)``, as the ``backend`` runs schedules."""

    def schedule() -> list[Tensor | None]:
        y, measured, kept = spec.record(backend, x, source, stats, out)
        return [y, measured, *kept]

    y, measured, *kept = backend.run_schedule(spec.memo, "record", (x, source, stats, out), spec.operands, schedule)
    assert y is not None
    return Forward(y, measured, kept)


def gradients(
    spec: BlockSpec,
    backend: Backend,
    grad: Tensor,
    held: Tensor,
    source: Tensor | None,
    kept: Sequence[Tensor | None],
    tensors: Sequence[Tensor | None],
    need: Sequence[bool],
) -> Sequence[Tensor | None]:
    """``spec.gradients(...)`` for the map of a gradient, as the ``backend`` runs schedules."""
    grad = as_map(grad)
    return backend.run_schedule(
        spec.memo,
        ("gradients", *need),
        (grad, held, source),
        (*kept, *tensors),
        lambda: spec.gradients(backend, grad, held, source, kept, tensors, need),
    )


def functorch_active() -> bool:
    """Whether a transform of torch.func (vmap, grad, ...) is under way."""
    return torch._C._are_functorch_transforms_active()


def replays(grad: Tensor) -> bool:
    """Whether a backward has to be plain PyTorch: it is differentiated itself (``create_graph=True``), or batched
    (``is_grads_batched=True``, vmap)."""
    batched = functorch_active() or is_legacy_batchedtensor(grad)
    return torch.is_grad_enabled() or batched


def replay(reference: Callable[..., Tensor], inputs: Sequence[Tensor | None], grad: Tensor) -> list[Tensor | None]:
    """The gradients of ``reference(*inputs)`` by operators that can be differentiated and batched: what a backward returns where it
    :func:`replays`. In the layout of ``grad``, which is that of eager: torch's BatchNorm has fewer right digits in channels_last."""
    create_graph = torch.is_grad_enabled()
    is_contiguous = grad.dim() > 2 and grad.stride(1) > grad.stride(-1)  # or part of what is
    with torch.enable_grad():
        # one input may have been computed from another: what is differentiated begins here
        own = [t if t is None or not t.requires_grad else t.view_as(t) for t in inputs]
        y = reference(*([t if t is None else t.contiguous() for t in own] if is_contiguous else own))
    wanted = [t for t in own if t is not None and t.requires_grad]
    found = iter(torch.autograd.grad(y, wanted, grad, create_graph=create_graph, allow_unused=True))
    return [next(found) if t is not None and t.requires_grad else None for t in own]


class Anchor(torch.autograd.Function):
    """``apply(x)``: a tensor of x's shape with the memory of one element, at x's place in the graph. A Function that has x's values
    elsewhere keeps it instead of x; :class:`Refill` gives it those values where the backward is differentiated."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x.new_zeros(1).expand(x.shape)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return grad


class Refill(torch.autograd.Function):
    """``apply(anchor, values)``: ``values``, at the place of ``anchor`` in the graph."""

    @staticmethod
    def forward(ctx, anchor: Tensor, values: Tensor) -> Tensor:
        return values.clone()

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None
