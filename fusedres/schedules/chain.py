"""The residual chain: convolutions in a row with their BatchNorms and activations, with or without a shortcut around them.

    a_0 = act_0(BN_0(x)) | x,  raw_i = conv_i(a_{i-1}),  a_i = act_i(BN_i(raw_i))
    y   = act(BN_n(raw_n) + shortcut) | act(raw_n + shortcut),  shortcut = x | BN_d(conv_d(pool(x or a_0))) | ... | nothing
    y   = t * a_n + (1 - t) * x,  t = sigmoid(BN_d(conv_d(x))): a highway

One schedule for the basic block (2 units), the bottleneck (3), the plain conv-BN-act (1), the stem (1 and a max pool), for their
pre-activation forms (BN_0 in front, nothing behind the last convolution) and, without units, for the join alone or BN-act alone: what is
left where a block is split around a module that no schedule knows. He et al. 2015 (arXiv 1512.03385), figures 2 and 5; He et al. 2016
(arXiv 1603.05027), figure 1b; the highway: Srivastava et al. 2015 (arXiv 1505.00387).

Kept for backward: x, every raw that a BatchNorm reads, and C-sized vectors; the join's derivative comes from its operands, so that y is not
kept. With ``recompute`` the raws of 1x1 convolutions are not kept either: backward runs those convolutions again, from what is kept,
without statistics. Before a pre-activation join the sum and its statistics are the last convolution's epilogue; the gradients of x by
everything that reads a_0 gather in one map, to which BN_0's correction is applied once, as in the dense block.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import activations
from ..backends.eager import Pool
from .common import (
    Norm,
    Unit,
    as_map,
    bias_gradient,
    channel_empty,
    coefficients,
    conv_tensors,
    count,
    double_backward,
    empty_map,
    frozen,
    gradient_of,
    map_bias_gradient,
    mean_pool,
    mean_pool_gradient,
    new_stats,
    norm_backward,
    norm_tensors,
    reduction,
    reference_conv,
    reference_norm,
    replays,
)


@dataclass(frozen=True)
class Subsample:
    """Every ``stride``-th pixel, with ``front`` and ``back`` channels of zeros around (He et al. 2015, option A)."""

    stride: tuple[int, int]
    front: int
    back: int

    def out_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the output for an input of ``shape``."""
        spatial = ((size - 1) // s + 1 for size, s in zip(shape[2:], self.stride, strict=True))
        return (shape[0], self.front + shape[1] + self.back, *spatial)

    def forward(self, x: Tensor) -> Tensor:
        """The subsampled map."""
        return as_map(F.pad(x[:, :, :: self.stride[0], :: self.stride[1]], (0, 0, 0, 0, self.front, self.back)))

    def backward(self, grad: Tensor, shape: tuple[int, ...]) -> Tensor:
        """The gradient of the input, of ``shape``."""
        dx = empty_map(shape, grad).zero_()
        dx[:, :, :: self.stride[0], :: self.stride[1]] = grad[:, self.front : self.front + shape[1]]
        return dx


@dataclass(frozen=True)
class Shortcut:
    """What is added at the join: a mean pool, then a subsampling, then a convolution with or without BatchNorm, of the block's input;
    what is None is left out, so that ``Shortcut()`` is the identity. ``activated``: of a_0 instead, which wants ``unit`` and no
    ``subsample``. ``gated``: not added; ``unit`` (and nothing else) is the gate of a highway, whose carry is the block's input."""

    pool: Pool | None = None
    subsample: Subsample | None = None
    unit: Unit | None = None
    activated: bool = False
    gated: bool = False

    def pooled(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape behind ``pool``."""
        return tuple(shape) if self.pool is None else self.pool.out_shape(shape)

    def read(self, backend, x: Tensor, affine: Tensor | None, act: str) -> tuple[Tensor, Tensor | None, str]:
        """What ``unit`` reads, or the join without one: a map with its pending affine and activation."""
        if self.pool is not None:
            x, affine, act = mean_pool(backend, x, affine, act, self.pool), None, "none"
        if self.subsample is not None:
            x = self.subsample.forward(x)
        return x, affine, act


@dataclass(frozen=True)
class Chain:
    """A residual chain. Only the last unit may lack its BatchNorm; ``pool`` (max) wants one unit, no ``first`` and no shortcut.

    ``act`` is the activation of the join; the last unit's own is then ``"none"``. Without a shortcut, or with a gated one, the last
    unit's activation is the chain's and ``act`` is ``"none"``.
    """

    units: tuple[Unit, ...]
    first: Norm | None = None
    shortcut: Shortcut | None = None
    act: str = "none"
    pool: Pool | None = None
    recompute: bool = False

    @functools.cached_property
    def projection(self) -> Unit | None:
        """The convolution of the shortcut."""
        return None if self.shortcut is None else self.shortcut.unit

    @functools.cached_property
    def gated(self) -> bool:
        """Whether the join is a highway's."""
        return self.shortcut is not None and self.shortcut.gated

    @functools.cached_property
    def norms(self) -> tuple[Norm | None, ...]:
        """The BatchNorm behind the input, then those behind the units."""
        return (self.first, *(unit.norm for unit in self.units))

    @functools.cached_property
    def all_norms(self) -> list[Norm]:
        """Every BatchNorm, the shortcut's last."""
        behind = None if self.projection is None else self.projection.norm
        return [norm for norm in (*self.norms, behind) if norm is not None]

    @functools.cached_property
    def in_epilogue(self) -> bool:
        """Whether the join is the last convolution's epilogue: nothing but a sum follows it."""
        return bool(self.units) and self.units[-1].norm is None and self.act == "none" and not self.gated

    @functools.cached_property
    def measures(self) -> bool:
        """Whether the statistics of the output are reduced where it is written: another pre-activation block follows, most likely."""
        return self.first is not None and self.first.training and self.shortcut is not None and not self.gated

    @functools.cached_property
    def all_units(self) -> tuple[Unit, ...]:
        """The units of the main path, then the shortcut's."""
        return self.units if self.projection is None else (*self.units, self.projection)

    @functools.cached_property
    def recomputing(self) -> Chain:
        """The same with ``recompute``."""
        return replace(self, recompute=True)

    def out_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the output for an input of ``shape``."""
        for unit in self.units:
            shape = unit.conv.out_shape(shape)
        return tuple(shape) if self.pool is None else self.pool.out_shape(shape)

    def behind(self, i: int) -> str:
        """The activation behind map ``i`` (0: the input, i: unit i's output)."""
        norm = self.norms[i]
        return "none" if norm is None else norm.act

    def cheap(self, i: int) -> bool:
        """Whether backward recomputes map ``i`` (n + 1: that of the shortcut's unit)."""
        return self.recompute and i > 0 and all(size == 1 for size in self.all_units[i - 1].conv.weight.shape[2:])

    @functools.cached_property
    def tensors(self) -> list[Tensor | None]:
        """The differentiable tensors: ``first``'s weight and bias, then four per unit (convolution weight and bias, BatchNorm weight
        and bias), the shortcut's last."""

        def of(unit: Unit | None) -> tuple[Tensor | None, ...]:
            if unit is None:
                return (None,) * 4
            return (*conv_tensors(unit.conv), *((None, None) if unit.norm is None else norm_tensors(unit.norm)))

        first = (None, None) if self.first is None else norm_tensors(self.first)
        return [*first, *(t for unit in (*self.units, self.projection) for t in of(unit))]


def run(
    backend,
    chain: Chain,
    x: Tensor,
    source: Tensor | None = None,
    stats: Tensor | None = None,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """``(y, its statistics where the chain measures them)`` for the map ``x``; differentiable where gradients are asked for.

    ``source`` is what the shortcut reads where it is not x; ``stats`` are x's statistics where its writer has reduced them already;
    ``out`` is the map, or channel slice of one, that y is written into.
    """
    # out here, so that what the Function keeps are its inputs, which double backward differentiates
    x, source = as_map(x), None if source is None else as_map(source)
    tensors = chain.tensors
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, source, *tensors)):
        return ChainFunction.apply(backend, chain, stats, (out,), x, source, *tensors)
    if any(norm.training for norm in chain.all_norms):
        state = _forward(backend, chain, x, source, stats, out)
        return state.y, state.stats
    return infer(backend, chain, x, source, out), None


def infer(backend, chain: Chain, x: Tensor, source: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    """The chain by running statistics: each convolution with its affine, activation and join in one epilogue."""

    def affine_of(norm: Norm | None) -> Tensor | None:
        return None if norm is None else frozen(backend, norm, x)[0]

    affine, act = affine_of(chain.first), chain.behind(0)
    residual = residual_affine = None
    if chain.shortcut is not None:
        shortcut = chain.shortcut
        pending = (affine, act) if shortcut.activated else (None, "none")
        residual, *pending = shortcut.read(backend, x if source is None else source, *pending)
        if shortcut.unit is not None:
            conv = shortcut.unit.conv
            residual = backend.conv_forward(residual, *pending, conv.weight, conv.bias, conv.geometry)
            residual_affine = affine_of(shortcut.unit.norm)
    h = x
    for i, unit in enumerate(chain.units, 1):
        conv = unit.conv
        last = i == len(chain.units) and not chain.gated
        joins = last and residual is not None
        h = backend.conv_forward(
            h, affine, act, conv.weight, conv.bias, conv.geometry,
            out=out if last and chain.pool is None else None,
            out_affine=affine_of(unit.norm),
            residual=residual if joins else None,
            residual_affine=residual_affine if joins else None,
            out_act=chain.act if joins else chain.behind(i),
        )  # fmt: skip
        affine, act = None, "none"
    if chain.gated:
        carry = x if source is None else source
        return backend.highway_forward(h, affine, act, residual, residual_affine, carry, out=out)
    if not chain.units:
        act = act if residual is None else chain.act
        h = backend.join_forward(h, affine, residual, residual_affine, act, out=out)
    return h if chain.pool is None else backend.pool_forward(h, None, "none", chain.pool, out=out)[0]


@dataclass
class _State:
    """What a forward leaves: maps (the input first), affines and saveds behind them, and the same of the shortcut's unit."""

    maps: list[Tensor | None]
    affines: list[Tensor | None]
    saveds: list[Tensor | None]
    side: tuple[Tensor | None, Tensor | None, Tensor | None] = (None, None, None)
    y: Tensor | None = None
    index: Tensor | None = None
    stats: Tensor | None = None


def _conv_bn(backend, unit: Unit, x: Tensor, affine: Tensor | None, act: str):
    conv, norm = unit.conv, unit.norm
    stats = None if norm is None else new_stats(backend, norm, conv.weight.shape[0], x)
    raw = backend.conv_forward(x, affine, act, conv.weight, conv.bias, conv.geometry, stats=stats)
    return raw, *((None, None) if norm is None else coefficients(backend, norm, stats, raw))


def _forward(
    backend, chain: Chain, x: Tensor, source: Tensor | None, stats: Tensor | None, out: Tensor | None
) -> _State:
    first, shortcut, n = chain.first, chain.shortcut, len(chain.units)
    affine = saved = None
    if first is not None:
        if first.training and stats is None:
            stats = new_stats(backend, first, x.shape[1], x)
            backend.statistics(x, stats)
        affine, saved = coefficients(backend, first, stats, x)
    state = _State([x], [affine], [saved])
    for i, unit in enumerate(chain.units[: n - 1] if chain.in_epilogue else chain.units):
        found = _conv_bn(backend, unit, state.maps[i], state.affines[i], chain.behind(i))
        for values, value in zip((state.maps, state.affines, state.saveds), found, strict=True):
            values.append(value)
    residual = residual_affine = None
    if shortcut is not None:
        pending = (affine, first.act) if shortcut.activated else (None, "none")
        residual, *pending = shortcut.read(backend, x if source is None else source, *pending)
        if shortcut.unit is not None:
            state.side = _conv_bn(backend, shortcut.unit, residual, *pending)
            residual, residual_affine, _ = state.side
    h, affine = state.maps[-1], state.affines[-1]
    act = chain.behind(len(state.maps) - 1)
    if chain.measures:
        state.stats = channel_empty(2, chain.units[-1].conv.weight.shape[0] if n else x.shape[1], x)
    if chain.pool is not None:
        state.y, state.index = backend.pool_forward(h, affine, act, chain.pool, out=out)
    elif chain.gated:
        carry = x if source is None else source
        state.y = backend.highway_forward(h, affine, act, residual, residual_affine, carry, out=out)
    elif chain.in_epilogue:
        conv = chain.units[-1].conv
        state.y = backend.conv_forward(
            h, affine, act, conv.weight, conv.bias, conv.geometry, out=out, stats=state.stats, residual=residual,
            residual_affine=residual_affine,
        )  # fmt: skip
        for values in (state.maps, state.affines, state.saveds):
            values.append(None)  # only the sum exists, and nobody needs it
    else:
        act = act if shortcut is None else chain.act
        state.y = backend.join_forward(h, affine, residual, residual_affine, act, out=out, stats=state.stats)
    return state


class ChainFunction(torch.autograd.Function):
    """``apply(backend, chain, stats, (out,), x, source, *chain.tensors) -> (y, stats of y)`` for maps; stats are not differentiable.
    ``out`` is packed so that autograd takes it for an output alone."""

    @staticmethod
    def forward(ctx, backend, chain, stats, held, x, source, *tensors):
        state = _forward(backend, chain, x, source, stats, *held)
        ctx.backend, ctx.chain = backend, chain
        ctx.set_materialize_grads(False)
        maps = [None if chain.cheap(i) else raw for i, raw in enumerate(state.maps)]
        raw, *behind = state.side
        unread = chain.act == "none" and behind[0] is None and not chain.gated
        if raw is not None and (chain.cheap(len(maps)) or unread):
            raw = None  # recomputed, or read by no activation and no BatchNorm
        ctx.save_for_backward(source, state.index, *maps, *state.affines, *state.saveds, raw, *behind, *tensors)
        if state.stats is not None:
            ctx.mark_non_differentiable(state.stats)
        return state.y, state.stats

    @staticmethod
    def backward(ctx, grad, _):
        if grad is None:
            return (None,) * len(ctx.needs_input_grad)
        backend, chain = ctx.backend, ctx.chain
        source, index, *rest = ctx.saved_tensors
        rows = len(chain.units) + 1
        maps, affines, saveds = (rest[i * rows : (i + 1) * rows] for i in range(3))
        side, tensors = rest[3 * rows : 3 * rows + 3], rest[3 * rows + 3 :]
        if replays(grad):
            found = double_backward(backend, lambda *t: reference(chain, *t), (maps[0], source, *tensors), grad)
            return None, None, None, None, *found
        step = _Backward(backend, chain, source, index, maps, affines, saveds, side, tensors, ctx.needs_input_grad[4:])
        return None, None, None, None, *step.run(as_map(grad))


class _Backward:
    """The backward of one chain. Units count from 1, map i is unit i's output and map 0 the input; the shortcut's unit is ``n + 1``."""

    def __init__(self, backend, chain, source, index, maps, affines, saveds, side, tensors, need) -> None:
        self.backend, self.chain, self.source, self.index, self.need = backend, chain, source, index, need[2:]
        self.need_x, self.need_source = need[:2]
        self.n = len(chain.units)
        self.units = (None, *chain.units, chain.projection)
        self.norms = (*chain.norms, None if chain.projection is None else chain.projection.norm)
        self.maps, self.affines, self.saveds = [*maps, side[0]], [*affines, side[1]], [*saveds, side[2]]
        self.tensors, self.grads = tensors, [None] * len(tensors)
        self.sums: dict[int, Tensor] = {}
        self.coeffs: dict[int, Tensor] = {}
        self.read = self.side_sums = self.dgate = self.carry = None

    def room(self, i: int) -> Tensor | None:
        """Room for the sums of the BatchNorm behind map i, None where there is none."""
        if self.affines[i] is None:
            return None
        channels = self.affines[i].shape[1]
        # the input's gather from several places before the BatchNorm's step reads them
        self.sums[i] = (
            reduction(self.backend, self.norms[i], channels, self.maps[0])
            if i
            else channel_empty(2, channels, self.maps[0])
        )
        return self.sums[i]

    def raw(self, i: int) -> Tensor | None:
        """Map i, recomputed on its first use where it was not kept."""
        if self.maps[i] is None:
            x, affine, _, act = self.operand(i)
            weight, bias = self.tensors[self.at(i) : self.at(i) + 2]
            self.maps[i] = self.backend.conv_forward(x, affine, act, weight, bias, self.units[i].conv.geometry)
        return self.maps[i]

    def operand(self, i: int) -> tuple[Tensor, Tensor | None, Tensor | None, str]:
        """What unit i reads: a map with its affine, saved and activation."""
        if i <= self.n:
            return self.raw(i - 1), self.affines[i - 1], self.saveds[i - 1], self.chain.behind(i - 1)
        if self.read is None:
            activated = self.chain.shortcut.activated
            pending = (self.affines[0], self.chain.behind(0)) if activated else (None, "none")
            x, affine, act = self.chain.shortcut.read(self.backend, self.root, *pending)
            self.read = x, affine, None if affine is None else self.saveds[0], act
        return self.read

    @staticmethod
    def at(i: int) -> int:
        """Where the tensors of unit i begin (for 0: two before the input's BatchNorm, as if a convolution stood there)."""
        return 4 * i - 2

    def finish_norm(self, i: int) -> None:
        """From the sums behind map i: the pending form of the map's gradient, and the C-sized gradients."""
        norm, rows, at = self.norms[i], count(self.raw(i)), self.at(i)
        sums, saved = self.sums[i], self.saveds[i]
        coeff = self.coeffs[i] = channel_empty(3, sums.shape[1], self.maps[0])
        norm_backward(self.backend, norm, sums, rows, norm.weight, saved, coeff)
        self.norm_gradients(i)
        if i and norm.group is None and self.need[at + 1]:
            self.grads[at + 1] = bias_gradient(sums, coeff, saved, rows, self.units[i].conv, True)

    def norm_gradients(self, i: int) -> None:
        at, norm = self.at(i), self.norms[i]
        self.grads[at + 2] = gradient_of(self.sums[i], 1, norm.weight, self.need[at + 2])
        self.grads[at + 3] = gradient_of(self.sums[i], 0, norm.bias, self.need[at + 3])

    def conv(self, i: int, g: Tensor, pending: bool, need_dx: bool, **target) -> Tensor | None:
        """The input gradient of unit i from the gradient behind its BatchNorm, and its weight's."""
        at, norm = self.at(i), self.norms[i]
        raw = self.raw(i) if pending and norm.training else None
        if self.need[at + 1] and (norm is None or norm.group is not None):
            coeff = None if raw is None else self.coeffs[i]
            self.grads[at + 1] = map_bias_gradient(g, self.tensors[at + 1], raw, coeff)
        dx = None
        if need_dx or self.need[at]:
            dx, self.grads[at] = self.backend.conv_backward(
                g, raw, self.coeffs[i] if pending else None, *self.operand(i), self.tensors[at],
                self.units[i].conv.geometry, need_dx=need_dx, need_dw=self.need[at], **target,
            )  # fmt: skip
        self.maps[i] = None  # its last use: freed here, not at the end
        return dx

    def join(self, grad: Tensor) -> tuple[Tensor, bool]:
        """``(dz, whether the last BatchNorm's coefficients are pending on it)``, with the sums of the BatchNorms at the join."""
        backend, chain, n, side = self.backend, self.chain, self.n, self.n + 1
        if chain.pool is not None:
            args = (grad, self.index, self.raw(n), self.affines[n], self.saveds[n], chain.behind(n), chain.pool)
            backend.pool_backward(*args, sums=self.room(n))
            self.finish_norm(n)
            return backend.pool_backward(*args, coeff=self.coeffs[n]), False
        sums, side_sums = self.room(n), self.room(side)
        dz, shortcut = grad, chain.shortcut
        if chain.gated:
            dz, self.dgate, self.carry = backend.highway_backward(
                grad, self.raw(n), self.affines[n], self.saveds[n], chain.behind(n), self.raw(side), self.affines[side],
                self.saveds[side], self.root, sums=sums, gate_sums=side_sums,
            )  # fmt: skip
        elif not chain.in_epilogue:
            residual, act = None, chain.behind(n) if shortcut is None else chain.act
            if shortcut is not None and (act != "none" or side_sums is not None):
                residual = self.operand(side)[0] if shortcut.unit is None else self.raw(side)
            together = sums is not None and side_sums is not None
            dz = backend.join_backward(
                grad, self.raw(n), self.affines[n], self.saveds[n], act, sums=sums, residual=residual,
                residual_affine=self.affines[side], residual_saved=self.saveds[side] if together else None,
                residual_sums=side_sums if together else None,
            )  # fmt: skip
        if side_sums is not None and sums is None and not chain.gated:
            backend.join_backward(dz, self.raw(side), self.affines[side], self.saveds[side], "none", sums=side_sums)
        # the shortcut's first: the order of collectives is that of autograd, the reverse of the forward's
        if side_sums is not None:
            self.finish_norm(side)
        if sums is not None:
            self.finish_norm(n)
        return dz, sums is not None

    @property
    def root(self) -> Tensor:
        """What the shortcut reads."""
        return self.maps[0] if self.source is None else self.source

    def shortcut(self, dz: Tensor) -> Tensor | None:
        """The gradient of what the shortcut reads; of ``activated`` ones times a_0's derivative and BN_0's scale, with sums."""
        backend, shortcut, side = self.backend, self.chain.shortcut, self.n + 1
        need, root = self.need_x if self.source is None else self.need_source, self.root
        affine = saved = sums = None
        act = "none"
        if shortcut.activated:
            affine, saved, act = self.affines[0], self.saveds[0], self.chain.behind(0)
            need = need or any(self.need[:2])
            sums = channel_empty(2, affine.shape[1], dz) if need else None
        self.side_sums = sums
        g, target = dz, {}
        if shortcut.gated:
            # the gate's input gradient gathers in the carry's
            g, self.dgate, target = self.dgate, None, {"dx": self.carry, "accumulate": True} if need else {}
        elif sums is not None and shortcut.pool is None:
            target = {"sums": sums, "scaled": True}
        if shortcut.unit is not None:
            g = self.conv(side, g, self.norms[side] is not None, need, **target)
        if not need:
            return None
        if shortcut.subsample is not None:
            g = shortcut.subsample.backward(g, shortcut.pooled(root.shape))
        if shortcut.pool is not None:
            g = mean_pool_gradient(backend, g, root, affine, saved, act, shortcut.pool, sums)
        return g

    def run(self, grad: Tensor) -> tuple[Tensor | None, ...]:
        chain = self.chain
        dz, pending = self.join(grad)
        aside = self.shortcut(dz) if chain.shortcut is not None else None
        dsource = None
        if self.source is not None:
            aside, dsource = None, aside
        g = dz
        for i in range(self.n, 0, -1):
            below = self.need_x or any(self.need[: self.at(i)])
            norm = self.norms[i - 1]
            target = {"sums": self.room(i - 1)} if below and norm is not None else {}
            if i == 1 and below:
                # to the shortcut's gradient: in place where it is ours and nobody reads it any more
                ours = aside is not None and aside is not grad and aside is not g
                target |= {"dx": aside, "accumulate": True} if ours else {"base": aside}
                target["scaled"] = norm is not None
            g = self.conv(i, g, pending, below, **target)
            if not below:
                return None, dsource, *self.grads
            if i > 1:
                self.finish_norm(i - 1)
            pending = norm is not None
        return self.input_gradient(g, pending), dsource, *self.grads

    def input_gradient(self, g: Tensor, pending: bool) -> Tensor | None:
        """The gradient of x from what has gathered: without units under BN_0, behind them with only BN_0's correction pending."""
        if not pending:
            return g if self.need_x else None
        x, norm = self.maps[0], self.norms[0]
        if self.n == 0:
            return self.backend.grad_affine(g, x if norm.training else None, self.coeffs[0]) if self.need_x else None
        if self.side_sums is not None:
            self.sums[0].add_(self.side_sums)
        self.norm_gradients(0)
        if not self.need_x or not norm.training:
            return g if self.need_x else None
        coeff = channel_empty(3, x.shape[1], x)
        coeff[0].fill_(1.0)
        coeff[1:].zero_()
        norm_backward(self.backend, norm, self.sums[0], count(x), norm.weight, self.saveds[0], coeff, accumulate=True)
        return self.backend.grad_affine(g, x, coeff, out=g)


def reference(chain: Chain, x: Tensor, source: Tensor | None, *tensors: Tensor | None) -> Tensor:
    """The definition, in plain PyTorch, for the tensors of :attr:`Chain.tensors`; running statistics untouched."""

    def apply(unit: Unit, i: int, h: Tensor) -> Tensor:
        weight, bias, gamma, beta = tensors[4 * i + 2 : 4 * i + 6]
        h = reference_conv(h, unit.conv, weight, bias)
        return h if unit.norm is None else reference_norm(h, unit.norm, gamma, beta)

    h = x if chain.first is None else reference_norm(x, chain.first, *tensors[:2])
    activated = h
    for i, unit in enumerate(chain.units):
        h = apply(unit, i, h)
    shortcut = chain.shortcut
    if shortcut is not None:
        s = activated if shortcut.activated else x if source is None else source
        if shortcut.pool is not None:
            s = F.avg_pool2d(s, shortcut.pool.kernel, shortcut.pool.stride, 0, shortcut.pool.ceil)
        if shortcut.subsample is not None:
            s = shortcut.subsample.forward(s)
        if shortcut.unit is not None:
            s = apply(shortcut.unit, len(chain.units), s)
        if shortcut.gated:
            gate = torch.sigmoid(s)
            h = gate * h + (1 - gate) * (x if source is None else source)
        else:
            h = activations.value(h + s, chain.act)
    return h if chain.pool is None else F.max_pool2d(h, chain.pool.kernel, chain.pool.stride, chain.pool.padding)
