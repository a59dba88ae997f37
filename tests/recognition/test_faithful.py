"""Converting never changes what a model computes: what is fused equals eager in float64, in every mode and over several steps; what is not
understood is left alone, with the reason; what changes later is noticed before the next call."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fusedres
from fusedres.convert import left_alone
from fusedres.report import why_not_fused
from fusedres.swap import FusedBlock, state_of

torchvision = pytest.importorskip("torchvision")


@pytest.fixture(autouse=True)
def plain_primitives() -> Iterator[None]:
    torch.manual_seed(0)
    with fusedres.use_backend("eager"):
        yield


C = 6
SHAPE = (3, C, 5, 7)


def draw(dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)


def step(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """The output, all gradients and all buffers of one call, drawn from the same random numbers."""
    torch.manual_seed(3)
    random.seed(3)
    x = x.clone().requires_grad_()
    model.zero_grad()
    y = model(x)
    y.backward(torch.randn(y.shape, dtype=y.dtype))
    found = {"output": y, "input": x.grad}
    found |= {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {k: v.detach().clone() for k, v in found.items()} | {n: b.clone() for n, b in model.named_buffers()}


def assert_equal(model: nn.Module, twin: nn.Module) -> None:
    """Two steps in training, then one in evaluation."""
    for training in (True, True, False):
        model.train(training), twin.train(training)
        x = draw()
        wanted, found = step(model, x), step(twin, x)
        assert found.keys() == wanted.keys()
        for name, value in wanted.items():
            torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}")


def converted(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if isinstance(m, FusedBlock)]


def twins(build: Callable[[], nn.Module]) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    model = build().double()
    for norm in [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]:
        nn.init.normal_(norm.weight, 1, 0.3), nn.init.normal_(norm.bias, 0, 0.3)
    return model, fusedres.convert(copy.deepcopy(model))


# ---- every activation, scale, order and repetition counts ---------------------------------------------------------------


class Row(nn.Module):
    """Convolution, BatchNorm, activation."""

    def __init__(self, act: type[nn.Module] = nn.Identity, momentum: float | None = 0.1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(C, C, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(C, momentum=momentum)
        self.act = act()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.norm(self.conv(x)))


class Before(nn.Module):
    """BatchNorm, activation, convolution."""

    def __init__(self, act: type[nn.Module] = nn.ReLU) -> None:
        super().__init__()
        self.norm, self.act, self.conv = nn.BatchNorm2d(C), act(), nn.Conv2d(C, C, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.act(self.norm(x)))


def block(forward: Callable[..., Tensor], **parts: Callable[[], nn.Module]) -> nn.Module:
    """A block with these parts and that forward."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name, part in parts.items():
                setattr(self, name, part())

    Block.forward = forward
    return Block()


def relu_row() -> nn.Module:
    return Row(nn.ReLU)


def silu_row() -> nn.Module:
    return Row(nn.SiLU)


def cumulative() -> nn.Module:
    return Row(momentum=None)


