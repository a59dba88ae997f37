"""What a driver is asked for in a launch, and who is told of it. Needs no Triton: for every backend that launches kernels."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from torch import Tensor


class Request(NamedTuple):
    """What the driver is asked for in a launch: a ``function`` by its handle, over a ``grid``, in blocks of so many ``threads`` with
    ``shared`` bytes. ``parameters``: of each, the operand and the bytes behind its address, or -1 and the bits of a number. ``owner``
    keeps the function loaded. ``dependent``: it may be scheduled before the kernel in front of it has ended, for which it waits itself."""

    owner: object
    function: int
    grid: tuple[int, int, int]
    threads: int
    shared: int
    parameters: tuple[tuple[int, int], ...]
    dependent: bool = False


Observer = Callable[[Request | None, Sequence[Tensor | None]], None]


class _State(threading.local):
    """Per thread, so that following one model beside the training of another takes nothing of that one's launches."""

    observer: Observer | None = None


_state = _State()


def observer() -> Observer | None:
    """Who is told of this thread's launches, after each, with its operands: of None where nobody can say what a driver was asked for."""
    return _state.observer


@contextlib.contextmanager
def observed(observer: Observer) -> Iterator[None]:
    """Tell ``observer`` of this thread's launches inside the ``with``."""
    previous, _state.observer = _state.observer, observer
    try:
        yield
    finally:
        _state.observer = previous


def driver_launch() -> int:
    """The address of ``cuLaunchKernel`` of the driver; 0 where there is none."""
    return _in_driver("cuLaunchKernel")


def driver_launch_dependent() -> int:
    """The address of ``cuLaunchKernelEx`` of the driver, which takes attributes; 0 where there is none."""
    return _in_driver("cuLaunchKernelEx")


@functools.cache
def _in_driver(name: str) -> int:
    try:
        library = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
        return ctypes.cast(getattr(library, name), ctypes.c_void_p).value or 0
    except (OSError, AttributeError):
        return 0
