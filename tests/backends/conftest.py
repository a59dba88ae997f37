"""Where kernels are interpreted, the contract holds for bfloat16 as well, by a corrected interpreter, and every access is watched."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


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
