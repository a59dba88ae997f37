"""Fixtures for tests of blocks."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture
def compiled_backend() -> Iterator[None]:
    """Everything runs by the C++ extension; without it nothing does."""
    pytest.importorskip("fusedres._C")
    import fusedres  # as below

    with fusedres.use_backend("cpp"):
        yield


@pytest.fixture
def plays(monkeypatch) -> list[int]:
    """The number of schedules that were played."""
    from fusedres.backends import tape  # not before tests/conftest.py has said which interpreter Triton has

    count, play = [0], tape.Tape.play

    def played(self, *args):
        found = play(self, *args)
        count[0] += found is not None
        return found

    monkeypatch.setattr(tape.Tape, "play", played)
    return count


@pytest.fixture
def rows(monkeypatch) -> list[int]:
    """The number of rows that ran."""
    from fusedres.blocks import stretch  # as above

    count, run = [0], stretch._Row.run

    def ran(self, *args):
        count[0] += 1
        return run(self, *args)

    monkeypatch.setattr(stretch._Row, "run", ran)
    return count
