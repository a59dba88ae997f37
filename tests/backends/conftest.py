"""Where kernels are interpreted, the contract holds for bfloat16 as well, by a corrected interpreter, and every access is watched."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch


@pytest.fixture(autouse=True)
def right_and_watched(request: pytest.FixtureRequest) -> Iterator[None]:
    """Triton's interpreter corrected around the tests that run a backend by its ``config``, with programs in a shuffled order, and what
    kernels touch watched."""
    if "config" not in request.fixturenames or not request.getfixturevalue("config").interpreted:
        yield
        return
    from interpreter import corrected, watched

    with corrected(order="shuffle"), watched():
        yield


@pytest.fixture
def exact_and_unmeasured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """On the backend ``triton`` no measured plans, nothing failed before, and no TF32: the rule compares IEEE float32."""
    from fusedres.backends.triton import BACKEND
    from fusedres.kernels import launch
    from fusedres.tuning import plans

    monkeypatch.setenv("FUSEDRES_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(BACKEND, "_fallen", {})
    plans.forget()
    launch.forget()
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield
    plans.forget()
    launch.forget()