JOINS: dict[str, Callable[[], nn.Module]] = {
    "act-on-both-sides-of-the-addition": lambda: block(lambda s, x: F.relu(x + s.v(s.u(x))), u=relu_row, v=relu_row),
    "act-in-front-alone": lambda: block(lambda s, x: s.v(s.u(x)) + x, u=relu_row, v=silu_row),
    "one-unit-with-act": lambda: block(lambda s, x: x + s.u(x), u=relu_row),
    "act-on-the-shortcut": lambda: block(lambda s, x: F.relu(s.w(x) + s.v(x)), v=Row, w=silu_row),
    "acts-on-both-paths": lambda: block(lambda s, x: s.w(x) + s.v(x), v=relu_row, w=silu_row),
    "act-of-the-projection": lambda: block(lambda s, x: F.relu(s.v(s.u(x)) + s.w(x)), u=relu_row, v=Row, w=relu_row),
    "functional-act-in-front": lambda: block(lambda s, x: F.relu(s.v(x)) + x, v=Row),
    "in-place-act-in-front": lambda: block(lambda s, x: F.relu(s.v(x), inplace=True).add(x), v=Row),
    "two-acts-in-a-row": lambda: block(lambda s, x: F.silu(F.relu(s.v(x))) + x, v=Row),
    "act-behind-a-lone-convolution": lambda: block(
        lambda s, x: F.relu(s.c(s.u(x))) + x, u=relu_row, c=lambda: nn.Conv2d(C, C, 1)
    ),
    "norm-alone-with-act-on-the-shortcut": lambda: block(
        lambda s, x: s.v(x) + F.relu(s.n(x)), v=Row, n=lambda: nn.BatchNorm2d(C)
    ),
    "pre-activation": lambda: block(lambda s, x: s.v(s.u(x)) + x, u=Before, v=Before),
    "pre-activation-then-act": lambda: block(lambda s, x: F.relu(s.v(s.u(x)) + x), u=Before, v=Before),
    "pre-activation-and-a-row": lambda: block(lambda s, x: s.v(s.u(x)) + x, u=Before, v=relu_row),
    "activated-projection-with-act": lambda: block(
        lambda s, x: (lambda h: F.relu(s.m(s.c(h))) + s.d(h))(F.relu(s.n(x))),
        n=lambda: nn.BatchNorm2d(C), m=lambda: nn.BatchNorm2d(C),
        c=lambda: nn.Conv2d(C, C, 3, 1, 1), d=lambda: nn.Conv2d(C, C, 1),
    ),
    "act-of-what-both-read": lambda: block(
        lambda s, x: (lambda h: s.v(h) + s.w(h))(F.relu(s.u(x))), u=Row, v=relu_row, w=Row
    ),
    "the-shortcut-first": lambda: block(lambda s, x: s.w(x) + s.v(s.u(x)), u=relu_row, v=Row, w=Row),
    "dropout-on-both-paths": lambda: block(
        lambda s, x: F.relu(F.dropout(s.v(s.u(x)), 0.4, s.training) + F.dropout(x, 0.3, s.training)), u=relu_row, v=Row
    ),
    "dropout-on-the-shortcut-first": lambda: block(
        lambda s, x: (lambda r: F.relu(F.dropout(s.v(x), 0.4, s.training) + r))(F.dropout(x, 0.3, s.training)), v=Row
    ),
    "doubled": lambda: block(lambda s, x: (lambda h: F.relu(h + h))(s.v(s.u(x))), u=relu_row, v=Row),
    "scaled": lambda: block(lambda s, x: F.relu(s.v(x) * 0.5 + x), v=Row),
    "scaled-shortcut": lambda: block(lambda s, x: F.relu(s.v(x) + x * 0.5), v=Row),
    "added-with-alpha": lambda: block(lambda s, x: F.relu(torch.add(s.v(x), x, alpha=2)), v=Row),
    "subtracted": lambda: block(lambda s, x: F.relu(s.v(x) - x), v=Row),
    "a-constant-behind": lambda: block(lambda s, x: s.v(x) + x + 1.0, v=Row),
    "a-row-called-twice": lambda: block(lambda s, x: F.relu(x + s.v(s.v(s.u(x)))), u=relu_row, v=Row),
    "a-row-with-act-called-twice": lambda: block(lambda s, x: F.relu(x + s.u(s.u(x))), u=relu_row),
    "a-row-on-both-paths": lambda: block(lambda s, x: F.relu(s.v(s.u(x)) + s.v(x)), u=relu_row, v=Row),
    "a-cumulative-norm-twice": lambda: block(lambda s, x: F.relu(x + s.v(s.v(s.u(x)))), u=relu_row, v=cumulative),
    "a-cumulative-norm-once": lambda: block(lambda s, x: F.relu(x + s.v(s.u(x))), u=relu_row, v=cumulative),
    "a-convolution-called-twice": lambda: block(
        lambda s, x: F.relu(s.n(s.c(F.relu(s.m(s.c(x))))) + x),
        c=lambda: nn.Conv2d(C, C, 3, 1, 1), n=lambda: nn.BatchNorm2d(C), m=lambda: nn.BatchNorm2d(C),
    ),
    "in-place-on-what-is-read-again": lambda: block(
        lambda s, x: (lambda h: F.relu(h, inplace=True) + h)(s.v(x)), v=Row
    ),
    "in-place-as-a-statement": lambda: InPlaceStatement(),
    "in-place-on-an-alias": lambda: block(
        lambda s, x: (lambda h: s.i(h).add_(s.v(x)))(x * 1.0), v=Row, i=nn.Identity
    ),
    "a-value-that-nobody-reads": lambda: block(lambda s, x: (s.w(x), F.relu(s.v(x) + x))[1], v=Row, w=Row),
}  # fmt: skip


