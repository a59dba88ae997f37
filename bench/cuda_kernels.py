"""How the CUDA C++ kernels compile, without a GPU: registers, spills, shared memory and 16-byte accesses, read from the machine code.

    python -m bench.cuda_kernels --out results                  (every architecture and dtype)
    python -m bench.cuda_kernels --arch sm_75 --dtype float16   (some of it)

Each program is compiled by NVRTC as backend ``cuda`` does at its first use on such a GPU.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console

from fusedres.backends.nvrtc import CHANNELS, DTYPES, MAPS, Program, compile_program

from . import environment
from .cross_compile import tool

ARCHITECTURES = ("sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")
#: loads and stores of global memory, by their width in the machine code
LOAD, STORE = r"\bLDG?\.\S*?128\b", r"\bSTG?\.\S*?128\b"
#: of thread-local memory: what registers have no room for
SPILL = r"\b(?:LDL|STL)\b"


@dataclass(frozen=True)
class Figures:
    """How a kernel compiled: ``wide_loads`` and ``wide_stores`` count instructions of 16 bytes, ``spills`` those of local memory."""

    kernel: str
    registers: int
    spills: int
    shared: int
    wide_loads: int
    wide_stores: int


def _said(command: Sequence[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def figures(program: Program, capability: tuple[int, int]) -> list[Figures]:
    """Those of every kernel of the program for a compute capability."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "program.cubin"
        file.write_bytes(compile_program(program, capability))
        usage = _said([tool("cuobjdump"), "-res-usage", str(file)])
        listing = _said([tool("nvdisasm"), "-c", str(file)])
    codes = re.split(r"^\s*\.section\s+\.text\.(\w+)", listing, flags=re.MULTILINE)
    code = dict(zip(codes[1::2], codes[2::2], strict=True))
    found = []
    for name, registers, shared in re.findall(r"Function (\w+):\s+REG:(\d+).*?SHARED:(\d+)", usage):
        counts = [len(re.findall(pattern, code[name])) for pattern in (SPILL, LOAD, STORE)]
        found.append(Figures(name, int(registers), counts[0], int(shared), counts[1], counts[2]))
    return sorted(found, key=lambda f: f.kernel)


@dataclass(frozen=True)
class Row:
    """A kernel of a program for an architecture, and the seconds that the program took to compile."""

    architecture: str
    program: Program
    seconds: float
    figures: Figures


def _compiled(architecture: str, program: Program) -> list[Row]:
    number = int(architecture.removeprefix("sm_"))
    start = time.perf_counter()
    found = figures(program, divmod(number, 10))
    seconds = time.perf_counter() - start
    return [Row(architecture, program, seconds, each) for each in found]


def markdown(rows: Sequence[Row], where: dict) -> str:
    """The rows as a page for readers: a table for every program, with the registers of each architecture."""
    spilling = sum(row.figures.spills > 0 for row in rows)
    lines = [
        "# How the CUDA C++ kernels compile",
        "",
        f"`{where['command']}`, {where['date'][:10]}, commit {where['commit']}: torch {where['torch']}, its NVRTC. Nothing here was run: "
        "these are the compiler's results.",
        "",
        f"{len(rows)} kernels, {spilling} of them spill. Registers of a thread, blocks being of 256 threads, by architecture; behind a "
        "plus the instructions that touch local memory, where there are any. Shared: bytes of a block. 16 bytes: instructions of that "
        "width that load from and store to global memory, the fewest of all architectures.",
    ]
    architectures = [a for a in ARCHITECTURES if any(row.architecture == a for row in rows)]
    for program in dict.fromkeys(row.program for row in rows):
        own = [row for row in rows if row.program == program]
        slowest = max(row.seconds for row in own)
        dtype = str(program.dtype).removeprefix("torch.")
        lines += [
            "", f"## {'Passes over maps' if program.kind == MAPS else 'Numbers per channel'}, {dtype}", "",
            f"Compiled and read in at most {slowest:.1f} s for an architecture.", "",
            f"| kernel | {' | '.join(architectures)} | shared | 16 bytes |", f"|---|{'---:|' * (len(architectures) + 2)}",
        ]  # fmt: skip
        for kernel in dict.fromkeys(row.figures.kernel for row in own):
            of = {row.architecture: row.figures for row in own if row.figures.kernel == kernel}
            cells = [f"{f.registers}{f' + {f.spills}' if f.spills else ''}" for f in (of[a] for a in architectures)]
            wide = f"{min(f.wide_loads for f in of.values())}, {min(f.wide_stores for f in of.values())}"
            lines.append(f"| {kernel} | {' | '.join(cells)} | {max(f.shared for f in of.values())} | {wide} |")
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> int:
    """The command line; 1 where a kernel spills."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [str(dtype).removeprefix("torch.") for dtype in DTYPES]
    parser.add_argument("--arch", nargs="+", choices=ARCHITECTURES, default=list(ARCHITECTURES))
    parser.add_argument("--dtype", nargs="+", choices=names, default=names)
    parser.add_argument("--out", type=Path, help="write cuda-kernels.md to this folder")
    args = parser.parse_args(arguments)
    console = Console(width=None if sys.stdout.isatty() else 140)
    where = environment.describe(torch.device("cpu"), environment.command("bench.cuda_kernels", arguments))
    dtypes = [getattr(torch, name) for name in args.dtype]
    programs = [Program(MAPS, dtype) for dtype in dtypes]
    programs += [Program(CHANNELS, dtype) for dtype in (torch.float32, torch.float64)]
    rows = [row for program in programs for arch in args.arch for row in _compiled(arch, program)]
    page = markdown(rows, where)
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "cuda-kernels.md").write_text(page)
    else:
        console.print(page, markup=False, highlight=False, soft_wrap=True)
    return int(any(row.figures.spills for row in rows))


if __name__ == "__main__":
    raise SystemExit(main())
