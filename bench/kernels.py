"""How the Triton kernels compile, without a GPU: registers, spills, shared memory, matrix instructions and the width of
memory accesses.

    python -m bench.kernels --cross-compile [--arch sm_90] [--only conv]

Every case calls a primitive of the triton backend on meta tensors and compiles what it launches for the given
architecture, as the first call on such a GPU would.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fusedres.backends import triton as backend
from fusedres.backends.eager import Geometry, Pool
from fusedres.kernels import helpers

TYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.uint8: "u8"}
COLUMNS = ("registers", "spills", "shared", "matrix", "wide", "narrow")
BATCH = 64


def new_map(channels: int, size: int, dtype: torch.dtype = torch.bfloat16, pitch: int = 0) -> torch.Tensor:
    """A map of BATCH images on the meta device, a slice of a buffer of ``pitch`` channels where given."""
    buffer = torch.empty(BATCH, pitch or channels, size, size, dtype=dtype, device="meta")
    return buffer.to(memory_format=torch.channels_last)[:, :channels]


def vectors(rows: int, channels: int) -> torch.Tensor:
    """Per-channel float32 values on the meta device."""
    return torch.empty(rows, channels, device="meta")


def convolution(
    channels: int,
    outputs: int,
    kernel: int,
    size: int,
    stride: int = 1,
    dtype: torch.dtype = torch.bfloat16,
    pitch: int = 0,
) -> dict[str, Callable[[], object]]:
    """The uses of one convolution: training with everything pending, and inference."""
    geometry = Geometry((stride, stride), (kernel // 2, kernel // 2), (1, 1), 1)
    small = size // stride
    x, y = new_map(channels, size, dtype, pitch), new_map(outputs, small, dtype)
    weight = torch.empty(outputs, channels, kernel, kernel, dtype=dtype, device="meta")

    def backward(**what):
        backend.conv_backward(
            y, y, vectors(3, outputs), x, vectors(2, channels), vectors(2, channels), "relu", weight, geometry, **what
        )

    return {
        "bare": lambda: backend.conv_forward(x, None, "none", weight, None, geometry),
        "training": lambda: backend.conv_forward(
            x, vectors(2, channels), "relu", weight, None, geometry, stats=vectors(2, outputs)
        ),
        "inference": lambda: backend.conv_forward(
            x, None, "none", weight, None, geometry, out_affine=vectors(2, outputs), residual=y, out_act="relu"
        ),
        "dgrad": lambda: backward(need_dw=False, dx=x, accumulate=True, scaled=True, sums=vectors(2, channels)),
        "wgrad": lambda: backward(need_dx=False),
    }


def cases() -> dict[str, Callable[[], object]]:
    """Typical shapes of ResNet-50 and DenseNet-121, by name."""
    convolutions = {
        "conv 1x1 256-64 @56": convolution(256, 64, 1, 56),
        "conv 1x1 256-1024 @14": convolution(256, 1024, 1, 14),
        "conv 1x1 dense 160-128 @56": convolution(160, 128, 1, 56, pitch=256),
        "conv 3x3 128-128 @28": convolution(128, 128, 3, 28),
        "conv 3x3 dense 128-32 @28": convolution(128, 32, 3, 28),
        "conv 3x3 s2 128-128 @56": convolution(128, 128, 3, 56, stride=2),
        "conv 1x1 growth 24-48 @28": convolution(24, 48, 1, 28, pitch=72),
        "conv 3x3 128-128 @28 fp32": convolution(128, 128, 3, 28, dtype=torch.float32),
    }
    found = {f"{name} {use}": call for name, uses in convolutions.items() for use, call in uses.items()}
    x, small = new_map(256, 56), new_map(64, 112)
    pooled, window = new_map(64, 56), Pool("max", (3, 3), (2, 2), (1, 1))
    index = torch.empty(pooled.shape, dtype=torch.uint8, device="meta", memory_format=torch.channels_last)
    affine, coeff, sums = vectors(2, 256), vectors(3, 256), vectors(2, 256)
    stem = (pooled, index, small, vectors(2, 64), vectors(2, 64), "relu", window)
    return found | {
        "statistics": lambda: backend.statistics(x, sums),
        "join forward": lambda: backend.join_forward(x, affine, x, affine, "relu", stats=sums),
        "join backward": lambda: backend.join_backward(
            x,
            x,
            affine,
            affine,
            "relu",
            sums=sums,
            residual=x,
            residual_affine=affine,
            residual_saved=affine,
            residual_sums=sums,
        ),  # fmt: skip
        "grad affine": lambda: backend.grad_affine(x, x, coeff),
        "dgrad epilogue": lambda: backend.dgrad_epilogue(
            x, x, affine, affine, "relu", dx=x, accumulate=True, scaled=True, sums=sums
        ),
        "pool forward": lambda: backend.pool_forward(small, vectors(2, 64), "relu", window),
        "pool backward sums": lambda: backend.pool_backward(*stem, sums=vectors(2, 64)),
        "pool backward dx": lambda: backend.pool_backward(*stem, coeff=vectors(3, 64)),
        "bn coefficients": lambda: backend.bn_coefficients(
            sums, BATCH, *(torch.empty(256, device="meta") for _ in range(4)), 0.1, 1e-5
        ),
        "bn backward": lambda: backend.bn_backward(sums, BATCH, torch.empty(256, device="meta"), affine, True, coeff),
    }


def source(launch: helpers.Launch) -> tuple[ASTSource, dict[str, int]]:
    """What the launch would compile, and its options: arguments specialised as a call does, with aligned pointers."""
    arguments = dict(launch.arguments)
    signature, constants, attributes = {}, {}, {}
    for i, parameter in enumerate(launch.kernel.params):
        value = arguments.pop(parameter.name)
        if parameter.is_constexpr or value is None or (type(value) is int and value == 1):
            signature[parameter.name], constants[(i,)] = "constexpr", value
            continue
        if isinstance(value, torch.Tensor):
            signature[parameter.name] = "*" + TYPES[value.dtype]
        else:
            signature[parameter.name] = "fp32" if isinstance(value, float) else "i64" if value >= 2**31 else "i32"
        if isinstance(value, torch.Tensor) or (isinstance(value, int) and value % 16 == 0):
            attributes[(i,)] = [["tt.divisibility", 16]]
    return ASTSource(launch.kernel, signature, constants, attributes), arguments


def tool(name: str) -> str:
    """Triton's own copy of a CUDA binary tool."""
    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


