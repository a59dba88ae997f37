"""The kernels compiled for GPUs that need not be here: no spill, matrix instructions, 128-bit access to the main
operands."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import forked
import pytest

pytest.importorskip("triton")
pytest.importorskip("torchvision")
pytest.importorskip("rich")

from bench.assembly import access_widths, instructions, longest_loop, shortest_cycle, shortest_way  # noqa: E402
from bench.cross_compile import ARCHITECTURES, Figures, Variant, faults  # noqa: E402

ROOT = Path(__file__).parents[1]


def cross_compile(out: Path, *arguments: str, forks: bool = True) -> list[dict]:
    """The rows of ``python -m bench.cross_compile``, which fails where something is wrong with a variant.

    In a process of its own, because interpreted kernels, which other tests ask for, do not compile; with a cache of its
    own, so that it compiles. Unless it ``forks``, an interpreter of its own: a pool starts others as that one was started.
    """
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {
        "TRITON_CACHE_DIR": str(out / "cache")
    }
    command = ["-m", "bench.cross_compile", "--out", str(out), *arguments]
    if forks:
        done = forked.python(command, cwd=ROOT, env=environment, timeout=3600)
    else:
        command = [sys.executable, *command]
        done = subprocess.run(command, cwd=ROOT, env=environment, timeout=3600, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads((out / "cross-compile.json").read_text())["rows"]


def check(rows: list[dict], architectures: dict[str, str]) -> None:
    """Assert what the command already asserts, from the figures themselves: that it looks where it should."""
    assert {row["architecture"] for row in rows} == set(architectures)
    for row in rows:
        what = f"{row['architecture']} {row['title']}, {row['first']}"
        assert row["spills"] == 0 and 0 < row["registers"] <= 512, what
        assert not row["faults"], what
        # the stem's 3 channels: the default plan leaves it to the library
        if row["kernel"].startswith("conv_") and " C=3 " not in row["first"]:
            assert row["matrix"].get(architectures[row["architecture"]], 0) > 0, what
            operands = {
                "conv_wgrad_kernel": ["grad", "x"],
                "conv_dgrad_kernel": ["grad", "weight"],
                "conv_forward_kernel": ["x", "weight"],
                "conv_pointwise_backward_kernel": ["grad", "x", "weight"],
            }[row["kernel"]]
            assert all(row["loads"][operand] == 128 for operand in operands), what


#: one of each kernel, of convolutions one or the other filter size; all others are slow
ONE_OF_EACH = [
    *("conv_forward 3x3", "conv_dgrad 3x3", "conv_wgrad 1x1", "conv_pointwise_backward 32x128x64"),
    *("add_act_forward", "add_act_backward", "pool_backward"),
]


def test_representative_variants_compile_well(tmp_path):
    some = ["--arch", "sm_90", "--models", "resnet50", "--quick", "--workers", "1", "--only", *ONE_OF_EACH]
    rows = cross_compile(tmp_path, *some)
    check(rows, {"sm_90": "HGMMA"})
    kernels = {row["kernel"].removesuffix("_kernel") for row in rows}
    assert {
        "conv_forward",
        "conv_dgrad",
        "conv_wgrad",
        "conv_pointwise_backward",
        "add_act_forward",
        "add_act_backward",
        "pool_backward",
    } <= kernels
    assert all(row["loop"] > 100 for row in rows if row["kernel"].startswith("conv_"))
    assert "## sm_90" in (tmp_path / "cross-compile.md").read_text()


ACCESSES = """
        buffer_load_dwordx4 v[8:11], v2, s[8:11], 0 offen
        global_load_ushort v4, v[2:3], off
        buffer_store_short v1, v2, s[4:7], 0 offen
"""
ACCESSES_SINCE_GFX11 = """
        buffer_load_b128 v[8:11], v2, s[8:11], 0 offen
        global_load_u16 v4, v[2:3], off
        buffer_store_d16_hi_b16 v1, v2, s[4:7], 0 offen
"""


@pytest.mark.parametrize("listing", [ACCESSES, ACCESSES_SINCE_GFX11], ids=["words", "bits"])
def test_the_narrowest_access_is_found_in_either_spelling_of_amds(listing):
    assert access_widths(listing) == ({"?": 16}, {"?": 16})
    first = listing.splitlines()[1]
    assert access_widths(first) == ({"?": 128}, {})


LISTING = """
.L_x_0:
        /*0000*/                   ISETP.GE P0, PT, R0, R1, PT ;
        /*0010*/              @!P0 BRA `(.L_x_1) ;
        /*0020*/                   IADD3 R2, R2, 1, RZ ;
        /*0030*/                   IADD3 R3, R3, 1, RZ ;
.L_x_1:
        /*0040*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24 ;
        /*0050*/               @P1 BRA `(.L_x_0) ;
        /*0060*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24 ;
        /*0070*/                   EXIT ;
