"""Run by test_launch.py in a process of its own, where kernels are not interpreted: launches over a stub of the CUDA driver, seen by what
stands in the launcher's place. Prints a JSON object of what each function of :data:`SCENES` returns."""

from __future__ import annotations

import ctypes
import json
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import torch
import triton

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "backends")]

from support import Draw  # noqa: E402
from test_interpreter import step  # noqa: E402
from torchvision.models.densenet import _DenseBlock  # noqa: E402
from torchvision.models.resnet import BasicBlock  # noqa: E402
from triton.runtime import driver  # noqa: E402

import fusedres  # noqa: E402
from bench import host  # noqa: E402
from bench.host import stubbed  # noqa: E402
from fusedres.backends import select  # noqa: E402
from fusedres.backends.triton import BACKEND, use_plan  # noqa: E402
from fusedres.kernels import elementwise, launch, requests  # noqa: E402
from fusedres.kernels.launch import Prepared, forget  # noqa: E402
from fusedres.kernels.layout import form_of  # noqa: E402
from fusedres.kernels.tiles import ConvConfig  # noqa: E402
from fusedres.operands import Epilogue, GradTarget, LazyMap  # noqa: E402
from fusedres.specs import Geometry, Norm  # noqa: E402
from fusedres.tuning.plans import Plan  # noqa: E402

seen: list[tuple] = []


class Launcher:
    """Notes each launch, tensors by their addresses."""

    def __init__(self, source, metadata) -> None:
        self.name = source.fn.__name__

    def __call__(self, x, y, z, stream, function, metadata, launch_metadata, enter, leave, *arguments) -> None:
        shown = [a.data_ptr() if isinstance(a, torch.Tensor) else a for a in arguments]
        seen.append((self.name, (x, y, z), stream, function, metadata, shown))


def functions() -> list[triton.JITFunction]:
    """Every kernel's function."""
    modules = [module for name, module in sys.modules.items() if name.startswith("fusedres.kernels.")]
    return [value for module in modules for value in vars(module).values() if isinstance(value, triton.JITFunction)]


@contextmanager
def compiled(launcher: type | None = None) -> Iterator[None]:
    """Every convolution by a kernel, and kernels anew, with Triton's launcher or another in front of them."""
    with stubbed(), use_plan("fused"):
        if launcher is not None:
            driver.active.launcher_cls = launcher
        for function in functions():
            function.device_caches.clear()
        forget()
        yield


@contextmanager
def noted() -> Iterator[None]:
    """Launches into :data:`seen`."""
    seen.clear()
    with compiled(Launcher):
        yield


def everything(backend, draw: Draw) -> None:
    """Every kernel, and what BatchNorm does on C numbers."""
    step(backend, draw)
    norm = Norm(
        draw.parameter(8),
        draw.parameter(8),
        draw.parameter(8),
        draw.parameter(8, positive=True),
        True,
        0.1,
        1e-5,
        "relu",
    )
    point, target = Geometry((1, 1), (0, 0), (1, 1), 1), GradTarget(sums=draw.room(2, 8))
    backend.conv_backward(
        draw.gradient(2, 16, 5, 4), draw.lazy(2, 8, 5, 4, act="relu"), draw.weight(16, 8, 1, 1), point, target
    )
    stats, sums, x = backend.new_reduction(8, draw.map(2, 8, 3, 3)), draw.room(2, 8), draw.map(2, 8, 3, 3)
    backend.statistics(x, stats)
    _, mean_invstd = backend.bn_coefficients(norm, stats, 18)
    scale_shift, _ = backend.bn_frozen(norm, torch.float32)
    backend.bn_backward(norm, sums, 18, mean_invstd, draw.room(3, 8))
    lazy = LazyMap(x, scale_shift, "none", mean_invstd)
    backend.highway_forward(lazy, lazy, x)
    backend.highway_backward(x, lazy, lazy, x, sums=sums, gate_sums=draw.room(2, 8))


