"""How the Triton kernels compile, without a GPU: registers, spills, shared memory, matrix instructions and the width of
memory accesses.

    python -m bench.cross_compile --out results                 (the sweep: every architecture)
    python -m bench.cross_compile --arch sm_90 --only dgrad     (some of it)

The configurations are those that ResNet-50 and DenseNet-121 launch, in training and inference, in bfloat16 at 224
pixels, with every convolution fused and with the default plans: both models are run on meta tensors, and each distinct
launch is compiled for the given architecture as the first call on such a GPU would.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from multiprocessing import get_context
from pathlib import Path

import torch
import torchvision
import triton
from rich.console import Console
from rich.progress import Progress
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel
from triton.tools.tensor_descriptor import TensorDescriptor

import fusedres
from fusedres.backends import select
from fusedres.backends.triton import BACKEND, use_plan
from fusedres.kernels.launch import Launch, record
from fusedres.kernels.tiles import MULTIPROCESSOR_REGISTERS, Arch

from . import environment
from .assembly import access_widths, count, instructions, longest_loop, shortest_cycle, shortest_way

TYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.uint8: "u8"}
MODELS = ("resnet50", "densenet121")
BATCHES = (32, 256)  # below and above the sizes at which the tiles change
RESOLUTION = 224


@dataclass(frozen=True)
class Architecture:
    """A target of compilation, what tiles must know of it, the matrix instructions that a convolution should use, and how wide
    in bits its stores should be."""

    target: GPUTarget
    arch: Arch
    matrix: str
    store: int = 128


def _nvidia(capability: int, shared: int, matrix: str) -> Architecture:
    """Of a compute capability, with so many KiB of shared memory for a block."""
    return Architecture(GPUTarget("cuda", capability, 32), Arch(f"sm_{capability}", shared * 1024, 32), matrix)


def _amd(name: str, warp: int, matrix: str) -> Architecture:
    """Of a family; stores are as the matrix instructions leave their results."""
    return Architecture(GPUTarget("hip", name, warp), Arch(name, 64 * 1024, warp), matrix, 16)


ARCHITECTURES = {
    found.arch.family: found
    for found in (
        _nvidia(80, 163, "HMMA"), _nvidia(86, 99, "HMMA"), _nvidia(89, 99, "HMMA"), _nvidia(90, 227, "HGMMA"),
        _nvidia(100, 227, "UTCHMMA"), _nvidia(103, 227, "UTCHMMA"), _nvidia(120, 99, "HMMA"),
        _amd("gfx90a", 64, "MFMA"), _amd("gfx942", 64, "MFMA"), _amd("gfx1100", 32, "WMMA"),
    )
}  # fmt: skip


@dataclass(frozen=True)
class Variant:
    """One compilation: a kernel by name, with its arguments as a launch specialises them, and the launch's options."""

    module: str
    kernel: str
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[int, object], ...]
    attributes: tuple[tuple[int, tuple[str, ...]], ...]
    options: tuple[tuple[str, int], ...]

    @property
    def operands(self) -> list[str]:
        """The tensors that are there."""
        return [name for name, kind in self.signature if kind.startswith("*")]

    @property
    def maps(self) -> list[str]:
        """The main operands: the feature maps and weights, in 16 bits, of what is no C-sized kernel or merge."""
        c_sized = self.module.endswith((".batchnorm", ".reduce"))
        return [name for name, kind in self.signature if kind in ("*bf16", "*fp16") and not c_sized]

    @property
    def is_product(self) -> bool:
        """Whether it should use the matrix units."""
        return self.kernel.startswith("conv_")

    @property
    def is_unaligned(self) -> bool:
        """Whether its channels do not divide into accesses of 8, as in a stem, which the default plan leaves to the
        library."""
        return any(self.constant(name) in (1, 2, 4) for name in ("ALIGN", "ALIGN_C", "ALIGN_K"))

    def constant(self, name: str) -> object:
        """The value of a compile-time argument, None where there is none of that name."""
        index = [parameter for parameter, _ in self.signature].index(name) if name in dict(self.signature) else -1
        return dict(self.constants).get(index)

    @property
    def title(self) -> str:
        """What tells it apart from the other variants, for readers."""
        parts = [self.kernel.removesuffix("_kernel")]
        geometry = self.constant("GEOMETRY")
        if geometry is not None:
            parts.append(f"{self.constant('R')}x{self.constant('S')}")
            parts += [f"stride {geometry.stride[0]}"] if geometry.stride[0] > 1 else []
        tile = [self.constant(f"BLOCK_{axis}") for axis in "MNKTC"]
        parts.append("x".join(str(size) for size in tile if size is not None))
        return " ".join(parts)


