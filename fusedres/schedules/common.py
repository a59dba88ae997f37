"""What the schedules share: the description of a convolution with its BatchNorm, and the C-sized steps between passes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from .. import activations
from ..backends import eager
from ..backends.eager import Geometry, Pool, accum_dtype
from ..backends.vendor import as_map, format_of

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@dataclass(frozen=True)
class Norm:
    """A BatchNorm as the schedules see it.

    ``training``: normalise by the statistics of the batch (else by the running ones). ``momentum`` is the factor of this step's update
    of the running statistics, which is skipped where they are None. ``act`` is a name of :mod:`fusedres.activations`. ``group``: the
    processes whose batches are normalised as one, by a SyncBatchNorm in training; None for this process's batch alone. ``promotes``:
    whether its float32 tensors make a float32 map of one in 16 bits, as arithmetic on tensors does and a BatchNorm does not.
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


@dataclass(frozen=True)
class Conv:
    """A convolution as the schedules see it."""

    weight: Tensor
    bias: Tensor | None
    geometry: Geometry

    def out_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the output for an input of ``shape``."""
        g = self.geometry
        spatial = (
            (size + 2 * g.padding[i] - g.dilation[i] * (self.weight.shape[2 + i] - 1) - 1) // g.stride[i] + 1
            for i, size in enumerate(shape[2:])
        )
        return (shape[0], self.weight.shape[0], *spatial)


@dataclass(frozen=True)
class Unit:
    """A convolution followed by its BatchNorm and activation, or by nothing."""

    conv: Conv
    norm: Norm | None


def conv_tensors(conv: Conv) -> tuple[Tensor | None, ...]:
    """The differentiable tensors of a convolution, in the order in which the Functions take them."""
    return conv.weight, conv.bias


def norm_tensors(norm: Norm) -> tuple[Tensor | None, ...]:
    """The differentiable tensors of a BatchNorm, in the order in which the Functions take them."""
    return norm.weight, norm.bias


def count(x: Tensor) -> int:
    """Values per channel."""
    return x.numel() // x.shape[1]


def channel_empty(rows: int, channels: int, like: Tensor) -> Tensor:
    """An uninitialised ``[rows, channels]`` per-channel tensor for maps like ``like``."""
    return torch.empty(rows, channels, dtype=accum_dtype(like.dtype), device=like.device)


def empty_map(shape: tuple[int, ...], like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """An uninitialised channels_last map, in the dtype of ``like`` where none is given."""
    return torch.empty(shape, dtype=dtype or like.dtype, device=like.device, memory_format=format_of(len(shape)))


def reduction(backend, norm: Norm, channels: int, like: Tensor):
    """Room for two reductions per channel that one C-sized step of ``norm`` reads next (:func:`coefficients`, :func:`norm_backward`): a
    tensor, or where the backend has one a form of its own, which lets it merge partial results in that step. What processes exchange is
    merged before: always a tensor."""
    make = getattr(backend, "new_reduction", None) if norm.group is None else None
    return channel_empty(2, channels, like) if make is None else make(channels, like)


def new_stats(backend, norm: Norm, channels: int, like: Tensor):
    """Room for the statistics that a BatchNorm in training needs, None where it uses the running ones."""
    return reduction(backend, norm, channels, like) if norm.training else None


def coefficients(backend, norm: Norm, stats: Tensor | None, raw: Tensor) -> tuple[Tensor, Tensor]:
    """``(affine, saved)`` of ``norm`` for ``raw``; updates the running statistics in training."""
    if not norm.training:
        return frozen(backend, norm, raw)
    finish, rows = backend.bn_coefficients, count(raw)
    if norm.group is not None:
        # the common number of rows stays on the device, where only eager's arithmetic takes it: C numbers, next to a collective
        finish = eager.bn_coefficients
        stats, rows = gathered(stats, rows, norm.group)
    return finish(stats, rows, norm.weight, norm.bias, norm.running_mean, norm.running_var, norm.momentum, norm.eps)


def gathered(stats: Tensor, rows: int, group: ProcessGroup) -> tuple[Tensor, Tensor]:
    """``(stats, rows)`` of the maps of all processes of ``group`` together, each with its own number of ``rows``, some with none; the same
    bits in every process, because each merges the same numbers in the same order.

    Chan's formula, around the mean of the process with the most rows, so that large means cost no digits.
    """
    own = torch.cat([stats.flatten(), stats.new_full((1,), rows)])
    found = own.new_empty(dist.get_world_size(group), own.numel())
    dist.all_gather(list(found.unbind()), own, group)
    rows_of = found[:, -1:]
    # the moments of no rows are NaN
    means, m2s = torch.where(rows_of > 0, found[:, :-1], 0.0).unflatten(1, stats.shape).unbind(1)
    total = rows_of.sum()
    about = means.index_select(0, rows_of.argmax(0))[0]
    mean = about + (rows_of * (means - about)).sum(0) / total
    return torch.stack([mean, (m2s + rows_of * (means - mean).square()).sum(0)]), total


def norm_backward(
    backend,
    norm: Norm,
    sums,
    rows: int,
    weight: Tensor | None,
    saved: Tensor,
    coeff: Tensor,
    accumulate: bool = False,
) -> None:
    """Write ``coeff`` from this process's ``sums`` over ``rows`` as the primitive ``bn_backward`` does, over the maps of all processes of
    ``norm.group``; ``sums`` stay this process's, as the gradients of weight and bias have to be."""
    if norm.group is None:
        backend.bn_backward(sums, rows, weight, saved, norm.training, coeff, accumulate)
        return
    total = torch.cat([sums.flatten(), sums.new_full((1,), rows)])
    dist.all_reduce(total, group=norm.group)
    # means instead of sums, over one row: the number of all rows is known on the device alone
    means = (total[:-1] / total[-1]).view_as(sums)
    backend.bn_backward(means, 1, weight, saved, norm.training, coeff, accumulate)


