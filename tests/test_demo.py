"""The demo shows progress where there is no terminal, keeps its budget, and reports what it has when it is interrupted."""

from __future__ import annotations

import functools
import io
import json
import time

import pytest

pytest.importorskip("torchvision")
pytest.importorskip("skimage")
pytest.importorskip("rich")

from rich.console import Console

from bench import demo, models
from bench import progress as progressing

TOY = ("--models", "resnet18", "--batch", "2", "--resolution", "32", "--rounds", "2")
QUICK = (*TOY, "--contenders", "eager", "fused")


def test_without_a_terminal_there_is_a_line_at_the_beginning_and_one_whenever_time_has_passed(monkeypatch):
    monkeypatch.setattr(progressing, "EVERY", 0.05)
    log = io.StringIO()
    with progressing.progress(Console(file=log, width=140), 4) as advance:
        advance("the first")
        advance("the second, which takes long")
        time.sleep(0.5)
    lines = log.getvalue().splitlines()
    assert "1 of 4: the first" in lines[0] or "2 of 4" in lines[0]
    assert len(lines) >= 3 and "2 of 4: the second, which takes long" in lines[-1] and "s left]" in lines[-1]


def test_no_line_is_written_behind_the_end(monkeypatch):
    monkeypatch.setattr(progressing, "EVERY", 0.02)
    log = io.StringIO()
    with progressing.progress(Console(file=log, width=140), 1) as advance:
        advance("all of it")
    written = log.getvalue()
    time.sleep(0.1)
    assert log.getvalue() == written


@pytest.mark.parametrize(
    "arguments", [pytest.param(QUICK, id="two contenders"), pytest.param(TOY, id="all", marks=pytest.mark.slow)]
)
def test_the_demo_proves_measures_and_reports(arguments, tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "prove", functools.partial(demo.prove, draws=1))
    assert demo.main([*arguments, "--compile", "--out", str(tmp_path)]) == 0
    records = json.loads((tmp_path / "records.json").read_text())
    assert {(r["mode"], r["contender"]) for r in records} >= {
        ("train", "fused"),
        ("infer", "fused"),
        ("infer", "eager"),
    }
    assert all(r["failure"] is None for r in records)
    assert "as right as eager's" in (tmp_path / "report.md").read_text() and (tmp_path / "report.png").exists()


def test_an_interrupted_demo_reports_what_it_has(tmp_path, monkeypatch, capsys):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "compiled", interrupted)
    monkeypatch.setattr(demo, "prove", lambda *arguments: True)
    demo.main([*QUICK, "--compile", "resnet18", "--out", str(tmp_path)])
    assert "interrupted: the report is of what was measured until now" in capsys.readouterr().out
    assert (tmp_path / "report.md").exists() and json.loads((tmp_path / "records.json").read_text())


def test_the_compiler_is_stopped_when_its_time_is_over(capsys):
    begin = time.monotonic()
    found = demo.compiled("resnet18", 0.5, models.Settings(2, 32), Console(width=140))
    assert found == [] and time.monotonic() - begin < 30
    assert "torch.compile was not ready with resnet18 within 0 s" in capsys.readouterr().out
