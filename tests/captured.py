"""What may not happen while a CUDA graph is captured, seen on a CPU with Triton's interpreter: the host reads no value of a tensor, waits
for nothing, and moves nothing between devices."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from triton.runtime.interpreter import InterpretedFunction

#: operators that read a value on the host, or whose result's size depends on values
_READS = frozenset(
    ("_local_scalar_dense", "item", "is_nonzero", "equal", "nonzero", "masked_select", "_unique2", "unique_dim", "is_pinned", "_pin_memory")
)  # fmt: skip
#: of tensors, and of torch.cuda, what reads or waits without an operator that a mode would see
_METHODS = (
    "tolist",
    "numpy",
    "__array__",
    "item",
    "cpu",
    "cuda",
    "pin_memory",
    "__bool__",
    "__int__",
    "__float__",
    "__index__",
)


class HostRead(AssertionError):
    """The host has asked for a value."""


class _Operators(TorchDispatchMode):
    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func._schema.name.split("::")[1]
        if name in _READS:
            raise HostRead(f"{name} reads values on the host")
        if name in ("index", "index_put_") and any(i is not None and i.dtype == torch.bool for i in args[1]):
            raise HostRead(f"{name} by a mask, whose size depends on values")
        y = func(*args, **(kwargs or {}))
        if isinstance(y, Tensor) and any(isinstance(a, Tensor) and a.device != y.device for a in args):
            raise HostRead(f"{name} moves a tensor between devices")
        return y


class _Methods(TorchFunctionMode):
    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if getattr(func, "__name__", "") in _METHODS:
            raise HostRead(f"Tensor.{func.__name__} on the host")
        return func(*args, **(kwargs or {}))


def _refused(what: str) -> Callable[..., None]:
    def refuse(*_: Any, **__: Any) -> None:
        raise HostRead(f"{what} waits for the device")

    return refuse


@contextlib.contextmanager
def captured() -> Iterator[list[str]]:
    """Inside, :class:`HostRead` for what a capture would not survive. Gives the kernels that are launched; the interpreter itself, which
    runs them on the host, is not looked at."""
    kernels: list[str] = []
    run = InterpretedFunction.run

    def launch(self: InterpretedFunction, *args: Any, **kwargs: Any) -> Any:
        kernels.append(self.__name__)
        with _disable_current_modes(), torch._C.DisableTorchFunction():
            return run(self, *args, **kwargs)

    waits = ("synchronize", "Event", "empty_cache", "mem_get_info")
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(InterpretedFunction, "run", launch))
        for name in waits:
            stack.enter_context(mock.patch.object(torch.cuda, name, _refused(f"torch.cuda.{name}")))
        stack.enter_context(_Methods())
        stack.enter_context(_Operators())
        yield kernels
