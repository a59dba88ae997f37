"""``precompile``: the kernels of a model's step compiled in parallel, before its first call would compile them in a row."""

from __future__ import annotations

import copy
import threading
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..backends import select
from ..backends.contract import Backend
from .step import run_step, tensors_of


def precompile(model: nn.Module, *example: object, **keywords: object) -> int:
    """Compile in parallel every Triton kernel that the converted ``model`` launches for ``model(*example, **keywords)`` by the plans that
    hold now, and keep them in Triton's cache on disk; returns how many.

    A first call compiles its kernels one after the other, which takes minutes for a large model on a machine with an empty cache. Nothing
    runs here: the step is followed on meta tensors, of a model in training mode also backward. Returns 0 where the triton backend would
    not run. Raises TypeError for what is no module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"precompile expects a torch.nn.Module, found {type(model).__name__}")
    first = next((t for t in (*tensors_of(example), *tensors_of(keywords)) if t.is_floating_point()), None)
    backend = None if first is None else select.resolve(first.device, first.dtype)
    if first is None or backend is None or backend.tuner is None:
        return 0
    return backend.tuner.compile(followed(backend, model, example, keywords, first.device), first.device)


def followed(
    backend: Backend,
    model: nn.Module,
    example: tuple[object, ...],
    keywords: Mapping[str, object],
    device: torch.device,
) -> list[Any]:
    """The launches of one step on ``device``, from meta tensors."""

    def to_meta(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.detach().to("meta").requires_grad_(value.requires_grad)
        if isinstance(value, Mapping):
            return {name: to_meta(v) for name, v in value.items()}
        return type(value)(map(to_meta, value)) if isinstance(value, (list, tuple)) else value

    # a copy whose tensors have no values: what deepcopy finds in its memo it does not copy
    memo: dict[int, Any] = {id(b): b.to("meta") for b in model.buffers()}
    memo |= {id(p): nn.Parameter(p.detach().to("meta"), p.requires_grad) for p in model.parameters()}
    twin, thread = copy.deepcopy(model, memo), threading.get_ident()

    # no backend serves meta tensors by itself; what other threads run is theirs
    def wrap(inner: Backend | None) -> Backend | None:
        return backend if threading.get_ident() == thread else inner

    with select.use_backend(None), select.observe(wrap), backend.tuner.recording(device) as launches:
        run_step(twin, to_meta(example), to_meta(keywords))
    return launches
