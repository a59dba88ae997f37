"""The dense block in one preallocated buffer (Huang et al. 2016, arXiv 1608.06993), with bottlenecks or without.

    X_0 = x,  slice_l = conv2_l(act(BN2_l(conv1_l(act(BN1_l([X_0 .. slice_{l-1}])))))) | conv1_l(act(BN1_l([X_0 .. slice_{l-1}])))

Every layer writes its k channels into its slice: nothing is concatenated. A channel's statistics do not depend on who reads it, so they
are reduced once, where it is written. Backward, with dz_lc the gradient at the output of layer l's first BatchNorm and M rows:

    dX_c = G_c - A_c - xhat_c * B_c,  G_c = dY_c + sum_l gamma_lc * invstd_c * dz_lc        (one buffer, accumulated in place)
    A_c  = sum_l gamma_lc * invstd_c * mean(dz_lc),  B_c = sum_l gamma_lc * invstd_c * mean(dz_lc * xhat_c)

The correction (A, B) is a pending coeff of the slice's gradient, applied once, where the slice's gradient is consumed.

Memory, in maps of one channel (M values), for C_0 channels in, C_L out, and layers of bottlenecks of m_l channels, C_{L-1} what the last
layer reads. Kept for backward: the buffer and each bottleneck's raw output, once.

    forward    C_L + sum_l m_l                      kept; C_L + max_l m_l with ``recompute`` and without gradients
               + C_L                                where the output leaves for code that is not ours, as a copy
    backward   C_{L-1}                              the one gradient buffer
               + max(max_l m_l, C_0)                the gradient of a bottleneck's output, and of x once those are gone

With ``recompute`` the bottleneck outputs are not kept: backward runs the 1x1 convolutions again, from the buffer, without statistics, and
the peak is C_L + C_{L-1} + max(2 max_l m_l, C_0). The extension's float32 convolutions hold to this to the byte; those of the library add
their own maps.

In three dimensions the same (:mod:`fusedres.backends.conv3d`): everything but the 3x3x3 convolutions sees rows, and those are the
library's.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..backends.contract import Backend
from ..backends.conv3d import for_maps
from ..backends.layout import as_map, channel_empty, empty_map, row_count
from ..checks import check_conv, check_map, check_norm
from ..errors import Unsupported
from ..operands import Epilogue, GradTarget, LazyGrad, LazyMap
from ..specs import BlockSpec, Conv, Forward, Norm, Shape
from .steps import (
    Anchor,
    Refill,
    bias_grad,
    bias_grad_behind_norm,
    frozen_ahead,
    gradients,
    identity_coeff,
    needs_autograd,
    new_reduction,
    new_stats,
    norm_backward,
    norm_grads,
    normalize,
    record,
    replay,
    replays,
)


@dataclass(frozen=True)
class Layer:
    """norm1-act-conv1-norm2-act-conv2, or, without a bottleneck, norm1-act-conv1."""

    norm1: Norm
    conv1: Conv
    norm2: Norm | None = None
    conv2: Conv | None = None

    @property
    def last(self) -> Conv:
        """The convolution that writes the layer's slice."""
        return self.conv1 if self.conv2 is None else self.conv2

    @property
    def growth(self) -> int:
        """Channels that the layer adds."""
        return self.last.weight.shape[0]


class OfLayer(NamedTuple):
    """One value per differentiable tensor of a layer: the tensors themselves, which of them need a gradient, or those gradients."""

    norm1_weight: Any = None
    norm1_bias: Any = None
    conv1_weight: Any = None
    conv1_bias: Any = None
    norm2_weight: Any = None
    norm2_bias: Any = None
    conv2_weight: Any = None
    conv2_bias: Any = None

    @classmethod
    def split(cls, flat: Sequence[Any]) -> list[OfLayer]:
        """One for each layer."""
        size = len(cls._fields)
        return [cls(*flat[i : i + size]) for i in range(0, len(flat), size)]


class _Kept(NamedTuple):
    """What backward needs of a layer: its bottleneck's raw output (None without one and with ``recompute``) and the vectors with which it
    reads the buffer and the bottleneck."""

    mid: Tensor | None
    scale_shift1: Tensor | None
    mean_invstd1: Tensor | None
    scale_shift2: Tensor | None
    mean_invstd2: Tensor | None


