"""Where kernels are interpreted, the contract holds for bfloat16 as well: by a corrected interpreter."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def right_bfloat16(request: pytest.FixtureRequest) -> Iterator[None]:
    """Triton's interpreter corrected around the tests that run a backend by its ``config``."""
    if "config" not in request.fixturenames or not request.getfixturevalue("config").interpreted:
        yield
        return
    from interpreter import corrected

    with corrected():
        yield
