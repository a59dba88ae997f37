"""Launching a kernel, or recording what would be launched: the one place through which every kernel goes.

What a launch needs follows, but for the addresses of its tensors, from their forms. Launchers derive it once per form (:func:`prepare`),
as a :class:`Prepared` launch, which Triton compiles and specialises when it is first called; later calls hand Triton's compiled kernel
the addresses, and nothing is derived, bound or looked up by Triton again.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import os
import struct
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, ParamSpec, TypeVar

import torch
import triton
from torch import Tensor
from triton.runtime import build, driver
from triton.tools.tensor_descriptor import TensorDescriptor

from . import requests
from .layout import Form
from .requests import Request, driver_launch
from .tiles import DEFAULT_ARCH, Arch, arch_of_gpu, is_since_hopper

if TYPE_CHECKING:
    from triton.compiler import CompiledKernel
    from triton.runtime.interpreter import InterpretedFunction

P = ParamSpec("P")
T = TypeVar("T")

# Arguments that change with the batch or the resolution, and by whose divisibility no access gets wider (channels are what
# is contiguous): one compilation serves all of them.
SIZES = ("N", "H", "W", "HO", "WO", "rows", "chunk", "tiles", "tile_rows")

#: whether kernels run in Triton's interpreter, on CPU tensors: TRITON_INTERPRET=1 when this was imported
INTERPRETED: bool = triton.knobs.runtime.interpret

#: the versions of Triton whose compiled kernels are launched as :meth:`Prepared.__call__` does; another's go through its public call
DIRECT_VERSIONS = ("3.6", "3.7", "3.8")

#: whether kernels that Triton has compiled are launched without its public call
direct: bool = (
    not INTERPRETED
    and ".".join(triton.__version__.split(".")[:2]) in DIRECT_VERSIONS
    # there a compilation also depends on how much memory is behind a tensor
    and torch.version.hip is None
)

#: whether launches are dependent where a GPU has that (programmatic dependent launch): scheduled while the kernel before them still runs
dependent: bool = os.environ.get("FUSEDRES_DEPENDENT_LAUNCHES") == "1"

# those of nobody: another object in their place, or calls in one of them, is a profiler's
_ENTER, _EXIT = triton.knobs.runtime.launch_enter_hook, triton.knobs.runtime.launch_exit_hook

#: prepared launches that are kept for each launcher
KEPT = 4096


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


def is_recording() -> bool:
    """Whether this thread's launches are collected (:func:`record`) or told to an observer (:mod:`.requests`)."""
    return _state.recording is not None or requests.observer() is not None


def target_device(device: torch.device) -> torch.device:
    """``device``, or for the meta device the one that :func:`record` was told."""
    recording = _state.recording
    if device.type == "meta" and recording is not None and recording.device is not None:
        return recording.device
    return device


def arch_of(device: torch.device) -> Arch:
    """The architecture of ``device``; where that is no GPU, the one that :func:`record` was told."""
    recording = _state.recording
    found = arch_of_gpu(device) if recording is None or device.type == "cuda" else recording.arch
    return _with_dependence(found) if dependent else found


@functools.cache
def _with_dependence(arch: Arch) -> Arch:
    """Of ``arch``, whose launches are to be dependent: so they are from compute capability 9.0 on. Part of the architecture, it is part of
    what every launch is prepared for, so that neither kind takes the other's place."""
    return arch._replace(dependent=is_since_hopper(arch))


@contextlib.contextmanager
def dependent_launches(on: bool) -> Iterator[None]:
    """Inside, launches are dependent, or not, in all threads."""
    global dependent
    previous, dependent = dependent, on
    try:
        yield
    finally:
        dependent = previous