@dataclass(frozen=True)
class Dense(BlockSpec):
    """A dense block of ``layers``; ``recompute``: backward runs the bottlenecks' 1x1 convolutions again."""

    layers: tuple[Layer, ...]
    recompute: bool = False

    @functools.cached_property
    def tensors(self) -> list[Tensor | None]:
        """The differentiable tensors, as :class:`OfLayer` for each layer."""
        found: list[Tensor | None] = []
        for layer in self.layers:
            norm2, conv2 = layer.norm2, layer.conv2
            found += OfLayer(
                layer.norm1.weight, layer.norm1.bias, layer.conv1.weight, layer.conv1.bias,
                *((None, None) if norm2 is None else (norm2.weight, norm2.bias)),
                *((None, None) if conv2 is None else (conv2.weight, conv2.bias)),
            )  # fmt: skip
        return found

    @functools.cached_property
    def recomputing(self) -> Dense:
        return replace(self, recompute=True)

    @functools.cached_property
    def growth(self) -> int:
        """Channels that all layers add."""
        return sum(layer.growth for layer in self.layers)

    @functools.cached_property
    def measures(self) -> bool:
        """Whether the statistics of the slices are reduced where they are written."""
        return any(layer.norm1.training for layer in self.layers)

    def out_shape(self, shape: Shape) -> Shape:
        return (shape[0], shape[1] + self.growth, *shape[2:])

    def check(self, x: Tensor, source: Tensor | None = None) -> None:
        weight = self.layers[0].conv1.weight
        check_map(x, weight.dtype, self, weight.dim())
        shape = tuple(x.shape)
        for layer in self.layers:
            check_norm(layer.norm1, shape, x)
            mid = out = check_conv(layer.conv1, shape, x)
            if layer.norm2 is not None and layer.conv2 is not None:
                check_norm(layer.norm2, mid, x)
                out = check_conv(layer.conv2, mid, x)
            if out[2:] != shape[2:] or mid[2:] != shape[2:]:
                raise Unsupported(f"a layer changes the spatial size from {shape[2:]} to {out[2:]}")
            shape = (shape[0], shape[1] + out[1], *shape[2:])

    def run(
        self,
        backend: Backend,
        x: Tensor,
        source: Tensor | None = None,
        *,
        stats: Tensor | None = None,
        out: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """The result is the buffer, which the autograd node keeps: whoever changes it in place, or gives it to someone who may, copies it
        before."""
        backend = for_maps(backend, x.dim())
        if needs_autograd(x, *self.tensors):
            anchor = Anchor.apply(x) if x.requires_grad else None
            return DenseFunction.apply(backend, self, anchor, x, *self.tensors)
        x = as_map(x)
        buffer, found = backend.run_schedule(
            self.memo, "run", (x,), self.operands, lambda: self.forward(backend, x, keep=False)[:2]
        )
        assert buffer is not None
        return buffer, found

    def forward(self, backend: Backend, x: Tensor, keep: bool) -> tuple[Tensor, Tensor | None, list[Tensor | None]]:
        """``(buffer, its statistics, what backward needs: a flat row of _Kept)``; the last is empty without ``keep``."""
        backend = frozen_ahead(backend, [norm for layer in self.layers for norm in (layer.norm1, layer.norm2)])
        end = x.shape[1]
        total = end + self.growth
        buffer = empty_map((x.shape[0], total, *x.shape[2:]), x)
        stats = channel_empty(2, total, x) if self.measures else None

        def stats_of(start: int, stop: int) -> Tensor | None:
            return None if stats is None else stats[:, start:stop]

        backend.add_act_forward(LazyMap(x), out=buffer[:, :end], stats=stats_of(0, end))
        kept: list[Tensor | None] = []
        for layer in self.layers:
            norm1 = layer.norm1
            last = end + layer.growth
            into = Epilogue(out=buffer[:, end:last], stats=stats_of(end, last))
            seen = normalize(backend, norm1, buffer[:, :end], stats_of(0, end) if norm1.training else None)
            mid = read = seen
            if layer.conv2 is not None:
                mid, read = self._bottleneck(backend, layer, seen, keep)
            backend.conv_forward(read, layer.last.weight, layer.last.bias, layer.last.geometry, into)
            if keep and layer.conv2 is None:
                kept += _Kept(None, seen.scale_shift, seen.mean_invstd, None, None)
            elif keep:
                raw = None if self.recompute else mid.raw
                kept += _Kept(raw, seen.scale_shift, seen.mean_invstd, mid.scale_shift, mid.mean_invstd)
            del mid, read  # freed before the next layer's bottleneck is allocated
            end = last
        return buffer, stats, kept

    @staticmethod
    def _bottleneck(backend: Backend, layer: Layer, seen: LazyMap, keep: bool) -> tuple[LazyMap, LazyMap]:
        """``(the bottleneck behind its BatchNorm, what conv2 reads)``: the same, but for inference, where BatchNorm and activation are in
        conv1's epilogue."""
        conv1, norm2 = layer.conv1, layer.norm2
        assert norm2 is not None
        if keep or norm2.training:
            stats = new_stats(backend, norm2, conv1.weight.shape[0], seen.raw)
            raw = backend.conv_forward(seen, conv1.weight, conv1.bias, conv1.geometry, Epilogue(stats=stats))
            mid = normalize(backend, norm2, raw, stats)
            return mid, mid
        y = backend.conv_norm_forward(seen, conv1.weight, conv1.bias, conv1.geometry, norm2, act=norm2.act)
        return LazyMap(y), LazyMap(y)

    @property
    def keeps_output(self) -> bool:
        return True

    def record(
        self, backend: Backend, x: Tensor, source: Tensor | None, stats: Tensor | None, out: Tensor | None = None
    ) -> Forward:
        return Forward(*self.forward(backend, x, keep=True))

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
        size = len(_Kept._fields)
        of_layers = [_Kept(*kept[i : i + size]) for i in range(0, len(kept), size)]
        need_x, _, *need_tensors = need
        walk = _Backward(backend, self, held, grad)
        # from the last layer to the first; what a layer has kept is freed by nobody but the graph
        rows = zip(self.layers, of_layers, OfLayer.split(tensors), OfLayer.split(need_tensors), strict=True)
        found = [walk.layer(*row) for row in reversed(list(rows))]
        dx = walk.input_grad() if need_x else None
        return dx, None, *(g for grads in reversed(found) for g in grads)

    def reference(self, x: Tensor, source: Tensor | None, *tensors: Tensor | None) -> Tensor:
        seen = x
        for layer, t in zip(self.layers, OfLayer.split(tensors), strict=True):
            mid = layer.norm1.reference(seen, t.norm1_weight, t.norm1_bias)
            mid = layer.conv1.reference(mid, t.conv1_weight, t.conv1_bias, layer.norm2)
            if layer.norm2 is not None and layer.conv2 is not None:
                mid = layer.norm2.reference(mid, t.norm2_weight, t.norm2_bias)
                mid = layer.conv2.reference(mid, t.conv2_weight, t.conv2_bias)
            seen = torch.cat([seen, mid], 1)
        return seen


class DenseFunction(torch.autograd.Function):
    """``apply(backend, spec, anchor, x, *spec.tensors) -> (X, stats)``; stats is not differentiable. ``anchor`` stands for x in the graph
    (None where x needs no gradient): the buffer has x's values, so that x itself is not kept."""

    @staticmethod
    def forward(
        ctx: Any, backend: Backend, spec: Dense, anchor: Tensor | None, x: Tensor, *tensors: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        buffer, stats, kept = record(spec, backend, as_map(x), None, None)
        ctx.backend, ctx.spec = backend, spec
        ctx.save_for_backward(anchor, buffer, *kept, *tensors)
        ctx.set_materialize_grads(False)
        if stats is not None:
            ctx.mark_non_differentiable(stats)
        return buffer, stats

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * len(ctx.needs_input_grad)
        spec = ctx.spec
        anchor, buffer, *rest = ctx.saved_tensors
        kept, tensors = rest[: -len(spec.tensors)], rest[-len(spec.tensors) :]
        if replays(grad):
            values = buffer[:, : buffer.shape[1] - spec.growth].detach()
            with torch.enable_grad():
                x = values if anchor is None else Refill.apply(anchor, values)
            inputs = (x, *tensors)
            return None, None, None, *replay(lambda x, *t: spec.reference(x, None, *t), inputs, grad)
        need_x, *need = ctx.needs_input_grad[3:]
        dx, _, *grads = gradients(spec, ctx.backend, grad, buffer, None, kept, tensors, (need_x, False, *need))
        return None, None, None, dx, *grads


class _Backward:
    """The backward of one dense block: the one gradient buffer, with the corrections that are pending on it, from the last layer down."""

    def __init__(self, backend: Backend, spec: Dense, buffer: Tensor, grad: Tensor) -> None:
        self.backend, self.buffer, self.grad = backend, buffer, grad
        total = buffer.shape[1]
        self.end, self.rows = total, row_count(buffer)
        below = total - spec.layers[-1].growth  # the last layer's own slice is read by nobody
        self.gathered = empty_map((buffer.shape[0], below, *buffer.shape[2:]), buffer)
        self.coeff = identity_coeff(total, buffer)

    def layer(self, layer: Layer, kept: _Kept, tensors: OfLayer, need: OfLayer) -> OfLayer:
        """The gradients of the layer below what has been done, whose reads are added to the gradient buffer."""
        backend, start = self.backend, self.end - layer.growth
        assert kept.mean_invstd1 is not None  # every layer begins with a BatchNorm
        topmost = self.end == self.buffer.shape[1]
        own = LazyGrad(self.grad[:, start : self.end])
        if not topmost:
            own = LazyGrad(
                self.gathered[:, start : self.end], self.buffer[:, start : self.end], self.coeff[:, start : self.end]
            )
        seen = LazyMap(self.buffer[:, :start], kept.scale_shift1, layer.norm1.act, kept.mean_invstd1)
        grads: dict[str, Tensor | None] = {}
        if layer.conv2 is None:
            below = own
            if need.conv1_bias:
                grads["conv1_bias"] = bias_grad(own.grad, tensors.conv1_bias, own.raw, own.coeff)
        else:
            below = self._bottleneck(layer, kept.mid, kept, seen, own, tensors, need, grads)
        # conv1 <- norm1, into the one gradient buffer
        sums = new_reduction(backend, layer.norm1, start, self.buffer)
        target = GradTarget(
            dx=self.gathered[:, :start],
            base=self.grad[:, :start] if topmost else None,
            accumulate=not topmost,
            scaled=True,
            sums=sums,
        )
        _, grads["conv1_weight"] = backend.conv_backward(
            below, seen, tensors.conv1_weight, layer.conv1.geometry, target, need.conv1_weight
        )
        norm_backward(
            backend, layer.norm1, tensors.norm1_weight, sums, self.rows, kept.mean_invstd1, self.coeff[:, :start], True
        )
        grads["norm1_weight"], grads["norm1_bias"] = norm_grads(
            backend, layer.norm1, sums, need.norm1_weight, need.norm1_bias
        )
        self.end = start
        return OfLayer(**grads)

    def _bottleneck(
        self,
        layer: Layer,
        raw: Tensor | None,
        kept: _Kept,
        seen: LazyMap,
        own: LazyGrad,
        tensors: OfLayer,
        need: OfLayer,
        grads: dict[str, Tensor | None],
    ) -> LazyGrad:
        """The gradient of conv1's output, pending norm2's correction; ``grads`` gets those of conv2 and norm2."""
        backend, norm2, conv2 = self.backend, layer.norm2, layer.conv2
        assert norm2 is not None and conv2 is not None and kept.mean_invstd2 is not None
        if raw is None:
            raw = backend.conv_forward(seen, tensors.conv1_weight, tensors.conv1_bias, layer.conv1.geometry)
        mid = LazyMap(raw, kept.scale_shift2, norm2.act, kept.mean_invstd2)
        sums, coeff = new_reduction(backend, norm2, raw.shape[1], raw), channel_empty(3, raw.shape[1], raw)
        if need.conv2_bias:
            grads["conv2_bias"] = bias_grad(own.grad, tensors.conv2_bias, own.raw, own.coeff)
        dz, grads["conv2_weight"] = backend.conv_backward(
            own, mid, tensors.conv2_weight, conv2.geometry, GradTarget(sums=sums), need.conv2_weight
        )
        assert dz is not None
        norm_backward(backend, norm2, tensors.norm2_weight, sums, self.rows, kept.mean_invstd2, coeff)
        grads["norm2_weight"], grads["norm2_bias"] = norm_grads(
            backend, norm2, sums, need.norm2_weight, need.norm2_bias
        )
        below = LazyGrad(dz, raw if norm2.training else None, coeff)
        if need.conv1_bias and norm2.group is not None:
            grads["conv1_bias"] = bias_grad(dz, tensors.conv1_bias, below.raw, coeff)
        elif need.conv1_bias:
            grads["conv1_bias"] = bias_grad_behind_norm(norm2, sums, coeff, tensors.conv1_bias)
        return below

    def input_grad(self) -> Tensor:
        """The gradient of x, once all layers are done."""
        x = slice(0, self.end)
        return self.backend.apply_grad_coeff(LazyGrad(self.gathered[:, x], self.buffer[:, x], self.coeff[:, x]))
