"""Whole models with dependent launches off and on (``FUSEDRES_DEPENDENT_LAUNCHES``): whether they change a bit, and what a step takes.

    python -m bench.dependent --json results/gpu/pdl.json     (on a GPU of compute capability 9.0 or newer)

First the bits: from the same state and images a step leaves the same output, gradients and running statistics, by Triton's launcher, from
tapes and by CUDA graphs. The arithmetic is the same, no kernel here is atomic, and cuDNN is told to be deterministic; where two steps with
launches off differ already, the library is not, and nothing is claimed. A difference means that a kernel read what was not written yet.
Then the time of a step, without an optimizer, off and on in turns.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from torch import Tensor, nn

import fusedres
from fusedres.kernels import launch, requests
from fusedres.trial.timing import Step, in_turns, seconds_per_call
from fusedres.tuning.override import use_plan

from . import environment, models, report

#: steps whose bits are compared: the first is launched by Python, the second recorded, the others played
STEPS = 6
#: of a round, for each way
SECONDS = 0.1


class Setting(NamedTuple):
    """A plan of convolutions, the images of a step, and whether a step is CUDA graphs."""

    plan: str
    batch: int
    graphs: bool


#: the bits of every kernel first; then what a user has, at a size where launches count and at one where they hardly do
SETTINGS = (
    Setting("fused", 32, False),
    *(Setting("auto", batch, graphs) for batch in (32, 256) for graphs in (False, True)),
)

Forward = Callable[[Tensor], Tensor]


def step(model: nn.Module, forward: Forward, x: Tensor, mode: str) -> Tensor:
    """One step, by ``forward`` of the model: its output."""
    if mode == "infer":
        with torch.no_grad():
            return forward(x)
    model.zero_grad(set_to_none=True)
    y = forward(x)
    y.float().square().mean().backward()
    return y


def results(model: nn.Module, forward: Forward, x: Tensor, mode: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """All that a step from ``state`` leaves, by name."""
    model.load_state_dict(state)
    found = {"output": step(model, forward, x, mode).detach()}
    found |= {f"gradient of {n}": p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {name: value.clone() for name, value in (found | dict(model.named_buffers())).items()}


def different(a: dict[str, Tensor], b: dict[str, Tensor]) -> list[str]:
    """The names of what has not the same bits."""
    return [name for name in a if not torch.equal(a[name], b[name])]


def compared(model: nn.Module, ways: dict[bool, Forward], x: Tensor, mode: str) -> dict[str, Any]:
    """The bits of steps on, beside those of a step off; and which launches Python made for the first of them."""
    state = {name: value.clone() for name, value in model.state_dict().items()}
    found = functools.partial(results, model, x=x, mode=mode, state=state)
    with launch.dependent_launches(False):
        off = found(ways[False])
        repeatable = not different(off, found(ways[False]))
    wrong: dict[str, None] = {}
    with launch.dependent_launches(True):
        for _ in range(STEPS):
            wrong |= dict.fromkeys(different(off, found(ways[True])))
    model.load_state_dict(state)
    return {"repeatable": repeatable, "different": list(wrong)}


def made(model: nn.Module, x: Tensor, mode: str, setting: Setting) -> tuple[dict[bool, Forward], dict[str, int]]:
    """A forward with dependent launches off and one with them on, compiled; and of the launches of a step, or of a capture's, that Python
    makes in this thread, how many there are with them on, and how many are dependent."""
    told: list[bool] = []

    def note(request: requests.Request | None, operands: Sequence[Tensor | None]) -> None:
        told.append(request is not None and request.dependent)

    ways: dict[bool, Forward] = {}
    for on in (False, True):
        told.clear()
        # a backward's launches are made in this thread, which is observed
        with launch.dependent_launches(on), torch.autograd.set_multithreading_enabled(False), requests.observed(note):
            if x.device.type == "cuda":
                fusedres.precompile(model, x)
            with torch.set_grad_enabled(mode == "train"):
                ways[on] = fusedres.graphed(model, x) if setting.graphs else model
            step(model, ways[on], x, mode)
    return ways, {"launches": len(told), "dependent": sum(told)}


def timed(model: nn.Module, ways: dict[bool, Forward], x: Tensor, mode: str, rounds: int) -> dict[str, list[float]]:
    """The seconds of a step in each round, off and on."""

    def way(on: bool) -> Callable[[], None]:
        def call() -> None:
            with launch.dependent_launches(on):
                step(model, ways[on], x, mode)

        return call

    steps = {on: Step(way(on)) for on in ways}
    for one in steps.values():
        one.call()
        one.calls = max(1, round(SECONDS / seconds_per_call(one.call, 1, x.device)))
    in_turns(list(steps.values()), rounds, x.device, lambda i: None)
    return {"off_seconds": steps[False].seconds, "on_seconds": steps[True].seconds}


def measure(name: str, mode: str, setting: Setting, settings: models.Settings) -> dict[str, Any]:
    """The record of a model in a mode; of what fails its failure instead of figures."""
    record: dict[str, Any] = {"model": name, "mode": mode, **setting._asdict(), "failure": None}
    try:
        x = settings.place(torch.randn(setting.batch, 3, settings.resolution, settings.resolution))
        model = fusedres.convert(models.build_model(name, x, settings)).train(mode == "train")
        with use_plan(setting.plan), torch.backends.cudnn.flags(enabled=True, deterministic=True):
            ways, counts = made(model, x, mode, setting)
            record |= counts | compared(model, ways, x, mode)
            record |= timed(model, ways, x, mode, settings.rounds)
    except Exception as error:  # such as too little memory: the other records are worth having
        record["failure"] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    return record


def is_wrong(record: dict[str, Any], expected: bool) -> bool:
    """Whether it failed, has other bits, or has launches that are not dependent where they are ``expected`` to be."""
    if record["failure"]:
        return True
    missing = expected and not 0 < record["launches"] == record["dependent"]
    return missing or (record["repeatable"] and bool(record["different"]))


def cells(record: dict[str, Any]) -> dict[str, str]:
    """A record as a row of a table."""
    setting = {
        "model": record["model"], "mode": record["mode"], "plan": record["plan"], "batch": str(record["batch"]),
        "graphs": "yes" if record["graphs"] else "",
    }  # fmt: skip
    if record["failure"]:
        return setting | dict.fromkeys(("dependent", "off ms", "on ms", "off to on"), "") | {"bits": record["failure"]}
    off, on = record["off_seconds"], record["on_seconds"]
    ratios = [a / b for a, b in zip(off, on, strict=True)]
    wrong = record["different"]
    bits = f"{len(wrong)} tensors differ, {wrong[0]} first" if wrong else "the same"
    return setting | {
        "dependent": f"{record['dependent']} of {record['launches']}",
        "off ms": f"{1e3 * statistics.median(off):.3f}",
        "on ms": f"{1e3 * statistics.median(on):.3f}",
        "off to on": f"{statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})",
        "bits": bits if record["repeatable"] else f"{bits}, off is not repeatable",
    }


def markdown(records: Sequence[dict[str, Any]]) -> list[str]:
    """The lines of bench.gpu's page."""
    rows = [cells(r) for r in records]
    return ["", "## pdl: dependent launches off and on", "", *report.markdown_table(rows).splitlines()] if rows else []