def variant(launch: Launch) -> Variant:
    """What the launch would compile: arguments specialised as a call does, with aligned pointers."""
    arguments = dict(launch.arguments)
    signature, constants, attributes = [], [], []
    for i, parameter in enumerate(launch.kernel.params):
        value = arguments.pop(parameter.name)
        plain = parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (type(value) is int and value == 1 and not plain):
            signature.append((parameter.name, "constexpr"))
            constants.append((i, value))
            continue
        if isinstance(value, torch.Tensor):
            signature.append((parameter.name, "*" + TYPES[value.dtype]))
            # buffer instructions of AMD address what is smaller than 2 GB
            small = value.untyped_storage().nbytes() < 2**31
            attributes.append((i, ("tt.divisibility", "tt.pointer_range") if small else ("tt.divisibility",)))
        elif isinstance(value, TensorDescriptor):
            signature.append((parameter.name, f"tensordesc<{TYPES[value.base.dtype]}{list(value.block_shape)}>"))
        else:
            kind = "fp32" if isinstance(value, float) else "i64" if value >= 2**31 else "i32"
            signature.append((parameter.name, kind))
            if isinstance(value, int) and value % 16 == 0 and not plain:
                attributes.append((i, ("tt.divisibility",)))
    function = launch.kernel.fn
    return Variant(
        function.__module__, function.__name__, tuple(signature), tuple(constants), tuple(attributes),
        tuple(arguments.items()),
    )  # fmt: skip


@dataclass
class Use:
    """Who launches a variant: how often in all recorded steps, and the first of them."""

    first: str
    launches: int = 0


def sizes(launch: Launch) -> str:
    """The sizes of a launch that do not change its code."""
    names = ("rows", "N", "H", "W", "C", "K", "tiles")
    return " ".join(f"{name}={launch.arguments[name]}" for name in names if name in launch.arguments)


@functools.cache
def network_of(model: str) -> torch.nn.Module:
    """The converted torchvision model, on meta tensors."""
    with torch.device("meta"):
        network = torchvision.models.get_model(model)
    return fusedres.convert(network.to(dtype=torch.bfloat16, memory_format=torch.channels_last))


def launches_of(model: str, mode: str, batch: int, plan: str, arch: Arch) -> list[Launch]:
    """What one step of the converted torchvision model launches, recorded on meta tensors."""
    network = network_of(model).train(mode == "train")
    x = torch.empty(batch, 3, RESOLUTION, RESOLUTION, dtype=torch.bfloat16, device="meta")
    x = x.to(memory_format=torch.channels_last)
    with record(arch=arch) as launches, use_plan(plan), select.observe(lambda inner: BACKEND):
        if mode == "train":
            # not backward(): a recorded launch holds its tensors, and what is held a parameter's gradient copies
            torch.autograd.grad(network(x).sum(), list(network.parameters()))
        else:
            with torch.no_grad():
                network(x)
    return launches


def variants(arch: Arch, models: Sequence[str] = MODELS) -> dict[Variant, Use]:
    """Every distinct compilation of the models' steps, with every convolution fused and with the default plans."""
    found: dict[Variant, Use] = {}
    for model in models:
        for mode in ("train", "infer"):
            for batch in BATCHES:
                for plan in ("fused", "auto"):
                    for launch in launches_of(model, mode, batch, plan, arch):
                        use = found.setdefault(variant(launch), Use(f"{model} {mode} {batch}: {sizes(launch)}"))
                        use.launches += 1
    return found


