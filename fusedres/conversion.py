"""``convert``, ``revert`` and ``report``: fusing an existing model in place, and what became of it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import nn

from .blocks import FusedBlock, FusedSequential, conv_runs, fused_class, is_converted
from .describe import Unsupported


def _torchvision(module: str, name: str) -> type | None:
    # a model of torchvision's can only be given where torchvision is loaded
    return getattr(sys.modules.get(f"torchvision.models.{module}"), name, None)


def _has_own(cls: type, base: type | None, *methods: str) -> bool:
    """Whether ``cls`` is ``base`` as far as ``methods`` go: a subclass that overrides one of them computes something else."""
    return base is not None and issubclass(cls, base) and all(getattr(cls, m) is getattr(base, m) for m in methods)


def _is_sequential(module: nn.Module) -> bool:
    return _has_own(type(module), nn.Sequential, "forward") and bool(conv_runs(list(module)))


# kind, where its class stands in torchvision, and the methods that the fused forward replaces
_FAMILIES: tuple[tuple[str, str, str, tuple[str, ...]], ...] = (
    ("basic block", "resnet", "BasicBlock", ("forward",)),
    ("bottleneck", "resnet", "Bottleneck", ("forward",)),
    ("resnet stem", "resnet", "ResNet", ("forward", "_forward_impl")),
    ("dense block", "densenet", "_DenseBlock", ("forward",)),
    ("transition", "densenet", "_Transition", ("forward",)),
    ("densenet head", "densenet", "DenseNet", ("forward",)),
)


def kind_of(module: nn.Module) -> str | None:
    """The kind of fused block that ``module`` can become, None where it is none."""
    if isinstance(module, FusedBlock):
        return type(module).kind
    if "forward" in module.__dict__:
        return None
    for kind, file, name, methods in _FAMILIES:
        if _has_own(type(module), _torchvision(file, name), *methods):
            return kind
    return "sequential" if _is_sequential(module) else None


def _candidates(model: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """``(path, module, kind)``; what stands inside a residual or dense block belongs to that block."""
    inside: set[int] = set()
    for path, module in model.named_modules():
        if id(module) in inside:
            continue
        kind = kind_of(module)
        if kind is None:
            continue
        if kind in ("basic block", "bottleneck", "dense block", "transition"):
            inside.update(id(m) for m in module.modules() if m is not module)
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
    for _, module, kind in list(_candidates(model)):
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
            for name in ("_fusedres_last", "_fusedres_recompute"):
                module.__dict__.pop(name, None)
            module.__class__ = module.original_class()
    return model


@dataclass(frozen=True)
class Row:
    """One block of a report: ``path`` in the model, ``kind``, whether it is ``fused``, and by what or why not in ``detail``."""

    path: str
    kind: str
    fused: bool
    detail: str


class Report(list[Row]):
    """The blocks of a model; ``str()`` is a table."""

    def __str__(self) -> str:
        if not self:
            return "fusedres: no residual or dense block found"
        head = ("module", "kind", "fused", "by what, or why not")
        cells = [head, *((r.path or "(model)", r.kind, "yes" if r.fused else "no", r.detail) for r in self)]
        widths = [max(len(row[i]) for row in cells) for i in range(3)]
        lines = ["  ".join((*(c.ljust(w) for c, w in zip(row, widths, strict=False)), row[3])) for row in cells]
        lines.insert(1, "  ".join("-" * w for w in (*widths, max(len(row[3]) for row in cells))))
        fused = sum(r.fused for r in self)
        return "\n".join([*lines, f"{fused} of {len(self)} blocks fused"])


def _static_reason(module: FusedBlock) -> str | None:
    """Why ``module`` would not run fused as it stands, before any input is seen."""
    describers: list[Callable[[], object]] = [lambda: module.describe_block(None)]
    if isinstance(module, FusedSequential):
        children = list(module)
        describers = [
            lambda run=children[start:stop]: module.describe_block(None, run) for start, stop in conv_runs(children)
        ]
    for describe_part in describers:
        try:
            describe_part()
        except Unsupported as reason:
            return str(reason)
    return None


def report(model: nn.Module) -> Report:
    """What :func:`convert` did, block by block: fused and by which backend, or why not.

    Before a block's first call the backend is that which serves its parameters; after it, what the last call really did. Raises TypeError
    if ``model`` is no ``nn.Module``.
    """
    from . import dispatch

    if not isinstance(model, nn.Module):
        raise TypeError(f"report expects a torch.nn.Module, found {type(model).__name__}")
    rows = Report()
    for path, module, kind in _candidates(model):
        if not isinstance(module, FusedBlock):
            rows.append(Row(path, kind, False, "not converted: call fusedres.convert(model)"))
            continue
        reason = _static_reason(module)
        last = module._fusedres_last
        if reason is not None:
            rows.append(Row(path, kind, False, reason))
        elif last is not None:
            rows.append(Row(path, kind, not last.startswith("original"), last))
        else:
            parameter = next(module.parameters(), torch.empty(0))
            backend = dispatch.resolve(parameter.device, parameter.dtype)
            none = f"no fused backend serves {parameter.dtype} on {parameter.device}; see python -m fusedres doctor"
            rows.append(Row(path, kind, backend is not None, none if backend is None else backend.name))
    return rows
