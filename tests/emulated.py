"""A GPU's driver for recorded launches, without a GPU: what it is asked for it runs in Triton's interpreter, on the memory at the addresses
that it is given."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from fusedres.kernels import launch, requests
from fusedres.kernels.launch import Prepared, Request
from fusedres.kernels.layout import Form, form

#: the stream of all launches
STREAM = 7
#: of whoever emulates: the type of CUDA's cuLaunchKernel
LAUNCHER = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.c_void_p, *[ctypes.c_uint] * 7, ctypes.c_void_p, ctypes.POINTER(ctypes.c_void_p), ctypes.c_void_p
)  # fmt: skip


class _Function(NamedTuple):
    prepared: Prepared
    operands: tuple[Form | None, ...]
    late: tuple[float, ...]


def _at(address: int, of: Form) -> Tensor:
    """The tensor of that form at an address."""
    count = 1 + sum((n - 1) * s for n, s in zip(of.shape, of.stride, strict=True)) if all(of.shape) else 0
    if count == 0:
        return torch.empty(of.shape, dtype=of.dtype)
    memory = (ctypes.c_char * (count * of.dtype.itemsize)).from_address(address)
    return torch.frombuffer(memory, dtype=of.dtype).as_strided(of.shape, of.stride)


class Driver:
    """Its functions by their handles, how many launches it has run, and what went wrong in one: a callback's exception reaches nobody."""

    def __init__(self) -> None:
        self.functions: list[_Function] = []
        self.launches = 0
        self.error: BaseException | None = None
        self.callback = LAUNCHER(self._launch)

    def request(self, prepared: Prepared, tensors: tuple[Tensor | None, ...], late: tuple[float, ...]) -> Request:
        """As a launch of a compiled kernel would ask for it."""
        self.functions.append(_Function(prepared, tuple(map(form, tensors)), late))
        addresses = [(i, 0) if t is not None else (-1, 0) for i, t in enumerate(tensors)]
        return Request(self, len(self.functions), prepared._grid, 32, 0, tuple(addresses))  # type: ignore[arg-type]

    def _launch(self, function: int, *asked: Any) -> int:
        try:
            *grid, threads, one, other, shared, stream, parameters, extra = asked
            of = self.functions[function - 1]
            assert tuple(grid) == of.prepared._grid and (threads, one, other, shared) == (32, 1, 1, 0)
            assert stream == STREAM and extra is None
            addresses = [
                ctypes.cast(parameters[i], ctypes.POINTER(ctypes.c_uint64)).contents.value
                for i in range(len(of.operands))
            ]
            tensors = [
                None if form is None else _at(address, form)
                for address, form in zip(addresses, of.operands, strict=True)
            ]
            of.prepared._run_public(tuple(tensors), of.late)
            self.launches += 1
            return 0
        except BaseException as error:
            self.error = error
            return 1


@contextlib.contextmanager
def emulated() -> Iterator[Driver]:
    """Launches are recorded as a GPU's inside the ``with``, and go to this driver when they are played."""
    driver, run = Driver(), Prepared._run_public

    def launched(self: Prepared, *tensors: Tensor | None, late: tuple[float, ...] = ()) -> None:
        with _disable_current_modes():  # an interpreter copies tensors, which a GPU's launch does not
            run(self, tensors, late)
        observer = requests.observer()
        if observer is not None:
            observer(driver.request(self, tensors, late), tensors)

    with (
        mock.patch.object(Prepared, "__call__", launched),
        mock.patch.object(launch, "stream_to_play_on", lambda device: STREAM),
        mock.patch.object(launch, "driver_launch", lambda: ctypes.cast(driver.callback, ctypes.c_void_p).value),
    ):
        yield driver
    if driver.error is not None:
        raise driver.error
