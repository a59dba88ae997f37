"""The C++ extension on CPU: every pass reads and writes each map once, vectorised, on torch's threads.

Its own convolutions (float32, and bfloat16 where the processor multiplies pairs of it) apply everything pending while an operand is loaded
and everything that follows while the result is in cache, so that a convolution reads its maps once, writes one, and nothing lies between.
What they do not take (other dtypes, groups whose width neither divides a vector nor is a multiple of it, odd channels in bfloat16, very
large kernels) is the library's, between passes.

What is fresh is allocated here, and the operators write into it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from .. import activations
from ..errors import BackendError
from ..operands import FRESH, PLAIN, Epilogue, GradTarget, LazyGrad, LazyMap
from ..specs import Geometry, Norm, Pool
from . import library_conv, tape
from .contract import Backend, Reduction, accum_dtype, is_max, is_relu
from .layout import empty_gradient, empty_map

try:
    from fusedres import _C
except ImportError as error:
    _C, _missing = None, str(error)
else:
    _C.cpu_capability()  # a wrong FUSEDRES_CPU_CAPABILITY is an error now, not in the middle of a step
    _missing = ""

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_MAX_KERNEL = 16
_MAX_STRIDE = 16  # product of both strides: the phases of an input gradient

if _C is not None:
    _ops = torch.ops.fusedres_cpp
    # every operator only writes into its arguments: for tracing there is nothing to infer
    for _name in (
        "statistics", "add_act_forward", "add_act_backward", "apply_grad_coeff", "dgrad_epilogue", "pool_forward", "pool_backward",
        "bn_coefficients", "bn_frozen", "bn_backward", "conv_forward", "conv_norm_forward", "conv_dgrad", "conv_wgrad", "highway_forward",
        "highway_backward",
    ):  # fmt: skip
        torch.library.register_fake(f"fusedres_cpp::{_name}", lambda *args: None)
    # resolved once: a look-up by name at every call takes as long as a small pass
    _statistics = _ops.statistics.default
    _conv_forward = _ops.conv_forward.default
    _conv_norm_forward = _ops.conv_norm_forward.default
    _conv_dgrad = _ops.conv_dgrad.default
    _conv_wgrad = _ops.conv_wgrad.default
    _add_act_forward = _ops.add_act_forward.default
    _add_act_backward = _ops.add_act_backward.default
    _highway_forward = _ops.highway_forward.default
    _highway_backward = _ops.highway_backward.default
    _apply_grad_coeff = _ops.apply_grad_coeff.default
    _dgrad_epilogue = _ops.dgrad_epilogue.default
    _pool_forward = _ops.pool_forward.default
    _pool_backward = _ops.pool_backward.default
    _bn_coefficients = _ops.bn_coefficients.default
    _bn_frozen = _ops.bn_frozen.default
    _bn_backward = _ops.bn_backward.default


def cpu_capability() -> str | None:
    """The instruction set of the kernels (``default``, ``avx2``, ``avx512`` or ``avx512_bf16``), None without the extension."""
    return None if _C is None else _C.cpu_capability()


@functools.lru_cache(maxsize=256)
def _code(act: str) -> tuple[int, float]:
    """An activation as the operators take it: its number in the extension's own order, and its slope. BackendError for one that the
    extension does not compute."""
    kind, slope = activations.parse(act)
    known = [] if _C is None else _C.activations()
    if kind not in known:
        raise BackendError(f"the C++ extension has no activation {kind!r}, only {', '.join(known)}: build it anew")
    return known.index(kind), slope


@functools.cache
def _multiplies(dtype: torch.dtype) -> bool:
    """Whether this process has convolutions of that dtype that are worth having."""
    return dtype == torch.float32 or (dtype == torch.bfloat16 and cpu_capability() == "avx512_bf16")


@functools.cache
def _lanes() -> int:
    """The float32 numbers of a vector register."""
    return {"default": 4, "avx2": 8}.get(cpu_capability() or "", 16)


def _is_depthwise(weight: torch.Size, geometry: Geometry) -> bool:
    """Whether the kernels for groups that read one channel and write one take it (``is_depthwise`` in csrc/cpu/conv.h)."""
    one_each = weight[1] == 1 and weight[0] == geometry.groups > 1
    return one_each and weight[3] <= 7 and geometry.dilation[1] == 1 and max(geometry.stride) <= 2


def _takes_groups(read: int, written: int, taps: int, pixels: int, groups: int, dtype: torch.dtype) -> bool:
    """Whether the kernels are faster than the library, with the passes around it, on groups that read and write so many channels each and
    are not depthwise. Groups as narrow as a part of a vector share one where they read what they write (``take_groups`` in
    csrc/cpu/conv_grid-inl.h); others have vectors of their own, which have to be full. What times both sides of the bounds:
    ``pytest -p benchmark bench/test_primitives.py --benchmark-only -k groups``."""
    lanes, pairs = _lanes(), dtype == torch.bfloat16
    if pixels <= 16:
        return read >= 4
    shares = read == written > 1 and lanes % read == 0
    # a vector that they do not fill is little beside two that they do, or beside what a call of the library costs
    if shares and (groups % (lanes // read) == 0 or groups * read > 2 * lanes or pixels <= 512):
        return not pairs or read <= 4
    if taps == 1:
        return read >= 4 and (pixels * groups <= 4096 or (written >= 16 and (read >= 32 or pixels <= 2048)))
    return (read // 2 if pairs else read) % lanes == 0 and (
        written % lanes == 0 or (2 * written == lanes and not pairs)
    )


@functools.lru_cache(maxsize=4096)
def _own_conv(
    shape: torch.Size, weight: torch.Size, dtype: torch.dtype, geometry: Geometry
) -> tuple[tuple[int, ...], list[int]] | None:
    """``(the shape of the output, the geometry as the operators take it)`` for an input of ``shape``; None where the convolution is the
    library's. Kept, because telling takes as long as a small pass."""
    if len(weight) != 4 or not _multiplies(dtype):
        return None
    written, depthwise = weight[0] // geometry.groups, _is_depthwise(weight, geometry)
    in_pairs = dtype == torch.bfloat16 and not depthwise  # of channels
    if (
        in_pairs
        and (written % 2 or weight[1] % 2)
        or max(weight[2:]) > _MAX_KERNEL
        or geometry.stride[0] * geometry.stride[1] > _MAX_STRIDE
    ):
        return None
    height, width = geometry.out_size(tuple(shape[2:]), tuple(weight[2:]))
    out = (shape[0], weight[0], height, width)
    groups, pixels = geometry.groups, shape[0] * height * width
    if groups > 1 and not depthwise:
        if not _takes_groups(weight[1], written, weight[2] * weight[3], pixels, groups, dtype):
            return None
    several = () if groups == 1 else (groups,)
    return out, [*geometry.stride, *geometry.padding, *geometry.dilation, *several]