def direct_is_public() -> dict[str, object]:
    """Of every launch, made twice with the same tensors: by Triton's public call, and then directly."""
    original = Prepared.__call__

    def twice(self: Prepared, *tensors, late=()) -> None:
        original(self, *tensors, late=late)
        original(self, *tensors, late=late)

    with noted():
        Prepared.__call__ = twice  # type: ignore[method-assign]
        try:
            for dtype in (torch.bfloat16, torch.float32):
                everything(BACKEND, Draw(dtype))
        finally:
            Prepared.__call__ = original  # type: ignore[method-assign]
        different = [first[0] for first, second in zip(seen[::2], seen[1::2], strict=True) if first != second]
        return {"launches": len(seen), "kernels": sorted({one[0] for one in seen}), "different": different}


def map_of(channels: int = 8, offset: int = 0) -> torch.Tensor:
    """A map whose address 16 divides, or not."""
    memory = torch.zeros(4 * channels * 9 + 64, dtype=torch.bfloat16)
    start = -(memory.data_ptr() // 2) % 8 + offset
    return memory[start : start + 2 * channels * 9].view(2, 3, 3, channels).permute(0, 3, 1, 2)


def counted(function: Callable[[], object]) -> int:
    """How often Triton's public call is made meanwhile."""
    calls = 0
    original = triton.JITFunction.run

    def run(self, *args, **kwargs):
        nonlocal calls
        calls += 1
        return original(self, *args, **kwargs)

    triton.JITFunction.run = run
    try:
        function()
    finally:
        triton.JITFunction.run = original
    return calls


def statistics(x: torch.Tensor) -> None:
    """One launch into a reduction."""
    BACKEND.statistics(x, BACKEND.new_reduction(8, x))


def specialisations() -> list[int]:
    """Public calls of the first and second launch with an aligned map, then with one that is not: of another specialisation."""
    with noted():
        return [counted(lambda x=x: statistics(x)) for x in (map_of(), map_of(), map_of(offset=1), map_of(offset=3))]


def watched() -> list[int]:
    """Public calls of later launches: by nobody watched, by a profiler's hook, in debug mode, of an unknown version of Triton."""
    runtime, found = triton.knobs.runtime, []
    with noted():
        statistics(map_of())
        found.append(counted(lambda: statistics(map_of())))
        hook = lambda *_: None  # noqa: E731
        runtime.launch_enter_hook.add(hook)
        found.append(counted(lambda: statistics(map_of())))
        runtime.launch_enter_hook.remove(hook)
        runtime.debug = True
        found.append(counted(lambda: statistics(map_of())))
        runtime.debug = False
        launch.direct = False
        found.append(counted(lambda: statistics(map_of())))
        launch.direct = True
        found.append(counted(lambda: statistics(map_of())))
    return found


original_compile = triton.JITFunction._do_compile

#: of the stub: a watcher of launches
WATCHER = ctypes.CFUNCTYPE(
    None, *[ctypes.POINTER(ctypes.c_uint)] * 2, ctypes.c_uint, ctypes.c_void_p, ctypes.c_void_p,
    ctypes.POINTER(ctypes.c_void_p),
)  # fmt: skip
SIZES = {"i32": 4, "fp32": 4}


def kinds(kernel: host._Kernel) -> list[str]:
    """The types of a kernel's parameters."""
    return [*(kind for kind in kernel.src.signature.values() if kind != "constexpr"), "scratch", "scratch"]


def kernels() -> dict[int, host._Kernel]:
    """Every kernel that has been made, by its handle."""
    found = [k for function in functions() for cache in function.device_caches.values() for k in cache[0].values()]
    return {kernel.function: kernel for kernel in found}


@contextmanager
def watching() -> Iterator[list[tuple]]:
    """What the driver is asked for meanwhile: the kernel, its grid, block, shared memory, stream and parameters."""
    asked: list[tuple] = []

    def watcher(grid, block, shared, stream, function, parameters) -> None:
        kernel = kernels()[function]
        values = [
            int.from_bytes(ctypes.string_at(parameters[i], SIZES.get(kind, 8)), "little", signed=True)
            for i, kind in enumerate(kinds(kernel))
        ]
        asked.append((kernel, tuple(grid[:3]), tuple(block[:3]), shared, stream, values))

    callback = WATCHER(watcher)
    place = ctypes.c_void_p.in_dll(ctypes.CDLL("libcuda.so.1"), "fusedres_stub_watcher")
    place.value = ctypes.cast(callback, ctypes.c_void_p).value
    try:
        yield asked
    finally:
        place.value = None


def requests_are_tritons() -> dict[str, object]:
    """Of every launch: whether the driver is asked by Triton's launcher for what is said of it to observers."""
    said: list[tuple] = []

    def observer(request, operands) -> None:
        values = []
        for kind, (operand, rest) in zip(kinds(request.owner), request.parameters, strict=True):
            value = rest if operand < 0 else operands[operand].data_ptr() + rest
            size = SIZES.get(kind, 8)
            values.append(int.from_bytes((value % 256**size).to_bytes(size, "little"), "little", signed=True))
        said.append((request.owner, request.grid, (request.threads, 1, 1), request.shared, None, values))

    with compiled(), watching() as asked, requests.observed(observer):
        for dtype in (torch.bfloat16, torch.float32):
            everything(BACKEND, Draw(dtype))
    different = [a[0].src.name for a, b in zip(asked, said, strict=True) if a != b]
    return {"launches": len(asked), "kernels": len({a[0].src.name for a in asked}), "different": different}


def tapes_are_schedules() -> dict[str, object]:
    """Of a network's steps: whether the driver is asked for the same as at first, but for addresses, and how many launches go through
    Python. The first four are recorded and played; then a hook looks on; then a thread begins."""
    models = []
    for training in (True, False):
        model = torch.nn.Sequential(BasicBlock(8, 8), _DenseBlock(2, 8, 2, 8, 0.0)).train(training)
        models.append(fusedres.convert(model.to(torch.bfloat16, memory_format=torch.channels_last), verify=False))
    x = torch.randn(2, 8, 6, 6).to(torch.bfloat16).to(memory_format=torch.channels_last)
    steps: list[list[tuple]] = []
    in_python: list[int] = []

    def step() -> None:
        with watching() as asked, mock.patch.object(Prepared, "_run", autospec=True, side_effect=Prepared._run) as runs:
            for model in models:
                with torch.set_grad_enabled(model.training):
                    y = model(x)
                if model.training:
                    y.sum().backward()
        in_python.append(runs.call_count)
        steps.append(
            [
                (*rest, [v for v, kind in zip(values, kinds(rest[0]), strict=True) if kind[0] != "*"])
                for *rest, values in asked
            ]
        )

    with compiled(), select.observe(lambda backend: BACKEND), torch.autograd.set_multithreading_enabled(False):
        for _ in range(4):
            step()
        hook = lambda *_: None  # noqa: E731
        triton.knobs.runtime.launch_enter_hook.add(hook)
        step()
        triton.knobs.runtime.launch_enter_hook.remove(hook)
        thread = threading.Thread(target=step)
        thread.start()
        thread.join()
    return {"launches": len(steps[0]), "same": [s == steps[0] for s in steps], "in_python": in_python}


def dependent() -> dict[str, list[list[int]]]:
    """Of a network's steps in inference, of which later ones are played: all launches, the dependent ones, and how many go through Python.
    Where launches are to be dependent on an sm_90, then not, then again, then on an sm_80."""
    block = _DenseBlock(2, 8, 2, 8, 0.0).eval()
    model = fusedres.convert(block.to(torch.bfloat16, memory_format=torch.channels_last), verify=False)
    x = torch.randn(2, 8, 6, 6).to(torch.bfloat16).to(memory_format=torch.channels_last)
    found: dict[str, list[list[int]]] = {}

    def steps(family: str, on: bool) -> list[list[int]]:
        arch, taken = launch.Arch(family, 227 * 1024, 32), list[list[int]]()
        with mock.patch.object(launch, "arch_of_gpu", lambda _: arch), launch.dependent_launches(on):
            for _ in range(4):
                before = [count.value for count in counts]
                with mock.patch.object(Prepared, "_run", autospec=True, side_effect=Prepared._run) as runs:
                    model(x)
                taken.append([*(c.value - b for c, b in zip(counts, before, strict=True)), runs.call_count])
        return taken

    with compiled(), select.observe(lambda backend: BACKEND), torch.no_grad():
        library = ctypes.CDLL("libcuda.so.1")
        counts = [ctypes.c_long.in_dll(library, f"fusedres_stub_{name}") for name in ("launches", "dependent")]
        found["on"], found["off"], found["on again"] = steps("sm_90", True), steps("sm_90", False), steps("sm_90", True)
        forget()  # a machine has one kind of GPU
        found["older"] = steps("sm_80", True)
    return found


def really_compiled() -> dict[str, object]:
    """Of a kernel that Triton has compiled itself: whether the driver is asked for what is said of it, at its first launch and later."""
    said: list[tuple] = []
    with compiled(), watching() as asked, requests.observed(lambda request, _: said.append(request)):
        with mock.patch.object(triton.JITFunction, "_do_compile", original_compile):
            statistics(map_of())
        statistics(map_of())
    said[0].owner.module = None  # which it would unload when no driver is left
    return {
        "launches": len(asked),
        "same": [
            (request.owner, request.grid, (request.threads, 1, 1), request.shared) == tuple(one[:4])
            for request, one in zip(said, asked, strict=True)
        ],
        "parameters": [len(request.parameters) == len(one[5]) for request, one in zip(said, asked, strict=True)],
    }


def described() -> dict[str, object]:
    """Of a kernel that takes tensor descriptors, compiled by Triton itself, at its first launch and at a later one over other tensors: what
    the driver is given as maps of x, the weight and out, and whether observers are told of more than the launch."""
    plan = Plan(True, ConvConfig(16, 16, 16, 4, 2, descriptors=True))
    maps: list[list[tuple]] = []
    expected: list[list[tuple]] = []
    said: list[object] = []

    def watcher(grid, block, shared, stream, function, parameters) -> None:
        # of each descriptor the map, two sizes and two strides
        read = [ctypes.string_at(parameters[5 * i], 48) for i in range(3)]
        maps.append([tuple(int.from_bytes(one[at : at + 8], "little") for at in range(0, 48, 8)) for one in read])

    def run(offset: int) -> None:
        x, out = map_of(48)[:, offset : offset + 16], map_of(32)
        weight = torch.zeros(24, 16, 1, 1, dtype=torch.bfloat16)
        with use_plan(plan):
            BACKEND.conv_forward(LazyMap(x), weight, None, Geometry((1, 1), (0, 0), (1, 1), 1), Epilogue(out[:, 8:]))
        # address, channels, pixels, bytes from one to the next, and the box
        expected.append(
            [
                (x.data_ptr(), 16, 18, 96, 16, 16), (weight.data_ptr(), 16, 24, 32, 16, 16),
                (out.data_ptr() + 16, 24, 18, 64, 16, 16),
            ]
        )  # fmt: skip

    callback = WATCHER(watcher)
    with compiled(), requests.observed(lambda request, _: said.append(request)):
        place = ctypes.c_void_p.in_dll(ctypes.CDLL("libcuda.so.1"), "fusedres_stub_watcher")
        place.value = ctypes.cast(callback, ctypes.c_void_p).value
        with mock.patch.object(triton.JITFunction, "_do_compile", original_compile):
            public = [counted(lambda: run(8)), counted(lambda: run(16))]
        place.value = None
        for kernel in kernels().values():
            kernel.module = None  # which it would unload when no driver is left
    return {"same": maps == expected, "launches": len(maps), "public": public, "said": said}


def refusals() -> list[str]:
    """What is said of tensors on two devices, and of arguments in another order than the kernel's."""
    x, found = form_of(map_of()), []
    arguments = {name: None for name in ("scale shift", "residual", "residual_scale residual_shift")}
    for operands in (
        {"raw": x, **arguments, "out": x._replace(device=torch.device("meta")), "partials": None},
        {"out": x, "raw": x, **arguments, "partials": None},
    ):
        try:
            numbers = dict.fromkeys(elementwise.add_act_forward_kernel.arg_names[8:], 8)
            Prepared(
                elementwise.add_act_forward_kernel, (1,), launch.arch_of(x.device), operands, num_warps=4, **numbers
            )
        except ValueError as error:
            found.append(str(error))
    return found


SCENES = (
    really_compiled,
    direct_is_public,
    specialisations,
    watched,
    requests_are_tritons,
    described,
    tapes_are_schedules,
    dependent,
    refusals,
)

if __name__ == "__main__":
    print(json.dumps({scene.__name__: scene() for scene in SCENES}))
