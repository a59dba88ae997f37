"""Which backend runs: chosen by device, dtype and what is installed, or by the user.

Order of preference: ``triton`` (GPUs), ``cpp`` (CPU), ``eager`` (plain PyTorch). In automatic choice a block for which only ``eager`` is
left runs its original modules, because unfused primitives would only be slower; asked for by name, ``eager`` runs the fused schedule on
plain PyTorch primitives, which is the oracle of every test.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from types import ModuleType

import torch

NAMES = ("triton", "cpp", "eager")
_override: str | None = None
_observer: Callable[[ModuleType | None], object] | None = None
_loaded: dict[str, ModuleType | str] = {}


class BackendError(RuntimeError):
    """A backend was asked for by name and cannot serve this device or dtype."""


def _check(name: str | None) -> str | None:
    if name is not None and name not in (*NAMES, "auto"):
        raise ValueError(f"unknown backend {name!r}: expected one of {', '.join(NAMES)}, 'auto' or None")
    return None if name == "auto" else name


class use_backend:
    """Choose the backend of every fused block by name, or ``None`` / ``"auto"`` for automatic choice.

    Works at once and for the whole process; as a context manager it restores the previous choice on exit. The environment variable
    ``FUSEDRES_BACKEND`` sets the initial choice. Raises ValueError for an unknown name; a backend that cannot serve a tensor raises
    :class:`BackendError` when a block runs.

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
    """Put ``wrap(backend)`` in the place of the backend that each block would run on, inside a ``with``: how calls are counted and timed.

    ``wrap`` gets the backend module, or None where the original modules would run, and returns an object with the same functions.
    """

    def __init__(self, wrap: Callable[[ModuleType | None], object]) -> None:
        self._wrap = wrap

    def __enter__(self) -> None:
        global _observer
        _observer = self._wrap

    def __exit__(self, *exc: object) -> None:
        global _observer
        _observer = None


def load(name: str) -> ModuleType | str:
    """The backend module, or a sentence that says why it cannot be imported."""
    if name not in _loaded:
        try:
            _loaded[name] = importlib.import_module(f".backends.{name}", __package__)
        except ImportError as error:
            _loaded[name] = f"cannot be imported: {error}"
    return _loaded[name]


def why_not(name: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """None where backend ``name`` serves maps of ``dtype`` on ``device``, else the reason."""
    module = load(name)
    return module if isinstance(module, str) else module.supports(device, dtype)


def resolve(device: torch.device, dtype: torch.dtype) -> ModuleType | None:
    """The backend for maps of ``dtype`` on ``device`` (or what observes it); None where the original modules should run.

    Raises BackendError where a backend that was asked for cannot serve them.
    """
    chosen = _choose(device, dtype)
    return chosen if _observer is None else _observer(chosen)


def _choose(device: torch.device, dtype: torch.dtype) -> ModuleType | None:
    if _override is not None:
        reason = why_not(_override, device, dtype)
        if reason is not None:
            raise BackendError(
                f"backend {_override!r} was asked for, but {reason}; found a {dtype} tensor on {device}. "
                'Use fusedres.use_backend("auto"), or unset FUSEDRES_BACKEND.'
            )
        return load(_override)
    # interpreted Triton on CPU tensors is for tests: only when asked for
    names = ("cpp",) if device.type == "cpu" else ("triton", "cpp")
    for name in names:
        if why_not(name, device, dtype) is None:
            return load(name)
    return None


def backends(device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> dict[str, str]:
    """For every backend ``"available"``, or why it cannot serve maps of ``dtype`` on ``device``."""
    return {name: why_not(name, torch.device(device), dtype) or "available" for name in NAMES}


_override = _check(os.environ.get("FUSEDRES_BACKEND") or None)