def _plan(x: LazyMap, weight: Tensor, geometry: Geometry) -> tuple[tuple[int, ...], list[int]] | None:
    # an activation of what has no scale and shift is not among the kernels' prologues
    if x[1] is None and x[2] != "none":
        return None
    try:
        return _own_conv(x[0].shape, weight.shape, weight.dtype, geometry)
    except TypeError:  # sizes that are symbols of a tracer have no hash
        return _own_conv.__wrapped__(x[0].shape, weight.shape, weight.dtype, geometry)


def _like(x: Tensor) -> Tensor:
    return empty_map(x.shape, x)


def _running_statistics(norm: Norm) -> tuple[Tensor, Tensor]:
    if norm.running_mean is None or norm.running_var is None:
        raise ValueError("a BatchNorm without running statistics is no frozen one")
    return norm.running_mean, norm.running_var


class CppBackend(Backend):
    """See the module."""

    name = "cpp"

    def supports(self, device: torch.device, dtype: torch.dtype) -> str | None:
        if device.type != "cpu":
            return f"its kernels run on CPU, not on {device.type}"
        if dtype not in _DTYPES:
            return f"it computes in floating point, not {dtype}"
        if _C is None:
            return (
                f"the C++ extension is not there ({_missing}); with a C++ compiler at hand, type FUSEDRES_BUILD=cpu pip install "
                "--no-build-isolation . in the folder of the sources"
            )
        return None

    def statistics(self, x: Tensor, stats: Reduction) -> None:
        _statistics(x, stats)

    def conv_forward(
        self, x: LazyMap, weight: Tensor, bias: Tensor | None, geometry: Geometry, epilogue: Epilogue = PLAIN
    ) -> Tensor:
        plan = _plan(x, weight, geometry)
        if plan is None:
            return library_conv.conv_forward(self, x, weight, bias, geometry, epilogue)
        raw, scale_shift, act, _ = x
        out, stats, out_scale_shift, residual, out_act = epilogue
        if out is None:
            out = empty_map(plan[0], raw)
        added, added_scale_shift = (None, None) if residual is None else residual[:2]
        _conv_forward(
            raw, scale_shift, *_code(act), weight, bias, plan[1], out, stats, out_scale_shift, added, added_scale_shift,
            *_code(out_act),
        )  # fmt: skip
        return out

    def conv_norm_forward(
        self,
        x: LazyMap,
        weight: Tensor,
        bias: Tensor | None,
        geometry: Geometry,
        norm: Norm,
        *,
        out: Tensor | None = None,
        residual: LazyMap | None = None,
        act: str = "none",
    ) -> Tensor:
        plan = _plan(x, weight, geometry)
        if plan is None:
            return super().conv_norm_forward(x, weight, bias, geometry, norm, out=out, residual=residual, act=act)
        statistics = _running_statistics(norm)
        raw, scale_shift, x_act, _ = x
        if out is None:
            out = empty_map(plan[0], raw)
        added, added_scale_shift = (None, None) if residual is None else residual[:2]
        _conv_norm_forward(
            raw, scale_shift, *_code(x_act), weight, bias, plan[1], out, norm.weight, norm.bias, *statistics, norm.eps, added,
            added_scale_shift, *_code(act),
        )  # fmt: skip
        return out

    def conv_backward(
        self,
        grad: LazyGrad,
        x: LazyMap,
        weight: Tensor,
        geometry: Geometry,
        target: GradTarget | None = FRESH,
        need_dw: bool = True,
    ) -> tuple[Tensor | None, Tensor | None]:
        plan = _plan(x, weight, geometry)
        if plan is None:
            return library_conv.conv_backward(self, grad, x, weight, geometry, target, need_dw)
        raw, scale_shift, act, mean_invstd = x
        code, numbers, dweight = _code(act), plan[1], None
        if need_dw:
            dweight = empty_gradient(weight)
            _conv_wgrad(*grad, raw, scale_shift, *code, numbers, dweight)
        if target is None:
            return None, dweight
        dx, base, accumulate, scaled, sums = target
        if dx is None:
            dx = _like(raw)
        below = raw if scale_shift is not None or sums is not None else None
        _conv_dgrad(*grad, weight, numbers, dx, below, scale_shift, *code, mean_invstd, base, accumulate, scaled, sums)
        return dx, dweight

    def dgrad_epilogue(self, da: Tensor, x: LazyMap, target: GradTarget = FRESH) -> Tensor:
        raw, scale_shift, act, mean_invstd = x
        dx, base, accumulate, scaled, sums = target
        if dx is None:
            dx = da
        _dgrad_epilogue(da, raw, scale_shift, mean_invstd, *_code(act), dx, base, accumulate, scaled, sums)
        return dx

    def add_act_forward(
        self,
        x: LazyMap,
        residual: LazyMap | None = None,
        act: str = "none",
        *,
        out: Tensor | None = None,
        stats: Reduction | None = None,
    ) -> Tensor:
        if out is None:
            out = _like(x.raw)
        added, added_scale_shift = (None, None) if residual is None else residual[:2]
        _add_act_forward(x.raw, x.scale_shift, added, added_scale_shift, *_code(act), out, stats)
        return out

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
        dz = None if act == "none" else _like(x.raw)
        if dz is not None or sums is not None or residual_sums is not None:
            added, scale_shift, _, mean_invstd = (None, None, None, None) if residual is None else residual
            _add_act_backward(
                grad, x.raw, x.scale_shift, x.mean_invstd, *_code(act), dz, sums, added, scale_shift, mean_invstd, residual_sums
            )  # fmt: skip
        return grad if dz is None else dz

    def highway_forward(self, x: LazyMap, gate: LazyMap, carry: Tensor, *, out: Tensor | None = None) -> Tensor:
        if out is None:
            out = _like(x.raw)
        _highway_forward(x.raw, x.scale_shift, is_relu(x), gate.raw, gate.scale_shift, carry, out)
        return out

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
        written = _like(x.raw), _like(x.raw), _like(x.raw)
        _highway_backward(
            grad, x.raw, x.scale_shift, x.mean_invstd, is_relu(x), gate.raw, gate.scale_shift, gate.mean_invstd, carry, *written,
            sums, gate_sums,
        )  # fmt: skip
        return written

    def apply_grad_coeff(self, grad: LazyGrad, *, out: Tensor | None = None) -> Tensor:
        if out is None:
            out = _like(grad.grad)
        _apply_grad_coeff(*grad, out)
        return out

    def pool_forward(
        self, x: LazyMap, pool: Pool, *, out: Tensor | None = None, stats: Reduction | None = None
    ) -> tuple[Tensor, Tensor | None]:
        shape = pool.out_shape(x.raw.shape)
        if out is None:
            out = empty_map(shape, x.raw)
        index = empty_map(shape, x.raw, torch.uint8) if is_max(pool) else None
        _pool_forward(x.raw, x.scale_shift, *_code(x.act), _window(pool), out, index, stats)
        return out, index

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
        if coeff is not None and dx is None:
            dx = _like(x.raw)
        if is_max(pool) != (index is not None):
            raise ValueError(f"a {pool.kind} pool's backward {'wants the index' if index is None else 'has no index'}")
        raw, scale_shift, act, mean_invstd = x
        _pool_backward(
            grad, index, raw, scale_shift, mean_invstd, *_code(act), _window(pool), sums, coeff, dx
        )  # fmt: skip
        return None if coeff is None else dx

    def bn_coefficients(self, norm: Norm, stats: Reduction, count: int) -> tuple[Tensor, Tensor]:
        assert isinstance(stats, Tensor)  # what new_reduction gives here
        # fresh: stats may be columns of a wider tensor
        shape, dtype = stats.shape, stats.dtype
        scale_shift, mean_invstd = torch.empty(shape, dtype=dtype), torch.empty(shape, dtype=dtype)
        mean, variance = norm.running_mean, norm.running_var
        _bn_coefficients(
            stats, count, norm.weight, norm.bias, mean, variance, norm.momentum, norm.eps, scale_shift, mean_invstd
        )
        return scale_shift, mean_invstd

    def bn_frozen(self, norm: Norm, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        mean, variance = _running_statistics(norm)
        scale_shift, mean_invstd = (torch.empty((2, *mean.shape), dtype=accum_dtype(dtype)) for _ in range(2))
        _bn_frozen(norm.weight, norm.bias, mean, variance, norm.eps, scale_shift, mean_invstd)
        return scale_shift, mean_invstd

    def bn_backward(
        self, norm: Norm, sums: Reduction, count: int, mean_invstd: Tensor, coeff: Tensor, accumulate: bool = False
    ) -> None:
        _bn_backward(sums, count, norm.weight, mean_invstd, norm.training, coeff, accumulate)

    def new_reduction(self, channels: int, like: Tensor) -> Reduction:
        return torch.empty((2, channels), dtype=accum_dtype(like.dtype))

    def parameter_grad(self, sums: Reduction, row: int, dtype: torch.dtype) -> Tensor:
        assert isinstance(sums, Tensor)  # what new_reduction gives here
        found = sums.select(0, row)
        return found if found.dtype == dtype else found.to(dtype)

    def run_schedule(
        self,
        memo: dict[Any, Any],
        which: Hashable,
        maps: Sequence[Tensor | None],
        tensors: Sequence[Tensor | None],
        schedule: Callable[[], Sequence[Tensor | None]],
    ) -> Sequence[Tensor | None]:
        if type(maps[0]) is not Tensor and type(maps[0]) is not Parameter:  # somebody traces
            return schedule()
        return tape.run(memo, (which, *map(tape.measures, maps)), (*maps, *tensors), schedule)

    def keep_packed(self, weight: Tensor) -> Callable[[], None] | None:
        if _C is None or weight.dim() != 4 or weight.device.type != "cpu" or not _multiplies(weight.dtype):
            return None
        address = weight.data_ptr()
        _C.keep_packed(address)
        return functools.partial(_C.forget_packed, address)

    def routes(self, primitive: str, *args: Any, **kwargs: Any) -> dict[str, str]:
        if primitive == "conv_forward":
            return _routes_forward(*args, **kwargs)
        return _routes_backward(*args, **kwargs) if primitive == "conv_backward" else {}


def _route(x: LazyMap, weight: Tensor, geometry: Geometry) -> str:
    return "library" if _plan(x, weight, geometry) is None else "fused"


def _routes_forward(x: LazyMap, weight: Tensor, bias: Tensor | None, geometry: Geometry, *_: Any) -> dict[str, str]:
    return {"forward": _route(x, weight, geometry)}


def _routes_backward(
    grad: LazyGrad,
    x: LazyMap,
    weight: Tensor,
    geometry: Geometry,
    target: GradTarget | None = FRESH,
    need_dw: bool = True,
) -> dict[str, str]:
    needed = {"dgrad": target is not None, "wgrad": need_dw}
    return {op: _route(x, weight, geometry) for op, need in needed.items() if need}


def _window(pool: Pool) -> list[int]:
    return [*pool.kernel, *pool.stride, *pool.padding]


BACKEND = CppBackend()