.L_x_2:
        /*0080*/                   BRA `(.L_x_2) ;
"""


def test_a_step_is_the_shortest_way_from_a_matrix_instruction_to_itself():
    """Without what a branch skips; none leads back to what is behind the loop."""
    assert longest_loop(LISTING) == 6 and shortest_cycle(LISTING, "HGMMA") == 4
    assert shortest_cycle(LISTING, "HMMA") == 0 and len(instructions(LISTING)) == 9


@pytest.mark.parametrize(
    "registers, shared, fit", [(128, 114 * 1024 - 2048, True), (128, 114 * 1024, False), (136, 64 * 1024, False)]
)
def test_a_tile_of_bounded_registers_is_wrong_where_two_do_not_fit(registers, shared, fit):
    one = Variant("kernels.conv_wgrad", "conv_wgrad_kernel", (), (), (), (("num_warps", 8), ("maxnreg", 128)))
    found = faults(one, Figures(registers, 0, shared, {"HGMMA": 4}, {}, {}), ARCHITECTURES["sm_90"])
    assert bool(found) != fit and all("one program a multiprocessor" in fault for fault in found)


TWO_ENDS = """
        /*0000*/               @P2 CALL.REL.NOINC `(.L_x_1) ;
        /*0010*/                   IADD3 R2, R2, 1, RZ ;
        /*0020*/                   BRA `(.L_x_2) ;
.L_x_1:
        /*0030*/                   EXIT ;
.L_x_2:
        /*0040*/                   HMMA.16816.F32.BF16 R44, R40, R30, R44 ;
        /*0050*/               @P0 BRA `(.L_x_3) ;
        /*0060*/                   IADD3 R3, R3, 1, RZ ;
        /*0070*/              @!P1 EXIT ;
        /*0080*/                   STG.E [R2], R3 ;
        /*0090*/                   EXIT ;
.L_x_3:
        /*00a0*/                   STG.E [R2], R3 ;
        /*00b0*/                   EXIT ;
"""


def test_the_shortest_way_passes_a_matrix_instruction_and_everything_until_an_end():
    """Not the end that is reached without one, nor one under a condition; a call from which nothing returns is a jump."""
    assert shortest_way(TWO_ENDS, "HMMA") == 7 and shortest_way(TWO_ENDS, "IADD3") == 7
    assert shortest_way(TWO_ENDS, "CALL") == 2 and shortest_way(TWO_ENDS, "HGMMA") == 0


def test_a_pointwise_forward_by_descriptors_compiles_well(tmp_path):
    """For Hopper and Blackwell: copies of boxes, matrix instructions, no spill, within shared memory, or the command fails."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = forked.python(
        ["-m", "bench.descriptors", "--arch", "sm_90", "sm_100", "--models", "resnet50", "--most", "1", "--out", str(tmp_path)],
        cwd=ROOT, env=environment | {"TRITON_CACHE_DIR": str(tmp_path / "cache")}, timeout=3600,
    )  # fmt: skip
    assert done.returncode == 0 and "4 compiled, 0 with a fault" in done.stdout, done.stdout + done.stderr
    page = (tmp_path / "descriptors.md").read_text()
    assert page.count("| **descriptors** |") == 2 == page.count("UTMALDG") - 1, page
    assert "## sm_90" in page and "## sm_100" in page


UNKNOWN = """
import torch
from triton.compiler.errors import CompilationError
from bench.cross_compile import ARCHITECTURES, compile_variant, variant
from fusedres.activations import Activation
from fusedres.kernels import elementwise
from fusedres.kernels.launch import record
from fusedres.operands import LazyMap

x = LazyMap(torch.empty(1, 8, 2, 2, dtype=torch.float16, device="meta").to(memory_format=torch.channels_last))
for kind, fails in (("silu", False), ("swish", True)):
    act = Activation(kind, 0.0)
    with record() as launches:
        elementwise.add_act_forward(x, None, act)
        elementwise.add_act_backward(x.raw, x, None, act)
    for launch, word in zip(launches, ("value", "derivative"), strict=True):
        try:
            compile_variant(variant(launch), ARCHITECTURES["sm_90"])
        except CompilationError as error:
            while error.__cause__ is not None:
                error = error.__cause__
            assert fails and f"no {word} for this kind" in str(error), error
        else:
            assert not fails, (kind, word)
"""


