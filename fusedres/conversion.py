"""``convert``, ``revert`` and ``report``: fusing an existing model in place, and what became of it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from . import memory, structure
from .blocks import (
    FusedBlock,
    FusedDenseBlock,
    FusedResidual,
    FusedSyncNorm,
    FusedTransition,
    conv_runs,
    fused_class,
    is_converted,
)
from .describe import Hooked, is_transition, layout, module_parts, tokens
from .memory import Unsupported


def _class(module: str, name: str) -> type | None:
    # a model of torchvision's can only be given where torchvision is loaded
    return getattr(sys.modules.get(module), name, None)


def _has_own(cls: type, base: type | None, *methods: str) -> bool:
    """Whether ``cls`` is ``base`` as far as ``methods`` go: a subclass that overrides one of them computes something else."""
    return base is not None and issubclass(cls, base) and all(getattr(cls, m) is getattr(base, m) for m in methods)


def _is_sequential(module: nn.Module) -> bool:
    return _has_own(type(module), nn.Sequential, "forward") and bool(conv_runs(list(module)))


#: where a module keeps what has been read of its structure
_PLANS = ("_fusedres_plans", "_fusedres_layers")

# kind, where its class stands, and the methods that the fused forward replaces
_FAMILIES: tuple[tuple[str, str, str, tuple[str, ...]], ...] = (
    ("basic block", "torchvision.models.resnet", "BasicBlock", ("forward",)),
    ("bottleneck", "torchvision.models.resnet", "Bottleneck", ("forward",)),
    ("resnet stem", "torchvision.models.resnet", "ResNet", ("forward", "_forward_impl")),
    ("dense block", "torchvision.models.densenet", "_DenseBlock", ("forward",)),
    ("densenet head", "torchvision.models.densenet", "DenseNet", ("forward",)),
    ("dense block", "timm.models.densenet", "DenseBlock", ("forward",)),
)


def kind_of(module: nn.Module) -> str | None:
    """The kind of fused block that ``module`` can become by its class, None where it is none."""
    if isinstance(module, FusedBlock):
        return type(module).kind
    if "forward" in module.__dict__:
        return None
    for kind, file, name, methods in _FAMILIES:
        if _has_own(type(module), _class(file, name), *methods):
            return kind
    if _is_transition(module):
        return FusedTransition.kind
    return "sequential" if _is_sequential(module) else None


def _is_transition(module: nn.Module) -> bool:
    if not _has_own(type(module), nn.Sequential, "forward") or len(module) not in (3, 4):
        return False
    try:
        return is_transition(tokens(module, tuple(module._modules)))
    except Unsupported:
        return False


def _dense_layers(row: nn.Sequential) -> dict[str, dict[bool, structure.Plan]]:
    """The plans of the dense layers at the end of a row."""
    layers: dict[str, dict[bool, structure.Plan]] = {}
    for name, child in reversed(list(row.named_children())):
        plans = structure.read(child)
        if plans is None or not all(plan.dense for plan in plans.values()):
            break
        layers[name] = plans
    return dict(reversed(layers.items()))


def _structure(module: nn.Module) -> tuple[str, dict] | None:
    """``(kind, attributes)`` of a module whose structure is that of a block, None where it is not."""
    if "forward" in module.__dict__:
        return None
    if _has_own(type(module), nn.Sequential, "forward"):
        layers = _dense_layers(module)
        return (FusedDenseBlock.kind, {"_fusedres_layers": layers}) if layers else None
    plans = structure.read(module)
    if plans is None or any(plan.dense for plan in plans.values()):
        return None
    is_row = all(plan.shortcut is None for plan in plans.values())
    transition = is_row
    for training, plan in plans.items():
        try:
            layout(module, plan, training)
            transition = transition and is_transition(tokens(module, plan.main))
        except Hooked:
            transition = False
        except Unsupported:
            return None
    if is_row and not transition and not any(isinstance(child, nn.Conv2d) for child in module.children()):
        return None  # a network, maybe: its parts are rows themselves
    return FusedTransition.kind if transition else FusedResidual.kind, {"_fusedres_plans": plans}


def _may_be_read(module: nn.Module, kind: str | None, blocks: set[int]) -> bool:
    if isinstance(module, FusedBlock):
        return not module.__dict__.keys().isdisjoint(_PLANS)  # convert again reads again
    if kind == "sequential" or kind is None and _has_own(type(module), nn.Sequential, "forward"):
        return bool(module) and id(module[-1]) in blocks  # a row of dense layers has any length
    return kind is None and id(module) in blocks


def _inside(module: nn.Module, kind: str) -> Iterator[nn.Module]:
    """What belongs to a block and is not converted on its own."""
    if "_fusedres_plans" in module.__dict__:
        for plan in module._fusedres_plans.values():
            yield from module_parts(module, plan)
    elif kind == FusedDenseBlock.kind and "_fusedres_layers" in module.__dict__:
        for name in module._fusedres_layers:
            yield from module.get_submodule(name).modules()
    elif kind not in ("resnet stem", "densenet head", "sequential"):
        yield from (m for m in module.modules() if m is not module)


def _candidates(model: nn.Module, read: bool = False) -> Iterator[tuple[str, nn.Module, str]]:
    """``(path, module, kind)``; what stands inside a residual or dense block belongs to that block. With ``read`` modules that no kind
    knows are read for their structure, and those that have a plan get it."""
    inside: set[int] = set()
    blocks = structure.blocks(model) if read else set()
    for path, module in model.named_modules():
        if id(module) in inside:
            continue
        kind = kind_of(module)
        if kind == FusedSyncNorm.kind:
            continue
        if read and _may_be_read(module, kind, blocks):
            found = _structure(module)
            if found is not None and (found[0] == kind or not isinstance(module, FusedBlock)):
                kind, attributes = found
                module.__dict__.update(attributes)
        if kind is None:
            continue
        inside.update(id(m) for m in _inside(module, kind))
        yield path, module, kind


def convert(model: nn.Module, *, recompute: bool = False) -> nn.Module:
    """Fuse the residual and dense blocks of ``model`` in place, and return it.

    Modules keep their children, parameters, buffers, hooks and names: an optimizer made before goes on working and checkpoints load both
    ways. What cannot be fused runs its original modules; :func:`report` says why. Raises TypeError if ``model`` is no ``nn.Module``.

    ``recompute``: backward runs the 1x1 convolutions again instead of keeping their outputs, which saves about half of the memory kept for
    backward; statistics and running statistics are those of the first run. Convert a part of a model (or convert again) to set it there.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"convert expects a torch.nn.Module, found {type(model).__name__}")
    for module in model.modules():
        if type(module) is nn.SyncBatchNorm:  # inside of blocks as well, for when those run their original modules
            module.__class__ = fused_class(FusedSyncNorm.kind, nn.SyncBatchNorm)
    for _, module, kind in list(_candidates(model, read=True)):
        if not isinstance(module, FusedBlock):
            module.__class__ = fused_class(kind, type(module))
        module._fusedres_recompute = recompute
    return model


