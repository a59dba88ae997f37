"""What ``convert`` recognises: the share of the residual and dense blocks in a library's models, by family, on the meta device.

    python -m bench.coverage --library timm             # residual and dense models: table and JSON into results/
    python -m bench.coverage --library timm --all       # every registered model: does any raise?

A block counts as recognised where ``convert`` made it a fused block that would run its schedule, whole or in pieces, as it stands, or where
every BatchNorm in it stands in such a block: one without a shortcut is nothing but its rows.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from collections import defaultdict
from pathlib import Path

import torch
from torch import nn

import fusedres
from fusedres.report import why_not_fused
from fusedres.swap import FusedBlock, original_class

from . import environment, report

#: the modules of timm that hold residual or dense convolutional networks, and the classes of their blocks
FILES: dict[str, tuple[str, ...]] = {
    "resnet": ("BasicBlock", "Bottleneck"),
    "resnetv2": ("PreActBasic", "PreActBottleneck", "Bottleneck"),
    "densenet": ("DenseBlock", "DenseTransition"),
    "regnet": ("Bottleneck", "PreBottleneck"),
    "res2net": ("Bottle2neck",),
    "resnest": ("ResNestBottleneck",),
    "sknet": ("SelectiveKernelBasic", "SelectiveKernelBottleneck"),
    "hrnet": ("BasicBlock", "Bottleneck"),
    "dla": ("DlaBasic", "DlaBottleneck", "DlaBottle2neck"),
    "senet": ("SEBottleneck", "SEResNetBottleneck", "SEResNeXtBottleneck", "SEResNetBlock"),
    "dpn": ("DualPathBlock",),
    "vovnet": ("OsaBlock",),
    "xception": ("Block",),
    "selecsls": ("SelecSlsBlock",),
}


def family(name: str, file: str, model: nn.Module) -> str:
    """The family of a timm model, told by what its blocks are made of."""
    has_batch_norms = any(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    if file == "resnetv2":
        return "pre-activation (BatchNorm)" if has_batch_norms else "pre-activation (other norms)"
    if file != "resnet" and not has_batch_norms:
        return f"{file} (other norms)"
    if file == "regnet":
        return "RegNet-Z (pre-activation)" if "regnetz" in name or "regnetv" in name else "RegNet"
    if file != "resnet":
        return {"densenet": "DenseNet", "res2net": "Res2Net", "sknet": "SKNet", "resnest": "ResNeSt"}.get(file, file)
    blocks = [m for m in model.modules() if type(m).__name__ in FILES["resnet"]]
    if not any(isinstance(m, nn.BatchNorm2d) for m in blocks[0].modules()):
        return "ResNet (other norms)"
    acts = {type(getattr(block, a, None)).__name__ for block in blocks for a in ("act1", "act2")}
    if not acts <= {"ReLU", "NoneType"}:
        return "ResNet (other activations)"
    attention = {type(block.se).__name__ for block in blocks} - {"NoneType"}
    if attention:
        return "SE-ResNet" if attention <= {"SEModule"} else "ResNet with other attention"
    if any(block.conv2.groups > 1 for block in blocks):
        return "ResNeXt"
    if "wide" in name:
        return "Wide ResNet"
    first = [next(iter(block.downsample), None) for block in blocks if isinstance(block.downsample, nn.Sequential)]
    if any(type(module).__name__.startswith("AvgPool2d") for module in first):
        return "ResNet-D"
    return "ResNet"


def _all_inside(block: nn.Module) -> bool:
    """Whether there are BatchNorms in ``block``, all of them inside of fused blocks."""
    fused = [m for m in block.modules() if m is not block and isinstance(m, FusedBlock) and why_not_fused(m) is None]
    inside = {inner for m in fused for inner in m.modules()}
    norms = [m for m in block.modules() if isinstance(m, nn.BatchNorm2d)]
    return bool(norms) and all(norm in inside for norm in norms)


def sweep(names: list[str]) -> list[dict]:
    """One record per model: its family, its blocks, how many are recognised, why the others are not, or the error."""
    import timm
    from timm.models import _registry

    records = []
    for at, name in enumerate(names):
        file = _registry._model_to_module[name]
        record = {"model": name, "file": file}
        try:
            with torch.device("meta"):
                model = timm.create_model(name)
        except Exception as error:  # the library's own affair: some models cannot be built on the meta device
            records.append(record | {"skipped": f"{type(error).__name__}: {error}"[:200]})
            continue
        record["family"] = family(name, file, model) if file in FILES else "other"
        start = time.perf_counter()
        try:
            fusedres.convert(model, verify=False)  # without values there is nothing to prove
        except Exception as error:
            records.append(record | {"error": f"{type(error).__name__}: {error}"[:500]})
            continue
        record["seconds"] = round(time.perf_counter() - start, 3)
        record["fused"] = sum(isinstance(m, FusedBlock) for m in model.modules())
        reasons: dict[str, int] = defaultdict(int)
        total = 0
        for module in model.modules():
            original = original_class(module)
            if original.__name__ not in FILES.get(file, ()):
                continue
            total += 1
            reason = why_not_fused(module) if isinstance(module, FusedBlock) else "not recognised"
            if reason is not None and not _all_inside(module):
                reasons[reason] += 1
        records.append(
            record | {"blocks": total, "recognised": total - sum(reasons.values()), "reasons": dict(reasons)}
        )
        print(f"\r{at + 1}/{len(names)} {name:40.40}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return records


def table(records: list[dict]) -> str:
    """The share by family, as a Markdown table."""
    families: dict[str, list[dict]] = defaultdict(list)
    for record in records:
        if record.get("blocks"):
            families[record["family"]].append(record)
    lines = ["| family | models | blocks | recognised | share |", "|---|---:|---:|---:|---:|"]
    for name in sorted(families):
        found = families[name]
        blocks, recognised = (sum(r[key] for r in found) for key in ("blocks", "recognised"))
        lines.append(f"| {name} | {len(found)} | {blocks} | {recognised} | {100 * recognised / blocks:.1f} % |")
    errors = [r["model"] for r in records if "error" in r]
    skipped = [r["model"] for r in records if "skipped" in r]
    lines.append(
        f"\n{len(records)} models, {len(errors)} raised in convert{': ' + ', '.join(errors) if errors else ''}"
    )
    if skipped:
        lines.append(f"{len(skipped)} cannot be built on the meta device: {', '.join(skipped)}")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--library", choices=["timm"], default="timm")
    parser.add_argument("--all", action="store_true", help="every registered model, for errors alone")
    parser.add_argument("--models", nargs="*", help="only these")
    parser.add_argument("--output", type=Path, default=Path("results"), help="folder for the table and the JSON")
    options = parser.parse_args(arguments)
    import timm

    warnings.filterwarnings("ignore", module="timm")
    if options.models:
        names = options.models
    elif options.all:
        names = timm.list_models()
    else:
        names = [name for file in FILES for name in timm.list_models(module=file)]
    records = sweep(names)
    text = table(records)
    print(text)
    options.output.mkdir(parents=True, exist_ok=True)
    stem = options.output / f"coverage-{options.library}{'-all' if options.all else ''}"
    about = environment.describe(torch.device("cpu"), environment.command("bench.coverage", arguments))
    about |= {"library": options.library, "version": timm.__version__}
    stem.with_suffix(".json").write_text(json.dumps({"environment": about, "models": records}, indent=1) + "\n")
    stem.with_suffix(".md").write_text(
        f"Blocks of {options.library} {timm.__version__} that `convert` recognises.\n\n{text}\n\n{report.environment_list(about)}\n"
    )
    return 1 if any("error" in record for record in records) else 0


if __name__ == "__main__":
    sys.exit(main())
