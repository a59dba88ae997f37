"""Launches of compiled kernels without Triton's public call, and from tapes: the same arguments, specialised as Triton would, and by the
public call where somebody looks on. Without a GPU, over a stub of the CUDA driver (launching.py)."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import forked
import pytest

pytest.importorskip("triton")
pytest.importorskip("torchvision")
pytest.importorskip("rich")

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux") or shutil.which(os.environ.get("CC", "cc")) is None,
    reason="the stub of the driver is a library for Linux, made by a C compiler",
)


needs_extension = pytest.mark.skipif(
    importlib.util.find_spec("fusedres._C") is None, reason="tapes are played by the C++ extension"
)


@pytest.fixture(scope="module")
def found() -> dict:
    """What the scenes of launching.py say."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "tests" / "backends" / "launching.py")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_every_kernel_is_launched_with_the_arguments_of_the_public_call(found):
    result = found["direct_is_public"]
    assert result["launches"] > 60 and result["different"] == []
    assert result["kernels"] == [
        "add_act_backward_kernel", "add_act_forward_kernel", "coefficients_kernel", "conv_dgrad_kernel",
        "conv_forward_kernel", "conv_pointwise_backward_kernel",
        "conv_wgrad_kernel", "gradient_kernel", "highway_backward_kernel", "highway_forward_kernel", "merge_kernel",
        "pool_backward_kernel", "pool_forward_kernel",
    ]  # fmt: skip


def test_addresses_are_specialised_as_triton_does(found):
    """Once for addresses that 16 divides, and once for those that it does not; what has been compiled is not looked up again."""
    assert found["specialisations"] == [1, 0, 1, 0]


def test_who_looks_on_sees_public_calls(found):
    """A hook, debug mode and an unknown version of Triton each get Triton's own launch, and afterwards nobody does."""
    assert found["watched"] == [0, 1, 1, 1, 0]


def test_of_every_launch_observers_learn_what_tritons_launcher_asks_the_driver_for(found):
    result = found["requests_are_tritons"]
    assert result == {"launches": 50, "kernels": 13, "different": []}


def test_what_triton_compiles_is_described_as_it_is_launched(found):
    assert found["really_compiled"] == {"launches": 2, "same": [True] * 2, "parameters": [True] * 2}


def test_tensor_descriptors_are_over_the_tensors_of_each_launch(found):
    """The second of two launches goes past Triton's public call; nobody else can say what the driver was asked for."""
    assert found["described"] == {"same": True, "launches": 2, "public": [1, 0], "said": [None, None]}


@needs_extension
def test_a_tape_asks_the_driver_for_what_its_schedule_does(found):
    result = found["tapes_are_schedules"]
    assert result["same"] == [True] * 6
    *recording, played, watched, in_a_thread = result["in_python"]
    assert recording[:2] == [result["launches"]] * 2 and played == 0
    # a thread's first schedule goes through Triton's launcher, which makes the device's context current
    assert watched == result["launches"] and 0 < in_a_thread == recording[2] < 10


def test_launches_are_dependent_only_by_the_environment_variable():
    environment = {k: v for k, v in os.environ.items() if k != "FUSEDRES_DEPENDENT_LAUNCHES"}
    said = []
    for variable in ({}, {"FUSEDRES_DEPENDENT_LAUNCHES": "0"}, {"FUSEDRES_DEPENDENT_LAUNCHES": "1"}):
        command = ["-c", "from fusedres.kernels import launch; print(launch.dependent)"]
        said.append(forked.python(command, cwd=ROOT, env=environment | variable).stdout.strip())
    assert said == ["False", "False", "True"]


@needs_extension
def test_launches_are_dependent_where_they_are_asked_to_be_and_the_gpu_can(found):
    """By Triton's launcher and from a tape, each switch with a tape of its own."""
    count = found["dependent"]["on"][0][0]
    assert count > 5
    for which, steps in found["dependent"].items():
        of_them = count if which.startswith("on") else 0
        assert [step[:2] for step in steps] == [[count, of_them]] * 4, which
        in_python = [step[2] for step in steps]
        assert in_python == [0] * 4 if which == "on again" else in_python[0] == count and in_python[-1] == 0, which


def test_arguments_are_checked_when_a_launch_is_prepared(found):
    devices, order = found["refusals"]
    assert devices == "the tensors of a launch are on one device, found cpu, meta"
    assert order.startswith("the arguments of add_act_forward_kernel are ['raw', ") and "found ['out', " in order
