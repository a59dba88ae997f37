"""The backward of a residual block (:mod:`fusedres.autograd.residual`), step by step."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

from ..backends.contract import Backend, Reduction
from ..backends.layout import channel_empty, row_count
from ..operands import FRESH, GradTarget, LazyGrad, LazyMap
from .steps import (
    bias_grad,
    bias_grad_behind_norm,
    identity_coeff,
    mean_pool_backward,
    new_reduction,
    norm_backward,
    norm_grads,
)

if TYPE_CHECKING:
    from .residual import Residual


class OfUnit(NamedTuple):
    """One value per differentiable tensor of a unit: the tensors themselves, which of them need a gradient, or those gradients. Of the
    block's input, in front of the first unit, only the BatchNorm's."""

    weight: Any = None
    bias: Any = None
    norm_weight: Any = None
    norm_bias: Any = None


def flatten(of_units: Sequence[tuple[Any, ...]]) -> list[Any]:
    """The input's two values, then four for each unit, of tuples in the order of :class:`OfUnit`."""
    return [*of_units[0][2:], *itertools.chain.from_iterable(of_units[1:])]


def split(flat: Sequence[Any]) -> list[OfUnit]:
    """The inverse of :func:`flatten`, as :class:`OfUnit`."""
    values = iter(flat[2:])
    by_unit = zip(*[values] * len(OfUnit._fields), strict=True)
    return [OfUnit(None, None, *flat[:2]), *itertools.starmap(OfUnit, by_unit)]


#: in the place of a map that backward needs nothing of, the fields of a LazyMap
_NOTHING = (None,) * len(LazyMap._fields)


class Kept(NamedTuple):
    """What backward needs of the maps: map 0 is the block's input, map i unit i's output, the last the output of the shortcut's unit;
    ``raws`` has None for what is recomputed, or not needed."""

    raws: list[Tensor | None]
    scale_shifts: list[Tensor | None]
    mean_invstds: list[Tensor | None]

    @classmethod
    def of(cls, maps: Iterable[LazyMap | None], side: LazyMap | None) -> Kept:
        """Of the maps of a forward."""
        raws, scale_shifts, _, mean_invstds = zip(*[m or _NOTHING for m in (*maps, side)], strict=True)
        return cls(list(raws), list(scale_shifts), list(mean_invstds))

    def flatten(self) -> list[Tensor | None]:
        """For ``save_for_backward``."""
        return [*self.raws, *self.scale_shifts, *self.mean_invstds]

    @classmethod
    def split(cls, flat: Sequence[Tensor | None], maps: int) -> Kept:
        """The inverse of :meth:`flatten`, for so many maps."""
        return cls(*(list(flat[i * maps : (i + 1) * maps]) for i in range(len(cls._fields))))