# ---- compilation -----------------------------------------------------------------------------------------------------


@dataclass
class Figures:
    """How a variant compiled: counts of instructions, bytes of shared memory, and the narrowest load from and store to
    each tensor in global memory, in bits. ``loop``: the instructions of the longest innermost loop, 0 where nobody looked; ``step``: of the
    shortest way from a matrix instruction back to it; ``way``: of the shortest way through the kernel and a matrix instruction, without
    what only a last, partial tile runs; ``total``: of the kernel; ``copies``: those of whole boxes (TMA)."""

    registers: int
    spills: int
    shared: int
    matrix: dict[str, int] = field(default_factory=dict)
    loads: dict[str, int] = field(default_factory=dict)
    stores: dict[str, int] = field(default_factory=dict)
    loop: int = 0
    step: int = 0
    way: int = 0
    total: int = 0
    copies: dict[str, int] = field(default_factory=dict)


def tool(name: str) -> str:
    """Triton's own copy of a CUDA binary tool."""
    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


def compiled(variant: Variant, architecture: Architecture) -> CompiledKernel:
    """``variant``, compiled for ``architecture``."""
    kernel = getattr(importlib.import_module(variant.module), variant.kernel)
    target, values = architecture.target, {"tt.divisibility": 16, "tt.pointer_range": 32}
    hip = target.backend == "hip"
    attributes = {
        (i,): [[name, values[name]] for name in names if hip or name != "tt.pointer_range"]
        for i, names in variant.attributes
    }
    ast = ASTSource(kernel, dict(variant.signature), {(i,): v for i, v in variant.constants}, attributes)
    return triton.compile(ast, target=target, options=dict(variant.options))


