"""What an installation holds and what it must not leak."""

from __future__ import annotations

import importlib
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import forked
import pytest

import fusedres

ROOT = Path(__file__).resolve().parent.parent
sources = pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="the sources are not here")


def run(command: list[str], cwd: Path, **env: str) -> subprocess.CompletedProcess:
    return subprocess.run(command, cwd=cwd, env=os.environ | env, capture_output=True, text=True)


def test_no_top_level_kernels(tmp_path):
    # PyPI has a package of that name
    code = "import importlib.util as u, fusedres; print(u.find_spec('kernels'), u.find_spec('fusedres.kernels') is not None)"
    assert forked.python(["-c", code], cwd=tmp_path).stdout.split() == ["None", "True"]


def test_kernels_import_as_a_subpackage():
    assert importlib.import_module("fusedres.kernels").__name__ == "fusedres.kernels"


def test_the_extension_loads():
    extension = pytest.importorskip("fusedres._C", exc_type=ImportError)
    assert extension.cpu_capability() in extension.cpu_capabilities()
    assert ".abi3." in extension.__file__
    assert fusedres.library_path() == Path(extension.__file__)
    assert fusedres.library_path().parent == Path(fusedres.__file__).parent


def test_the_version_is_that_of_the_distribution():
    from importlib.metadata import version

    assert version("fusedres") == fusedres.__version__


def test_without_the_extension_the_backend_says_what_to_type(tmp_path):
    code = (
        "import sys; sys.modules['fusedres._C'] = None\n"
        "import torch, fusedres\n"
        "from fusedres.backends import cpp\n"
        "print(cpp.BACKEND.supports(torch.device('cpu'), torch.float32))"
    )
    said = forked.python(["-c", code], cwd=tmp_path).stdout
    assert "FUSEDRES_BUILD=cpu pip install" in said


@pytest.fixture
def checkout(tmp_path) -> Path:
    """The files of the source tree that a build reads, without what earlier builds left."""
    left_behind = shutil.ignore_patterns("__pycache__", "*.so", "*.egg-info")
    for folder in ("fusedres", "kernels", "csrc", "bench", "tests"):
        if (ROOT / folder).exists():
            shutil.copytree(ROOT / folder, tmp_path / folder, ignore=left_behind)
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


def wheel(checkout: Path, **env: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "pip", "wheel", "-v", "--no-deps", "--no-build-isolation", "-w", "dist", "."]
    return run(command, checkout, PIP_NO_INDEX="1", **env)


@sources
@pytest.mark.slow
@pytest.mark.parametrize(
    "env",
    [{"FUSEDRES_BUILD": "none"}, {"FUSEDRES_BUILD": "auto", "CXX": "no-such-compiler"}],
    ids=["not asked for", "no compiler"],
)
def test_a_wheel_without_the_extension(checkout, env):
    built = wheel(checkout, **env)
    assert built.returncode == 0, built.stderr
    if "CXX" in env:
        assert "without its C++ kernels: no C++ compiler 'no-such-compiler' was found" in built.stdout + built.stderr
    (file,) = (checkout / "dist").glob("*.whl")
    assert file.name.endswith("-py3-none-any.whl")
    names = zipfile.ZipFile(file).namelist()
    assert {
        "fusedres/__init__.py",
        "fusedres/backends/cpp.py",
        "fusedres/kernels/__init__.py",
        "fusedres/cuda/kernels.cu",
        "fusedres/cuda/kernels.cuh",
        "fusedres/_C.pyi",
        "fusedres/py.typed",
    } <= set(names)
    assert {name.split("/")[0].split("-")[0] for name in names} == {"fusedres"}


@sources
@pytest.mark.slow
@pytest.mark.parametrize(
    ("env", "sentence"),
    [
        ({"FUSEDRES_BUILD": "cpu", "CXX": "no-such-compiler"}, "FUSEDRES_BUILD=cpu, but no C++ compiler"),
        ({"FUSEDRES_BUILD": "gpu"}, "expected auto, cpu or none"),
    ],
    ids=["asked for without a compiler", "unknown"],
)
def test_a_build_that_cannot_be_done_says_why(checkout, env, sentence):
    built = wheel(checkout, **env)
    assert built.returncode != 0
    assert sentence in built.stdout + built.stderr


@sources
@pytest.mark.slow
def test_the_source_distribution_holds_every_source(checkout):
    built = run([sys.executable, "setup.py", "-q", "sdist"], checkout, FUSEDRES_BUILD="none")
    assert built.returncode == 0, built.stderr
    (file,) = (checkout / "dist").glob("*.tar.gz")
    shutil.unpack_archive(file, checkout / "unpacked")
    (root,) = (checkout / "unpacked").iterdir()
    for folder in ("csrc", "kernels", "fusedres", "tests"):
        expected = {
            p.relative_to(checkout)
            for p in (checkout / folder).rglob("*")
            if p.suffix in (".cpp", ".cu", ".cuh", ".h", ".py", ".json")
        }
        assert expected <= {p.relative_to(root) for p in (root / folder).rglob("*")}
