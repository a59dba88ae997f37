"""What all tests share: Triton's interpreter where there is no GPU, the ``gpu`` marker, one core per worker's share, the package ``bench``,
the CUDA C++ kernels on the host as a backend of its own, and the option ``--backend`` of the contract's tests."""

from __future__ import annotations

import gc
import importlib
import importlib.util
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from _pytest.runner import runtestprotocol

# read when torch loads OpenMP: workers, and the processes that tests start, share the cores, so that a thread that waits must not spin
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# read with torch's compiler, which would collect garbage after everything that it compiles: so often that full collections follow
os.environ.setdefault("TORCH_DYNAMO_RUN_GC_AFTER_COMPILE", "0")

# the package bench without the checkout's root on sys.path, where kernels/ would answer for other people's
_spec = importlib.util.spec_from_file_location("bench", Path(__file__).parents[1] / "bench" / "__init__.py")
sys.modules.setdefault("bench", importlib.util.module_from_spec(_spec))


def pytest_configure(config: pytest.Config) -> None:
    """What tests run in, ready; but where workers run them: there each has its own, and who only tells them which needs no torch."""
    if config.getoption("dist", "no") != "no":
        return
    import torch

    if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "0")):
        # every worker would take all cores otherwise
        torch.set_num_threads(max(1, torch.get_num_threads() // workers))
        config.pluginmanager.register(Brief(), "brief")
    if not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"  # read when triton is first imported
        # torch.manual_seed notes the stack for devices that are not there, for each kind of them, which takes longer than to seed
        for devices in (torch.cuda, torch.xpu):
            devices.manual_seed_all = lambda seed: None

    import host_kernels  # after what torch and Triton read when they are imported

    host_kernels.register()


class Brief:
    """How a worker runs a test: it tells of its call, and of all that did not pass, but not also that it begins, is set up, torn down and
    over, each of which takes longer than a quick test."""

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item, nextitem: pytest.Item | None) -> bool | None:
        if item.config.getoption("durations") is not None:  # of which that is a part
            return None
        for report in runtestprotocol(item, log=False, nextitem=nextitem):
            if report.when == "call" or not report.passed:
                item.ihook.pytest_runtest_logreport(report=report)
        return True


def pytest_addoption(parser: pytest.Parser) -> None:
    """``--backend NAME``: hold that backend alone to the contract."""
    parser.addoption("--backend", action="append", help="run tests/backends/test_contract.py for this backend alone")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what is marked ``gpu`` where there is none."""
    import torch

    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))


@pytest.hookimpl(hookwrapper=True)
def pytest_collection() -> Iterator[None]:
    """No garbage collection while tests are found, nor ever of what is there for the whole session by then: a full one would go through
    torch and thousands of tests each time."""
    gc.disable()
    yield
    gc.freeze()
    gc.enable()
    # tests make many objects that live as long as the test does: less often, a collection finds more of them dead
    gc.set_threshold(50_000, 10, 20)


_modules = len(sys.modules)
#: whether a full collection has run since what there was has last been set aside
_collected = False


def _note_collection(phase: str, info: dict[str, int]) -> None:
    global _collected
    _collected = _collected or (phase == "stop" and info["generation"] == 2)


gc.callbacks.append(_note_collection)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_teardown() -> Iterator[None]:
    """Nor is what has outlived a full collection, between two tests, gone through again and again: a large library that a test has been
    the first to import, what compilers keep."""
    global _modules, _collected
    yield
    if len(sys.modules) > _modules + 200:
        _modules = len(sys.modules)
        gc.collect()
    if _collected:
        _collected = False
        gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def a_quick_interpreter() -> None:
    """Triton's interpreter, where it is the one that runs kernels, without what it does beside running them."""
    import torch

    if not torch.cuda.is_available() and importlib.util.find_spec("triton") is not None:
        from interpreter import quicken

        quicken()


#: structures whose proof has held in this process
_held: set[tuple[object, ...]] = set()


@pytest.fixture
def proven_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """What has been proven when it was converted in one test is not proven again in another. For tests that compare what is converted with
    its modules themselves, and that plant no fault for a proof to find."""
    verify = importlib.import_module("fusedres.verify")
    disprove = verify.disprove

    def once(claim: Any) -> str | None:
        what = claim.structure, repr(claim.form), claim.asks
        reason = None if what in _held else disprove(claim)
        if reason is None:
            _held.add(what)
        return reason

    monkeypatch.setattr(verify, "disprove", once)


@pytest.fixture
def uninitialised_memory_is_nan() -> Iterator[None]:
    """Fresh memory holds NaN, so that reading what nobody has written fails."""
    import torch

    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