def disassembled(kernel: CompiledKernel) -> tuple[str, str]:
    """What NVIDIA's tools say of a kernel's registers, and its machine code."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = subprocess.run([tool("cuobjdump"), "-res-usage", file.name], capture_output=True, text=True, check=True)
        listing = subprocess.run([tool("nvdisasm"), "-c", file.name], capture_output=True, text=True, check=True)
    return usage.stdout + usage.stderr, listing.stdout


def compile_variant(variant: Variant, architecture: Architecture) -> Figures:
    """The figures of ``variant``, compiled for ``architecture``."""
    kernel = compiled(variant, architecture)
    shared = kernel.metadata.shared
    if architecture.target.backend == "hip":
        text = kernel.asm["amdgcn"]

        def entry(name: str) -> int:
            return int(re.search(rf"\.{name}:\s+(\d+)", text)[1])

        spills = entry("vgpr_spill_count") + entry("private_segment_fixed_size") // 4
        counts = {name: len(re.findall(rf"\bv_{name.lower()}_", text)) for name in ("MFMA", "WMMA")}
        matrix = {name: count for name, count in counts.items() if count}
        return Figures(entry("vgpr_count"), spills, shared, matrix, *access_widths(text))
    usage, listing = disassembled(kernel)
    loads, stores = access_widths(kernel.asm["ptx"])
    return Figures(
        registers=int(re.search(r"REG:(\d+)", usage)[1]),
        spills=sum(count("STL LDL", listing).values()),
        shared=shared,
        matrix=count("HGMMA HMMA UTCHMMA", listing),
        loads=loads,
        stores=stores,
        loop=longest_loop(listing),
        step=shortest_cycle(listing, architecture.matrix),
        way=shortest_way(listing, architecture.matrix),
        total=len(instructions(listing)),
        copies=count("UTMALDG UTMASTG", listing),
    )


def faults(variant: Variant, figures: Figures, architecture: Architecture) -> list[str]:
    """What is wrong with a compiled variant, in words."""
    found = []
    if figures.spills:
        found.append(f"{figures.spills} spills")
    if figures.shared > architecture.arch.shared:
        found.append(f"{figures.shared} bytes of shared memory")
    options = dict(variant.options)
    if "maxnreg" in options:
        taken = 32 * options["num_warps"] * figures.registers
        # of a multiprocessor's shared memory each program takes a KiB more than it asks for
        if 2 * taken > MULTIPROCESSOR_REGISTERS or 2 * (figures.shared + 1024) > architecture.arch.shared + 1024:
            found.append("one program a multiprocessor, although its registers are bounded")
    if variant.is_unaligned:
        return found
    if variant.is_product and architecture.matrix not in figures.matrix:
        found.append(f"no {architecture.matrix}")
    accesses = ((figures.loads, 128), (figures.stores, architecture.store))
    narrow = [f"{name} {w[name]}" for w, least in accesses for name in variant.maps if w.get(name, least) < least]
    if narrow:
        found.append("narrow: " + ", ".join(narrow))
    return found


# ---- the sweep -------------------------------------------------------------------------------------------------------


@dataclass
class Row:
    """One line of the table."""

    architecture: str
    variant: Variant
    use: Use
    figures: Figures
    faults: list[str]

    def record(self) -> dict:
        """The row as JSON types."""
        return {
            "architecture": self.architecture,
            "kernel": self.variant.kernel,
            "title": self.variant.title,
            "operands": self.variant.operands,
            "options": dict(self.variant.options),
            "first": self.use.first,
            "launches": self.use.launches,
            **asdict(self.figures),
            "faults": self.faults,
        }


def compile_all(
    jobs: Sequence[tuple[str, Variant]], workers: int | None = None
) -> Iterator[tuple[str, Variant, Figures]]:
    """Compile each (architecture, variant), in parallel processes, in the order in which they finish; by one worker here."""
    if workers == 1:
        for arch, variant in jobs:
            yield arch, variant, compile_variant(variant, ARCHITECTURES[arch])
        return
    # spawned: a forked child of a process in which torch has started threads may hang
    context = get_context("spawn")
    with ProcessPoolExecutor(workers or os.cpu_count(), mp_context=context) as pool:
        waiting = {
            pool.submit(compile_variant, variant, ARCHITECTURES[arch]): (arch, variant) for arch, variant in jobs
        }
        for future in as_completed(waiting):
            yield *waiting[future], future.result()


def representatives(found: dict[Variant, Use]) -> dict[Variant, Use]:
    """For each kernel and filter size the variant with the most operands; of the kernel that holds all outputs for each number of them."""
    best: dict[tuple, Variant] = {}
    for variant in found:
        key = (variant.kernel, variant.constant("R") or variant.constant("BLOCK_K"))
        if key not in best or len(variant.operands) > len(best[key].operands):
            best[key] = variant
    return {variant: found[variant] for variant in best.values()}


def sweep(
    architectures: Sequence[str],
    models: Sequence[str],
    only: Sequence[str],
    quick: bool,
    workers: int | None,
    console: Console,
) -> list[Row]:
    """The rows of all architectures, sorted by kernel."""
    uses = {}
    for arch in architectures:
        found = variants(ARCHITECTURES[arch].arch, models)
        found = representatives(found) if quick else found
        uses |= {(arch, variant): use for variant, use in found.items() if any(o in variant.title for o in only)}
    rows = []
    with Progress(console=console) as progress:
        task = progress.add_task("compiling", total=len(uses))
        for arch, variant, figures in compile_all(list(uses), workers):
            rows.append(Row(arch, variant, uses[arch, variant], figures, faults(variant, figures, ARCHITECTURES[arch])))
            progress.advance(task)
    order = list(ARCHITECTURES)
    return sorted(rows, key=lambda row: (order.index(row.architecture), row.variant.title, row.use.first))


def markdown(rows: Sequence[Row], where: dict, models: Sequence[str], quick: bool) -> str:
    """The rows as a page for readers: a summary, then a table for every architecture. ``quick``: they are representatives."""
    lines = [
        "# How the kernels compile",
        "",
        f"`{where['command']}`, {where['date'][:10]}, commit {where['commit']}: triton {where['triton']}, torch {where['torch']}. "
        "Nothing here was run: these are the compilers' results.",
        "",
        (
            "Of each kernel and filter size (of conv_pointwise_backward, of each number of outputs) one variant, that with the most "
            "operands, of every launch"
            if quick
            else "Every launch"
        )
        + f" of {' and '.join(models)} (training and inference, bfloat16, {RESOLUTION} pixels, batches "
        f"{' and '.join(map(str, BATCHES))}; all convolutions fused, and the default plans), each distinct one compiled once. "
        "Loop: instructions of the longest innermost loop (NVIDIA). Matrix: static counts of matrix instructions. "
        "Narrowest: the narrowest load from and store to a feature map or a weight, in bits."
        " It is too narrow where a load is below 128 bits, or a store is, except on AMD, where it is as the matrix "
        "instructions leave the result; the stem (unaligned channels), whose 3 channels allow no more, is the library's by default.",
        "",
        "| architecture | variants | most registers | spilling | without matrix instructions | too narrow |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    groups = {arch: [row for row in rows if row.architecture == arch] for arch in ARCHITECTURES}
    for arch, group in groups.items():
        if group:
            lacking = sum(any(fault.startswith("no ") for fault in row.faults) for row in group)
            narrow = sum(any(fault.startswith("narrow") for fault in row.faults) for row in group)
            lines.append(
                f"| {arch} | {len(group)} | {max(row.figures.registers for row in group)} | "
                f"{sum(row.figures.spills > 0 for row in group)} | {lacking} | {narrow} |"
            )
    for arch, group in groups.items():
        if group:
            lines += [
                "", f"## {arch}", "",
                "| kernel and tile | warps, stages | first launched by | registers | spills | shared | loop | matrix | narrowest "
                "| remark |",
                "|---|---|---|---:|---:|---:|---:|---|---:|---|",
            ]  # fmt: skip
        for row in group:
            options, figures = dict(row.variant.options), row.figures
            widths = [
                min((found[name] for name in row.variant.maps if name in found), default="-")
                for found in (figures.loads, figures.stores)
            ]
            remark = "; ".join(row.faults) or ("unaligned channels" if row.variant.is_unaligned else "")
            lines.append(
                f"| {row.variant.title} | {options['num_warps']}, {options.get('num_stages', '-')} | {row.use.first} | "
                f"{figures.registers} | {figures.spills} | {figures.shared} | {figures.loop or '-'} | "
                f"{' '.join(f'{name} {count}' for name, count in figures.matrix.items()) or '-'} | "
                f"{widths[0]}, {widths[1]} | {remark} |"
            )
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> int:
    """The command line; 1 where something is wrong with a variant."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", nargs="+", choices=ARCHITECTURES, default=list(ARCHITECTURES))
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--only", nargs="+", default=[""], help="variants whose title contains one of these")
    parser.add_argument("--quick", action="store_true", help="of each kernel and filter size only one variant")
    parser.add_argument("--workers", type=int, help="processes (default: one for each core; 1: this one)")
    parser.add_argument("--out", type=Path, help="write cross-compile.json and cross-compile.md to this folder")
    args = parser.parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("interpreted kernels do not compile: unset TRITON_INTERPRET")
    console = Console(width=None if sys.stdout.isatty() else 140)
    where = environment.describe(torch.device("cpu"), environment.command("bench.cross_compile", arguments))
    rows = sweep(args.arch, args.models, args.only, args.quick, args.workers, console)
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        # a row a line: readable, and a difference between two of them too
        records = ",\n".join(json.dumps(row.record()) for row in rows)
        text = f'{{"environment": {json.dumps(where)}, "rows": [\n{records}\n]}}\n'
        (args.out / "cross-compile.json").write_text(text)
        (args.out / "cross-compile.md").write_text(markdown(rows, where, args.models, args.quick))
    else:
        console.print(markdown(rows, where, args.models, args.quick), markup=False, highlight=False, soft_wrap=True)
    wrong = [row for row in rows if row.faults]
    for row in wrong:
        remark = f"{row.architecture} {row.variant.title} ({row.use.first}): {'; '.join(row.faults)}"
        console.print(remark, markup=False, highlight=False, soft_wrap=True)
    console.print(f"{len(rows)} compiled, {len(wrong)} with a remark")
    return int(bool(wrong))


if __name__ == "__main__":
    raise SystemExit(main())