def test_an_activation_without_device_code_does_not_compile(tmp_path):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = forked.python(["-c", UNKNOWN], cwd=ROOT, env=environment | {"TRITON_CACHE_DIR": str(tmp_path)})
    assert done.returncode == 0, done.stderr


DEPENDENT = """
import re, sys
import torch
from bench.assembly import instructions
from bench.cross_compile import ARCHITECTURES, compiled, disassembled, variant
from launching import everything
from support import Draw
from fusedres.backends.triton import BACKEND, use_plan
from fusedres.kernels import batchnorm, launch
from fusedres.kernels.tiles import ConvConfig
from fusedres.operands import LazyMap
from fusedres.specs import Geometry, Norm
from fusedres.tuning.plans import Plan

family, *wanted = sys.argv[1:]
target = ARCHITECTURES[family]
ACCESS = re.compile(r"\\b(LDG|LDGSTS|STG|LD|ST|ATOM|ATOMG|RED|REDG|UBLKCP|UTMALDG|UTMASTG)\\b")
for on in (True, False):
    draw = Draw(torch.bfloat16, pad=(8, 16))
    frozen = Norm(*(draw.parameter(8) for _ in range(4)), False, 0.1, 1e-5, "none")
    with launch.dependent_launches(on), launch.record(arch=target.arch) as launches:
        with use_plan("fused"):
            everything(BACKEND, draw)
        batchnorm.bn_frozen_together([frozen, frozen])
        with use_plan(Plan(True, ConvConfig(64, 64, 64, 4, 2, descriptors=True))):
            x, weight = LazyMap(draw.map(2, 128, 8, 8)), draw.weight(64, 128, 1, 1)
            BACKEND.conv_forward(x, weight, None, Geometry((1, 1), (0, 0), (1, 1), 1))
    firsts = {one.kernel.__name__: one for one in launches}
    assert len(firsts) == 15, sorted(firsts)
    for name, one in firsts.items():
        if not any(part in name for part in wanted):
            continue
        kernel = compiled(variant(one), target)
        code = instructions(disassembled(kernel)[1])
        places = {word: [i for i, text in enumerate(code) if word in text] for word in ("ACQBULK", "PREEXIT")}
        assert kernel.metadata.launch_pdl == on, name
        if not on:
            assert places == {"ACQBULK": [], "PREEXIT": []}, (name, places)
            continue
        (wait,), (trigger,) = places.values()
        first = next(i for i, text in enumerate(code) if ACCESS.search(text))
        assert wait < trigger < first, (name, places, first)
        # on Blackwell warps have taken memory of the matrix units before
        assert family != "sm_90" or not any("BRA" in text for text in code[:wait]), (name, code[:wait])
        print(name)
"""


@pytest.mark.parametrize(
    "family, kernels",
    [
        ("sm_90", ["coefficients", "add_act_forward"]),
        *(pytest.param(family, ["_kernel"], marks=pytest.mark.slow) for family in ("sm_90", "sm_100", "sm_120")),
    ],
)
def test_a_dependent_kernel_waits_in_front_of_its_first_access_of_memory(tmp_path, family, kernels):
    """In machine code, every thread of it; without the switch it neither waits nor lets others start."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(tmp_path)}
    environment["PYTHONPATH"] = os.pathsep.join(str(ROOT / part) for part in ("", "tests", "tests/backends"))
    done = forked.python(["-c", DEPENDENT, family, *kernels], cwd=ROOT, env=environment, timeout=3600)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.split()) == (15 if kernels == ["_kernel"] else len(kernels))


def test_every_kernel_begins_by_waiting():
    """Behind its docstring: what stands in front could read what is not written yet."""
    found = [
        function
        for file in (ROOT / "kernels").glob("*.py")
        for function in ast.parse(file.read_text()).body
        if isinstance(function, ast.FunctionDef) and function.name.endswith("_kernel")
    ]
    assert len(found) == 15
    for function in found:
        assert ast.get_docstring(function) and ast.unparse(function.body[1]) == "begin(DEPENDENT)", function.name


@pytest.mark.slow
def test_every_variant_compiles_well(tmp_path):
    check(cross_compile(tmp_path, forks=False), {family: found.matrix for family, found in ARCHITECTURES.items()})
