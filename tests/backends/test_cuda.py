"""The CUDA C++ backend beyond the contract, which the same templates keep on the host (``cuda_host`` in :mod:`test_contract`): how they
compile for GPUs that are not here, the cache, loading and launching over a stand-in for the driver, tapes, and rows beyond 2^31."""

from __future__ import annotations

import copy
import ctypes
import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import host_kernels
import pytest
import torch
from support import ran
from taped import assert_same, drawn, in_python, row, steps
from torch import Tensor

import fusedres
from fusedres.backends import cuda_launch, nvrtc, select, tape
from fusedres.backends.cuda import BACKEND, CudaBackend
from fusedres.backends.cuda_launch import cut
from fusedres.backends.nvrtc import CHANNELS, KERNELS, MAPS, Functions, Nvrtc, Program
from fusedres.errors import BackendError
from fusedres.kernels import requests
from fusedres.nn import BasicBlock, DenseBlock
from fusedres.operands import LazyMap

needs_nvrtc = pytest.mark.skipif(nvrtc.missing() is not None, reason=str(nvrtc.missing()))
needs_host = pytest.mark.skipif(
    select.why_not(host_kernels.NAME, torch.device("cpu"), torch.float32) is not None, reason="no compiler for the host"
)
_spec = importlib.util.spec_from_file_location("loading", Path(__file__).parent / "loading.py")
loading = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(loading)
ARCHITECTURES = ((7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0))
HALF = Program(MAPS, torch.float16)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A cache folder of the test's own, with a name that is not ASCII."""
    folder = tmp_path / "Zwischenablage für Ünïcode"
    monkeypatch.setenv("FUSEDRES_CACHE_DIR", str(folder))
    return folder


# ---- compilation -----------------------------------------------------------------------------------------------------


@needs_nvrtc
@pytest.mark.parametrize("capability", ARCHITECTURES, ids=lambda c: f"sm_{c[0]}{c[1]}")
def test_numbers_per_channel_compile_for_every_architecture(capability):
    cubin = nvrtc.compile_program(Program(CHANNELS, torch.float32), capability)
    assert cubin[:4] == b"\x7fELF" and all(name.encode() in cubin for name in KERNELS[CHANNELS])


@needs_nvrtc
@pytest.mark.parametrize(
    ("dtype", "capability"),
    [
        pytest.param(dtype, capability, marks=[pytest.mark.slow] * ((dtype, capability) != (torch.bfloat16, (7, 5))))
        for dtype in nvrtc.DTYPES
        for capability in ARCHITECTURES
    ],
    ids=str,
)
def test_the_passes_compile_without_spills_and_access_16_bytes(dtype, capability):
    """In 16 bits on the oldest architecture by default: what it has the fewest instructions for."""
    pytest.importorskip("triton")  # whose tools read them
    from bench.cuda_kernels import figures

    found = figures(Program(MAPS, dtype), capability)
    assert {f.kernel for f in found} == set(KERNELS[MAPS])
    for f in found:
        assert f.spills == 0 and f.registers <= 128, f
        assert not f.kernel.endswith("wide") or (f.wide_loads > 0 and f.wide_stores > 0), f


@needs_nvrtc
def test_a_fault_of_the_compiler_is_said_in_its_words(monkeypatch):
    monkeypatch.setattr(nvrtc, "sources", lambda: {"kernels.cu": "int nothing(;"})
    with pytest.raises(BackendError, match="sm_80: kernels.cu"):
        nvrtc.compile_program(HALF, (8, 0))


@pytest.mark.skipif(shutil.which("hipcc") is None, reason="no hipcc")
@pytest.mark.parametrize("dtype", nvrtc.DTYPES, ids=str)
def test_the_same_sources_compile_by_hip(dtype, tmp_path):
    for kind in KERNELS:
        macros = [f"-D{macro}" for macro in Program(kind, dtype).macros]
        source = host_kernels.SOURCES / "kernels.cu"
        command = ["hipcc", "-x", "hip", "-std=c++17", "--offload-arch=gfx942", "-c", *macros, str(source)]
        subprocess.run([*command, "-o", str(tmp_path / "kernels.o")], check=True)