def frozen(backend, norm: Norm, like: Tensor) -> tuple[Tensor, Tensor]:
    """``(affine, saved)`` of ``norm`` by its running statistics."""
    return backend.bn_frozen(
        norm.weight, norm.bias, norm.running_mean, norm.running_var, norm.eps, accum_dtype(like.dtype)
    )


def gradient_of(sums, row: int, parameter: Tensor | None, needed: bool) -> Tensor | None:
    """A row of ``sums`` as the gradient of a BatchNorm's parameter."""
    if not needed:
        return None
    return sums[row].to(parameter.dtype) if isinstance(sums, Tensor) else sums.as_gradient(row, parameter.dtype)


def bias_gradient(sums, coeff: Tensor, saved: Tensor, n: int, conv: Conv, needed: bool) -> Tensor | None:
    """The gradient of a bias in front of a BatchNorm, from C numbers: ``sum(p * dz + q * raw + r)``.

    In training it is zero up to rounding, because normalisation removes the bias. Not for a BatchNorm with a ``group``, whose mean is not
    that of this process's rows: :func:`map_bias_gradient` there.
    """
    if not needed:
        return None
    return (coeff[0] * sums[0] + n * (coeff[1] * saved[0] + coeff[2])).to(conv.bias.dtype)


def map_bias_gradient(grad: Tensor, bias: Tensor, raw: Tensor | None = None, coeff: Tensor | None = None) -> Tensor:
    """The gradient of a bias that no BatchNorm follows: the sum of ``grad``, or of ``p * grad + q * raw + r`` with a pending coeff."""
    dims = [0, *range(2, grad.dim())]
    total = grad.sum(dims, dtype=accum_dtype(grad.dtype))
    if coeff is not None:
        total = coeff[0] * total + coeff[1] * raw.sum(dims, dtype=total.dtype) + count(grad) * coeff[2]
    return total.to(bias.dtype)


def mean_pool(backend, x: Tensor, affine: Tensor | None, act: str, pool: Pool) -> Tensor:
    """The mean pool of ``act(affine(x))``; the vendor's, behind a pass, where windows leave a remainder."""
    if not _remains(x, pool):
        return backend.pool_forward(x, affine, act, pool)[0]
    a = backend.join_forward(x, affine, None, None, act) if affine is not None or act != "none" else x
    return as_map(torch.ops.aten.avg_pool2d(a, pool.kernel, pool.stride, pool.padding, True, False))


