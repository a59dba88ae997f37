"""CUDA C++ kernels for every pass, between cuDNN's convolutions: for GPUs and systems that Triton does not serve.

The kernels are compiled at first use (:mod:`.nvrtc`), a few seconds for each dtype, and kept on disk. Whatever a convolution reads or
leaves pending goes through one pass of its own (:mod:`.library_conv`). All results have the same bits from run to run.
"""

# fusedres.kernels is the folder kernels/, which setup.py says and a type checker does not see
# pyright: reportMissingImports=false
from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import Parameter

from .. import first_use
from ..errors import BackendError
from ..kernels import requests
from ..operands import FRESH, PLAIN, Epilogue, GradTarget, LazyGrad, LazyMap
from ..specs import Geometry, Norm, Pool
from . import contract, cuda_check, library_conv, tape
from .contract import Backend, is_max, is_relu, without_activation
from .cuda_launch import Arguments, Pass, Reduction, Tiles, channel_launch, merge, one_tile
from .layout import empty_map
from .nvrtc import DTYPES, Nvrtc, Runtime


def _room(to: contract.Reduction) -> Tensor | Reduction:
    """What a reduction is here: the caller's tensor, or what :meth:`CudaBackend.new_reduction` has given."""
    return cast("Tensor | Reduction", to)