def compile_launch(launch: helpers.Launch, arch: int) -> dict[str, object]:
    """The figures of one launch, compiled for ``arch``: counts of instructions but for the bytes of shared memory."""
    ast, options = source(launch)
    compiled = triton.compile(ast, target=GPUTarget("cuda", arch, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.run([tool("cuobjdump"), "-res-usage", file.name], capture_output=True, text=True, check=True)
        listing = subprocess.run([tool("nvdisasm"), "-c", file.name], capture_output=True, text=True, check=True)
    sass = listing.stdout
    global_access = re.findall(r"\b(?:LDG|STG|LDGSTS)\.E\S*", sass)
    wide = sum(".128" in access for access in global_access)
    matrix = {
        name: len(re.findall(rf"\b{name}\.", sass)) for name in ("HGMMA", "HMMA", "UTCHMMA") if f" {name}." in sass
    }
    return {
        "registers": int(re.search(r"REG:(\d+)", usage.stdout + usage.stderr)[1]),
        "spills": len(re.findall(r"\b(?:STL|LDL)\b", sass)),
        "shared": compiled.metadata.shared,
        "matrix": " ".join(f"{name} {count}" for name, count in matrix.items()) or "-",
        "wide": wide,
        "narrow": len(global_access) - wide,
    }


def cross_compile(arch: str, only: str) -> int:
    """Print the table; the number of cases that spill or lack the matrix instructions that they should have."""
    number, wrong, seen = int(arch.removeprefix("sm_")), 0, set()
    print(f"triton {triton.__version__}, {arch}, batch {BATCH}, bfloat16 unless said")
    print("wide: 128-bit instructions to and from global memory; narrow: the others, per-channel vectors among them\n")
    row = "{:44} {:>9} {:>6} {:>7} {:>10} {:>5} {:>6}"
    print(row.format("case", *COLUMNS))
    for name, call in cases().items():
        if only not in name:
            continue
        with helpers.record() as launches, backend.use_plan("fused"):
            call()
        for launch in launches:
            kernel = launch.kernel.__name__
            # a merge is compiled once: its sizes differ from case to case, its code hardly
            if kernel == "merge_kernel":
                variant = f"merge {'moments' if launch.arguments['MOMENTS'] else 'sums'}"
                if variant in seen:
                    continue
                seen.add(variant)
                title = variant
            else:
                title = name
            figures = compile_launch(launch, number)
            product = kernel.startswith("conv_") and "fp32" not in name
            bad = figures["spills"] > 0 or (product and figures["matrix"] == "-")
            wrong += bad
            values = (str(figures[column]) for column in COLUMNS)
            print(row.format(title, *values) + ("  <--" if bad else ""), flush=True)
    verdict = (
        f"{wrong} with spills or without matrix instructions" if wrong else "no spills; matrix instructions everywhere"
    )
    print(f"\n{verdict}")
    return wrong


def main() -> int:
    """The command line; 1 where a kernel spills or misses the matrix units."""
    parser = argparse.ArgumentParser(prog="python -m bench.kernels", description=__doc__.splitlines()[0])
    parser.add_argument("--cross-compile", action="store_true", required=True, help="compile and print a table")
    parser.add_argument("--arch", default="sm_90", help="sm_80, sm_90, sm_100, ... (default %(default)s)")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    arguments = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("interpreted kernels do not compile: unset TRITON_INTERPRET")
    return 1 if cross_compile(arguments.arch, arguments.only) else 0


if __name__ == "__main__":
    raise SystemExit(main())
