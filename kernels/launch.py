"""Launching a kernel, or recording what would be launched: the one place through which every kernel goes."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import torch
import triton

from .tiles import DEFAULT_ARCH, Arch, arch_of_gpu

if TYPE_CHECKING:
    from triton.runtime.interpreter import InterpretedFunction

# Arguments that change with the batch or the resolution, and by whose divisibility no access gets wider (channels are what
# is contiguous): one compilation serves all of them.
SIZES = ("N", "H", "W", "HO", "WO", "rows", "chunk", "tiles", "tile_rows")

#: whether kernels run in Triton's interpreter, on CPU tensors: TRITON_INTERPRET=1 when this was imported
INTERPRETED: bool = triton.knobs.runtime.interpret


class Launch(NamedTuple):
    """One kernel launch: the jitted function, its grid, and every argument and option by name."""

    kernel: triton.JITFunction | InterpretedFunction
    grid: tuple[int, ...]
    arguments: dict[str, object]


class _Recording(NamedTuple):
    launches: list[Launch]
    device: torch.device | None
    arch: Arch


class _State(threading.local):
    """Per thread, so that following one model beside the training of another takes nothing of that one's launches."""

    recording: _Recording | None = None


_state = _State()


@contextlib.contextmanager
def record(device: torch.device | None = None, arch: Arch | None = None) -> Iterator[list[Launch]]:
    """Collect this thread's launches instead of running them: to compile or count the kernels of a call, for meta tensors, without a GPU.

    ``device`` is the one that meta tensors stand for, where it is here; ``arch`` the architecture that tiles are chosen for (default:
    that of ``device``, else sm_80). The backward of CPU and meta tensors runs on the calling thread and is recorded too; that of CUDA
    tensors only under ``torch.autograd.set_multithreading_enabled(False)``.
    """
    if arch is None:
        arch = DEFAULT_ARCH if device is None else arch_of(device)
    previous, _state.recording = _state.recording, _Recording([], device, arch)
    try:
        yield _state.recording.launches
    finally:
        _state.recording = previous


def target_device(device: torch.device) -> torch.device:
    """``device``, or for the meta device the one that :func:`record` was told."""
    recording = _state.recording
    if device.type == "meta" and recording is not None and recording.device is not None:
        return recording.device
    return device


def arch_of(device: torch.device) -> Arch:
    """The architecture of ``device``; where that is no GPU, the one that :func:`record` was told."""
    recording = _state.recording
    return arch_of_gpu(device) if device.type == "cuda" or recording is None else recording.arch


def launch(
    kernel: triton.JITFunction | InterpretedFunction,
    grid: tuple[int, ...],
    device: torch.device,
    *,
    num_warps: int,
    **arguments: object,
) -> None:
    """Run ``kernel`` over ``grid`` on ``device``, which need not be the current one; ``num_warps`` counts warps of 32 threads, so that a
    configuration means the same number of threads everywhere."""
    arguments["num_warps"] = max(1, num_warps * 32 // arch_of(device).warp)
    recording = _state.recording
    if recording is not None:
        recording.launches.append(Launch(kernel, grid, arguments))
    elif device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            kernel[grid](**arguments)
    else:
        kernel[grid](**arguments)