class CudaBackend(Backend):
    """See the module."""

    name = "cuda"

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        #: what was found at the first use: the reason not to be used, or None
        self._compared: dict[tuple[torch.device, torch.dtype], str | None] = {}

    def supports(self, device: torch.device, dtype: torch.dtype) -> str | None:
        """See the contract."""
        if dtype not in DTYPES:
            return f"its kernels compute in floating point, not {dtype}"
        return self._runtime.why_not(device)

    def distrusts(self, device: torch.device, dtype: torch.dtype) -> str | None:
        """See the contract: what computes something else on a GPU than PyTorch is not used there, loudly. Nothing is compared while a graph
        is captured."""
        if (device, dtype) in self._compared:
            return self._compared[device, dtype]
        if not first_use.is_on() or (device.type == "cuda" and torch.cuda.is_current_stream_capturing()):
            return None
        try:
            what = cuda_check.differing(self, device, dtype)
        except BackendError as error:
            reason = f"its kernels cannot be built: {error}"
        else:
            reason = None if what is None else f"its kernels compute something else than PyTorch on {device}: {what}"
        if reason is not None:
            warnings.warn(f"fusedres: backend {self.name!r} is not used for {dtype}, since {reason}", stacklevel=2)
        self._compared[device, dtype] = reason
        return reason

    def notes(self, device: torch.device) -> list[str]:
        """See the contract."""
        found = [(dtype, reason) for (where, dtype), reason in self._compared.items() if where == device and reason]
        return [f"not used for {str(dtype).removeprefix('torch.')}: {reason}" for dtype, reason in found]

    # ---- convolutions ------------------------------------------------------------------------------------------------

    def conv_forward(
        self, x: LazyMap, weight: Tensor, bias: Tensor | None, geometry: Geometry, epilogue: Epilogue = PLAIN
    ) -> Tensor:
        """See the contract."""
        return library_conv.conv_forward(self, x, weight, bias, geometry, epilogue)

    def conv_backward(
        self,
        grad: LazyGrad,
        x: LazyMap,
        weight: Tensor,
        geometry: Geometry,
        target: GradTarget | None = FRESH,
        need_dw: bool = True,
    ) -> tuple[Tensor | None, Tensor | None]:
        """See the contract."""
        return library_conv.conv_backward(self, grad, x, weight, geometry, target, need_dw)

    # ---- passes ------------------------------------------------------------------------------------------------------

    def statistics(self, x: Tensor, stats: contract.Reduction) -> None:
        """See the contract."""
        self._forward(LazyMap(x), None, "none", None, stats)

    def add_act_forward(
        self,
        x: LazyMap,
        residual: LazyMap | None = None,
        act: str = "none",
        *,
        out: Tensor | None = None,
        stats: contract.Reduction | None = None,
    ) -> Tensor:
        """See the contract."""
        without_activation(x, residual)
        out = empty_map(x.raw.shape, x.raw) if out is None else out
        self._forward(x, residual, act, out, stats)
        return out

    def _forward(
        self, x: LazyMap, residual: LazyMap | None, act: str, out: Tensor | None, stats: contract.Reduction | None
    ) -> None:
        run = Pass(self._runtime, "add_act_forward", x.raw)
        run.operand(x)
        run.operand(residual)
        run.map(out)
        run.partials(0 if stats is None else 3)
        run.act(act)
        self._finish_moments(run, stats)

    def _finish_moments(self, run: Pass, stats: contract.Reduction | None) -> None:
        """Launch, and merge the moments."""
        found = run.run()
        if stats is not None:
            (partials,) = found
            merge(self._runtime, Tiles(partials[0], partials[1], partials[2], run.chunk, run.rows_walked), _room(stats))

    def apply_grad_coeff(self, grad: LazyGrad, *, out: Tensor | None = None) -> Tensor:
        """See the contract: an addition whose residual is raw, scaled by q."""
        if grad.coeff is None:
            raise ValueError("there is no coeff to apply")
        out = empty_map(grad.grad.shape, grad.grad) if out is None else out
        run = Pass(self._runtime, "add_act_forward", grad.grad)
        run.map(grad.grad)
        run.row(grad.coeff, 0)
        run.row(grad.coeff, 2)
        run.map(grad.raw)
        run.row(grad.coeff, 1)
        run.row(None)
        run.map(out)
        run.partials(0)
        run.act("none")
        run.run()
        return out

    def add_act_backward(
        self,
        grad: Tensor,
        x: LazyMap,
        residual: LazyMap | None = None,
        act: str = "none",
        *,
        sums: contract.Reduction | None = None,
        residual_sums: contract.Reduction | None = None,
    ) -> Tensor:
        """See the contract."""
        without_activation(x, residual)
        if residual is None and residual_sums is not None:
            raise ValueError("residual_sums are asked for without a residual")
        out = grad if act == "none" else empty_map(x.raw.shape, x.raw)
        if out is not grad or sums is not None or residual_sums is not None:
            written = None if out is grad else out
            self._backward(grad, x, residual, act, written, GradTarget(sums=sums), residual_sums)
        return out

    def dgrad_epilogue(self, da: Tensor, x: LazyMap, target: GradTarget = FRESH) -> Tensor:
        """See the contract: without a dx of its own it is written over ``da``."""
        if target.scaled and x.scale_shift is None:
            raise ValueError("a scaled gradient is asked for of a map without its scale_shift")
        dx = da if target.dx is None else target.dx
        self._backward(da, x, None, x.act, dx, target._replace(dx=dx))
        return dx

    def _backward(
        self,
        grad: Tensor,
        x: LazyMap,
        residual: LazyMap | None,
        act: str,
        out: Tensor | None,
        target: GradTarget,
        residual_sums: contract.Reduction | None = None,
    ) -> None:
        rooms = [to for to in (target.sums, residual_sums) if to is not None]
        run = Pass(self._runtime, "add_act_backward", x.raw)
        run.map(grad)
        run.operand(x)
        run.mean_invstd(x, target.sums is not None)
        run.operand(residual)
        run.mean_invstd(residual, residual_sums is not None)
        run.map(target.dx if target.accumulate else target.base)
        run.map(out)
        run.partials(1 + len(rooms) if rooms else 0)
        run.act(act)
        run.integers(int(target.scaled))
        found = run.run()
        for i, to in enumerate(rooms):
            # each pair is (sum dz, its own sum dz * xhat): the parts 0 and 1 + i
            merge(self._runtime, Tiles(found[0][0], found[0][1 + i]), _room(to))

    def highway_forward(self, x: LazyMap, gate: LazyMap, carry: Tensor, *, out: Tensor | None = None) -> Tensor:
        """See the contract."""
        out = empty_map(x.raw.shape, x.raw) if out is None else out
        run = Pass(self._runtime, "highway_forward", x.raw)
        run.operand(x)
        run.operand(gate)
        run.map(carry)
        run.map(out)
        run.integers(int(is_relu(x)))
        run.run()
        return out

    def highway_backward(
        self,
        grad: Tensor,
        x: LazyMap,
        gate: LazyMap,
        carry: Tensor,
        *,
        sums: contract.Reduction | None = None,
        gate_sums: contract.Reduction | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See the contract."""
        dz, dgate, dcarry = (empty_map(x.raw.shape, x.raw) for _ in range(3))
        run = Pass(self._runtime, "highway_backward", x.raw)
        run.map(grad)
        run.operand(x)
        run.mean_invstd(x, sums is not None)
        run.operand(gate)
        run.mean_invstd(gate, gate_sums is not None)
        for each in (carry, dz, dgate, dcarry):
            run.map(each)
        rooms = [to for to in (sums, gate_sums) if to is not None]
        for to in (sums, gate_sums):
            run.partials(0 if to is None else 2)
        run.integers(int(is_relu(x)))
        for to, found in zip(rooms, run.run(), strict=True):
            merge(self._runtime, Tiles(found[0], found[1]), _room(to))
        return dz, dgate, dcarry

    def pool_forward(
        self, x: LazyMap, pool: Pool, *, out: Tensor | None = None, stats: contract.Reduction | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """See the contract."""
        has_index = is_max(pool)
        if out is None:
            out = empty_map(pool.out_shape(tuple(x.raw.shape)), x.raw)
        index = empty_map(out.shape, x.raw, torch.uint8) if has_index else None
        run = Pass(self._runtime, "pool_forward", out)
        run.operand(x)
        run.map(out)
        run.map(index)
        run.partials(0 if stats is None else 3)
        _window(run, x.raw, out, pool)
        run.act(x.act)
        self._finish_moments(run, stats)
        return out, index

    def pool_backward(
        self,
        grad: Tensor,
        index: Tensor | None,
        x: LazyMap,
        pool: Pool,
        *,
        sums: contract.Reduction | None = None,
        coeff: Tensor | None = None,
        dx: Tensor | None = None,
    ) -> Tensor | None:
        """See the contract."""
        if is_max(pool) != (index is not None):
            raise ValueError(f"a {pool.kind} pool goes back with its index if it is a max, without one if it is a mean")
        if coeff is None:
            dx = None
        elif dx is None:
            dx = empty_map(x.raw.shape, x.raw)
        run = Pass(self._runtime, "pool_backward", x.raw)
        run.map(grad)
        run.map(index)
        run.operand(x)
        run.mean_invstd(x, sums is not None)
        run.rows(coeff, 3)
        run.map(dx)
        run.partials(0 if sums is None else 2)
        _window(run, x.raw, grad, pool)
        run.act(x.act)
        found = run.run()
        if sums is not None:
            merge(self._runtime, Tiles(found[0][0], found[0][1]), _room(sums))
        return dx

    # ---- C numbers ---------------------------------------------------------------------------------------------------

    def new_reduction(self, channels: int, like: Tensor) -> contract.Reduction:
        """See the contract: partial results, merged by the kernel that reads them."""
        return Reduction()

    def parameter_grad(self, sums: contract.Reduction, row: int, dtype: torch.dtype) -> Tensor:
        """See the contract: the merge has rounded to the parameter's dtype already."""
        return sums.as_gradient(row, dtype) if isinstance(sums, Reduction) else sums[row].to(dtype)

    def bn_coefficients(self, norm: Norm, stats: contract.Reduction, count: int) -> tuple[Tensor, Tensor]:
        """See the contract."""
        room = _room(stats)
        return self._coefficients(norm, room.reduced if isinstance(room, Reduction) else one_tile(room, count), count)

    def bn_frozen(self, norm: Norm, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """See the contract."""
        return self._coefficients(norm, None, 1, dtype)

    def _coefficients(
        self, norm: Norm, moments: Tiles | None, count: int, dtype: torch.dtype = torch.float32
    ) -> tuple[Tensor, Tensor]:
        """Of the ``moments`` of a batch, or without them of the running statistics, in ``dtype`` then. ValueError where there are none."""
        arguments = Arguments()
        if moments is None:
            if norm.running_mean is None or norm.running_var is None:
                raise ValueError("a BatchNorm without running statistics is no frozen one")
            like, channels = norm.running_mean, norm.running_mean.shape[0]
            arguments.integers(0, 0, 0, 0, 0, 0, channels)
        else:
            like, dtype, channels = moments.first, moments.first.dtype, moments.first.shape[1]
            moments.add_to(arguments)
        for parameter in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
            arguments.parameter(parameter)
        found = [torch.empty((2, channels), dtype=dtype, device=like.device) for _ in range(2)]
        for pair in found:
            arguments.rows(pair, 2)
        for number in (count, norm.eps, norm.momentum):
            arguments.real(number)
        channel_launch(self._runtime, "bn_coefficients", dtype, channels, arguments)
        return found[0], found[1]

    def bn_backward(
        self,
        norm: Norm,
        sums: contract.Reduction,
        count: int,
        mean_invstd: Tensor,
        coeff: Tensor,
        accumulate: bool = False,
    ) -> None:
        """See the contract."""
        room, weight, dtype, channels = _room(sums), norm.weight, mean_invstd.dtype, mean_invstd.shape[1]
        merged = rounded = None
        if isinstance(room, Reduction):
            tiles = room.reduced
            merged = room.values = torch.empty((2, channels), dtype=dtype, device=coeff.device)
            if weight is not None and weight.dtype != dtype:
                rounded = room.rounded = torch.empty((2, channels), dtype=weight.dtype, device=coeff.device)
        else:
            tiles = one_tile(room)
        arguments = Arguments()
        tiles.add_to(arguments)
        arguments.rows(merged, 2)
        for row in range(2):
            arguments.parameter(rounded, row)
        arguments.parameter(weight)
        arguments.rows(mean_invstd, 2)
        arguments.rows(coeff, 3)
        arguments.real(count)
        arguments.integers(int(norm.training), int(accumulate))
        channel_launch(self._runtime, "bn_backward", dtype, channels, arguments)

    # ---- schedules ---------------------------------------------------------------------------------------------------

    def run_schedule(
        self,
        memo: dict[Any, Any],
        which: Hashable,
        maps: Sequence[Tensor | None],
        tensors: Sequence[Tensor | None],
        schedule: Callable[[], Sequence[Tensor | None]],
    ) -> Sequence[Tensor | None]:
        """See the contract: launches that were recorded, where the C++ extension is there to play them."""
        x = maps[0]
        if x is None or type(x) not in (Tensor, Parameter) or not tape.can_play():
            return schedule()
        stream = self._runtime.stream_to_play_on(x.device)
        if stream is None:
            return schedule()
        launcher = tape.Launcher(requests.observed, self._runtime.launcher)
        return tape.run(
            memo, (which, self.name, x.device, *map(tape.measures, maps)), (*maps, *tensors), schedule, launcher, stream
        )


def _window(run: Pass, x: Tensor, out: Tensor, pool: Pool) -> None:
    """Sizes of the map and of what its pool gives, and the window."""
    run.integers(*x.shape[2:], *out.shape[2:], *pool.kernel, *pool.stride, *pool.padding)


BACKEND = CudaBackend(Nvrtc())
