"""Maps of three dimensions on the primitives of two.

A channels_last_3d map N x C x D x H x W and the channels_last map N x C x (D * H) x W are the same bytes. Passes over rows and pointwise
convolutions do not ask which pixels are neighbours: they run as the backend's own, on that view. Other convolutions are the library's,
between these passes.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..operands import FRESH, PLAIN, Epilogue, GradTarget, LazyGrad, LazyMap
from ..specs import Geometry
from . import library_conv
from .contract import Backend, Wrapped

#: the primitives that see rows, not neighbours
_ROW_PASSES = frozenset({"statistics", "add_act_forward", "add_act_backward", "apply_grad_coeff", "dgrad_epilogue"})
_C_SIZED = frozenset({"bn_coefficients", "bn_frozen", "bn_backward"})


def _is_map(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() == 5


def _flat(value: Any) -> Any:
    """Maps, and maps inside operands, with depth and height as one dimension: views. Everything else as it is."""
    if _is_map(value):
        return value.view(*value.shape[:2], value.shape[2] * value.shape[3], value.shape[4])
    if isinstance(value, Geometry):
        return Geometry(value.stride[:2], value.padding[:2], value.dilation[:2], value.groups)
    if isinstance(value, LazyMap | LazyGrad | Epilogue | GradTarget):
        return type(value)(*map(_flat, value))
    return value


def _is_pointwise(weight: Tensor, geometry: Geometry) -> bool:
    return max(weight.shape[2:]) == max(geometry.stride) == 1 and not any(geometry.padding)


class Volumes(Wrapped):
    """The primitives of ``inner`` for maps of three dimensions, as far as a dense block needs them."""

    def call(self, primitive: str, *args: Any, **kwargs: Any) -> Any:
        if primitive in _C_SIZED:
            return super().call(primitive, *args, **kwargs)
        if primitive in _CONVOLUTIONS:
            return _CONVOLUTIONS[primitive](self, *args, **kwargs)
        if primitive not in _ROW_PASSES:
            raise NotImplementedError(f"{primitive} is not there for maps of three dimensions")
        flat = {name: _flat(value) for name, value in kwargs.items()}
        result = super().call(primitive, *map(_flat, args), **flat)
        if not isinstance(result, Tensor):
            return result
        first = args[0] if isinstance(args[0], Tensor) else args[0][0]
        return result.view(first.shape)


def _forward(
    volumes: Volumes,
    x: LazyMap,
    weight: Tensor,
    bias: Tensor | None,
    geometry: Geometry,
    epilogue: Epilogue = PLAIN,
) -> Tensor:
    if not _is_pointwise(weight, geometry):
        return library_conv.conv_forward(volumes, x, weight, bias, geometry, epilogue)
    y = volumes.inner.conv_forward(_flat(x), _flat(weight), bias, _flat(geometry), _flat(epilogue))
    return y.view(x.raw.shape[0], weight.shape[0], *x.raw.shape[2:]) if epilogue.out is None else epilogue.out


def _backward(
    volumes: Volumes,
    grad: LazyGrad,
    x: LazyMap,
    weight: Tensor,
    geometry: Geometry,
    target: GradTarget | None = FRESH,
    need_dw: bool = True,
) -> tuple[Tensor | None, Tensor | None]:
    if not _is_pointwise(weight, geometry):
        return library_conv.conv_backward(volumes, grad, x, weight, geometry, target, need_dw)
    flat = _flat(weight)
    dx, dweight = volumes.inner.conv_backward(_flat(grad), _flat(x), flat, _flat(geometry), _flat(target), need_dw)
    if dx is not None:
        dx = dx.view(x.raw.shape)
    return dx, None if dweight is None else dweight.view(weight.shape)


_CONVOLUTIONS = {"conv_forward": _forward, "conv_backward": _backward}


def for_maps(backend: Backend, dims: int) -> Backend:
    """The backend for maps of ``dims`` dimensions, with batch and channels."""
    return Volumes(backend) if dims == 5 else backend
