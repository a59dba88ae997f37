"""``python -m fusedres doctor`` tells the truth: with the extension, without it, and under an override."""

from __future__ import annotations

import json
import os

import forked
import pytest
import torch
from support import ran

import fusedres
from fusedres import doctor
from fusedres.__main__ import main

WITHOUT_EXTENSION = (
    "import sys; sys.modules['fusedres._C'] = None; from fusedres.__main__ import main; main(['doctor', '--json'])"
)


def run(arguments: list[str], folder, **environment: str) -> dict:
    """The JSON that a new process in ``folder`` prints."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("FUSEDRES_", "TRITON_"))}
    done = forked.python(arguments, cwd=folder, env=clean | environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_the_doctor_says_what_a_block_then_does(capsys):
    assert main(["doctor", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["versions"]["torch"] == torch.__version__
    block = fusedres.nn.BasicBlock(4, 4)
    with torch.no_grad():
        block(torch.randn(1, 4, 5, 5))
    runs = said["serves"]["cpu"]["float32"]["runs"]
    assert ran(block).startswith(runs)


def test_without_the_extension_the_original_modules_run_and_the_reason_is_given(tmp_path):
    said = run(["-c", WITHOUT_EXTENSION], tmp_path)
    assert said["extension"]["file"] is None and "_C" in said["extension"]["error"]
    served = said["serves"]["cpu"]["float32"]
    assert served["runs"] == "original modules"
    assert "extension" in served["backends"]["cpp"] and served["backends"]["eager"] == "available"


def test_the_extension_and_its_instruction_set_are_named(tmp_path):
    pytest.importorskip("fusedres._C", exc_type=ImportError)
    said = run(["-m", "fusedres", "doctor", "--json"], tmp_path, FUSEDRES_CPU_CAPABILITY="default")
    assert said["extension"]["capability"] == "default"
    assert said["environment"] == {"FUSEDRES_CPU_CAPABILITY": "default"}
    assert said["serves"]["cpu"]["float32"]["runs"] == "cpp"


def test_an_override_that_cannot_serve_is_shown_as_the_error_that_it_will_be(tmp_path):
    said = run(["-m", "fusedres", "doctor", "--json"], tmp_path, FUSEDRES_BACKEND="triton")
    assert said["serves"]["cpu"]["float32"]["runs"].startswith("error: backend 'triton' was asked for")


def test_a_person_reads_devices_and_reasons(capsys):
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    found = doctor.diagnose()
    assert f"cpu: {found['devices']['cpu']}" in text
    for name, reason in found["serves"]["cpu"]["float64"]["backends"].items():
        assert reason == "available" or f"not {name}: {reason}" in text
