"""Many models at many sizes: where a converted model is fastest against eager, and where it gains least.

    python -m bench.sweep --out results

Every cell is the median of paired ratios to eager, as in :mod:`bench.models`, of a converted model. Writes sweep.json (the
records of both contenders) and sweep.md (the table, with the smallest ratio of each mode).
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console

from . import environment, models, report
from .networks import NETWORKS

MODELS = (
    "resnet18", "resnet34", "resnet50", "resnet101", "resnext50_32x4d", "wide_resnet50_2",
    "densenet121", "densenet169", "densenet201", "mobilenet_v2", "mobilenet_v3_large", "efficientnet_b0", "regnet_y_400mf",
    "shufflenet_v2_x1_0", *NETWORKS,
)  # fmt: skip
WORDS = {"train": "Training", "infer": "Inference"}


def grid(records: Sequence[dict], mode: str) -> list[dict[str, str]]:
    """A row per model, a column per batch and resolution: the ratio to eager of the fused records of ``mode``."""
    fused = [r for r in records if r["mode"] == mode and r["contender"] == "fused"]
    return [
        {"model": model}
        | {
            f"{r['batch']} x {r['resolution']} px": "failed" if r["failure"] else f"{r['ratio_to_eager']:.2f}x"
            for r in sorted(same, key=lambda r: (r["resolution"], r["batch"]))
        }
        for model, same in report.by_key(fused, lambda r: r["model"]).items()
    ]


def smallest(records: Sequence[dict], mode: str) -> str:
    """The least ratio of ``mode``, in words."""
    fused = [r for r in records if r["mode"] == mode and r["contender"] == "fused" and not r["failure"]]
    r = min(fused, key=lambda r: r["ratio_to_eager"])
    return f"{r['ratio_to_eager']:.3f}x ({r['model']}, batch {r['batch']}, {r['resolution']} px)"


def show(records: Sequence[dict], console: Console) -> None:
    """The tables on the console."""
    for mode in dict.fromkeys(r["mode"] for r in records):
        title = f"{WORDS[mode]}, ratio to eager; smallest {smallest(records, mode)}"
        console.print(report.console_table(grid(records, mode), title))


def page(records: Sequence[dict]) -> str:
    """The tables as Markdown."""
    parts = ["# Converted models against eager, over sizes"]
    for mode in dict.fromkeys(r["mode"] for r in records):
        parts += [
            f"## {WORDS[mode]}, {records[0]['dtype']}",
            report.markdown_table(grid(records, mode)),
            f"Smallest: {smallest(records, mode)}.",
        ]
    parts += ["Cells are medians of paired ratios to eager in one process; columns are batch and resolution."]
    parts += ["## How it was measured", *report.by_key(records, lambda r: report.environment_list(r["environment"]))]
    return "\n\n".join(parts) + "\n"


def main(arguments: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", type=models.known_model, default=MODELS, help="torchvision models")
    parser.add_argument("--modes", nargs="+", choices=tuple(WORDS), default=tuple(WORDS))
    parser.add_argument("--batch", type=int, nargs="+", default=(1, 8, 32))
    parser.add_argument("--resolution", type=int, nargs="+", default=(64, 160), help="pixels")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("results"), help="folder of sweep.json and sweep.md")
    args = parser.parse_args(arguments)
    settings = models.Settings(
        dtype=getattr(torch, args.dtype),
        device=torch.device(args.device),
        rounds=args.rounds,
        seconds_per_round=0.1,
        parity_draws=0,
        bytes=False,
    )
    console = models.new_console()
    where = environment.describe(settings.device, environment.command("bench.sweep", arguments))
    records: list[dict] = []
    for batch, resolution in itertools.product(args.batch, args.resolution):
        console.print(f"batch {batch}, {resolution} px")
        at = dataclasses.replace(settings, batch=batch, resolution=resolution)
        records += models.run(args.models, args.modes, ("eager", "fused"), at, where, console)
        models.save(records, args.out / "sweep.json")
    show(records, console)
    (args.out / "sweep.md").write_text(page(records))
    console.print(f"table: {args.out / 'sweep.md'}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
