"""Triton's interpreter as a proof of the kernels: in bfloat16, which it computes wrongly by itself; of their independence of the order of
programs; and of what they touch (:func:`watched`).

Two faults are corrected from outside, in Triton 3.6 to 3.8: ``tl.dot`` multiplies the bits of bfloat16 operands as integers, and float32 is
truncated to bfloat16, not rounded to nearest even. Arithmetic on bfloat16 values themselves would be wrong too, and is refused: kernels
convert to float32 on load. ``tests/backends/test_interpreter.py`` fails once Triton mends them, and this can go.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import math
import random
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter as triton_interpreter
from triton.runtime.interpreter import InterpretedFunction, InterpreterBuilder, TensorHandle


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


def _in_order(order: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Programs in another ``order`` than that of their numbers: ``"reverse"``, or ``"shuffle"``, the same for the same grid."""

    @functools.cache
    def numbers(programs: int) -> list[int]:
        found = list(range(programs))
        random.Random(programs).shuffle(found) if order == "shuffle" else found.reverse()
        return found

    def placing(original: Callable[..., None]) -> Callable[..., None]:
        def place(self: InterpreterBuilder, x: int, y: int, z: int) -> None:
            _, height, depth = self.grid_dim
            number = numbers(math.prod(self.grid_dim))[(x * height + y) * depth + z]
            original(self, number // depth // height, number // depth % height, number % depth)

        return place

    return placing


_CORRECTIONS = {
    "create_dot": _multiplying,
    "cast_impl": _converting,
    "create_fp_to_fp": _converting,
    "unary_op": _refusing,
    "binary_op": _refusing,
}


@contextlib.contextmanager
def corrected(*, order: str = "forward") -> Iterator[None]:
    """Right bfloat16 inside the ``with``, and programs in ``order``: forward, reverse or shuffle."""
    changes = {**_CORRECTIONS, **({} if order == "forward" else {"set_grid_idx": _in_order(order)})}
    with contextlib.ExitStack() as stack:
        for name, change in changes.items():
            stack.enter_context(mock.patch.object(InterpreterBuilder, name, change(getattr(InterpreterBuilder, name))))
        yield


def quicken() -> None:
    """From now on Triton's interpreter does without most of what it does beside computing, which is more than half of its time. It lists a
    module's members once, not at every call of a device function, to find the builtins that it replaces: which they are does not change,
    one that is replaced is no builtin any more, and all of a module are replaced together. It looks types up that it has seen. And it
    does not compute every integer again in 64 bits to see whether it overflowed, of which nobody hears where its kernels do not debug."""
    names = functools.cache(lambda of: [name for name, member in inspect.getmembers(of) if tl.core.is_builtin(member)])
    replace = triton_interpreter._patch_attr

    def replace_all(of: Any, *rest: Any) -> None:
        for name in names(of):
            member = getattr(of, name)
            if not tl.core.is_builtin(member):
                return
            replace(of, name, member, *rest)

    triton_interpreter._patch_builtin = replace_all
    find = triton_interpreter._get_np_dtype
    found = functools.cache(find)  # of scalars: types of pointers have no hash
    triton_interpreter._get_np_dtype = lambda of: found(of) if type(of) is tl.dtype else find(of)
    builder = triton_interpreter.interpreter_builder
    if not builder.options.debug:
        builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)


# ---- what kernels touch ----------------------------------------------------------------------------------------------

_NOBODY, _SEVERAL = -1, -2


