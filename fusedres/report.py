"""``report``: what became of a model, block by block."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import nn

from .backends.select import resolve
from .blocks import BlockState, kind_key, kind_of, parts_of
from .convert import candidates, left_alone
from .dry_run import follow
from .errors import Unsupported
from .recognition import norm_types
from .swap import resume, state_of


@dataclass(frozen=True)
class Row:
    """One block of a report: ``path`` in the model, ``kind``, whether it is ``fused``, and by what or why not in ``detail``.

    After a call: ``routes``, pairs of a convolution's name and ``"fused"`` (a kernel of ours) or ``"library"`` (oneDNN's or cuDNN's between
    our passes), as ``forward/dgrad/wgrad`` where these differ. ``nchw``: whether the block was given maps that are not channels_last, each
    of which costs a copy in and one out. After a call in training: ``kept`` bytes for backward, and ``eager_kept``, what the same modules
    keep in eager. Counted are the maps that the block reads and makes but for its output, which counts where it is read, and small vectors;
    not parameters, and not what runs unfused inside a block.
    """

    path: str
    kind: str
    fused: bool
    detail: str
    routes: tuple[tuple[str, str], ...] = ()
    kept: int | None = None
    eager_kept: int | None = None
    nchw: bool = False

    def agrees(self, other: Row) -> bool:
        """Whether a table may show both as one: neighbours of a kind with the same outcome."""
        ours, theirs = (row.path.rpartition(".")[0] for row in (self, other))
        said = [(r.kind, r.fused, r.detail, r.routes, r.nchw, r.kept is None) for r in (self, other)]
        return said[0] == said[1] and bool(ours) and ours == theirs


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
                *self._advice(),
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
            else (_mib(sum(r.kept or 0 for r in group)), _mib(sum(r.eager_kept or 0 for r in group)))
        )
        plans = ", ".join(f"{name} {plan}" for name, plan in first.routes)
        return path, first.kind, "yes" if first.fused else "no", first.detail, plans, *kept

    def _kept(self) -> list[str]:
        trained = [row for row in self if row.kept is not None]
        if not trained:
            return []
        kept, eager = sum(row.kept or 0 for row in trained), sum(row.eager_kept or 0 for row in trained)
        less = f" ({100 * (1 - kept / eager):.0f} % less)" if kept < eager else ""
        return [
            f"kept for backward by the last call: {_mib(kept)} MiB, by the same modules in eager {_mib(eager)} MiB{less}"
        ]

    def _advice(self) -> list[str]:
        converted = sum(row.nchw for row in self)
        if not converted:
            return []
        return [
            f"{converted} of them {'was' if converted == 1 else 'were'} given maps that are not channels_last, which are converted: "
            "model.to(memory_format=torch.channels_last) saves that"
        ]


def why_not_fused(module: nn.Module) -> str | None:
    """Why ``module``, a fused block, would not run fused as it stands, before any input is seen."""
    try:
        for part in parts_of(module):
            part.describe(None)
    except Unsupported as reason:
        return str(reason)
    return None


def report(model: nn.Module) -> Report:
    """What :func:`~fusedres.convert` did, block by block: fused and by which backend, or why not.

    Before a block's first call the backend is that which serves its parameters; after it, what the last call really did, and after one in
    training also the bytes that it kept for backward (:class:`Row`). Raises TypeError if ``model`` is no ``nn.Module``.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"report expects a torch.nn.Module, found {type(model).__name__}")
    rows = Report()
    for path, module, key in candidates(model):
        row = _row(path, resume(module), key)
        if row is not None:
            rows.append(row)
    for path, module, reason in left_alone(model):
        if _has_norm_of_its_own(module):
            rows.append(Row(path, "left alone", False, reason))
    return rows


def _has_norm_of_its_own(module: nn.Module) -> bool:
    """Whether there is a BatchNorm inside ``module`` that belongs to no fused block."""
    if kind_key(module) is not None:
        return False
    return isinstance(module, norm_types()) or any(map(_has_norm_of_its_own, module.children()))


def _row(path: str, module: nn.Module, key: str) -> Row | None:
    state = state_of(module)
    if state is None:
        kind = kind_of(key)
        label = kind.label(module, BlockState(kind))
        return Row(path, label, False, "not converted: call fusedres.convert(model)")
    label, reason = state.kind.label(module, state), why_not_fused(module)
    if reason is not None:
        return Row(path, label, False, reason)
    if not parts_of(module):
        return None  # it only hands over what its children make
    if state.outcome is not None:
        followed = follow(module, state)
        row = Row(path, label, state.outcome.fused, str(state.outcome))
        if followed is None:
            return row
        return replace(row, routes=followed.routes, kept=followed.kept, eager_kept=followed.eager, nchw=followed.nchw)
    parameter = next(module.parameters(), torch.empty(0))
    backend = resolve(parameter.device, parameter.dtype)
    if backend is None:
        none = f"no fused backend serves {parameter.dtype} on {parameter.device}; see python -m fusedres doctor"
        return Row(path, label, False, none)
    return Row(path, label, True, backend.name)