# ---- the cache -------------------------------------------------------------------------------------------------------


@pytest.fixture
def compilations(monkeypatch) -> list[tuple[Program, tuple[int, int]]]:
    """What is compiled meanwhile, which takes no time and gives its own name."""
    found: list[tuple[Program, tuple[int, int]]] = []

    def compiled(program: Program, capability: tuple[int, int]) -> bytes:
        found.append((program, capability))
        return repr((program, capability)).encode()

    monkeypatch.setattr(nvrtc, "compile_program", compiled)
    monkeypatch.setattr(nvrtc, "_version", lambda: (13, 0))
    return found


def test_what_is_compiled_once_is_read_again(cache, compilations):
    first, second = (nvrtc.cubin_of(HALF, (9, 0)) for _ in range(2))
    assert first == second and len(compilations) == 1
    assert [file.suffix for file in (cache / "cuda").iterdir()] == [".cubin"], "something else is left there"


def test_another_program_architecture_version_or_source_is_another_file(cache, compilations, monkeypatch):
    files = [
        nvrtc.cached_file(HALF, (9, 0)),
        nvrtc.cached_file(HALF, (7, 5)),
        nvrtc.cached_file(Program(MAPS, torch.float32), (9, 0)),
        nvrtc.cached_file(Program(CHANNELS, torch.float16), (9, 0)),
    ]
    monkeypatch.setattr(nvrtc, "_version", lambda: (13, 1))
    files.append(nvrtc.cached_file(HALF, (9, 0)))
    monkeypatch.setattr(nvrtc, "sources", lambda: {"kernels.cu": "// another"})
    files.append(nvrtc.cached_file(HALF, (9, 0)))
    assert len(set(files)) == len(files)


