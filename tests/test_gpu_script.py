"""The one command that needs a GPU, rehearsed without one."""

from __future__ import annotations

import json
import os
from pathlib import Path

import forked
import pytest

pytest.importorskip("triton")
pytest.importorskip("torchvision")
pytest.importorskip("rich")

ROOT = Path(__file__).parents[1]


def rehearse(out: Path, *arguments: str) -> tuple[int, dict[str, dict]]:
    """The exit status and the outcomes by stage."""
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    done = forked.python(
        ["-m", "bench.gpu", "--dry-run", "--out", str(out), *arguments], cwd=ROOT, env=environment, timeout=3600
    )
    return done.returncode, {outcome["stage"]: outcome for outcome in json.loads((out / "summary.json").read_text())}


def test_a_stage_runs(tmp_path):
    """This script's own, and what it leaves."""
    code, outcomes = rehearse(tmp_path, "--only", "environment")
    assert code == 0 and {o["status"] for o in outcomes.values()} == {"passed"}
    assert json.loads((tmp_path / "environment.json").read_text())["backends"]["torch.float32"]["triton"] == "available"
    page = (tmp_path / "summary.md").read_text()
    assert "rehearsal" in page and "| environment | passed |" in page


@pytest.mark.slow
def test_the_roofline_is_counted_and_drawn(tmp_path):
    code, outcomes = rehearse(tmp_path, "--only", "environment", "primitives-resnet50-train")
    assert code == 0 and {o["status"] for o in outcomes.values()} == {"passed"}
    assert json.loads((tmp_path / "primitives-resnet50-train.json").read_text())[0]["primitives"]
    page = (tmp_path / "summary.md").read_text()
    assert "rehearsal" in page and "| primitives-resnet50-train | passed |" in page
    assert (tmp_path / "primitives.png").stat().st_size > 10_000


@pytest.mark.slow
def test_what_is_tuned_and_the_times_on_the_host_are_left(tmp_path):
    code, outcomes = rehearse(tmp_path, "--only", "host", "tune")
    assert code == 0 and {o["status"] for o in outcomes.values()} == {"passed"}
    assert list((tmp_path / "plans").glob("*.json"))
    (host,) = json.loads((tmp_path / "host.json").read_text())["records"]
    assert host["launches"] > 50 and 0 < host["milliseconds"] and 0 < host["eager_milliseconds"]
    assert "| tune | passed |" in (tmp_path / "summary.md").read_text()


@pytest.mark.slow
def test_what_is_cut_off_leaves_the_rest(tmp_path):
    code, outcomes = rehearse(tmp_path, "--only", "environment", "tests", "models-32", "--budget", "0.5")
    assert code == 0
    assert {stage: o["status"] for stage, o in outcomes.items()} == {
        "environment": "cut off", "tests": "left out", "models-32": "left out",
    }  # fmt: skip
    # some stages more add to what is there
    code, outcomes = rehearse(tmp_path, "--only", "ceilings", "--budget", "0")
    assert code == 0 and list(outcomes) == ["environment", "tests", "ceilings", "models-32"]


def test_without_a_gpu_it_says_so(tmp_path):
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    done = forked.python(["-m", "bench.gpu", "--out", str(tmp_path)], cwd=ROOT, env=environment)
    assert done.returncode == 2 and "--dry-run" in done.stderr


@pytest.mark.slow
def test_every_stage(tmp_path):
    code, outcomes = rehearse(tmp_path)
    assert code == 0 and {o["status"] for o in outcomes.values()} == {"passed"}
