"""Bytes of a training step: what is kept from forward to backward, and the highest amount alive at any moment."""

from __future__ import annotations

import json
import tempfile
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile


class _Kept:
    """A tensor on its way from forward to backward; lives as long as the graph holds it."""

    __slots__ = ("__weakref__", "tensor")

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


@contextmanager
def count_kept(model: nn.Module, batch: int) -> Iterator[Callable[[], int]]:
    """Count what the forward inside the block keeps; the yielded function gives the bytes kept at the moment of its call.

    Counted are whole storages, each once, of every saved tensor with a batch dimension: two dimensions or more, the first
    of size ``batch``. Parameters and buffers are not, nor copies of them in another dtype, which autocast makes.
    """
    own = [*model.parameters(), *model.buffers()]
    own_storages = {t.untyped_storage().data_ptr() for t in own}
    own_shapes = {t.shape for t in own if t.dim() > 1}
    alive: weakref.WeakSet[_Kept] = weakref.WeakSet()

    def pack(tensor: Tensor) -> _Kept:
        # detached: a node that keeps its own output would otherwise keep itself, and never be freed
        kept = _Kept(tensor.detach())
        alive.add(kept)
        return kept

    def total() -> int:
        storages = {}
        for kept in alive:
            t = kept.tensor
            storage = t.untyped_storage()
            if t.dim() > 1 and t.shape[0] == batch and t.shape not in own_shapes:
                storages[storage.data_ptr()] = storage.nbytes()
        return sum(size for pointer, size in storages.items() if pointer not in own_storages)

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept.tensor):
        yield total


def _cpu_peak(step: Callable[[], object], smallest: int) -> int:
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    changes = sorted((e for e in events if e.get("name") == "[memory]"), key=lambda event: event["ts"])
    alive: dict[int, int] = {}
    peak = 0
    for size, address in ((change["args"]["Bytes"], change["args"]["Addr"]) for change in changes):
        if abs(size) < smallest:
            continue
        # the profiler also reports the end of what lay at an address when an earlier profile ended
        if size > 0:
            alive[address] = size
        else:
            alive.pop(address, None)
        peak = max(peak, sum(alive.values()))
    return peak


def peak_bytes(step: Callable[[], object], device: torch.device, smallest: int = 0) -> int:
    """The most bytes that were alive during ``step()`` beyond those alive before it.

    On a GPU as the allocator counts them; on a CPU as the profiler sees PyTorch's allocations, without oneDNN's scratch space,
    and without those of fewer than ``smallest`` bytes.
    """
    if device.type != "cuda":
        return _cpu_peak(step, smallest)
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    step()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before
