"""The aids of the repository say what is true: workflows, hooks, CONTRIBUTING.md, CHANGELOG.md and docs/ name what is there."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

import fusedres

yaml = pytest.importorskip("yaml")

ROOT = Path(__file__).resolve().parent.parent
WORKFLOWS = ROOT / ".github" / "workflows"
PAGES = ("CONTRIBUTING.md", "CHANGELOG.md", "README.md", "docs/architecture.md", "docs/whole-block-fusion.md")
SOURCES = tuple(
    path
    for top in ("fusedres", "kernels", "csrc", "bench", "tests")
    for path in (ROOT / top).rglob("*")
    if path.suffix in (".py", ".h", ".cpp")
)


def _commands(workflow: str) -> list[str]:
    jobs = yaml.safe_load((WORKFLOWS / workflow).read_text())["jobs"]
    return [step["run"] for job in jobs.values() for step in job["steps"] if "run" in step]


def _triggers(workflow: str) -> dict:
    return yaml.safe_load((WORKFLOWS / workflow).read_text())[True]  # YAML reads the key `on` as a truth value


def test_every_change_runs_the_continuous_integration():
    assert {"push", "pull_request"} <= set(_triggers("ci.yml"))
    assert _commands("ci.yml") == [".ci/run"]
    assert (ROOT / ".ci" / "run").stat().st_mode & 0o100


def test_the_slow_tests_run_on_a_schedule():
    assert _triggers("slow.yml")["schedule"][0]["cron"]
    assert ".venv/bin/pytest -m slow" in _commands("slow.yml")


def test_a_commit_runs_what_lint_runs():
    tomllib = pytest.importorskip("tomllib")  # of Python 3.11
    hooks = [
        hook
        for repo in yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
        for hook in repo["hooks"]
    ]
    tools = {Path(shlex.split(hook["entry"])[0]).name for hook in hooks}
    lint = re.search(r"^lint:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    linted = {Path(line.split()[0]).name for line in lint[1].splitlines()}
    assert {"ruff", "pyright", "clang-format"} <= linted <= tools
    developed = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["dev"]
    assert linted <= {re.split(r"[\[<>=~]", requirement)[0] for requirement in developed}


def test_the_changelog_begins_with_this_version():
    versions = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert versions[0] == "Unreleased" and fusedres.__version__ in versions


@pytest.mark.parametrize("page", PAGES)
def test_the_links_of_a_page_lead_somewhere(page):
    path = ROOT / page
    for link in re.findall(r"\]\(([^)#]+)[^)]*\)", path.read_text()):
        assert link.startswith("https://") or (path.parent / link).exists(), link


@pytest.mark.parametrize("page", ["CONTRIBUTING.md", "docs/architecture.md"])
def test_the_files_that_a_page_names_are_there(page):
    text = re.sub(r"```.*?```", "", (ROOT / page).read_text(), flags=re.DOTALL)
    named = set(re.findall(r"`((?:fusedres|kernels|csrc|tests|bench|docs)/[\w./-]*)`", text))
    assert named
    for name in named:
        if not re.search(r"\b(NAME|FAMILY)\b", name):  # what a recipe creates
            assert (ROOT / name).exists(), f"{page} names {name}"


@pytest.mark.parametrize("page", ["CONTRIBUTING.md", "docs/architecture.md"])
def test_the_tests_that_a_page_runs_are_there(page):
    for name in re.findall(r"\b(tests/[\w./]+\.py)\b", (ROOT / page).read_text()):
        assert (ROOT / name).exists(), f"{page} runs {name}"


def test_every_environment_variable_is_described():
    sources = "".join(path.read_text() for path in (*SOURCES, ROOT / "setup.py") if path != Path(__file__))
    read = set(re.findall(r"""(?:environ|getenv)\b[^\n]{0,9}["'](FUSEDRES_[A-Z_]+)["']""", sources))
    page = (ROOT / "docs" / "architecture.md").read_text()
    described = set(re.findall(r"`(FUSEDRES_[A-Z_]+)`", "".join(re.findall(r"^\|.*\|$", page, re.MULTILINE))))
    assert read and read <= described
