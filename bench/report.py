"""The harness' records as a picture and a Markdown page.

    python -m bench.report results/models.json --out results

Writes report.png (speed relative to eager, bytes kept for backward and peak memory, of every contender in every model and mode) and
report.md (the same as tables, with the machine, the versions, the commit and the command). Contenders of another setting (device, batch,
resolution, dtype) are never compared with each other; what failed is shown as failed.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.table import Table

from . import models

MIB = models.MIB
#: distinct also to the colour-blind (Okabe and Ito 2008), and in every picture the same
COLOURS = {
    "eager": "#9a9a9a",
    "compile": "#e69f00",
    "compile-freezing": "#d55e00",
    "fused": "#0072b2",
    "fused+compile": "#009e73",
    "fused-recompute": "#56b4e9",
    "fused-prepacked": "#00356b",
    "memory_efficient": "#cc79a7",
    "openvino": "#7f5fa8",
    "onnxruntime": "#b2912f",
}
OTHER_COLOURS = ("#f0e442", "#4d4d4d")
INK, FAINT, ALARM = "#222222", "#8a8a8a", "#c1121f"


@dataclass(frozen=True)
class Row:
    """A line of the picture: a heading of a ``level``, or a record."""

    text: str
    level: int = 0
    record: dict | None = None
    eager: dict | None = None


def by_key(records: Sequence[dict], key) -> dict[object, list[dict]]:
    """The records by ``key(record)``, in the order of their first appearance."""
    found: dict[object, list[dict]] = {}
    for record in records:
        found.setdefault(key(record), []).append(record)
    return found


def _settings(records: Sequence[dict]) -> dict[object, list[dict]]:
    """The records that may be compared, by their setting in words."""
    machines = {_machine(r) for r in records}

    def words(record: dict) -> str:
        return (f"{_machine(record)}: " if len(machines) > 1 else "") + models.setting(record)

    return by_key(records, words)


def _machine(record: dict) -> str:
    where = record["environment"]
    return where["device"] if where["cuda"] else f"{where['device']}, {where['cpu_capability']}"


def _eager(records: Sequence[dict]) -> dict | None:
    return next((r for r in records if r["contender"] == "eager"), None)


def _rows(records: Sequence[dict]) -> Iterator[Row]:
    settings = _settings(records)
    for words, same in settings.items():
        if len(settings) > 1:
            yield Row(words, level=1)
        for (model, mode), group in by_key(same, lambda r: (r["model"], r["mode"])).items():
            yield Row(f"{model}, {'training' if mode == 'train' else 'inference'}", level=2)
            for record in group:
                yield Row(record["contender"], record=record, eager=_eager(group))


def per_image(record: dict | None, what: str) -> float | None:
    """Bytes of a step as MiB per image, None where not measured."""
    size = None if record is None else record[what]
    return None if size is None else size / record["batch"] / MIB


def relative(record: dict, eager: dict | None, what: str) -> float | None:
    """A figure of bytes over eager's; None for eager itself and where one of both is missing."""
    if eager is None or record is eager or record[what] is None or not eager[what]:
        return None
    return record[what] / eager[what]


def _number(value: float) -> str:
    """Three digits or more, so that neither 2 nor 2000 images a second lose what matters."""
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _speed(row: Row, ratios: bool) -> tuple[float | None, str, tuple[float, float] | None]:
    """Length of the bar, its label, its range."""
    r = row.record
    if r["images_per_s"] is None:
        return None, "", None
    rate = f"{_number(r['images_per_s'])} images/s"
    if not ratios:
        return r["images_per_s"], rate, None
    if r["ratio_to_eager"] is None:
        return None, f"{rate}, without eager beside it", None
    label = rate if r is row.eager else f"{r['ratio_to_eager']:.2f}x   {rate}"
    return r["ratio_to_eager"], label, None if r is row.eager else tuple(r["ratio_range"])


def _memory(row: Row, what: str) -> tuple[float | None, str, None]:
    value, ratio = per_image(row.record, what), relative(row.record, row.eager, what)
    if value is None:
        return None, "", None
    return value, f"{_number(value)} MiB" if ratio is None else f"{ratio:.2f}x   {_number(value)} MiB", None


def _colours(records: Sequence[dict]) -> dict[str, str]:
    others = cycle(OTHER_COLOURS)
    names = dict.fromkeys(r["contender"] for r in records)
    return {name: COLOURS[name] if name in COLOURS else next(others) for name in names}