class _Memory:
    """The storage of some tensors of a launch: which of its elements are theirs, and which program has read and written each."""

    def __init__(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        self.first, self.itemsize = storage.data_ptr(), tensor.element_size()
        self.last = self.first + storage.nbytes()
        elements = storage.nbytes() // self.itemsize
        self.owned = torch.zeros(elements, dtype=torch.bool)
        self.reader, self.writer = (np.full(elements, _NOBODY, np.int64) for _ in range(2))

    def own(self, tensor: torch.Tensor) -> None:
        """Its elements may be touched: those of a slice, not what lies between."""
        assert tensor.element_size() == self.itemsize, "one storage under two sizes of elements"
        torch.as_strided(self.owned, tensor.shape, tensor.stride(), tensor.storage_offset()).fill_(True)


class _Watch:
    """One launch at a time: every address that its programs load from and store to."""

    def __init__(self) -> None:
        self.launches = 0
        self._kernel, self._memories = "", []

    def begin(self, kernel: str, tensors: list[torch.Tensor]) -> None:
        found: dict[int, _Memory] = {}
        for tensor in tensors:
            memory = found.setdefault(tensor.untyped_storage().data_ptr(), _Memory(tensor))
            memory.own(tensor)
        self._kernel, self._memories = kernel, list(found.values())
        self.launches += 1

    def _elements(self, what: str, pointers: TensorHandle, mask: TensorHandle) -> Iterator[tuple[_Memory, np.ndarray]]:
        """The elements behind the addresses that are not masked, by memory."""
        inside = np.asarray(mask.data).astype(bool)  # of a descriptor's box an array, whose ``data`` is its buffer
        addresses = pointers.data.astype(np.int64)[np.broadcast_to(inside, pointers.data.shape)]
        left = addresses.size
        for memory in self._memories:
            here = addresses[(addresses >= memory.first) & (addresses < memory.last)]
            elements = (here - memory.first) // memory.itemsize
            outside = int((~memory.owned.numpy()[elements]).sum())
            assert not outside, f"{self._kernel} {what} {outside} elements beside a tensor, in its memory"
            left -= here.size
            if here.size:
                yield memory, elements
        assert not left, f"{self._kernel} {what} {left} elements in nobody's memory"

    def load(self, program: int, pointers: TensorHandle, mask: TensorHandle) -> None:
        for memory, elements in self._elements("reads", pointers, mask):
            known = memory.reader[elements]
            memory.reader[elements] = np.where((known == _NOBODY) | (known == program), program, _SEVERAL)

    def store(self, program: int, pointers: TensorHandle, mask: TensorHandle) -> None:
        for memory, elements in self._elements("writes", pointers, mask):
            assert len(np.unique(elements)) == len(elements), f"{self._kernel} writes an element twice in one store"
            known = memory.writer[elements]
            assert ((known == _NOBODY) | (known == program)).all(), (
                f"two programs of {self._kernel} write the same element"
            )
            memory.writer[elements] = program

    def end(self) -> None:
        for memory in self._memories:
            both = (memory.writer != _NOBODY) & (memory.reader != _NOBODY) & (memory.reader != memory.writer)
            assert not both.any(), f"a program of {self._kernel} reads what another one writes"
        self._memories = []


@contextlib.contextmanager
def watched() -> Iterator[_Watch]:
    """Inside, AssertionError (by the interpreter's own error) where a kernel loads or stores beside the very elements of its tensors, where
    two programs write the same element, or one reads what another writes: what no order of programs may do, seen without running into it.
    Gives the watch, which counts launches."""
    watch = _Watch()
    run, load, store = (
        InterpretedFunction.run,
        InterpreterBuilder.create_masked_load,
        InterpreterBuilder.create_masked_store,
    )

    def number(builder: InterpreterBuilder) -> int:
        (x, y, z), (_, height, depth) = builder.grid_idx, builder.grid_dim
        return (x * height + y) * depth + z

    def watched_run(self: InterpretedFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        given = [getattr(a, "base", a) for a in (*args, *kwargs.values())]  # of a tensor descriptor what it is over
        watch.begin(self.__name__, [a for a in given if isinstance(a, torch.Tensor) and a.numel()])
        result = run(self, *args, grid=grid, warmup=warmup, **kwargs)
        watch.end()
        return result

    def watched_load(
        self: InterpreterBuilder, pointers: TensorHandle, mask: TensorHandle, *rest: Any, **options: Any
    ) -> TensorHandle:
        watch.load(number(self), pointers, mask)
        return load(self, pointers, mask, *rest, **options)

    def watched_store(
        self: InterpreterBuilder, pointers: TensorHandle, value: TensorHandle, mask: TensorHandle, *rest: Any
    ):
        watch.store(number(self), pointers, mask)
        return store(self, pointers, value, mask, *rest)

    with (
        mock.patch.object(InterpretedFunction, "run", watched_run),
        mock.patch.object(InterpreterBuilder, "create_masked_load", watched_load),
        mock.patch.object(InterpreterBuilder, "create_masked_store", watched_store),
    ):
        yield watch
