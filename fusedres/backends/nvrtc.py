"""The CUDA C++ kernels on a GPU: compiled at first use by NVRTC for the GPU at hand, kept on disk, loaded through the driver.

No compiler and no toolkit: NVRTC and ``cuda.bindings``, NVIDIA's Python bindings, come with torch's CUDA builds on Linux, elsewhere with
``pip install cuda-bindings``. Sources are in ``csrc/cuda``, installed as ``fusedres.cuda``. What is compiled is kept in the cache folder
(``FUSEDRES_CACHE_DIR``) under a name that depends on the sources, their options, the architecture and the version of NVRTC.
"""

# fusedres.kernels is the folder kernels/, which setup.py says and a type checker does not see
# pyright: reportMissingImports=false
from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib
import importlib.resources
import os
import tempfile
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch

from ..cache import cache_folder
from ..errors import BackendError
from ..kernels import requests

#: what kernels are launched with
THREADS = 256
#: the kernels for accesses of 16 bytes and of one value, by their names in csrc/cuda/kernels.cuh
_OF_MAPS = (
    "add_act_forward",
    "add_act_backward",
    "pool_forward",
    "pool_backward",
    "highway_forward",
    "highway_backward",
)
MAPS, CHANNELS = "maps", "channels"
#: which kernels there are in a program: those over maps, and those over numbers per channel
KERNELS = {
    MAPS: tuple(f"{name}_{width}" for name in _OF_MAPS for width in ("wide", "narrow")),
    CHANNELS: ("merge", "bn_coefficients", "bn_backward"),
}
_STORAGE = {torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "float", torch.float64: "double"}
DTYPES = tuple(_STORAGE)
_MAIN = "kernels.cu"


class Program(NamedTuple):
    """Kernels that are compiled together: of a ``kind`` (:data:`KERNELS`) in a dtype."""

    kind: str
    dtype: torch.dtype

    @property
    def macros(self) -> tuple[str, ...]:
        """What the sources want to know, as ``NAME=VALUE``."""
        return f"FUSEDRES_STORAGE={_STORAGE[self.dtype]}", f"FUSEDRES_OF_{self.kind.upper()}=1"


class Functions(NamedTuple):
    """A loaded program: the handles of its kernels by name, and what keeps it loaded."""

    handles: Mapping[str, int]
    owner: object


class Runtime(Protocol):
    """Where the kernels run: on GPUs (:class:`Nvrtc`) or, in tests, on a host."""

    @property
    def launcher(self) -> int:
        """What launches them: the address of a function of the type of CUDA's ``cuLaunchKernel``, 0 where there is none."""
        ...

    def why_not(self, device: torch.device) -> str | None:
        """None where kernels run on ``device``, else the reason in words that complete a sentence."""
        ...

    def load(self, program: Program, device: torch.device) -> Functions:
        """The program on ``device``. Raises BackendError where it cannot be compiled or loaded."""
        ...

    def on(self, device: torch.device) -> contextlib.AbstractContextManager[Any]:
        """A ``with`` in which ``device`` is the current one."""
        ...

    def stream(self, device: torch.device) -> int:
        """The current stream of ``device``."""
        ...

    def stream_to_play_on(self, device: torch.device) -> int | None:
        """The same where recorded launches may go to it: the device is the current one, and this thread has launched there before, so
        that a context is current. Else None."""
        ...


@functools.cache
def sources() -> Mapping[str, str]:
    """The text of every source by its name."""
    folder = importlib.resources.files("fusedres.cuda")
    found = sorted(
        (item for item in folder.iterdir() if item.name.endswith((".cu", ".cuh"))), key=lambda item: item.name
    )
    return {item.name: item.read_text(encoding="utf-8") for item in found}


def _bindings() -> Any:
    """``cuda.bindings`` with NVRTC and the driver, imported when they are first needed."""
    return importlib.import_module("cuda.bindings.driver"), importlib.import_module("cuda.bindings.nvrtc")


def _checked(result: tuple[Any, ...]) -> Any:
    """What a function of the bindings returns behind its error. Raises BackendError for one."""
    error, *values = result
    if int(error) != 0:
        raise BackendError(f"fusedres: CUDA says {error.name}")
    return values[0] if len(values) == 1 else tuple(values)


@functools.cache
def missing() -> str | None:
    """What is not installed here that the kernels are compiled and launched by, and how to get it; None where all is there."""
    try:
        _, nvrtc = _bindings()
        _checked(nvrtc.nvrtcVersion())
    except Exception as error:  # no module is an ImportError; the bindings have exceptions of their own for no library
        return (
            "its kernels are compiled by NVRTC through cuda.bindings (pip install cuda-bindings nvidia-cuda-nvrtc), which "
            f"cannot be used here: {type(error).__name__}: {error}"
        )
    return None


def _version() -> tuple[int, int]:
    return _checked(_bindings()[1].nvrtcVersion())


def compile_program(program: Program, capability: tuple[int, int]) -> bytes:
    """The cubin of ``program`` for a compute capability. Needs no GPU. Raises BackendError with the compiler's words."""
    nvrtc = _bindings()[1]
    text = sources()
    headers = [name for name in text if name != _MAIN]
    handle = _checked(
        nvrtc.nvrtcCreateProgram(
            text[_MAIN].encode(), _MAIN.encode(), len(headers), [text[name].encode() for name in headers],
            [name.encode() for name in headers],
        )
    )  # fmt: skip
    try:
        options = [option.encode() for option in _options(program, capability)]
        (error,) = nvrtc.nvrtcCompileProgram(handle, len(options), options)
        if int(error) != 0:
            log = b" " * _checked(nvrtc.nvrtcGetProgramLogSize(handle))
            nvrtc.nvrtcGetProgramLog(handle, log)
            said = log.decode(errors="replace").strip("\0 \n")
            raise BackendError(f"fusedres: NVRTC cannot compile for sm_{capability[0]}{capability[1]}: {said}")
        cubin = b" " * _checked(nvrtc.nvrtcGetCUBINSize(handle))
        nvrtc.nvrtcGetCUBIN(handle, cubin)
        return cubin
    finally:
        nvrtc.nvrtcDestroyProgram(handle)


