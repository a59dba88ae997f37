"""What a dense block holds at its peak, byte by byte, is what its schedule states."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import fusedres
from fusedres.backends import select
from fusedres.trial import memory

torchvision = pytest.importorskip("torchvision")
ROOT = Path(__file__).parents[1]

BATCH, SIDE = 2, 48
MAP = BATCH * SIDE * SIDE * 4  # bytes of a float32 map of one channel: more than any gradient of a weight has here
LAYERS, GROWTH, BOTTLENECK = 4, 8, 4


def block(recompute: bool, first: int) -> nn.Module:
    dense = torchvision.models.densenet._DenseBlock(LAYERS, first, BOTTLENECK, GROWTH, 0.0)
    return fusedres.convert(nn.Sequential(dense), recompute=recompute).to(memory_format=torch.channels_last)


def image(first: int) -> Tensor:
    return torch.randn(BATCH, first, SIDE, SIDE).to(memory_format=torch.channels_last)


def peak(step, smallest: int = MAP) -> int:
    """The peak of the second call, in maps of one channel: what a first call remembers is no part of a step."""
    step()
    size = memory.peak_bytes(step, torch.device("cpu"), smallest=smallest)
    assert size % MAP == 0
    return size // MAP


@pytest.fixture(autouse=True)
def on_the_extension():
    if select.backends()["cpp"] != "available":
        pytest.skip(f"cpp: {select.backends()['cpp']}")
    with fusedres.use_backend("cpp"):
        yield


def test_what_was_alive_before_a_step_is_no_part_of_its_peak():
    """Not even if it came to life in an earlier step: its end would hide as much of this one."""
    held = []

    def step() -> None:
        held.clear()
        held.append(torch.empty(1000, 1000))

    for _ in range(3):
        assert memory.peak_bytes(step, torch.device("cpu")) == 4_000_000


# x wider and narrower than the gradient of a bottleneck's output, which share the last place of the peak
@pytest.mark.parametrize("first", [16, 80], ids=["narrow", "wide"])
@pytest.mark.parametrize("recompute", [False, True], ids=["keeping", "recompute"])
def test_a_dense_blocks_training_peak_is_the_formulas(first, recompute):
    model, x = block(recompute, first), image(first).requires_grad_()
    last, read = first + LAYERS * GROWTH, first + (LAYERS - 1) * GROWTH
    mid = BOTTLENECK * GROWTH
    grad = torch.randn(BATCH, last, SIDE, SIDE).to(memory_format=torch.channels_last)

    def step() -> None:
        model.zero_grad(set_to_none=True)
        x.grad = None
        model(x).backward(grad)

    kept, working = (0, max(2 * mid, first)) if recompute else (LAYERS * mid, max(mid, first))
    copied = last  # the output, as it leaves for code that is not ours; a fused neighbour would read the buffer itself
    assert peak(step) == last + kept + read + working + copied
    assert fusedres.report(model)[0].fused


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
def test_a_dense_block_without_gradients_holds_its_buffer_and_one_bottleneck(training):
    model, x = block(False, 16).train(training), image(16)

    def step() -> None:
        with torch.no_grad():
            model(x)

    assert peak(step) == 16 + LAYERS * GROWTH + BOTTLENECK * GROWTH
    assert fusedres.report(model)[0].fused


@pytest.mark.parametrize(
    ("name", "recompute", "most"),
    [
        pytest.param("densenet121", False, 29, id="densenet121", marks=pytest.mark.slow),
        pytest.param("densenet121", True, 12, id="densenet121-recompute"),
        pytest.param("resnet50", False, 65, id="resnet50"),
        pytest.param("resnet50", True, 34, id="resnet50-recompute", marks=pytest.mark.slow),
    ],
)
def test_what_a_whole_model_keeps_for_backward_per_image(name, recompute, most):
    """In MiB, float32, 224 pixels; eager keeps 124.3 of a densenet121 and 81.9 of a resnet50."""
    batch = 3  # not 2, the rows of per-channel tensors
    model = torchvision.models.get_model(name).to(memory_format=torch.channels_last)
    model = fusedres.convert(model, recompute=recompute)
    x = torch.randn(batch, 3, 224, 224).to(memory_format=torch.channels_last)
    with memory.count_kept(model, batch) as kept:
        y = model(x)
        assert 0.5 * most < kept() / batch / 2**20 <= most
    del y
    assert all(row.fused for row in fusedres.report(model))