def product_precision(dtype: torch.dtype) -> str:
    """The ``input_precision`` of ``tl.dot`` for a convolution's operands: TF32 where torch's convolutions of float32 may use it
    (``torch.backends.cudnn.conv.fp32_precision``, or ``allow_tf32``), on NVIDIA."""
    allowed = (
        dtype == torch.float32 and torch.version.hip is None and torch.backends.cudnn.conv.fp32_precision == "tf32"
    )
    return "tf32" if allowed else "ieee"


# ---- what a machine lacks --------------------------------------------------------------------------------------------

_PROBE = """
#include <Python.h>
static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "launcherprobe", NULL, -1, NULL};
PyMODINIT_FUNC PyInit_launcherprobe(void) { return PyModule_Create(&module); }
"""


@functools.cache
def build_fault() -> str | None:
    """Why Triton cannot build on this machine the C module through which it launches kernels, None where it can.

    Tried once in a process, as Triton does it, so that its first kernel does not fail inside a user's forward. Needs no GPU; Triton keeps
    the result in its cache.
    """
    try:
        build.compile_module_from_src(_PROBE, "launcherprobe")
    # no compiler is a RuntimeError, no Python.h the compiler's CalledProcessError, an unwritable cache an OSError
    except Exception as error:
        return f"Triton cannot build its launcher here (it needs a C compiler and Python's headers): {error}"
    return None


# ---- prepared launches -----------------------------------------------------------------------------------------------

_caches: list[Callable[[], None]] = []


def prepare(function: Callable[P, T]) -> Callable[P, T]:
    """A function of forms and other hashable arguments, which is called once for those that it has seen: a launcher's preparation."""
    cached = functools.lru_cache(KEPT)(function)
    _caches.append(cached.cache_clear)
    return cached  # type: ignore[return-value]  # lru_cache's type forgets the parameters


#: how often launches have been forgotten
edition = 0


def forget() -> None:
    """Prepare every launch anew: after a change of what preparations read besides their arguments, such as tiles."""
    global edition
    edition += 1
    for clear in _caches:
        clear()


