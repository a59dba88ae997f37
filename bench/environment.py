"""What a figure depends on besides the code: written into every record."""

from __future__ import annotations

import importlib.metadata
import platform
import shlex
import subprocess
import sys
from datetime import datetime, timezone
from pathlib import Path

import cpuinfo
import torch

import fusedres


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git(*arguments: str) -> str | None:
    root = Path(__file__).parent
    try:
        done = subprocess.run(["git", "-C", root, *arguments], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def commit() -> str | None:
    """The checkout's commit, marked where files differ from it; None outside a checkout."""
    head = _git("rev-parse", "--short=12", "HEAD")
    return f"{head} (modified)" if head and _git("status", "--porcelain", "--untracked-files=no") else head


def command(module: str, arguments: list[str] | None) -> str:
    """The line that repeats this run."""
    return shlex.join(["python", "-m", module, *(sys.argv[1:] if arguments is None else arguments)])


def describe(device: torch.device, command: str) -> dict[str, str | int | None]:
    """Device, versions, commit, threads, date and the command."""
    cuda = device.type == "cuda"
    cpu = cpuinfo.get_cpu_info().get("brand_raw", platform.processor())
    return {
        "device": torch.cuda.get_device_name(device) if cuda else cpu,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "cuda": torch.version.cuda if cuda else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "torchvision": _version("torchvision"),
        **{name: _version(name) for name in ("openvino", "onnxruntime") if _version(name)},
        "fusedres": fusedres.__version__,
        "commit": commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": command,
    }
