"""No primitive of the C++ backend reads or writes beside its operands: all memory begins, or ends, at a page that nobody may touch."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import forked
import pytest

_C = pytest.importorskip("fusedres._C")
pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="protects pages as Linux does")
each_side = pytest.mark.parametrize("side", ["before", "behind"])


def run(side: str, *options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """``guarded.py`` in a process of its own."""
    program = str(Path(__file__).with_name("guarded.py"))
    return forked.python([program, side, *options], env={**os.environ, **environment})


def assert_stays_inside(done: subprocess.CompletedProcess[str]) -> None:
    """Every case ran to its end."""
    *_, last = done.stdout.splitlines() or ["nothing"]
    assert done.returncode == 0, f"ended by {done.returncode} in: {last}\n{done.stderr}"
    assert last.endswith(" cases")


@pytest.mark.parametrize(("side", "dtype", "turn"), [("behind", "float32", "0"), ("before", "bfloat16", "1")])
def test_no_primitive_reads_or_writes_beside_its_operands(side: str, dtype: str, turn: str) -> None:
    """Every case, at one of the two sides each of its maps; at both of them in the next test."""
    assert_stays_inside(run(side, "--dtype", dtype, "--turn", turn))


@pytest.mark.slow
@each_side
@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16", "float16"])
@pytest.mark.parametrize("capability", _C.cpu_capabilities())
def test_nor_does_any_instruction_set_in_any_dtype(side: str, dtype: str, capability: str) -> None:
    assert_stays_inside(run(side, "--dtype", dtype, FUSEDRES_CPU_CAPABILITY=capability))


@each_side
def test_a_channel_beside_the_memory_is_found(side: str) -> None:
    done = run(side, "--overhang")
    assert done.stdout.splitlines() == ["overhang"]
    assert done.returncode in (-signal.SIGSEGV, -signal.SIGBUS)
