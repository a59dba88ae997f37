"""Which backend runs: chosen by device, dtype and what is installed, or by the user.

The registry is the order of preference: the first backend that is registered for a device type and serves the dtype there is taken. In
automatic choice a block for which none is left runs its original modules, because unfused primitives would only be slower; asked for by
name, ``eager`` runs the fused blocks on plain PyTorch primitives, which is the oracle of every test.
"""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..errors import BackendError
from .contract import Backend


@dataclass(frozen=True)
class Entry:
    """A backend in the registry. ``source``: the module whose ``BACKEND`` it is, imported on first use, or the backend itself.
    ``devices``: the device types for which it is taken by itself; for others, and where that is empty, only by name."""

    name: str
    source: str | Backend
    devices: tuple[str, ...] = ()


_entries: dict[str, Entry] = {
    entry.name: entry
    for entry in (
        # on CPU tensors, by Triton's interpreter, for tests: only by name
        Entry("triton", "fusedres.backends.triton", ("cuda",)),
        Entry("cuda", "fusedres.backends.cuda", ("cuda",)),
        Entry("cpp", "fusedres.backends.cpp", ("cpu",)),
        Entry("eager", "fusedres.backends.eager"),
    )
}
_loaded: dict[str, Backend | str] = {}
_override: str | None = None
_observers: list[Callable[[Backend | None], Backend | None]] = []


def names() -> tuple[str, ...]:
    """The registered backends, the preferred first."""
    return tuple(_entries)


def register(backend: type[Backend], devices: tuple[str, ...] = (), *, first: bool = False) -> None:
    """Add a backend: for tensors on ``devices`` it is taken by itself, elsewhere by its name. ``first``: before those that are registered
    already, else behind them. Raises BackendError where it lacks a primitive, and ValueError where its name is taken.

    >>> class Mps(Backend): ...
    >>> register(Mps, ("mps",))
    """
    name = backend.name
    if name in _entries:
        raise ValueError(f"there is a backend {name!r} already")
    lacking = sorted(backend.__abstractmethods__)
    if lacking:
        raise BackendError(f"backend {name!r} is not complete: it lacks {', '.join(lacking)}")
    entry = Entry(name, backend(), devices)
    kept = dict(_entries)
    _entries.clear()
    _entries.update({name: entry, **kept} if first else {**kept, name: entry})
    _automatic.cache_clear()


def unregister(name: str) -> None:
    """Remove a backend that :func:`register` has added. Raises ValueError where there is none of that name."""
    if name not in _entries:
        raise ValueError(_unknown(name))
    del _entries[name]
    _loaded.pop(name, None)
    _automatic.cache_clear()


def _unknown(name: str) -> str:
    return f"unknown backend {name!r}: expected one of {', '.join(_entries)}, 'auto' or None"


def _check(name: str | None) -> str | None:
    if name is not None and name not in (*_entries, "auto"):
        raise ValueError(_unknown(name))
    return None if name == "auto" else name


class use_backend:
    """Choose the backend of every fused block by name, or ``None`` / ``"auto"`` for automatic choice.

    Works at once and for the whole process (autograd runs backward on threads of its own, which a context variable would not reach); as a
    context manager it restores the previous choice on exit. The environment variable ``FUSEDRES_BACKEND`` sets the initial choice. Raises
    ValueError for an unknown name; a backend that cannot serve a tensor raises :class:`~fusedres.errors.BackendError` when a block runs.

    >>> with use_backend("eager"):
    ...     y = model(x)
    """

    def __init__(self, name: str | None) -> None:
        global _override
        self._previous = _override
        _override = _check(name)

    def __enter__(self) -> None:
        return None

    def __exit__(self, *exc: object) -> None:
        global _override
        _override = self._previous


class observe:
    """Put ``wrap(backend)`` in the place of the backend that each block would run on, inside a ``with``: how calls are counted, timed and
    compared. ``wrap`` gets None where the original modules would run, and may return it. Observers nest: the inner one wraps what runs, the
    outer one wraps the result. For the whole process, as :class:`use_backend`.
    """

    def __init__(self, wrap: Callable[[Backend | None], Backend | None]) -> None:
        self._wrap = wrap

    def __enter__(self) -> None:
        _observers.append(self._wrap)

    def __exit__(self, *exc: object) -> None:
        _observers.remove(self._wrap)


def is_observed() -> bool:
    """Whether somebody looks at what every block runs on."""
    return bool(_observers)


def load(name: str) -> Backend | str:
    """The backend, or a sentence that says why it cannot be imported. Raises KeyError for an unknown name."""
    if name not in _loaded:
        source = _entries[name].source
        if isinstance(source, Backend):
            _loaded[name] = source
        else:
            try:
                _loaded[name] = importlib.import_module(source).BACKEND
            except ImportError as error:
                _loaded[name] = f"cannot be imported: {error}"
    return _loaded[name]


def get(name: str) -> Backend:
    """The backend called ``name``. Raises BackendError where it cannot be imported."""
    backend = load(name)
    if isinstance(backend, str):
        raise BackendError(f"backend {name!r} {backend}")
    return backend


def why_not(name: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """None where backend ``name`` serves maps of ``dtype`` on ``device``, else the reason."""
    backend = load(name)
    return backend if isinstance(backend, str) else backend.supports(device, dtype)


def _why_unusable(name: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """As :func:`why_not`, or what was found out at the first use, which this may be."""
    return why_not(name, device, dtype) or get(name).distrusts(device, dtype)


def resolve(device: torch.device, dtype: torch.dtype) -> Backend | None:
    """The backend for maps of ``dtype`` on ``device`` (or what observes it); None where the original modules should run.

    Raises BackendError where a backend that was asked for cannot serve them.
    """
    chosen = _choose(device, dtype)
    for wrap in reversed(_observers):
        chosen = wrap(chosen)
    return chosen


def _choose(device: torch.device, dtype: torch.dtype) -> Backend | None:
    if _override is None:
        return _automatic(device, dtype)
    reason = _why_unusable(_override, device, dtype)
    if reason is not None:
        raise BackendError(
            f"backend {_override!r} was asked for, but {reason}; found a {dtype} tensor on {device}. "
            'Use fusedres.use_backend("auto"), or unset FUSEDRES_BACKEND.'
        )
    return get(_override)


@functools.cache
def _automatic(device: torch.device, dtype: torch.dtype) -> Backend | None:
    """The first of the registered backends that is for ``device`` and serves ``dtype`` there; asked at every call of a block."""
    for entry in _entries.values():
        if device.type in entry.devices and _why_unusable(entry.name, device, dtype) is None:
            return get(entry.name)
    return None


def backends(device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> dict[str, str]:
    """For every backend ``"available"``, or why it cannot serve maps of ``dtype`` on ``device``."""
    return {name: why_not(name, torch.device(device), dtype) or "available" for name in _entries}


_override = _check(os.environ.get("FUSEDRES_BACKEND") or None)
