"""Blocks of any shape under torch.compile: their pieces are operators of one graph, what stands between them is traced as it is, and what
their forwards do beside computing happens in its place."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
import torch
import torch.nn.functional as F
from beside import BESIDE, assert_same, kept
from compiling import NEEDS_CPP, assert_equal, compiled, operators, parts, step, twins
from followed import Block, draw
from general_blocks import SHAPES, C, Optional, Selects, Tree
from torch import Tensor, nn

from fusedres.blocks import parts_of
from fusedres.swap import FusedBlock

pytestmark = [NEEDS_CPP, pytest.mark.usefixtures("proven_once")]


def maps(batch: int = 3) -> Tensor:
    return torch.randn(batch, C, 8, 8, generator=torch.Generator().manual_seed(batch))


def computing(model: nn.Module) -> int:
    """How many parts there are but for those without any tensor, sums alone, which are ordinary code to a compiler."""
    assert parts(model) > 0
    specs = [part.describe(None)[0] for m in model.modules() if isinstance(m, FusedBlock) for part in parts_of(m)]
    return sum(any(t is not None for t in spec.tensors) for spec in specs)


SEVERAL = {"several maps, by position and in lists": Tree, "lists in and out": Selects}


def quick_or_slow(names: Iterable[str], quick: set[str]) -> list:
    """Every name, those that are not ``quick`` as slow."""
    return [pytest.param(name, marks=[] if name in quick else [pytest.mark.slow]) for name in names]


@pytest.mark.parametrize(
    "name",
    quick_or_slow(
        [*(name for name in SHAPES if name not in ("draws", "read twice")), *SEVERAL],
        {"several skips", "several maps, by position and in lists"},
    ),
)
def test_a_block_of_any_shape_is_operators_that_equal_eager(name):
    model, twin = twins(SEVERAL[name] if name in SEVERAL else SHAPES[name][0])
    program, counter = compiled(model)
    for batch in (3, 2):
        found, expected = step(program, maps(batch), True), step(twin, maps(batch), True)
        assert_equal(found, expected, "gradient")
        # a compiler adds up the gradients of what is traced between operators in an order of its own: some roundings of float32
        for key, value in expected.items():
            torch.testing.assert_close(found[key], value, rtol=1e-5, atol=1e-5)
    assert operators(counter) == {"residual_forward": computing(twin)}
    assert counter.frame_count == 2


KINDS = {kind.__name__: kind for kind in BESIDE}


@pytest.mark.parametrize("name", quick_or_slow(KINDS, {"StoresAMap", "WithoutGradientInside", "InOrder"}))
def test_what_a_forward_does_beside_happens_in_its_place(name):
    model, twin = twins(KINDS[name])
    model, twin = model.double(), twin.double()
    program, counter = compiled(model)
    for _ in range(3):
        assert_same(program(draw()), twin(draw()), "output")
        found = kept(model)
        for name, value in kept(twin).items():  # a compiler keeps more in a module than its forward does
            assert_same(found[name], value, name)
    kinds = operators(counter)
    assert kinds.get("residual_forward", 0) + kinds.get("residual_infer", 0) == computing(twin) > 0


def test_maps_may_come_by_name_and_constants_beside_them():
    model, twin = twins(Optional)
    x, shortcut = maps(), maps(3).flip(0)
    calls = (
        ((x,), {"shortcut": shortcut}),
        ((x, None), {"children": [shortcut, x]}),
        ((), {"shortcut": shortcut, "x": x}),
        ((x, shortcut, None), {}),
    )
    for args, kwargs in calls:
        program, counter = compiled(model)
        assert torch.equal(program(*args, **kwargs), twin(*args, **kwargs))
        assert operators(counter)["residual_forward"] == computing(twin)
    for mine, other in zip(model.buffers(), twin.buffers(), strict=True):
        assert torch.equal(mine, other)


class Remembers(Block):
    """Adds to a map that it keeps, which it may be given."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("memory", draw())

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        self.memory.add_(1)
        return F.relu(self.bn2(self.conv2(out)) + x)


def test_what_overwrites_a_map_that_it_may_be_given_runs_its_original_modules():
    model, twin = twins(Remembers)
    model, twin = model.double(), twin.double()
    program, counter = compiled(model)
    for x in (draw(), None):
        with torch.no_grad():
            found, expected = (call(m.memory if x is None else x) for m, call in ((model, program), (twin, twin)))
        # in float64, where what is traced between operators may be rounded in another order
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)
        assert_same(model.memory, twin.memory, "memory")
    assert operators(counter) == {}
