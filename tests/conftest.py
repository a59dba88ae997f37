"""What all tests share: Triton's interpreter where there is no GPU, the ``gpu`` marker, one core per worker's share, the package ``bench``,
the CUDA C++ kernels on the host as a backend of its own, and the option ``--backend`` of the contract's tests."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is first imported

if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "0")):
    # every worker would take all cores otherwise
    torch.set_num_threads(max(1, torch.get_num_threads() // workers))

# the package bench without the checkout's root on sys.path, where kernels/ would answer for other people's
_spec = importlib.util.spec_from_file_location("bench", Path(__file__).parents[1] / "bench" / "__init__.py")
sys.modules.setdefault("bench", importlib.util.module_from_spec(_spec))

import host_kernels  # noqa: E402  # after what torch and Triton read when they are imported

host_kernels.register()


def pytest_addoption(parser: pytest.Parser) -> None:
    """``--backend NAME``: hold that backend alone to the contract."""
    parser.addoption("--backend", action="append", help="run tests/backends/test_contract.py for this backend alone")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what is marked ``gpu`` where there is none."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))


@pytest.fixture
def uninitialised_memory_is_nan() -> Iterator[None]:
    """Fresh memory holds NaN, so that reading what nobody has written fails."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
