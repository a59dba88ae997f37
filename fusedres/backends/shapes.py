"""What the primitives return, without computing it: tensors of the right shape, dtype and layout, for tracers that want nothing else.

A schedule that runs on it says what the same schedule returns on any backend. It takes fake and meta tensors, and sizes that are symbols.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import conv_flop_count

from ..operands import FRESH, PLAIN, Epilogue, GradTarget, LazyGrad, LazyMap
from ..specs import Geometry, Norm, Pool
from .contract import Backend, Reduction, Wrapped
from .layout import empty_map


def _fresh(like: Tensor, out: Tensor | None = None) -> Tensor:
    return empty_map(tuple(like.shape), like) if out is None else out


class ShapeBackend(Backend):
    """See the module. It serves nobody by itself."""

    name = "shapes"

    def supports(self, device: torch.device, dtype: torch.dtype) -> str | None:
        return "it computes nothing"

    def statistics(self, x: Tensor, stats: Reduction) -> None:
        pass

    def conv_forward(
        self, x: LazyMap, weight: Tensor, bias: Tensor | None, geometry: Geometry, epilogue: Epilogue = PLAIN
    ) -> Tensor:
        if epilogue.out is not None:
            return epilogue.out
        size = geometry.out_size(tuple(x.raw.shape[2:]), tuple(weight.shape[2:]))
        return empty_map((x.raw.shape[0], weight.shape[0], *size), x.raw)

    def conv_backward(
        self,
        grad: LazyGrad,
        x: LazyMap,
        weight: Tensor,
        geometry: Geometry,
        target: GradTarget | None = FRESH,
        need_dw: bool = True,
    ) -> tuple[Tensor | None, Tensor | None]:
        dx = None if target is None else _fresh(x.raw, target.dx)
        return dx, torch.empty_like(weight) if need_dw else None

    def dgrad_epilogue(self, da: Tensor, x: LazyMap, target: GradTarget = FRESH) -> Tensor:
        return _fresh(x.raw, target.dx)

    def add_act_forward(
        self,
        x: LazyMap,
        residual: LazyMap | None = None,
        act: str = "none",
        *,
        out: Tensor | None = None,
        stats: Reduction | None = None,
    ) -> Tensor:
        return _fresh(x.raw, out)

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
        return grad if act == "none" else _fresh(x.raw)

    def highway_forward(self, x: LazyMap, gate: LazyMap, carry: Tensor, *, out: Tensor | None = None) -> Tensor:
        return _fresh(x.raw, out)

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
        return _fresh(x.raw), _fresh(x.raw), _fresh(x.raw)

    def apply_grad_coeff(self, grad: LazyGrad, *, out: Tensor | None = None) -> Tensor:
        return _fresh(grad.grad, out)

    def pool_forward(
        self, x: LazyMap, pool: Pool, *, out: Tensor | None = None, stats: Reduction | None = None
    ) -> tuple[Tensor, Tensor | None]:
        shape = pool.out_shape(tuple(x.raw.shape))
        y = empty_map(shape, x.raw) if out is None else out
        return y, empty_map(shape, x.raw, torch.uint8) if pool.kind == "max" else None

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
        return None if coeff is None else _fresh(x.raw, dx)

    def bn_coefficients(self, norm: Norm, stats: Any, count: int) -> tuple[Tensor, Tensor]:
        found = [torch.empty(tuple(stats.shape), dtype=stats.dtype, device=stats.device) for _ in range(2)]
        return found[0], found[1]

    def bn_frozen(self, norm: Norm, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        mean = norm.running_mean
        if mean is None:
            raise ValueError("a BatchNorm without running statistics is no frozen one")
        found = [torch.empty(2, mean.shape[0], dtype=dtype, device=mean.device) for _ in range(2)]
        return found[0], found[1]

    def bn_backward(
        self, norm: Norm, sums: Reduction, count: int, mean_invstd: Tensor, coeff: Tensor, accumulate: bool = False
    ) -> None:
        pass


BACKEND = ShapeBackend()


class Counting(Wrapped):
    """Counts the floating-point operations of convolutions in ``flops``, as torch.utils.flop_counter does."""

    def __init__(self) -> None:
        super().__init__(BACKEND)
        self.flops = 0

    def call(self, primitive: str, *args: Any, **kwargs: Any) -> Any:
        found = super().call(primitive, *args, **kwargs)
        if primitive in ("conv_forward", "conv_backward"):
            given = inspect.signature(getattr(BACKEND, primitive)).bind(*args, **kwargs).arguments
            forward = primitive == "conv_forward"
            out = found if forward else given["grad"].grad
            products = 1 if forward else sum(gradient is not None for gradient in found)
            x, weight = given["x"].raw, given["weight"]
            self.flops += products * conv_flop_count(list(x.shape), list(weight.shape), list(out.shape))
        return found
