"""How each convolution runs on the triton backend, where that was measured: the plans, and the files that hold them.

A table belongs to a device. The user's own is in the cache folder (``FUSEDRES_CACHE_DIR``, else ``fusedres`` in the
user's cache folder) and counts only for the versions of torch, triton and this package that it was measured with; those
that come with the package, in ``tables/``, are better than a guess for any version. What cannot be read is no table.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import json
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch

try:
    import fcntl
except ImportError:  # not on Windows, where Triton is not either
    fcntl = None

FORMAT = 1


class Problem(NamedTuple):
    """One convolution as far as its speed goes: ``op`` is forward, dgrad or wgrad; ``features`` names what is fused."""

    op: str
    dtype: str
    x: tuple[int, ...]
    x_pitch: int
    y_pitch: int
    weight: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    features: tuple[str, ...]


class Plan(NamedTuple):
    """The fused kernel, by a configuration or its default one, or the vendor's convolution between passes."""

    fused: bool
    config: tuple[int, ...] | None = None


Table = Mapping[Problem, Plan]


def versions() -> dict[str, str | int]:
    """What a measurement depends on besides the device."""
    from . import __version__

    try:
        triton = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        triton = ""
    return {"format": FORMAT, "torch": torch.__version__, "triton": triton, "fusedres": __version__}


@functools.cache
def device_name(device: torch.device) -> str:
    """The name under which plans for ``device`` are kept."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def file_name(device: str) -> str:
    """The file of a device's table."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-") + ".json"


def cache_folder() -> Path:
    """Where this user's tables are."""
    chosen = os.environ.get("FUSEDRES_CACHE_DIR")
    return Path(chosen) if chosen else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fusedres"


def read(path: Path, device: str, wanted: Mapping[str, object]) -> dict[Problem, Plan]:
    """The table in the file, empty where it is absent, unreadable, of another device, or differs from ``wanted``."""

    def frozen(value):
        return tuple(map(frozen, value)) if isinstance(value, list) else value

    try:
        content = json.loads(path.read_text())
        if content["device"] != device or any(content[name] != value for name, value in wanted.items()):
            return {}
        return {
            Problem(**{name: frozen(value) for name, value in entry["problem"].items()}): Plan(
                bool(entry["fused"]), frozen(entry["config"])
            )
            for entry in content["plans"]
        }
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return {}


def write(path: Path, device: str, table: Table) -> None:
    """Add the table to the file: another process's entries stay, and a reader sees the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with _locked(path.with_suffix(".lock")):
        merged = read(path, device, versions()) | dict(table)
        plans = [{"problem": p._asdict(), "fused": plan.fused, "config": plan.config} for p, plan in merged.items()]
        with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".tmp", delete=False) as file:
            json.dump({"device": device, **versions(), "plans": plans}, file, indent=1)
        os.replace(file.name, path)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        if fcntl is not None:
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


@functools.cache
def table(device: torch.device) -> dict[Problem, Plan]:
    """The plans for ``device``, read once in a process."""
    name = device_name(device)
    committed = read(Path(__file__).parent / "tables" / file_name(name), name, {"format": FORMAT})
    return committed | read(cache_folder() / file_name(name), name, versions())


def remember(device: torch.device, found: Table) -> Path:
    """Use the plans from now on, here and, through the file, in later processes; returns the file."""
    path = cache_folder() / file_name(device_name(device))
    write(path, device_name(device), found)
    table(device).update(found)
    return path
