"""Schedules of the Triton backend that are played from a tape: the bits of the schedule in Python, and nothing is played for what it was
not recorded for. Kernels run in the interpreter, behind a driver that is emulated; that a real one is asked for the same as by Triton's
own launcher: ``test_launch.py``."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import pytest
import torch
from emulated import Driver, emulated
from support import each_mode
from taped import assert_same, drawn, in_python, row, steps
from test_family import ALL
from torch import Tensor, nn

pytest.importorskip("triton")
pytest.importorskip("fusedres._C")

import fusedres  # noqa: E402
from fusedres.backends import tape  # noqa: E402
from fusedres.backends.triton import TritonBackend, use_plan  # noqa: E402
from fusedres.blocks import stretch  # noqa: E402
from fusedres.kernels.launch import INTERPRETED  # noqa: E402
from fusedres.nn import BasicBlock  # noqa: E402

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="wants kernels in the interpreter")


@pytest.fixture
def driver(monkeypatch) -> Iterator[Driver]:
    """What is played goes to it; a schedule is recorded at its first run."""
    monkeypatch.setattr(tape, "RUNS_BEFORE_RECORDING", 0)
    monkeypatch.setattr(stretch, "RUNS_BEFORE", 100)  # block by block
    with fusedres.use_backend("triton"), emulated() as driver:
        yield driver


def assert_plays(block: nn.Module, shape: tuple[int, ...], training: bool, driver: Driver) -> None:
    maps = [torch.randn(shape).to(memory_format=torch.channels_last) for _ in range(2)]
    twin = copy.deepcopy(block)
    ours = steps(block, maps, training)
    assert driver.launches > 0, "nothing was played"
    assert_same(ours, in_python(TritonBackend, lambda: steps(twin, maps, training)))


QUICK = ("bottleneck-grouped", "row-then-transition")


@each_mode
@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in ALL])
def test_a_tape_of_launches_gives_the_bits_of_its_schedule(name, training, driver):
    build, (_, *shape) = ALL[name]
    assert_plays(drawn(build, training), (1, *shape), training, driver)


@each_mode
def test_convolutions_of_the_library_stand_between_launches(training, driver):
    with use_plan("library"):
        assert_plays(drawn(row, training), (2, 8, 5, 7), training, driver)


def launched(driver: Driver, run: Callable[[], object]) -> int:
    """How many launches of a tape there are meanwhile."""
    before = driver.launches
    run()
    return driver.launches - before


def test_a_map_at_another_alignment_is_not_played(driver):
    block = drawn(row, False)
    whole = torch.randn(2, 5, 7, 8 + 1)
    x, odd = torch.randn(2, 8, 5, 7).to(memory_format=torch.channels_last), whole[..., 1:].permute(0, 3, 1, 2)
    y = odd.contiguous(memory_format=torch.channels_last)
    twin = torch.empty(y.numel() + 1)[1:].view(2, 5, 7, 8).permute(0, 3, 1, 2).copy_(y)
    assert twin.stride() == x.stride() and twin.data_ptr() % 16
    with torch.no_grad():
        block(x)
        assert launched(driver, lambda: block(x)) > 0
        found: list[Tensor] = []
        assert launched(driver, lambda: found.append(block(twin))) == 0
        assert torch.equal(found[0], block(y))


def test_another_plan_has_another_tape(driver):
    block, x = drawn(row, False), torch.randn(2, 8, 5, 7).to(memory_format=torch.channels_last)
    with torch.no_grad():
        block(x)
        assert launched(driver, lambda: block(x)) == 2 == len(driver.functions)
        with use_plan("library"):
            assert launched(driver, lambda: block(x)) == 0
            assert launched(driver, lambda: block(x)) == 2 == len(driver.functions) - 2
        assert launched(driver, lambda: block(x)) == 2 == len(driver.functions) - 2


def test_blocks_in_a_row_are_launched_by_one_call_in_inference(driver, monkeypatch):
    monkeypatch.setattr(stretch, "RUNS_BEFORE", 0)
    model = drawn(lambda: nn.Sequential(*row(), *row(), BasicBlock(8, 8)), False)
    x, calls = torch.randn(1, 8, 5, 3).to(memory_format=torch.channels_last), list[int]()
    play = tape.Tape.play
    with torch.no_grad():
        expected = model(x)  # recorded, block by block
        monkeypatch.setattr(tape.Tape, "play", lambda *args: (calls.append(driver.launches), play(*args))[1])
        assert launched(driver, lambda: calls.append(int(torch.equal(model(x), expected)))) > 3
    assert calls == [0, 1]


def test_a_refused_launch_raises(driver):
    block, x = drawn(row, False), torch.randn(2, 8, 5, 7).to(memory_format=torch.channels_last)
    with torch.no_grad():
        block(x)
        driver.functions.clear()
        with pytest.raises(RuntimeError, match="the driver has refused a recorded launch: error 1"):
            block(x)
    assert isinstance(driver.error, IndexError)
    driver.error = None