class Prepared:
    """A launch of ``kernel`` over ``grid`` of which only the tensors, and numbers named ``late``, are open.

    ``operands``: the forms of the tensors (None: absent), by the names of the kernel's parameters, in the order of its signature, where
    they come first. Several names are the rows of one tensor. Behind them come the ``late`` numbers, then ``numbers``. ``num_warps``
    counts warps of 32 threads, so that a configuration means the same number of threads everywhere; ``num_stages`` is Triton's; of
    ``registers`` a thread has so many at most on NVIDIA's GPUs, 0: no bound.
    ``boxes``: of which operands, maps or a 1x1's weight, the kernel takes a tensor descriptor, and the rows and channels that it moves at
    once; their addresses are multiples of 16. A kernel's last parameter is DEPENDENT, which ``arch`` says.

    Raises ValueError for tensors on several devices, and for another order than the signature's.
    """

    def __init__(
        self,
        kernel: triton.JITFunction | InterpretedFunction,
        grid: tuple[int, ...],
        arch: Arch,
        operands: Mapping[str, Form | None],
        boxes: Mapping[str, tuple[int, int]] | None = None,
        *,
        num_warps: int,
        num_stages: int | None = None,
        registers: int = 0,
        late: tuple[str, ...] = (),
        **numbers: object,
    ) -> None:
        numbers["DEPENDENT"] = arch.dependent
        self.kernel, self.grid, self._numbers, self._late = kernel, grid, numbers, late
        x, y, z = (*grid, 1, 1)[:3]
        self._grid = x, y, z
        self._options: dict[str, object] = {"num_warps": max(1, num_warps * 32 // arch.warp)}
        if num_stages is not None:
            self._options["num_stages"] = num_stages
        if registers and arch.family.startswith("sm_"):
            self._options["maxnreg"] = registers
        if arch.dependent:
            self._options["launch_pdl"] = True
        self._names = [names.split() for names in operands]
        order = [*(name for names in self._names for name in names), *late, *numbers]
        if order != list(kernel.arg_names):
            raise ValueError(f"the arguments of {kernel.__name__} are {list(kernel.arg_names)}, found {order}")
        devices = {form.device for form in operands.values() if form is not None}
        if len(devices) != 1:
            raise ValueError(f"the tensors of a launch are on one device, found {', '.join(sorted(map(str, devices)))}")
        self._device = devices.pop()
        # where the rows of each operand begin, in bytes behind its address; what is passed in the place of an absent one
        self._rows: list[tuple[int, ...] | None] = [
            None
            if form is None
            else tuple(i * form.stride[0] * form.dtype.itemsize if i else 0 for i in range(len(names)))
            for names, form in zip(self._names, operands.values(), strict=True)
        ]
        self._absent = [(None,) * len(names) for names in self._names]
        self._rest = tuple(numbers.values())
        self._boxes = boxes or {}
        self._described = [
            _descriptor(form, self._boxes[names]) if form is not None and names in self._boxes else None
            for names, form in operands.items()
        ]
        # what Triton has compiled, by the current device and by which addresses 16 does not divide: that is in its specialisation
        self._compiled: dict[tuple[int, tuple[bool, ...]], tuple[Callable[..., None], CompiledKernel]] = {}

    def __call__(self, *tensors: Tensor | None, late: tuple[float, ...] = ()) -> None:
        """Launch on the device of the tensors, which need not be the current one."""
        if _state.recording is not None:
            _state.recording.launches.append(Launch(self.kernel, self.grid, self._named(tensors, late)))
        else:
            kernel = self._run_anywhere(tensors, late)
            observer = requests.observer()
            if observer is not None:
                observer(None if kernel is None else self._request(kernel, late), tensors)

    def _run_anywhere(self, tensors: tuple[Tensor | None, ...], late: tuple[float, ...]) -> CompiledKernel | None:
        """As :meth:`_run`, where the tensors are."""
        if INTERPRETED:
            self._run_public(tensors, late)
            return None
        current, own = driver.active.get_current_device(), self._device.index
        if own is None or own == current:
            return self._run(current, tensors, late)
        with torch.cuda.device(self._device):
            return self._run(own, tensors, late)

    def _run_public(self, tensors: tuple[Tensor | None, ...], late: tuple[float, ...]) -> Any:
        """Triton's own call, which gives what it has compiled; None where a hook of its compilation says so."""
        return self.kernel[self.grid](**self._named(tensors, late))

    def _run(self, device: int, tensors: tuple[Tensor | None, ...], late: tuple[float, ...]) -> CompiledKernel | None:
        """Launch on the current ``device``: what has been launched, None by Triton's own call where it is to be that at every time."""
        if not is_direct():
            self._run_public(tensors, late)
            return None
        together, addresses = 0, []
        for tensor, rows, absent, box in zip(tensors, self._rows, self._absent, self._described, strict=True):
            if tensor is None or rows is None:
                addresses += absent
            elif box is not None:
                addresses.append(_over(tensor, box))
            else:
                at = tensor.data_ptr()
                for row in rows:
                    addresses.append(at + row)
                together |= at
        odd = tuple([type(at) is int and at & 15 > 0 for at in addresses]) if together & 15 else ()
        ready = self._compiled.get((device, odd))
        if ready is None:
            found = self._run_public(tensors, late)
            if found is not None:
                self._compiled[device, odd] = found.run, found
            return found
        run, kernel = ready
        stream = driver.active.get_current_stream(device)
        run(
            *self._grid, stream, kernel.function, kernel.packed_metadata, None, None, None, *addresses, *late, *self._rest
        )  # fmt: skip
        return kernel

    def _request(self, kernel: CompiledKernel, late: tuple[float, ...]) -> Request | None:
        """What ``kernel`` is launched by; None where it wants more than a grid, shared memory and parameters."""
        about = kernel.metadata
        num_warps, num_ctas, shared = kernel.packed_metadata
        if (
            num_ctas != 1
            or shared > _MOST_SHARED
            or any(getattr(about, name, None) for name in _EXTRAS)
            or "gsan" in (getattr(about, "instrumentation_mode", None) or "")
        ):
            return None
        pointers = [
            (i, row)
            for i, (names, rows) in enumerate(zip(self._names, self._rows, strict=True))
            for row in (rows or (0,) * len(names))
        ]
        found = []
        for kind, given in zip(kernel.src.signature.values(), [*pointers, *late, *self._rest], strict=True):
            if isinstance(given, tuple):
                parameter = given if kind.startswith("*") else None
            else:
                parameter = _bits(kind, given)
            if kind != "constexpr":
                if parameter is None:
                    return None
                found.append(parameter)
        # global and profile scratch memory, of which there is none
        found += [(-1, 0)] * 2
        return Request(
            kernel, kernel.function, self._grid, 32 * num_warps, shared, tuple(found), bool(about.launch_pdl)
        )

    def _named(self, tensors: tuple[Tensor | None, ...], late: tuple[float, ...]) -> dict[str, Any]:
        """Every argument and option by name."""
        arguments: dict[str, Any] = {}
        for names, tensor, box in zip(self._names, tensors, self._described, strict=True):
            if tensor is None or len(names) == 1:
                arguments |= dict.fromkeys(names, tensor if tensor is None or box is None else _over(tensor, box))
            else:
                arguments |= zip(names, tensor.unbind(0), strict=True)
        return arguments | dict(zip(self._late, late, strict=True)) | self._numbers | self._options


def _descriptor(form: Form, box: tuple[int, int]) -> TensorDescriptor:
    """Of a map as a matrix of pixels by channels, in boxes of so many; over nothing yet."""
    shape, strides = [form.rows, form.shape[1]], [form.pitch, 1]
    return TensorDescriptor(torch.empty(0, dtype=form.dtype, device="meta"), shape, strides, list(box))


def _over(tensor: Tensor, described: TensorDescriptor) -> TensorDescriptor:
    """The same descriptor over a ``tensor``, without the checks of what is known of its form."""
    found = copy.copy(described)
    found.base = tensor
    return found


#: of what Triton knows about a kernel: where one is true or not zero, its launch asks the driver for more
_EXTRAS = ("global_scratch_size", "profile_scratch_size", "launch_cooperative_grid", "tensordesc_meta")
#: bytes beyond which Triton's launcher asks for another mode of shared memory
_MOST_SHARED = 228 * 1024


def _bits(kind: str, number: Any) -> tuple[int, int] | None:
    """A number as a parameter of that type, None for a type that no kernel here has."""
    if kind in ("i32", "i64"):
        return -1, int(number)
    return (-1, int.from_bytes(struct.pack("<f", number), "little")) if kind == "fp32" else None


def is_direct() -> bool:
    """Whether launches go without Triton's public call now."""
    return direct and not _is_watched()


class _Started(threading.local):
    devices: frozenset[int] = frozenset()


_started = _Started()


def stream_to_play_on(device: torch.device) -> int | None:
    """The current stream of ``device`` where recorded launches may go to it: it is the current device, nobody looks on, and this thread
    has launched there before by Triton's launcher, which makes a context current. Else None."""
    if _state.recording is not None or not is_direct() or not driver_launch():
        return None
    current = driver.active.get_current_device()
    if device.index is not None and device.index != current:
        return None
    if current not in _started.devices:
        _started.devices |= {current}
        return None
    return driver.active.get_current_stream(current)


def _is_watched() -> bool:
    """Whether a profiler or a debugger wants to see launches as Triton makes them."""
    runtime = triton.knobs.runtime
    return bool(
        runtime.launch_enter_hook is not _ENTER
        or runtime.launch_exit_hook is not _EXIT
        or _ENTER.calls
        or _EXIT.calls
        or runtime.debug
    )
