"""What a block's last call kept for backward, and by which plans its convolutions ran: followed afterwards, on meta tensors.

A call only leaves the sizes of its maps behind. From them each part of the block is run anew, forward and backward, without values: by
its schedule, and by the schedule's reference in plain PyTorch. What autograd saves on either way is counted.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from . import dispatch
from .blocks import Call, FusedBlock
from .memory import Part, Unsupported
from .schedules import chain, dense, norm_pool
from .schedules.common import Conv


class Followed(NamedTuple):
    """``kept``: bytes that the last call kept for backward, None where it was none in training; ``eager``: those that the same modules
    keep in eager; ``plans``: each convolution's, by name, where the backend has plans."""

    kept: int | None
    eager: int | None
    plans: tuple[tuple[str, str], ...]


@dataclass
class _Noted:
    """A backend whose convolutions note their plans, by the identity of their weights."""

    inner: Any
    name: str
    plans: dict[int, dict[str, bool]]

    def __getattr__(self, name: str):
        return getattr(self.inner, name)

    def conv_forward(self, x, affine, act, weight, *rest, **more):
        plan = self.inner.forward_plan(x, affine, act, weight, *rest, **more)
        self.plans.setdefault(id(weight), {}).setdefault("forward", plan.fused)
        return self.inner.conv_forward(x, affine, act, weight, *rest, **more)

    def conv_backward(self, grad, raw, coeff, x, affine, saved, act, weight, *rest, need_dx=True, need_dw=True, **more):
        operands = (grad, raw, coeff, x, affine, saved, act, weight, *rest)
        needs = {"need_dx": need_dx, "need_dw": need_dw}
        dgrad, wgrad = self.inner.backward_plans(*operands, **needs, **more)
        noted = self.plans.setdefault(id(weight), {})
        noted |= {op: plan.fused for op, plan, need in (("dgrad", dgrad, need_dx), ("wgrad", wgrad, need_dw)) if need}
        return self.inner.conv_backward(*operands, **needs, **more)


class _StandIn:
    """The plain primitives, which take meta tensors, under another backend's name."""

    def __init__(self, name: str) -> None:
        self.inner, self.name = dispatch.load("eager"), name

    def __getattr__(self, name: str):
        return getattr(self.inner, name)


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
    if is_dataclass(value):
        of_conv = isinstance(value, Conv)
        inside = {f.name: getattr(value, f.name) for f in fields(value)}
        return replace(value, **{n: _without_values(v, known, dtype, of_conv) for n, v in inside.items()})
    if dist.is_available() and isinstance(value, dist.ProcessGroup):
        return None  # what is followed in one process must not wait for others
    if type(value) is tuple:
        return tuple(_without_values(item, known, dtype) for item in value)
    return value


def _reference(description: Any, x: Tensor, *beside: Tensor) -> Tensor:
    """The part in plain PyTorch."""
    if isinstance(description, chain.Chain):
        return chain.reference(description, x, beside[0] if beside else None, *description.tensors)
    if isinstance(description, norm_pool.NormPool):
        return norm_pool.reference(description, x, *description.tensors)
    return dense.reference(description, x, *(t for layer in description for t in layer.tensors))


_Storages = dict[int, torch.UntypedStorage]
_Maps = dict[tuple[int, torch.Size], Tensor]


def _saved(run: Callable[[], Tensor], own: list[Tensor]) -> _Storages:
    """The storages that ``run()`` saves for backward, without those of ``own`` and without its result's: that is kept, if at all, by
    whoever reads it, and counted there."""
    saved: _Storages = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        saved[storage._cdata] = storage
        # detached: a node that keeps its own output would otherwise keep itself
        return tensor.detach()

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = run()
    others = {tensor.untyped_storage()._cdata for tensor in (*own, result)}
    return {key: storage for key, storage in saved.items() if key not in others}


def _bytes(parts: list[_Storages | None]) -> int | None:
    """Bytes of the storages of all parts, each once; None where a part was not recorded."""
    if None in parts:
        return None
    return sum(storage.nbytes() for storage in {k: s for part in parts for k, s in part.items()}.values())


def _launching_nothing(device: torch.device):
    """A context in which kernels meant for ``device`` take meta tensors, their launches left out."""
    from .kernels import helpers

    return helpers.record(helpers.limits(device), device)


def follow(block: FusedBlock) -> Followed | None:
    """What the last call of ``block`` kept and by which plans it ran; None where that was not fused, or the block has changed since."""
    name = block._fusedres_last
    if name is None or name.startswith("original"):
        return None
    try:
        # the last of a row may have been left to what is around it
        made = [(p, call) for p, call in zip(block.parts(), block._fusedres_calls, strict=False) if call is not None]
        if not made or any(call.mode is not block.training for _, call in made):
            return None
        maps: _Maps = {}
        found = [_follow_part(block, part, call, name, maps) for part, call in made]
    except Unsupported:
        return None
    kept, eager, plans = zip(*found, strict=True)
    return Followed(_bytes(kept), _bytes(eager), tuple(plan for of_part in plans for plan in of_part))


def _follow_part(block: FusedBlock, part: Part, call: Call, name: str, block_maps: _Maps):
    """``(storages kept, by the same modules in eager, plans)`` of one part; ``block_maps`` holds the maps of the parts before it."""
    known: dict[int, Tensor] = {}
    description = _without_values(part.describe(None)[0], known, call.dtype)
    maps = []
    for key, needed in zip(zip(call.identities, call.shapes, strict=True), call.needed, strict=True):
        if key not in block_maps:
            empty = torch.empty(key[1], dtype=call.dtype, device="meta", memory_format=torch.channels_last)
            block_maps[key] = empty.requires_grad_(needed)
        maps.append(block_maps[key])
    kept = eager = None
    plans: dict[int, dict[str, bool]] = {}
    with torch.set_grad_enabled(call.recorded):
        if call.recorded:
            stand_in, own = _StandIn(name), list(known.values())
            kept = _saved(lambda: block.run_block(stand_in, description, *maps), own)
            eager = _saved(lambda: _reference(description, *maps), own)
        backend = dispatch.load(name)
        if hasattr(backend, "forward_plan"):
            with _launching_nothing(call.device):
                y = block.run_block(_Noted(backend, name, plans), description, *maps)
                if y.requires_grad:
                    y.backward(torch.empty_like(y))
    return kept, eager, _named(block, known, plans)


def _named(
    block: FusedBlock, known: dict[int, Tensor], noted: dict[int, dict[str, bool]]
) -> tuple[tuple[str, str], ...]:
    """Plans by the names of their convolutions, in the order of the forward: forward, dgrad and wgrad one by one where they differ."""
    names = {
        id(known[id(parameter)]): path.removesuffix(".weight")
        for path, parameter in block.named_parameters()
        if id(parameter) in known
    }

    def words(by_op: dict[str, bool]) -> str:
        found = ["fused" if by_op[op] else "vendor" for op in ("forward", "dgrad", "wgrad") if op in by_op]
        return found[0] if len(set(found)) == 1 else "/".join(found)

    return tuple((names[key], words(by_op)) for key, by_op in noted.items() if key in names)