class ResidualBackward:
    """The backward of one call. Units count from 1, map i is unit i's output and map 0 the input; the shortcut's unit is n + 1."""

    def __init__(
        self,
        backend: Backend,
        spec: Residual,
        kept: Kept,
        tensors: list[OfUnit],
        need: list[OfUnit],
        need_x: bool,
        need_source: bool,
        source: Tensor | None,
        index: Tensor | None,
    ) -> None:
        self.backend, self.spec, self.tensors, self.need = backend, spec, tensors, need
        self.raws, self.scale_shifts, self.mean_invstds = kept
        self.need_x, self.need_source, self.source, self.index = need_x, need_source, source, index
        self.n = len(spec.units)
        self.units = (None, *spec.units, spec.projection)
        self.norms = spec.norms
        self.grads: list[dict[str, Tensor | None]] = [{} for _ in tensors]
        self.sums: dict[int, Reduction] = {}
        self.coeffs: dict[int, Tensor] = {}
        self.like = self._input()
        self.root = self.like if source is None else source
        self.shortcut_operand: LazyMap | None = None
        self.activated_sums: Tensor | None = None

    def _input(self) -> Tensor:
        x = self.raws[0]
        assert x is not None  # the input is always kept
        return x

    # ---- maps --------------------------------------------------------------------------------------------------------

    def raw(self, i: int) -> Tensor:
        """Map i, recomputed on its first use where it was not kept."""
        found = self.raws[i]
        if found is None:
            unit, t = self.units[i], self.tensors[i]
            assert unit is not None
            found = self.backend.conv_forward(self.operand(i), t.weight, t.bias, unit.conv.geometry)
            self.raws[i] = found
        return found

    def lazy(self, i: int) -> LazyMap:
        """Map i behind its BatchNorm and activation."""
        return LazyMap(self.raw(i), self.scale_shifts[i], self.spec.act_behind(i), self.mean_invstds[i])

    def operand(self, i: int) -> LazyMap:
        """What unit i reads."""
        if i <= self.n:
            return self.lazy(i - 1)
        if self.shortcut_operand is None:
            shortcut = self.spec.shortcut
            assert shortcut is not None
            read = self.lazy(0) if shortcut.activated else LazyMap(self.root)
            self.shortcut_operand = shortcut.read(self.backend, read)
        return self.shortcut_operand

    # ---- BatchNorms --------------------------------------------------------------------------------------------------

    def room(self, i: int) -> Reduction | None:
        """Room for the sums of the BatchNorm behind map i, None where there is none."""
        norm, scale_shift = self.norms[i], self.scale_shifts[i]
        if norm is None or scale_shift is None:
            return None
        channels = scale_shift.shape[1]
        # the input's gather from several places before the BatchNorm's step reads them
        sums = new_reduction(self.backend, norm, channels, self.like) if i else channel_empty(2, channels, self.like)
        self.sums[i] = sums
        return sums

    def finish_norm(self, i: int) -> None:
        """From the sums behind map i: the pending form of the map's gradient, and the C-sized gradients."""
        norm, mean_invstd = self.norms[i], self.mean_invstds[i]
        assert norm is not None and mean_invstd is not None
        sums, rows = self.sums[i], row_count(self.raw(i))
        coeff = self.coeffs[i] = channel_empty(3, mean_invstd.shape[1], self.like)
        norm_backward(self.backend, norm, self.tensors[i].norm_weight, sums, rows, mean_invstd, coeff)
        self.norm_grads(i)
        if norm.group is None and self.need[i].bias:
            bias = self.tensors[i].bias
            self.grads[i]["bias"] = bias_grad_behind_norm(norm, sums, coeff, bias)

    def norm_grads(self, i: int) -> None:
        """The gradients of the weight and bias of the BatchNorm behind map i."""
        norm, need = self.norms[i], self.need[i]
        assert norm is not None
        found = norm_grads(self.backend, norm, self.sums[i], need.norm_weight, need.norm_bias)
        self.grads[i]["norm_weight"], self.grads[i]["norm_bias"] = found

    # ---- the parts of a block, in the order of the backward ----------------------------------------------------------

    def conv(self, i: int, g: Tensor, pending: bool, target: GradTarget | None) -> Tensor | None:
        """The input gradient of unit i (None without ``target``) from the gradient ``g`` behind its BatchNorm, and its weight's.
        ``pending``: the BatchNorm's correction is still to be applied to ``g``."""
        unit, norm, need, t = self.units[i], self.norms[i], self.need[i], self.tensors[i]
        assert unit is not None
        grad = LazyGrad(g)
        if pending:
            grad = LazyGrad(g, self.raw(i) if norm is not None and norm.training else None, self.coeffs[i])
        if need.bias and (norm is None or norm.group is not None):
            self.grads[i]["bias"] = bias_grad(g, t.bias, grad.raw, grad.coeff)
        dx = None
        if target is not None or need.weight:
            dx, self.grads[i]["weight"] = self.backend.conv_backward(
                grad, self.operand(i), t.weight, unit.conv.geometry, target, need.weight
            )
        self.raws[i] = None  # its last use: freed here, not at the end
        return dx

    def addition(self, grad: Tensor) -> tuple[Tensor, Tensor, Tensor | None, bool]:
        """``(dz of the main path, the gradient of what the shortcut's last step gives, that of a highway's carry, whether the last
        BatchNorm's correction is pending on dz)``, with the sums of the BatchNorms at the addition."""
        backend, spec, n, side = self.backend, self.spec, self.n, self.n + 1
        if spec.pool is not None:
            lazy = self.lazy(n)
            backend.pool_backward(grad, self.index, lazy, spec.pool, sums=self.room(n))
            self.finish_norm(n)
            dz = backend.pool_backward(grad, self.index, lazy, spec.pool, coeff=self.coeffs[n])
            assert dz is not None
            return dz, dz, None, False
        sums, side_sums = self.room(n), self.room(side)
        carry: Tensor | None = None
        if spec.gated:
            dz, dside, carry = backend.highway_backward(
                grad, self.lazy(n), self.lazy(side), self.root, sums=sums, gate_sums=side_sums
            )
        elif spec.adds_in_epilogue:
            dz = dside = grad
        else:
            dz = dside = self._add_act_backward(grad, sums, side_sums)
        if side_sums is not None and sums is None and not spec.gated:
            lazy = self.lazy(side).before_act
            backend.add_act_backward(dz, lazy, sums=side_sums)
        # the shortcut's first: the order of collectives is that of autograd, the reverse of the forward's
        if side_sums is not None:
            self.finish_norm(side)
        if sums is not None:
            self.finish_norm(n)
        return dz, dside, carry, sums is not None

    def _add_act_backward(self, grad: Tensor, sums: Reduction | None, side_sums: Reduction | None) -> Tensor:
        spec, n, side = self.spec, self.n, self.n + 1
        shortcut, act = spec.shortcut, spec.act_behind(n) if spec.shortcut is None else spec.act
        residual: LazyMap | None = None
        # the residual's values are needed for the activation's derivative and for the sums of its own BatchNorm
        if shortcut is not None and (act != "none" or side_sums is not None):
            residual = (self.operand(side) if shortcut.unit is None else self.lazy(side)).before_act
        both = sums is not None and side_sums is not None
        return self.backend.add_act_backward(
            grad,
            self.lazy(n).before_act,
            residual,
            act,
            sums=sums,
            residual_sums=side_sums if both else None,
        )

    def shortcut(self, g: Tensor, carry: Tensor | None) -> Tensor | None:
        """The gradient of what the shortcut reads, from the gradient ``g`` of what it gives; of ``activated`` ones times a_0's derivative
        and BN_0's scale, with sums. None where nobody needs it."""
        backend, spec, side = self.backend, self.spec, self.n + 1
        shortcut, root = spec.shortcut, LazyMap(self.root)
        assert shortcut is not None
        need = self.need_x if self.source is None else self.need_source
        if shortcut.activated:
            root = self.lazy(0)
            need = need or any(self.need[0])
            assert root.scale_shift is not None
            self.activated_sums = channel_empty(2, root.scale_shift.shape[1], g) if need else None
        sums, target = self.activated_sums, FRESH
        if carry is not None:
            # the gate's input gradient gathers in the carry's
            target = GradTarget(dx=carry, accumulate=True)
        elif sums is not None and shortcut.pool is None:
            target = GradTarget(scaled=True, sums=sums)
        if shortcut.unit is not None:
            dx = self.conv(side, g, self.norms[side] is not None, target if need else None)
            if dx is None:
                return None
            g = dx
        if not need:
            return None
        if shortcut.subsample is not None:
            g = shortcut.subsample.backward(g, shortcut.pooled(tuple(self.root.shape)))
        if shortcut.pool is not None:
            g = mean_pool_backward(backend, g, root, shortcut.pool, sums)
        return g

    def run(self, grad: Tensor) -> tuple[Tensor | None, ...]:
        """``(dx, dsource, *the gradients of spec.tensors)``."""
        dz, dside, carry, pending = self.addition(grad)
        aside = dsource = None
        if self.spec.shortcut is not None:
            aside = self.shortcut(dside, carry)
        del dside, carry
        if self.source is not None:
            aside, dsource = None, aside
        g: Tensor = dz
        for i in range(self.n, 0, -1):
            below = self.need_x or any(any(need) for need in self.need[:i])
            target = self._target(i, aside, owned=aside is not grad and aside is not g) if below else None
            dx = self.conv(i, g, pending, target)
            if dx is None:
                return None, dsource, *self._flat_grads()
            g = dx
            if i > 1:
                self.finish_norm(i - 1)
            pending = self.norms[i - 1] is not None
        dx = self.input_grad(g, pending)
        if self.n == 0 and aside is not None and dx is not None:
            dx = dx + aside  # without units there was no convolution to add it in its epilogue
        return dx, dsource, *self._flat_grads()

    def _target(self, i: int, aside: Tensor | None, owned: bool) -> GradTarget:
        """Where the input gradient of unit i goes; the first unit's to the shortcut's: in place where that is ``owned`` by this backward
        and nobody reads it any more."""
        sums = self.room(i - 1)
        if i > 1:
            return GradTarget(sums=sums)
        scaled = self.norms[0] is not None
        if aside is not None and owned:
            return GradTarget(dx=aside, accumulate=True, scaled=scaled, sums=sums)
        return GradTarget(base=aside, scaled=scaled, sums=sums)

    def _flat_grads(self) -> list[Tensor | None]:
        return flatten([tuple(map(grads.get, OfUnit._fields)) for grads in self.grads])

    def input_grad(self, g: Tensor, pending: bool) -> Tensor | None:
        """The gradient of x from what has gathered: without units under BN_0, behind them with only BN_0's correction pending."""
        if not pending:
            return g if self.need_x else None
        x, norm, mean_invstd = self.like, self.norms[0], self.mean_invstds[0]
        assert norm is not None and mean_invstd is not None
        if self.n == 0:
            raw = x if norm.training else None
            return self.backend.apply_grad_coeff(LazyGrad(g, raw, self.coeffs[0])) if self.need_x else None
        sums = self.sums[0]
        if self.activated_sums is not None:
            assert isinstance(sums, Tensor)  # as room() makes it for the input
            sums.add_(self.activated_sums)
        self.norm_grads(0)
        if not self.need_x or not norm.training:
            return g if self.need_x else None
        coeff = identity_coeff(x.shape[1], x)
        norm_backward(self.backend, norm, self.tensors[0].norm_weight, sums, row_count(x), mean_invstd, coeff, True)
        return self.backend.apply_grad_coeff(LazyGrad(g, x, coeff), out=g)