def test_a_folder_that_cannot_be_written_costs_a_compilation_each_time(tmp_path, compilations, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("FUSEDRES_CACHE_DIR", str(tmp_path / "file"))
    assert nvrtc.cubin_of(HALF, (9, 0)) == nvrtc.cubin_of(HALF, (9, 0)) and len(compilations) == 2


def test_the_sources_come_with_the_package():
    found = nvrtc.sources()
    assert "kernels.cu" in found and set(found) == {p.name for p in host_kernels.SOURCES.iterdir() if ".cu" in p.suffix}


# ---- loading and launching, over a stand-in for the driver -----------------------------------------------------------


class Driver:
    """What :class:`Nvrtc` asks of ``cuda.bindings.driver``, and of torch's devices: two GPUs of two architectures."""

    def __init__(self) -> None:
        self.current, self.capturing, self.context = 0, False, 0
        self.modules: list[bytes] = []
        self.damaged: set[bytes] = set()

    def cuModuleLoadData(self, cubin: bytes):  # noqa: N802  # the driver's name
        fault = cubin in self.damaged
        if not fault:
            self.modules.append(cubin)
        return _Error(int(fault)), len(self.modules)

    def cuModuleGetFunction(self, module: int, name: bytes):  # noqa: N802
        return _Error(0), 1000 * module + len(name)

    def cuCtxGetCurrent(self):  # noqa: N802
        return _Error(0), self.context

    def cuDevicePrimaryCtxRetain(self, device: int):  # noqa: N802
        return _Error(0), 70 + device

    def cuCtxSetCurrent(self, context: int):  # noqa: N802
        self.context = context
        return (_Error(0),)

    CUdevice = staticmethod(int)


class _Error(int):
    name = "CUDA_ERROR_INVALID_IMAGE"


class _On:
    """``torch.cuda.device``."""

    def __init__(self, driver: Driver, device: torch.device) -> None:
        self.driver, self.device = driver, device

    def __enter__(self) -> None:
        self.before, self.driver.current = self.driver.current, self.device.index

    def __exit__(self, *exc: object) -> None:
        self.driver.current = self.before


@pytest.fixture
def driver(monkeypatch, cache, compilations) -> Driver:
    """It, in the place of what is here."""
    found = Driver()
    monkeypatch.setattr(nvrtc, "_bindings", lambda: (found, None))
    for name, value in (
        ("current_device", lambda: found.current),
        ("is_current_stream_capturing", lambda: found.capturing),
        ("get_device_capability", lambda device: ((8, 6), (9, 0))[device if isinstance(device, int) else device.index]),
        ("device", lambda device: _On(found, device)),
        ("current_stream", lambda device: SimpleNamespace(cuda_stream=11 + found.current)),
    ):
        monkeypatch.setattr(torch.cuda, name, value)
    return found


GPUS = [torch.device("cuda", i) for i in range(2)]


def test_a_program_is_loaded_once_for_each_gpu_as_compiled_for_it(driver, compilations):
    runtime = Nvrtc()
    first, again, other = (runtime.load(HALF, GPUS[i]) for i in (0, 0, 1))
    assert first is again and first.handles != other.handles and set(first.handles) == set(KERNELS[MAPS])
    assert [capability for _, capability in compilations] == [(8, 6), (9, 0)] and driver.current == 0


def test_a_capture_wants_what_is_loaded(driver):
    """Nothing can be compiled or loaded within, and the message says what to do."""
    runtime = Nvrtc()
    driver.capturing = True
    with pytest.raises(RuntimeError, match="run the model once"):
        runtime.load(HALF, GPUS[0])
    driver.capturing = False
    loaded = runtime.load(HALF, GPUS[0])
    driver.capturing = True
    assert runtime.load(HALF, GPUS[0]) is loaded


def test_a_damaged_file_is_compiled_anew(driver, compilations):
    path = nvrtc.cached_file(HALF, (8, 6))
    path.parent.mkdir(parents=True)
    path.write_bytes(b"damaged")
    driver.damaged.add(b"damaged")
    Nvrtc().load(HALF, GPUS[0])
    assert len(compilations) == 1 and path.read_bytes() == driver.modules[0]


def test_a_module_that_the_driver_refuses_is_an_error(driver):
    driver.damaged.add(repr((HALF, (8, 6))).encode())
    with pytest.raises(BackendError, match="CUDA_ERROR_INVALID_IMAGE"):
        Nvrtc().load(HALF, GPUS[0])


def test_a_thread_without_a_context_gets_the_devices_own(driver):
    runtime = Nvrtc()
    assert runtime.stream_to_play_on(GPUS[0]) is None, "this thread has launched nothing yet"
    assert runtime.stream(GPUS[0]) == 11 and driver.context == 70
    assert runtime.stream_to_play_on(GPUS[0]) == 11
    with runtime.on(GPUS[1]):
        assert runtime.stream_to_play_on(GPUS[1]) is None and runtime.stream_to_play_on(GPUS[0]) is None
    assert driver.current == 0


@needs_nvrtc
@needs_host
def test_nvidias_own_bindings_are_called_as_they_want_to_be(cache, tmp_path):
    """Over a stub of the driver, in a process of its own (loading.py)."""
    pytest.importorskip("cuda.bindings.driver")
    nvrtc.cubin_of(Program(CHANNELS, torch.float32), (8, 6))
    source, library = tmp_path / "driver.c", tmp_path / "libcuda.so.1"
    source.write_text(loading.SOURCE)
    flags = ["-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-x", "c"]
    subprocess.run([host_kernels.COMPILER, *flags, str(source), "-o", str(library), "-ldl"], check=True)
    done = subprocess.run(
        [sys.executable, loading.__file__, str(library)],
        env=os.environ | {"LD_LIBRARY_PATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    handles = [0x1000 + len(name) for name in KERNELS[CHANNELS]]
    assert done.stdout.split() == [*map(str, handles), "5", "70"], done.stderr


class Noted(host_kernels.Host):
    """Launches that are noted and go nowhere; ``error`` is what they return."""

    def __init__(self, error: int = 0) -> None:
        self.asked: list[tuple] = []

        def launch(function, *rest) -> int:
            self.asked.append((function, *rest[:7], rest[7]))
            return error

        kind = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, *[ctypes.c_uint] * 7, *[ctypes.c_void_p] * 3)
        self._callback = kind(launch)

    @property
    def launcher(self) -> int:
        return ctypes.cast(self._callback, ctypes.c_void_p).value or 0

    def load(self, program: Program, device: torch.device) -> Functions:
        return Functions({name: 100 + i for i, name in enumerate(KERNELS[program.kind])}, None)

    def stream(self, device: torch.device) -> int:
        return 7


def a_map(channels: int = 16, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(2, channels, 5, 7).to(dtype).to(memory_format=torch.channels_last)


def test_the_driver_is_asked_on_the_current_stream_for_the_blocks_of_a_pass():
    runtime = Noted()
    CudaBackend(runtime).add_act_forward(LazyMap(a_map()), None, "relu")
    (asked,) = runtime.asked
    blocks = cut(70, 16, 4, False).grid
    assert asked == (100 + KERNELS[MAPS].index("add_act_forward_wide"), *blocks, 1, 256, 1, 1, 0, 7)


@pytest.mark.parametrize(("channels", "offset", "width"), [(16, 0, "wide"), (6, 0, "narrow"), (16, 1, "narrow")])
def test_accesses_are_as_wide_as_channels_and_addresses_allow(channels, offset, width):
    runtime = Noted()
    x = a_map(channels)
    odd = torch.empty(x.numel() + 4)[offset : offset + x.numel()].view(2, 5, 7, channels).permute(0, 3, 1, 2)
    CudaBackend(runtime).add_act_forward(LazyMap(odd.copy_(x)))
    assert runtime.asked[0][0] == 100 + KERNELS[MAPS].index(f"add_act_forward_{width}")


def test_a_refused_launch_raises():
    with pytest.raises(RuntimeError, match="refused to launch add_act_forward_wide: error 719"):
        CudaBackend(Noted(719)).add_act_forward(LazyMap(a_map()))


def test_an_activation_without_a_kernel_raises(monkeypatch):
    monkeypatch.setattr(cuda_launch, "_KINDS", ("none",))
    with pytest.raises(ValueError, match="no activation 'relu'"):
        CudaBackend(Noted()).add_act_forward(LazyMap(a_map()), None, "relu")


# ---- the choice ------------------------------------------------------------------------------------------------------


def test_triton_comes_first_and_then_this_backend():
    assert select.names().index("triton") < select.names().index("cuda") < select.names().index("eager")


def test_where_triton_does_not_serve_a_gpu_this_backend_does(monkeypatch):
    gpu = torch.device("cuda", 0)
    monkeypatch.setitem(select._loaded, "triton", "cannot be imported: No module named 'triton'")
    monkeypatch.setattr(BACKEND._runtime, "why_not", lambda device: None if device.type == "cuda" else "no GPU")
    monkeypatch.setenv("FUSEDRES_SELF_CHECK", "0")  # which would launch
    select._automatic.cache_clear()
    try:
        assert select.resolve(gpu, torch.float16) is BACKEND
        assert fusedres.backends("cuda", torch.float64)["cuda"] == "available"
    finally:
        select._automatic.cache_clear()


def test_without_nvrtc_it_says_what_to_install(monkeypatch):
    def nothing() -> None:
        raise ImportError("No module named 'cuda'")

    monkeypatch.setattr(nvrtc, "_bindings", nothing)
    nvrtc.missing.cache_clear()
    try:
        assert "pip install cuda-bindings" in (BACKEND.supports(torch.device("cuda", 0), torch.float16) or "")
    finally:
        nvrtc.missing.cache_clear()


def test_asked_for_where_it_does_not_serve_it_is_an_error():
    with fusedres.use_backend("cuda"), pytest.raises(BackendError, match="its kernels run on GPUs, not on cpu"):
        select.resolve(torch.device("cpu"), torch.float32)


# ---- passes that the contract does not reach -------------------------------------------------------------------------


@needs_host
@pytest.mark.parametrize("channels", [8, 3])
def test_rows_beyond_2_31_values(channels):
    """Two rows so far apart that 32 bits do not count the values between: memory that nobody touches is not there."""
    pitch = 2**31 + 16
    memory = torch.empty(pitch + 32, dtype=torch.float16)
    x = memory.as_strided((2, channels, 1, 1), (pitch, 1, pitch, pitch))
    x.copy_(torch.randn(2, channels, 1, 1))
    with fusedres.use_backend(host_kernels.NAME):
        backend = select.get(host_kernels.NAME)
        stats = torch.empty(2, channels)
        y = backend.add_act_forward(LazyMap(x), None, "relu", stats=stats)
        backend.add_act_forward(LazyMap(x), None, "relu", out=x)
    assert torch.equal(y, x.clone()) and (y >= 0).all() and (y > 0).any()
    torch.testing.assert_close(stats[0], y.float().mean((0, 2, 3)))


@needs_host
def test_many_tiles_are_merged_in_two_levels(monkeypatch):
    """The same numbers, but for roundings, as in one level."""
    backend, x = select.get(host_kernels.NAME), a_map(8)
    found = []
    for limit in (1024, 2):
        monkeypatch.setattr(cuda_launch, "ONE_LEVEL", limit)
        monkeypatch.setattr(cuda_launch, "CHUNK", 2)
        monkeypatch.setattr(cuda_launch, "cut", lambda *_: cuda_launch.Cut((9, 1), 2, 8))
        stats, sums = torch.empty(2, 8), torch.empty(2, 8)
        backend.statistics(x, stats)
        lazy = LazyMap(x, None, "none", torch.rand(2, 8))
        torch.manual_seed(0)
        backend.add_act_backward(x, lazy._replace(mean_invstd=torch.rand(2, 8)), None, "relu", sums=sums)
        found.append((stats, sums))
    torch.testing.assert_close(found[0], found[1])
    assert not torch.equal(found[0][0], found[1][0]) or not torch.equal(found[0][1], found[1][1]), "one level twice"


# ---- tapes -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def launches(monkeypatch) -> Iterator[list[str]]:
    """The kernels that are launched from Python; a schedule is recorded at its first run."""
    pytest.importorskip("fusedres._C")
    found: list[str] = []
    original = cuda_launch.launch

    def launch(runtime, program, kernel, grid, arguments) -> None:
        found.append(kernel)
        original(runtime, program, kernel, grid, arguments)

    monkeypatch.setattr(cuda_launch, "launch", launch)
    monkeypatch.setattr(tape, "RUNS_BEFORE_RECORDING", 0)
    with fusedres.use_backend(host_kernels.NAME):
        yield found


@needs_host
@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
@pytest.mark.parametrize(
    "build", [row, lambda: BasicBlock(8, 8), lambda: DenseBlock(2, 8, 2, 4, 0.0)], ids=["row", "residual", "dense"]
)
def test_a_tape_gives_the_bits_of_its_schedule(build, training, launches):
    maps = [torch.randn(2, 8, 5, 7).to(memory_format=torch.channels_last) for _ in range(3)]
    block = drawn(build, training)
    twin = copy.deepcopy(block)
    first = steps(block, maps[:1], training)
    count = len(launches)
    ours = steps(block, maps[1:], training)
    assert ran(block).startswith(host_kernels.NAME) and count > 0
    assert len(launches) == count, f"in Python again: {launches[count:]}"
    assert_same(first + ours, in_python(host_kernels.HostBackend, lambda: steps(twin, maps, training)))


@needs_host
def test_observers_are_told_of_every_launch():
    told: list[requests.Request | None] = []
    backend = select.get(host_kernels.NAME)
    with requests.observed(lambda request, operands: told.append(request)):
        backend.statistics(a_map(), backend.new_reduction(16, a_map()))
    assert len(told) == 1 and told[0] is not None and told[0].threads == 256
