"""What a step launches, counted on meta tensors: eager's operators, and the kernels of the backends for GPUs, with the bytes of the feature
maps that they read and write."""

from __future__ import annotations

import contextlib
import ctypes
import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fusedres.backends import select
from fusedres.backends.contract import Backend
from fusedres.backends.cuda import CudaBackend
from fusedres.backends.nvrtc import KERNELS, Functions, Program
from fusedres.kernels import requests


def bytes_of(*maps: Tensor | None) -> int:
    """The bytes of the maps that are there."""
    return sum(m.numel() * m.element_size() for m in maps if m is not None)


def met(x: Tensor, kernel: Sequence[int], stride: Sequence[int]) -> int:
    """The bytes of the map ``x`` that a convolution meets: a stride wider than the kernel skips pixels, as in a projection."""
    shares = [min(1.0, k / step) for k, step in zip(kernel, stride, strict=True)]
    return int(bytes_of(x) * math.prod(shares))


class EagerTraffic(TorchDispatchMode):
    """Counts PyTorch's operators that compute something, and their feature-map bytes: each its own pass over its maps."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0
        self.operators = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        flat = [t for a in args for t in (a if isinstance(a, (list, tuple)) else (a,))]
        maps = [t for t in flat if isinstance(t, Tensor) and t.dim() == 4]
        outs = [
            t
            for t in (result if isinstance(result, (list, tuple)) else (result,))
            if isinstance(t, Tensor) and t.dim() == 4
        ]
        name = func.overloadpacket.__name__
        if func.is_view or "detach" in name or name.startswith(("empty", "t.", "view", "new_")):
            return result
        if name == "convolution":
            moved = met(args[0], args[1].shape[2:], args[3]) + bytes_of(result)
        elif name == "convolution_backward":
            grad, x = args[0], args[1]
            moved = bytes_of(grad) + met(x, args[2].shape[2:], args[4])
            moved += bytes_of(grad, x) if result[0] is not None else 0
        elif "batch_norm_backward" in name:
            moved = 5 * bytes_of(args[1])
        elif "batch_norm" in name:
            moved = (3 if args[5] else 2) * bytes_of(args[0])
        else:
            moved = bytes_of(*maps, *outs)
        self.operators += 1
        if maps:
            self.total += moved
        return result


def operators_on(backend: Backend, model: torch.nn.Module, x: Tensor, mode: str) -> EagerTraffic:
    """PyTorch's operators in a step of the converted ``model`` on the ``backend``."""
    with select.observe(lambda inner: backend), EagerTraffic() as operators, torch.set_grad_enabled(mode == "train"):
        y = model(x)
        if mode == "train":
            # not backward(): a recorded launch holds its tensors, and what is held a parameter's gradient copies
            torch.autograd.grad(y.sum(), list(model.parameters()))
    return operators


class Nowhere:
    """Where the CUDA C++ kernels are launched on meta tensors: nowhere."""

    launcher = 0

    def __init__(self) -> None:
        self._launch = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, *[ctypes.c_uint] * 7, *[ctypes.c_void_p] * 3)(
            lambda *_: 0
        )
        self.launcher = ctypes.cast(self._launch, ctypes.c_void_p).value or 0

    def why_not(self, device: torch.device) -> None:
        """Every device will do."""

    def load(self, program: Program, device: torch.device) -> Functions:
        """Kernels without code."""
        return Functions(dict.fromkeys(KERNELS[program.kind], 0), None)

    def on(self, device: torch.device) -> contextlib.AbstractContextManager[None]:
        """Nothing to switch."""
        return contextlib.nullcontext()

    def stream(self, device: torch.device) -> int:
        """The default one."""
        return 0

    def stream_to_play_on(self, device: torch.device) -> None:
        """Nothing is played."""


def launched_by_cuda(model: torch.nn.Module, x: Tensor, mode: str) -> dict[str, int]:
    """As :func:`launched`, on the cuda backend."""
    moved: list[int] = []

    def note(request: requests.Request | None, operands: Sequence[Tensor | None]) -> None:
        moved.append(bytes_of(*(t for t in operands if t is not None and t.dim() == 4)))

    with requests.observed(note):
        operators = operators_on(CudaBackend(Nowhere()), model, x, mode)
    return {"kernels": len(moved), "operators": operators.operators, "bytes": sum(moved) + operators.total}


def launched(model: torch.nn.Module, x: Tensor, mode: str, plan: str, family: str) -> dict[str, int] | None:
    """What a step of the converted ``model`` launches on the triton backend by ``plan`` on a GPU of ``family``, on meta tensors: the
    backend's own kernels, PyTorch's operators beside them, and the bytes of the feature maps that both read and write, whole. None where
    Triton is missing."""
    if isinstance(select.load("triton"), str):
        return None
    from fusedres.backends.triton import BACKEND, use_plan
    from fusedres.kernels import launch
    from fusedres.kernels.tiles import DEFAULT_ARCH

    arch = DEFAULT_ARCH._replace(family=family)
    with launch.record(arch=arch) as launches, use_plan(plan):
        operators = operators_on(BACKEND, model, x, mode)
    moved = sum(
        bytes_of(value)
        for launch in launches
        for name, value in launch.arguments.items()
        if isinstance(value, Tensor) and value.dim() == 4 and name != "weight"
    )
    return {"kernels": len(launches), "operators": operators.operators, "bytes": moved + operators.total}


#: a name, with the plan and the family of GPUs that it is the default for
PLANS = {
    "fused": ("fused", "sm_80", "every convolution fused"),
    **{
        f"auto {family}": ("auto", family, f"by the default plans for {family}")
        for family in ("sm_80", "sm_90", "sm_100", "gfx942")
    },
}
