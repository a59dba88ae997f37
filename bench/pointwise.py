"""Both gradients of a 1x1 convolution by one kernel, beside a kernel for each and beside the library, for every one of a model's step.

    python -m bench.pointwise --model resnet50 densenet121 --batch 256 --json results/gpu/pointwise.json     (on a GPU)

Each way runs on random operands of the sizes, pitches and options of the call, with its default tiles. The floor is the time in which one
kernel's maps, each read or written once, move at the bandwidth of a large copy.
"""

from __future__ import annotations

import argparse
import collections
import json
from pathlib import Path

import torch
from rich.console import Console

import fusedres
from fusedres.backends import select
from fusedres.backends.contract import Backend, Wrapped
from fusedres.backends.triton import BACKEND, BUILD_ERRORS
from fusedres.tuning import estimate
from fusedres.tuning.convolutions import BOTH
from fusedres.tuning.plans import FUSED, LIBRARY, Problem

from . import environment, report, roofline

#: the ways, by what is asked of the tuner's call
WAYS = {"one kernel": (("backward",), FUSED), "two kernels": (BOTH, FUSED), "library": (BOTH, LIBRARY)}


class _Problems(Wrapped):
    """A backend that counts the calls for which one kernel could make both gradients."""

    def __init__(self, inner: Backend, found: collections.Counter[Problem]) -> None:
        super().__init__(inner)
        self._found = found

    def call(self, primitive, *args, **kwargs):
        """Note it, and run it."""
        self._found.update(p for p in BACKEND.tuner.problems(primitive, *args, **kwargs) if p.op == "backward")
        return super().call(primitive, *args, **kwargs)


def problems(model: str, batch: int, resolution: int, dtype: torch.dtype) -> collections.Counter[Problem]:
    """Of a training step, on meta tensors: how often each is met."""
    network = fusedres.convert(roofline.build(model, "meta", dtype, "train"), verify=False)
    x = torch.empty(batch, 3, resolution, resolution, dtype=dtype, device="meta")
    found: collections.Counter[Problem] = collections.Counter()
    with BACKEND.tuner.recording(torch.device("meta")), select.observe(lambda inner: _Problems(BACKEND, found)):
        y = network(x.to(memory_format=torch.channels_last))
        torch.autograd.grad(y.sum(), list(network.parameters()))
    return found


def measured(problem: Problem, device: torch.device, repeats: int) -> dict[str, float | None]:
    """The seconds of each way, None where it cannot be built."""
    found: dict[str, float | None] = {}
    for way, (needed, plan) in WAYS.items():
        call = BACKEND.tuner.call(problem, needed, plan, device)
        try:
            found[way] = roofline.best_of(call, device, repeats)
        except BUILD_ERRORS as error:
            print(f"{way} of {problem}: {error}")
            found[way] = None
    return found


def _microseconds(spent: float | None) -> str:
    return "failed" if spent is None else f"{spent * 1e6:.0f}"


def _ratio(a: float | None, b: float | None) -> str:
    return "" if a is None or b is None else f"{a / b:.2f}x"


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", default=["resnet50", "densenet121"], help="torchvision models")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--resolution", type=int, default=224)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--most", type=int, help="only so many of the problems, the largest ones")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    args = parser.parse_args(argv)
    dtype, device = getattr(torch, args.dtype), torch.device(args.device)
    bandwidth, _ = roofline.ceilings(dtype, device)
    where = environment.describe(device, environment.command("bench.pointwise", argv))
    records, rows = [], []
    for model in args.model:
        found = problems(model, args.batch, args.resolution, dtype)
        moved = {p: estimate.costs(p).fused.bytes * getattr(torch, p.dtype).itemsize // 2 for p in found}
        for problem in sorted(found, key=lambda p: -moved[p])[: args.most]:
            seconds = measured(problem, device, args.repeats)
            floor = moved[problem] / bandwidth
            records.append(
                {
                    "model": model, "problem": problem._asdict(), "calls": found[problem], "bytes": moved[problem],
                    "floor_seconds": floor, "seconds": seconds, "environment": where,
                }
            )  # fmt: skip
            rows.append(
                {
                    "model": model, "input": "x".join(map(str, problem.x)), "outputs": str(problem.weight[0]),
                    "calls": str(found[problem]), **{f"{way}, us": _microseconds(spent) for way, spent in seconds.items()},
                    "floor, us": _microseconds(floor), "floor to one kernel": _ratio(floor, seconds["one kernel"]),
                    "two kernels to one": _ratio(seconds["two kernels"], seconds["one kernel"]),
                    "library to one": _ratio(seconds["library"], seconds["one kernel"]),
                }
            )  # fmt: skip
    Console(width=140).print(report.console_table(rows, f"both gradients of a 1x1, {args.dtype}"))
    if args.json:
        args.json.write_text(json.dumps(records, indent=1) + "\n")


if __name__ == "__main__":
    main()
