"""Modules of the user's that overwrite the map that they are given: whoever reads that map later reads what was written, though a fused
block has handed the map over in another memory format, or keeps it for its backward."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import pytest
import torch
from followed import converted
from support import ran
from torch import Tensor, nn

import fusedres

pytestmark = pytest.mark.usefixtures("proven_once")

C = 12


@pytest.fixture(autouse=True)
def plain_primitives() -> Iterator[None]:
    with fusedres.use_backend("eager"):
        yield


class Overwriting(nn.Module):
    """An activation, in place, of which a block sees a module alone."""

    def __init__(self) -> None:
        super().__init__()
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(x)


def row(c_in: int = C) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(c_in, C, 3, padding=1, bias=False), nn.BatchNorm2d(C))


class Added(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.act, self.row = Overwriting(), row()

    def forward(self, x: Tensor) -> Tensor:
        return self.row(self.act(x)) + x


class Multiplied(Added):
    def forward(self, x: Tensor) -> Tensor:
        return self.row(self.act(x)) * x


class Projected(Added):
    """Whose shortcut reads the map before it is overwritten."""

    def __init__(self) -> None:
        super().__init__()
        self.shortcut = row()

    def forward(self, x: Tensor) -> Tensor:
        s = self.shortcut(x)
        return self.row(self.act(x)) + s


class Around(Projected):
    """Which reads the map before and afterwards."""

    def __init__(self) -> None:
        super().__init__()
        self.last = row()

    def forward(self, x: Tensor) -> Tensor:
        y = self.shortcut(x) * self.row(x)
        return y * self.act(x) + self.last(x)


class Halves(Added):
    """Which overwrites a view of it."""

    def forward(self, x: Tensor) -> Tensor:
        x[:, : C // 2].relu_()
        return self.row(x) * x


class Layer(nn.Module):
    """A dense block of one layer, which keeps its output for backward."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.act, self.conv = nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, C - 8, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.conv(self.act(self.norm(x)))], 1)


BEFORE: dict[str, Callable[[], nn.Module]] = {
    "a dense block": lambda: nn.Sequential(Layer()),
    "a row": lambda: row(8),
    "a convolution": lambda: nn.Conv2d(8, C, 1),
}
each_before = pytest.mark.parametrize("before", BEFORE)
each_format = pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])


def twins(before: str, block: type[nn.Module], layout: torch.memory_format) -> tuple[nn.Module, nn.Module, Tensor]:
    """A network, its converted twin, and a map for both."""
    torch.manual_seed(0)
    model = nn.Sequential(BEFORE[before](), block()).double().to(memory_format=layout)
    x = torch.randn(2, 8, 5, 6, dtype=torch.float64).to(memory_format=layout)
    twin = fusedres.convert(copy.deepcopy(model))
    assert converted(twin)
    return model, twin, x


def results(model: nn.Module, x: Tensor, records: bool) -> list[Tensor]:
    """The output, and the gradient of the map."""
    x = x.clone().requires_grad_()
    with torch.set_grad_enabled(records):
        y = model(x)
    return [y, *torch.autograd.grad(y.square().sum(), x)] if records else [y]


def assert_same(found: list[Tensor], wanted: list[Tensor]) -> None:
    for value, expected in zip(found, wanted, strict=True):
        # in float64, where sums in another order are off by some 1e-15 of their terms
        torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-11)


@each_before
@each_format
@pytest.mark.parametrize("block", [Added, Multiplied, Halves])
@pytest.mark.parametrize("records", [True, False], ids=["training", "without gradients"])
def test_what_was_written_into_a_map_is_what_its_other_readers_read(before, block, layout, records):
    model, twin, x = twins(before, block, layout)
    assert_same(results(twin, x, records), results(model, x, records))
    assert ran(twin[1]) == "eager"


@each_before
@each_format
@pytest.mark.parametrize("block", [Projected, Around])
def test_who_reads_a_map_before_it_is_overwritten_reads_it_as_it_was(before, block, layout):
    """Without gradients: with them eager raises, since a convolution has kept the map."""
    model, twin, x = twins(before, block, layout)
    assert_same(results(twin, x, False), results(model, x, False))


@pytest.mark.parametrize(
    ("before", "layout", "block", "records"),
    [
        pytest.param(before, layout, block, records, id=f"{key}-{block.__name__}", marks=marks)
        for key, before, layout, quick in (
            ("row-nchw", "a row", torch.contiguous_format, Multiplied),
            ("dense-nchw", "a dense block", torch.contiguous_format, Halves),
            ("dense-nhwc", "a dense block", torch.channels_last, Around),
        )
        for block, records in ((Multiplied, True), (Halves, True), (Around, False))
        for marks in ([] if block is quick else [pytest.mark.slow],)
    ],
)
def test_it_is_so_under_a_compiler(before, layout, block, records):
    torch._dynamo.reset()
    model, twin, x = twins(before, block, layout)
    program = torch.compile(twin, backend="aot_eager")
    assert_same(results(program, x, records), results(model, x, records))


@each_before
def test_a_module_that_overwrites_from_now_on_is_noticed(before):
    model, twin, x = twins(before, Added, torch.contiguous_format)
    for inplace in (False, True, False):
        model[1].act.act.inplace = twin[1].act.act.inplace = inplace
        assert_same(results(twin, x, True), results(model, x, True))


def test_a_block_whose_module_overwrites_nothing_is_a_residual_block():
    """Though the module's own maps are overwritten."""

    class Gate(Overwriting):
        def forward(self, x: Tensor) -> Tensor:
            return x * self.act(x.mean((2, 3), keepdim=True))

    block = Added()
    block.act = Gate()
    twin = fusedres.convert(copy.deepcopy(block).double())
    x = torch.randn(2, C, 5, 6, dtype=torch.float64)
    assert_same(results(twin, x, True), results(block.double(), x, True))
    assert ran(twin) == "eager" and "residual" in str(fusedres.report(twin))


def test_a_map_that_a_block_keeps_may_be_overwritten_behind_a_compiled_one():
    torch.manual_seed(0)
    model = nn.Sequential(Layer()).double()
    twin = fusedres.convert(copy.deepcopy(model))
    program = torch.compile(twin, backend="aot_eager")
    x = torch.randn(2, 8, 5, 6, dtype=torch.float64)
    found, wanted = (results(lambda x, m=m: m(x).relu_(), x, True) for m in (program, model))
    assert_same(found, wanted)
