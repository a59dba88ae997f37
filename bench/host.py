"""What a step costs the host, without a GPU: the time in which Python and PyTorch enqueue its work, and how many launches that is.

    python -m bench.host --json results/host.json

Triton's own driver and launcher run over a stub of the CUDA driver (bench/stub_driver.c), in which a launch only counts; nothing is
compiled, since a step's second call compiles nothing either. Every convolution is fused. Beside each model stands an *eager-shaped* row:
the same architecture, one channel wide on maps of 2 x 2, through PyTorch's eager operators on the CPU, whose time is that of their
dispatch. Neither side pays for launches in the driver, of which the row has as many as the operators that are counted for it. With
FUSEDRES_DEPENDENT_LAUNCHES=1 launches are dependent, as on an sm_90, and counted.

A host that needs longer for a step than the GPU keeps the GPU waiting: below the batch where both are equal, the ratio of these times is
the speed-up. Times are process times, the least of several rounds that alternate between the rows.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import functools
import itertools
import json
import os
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torchvision
import triton
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.models.densenet import DenseNet
from torchvision.models.resnet import Bottleneck
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

import fusedres
from fusedres.backends import select
from fusedres.backends.triton import BACKEND, use_plan
from fusedres.kernels import launch
from fusedres.kernels.launch import INTERPRETED
from fusedres.kernels.tiles import Arch

from . import environment

MODELS = ("resnet50", "densenet121")
MODES = ("train", "infer")
#: of a step's host time: at most so much of the eager-shaped row's
GOALS = {"train": 1.0, "infer": 0.7}


# ---- the stub --------------------------------------------------------------------------------------------------------


class _Stub:
    """Triton's driver for NVIDIA, over the stub of CUDA's: one sm_90 without a device behind it, for tensors in the memory of the host."""

    def __init__(self) -> None:
        from triton.backends.nvidia import driver as nvidia

        self.utils, self.launcher_cls = nvidia.CudaUtils(), nvidia.CudaLauncher
        # as those that a driver has for a GPU: a function of torch's each
        self.get_current_device, self.get_current_stream = int, int

    def get_current_target(self) -> GPUTarget:
        """A target that every kernel here is for."""
        return GPUTarget("cuda", 90, 32)

    def is_active(self) -> bool:
        """That it is one."""
        return True


class _Kernel:
    """A kernel as a compilation leaves it, with Triton's launcher in front of no code."""

    _numbers = itertools.count(1)

    def __init__(self, source: Any, options: Any) -> None:
        self.src, self.function = source, next(self._numbers)
        self.metadata = metadata = SimpleNamespace(
            num_ctas=1, num_warps=options.num_warps, shared=0, global_scratch_size=0, global_scratch_align=1,
            profile_scratch_size=0,
            profile_scratch_align=1, launch_cooperative_grid=False, launch_pdl=options.launch_pdl, tensordesc_meta=None,
            instrumentation_mode="", cluster_dims=(1, 1, 1),
        )  # fmt: skip
        self.packed_metadata = (metadata.num_warps, metadata.num_ctas, metadata.shared)
        self.run = driver.active.launcher_cls(source, metadata)

    def launch_metadata(self, *arguments: object) -> None:
        """What hooks would be told."""


def _without_compiler(self: JITFunction, key, signature, device, constants, options, attributes, warmup) -> _Kernel:
    """In the place of ``JITFunction._do_compile``."""
    kernel = _Kernel(self.ASTSource(self, signature, constants, attributes), options)
    self.device_caches[device][0][key] = kernel
    return kernel


