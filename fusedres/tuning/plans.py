"""How each convolution runs on a backend with a choice, where that was measured: the plans, and the files that hold them.

A table belongs to a device. The user's own is in the cache folder (``FUSEDRES_CACHE_DIR``, else ``fusedres`` in the user's cache folder)
and counts only for the versions of torch, triton and this package that it was measured with; those that come with the package, in
``tables/``, are better than a guess for any version. What cannot be read, or holds a tile that is none, is no table.
"""

# fusedres.kernels is the folder kernels/, which setup.py says and a type checker does not see
# pyright: reportMissingImports=false
from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import json
import math
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..cache import cache_folder
from ..kernels.tiles import DEFAULT_ARCH, Arch, ConvConfig, ConvSize, arch_of_gpu, check
from ..specs import Geometry
from ..version import __version__

try:
    import fcntl
except ImportError:  # on Windows, where of two processes that write at once the later wins
    fcntl = None

#: of the files: raised with every change of what they hold
FORMAT = 4


class Problem(NamedTuple):
    """One convolution as far as its speed goes: ``op`` is forward, dgrad, wgrad, or backward, which is both gradients by one kernel;
    ``features`` names what is fused."""

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

    @property
    def geometry(self) -> Geometry:
        """Stride, padding, dilation and groups."""
        return Geometry(self.stride, self.padding, self.dilation, self.groups)

    @property
    def out_size(self) -> tuple[int, ...]:
        """The spatial size of the convolution's output."""
        return self.geometry.out_size(self.x[2:], self.weight[2:])

    @property
    def size(self) -> ConvSize:
        """What decides its tile."""
        residues = self.stride if self.op == "dgrad" else (1,) * len(self.stride)
        # residue 0 of the input has the most pixels
        pixels = (
            [-(-n // s) for n, s in zip(self.x[2:], residues, strict=True)] if self.op == "dgrad" else self.out_size
        )
        return ConvSize(
            rows=self.x[0] * math.prod(pixels),
            channels=self.weight[1],
            outputs=self.weight[0] // self.groups,
            taps=math.prod(self.weight[2:]) * math.prod(residues),
            itemsize=getattr(torch, self.dtype).itemsize,
            pending="raw" in self.features,
        )


@dataclass(frozen=True)
class Plan:
    """The fused kernel, in tiles of ``config`` or its default ones, or the library's convolution between passes; in the place of both
    gradients by one kernel, each by a plan of its own.

    ValueError for a tile of what the library runs: there it would change nothing.
    """

    fused: bool
    config: ConvConfig | None = None

    def __post_init__(self) -> None:
        if self.config is not None and not self.fused:
            raise ValueError(f"a convolution by the library has no tile of ours, found {self.config}")

    def __str__(self) -> str:
        return f"fused, {self.config or 'default tile'}" if self.fused else "library"


FUSED, LIBRARY = Plan(True), Plan(False)
Table = Mapping[Problem, Plan]


def versions() -> dict[str, str | int]:
    """What a measurement depends on besides the device."""
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


def _entry(problem: Problem, plan: Plan) -> dict[str, Any]:
    """A line of a table as JSON types, by the names of the fields."""
    return {"problem": problem._asdict(), **asdict(plan)}


def _parse(entry: dict[str, Any], arch: Arch) -> tuple[Problem, Plan]:
    """A line of a table. TypeError for fields that are not known or missing, ValueError for a tile that is none or is not allowed."""

    def frozen(value: Any) -> Any:
        return tuple(map(frozen, value)) if isinstance(value, list) else value

    problem = Problem(**{name: frozen(value) for name, value in entry["problem"].items()})
    fields = {name: value for name, value in entry.items() if name != "problem"}
    if fields["config"] is not None:
        fields["config"] = check(problem.op, problem.size.taps, arch, ConvConfig(**fields["config"]))
    return problem, Plan(**fields)


def read(path: Path, device: str, wanted: Mapping[str, object], arch: Arch = DEFAULT_ARCH) -> dict[Problem, Plan]:
    """The table in the file, empty where it is absent, unreadable, of another device, or differs from ``wanted``."""
    try:
        content = json.loads(path.read_text())
        if content["device"] != device or any(content[name] != value for name, value in wanted.items()):
            return {}
        return dict(_parse(entry, arch) for entry in content["plans"])
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return {}


def write(path: Path, device: str, table: Table, arch: Arch = DEFAULT_ARCH) -> None:
    """Add the table to the file: another process's entries stay, and a reader sees the old file or the new one."""
    with replaced(path) as content:
        merged = read(path, device, versions(), arch) | dict(table)
        entries = [_entry(problem, plan) for problem, plan in merged.items()]
        content({"device": device, **versions(), "plans": entries})


@contextlib.contextmanager
def replaced(path: Path) -> Iterator[Callable[[object], None]]:
    """A function that replaces the JSON file, which nobody else does meanwhile, and which nobody sees half written."""
    path.parent.mkdir(parents=True, exist_ok=True)

    def write(content: object) -> None:
        with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".tmp", delete=False) as file:
            json.dump(content, file, indent=1)
        os.replace(file.name, path)

    with _locked(path.with_suffix(".lock")):
        yield write


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        if fcntl is not None:
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


_tables: dict[torch.device, dict[Problem, Plan]] = {}
#: how often tables have changed
edition = 0


def table(device: torch.device) -> Table:
    """The plans for ``device``: read from the files once in a process, and added to by :func:`remember`."""
    known = _tables.get(device)
    if known is None:
        name, arch = device_name(device), arch_of_gpu(device)
        committed = read(Path(__file__).parents[1] / "tables" / file_name(name), name, {"format": FORMAT}, arch)
        known = _tables[device] = committed | read(cache_folder() / file_name(name), name, versions(), arch)
    return known


def forget() -> None:
    """Read the files anew at the next look, as another process would."""
    global edition
    edition += 1
    _tables.clear()


def remember(device: torch.device, found: Table) -> Path:
    """Use the plans from now on, here and, through the file, in later processes; returns the file."""
    global edition
    edition += 1
    name = device_name(device)
    path = cache_folder() / file_name(name)
    write(path, name, found, arch_of_gpu(device))
    _tables[device] = {**table(device), **found}
    return path
