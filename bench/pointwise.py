"""A model's 1x1 convolutions by each of the kernels for them, and by the library: both gradients by one kernel beside a kernel for each,
and the forward by tensor descriptors, where those can say it, beside the kernel that loads by itself.

    python -m bench.pointwise --model resnet50 densenet121 --batch 256 --json results/gpu/pointwise.json     (on a GPU)

Each way runs on random operands of the sizes, pitches and options of the call, with its default tiles; by descriptors, which have none,
with each of the tuner's candidates, of which the fastest counts. The floor is the time in which one kernel's maps, each read or written
once, move at the bandwidth of a large copy.
"""

from __future__ import annotations

import argparse
import collections
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console

import fusedres
from fusedres.backends import select
from fusedres.backends.contract import Backend, Wrapped
from fusedres.backends.triton import BACKEND, BUILD_ERRORS
from fusedres.kernels import tiles
from fusedres.kernels.launch import arch_of
from fusedres.kernels.tiles import Arch
from fusedres.tuning import estimate
from fusedres.tuning.convolutions import BOTH, may_be_described
from fusedres.tuning.plans import FUSED, LIBRARY, Plan, Problem

from . import environment, report, roofline

#: what stands for a GPU that has tensor descriptors, where there is none
HOPPER = Arch("sm_90", 227 * 1024, 32)
#: the way of ours that is compared with all others, by what it computes
OURS = {"backward": "one kernel", "forward": "descriptors"}


def ways(problem: Problem, arch: Arch) -> dict[str, list[tuple[Sequence[str], Plan]]]:
    """The ways to solve it, by what is asked of the tuner's call: one or several, of which the fastest counts."""
    if problem.op == "backward":
        return {
            "one kernel": [(("backward",), FUSED)], "two kernels": [(BOTH, FUSED)], "library": [(BOTH, LIBRARY)],
        }  # fmt: skip
    described = tiles.described_candidates(problem.size, problem.features, arch)
    needed = ("forward",)
    return {
        "descriptors": [(needed, Plan(True, tile)) for tile in described], "kernel": [(needed, FUSED)],
        "library": [(needed, LIBRARY)],
    }  # fmt: skip


class _Problems(Wrapped):
    """A backend that counts the calls for which one kernel could make both gradients, and those that descriptors can say."""

    def __init__(self, inner: Backend, found: collections.Counter[Problem]) -> None:
        super().__init__(inner)
        self._found = found

    def call(self, primitive, *args, **kwargs):
        """Note it, and run it."""
        of_call = BACKEND.tuner.problems(primitive, *args, **kwargs)
        self._found.update(p for p in of_call if p.op == "backward" or is_plain_product(p))
        return super().call(primitive, *args, **kwargs)


def is_plain_product(problem: Problem) -> bool:
    """Whether descriptors can say it; of float32 as if it were TF32, so that a rehearsal has any."""
    return may_be_described(problem._replace(features=(*problem.features, "tf32")))


def problems(
    model: str, batch: int, resolution: int, dtype: torch.dtype, mode: str = "train"
) -> collections.Counter[Problem]:
    """Of a step, on meta tensors: how often each is met."""
    network = fusedres.convert(roofline.build(model, "meta", dtype, mode), verify=False)
    x = torch.empty(batch, 3, resolution, resolution, dtype=dtype, device="meta")
    found: collections.Counter[Problem] = collections.Counter()
    with (
        BACKEND.tuner.recording(torch.device("meta")),
        select.observe(lambda inner: _Problems(BACKEND, found)),
        torch.set_grad_enabled(mode == "train"),
    ):
        y = network(x.to(memory_format=torch.channels_last))
        if mode == "train":
            torch.autograd.grad(y.sum(), list(network.parameters()))
    return found


def compile_all(problems: Sequence[Problem], device: torch.device) -> None:
    """Everything that will be measured, in parallel; what fails to compile fails again where it is measured."""
    with BACKEND.tuner.recording(device) as launches:
        for problem in problems:
            for plans in ways(problem, arch_of(device)).values():
                for needed, plan in plans:
                    BACKEND.tuner.call(problem, needed, plan, torch.device("meta"))()
    BACKEND.tuner.compile(launches, device)


def measured(problem: Problem, device: torch.device, repeats: int) -> dict[str, float | None]:
    """The seconds of each way, None where it cannot be built."""
    found: dict[str, float | None] = {}
    for way, plans in ways(problem, arch_of(device) if device.type == "cuda" else HOPPER).items():
        found[way] = None
        for needed, plan in plans if device.type == "cuda" else plans[:1]:
            try:
                spent = roofline.best_of(BACKEND.tuner.call(problem, needed, plan, device), device, repeats)
            except BUILD_ERRORS as error:
                print(f"{way} of {problem}: {error}")
            else:
                found[way] = spent if found[way] is None else min(found[way], spent)
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
    parser.add_argument("--most", type=int, help="of each kind only so many of the problems, the largest ones")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    args = parser.parse_args(argv)
    dtype, device = getattr(torch, args.dtype), torch.device(args.device)
    bandwidth, _ = roofline.ceilings(dtype, device)
    where = environment.describe(device, environment.command("bench.pointwise", argv))
    records, rows = [], []
    for model in args.model:
        found = problems(model, args.batch, args.resolution, dtype)
        found += problems(model, args.batch, args.resolution, dtype, "infer")
        moved = {p: estimate.costs(p).fused.bytes * getattr(torch, p.dtype).itemsize // 2 for p in found}
        largest = sorted(found, key=lambda p: (p.op, -moved[p]))
        chosen = [p for op in OURS for p in [q for q in largest if q.op == op][: args.most]]
        if device.type == "cuda":
            compile_all(chosen, device)
        for problem in chosen:
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
                    "model": model, "op": problem.op, "input": "x".join(map(str, problem.x)),
                    "outputs": str(problem.weight[0]), "calls": str(found[problem]), "floor, us": _microseconds(floor),
                    **{f"{way}, us": _microseconds(spent) for way, spent in seconds.items()},
                    **{
                        f"{way} to ours": _ratio(spent, seconds[OURS[problem.op]])
                        for way, spent in {"floor": floor, **seconds}.items() if way != OURS[problem.op]
                    },
                }
            )  # fmt: skip
    for op, title in (("backward", "both gradients"), ("forward", "forward, nothing pending on the input,")):
        of_op = [row for row in rows if row["op"] == op]
        if of_op:
            Console(width=160).print(report.console_table(of_op, f"{title} of a 1x1, {args.dtype}"))
    if args.json:
        args.json.write_text(json.dumps(records, indent=1) + "\n")


if __name__ == "__main__":
    main()
