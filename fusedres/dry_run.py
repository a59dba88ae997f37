"""What a block's last call kept for backward, and which way its convolutions went: found afterwards, on meta tensors.

A call only leaves the sizes of its maps behind. From them each part of the block is run anew, forward and backward, without values: by its
autograd block, and by the description's reference in plain PyTorch. What autograd saves on either way is counted.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .backends.contract import Backend, Wrapped
from .backends.eager import BACKEND as EAGER
from .backends.layout import format_of
from .backends.select import load
from .blocks import BlockState, CallRecord, parts_of
from .blocks.base import with_recompute
from .errors import Unsupported
from .recognition import Part
from .specs import BlockSpec, Conv


class Followed(NamedTuple):
    """``kept``: bytes that the last call kept for backward, None where it was none in training; ``eager``: those that the same modules
    keep in eager; ``routes``: each convolution's, by name, where the backend has a choice; ``nchw``: whether a map had to be converted."""

    kept: int | None
    eager: int | None
    routes: tuple[tuple[str, str], ...]
    nchw: bool


#: the routes of a convolution by ``"forward"``, ``"dgrad"`` and ``"wgrad"``, by the storage of its weight
_Routes = dict[int, dict[str, str]]
_Storages = dict[int, torch.UntypedStorage]
_Maps = dict[tuple[int, torch.Size], Tensor]


def _key(tensor: Tensor) -> int:
    """What all views of a tensor share."""
    return tensor.untyped_storage()._cdata


class _Noting(Wrapped):
    """The plain primitives, which take meta tensors; notes by which routes another backend would run the convolutions."""

    def __init__(self, asked: Backend, found: _Routes) -> None:
        super().__init__(EAGER)
        self._asked, self._found = asked, found

    def call(self, primitive: str, *args: Any, **kwargs: Any) -> Any:
        routes = self._asked.routes(primitive, *args, **kwargs)
        if routes:
            weight = next(a for a in (*args, *kwargs.values()) if isinstance(a, Tensor))
            noted = self._found.setdefault(_key(weight), {})
            for operation, route in routes.items():
                noted.setdefault(operation, route)
        return super().call(primitive, *args, **kwargs)


def _without_values(value: Any, known: dict[int, Tensor], dtype: torch.dtype, of_conv: bool = False) -> Any:
    """A description with meta tensors; ``dtype`` is what convolutions compute in, to which autocast casts their weights. ``known`` gets
    the meta tensors by the identities of those that they stand for."""
    if isinstance(value, Tensor):
        if id(value) not in known:
            # not empty_like: of a DTensor, whose shape is that of the whole, it would be another
            known[id(value)] = torch.empty_strided(
                value.shape, value.stride(), dtype=dtype if of_conv else value.dtype, device="meta",
                requires_grad=value.requires_grad,
            )  # fmt: skip
        return known[id(value)]
    if is_dataclass(value) and not isinstance(value, type):
        of_conv = isinstance(value, Conv)
        inside = {f.name: getattr(value, f.name) for f in fields(value)}
        return replace(value, **{n: _without_values(v, known, dtype, of_conv) for n, v in inside.items()})
    if dist.is_available() and isinstance(value, dist.ProcessGroup):
        return None  # what is followed in one process must not wait for others
    if type(value) is tuple:
        return tuple(_without_values(item, known, dtype) for item in cast(tuple[Any, ...], value))
    return value


def _saved(run: Callable[[], Tensor], own: list[Tensor], keeps_result: bool = False) -> tuple[Tensor, _Storages]:
    """``run()``, and the storages that it saves for backward, without those of ``own`` and, unless ``keeps_result``, without its result's:
    that is kept, if at all, by whoever reads it, and counted there."""
    saved: _Storages = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        saved[storage._cdata] = storage
        # detached: a node that keeps its own output would otherwise keep itself
        return tensor.detach()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = run()
    others = {_key(tensor) for tensor in (own if keeps_result else [*own, result])}
    return result, {key: storage for key, storage in saved.items() if key not in others}


def _bytes(parts: list[_Storages]) -> int:
    """Bytes of the storages of all parts, each once."""
    return sum(storage.nbytes() for storage in {k: s for part in parts for k, s in part.items()}.values())


def follow(block: nn.Module, state: BlockState) -> Followed | None:
    """What the last call of ``block`` kept and which way it ran; None where that was not fused, or the block has changed since."""
    if state.outcome is None or state.outcome.backend is None:
        return None
    backend = load(state.outcome.backend)
    if not isinstance(backend, Backend):
        return None
    try:
        # the last of a row may have been left to what is around it
        made = [(part, r) for part, r in zip(parts_of(block), state.records, strict=False) if r is not None]
        if not made or any(record.mode is not block.training for _, record in made):
            return None
        maps: _Maps = {}
        found = [_follow_part(block, state, part, record, backend, maps) for part, record in made]
    except (Unsupported, ValueError):  # as a call with the same maps would find now
        return None
    recorded = all(record.recorded for _, record in made)
    return Followed(
        _bytes([of_part.kept for of_part in found]) if recorded else None,
        _bytes([of_part.eager for of_part in found]) if recorded else None,
        tuple(route for of_part in found for route in of_part.routes),
        any(record.was_nchw for _, record in made),
    )


class _OfPart(NamedTuple):
    kept: _Storages
    eager: _Storages
    routes: tuple[tuple[str, str], ...]


def _follow_part(
    block: nn.Module, state: BlockState, part: Part, record: CallRecord, backend: Backend, block_maps: _Maps
) -> _OfPart:
    """One part; ``block_maps`` holds the maps of the parts before it."""
    known: dict[int, Tensor] = {}
    spec: BlockSpec = _without_values(part.describe(None)[0], known, record.dtype)
    spec = with_recompute(spec, state)
    maps: list[Tensor | None] = []
    for key, needed in zip(zip(record.identities, record.shapes, strict=True), record.needed, strict=True):
        if key not in block_maps:
            shape = key[1]
            empty = torch.empty(shape, dtype=record.dtype, device="meta", memory_format=format_of(len(shape)))
            block_maps[key] = empty.requires_grad_(needed)
        maps.append(block_maps[key])
    x, source = (*maps, None)[:2]
    assert x is not None
    spec.check(x, source)
    own, routes = list(known.values()), _Routes()
    noting, recording = _Noting(backend, routes), contextlib.nullcontext()
    if backend.tuner is not None:
        recording = backend.tuner.recording(record.device)
    kept: _Storages = {}
    eager: _Storages = {}
    with torch.set_grad_enabled(record.recorded), recording:
        if record.recorded:
            _, eager = _saved(lambda: spec.reference(x, source, *spec.tensors), own)
        y, kept = _saved(lambda: spec.run(noting, x, source)[0], own, record.copied)
        if y.requires_grad:
            y.backward(torch.empty_like(y))
    return _OfPart(kept, eager, _named(block, known, routes))


def _named(block: nn.Module, known: dict[int, Tensor], noted: _Routes) -> tuple[tuple[str, str], ...]:
    """Routes by the names of their convolutions, in the order of the forward: forward, dgrad and wgrad one by one where they differ."""
    names = {
        _key(known[id(parameter)]): path.removesuffix(".weight")
        for path, parameter in block.named_parameters()
        if id(parameter) in known
    }

    def words(routes: dict[str, str]) -> str:
        found = [routes[operation] for operation in ("forward", "dgrad", "wgrad") if operation in routes]
        return found[0] if len(set(found)) == 1 else "/".join(found)

    return tuple((names[key], words(routes)) for key, routes in noted.items() if key in names)
