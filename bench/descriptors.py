"""How a 1x1's forward compiles by tensor descriptors, beside the kernel that loads by itself, without a GPU.

    python -m bench.descriptors --out results

Of every 1x1 of ResNet-50 and DenseNet-121 (bfloat16, 224 pixels, batch 256, training and inference) that descriptors can say, in the
tuner's candidate whose tile is nearest to the default one. Nobody launches these by default, so that bench.cross_compile does not see them.
On sm_90 also what the instructions come to for a pixel of the whole convolution: the cycles in which a multiprocessor issues them (a
warp's, by the four that it issues for a cycle), beside those in which an H100's memory delivers that pixel's bytes and its matrix units
multiply.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console

from fusedres.backends.triton import BACKEND
from fusedres.kernels import tiles
from fusedres.kernels.launch import record
from fusedres.kernels.tiles import ConvConfig
from fusedres.tuning import estimate
from fusedres.tuning.plans import FUSED, Plan, Problem

from . import environment, pointwise
from .cross_compile import ARCHITECTURES, MODELS, RESOLUTION, Architecture, Figures, Variant, compile_all, variant

FAMILIES = ("sm_90", "sm_100", "sm_103", "sm_120")
BATCH = 256
#: of an H100
MULTIPROCESSORS, CLOCK = 132, 1.755e9
#: instructions that a multiprocessor issues in a cycle
ISSUES = 4


def nearest(problem: Problem, architecture: Architecture) -> ConvConfig:
    """The candidate whose tile is as large as the default one, or nearly so, and of those the one with the fewest steps."""
    default = tiles.forward_config(problem.size, architecture.arch)
    found = tiles.described_candidates(problem.size, problem.features, architecture.arch)

    def distance(one: ConvConfig) -> float:
        sides = (one.BLOCK_M / default.BLOCK_M, one.BLOCK_N / default.BLOCK_N)
        return sum(abs(math.log2(side)) for side in sides)

    return min(found, key=lambda one: (distance(one), -one.BLOCK_K, -one.num_stages))


def launched(problem: Problem, plan: Plan, architecture: Architecture) -> Variant:
    """What its kernel compiles to by the plan."""
    meta = torch.device("meta")
    with record(arch=architecture.arch) as launches:
        BACKEND.tuner.call(problem, {problem.op}, plan, meta)()
    return variant(launches[0])


def issued(problem: Problem, tile: ConvConfig, figures: Figures) -> float:
    """The cycles for a pixel of the whole convolution in which its instructions are issued. Of one loop over the steps of all tiles the
    shortest way through it is a step, the longest one with everything that ends a tile; a kernel for one tile has beside its steps what is
    on the shortest way through it."""
    steps = -(-problem.x[1] // tile.BLOCK_K)
    rest = figures.loop - figures.step if tile.descriptors else figures.way - figures.step
    of_tile = steps * figures.step + rest
    return -(-problem.weight[0] // tile.BLOCK_N) * of_tile * tile.num_warps / ISSUES / tile.BLOCK_M


def floors(problem: Problem) -> tuple[float, float]:
    """The cycles of a pixel on an H100: of memory, and of products."""
    speed = estimate.SPEEDS["sm_90"]
    pixels = problem.x[0] * math.prod(problem.out_size)
    by_memory = estimate.costs(problem).fused.bytes / pixels / (speed.bandwidth / MULTIPROCESSORS / CLOCK)
    return by_memory, 2 * problem.x[1] * problem.weight[0] / speed.per_cycle


@dataclass
class Row:
    """A convolution, and its kernel by one of both ways."""

    problem: Problem
    first: str
    tile: ConvConfig
    figures: Figures

    def cells(self, family: str, architecture: Architecture) -> list[str]:
        """For readers."""
        p, f = self.problem, self.figures
        features = " ".join(p.features).replace("out_scale_shift", "scale, shift").replace("out_", "") or "bare"
        fault = f.shared > architecture.arch.shared or f.spills or architecture.matrix not in f.matrix
        found = [
            f"{p.x[1]} to {p.weight[0]}", features, self.first, "**descriptors**" if self.tile.descriptors else "itself",
            f"{self.tile.BLOCK_M}x{self.tile.BLOCK_N}x{self.tile.BLOCK_K}, {self.tile.num_warps}, {self.tile.num_stages}",
            str(f.registers), str(f.spills), str(f.shared), str(f.step), str(f.loop), str(f.way), str(f.total),
            " ".join(f"{name} {count}" for name, count in {**f.copies, **f.matrix}.items()) + (" FAULT" if fault else ""),
        ]  # fmt: skip
        if family == "sm_90":
            found += [f"{cycles:.0f}" for cycles in (issued(p, self.tile, f), *floors(p))]
        return found


def problems(models: Sequence[str] = MODELS) -> dict[Problem, str]:
    """The convolutions, of all sizes of the same code one, with the first step that has it."""
    found: dict[Problem, str] = {}
    seen = set()
    for model in models:
        for mode in ("infer", "train"):
            for problem in pointwise.problems(model, BATCH, RESOLUTION, torch.bfloat16, mode):
                key = problem.x[1], problem.weight[0], problem.features
                if problem.op == "forward" and key not in seen:
                    seen.add(key)
                    found[problem] = f"{model} {mode}"
    return dict(sorted(found.items(), key=lambda item: (item[1], item[0].x[1:2], item[0].weight[0])))


def markdown(rows: dict[str, list[Row]], where: dict) -> str:
    """A table for every architecture."""
    lines = [
        "# How a 1x1's forward compiles by tensor descriptors",
        "",
        f"`{where['command']}`, {where['date'][:10]}, commit {where['commit']}: triton {where['triton']}, torch {where['torch']}. "
        "Nothing here was run: these are the compilers' results.",
        "",
        " ".join((__doc__ or "").split("\n\n")[2].split()),
        "",
        "Step: the instructions of the shortest way from a matrix instruction back to it. Loop: the longest innermost loop. Way: the "
        "shortest one through the kernel and a matrix instruction: of a kernel for one tile that of a full tile in one step. Total: the "
        "whole kernel. "
        "UTMALDG and UTMASTG copy boxes; the others are matrix instructions.",
    ]
    head = [
        "channels", "epilogue", "first in", "loads by", "tile, warps, stages", "registers", "spills", "shared", "step", "loop",
        "way", "total", "instructions",
    ]  # fmt: skip
    for family, of_family in rows.items():
        names = head + (["issue", "memory", "product cycles a pixel"] if family == "sm_90" else [])
        lines += ["", f"## {family}", "", f"| {' | '.join(names)} |", "|" + "---|" * len(names)]
        lines += [f"| {' | '.join(row.cells(family, ARCHITECTURES[family]))} |" for row in of_family]
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> int:
    """The command line; 1 where one spills, does not fit, or lacks matrix instructions or copies of boxes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--most", type=int, help="only so many of the convolutions")
    parser.add_argument("--workers", type=int, default=1, help="processes (1: this one)")
    parser.add_argument("--out", type=Path, help="write descriptors.md to this folder")
    args = parser.parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("interpreted kernels do not compile: unset TRITON_INTERPRET")
    where = environment.describe(torch.device("cpu"), environment.command("bench.descriptors", arguments))
    found, wrong = list(problems(args.models).items())[: args.most], 0
    rows: dict[str, list[Row]] = {}
    for family in args.arch:
        architecture, rows[family] = ARCHITECTURES[family], []
        both = [
            (problem, first, plan.config or tiles.forward_config(problem.size, architecture.arch), launched(problem, plan, architecture))
            for problem, first in found
            for plan in (FUSED, Plan(True, nearest(problem, architecture)))
        ]  # fmt: skip
        jobs = list(dict.fromkeys((family, one) for *_, one in both))
        figures = {one: made for _, one, made in compile_all(jobs, args.workers)}
        for problem, first, tile, one in both:
            rows[family].append(Row(problem, first, tile, figures[one]))
            f = figures[one]
            copies = not tile.descriptors or {"UTMALDG", "UTMASTG"} <= set(f.copies)
            wrong += bool(
                f.spills or f.shared > architecture.arch.shared or architecture.matrix not in f.matrix or not copies
            )
    page = markdown(rows, where)
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "descriptors.md").write_text(page)
    else:
        Console(width=None if sys.stdout.isatty() else 140).print(page, markup=False, highlight=False, soft_wrap=True)
    print(f"{sum(map(len, rows.values()))} compiled, {wrong} with a fault")
    return int(wrong > 0)


if __name__ == "__main__":
    raise SystemExit(main())
