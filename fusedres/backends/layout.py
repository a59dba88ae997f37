"""Maps in memory: channels_last, or channel slices of a wider channels_last buffer."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor
from torch.nn import Parameter

from .contract import accum_dtype

try:
    from fusedres import _C  # noqa: F401
except ImportError:
    _fresh = None
else:
    _fresh = torch.ops.fusedres_cpp.fresh.default
    torch.library.register_fake(
        "fusedres_cpp::fresh", lambda sizes, strides, dtype: torch.empty_strided(sizes, strides, dtype=dtype)
    )

_FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}
#: dimensions from the outermost in memory to the innermost
_ORDERS = {4: (0, 2, 3, 1), 5: (0, 2, 3, 4, 1)}
#: values from which on the extension is asked for memory, which it has for as many bytes
_LARGE = 1 << 17


def format_of(dims: int) -> torch.memory_format:
    """The memory format of maps of so many dimensions."""
    return _FORMATS.get(dims, torch.contiguous_format)


def as_map(x: Tensor) -> Tensor:
    """``x`` in channels_last (itself where it is already, or is a channel slice of a map)."""
    found = format_of(x.dim())
    # the first is one question, and answers it nearly always
    return x if x.is_contiguous(memory_format=found) or is_slice(x) else x.contiguous(memory_format=found)


def is_slice(x: Tensor) -> bool:
    """Whether ``x`` is a channel slice of a wider map: rows of channels side by side, one pitch apart."""
    if x.dim() not in _FORMATS or x.stride(1) != 1:
        return False
    pitch = None
    rows = 1
    # from the fastest dimension to the slowest; the stride of a dimension of size 1 says nothing
    for size, stride in zip((x.shape[0], *x.shape[2:])[::-1], (x.stride(0), *x.stride()[2:])[::-1], strict=True):
        if size > 1:
            pitch = stride if pitch is None else pitch
            if stride != rows * pitch:
                return False
        rows *= size
    return pitch is not None and pitch > x.shape[1]


@functools.lru_cache(maxsize=1024)
def _strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    order = _ORDERS[len(shape)]
    return tuple(math.prod(shape[d] for d in order[order.index(i) + 1 :]) for i in range(len(shape)))


def _keeps(like: Tensor) -> bool:
    """Whether memory may come from the extension, which keeps it from map to map: on a CPU, and where nobody traces, because a compiler
    plans memory by itself."""
    return like.is_cpu and type(like) in (Tensor, Parameter) and not torch.compiler.is_compiling()


def empty_map(shape: tuple[int, ...], like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """An uninitialised channels_last map, in the dtype of ``like`` where none is given."""
    if _fresh is not None and _keeps(like) and math.prod(shape) >= _LARGE:
        return _fresh(shape, _strides(tuple(shape)), dtype or like.dtype)
    # by its order: Inductor forgets the memory format of torch.empty, and would copy between what it makes of it and maps
    return torch.empty_permuted(shape, _ORDERS[len(shape)], dtype=dtype or like.dtype, device=like.device)


def empty_gradient(weight: Tensor) -> Tensor:
    """An uninitialised tensor that lies as ``weight`` does."""
    dense = weight.is_contiguous() or weight.is_contiguous(memory_format=format_of(weight.dim()))
    if _fresh is not None and _keeps(weight) and dense and weight.numel() >= _LARGE:
        return _fresh(weight.shape, weight.stride(), weight.dtype)
    return torch.empty_like(weight)


def has_symbols(*sizes: int) -> bool:
    """Whether one of ``sizes`` is a symbol: a tracer asks for what comes back, without values."""
    return any(isinstance(size, torch.SymInt) for size in sizes)


def channel_empty(rows: int, channels: int, like: Tensor) -> Tensor:
    """An uninitialised ``[rows, channels]`` per-channel tensor for maps like ``like``."""
    return torch.empty(rows, channels, dtype=accum_dtype(like.dtype), device=like.device)


def row_count(x: Tensor) -> int:
    """Values per channel."""
    return x.numel() // x.shape[1]
