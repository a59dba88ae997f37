"""A forward that does more than compute is left alone, with the reason, and converting runs nothing of it."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from beside import BESIDE
from followed import Block, C, OfAClass, assert_equal, converted, draw, twins
from torch import Tensor, nn

import fusedres
from fusedres.convert import left_alone
from fusedres.swap import FusedBlock

torchvision = pytest.importorskip("torchvision")


@pytest.fixture(autouse=True)
def plain_primitives() -> Iterator[None]:
    torch.manual_seed(0)
    with fusedres.use_backend("eager"):
        yield


# ---- what a look at the calls alone does not show -----------------------------------------------------------------------


TABLE = {"scale": 1.0}
LOG: list[int] = []


class BranchesOnItsCount(Block):
    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return F.relu(self.body(x) + x) if self.calls % 2 else x


class GoesThroughWhatItKeeps(Block):
    def forward(self, x: Tensor) -> Tensor:
        for scale in self.kept:
            x = x * scale
        return F.relu(self.body(x) + x)


class AddsToAListInPlace(Block):
    def forward(self, x: Tensor) -> Tensor:
        self.kept += [x.mean()]
        return F.relu(self.body(x) + x)


class ReadsBeforeItSets(Block):
    def forward(self, x: Tensor) -> Tensor:
        out = self.body(x) + (self.last if hasattr(self, "last") else 0)
        self.last = out.detach().mean()
        return F.relu(out + x)


class SetsItsConvolution(Block):
    def forward(self, x: Tensor) -> Tensor:
        self.conv1.stride = (1, 1)
        return F.relu(self.body(x) + x)


class SetsItsMode(Block):
    def forward(self, x: Tensor) -> Tensor:
        self.training = self.training
        return F.relu(self.body(x) + x)


class SetsAProperty(Block):
    @property
    def seen(self) -> Tensor | None:
        return None

    @seen.setter
    def seen(self, value: Tensor) -> None:
        self.calls += 1

    def forward(self, x: Tensor) -> Tensor:
        self.seen = x
        return F.relu(self.body(x) + x)


class SetsByItself(Block):
    def __setattr__(self, name: str, value: object) -> None:
        super().__setattr__(name, value)

    def forward(self, x: Tensor) -> Tensor:
        self.seen = x.shape
        return F.relu(self.body(x) + x)


class SetsAModule(Block):
    def forward(self, x: Tensor) -> Tensor:
        self.bn2 = self.bn2
        return F.relu(self.body(x) + x)


class SetsPastTheClass(Block):
    def forward(self, x: Tensor) -> Tensor:
        object.__setattr__(self, "seen", x.shape)
        return F.relu(self.body(x) + x)


class AppendsToAListItKeeps(Block):
    def forward(self, x: Tensor) -> Tensor:
        maps = [x]
        self.maps = maps
        maps.append(self.body(x))
        return F.relu(self.maps[-1] + x)


class KeepsAListTwice(Block):
    def forward(self, x: Tensor) -> Tensor:
        maps = [x]
        self.maps, self.same = maps, maps
        return F.relu(self.body(x) + x)


class UnderInference(Block):
    def forward(self, x: Tensor) -> Tensor:
        with torch.inference_mode():
            out = self.body(x)
        return F.relu(out.clone() + x)


class AppendsToAGlobal(Block):
    def forward(self, x: Tensor) -> Tensor:
        LOG.append(1)
        return F.relu(self.body(x) + x)


class UnderAutocast(Block):
    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return F.relu(self.body(x) + x)


class DrawsFromTorch(Block):
    def forward(self, x: Tensor) -> Tensor:
        if self.training and torch.rand(1) < 0.5:
            return x
        return F.relu(self.body(x) + x)


class DrawsFromPython(Block):
    def forward(self, x: Tensor) -> Tensor:
        if self.training and random.random() < 0.5:
            return x
        return F.relu(self.body(x) + x)


class AsksForTheMapsGradient(Block):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x) + x) if x.requires_grad else x


class ReadsAGlobalDict(Block):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x) * TABLE["scale"] + x)


class ReadsANamespace(Block):
    def forward(self, x: Tensor) -> Tensor:
        out = self.body(x)
        return F.relu(out + x) if self.config.residual else F.relu(out)


class Prints(Block):
    def forward(self, x: Tensor) -> Tensor:
        print(end="")
        return F.relu(self.body(x) + x)


class Catches(Block):
    def forward(self, x: Tensor) -> Tensor:
        try:
            return F.relu(self.body(x) + x)
        finally:
            pass


class Imports(Block):
    def forward(self, x: Tensor) -> Tensor:
        import math

        return F.relu(self.body(x) * math.sqrt(1) + x)


class LooksUp(Block):
    def __getattr__(self, name: str) -> object:
        return super().__getattr__("conv1" if name == "first" else name)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.first(x))))) + x)


class Registers(Block):
    def forward(self, x: Tensor) -> Tensor:
        out = self.body(x)
        if out.requires_grad:
            out.register_hook(lambda grad: grad * 2)
        return F.relu(out + x)


class OverwritesItsInput(Block):
    def forward(self, x: Tensor) -> Tensor:
        x += self.body(x)
        return F.relu(x)


HIDDEN: dict[type[Block], str] = {
    BranchesOnItsCount: "branches on", GoesThroughWhatItKeeps: "goes through", AddsToAListInPlace: "changes a list in place",
    ReadsBeforeItSets: "before it is set", SetsItsConvolution: "of a module of torch's", SetsItsMode: "stores self.training",
    SetsAProperty: "a property", SetsByItself: "sets its attributes by itself", SetsAModule: "a parameter or a module",
    SetsPastTheClass: "object", AppendsToAListItKeeps: "changes a list that it is given", KeepsAListTwice: "keeps already",
    UnderInference: "torch.inference_mode()",
    AppendsToAGlobal: "reads LOG", UnderAutocast: "torch.autocast", DrawsFromTorch: "calls rand", DrawsFromPython: "random",
    AsksForTheMapsGradient: ".requires_grad", ReadsAGlobalDict: "reads TABLE", ReadsANamespace: "reads config", Prints: "print",
    Catches: "try", Imports: "import math", LooksUp: "looks its attributes up", Registers: "requires_grad",
}  # fmt: skip


@pytest.mark.parametrize("kind", HIDDEN, ids=lambda kind: kind.__name__)
def test_a_forward_that_does_more_than_compute_is_left_alone_for_that_reason(kind):
    block = kind()
    fusedres.convert(block)
    assert type(block) is kind
    ((_, module, reason),) = left_alone(block)
    assert module is block and HIDDEN[kind] in reason
    assert HIDDEN[kind] in str(fusedres.report(block))


NOT_IN_PLACE = [kind for kind in HIDDEN if kind is not UnderAutocast]


@pytest.mark.parametrize("kind", NOT_IN_PLACE, ids=lambda kind: kind.__name__)
def test_what_such_a_forward_does_happens_as_before(kind):
    model, twin = twins(kind)
    assert_equal(model, twin)
    assert (model.calls, len(model.kept)) == (twin.calls, len(twin.kept))


def test_a_forward_that_overwrites_its_input_still_does():
    model, twin = twins(OverwritesItsInput)
    for training in (True, False):
        x, y = draw(), draw()
        with torch.no_grad():
            wanted, found = model.train(training)(x), twin.train(training)(y)
        torch.testing.assert_close(found, wanted)
        torch.testing.assert_close(y, x)
        assert not torch.equal(x, draw())


def test_the_parts_of_such_a_block_are_converted_where_they_are_blocks_themselves():
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.calls = Block(), 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return self.inner(x)

    model, twin = twins(Outer)
    assert converted(twin) == [twin.inner]
    assert_equal(model, twin)
    assert twin.calls == model.calls


# ---- converting does nothing ---------------------------------------------------------------------------------------------


def contents(model: nn.Module) -> list[object]:
    """Everything that the modules of ``model`` hold but for what says that they are fused."""
    found: list[object] = []
    for module in model.modules():
        for name, value in module.__dict__.items():
            if name != "_fusedres":
                found += [name, *(value.items() if isinstance(value, dict) else [value])]
    return found


@pytest.mark.parametrize("kind", [*HIDDEN, *BESIDE, Block, OfAClass], ids=lambda kind: kind.__name__)
def test_converting_runs_nothing_and_changes_classes_alone(kind):
    block = kind()
    before, tensors = contents(block), {name: t.clone() for name, t in block.state_dict().items()}
    states = torch.random.get_rng_state(), random.getstate(), len(LOG)
    fusedres.convert(block)
    fusedres.report(block)
    assert torch.equal(torch.random.get_rng_state(), states[0])
    assert (random.getstate(), len(LOG)) == states[1:]
    after = contents(block)
    assert len(after) == len(before) and all(a is b or a == b for a, b in zip(after, before, strict=True))
    assert all(torch.equal(t, tensors[name]) for name, t in block.state_dict().items())
    fusedres.revert(block)
    assert type(block) is kind and "_fusedres" not in block.__dict__


def test_modules_that_wait_for_their_first_input_are_left_alone():
    class Lazy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.LazyConv2d(C, 3, padding=1), nn.LazyBatchNorm2d()

        def forward(self, x: Tensor) -> Tensor:
            return F.relu(self.norm(self.conv(x)) + x)

    block = fusedres.convert(Lazy())
    assert type(block) is Lazy
    block(draw(torch.float32))
    model = copy.deepcopy(block).double()
    twin = fusedres.convert(copy.deepcopy(model))
    assert isinstance(twin, FusedBlock)
    assert_equal(model, twin)