def _panel(axes: Axes, rows: Sequence[Row], bars: Sequence[tuple], colours: dict[str, str], title: str) -> None:
    """One panel: a bar for every record, labelled with its value."""
    longest = max((span[1] if span else value or 0 for value, _, span in bars), default=0) or 1
    axes.set_title(title, loc="left", fontsize=10, color=INK, pad=8)
    # room for the labels behind the longest bar
    axes.set_xlim(0, longest * 1.75)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    gap = longest * 0.025
    for y, (row, (value, label, span)) in enumerate(zip(rows, bars, strict=True)):
        if row.record is None:
            continue
        end = value or 0
        if value is not None:
            axes.barh(y, value, height=0.78, color=colours[row.record["contender"]])
        if span is not None:
            axes.hlines(y, *span, color=INK, linewidth=1.1)
            axes.vlines(span, y - 0.16, y + 0.16, color=INK, linewidth=1.1)
            end = span[1]
        failed = not label and row.record["failure"]
        colour = ALARM if failed else INK
        text = f"failed: {row.record['failure'].partition(':')[0]}" if failed else label
        # on white, for the lines of the grid not to cross it
        plate = {"facecolor": "white", "edgecolor": "none", "pad": 0.8} if text else None
        axes.text(end + gap, y, text, va="center", fontsize=8.5, color=colour, bbox=plate)
    axes.tick_params(axis="x", labelsize=8, colors=FAINT, length=0)
    axes.tick_params(axis="y", labelsize=9, colors=INK, length=0)
    axes.grid(axis="x", color="#e4e4e4", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.set_facecolor("none")
    axes.spines[:].set_visible(False)
    axes.spines["left"].set(visible=True, color=FAINT)


def draw(records: Sequence[dict], heading: str) -> Figure:
    """The picture: a line per record, a panel per figure."""
    rows, colours = list(_rows(records)), _colours(records)
    ratios = any(r["ratio_to_eager"] is not None for r in records)
    panels = {
        "Speed relative to eager, range over rounds" if ratios else "Images per second": [
            (None, "", None) if row.record is None else _speed(row, ratios) for row in rows
        ]
    }
    memory = {"Kept for backward, per image": "kept_for_backward_bytes", "Peak memory, per image": "peak_bytes"}
    for title, what in memory.items():
        if any(r[what] is not None for r in records):
            panels[title] = [(None, "", None) if row.record is None else _memory(row, what) for row in rows]

    figure = Figure(figsize=(2.2 + 3.8 * len(panels), 1.25 + 0.235 * len(rows)), dpi=150, layout="constrained")
    figure.get_layout_engine().set(wspace=0.03, h_pad=0.08)
    grid = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axes, (title, bars) in zip(grid, panels.items(), strict=True):
        _panel(axes, rows, bars, colours, title)
        axes.tick_params(axis="y", labelleft=axes is grid[0])
        for y, row in enumerate(rows):
            if row.level:
                axes.axhspan(y - 0.5, y + 0.5, color="#dfe5ea" if row.level == 1 else "#f1f3f5", linewidth=0, zorder=0)
    failed = [row.record is not None and models.cells(row.record)["parity"].startswith("failed") for row in rows]
    names = [
        "" if row.level else f"{row.text}: parity failed" if bad else row.text
        for row, bad in zip(rows, failed, strict=True)
    ]
    grid[0].set_yticks(range(len(rows)), names)
    for label, bad in zip(grid[0].get_yticklabels(), failed, strict=True):
        if bad:
            label.set_color(ALARM)
    for y, row in enumerate(rows):
        if row.level:
            at = grid[0].get_xlim()[1] * 0.012
            grid[0].text(at, y, row.text, va="center", fontsize=9.5, weight="bold", color=INK)
        elif ratios:
            grid[0].vlines(1, y - 0.5, y + 0.5, color=INK, linewidth=0.9, linestyle=(0, (4, 3)))
    figure.suptitle(heading, x=0.008, ha="left", fontsize=13, weight="bold", color=INK)
    figure.supxlabel("   ".join(_caption(records)), x=0.008, ha="left", fontsize=8, color=FAINT)
    return figure


def _caption(records: Sequence[dict]) -> Iterator[str]:
    where, settings = records[0]["environment"], _settings(records)
    yield f"{where['device']}, {where['threads']} threads" if len(settings) == 1 else f"{len(settings)} settings"
    if len(settings) == 1:
        yield next(iter(settings))
    yield f"torch {where['torch']}, fusedres {where['fusedres']}" + (f" ({where['commit']})" if where["commit"] else "")
    yield where["date"][:10]


#: columns of words; all others are numbers
LEFT = ("model", "contender", "parity", "remark", "primitive")


def console_table(rows: Sequence[dict[str, str]], title: str) -> Table:
    """Rows as a table for a terminal."""
    table = Table(title=title)
    for head in rows[0]:
        table.add_column(head, justify="left" if head in LEFT else "right")
    for row in rows:
        table.add_row(*row.values())
    return table


def markdown_table(rows: Sequence[dict[str, str]]) -> str:
    """Rows as a Markdown table, without columns that nobody fills."""
    heads = [head for head in rows[0] if any(row[head] for row in rows)]
    lines = [heads, [":--" if head in LEFT else "--:" for head in heads]]
    lines += [[row[head].replace("|", "\\|") for head in heads] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cells(record: dict, eager: dict | None) -> dict[str, str]:
    shared = models.cells(record)

    def memory(what: str) -> str:
        value, ratio = per_image(record, what), relative(record, eager, what)
        return "" if value is None else _number(value) + ("" if ratio is None else f" ({ratio:.2f}x)")

    speed = shared["to eager"]
    if speed and record is not eager:
        speed = f"**{speed}** ({record['ratio_range'][0]:.2f} to {record['ratio_range'][1]:.2f})"
    return {
        "model": record["model"],
        "contender": record["contender"],
        "images/s": "" if record["images_per_s"] is None else _number(record["images_per_s"]),
        "to eager": speed,
        "kept, MiB per image": memory("kept_for_backward_bytes"),
        "peak, MiB per image": memory("peak_bytes"),
        "compile s": shared["compile s"],
        "parity": shared["parity"],
        "remark": f"failed: {record['failure']}" if record["failure"] else shared["remark"],
    }


def _tables(records: Sequence[dict]) -> Iterator[str]:
    settings = _settings(records)
    for words, same in settings.items():
        for mode, group in by_key(same, lambda r: r["mode"]).items():
            title = {"train": "Training", "infer": "Inference"}.get(mode, mode)
            yield f"## {title}: {words}"
            eager = {r["model"]: r for r in group if r["contender"] == "eager"}
            yield markdown_table([_cells(r, eager.get(r["model"])) for r in group])


def environment_list(where: dict) -> str:
    """The machine, the versions and the command, as a list."""
    packages = ("torch", "triton", "torchvision", "fusedres", "python")
    versions = ", ".join(f"{name} {where[name]}" for name in packages if where[name])
    cuda = f", CUDA {where['cuda']}" if where["cuda"] else f", {where['threads']} threads, {where['cpu_capability']}"
    lines = (
        f"Command: `{where['command']}`",
        f"Machine: {where['device']}{cuda}",
        f"Versions: {versions}",
        f"Commit: {where['commit'] or 'not in a checkout'}",
        f"Date: {where['date']}",
    )
    return "\n".join(f"- {line}" for line in lines)


def write_report(
    records: Sequence[dict], folder: Path, heading: str = "ResNet and DenseNet, side by side", extra_markdown: str = ""
) -> tuple[Path, Path]:
    """Write report.md and report.png of the harness' records into ``folder``, which is made where missing; returns both paths.

    ``extra_markdown`` goes below the heading. Raises ValueError where there are no records.
    """
    if not records:
        raise ValueError("no records: nothing to report")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    page, picture = folder / "report.md", folder / "report.png"
    draw(records, heading).savefig(picture, facecolor="white")
    parts = [f"# {heading}", extra_markdown, f"![{heading}: speed and memory of every contender]({picture.name})"]
    parts += _tables(records)
    reading = (
        "Speeds are medians over the rounds; contenders take turns in one process, and a ratio is the median of the ratios of the same "
        "round, with its range over the rounds in brackets. Kept is what forward leaves for backward, peak the most that is alive in a "
        "step beyond weights and images; beside both, the ratio to eager."
    )
    if any(r["parity"] for r in records):
        reading += " Parity: errors against float64 of outputs, gradients and running statistics are at most twice eager's own."
    parts += [reading, "## How it was measured"]
    parts += by_key(records, lambda r: environment_list(r["environment"]))
    page.write_text("\n\n".join(part for part in parts if part) + "\n")
    return page, picture


def main(arguments: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("records", type=Path, nargs="+", metavar="FILE.json", help="records of bench.models")
    parser.add_argument("--out", type=Path, help="folder of the report; default that of the first file")
    parser.add_argument("--heading", default="ResNet and DenseNet, side by side")
    args = parser.parse_args(arguments)
    try:
        records = [record for file in args.records for record in json.loads(file.read_text())]
        page, picture = write_report(records, args.out or args.records[0].parent, args.heading)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    print(f"report: {page} and {picture}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
