"""The residual block: convolutions in a row with their BatchNorms and activations, with or without a shortcut around them.

    a_0 = act_0(BN_0(x)) | x,  raw_i = conv_i(a_{i-1}),  a_i = act_i(BN_i(raw_i))
    y   = act(BN_n(raw_n) + shortcut) | act(raw_n + shortcut),  shortcut = x | BN_d(conv_d(pool(x or a_0))) | ... | nothing
    y   = t * a_n + (1 - t) * x,  t = sigmoid(BN_d(conv_d(x))): a highway

One description for the basic block (2 units), the bottleneck (3), the plain conv-BN-act (1), the stem (1 and a max pool), for their
pre-activation forms (BN_0 in front, nothing behind the last convolution) and, without units, for the addition alone or BN-act alone: what
is left where a block is split around a module that is not fused. He et al. 2015 (arXiv 1512.03385), figures 2 and 5; He et al. 2016
(arXiv 1603.05027), figure 1b; the highway: Srivastava et al. 2015 (arXiv 1505.00387).

Kept for backward: x, every raw that a BatchNorm reads, and C-sized vectors; the derivative of the last activation comes from its operands,
so that y is not kept. With ``recompute`` the raws of 1x1 convolutions are not kept either: backward runs those convolutions again, from
what is kept, without statistics. Before a pre-activation addition the sum and its statistics are the last convolution's epilogue; the
gradients of x by everything that reads a_0 gather in one map, to which BN_0's correction is applied once, as in the dense block.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import activations
from ..backends.contract import Backend
from ..backends.layout import as_map, channel_empty, empty_map
from ..checks import check_map, check_norm, check_unit
from ..errors import Unsupported
from ..operands import Epilogue, LazyMap
from ..specs import BlockSpec, Conv, Forward, Norm, Pool, Shape, Unit
from .residual_backward import Kept, OfUnit, ResidualBackward, flatten, split
from .steps import (
    conv_norm,
    frozen_ahead,
    gradients,
    kept_map,
    mean_pool,
    needs_autograd,
    normalize,
    normalize_input,
    record,
    replay,
    replays,
)


@dataclass(frozen=True)
class Subsample:
    """Every ``stride``-th pixel, with ``front`` and ``back`` channels of zeros around (He et al. 2015, option A)."""

    stride: tuple[int, int]
    front: int
    back: int

    @property
    def pads(self) -> bool:
        """Whether there are channels of zeros."""
        return self.front > 0 or self.back > 0

    def out_shape(self, shape: Shape) -> Shape:
        """The shape of the output for an input of ``shape``."""
        spatial = ((size - 1) // s + 1 for size, s in zip(shape[2:], self.stride, strict=True))
        return (shape[0], self.front + shape[1] + self.back, *spatial)

    def forward(self, x: Tensor) -> Tensor:
        """The map of those pixels and channels."""
        y = empty_map(self.out_shape(tuple(x.shape)), x)
        end = self.front + x.shape[1]
        if self.pads:
            y[:, : self.front].zero_()
            y[:, end:].zero_()
        y[:, self.front : end].copy_(x[:, :, :: self.stride[0], :: self.stride[1]])
        return y

    def reference(self, x: Tensor) -> Tensor:
        """The definition, in plain PyTorch."""
        return F.pad(x[:, :, :: self.stride[0], :: self.stride[1]], (0, 0, 0, 0, self.front, self.back))

    def backward(self, grad: Tensor, shape: Shape) -> Tensor:
        """The gradient of the input, of ``shape``."""
        dx = empty_map(shape, grad).zero_()
        dx[:, :, :: self.stride[0], :: self.stride[1]] = grad[:, self.front : self.front + shape[1]]
        return dx


@dataclass(frozen=True)
class Shortcut:
    """What is added: a mean pool, then a subsampling, then a convolution with or without BatchNorm, of the block's input; what is None is
    left out, so that ``Shortcut()`` is the identity. ``activated``: of a_0 instead, which wants ``unit`` and no ``subsample``. ``gated``:
    not added; ``unit`` (and nothing else) is the gate of a highway, whose carry is the block's input."""

    pool: Pool | None = None
    subsample: Subsample | None = None
    unit: Unit | None = None
    activated: bool = False
    gated: bool = False

    def pooled(self, shape: Shape) -> Shape:
        """The shape behind ``pool``."""
        return tuple(shape) if self.pool is None else self.pool.out_shape(shape)

    def out_shape(self, shape: Shape) -> Shape:
        """The shape in front of ``unit``."""
        shape = self.pooled(shape)
        return shape if self.subsample is None else self.subsample.out_shape(shape)

    def read(self, backend: Backend, x: LazyMap) -> LazyMap:
        """What ``unit`` reads, or the addition without one."""
        if self.pool is not None:
            x = LazyMap(mean_pool(backend, x, self.pool))
        return x if self.subsample is None else LazyMap(self.subsample.forward(x.raw))


