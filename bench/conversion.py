"""How long ``fusedres.convert`` takes, with its proof and without: of large models, each built anew for every conversion.

    python -m bench.conversion                      # five large models: table and JSON into results/
    python -m bench.conversion --models resnet50    # others, of torchvision or, where it does not know them, of timm

Seconds of the processor on one thread, which are those of the clock where nothing else runs: a median of several conversions, with and
without the proof in turn; beside it how many modules run fused.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import nn

import fusedres
from fusedres.swap import FusedBlock

from . import environment, report

MODELS = ("resnet152", "densenet121", "densenet201", "regnet_y_16gf", "dpn92")


def build(name: str) -> nn.Module:
    """The model of that name; SystemExit where neither library knows it."""
    if name in torchvision.models.list_models():
        return torchvision.models.get_model(name)
    try:
        import timm
    except ImportError:
        raise SystemExit(f"torchvision has no model {name}, and timm is not installed") from None
    if not timm.is_model(name):
        raise SystemExit(f"neither torchvision nor timm has a model {name}")
    return timm.create_model(name)


def measure(name: str, repeats: int) -> dict[str, Any]:
    """The record of one model."""
    seconds: dict[bool, list[float]] = {True: [], False: []}
    model = nn.Module()
    for _ in range(repeats):
        for verify in (True, False):
            model = build(name)
            start = time.process_time()
            fusedres.convert(model, verify=verify)
            seconds[verify].append(time.process_time() - start)
    return {
        "model": name,
        "parameters": sum(p.numel() for p in model.parameters()),
        "fused": sum(isinstance(m, FusedBlock) for m in model.modules()),
        "with_proof": round(statistics.median(seconds[True]), 3),
        "without": round(statistics.median(seconds[False]), 3),
    }


def table(records: list[dict[str, Any]]) -> str:
    """The records as a Markdown table."""
    lines = [
        "| model | parameters | fused modules | convert | without the proof |",
        "|---|---:|---:|---:|---:|",
    ]
    for r in records:
        lines.append(
            f"| {r['model']} | {r['parameters'] / 1e6:.1f} M | {r['fused']} | {r['with_proof']:.2f} s | {r['without']:.2f} s |"
        )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path, default=Path("results"), help="folder for the table and the JSON")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    measure("resnet18", 1)  # what is imported and parsed once
    records = []
    for name in options.models:
        records.append(measure(name, options.repeats))
        print(f"{name} {records[-1]['with_proof']} s", file=sys.stderr, flush=True)
    text = table(records)
    print(text)
    options.output.mkdir(parents=True, exist_ok=True)
    about = environment.describe(torch.device("cpu"), environment.command("bench.conversion", arguments))
    stem = options.output / "conversion"
    stem.with_suffix(".json").write_text(json.dumps({"environment": about, "models": records}, indent=1) + "\n")
    stem.with_suffix(".md").write_text(
        f"Processor seconds that `fusedres.convert` takes, on one thread.\n\n{text}\n\n{report.environment_list(about)}\n"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
