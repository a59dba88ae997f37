"""Triton's interpreter as a proof of the kernels in bfloat16, which it computes wrongly by itself, and of their independence of order.

Two faults are corrected from outside, in Triton 3.6 to 3.8: ``tl.dot`` multiplies the bits of bfloat16 operands as integers, and float32 is
truncated to bfloat16, not rounded to nearest even. Arithmetic on bfloat16 values themselves would be wrong too, and is refused: kernels
convert to float32 on load. ``tests/backends/test_interpreter.py`` fails once Triton mends them, and this can go.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import numpy as np
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle


def widened(bits: np.ndarray) -> np.ndarray:
    """The float32 values of bfloat16 bits."""
    return (np.ascontiguousarray(bits).astype(np.uint32) << np.uint32(16)).view(np.float32)


def rounded(values: np.ndarray) -> np.ndarray:
    """The bits of float32 values in bfloat16: to nearest, ties to even; NaN stays NaN."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32).astype(np.uint64)
    odd = (bits >> np.uint64(16)) & np.uint64(1)
    nearest = (bits + np.uint64(0x7FFF) + odd) >> np.uint64(16)
    quiet = (bits >> np.uint64(16)) | np.uint64(0x40)
    return np.where(np.isnan(values), quiet, nearest).astype(np.uint16)


def _is_bfloat16(handle: Any) -> bool:
    return isinstance(handle, TensorHandle) and handle.dtype.scalar == tl.bfloat16


def _as_float32(handle: TensorHandle) -> TensorHandle:
    return TensorHandle(widened(handle.data), tl.float32) if _is_bfloat16(handle) else handle


def _converting(original: Callable[..., TensorHandle]) -> Callable[..., TensorHandle]:
    """A conversion between types, right between bfloat16 and float32."""

    def convert(self: InterpreterBuilder, source: TensorHandle, target: Any, *rest: Any) -> TensorHandle:
        kinds = source.dtype.scalar, target.scalar
        if kinds == (tl.bfloat16, tl.float32):
            return TensorHandle(widened(source.data), tl.float32)
        if kinds == (tl.float32, tl.bfloat16):
            return TensorHandle(rounded(source.data), tl.bfloat16)
        assert tl.bfloat16 not in kinds or kinds[0] == kinds[1], f"{kinds[0]} to {kinds[1]} is not corrected"
        return original(self, source, target, *rest)

    return convert


def _multiplying(original: Callable[..., TensorHandle]) -> Callable[..., TensorHandle]:
    """``tl.dot``, of the values of its operands."""

    def dot(self: InterpreterBuilder, a: TensorHandle, b: TensorHandle, *rest: Any) -> TensorHandle:
        return original(self, _as_float32(a), _as_float32(b), *rest)

    return dot


def _refusing(original: Callable[..., TensorHandle]) -> Callable[..., TensorHandle]:
    """An operation that would take the bits of bfloat16 for integers."""

    def operate(self: InterpreterBuilder, *operands: Any) -> TensorHandle:
        assert not any(map(_is_bfloat16, operands)), (
            "arithmetic on bfloat16 values, which Triton's interpreter computes wrongly"
        )
        return original(self, *operands)

    return operate


def _from_the_last(original: Callable[..., None]) -> Callable[..., None]:
    """Programs in reverse: what must not depend on their order."""

    def place(self: InterpreterBuilder, x: int, y: int, z: int) -> None:
        original(self, *(size - 1 - i for size, i in zip(self.grid_dim, (x, y, z), strict=True)))

    return place


_CORRECTIONS = {
    "create_dot": _multiplying,
    "cast_impl": _converting,
    "create_fp_to_fp": _converting,
    "unary_op": _refusing,
    "binary_op": _refusing,
}


@contextlib.contextmanager
def corrected(*, reverse: bool = False) -> Iterator[None]:
    """Right bfloat16 inside the ``with``; ``reverse``: every grid's last program first."""
    changes = {**_CORRECTIONS, **({"set_grid_idx": _from_the_last} if reverse else {})}
    with contextlib.ExitStack() as stack:
        for name, change in changes.items():
            stack.enter_context(mock.patch.object(InterpreterBuilder, name, change(getattr(InterpreterBuilder, name))))
        yield