def main(arguments: list[str] | None = None) -> int:
    """The command line; 1 where something has failed, or has other bits than without."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["resnet50", "densenet121"], help="torchvision models")
    parser.add_argument("--modes", nargs="+", choices=("train", "infer"), default=["train", "infer"])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help="tiny images, for a rehearsal")
    parser.add_argument("--json", type=Path, help="write the records to this file, each when it is there")
    args = parser.parse_args(arguments)
    device = torch.device(args.device)
    with launch.dependent_launches(True):
        expected = launch.arch_of(device).dependent
    if device.type == "cuda" and not expected:
        print("remark: this GPU has no dependent launches")
        return 0
    settings = models.Settings(
        resolution=32 if args.quick else 224,
        dtype=torch.float32 if args.quick else torch.bfloat16,
        device=device,
        rounds=args.rounds,
    )
    where = environment.describe(device, environment.command("bench.dependent", arguments))
    records: list[dict[str, Any]] = []
    for setting in (Setting("auto", 2, False),) if args.quick else SETTINGS:
        for name in args.models:
            for mode in args.modes:
                records.append(measure(name, mode, setting, settings) | {"environment": where})
                print(" ".join(cells(records[-1]).values()), flush=True)
                if args.json:
                    args.json.write_text(json.dumps(records, indent=1) + "\n")
                if device.type == "cuda":
                    torch.cuda.empty_cache()
    Console(width=160).print(report.console_table([cells(r) for r in records], "Dependent launches off and on"))
    return int(any(is_wrong(r, expected) for r in records))


if __name__ == "__main__":
    raise SystemExit(main())