class InPlaceStatement(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.row = Row()

    def forward(self, x: Tensor) -> Tensor:
        h = self.row(x)
        F.relu_(h)
        return h + x


@pytest.mark.parametrize("name", JOINS)
def test_every_call_counts(name):
    assert_equal(*twins(JOINS[name]))


FUSED_JOINS = [
    "act-on-both-sides-of-the-addition", "act-in-front-alone", "one-unit-with-act", "act-on-the-shortcut", "acts-on-both-paths",
    "act-of-the-projection", "functional-act-in-front", "pre-activation-and-a-row", "activated-projection-with-act",
    "act-of-what-both-read", "the-shortcut-first", "dropout-on-both-paths", "doubled", "a-row-called-twice", "in-place-act-in-front",
    "a-cumulative-norm-once", "in-place-as-a-statement",
]  # fmt: skip


@pytest.mark.parametrize("name", FUSED_JOINS)
def test_what_is_split_still_runs_fused(name):
    _, twin = twins(JOINS[name])
    assert isinstance(twin, FusedBlock)
    twin(draw())
    assert state_of(twin).outcome.backend == "eager"


def test_a_cumulative_norm_that_stands_twice_is_left_to_its_modules_for_that_reason():
    _, twin = twins(JOINS["a-cumulative-norm-twice"])
    assert not isinstance(twin, FusedBlock) or "stands twice" in why_not_fused(twin)


def test_a_momentum_that_is_taken_away_after_conversion_counts():
    model, twin = twins(JOINS["a-row-called-twice"])
    for m in (model, twin):
        m.v.norm.momentum = None
    assert_equal(model, twin)
    assert "stands twice" in why_not_fused(twin)


# ---- what a look at the calls alone does not show -----------------------------------------------------------------------


class Block(nn.Module):
    """A basic block, to be overridden."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = (nn.Conv2d(C, C, 3, padding=1, bias=False) for _ in range(2))
        self.bn1, self.bn2 = nn.BatchNorm2d(C), nn.BatchNorm2d(C)
        self.register_buffer("average", torch.zeros(C))
        self.calls, self.kept, self.table = 0, [], {"scale": 1.0}
        self.config = SimpleNamespace(residual=True)

    def body(self, x: Tensor) -> Tensor:
        return self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x) + x)


TABLE = {"scale": 1.0}
LOG: list[int] = []


class StoresAMap(Block):
    def forward(self, x: Tensor) -> Tensor:
        out = self.body(x)
        self.features = out
        return F.relu(out + x)


class Counts(Block):
    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return F.relu(self.body(x) + x)


class Appends(Block):
    def forward(self, x: Tensor) -> Tensor:
        self.kept.append(x.shape)
        return F.relu(self.body(x) + x)


class AppendsToAGlobal(Block):
    def forward(self, x: Tensor) -> Tensor:
        LOG.append(1)
        return F.relu(self.body(x) + x)


class UpdatesABuffer(Block):
    def forward(self, x: Tensor) -> Tensor:
        out = self.body(x)
        with torch.no_grad():
            self.average.mul_(0.9).add_(out.mean((0, 2, 3)), alpha=0.1)
        return F.relu(out + x)


class UpdatesABufferOutside(Block):
    def forward(self, x: Tensor) -> Tensor:
        self.average.add_(1)
        return F.relu(self.body(x) + x)


class WithoutGradient(Block):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(out)) + x)


class Decorated(Block):
    @torch.no_grad()
    def frozen(self, x: Tensor) -> Tensor:
        return F.relu(self.bn1(self.conv1(x)))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn2(self.conv2(self.frozen(x))) + x)


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


class AsksForGradients(Block):
    def forward(self, x: Tensor) -> Tensor:
        out = self.body(x)
        if torch.is_grad_enabled():
            out = out * 2
        return F.relu(out + x)


class AsksForTheMapsGradient(Block):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x) + x) if x.requires_grad else x


class ReadsADict(Block):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x) * self.table["scale"] + x)


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
    StoresAMap: "stores self.features", Counts: "stores self.calls", Appends: "reads kept", AppendsToAGlobal: "reads LOG",
    UpdatesABuffer: "with torch.no_grad()", UpdatesABufferOutside: ".add_ of a", WithoutGradient: "with torch.no_grad()",
    Decorated: "Decorated.frozen", UnderAutocast: "torch.autocast", DrawsFromTorch: "calls rand",
    DrawsFromPython: "random", AsksForGradients: "is_grad_enabled", AsksForTheMapsGradient: ".requires_grad",
    ReadsADict: "reads table", ReadsAGlobalDict: "reads TABLE", ReadsANamespace: "reads config", Prints: "print",
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


# ---- what is read may change later --------------------------------------------------------------------------------------

SCALE = 0.5
NAMES = SimpleNamespace()


def rectified(x: Tensor) -> Tensor:
    return F.relu(x)


class OfAGlobal(Block):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x) * SCALE + x)


class OfAClass(Block):
    scale = 0.5

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x) * self.scale + x)


class OfAnAttribute(Block):
    def __init__(self) -> None:
        super().__init__()
        self.scale, self.act = 0.5, rectified

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.body(x) * self.scale + x)


class OfAFunction(Block):
    def forward(self, x: Tensor) -> Tensor:
        return rectified(self.body(x) + x)


class OfAnAbsence(Block):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x) + (self.shortcut(x) if hasattr(self, "shortcut") else x))


def with_a_closure() -> tuple[nn.Module, Callable[[float], None]]:
    scale = 0.5

    class OfAClosure(Block):
        def forward(self, x: Tensor) -> Tensor:
            return F.relu(self.body(x) * scale + x)

    def change(to: float) -> None:
        nonlocal scale
        scale = to

    return OfAClosure(), change


def change_global(monkeypatch, *models):
    monkeypatch.setitem(globals(), "SCALE", 2.0)


def change_class(monkeypatch, *models):
    monkeypatch.setattr(OfAClass, "scale", 2.0)


def change_attribute(monkeypatch, *models):
    for model in models:
        model.scale = 2.0


def change_held_function(monkeypatch, *models):
    for model in models:
        model.act = torch.tanh


def change_function(monkeypatch, *models):
    monkeypatch.setitem(globals(), "rectified", torch.tanh)


def change_code(monkeypatch, *models):
    monkeypatch.setattr(rectified, "__code__", (lambda x: torch.tanh(x)).__code__)


def change_method(monkeypatch, *models):
    monkeypatch.setattr(Block, "body", lambda self, x: self.conv1(x))


def change_forward(monkeypatch, *models):
    monkeypatch.setattr(OfAFunction, "forward", lambda self, x: self.body(x) + x)


def add_to_the_class(monkeypatch, *models):
    monkeypatch.setattr(OfAnAbsence, "shortcut", lambda self, x: 2 * x, raising=False)


def add_a_child(monkeypatch, *models):
    torch.manual_seed(5)
    child = nn.Conv2d(C, C, 1).double()
    for model in models:
        model.shortcut = copy.deepcopy(child)


def change_torch(monkeypatch, *models):
    monkeypatch.setattr(F, "relu", lambda x, inplace=False: torch.tanh(x))


CHANGES = [
    (OfAGlobal, change_global), (OfAClass, change_class), (OfAnAttribute, change_attribute), (OfAnAttribute, change_held_function),
    (OfAFunction, change_function), (OfAFunction, change_code), (OfAFunction, change_method), (OfAFunction, change_forward),
    (OfAnAbsence, add_to_the_class), (OfAnAbsence, add_a_child), (Block, change_torch),
]  # fmt: skip


@pytest.mark.parametrize("called", [True, False], ids=["called-before", "not-called"])
@pytest.mark.parametrize(("kind", "change"), CHANGES, ids=lambda value: value.__name__)
def test_a_later_change_of_what_a_forward_reads_is_noticed(kind, change, called, monkeypatch):
    model, twin = twins(kind)
    assert isinstance(twin, FusedBlock)
    if called:
        assert_equal(model, twin)
        assert state_of(twin).outcome.fused
    change(monkeypatch, model, twin)
    assert_equal(model, twin)
    assert not state_of(twin).outcome.fused


def test_a_later_change_of_a_closure_is_noticed():
    built, change = with_a_closure()
    model = built.double()
    twin = fusedres.convert(copy.deepcopy(model))
    assert isinstance(twin, FusedBlock)
    assert_equal(model, twin)
    change(2.0)
    assert_equal(model, twin)
    assert not state_of(twin).outcome.fused


def test_what_is_undone_runs_fused_again(monkeypatch):
    model, twin = twins(OfAClass)
    with monkeypatch.context() as patched:
        patched.setattr(OfAClass, "scale", 2.0)
        assert_equal(model, twin)
    assert_equal(model, twin)
    assert state_of(twin).outcome.fused


# ---- code that was replaced from outside --------------------------------------------------------------------------------


def mirrored(self: nn.Module, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A convolution of another padding, as those who make tiles put it into every convolution."""
    padded = F.pad(x, self._reversed_padding_repeated_twice, mode="circular")
    return F.conv2d(padded, weight, bias, self.stride, 0, self.dilation, self.groups)


def doubled_norm(self: nn.Module, x: Tensor) -> Tensor:
    return 2 * F.batch_norm(x, None, None, self.weight, self.bias, True, 0.0, self.eps)


def patch_class(cls: type, name: str, function: Callable) -> Callable:
    def patch(monkeypatch, *models: nn.Module) -> None:
        monkeypatch.setattr(cls, name, function)

    return patch


def patch_convolutions(monkeypatch, *models: nn.Module) -> None:
    for model in models:
        for module in [m for m in model.modules() if isinstance(m, nn.Conv2d)]:
            module._conv_forward = mirrored.__get__(module)


def patch_instances(kind: type[nn.Module], function: Callable) -> Callable:
    def patch(monkeypatch, *models: nn.Module) -> None:
        for model in models:
            for module in [m for m in model.modules() if isinstance(m, kind)]:
                module.forward = function.__get__(module)

    return patch


resnet, densenet = torchvision.models.resnet, torchvision.models.densenet


def without_act(self: nn.Module, x: Tensor) -> Tensor:
    out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
    return out + (x if self.downsample is None else self.downsample(x))


def without_pool(self: nn.Module, x: Tensor) -> Tensor:
    x = self.layer2(self.layer1(self.relu(self.bn1(self.conv1(x)))))
    return self.fc(torch.flatten(self.avgpool(self.layer4(self.layer3(x))), 1))


def with_gelu(self: nn.Module, x: Tensor) -> Tensor:
    out = F.gelu(self.features(x))
    return self.classifier(torch.flatten(F.adaptive_avg_pool2d(out, (1, 1)), 1))


def twice(self: nn.Module, init_features: Tensor) -> Tensor:
    features = [init_features]
    for layer in self.values():
        features.append(2 * layer(features))
    return torch.cat(features, 1)


def half(self: nn.Module, x: list[Tensor] | Tensor) -> Tensor:
    seen = x if isinstance(x, Tensor) else torch.cat(x, 1)
    return 0.5 * self.conv2(self.relu2(self.norm2(self.conv1(self.relu1(self.norm1(seen))))))


def small_resnet() -> nn.Module:
    return resnet.ResNet(resnet.BasicBlock, [1, 1, 1, 1], num_classes=3)


def small_densenet() -> nn.Module:
    return densenet.DenseNet(4, (2, 2), 8, num_classes=3)


PATCHES: dict[str, tuple[Callable[[], nn.Module], Callable]] = {
    "BasicBlock.forward": (small_resnet, patch_class(resnet.BasicBlock, "forward", without_act)),
    "ResNet._forward_impl": (small_resnet, patch_class(resnet.ResNet, "_forward_impl", without_pool)),
    "ResNet.forward": (small_resnet, patch_class(resnet.ResNet, "forward", without_pool)),
    "DenseNet.forward": (small_densenet, patch_class(densenet.DenseNet, "forward", with_gelu)),
    "_DenseBlock.forward": (small_densenet, patch_class(densenet._DenseBlock, "forward", twice)),
    "_DenseLayer.forward": (small_densenet, patch_class(densenet._DenseLayer, "forward", half)),
    "Conv2d._conv_forward": (small_resnet, patch_class(nn.Conv2d, "_conv_forward", mirrored)),
    "Conv2d.forward": (small_densenet, patch_class(nn.Conv2d, "forward", lambda s, x: mirrored(s, x, s.weight, s.bias))),
    "BatchNorm2d.forward": (small_resnet, patch_class(nn.BatchNorm2d, "forward", doubled_norm)),
    "ReLU.forward": (small_resnet, patch_class(nn.ReLU, "forward", lambda s, x: torch.tanh(x))),
    "MaxPool2d.forward": (small_resnet, patch_class(nn.MaxPool2d, "forward", lambda s, x: F.max_pool2d(x, 2))),
    "convolutions' _conv_forward": (small_resnet, patch_convolutions),
    "convolutions' forward": (small_densenet, patch_instances(nn.Conv2d, lambda s, x: mirrored(s, x, s.weight, s.bias))),
    "norms' forward": (small_resnet, patch_instances(nn.BatchNorm2d, doubled_norm)),
    "blocks' forward": (small_resnet, patch_instances(resnet.BasicBlock, without_act)),
    "activations' forward": (small_resnet, patch_instances(nn.ReLU, lambda s, x: torch.tanh(x))),
    "batch_norm itself": (
        small_resnet, patch_class(F, "batch_norm", lambda x, m, v, w, b, training, *rest: 0.5 * x)
    ),
}  # fmt: skip


@pytest.mark.parametrize("when", ["before", "after", "after-a-call"])
@pytest.mark.parametrize("name", PATCHES)
def test_code_that_was_replaced_is_what_runs(name, when, monkeypatch):
    build, patch = PATCHES[name]
    torch.manual_seed(0)
    model = build().double()
    twin = copy.deepcopy(model)
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    if when != "before":
        fusedres.convert(twin)
        assert converted(twin)
    if when == "after-a-call":
        model(x), twin(x)
    patch(monkeypatch, model, twin)
    if when == "before":
        fusedres.convert(twin)
    for training in (True, False):
        model.train(training), twin.train(training)
        wanted, found = step(model, x), step(twin, x)
        for key, value in wanted.items():
            torch.testing.assert_close(found[key], value, rtol=1e-7, atol=1e-9, msg=lambda m, n=key: f"{n}: {m}")


def test_the_forward_of_a_patched_class_is_what_is_fused(monkeypatch):
    monkeypatch.setattr(resnet.BasicBlock, "forward", without_act)
    model = fusedres.convert(small_resnet().double())
    assert isinstance(model.layer1[0], FusedBlock)
    model(torch.randn(2, 3, 32, 32, dtype=torch.float64))
    assert state_of(model.layer1[0]).outcome.fused


# ---- converting does nothing ---------------------------------------------------------------------------------------------


def contents(model: nn.Module) -> list[object]:
    """Everything that the modules of ``model`` hold but for what says that they are fused."""
    found: list[object] = []
    for module in model.modules():
        for name, value in module.__dict__.items():
            if name != "_fusedres":
                found += [name, *(value.items() if isinstance(value, dict) else [value])]
    return found


@pytest.mark.parametrize("kind", [*HIDDEN, Block, OfAClass], ids=lambda kind: kind.__name__)
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