def mean_pool_gradient(
    backend,
    grad: Tensor,
    x: Tensor,
    affine: Tensor | None,
    saved: Tensor | None,
    act: str,
    pool: Pool,
    sums: Tensor | None,
) -> Tensor:
    """``dz``, the gradient of affine(x) by :func:`mean_pool`, times the affine's scale where there is one; its ``sums`` if asked for."""
    if not _remains(x, pool):
        args = (grad, None, x, affine, saved, act, pool)
        if sums is not None:
            backend.pool_backward(*args, sums=sums)
        coeff = channel_empty(3, x.shape[1], x)
        coeff[0].fill_(1.0) if affine is None else coeff[0].copy_(affine[0])
        coeff[1:].zero_()
        return backend.pool_backward(*args, coeff=coeff)
    da = as_map(torch.ops.aten.avg_pool2d_backward(grad, x, pool.kernel, pool.stride, pool.padding, True, False, None))
    if affine is None and act == "none":
        return da
    return backend.dgrad_epilogue(da, x, affine, saved, act, scaled=affine is not None, sums=sums)


def _remains(x: Tensor, pool: Pool) -> bool:
    return pool.ceil and any(size % kernel for size, kernel in zip(x.shape[2:], pool.kernel, strict=True))


def functorch_active() -> bool:
    """Whether a transform of torch.func (vmap, grad, ...) is under way."""
    return torch._C._are_functorch_transforms_active()


def _batched(grad: Tensor) -> bool:
    return functorch_active() or torch._C._functorch.is_legacy_batchedtensor(grad)


def replays(grad: Tensor) -> bool:
    """Whether a backward has to be plain PyTorch: it is differentiated itself, or batched (``is_grads_batched=True``, vmap)."""
    return torch.is_grad_enabled() or _batched(grad)


def double_backward(backend, reference: Callable[..., Tensor], inputs: Sequence[Tensor | None], grad: Tensor):
    """The gradients of ``reference(*inputs)`` by operators that can be differentiated and batched: what a backward returns where it
    :func:`replays`.

    Only the eager backend offers it: the block is replayed in plain PyTorch. Raises RuntimeError on the others.
    """
    if backend.name != "eager":
        how = "batched (is_grads_batched=True, vmap)" if _batched(grad) else "differentiated with create_graph=True"
        raise RuntimeError(
            f"fusedres: the backward of a block that ran on the {backend.name!r} backend was {how}, which a fused backward cannot be. "
            'Run the forward under fusedres.use_backend("eager"), which supports it.'
        )
    wanted = [t for t in inputs if t is not None and t.requires_grad]
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        y = reference(*inputs)
    found = iter(torch.autograd.grad(y, wanted, grad, create_graph=create_graph, allow_unused=True))
    return [next(found) if t is not None and t.requires_grad else None for t in inputs]


def reference_norm(x: Tensor, norm: Norm, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """``act(BatchNorm(x))`` in plain PyTorch, running statistics untouched; RuntimeError for a BatchNorm with a ``group``."""
    if norm.group is not None:
        raise RuntimeError("fusedres: a SyncBatchNorm in training has no double backward, here as in torch")
    running = (None, None) if norm.training else (norm.running_mean, norm.running_var)
    y = F.batch_norm(x, *running, weight, bias, norm.training, 0.0, norm.eps)
    return activations.value(y, norm.act)


def reference_conv(x: Tensor, conv: Conv, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The convolution in plain PyTorch."""
    g = conv.geometry
    return torch.convolution(x, weight, bias, g.stride, g.padding, g.dilation, False, [0] * len(g.padding), g.groups)


__all__ = [
    "Conv",
    "Geometry",
    "Norm",
    "Unit",
    "as_map",
    "bias_gradient",
    "channel_empty",
    "coefficients",
    "conv_tensors",
    "count",
    "double_backward",
    "empty_map",
    "frozen",
    "functorch_active",
    "gathered",
    "gradient_of",
    "map_bias_gradient",
    "mean_pool",
    "mean_pool_gradient",
    "new_stats",
    "norm_backward",
    "norm_tensors",
    "reduction",
    "reference_conv",
    "reference_norm",
    "replays",
]
