"""``python -m fusedres doctor``: what is installed, and which backend serves which device and dtype, and why not the others."""

from __future__ import annotations

import importlib.metadata
import os
import platform

import torch

from .backends.select import backends, load, names, resolve
from .errors import BackendError
from .version import __version__

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _extension() -> dict[str, str | list[str] | None]:
    """Where the C++ extension is and which instruction sets it can use here, or the error with which it does not load."""
    try:
        from fusedres import _C
    except ImportError as error:
        return {"file": None, "error": str(error)}
    return {"file": _C.__file__, "capability": _C.cpu_capability(), "capabilities": list(_C.cpu_capabilities())}


def _devices() -> dict[str, str]:
    """Every device by the name torch gives it, and what it is."""
    threads = f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"
    found = {"cpu": threads}
    for i in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(i)
        found[f"cuda:{i}"] = f"{torch.cuda.get_device_name(i)}, compute capability {major}.{minor}"
    return found


def _choice(device: str, dtype: torch.dtype) -> str:
    """The backend that a block on ``device`` in ``dtype`` would run on now, or what happens instead."""
    try:
        chosen = resolve(torch.device(device), dtype)
    except BackendError as error:
        return f"error: {error}"
    return "original modules" if chosen is None else chosen.name


def _notes(device: str) -> dict[str, list[str]]:
    """What backends say of the device besides, by their names."""
    loaded = {name: load(name) for name in names()}
    found = {name: b.notes(torch.device(device)) for name, b in loaded.items() if not isinstance(b, str)}
    return {name: lines for name, lines in found.items() if lines}


def diagnose() -> dict:
    """Everything the command prints, as JSON types.

    ``serves[device][dtype]`` has ``runs`` (a backend's name, ``"original modules"`` where no fused one serves, or the error of an override)
    and, per backend, ``"available"`` or the reason why not; ``notes[device]`` what backends have found out there.
    """
    devices = _devices()
    return {
        "versions": {
            "fusedres": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "triton": _version("triton"),
            "torchvision": _version("torchvision"),
            "cuda": torch.version.cuda,
        },
        "platform": platform.platform(),
        "extension": _extension(),
        "environment": {k: v for k, v in sorted(os.environ.items()) if k.startswith(("FUSEDRES_", "TRITON_INTERPRET"))},
        "devices": devices,
        "serves": {
            device: {
                str(dtype).removeprefix("torch."): {
                    "runs": _choice(device, dtype),
                    "backends": backends(device, dtype),
                }
                for dtype in _DTYPES
            }
            for device in devices
        },
        "notes": {device: _notes(device) for device in devices},
    }


def render(found: dict) -> str:
    """``found`` as text for a person."""
    extension = found["extension"]
    if extension["file"] is None:
        extension_line = f"not loaded: {extension['error']}"
    else:
        extension_line = f"{extension['file']} (runs {extension['capability']}, of {', '.join(extension['capabilities'])} on this CPU)"
    lines = [
        *(f"{name:<12} {version or 'not installed'}" for name, version in found["versions"].items()),
        f"{'platform':<12} {found['platform']}",
        f"{'C++ kernels':<12} {extension_line}",
        *(f"{name}={value}" for name, value in found["environment"].items()),
    ]
    for device, what in found["devices"].items():
        lines += ["", f"{device}: {what}"]
        reasons: dict[str, str] = {}
        for dtype, served in found["serves"][device].items():
            lines.append(f"  {dtype:<9} {served['runs']}")
            reasons |= {f"{name}: {why}": dtype for name, why in served["backends"].items() if why != "available"}
        lines += [f"    not {reason}" for reason in reasons]
        lines += [f"  {name}: {line}" for name, said in found["notes"][device].items() for line in said]
    return "\n".join(lines)