@dataclass
class _Forward:
    """What a forward leaves: ``maps`` (the input first, each behind its BatchNorm; None for one that exists only in a sum), ``side``, that
    of the shortcut's unit, the result ``y`` with its ``stats``, and the ``index`` of a max pool."""

    maps: list[LazyMap | None]
    side: LazyMap | None = None
    y: Any = None
    stats: Tensor | None = None
    index: Tensor | None = None


@dataclass(frozen=True)
class Residual(BlockSpec):
    """A residual block. Only the last unit may lack its BatchNorm; ``pool`` (max) wants one unit, no ``first`` and no shortcut.

    ``act`` is the activation behind the addition; the last unit's own is then ``"none"``. Without a shortcut, or with a gated one, the last
    unit's activation is the block's and ``act`` is ``"none"``.
    """

    units: tuple[Unit, ...]
    first: Norm | None = None
    shortcut: Shortcut | None = None
    act: str = "none"
    pool: Pool | None = None
    recompute: bool = False

    # ---- what follows from the fields --------------------------------------------------------------------------------

    @functools.cached_property
    def projection(self) -> Unit | None:
        """The convolution of the shortcut."""
        return None if self.shortcut is None else self.shortcut.unit

    @functools.cached_property
    def gated(self) -> bool:
        """Whether it is a highway."""
        return self.shortcut is not None and self.shortcut.gated

    @functools.cached_property
    def norms(self) -> tuple[Norm | None, ...]:
        """The BatchNorm behind the input, those behind the units, that behind the shortcut's unit."""
        behind = None if self.projection is None else self.projection.norm
        return (self.first, *(unit.norm for unit in self.units), behind)

    @functools.cached_property
    def adds_in_epilogue(self) -> bool:
        """Whether the addition is in the last convolution's epilogue: nothing but a sum follows it."""
        return bool(self.units) and self.units[-1].norm is None and self.act == "none" and not self.gated

    @functools.cached_property
    def measures(self) -> bool:
        """Whether the statistics of the output are reduced where it is written: another pre-activation block follows, most likely."""
        return self.first is not None and self.first.training and self.shortcut is not None and not self.gated

    @functools.cached_property
    def trains(self) -> bool:
        """Whether a BatchNorm uses its batch."""
        return any(norm is not None and norm.training for norm in self.norms)

    @functools.cached_property
    def all_units(self) -> tuple[Unit, ...]:
        """The units of the main path, then the shortcut's."""
        return self.units if self.projection is None else (*self.units, self.projection)

    @functools.cached_property
    def recomputing(self) -> Residual:
        return replace(self, recompute=True)

    @property
    def writes_into(self) -> bool:
        return True

    def act_behind(self, i: int) -> str:
        """The activation behind map ``i`` (0: the input, i: unit i's output)."""
        norm = self.norms[i]
        return "none" if norm is None else norm.act

    def recomputes(self, i: int) -> bool:
        """Whether backward recomputes map ``i`` (n + 1: that of the shortcut's unit)."""
        return self.recompute and i > 0 and all(size == 1 for size in self.all_units[i - 1].conv.weight.shape[2:])

    @functools.cached_property
    def tensors(self) -> list[Tensor | None]:
        """The differentiable tensors: ``first``'s weight and bias, then those of each unit (:class:`OfUnit`), the shortcut's last."""

        def of(unit: Unit | None) -> OfUnit:
            if unit is None:
                return OfUnit()
            norm = unit.norm
            return OfUnit(
                unit.conv.weight, unit.conv.bias, *((None, None) if norm is None else (norm.weight, norm.bias))
            )

        first = OfUnit() if self.first is None else OfUnit(None, None, self.first.weight, self.first.bias)
        return flatten([first, *map(of, (*self.units, self.projection))])

    def out_shape(self, shape: Shape) -> Shape:
        for unit in self.units:
            shape = unit.conv.out_shape(shape)
        return tuple(shape) if self.pool is None else self.pool.out_shape(shape)

    # ---- checks ------------------------------------------------------------------------------------------------------

    def check(self, x: Tensor, source: Tensor | None = None) -> None:
        activations.parse(self.act)
        dtype = next((unit.conv.weight.dtype for unit in self.all_units), x.dtype)
        check_map(x, dtype, self)
        shape = tuple(x.shape)
        if self.first is not None:
            check_norm(self.first, shape, x)
        for unit in self.units:
            shape = check_unit(unit, shape, x)
        if self.shortcut is not None:
            read = x if source is None else source
            check_map(read, dtype, self)
            self._check_shortcut(self.shortcut, read, shape)
        if self.pool is not None:
            sizes = zip(shape[2:], self.pool.kernel, self.pool.padding, strict=True)
            if any(size + 2 * pad < kernel for size, kernel, pad in sizes):
                raise Unsupported("a pooling window larger than its input")

    def _check_shortcut(self, shortcut: Shortcut, read: Tensor, main: Shape) -> None:
        projected = "none" if self.norms[-1] is None else self.norms[-1].act
        if not shortcut.gated and (projected, self.act_behind(len(self.units))) != ("none", "none"):
            raise Unsupported("an activation in front of the addition")
        shape = shortcut.out_shape(tuple(read.shape))
        if min(shape[2:]) < 1:
            raise Unsupported("a pooling window larger than its input")
        if shortcut.unit is not None:
            shape = check_unit(shortcut.unit, shape, read)
        if shape != main:
            raise Unsupported(f"its {'gate' if shortcut.gated else 'shortcut'} gives {shape}, its main path {main}")
        if not shortcut.gated:
            return
        last, gate = self.act_behind(len(self.units)), self.norms[-1]
        if gate is not None and gate.act != "none":
            raise Unsupported(f"a highway whose gate has {gate.act} in front of its sigmoid")
        if self.act != "none" or last not in ("none", "relu"):
            raise Unsupported(
                f"a highway whose candidate ends in {last} and its addition in {self.act}, not in ReLU or nothing"
            )
        if tuple(read.shape) != main:
            raise Unsupported(f"a highway carries {tuple(read.shape)} past a main path that gives {main}")

    # ---- running -----------------------------------------------------------------------------------------------------

    def run(
        self,
        backend: Backend,
        x: Tensor,
        source: Tensor | None = None,
        *,
        stats: Tensor | None = None,
        out: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        # out here, so that what the Function keeps are its inputs, which double backward differentiates
        source = None if source is None else as_map(source)
        if needs_autograd(x, source, *self.tensors):
            x = kept_map(x, *self._weights_on_input(source is None))
            return ResidualFunction.apply(backend, self, stats, (out,), x, source, *self.tensors)
        x = as_map(x)

        def schedule() -> tuple[Tensor, Tensor | None]:
            if self.trains:
                state = self.forward(backend, x, source, stats, out)
                return state.y, state.stats
            return self.infer(backend, x, source, out), None

        y, measured = backend.run_schedule(self.memo, "run", (x, source, stats, out), self.operands, schedule)
        assert y is not None
        return y, measured

    def _weights_on_input(self, root: bool) -> list[Tensor | None]:
        """The tensors whose gradients need the input; ``root``: whether the shortcut reads it, too."""
        readers: list[Norm | Conv | None] = [self.first if self.first or not self.units else self.units[0].conv]
        if root and self.shortcut is not None and self.shortcut.unit is not None:
            readers.append(self.shortcut.unit.conv)
        return [t for reader in readers if reader is not None for t in (reader.weight, reader.bias)]

    def infer(self, backend: Backend, x: Tensor, source: Tensor | None, out: Tensor | None) -> Tensor:
        """By running statistics: each convolution with its BatchNorm, activation and addition in one epilogue."""
        backend = frozen_ahead(backend, self.norms)
        h, root = normalize(backend, self.first, x, None), x if source is None else source
        residual: LazyMap | None = None
        shortcut, n = self.shortcut, len(self.units)
        if shortcut is not None:
            residual = shortcut.read(backend, h if shortcut.activated else LazyMap(root))
            if shortcut.unit is not None:
                conv = shortcut.unit.conv
                raw = backend.conv_forward(residual, conv.weight, conv.bias, conv.geometry)
                residual = normalize(backend, shortcut.unit.norm, raw, None)
        for i, unit in enumerate(self.units, 1):
            conv, norm = unit.conv, unit.norm
            is_last = i == n and not self.gated
            adds = residual if is_last else None
            act = self.act_behind(i) if adds is None else self.act
            place = out if is_last and self.pool is None else None
            if norm is None:
                epilogue = Epilogue(place, residual=adds, act=act)
                y = backend.conv_forward(h, conv.weight, conv.bias, conv.geometry, epilogue)
            else:
                y = backend.conv_norm_forward(
                    h, conv.weight, conv.bias, conv.geometry, norm, out=place, residual=adds, act=act
                )
            h = LazyMap(y)
        if self.gated and residual is not None:
            return backend.highway_forward(h, residual, root, out=out)
        if not self.units:
            return self._add(backend, h, residual, out, None)
        return h.raw if self.pool is None else backend.pool_forward(h, self.pool, out=out)[0]

    def _add(
        self, backend: Backend, h: LazyMap, residual: LazyMap | None, out: Tensor | None, stats: Tensor | None
    ) -> Tensor:
        """The last pass: ``act(h + residual)``, or h behind its own activation."""
        act = h.act if self.shortcut is None else self.act
        return backend.add_act_forward(h.before_act, residual, act, out=out, stats=stats)

    def forward(
        self, backend: Backend, x: Tensor, source: Tensor | None, stats: Tensor | None, out: Tensor | None
    ) -> _Forward:
        """In training: every map raw, as backward reads it."""
        backend = frozen_ahead(backend, self.norms)
        shortcut, n = self.shortcut, len(self.units)
        h = begin = normalize_input(backend, self.first, x, stats)
        state = _Forward([begin])
        for unit in self.units[: n - 1] if self.adds_in_epilogue else self.units:
            h = conv_norm(backend, unit, h)
            state.maps.append(h)
        root = x if source is None else source
        residual: LazyMap | None = None
        if shortcut is not None:
            residual = shortcut.read(backend, begin if shortcut.activated else LazyMap(root))
            if shortcut.unit is not None:
                residual = state.side = conv_norm(backend, shortcut.unit, residual)
        if self.measures:
            state.stats = channel_empty(2, self.units[-1].conv.weight.shape[0] if n else x.shape[1], x)
        if self.pool is not None:
            state.y, state.index = backend.pool_forward(h, self.pool, out=out)
        elif self.gated and residual is not None:
            state.y = backend.highway_forward(h, residual, root, out=out)
        elif self.adds_in_epilogue:
            conv, epilogue = self.units[-1].conv, Epilogue(out=out, stats=state.stats, residual=residual)
            state.y = backend.conv_forward(h, conv.weight, conv.bias, conv.geometry, epilogue)
            state.maps.append(None)  # only the sum exists, and nobody needs it
        else:
            state.y = self._add(backend, h, residual, out, state.stats)
        return state

    def record(
        self, backend: Backend, x: Tensor, source: Tensor | None, stats: Tensor | None, out: Tensor | None = None
    ) -> Forward:
        state = self.forward(backend, x, source, stats, out)
        kept = Kept.of(state.maps, state.side)
        kept.raws[0] = None  # the input itself
        for i in range(1, len(kept.raws)):
            if kept.raws[i] is not None and self.recomputes(i):
                kept.raws[i] = None
        side = state.side
        if side is not None and side.is_plain and self.act == "none" and not self.gated:
            kept.raws[-1] = None  # read by no activation and no BatchNorm
        return Forward(state.y, state.stats, [state.index, *kept.flatten()])

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
        index, *rest = kept
        maps = Kept.split(rest, len(self.units) + 2)
        maps.raws[0] = held
        need_x, need_source, *need_tensors = need
        step = ResidualBackward(
            backend, self, maps, split(tensors), split(need_tensors), need_x, need_source, source, index
        )
        return step.run(grad)

    def reference(self, x: Tensor, source: Tensor | None, *tensors: Tensor | None) -> Tensor:
        first, *of_units = split(tensors)

        def apply(unit: Unit, t: OfUnit, h: Tensor) -> Tensor:
            h = unit.conv.reference(h, t.weight, t.bias, unit.norm)
            return h if unit.norm is None else unit.norm.reference(h, t.norm_weight, t.norm_bias)

        h = x if self.first is None else self.first.reference(x, first.norm_weight, first.norm_bias)
        activated, root, shortcut = h, x if source is None else source, self.shortcut
        for unit, t in zip(self.units, of_units, strict=False):
            h = apply(unit, t, h)
        if shortcut is not None:
            s = activated if shortcut.activated else root
            if shortcut.pool is not None:
                s = F.avg_pool2d(s, shortcut.pool.kernel, shortcut.pool.stride, 0, shortcut.pool.ceil)
            if shortcut.subsample is not None:
                s = shortcut.subsample.reference(s)
            if shortcut.unit is not None:
                s = apply(shortcut.unit, of_units[-1], s)
            if shortcut.gated:
                gate = torch.sigmoid(s)
                h = gate * h + (1 - gate) * root
            else:
                h = activations.value(h + s, self.act)
        return h if self.pool is None else F.max_pool2d(h, self.pool.kernel, self.pool.stride, self.pool.padding)


class ResidualFunction(torch.autograd.Function):
    """``apply(backend, spec, stats, (out,), x, source, *spec.tensors) -> (y, stats of y)`` for maps; stats are not differentiable. ``out``
    is packed so that autograd takes it for an output alone."""

    @staticmethod
    def forward(
        ctx: Any,
        backend: Backend,
        spec: Residual,
        stats: Tensor | None,
        held: tuple[Tensor | None],
        x: Tensor,
        source: Tensor | None,
        *tensors: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        y, measured, kept = record(spec, backend, x, source, stats, *held)
        ctx.backend, ctx.spec = backend, spec
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, source, *kept, *tensors)
        if measured is not None:
            ctx.mark_non_differentiable(measured)
        return y, measured

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * len(ctx.needs_input_grad)
        spec = ctx.spec
        x, source, *rest = ctx.saved_tensors
        kept, tensors = rest[: -len(spec.tensors)], rest[-len(spec.tensors) :]
        if replays(grad):
            return None, None, None, None, *replay(spec.reference, (x, source, *tensors), grad)
        need = ctx.needs_input_grad[4:]
        return None, None, None, None, *gradients(spec, ctx.backend, grad, x, source, kept, tensors, need)
