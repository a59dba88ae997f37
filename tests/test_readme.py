"""What the README shows runs as it stands there; its longer commands are those of .ci/run."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import warnings
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PAGES = [*sorted(ROOT.glob("*.md")), *sorted(ROOT.glob("docs/*.md")), ROOT / "examples" / "README.md"]


def test_its_python_runs(capsys):
    pytest.importorskip("torchvision")
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    exec(compile(code, "README.md", "exec"), {"__name__": "readme"})
    assert "17 of 17 blocks" in capsys.readouterr().out


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
@pytest.mark.parametrize("target", sorted(set(re.findall(r"\bmake ([a-z]+)\b", README))))
def test_its_targets_exist(target):
    assert subprocess.run(["make", "--dry-run", target], cwd=ROOT, capture_output=True).returncode == 0


def test_the_python_of_the_guide_runs(capsys):
    pytest.importorskip("torchvision")
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "guide.md").read_text(), re.DOTALL)
    names = {"__name__": "guide"}
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)  # what convert says of a structure that differs
        for block in blocks:
            exec(compile(block, "docs/guide.md", "exec"), names)
    assert "blocks fused" in capsys.readouterr().out


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)]+)\)", page.read_text()):
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        other = page if not path else (page.parent / path)
        assert other.exists(), f"{page.name}: {link}"
        if anchor and other.suffix == ".md":
            lines = other.read_text().splitlines()
            anchors = {re.sub(r"[^\w -]", "", line.lstrip("# ").lower()).strip().replace(" ", "-") for line in lines}
            assert anchor in anchors, f"{page.name}: {link}"


def test_its_modules_exist():
    for module in re.findall(r"python -m ((?:bench|fusedres)[.\w]*)", README):
        path = ROOT / module.replace(".", "/")
        assert path.with_suffix(".py").exists() or (path / "__main__.py").exists(), module


@pytest.mark.parametrize("model", ["densenet121", "resnet50"])
@pytest.mark.parametrize("mode", ["train", "infer"])
@pytest.mark.parametrize("contender", ["fused", "fused-recompute", "fused-prepacked"])
def test_its_figures_are_the_measured_ones(model, mode, contender):
    found = {
        (r["model"], r["mode"], r["contender"]): r for r in json.loads((ROOT / "results" / "models.json").read_text())
    }
    record, eager, compiled = (found.get((model, mode, name)) for name in (contender, "eager", "compile"))
    if record is None:
        assert (mode, contender) in (("infer", "fused-recompute"), ("train", "fused-prepacked"))
        return
    words = {"densenet121": "DenseNet-121", "resnet50": "ResNet-50", "train": "training", "infer": "inference"}
    cells = [f"{words[model]} {words[mode]}{contender.replace('fused', '').replace('-', ', ')}"]
    cells += [f"{r['images_per_s']:.1f}" for r in (eager, compiled, record)]
    cells += [f"{r['ratio_to_eager']:.2f}x" for r in (compiled, record)]
    kept = "kept_for_backward_bytes"
    cells.append(f"{record[kept] / eager[kept]:.2f}x" if mode == "train" else "")
    assert f"| {' | '.join(cells)} |".replace("  |", " |") in README
    assert record["environment"]["date"][:10] in README and record["environment"]["device"] in README


@pytest.mark.parametrize("of, words", [("bfloat16", "In bfloat16"), ("avx2", "With AVX2 alone")])
def test_its_other_figures_are_the_measured_ones(of, words):
    records = json.loads((ROOT / "results" / f"models-{of}.json").read_text())
    ratio = {(r["model"], r["mode"]): f"{r['ratio_to_eager']:.2f}x" for r in records if r["contender"] == "fused"}
    dense, residual = ([ratio[model, mode] for mode in ("train", "infer")] for model in ("densenet121", "resnet50"))
    said = "DenseNet-121 trains at {} and infers at {} eager, ResNet-50 at {} and {}".format(*dense, *residual)
    assert f"{words} {said}" in README


def test_its_figures_of_one_image_at_a_time_are_the_measured_ones():
    records = json.loads((ROOT / "results" / "models-batch1.json").read_text())
    for model, words in (("densenet121", "DenseNet-121"), ("resnet50", "ResNet-50")):
        ratio = {r["contender"]: f"{r['ratio_to_eager']:.2f}x" for r in records if r["model"] == model}
        assert (
            "{} at {fused} and {prepacked} of eager".format(words, **ratio, prepacked=ratio["fused-prepacked"])
            in README
        )