@functools.cache
def _library() -> tuple[tempfile.TemporaryDirectory[str], ctypes.c_long, ctypes.c_long]:
    """The stub, built and loaded: the folder of its library, which goes with the process, and how many launches it has seen, and how many
    of them dependent."""
    folder = tempfile.TemporaryDirectory()
    library = Path(folder.name) / "libcuda.so.1"
    source = Path(__file__).with_name("stub_driver.c")
    compiler = os.environ.get("CC", "cc")
    subprocess.run([compiler, "-O2", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-o", library, source], check=True)
    # torch looks for devices once: it must not find the stub's, nor use this machine's through the stub
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    torch.cuda.device_count()
    stub = ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
    return folder, *(ctypes.c_long.in_dll(stub, f"fusedres_stub_{name}") for name in ("launches", "dependent"))


@contextlib.contextmanager
def stubbed() -> Iterator[Callable[[], tuple[int, int]]]:
    """Inside, kernels launch into the stub, whichever tensors they get; gives a function that says how many launches it has seen, and how
    many of them dependent."""
    folder, launches, dependent = _library()
    with triton.knobs.nvidia.scope(), triton.knobs.cache.scope():
        triton.knobs.nvidia.libcuda_path = triton.knobs.cache.dir = folder.name
        with (
            mock.patch.object(driver, "_active", _Stub()),
            mock.patch.object(JITFunction, "_do_compile", _without_compiler),
        ):
            yield lambda: (launches.value, dependent.value)


# ---- the rows --------------------------------------------------------------------------------------------------------


class _NarrowResNet(nn.Module):
    """A ResNet-50 of one channel: its modules in its order, but for the head."""

    def __init__(self) -> None:
        super().__init__()
        blocks = []
        for i, count in enumerate((3, 4, 6, 3)):
            for j in range(count):
                below = 1 if i == j == 0 else 4
                project = nn.Sequential(nn.Conv2d(below, 4, 1, bias=False), nn.BatchNorm2d(4)) if j == 0 else None
                blocks.append(Bottleneck(below, 1, downsample=project))
        stem = [
            nn.Conv2d(3, 1, 3, padding=1, bias=False),
            nn.BatchNorm2d(1),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(3, 1, 1),
        ]
        self.layers = nn.Sequential(*stem, *blocks)

    def forward(self, x: Tensor) -> Tensor:
        """The last map."""
        return self.layers(x)


def eager_shaped(name: str) -> nn.Module:
    """The eager operators of a model, one channel wide."""
    if name == "resnet50":
        return _NarrowResNet()
    narrow = DenseNet(
        growth_rate=1, block_config=(6, 12, 24, 16), num_init_features=2, bn_size=1, num_classes=1
    ).features
    for module in narrow.modules():
        # maps of 2 x 2 stay that
        if isinstance(module, (nn.AvgPool2d, nn.MaxPool2d)):
            module.kernel_size, module.stride, module.padding = 1, 1, 0
        elif isinstance(module, nn.Conv2d):
            module.stride = (1, 1)
    return narrow


def converted(name: str) -> nn.Module:
    """The model itself in bfloat16, without its head, every block of it fused."""
    model = torchvision.models.get_model(name)
    model = model.features if name.startswith("densenet") else nn.Sequential(*list(model.children())[:-2])
    return fusedres.convert(model.to(dtype=torch.bfloat16, memory_format=torch.channels_last))


def step_of(model: nn.Module, mode: str, x: Tensor) -> Callable[[], None]:
    """One step of the model on ``x``."""
    model.train(mode == "train")
    parameters = list(model.parameters())

    def train() -> None:
        model(x).sum().backward()
        for p in parameters:
            p.grad = None

    def infer() -> None:
        with torch.no_grad():
            model(x)

    return train if mode == "train" else infer


class _Operators(TorchDispatchMode):
    """Counts the operators that do something: views only make tensors."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


def operators(step: Callable[[], None]) -> int:
    """How many operators of PyTorch a step calls."""
    with _Operators() as found:
        step()
    return found.count


@dataclass
class Record:
    """A model in a mode beside its eager-shaped row: milliseconds a step, launches of our kernels, how many of them are dependent, and
    operators of PyTorch."""

    model: str
    mode: str
    launches: int
    dependent: int
    operators: int
    milliseconds: float
    eager_operators: int
    eager_milliseconds: float

    @property
    def ratio(self) -> float:
        """Of the eager-shaped row's time."""
        return self.milliseconds / self.eager_milliseconds

    @property
    def microseconds_per_launch(self) -> float:
        """Of a step, everything above the launch included."""
        return 1e3 * self.milliseconds / self.launches


def seconds(step: Callable[[], None], calls: int = 1) -> float:
    """The process time of a call."""
    start = time.process_time()
    for _ in range(calls):
        step()
    return (time.process_time() - start) / calls


def measure(name: str, mode: str, rounds: int, launches: Callable[[], tuple[int, int]]) -> Record:
    """Both rows, in turns."""
    x = torch.zeros(2, 3, 64, 64, dtype=torch.bfloat16).to(memory_format=torch.channels_last)
    ours = step_of(converted(name), mode, x)
    eager = step_of(eager_shaped(name), mode, torch.zeros(1, 3, 2, 2))
    arch = Arch("sm_90", 227 * 1024, 32)
    # not observed: who looks on sees blocks one by one
    with (
        use_plan("fused"),
        mock.patch.object(select, "_choose", lambda device, dtype: BACKEND),
        mock.patch.object(launch, "arch_of_gpu", lambda device: arch),
    ):
        for _ in range(2):
            ours(), eager()
        before = launches()
        ours()
        count, dependent = (now - then for now, then in zip(launches(), before, strict=True))
        counts = operators(ours), operators(eager)
        times = [(seconds(ours), seconds(eager)) for _ in range(rounds)]
    least = [1e3 * min(column) for column in zip(*times, strict=True)]
    return Record(name, mode, count, dependent, counts[0], least[0], counts[1], least[1])


def render(records: list[Record]) -> Table:
    """The records for a person."""
    table = Table(title="Host time of a step")
    for head in (
        "model",
        "mode",
        "launches",
        "dependent",
        "operators",
        "ms",
        "us a launch",
        "eager operators",
        "eager ms",
        "ratio",
        "goal",
    ):
        table.add_column(head, justify="left" if head in ("model", "mode") else "right")
    for r in records:
        table.add_row(
            r.model, r.mode, str(r.launches), str(r.dependent), str(r.operators), f"{r.milliseconds:.1f}",
            f"{r.microseconds_per_launch:.0f}",
            str(r.eager_operators), f"{r.eager_milliseconds:.1f}", f"{r.ratio:.2f}", f"{GOALS[r.mode]:.1f}",
        )  # fmt: skip
    return table


def main(arguments: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--modes", nargs="+", choices=MODES, default=MODES)
    parser.add_argument("--rounds", type=int, default=10, help="measurements of each row (default %(default)s)")
    parser.add_argument("--json", type=Path, help="write the records here")
    args = parser.parse_args(arguments)
    if INTERPRETED:
        parser.error("kernels are interpreted here: unset TRITON_INTERPRET")
    torch.set_num_threads(1)
    with stubbed() as launches:
        records = [measure(name, mode, args.rounds, launches) for name in args.models for mode in args.modes]
    Console(width=140).print(render(records))
    if args.json is not None:
        found = environment.describe(torch.device("cpu"), environment.command("bench.host", arguments))
        rows = [asdict(r) | {"ratio": r.ratio, "goal": GOALS[r.mode]} for r in records]
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps({"environment": found, "records": rows}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
