"""What a trial has found, for people: a table and a picture."""

from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from .measure import Row, Trial

_MIB = 2**20
_COLOURS = {"eager": "#9aa5b1", "fused": "#0b7285", "fused, recompute": "#66a9b5", "torch.compile": "#e8a33d"}


def _mib(size: int | None) -> str:
    return "" if size is None else f"{size / _MIB:.1f}"


def _cells(row: Row) -> tuple[str, ...]:
    if row.ratio is None or row.ratio_range is None:
        return row.mode, row.contender, "", "", "", "", row.failure or ""
    least, most = row.ratio_range
    speed = f"{row.ratio:.2f}x"
    spread = "" if row.contender == "eager" else f"{least:.2f} to {most:.2f}"
    return row.mode, row.contender, f"{row.images_per_s:.1f}", speed, spread, _mib(row.kept_bytes), _mib(row.peak_bytes)


def show(trial: Trial, console: Console) -> None:
    """The blocks, the parity and the table of ``trial`` on the console."""
    console.print(str(trial.report), highlight=False, markup=False)
    for mode, verification in trial.parity.items():
        verdict = "passed" if verification.holds else "FAILED"
        console.print(f"parity, {mode}: {verdict}: {verification}", highlight=False, markup=False)
    table = Table("mode", "contender", title=_title(trial))
    for name in ("images/s", "to eager", "range", "kept MiB", "peak MiB"):
        table.add_column(name, justify="right")
    for row in trial.rows:
        table.add_row(*_cells(row))
    console.print(table)


def _title(trial: Trial) -> str:
    s = trial.setting
    size = " x ".join(map(str, s.size))
    dtype = f"{str(s.dtype).removeprefix('torch.')}{' by autocast' if s.amp else ''}"
    return f"batch {s.batch}, {size}, {dtype}, {s.device}{'' if s.channels_last else ', contiguous'}"


def draw(trial: Trial, heading: str, path: Path) -> None:
    """The picture of ``trial``: speeds beside eager, and the memory of a step, one bar per contender and mode."""
    rows = [row for row in trial.rows if row.ratio is not None]
    panels = {
        "speed, relative to eager": [(row.ratio or 0.0, f"{row.ratio:.2f}x") for row in rows],
        "peak memory of a step, MiB": [((row.peak_bytes or 0) / _MIB, _mib(row.peak_bytes)) for row in rows],
        "kept for backward, MiB": [((row.kept_bytes or 0) / _MIB, _mib(row.kept_bytes)) for row in rows],
    }
    figure = Figure(figsize=(11, 1.3 + 0.34 * len(rows)), dpi=150, layout="constrained")
    grid = figure.subplots(1, len(panels), sharey=True)
    for axes, (title, bars) in zip(grid, panels.items(), strict=True):
        values = [value for value, _ in bars]
        drawn = axes.barh(range(len(rows)), values, color=[_COLOURS[row.contender] for row in rows])
        axes.bar_label(drawn, [label for _, label in bars], padding=3, fontsize=8)
        axes.set_xlim(0, 1.2 * max([*values, 1e-9]))
        axes.set_title(title, loc="left", fontsize=9)
        axes.tick_params(labelsize=8, length=0)
        axes.spines[["top", "right", "bottom"]].set_visible(False)
        axes.set_xticks([])
    grid[0].axvline(1, color="black", linewidth=0.8, linestyle=(0, (4, 3)))
    grid[0].set_yticks(range(len(rows)), [f"{row.mode}: {row.contender}" for row in rows])
    grid[0].invert_yaxis()
    figure.suptitle(f"{heading}: {_title(trial)}", x=0.01, ha="left", fontsize=11)
    figure.savefig(path)
