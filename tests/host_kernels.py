"""The CUDA C++ kernels on the host, for CPU tensors: the backend ``cuda_host``, which is ``cuda`` but for where its kernels run.

The same templates, compiled by the host's C++ compiler (:file:`backends/host_kernels.cpp`): blocks and threads in a shuffled order, phase
by phase, behind a function of the type of CUDA's ``cuLaunchKernel``. Each program is compiled once and kept in ``build/``.
FUSEDRES_SANITIZE (``address,undefined``) compiles it with those checks of the compiler's.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch

from fusedres.backends import select
from fusedres.backends.cuda import CudaBackend
from fusedres.backends.nvrtc import CHANNELS, KERNELS, Functions, Program

ROOT = Path(__file__).parents[1]
SOURCES = ROOT / "csrc" / "cuda"
MAIN = Path(__file__).parent / "backends" / "host_kernels.cpp"
NAME = "cuda_host"
SANITIZE = os.environ.get("FUSEDRES_SANITIZE", "")
COMPILER = os.environ.get("CXX", "g++")
FLAGS = ("-std=c++17", "-O1", "-g1", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", f"-I{SOURCES}")


@contextlib.contextmanager
def locked(path: Path):
    """Nobody else is in here for that file, of all processes."""
    import fcntl

    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def built(program: Program) -> Path:
    """The library of the program, compiled where it is not there yet."""
    macros = [f"-D{macro}" for macro in program.macros]
    checks = [f"-fsanitize={SANITIZE}", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"] if SANITIZE else []
    command = [COMPILER, *FLAGS, *checks, *macros, str(MAIN)]
    key = hashlib.sha256(repr(command).encode())
    for path in (MAIN, *sorted(SOURCES.glob("*.cuh"))):
        key.update(path.read_bytes())
    folder = ROOT / "build" / "host-kernels"
    folder.mkdir(parents=True, exist_ok=True)
    library = folder / f"{key.hexdigest()[:24]}.so"
    with locked(library.with_suffix(".lock")):
        if not library.exists():
            made = library.with_suffix(".tmp")
            subprocess.run([*command, "-o", str(made)], check=True)
            made.rename(library)
    return library


@functools.cache
def loaded(program: Program) -> Functions:
    """The program's functions by their addresses."""
    library = ctypes.CDLL(str(built(program)))
    handles = {name: address(library, name) for name in KERNELS[program.kind]}
    return Functions(handles, library)


def address(library: ctypes.CDLL, name: str) -> int:
    """Of a function."""
    return ctypes.cast(getattr(library, name), ctypes.c_void_p).value or 0


class Host:
    """CPU tensors; as a GPU's driver, with one stream, which is always the current one."""

    @property
    def launcher(self) -> int:
        library = loaded(Program(CHANNELS, torch.float32)).owner
        assert isinstance(library, ctypes.CDLL)
        return address(library, "fusedres_launch")

    def why_not(self, device: torch.device) -> str | None:
        if device.type != "cpu":
            return f"its kernels run on the host, not on {device.type}"
        if not sys.platform.startswith("linux") or shutil.which(COMPILER) is None:
            return "its kernels are compiled by the host's C++ compiler, which is not here"
        return None

    def load(self, program: Program, device: torch.device) -> Functions:
        return loaded(program)

    def on(self, device: torch.device) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def stream(self, device: torch.device) -> int:
        return 0

    def stream_to_play_on(self, device: torch.device) -> int | None:
        return 0


class HostBackend(CudaBackend):
    """``cuda`` on the host."""

    name = NAME

    def __init__(self) -> None:
        super().__init__(Host())


def register() -> None:
    """Add it to the backends, once: by its name alone."""
    if NAME not in select.names():
        select.register(HostBackend)
