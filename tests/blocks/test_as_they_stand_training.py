"""What blocks call as it stands, where gradients are recorded: part of a row, in which it is called anew at every step."""

from __future__ import annotations

import operator
from collections.abc import Callable

import general_blocks
import pytest
import torch
from standing import CHANGES, MODELS, Weighed
from stretched import (
    WARM_ROWS,
    added_by,
    assert_same_step,
    images,
    model_of,
    one_by_one,
    row,
    step,
    training,
    warm,
)
from torch import Tensor, nn

import fusedres
from fusedres.backends import select
from fusedres.blocks import stretch
from fusedres.blocks.calls import PlainCall, follow, made
from fusedres.blocks.handover import Handover
from fusedres.swap import state_of
from fusedres.trial import memory

pytestmark = pytest.mark.usefixtures("compiled_backend")

#: models with something inside that a step of training changes, or a dense layer in pieces: the blocks around it are rows
ALONE = ("around", "norm", "layers in pieces")


def assert_same_steps(model: nn.Module, twin: nn.Module, steps: int, memory_format: torch.memory_format) -> None:
    for _ in range(steps):
        assert_same_step(model, twin, images().to(memory_format=memory_format))


@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format], ids=["nhwc", "nchw"])
@pytest.mark.parametrize("name", [name for name in MODELS if name not in ALONE])
def test_it_is_part_of_a_row_with_the_bits_of_the_blocks_one_by_one(name, memory_format, rows):
    model = training(MODELS[name])
    twin = one_by_one(model)
    assert_same_steps(model, twin, WARM_ROWS + 2, memory_format)
    x = images().to(memory_format=memory_format).requires_grad_()
    assert added_by(lambda: step(model, x), rows) == 1 and added_by(lambda: step(twin, x), rows) == 0
    assert state_of(model).stretches[1]._known.mixed


@pytest.mark.parametrize("name", ALONE)
def test_what_ends_a_row_leaves_the_bits(name):
    model = training(MODELS[name])
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    twin = one_by_one(model)
    assert_same_steps(model, twin, WARM_ROWS + 2, torch.channels_last)


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_change_is_noticed(change, rows, monkeypatch):
    monkeypatch.setattr(stretch, "RUNS_AFTER_FAILURE", 1)
    model = training(MODELS["gate"])
    x = images()
    warm(model, x)
    assert added_by(lambda: step(model, x), rows) == 1
    twin = one_by_one(model)
    for net in (model, twin):
        with torch.no_grad():
            change(net)
    if change is CHANGES["padding"]:
        for net in (model, twin):
            with pytest.raises(RuntimeError, match="size"):
                step(net, x)
        return
    for _ in range(3 * WARM_ROWS):
        assert_same_step(model, twin, x)
    if change is CHANGES["one that counts"]:
        assert model[5].inside.calls == twin[5].inside.calls == 3 * WARM_ROWS


def test_random_numbers_are_drawn_at_every_step(rows):
    model = training(lambda: row(Weighed(nn.Dropout(0.5))))
    x = images()
    found = [step(model, x) for _ in range(2 * WARM_ROWS)]
    assert not any(torch.equal(a, b) for a, b in zip(found, found[1:], strict=False))
    assert rows[0] == WARM_ROWS


def test_frozen_weights_of_what_stands_beside_are_another_row(rows):
    model = training(MODELS["squeeze"])
    warm(model, images())
    twin = one_by_one(model)
    for net in (model, twin):
        net[5].inside.requires_grad_(False)
    for _ in range(WARM_ROWS + 1):
        assert_same_step(model, twin, images())
    assert model[5].inside.fc1.weight.grad is None and rows[0] > 0


class Inner(nn.Module):
    """A module as it stands around one that is fused."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x).sigmoid() * x


def test_what_is_fused_inside_of_it_runs_once(rows):
    """In evaluation, where its BatchNorm is known to compute."""
    model = model_of(lambda: row(Weighed(Inner())))
    twin = one_by_one(model)
    for _ in range(WARM_ROWS + 2):
        assert_same_step(model, twin, images())
    assert rows[0] > 0
    assert str(fusedres.report(model)) == str(fusedres.report(twin))


class Shifts(nn.Module):
    """A residual block whose forward makes maps that no backward reads."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = general_blocks.unit(8), general_blocks.unit(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.one(x) + 1.0 - 2.0 + 3.0 - 4.0) + x


def test_a_row_holds_no_more_than_its_blocks_one_by_one(rows):
    model = training(lambda: nn.Sequential(Shifts(), Shifts()))
    x = images(1, 8, 96, 96).to(memory_format=torch.channels_last)

    def peak(net: nn.Module) -> int:
        warm(net, x)
        return memory.peak_bytes(lambda: step(net, x), x.device)

    assert peak(model) <= peak(one_by_one(model)) and rows[0] > 0


# ---- how a row is put together --------------------------------------------------------------------------------------


def row_of(run: Callable[[Tensor], Tensor]) -> stretch._Row | None:
    x = images()
    with follow() as calls:
        y = run(x)
    return stretch._row(select.resolve(x.device, x.dtype), [], x, calls, Handover(y), stretch._Left((), None, False))


def again(made_of: stretch._Row, x: Tensor) -> Tensor:
    return made_of.run(select.resolve(x.device, x.dtype), x).x


def halves(x: Tensor) -> Tensor:
    both = made(torch.chunk, x, 2, dim=-1)
    first, second = (made(operator.getitem, both, i) for i in (0, 1))
    return made(torch.cat, [second, first], dim=made(operator.neg, 1))


def test_a_row_of_calls_fills_in_what_they_have_made_for_another_map():
    found, x = row_of(halves), images()
    assert found is not None and torch.equal(again(found, x), halves(x))


NO_ROW: dict[str, Callable[[Tensor], Tensor]] = {
    "a number of what is in a map": lambda x: made(torch.mul, x, made(lambda t: float(t.sum()), x)),
    "a tensor from outside": lambda x: made(torch.mul, x, torch.ones(1)),
    "a tensor that nobody has told of": lambda x: made(torch.relu, x + 1),
    "something behind the last call": lambda x: made(torch.relu, x) + 1,
    "no call": lambda x: x + 1,
}


@pytest.mark.parametrize("run", NO_ROW.values(), ids=NO_ROW)
def test_calls_that_may_not_be_the_same_the_next_time_are_no_row(run):
    assert row_of(run) is None


def test_what_a_call_makes_itself_is_not_told_of():
    x = images()
    with follow() as calls:
        y = made(lambda t: made(torch.relu, made(torch.neg, t)), x)
    (call,) = calls
    assert isinstance(call, PlainCall) and call.y is y