def revert(model: nn.Module) -> nn.Module:
    """Undo :func:`convert` in place, and return the model."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"revert expects a torch.nn.Module, found {type(model).__name__}")
    for module in model.modules():
        if is_converted(module):
            for name in (memory.KEY, "_fusedres_last", "_fusedres_calls", "_fusedres_recompute", *_PLANS):
                module.__dict__.pop(name, None)
            module.__class__ = module.original_class()
    return model


@dataclass(frozen=True)
class Row:
    """One block of a report: ``path`` in the model, ``kind``, whether it is ``fused``, and by what or why not in ``detail``.

    After a call: ``plans``, pairs of a convolution's name and ``"fused"`` (kernel) or ``"vendor"`` (between fused passes), as
    ``forward/dgrad/wgrad`` where these differ, where the backend has plans. After a call in training: ``kept`` bytes for backward, and
    ``eager_kept``, what the same modules keep in eager. Counted are the maps that the block reads and makes but for its output, which
    counts where it is read, and small vectors; not parameters, and not what runs unfused inside a block.
    """

    path: str
    kind: str
    fused: bool
    detail: str
    plans: tuple[tuple[str, str], ...] = ()
    kept: int | None = None
    eager_kept: int | None = None

    def agrees(self, other: Row) -> bool:
        """Whether a table may show both as one: neighbours of a kind with the same outcome."""
        ours, theirs = (row.path.rpartition(".")[0] for row in (self, other))
        same = (self.kind, self.fused, self.detail, self.plans) == (other.kind, other.fused, other.detail, other.plans)
        return same and bool(ours) and ours == theirs and (self.kept is None) == (other.kept is None)


def _mib(size: int) -> str:
    return f"{size / 2**20:.1f}" if size < 100 * 2**20 else f"{size / 2**20:.0f}"


class Report(list[Row]):
    """The blocks of a model; ``str()`` is a table, in which neighbours that agree share a line."""

    def __str__(self) -> str:
        if not self:
            return "fusedres: no residual or dense block found"
        groups: list[list[Row]] = []
        for row in self:
            if groups and groups[-1][-1].agrees(row):
                groups[-1].append(row)
            else:
                groups.append([row])
        head = ("module", "kind", "fused", "by what, or why not", "plan", "kept, MiB", "in eager")
        cells = [head, *map(self._line, groups)]
        # columns that nobody fills are left out
        filled = [i for i in range(len(head)) if any(line[i] for line in cells[1:])]
        widths = {i: max(len(line[i]) for line in cells) for i in filled}
        cells.insert(1, tuple("-" * widths.get(i, 0) for i in range(len(head))))
        lines = [
            "  ".join(line[i].rjust(widths[i]) if i > 4 else line[i].ljust(widths[i]) for i in filled) for line in cells
        ]
        return "\n".join(
            [
                *(line.rstrip() for line in lines),
                *self._kept(),
                f"{sum(r.fused for r in self)} of {len(self)} blocks fused",
            ]
        )

    @staticmethod
    def _line(group: list[Row]) -> tuple[str, ...]:
        first, last = group[0], group[-1]
        path = f"{first.path} to {last.path}" if len(group) > 1 else first.path or "(model)"
        kept = (
            ("", "")
            if first.kept is None
            else (_mib(sum(r.kept for r in group)), _mib(sum(r.eager_kept for r in group)))
        )
        plans = ", ".join(f"{name} {plan}" for name, plan in first.plans)
        return path, first.kind, "yes" if first.fused else "no", first.detail, plans, *kept

    def _kept(self) -> list[str]:
        trained = [row for row in self if row.kept is not None]
        if not trained:
            return []
        kept, eager = (sum(getattr(row, name) for row in trained) for name in ("kept", "eager_kept"))
        less = f" ({100 * (1 - kept / eager):.0f} % less)" if kept < eager else ""
        return [
            f"kept for backward by the last call: {_mib(kept)} MiB, by the same modules in eager {_mib(eager)} MiB{less}"
        ]


def why_not_fused(module: FusedBlock) -> str | None:
    """Why ``module`` would not run fused as it stands, before any input is seen."""
    try:
        for part in module.parts():
            part.describe(None)
    except Unsupported as reason:
        return str(reason)
    return None


def report(model: nn.Module) -> Report:
    """What :func:`convert` did, block by block: fused and by which backend, or why not.

    Before a block's first call the backend is that which serves its parameters; after it, what the last call really did, and after one in
    training also the bytes that it kept for backward (:class:`Row`). Raises TypeError if ``model`` is no ``nn.Module``.
    """
    from . import dispatch, following

    if not isinstance(model, nn.Module):
        raise TypeError(f"report expects a torch.nn.Module, found {type(model).__name__}")
    rows = Report()
    for path, module, kind in _candidates(model):
        if not isinstance(module, FusedBlock):
            rows.append(Row(path, kind, False, "not converted: call fusedres.convert(model)"))
            continue
        kind, reason = module.label(), why_not_fused(module)
        last = module._fusedres_last
        if reason is not None:
            rows.append(Row(path, kind, False, reason))
        elif last is not None:
            followed = following.follow(module)
            more = () if followed is None else (followed.plans, followed.kept, followed.eager)
            rows.append(Row(path, kind, not last.startswith("original"), last, *more))
        else:
            parameter = next(module.parameters(), torch.empty(0))
            backend = dispatch.resolve(parameter.device, parameter.dtype)
            none = f"no fused backend serves {parameter.dtype} on {parameter.device}; see python -m fusedres doctor"
            rows.append(Row(path, kind, backend is not None, none if backend is None else backend.name))
    return rows