def _options(program: Program, capability: tuple[int, int]) -> list[str]:
    return [
        f"--gpu-architecture=sm_{capability[0]}{capability[1]}",
        "--std=c++17",
        *(f"--define-macro={macro}" for macro in program.macros),
    ]


def cached_file(program: Program, capability: tuple[int, int]) -> Path:
    """Where the compiled program is kept."""
    key = hashlib.sha256()
    for part in (
        *_options(program, capability),
        *map(str, _version()),
        *(p for item in sources().items() for p in item),
    ):
        key.update(part.encode() + b"\0")
    dtype = str(program.dtype).removeprefix("torch.")
    return (
        cache_folder()
        / "cuda"
        / f"{program.kind}-{dtype}-sm{capability[0]}{capability[1]}-{key.hexdigest()[:24]}.cubin"
    )


def cubin_of(program: Program, capability: tuple[int, int], *, anew: bool = False) -> bytes:
    """The compiled program, from the cache where it is there and not asked for ``anew``. A folder that cannot be written costs a
    compilation in every process, and nothing else."""
    path = cached_file(program, capability)
    if not anew:
        with contextlib.suppress(OSError):
            return path.read_bytes()
    cubin = compile_program(program, capability)
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".tmp", delete=False) as file:
            file.write(cubin)
        os.replace(file.name, path)  # nobody sees half of it
    return cubin


class Nvrtc:
    """NVIDIA's GPUs."""

    def __init__(self) -> None:
        self._loaded: dict[tuple[Program, int], Functions] = {}
        self._lock = threading.Lock()
        self._started = threading.local()

    @property
    def launcher(self) -> int:
        """See :class:`Runtime`."""
        return requests.driver_launch()

    def why_not(self, device: torch.device) -> str | None:
        """See :class:`Runtime`."""
        if device.type != "cuda":
            return f"its kernels run on GPUs, not on {device.type}"
        if torch.version.hip is not None:
            return "its kernels are compiled by NVRTC, for NVIDIA's GPUs"
        reason = missing()
        if reason is not None:
            return reason
        if not self.launcher:
            return "the driver's library, which launches its kernels, cannot be loaded"
        supported = _checked(_bindings()[1].nvrtcGetSupportedArchs())
        major, minor = torch.cuda.get_device_capability(device)
        if 10 * major + minor not in supported:
            return f"NVRTC {'.'.join(map(str, _version()))} does not compile for compute capability {major}.{minor}"
        return None

    def load(self, program: Program, device: torch.device) -> Functions:
        """See :class:`Runtime`. The first call for a device compiles, or reads the cache; RuntimeError while a graph is captured, in which
        nothing can be loaded."""
        index = torch.cuda.current_device() if device.index is None else device.index
        found = self._loaded.get((program, index))
        if found is None:
            if torch.cuda.is_current_stream_capturing():
                raise RuntimeError(
                    "fusedres: a CUDA graph is being captured, and the kernels of backend 'cuda' are not compiled yet; run the "
                    "model once on such an input before the capture"
                )
            with self._lock:
                found = self._loaded.get((program, index))
                if found is None:
                    found = self._loaded[program, index] = self._load(program, index)
        return found

    def _load(self, program: Program, index: int) -> Functions:
        driver = _bindings()[0]
        capability = torch.cuda.get_device_capability(index)
        with self.on(torch.device("cuda", index)):
            self._make_current()
            error, module = driver.cuModuleLoadData(cubin_of(program, capability))
            if int(error) != 0:  # a file that is damaged, or another driver's
                module = _checked(driver.cuModuleLoadData(cubin_of(program, capability, anew=True)))
            handles = {
                name: int(_checked(driver.cuModuleGetFunction(module, name.encode()))) for name in KERNELS[program.kind]
            }
        return Functions(handles, module)

    def on(self, device: torch.device) -> contextlib.AbstractContextManager[Any]:
        """See :class:`Runtime`."""
        if device.index is None or device.index == torch.cuda.current_device():
            return contextlib.nullcontext()
        return torch.cuda.device(device)

    def stream(self, device: torch.device) -> int:
        """See :class:`Runtime`; the device is the current one."""
        self._make_current()
        return torch.cuda.current_stream(device).cuda_stream

    def stream_to_play_on(self, device: torch.device) -> int | None:
        """See :class:`Runtime`."""
        current = torch.cuda.current_device()
        if device.index not in (None, current) or current not in self._devices():
            return None
        return torch.cuda.current_stream(device).cuda_stream

    def _devices(self) -> set[int]:
        """On which devices this thread has launched."""
        found = getattr(self._started, "devices", None)
        if found is None:
            found = self._started.devices = set()
        return found

    def _make_current(self) -> None:
        """A context for the current device in this thread, once: torch makes none in a thread that only launches."""
        device = torch.cuda.current_device()
        if device in self._devices():
            return
        driver = _bindings()[0]
        if int(_checked(driver.cuCtxGetCurrent())) == 0:
            _checked(driver.cuCtxSetCurrent(_checked(driver.cuDevicePrimaryCtxRetain(driver.CUdevice(device)))))
        self._devices().add(device)
