"""Maps of three dimensions on the backends of two.

A channels_last_3d map N x C x D x H x W and the channels_last map N x C x (D * H) x W are the same bytes. Passes over rows and pointwise
convolutions do not ask which pixels are neighbours: they run as the backend's own, on that view. Other convolutions are the vendor's,
between these passes. The contracts are those of :mod:`fusedres.backends.eager`.
"""

from __future__ import annotations

from torch import Tensor

from . import vendor
from .eager import Geometry


def _flat(x: Tensor | None) -> Tensor | None:
    """The map ``x``, or its channel slice, with depth and height as one dimension: a view."""
    return None if x is None else x.view(*x.shape[:2], x.shape[2] * x.shape[3], x.shape[4])


def _is_pointwise(weight: Tensor, geometry: Geometry) -> bool:
    return max(weight.shape[2:]) == max(geometry.stride) == 1 and not any(geometry.padding)


class Volumes:
    """The primitives of ``backend`` that a dense block needs, for maps of three dimensions."""

    def __init__(self, backend) -> None:
        self._backend, self.name = backend, backend.name

    def __getattr__(self, name: str):
        # the steps of C numbers, which see no map
        if name.startswith(("bn_", "new_")):
            return getattr(self._backend, name)
        raise AttributeError(f"{name} is not there for maps of three dimensions")

    def statistics(self, x: Tensor, stats: Tensor) -> None:
        """See :func:`fusedres.backends.eager.statistics`."""
        self._backend.statistics(_flat(x), stats)

    def join_forward(self, raw, affine, residual, residual_affine, act, *, out=None, stats=None) -> Tensor:
        """See :func:`fusedres.backends.eager.join_forward`."""
        y = self._backend.join_forward(
            _flat(raw), affine, _flat(residual), residual_affine, act, out=_flat(out), stats=stats
        )
        return y.view(raw.shape) if out is None else out

    def grad_affine(self, grad, raw, coeff, *, out=None) -> Tensor:
        """See :func:`fusedres.backends.eager.grad_affine`."""
        g = self._backend.grad_affine(_flat(grad), _flat(raw), coeff, out=_flat(out))
        return g.view(grad.shape) if out is None else out

    def dgrad_epilogue(self, da, x, affine, saved, act, *, dx=None, base=None, **rest) -> Tensor:
        """See :func:`fusedres.backends.eager.dgrad_epilogue`."""
        found = self._backend.dgrad_epilogue(
            _flat(da), _flat(x), affine, saved, act, dx=_flat(dx), base=_flat(base), **rest
        )
        return found.view(x.shape) if dx is None else dx

    def conv_forward(self, x, affine, act, weight, bias, geometry, *, out=None, residual=None, **epilogue) -> Tensor:
        """See :func:`fusedres.backends.eager.conv_forward`."""
        if not _is_pointwise(weight, geometry):
            return vendor.conv_forward(
                self, x, affine, act, weight, bias, geometry, out=out, residual=residual, **epilogue
            )
        y = self._backend.conv_forward(
            _flat(x), affine, act, _flat(weight), bias, _flat_geometry(geometry), out=_flat(out), residual=_flat(residual), **epilogue
        )  # fmt: skip
        return y.view(x.shape[0], weight.shape[0], *x.shape[2:]) if out is None else out

    def conv_backward(
        self, grad, raw, coeff, x, affine, saved, act, weight, geometry, *, dx=None, base=None, **rest
    ) -> tuple[Tensor | None, Tensor | None]:
        """See :func:`fusedres.backends.eager.conv_backward`."""
        if not _is_pointwise(weight, geometry):
            return vendor.conv_backward(
                self, grad, raw, coeff, x, affine, saved, act, weight, geometry, dx=dx, base=base, **rest
            )
        found, dweight = self._backend.conv_backward(
            _flat(grad), _flat(raw), coeff, _flat(x), affine, saved, act, _flat(weight), _flat_geometry(geometry), dx=_flat(dx),
            base=_flat(base), **rest,
        )  # fmt: skip
        if found is not None:
            found = found.view(x.shape) if dx is None else dx
        return found, None if dweight is None else dweight.view(weight.shape)


def _flat_geometry(geometry: Geometry) -> Geometry:
    return Geometry(*(values[:2] for values in geometry[:3]), geometry.groups)


def for_maps(backend, dims: int):
    """The backend for maps of ``dims`` dimensions, with batch and channels."""
    return Volumes(backend) if dims == 5 else backend
